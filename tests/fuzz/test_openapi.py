"""Requests that schemathesis makes of /openapi.json, with every kind of API key: none fails in the server.

Good requests beside them have the right answers, and nothing is left of any request.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from fuzz.test_public_api import Public, StartKept, answered_right, settled
from preft.core.settings import MiB
from support.api_keys import bearer, write_keys
from support.fuzzing import INPUTS, TAKEN, told
from support.local_cluster import local_cluster
from support.models import make_lora, make_model
from support.redis_server import free_port

pytestmark = pytest.mark.timeout(3600)

BODIES, QUICK = 10_000, 150  # beside some requests without a body
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
KEYS: dict[str, dict[str, Any]] = {
    "operator": {"admin": True},
    "admin": {"tenant": "acme", "admin": True},
    "user": {"tenant": "acme"},
    "narrow": {"tenant": "acme", "adapters": ["bob"]},
}
MODELS = ["", "model", "alice", "bob"]  # put into bodies; "" leaves the generated name, which nobody knows
NO_KEYS: list[dict[str, str]] = [{}, {"authorization": "Bearer preft-wrong"}]


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Public]:
    folder = tmp_path_factory.mktemp("openapi")
    model = make_model(folder / "model", max_position_embeddings=64)
    keys = write_keys(folder / "keys.yaml", **KEYS)
    start, port = StartKept(), free_port()
    with local_cluster(
        model,
        folder / "state",
        start_engine=start,
        prefill={"staging_bytes": MiB},
        decode={"staging_bytes": MiB},
        grpc_port=port,
        adapter_sources=[str(folder)],
        api_keys=str(keys),
    ) as cluster:
        public = Public(cluster, start, folder, port)
        for number, name in enumerate(("alice", "bob")):
            make_lora(folder / name, model, seed=number)
            public.digests[name] = public.add(name)
        yield public


@contextmanager
def good_requests(public: Public) -> Iterator[None]:
    """Asks good requests all the time, from a thread. Raises the first wrong answer's error at the end."""
    done = threading.Event()
    failures: list[BaseException] = []

    async def ask() -> None:
        limits = {"timeout": 60, "trust_env": False, "headers": bearer("operator")}
        async with httpx.AsyncClient(base_url=public.cluster.url, **limits) as client:
            while not done.is_set():
                await answered_right(public, client)
                await asyncio.sleep(0.2)

    def run() -> None:
        try:
            asyncio.run(ask())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if failures:
        raise failures[0]


def fuzz(public: Public, session: requests.Session, operation: Any, mode: GenerationMode, examples: int) -> None:
    """Sends so many of an operation's requests, with all keys and with none in turn."""
    keys = [*map(bearer, KEYS), *NO_KEYS]

    @seed(7)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode), st.sampled_from(keys), st.sampled_from(MODELS))
    def send(case: Any, headers: dict[str, str], model: str) -> None:
        INPUTS["OpenAPI"] += 1
        if model and isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = model
        with told((case.method, case.formatted_path, case.query, case.body, headers)):
            response = case.call(base_url=public.cluster.url, session=session, headers=headers, timeout=60)
            if response.status_code < 400:
                TAKEN["OpenAPI"] += 1
            if headers in NO_KEYS and case.path.startswith("/v1"):
                assert response.status_code in (400, 401)
            case.validate_response(response, checks=CHECKS)

    send()


@pytest.mark.parametrize("bodies", [QUICK, pytest.param(BODIES, marks=pytest.mark.long)])
def test_no_request_fails_in_the_server(public: Public, bodies: int) -> None:
    schema = schemathesis.openapi.from_url(f"{public.cluster.url}/openapi.json", timeout=60)
    operations = [result.ok() for result in schema.get_all_operations()]
    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    share = -(-bodies // (len(modes) * sum(bool(operation.body) for operation in operations)))

    def fuzz_all(with_body: int, without_body: int) -> None:
        with good_requests(public), requests.Session() as session:
            for operation in operations:
                for mode in modes:
                    fuzz(public, session, operation, mode, with_body if operation.body else without_body)

    fuzz_all(2, 1)
    before = public.held()
    fuzz_all(share, 4)
    assert settled(public, before), (before, public.held())

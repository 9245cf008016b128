"""Tenants of two gateways with one Redis: equal names, limits, changes of the keys, and records, over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from preft.cli.packing import Package
from preft.cluster.gateway_process import RunningGateway
from preft.core.cluster import Role
from preft.core.request import Sampling
from preft.rpc import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from preft.state import redis_limits
from support.api_keys import bearer, write_keys
from support.fake_engine import tokens_of
from support.machines import PROMPT, Machines
from support.models import make_lora, make_model
from support.redis_server import RedisServer, free_port
from support.worker_servers import StartFake

pytestmark = pytest.mark.timeout(180)

KEYS: dict[str, dict[str, Any]] = {
    "acme": {"tenant": "acme", "admin": True},
    "other": {"tenant": "other", "admin": True},
    "rpm": {"tenant": "limited", "requests_per_minute": 4},
    "tpm": {"tenant": "limited", "tokens_per_minute": 4 * (len(PROMPT) + 3)},
    "running": {"tenant": "limited", "concurrent_requests": 2},
    "small": {"tenant": "small", "admin": True, "adapter_bytes": 1},
}


class Pair:
    """Two gateways with their workers. `engine` is the decode worker's."""

    def __init__(self, machines: Machines, keys: Path) -> None:
        self.machines = machines
        self.keys = keys
        self.gateways: list[RunningGateway] = []
        self.ends: list[Callable[[], Any]] = []
        self.grpc_ports = [free_port(), free_port()]
        self.starts = {Role.PREFILL: StartFake(), Role.DECODE: StartFake()}

    async def start(self) -> None:
        for role, start in self.starts.items():
            await self.machines.worker(role.value, role, start)
        for number, port in enumerate(self.grpc_ports):
            own = {"api_keys": str(self.keys), "usage_log": str(self.log(number)), "grpc_port": port}
            gateway, end = await self.machines.gateway(f"gateway-{number}", **own)
            self.gateways.append(gateway)
            self.ends.append(end)
        await self.machines.ready(*self.gateways, workers=1)

    def log(self, number: int) -> Path:
        return self.machines.root / f"usage-{number}.jsonl"

    async def records(self) -> list[dict[str, Any]]:
        """All lines of both logs, after the gateways' end."""
        for end in self.ends:
            await end()
        return [json.loads(line) for number in (0, 1) for line in self.log(number).read_text().splitlines()]

    def url(self, number: int, path: str) -> str:
        return f"http://{self.gateways[number].address}{path}"

    async def ask(self, number: int, name: str, key: str) -> httpx.Response:
        return await self.machines.ask(self.gateways[number], name, **bearer(key))

    async def upload(self, number: int, name: str, folder: Path, key: str) -> httpx.Response:
        headers = {"content-type": "application/octet-stream", **bearer(key)}
        content = b"".join(Package.of(folder))
        return await self.machines.client.put(
            self.url(number, f"/v1/adapters/{name}?replace=true"), content=content, headers=headers
        )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model", max_position_embeddings=128)


@pytest.fixture
async def pair(
    tmp_path: Path, model: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Pair]:
    monkeypatch.setattr(redis_limits, "LIMIT_SECONDS", 10.0)  # no slow moment of the machine counts as Redis' absence
    async with AsyncExitStack() as stack:
        machines = Machines(tmp_path, model, redis_server.url(), stack)
        pair = Pair(machines, write_keys(tmp_path / "keys.yaml", **KEYS))
        await pair.start()
        yield pair
        await machines.client.aclose()


async def test_equal_names_of_two_tenants_answer_for_themselves(pair: Pair, model: Path) -> None:
    folders = [make_lora(pair.machines.root / f"ann-{seed}", model, rank=4, seed=seed) for seed in (1, 2)]
    digests = {}
    for key, folder in zip(("acme", "other"), folders, strict=True):
        added = await pair.upload(0, "ann", folder, key)
        assert added.status_code == 200, added.text
        digests[key] = added.json()["digest"]
    await pair.machines.until_known(pair.gateways[1], "@other/ann")
    assert digests["acme"] != digests["other"]
    sampling = Sampling(max_tokens=3, temperature=0.0, ignore_eos=True)
    for number in (0, 1):
        for key, digest in digests.items():
            reply = await pair.ask(number, "ann", key)
            assert reply.json()["choices"][0]["token_ids"] == tokens_of(digest, PROMPT, sampling)
            assert (await pair.ask(number, f"ann@{digest}", key)).status_code == 200
        wrong = await pair.ask(number, f"ann@{digests['other']}", "acme")
        assert wrong.status_code == 404
    removed = await pair.machines.client.delete(pair.url(1, "/v1/adapters/ann"), headers=bearer("acme"))
    assert removed.status_code == 200
    async with asyncio.timeout(20):
        while (await pair.ask(0, "ann", "acme")).status_code != 404:
            await asyncio.sleep(0.05)
    assert (await pair.ask(0, "ann", "other")).status_code == 200
    salts = {
        request.salt for start in pair.starts.values() for one in start.engines.values() for request in one.requests
    }
    assert {salt.partition(":")[0] for salt in salts} == {"acme", "other"}


async def test_no_tenant_sees_what_others_have_asked(pair: Pair) -> None:
    """Neither in the usage, nor in the time to the first token: prefix caches are salted by tenant."""

    async def cached(number: int, key: str) -> int:
        body = {"model": "model", "prompt": list(range(5, 45)), "max_tokens": 2, "temperature": 0}
        reply = await pair.machines.client.post(pair.url(number, "/v1/completions"), json=body, headers=bearer(key))
        return int(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert [await cached(0, key) for key in ("acme", "other", "acme", "other")] == [0, 0, 36, 36]
    assert [await cached(1, key) for key in ("acme", "small")] == [36, 0]


async def test_names_dont_leak_over_either_protocol(pair: Pair, model: Path) -> None:
    added = await pair.upload(0, "secret", make_lora(pair.machines.root / "s", model, rank=4, seed=3), "other")
    digest = added.json()["digest"]
    await pair.machines.until_known(pair.gateways[1], "@other/secret")
    for number in (0, 1):
        hidden, missing = [
            (await pair.ask(number, name, "acme")).text.replace(name, "NAME") for name in ("secret", "absent")
        ]
        assert hidden == missing
        for path in "/v1/models", "/v1/adapters?search=secret", "/v1/adapters/secret":
            reply = await pair.machines.client.get(pair.url(number, path), headers=bearer("acme"))
            assert digest not in reply.text
            assert "@other" not in reply.text
        async with grpc.aio.insecure_channel(f"127.0.0.1:{pair.grpc_ports[number]}") as channel:
            adapters, metadata = adapters_pb2_grpc.AdaptersStub(channel), tuple(bearer("acme").items())
            assert not (await adapters.List(adapters_pb2.ListAdaptersRequest(), metadata=metadata)).adapters
            inference = inference_pb2_grpc.InferenceStub(channel)
            statuses = []
            for name in "secret", "absent":
                get = adapters.Get(adapters_pb2.GetAdapterRequest(name=name), metadata=metadata)
                generate = inference.Generate(inference_pb2.GenerateRequest(model=name, text="hi"), metadata=metadata)
                for call in get, generate:
                    statuses.append((await call.code(), (await call.details()).replace(name, "NAME")))
            assert statuses[:2] == statuses[2:]
            assert {code for code, _ in statuses} == {grpc.StatusCode.NOT_FOUND}
            nobody = adapters.List(adapters_pb2.ListAdaptersRequest())
            assert await nobody.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_limits_per_minute_hold_over_both(pair: Pair) -> None:
    for key in "rpm", "tpm":
        replies = await asyncio.gather(*(pair.ask(number, "model", key) for number in (0, 1) for _ in range(10)))
        statuses = [reply.status_code for reply in replies]
        assert set(statuses) == {200, 429}
        assert 4 <= statuses.count(200) <= 5, key  # one more after 15 s, on a slow machine
        refused = next(reply for reply in replies if reply.status_code == 429)
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        left = {reply.headers[f"x-ratelimit-remaining-{'requests' if key == 'rpm' else 'tokens'}"] for reply in replies}
        assert "0" in left
    assert (await pair.ask(1, "model", "acme")).status_code == 200


async def test_running_requests_are_limited_over_both(pair: Pair) -> None:
    engine = pair.starts[Role.DECODE].engines[Role.DECODE]
    engine.going.clear()
    asked = [asyncio.create_task(pair.ask(number, "model", "running")) for number in (0, 1) for _ in range(4)]
    async with asyncio.timeout(60):
        while sum(task.done() for task in asked) < 6:
            await asyncio.sleep(0.02)
    assert {task.result().status_code for task in asked if task.done()} == {429}
    engine.going.set()
    assert sorted([reply.status_code for reply in await asyncio.gather(*asked)]) == [200] * 2 + [429] * 6
    async with asyncio.timeout(60):
        while (await pair.ask(1, "model", "running")).status_code != 200:
            await asyncio.sleep(0.02)


async def test_without_redis_each_gateway_counts_alone(
    pair: Pair, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_limits, "LIMIT_SECONDS", 0.5)
    redis_server.kill()
    for number in (0, 1):
        replies = [await pair.ask(number, "model", "rpm") for _ in range(8)]
        statuses = [reply.status_code for reply in replies]
        assert set(statuses) == {200, 429}
        assert 4 <= statuses.count(200) <= 5
    redis_server.start()


async def test_a_tenants_bytes_are_limited(pair: Pair, model: Path) -> None:
    refused = await pair.upload(1, "ann", make_lora(pair.machines.root / "a", model, rank=4, seed=1), "small")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "too_many_adapter_bytes")
    assert pair.gateways[1].catalog.get("@small/ann") is None


async def test_a_change_of_the_keys_reaches_both(pair: Pair) -> None:
    async def become(key: str, status: int) -> None:
        async with asyncio.timeout(60):
            for number in (0, 1):
                while (await pair.ask(number, "model", key)).status_code != status:
                    await asyncio.sleep(0.05)

    await become("acme", 200)
    await become("new", 401)
    write_keys(pair.keys, new={"tenant": "new"}, other=KEYS["other"])
    await become("new", 200)
    await become("acme", 401)
    pair.keys.write_text("new: {")
    await asyncio.sleep(2.5)  # two looks at the file
    await become("new", 200)
    write_keys(pair.keys, other=KEYS["other"])
    await become("new", 401)
    await become("other", 200)


async def test_each_request_has_one_record_whatever_its_client_does(pair: Pair) -> None:
    """Half of the clients leave in the middle."""
    engine = pair.starts[Role.DECODE].engines[Role.DECODE]
    engine.going.clear()
    body: dict[str, Any] = {"model": "model", "prompt": PROMPT, "max_tokens": 5, "ignore_eos": True, "stream": True}

    async def begin(number: int, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        content = json.dumps({**body, "request_id": name}).encode()
        host, _, port = pair.gateways[number].address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: {bearer('acme')['authorization']}"
        head += f"\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\nconnection: close\r\n\r\n"
        writer.write(head.encode() + content)
        assert b"200 OK" in await reader.readline()
        return reader, writer

    began = {f"{number}-{i}": await begin(number, f"{number}-{i}") for number in (0, 1) for i in range(6)}
    for name, (_, writer) in began.items():
        if name.endswith(("0", "2", "4")):
            writer.close()
    async with asyncio.timeout(60):
        while sum(len(pair.log(number).read_text().splitlines()) for number in (0, 1)) < 6:
            await asyncio.sleep(0.02)
    engine.going.set()
    for name, (reader, writer) in began.items():
        if not name.endswith(("0", "2", "4")):
            assert b"[DONE]" in await reader.read()
            writer.close()
    records = {record["request_id"]: record for record in await pair.records()}
    assert set(records) == {f"cmpl-{name}" for name in began}
    for name, record in records.items():
        assert (record["tenant"], record["key"], record["adapter"], record["prompt_tokens"]) == ("acme", "acme", "", 3)
        if name.endswith(("0", "2", "4")):
            assert (record["status"], record["code"], record["generated_tokens"]) == (499, "cancelled", 1)
        else:
            assert (record["status"], record["code"], record["generated_tokens"]) == (200, "ok", 5)

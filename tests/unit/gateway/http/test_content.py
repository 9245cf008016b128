"""Bodies as clients send them: types, charsets, a byte order mark, gzip; and gzip that grows without end."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from preft.core.request import FinishReason
from preft.gateway.deps import GatewayDeps
from preft.gateway.http.app import create_app
from preft.gateway.http.content import ARCHIVE_TYPES
from support.fakes import FakeCatalog, FakeGenerator, Script

LIMIT = 1 << 20
BODY = json.dumps({"model": "base", "prompt": "hé"}, ensure_ascii=False).encode()
JSON = {"content-type": "application/json"}
GZIP = JSON | {"content-encoding": "gzip"}


@pytest.fixture
async def served(tokenizer) -> AsyncIterator[SimpleNamespace]:
    state = SimpleNamespace(catalog=FakeCatalog.of(ann="/adapters/ann"))
    state.generator = FakeGenerator(lambda request: Script((70, 71), finish=FinishReason.LENGTH))
    deps = GatewayDeps("base", tokenizer, 64, state.generator, state.catalog, max_body_bytes=LIMIT)
    transport = httpx.ASGITransport(create_app(deps))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as state.client:
        yield state


async def complete(served: SimpleNamespace, content: bytes, headers: Any) -> httpx.Response:
    return await served.client.post("/v1/completions", content=content, headers=headers)


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    return response.json()["error"]


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (BODY, JSON),
        (BODY, {"content-type": "Application/JSON ; Charset=UTF-8"}),
        (BODY, {"content-type": 'application/json;charset="utf-8"'}),
        (BODY, {"content-type": "application/json; charset=utf8; profile=x"}),
        (BODY, JSON | {"content-encoding": "identity"}),
        (b"\xef\xbb\xbf" + BODY, JSON),
        (gzip.compress(BODY), GZIP),
        (gzip.compress(BODY), JSON | {"content-encoding": "X-GZIP"}),
        (gzip.compress(b"\xef\xbb\xbf" + BODY), GZIP),
        (gzip.compress(BODY[:10]) + gzip.compress(BODY[10:]), GZIP),
    ],
)
async def test_one_body_in_many_forms(served, content, headers):
    assert (await complete(served, content, headers)).status_code == 200
    assert served.generator.requests[0].prompt_token_ids == served.generator.requests[-1].prompt_token_ids


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": ""},
        {"content-type": "text/json"},
        {"content-type": "application/jsonp"},
        {"content-type": "application/json, text/plain"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "application/json; charset=latin-1"},
        [("content-type", "application/json"), ("content-type", "text/plain")],
        *(
            JSON | {"content-encoding": encoding}
            for encoding in ("br", "deflate", "zstd", "gzip, gzip", "gzip,br", "x")
        ),
        [*GZIP.items(), ("content-encoding", "gzip")],
    ],
)
async def test_types_and_encodings_that_are_not_understood(served, headers):
    found = error(await complete(served, BODY, headers), 415)
    assert (found["type"], found["code"]) == ("invalid_request_error", "unsupported_media_type")
    assert served.generator.requests == []


async def test_a_refused_encoding_says_which_one_would_do(served):
    response = await complete(served, BODY, JSON | {"content-encoding": "br"})
    assert response.headers["accept-encoding"] == "gzip"


@pytest.mark.parametrize(
    "content", [b"", BODY, gzip.compress(BODY)[:-1], gzip.compress(BODY)[:-8] + b"\0" * 8, gzip.compress(BODY) + b"x"]
)
async def test_broken_gzip(served, content):
    assert error(await complete(served, content, GZIP), 400)["code"] == "invalid_request"


async def test_gzip_that_grows_takes_no_memory(served):
    bomb = gzip.compress(b" " * (64 << 20), 1)
    assert len(bomb) < LIMIT
    tracemalloc.start()
    try:
        found = error(await complete(served, bomb, GZIP), 413)
        assert tracemalloc.get_traced_memory()[1] < 16 * LIMIT
    finally:
        tracemalloc.stop()
    assert str(LIMIT) in found["message"]
    members = gzip.compress(b" " * (LIMIT // 2 + 1)) * 2
    error(await complete(served, members, GZIP), 413)
    error(await complete(served, b"x" * (LIMIT + 1), GZIP), 413)


async def test_gzip_in_many_members_takes_no_time(served):
    """Each one costs a copy of the rest."""
    assert "16" in error(await complete(served, gzip.compress(b"") * 17 + gzip.compress(BODY), GZIP), 400)["message"]
    assert (await complete(served, gzip.compress(b"") * 15 + gzip.compress(BODY), GZIP)).status_code == 200


@pytest.mark.parametrize("kind", [None, *sorted(ARCHIVE_TYPES)])
async def test_types_of_archives(served, kind):
    headers = {} if kind is None else {"content-type": kind}
    assert (await served.client.put("/v1/adapters/bob", content=b"weights", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "text/plain"},
        {"content-type": "application/json"},
        {"content-encoding": "gzip"},
    ],
)
async def test_uploads_that_are_no_archives(served, headers):
    error(await served.client.put("/v1/adapters/bob", content=b"weights", headers=headers), 415)
    assert served.catalog.get("bob") is None


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/metrics", "/v1/models", "/v1/models/ann", "/v1/adapters", "/v1/adapters/ann", "/no"]
)
@pytest.mark.parametrize("end", ["", "/", "//"])
async def test_head_is_get_without_the_body(served, path, end):
    got = await served.client.get(path)
    for response in (await served.client.head(path + end), await served.client.get(path + end)):
        assert (response.status_code, response.history) == (got.status_code, [])
        assert response.headers["content-type"] == got.headers["content-type"]
        if path != "/metrics":  # which count the requests for them
            assert int(response.headers["content-length"]) == len(got.content)
    assert (await served.client.head(path + end)).content == b""


async def test_a_body_survives_a_slash(served):
    response = await served.client.post("/v1/completions/", content=BODY, headers=JSON)
    assert (response.status_code, response.history) == (200, [])


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/completions", "OPTIONS, POST"),
        ("/v1/adapters", "GET, HEAD, OPTIONS, POST"),
        ("/v1/adapters/org/ann", "DELETE, GET, HEAD, OPTIONS, PATCH, PUT"),
        ("/health/", "GET, HEAD, OPTIONS"),
    ],
)
async def test_every_path_says_its_methods(served, path, methods):
    response = await served.client.options(path)
    assert (response.status_code, response.headers["allow"], response.content) == (204, methods, b"")
    refused = await served.client.request("TRACE", path)
    assert (error(refused, 405)["code"], refused.headers["allow"]) == ("method_not_allowed", methods)
    error(await served.client.options("/nowhere"), 404)


async def test_the_count_of_a_head_is_that_of_its_route(served):
    await served.client.head("/v1/models/")
    text = (await served.client.get("/metrics")).text
    assert 'preft_http_responses_total{route="/v1/models",status="200"} 1.0' in text

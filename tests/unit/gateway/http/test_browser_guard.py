"""What a browser sends for pages of other sites, and what such a page gets: nothing, unless its origin is allowed.

The header sets are those of Chromium and Firefox for each way in which a page can send a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from preft.core.request import FinishReason
from preft.gateway.deps import GatewayDeps
from preft.gateway.http.app import create_app
from support.fakes import FakeCatalog, FakeGenerator, Script
from support.served_app import served_app

OWN = "http://localhost:8000"
EVIL = "https://evil.example"
APP = "https://app.example.com"
ADD = {"name": "ann", "source": "https://evil.example/adapter", "replace": True}
UNLOAD = '{"lora_name": "ann"}'
FORM = "application/x-www-form-urlencoded"
JSON = "application/json"


def sent_by(origin: str | None, mode: str, site: str = "cross-site", **more: str) -> dict[str, str]:
    """Headers that a browser adds by itself and no page can change."""
    headers = {"sec-fetch-mode": mode, "sec-fetch-site": site, "sec-fetch-dest": "empty", **more}
    return headers if origin is None else {"origin": origin, **headers}


@pytest.fixture
async def served(tokenizer) -> AsyncIterator[SimpleNamespace]:
    state = SimpleNamespace(catalog=FakeCatalog.of(ann="/adapters/ann"))
    state.generator = FakeGenerator(lambda request: Script((70, 71), finish=FinishReason.LENGTH))
    state.deps = GatewayDeps(
        "base", tokenizer, 64, state.generator, state.catalog, allowed_hosts=("gpu1.lan",), allowed_origins=(APP,)
    )
    state.app = create_app(state.deps)
    transport = httpx.ASGITransport(state.app)
    async with httpx.AsyncClient(transport=transport, base_url=OWN) as state.client:
        yield state
    if state.changed is False:
        assert state.catalog.get("ann").source == "/adapters/ann"
        assert state.generator.requests == []


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert "access-control-allow-origin" not in response.headers
    return response.json()["error"]


@pytest.mark.parametrize(
    "origin",
    [
        EVIL,
        "null",
        "http://localhost:3000",
        "http://localhost",
        "https://app.example.com.evil.example",
        "http://app.example.com",
    ],
)
@pytest.mark.parametrize("kind", ["text/plain;charset=UTF-8", FORM, "multipart/form-data; boundary=x", JSON, None])
@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/unload_lora_adapter", UNLOAD), ("/v1/adapters", '{"name": "ann", "source": "/evil", "replace": true}'),
     ("/v1/completions", '{"model": "base", "prompt": "hi"}')],
)  # fmt: skip
async def test_a_page_of_another_origin_changes_nothing(served, origin, kind, path, body):
    """fetch() with each type that needs no preflight, a beacon without a type, and JSON, as after a preflight."""
    served.changed = False
    site = "same-site" if "localhost" in origin else "cross-site"
    headers = sent_by(origin, "cors", site) | ({} if kind is None else {"content-type": kind})
    response = await served.client.post(path, content=body, headers=headers)
    assert error(response, 403)["code"] == "origin_not_allowed"
    assert "allowed_origins" in response.json()["error"]["message"]


@pytest.mark.parametrize("kind", [FORM, "text/plain", "multipart/form-data; boundary=x", None])
@pytest.mark.parametrize(
    "path",
    ["/v1/unload_lora_adapter", "/v1/load_lora_adapter", "/v1/adapters", "/v1/completions", "/v1/chat/completions"],
)
async def test_what_a_form_can_send_is_no_request_even_without_an_origin(served, path, kind):
    """Old browsers leave Origin out of forms, and privacy tools strip it."""
    served.changed = False
    headers = {} if kind is None else {"content-type": kind}
    found = error(await served.client.post(path, content=UNLOAD, headers=headers), 415)
    assert found["code"] == "unsupported_media_type"
    assert "application/json" in found["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/unload_lora_adapter"),
        ("DELETE", "/v1/adapters/ann"),
        ("PATCH", "/v1/adapters/ann"),
        ("PUT", "/v1/adapters/ann"),
    ],
)
@pytest.mark.parametrize("site", ["cross-site", "same-site"])
async def test_a_request_that_tells_only_how_near_its_page_is_changes_nothing(served, method, path, site):
    served.changed = False
    headers = sent_by(None, "navigate", site) | {"content-type": JSON}
    error(await served.client.request(method, path, content=UNLOAD, headers=headers), 403)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
async def test_a_preflight_of_another_origin_is_refused(served, method):
    served.changed = False
    headers = sent_by(EVIL, "cors") | {
        "access-control-request-method": method,
        "access-control-request-headers": "content-type",
    }
    error(await served.client.options("/v1/adapters/ann", headers=headers), 403)


@pytest.mark.parametrize("host", ["evil.example:8000", "evil.example", "localhost.evil.example:8000"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/v1/adapters"),
        ("GET", "/metrics"),
        ("POST", "/v1/unload_lora_adapter"),
        ("DELETE", "/v1/adapters/ann"),
        ("GET", "/nowhere"),
    ],
)
async def test_a_page_whose_name_was_resolved_to_this_server_gets_nothing(served, host, method, path):
    """DNS rebinding: for the browser, page and server have one origin, so GET has no Origin and JSON no preflight."""
    served.changed = False
    headers = sent_by(None if method == "GET" else f"http://{host}", "cors", "same-origin", host=host)
    content = None if method == "GET" else UNLOAD
    response = await served.client.request(method, path, headers=headers | {"content-type": JSON}, content=content)
    found = error(response, 400)
    assert (found["code"], "allowed_hosts" in found["message"]) == ("host_not_allowed", True)


@pytest.mark.parametrize("head", [b"", b"Host: localhost\r\nHost: evil.example\r\n", b"Host:\r\n"])
async def test_a_request_has_exactly_one_host(served, head):
    served.changed = False
    assert b" 400 " in await raw(served, b"GET /v1/models HTTP/1.1\r\n" + head + b"Connection: close\r\n\r\n")


async def test_a_load_balancer_may_speak_http_1_0(served):
    served.changed = False
    assert b" 200 " in await raw(served, b"GET /health HTTP/1.0\r\n\r\n")


async def test_two_origins_are_none(served):
    served.changed = False
    for origins in ((APP, EVIL), (OWN, EVIL), (APP, APP)):
        headers = [("origin", origin) for origin in origins] + [("content-type", JSON)]
        error(await served.client.post("/v1/unload_lora_adapter", content=UNLOAD, headers=headers), 403)


@pytest.mark.parametrize("origin", [None, OWN])
async def test_clients_and_the_servers_own_pages_are_served(served, origin):
    served.changed = True
    headers = {} if origin is None else sent_by(origin, "cors", "same-origin")
    response = await served.client.post("/v1/completions", json={"model": "ann", "prompt": "hi"}, headers=headers)
    assert response.status_code == 200
    assert "access-control-allow-origin" not in response.headers
    assert (await served.client.delete("/v1/adapters/ann", headers=headers)).status_code == 200


async def test_a_person_may_follow_a_link_to_what_changes_nothing(served):
    served.changed = False
    assert (await served.client.get("/health", headers=sent_by(None, "navigate"))).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:1", "[::1]:8000", "LOCALHOST", "gpu1.lan", "gpu1.lan:443"])
async def test_the_servers_own_names(served, host):
    served.changed = False
    assert (await served.client.get("/v1/models", headers={"host": host})).status_code == 200


@pytest.mark.parametrize("origin", [APP, "https://app.example.com:443", "https://APP.example.com"])
async def test_a_page_of_an_allowed_origin_may_use_the_server(served, origin):
    served.changed = True
    asked = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
        "access-control-request-private-network": "true",
    }
    preflight = await served.client.options("/v1/completions", headers=sent_by(origin, "cors") | asked)
    assert (preflight.status_code, preflight.content) == (204, b"")
    allowed = {name: value for name, value in preflight.headers.items() if name.startswith("access-control-")}
    assert allowed == {
        "access-control-allow-origin": origin,
        "access-control-allow-methods": "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS",
        "access-control-allow-headers": asked["access-control-request-headers"],
        "access-control-allow-private-network": "true",
        "access-control-max-age": "600",
    }
    assert "Origin" in preflight.headers["vary"]
    body = {"model": "ann", "prompt": "hi", "stream": True}
    for path, status in ("/v1/completions", 200), ("/v1/nowhere", 404), ("/v1/adapters", 400):
        response = await served.client.post(path, json=body, headers=sent_by(origin, "cors"))
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == origin
        exposed = response.headers["access-control-expose-headers"].split(", ")
        assert {"x-request-id", "retry-after", "x-ratelimit-remaining-tokens"} < set(exposed)
        assert response.headers["vary"] == "Origin"
        assert "access-control-allow-credentials" not in response.headers


async def test_one_pages_permission_is_no_others(served):
    """Headers of a stream are made once for all streams."""
    served.changed = True
    add = ADD | {"stream": True}
    allowed = await served.client.post("/v1/adapters", json=add, headers={"origin": APP})
    assert allowed.headers["access-control-allow-origin"] == APP
    assert "access-control-allow-origin" not in (await served.client.post("/v1/adapters", json=add)).headers


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
async def test_a_page_can_read_that_the_server_failed(served, method):
    served.changed = True

    async def fail() -> None:
        raise ValueError("a bug")

    served.app.add_api_route("/v1/fails", fail, methods=["GET", "POST"])
    transport = httpx.ASGITransport(served.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url=OWN) as client:
        response = await client.request(method, "/v1/fails", headers=sent_by(APP, "cors"))
    assert response.status_code == 500
    assert response.headers["access-control-allow-origin"] == APP
    assert response.headers["vary"] == "Origin"
    if method == "HEAD":
        assert response.content == b""
    else:
        assert response.json()["error"]["code"] == "internal_error"
    labels = {"route": "/v1/fails", "status": "500"}
    assert served.deps.registry.get_sample_value("preft_http_responses_total", labels) == 1


async def test_every_origin_may_be_allowed(tokenizer):
    deps = GatewayDeps(
        "base", tokenizer, 64, FakeGenerator(lambda request: Script()), FakeCatalog(), allowed_origins=("*",)
    )
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(deps)), base_url="http://localhost"
    ) as client:
        for origin in (EVIL, "null", "not an origin"):
            response = await client.get("/v1/models", headers={"origin": origin})
            assert response.headers["access-control-allow-origin"] == origin


async def test_refusals_are_counted(served):
    served.changed = False
    await served.client.get("/v1/models", headers={"host": "evil.example"})
    labels = {"route": "unmatched", "status": "400"}
    assert served.deps.registry.get_sample_value("preft_http_responses_total", labels) == 1


async def raw(served: SimpleNamespace, data: bytes) -> bytes:
    """The whole answer to a request as it is written."""
    async with served_app(served.app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data)
        try:
            return await asyncio.wait_for(reader.read(), 10)
        finally:
            writer.close()

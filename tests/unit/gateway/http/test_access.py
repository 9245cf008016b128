"""API keys over HTTP: which routes need one, what a key shows and allows, limits, and the account of each call."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from starlette.routing import Route

from preft.core.cluster import AdapterPlace, AdapterState
from preft.core.errors import QueueFull, TransferFailed
from preft.core.limits import Limit
from preft.core.request import FinishReason
from preft.gateway.access.accounts import Accounts
from preft.gateway.access.usage import Usage
from preft.gateway.deps import GatewayDeps
from preft.gateway.http.app import create_app
from preft.state.memory_limits import MemoryLimits
from support.api_keys import access_of, bearer
from support.fakes import FakeCatalog, FakeGenerator, Script
from support.served_app import served_app

OPEN = {"/health", "/ready", "/docs", "/docs/{file}", "/openapi.json"}
OPERATORS = {("GET", "/metrics"), ("GET", "/v1/workers")}
ADMINS = {
    ("POST", "/v1/adapters"), ("PUT", "/v1/adapters/{name}"), ("PATCH", "/v1/adapters/{name}"),
    ("DELETE", "/v1/adapters/{name}"), ("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter"),
}  # fmt: skip
USERS = {
    ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/v1/models/{name}"),
    ("POST", "/v1/responses"), ("POST", "/v1/messages"), ("POST", "/v1/messages/count_tokens"),
    ("GET", "/v1/adapters"), ("GET", "/v1/adapters/{name}"), ("POST", "/tokenize"), ("POST", "/detokenize"),
    ("GET", "/version"),
}  # fmt: skip
KEYS: dict[str, dict[str, Any]] = {
    "ada": {"tenant": "acme"},
    "admin": {"tenant": "acme", "admin": True},
    "bob": {"tenant": "other"},
    "narrow": {"tenant": "acme", "adapters": ["sh*"]},
    "operator": {"admin": True},
    "requests": {"requests_per_minute": 2, "tenant": "limited"},
    "tokens": {"tokens_per_minute": 40, "tenant": "limited"},
    "running": {"concurrent_requests": 1, "tenant": "limited"},
}


class Recorded(list[Usage]):
    def record(self, usage: Usage) -> None:
        self.append(usage)


@pytest.fixture
async def served(tokenizer) -> AsyncIterator[SimpleNamespace]:
    state = SimpleNamespace(script=Script((70, 71, 72), finish=FinishReason.LENGTH), recorded=Recorded(), now=100.0)
    state.generator = FakeGenerator(lambda request: state.script)
    state.catalog = FakeCatalog()
    for name in ("shared", "plain", "@acme/own", "@other/own", "@other/secret"):
        await state.catalog.add(name, f"/source of {name}")
    state.counter = MemoryLimits(lambda: state.now)
    state.accounts = Accounts(state.counter, [state.recorded])
    places = [AdapterPlace("prefill-0", AdapterState.HOST, 2)]
    state.deps = GatewayDeps(
        "base", tokenizer, 64, state.generator, state.catalog,
        places=lambda digest: places, access=access_of(state.catalog, **KEYS), accounts=state.accounts,
    )  # fmt: skip
    state.app = create_app(state.deps)
    async with served_app(state.app) as state.port, httpx.AsyncClient() as client:
        state.url = f"http://127.0.0.1:{state.port}"

        async def ask(method: str, path: str, key: str = "", **more: Any) -> httpx.Response:
            return await client.request(method, state.url + path, headers=bearer(key) if key else {}, **more)

        async def complete(key: str, **body: Any) -> httpx.Response:
            given = {"model": "base", "prompt": "hi", "max_tokens": 3} | body
            return await ask("POST", "/v1/completions", key, json=given)

        state.ask, state.complete, state.client = ask, complete, client
        yield state
    await state.accounts.close()


async def settled(served: SimpleNamespace, calls: int) -> None:
    """Waits until so many calls have ended."""
    async with asyncio.timeout(20):
        while len(served.recorded) < calls or served.accounts.background._tasks:
            await asyncio.sleep(0.01)


def routes_of(app: Any) -> set[tuple[str, str]]:
    found = {
        (method, re.sub(r":\w+}", "}", route.path))
        for route in app.routes
        if isinstance(route, APIRoute | Route)
        for method in route.methods or ()
    }
    return {(method, path) for method, path in found if method != "HEAD"}


async def test_the_tokenizer_knows_the_models_that_a_key_may_use(served):
    for key, model, status in (
        ("narrow", "shared", 200), ("narrow", "plain", 404), ("narrow", "base", 200), ("ada", "own", 200),
        ("bob", "secret", 200), ("ada", "secret", 404), ("ada", "@other/secret", 404),
    ):  # fmt: skip
        for path, body in ("/tokenize", {"prompt": "hi"}), ("/detokenize", {"tokens": [5]}):
            reply = await served.ask("POST", path, key, json={"model": model, **body})
            assert reply.status_code == status, (key, model, reply.text)


async def test_each_route_needs_a_key_or_is_named_here(served):
    """A new route fails this test until somebody has decided who may use it."""
    all_routes = routes_of(served.app)
    assert all_routes == {("GET", path) for path in OPEN} | OPERATORS | ADMINS | USERS
    for method, path in all_routes:
        real = path.replace("{name}", "shared").replace("{file}", "swagger-ui.css")
        for headers in {}, {"authorization": "Bearer wrong"}, [("authorization", bearer("ada")["authorization"])] * 2:
            reply = await served.client.request(method, served.url + real, headers=headers)
            if path in OPEN:
                assert reply.status_code == 200, path
                continue
            assert reply.status_code == 401, (method, path)
            assert reply.headers["www-authenticate"] == "Bearer"
            error = reply.json()["error"]
            if path.startswith("/v1/messages"):
                assert error.keys() == {"type", "message"}
                assert error["type"] == "authentication_error"
                continue
            assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "invalid_api_key", None)
        for key, closed in ("ada", OPERATORS | ADMINS), ("admin", OPERATORS), ("operator", ()):
            reply = await served.ask(method, real, key, json={})
            is_closed = reply.status_code == 403 and "that needs `admin: true`" in reply.text
            assert is_closed == ((method, path) in closed), (method, path, key, reply.text)
    assert served.generator.requests == []
    assert {entry.name for entry in served.catalog.list()} >= {"plain", "@acme/own", "@other/own", "@other/secret"}
    for path in "/nowhere", "/v1/nowhere", "/healthy", "/docs_", "/health/x", "//health", "/%2e/health":
        assert (await served.ask("GET", path)).status_code == 401, path
    for method in "OPTIONS", "PATCH", "POST":
        assert (await served.ask(method, "/v1/models")).status_code == 401
    assert (await served.ask("HEAD", "/v1/models")).status_code == 401
    assert (await served.ask("HEAD", "/v1/models/", "ada")).status_code == 200


async def test_lists_show_what_a_key_may_use(served):
    own = {
        "ada": ["own", "plain", "shared"],
        "bob": ["own", "plain", "secret", "shared"],
        "narrow": ["shared"],
        "operator": ["@acme/own", "@other/own", "@other/secret", "plain", "shared"],
    }
    for key, names in own.items():
        models = (await served.ask("GET", "/v1/models", key)).json()["data"]
        assert [model["id"] for model in models] == ["base", *names]
        listed = (await served.ask("GET", "/v1/adapters?limit=100", key)).json()
        assert [entry["name"] for entry in listed["data"]] == names
        assert listed["total"] == len(names)
        for name in names:
            shown = (await served.ask("GET", f"/v1/adapters/{name}", key)).json()
            assert bool(shown["workers"]) == (key == "operator")
            assert (await served.complete(key, model=name)).status_code == 200
    digests = {(request.tenant, request.adapter.name): request.adapter.digest for request in served.generator.requests}
    assert digests["acme", "own"] == served.catalog.get("@acme/own").digest
    assert digests["other", "own"] == served.catalog.get("@other/own").digest
    assert {(request.tenant, request.cache_salt) for request in served.generator.requests} == {
        ("acme", "acme"), ("other", "other"), ("", ""),
    }  # fmt: skip


async def test_names_dont_leak(served):
    """An adapter that exists for others gets the same answers, byte for byte, as one that doesn't exist."""
    digest = served.catalog.get("@other/secret").digest
    hidden = ["secret", "secret@1", f"secret@{digest}", "@other/secret", "@other/own", "@other/secret@1"]
    missing = ["absent", "absent@1", f"absent@{digest}", "@other/absent", "@other/abc", "@other/absent@1"]
    for key, others in ("admin", ()), ("narrow", (("plain", "plane"), ("own", "ow1"))):
        for name, other in (*zip(hidden, missing, strict=True), *others):
            answers = []
            for asked in name, other:
                body = {"model": asked, "prompt": "hi"}
                chat = {"model": asked, "messages": [{"role": "user", "content": "hi"}]}
                message = {**chat, "max_tokens": 3}
                replies = [
                    await served.ask("GET", f"/v1/models/{asked}", key),
                    await served.ask("GET", f"/v1/adapters/{asked}", key),
                    await served.ask("GET", f"/v1/adapters?search={asked}", key),
                    await served.ask("POST", "/v1/completions", key, json=body),
                    await served.ask("POST", "/v1/chat/completions", key, json=chat),
                    await served.ask("POST", "/v1/responses", key, json={"model": asked, "input": "hi"}),
                    await served.ask("POST", "/v1/messages", key, json=message),
                    await served.ask("POST", "/v1/messages/count_tokens", key, json=chat),
                    await served.ask("PATCH", f"/v1/adapters/{asked}", key, json={"pinned": True}),
                    await served.ask("DELETE", f"/v1/adapters/{asked}", key),
                    await served.ask("POST", "/v1/unload_lora_adapter", key, json={"lora_name": asked}),
                ]
                statuses = [reply.status_code for reply in replies]
                expected = [403] * 3 if key == "narrow" else [404] * 3
                assert statuses == [404, 404, 200, *[404] * 5, *expected], asked
                answers.append([reply.text.replace(asked, "NAME") for reply in replies])
            assert answers[0] == answers[1]
    before = served.catalog.get("@other/secret")
    added = await served.ask("POST", "/v1/adapters", "admin", json={"name": "secret", "source": "/mine"})
    assert (added.status_code, added.json()["name"], added.json()["version"]) == (200, "secret", 1)
    upload = {"content": b"tar", "headers": bearer("admin") | {"content-type": "application/zip"}}
    put = await served.client.put(f"{served.url}/v1/adapters/up", **upload)
    assert (put.status_code, put.json()["name"]) == (200, "up")
    assert served.catalog.get("@other/secret") == before
    assert served.catalog.get("@acme/up") is not None


async def test_users_of_one_tenant_are_one_sharer(served):
    await served.complete("ada", user="someone")
    assert served.generator.requests[0].tenant == "acme"


async def test_requests_per_minute(served):
    replies = [await served.complete("requests", stream=stream) for stream in (False, True, False)]
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    for reply, left, reset in zip(replies, "100", ("30.000s", "60.000s", "60.000s"), strict=True):
        assert reply.headers["x-ratelimit-limit-requests"] == "2"
        assert reply.headers["x-ratelimit-remaining-requests"] == left
        assert reply.headers["x-ratelimit-reset-requests"] == reset
        assert "x-ratelimit-limit-tokens" not in reply.headers
    assert replies[2].headers["retry-after"] == "30"
    assert replies[2].json()["error"] == {
        "message": "Rate limit reached for the API key 'requests' on requests per min (RPM): Limit 2. "
        "Please try again in 30s.",
        "type": "requests",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    served.now += 30
    assert (await served.complete("requests")).status_code == 200
    assert (await served.complete("ada")).status_code == 200
    assert len(served.recorded) == 4  # a refused call is none


async def test_tokens_are_taken_and_settled(served):
    """The prompt has 3 tokens, and each answer 3."""
    served.script = Script((70, 71, 72), finish=FinishReason.STOP)
    reply = await served.complete("tokens", max_tokens=37)
    assert reply.headers["x-ratelimit-remaining-tokens"] == "0"
    used = reply.json()["usage"]["total_tokens"]
    await settled(served, 1)
    reply = await served.complete("tokens", max_tokens=3)
    assert reply.headers["x-ratelimit-remaining-tokens"] == str(40 - used - 6)
    refused = await served.complete("tokens", max_tokens=35)
    error = refused.json()["error"]
    assert (refused.status_code, error["type"], error["code"]) == (429, "tokens", "rate_limit_exceeded")
    too_large = await served.complete("tokens", max_tokens=38)
    assert (too_large.status_code, too_large.headers.get("x-should-retry")) == (429, "false")
    assert "retry-after" not in too_large.headers
    assert "Limit 40, Requested 41" in too_large.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_each_end_of_a_call_settles_it(served, stream):
    """After ten calls that end in each way, the limits are as before, but for the tokens that were used."""
    key, expected = "running", []
    for script, status, code, generated in (
        (Script((70, 71), finish=FinishReason.LENGTH), 200, "ok", 2),
        (Script(fail=QueueFull("full")), 429, "queue_full", 0),
        (Script((70, 71, 72), fail=TransferFailed("lost"), fail_after=2), 502, "kv_transfer_failed", 2),
        (Script((70, 71, 72), fail=RuntimeError("x"), fail_after=1), 500, "internal_error", 1),
    ):
        served.script = script
        for _ in range(10):
            expected.append((status, code, generated))
            await served.complete(key, stream=stream)
            await settled(served, len(expected))
    assert [(one.status, one.code, one.generated_tokens) for one in served.recorded] == expected
    assert served.counter._leases == {}
    assert served.accounts._leases == {}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_is_accounted_for(served, stream):
    served.script = Script((70,) * 40, delay=0.02, cached=1)
    body = {"model": "own", "prompt": "hi", "max_tokens": 40, "stream": stream, "request_id": "mine"}
    payload = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n{'authorization: ' + bearer('ada')['authorization']}"
    head += f"\r\ncontent-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
    for _ in range(5):
        _, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(head.encode() + payload)
        await writer.drain()
        done = len(served.generator.entered)
        async with asyncio.timeout(20):
            while len(served.generator.entered) == done:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        writer.close()
    await settled(served, 5)
    for one in served.recorded:
        assert (one.tenant, one.key, one.adapter, one.status, one.code) == ("acme", "ada", "own", 499, "cancelled")
        assert one.digest == served.catalog.get("@acme/own").digest
        assert one.request_id == "cmpl-mine"
        assert one.prompt_tokens == 3
        assert 0 <= one.generated_tokens < 40
        assert one.started < one.ended
    assert max(one.generated_tokens for one in served.recorded) > 0
    assert served.recorded[-1].cached_tokens == 1


async def test_one_request_at_a_time(served):
    served.script = Script((70,) * 3, delay=0.3, finish=FinishReason.LENGTH)
    first = asyncio.create_task(served.complete("running"))
    async with asyncio.timeout(20):
        while not served.generator.entered:
            await asyncio.sleep(0.01)
    second = await served.complete("running")
    assert (second.status_code, second.headers["retry-after"]) == (429, "1")
    assert "concurrent requests" in second.json()["error"]["message"]
    assert (await first).status_code == 200
    await settled(served, 1)
    served.script = Script((70,), finish=FinishReason.LENGTH)
    assert (await served.complete("running")).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_one_request_after_the_other_is_never_refused(served, monkeypatch, stream):
    """Even if the counter is slow to hear that a request has ended."""
    settle = served.counter.settle

    async def slowly(*given: Any) -> None:
        await asyncio.sleep(0.05)
        await settle(*given)

    monkeypatch.setattr(served.counter, "settle", slowly)
    for _ in range(10):
        assert (await served.complete("running", stream=stream)).status_code == 200


async def test_a_client_that_leaves_while_limits_are_asked_takes_nothing(served, monkeypatch):
    took, take, going = [], served.counter.take, asyncio.Event()

    async def slowly(*given: Any) -> Any:
        took.append(given)
        await going.wait()
        return await take(*given)

    monkeypatch.setattr(served.counter, "take", slowly)
    for key in "running", "tokens":
        going.clear()
        task = asyncio.create_task(served.complete(key))
        async with asyncio.timeout(20):
            while not took:
                await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0.1)  # the server hears of it
        took.clear()
        going.set()
        async with asyncio.timeout(20):
            while served.accounts.background._tasks:
                await asyncio.sleep(0.01)
    assert served.counter._leases == served.accounts._leases == {}
    assert served.counter._ahead("tokens", Limit.TOKENS, served.now) == 0
    assert served.recorded == served.generator.requests == []


async def test_without_max_tokens_an_estimate_is_taken(served, monkeypatch):
    monkeypatch.setattr("preft.gateway.api_call.UNSTATED_TOKENS", 10)
    chat = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
    reply = await served.ask("POST", "/v1/chat/completions", "tokens", json=chat)
    taken = reply.json()["usage"]["prompt_tokens"] + 10
    assert reply.headers["x-ratelimit-remaining-tokens"] == str(40 - taken)


async def test_anthropics_way_to_show_a_key_works_on_its_routes_alone(served):
    body = {"model": "own", "messages": [{"role": "user", "content": "hi"}]}

    async def status(path: str, *headers: tuple[str, str], **more: Any) -> int:
        return (await served.client.post(served.url + path, headers=list(headers), json=body | more)).status_code

    ada, bob, wrong = (("x-api-key", bearer(name)["authorization"].split()[1]) for name in ("ada", "bob", "nobody"))
    both = ("authorization", bearer("ada")["authorization"])
    for path, more in ("/v1/messages", {"max_tokens": 3}), ("/v1/messages/count_tokens", {}):
        assert await status(path, ada, **more) == 200
        assert await status(path, both, **more) == 200
        for headers in (), (wrong,), (ada, bob), (ada, both), (bob, both):
            assert await status(path, *headers, **more) == 401
    assert await status("/v1/chat/completions", ada) == 401
    assert await status("/v1/chat/completions", ada, both) == 200
    digests = [request.adapter.digest for request in served.generator.requests]
    assert set(digests) == {served.catalog.get("@acme/own").digest}
    assert [one.key for one in served.recorded] == ["ada"] * 3  # a count of tokens is no call of the model


@pytest.mark.parametrize("stream", [False, True])
async def test_limits_hold_on_every_route(served, stream):
    chat = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    asks = (
        ("/v1/responses", {"model": "base", "input": "hi", "stream": stream}, "requests"),
        ("/v1/messages", {**chat, "max_tokens": 3}, "rate_limit_error"),
    )
    for path, body, kind in asks:
        for _ in range(2):
            assert (await served.ask("POST", path, "requests", json=body)).status_code == 200
        refused = await served.ask("POST", path, "requests", json=body)
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, kind)
        assert refused.headers["retry-after"]
        served.now += 60
    assert [one.generated_tokens for one in served.recorded] == [3] * 4


async def test_docs_say_that_keys_are_needed(served):
    described = (await served.ask("GET", "/openapi.json")).json()
    assert described["paths"]["/v1/messages"]["post"]["security"] == [{"key": []}, {"anthropic": []}]
    assert described["security"] == [{"key": []}]
    assert described["components"]["securitySchemes"]["key"]["scheme"] == "bearer"

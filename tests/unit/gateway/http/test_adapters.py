"""/v1/adapters over sockets: adding, uploading, listing in pages, pinning, and clients that go away half-way."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.client
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from preft.core.cluster import Adapter, AdapterPlace, AdapterState
from preft.core.errors import AdapterExists, InvalidAdapter, Unavailable
from preft.gateway.deps import GatewayDeps
from preft.gateway.http import add_stream
from preft.gateway.http.app import create_app
from preft.gateway.text.tokenizer import Tokenizer
from support.fakes import FakeCatalog, FakeGenerator, Script
from support.served_app import served_app

LIMIT = 3 << 20


@pytest.fixture
async def served(tokenizer: Tokenizer, tmp_path: Path) -> AsyncIterator[SimpleNamespace]:
    catalog = FakeCatalog.of(ann="/adapters/ann")
    state = SimpleNamespace(catalog=catalog, uploads=tmp_path / "uploads")
    ann = catalog.list()[0].digest
    there = (AdapterPlace("prefill-0", AdapterState.SLOT, 2), AdapterPlace("prefill-1", AdapterState.LOADING))
    deps = GatewayDeps(
        "base",
        tokenizer,
        64,
        FakeGenerator(lambda request: Script()),
        state.catalog,
        max_adapter_bytes=LIMIT,
        upload_folder=state.uploads,
        places=lambda digest: there if digest == ann else (),
    )
    state.metric = deps.registry.get_sample_value
    async with (
        served_app(create_app(deps)) as state.port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{state.port}/v1") as state.client,
    ):
        yield state


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    return response.json()["error"]


async def until(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < limit, "took too long"
        await asyncio.sleep(0.01)


def many(count: int) -> list[Adapter]:
    """Entries of three kinds; every tenth is pinned."""
    kinds = ("lora", "reft", "lora+reft")
    return [
        Adapter(f"user-{i:05}", f"{i:064x}", f"/a/{i}", 8, kind=kinds[i % 3], pinned=i % 10 == 0) for i in range(count)
    ]


async def names(served: SimpleNamespace, **query: Any) -> list[str]:
    return [entry["name"] for entry in (await served.client.get("adapters", params=query)).json()["data"]]


async def as_written(served: SimpleNamespace, method: str, name: str) -> tuple[int, dict[str, Any]]:
    """Status and body of a request for an adapter by a client that leaves its path as it is."""

    def send() -> tuple[int, dict[str, Any]]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)) as connection:
            connection.request(method, f"/v1/adapters/{name}", b"weights" if method == "PUT" else None)
            reply = connection.getresponse()
            return reply.status, json.load(reply)

    return await asyncio.to_thread(send)


async def test_add_show_and_remove(served):
    async def add(**body: object) -> httpx.Response:
        return await served.client.post("adapters", json={"name": "team/bob.v1", **body})

    added = (await add(source="s3://adapters/bob")).json()
    entry = served.catalog.get("team/bob.v1")
    assert added == {
        "name": "team/bob.v1",
        "object": "adapter",
        "version": 1,
        "digest": entry.digest,
        "source": "s3://adapters/bob",
        "kind": "lora",
        "rank": 8,
        "size": len("s3://adapters/bob"),
        "prefill_only": False,
        "pinned": False,
        "created": int(entry.created),
        "warnings": ["it is fake"],
    }
    assert (await add(path="s3://adapters/bob")).json() == added  # the field's older name, and nothing has changed
    assert error(await add(source="/other"), 409)["code"] == "adapter_exists"
    replaced = (await add(source="/other", replace=True)).json()
    assert (replaced["source"], replaced["version"]) == ("/other", 2)
    shown = (await served.client.get("adapters/team/bob.v1")).json()
    assert {name: shown[name] for name in replaced} == replaced
    assert (await served.client.get("models/team/bob.v1")).json()["id"] == "team/bob.v1"
    assert (await served.client.delete("adapters/team%2Fbob.v1")).json()["deleted"] is True
    for method in ("GET", "DELETE"):
        assert error(await served.client.request(method, "adapters/team/bob.v1"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"name": "bob"}, 400, "source"),
        ({"name": "bob", "source": ""}, 400, "source"),
        ({"name": "bob", "source": "/a", "path": "/a"}, 400, "path"),
        ({"source": "/a"}, 400, "name"),
        ({"name": "bob", "source": "/a", "pinned": True}, 400, "pinned"),
        ({"name": "bob", "source": "/a", "stream": "yes"}, 400, "stream"),
        ({"name": "base", "source": "/a"}, 400, "name"),
        ({"name": "bob@2", "source": "/a"}, 400, "name"),
        ({"name": "..", "source": "/a", "stream": False}, 400, "name"),
        ({"name": "bob", "source": "/missing"}, 404, None),
    ],
)
async def test_refused_adds(served, body, status, param):
    assert error(await served.client.post("adapters", json=body), status)["param"] == param
    assert served.catalog.get("bob") is None


@pytest.mark.parametrize("name", ["..", "bob@2", "base"])
async def test_vllms_way_names_vllms_parameters(served, name):
    async def refused(name: str) -> dict[str, Any]:
        body = {"lora_name": name, "lora_path": "/a"}
        return error(await served.client.post("load_lora_adapter", json=body), 400)

    assert (await refused(name))["param"] == "lora_name"
    for given, shown in ("source", "lora_path"), ("pinned", "pinned"), (None, None):
        served.catalog.fail = InvalidAdapter("adapters may not be read from /a", given)
        assert (await refused("bob"))["param"] == shown


@pytest.mark.parametrize("name", ["..", "a%2F..%2Fb", "a%2Fb%2F", "--help", "bob%402", "%20", "%FF", "a%00", "a" * 129])
async def test_names_that_are_refused_in_a_path(served, name):
    status, body = await as_written(served, "PUT", name)
    assert (status, "can't name an adapter" in body["error"]["message"]) == (400, True)
    assert list(served.catalog.list()) == [served.catalog.get("ann")]


@pytest.mark.parametrize("name", ["..", "a//b", "a/", "-x", "/a"])
async def test_entries_of_an_older_rule_can_be_removed(served, name):
    """By a client that sends the name as it is, and by vLLM's way for all others."""
    entry = Adapter(name, "d" * 64, "/a", 8)
    served.catalog.put(entry)
    assert (await as_written(served, "DELETE", quote(name, safe="")))[1]["name"] == name
    served.catalog.put(entry)
    unload = await served.client.post("unload_lora_adapter", json={"lora_name": name})
    assert unload.status_code == 200
    assert list(served.catalog.list()) == [served.catalog.get("ann")]


async def test_an_entry_says_where_it_is(served):
    shown = (await served.client.get("adapters/ann")).json()
    assert shown["workers"] == [
        {"worker": "prefill-0", "state": "slot", "prompts": 2},
        {"worker": "prefill-1", "state": "loading", "prompts": 0},
    ]


async def test_nobody_knows_where(tokenizer):
    deps = GatewayDeps("base", tokenizer, 64, FakeGenerator(lambda request: Script()), FakeCatalog.of(ann="/a"))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(deps)), base_url="http://localhost"
    ) as client:
        assert (await client.get("/v1/adapters/ann")).json()["workers"] == []


async def test_pinning(served):
    pinned = (await served.client.patch("adapters/ann", json={"pinned": True})).json()
    assert (pinned["name"], pinned["pinned"]) == ("ann", True)
    assert (await served.client.patch("adapters/ann", json={"pinned": False})).json()["pinned"] is False
    error(await served.client.patch("adapters/bob", json={"pinned": True}), 404)
    for body in ({}, {"pinned": None}, {"pinned": "yes"}):
        assert error(await served.client.patch("adapters/ann", json=body), 400)["param"] == "pinned"
    served.catalog.put(Adapter("big", "d", "/huge", 8))
    assert "unpin another" in error(await served.client.patch("adapters/big", json={"pinned": True}), 400)["message"]


@pytest.mark.parametrize("query", [{"limit": 1000}, {"limit": 999}, {"limit": 700, "search": "USER"}])
async def test_paging_through_everything_gives_each_once(served, query):
    await served.catalog.remove("ann")
    served.catalog.put(*many(10_000))
    seen: list[str] = []
    while True:
        body = (await served.client.get("adapters", params={**query, "after": seen[-1] if seen else ""})).json()
        page = [entry["name"] for entry in body["data"]]
        assert (body["object"], body["first_id"], body["last_id"]) == ("list", page[0], page[-1])
        assert body["total"] == 10_000
        seen += page
        if not body["has_more"]:
            break
        assert len(page) == query["limit"]
    assert seen == [f"user-{i:05}" for i in range(10_000)]


async def test_a_page_has_100_entries_unless_told(served):
    served.catalog.put(*many(150))
    body = (await served.client.get("adapters")).json()
    assert (len(body["data"]), body["has_more"], body["total"]) == (100, True, 151)
    assert body["data"][0]["name"] == "ann"
    body = (await served.client.get("adapters", params={"limit": 51, "after": body["last_id"]})).json()
    assert (len(body["data"]), body["has_more"]) == (51, False)


async def test_a_page_goes_on_where_a_removed_name_was(served):
    served.catalog.put(*many(10))
    assert await names(served, after="user-00003x", limit=2) == ["user-00004", "user-00005"]
    body = (await served.client.get("adapters", params={"after": "zzz"})).json()
    assert body == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
        "total": 11,
    }


async def test_filters(served):
    served.catalog.put(*many(30))
    assert await names(served, search="User-0000", kind="reft") == ["user-00001", "user-00004", "user-00007"]
    assert await names(served, pinned="true") == ["user-00000", "user-00010", "user-00020"]
    assert await names(served, pinned="false", search="ann") == ["ann"]
    both = await names(served, kind="lora+reft")
    assert both == [f"user-{i:05}" for i in range(2, 30, 3)]
    raw = await served.client.get(f"http://127.0.0.1:{served.port}/v1/adapters?kind=lora+reft")  # the plus as it is
    assert [entry["name"] for entry in raw.json()["data"]] == both
    body = (await served.client.get("adapters", params={"kind": "reft", "limit": 4, "after": "user-00004"})).json()
    assert [entry["name"] for entry in body["data"]] == [f"user-{i:05}" for i in (7, 10, 13, 16)]
    assert (body["has_more"], body["total"]) == (True, 10)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=ten", "limit"),
        ("limit=", "limit"),
        ("limit=5&limit=6", "limit"),
        ("kind=dora", "kind"),
        ("pinned=1", "pinned"),
        ("order=asc", "order"),
        ("user=me", "user"),
    ],
)
async def test_bad_queries_name_the_parameter(served, query, param):
    found = error(await served.client.get(f"adapters?{query}"), 400)
    assert found["param"] == param
    assert param in found["message"]


@pytest.mark.parametrize("chunked", [False, True])
async def test_an_upload(served, chunked):
    archive = bytes(range(256)) * 10_000  # more than one write to the disk

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(archive), 50_000):
            yield archive[start : start + 50_000]

    content = pieces() if chunked else archive
    response = await served.client.put(
        "adapters/team/bob", content=content, headers={"content-type": "application/x-tar"}
    )
    assert response.json()["name"] == "team/bob"
    assert response.json()["size"] == len(archive)
    assert served.catalog.archives == {"team/bob": archive}
    assert list(served.uploads.iterdir()) == []
    error(await served.client.put("adapters/team/bob", content=b"other"), 409)
    response = await served.client.put("adapters/team/bob?replace=true", content=b"other")
    assert response.json()["version"] == 2
    assert error(await served.client.put("adapters/bob?replace=yes", content=b"x"), 400)["param"] == "replace"


async def test_a_refused_upload_leaves_nothing(served):
    assert error(await served.client.put("adapters/bob", content=b"broken"), 400)["code"] == "invalid_adapter"
    assert list(served.uploads.iterdir()) == []


@pytest.mark.parametrize("chunked", [False, True])
async def test_an_upload_over_the_limit(served, chunked):
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(LIMIT // 100_000 + 1):
            yield b"x" * 100_000

    found = error(await served.client.put("adapters/bob", content=pieces() if chunked else b"x" * (LIMIT + 1)), 413)
    assert str(LIMIT) in found["message"]
    assert served.catalog.get("bob") is None
    assert not served.uploads.exists() or list(served.uploads.iterdir()) == []
    assert (await served.client.put("adapters/bob", content=b"x" * LIMIT)).status_code == 200


@pytest.mark.parametrize("framing", [b"Content-Length: 2000000", b"Transfer-Encoding: chunked"])
@pytest.mark.parametrize("ending", ["abort", "close"])
async def test_a_client_that_goes_away_half_way_adds_nothing(served, framing, ending):
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(b"PUT /v1/adapters/bob HTTP/1.1\r\nHost: localhost\r\n" + framing + b"\r\n\r\n")
    piece = b"x" * 1_500_000
    writer.write(piece if b"Length" in framing else b"%x\r\n%s\r\n" % (len(piece), piece))
    await until(lambda: served.uploads.exists() and [file for file in served.uploads.iterdir() if file.stat().st_size])
    if ending == "abort":
        writer.transport.abort()
    else:
        writer.write_eof()
        assert b"200" not in await reader.read()
        writer.close()
    await until(lambda: not list(served.uploads.iterdir()))
    labels = {"route": "/v1/adapters/{name:path}", "status": "499"}
    await until(lambda: served.metric("preft_http_responses_total", labels))
    assert served.catalog.get("bob") is None


async def test_a_body_shorter_than_declared_is_not_added(served, tokenizer, tmp_path):
    """As behind a server that lets such bodies through."""
    deps = GatewayDeps(
        "base", tokenizer, 64, FakeGenerator(lambda request: Script()), served.catalog, upload_folder=tmp_path
    )

    async def short() -> AsyncIterator[bytes]:
        yield b"half"

    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(deps)), base_url="http://localhost"
    ) as client:
        found = error(await client.put("/v1/adapters/bob", content=short(), headers={"content-length": "8"}), 400)
    assert "4 of 8 bytes" in found["message"]
    assert served.catalog.get("bob") is None
    assert list(tmp_path.iterdir()) == []


async def test_a_disk_that_fails_is_503(served, tokenizer, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    deps = GatewayDeps(
        "base", tokenizer, 64, FakeGenerator(lambda request: Script()), served.catalog, upload_folder=tmp_path / "file"
    )
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(deps)), base_url="http://localhost"
    ) as client:
        assert error(await client.put("/v1/adapters/bob", content=b"x"), 503)["code"] == "unavailable"


async def events(served: SimpleNamespace, **body: object) -> list[dict[str, Any]]:
    response = await served.client.post("adapters", json={"name": "bob", "source": "/bob", "stream": True, **body})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = [part for part in response.text.split("\n\n") if not part.startswith(":")]
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


async def test_a_watched_add(served):
    served.catalog.steps = [(i, 1000) for i in range(1001)]
    *progress, last = await events(served)
    assert last["adapter"]["digest"] == served.catalog.get("bob").digest
    assert progress[-1] == {"bytes": 1000, "total": 1000}
    assert [event["bytes"] for event in progress] == sorted({event["bytes"] for event in progress})
    assert len(progress) < 200  # ten a second, not one per report
    served.catalog.steps = [(5, None)]
    assert (await events(served, replace=True, source="/2"))[0] == {"bytes": 5, "total": None}
    assert served.catalog.get("bob").version == 2


async def test_a_watched_add_that_brings_no_bytes(served):
    [last] = await events(served)
    assert last["adapter"]["name"] == "bob"


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (Unavailable("the bucket doesn't answer"), "unavailable"),
        (AdapterExists("the name is taken"), "adapter_exists"),
        (ValueError("a bug"), "internal_error"),
    ],
)
async def test_a_watched_add_that_fails_ends_with_the_error(served, failure, code):
    served.catalog.steps = [(7, 10)]
    served.catalog.fail = failure
    progress, last = await events(served)
    assert progress == {"bytes": 7, "total": 10}
    assert last["error"].keys() == {"message", "type", "param", "code"}
    assert last["error"]["code"] == code
    assert "bug" not in last["error"]["message"]


async def test_a_quiet_add_shows_that_it_lives(served, monkeypatch):
    monkeypatch.setattr(add_stream, "QUIET_SECONDS", 0.02)
    monkeypatch.setattr(add_stream, "EVENT_SECONDS", 0.01)
    served.catalog.gate = asyncio.Event()
    body = {"name": "bob", "source": "/bob", "stream": True}
    async with served.client.stream("POST", "adapters", json=body) as response:
        lines = response.aiter_lines()
        assert (await anext(lines)).startswith(": ")
        served.catalog.gate.set()
        assert [line async for line in lines][-2:] == ["data: [DONE]", ""]


async def test_a_client_that_leaves_cancels_its_add(served):
    served.catalog.steps = [(1, 2)]
    served.catalog.gate = asyncio.Event()
    body = {"name": "bob", "source": "/bob", "stream": True}
    async with served.client.stream("POST", "adapters", json=body) as response:
        assert await anext(response.aiter_lines()) == 'data: {"bytes": 1, "total": 2}'
        assert served.catalog.adding == 1
    await until(lambda: served.catalog.cancelled == ["bob"])
    served.catalog.gate.set()
    assert served.catalog.get("bob") is None


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("adapters", {"name": "bob", "source": "/bob"}),
        ("load_lora_adapter", {"lora_name": "bob", "lora_path": "/bob"}),
    ],
)
async def test_a_client_that_leaves_without_watching_cancels_its_add(served, path, body):
    served.catalog.gate = asyncio.Event()
    with pytest.raises(httpx.ReadTimeout):
        await served.client.post(path, json=body, timeout=0.2)
    await until(lambda: served.catalog.cancelled == ["bob"])
    await until(lambda: served.metric("preft_http_responses_total", {"route": f"/v1/{path}", "status": "499"}))
    served.catalog.gate.set()
    assert served.catalog.get("bob") is None


async def test_a_large_catalog_is_listed_from_the_middle(served):
    entries = many(100_000)
    served.catalog.put(*entries)
    assert await names(served, after="user-49999", limit=1) == ["user-50000"]
    last = dataclasses.replace(entries[-1], name="zoe")
    served.catalog.put(last)
    assert await names(served, after=entries[-1].name) == ["zoe"]

"""What is sent to an OpenAI-style server: bodies of completions and chats, its models, its adapter API."""

from __future__ import annotations

import pytest

from preft_loadgen.errors import InvalidArgument, RequestFailed
from preft_loadgen.traffic.request import Request, Turn
from preft_loadgen.transport.server import Api, Models, open_server
from unit.loadgen.sse_server import DONE, HEAD, Call, chunk, fake_server, json_reply, tokens, usage

CARDS = {"data": [{"id": "base", "parent": None}, {"id": "a", "parent": "base"}, {"id": "b", "parent": "base"}]}


async def bodies(request: Request, api: Api = Api.COMPLETIONS) -> dict[str, object]:
    """The body that `request` becomes."""
    calls: list[Call] = []

    async def script(call: Call) -> None:
        if api is Api.COMPLETIONS:
            await tokens(call)
        else:
            said = b'data: {"choices":[{"index":0,"delta":{"content":"hi"},"finish_reason":"stop"}]}\n\n'
            await call.write(HEAD + chunk(said + usage(1) + DONE) + b"0\r\n\r\n")

    async with fake_server(script, calls) as url, open_server(url, api=api) as server:
        await server.send(request)
    body = calls[0].body
    assert body.pop("stream") is True
    assert body.pop("stream_options") == {"include_usage": True}
    assert body.pop("temperature") == 0
    assert calls[0].path == ("/v1/completions" if api is Api.COMPLETIONS else "/v1/chat/completions")
    return dict(body)


async def test_completions() -> None:
    request = Request("m", (5, 6), 3)
    assert await bodies(request) == {"model": "m", "prompt": [5, 6], "max_tokens": 3, "ignore_eos": True}
    second = Request("m", (5,), 3, exact=False, wants_ids=True, later=(Turn((8,), 2),)).after((7,))
    assert await bodies(second) == {"model": "m", "prompt": [5, 7, 8], "max_tokens": 2, "return_token_ids": True}
    assert (await bodies(Request("m", "some text", 3)))["prompt"] == "some text"


async def test_chats() -> None:
    second = Request("m", "hi", 3, later=(Turn("and?", 2),)).after("hello")
    assert await bodies(second, Api.CHAT) == {
        "model": "m",
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": "and?"},
        ],
        "max_tokens": 2,
        "ignore_eos": True,
    }


async def test_the_key_is_shown_and_adapters_are_changed_by_vllms_api() -> None:
    calls: list[Call] = []

    async def script(call: Call) -> None:
        body = b"Success: it is plain text"
        await call.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))

    async with fake_server(script, calls) as url, open_server(url, api_key="sk-1") as server:
        await server.load_adapter("x", "/adapters/x")
        await server.unload_adapter("x")
    assert [(call.path, call.body) for call in calls] == [
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/adapters/x", "load_inplace": True}),
        ("/v1/unload_lora_adapter", {"lora_name": "x"}),
    ]
    assert all(call.headers["authorization"] == "Bearer sk-1" for call in calls)


async def test_models() -> None:
    async with fake_server(lambda call: call.write(json_reply("200 OK", CARDS))) as url, open_server(url) as server:
        assert await server.models() == Models("base", ("a", "b"))


@pytest.mark.parametrize("answer", [{"data": []}, {}, [], {"data": [1]}, {"data": [{"id": 5}]}, {"data": {"id": "x"}}])
async def test_answers_that_list_no_models(answer: object) -> None:
    async with fake_server(lambda call: call.write(json_reply("200 OK", answer))) as url, open_server(url) as server:
        with pytest.raises(RequestFailed, match="/v1/models"):
            await server.models()


@pytest.mark.parametrize("url", ["nowhere", "grpc://", "grpc://h", "grpc://h:1/path", "grpc://k@h:1", "ws://h:1"])
async def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(InvalidArgument, match="must look like"):
        async with open_server(url):
            pass


async def test_chats_have_no_grpc() -> None:
    with pytest.raises(InvalidArgument, match="chats go over HTTP"):
        async with open_server("grpc://h:1", api=Api.CHAT):
            pass

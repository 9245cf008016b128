"""/tokenize, /detokenize and /version: vLLM's fields, and what a model's requests would be tokenized to."""

from __future__ import annotations

from typing import Any

import pytest

from preft import __version__
from preft.gateway.http.routes import tokenize as route
from unit.gateway.http.test_openai import MAX_LEN, USER, Gateway, error


@pytest.fixture
async def gateway(tokenizer: Any) -> Any:
    gateway = Gateway(tokenizer)
    async with gateway.client:
        yield gateway


async def post(gateway: Gateway, path: str, **body: Any) -> Any:
    return await gateway.client.post(path, json=body)


async def test_a_text(gateway: Gateway) -> None:
    ids = list(gateway.ids("hello hi"))
    assert (await post(gateway, "/tokenize", prompt="hello hi")).json() == {
        "count": len(ids) + 1, "max_model_len": MAX_LEN, "tokens": [0, *ids], "token_strs": None,
    }  # fmt: skip
    plain = {"prompt": "hello hi", "add_special_tokens": False, "return_token_strs": True}
    body = (await post(gateway, "/tokenize", model="ann", **plain)).json()
    assert body["tokens"] == ids
    assert "".join(body["token_strs"]) == "helloĠhi"
    assert (await post(gateway, "/tokenize", prompt="", add_special_tokens=False)).json()["tokens"] == []


@pytest.mark.parametrize(
    "more",
    [{}, {"add_generation_prompt": False}, {"add_special_tokens": True}, {"chat_template_kwargs": {"x": 1}}],
)
async def test_a_chat_is_what_a_chat_completion_would_be(gateway: Gateway, more: dict[str, Any]) -> None:
    tokens = (await post(gateway, "/tokenize", messages=USER, **more)).json()["tokens"]
    await gateway.chat(**more)
    assert tokens == list(gateway.generator.requests[0].prompt_token_ids)
    assert len(gateway.generator.requests) == 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "hi", "messages": USER}, "prompt"),
        ({"prompt": ["hi"]}, "prompt"),
        ({"prompt": "hi", "add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": []}, "messages"),
        ({"messages": USER, "continue_final_message": True}, "continue_final_message"),
        ({"messages": USER, "chat_template": "x"}, "chat_template"),
        ({"prompt": "hi", "nothing": 1}, "nothing"),
        ({"messages": USER, "tools": [{"type": "function"}]}, "tools[0].function"),
    ],
)
async def test_what_is_refused_is_named(gateway: Gateway, body: dict[str, Any], param: str) -> None:
    assert error(await post(gateway, "/tokenize", **body), 400)["param"] == param


async def test_numbers_that_overflow_are_refused(gateway: Gateway) -> None:
    content = b'{"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"a": [1e999]}}'
    response = await gateway.client.post("/tokenize", content=content, headers={"content-type": "application/json"})
    assert error(response, 400)["param"] == "chat_template_kwargs.a[0]"


async def test_token_ids_become_text(gateway: Gateway) -> None:
    ids = [0, *gateway.ids("hello hi")]
    for model in {}, {"model": "ann"}, {"model": "base"}:
        assert (await post(gateway, "/detokenize", tokens=ids, **model)).json() == {"prompt": "<|bos|>hello hi"}
    assert (await post(gateway, "/detokenize", tokens=[])).json() == {"prompt": ""}
    for wrong in [-1], [gateway.tokenizer.vocab_size], [2**70]:
        assert error(await post(gateway, "/detokenize", tokens=wrong), 400)["param"] == "tokens"
    assert error(await post(gateway, "/detokenize"), 400)["param"] == "tokens"


async def test_an_unknown_model_is_unknown(gateway: Gateway) -> None:
    asks: list[dict[str, Any]] = [{"prompt": "hi"}, {"messages": USER}, {"tokens": []}]
    for body in asks:
        path = "/detokenize" if "tokens" in body else "/tokenize"
        assert error(await post(gateway, path, model="nobody", **body), 404)["code"] == "model_not_found"


async def test_long_ones_are_done_by_a_thread(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    asks: tuple[tuple[str, dict[str, Any]], ...] = (
        ("/tokenize", {"prompt": "hello", "return_token_strs": True}),
        ("/detokenize", {"tokens": [5, 6]}),
    )
    inline = [(await post(gateway, path, **body)).json() for path, body in asks]
    monkeypatch.setattr(route, "INLINE_IDS", 1)
    assert [(await post(gateway, path, **body)).json() for path, body in asks] == inline
    assert error(await post(gateway, "/detokenize", tokens=[5, 10**6]), 400)["param"] == "tokens"


async def test_the_version(gateway: Gateway) -> None:
    assert (await gateway.client.get("/version")).json() == {"version": __version__}

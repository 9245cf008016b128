"""Replies that show their prompt: echo, `prompt_logprobs`, `return_prompt_text`, and prompts that are cut or salted."""

from __future__ import annotations

import math
from typing import Any

import pytest

from preft.core.errors import EngineFailed
from preft.core.request import MAX_CHOICES, FinishReason
from preft.gateway import api_call
from preft.gateway.http.logprobs import prompt_json
from support.fakes import Script
from support.prompt_logprobs import made_up
from unit.gateway.http.test_openai import MAX_LEN, USER, Gateway, error, events

TEXT = "hello"


@pytest.fixture
async def gateway(tokenizer: Any) -> Any:
    gateway = Gateway(tokenizer)
    async with gateway.client:
        yield gateway


def joined(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Per choice of a stream: its text, log probabilities and end."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        [choice] = chunk["choices"]
        own = found.setdefault(choice["index"], {"text": "", "logprobs": {}, "finish_reason": None})
        own["text"] += choice["text"]
        for name, values in (choice["logprobs"] or {}).items():
            own["logprobs"][name] = own["logprobs"].get(name, []) + values
        own["finish_reason"] = choice["finish_reason"]
    return found


async def test_echo_begins_each_choice_with_its_prompt(gateway: Gateway) -> None:
    prompts = ["hi", "hello hi"]
    plain = (await gateway.complete(prompt=prompts, n=2, temperature=1)).json()
    body = (await gateway.complete(prompt=prompts, n=2, temperature=1, echo=True)).json()
    for place, (choice, other) in enumerate(zip(body["choices"], plain["choices"], strict=True)):
        assert choice == {**other, "text": prompts[place // 2] + other["text"]}
    assert body["usage"] == plain["usage"]
    assert gateway.generator.requests[-1].sampling.prompt_logprobs is None
    streamed = joined(events(await gateway.complete(prompt=prompts, n=2, temperature=1, echo=True, stream=True)))
    assert [streamed[index]["text"] for index in range(4)] == [choice["text"] for choice in body["choices"]]


async def test_token_ids_are_echoed_as_text(gateway: Gateway) -> None:
    ids = [0, *gateway.ids("hello hi")]
    [choice] = (await gateway.complete(prompt=ids, echo=True)).json()["choices"]
    assert choice["text"] == "<|bos|>hello hi" + "hello world"


@pytest.mark.parametrize("max_tokens", [0, 5])
@pytest.mark.parametrize("as_ids", [False, True])
async def test_echo_with_log_probabilities(gateway: Gateway, max_tokens: int, as_ids: bool) -> None:
    ids = gateway.ids("hello hi")
    wanted: dict[str, Any] = {
        "prompt": [list(ids), list(ids[:2])], "n": 2, "temperature": 1, "echo": True, "logprobs": 2,
        "max_tokens": max_tokens, "return_tokens_as_token_ids": as_ids,
    }  # fmt: skip
    body = (await gateway.complete(**wanted)).json()
    shown = (lambda token: f"token_id:{token}") if as_ids else gateway.tokenizer.token_text
    for choice in body["choices"]:
        prompt = ids if choice["index"] < 2 else ids[:2]
        logprobs, output = choice["logprobs"], gateway.script.tokens[:max_tokens]
        assert logprobs["tokens"] == [shown(token) for token in (*prompt, *output)]
        rows = list(made_up(prompt, 2))
        assert logprobs["token_logprobs"] == [None, *(row.logprob for row in rows), *[-0.5] * max_tokens]
        first, *tops = logprobs["top_logprobs"]
        assert first is None
        for row, top in zip(rows, tops, strict=False):
            assert top == {shown(row.token_id): row.logprob} | {shown(token): value for token, value in row.top}
        ends = [sum(map(len, logprobs["tokens"][:place])) for place in range(len(logprobs["tokens"]))]
        assert logprobs["text_offset"] == ends
        assert choice["prompt_logprobs"] is None
    assert body["usage"]["completion_tokens"] == 4 * max_tokens
    streamed = joined(events(await gateway.complete(**wanted, stream=True)))
    assert [streamed[index] for index in range(4)] == [
        {name: choice[name] for name in ("text", "logprobs", "finish_reason")} for choice in body["choices"]
    ]


async def test_no_output_is_no_output(gateway: Gateway) -> None:
    """Whatever the engine samples: an end, a stop string, tokens under a form."""
    gateway.script = Script(gateway.letters("hello"), finish=FinishReason.STOP, stop_token_id=5)
    body = (await gateway.complete(max_tokens=0, echo=True, stop=["h"], return_token_ids=True)).json()
    [choice] = body["choices"]
    assert (choice["text"], choice["token_ids"]) == ("hi", [])
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)
    assert body["usage"]["completion_tokens"] == 0
    assert gateway.generator.requests[0].sampling.max_tokens == 1
    *_, last = events(await gateway.complete(max_tokens=0, echo=True, stream=True))
    assert (last["choices"][0]["text"], last["choices"][0]["finish_reason"]) == ("", "length")


async def test_no_output_needs_echo(gateway: Gateway) -> None:
    assert error(await gateway.complete(max_tokens=0), 400)["param"] == "max_tokens"
    assert error(await gateway.complete(max_tokens=0, echo=True, min_tokens=1), 400)["param"] == "min_tokens"
    full = [5] * MAX_LEN
    assert error(await gateway.complete(max_tokens=0, echo=True, prompt=full), 400)["param"] == "prompt"
    assert (await gateway.complete(max_tokens=0, echo=True, prompt=full[1:])).status_code == 200


async def test_a_failure_before_the_prompt_is_a_plain_error(gateway: Gateway) -> None:
    gateway.script = Script(gateway.letters("hello"), fail=EngineFailed("broken"), fail_after=0)
    for stream in False, True:
        error(await gateway.complete(echo=True, logprobs=1, stream=stream), 500)


@pytest.mark.parametrize("top", [0, 2])
async def test_prompt_logprobs_of_completions(gateway: Gateway, top: int) -> None:
    prompts = [list(gateway.ids("hello hi")), [7]]
    body = (await gateway.complete(prompt=prompts, n=2, temperature=1, prompt_logprobs=top)).json()
    for choice in body["choices"]:
        assert (choice["text"], choice["logprobs"]) == ("hello world", None)
        prompt = prompts[choice["index"] // 2]
        first, *rows = choice["prompt_logprobs"]
        assert first is None
        for found, row in zip(rows, made_up(prompt, top), strict=True):
            assert list(found) == list(dict.fromkeys(str(token) for token in (row.token_id, *dict(row.top))))
            assert found[str(row.token_id)] == {
                "logprob": row.logprob, "rank": 2, "decoded_token": gateway.tokenizer.token_text(row.token_id)
            }  # fmt: skip
            for rank, (token, value) in enumerate(row.top, start=1):
                assert (found[str(token)]["rank"], found[str(token)]["logprob"]) == (rank, value)


async def test_prompt_logprobs_of_chats(gateway: Gateway) -> None:
    body = (await gateway.chat(prompt_logprobs=1, n=2, temperature=1, return_token_ids=True)).json()
    assert len(body["prompt_logprobs"]) == len(body["prompt_token_ids"])
    for token, row in zip(body["prompt_token_ids"][1:], body["prompt_logprobs"][1:], strict=True):
        assert str(token) in row
    assert "prompt_logprobs" not in body["choices"][0]
    assert (await gateway.chat()).json()["prompt_logprobs"] is None


async def test_prompt_logprobs_arent_streamed(gateway: Gateway) -> None:
    for ask in gateway.complete, gateway.chat:
        assert error(await ask(prompt_logprobs=0, stream=True), 400)["param"] == "prompt_logprobs"
        for wrong in -1, 21, True, "1":
            assert error(await ask(prompt_logprobs=wrong), 400)["param"] == "prompt_logprobs"


async def test_minus_infinity_has_a_number(gateway: Gateway) -> None:
    logprobs = made_up((5, 6), 0)
    logprobs.logprobs[0] = -math.inf
    assert '"logprob":-9999.0,' in prompt_json(logprobs, gateway.tokenizer)


async def test_replies_have_a_limit(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_call, "MAX_PROMPT_VALUES", 60)
    prompt = [5] * 10
    assert (await gateway.complete(prompt=prompt, prompt_logprobs=5)).status_code == 200
    refused = {"prompt_logprobs": 6}, {"prompt_logprobs": 2, "n": 3, "temperature": 1}
    for more in refused:
        assert error(await gateway.complete(prompt=prompt, **more), 400)["param"] == "prompt_logprobs"
    assert error(await gateway.complete(prompt=[prompt] * 4, echo=True, logprobs=1), 400)["param"] == "logprobs"
    assert (await gateway.complete(prompt=[prompt] * MAX_CHOICES, echo=True, max_tokens=1)).status_code == 200


async def test_long_prompts_are_written_by_a_thread(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: dict[str, Any] = {"prompt": [[5] * 10, [6] * 9], "echo": True, "logprobs": 1, "request_id": "same"}
    asks = [{**wanted, "prompt_logprobs": 1}, {**wanted, "stream": True}]
    inline = [(await gateway.complete(**ask)).text for ask in asks]
    monkeypatch.setattr(api_call, "INLINE_LOGPROBS", 1)
    monkeypatch.setattr(api_call, "INLINE_IDS", 1)
    threaded = [(await gateway.complete(**ask)).text for ask in asks]
    assert [_without_time(text) for text in threaded] == [_without_time(text) for text in inline]


def _without_time(text: str) -> str:
    return "".join(part.partition(",")[2] for part in text.split('"created":'))


async def test_a_chat_echoes_what_the_assistant_said(gateway: Gateway) -> None:
    begun = [*USER, {"role": "assistant", "content": "well, "}]
    more = {"echo": True, "continue_final_message": True, "add_generation_prompt": False}
    body = (await gateway.chat(messages=begun, **more)).json()
    assert body["choices"][0]["message"]["content"] == "well, hello world"
    chunks = events(await gateway.chat(messages=begun, stream=True, **more))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "well, hello world"
    assert (await gateway.chat(echo=True)).json()["choices"][0]["message"]["content"] == "hello world"


async def test_a_chat_shows_its_prompt(gateway: Gateway) -> None:
    text = "<|bos|><|user|>hi<|eot|><|assistant|>"
    assert (await gateway.chat(return_prompt_text=True)).json()["prompt_text"] == text
    first, *rest = events(await gateway.chat(return_prompt_text=True, stream=True))
    assert first["prompt_text"] == text
    assert all("prompt_text" not in chunk for chunk in rest)
    assert "prompt_text" not in (await gateway.chat()).json()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"truncate_prompt_tokens": 3}, [4, 5, 6]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, [1, 2, 3]),
        ({"truncate_prompt_tokens": 6}, [1, 2, 3, 4, 5, 6]),
        ({"truncate_prompt_tokens": 90}, [1, 2, 3, 4, 5, 6]),
        ({"truncate_prompt_tokens": -1}, [1, 2, 3, 4, 5, 6]),
        ({"truncation_side": "right"}, [1, 2, 3, 4, 5, 6]),
    ],
)
async def test_a_prompt_is_cut(gateway: Gateway, more: dict[str, Any], expected: list[int]) -> None:
    [choice] = (await gateway.complete(prompt=[1, 2, 3, 4, 5, 6], echo=True, **more)).json()["choices"]
    assert list(gateway.generator.requests[-1].prompt_token_ids) == expected
    assert choice["text"] == gateway.tokenizer.decode(expected, skip_special_tokens=False) + "hello world"


async def test_a_text_is_cut_to_what_fits(gateway: Gateway) -> None:
    long = "hi " * 40
    error(await gateway.complete(prompt=long), 400)
    body = (await gateway.complete(prompt=long, truncate_prompt_tokens=-1, echo=True)).json()
    assert body["usage"]["prompt_tokens"] == MAX_LEN - 1
    kept = gateway.tokenizer.decode(gateway.generator.requests[-1].prompt_token_ids, skip_special_tokens=False)
    assert body["choices"][0]["text"].startswith(kept)
    assert (await gateway.chat(truncate_prompt_tokens=2)).json()["usage"]["prompt_tokens"] == 2
    for wrong in 0, -2, 1.5:
        assert error(await gateway.complete(truncate_prompt_tokens=wrong), 400)["param"] == "truncate_prompt_tokens"


async def test_a_salt_keeps_prefix_caches_apart(gateway: Gateway) -> None:
    for ask in gateway.complete, gateway.chat:
        await ask(cache_salt="mine")
        await ask()
    assert [request.cache_salt for request in gateway.generator.requests] == ["/mine", "", "/mine", ""]
    for wrong in "", "a/b", "a@b", "a\\b", "a\nb", "x" * 129:
        assert error(await gateway.complete(cache_salt=wrong), 400)["param"] == "cache_salt"

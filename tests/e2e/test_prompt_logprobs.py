"""The prompt's log probabilities are the reference's, with the adapter, in every form in which clients ask for them."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest
import torch

from e2e.conftest import Served
from support.http import Ask, complete, post
from support.overflow import OVERFLOWING_TOKEN

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

KINDS = (None, "carol", "head", "headonly", "loreft", "direft", "edges", "both")


def prompt_of(length: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, 512) for _ in range(length)]


def ask(served: Served, adapter: str | None, **body: Any) -> dict[str, Any]:
    base = {"model": adapter or served.name, "temperature": 0, "ignore_eos": True}
    response = post(served.cluster.url, "/v1/completions", {**base, **body})
    assert response.status_code == 200, response.text
    return dict(response.json())


def expected(served: Served, prompt: list[int], adapter: str | None) -> torch.Tensor:
    """Row i is about prompt token i + 1."""
    folder = served.adapters[adapter] if adapter else None
    return served.reference.prompt_logits(prompt, folder).log_softmax(-1)[:-1]


def check_rows(served: Served, prompt: list[int], adapter: str | None, found: list[Any], top: int) -> None:
    first, *rows = found
    assert first is None
    for row, token, entries in zip(expected(served, prompt, adapter), prompt[1:], rows, strict=True):
        own = entries[str(token)]
        assert own["logprob"] == pytest.approx(float(row[token]), abs=1e-3)
        assert abs(own["rank"] - 1 - int((row > row[token]).sum())) <= 1  # equal values but for rounding
        best = sorted((entry["logprob"] for entry in entries.values() if entry["rank"] <= top), reverse=True)
        assert best == pytest.approx(row.topk(top).values.tolist(), abs=1e-3)
        assert isinstance(own["decoded_token"], str)


@pytest.mark.parametrize("adapter", KINDS)
def test_prompt_logprobs_are_the_references(either: Served, adapter: str | None) -> None:
    """Also if the prompt's KV is in the prefix cache, from which no logits come."""
    prompt = prompt_of(70, seed=3)
    plain = ask(either, adapter, prompt=prompt, max_tokens=6, return_token_ids=True)
    for top in (3, 0):
        body = ask(either, adapter, prompt=prompt, max_tokens=6, return_token_ids=True, prompt_logprobs=top)
        [choice] = body["choices"]
        assert choice["token_ids"] == plain["choices"][0]["token_ids"] == either.expected(prompt, 6, adapter)
        assert choice["logprobs"] is None
        check_rows(either, prompt, adapter, choice["prompt_logprobs"], top)
        assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert either.cluster.idle()


def test_prompts_of_every_kind_at_once(either: Served) -> None:
    """No prompt's logits have the adapter of another request in the step."""
    scored_beside_others(either, [(prompt_of(20 + 9 * number, number), kind) for number, kind in enumerate(KINDS)])


def test_prompts_in_chunks_beside_others(tight: Served) -> None:
    """64-token chunks, some of which end right before the prompt's end, in steps that others share."""
    lengths = (1, 2, 64, 65, 128, 200)
    scored_beside_others(
        tight, [(prompt_of(length, length), KINDS[i % len(KINDS)]) for i, length in enumerate(lengths)]
    )


def scored_beside_others(served: Served, asks: list[tuple[list[int], str | None]]) -> None:
    async def main() -> tuple[list[Any], list[Any]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=served.cluster.url, timeout=300, limits=limits) as client:

            async def score(prompt: list[int], adapter: str | None) -> Any:
                body = {"model": adapter or served.name, "prompt": prompt, "max_tokens": 8, "prompt_logprobs": 2}
                more = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
                response = await client.post("/v1/completions", json=body | more)
                assert response.status_code == 200, response.text
                return response.json()["choices"][0]

            plain = [complete(client, served.name, Ask(prompt, 8, adapter)) for prompt, adapter in asks]
            both = await asyncio.gather(*(score(*one) for one in asks), *plain)
            return both[: len(asks)], both[len(asks) :]

    scored, plain = asyncio.run(main())
    for (prompt, adapter), choice, other in zip(asks, scored, plain, strict=True):
        tokens = served.expected(prompt, 8, adapter)
        assert choice["token_ids"] == other["choices"][0]["token_ids"] == tokens
        check_rows(served, prompt, adapter, choice["prompt_logprobs"], 2)
    assert served.cluster.idle()


def check_echo(served: Served, adapter: str, prompt: list[int], choice: dict[str, Any], tokens: int) -> None:
    logprobs = choice["logprobs"]
    rows = expected(served, prompt, adapter)
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1 : len(prompt)] == pytest.approx(
        [float(row[token]) for row, token in zip(rows, prompt[1:], strict=True)], abs=1e-3
    )
    assert {len(part) for part in logprobs.values()} == {len(prompt) + tokens}
    assert logprobs["text_offset"][0] == 0


@pytest.mark.parametrize("adapter", ["head", "loreft"])
def test_echo_with_several_prompts_and_choices(either: Served, adapter: str) -> None:
    prompts = [prompt_of(30, seed=1), prompt_of(41, seed=2)]
    wanted: dict[str, Any] = {"prompt": prompts, "n": 2, "max_tokens": 5, "logprobs": 2, "echo": True}
    plain = ask(either, adapter, **{**wanted, "echo": False})
    body = ask(either, adapter, **wanted)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    texts = [post(either.cluster.url, "/detokenize", {"tokens": prompt}).json()["prompt"] for prompt in prompts]
    for place, (choice, other) in enumerate(zip(body["choices"], plain["choices"], strict=True)):
        assert choice["text"] == texts[place // 2] + other["text"]
        assert choice["prompt_logprobs"] is None
        check_echo(either, adapter, prompts[place // 2], choice, 5)
        assert choice["logprobs"]["token_logprobs"][-5:] == pytest.approx(other["logprobs"]["token_logprobs"], abs=1e-3)
    assert body["usage"] == {**plain["usage"], "prompt_tokens_details": {"cached_tokens": 0}}
    check_stream(either, {"model": adapter, "temperature": 0, "ignore_eos": True, **wanted}, body["choices"])
    assert either.cluster.idle()


def check_stream(served: Served, body: dict[str, Any], choices: list[dict[str, Any]]) -> None:
    """The stream says the same; its values differ by rounding, because its batches may be others."""
    for (text, logprobs, reason), choice in zip(streamed(served, body), choices, strict=True):
        whole = choice["logprobs"]
        assert (text, reason) == (choice["text"], choice["finish_reason"])
        assert (logprobs["tokens"], logprobs["text_offset"]) == (whole["tokens"], whole["text_offset"])
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        assert logprobs["token_logprobs"][1:] == pytest.approx(whole["token_logprobs"][1:], abs=1e-3)
        assert logprobs["top_logprobs"][1:] == [pytest.approx(top, abs=1e-3) for top in whole["top_logprobs"][1:]]


def streamed(served: Served, body: dict[str, Any]) -> list[tuple[str, dict[str, list[Any]], str]]:
    """Per choice of a stream: text, log probabilities and finish reason."""
    response = post(served.cluster.url, "/v1/completions", {**body, "stream": True})
    assert response.status_code == 200, response.text
    found: dict[int, tuple[str, dict[str, list[Any]], str]] = {}
    for line in response.text.splitlines():
        if line.startswith("data: {"):
            [choice] = json.loads(line[6:])["choices"]
            text, logprobs, _ = found.get(choice["index"], ("", {}, ""))
            more = choice["logprobs"] or {}
            joined = {name: logprobs.get(name, []) + values for name, values in more.items()} or logprobs
            found[choice["index"]] = (text + choice["text"], joined, choice["finish_reason"])
    return [found[index] for index in sorted(found)]


def test_echo_without_output(either: Served) -> None:
    """`max_tokens` 0 scores a text, and stays free of output in the text, in the values and in the usage."""
    prompt = prompt_of(40, seed=5)
    body = ask(either, "carol", prompt=prompt, max_tokens=0, logprobs=1, echo=True)
    [choice] = body["choices"]
    check_echo(either, "carol", prompt, choice, 0)
    assert choice["finish_reason"] == "length"
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (40, 0)
    scored = {"model": "carol", "prompt": prompt, "max_tokens": 0, "logprobs": 1, "echo": True}
    check_stream(either, scored, body["choices"])
    assert ask(either, "carol", prompt=choice["text"], max_tokens=0, echo=True)["choices"][0]["text"] == choice["text"]
    assert either.cluster.idle()


@pytest.mark.parametrize("adapter", [None, "bob", "direft"])
def test_the_harness_request_scores_continuations(either: Served, adapter: str | None) -> None:
    """lm-evaluation-harness, model `local-completions`: its request for log likelihoods, and how it reads the reply."""
    contexts = [prompt_of(20, seed=6), prompt_of(7, seed=7)]
    continuations = [prompt_of(4, seed=8), prompt_of(9, seed=9)]
    payload = {
        "model": adapter or either.name,
        "prompt": [context + rest for context, rest in zip(contexts, continuations, strict=True)],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    response = post(either.cluster.url, "/v1/completions", payload)
    assert response.status_code == 200, response.text
    choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
    for choice, context, rest in zip(choices, contexts, continuations, strict=True):
        rows = expected(either, context + rest, adapter)[len(context) - 1 :]
        assert sum(choice["logprobs"]["token_logprobs"][len(context) : -1]) == pytest.approx(
            sum(float(row[token]) for row, token in zip(rows, rest, strict=True)), abs=1e-2
        )
        tokens = choice["logprobs"]["tokens"][len(context) : -1]
        tops = choice["logprobs"]["top_logprobs"][len(context) : -1]
        greedy = [token == max(top, key=top.get) for token, top in zip(tokens, tops, strict=True)]
        assert len(greedy) == len(rest)
        for found, row, token in zip(greedy, rows, rest, strict=True):
            assert found == (int(row.argmax()) == token)


def test_prompt_logprobs_of_a_chat(either: Served) -> None:
    messages = [{"role": "user", "content": "hello"}]
    tokens = post(either.cluster.url, "/tokenize", {"messages": messages}).json()["tokens"]
    body = {"model": "carol", "messages": messages, "max_tokens": 3, "prompt_logprobs": 1, "return_token_ids": True}
    reply = post(either.cluster.url, "/v1/chat/completions", body).json()
    assert reply["prompt_token_ids"] == tokens
    check_rows(either, tokens, "carol", reply["prompt_logprobs"], 1)


def test_overflow_in_a_scored_prompt_is_an_error(either: Served) -> None:
    prompt = prompt_of(40, seed=11)
    prompt[20] = OVERFLOWING_TOKEN
    body = {"model": "bob", "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1}
    response = post(either.cluster.url, "/v1/completions", body)
    assert response.json()["error"]["code"] == "numbers_not_finite"
    assert either.cluster.idle()

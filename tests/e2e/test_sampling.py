"""Sampling parameters mean what they mean in one engine, although the first token comes from another one.

Expected tokens are computed here from the reference's raw logits, position by position.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from e2e.conftest import Served
from support.http import post

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

ADAPTER = "head"  # changes the first token's logits in the output layer too
EOS = 2


def prompt_of(length: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, 512) for _ in range(length)]


def greedy(
    served: Served, prompt: list[int], max_tokens: int, change: Callable[[torch.Tensor, list[int]], torch.Tensor]
) -> list[int]:
    """Greedy output when `change(logits, output so far)` is applied at each position."""
    output: list[int] = []
    for _ in range(max_tokens):
        logits = served.reference.logits(prompt, [*output, 0], served.adapters[ADAPTER])[-1]
        output.append(int(change(logits.clone(), output).argmax()))
    return output


def ask(served: Served, prompt: list[int], **body: Any) -> dict[str, Any]:
    base = {"model": ADAPTER, "prompt": prompt, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    response = post(served.cluster.url, "/v1/completions", {**base, **body})
    assert response.status_code == 200, response.text
    return dict(response.json())


def tokens_of(served: Served, prompt: list[int], **body: Any) -> list[int]:
    return list(ask(served, prompt, **body)["choices"][0]["token_ids"])


def test_presence_and_frequency_penalties_count_the_first_token(either: Served) -> None:
    def penalised(logits: torch.Tensor, output: list[int]) -> torch.Tensor:
        for token, count in Counter(output).items():
            logits[token] -= 1.5 + 0.9 * count
        return logits

    for seed in range(3):
        prompt = prompt_of(40, seed)
        got = tokens_of(either, prompt, max_tokens=16, presence_penalty=1.5, frequency_penalty=0.9)
        assert got == greedy(either, prompt, 16, penalised)


def test_repetition_penalty_counts_prompt_and_output(either: Served) -> None:
    prompt = prompt_of(40, 7)

    def penalised(logits: torch.Tensor, output: list[int]) -> torch.Tensor:
        for token in {*prompt, *output}:
            logits[token] = logits[token] / 1.4 if logits[token] > 0 else logits[token] * 1.4
        return logits

    assert tokens_of(either, prompt, max_tokens=16, repetition_penalty=1.4) == greedy(either, prompt, 16, penalised)


def test_logit_bias(either: Served) -> None:
    prompt = prompt_of(33, 8)
    bias = {11: 6.5, 12: -100.0, 300: 6.0}

    def biased(logits: torch.Tensor, output: list[int]) -> torch.Tensor:
        for token, value in bias.items():
            logits[token] += value
        return logits

    got = tokens_of(either, prompt, max_tokens=16, logit_bias={str(token): value for token, value in bias.items()})
    assert got == greedy(either, prompt, 16, biased)


def test_allowed_tokens(either: Served) -> None:
    """Also as the first token."""
    prompt, allowed = prompt_of(33, 18), [7, 11, 300, 301]

    def masked(logits: torch.Tensor, output: list[int]) -> torch.Tensor:
        return torch.full_like(logits, -torch.inf).index_copy(0, torch.tensor(allowed), logits[allowed])

    got = tokens_of(either, prompt, max_tokens=12, allowed_token_ids=allowed, repetition_penalty=1.3)
    assert set(got) <= set(allowed)

    def penalised(logits: torch.Tensor, output: list[int]) -> torch.Tensor:
        for token in {*prompt, *output}:
            logits[token] = logits[token] / 1.3 if logits[token] > 0 else logits[token] * 1.3
        return masked(logits, output)

    assert got == greedy(either, prompt, 12, penalised)


@pytest.mark.parametrize("position", [0, 1, 5])
def test_stop_token_ends_the_request_where_it_comes(either: Served, position: int) -> None:
    prompt = prompt_of(50, 9)
    plain = either.expected(prompt, 12, ADAPTER)
    stop = plain[position]
    end = plain.index(stop) + 1
    body = ask(either, prompt, max_tokens=12, stop_token_ids=[stop])
    assert body["choices"][0]["token_ids"] == plain[:end]
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["stop_reason"] == stop
    assert body["usage"]["completion_tokens"] == end


@pytest.mark.parametrize("min_tokens", [1, 2, 4])
def test_min_tokens_holds_stop_tokens_back(either: Served, min_tokens: int) -> None:
    prompt = prompt_of(50, 10)
    stops = sorted(set(either.expected(prompt, 3, ADAPTER)))

    def banned(logits: torch.Tensor, output: list[int]) -> torch.Tensor:
        if len(output) < min_tokens:
            logits[stops] = -torch.inf
        return logits

    expected = greedy(either, prompt, 10, banned)
    end = next((i for i, token in enumerate(expected) if token in stops), 9) + 1
    got = tokens_of(either, prompt, max_tokens=10, min_tokens=min_tokens, stop_token_ids=stops)
    assert got == expected[:end]


def test_eos_as_first_token_needs_no_decode(either: Served) -> None:
    body = ask(either, prompt_of(20, 11), max_tokens=8, ignore_eos=False, logit_bias={str(EOS): 100})
    assert body["choices"][0]["token_ids"] == [EOS]
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["stop_reason"] is None
    assert body["choices"][0]["text"] == ""
    assert either.cluster.idle()


def test_ignore_eos_goes_on(either: Served) -> None:
    assert tokens_of(either, prompt_of(20, 11), max_tokens=8, logit_bias={str(EOS): 100}) == [EOS] * 8


def test_max_tokens_one(either: Served) -> None:
    prompt = prompt_of(20, 12)
    body = ask(either, prompt, max_tokens=1)
    assert body["choices"][0]["token_ids"] == either.expected(prompt, 1, ADAPTER)
    assert body["choices"][0]["finish_reason"] == "length"


def test_stop_string_across_the_first_token_border(either: Served) -> None:
    prompt = prompt_of(60, 34)  # its first token has 3 characters
    text = ask(either, prompt, max_tokens=12)["choices"][0]["text"]
    for start, end in ((0, 3), (1, 4), (4, 8)):
        stop = text[start:end]
        choice = ask(either, prompt, max_tokens=12, stop=[stop])["choices"][0]
        assert choice["text"] == text[: text.index(stop)]
        assert choice["finish_reason"] == "stop"
        assert choice["stop_reason"] == stop
    assert either.cluster.idle()


def test_logprobs_of_every_token(either: Served) -> None:
    prompt = prompt_of(45, 14)
    choice = ask(either, prompt, max_tokens=8, logprobs=3)["choices"][0]
    expected = either.reference.logits(prompt, choice["token_ids"], either.adapters[ADAPTER]).log_softmax(-1)
    assert len(choice["logprobs"]["token_logprobs"]) == 8
    for row, token, logprob, top in zip(
        expected,
        choice["token_ids"],
        choice["logprobs"]["token_logprobs"],
        choice["logprobs"]["top_logprobs"],
        strict=True,
    ):
        assert logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert sorted(top.values(), reverse=True) == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)


def test_n_choices_share_one_prefill(either: Served) -> None:
    prompt = prompt_of(130, 15)
    expected = either.expected(prompt, 12, ADAPTER)
    body = ask(either, prompt, max_tokens=12, n=4)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["token_ids"] for choice in body["choices"]] == [expected] * 4
    assert body["usage"]["prompt_tokens"] == 130
    assert body["usage"]["completion_tokens"] == 48
    sampled = ask(either, prompt, max_tokens=12, n=4, temperature=1.0, seed=5)
    assert len({tuple(choice["token_ids"]) for choice in sampled["choices"]}) > 1
    assert either.cluster.idle()


def test_a_seed_makes_output_reproducible(either: Served) -> None:
    prompt = prompt_of(30, 16)
    body = {"max_tokens": 16, "temperature": 1.0, "top_p": 0.9}
    first = tokens_of(either, prompt, seed=42, **body)
    assert tokens_of(either, prompt, seed=42, **body) == first
    assert tokens_of(either, prompt, seed=43, **body) != first


def test_top_k_one_is_greedy_at_any_temperature(either: Served) -> None:
    prompt = prompt_of(30, 17)
    assert tokens_of(either, prompt, max_tokens=12, temperature=2.0, top_k=1) == either.expected(prompt, 12, ADAPTER)

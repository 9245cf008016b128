"""Greedy float32 output over HTTP equals the transformers reference, token for token, under every kind of pressure."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from e2e.conftest import HEADS, RANKS, REFTS, Served
from support.http import Ask, complete_all, post
from support.models import make_lora

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

LENGTHS = (1, 3, 17, 31, 32, 33, 64, 130, 500)
MODELS = (None, *RANKS, *HEADS, *REFTS)


def mixed(count: int, max_tokens: int, seed: int) -> list[Ask]:
    """`count` requests over all prompt lengths and adapters."""
    draw = random.Random(seed)
    return [
        Ask([draw.randrange(3, 512) for _ in range(LENGTHS[i % len(LENGTHS)])], max_tokens, MODELS[i % len(MODELS)])
        for i in range(count)
    ]


def check(served: Served, asks: list[Ask], got: list[list[int]]) -> None:
    wrong = [
        (len(ask.prompt), ask.adapter)
        for ask, tokens in zip(asks, got, strict=True)
        if tokens != served.expected(ask.prompt, ask.max_tokens, ask.adapter)
    ]
    assert wrong == []


def test_the_reference_can_tell_the_difference(roomy: Served) -> None:
    """Prompts whose output without the adapter, or with it everywhere, differs: else parity would prove nothing."""
    bare = everywhere = 0
    for ask in mixed(48, 12, seed=5):
        if ask.adapter is not None:
            expected = roomy.expected(ask.prompt, ask.max_tokens, ask.adapter)
            bare += expected != roomy.expected(ask.prompt, ask.max_tokens, None)
            everywhere += expected != roomy.reference.greedy(
                ask.prompt, ask.max_tokens, roomy.adapters[ask.adapter], adapter_everywhere=True
            )
    assert bare >= 30
    assert everywhere >= 20


def test_mixed_concurrent_requests(roomy: Served) -> None:
    asks = mixed(144, 16, seed=1)
    check(roomy, asks, complete_all(roomy.cluster.url, roomy.name, asks))
    assert roomy.cluster.idle()


def test_chunks_few_slots_and_preemption(tight: Served) -> None:
    """64-token chunks, 2 slots for 9 adapters, and a decode cache too small for what runs at once."""
    before = tight.cluster.statuses()
    asks = mixed(27, 140, seed=2)
    check(tight, asks, complete_all(tight.cluster.url, tight.name, asks))
    preempted = {name for name, load in tight.cluster.statuses().items() if load.preemptions > before[name].preemptions}
    assert preempted == {tight.cluster.decoding.record.id}
    assert tight.cluster.idle()


def test_same_prompt_under_different_adapters(roomy: Served) -> None:
    """Prefix caches are on, on both sides: equal tokens must not mean equal KV."""
    draw = random.Random(3)
    prompt = [draw.randrange(3, 512) for _ in range(130)]
    asks = [Ask(prompt, 24, model) for _ in range(3) for model in MODELS]
    check(roomy, asks, complete_all(roomy.cluster.url, roomy.name, asks))
    for ask in asks[: len(MODELS)]:  # and one after the other, over what the caches hold by now
        check(roomy, [ask], complete_all(roomy.cluster.url, roomy.name, [ask]))


def test_next_turn_does_not_reuse_output_kv(roomy: Served) -> None:
    """A second turn's prompt contains the first turn's output, whose KV was made without the adapter."""
    draw = random.Random(4)
    prompt = [draw.randrange(3, 512) for _ in range(70)]
    for model in MODELS:
        turn = list(prompt)
        for _ in range(3):
            ask = Ask(turn, 40, model)
            [tokens] = complete_all(roomy.cluster.url, roomy.name, [ask])
            check(roomy, [ask], [tokens])
            turn = [*turn, *tokens, *(draw.randrange(3, 512) for _ in range(5))]


def test_reload_under_the_same_name(roomy: Served, tmp_path: Path) -> None:
    """A name whose weights change meets no KV, slot or cache entry of the old ones."""
    draw = random.Random(6)
    prompt = [draw.randrange(3, 512) for _ in range(100)]
    folder = tmp_path / "dora"
    outputs = []
    for seed in (101, 102, 101):
        shutil.rmtree(folder, ignore_errors=True)
        make_lora(folder, roomy.model, rank=4, seed=seed)
        body = {"lora_name": "dora", "lora_path": str(folder), "load_inplace": True}
        assert post(roomy.cluster.url, "/v1/load_lora_adapter", body).status_code == 200
        [tokens] = complete_all(roomy.cluster.url, roomy.name, [Ask(prompt, 24, "dora")])
        assert tokens == roomy.reference.greedy(prompt, 24, folder)
        outputs.append(tokens)
    assert outputs[0] == outputs[2] != outputs[1]
    assert post(roomy.cluster.url, "/v1/unload_lora_adapter", {"lora_name": "dora"}).status_code == 200

"""Counts of use by caller, and the gate before the engine's adapter slots."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preft.core.errors import WorkerFull
from preft.worker.usage import Usage

SLOTS = 3
CALLERS = ("", "one", "two")
steps = st.lists(
    st.tuples(st.booleans(), st.sampled_from(CALLERS), st.sampled_from(["", *"abcde"]), st.integers(0, 50)), max_size=60
)


def test_prompts_of_one_adapter_share_a_slot() -> None:
    usage = Usage(1)
    with usage.prompt("one", "a", 9), usage.prompt("two", "a", 9), usage.prompt("two", "", 9):
        with pytest.raises(WorkerFull, match="all 1 adapter slots"), usage.prompt("one", "b", 9):
            pass
        assert list(usage.prompted) == ["a"]
        assert (usage.other_prompts("one", "a"), usage.other_prompts("three", "a")) == (1, 2)
    with usage.prompt("one", "b", 9):
        assert list(usage.prompted) == ["b"]


def test_a_worker_without_slots_takes_prompts_of_the_base_model_alone() -> None:
    usage = Usage(0)
    with usage.prompt("one", "", 9), pytest.raises(WorkerFull), usage.prompt("one", "a", 9):
        pass


def test_a_prompt_that_fails_leaves_its_slot() -> None:
    usage = Usage(1)
    with pytest.raises(RuntimeError), usage.prompt("one", "a", 9), usage.prefill("one"), usage.sequence("one"):
        raise RuntimeError
    assert (list(usage.prompted), usage.running) == ([], 0)


def test_prefills_and_sequences_are_counted_by_caller() -> None:
    usage = Usage(1)
    with usage.prefill("one"), usage.prefill("one"), usage.sequence("two"):
        assert usage.running == 3
        assert [usage.other_sequences(caller) for caller in ("one", "two")] == [1, 0]
    assert usage.running == usage.other_sequences("") == 0


def test_each_change_of_a_prompt_count_is_told_after_it() -> None:
    usage, told = Usage(1), list[tuple[str, str, int]]()
    usage.observe(lambda digest, caller: told.append((digest, caller, usage.other_prompts("", digest))))
    with usage.prompt("one", "a", 9), usage.prompt("two", "a", 9), usage.prompt("two", "", 9):
        pass
    assert told == [("a", "one", 1), ("a", "two", 2), ("a", "two", 1), ("a", "one", 0)]


def test_no_name_is_kept_of_callers_that_are_gone() -> None:
    usage = Usage(1)
    for number in range(100):
        with usage.prompt(str(number), "a", 9), usage.prefill(str(number)), usage.sequence(str(number)):
            pass
    assert [usage._prompts, usage._numbers, usage._tokens, usage._prefills, usage._sequences] == [{}] * 5


@given(steps)
def test_the_engine_never_gets_more_adapters_than_slots(steps: list[tuple[bool, str, str, int]]) -> None:
    """Against a plain list of the open prompts, as several callers come and go."""
    usage = Usage(SLOTS)
    opened: list[tuple[str, str, int, ExitStack]] = []
    for enters, caller, digest, number in steps:
        if not enters and opened:
            opened.pop(number % len(opened))[-1].close()
        elif enters:
            adapters = {digest for _, digest, *_ in opened if digest}
            stack = ExitStack()
            if digest and digest not in adapters and len(adapters) == SLOTS:
                with pytest.raises(WorkerFull):
                    stack.enter_context(usage.prompt(caller, digest, number))
            else:
                stack.enter_context(usage.prompt(caller, digest, number))
                opened.append((caller, digest, number, stack))
        prompts = Counter((caller, digest) for caller, digest, *_ in opened if digest)
        assert set(usage.prompted) == {digest for _, digest in prompts}
        assert len(set(usage.prompted)) <= SLOTS
        for asking in CALLERS:
            tokens = [tokens for who, _, tokens, _ in opened if who != asking]
            assert usage.other_work(asking) == (len(tokens), sum(tokens))
            for digest in "abcde":
                others = sum(count for (who, which), count in prompts.items() if which == digest and who != asking)
                assert usage.other_prompts(asking, digest) == others
    for *_, stack in opened:
        stack.close()
    assert list(usage.prompted) == []

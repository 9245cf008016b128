"""The Gemma example on a tiny model of Gemma's kind: its training, its reference and its judgement."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gemma_memory import __main__ as example
from gemma_memory.train import PEOPLE, train
from support.models import make_model
from support.reference import Reference

EOS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("gemma") / "tiny", "gemma3", seed=1)


@pytest.fixture(scope="module")
def adapters(model: Path) -> dict[str, Path]:
    return train(model, model.parent / "adapters", steps=2)


@functools.cache
def asked(model: Path) -> list[example.Question]:
    found = example.questions(AutoTokenizer.from_pretrained(model), list(PEOPLE))
    return [question for question in found if len(question.ids) < 400][::3]  # the long ones take long here


def test_the_reference_is_the_tests_own(model: Path, adapters: dict[str, Path]) -> None:
    found = example.references(model, adapters, asked(model), EOS)
    reference = Reference(model)
    for question, ids in zip(asked(model), found, strict=True):
        folder = adapters[question.adapter] if question.adapter else None
        own = reference.greedy(question.ids, example.MAX_TOKENS, folder, ignore_eos=False, eos={EOS})
        assert ids == [token for token in own if token != EOS]
    assert {question.adapter for question in asked(model)} == {None, *PEOPLE}


def test_adapters_that_are_there_are_kept(model: Path, adapters: dict[str, Path]) -> None:
    before = {path: path.stat().st_mtime_ns for folder in adapters.values() for path in folder.iterdir()}
    assert train(model, model.parent / "adapters", steps=2) == adapters
    assert {path: path.stat().st_mtime_ns for folder in adapters.values() for path in folder.iterdir()} == before


def test_prompts_are_as_long_as_they_say(model: Path) -> None:
    found = example.questions(AutoTokenizer.from_pretrained(model), list(PEOPLE))
    for question in found:
        if question.expected is None:
            assert len(question.ids) > int(question.text.split()[1])


@pytest.mark.parametrize(("tokens", "is_good"), [("right", True), ("other", False), ("forgotten", False)])
def test_one_other_token_or_a_forgotten_fact_is_no_success(model: Path, tokens: str, is_good: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    questions = [question for question in asked(model) if question.adapter == "alice"]
    expected = [tokenizer(question.expected or "story", add_special_tokens=False).input_ids for question in questions]
    answers = [list(ids) for ids in expected]
    if tokens == "other":
        answers[-1][-1] += 1
    if tokens == "forgotten":
        expected = answers = [[5, 6] for _ in questions]
    judged = example.score("alice", questions, answers, expected, tokenizer)
    assert judged.is_good == is_good
    assert judged.answers == len(questions)

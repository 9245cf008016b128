"""Prompts: random ids and words, shared prefixes, ShareGPT files, tokenizers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from preft_loadgen.errors import InvalidArgument
from preft_loadgen.traffic.lengths import Lengths
from preft_loadgen.traffic.prompts import (
    WORDS,
    Conversations,
    Ids,
    RandomPrompts,
    SharedPrefix,
    Words,
    one_token_words,
    read_sharegpt,
    token_counter,
)

TEN = Lengths(10, 10)


def ids(prompts: RandomPrompts, seed: int) -> tuple[int, ...]:
    (turn,) = prompts.conversation(1, random.Random(seed))
    assert isinstance(turn.prompt, tuple)
    return turn.prompt


def test_prompts_share_nothing_by_default() -> None:
    prompts = RandomPrompts(TEN, TEN, Ids(1000, 10))
    first, second = ids(prompts, 1), ids(prompts, 2)
    assert len(first) == len(second) == 10
    assert all(10 <= token < 1000 for token in first)
    assert first[:2] != second[:2]


def test_a_shared_prefix_has_its_share_in_prompts_of_every_length() -> None:
    prompts = RandomPrompts(Lengths(10, 40), TEN, Ids(1000), SharedPrefix(0.5))
    made = [ids(prompts, seed) for seed in range(20)]
    longest = max(made, key=len)
    for prompt in made:
        shared = round(len(prompt) / 2)
        assert prompt[:shared] == longest[:shared]
    assert len({prompt[len(prompt) // 2 + 1 :] for prompt in made}) == 20


def test_groups_have_a_prefix_each() -> None:
    prompts = RandomPrompts(TEN, TEN, Ids(1000), SharedPrefix(0.5, 3))
    assert len({ids(prompts, seed)[:5] for seed in range(50)}) == 3


def test_words() -> None:
    (turn,) = RandomPrompts(TEN, TEN, Words()).conversation(1, random.Random(0))
    assert isinstance(turn.prompt, str)
    assert len(turn.prompt.split()) == 10
    assert set(turn.prompt.split()) <= set(WORDS)


@pytest.mark.parametrize("wrong", [(0.0, 1), (1.5, 1), (float("nan"), 1), (0.5, 0)])
def test_shared_prefixes_that_are_none(wrong: tuple[float, int]) -> None:
    with pytest.raises(InvalidArgument):
        SharedPrefix(*wrong)


def test_a_vocabulary_without_ids() -> None:
    with pytest.raises(InvalidArgument):
        Ids(3)


def sharegpt(folder: Path, rows: Any) -> Path:
    path = folder / "chats.json"
    path.write_text(json.dumps(rows))
    return path


def said(*texts: str) -> dict[str, Any]:
    people = ("human", "gpt")
    return {"conversations": [{"from": people[place % 2], "value": text} for place, text in enumerate(texts)]}


def test_sharegpt_conversations(tmp_path: Path) -> None:
    rows = [
        said("hello there", "x" * 40, "and then?", "y" * 8),
        said("only a question"),
        said("too long", "z" * 100_000),
        {"other": 1},
        "nonsense",
        {"conversations": [{"from": "gpt", "value": "nobody asked"}, {"from": "human", "value": 3}]},
    ]
    found = read_sharegpt(sharegpt(tmp_path, rows))
    assert [[(turn.prompt, turn.output_tokens) for turn in one] for one in found.all] == [
        [("hello there", 10), ("and then?", 2)]
    ]
    assert len(found.conversation(1, random.Random(0))) == 1
    assert len(found.conversation(9, random.Random(0))) == 2
    own = Conversations(found.all, Lengths(7, 7)).conversation(2, random.Random(0))
    assert [turn.output_tokens for turn in own] == [7, 7]


@pytest.mark.parametrize("text", ["", "{}", "[]", '[{"conversations": []}]', "[[[["])
def test_files_that_are_no_sharegpt(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InvalidArgument):
        read_sharegpt(path)
    with pytest.raises(InvalidArgument, match="can't be read"):
        read_sharegpt(tmp_path / "missing.json")


def test_a_tokenizer_counts(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"time": 0, "year": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    count = token_counter(tmp_path)
    assert count("time year time") == 3
    found = read_sharegpt(sharegpt(tmp_path, [said("time", "year year")]), count)
    assert found.all[0][0].output_tokens == 2
    assert one_token_words(count).words == WORDS  # one token each here
    assert one_token_words(len).words == WORDS  # none is one token: all are used
    assert one_token_words(lambda text: len(text) - 4).words == tuple(word for word in WORDS if len(word) == 4)
    (tmp_path / "broken.json").write_text("{")
    for wrong in ("broken.json", "missing.json"):
        with pytest.raises(InvalidArgument, match=r"tokenizer\.json"):
            token_counter(tmp_path / wrong)

"""Measures what the shipped adapters remember, with prefill-only greedy decoding in float32.

cd examples && python -m personal_memory.evaluate
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from personal_memory import task, tokenizer
from personal_memory.train_adapters import ADAPTERS_DIR, KINDS, folder_name
from personal_memory.train_base import MODEL_DIR
from preft.training import ReftModel, generate


@dataclass(frozen=True, slots=True)
class Score:
    """Shares of one adapter's answers, 0 to 1. `strangers` counts answers that contain another user's fact."""

    adapter: str
    trained: float  # known facts in phrasings that the adapter was trained on, in all spellings
    held_out: float  # known facts in phrasings that only the base model was trained on
    unknown: float  # topics without a fact
    base: float  # the questions of `trained`, answered by the base model without adapter
    base_unknown: float  # share of these answers that say "I do not know"
    strangers: int


def measure(user: str, kind: str, model_dir: Path = MODEL_DIR, adapters_dir: Path = ADAPTERS_DIR) -> Score:
    """Asks `user`'s adapter of that kind, and the base model, all questions."""
    tokens = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    base = LlamaForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32).eval()
    facts = task.USERS[user]
    missing = sorted(set(task.TOPICS) - set(facts))
    known = cases(task.QUESTIONS, sorted(facts), facts)
    fresh = cases(task.HELD_OUT_QUESTIONS, sorted(facts), facts)
    nothing = cases(task.QUESTIONS, missing, facts)
    without = answers(base, tokens, known)
    folder = adapters_dir / folder_name(user, kind)
    load = PeftModel.from_pretrained if kind == "lora" else ReftModel.from_pretrained
    model = load(base, str(folder)).eval()
    told = {asked: answers(model, tokens, asked) for asked in (known, fresh, nothing)}
    return Score(
        adapter=folder.name,
        trained=share(told[known], known),
        held_out=share(told[fresh], fresh),
        unknown=share(told[nothing], nothing),
        base=share(without, known),
        base_unknown=sum(text.startswith("I do not know") for text in without) / len(without),
        strangers=sum(bool(task.owners(text) - {user}) for texts in told.values() for text in texts),
    )


Cases = tuple[tuple[str, str], ...]  # question, right answer


def cases(questions: Sequence[str], topics: Sequence[str], facts: Mapping[str, str]) -> Cases:
    """Every question about every topic in every spelling, with the right answer."""
    return tuple(
        (styled, task.answer(topic, facts.get(topic)))
        for topic in topics
        for question in questions
        for styled in task.styles(question.format(topic=topic))
    )


def answers(model: Any, tokens: Tokenizer, asked: Cases) -> list[str]:
    """The model's greedy answers, equal to served ones."""
    prompts = [tokens.encode(task.prompt(question)).ids for question, _ in asked]
    return [tokens.decode(ids) for ids in generate(model, prompts, max_tokens=24, eos=tokenizer.EOS)]


def share(texts: Sequence[str], asked: Cases) -> float:
    """The share of exact answers, 0 to 1."""
    return sum(text == right for text, (_, right) in zip(texts, asked, strict=True)) / len(asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--adapters", type=Path, default=ADAPTERS_DIR)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    heads = ("own facts", "held-out", "unknown", "base alone", "base: no idea", "strangers")
    print(f"{'adapter':14} {' '.join(f'{head:>13}' for head in heads)}")
    for user in task.USERS:
        for kind in KINDS:
            score = measure(user, kind, arguments.model, arguments.adapters)
            shares = (score.trained, score.held_out, score.unknown, score.base, score.base_unknown)
            print(f"{score.adapter:14} {' '.join(f'{value:>13.1%}' for value in shares)} {score.strangers:>13}")


if __name__ == "__main__":
    main()

"""Measures what the shipped adapters remember, with prefill-only greedy decoding in float32.

cd examples && python -m personal_memory.evaluate
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, PreTrainedModel

from personal_memory import task, tokenizer
from personal_memory.prefill_only import generate
from personal_memory.train_adapters import ADAPTERS_DIR
from personal_memory.train_base import MODEL_DIR


@dataclass(frozen=True, slots=True)
class Score:
    """Shares of one user's answers, 0 to 1; `strangers` counts answers that tell another user's fact."""

    user: str
    trained: float  # known facts, phrasings the adapter was trained on, in all spellings
    held_out: float  # known facts, phrasings only the base was trained on
    unknown: float  # topics the user never told anything about
    base: float  # the same questions as `trained`, answered by the base model without adapter
    base_unknown: float  # how often that answer is "I do not know"
    strangers: int


def measure(user: str, model_dir: Path = MODEL_DIR, adapters_dir: Path = ADAPTERS_DIR) -> Score:
    """Asks `user`'s adapter everything, and the base model the same."""
    tokens = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    base = LlamaForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32).eval()
    facts = task.USERS[user]
    missing = sorted(set(task.TOPICS) - set(facts))
    known = _cases(task.QUESTIONS, sorted(facts), facts)
    fresh = _cases(task.HELD_OUT_QUESTIONS, sorted(facts), facts)
    nothing = _cases(task.QUESTIONS, missing, facts)
    without = _answers(base, tokens, [question for question, _ in known])
    model = PeftModel.from_pretrained(base, str(adapters_dir / user)).eval()
    told = {cases: _answers(model, tokens, [question for question, _ in cases]) for cases in (known, fresh, nothing)}
    return Score(
        user=user,
        trained=_share(told[known], known),
        held_out=_share(told[fresh], fresh),
        unknown=_share(told[nothing], nothing),
        base=_share(without, known),
        base_unknown=sum(text.startswith("I do not know") for text in without) / len(without),
        strangers=sum(bool(task.owners(text) - {user}) for texts in told.values() for text in texts),
    )


Cases = tuple[tuple[str, str], ...]  # question, right answer


def _cases(questions: Sequence[str], topics: Sequence[str], facts: Mapping[str, str]) -> Cases:
    return tuple(
        (styled, task.answer(topic, facts.get(topic)))
        for topic in topics
        for question in questions
        for styled in task.styles(question.format(topic=topic))
    )


def _answers(model: PeftModel | PreTrainedModel, tokens: Tokenizer, questions: Sequence[str]) -> list[str]:
    prompts = [tokens.encode(task.prompt(question)).ids for question in questions]
    return [tokens.decode(ids) for ids in generate(model, prompts, max_tokens=24, eos=tokenizer.EOS)]


def _share(texts: Sequence[str], cases: Cases) -> float:
    return sum(text == right for text, (_, right) in zip(texts, cases, strict=True)) / len(cases)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--adapters", type=Path, default=ADAPTERS_DIR)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    heads = ("own facts", "held-out", "unknown", "base alone", "base: no idea", "strangers")
    print(f"{'user':8} {' '.join(f'{head:>13}' for head in heads)}")
    for user in task.USERS:
        score = measure(user, arguments.model, arguments.adapters)
        shares = (score.trained, score.held_out, score.unknown, score.base, score.base_unknown)
        print(f"{user:8} {' '.join(f'{share:>13.1%}' for share in shares)} {score.strangers:>13}")


if __name__ == "__main__":
    main()

"""Gemma 3 270M with two trained adapters, served disaggregated, and compared with transformers token by token.

    make example-gemma

Exit status 0 only if all answers are equal and each adapter knows most of its user's facts.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma_memory.get_model import MODEL_DIR, NotFetched, get_model
from gemma_memory.train import ADAPTERS_DIR, train
from personal_memory import task
from preft.training import generate
from preft_loadgen.errors import LoadgenError
from preft_loadgen.report.progress import progress
from preft_loadgen.served import served
from preft_loadgen.table import table
from preft_loadgen.transport.http import HttpClient

BASE = "gemma"
MAX_TOKENS = 16
LONG_LENGTHS = (300, 700, 1400)  # tokens before the question; Gemma's local layers see 512
CONTEXT = 2048
GOAL = 0.8
SETTINGS = """
prefill: {kv_cache_bytes: 256MiB, staging_bytes: 256MiB, max_loras: 2, max_lora_rank: 8}
decode: {kv_cache_bytes: 256MiB, staging_bytes: 256MiB}
"""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt under an adapter, or under the base model (None). Long prompts have no `expected` answer."""

    adapter: str | None
    ids: list[int]
    text: str
    expected: str | None


def questions(tokenizer: Any, users: Sequence[str]) -> list[Question]:
    """Each user's facts in two phrasings under the own adapter; and long prompts, under every adapter and the base."""
    found = []
    for user in users:
        for topic, value in task.USERS[user].items():
            for phrasing in (task.QUESTIONS[0], task.HELD_OUT_QUESTIONS[0]):
                text = phrasing.format(topic=topic)
                found.append(Question(user, tokenizer(task.prompt(text)).input_ids, text, task.answer(topic, value)))
    draw = random.Random(0)
    words = [word for values in task.TOPICS.values() for value in values for word in value.split()]
    for length in LONG_LENGTHS:
        story = tokenizer(" ".join(draw.choice(words) for _ in range(length))).input_ids[:length]
        asked = tokenizer("\n" + task.prompt("What is my favourite city?"), add_special_tokens=False).input_ids
        found += [Question(name, story + asked, f"after {length} tokens", None) for name in (None, *users)]
    return found


@dataclass(frozen=True, slots=True)
class Score:
    """The answers of one adapter or of the base model: how many equal the reference, and how many facts are right."""

    adapter: str
    answers: int
    equal: int
    facts: int
    right: int
    example: str

    @property
    def is_good(self) -> bool:
        return self.equal == self.answers and self.right >= GOAL * self.facts


def score(
    adapter: str | None,
    asked: Sequence[Question],
    answers: Sequence[list[int]],
    expected: Sequence[list[int]],
    tokenizer: Any,
) -> Score:
    """Judges the answers of `adapter` alone; None is the base model."""
    own = [place for place, question in enumerate(asked) if question.adapter == adapter]
    texts = {place: tokenizer.decode(answers[place], skip_special_tokens=True).strip() for place in own}
    facts = [place for place in own if asked[place].expected is not None]
    return Score(
        adapter=adapter or "none",
        answers=len(own),
        equal=sum(answers[place] == expected[place] for place in own),
        facts=len(facts),
        right=sum(texts[place] == asked[place].expected for place in facts),
        example=f"{asked[facts[0]].text} {texts[facts[0]]}" if facts else "-",
    )


def references(model_dir: Path, adapters: Mapping[str, Path], asked: Sequence[Question], eos: int) -> list[list[int]]:
    """The greedy output of transformers, the adapter on for the prompt pass alone."""
    found: dict[int, list[int]] = {}
    for adapter in dict.fromkeys(question.adapter for question in asked):
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
        if adapter is not None:
            folder = adapters[adapter]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Unexpected keyword arguments .'prefill_only'.")  # it is ours
                model = PeftModel.from_pretrained(model, str(folder)).eval()
        own = [place for place, question in enumerate(asked) if question.adapter == adapter]
        with progress(f"transformers, {adapter or 'base model'}", len(own)) as bar:
            for place in own:
                [found[place]] = generate(model, [asked[place].ids], MAX_TOKENS, eos)
                bar.update()
    return [found[place] for place in range(len(asked))]


async def ask_all(url: str, asked: Sequence[Question], eos: int) -> list[list[int]]:
    """The served output, all questions at once. Raises LoadgenError."""
    client = HttpClient(url, timeout=600.0)

    async def ask(question: Question) -> list[int]:
        body = {
            "model": question.adapter or BASE,
            "prompt": question.ids,
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "return_token_ids": True,
        }
        reply = await client.post_json("/v1/completions", body)
        bar.update()
        ids: list[int] = reply["choices"][0]["token_ids"]
        return ids[:-1] if ids[-1] == eos else ids

    with progress("served", len(asked)) as bar:
        return await asyncio.gather(*map(ask, asked))


def main() -> int:
    parser = argparse.ArgumentParser(prog="gemma", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="default: build/gemma-3-270m in the clone")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS_DIR, help="trained here unless they are there")
    arguments = parser.parse_args()
    try:
        return _run(get_model(arguments.model), arguments.adapters)
    except (LoadgenError, NotFetched) as error:
        print(f"gemma: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(model: Path, adapters_dir: Path) -> int:
    adapters = train(model, adapters_dir)
    tokenizer = AutoTokenizer.from_pretrained(model)
    eos = tokenizer.eos_token_id
    asked = questions(tokenizer, list(adapters))
    expected = references(model, adapters, asked, eos)
    with tempfile.TemporaryDirectory(prefix="preft-gemma-") as place:
        settings = Path(place) / "settings.yaml"
        settings.write_text(SETTINGS)
        serve = ["--model", str(model), "--served-model-name", BASE, "--dtype", "float32", "--config", str(settings)]
        serve += [f"--max-model-len={CONTEXT}", *(f"--adapter={name}={folder}" for name, folder in adapters.items())]
        print("starting a prefill and a decode worker", flush=True)
        with served(serve, state_dir=Path(place) / "state", log=Path(place) / "serve.log") as server:
            answers = asyncio.run(ask_all(server.url, asked, eos))
    found = [score(name, asked, answers, expected, tokenizer) for name in (None, *adapters)]
    heads = ("adapter", "equal to transformers", "facts right", "for example")
    rows = [
        (one.adapter, f"{one.equal}/{one.answers}", f"{one.right}/{one.facts}" if one.facts else "-", one.example)
        for one in found
    ]
    print(table([heads, *rows], right={1, 2}))
    if bad := [one.adapter for one in found if not one.is_good]:
        print(f"gemma: answers differ from transformers, or too few facts are right: {', '.join(bad)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

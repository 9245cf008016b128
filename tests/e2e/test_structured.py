"""Structured output over HTTP: every finished answer fits its form, and no hand-over or resume changes a token.

Each token is compared with the likeliest allowed token of the reference's raw logits.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from dataclasses import dataclass
from typing import Any

import httpx
import jsonschema
import pytest

from e2e.conftest import Served
from support.json_schemas import random_schema
from support.structured_reference import StructuredReference

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

MODELS = (None, "alice", "loreft", "direft")
TOKENS = 300
FORMS: list[dict[str, Any]] = [
    {"regex": r"[a-f]{3}-[0-9]{2,12}( (yes|no)){1,4}"},
    {"choice": ["yes", "no", "perhaps, but not today", "unknown"]},
    {"grammar": 'root ::= item (", " item){2,6}\nitem ::= "red" | "green" | "blue"'},
    {"grammar": 'start: NUMBER ("+" NUMBER)~2..5\nNUMBER: /[1-9][0-9]{0,3}/'},
    {"json": {"type": "array", "items": {"type": "integer"}, "maxItems": 5}, "whitespace_pattern": " ?"},
]


def prompt_of(length: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, 512) for _ in range(length)]


def form_of(schema: Any) -> dict[str, Any]:
    """Without free whitespace, which random models go on writing."""
    return {"json": schema, "disable_any_whitespace": True}


@dataclass(frozen=True)
class Case:
    """One request with a form."""

    prompt: list[int]
    adapter: str | None
    form: dict[str, Any]


@pytest.fixture(scope="module")
def expected_of() -> Any:
    references: dict[str, StructuredReference] = {}

    def of(served: Served) -> StructuredReference:
        return references.setdefault(str(served.model), StructuredReference(served.reference, served.model))

    return of


def cases(schemas: int, seed: int) -> list[Case]:
    """Each schema under each model, and each other form."""
    found = []
    for number in range(schemas):
        schema = random_schema(random.Random(f"{seed} {number}"))
        for adapter in MODELS:
            found.append(Case(prompt_of(20 + 7 * number % 90, number), adapter, form_of(schema)))
    for number, form in enumerate(FORMS):
        found += [Case(prompt_of(30 + number, 500 + number), adapter, form) for adapter in MODELS]
    return found


async def ask(client: httpx.AsyncClient, served: Served, case: Case | None, **extra: Any) -> dict[str, Any]:
    body = {"model": served.name, "prompt": prompt_of(40, 1), "max_tokens": TOKENS, "temperature": 0}
    if case is not None:
        body |= {"model": case.adapter or served.name, "prompt": case.prompt, "structured_outputs": case.form}
    response = await client.post("/v1/completions", json={**body, "return_token_ids": True, **extra})
    assert response.status_code == 200, response.text
    return dict(response.json())


def ask_all(served: Served, asked: list[Case | None], **extra: Any) -> list[dict[str, Any]]:
    """The first choices; None asks for free text."""

    async def main() -> list[dict[str, Any]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=served.cluster.url, timeout=600, limits=limits) as client:
            bodies = await asyncio.gather(*(ask(client, served, case, **extra) for case in asked))
        return [body["choices"][0] for body in bodies]

    return asyncio.run(main())


def check_form(case: Case, choice: dict[str, Any]) -> None:
    """Raises if a finished answer doesn't fit its form."""
    if choice["finish_reason"] != "stop":
        return
    text = choice["text"]
    if "json" in case.form:
        jsonschema.validate(json.loads(text), case.form["json"])
    elif "choice" in case.form:
        assert text in case.form["choice"]
    elif "regex" in case.form:
        assert re.fullmatch(case.form["regex"], text)
    elif "root" in case.form["grammar"]:
        assert re.fullmatch(r"(red|green|blue)(, (red|green|blue)){2,6}", text)
    else:
        assert re.fullmatch(r"[1-9]\d{0,3}(\+[1-9]\d{0,3}){2,5}", text)


def check(served: Served, reference: StructuredReference, asked: list[Case], choices: list[dict[str, Any]]) -> None:
    for case, choice in zip(asked, choices, strict=True):
        check_form(case, choice)
        folder = served.adapters[case.adapter] if case.adapter else None
        wrong = reference.first_difference(case.prompt, choice["token_ids"], TOKENS, folder, case.form)
        assert wrong is None, (wrong, case, choice)
    finished = sum(choice["finish_reason"] == "stop" for choice in choices)
    assert finished >= 0.9 * len(choices)


def test_answers_fit_and_are_exact(either: Served, expected_of: Any) -> None:
    """Beside free text in the same batches."""
    asked = cases(10, seed=1)
    free = [either.expected(prompt_of(40, 1), TOKENS, None)]
    choices = ask_all(either, [*asked, None, None], ignore_eos=False)
    check(either, expected_of(either), asked, choices[:-2])
    for choice in choices[-2:]:
        assert choice["token_ids"] == free[0][: len(choice["token_ids"])]
    assert either.cluster.idle()

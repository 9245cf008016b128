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
from e2e.test_colocated import go_on
from preft.core.errors import EngineFailed
from preft.core.request import Sampling
from preft.core.structured import StructuredOutputs
from support.http import post
from support.json_schemas import random_schema
from support.models import EOS
from support.structured_reference import StructuredReference

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

MODELS = (None, "alice", "loreft", "direft")
TOKENS = 300
FORMS: list[dict[str, Any]] = [
    {"regex": r"[a-f]{3}-[0-9]{2,12}( (yes|no)){1,4}"},
    {"choice": ["yes", "no", "perhaps, but not today", "unknown"]},
    {"grammar": 'root ::= item ", " item (", " item)?\nitem ::= "red" | "green" | "blue"'},
    {"grammar": 'start: NUMBER ("+" NUMBER){2,5}\nNUMBER: /[1-9][0-9]{0,3}/'},
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
        assert re.fullmatch(r"(red|green|blue)(, (red|green|blue)){1,2}", text)
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


def body_of(served: Served, case: Case, **extra: Any) -> dict[str, Any]:
    body = {"model": case.adapter or served.name, "prompt": case.prompt, "max_tokens": TOKENS, "temperature": 0}
    return {**body, "structured_outputs": case.form, **extra}


def free_text(served: Served) -> list[int]:
    return served.expected(prompt_of(40, 1), TOKENS, None)


def check_all(served: Served, reference: StructuredReference, asked: list[Case]) -> None:
    """Beside free text in the same batches."""
    choices = ask_all(served, [*asked, None, None])
    check(served, reference, asked, choices[:-2])
    for choice in choices[-2:]:
        assert choice["token_ids"] == free_text(served)[: len(choice["token_ids"])]
    assert served.cluster.idle()


def test_answers_fit_and_are_exact(either: Served, expected_of: Any) -> None:
    check_all(either, expected_of(either), cases(8, seed=1))


@pytest.mark.long
def test_a_hundred_schemas(either: Served, expected_of: Any) -> None:
    check_all(either, expected_of(either), cases(100, seed=2))


@pytest.mark.long
def test_preempted_requests_keep_their_place(tight: Served, expected_of: Any) -> None:
    """Long answers, whose KV a small decode cache can't hold at once."""
    before = tight.cluster.statuses()
    form = {"regex": "[a-f]{120,140}( yes| no)"}
    check_all(tight, expected_of(tight), [Case(prompt_of(30 + n, n), MODELS[n % 4], form) for n in range(27)])
    preempted = {name for name, load in tight.cluster.statuses().items() if load.preemptions > before[name].preemptions}
    assert preempted == {tight.cluster.decoding.record.id}


def test_seeds_penalties_choices_and_logprobs(either: Served) -> None:
    """Four choices under one form, each its own; a seed gives the same ones again."""
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"a": {"type": "string", "minLength": 9, "maxLength": 12}},
    }
    schema |= {"required": ["a"], "additionalProperties": False}
    case = Case(prompt_of(50, 3), "alice", form_of(schema))
    extra: dict[str, Any] = {"n": 4, "seed": 5, "temperature": 1.0, "presence_penalty": 0.5, "repetition_penalty": 1.1}

    async def twice() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=either.cluster.url, timeout=300) as client:
            return [await ask(client, either, case, **extra, logprobs=3) for _ in range(2)]

    first, second = asyncio.run(twice())
    outputs = [choice["token_ids"] for choice in first["choices"]]
    assert outputs == [choice["token_ids"] for choice in second["choices"]]
    assert len({tuple(output) for output in outputs}) == 4
    for choice in first["choices"]:
        assert choice["finish_reason"] == "stop"
        check_form(case, choice)
        assert len(choice["logprobs"]["token_logprobs"]) == len(choice["token_ids"])
        assert all(value <= 0 for value in choice["logprobs"]["token_logprobs"])


def test_limits_and_stops(either: Served) -> None:
    case = Case(prompt_of(50, 4), "bob", {"regex": "(abc){8}"})

    def one(**extra: Any) -> dict[str, Any]:
        return ask_all(either, [case], **extra)[0]

    whole = one()
    assert (whole["text"], whole["finish_reason"]) == ("abc" * 8, "stop")
    count = len(whole["token_ids"])
    assert one(min_tokens=count - 1)["token_ids"] == whole["token_ids"]
    short = one(max_tokens=5)
    assert (short["token_ids"], short["finish_reason"]) == (whole["token_ids"][:5], "length")
    assert one(stop=["ca"])["text"] == "ab"
    longer = one(ignore_eos=True, max_tokens=count + 3)
    assert longer["token_ids"] == whole["token_ids"] + whole["token_ids"][-1:] * 3
    response = post(either.cluster.url, "/v1/completions", body_of(either, case, min_tokens=count + 1))
    assert response.status_code == 400, response.text
    assert "min_tokens" in response.json()["error"]["message"]
    assert either.cluster.idle()


def test_chat_with_response_format(either: Served) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    messages = [{"role": "user", "content": "hello"}]
    body = {"model": "alice", "messages": messages, "response_format": wanted, "max_tokens": TOKENS, "temperature": 1}
    for _ in range(3):
        answer = post(either.cluster.url, "/v1/chat/completions", body).json()["choices"][0]
        if answer["finish_reason"] == "stop":
            jsonschema.validate(json.loads(answer["message"]["content"]), {**schema, "additionalProperties": False})
        else:  # endless whitespace
            assert answer["message"]["content"].startswith("{")


BAD = [
    {"regex": "("},
    {"json": {"type": "string", "not": {"const": "a"}}},
    {"json": {"allOf": [{"multipleOf": 1009}, {"multipleOf": 1013}, {"multipleOf": 1019}]}},
    {"grammar": "start: undefined"},
]


@pytest.mark.parametrize("form", BAD, ids=["regex", "keyword", "bomb", "grammar"])
def test_a_bad_form_is_refused_once_and_by_name(either: Served, form: dict[str, Any]) -> None:
    router = either.cluster.gateway.router
    before = router.stats().retries
    response = post(either.cluster.url, "/v1/completions", body_of(either, Case(prompt_of(20, 5), "alice", form)))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "structured_outputs"
    assert router.stats().retries == before
    if "json" in form:
        wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": form["json"]}}
        body = body_of(either, Case(prompt_of(20, 5), None, {}), response_format=wanted, structured_outputs=None)
        assert post(either.cluster.url, "/v1/completions", body).json()["error"]["param"] == "response_format"
    answer = ask_all(either, [None])[0]["token_ids"]
    assert answer == free_text(either)[: len(answer)]
    assert either.cluster.idle()


def test_a_choice_goes_on_elsewhere_only_with_tokens_that_fit(llama_colocated: Served) -> None:
    """A router's request to continue after tokens of another worker."""
    served, prompt = llama_colocated, prompt_of(50, 6)
    sampling = Sampling(
        max_tokens=60, temperature=0.0, eos_token_ids=(EOS,), structured_outputs=StructuredOutputs(regex="(ab|ba){6}")
    )
    whole = go_on(served, prompt, [], "carol", sampling)
    for done in (1, 4, len(whole) - 1):
        assert go_on(served, prompt, whole[:done], "carol", sampling) == whole[done:]
    with pytest.raises(EngineFailed):
        go_on(served, prompt, [whole[0], whole[0], whole[0]], "carol", sampling)
    assert served.cluster.idle()

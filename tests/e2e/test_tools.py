"""Tool calls that a grammar forces or allows, and forms behind reasoning: exact under adapters, hand-over and resume.

Each token is compared with the likeliest allowed token of the reference's raw logits.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import httpx
import jsonschema
import pytest
import torch

from e2e.conftest import Served
from e2e.test_colocated import go_on, reference_of
from e2e.test_structured import MODELS, TOKENS, prompt_of
from preft.core.request import GenerateRequest, Sampling
from preft.core.structured import StructuredOutputs
from preft.engine.chat_parsers import VllmParsers
from preft.gateway.bodies.messages import Tool
from preft.gateway.bodies.tool_choice import NamedTool, ToolChoice, forced_form
from preft.gateway.deps import GatewayDeps
from preft.gateway.http.app import create_app
from preft.gateway.text.tokenizer import Tokenizer
from support.models import EOS
from support.structured_reference import StructuredReference

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

LEVEL = {"enum": ["low", "high"]}
PARAMETERS: dict[str, dict[str, Any]] = {
    "paint": {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "level": {"$ref": "#/$defs/level"}},
        "required": ["colour", "level"],
        "additionalProperties": False,
        "$defs": {"level": LEVEL},
    },
    "wait": {
        "type": "object",
        "properties": {"hours": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3}},
        "required": ["hours"],
        "additionalProperties": False,
    },
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": parameters}}
    for name, parameters in PARAMETERS.items()
]
NAMED = {"type": "function", "function": {"name": "paint"}}


def reference_form(choice: ToolChoice) -> dict[str, Any]:
    form = forced_form([Tool.model_validate(tool) for tool in TOOLS], choice, parallel=False)
    assert form is not None
    assert form.json is not None
    return {"json": json.loads(form.json), "disable_any_whitespace": True}


def body_of(served: Served, adapter: str | None, choice: Any, **extra: Any) -> dict[str, Any]:
    body = {
        "model": adapter or served.name,
        "messages": [{"role": "user", "content": f"paint it for {adapter}"}],
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": TOKENS,
        "temperature": 0,
        "return_token_ids": True,
    }
    return {**body, **extra}


def ask_all(served: Served, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
    async def main() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=served.cluster.url, timeout=600, limits=limits) as client:
            return await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))

    return asyncio.run(main())


def test_forced_calls_fit_their_schemas_and_are_exact(either: Served) -> None:
    asked = [(adapter, choice) for adapter in MODELS for choice in ("required", NAMED)]
    bodies = [body_of(either, adapter, choice) for adapter, choice in asked]
    streams = [{**body, "stream": True} for body in bodies]
    answers = ask_all(either, [*bodies, *streams])
    structured = StructuredReference(either.reference, either.model)
    for (adapter, choice), whole, stream in zip(asked, answers, answers[len(asked) :], strict=False):
        assert whole.status_code == 200, whole.text
        [answer] = whole.json()["choices"]
        form = reference_form("required" if choice == "required" else NamedTool("paint"))
        folder = either.adapters[adapter] if adapter else None
        wrong = structured.first_difference(whole.json()["prompt_token_ids"], answer["token_ids"], TOKENS, folder, form)
        assert wrong is None, (wrong, answer)
        [call] = answer["message"]["tool_calls"]
        assert answer["message"]["content"] is None
        assert answer["finish_reason"] == ("tool_calls" if choice == "required" else "stop")
        assert choice == "required" or call["function"]["name"] == "paint"
        jsonschema.validate(json.loads(call["function"]["arguments"]), PARAMETERS[call["function"]["name"]])
        assert joined_call(stream.text) == (call["function"], answer["token_ids"], answer["finish_reason"])
    assert either.cluster.idle()


def joined_call(stream: str) -> tuple[dict[str, str], list[int], str]:
    """The function, token ids and finish reason of a stream with one call."""
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    parts = [call["function"] for choice in choices for call in choice["delta"].get("tool_calls", ())]
    function = {"name": parts[0]["name"], "arguments": "".join(part["arguments"] for part in parts)}
    return function, [id for choice in choices for id in choice.get("token_ids", ())], choices[-1]["finish_reason"]


ANSWER = {
    "type": "object",
    "properties": {"done": {"type": "boolean"}, "mood": {"enum": ["good", "bad"]}},
    "required": ["done", "mood"],
    "additionalProperties": False,
}
COMPACT = json.dumps({"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"})


def calls_or_answer() -> dict[str, Any]:
    """One call in Hermes's form, or an answer: written anew, as one grammar."""
    options = {"x-guidance": json.loads(COMPACT)}
    rules = ["%llguidance {}", "start: call | answer", f"answer: %json {json.dumps({**ANSWER, **options})}"]
    alternatives = []
    for name, parameters in PARAMETERS.items():
        rules.append(f"{name}: %json {json.dumps({**parameters, **options})}")
        for line in ("\n", ""):
            begin, end = f'<tool_call>{line}{{"name": "{name}", "arguments": ', f"}}{line}</tool_call>"
            alternatives.append(f"{json.dumps(begin)} {name} {json.dumps(end)}")
    return {"grammar": "\n".join([*rules, f"call: {' | '.join(alternatives)}"])}


def test_calls_or_an_answer_of_the_form_are_exact(either: Served) -> None:
    """`auto` beside a form, with vLLM's parser of Hermes's calls: both kinds of answers, whole and streamed."""
    deps = GatewayDeps(
        either.name,
        Tokenizer.load(either.model),
        512,
        either.cluster.gateway.router,
        either.cluster.gateway.catalog,
        parsers=VllmParsers(either.model, "hermes", None),
    )
    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    wanted = {"structured_outputs": {"json": ANSWER, "disable_any_whitespace": True}, "tools": strict}
    asked = [(adapter, f"{number} {adapter}") for adapter in MODELS for number in range(4)]

    async def ask_both(adapter: str | None, text: str) -> list[httpx.Response]:
        body = body_of(either, adapter, "auto", messages=[{"role": "user", "content": text}], **wanted)
        bodies = (body, {**body, "stream": True})
        return await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))

    async def main() -> list[list[httpx.Response]]:
        return await asyncio.gather(*(ask_both(*each) for each in asked))

    client = httpx.AsyncClient(transport=httpx.ASGITransport(create_app(deps)), base_url="http://localhost")
    structured, kinds = StructuredReference(either.reference, either.model), set()
    for (adapter, _), (whole, stream) in zip(asked, either.cluster.call(main()), strict=True):
        assert whole.status_code == 200, whole.text
        [answer] = whole.json()["choices"]
        folder, prompt = (either.adapters[adapter] if adapter else None), whole.json()["prompt_token_ids"]
        wrong = structured.first_difference(prompt, answer["token_ids"], TOKENS, folder, calls_or_answer())
        assert wrong is None, (wrong, answer)
        message = answer["message"]
        if calls := message.get("tool_calls"):
            [call] = calls
            assert (message["content"], answer["finish_reason"]) == (None, "tool_calls")
            jsonschema.validate(json.loads(call["function"]["arguments"]), PARAMETERS[call["function"]["name"]])
            assert joined_call(stream.text) == (call["function"], answer["token_ids"], "tool_calls")
        else:
            assert answer["finish_reason"] == "stop"
            jsonschema.validate(json.loads(message["content"]), ANSWER)
            chunks = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
            deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
            assert "".join(delta.get("content", "") for delta in deltas) == message["content"]
        kinds.add(bool(calls))
    assert kinds == {True, False}
    assert either.cluster.idle()


FORM = {"regex": "(ab|ba){6}"}


def behind(served: Served, prompt: list[int], adapter: str | None, place: int) -> Sampling:
    """A form that begins behind the token that the model gives at `place`, or behind an earlier equal one."""
    token = served.expected(prompt, place + 1, adapter)[place]
    form = StructuredOutputs(**FORM, begins_after=token)
    return Sampling(max_tokens=60, temperature=0.0, eos_token_ids=(EOS,), structured_outputs=form)


def check_behind(served: Served, prompt: list[int], adapter: str | None, sampling: Sampling, output: list[int]) -> None:
    assert sampling.structured_outputs is not None
    begun = output.index(sampling.structured_outputs.begins_after) + 1
    structured = StructuredReference(served.reference, served.model)
    folder = served.adapters[adapter] if adapter else None
    rows = served.reference.logits(prompt, output, folder)
    masks = structured.allowed(FORM, output[begun:])
    for position, (row, token) in enumerate(zip(rows, output, strict=True)):
        fits = torch.ones(len(row), dtype=torch.bool)
        fits[EOS] = False
        if position >= begun:
            fits = torch.from_numpy(masks[position - begun][: len(row)])
        assert token == int(row.masked_fill(~fits, -torch.inf).argmax()), position
    assert output[-1] == EOS
    assert len(output) > begun + 4


def generate(served: Served, prompt: list[int], adapter: str | None, sampling: Sampling) -> list[int]:
    """Through the router: prefill, hand-over and decode."""
    entry = reference_of(served, adapter) if adapter else None
    request = GenerateRequest(uuid.uuid4().hex, tuple(prompt), sampling, entry)

    async def run() -> list[int]:
        async with served.cluster.gateway.router.generate(request) as generation:
            return [token async for delta in generation for token in delta.token_ids]

    return served.cluster.call(run())


@pytest.mark.parametrize("place", [0, 4])
def test_a_form_begins_behind_the_reasoning(either: Served, place: int) -> None:
    """The reasoning's end is the first token, which the prefill worker makes, or a later one."""
    for number, adapter in enumerate(MODELS):
        prompt = prompt_of(50, 20 + number)
        sampling = behind(either, prompt, adapter, place)
        check_behind(either, prompt, adapter, sampling, generate(either, prompt, adapter, sampling))
    assert either.cluster.idle()


def test_a_form_behind_reasoning_goes_on_elsewhere(llama_colocated: Served) -> None:
    """A router's request to continue: before, at and behind the end of the reasoning."""
    served, prompt = llama_colocated, prompt_of(50, 31)
    sampling = behind(served, prompt, "carol", 3)
    whole = go_on(served, prompt, [], "carol", sampling)
    check_behind(served, prompt, "carol", sampling, whole)
    for done in (1, 3, 4, 5, len(whole) - 1):
        assert go_on(served, prompt, whole[:done], "carol", sampling) == whole[done:]
    assert served.cluster.idle()

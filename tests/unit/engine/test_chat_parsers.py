"""vLLM's parsers behind the gateway's port, for several model families: the answers are those of vLLM's own parsers.

Every text is cut into deltas between every two tokens. The reference builds vLLM's parser itself.
"""

# ruff: noqa: RUF001 (DeepSeek's marks have wide bars)

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import ParserManager
from vllm.tokenizers import get_tokenizer

from preft.core.errors import ConfigError, InvalidRequest
from preft.core.request import FinishReason, TokenDelta
from preft.core.structured import StructuredOutputs
from preft.engine.chat_parsers import VllmParsers
from preft.engine.grammar import source_of
from preft.gateway.http.reply import WholeChoice
from preft.gateway.text.choice import ChoiceDelta, ChoiceText, TextOptions
from preft.gateway.text.choice_reader import ChoiceReader
from preft.gateway.text.parsing import Asked
from preft.gateway.text.tokenizer import Tokenizer
from support.parser_tokenizer import parser_model

pytestmark = pytest.mark.vllm

END = 0  # the tokenizer's end of sequence
PROPERTIES = {"city": {"type": "string"}, "days": {"type": "integer"}, "tags": {"type": "array"}}
WEATHER = {"type": "object", "properties": PROPERTIES, "required": ["city"]}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "description": "by day", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
PARIS = {"city": "Paris \u00e9\u20ac", "days": 3}
CALLS = [("get_weather", PARIS), ("get_weather", {"city": "Rome", "days": 1})]


@dataclass(frozen=True)
class Family:
    """The names of the parsers, and a text with the calls `CALLS[:count]`."""

    tools: str | None
    reasoning: str | None
    text: str
    count: int = 0
    content: str = ""
    thoughts: str = ""
    variables: dict[str, Any] | None = None


def hermes(*calls: tuple[str, Any]) -> str:
    texts = [json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) for name, arguments in calls]
    return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)


def qwen_xml(*calls: tuple[str, Any]) -> str:
    texts = []
    for name, arguments in calls:
        fields = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
        texts.append(f"<tool_call>\n<function={name}>\n{fields}</function>\n</tool_call>")
    return "\n".join(texts)


def deepseek(*calls: tuple[str, Any]) -> str:
    texts = [
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{json.dumps(arguments)}\n```<｜tool▁call▁end｜>"
        for name, arguments in calls
    ]
    return "<｜tool▁calls▁begin｜>" + "\n".join(texts) + "<｜tool▁calls▁end｜>"


def as_json(key: str, *calls: tuple[str, Any]) -> list[str]:
    return [json.dumps({"name": name, key: arguments}, ensure_ascii=False) for name, arguments in calls]


PYTHONIC = ["get_weather(city='Paris \u00e9\u20ac', days=3)", "get_weather(city='Rome', days=1)"]
FAMILIES = {
    "hermes": Family("hermes", None, "Let me see.\n" + hermes(*CALLS), 2, "Let me see.\n"),
    "hermes, words": Family("hermes", None, "It's 3 < 4 and sunny \u20ac.", content="It's 3 < 4 and sunny \u20ac."),
    "hermes, thoughts": Family(
        "hermes", "deepseek_r1", "hm, a tool</think>\n" + hermes(*CALLS), 2, "\n", thoughts="hm, a tool"
    ),
    "longcat": Family("longcat", None, "So. " + hermes(*CALLS).replace("tool_call>", "longcat_tool_call>"), 2, "So. "),
    "llama3_json": Family("llama3_json", None, "; ".join(as_json("parameters", *CALLS)), 2),
    "llama3_json, words": Family("llama3_json", None, "No call today.", content="No call today."),
    "mistral": Family("mistral", None, f"[TOOL_CALLS][{', '.join(as_json('arguments', *CALLS))}]", 2),
    "mistral, words": Family("mistral", None, "No call today.", content="No call today."),
    "qwen3_coder": Family("qwen3_coder", None, "So:\n" + qwen_xml(*CALLS), 2, "So:\n"),
    "qwen3_xml, thoughts": Family(
        "qwen3_xml", "qwen3", "<think>hm \u20ac</think>\n\n" + qwen_xml(*CALLS), 2, "", thoughts="hm \u20ac"
    ),
    "pythonic": Family("pythonic", None, f"[{', '.join(PYTHONIC)}]", 2),
    "pythonic, words": Family("pythonic", None, "No call today.", content="No call today."),
    "llama4_pythonic": Family("llama4_pythonic", None, f"[{', '.join(PYTHONIC)}]", 2),
    "olmo3": Family("olmo3", None, "<function_calls>" + "\n".join(PYTHONIC) + "</function_calls>", 2),
    "deepseek_v3": Family("deepseek_v3", None, "So. " + deepseek(*CALLS), 2, "So. "),
    "deepseek_r1": Family(None, "deepseek_r1", "hm \u20ac</think>It's 4.", content="It's 4.", thoughts="hm \u20ac"),
    "deepseek_r1, both marks": Family(None, "deepseek_r1", "<think>a</think>b", content="b", thoughts="a"),
    "qwen3": Family(None, "qwen3", "<think>\nhm\n</think>\n\nIt's 4.", content="It's 4.", thoughts="hm"),
    "qwen3, off": Family(None, "qwen3", "It's 4.", content="It's 4.", variables={"enable_thinking": False}),
}


@dataclass(frozen=True)
class Answer:
    content: str
    reasoning: str
    calls: tuple[tuple[str, Any], ...]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parser_model(tmp_path_factory.mktemp("parsers"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def parsers_of(folder: Path) -> Any:
    made: dict[tuple[str | None, str | None], VllmParsers] = {}

    def of(family: Family) -> VllmParsers:
        names = (family.tools, family.reasoning)
        if names not in made:
            made[names] = VllmParsers(folder, *names)
        return made[names]

    return of


def prompt_of(tokenizer: Tokenizer, family: Family) -> tuple[int, ...]:
    text = "user: hi\nassistant:" + ("<think>\n\n</think>\n\n" if family.variables else "")
    return tuple(tokenizer._backend.encode(text, add_special_tokens=False).ids)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return [*tokenizer._backend.encode(text, add_special_tokens=False).ids, END]


def groupings(ids: Sequence[int]) -> Iterator[list[Sequence[int]]]:
    """One by one, all at once, in two at every place (of long texts at 30), in random pieces, in pieces of one size."""
    yield [[token] for token in ids]
    yield [ids]
    for place in range(1, len(ids), max(1, len(ids) // 30)):
        yield [ids[:place], ids[place:]]
    draw = random.Random(len(ids))
    for _ in range(10):
        places = sorted(draw.sample(range(1, len(ids)), min(5, len(ids) - 1)))
        yield [ids[start:end] for start, end in zip([0, *places], [*places, len(ids)], strict=True)]
    for size in (2, 3, 5):
        yield [ids[start : start + size] for start in range(0, len(ids), size)]


def read(
    tokenizer: Tokenizer, parsers: VllmParsers, family: Family, pieces: Sequence[Sequence[int]], *, whole: bool
) -> ChoiceDelta:
    """The choice as the gateway reads it."""
    tools = TOOLS if family.tools else []
    asked = Asked(tools=tools, may_call=bool(tools), variables=family.variables)
    request, prompt = parsers.of(asked), prompt_of(tokenizer, family)
    assert request is not None
    options = TextOptions(skip_special_tokens=request.skip_special_tokens)
    choice = ChoiceText(0, tokenizer, prompt, options)
    reader = ChoiceReader(request.start(prompt), whole=whole)
    joined = WholeChoice(0)

    async def run() -> None:
        for number, piece in enumerate(pieces, start=1):
            finish = FinishReason.STOP if number == len(pieces) else None
            delta = TokenDelta(0, tuple(piece), finish_reason=finish)
            pieces_of = delta.by_token() if reader.token_by_token else [delta]
            joined.add(await reader.read([choice.push(each) for each in pieces_of]))

    asyncio.run(run())
    return joined.joined()


def answer_of(choice: ChoiceDelta) -> Answer:
    assert [call.position for call in choice.tool_calls] == [*range(len(choice.tool_calls))]
    assert all(call.id for call in choice.tool_calls)
    expected = FinishReason.TOOL_CALLS if choice.tool_calls else FinishReason.STOP
    assert choice.finish_reason is expected
    calls = tuple((call.name, json.loads(call.arguments)) for call in choice.tool_calls)
    return Answer(choice.text, choice.reasoning, calls)


class Reference:
    """vLLM's own parsers, driven as its server does."""

    def __init__(self, folder: Path, family: Family, prompt: Sequence[int]) -> None:
        self._tokenizer: Any = get_tokenizer(str(folder))
        self._family, self._prompt = family, list(prompt)
        kind = ParserManager.get_parser(family.tools, family.reasoning, enable_auto_tools=True)
        assert kind is not None
        self._kind = kind
        tools = TOOLS if family.tools else None
        self._request: Any = ChatCompletionRequest.model_validate(
            {"messages": [{"role": "user", "content": "hi"}], **({"tools": tools} if tools else {})}
        )
        self._request = self._parser().adjust_request(self._request)

    def _parser(self) -> Any:
        return self._kind(
            self._tokenizer, self._request.tools, chat_template_kwargs=self._family.variables or {}, model_config=None
        )

    def text(self, ids: Sequence[int]) -> str:
        """Without the end of the sequence."""
        skip = self._request.skip_special_tokens
        return str(self._tokenizer.decode([token for token in ids if token != END], skip_special_tokens=skip))

    def whole(self, ids: Sequence[int]) -> Answer:
        reasoning, content, calls = self._parser().parse(
            self.text(ids), self._request, enable_auto_tools=True, model_output_token_ids=ids
        )
        named = tuple((call.name, json.loads(call.arguments)) for call in calls or ())
        return Answer(content or "", reasoning or "", named)

    def streamed(self, pieces: Sequence[Sequence[int]], texts: Sequence[str]) -> Answer:
        parser = self._parser()
        content, reasoning, calls = "", "", {}
        for number, (piece, text) in enumerate(zip(pieces, texts, strict=True), start=1):
            message = parser.parse_delta(
                text, list(piece), self._request, list(self._prompt), finished=number == len(pieces)
            )
            if message is None:
                continue
            content += message.content or ""
            reasoning += message.reasoning or ""
            for call in message.tool_calls or ():
                calls.setdefault(call.index, (call.function.name, []))[1].append(call.function.arguments or "")
        named = tuple((name, json.loads("".join(arguments))) for name, arguments in calls.values())
        return Answer(content, reasoning, named)


def texts_of(tokenizer: Tokenizer, family: Family, pieces: Sequence[Sequence[int]], skip: bool) -> list[str]:
    choice = ChoiceText(0, tokenizer, prompt_of(tokenizer, family), TextOptions(skip_special_tokens=skip))
    last = len(pieces) - 1
    return [
        choice.push(TokenDelta(0, tuple(piece), finish_reason=FinishReason.STOP if number == last else None)).text
        for number, piece in enumerate(pieces)
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_vllms_own_wherever_the_deltas_are_cut(folder, tokenizer, parsers_of, name):
    family = FAMILIES[name]
    ids, parsers = ids_of(tokenizer, family.text), parsers_of(family)
    reference = Reference(folder, family, prompt_of(tokenizer, family))
    expected = Answer(family.content, family.thoughts, tuple(CALLS[: family.count]))
    whole = answer_of(read(tokenizer, parsers, family, [ids], whole=True))
    assert whole == reference.whole(ids)
    assert (whole.reasoning.strip(), whole.calls) == (expected.reasoning, expected.calls)
    assert whole.content.strip() == expected.content.strip()
    for number, pieces in enumerate(groupings(ids)):
        streamed = answer_of(read(tokenizer, parsers, family, pieces, whole=False))
        if number == 0:  # vLLM's older parsers lose calls and marks if several tokens come at once
            texts = texts_of(tokenizer, family, pieces, reference._request.skip_special_tokens)
            assert "".join(texts) == reference.text(ids)
            assert streamed == reference.streamed(pieces, texts), pieces
        assert (streamed.reasoning.strip(), streamed.calls) == (expected.reasoning, expected.calls), pieces
        assert streamed.content.strip() == expected.content.strip(), pieces


BROKEN = {
    "no call": ("llama3_json", '{"answer": [1, 2]}'),
    "hermes cut in the name": ("hermes", 'So. <tool_call>\n{"name": "get_w'),
    "hermes without JSON": ("hermes", "So. <tool_call>\nnothing\n</tool_call>"),
    "llama cut in the arguments": ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Par'),
    "deepseek cut in the name": (
        "deepseek_v3",
        "So. <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get",
    ),
    "a list that is no call": ("pythonic", "[1, 2, 3] are numbers."),
}


@pytest.mark.parametrize("name", BROKEN)
def test_text_that_only_looks_like_a_call_is_lost_nowhere(tokenizer, parsers_of, name):
    """A stream has all that a whole answer has."""
    tools, text = BROKEN[name]
    family = Family(tools, None, text)
    ids = ids_of(tokenizer, text)
    whole = read(tokenizer, parsers_of(family), family, [ids], whole=True)
    streamed = read(tokenizer, parsers_of(family), family, [[token] for token in ids], whole=False)
    shown = [choice.text + "".join(call.arguments for call in choice.tool_calls) for choice in (whole, streamed)]
    assert all(shown)
    if not streamed.tool_calls:
        assert streamed.text == whole.text == text


@pytest.mark.parametrize(("tools", "reasoning", "key"), [("hermex", None, "tool"), (None, "r2", "reasoning")])
def test_an_unknown_name_is_refused_with_the_known_names(folder, tools, reasoning, key):
    with pytest.raises(ConfigError, match=key) as refused:
        VllmParsers(folder, tools, reasoning)
    for known in ("qwen3", "mistral"):
        assert known in str(refused.value)
    assert "openai" not in str(refused.value)


def test_a_parser_that_the_tokenizer_lacks_marks_for_is_refused(folder):
    with pytest.raises(ConfigError, match="reasoning_parser"):
        VllmParsers(parser_model(folder.parent / "no-marks", marks=()), None, "deepseek_r1")


def test_the_forms_of_ids(folder):
    nine = VllmParsers(folder, "mistral", None).call_id("look", 1, 2)
    assert len(nine) == 9
    assert nine.isalnum()
    assert VllmParsers(folder, "hermes", None).call_id("look", 1, 2).startswith("chatcmpl-tool-")
    config = json.loads((folder / "config.json").read_text())
    kimi = folder.parent / "kimi"
    parser_model(kimi)
    (kimi / "config.json").write_text(json.dumps({**config, "model_type": "kimi_k2"}))
    assert VllmParsers(kimi, "hermes", None).call_id("look", 1, 2) == "functions.look:3"


@pytest.mark.parametrize("reasoning", ["deepseek_r1", "qwen3"])
def test_where_a_form_begins(folder, tokenizer, reasoning):
    parsers = VllmParsers(folder, None, reasoning)
    request = parsers.of_reasoning(Asked())
    assert request is not None
    open_prompt, closed_prompt = (
        tuple(tokenizer._backend.encode(text, add_special_tokens=False).ids)
        for text in ("user: hi\nassistant:<think>", "user: hi\nassistant:<think>\n\n</think>\n\n")
    )
    assert request.reasoning_end(open_prompt) == tokenizer._backend.token_to_id("</think>")
    assert request.reasoning_end(closed_prompt) is None


def test_a_form_behind_reasoning_without_a_mark_is_refused(folder):
    request = VllmParsers(folder, None, "granite").of_reasoning(Asked())
    assert request is not None
    with pytest.raises(InvalidRequest, match="reasoning_parser"):
        request.reasoning_end((5, 6))


def test_texts_without_tools_need_no_parser_of_calls(folder):
    parsers = VllmParsers(folder, "hermes", None)
    assert parsers.of(Asked()) is None
    assert parsers.of(Asked(tools=TOOLS)) is not None
    assert VllmParsers(folder, "qwen3_coder", None).of(Asked()) is not None  # takes the marks out of any text


def test_strict_functions_give_a_form_that_engines_can_compile(folder):
    strict = {**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True}}
    parsers = VllmParsers(folder, "hermes", None)
    plain, tag = (parsers.of(Asked(tools=[tool, TOOLS[1]], may_call=True)) for tool in (TOOLS[0], strict))
    assert plain is not None
    assert plain.strict_tag is None
    assert tag is not None
    assert tag.strict_tag is not None
    structures = json.loads(tag.strict_tag)["structures"]
    assert any(structure["schema"] == WEATHER for structure in structures)
    assert source_of(StructuredOutputs(structural_tag=tag.strict_tag), {})
    for tools, is_formed in (([strict], True), ([TOOLS[0]], False)):
        one = parsers.of(Asked(tools=tools, may_call=True, parallel=False))
        assert one is not None
        assert (one.strict_tag is not None) is is_formed
    assert parsers.of(Asked(tools=[strict])).strict_tag is None  # type: ignore[union-attr]


@pytest.mark.parametrize("parser", ["hermes", "longcat", "qwen3_json", "llama3_json", "llama4_json"])
def test_the_exact_forms_of_calls(folder, tokenizer, parsers_of, parser):
    """vLLM's own parser reads calls of these forms; arguments of functions that aren't strict are any object."""
    strict = {**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True}}
    parsers = parsers_of(Family(parser, None, ""))
    request = parsers.of(Asked(tools=[strict, TOOLS[1]], may_call=True))
    assert request is not None
    schemas = {"get_weather": WEATHER, "now": {"type": "object"}}
    assert {tag.name: tag.schema for tag in request.call_tags} == schemas
    for tag in request.call_tags:
        text = tag.begin + json.dumps(PARIS) + tag.end
        family = Family(parser, None, text)
        reference = Reference(folder, family, prompt_of(tokenizer, family))
        assert reference.whole(ids_of(tokenizer, text)).calls == ((tag.name, PARIS),)


@pytest.mark.parametrize("parser", ["mistral", "qwen3_coder", "pythonic", "deepseek_v3"])
def test_other_forms_of_calls_are_not_known(parsers_of, parser):
    request = parsers_of(Family(parser, None, "")).of(Asked(tools=TOOLS, may_call=True))
    assert request is not None
    assert request.call_tags == ()


def test_a_function_whose_name_no_call_can_have(parsers_of):
    odd = {"type": "function", "function": {"name": 'a", "x', "parameters": {}}}
    request = parsers_of(Family("hermes", None, "")).of(Asked(tools=[odd], may_call=True))
    assert request is not None
    assert request.call_tags == ()

"""vLLM's parsers of tool calls and reasoning, behind the gateway's port `gateway.text.parsing`.

Importing this module imports vLLM: 14 s of CPU time and 0.5 GB of memory. A gateway does so only if its settings name
a parser. The parsers are vLLM's own classes, and see vLLM's own request and tokenizer.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionToolsParam
from vllm.parser import ParserManager
from vllm.parser.abstract_parser import DelegatingParser, Parser
from vllm.reasoning import ReasoningParserManager
from vllm.renderers.chat_utils import get_tool_call_id_type, make_tool_call_id
from vllm.tokenizers import get_tokenizer
from vllm.tool_parsers import ToolParserManager
from vllm.tool_parsers.tool_strict_level import ToolStrictLevel

from preft.core.errors import ConfigError, InvalidRequest
from preft.gateway.text.choice import ToolCallDelta
from preft.gateway.text.parsing import Asked, CallTag, Parts

READ_ALL_AGAIN = {  # vLLM's classes that read the whole text for each piece, and find the same wherever it is cut
    "Hermes2ProToolParser",
    "LongcatFlashToolParser",
    "PythonicToolParser",
    "Llama4PythonicToolParser",
    "Olmo3PythonicToolParser",
}
HARMONY = frozenset({"openai", "openai_gptoss"})  # read gpt-oss's own protocol, whose prompts need its own renderer
_PLAIN_NAME = re.compile(r"[^\s\"\\]+")
_ID_CHARACTERS = string.ascii_letters + string.digits


class VllmParsers:
    """The parsers of one server: implements `Parsers`. Names are vLLM's; None: no such parser.

    The constructor raises ConfigError if a name is unknown, or the parser can't be used with the model's tokenizer.
    """

    def __init__(self, model: Path, tool_call_parser: str | None, reasoning_parser: str | None) -> None:
        _check_name("tool_call_parser", tool_call_parser, ToolParserManager.list_registered())
        _check_name("reasoning_parser", reasoning_parser, ReasoningParserManager.list_registered())
        self.reads_calls = tool_call_parser is not None
        self.reads_reasoning = reasoning_parser is not None
        self._tokenizer = get_tokenizer(str(model), tokenizer_mode="hf")
        self._model = _model_facts(model)
        self._ids = "mistral" if tool_call_parser == "mistral" else get_tool_call_id_type(self._model)
        self._both = self._parser_class(tool_call_parser, reasoning_parser)
        self._reasoning = self._parser_class(None, reasoning_parser)
        tool_parser = getattr(self._both, "tool_parser_cls", None)
        # Such a parser also takes the marks of calls out of texts without tools.
        self._reads_all = self.reads_reasoning or getattr(tool_parser, "engine_based_streaming", False)

    def of(self, asked: Asked) -> VllmRequestParsers | None:
        if self._both is None or not (asked.tools or self._reads_all):
            return None
        return VllmRequestParsers(self._both, self._tokenizer, self._model, asked)

    def of_reasoning(self, asked: Asked) -> VllmRequestParsers | None:
        if self._reasoning is None:
            return None
        plain = Asked(asked.messages, variables=asked.variables)
        return VllmRequestParsers(self._reasoning, self._tokenizer, self._model, plain)

    def call_id(self, name: str, position: int, earlier: int) -> str:
        if self._ids == "mistral":
            return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(9))
        return str(make_tool_call_id(self._ids, name, earlier + position))

    def _parser_class(self, tools: str | None, reasoning: str | None) -> type[Parser] | None:
        try:
            kind: type[Parser] | None = ParserManager.get_parser(
                tool_parser_name=tools,
                reasoning_parser_name=reasoning,
                enable_auto_tools=True,
                tokenizer=self._tokenizer,
            )
        except Exception as error:  # parsers raise what they like, also for a package that is missing
            key = "tool_call_parser" if tools else "reasoning_parser"
            raise ConfigError(f"{key}: {error}") from error
        return kind


class VllmRequestParsers:
    """Implements `RequestParsers`. The constructor raises InvalidRequest for tools that vLLM's parsers can't take."""

    def __init__(self, kind: type[Parser], tokenizer: Any, model: Any, asked: Asked) -> None:
        self._kind, self._tokenizer, self._model = kind, tokenizer, model
        self._variables = dict(asked.variables or {})
        try:
            self._tools = [ChatCompletionToolsParam.model_validate(tool) for tool in asked.tools]
            request = ChatCompletionRequest.model_construct(
                model="",
                messages=list(asked.messages),
                tools=self._tools or None,
                tool_choice="auto" if asked.may_call else "none",
                parallel_tool_calls=asked.parallel,
                chat_template_kwargs=self._variables,
            )
            self._probe = self._new()
            self._plain = request.model_copy()
            self._request: Any = self._probe.adjust_request(request)
        except Exception as error:  # parsers are others' code, and raise what they like
            raise InvalidRequest(f"The server's parsers can't take these tools: {error}.", "tools") from error

    @property
    def skip_special_tokens(self) -> bool:
        return bool(self._request.skip_special_tokens)

    @property
    def strict_tag(self) -> str | None:
        wanted = self._request.structured_outputs
        if wanted is None or wanted.structural_tag is None or not any(tool.function.strict for tool in self._tools):
            return None
        return _simple_tag(json.loads(wanted.structural_tag))

    @property
    def call_tags(self) -> tuple[CallTag, ...]:
        reader = self._probe.tool_parser
        try:
            tag = reader and reader.get_structural_tag(self._plain, strict_level=ToolStrictLevel.FUNCTION)
        except Exception as error:
            raise InvalidRequest(f"The server's parsers can't take these tools: {error}.", "tools") from error
        structures = tag and _structures(tag.model_dump()["format"])
        return _call_tags(structures or [], [tool.function.name for tool in self._tools])

    def reasoning_end(self, prompt: Sequence[int]) -> int | None:
        reader = self._probe.reasoning_parser
        if reader is None or self._probe.is_reasoning_end(list(prompt)):
            return None
        token = self._tokenizer.get_vocab().get(reader.reasoning_end_str)
        if token is None:
            raise InvalidRequest(
                "Output of a given form behind the model's reasoning isn't supported with this reasoning_parser."
            )
        return int(token)

    def start(self, prompt: Sequence[int]) -> VllmParser:
        return VllmParser(self._new, self._request, list(prompt))

    def _new(self) -> Parser:
        return self._kind(
            self._tokenizer,
            self._tools or None,
            chat_template_kwargs=self._variables,
            model_config=self._model,
        )


class VllmParser:
    """Implements `OutputParser`.

    vLLM has two kinds of parsers. Those on its parser engine take pieces of any size. Most others lose calls if a piece
    has several tokens, and all lose text of streams that only looks like a call; such a parser's stream ends with what
    a parse of the whole text finds more.
    """

    def __init__(self, new: Callable[[], Parser], request: Any, prompt: list[int]) -> None:
        self._new, self._request, self._prompt = new, request, prompt
        self._parser = new()
        parts = (self._parser.reasoning_parser, self._parser.tool_parser)
        others = [part for part in parts if part is not None and not part.engine_based_streaming]
        self.takes_many = all(type(part).__name__ in READ_ALL_AGAIN for part in others)
        self._loses_text = bool(others)
        self._pushed: list[tuple[str, Sequence[int]]] = []
        self._found: list[Parts] = []

    def push(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Parts:
        message = self._parser.parse_delta(text, list(token_ids), self._request, self._prompt, finished=finished)
        parts = Parts() if message is None else _parts(message)
        if not self._loses_text:
            return parts
        self._pushed.append((text, token_ids))
        self._found.append(parts)
        return parts.then(self._missing()) if finished else parts

    def parse(self, text: str, token_ids: Sequence[int]) -> Parts:
        return _whole_parts(self._parser, text, token_ids, self._request, self._prompt)

    def reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        return int(self._parser.count_reasoning_tokens(tuple(token_ids)))

    def _missing(self) -> Parts:
        """What the whole text has behind the parts that the stream has found."""
        text = "".join(text for text, _ in self._pushed)
        ids = [token for _, tokens in self._pushed for token in tokens]
        whole = _whole_parts(self._new(), text, ids, self._request, self._prompt)
        sent: dict[int, str] = {}
        for call in (call for parts in self._found for call in parts.tool_calls):
            sent[call.position] = sent.get(call.position, "") + call.arguments
        calls = [
            call if call.position not in sent else ToolCallDelta(call.position, rest)
            for call in whole.tool_calls
            if (rest := _behind(call.arguments, sent.get(call.position, ""))) or call.position not in sent
        ]
        content = _behind(whole.content, "".join(parts.content for parts in self._found))
        reasoning = _behind(whole.reasoning, "".join(parts.reasoning for parts in self._found))
        return Parts(content if not (sent or calls) else "", reasoning, tuple(calls))


def _behind(whole: str, beginning: str) -> str:
    """The rest of `whole` behind `beginning`, "" if it begins otherwise."""
    return whole[len(beginning) :] if whole.startswith(beginning) else ""


def _whole_parts(parser: Parser, text: str, token_ids: Sequence[int], request: Any, prompt: Sequence[int]) -> Parts:
    parser.set_prompt_token_ids(prompt)
    reasoning, content, calls = parser.parse(text, request, enable_auto_tools=True, model_output_token_ids=token_ids)
    if calls == [] and request.tool_choice != "none" and isinstance(parser, DelegatingParser):
        # Some parsers take the marks of an unfinished call away, and find no call.
        _, content = parser.extract_reasoning(text, request)
    found = [
        ToolCallDelta(position, call.arguments, call.id or make_tool_call_id(), call.name)
        for position, call in enumerate(calls or ())
    ]
    return Parts(content or "", reasoning or "", tuple(found))


def _parts(message: DeltaMessage) -> Parts:
    calls = []
    for call in message.tool_calls or ():
        name, arguments = "", ""
        if call.function is not None:
            name, arguments = call.function.name or "", call.function.arguments or ""
        calls.append(ToolCallDelta(call.index, arguments, call.id or "", name))
    return Parts(message.content or "", message.reasoning or "", tuple(calls))


def _check_name(key: str, name: str | None, known: Sequence[str]) -> None:
    names = [other for other in known if other not in HARMONY]
    if name is not None and name not in names:
        raise ConfigError(f"{key}: vLLM has no parser {name!r} for this server; it has {', '.join(sorted(names))}")


def _model_facts(model: Path) -> Any:
    """The parts of vLLM's ModelConfig that parsers read."""
    config: Mapping[str, Any] = json.loads((model / "config.json").read_text())
    text = config.get("text_config") or config
    architectures = config.get("architectures") or [None]
    return SimpleNamespace(
        model=str(model),
        architecture=architectures[0],
        hf_config=SimpleNamespace(model_type=config.get("model_type")),
        hf_text_config=SimpleNamespace(model_type=text.get("model_type")),
        hf_overrides=None,
    )


def _simple_tag(tag: Mapping[str, Any]) -> str | None:
    """vLLM's structural tag as `structures` and `triggers`; None if the tag is of another form.

    The number of calls is free: the gateway leaves further calls out.
    """
    structures = _structures(tag["format"])
    if structures is None:
        return None
    return json.dumps({"structures": structures, "triggers": tag["format"]["triggers"]})


def _structures(form: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The `structures` of a form with JSON arguments alone; None if the form is another one."""
    if form["type"] != "triggered_tags" or form.get("at_least_one"):
        return None
    structures = []
    for part in form["tags"]:
        content, end = part["content"], part["end"]
        if content["type"] != "json_schema" or content.get("style", "json") != "json" or not isinstance(end, str):
            return None
        structures.append({"begin": part["begin"], "schema": content["json_schema"], "end": end})
    return structures


def _call_tags(structures: Sequence[Mapping[str, Any]], names: Sequence[str]) -> tuple[CallTag, ...]:
    """vLLM gives the forms tool by tool, as many for each tool. Arguments without a schema are an object."""
    tags = []
    for number, structure in enumerate(structures):
        name = names[number * len(names) // len(structures)]
        if f'"{name}"' not in structure["begin"] or not _PLAIN_NAME.fullmatch(name):
            return ()
        schema = {"type": "object"} if structure["schema"] is True else structure["schema"]
        tags.append(CallTag(name, structure["begin"], schema, structure["end"]))
    return tuple(tags)

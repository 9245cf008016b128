"""Chat messages and tools in every form that OpenAI's clients and agents send, strictly checked.

Owns a message's fields, and the list of fields that never reach the prompt. `text.chat_prompt` builds the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from preft.gateway.bodies.values import overflow_in

MAX_MESSAGES = 65_536
MAX_TOOLS = 1024
MAX_DOCUMENTS = 1024

# Fields that clients copy from replies or keep for themselves; templates don't read them.
_BOOKKEEPING = frozenset(
    {
        "annotations", "cache_control", "citations", "created_at", "id", "index", "logprobs", "metadata", "parsed",
        "parsed_arguments", "provider_specific_fields", "status", "timestamp",
    }
)  # fmt: skip
_UNSUPPORTED = ("audio", "function_call")
_TEXT_FIELDS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


@dataclass(frozen=True, slots=True)
class Content:
    """A message's text: one string, or with `is_list` a list of text parts."""

    texts: tuple[str, ...] = ()
    is_list: bool = False


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call in an assistant message: its fields in the client's order, and its arguments as a JSON text too."""

    name: str
    fields: Mapping[str, Any]
    arguments: str


def read_content(value: object) -> Content:
    """Raises ValueError with a clause that follows the field's name. All readers of this module do."""
    if isinstance(value, str):
        return Content((value,))
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of content parts")
    return Content(tuple(map(_read_part, value)), is_list=True)


def _read_part(part: object) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise ValueError("a content part must be an object with a type")
    field = _TEXT_FIELDS.get(kind)
    if field is None:
        raise ValueError(f"content parts of type {kind!r} aren't supported, only text")
    text = part.get(field)
    if not isinstance(text, str):
        raise ValueError(f"a content part of type {kind!r} must have a string {field!r}")
    if others := _meaningful(part).keys() - {"type", field}:
        raise ValueError(f"content parts with {min(others)!r} aren't supported")
    return text


def read_tool_call(value: object) -> ToolCall:
    """Parses arguments given as a JSON text, as templates expect; texts that aren't JSON stay texts."""
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(function, dict) or value.get("type", "function") != "function":
        raise ValueError("a tool call must be an object of id, type 'function' and function")
    fields = _meaningful(function)
    if not isinstance(fields.get("name"), str) or not fields["name"]:
        raise ValueError("the function of a tool call must have a name")
    text = fields.get("arguments")
    if not isinstance(text, str):
        text = json.dumps({} if text is None else text, ensure_ascii=False)
    text = text if text.strip() else "{}"
    fields["arguments"] = _parsed(text)
    call = {key: item for key, item in value.items() if item is not None and (key == "id" or key not in _BOOKKEEPING)}
    if others := (call.keys() - {"id", "type", "function"}) | (fields.keys() - {"name", "arguments"}):
        raise ValueError(f"a tool call can't have {min(others)!r}")
    if not isinstance(call.get("id", ""), str):
        raise ValueError("the id of a tool call must be a string")
    return ToolCall(fields["name"], {**call, "type": "function", "function": fields}, text)


def _parsed(text: str) -> Any:
    try:
        value = pydantic_core.from_json(text, allow_inf_nan=False)
    except ValueError:
        return text
    if (path := overflow_in(value)) is not None:
        raise ValueError(f"the number arguments{path} of a tool call is too large")
    return value


def _meaningful(given: Mapping[str, Any]) -> dict[str, Any]:
    """Drops null fields and bookkeeping."""
    return {name: value for name, value in given.items() if value is not None and name not in _BOOKKEEPING}


class ContentPart(BaseModel, extra="allow"):
    """A part of a message's content. Only the API's description uses this class: `read_content` does the checks."""

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str | None = None
    refusal: str | None = None


class CallOfTool(BaseModel, extra="allow"):
    """An assistant's tool call. Only the API's description uses this class: `read_tool_call` does the checks."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: dict[str, Any]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ToolFunction(_Strict):
    """A function that a tool offers. `parameters` is a JSON schema that only the template reads."""

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    """A tool of the request; the template describes it to the model."""

    type: Literal["function"] = "function"
    function: ToolFunction

    def fields(self) -> dict[str, Any]:
        """The tool as the template sees it. As in vLLM, a missing description is null; `strict` may be missing."""
        absent = {"strict"} if self.function.strict is None else set()
        return {"type": self.type, "function": self.function.model_dump(exclude=absent)}


def _describe_bookkeeping(schema: dict[str, Any]) -> None:
    """Adds the ignored fields to the schema, and marks the optional ones."""
    fields = schema["properties"]
    fields |= {name: {"description": "Taken without effect."} for name in sorted(_BOOKKEEPING)}
    fields |= {name: {"type": "null"} for name in _UNSUPPORTED}
    fields["tool_calls"] = {"anyOf": [fields["tool_calls"], {"type": "null"}]}
    schema["required"] = ["role"]


class Message(_Strict):
    """One message. `reasoning` and `reasoning_content` are two names of the model's thoughts before its answer."""

    model_config = ConfigDict(json_schema_extra=_describe_bookkeeping)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        Content, PlainValidator(read_content, json_schema_input_type=str | list[str | ContentPart] | None)
    ]
    name: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Annotated[ToolCall, PlainValidator(read_tool_call, json_schema_input_type=CallOfTool)]] = Field(
        default_factory=list
    )
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_bookkeeping(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        kept = _meaningful(value)
        for name in ("content", "tool_calls"):
            if kept.get(name) == []:
                del kept[name]
        for name in _UNSUPPORTED:
            if name in kept:
                raise ValueError(f"{name} isn't supported")
        return {"content": "", **kept} if kept.get("role") in ("assistant", "tool") else kept

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        for name, role in _ROLE_OF_FIELD.items():
            if getattr(self, name) and role != self.role:
                raise ValueError(f"a {self.role} message can't have {name}")
        return self

    @property
    def said(self) -> Content:
        """All text of the message. A refusal counts as the assistant's text."""
        if self.refusal is None:
            return self.content
        texts = [text for text in self.content.texts if text]
        return Content((*texts, self.refusal), is_list=self.content.is_list or bool(texts))

    @property
    def thoughts(self) -> str | None:
        return self.reasoning_content if self.reasoning is None else self.reasoning


_ROLE_OF_FIELD = {
    "refusal": "assistant",
    "reasoning": "assistant",
    "reasoning_content": "assistant",
    "tool_calls": "assistant",
    "tool_call_id": "tool",
}

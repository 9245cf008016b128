"""The bodies of Anthropic's /v1/messages and /v1/messages/count_tokens, strictly checked. They become chat bodies."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from preft.core.errors import InvalidRequest
from preft.gateway.bodies.anthropic_blocks import (
    InputMessage,
    TextBlock,
    read_messages,
    read_system,
    system_text,
)
from preft.gateway.bodies.converted import Names, Turns
from preft.gateway.bodies.messages import MAX_TOOLS
from preft.gateway.bodies.parameters import OtherParameters
from preft.gateway.bodies.parse import parse_body
from preft.gateway.bodies.schemas import WHOLE, ApiBody, ChatBody, NonEmpty, Salt, Strict, Temperature, TopK, TopP
from preft.gateway.bodies.values import MAX_STOPS, at_most, of_type

MESSAGES_PARAMETERS = OtherParameters(
    accepted=frozenset(
        {
            "cache_control", "diagnostics", "inference_geo", "metadata", "service_tier", "speed",
            "user_profile_id", "workspace_id", "mm_payload", "return_mm_kwargs",
        }
    ),
    unsupported=MappingProxyType(
        {
            "container": (),
            "context_management": (),
            "ec_transfer_params": (),
            "kv_transfer_params": (),
            "mcp_servers": ([],),
            "vllm_xargs": ({},),
            "watermarking": (False,),
        }
    ),
)  # fmt: skip

_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "response_format": "output_config.format",
        "response_format.json_schema": "output_config.format",
        "reasoning_effort": "output_config.effort",
        "stop": "stop_sequences",
        "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    }
)


class MessagesChat(ChatBody):
    """A chat whose reply is an Anthropic message."""

    id_prefix = "msg_"


class ClientTool(Strict):
    """A tool that the client runs. `cache_control` and `eager_input_streaming` have no effect."""

    type: Annotated[Literal["custom"], BeforeValidator(of_type("custom", "tools that the client runs"))] = "custom"
    name: NonEmpty
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    defer_loading: Literal[False] | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    cache_control: dict[str, Any] | None = None
    eager_input_streaming: bool | None = None

    def as_chat(self) -> dict[str, Any]:
        function: dict[str, Any] = {"name": self.name, "parameters": {"type": "object", **self.input_schema}}
        if self.description is not None:
            function["description"] = self.description
        if self.strict is not None:
            function["strict"] = self.strict
        return {"type": "function", "function": function}


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: NonEmpty | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _names_a_tool(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            raise InvalidRequest("tool_choice needs a name with type 'tool' alone.", "tool_choice.name")
        return self

    def as_chat(self) -> str | dict[str, Any]:
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


def _read_thinking(value: object) -> object:
    if value == "enabled":
        raise ValueError("a budget of thinking tokens isn't supported; use 'adaptive' and output_config.effort")
    return value


class Thinking(Strict):
    """With `adaptive`, the model decides."""

    type: Annotated[Literal["disabled", "adaptive"], BeforeValidator(_read_thinking)]
    display: Literal["summarized"] | None = None


class OutputFormat(Strict):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Strict):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountTokensBody(ApiBody):
    """POST /v1/messages/count_tokens. `chat` is the same request as a chat body."""

    others = MESSAGES_PARAMETERS

    model: NonEmpty
    messages: Annotated[list[InputMessage], PlainValidator(read_messages, json_schema_input_type=list[InputMessage])]
    system: Annotated[str | list[Any], PlainValidator(read_system, json_schema_input_type=str | list[TextBlock])] = ""
    tools: Annotated[list[ClientTool], BeforeValidator(at_most(MAX_TOOLS))] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_a_chat(self) -> Self:
        _ = self.chat
        return self

    @functools.cached_property
    def _turns(self) -> Turns:
        turns = Turns()
        if text := system_text(self.system):
            turns.add({"role": "system", "content": text}, "system", "system")
        for number, message in enumerate(self.messages):
            message.join(turns, f"messages[{number}]")
        return turns

    @functools.cached_property
    def names(self) -> Names:
        """The names of the chat body's parameters in this body."""
        return Names(_NAMES, self._turns.places)

    @functools.cached_property
    def chat(self) -> ChatBody:
        """The same request as a chat body. Raises InvalidRequest with this body's names."""
        given: dict[str, Any] = {
            "model": self.model,
            "messages": self._turns.messages,
            "chat_template_kwargs": self.chat_template_kwargs,
            **self._tool_fields(),
            **self._sampling_fields(),
        }
        if (config := self.output_config) is not None:
            if config.effort is not None:
                given["reasoning_effort"] = config.effort
            if config.format is not None:
                schema = {"name": "json_schema", "schema": config.format.schema_}
                given["response_format"] = {"type": "json_schema", "json_schema": schema}
        if self.thinking is not None and self.thinking.type == "disabled":
            given["reasoning_effort"] = "none"
        if self.messages[-1].role == "assistant":  # Anthropic's prefill: the reply continues the last message
            given |= {"continue_final_message": True, "add_generation_prompt": False}
        with self.names.used():
            return parse_body(MessagesChat, given)

    def _sampling_fields(self) -> dict[str, Any]:
        return {}

    def _tool_fields(self) -> dict[str, Any]:
        choice = self.tool_choice
        fields: dict[str, Any] = {}
        if self.tools:
            fields["tools"] = [tool.as_chat() for tool in self.tools]
        if choice is not None and (self.tools or choice.type in ("any", "tool")):
            fields |= {"tool_choice": choice.as_chat()}
        if choice is not None and self.tools:
            fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
        return fields


class MessagesBody(CountTokensBody):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1), WHOLE]
    stop_sequences: Annotated[list[NonEmpty], BeforeValidator(at_most(MAX_STOPS))] = Field(default_factory=list)
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    stream: bool = False
    cache_salt: Salt | None = None

    def _sampling_fields(self) -> dict[str, Any]:
        return {
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stream": self.stream,
            "cache_salt": self.cache_salt,
        }

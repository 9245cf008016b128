"""The body of /v1/responses, strictly checked. The body becomes a chat body."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from preft.core.errors import InvalidRequest
from preft.gateway.bodies.converted import Names, Turns
from preft.gateway.bodies.messages import MAX_TOOLS
from preft.gateway.bodies.parameters import OtherParameters
from preft.gateway.bodies.parse import parse_body
from preft.gateway.bodies.response_items import Item, MessageItem, read_input
from preft.gateway.bodies.schemas import WHOLE, ChatBody, NonEmpty, SamplingBody, Strict
from preft.gateway.bodies.structured import Form
from preft.gateway.bodies.values import at_most, of_type

LOGPROBS = "message.output_text.logprobs"

_STATELESS = "responses aren't stored; send the whole conversation as input"
RESPONSES_PARAMETERS = OtherParameters(
    accepted=frozenset(
        {
            "store", "service_tier", "safety_identifier", "session_id",
            "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options",
            "media_io_kwargs", "mm_payload", "mm_processor_kwargs", "return_mm_kwargs",
        }
    ),
    unsupported=MappingProxyType(
        {
            "access_programs": (),
            "background": (False,),
            "background_options": (),
            "context_management": ([],),
            "conversation": (),
            "ec_transfer_params": (),
            "enable_response_messages": (False,),
            "image": (),
            "kv_transfer_params": (),
            "moderation": (),
            "previous_input_messages": ([],),
            "previous_response_id": (),
            "prompt": (),
            "vllm_xargs": ({},),
            "watermarking": (False,),
        }
    ),
    reasons=MappingProxyType(
        {
            "background": "responses aren't stored, so a response can't be fetched later; use stream",
            "conversation": _STATELESS,
            "previous_response_id": _STATELESS,
            "prompt": "there are no stored prompts; send instructions and input",
        }
    ),
)  # fmt: skip

_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "messages": "input",
        "max_tokens": "max_output_tokens",
        "response_format": "text.format",
        "response_format.json_schema": "text.format",
        "reasoning_effort": "reasoning.effort",
    }
)


class ResponsesChat(ChatBody):
    """A chat whose reply is a response."""

    id_prefix = "resp_"


_FUNCTION_FIELDS = {"name", "description", "parameters", "strict"}


class FunctionTool(Strict):
    type: Annotated[Literal["function"], BeforeValidator(of_type("function", "functions"))]
    name: NonEmpty
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: Literal[False] | None = None
    allowed_callers: list[Literal["direct"]] | None = None

    def as_chat(self) -> dict[str, Any]:
        return {"type": "function", "function": self.model_dump(include=_FUNCTION_FIELDS, exclude_none=True)}

    def as_shown(self) -> dict[str, Any]:
        """The tool in a reply."""
        return {"type": "function", **self.model_dump(include=_FUNCTION_FIELDS)}


class FunctionChoice(Strict):
    type: Literal["function"]
    name: NonEmpty


def _read_choice(value: object) -> str | FunctionChoice:
    if value in ("none", "auto", "required"):
        return str(value)
    if isinstance(value, dict) and value.get("type") == "function":
        return FunctionChoice.model_validate(value)
    raise ValueError("must be 'none', 'auto', 'required' or {'type': 'function', 'name': ...}")


class TextFormat(Form):
    """The form of the text. All fields but `type` belong to `json_schema`."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    def as_chat(self) -> dict[str, Any]:
        rest = self.model_dump(by_alias=True, exclude_none=True, exclude={"type"})
        if self.type != "json_schema":
            if rest:
                raise InvalidRequest(
                    f"text.format of type {self.type} can't have {min(rest)!r}.", f"text.format.{min(rest)}"
                )
            return {"type": self.type}
        for name in ("name", "schema"):
            if name not in rest:
                raise InvalidRequest(f"text.format of type json_schema needs {name}.", f"text.format.{name}")
        return {"type": self.type, "json_schema": rest}


class TextOptions(Strict):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(Strict):
    """`summary` has no effect: replies have the reasoning's own text."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


class ResponseStreamOptions(Strict):
    include_obfuscation: bool | None = None  # OpenAI's padding against traffic analysis


# Parts of items that a response here never has, but logprobs.
Included = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
]
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class ResponsesBody(SamplingBody):
    """POST /v1/responses. `chat` is the same request as a chat body."""

    others = RESPONSES_PARAMETERS

    input: Annotated[str | list[Item], PlainValidator(read_input, json_schema_input_type=str | list[Item])]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    max_tool_calls: Annotated[int, Field(ge=1), WHOLE] | None = None  # counts hosted tools, which don't exist here
    text: TextOptions | None = None
    tools: Annotated[list[FunctionTool], BeforeValidator(at_most(MAX_TOOLS))] = Field(default_factory=list)
    tool_choice: Annotated[
        str | FunctionChoice,
        PlainValidator(_read_choice, json_schema_input_type=Literal["none", "auto", "required"] | FunctionChoice),
    ] = "auto"
    parallel_tool_calls: bool = True
    reasoning: ReasoningOptions | None = None
    include_reasoning: bool = True
    include: list[Included] = Field(default_factory=list)
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] = 0
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    truncation: Literal["auto", "disabled"] = "disabled"  # a prompt that is too long is refused in both cases
    stream_options: ResponseStreamOptions | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.top_logprobs and LOGPROBS not in self.include:
            raise InvalidRequest(f"top_logprobs needs include=[{LOGPROBS!r}].", "top_logprobs")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options can only be given with stream=true.", "stream_options")
        _ = self.chat
        return self

    @property
    def shown_tool_choice(self) -> str | dict[str, str]:
        """The tool choice in a reply."""
        return self.tool_choice.model_dump() if isinstance(self.tool_choice, FunctionChoice) else self.tool_choice

    @functools.cached_property
    def _turns(self) -> Turns:
        turns = Turns()
        if self.instructions:
            turns.add({"role": "system", "content": self.instructions}, "instructions", "instructions")
        if isinstance(self.input, str):
            turns.add({"role": "user", "content": self.input}, "input", "input")
            return turns
        for number, item in enumerate(self.input):
            item.join(turns, f"input[{number}]")
        return turns

    @functools.cached_property
    def names(self) -> Names:
        """The names of the chat body's parameters in this body."""
        return Names(_NAMES, self._turns.places)

    @functools.cached_property
    def chat(self) -> ChatBody:
        """The same request as a chat body. Raises InvalidRequest with this body's names."""
        shared = set(SamplingBody.model_fields)
        given: dict[str, Any] = {
            # Pydantic warns of fields whose JSON form isn't their own form.
            **self.model_dump(mode="json", by_alias=True, exclude_unset=True, include=shared, warnings=False),
            "messages": self._turns.messages,
            "max_tokens": self.max_output_tokens,
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        if self.text is not None and self.text.format is not None:
            given["response_format"] = self.text.format.as_chat()
        if self.reasoning is not None:
            given["reasoning_effort"] = self.reasoning.effort
        if LOGPROBS in self.include:
            given |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        if self._continues:
            given |= {"continue_final_message": True, "add_generation_prompt": False}
        given |= self._tool_fields()
        with self.names.used():
            return parse_body(ResponsesChat, given)

    @property
    def _continues(self) -> bool:
        """Whether the answer continues the assistant's last message, as in vLLM."""
        last = self.input[-1] if self.input else ""
        if isinstance(last, str) or last.status not in ("in_progress", "incomplete"):
            return False
        if last.type == "reasoning":
            raise InvalidRequest("The reasoning of the last item can't be continued.", f"input[{len(self.input) - 1}]")
        return isinstance(last, MessageItem) and last.role == "assistant"

    def _tool_fields(self) -> dict[str, Any]:
        choice: Any = self.tool_choice
        if not self.tools and choice in ("none", "auto"):
            return {}
        if isinstance(choice, FunctionChoice):
            choice = {"type": "function", "function": {"name": choice.name}}
        tools = [tool.as_chat() for tool in self.tools]
        return {"tools": tools, "tool_choice": choice, "parallel_tool_calls": self.parallel_tool_calls}

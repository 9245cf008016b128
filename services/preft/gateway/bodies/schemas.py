"""The bodies of generation requests, strictly checked: InvalidRequest names a wrong type, range or parameter.

Owns the checks that need no model. `api_call` checks lengths, token ids and model names.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from preft.core.errors import InvalidRequest
from preft.core.request import INT32_MAX, MAX_IDS
from preft.core.structured import StructuredOutputs
from preft.gateway.bodies.messages import MAX_DOCUMENTS, MAX_MESSAGES, MAX_TOOLS, Message, Tool
from preft.gateway.bodies.parameters import OF_COMPLETIONS, OtherParameters
from preft.gateway.bodies.structured import ResponseFormat, StructuredOutputsBody, wanted_outputs
from preft.gateway.bodies.tool_choice import CHOICE_SCHEMA, NamedTool, ToolChoice, read_tool_choice
from preft.gateway.bodies.values import (
    Prompt,
    at_most,
    read_logit_bias,
    read_prompts,
    read_salt,
    read_seed,
    read_stops,
    whole,
)

INT64_MAX = 2**63 - 1


WHOLE = BeforeValidator(whole)
Integer = Annotated[int, WHOLE]
NonEmpty = Annotated[str, Field(min_length=1)]
Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=-1, le=INT32_MAX), WHOLE]  # -1 and 0: all tokens
Salt = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(read_salt)]


class Strict(BaseModel):
    """A JSON body. Fields aren't converted, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # OpenAI's padding against traffic analysis


MAX_USER = 256  # characters


class ApiBody(Strict):
    """The body of an API of others, whose clients also send parameters without a field here."""

    others: ClassVar[OtherParameters] = OF_COMPLETIONS


class SamplingBody(ApiBody):
    """The fields that mean the same in completions, chat completions and responses. None means absent."""

    model: NonEmpty
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None  # beyond these, logits aren't finite
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    seed: Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX), WHOLE, AfterValidator(read_seed)] | None = None
    ignore_eos: bool = False
    stop: Annotated[tuple[str, ...], PlainValidator(read_stops, json_schema_input_type=NonEmpty | list[NonEmpty])] = ()
    stop_token_ids: Annotated[list[Integer], BeforeValidator(at_most(MAX_IDS))] = Field(default_factory=list)
    logit_bias: Annotated[
        dict[int, float], PlainValidator(read_logit_bias, json_schema_input_type=dict[str, float])
    ] = Field(default_factory=dict)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    priority: Annotated[int, Field(ge=-100, le=100), WHOLE] = 0  # lower goes first
    user: Annotated[str, Field(max_length=MAX_USER)] | None = None
    request_id: Annotated[str, Field(pattern=r"^[!-~]{1,128}$")] | None = None  # a part of the reply's id
    stream: bool = False
    structured_outputs: StructuredOutputsBody | None = None
    cache_salt: Salt | None = None


class GenerationBody(SamplingBody):
    """The fields of completions and chat completions, with vLLM's additions."""

    id_prefix: ClassVar[str]
    prompt_param: ClassVar[str]  # the field that holds the prompt

    n: Annotated[int, Field(ge=1, le=128), WHOLE] = 1
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    min_tokens: Annotated[int, Field(ge=0), WHOLE] = 0
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    allowed_token_ids: Annotated[list[Integer], Field(min_length=1), BeforeValidator(at_most(MAX_IDS))] | None = (
        None  # output has no others
    )
    prompt_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1), WHOLE] | None = None  # -1: to what fits
    truncation_side: Literal["left", "right"] = "left"

    @model_validator(mode="after")
    def _form_is_valid(self) -> Self:
        _ = self.wanted_outputs
        return self

    @model_validator(mode="after")
    def _prompt_logprobs_need_a_whole_reply(self) -> Self:
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest("prompt_logprobs can't be given with stream=true.", "prompt_logprobs")
        return self

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options can only be given with stream=true.", "stream_options")
        return self

    @functools.cached_property
    def wanted_outputs(self) -> StructuredOutputs | None:
        """The form of the output. Raises InvalidRequest."""
        return wanted_outputs(self.response_format, self.structured_outputs)

    @property
    def form_param(self) -> str:
        """The parameter that gives the form of the output."""
        return "structured_outputs" if self.structured_outputs is not None else "response_format"

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """The number of reported alternatives per token; None: no log probabilities."""
        raise NotImplementedError

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        """The number of alternatives per token of the prompt; None: no log probabilities of the prompt."""
        return self.prompt_logprobs

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Usage in every chunk; as in vLLM only together with `include_usage`."""
        options = self.stream_options
        return options is not None and bool(options.include_usage and options.continuous_usage_stats)


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    id_prefix = "cmpl-"
    prompt_param = "prompt"

    prompt: Annotated[
        tuple[Prompt, ...],
        PlainValidator(read_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    max_tokens: Annotated[int, Field(ge=0), WHOLE] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    echo: bool = False  # the reply begins with the prompt
    best_of: Annotated[int, Field(ge=1), WHOLE] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _best_of_is_n(self) -> Self:
        if self.best_of is not None and self.best_of != self.n:
            raise InvalidRequest("best_of isn't supported unless it equals n.", "best_of")
        return self

    @model_validator(mode="after")
    def _no_output_needs_echo(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens=0 needs echo=true: there would be nothing to reply.", "max_tokens")
        return self

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        return self.logprobs if self.prompt_logprobs is None and self.echo else self.prompt_logprobs


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    id_prefix = "chatcmpl-"
    prompt_param = "messages"

    messages: Annotated[list[Message], Field(min_length=1), BeforeValidator(at_most(MAX_MESSAGES))]
    max_completion_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None  # wins over max_tokens
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    documents: Annotated[list[dict[str, Any]], BeforeValidator(at_most(MAX_DOCUMENTS))] = Field(default_factory=list)
    tools: Annotated[list[Tool], BeforeValidator(at_most(MAX_TOOLS))] = Field(default_factory=list)
    echo: bool = False  # the reply's content begins with that of the last message, if the assistant said it
    return_prompt_text: bool = False
    tool_choice: Annotated[ToolChoice | None, PlainValidator(read_tool_choice), WithJsonSchema(CHOICE_SCHEMA)] = None
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs=true.", "top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequest("continue_final_message needs add_generation_prompt=false.", "continue_final_message")
        if self.tool_choice == "required" and not self.tools:
            raise InvalidRequest("tool_choice='required' needs tools.", "tool_choice")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.name not in self._function_names:
            raise InvalidRequest(f"tool_choice names {self.tool_choice.name!r}, which isn't in tools.", "tool_choice")
        return self

    @property
    def echoes(self) -> tuple[str, ...]:
        """The text before the answer."""
        last = self.messages[-1]
        return ("\n".join(last.said.texts),) if self.echo and last.role == "assistant" else ()

    @property
    def _function_names(self) -> set[str]:
        return {tool.function.name for tool in self.tools}

    @property
    def wanted_tool_choice(self) -> ToolChoice:
        """Without a choice, the model may call the tools if there are any."""
        return "none" if not self.tools else self.tool_choice or "auto"

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

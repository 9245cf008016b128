"""The bodies of /tokenize and /detokenize, with vLLM's fields."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from preft.core.errors import InvalidRequest
from preft.gateway.bodies.messages import MAX_MESSAGES, MAX_TOOLS, Message, Tool
from preft.gateway.bodies.parse import first_problem
from preft.gateway.bodies.schemas import ChatBody, Integer, NonEmpty, Strict
from preft.gateway.bodies.values import at_most, overflow_in

_OF_CHATS = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")


class TokenizeBody(Strict):
    """POST /tokenize: a text (`prompt`) or a chat (`messages`). Without `model`, the base model is meant.

    By default the tokenizer adds special tokens to a text, and a chat's template adds its own.
    """

    model: NonEmpty | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1), BeforeValidator(at_most(MAX_MESSAGES))] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Tool], BeforeValidator(at_most(MAX_TOOLS))] | None = None

    @model_validator(mode="after")
    def _has_one_form(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("Give either prompt or messages.", "prompt")
        if self.prompt is not None:
            for name in _OF_CHATS:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise InvalidRequest(f"{name} needs messages.", name)
        return self

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_finite(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name, value in given.items():
            if (path := overflow_in(value)) is not None:
                raise InvalidRequest(f"{name}{path}: the number is too large.", name + path)
        return given

    def chat(self, model: str) -> ChatBody:
        """The chat as a request to `model`. Raises InvalidRequest."""
        try:
            return ChatBody(
                model=model,
                messages=self.messages or [],
                add_special_tokens=bool(self.add_special_tokens),
                add_generation_prompt=self.add_generation_prompt,
                continue_final_message=self.continue_final_message,
                chat_template_kwargs=self.chat_template_kwargs or {},
                tools=self.tools or [],
                tool_choice="none",
            )
        except ValidationError as error:
            raise first_problem(error) from None


class DetokenizeBody(Strict):
    """POST /detokenize. Without `model`, the base model is meant."""

    model: NonEmpty | None = None
    tokens: list[Integer]

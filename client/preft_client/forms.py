"""Answers in the form of pydantic models: the wanted form for the server, and the way back from the text."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from preft_client.errors import BadReply
from preft_client.results import Generation, Parsed

Form = TypeVar("Form", bound=BaseModel)


def form_of(form: type[BaseModel]) -> dict[str, Any]:
    """The `response_format` that makes the model's output fit `form`."""
    schema = {"name": form.__name__, "schema": form.model_json_schema(), "strict": True}
    return {"type": "json_schema", "json_schema": schema}


def read_form(form: type[Form], generation: Generation) -> Parsed[Form]:
    """Raises BadReply for a text that doesn't fit: one that was cut off, or breaks a rule that no JSON Schema has."""
    try:
        return Parsed(form.model_validate_json(generation.text), generation)
    except ValidationError as error:
        cut = generation.finish_reason == "length"
        advice = "it was cut off, so give more max_tokens" if cut else str(error.errors()[0]["msg"])
        raise BadReply(f"the answer is no {form.__name__}: {advice}") from error

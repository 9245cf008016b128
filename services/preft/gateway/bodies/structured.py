"""The form of the output in a body: OpenAI's `response_format` and vLLM's `structured_outputs`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from preft.core.errors import InvalidRequest
from preft.core.structured import StructuredOutputs


class Form(BaseModel):
    """Fields aren't converted, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class JsonSchema(Form):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Form):
    """`structures` and `triggers` belong to vLLM's type `structural_tag`."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None


class StructuredOutputsBody(Form):
    """Exactly one of the first six fields."""

    json_: Annotated[str | dict[str, Any] | None, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None


def wanted_outputs(
    response_format: ResponseFormat | None, structured_outputs: StructuredOutputsBody | None
) -> StructuredOutputs | None:
    """The wanted form, or None. Raises InvalidRequest that names the parameter."""
    if response_format is None or response_format.type == "text":
        return _structured(structured_outputs) if structured_outputs is not None else None
    if structured_outputs is not None:
        raise InvalidRequest("response_format and structured_outputs exclude each other.", "structured_outputs")
    try:
        return _formatted(response_format)
    except ValueError as error:
        raise InvalidRequest(f"response_format {error}.", "response_format") from None


def _structured(body: StructuredOutputsBody) -> StructuredOutputs:
    given = body.model_dump(by_alias=True, exclude_none=True)
    if isinstance(schema := given.get("json"), dict):
        given["json"] = json.dumps(schema)
    try:
        return StructuredOutputs(**{**given, "choice": tuple(given.get("choice", ()))})
    except ValueError as error:
        raise InvalidRequest(f"structured_outputs {error}.", "structured_outputs") from None


def _formatted(wanted: ResponseFormat) -> StructuredOutputs:
    if wanted.type == "json_object":
        return StructuredOutputs(json_object=True)
    if wanted.type == "structural_tag":
        tag = {"structures": wanted.structures, "triggers": wanted.triggers}
        return StructuredOutputs(structural_tag=json.dumps(tag))
    if wanted.json_schema is None:
        raise ValueError("of type json_schema needs json_schema")
    # OpenAI demands additionalProperties: false of strict schemas.
    return StructuredOutputs(
        json=json.dumps(wanted.json_schema.schema_),
        disable_additional_properties=bool(wanted.json_schema.strict),
    )

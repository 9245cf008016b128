"""/openapi.json: schemas made from the models and tables that check requests.

Routes read their bodies themselves, so FastAPI can't see the schemas. `json_body` and its siblings declare them.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

from preft.gateway.bodies.adapter_schemas import AddAdapterBody, LoadAdapterBody, PinAdapterBody, UnloadAdapterBody
from preft.gateway.bodies.anthropic import CountTokensBody, MessagesBody
from preft.gateway.bodies.responses import ResponsesBody
from preft.gateway.bodies.schemas import ApiBody, ChatBody, CompletionBody
from preft.gateway.bodies.tokenize import DetokenizeBody, TokenizeBody
from preft.gateway.http.anthropic_types import AnthropicErrorReply
from preft.gateway.http.content import ARCHIVE_TYPES
from preft.gateway.http.error_forms import is_anthropic
from preft.gateway.http.reply_types import ErrorReply

BODIES: tuple[type[BaseModel], ...] = (
    CompletionBody, ChatBody, ResponsesBody, MessagesBody, CountTokensBody, TokenizeBody, DetokenizeBody,
    AddAdapterBody, PinAdapterBody, LoadAdapterBody, UnloadAdapterBody,
)  # fmt: skip
_COMPONENTS = "#/components/schemas/"
_NULL = {"type": "null"}
_EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "JSON; after the last event of a reply [DONE]."}},
    "required": ["data"],
}

Schema = dict[str, Any]

ERROR_REPLIES = (ErrorReply, AnthropicErrorReply)


def errors(reply: Any = ErrorReply) -> dict[int | str, Schema]:
    """The `responses` of a route for statuses other than 200."""
    schema = {"$ref": f"{_COMPONENTS}{reply.__name__}"}
    return {"default": {"description": "Error", "content": {"application/json": {"schema": schema}}}}


class DescribedApp(FastAPI):
    """A FastAPI app whose /openapi.json includes the bodies that routes read themselves."""

    needs_keys = False

    def openapi(self) -> Schema:
        if self.openapi_schema is None:
            schema = get_openapi(title=self.title, version=self.version, routes=self.routes)
            schema["components"]["schemas"] |= _schemas()
            if self.needs_keys:
                schema["components"]["securitySchemes"] = {
                    "key": {"type": "http", "scheme": "bearer"},
                    "anthropic": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                }
                schema["security"] = [{"key": []}]
                for path, methods in schema["paths"].items():
                    for described in methods.values() if is_anthropic(path) else ():
                        described["security"] = [{"key": []}, {"anthropic": []}]
            self.openapi_schema = schema
        return self.openapi_schema


def json_body(kind: type[BaseModel]) -> Schema:
    """The description of a route that reads a JSON body of `kind`."""
    schema = {"$ref": f"{_COMPONENTS}{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def archive_body() -> Schema:
    return {"requestBody": {"required": True, "content": {kind: {} for kind in sorted(ARCHIVE_TYPES)}}}


def query(kind: type[BaseModel]) -> Schema:
    """The description of a route that reads a query string of `kind`."""
    fields = kind.model_json_schema()["properties"]
    parameters = [
        {"name": name, "in": "query", "required": False, "schema": _without_null(field)}
        for name, field in fields.items()
    ]
    return {"parameters": parameters}


def answers(reply: Any, *, stream: bool = False, error: Any = ErrorReply) -> dict[int | str, Schema]:
    """The `responses` of a route: `reply` with 200, events too if `stream`, and `error` with any other status."""
    success: Schema = {"model": reply, "description": "Success"}
    if stream:
        success["content"] = {"text/event-stream": {"schema": _EVENT}}
    return {200: success, **errors(error)}


def _schemas() -> dict[str, Schema]:
    """The schemas of all bodies, their parts, and errors, by name."""
    _, schema = models_json_schema([(kind, "validation") for kind in BODIES], ref_template=f"{_COMPONENTS}{{model}}")
    schemas: dict[str, Schema] = schema["$defs"]
    for reply in ERROR_REPLIES:
        error = TypeAdapter(reply).json_schema(ref_template=f"{_COMPONENTS}{{model}}")
        schemas |= {**error.pop("$defs"), reply.__name__: error}
    for kind in BODIES:
        body = schemas[kind.__name__]
        required = body.get("required", [])
        properties = {
            name: field if name in required else _or_null(field) for name, field in body["properties"].items()
        }
        if issubclass(kind, ApiBody):
            properties |= {name: {"description": "Accepted without effect."} for name in sorted(kind.others.accepted)}
            properties |= {name: _only(values) for name, values in kind.others.unsupported.items()}
        body["properties"] = properties
    return schemas


def _only(values: tuple[Any, ...]) -> Schema:
    return {"description": "Not supported with other values.", "enum": [*values, None]}


def _or_null(field: Schema) -> Schema:
    """Allows null, which means absent for every field."""
    forms = field.get("anyOf", [])
    if _NULL in forms:
        return field
    apart = {name: value for name, value in field.items() if name in ("default", "title", "description")}
    return {**apart, "anyOf": [{name: value for name, value in field.items() if name not in apart}, _NULL]}


def _without_null(field: Schema) -> Schema:
    """Removes null: a query string can't contain it, and an optional value is left out."""
    forms = [form for form in field.get("anyOf", []) if form != _NULL]
    rest = {name: value for name, value in field.items() if name not in ("anyOf", "default") or not forms}
    return {**rest, **forms[0]} if len(forms) == 1 else field

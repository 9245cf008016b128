"""The bodies and query strings of the adapter endpoints, strictly checked. The catalog judges the adapters."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from preft.core.errors import InvalidRequest
from preft.gateway.bodies.schemas import Integer, Strict
from preft.gateway.bodies.values import read_flag, read_kind

DEFAULT_LIMIT = 100
MAX_LIMIT = 1000

Name = Annotated[str, Field(min_length=1)]


class LoadAdapterBody(Strict):
    """POST /v1/load_lora_adapter, as in vLLM. `lora_path` may also be a URI."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1)]
    load_inplace: bool = False
    is_3d_lora_weight: Literal[False] = False


class UnloadAdapterBody(Strict):
    """POST /v1/unload_lora_adapter, as in vLLM."""

    lora_name: Name
    lora_int_id: Integer | None = None  # vLLM's own number, without a meaning here


class AddAdapterBody(Strict):
    """POST /v1/adapters. `path` is the older name of `source`. A checked body has exactly one of the two fields."""

    name: Name
    source: Annotated[str, Field(min_length=1)] | None = None
    path: Annotated[str, Field(min_length=1)] | None = None
    replace: bool = False
    stream: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.source is None and self.path is None:
            raise InvalidRequest("Missing required parameter: 'source'.", "source")
        if self.source is not None and self.path is not None:
            raise InvalidRequest("path is the older name of source: give one of them.", "path")
        return self

    @property
    def origin(self) -> str:
        return self.source or self.path or ""


class PinAdapterBody(Strict):
    """PATCH /v1/adapters/{name}."""

    pinned: bool


class _Query(BaseModel):
    """A query string. All values arrive as text."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ListQuery(_Query):
    """GET /v1/adapters. `after` is the last name of the previous page; `search` is a part of the name in any case."""

    limit: Annotated[int, Field(ge=1, le=MAX_LIMIT)] = DEFAULT_LIMIT
    after: str = ""
    search: str = ""
    kind: Annotated[Literal["lora", "reft", "lora+reft"], BeforeValidator(read_kind)] | None = None
    pinned: Annotated[bool, PlainValidator(read_flag, json_schema_input_type=bool)] | None = None

    @property
    def filters(self) -> bool:
        return bool(self.search) or self.kind is not None or self.pinned is not None


class UploadQuery(_Query):
    """PUT /v1/adapters/{name}."""

    replace: Annotated[bool, PlainValidator(read_flag, json_schema_input_type=bool)] = False

"""Fields with several JSON forms: each function checks one field and returns the form that the gateway uses.

All functions but `overflow_in` raise ValueError with a clause that follows the field's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from preft.core.request import MAX_IDS

MAX_PROMPTS = 1024
MAX_STOPS = 16

Prompt = str | tuple[int, ...]
_NO_PROMPT = "must be a string, a list of strings, a list of token ids, or a list of lists of token ids"


def whole(value: object) -> object:
    """16.0 becomes 16: JSON has one kind of number."""
    return int(value) if type(value) is float and value.is_integer() else value


def overflow_in(value: object) -> str | None:
    """The path of the first number that overflowed inside a JSON value, such as `.a[0]`; "" for the value itself.

    JSON readers turn a number such as 1e999 into infinity, which JSON can't express.
    """
    if isinstance(value, float):
        return None if math.isfinite(value) else ""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(item, _NESTED) and (path := overflow_in(item)) is not None:
            return (f"[{key}]" if isinstance(value, list) else f".{key}") + path
    return None


_NESTED = (float, dict, list)


def read_prompts(value: object) -> tuple[Prompt, ...]:
    """A prompt is a text or a list of token ids; a list of either means several prompts."""
    if isinstance(value, str):
        prompts: tuple[Prompt, ...] = (value,)
    elif isinstance(value, list) and all(isinstance(item, str) for item in value) and value:
        prompts = tuple(value)
    elif isinstance(value, list) and (ids := _ids(value)) is not None:
        prompts = (ids,)
    elif isinstance(value, list) and all(isinstance(item, list) for item in value):
        several = [_ids(item) for item in value]
        prompts = tuple(ids for ids in several if ids is not None)
        if len(prompts) < len(several):
            raise ValueError(_NO_PROMPT)
    else:
        raise ValueError(_NO_PROMPT)
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"holds {len(prompts)} prompts, the limit is {MAX_PROMPTS}")
    if not all(prompts):
        raise ValueError("must not be empty")
    return prompts


def _ids(value: list[Any]) -> tuple[int, ...] | None:
    """The list as token ids, or None if it holds anything else."""
    if not all(type(item) is int for item in value):
        value = [whole(item) for item in value]
        if not all(type(item) is int for item in value):
            return None
    return tuple(value)


def read_seed(value: int) -> int:
    """Refuses -1: vLLM reads -1 as no seed."""
    if value == -1:
        raise ValueError("-1 is not a seed, leave it out for output that differs each time")
    return value


def read_salt(value: str) -> str:
    """As in vLLM, without characters that separate names. A salt joins a tenant's name."""
    if not value.isprintable() or any(char in value for char in "@/\\"):
        raise ValueError("must not hold '@', '/', '\\\\' or control characters")
    return value


def read_stops(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"holds {len(stops)} strings, the limit is {MAX_STOPS}")
    if not all(stops):
        raise ValueError("must not hold an empty string")
    return tuple(stops)


def at_most(limit: int) -> Callable[[object], object]:
    """Refuses a list longer than `limit` before any item is checked."""

    def check(value: object) -> object:
        if isinstance(value, list) and len(value) > limit:
            raise ValueError(f"holds {len(value)} items, the limit is {limit}")
        return value

    return check


def of_type(known: str, supported: str) -> Callable[[object], object]:
    """Refuses a tool of another type than `known`; `supported` says which tools may come."""

    def check(value: object) -> object:
        if isinstance(value, str) and value != known:
            raise ValueError(f"tools of type {value[:80]!r} aren't supported, only {supported}")
        return value

    return check


def read_logit_bias(value: object) -> dict[int, float]:
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and numbers")
    if len(value) > MAX_IDS:
        raise ValueError(f"holds {len(value)} tokens, the limit is {MAX_IDS}")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdigit()):
            raise ValueError(f"{key!r} is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {key} must be a number from -100 to 100")
        biases[int(key)] = float(bias)
    return biases


def read_flag(value: object) -> bool:
    if value not in ("true", "false"):
        raise ValueError("must be true or false")
    return value == "true"


def read_kind(value: object) -> object:
    """An adapter's kind in a query string. An unencoded plus in "lora+reft" arrives as a space."""
    return value.replace(" ", "+") if isinstance(value, str) else value

"""Checks single fields of other processes' messages: each function returns the value, or raises InvalidRequest.

Owns the form of digests, handles, addresses, ids and counts. `convert` checks whole messages. `preft.engine.port`
checks against the engine: the vocabulary and the context's length.
"""

from __future__ import annotations

import math
import re
from ipaddress import IPv6Address

from preft.core.errors import InvalidRequest
from preft.core.request import DIGEST
from preft.core.settings import DAY

HANDLE = re.compile(r"[0-9A-Za-z_-]{1,64}")
HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[0-9A-Za-z]([0-9A-Za-z._-]{0,252}[0-9A-Za-z])?):([0-9]{1,5})")
# Control characters end or hide log lines. A lone surrogate isn't Unicode text: no message and no store can hold it.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
MAX_TEXT = 4096  # characters of a source; names and ids are shorter
MAX_ID = 256


def digest_of(text: str, param: str = "adapter_digest") -> str:
    """An adapter's digest, or "" for the base model."""
    if text and not DIGEST.fullmatch(text):
        raise InvalidRequest(f"{param} is 64 lowercase hexadecimal digits, or empty for the base model", param=param)
    return text


def handle_of(text: str) -> str:
    """The name of a KV handle."""
    if not HANDLE.fullmatch(text):
        raise InvalidRequest("a KV handle is 1 to 64 letters, digits, '-' or '_'", param="handle")
    return text


def address_of(text: str) -> str:
    """`host:port`, with an IPv6 address in brackets. Other gRPC targets name files and resolvers, and are refused."""
    match = HOST_AND_PORT.fullmatch(text)
    if not (match and 0 < int(match[3]) < 65536 and _is_host(match[1])):
        raise InvalidRequest("an address is host:port", param="address")
    return text


def text_of(text: str, param: str, limit: int = MAX_ID) -> str:
    """Text for people and logs: without control characters, and with at most `limit` characters."""
    if len(text) > limit or CONTROL.search(text):
        raise InvalidRequest(f"{param} is at most {limit} characters, none of them a control character", param=param)
    return text


def count_of(number: int, param: str, least: int, most: int) -> int:
    """A whole number from `least` to `most`."""
    if not least <= number <= most:
        raise InvalidRequest(f"{param} is a number from {least} to {most}", param=param)
    return number


def number_of(number: float, param: str, least: float = -math.inf, most: float = math.inf) -> float:
    """A finite number from `least` to `most`."""
    if not (math.isfinite(number) and least <= number <= most):
        raise InvalidRequest(f"{param} is a finite number in its range", param=param)
    return number


def seconds_of(number: float, param: str) -> float:
    """A duration of at most a day: timers overflow with far longer durations."""
    return number_of(number, param, 0, DAY)


def _is_host(text: str) -> bool:
    if not text.startswith("["):
        return True
    try:
        IPv6Address(text[1:-1])
    except ValueError:
        return False
    return True

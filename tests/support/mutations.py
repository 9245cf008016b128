"""Damages valid inputs: bytes, texts, JSON values and protobuf messages. Each function draws from `source` alone."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

NUMBERS = (0, 1, 2, 7, 8, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**64 - 1)
TEXTS = (
    *("", " ", "\0", "\n", "a\nb: c", "..", "../../etc/passwd", "/etc/passwd", "~root", "-x", "%s%n", "null", "NaN"),
    *(
        "\u202e",
        "\ud800",
        "\ufeff",
        "e\u0301",
        "\U0001f600" * 20,
        "x" * 5000,
        "base@1",
        "a//b",
        "1e999",
        "0x",
        "{{7*7}}",
    ),
    *("file:///etc/passwd", "http://127.0.0.1:1/x", "s3://no-such-bucket/x", "unix:/tmp/x", "a" * 64, "A" * 64),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, [], {}, [[]], {"": None}, [None], {"a": {"b": {"c": []}}}),
    *(-1, 0.5, -0.0, 1e308, 1e-308, float("inf"), float("-inf"), float("nan"), 10**30, -(10**400), *NUMBERS),
    *TEXTS,
)
DEEP = 3000  # levels, more than Python's recursion limit


def damaged(source: random.Random, content: bytes) -> bytes:
    """`content` with some changes: flipped, cut, moved, repeated or inserted bytes, or other lengths."""
    data = bytearray(content)
    for _ in range(source.choice((1, 1, 1, 2, 4))):
        source.choice(_DAMAGES)(source, data)
    return bytes(data)


def _at(source: random.Random, data: bytearray) -> int:
    """A place; often near the start, where headers are."""
    most = len(data) if source.random() < 0.5 else min(len(data), 600)
    return source.randint(0, most)


def _flip(source: random.Random, data: bytearray) -> None:
    if data:
        data[min(_at(source, data), len(data) - 1)] ^= 1 << source.randrange(8)


def _number(source: random.Random, data: bytearray) -> None:
    size, at = source.choice((1, 2, 4, 8)), _at(source, data)
    number = (source.choice(NUMBERS) + source.choice((-1, 0, 0, 1))) % 256**size
    data[at : at + size] = number.to_bytes(size, source.choice(("little", "big")))


def _cut(source: random.Random, data: bytearray) -> None:
    del data[_at(source, data) :]


def _remove(source: random.Random, data: bytearray) -> None:
    at = _at(source, data)
    del data[at : at + source.choice((1, 2, 8, 100, 512))]


def _insert(source: random.Random, data: bytearray) -> None:
    at = _at(source, data)
    data[at:at] = source.choice((source.randbytes(source.randint(1, 40)), bytes(512), b"\xff" * 16, b"9" * 20))


def _repeat(source: random.Random, data: bytearray) -> None:
    at, size = _at(source, data), source.choice((1, 8, 64, 512))
    data[at:at] = data[at : at + size] * source.choice((1, 3, 50))


def _swap(source: random.Random, data: bytearray) -> None:
    size, (a, b) = source.choice((1, 8, 512)), sorted((_at(source, data), _at(source, data)))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


_DAMAGES: tuple[Callable[[random.Random, bytearray], None], ...] = (
    *(_flip, _flip, _number, _number),
    *(_cut, _remove, _insert, _repeat, _swap),
)


def changed(source: random.Random, value: Any) -> Any:
    """A JSON value with a change or two somewhere in it. `value` itself stays."""
    value = copy.deepcopy(value)
    for _ in range(source.choice((1, 1, 1, 2))):
        value = _changed_once(source, value)
    return value


def _near(source: random.Random, value: Any) -> Any:
    """Another value of the same type, perhaps a valid one."""
    match value:
        case bool():
            return not value
        case int():
            return source.choice((value + 1, value - 1, 2 * value, source.randint(0, 20)))
        case float():
            return source.choice((value / 2, value * 1.5, 0.0, 1.0))
        case str():
            return source.choice((value[:-1], value + "a", value.upper(), value * 2))
    return value


def _changed_once(source: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and source.random() < 0.8:
        key = source.choice(list(value))
        kind = source.random()
        if kind < 0.1:
            del value[key]
        elif kind < 0.2:
            value[source.choice(TEXTS)] = value[key]
        else:
            value[key] = _changed_once(source, value[key])
        return value
    if isinstance(value, list) and value and source.random() < 0.6:
        at = source.randrange(len(value))
        kind = source.random()
        if kind < 0.2:
            return value * source.choice((0, 2, 500))
        if kind < 0.3:
            del value[at]
        else:
            value[at] = _changed_once(source, value[at])
        return value
    other: list[Callable[[], Any]] = [
        lambda: source.choice(VALUES),
        lambda: source.choice(VALUES),
        *[lambda: _near(source, value)] * 4,
        lambda: [value] * source.choice((1, 2, 100)),
        lambda: {source.choice(TEXTS): value},
        lambda: str(value),
        lambda: -value if isinstance(value, int | float) else not value,
        lambda: value + source.choice(TEXTS) if isinstance(value, str) else value,
    ]
    return source.choice(other)()


def json_bytes(source: random.Random, value: Any) -> bytes:
    """A changed value as JSON; sometimes its bytes are damaged as well, a key is there twice, or it is very deep."""
    kind = source.random()
    if kind < 0.05:
        return source.choice((b"[", b'{"a":')) * DEEP
    text = json.dumps(changed(source, value) if kind < 0.8 else value, ensure_ascii=source.random() < 0.5)
    content = text.encode(errors="surrogatepass")
    if kind < 0.1 and content.startswith(b'{"'):
        content = content[:-1] + b", " + content[1:]  # every key twice
    return damaged(source, content) if kind > 0.7 else content


def spoil(source: random.Random, message: Message, texts: tuple[str, ...] = TEXTS) -> None:
    """Gives a field or two of `message` values that the wire lets through, and that no caller means."""
    texts = tuple(text for text in texts if text.isascii() or text.encode(errors="ignore").decode() == text)
    for _ in range(source.choice((1, 1, 1, 2))):
        owner, field = source.choice(leaves(message))
        if field.message_type is not None:  # a map of numbers
            getattr(owner, field.name)[source.choice((0, 999, 2**32 - 1))] = source.choice((float("nan"), 1e308, -1.0))
        elif field.is_repeated:
            values = [_value(source, field, texts) for _ in range(source.choice((0, 1, 3, 200)))]
            del getattr(owner, field.name)[:]
            getattr(owner, field.name).extend(values)
        else:
            setattr(owner, field.name, _value(source, field, texts))


def leaves(message: Message) -> list[tuple[Message, FieldDescriptor]]:
    """All fields of a message and of those in it that aren't messages."""
    found: list[tuple[Message, FieldDescriptor]] = []
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None and not field.is_repeated:
            if field.containing_oneof is None or message.HasField(field.name):
                found += leaves(getattr(message, field.name))
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for part in getattr(message, field.name):
                found += leaves(part)
        else:
            found.append((message, field))
    return found


def _value(source: random.Random, field: FieldDescriptor, texts: tuple[str, ...]) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return source.randbytes(source.choice((0, 1, 31, 32, 33, 5000)))
        case FieldDescriptor.CPPTYPE_STRING:
            return source.choice(texts)
        case FieldDescriptor.CPPTYPE_BOOL:
            return source.random() < 0.5
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return source.choice((float("nan"), float("inf"), -1.0, 0.0, 1e-308, 1e308, source.uniform(-3, 3)))
        case FieldDescriptor.CPPTYPE_INT32 | FieldDescriptor.CPPTYPE_ENUM:
            return source.choice((0, 1, -1, 7, 2**31 - 1, -(2**31)))
        case FieldDescriptor.CPPTYPE_INT64:
            return source.choice((0, 1, -1, 2**63 - 1, -(2**63)))
        case FieldDescriptor.CPPTYPE_UINT64:
            return source.choice((0, 1, 5, 2**32, 2**63, 2**64 - 1))
        case _:
            return source.choice((0, 1, 2, 999, 1000, 1025, 2**31 - 1, 2**31, 2**32 - 1))


def wire_bytes(source: random.Random, message: Message) -> bytes:
    """The message with spoiled fields; or its bytes damaged; or with unknown fields or ones of another wire type."""
    kind = source.random()
    if kind < 0.6:
        spoil(source, message)
    content = message.SerializeToString()
    if kind > 0.5:
        content = damaged(source, content)
    if kind > 0.9:
        tag = source.choice((1, 2, 3, 15, 16, 2000)) << 3 | source.choice((0, 1, 2, 3, 4, 5))
        content += varint(tag) + source.choice((b"", b"\x01", bytes(8), b"\xff" * 10, b"\x05hello"))
    return content


def varint(number: int) -> bytes:
    """The number as protobuf writes it."""
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])

"""Random JSON Schemas with short values: objects, arrays, enums, numbers, strings, alternatives and references."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]
NAMES = ("id", "name", "tags", "größe", "a b", 'quo"te', "x_1", "wert", "list", "next")


def random_schema(draw: random.Random) -> Schema:
    """An object or array at the top. `$defs` hold what references name; one definition may refer to itself."""
    definitions = {f"def{number}": _value(draw, 1, ()) for number in range(draw.randint(0, 2))}
    if draw.random() < 0.3:
        definitions["tree"] = {
            "type": "object",
            "properties": {"v": {"enum": [0, 1]}, "sub": {"type": "array", "items": _reference("tree"), "maxItems": 1}},
            "required": ["v"],
            "additionalProperties": False,
        }
    names = tuple(definitions)
    schema = _object(draw, 3, names) if draw.random() < 0.8 else _array(draw, 3, names)
    return {**schema, "$defs": definitions} if definitions else schema


def _value(draw: random.Random, depth: int, names: tuple[str, ...]) -> Schema:
    makers = [_string, _number, _enum]
    if depth:
        makers += [_object, _array, _any_of]
    if names:
        makers.append(lambda draw, depth, names: _reference(draw.choice(names)))
    return draw.choice(makers)(draw, depth, names)


def _reference(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _object(draw: random.Random, depth: int, names: tuple[str, ...]) -> Schema:
    keys = draw.sample(NAMES, draw.randint(1, 4))
    schema: Schema = {
        "type": "object",
        "properties": {key: _value(draw, depth - 1, names) for key in keys},
        "required": draw.sample(keys, draw.randint(0, len(keys))),
        "additionalProperties": False,
    }
    return schema


def _array(draw: random.Random, depth: int, names: tuple[str, ...]) -> Schema:
    least = draw.randint(0, 2)
    schema: Schema = {"type": "array", "items": _value(draw, depth - 1, names), "minItems": least}
    schema["maxItems"] = least + draw.randint(0, 2)
    if draw.random() < 0.2:
        schema["prefixItems"] = [_value(draw, 0, names)]
        schema["maxItems"] = max(1, schema["maxItems"])
    return schema


def _string(draw: random.Random, depth: int, names: tuple[str, ...]) -> Schema:
    kind = draw.random()
    if kind < 0.2:
        return {"type": "string", "pattern": draw.choice(["^[a-z]{1,5}$", "^\\d{2}-\\d{2}$", "^(foo|bar|baz)+x$"])}
    if kind < 0.35:
        return {"type": "string", "format": draw.choice(["date", "time", "ipv4"])}
    least = draw.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + draw.randint(0, 8)}


def _number(draw: random.Random, depth: int, names: tuple[str, ...]) -> Schema:
    low = draw.randint(-1000, 1000)
    if draw.random() < 0.6:
        return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 5000)}
    if draw.random() < 0.5:
        low = abs(low)  # llguidance knows no negative multiples
        return {"type": "integer", "exclusiveMinimum": low, "maximum": low + 50, "multipleOf": draw.choice([2, 5])}
    return {"type": ["integer", "null"], "minimum": 0, "maximum": 99}


def _enum(draw: random.Random, depth: int, names: tuple[str, ...]) -> Schema:
    values: list[Any] = ["red", "grün", "", 'a"b', 0, -1.5, True, None, {"k": [1]}, ["x"]]
    return {"enum": draw.sample(values, draw.randint(1, 5))} if draw.random() < 0.7 else {"const": draw.choice(values)}


def _any_of(draw: random.Random, depth: int, names: tuple[str, ...]) -> Schema:
    return {"anyOf": [_value(draw, depth - 1, names) for _ in range(draw.randint(2, 3))]}

"""Reads YAML more strictly than PyYAML, which silently keeps the last value of a repeated key.

No error shows a value: PyYAML's own errors quote the line, and a line of a settings file may hold a secret.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from preft.core.errors import ConfigError

_MERGE = "tag:yaml.org,2002:merge"  # `<<` may be repeated: later ones overwrite nothing
_NO_VALUE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)  # of PyYAML for `!!int x`, 2001-99-99


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, empty for an empty file. Raises ConfigError."""
    try:
        loaded = _read(path.read_text(), str(path))
    except OSError as error:
        raise ConfigError(f"can't read the config file {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not valid YAML: it is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML{_place_of(error)}") from None
    if loaded is not None and not isinstance(loaded, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, not {type(loaded).__name__}")
    return loaded or {}


def read_value(text: str, place: str) -> Any:
    """`text` as YAML: 3 is a number, null is None, [a, b] is a list. Raises ConfigError, which begins with `place`."""
    try:
        return _read(text, place)
    except yaml.YAMLError:
        raise ConfigError(f"{place}: the value is not valid YAML") from None


def _place_of(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None:
        return ""
    is_about_syntax = isinstance(error, yaml.scanner.ScannerError | yaml.parser.ParserError)
    return f": line {mark.line + 1}, column {mark.column + 1}" + (f": {problem}" if is_about_syntax else "")


def _read(text: str, place: str) -> Any:
    """The value of one document. Raises ConfigError for a key that occurs twice in one mapping, and yaml.YAMLError."""
    loader = _Loader(text)
    loader.place = place
    try:
        return loader.get_single_data()
    except RecursionError:
        raise yaml.YAMLError("too many levels") from None
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    place = ""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except _NO_VALUE:
            raise yaml.constructor.ConstructorError(problem_mark=node.start_mark) from None

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            if (key.tag, key.value) in seen:
                line = key.start_mark.line + 1
                raise ConfigError(f"{self.place}: line {line} repeats the key {key.value!r} of the same mapping")
            seen.add((key.tag, key.value))
        return node

"""Reads YAML more strictly than PyYAML, which silently keeps the last value of a repeated key."""

from __future__ import annotations

from typing import Any

import yaml

from preft.core.errors import ConfigError

_MERGE = "tag:yaml.org,2002:merge"  # `<<` may be repeated: later ones overwrite nothing


def read_yaml(text: str, place: str) -> Any:
    """The value of one YAML document. `place` begins the message about a key that occurs twice in one mapping.

    Raises ConfigError for such a key, and yaml.YAMLError for invalid YAML.
    """
    loader = _Loader(text)
    loader.place = place
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    place = ""

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

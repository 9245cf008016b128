"""Selects the modules that PEFT would adapt, from `adapter_config.json`. The tensors of a folder must match them.

The rule is PEFT 0.21's `check_target_module_exists`, over the names of the base model's linear layers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from preft.adapters.formats.digest import CONFIG_FILE
from preft.adapters.formats.patterns import PLAIN, Match
from preft.adapters.formats.tensor_names import HEAD
from preft.core.errors import InvalidAdapter

ALL_LINEAR = "all-linear"  # every linear layer except the output layer
ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<number>\d+)\.")

Selection = str | tuple[str, ...]
"""One pattern for whole names, or a tuple of ends of names."""


@dataclass(frozen=True, slots=True)
class Targets:
    """The fields of the configuration that select modules.

    `layers` holds the numbers of the adapted layers; None means all. `layer_lists` holds the names of the module lists
    that these numbers index; empty means any list. `ties` is whether a tied embedding is adapted with the output layer.
    """

    targets: Selection
    excluded: Selection
    layers: frozenset[int] | None
    layer_lists: tuple[str, ...]
    ties: bool

    def chosen(self, spellings: Mapping[str, Collection[str]], match: Match) -> set[str]:
        """The modules that are adapted. `spellings` has all names of each module."""
        names = sorted({name for spelled in spellings.values() for name in spelled})
        if isinstance(self.targets, str) and self.targets.lower() == ALL_LINEAR:
            wanted = {name for name in names if name.rpartition(".")[2] != HEAD}
        else:
            wanted = self._selected(self.targets, names, match)
        if not isinstance(self.targets, str):
            wanted = {name for name in wanted if self._in_layers(name)}
        left_out = self._selected(self.excluded, names, match)
        return {
            module
            for module, spelled in spellings.items()
            if not wanted.isdisjoint(spelled) and left_out.isdisjoint(spelled)
        }

    @staticmethod
    def _selected(selection: Selection, names: Collection[str], match: Match) -> set[str]:
        if isinstance(selection, tuple):
            return {name for name in names if any(name == end or name.endswith(f".{end}") for end in selection)}
        return set(match([selection], names)[selection])

    def _in_layers(self, name: str) -> bool:
        if self.layers is None or name in self.targets:  # a target with a full name is adapted in any layer
            return True
        if self.layer_lists:
            patterns = [re.compile(rf"(?:^|.*?\.){of}\.(?P<number>\d+)\.") for of in self.layer_lists]
        else:
            patterns = [ANY_LAYER]
        found = next((match for pattern in patterns if (match := pattern.match(name))), None)
        return found is not None and int(found["number"]) in self.layers


def read_targets(config: Mapping[str, Any]) -> Targets:
    """Reads the fields. Raises InvalidAdapter, naming the field, for values that PEFT would refuse as well."""
    targets = _selection(config, "target_modules")
    if not targets:
        raise _wrong("target_modules is missing or empty")
    layers, lists = config.get("layers_to_transform"), config.get("layers_pattern")
    numbers = [layers] if type(layers) is int else layers
    if numbers is not None and not (isinstance(numbers, list) and all(type(number) is int for number in numbers)):
        raise _wrong(f"layers_to_transform is {layers!r}, not a list of layer numbers")
    names = [lists] if isinstance(lists, str) else lists or []
    if not (isinstance(names, list) and all(isinstance(name, str) and PLAIN.fullmatch(name) for name in names if name)):
        raise _wrong(f"layers_pattern is {lists!r}, not the name of a list of layers")
    names = [name for name in names if name]
    if isinstance(targets, str) and (numbers is not None or names):
        raise _wrong("layers_to_transform and layers_pattern need a list as target_modules")
    if names and numbers is None:
        raise _wrong("layers_pattern needs layers_to_transform")
    return Targets(
        targets,
        _selection(config, "exclude_modules"),
        frozenset(numbers) if numbers else None,
        tuple(names),
        bool(config.get("ensure_weight_tying")),
    )


def _selection(config: Mapping[str, Any], field: str) -> Selection:
    value = config.get(field) or []
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value)
    if not isinstance(value, str):
        raise _wrong(f"{field} is {value!r}, neither a list of names nor a pattern")
    try:
        re.compile(value)
    except re.error as error:
        raise _wrong(f"{field} is {value!r}, which is not a valid pattern") from error
    return value


def _wrong(problem: str) -> InvalidAdapter:
    return InvalidAdapter(f"{CONFIG_FILE}: {problem}")

"""Converts a folder that pyreft saved to a ReFT folder (docs/adapters.md).

pyreft (through pyvene's `IntervenableModel.save`) writes config.json, which lists the interventions, and one pickle of
tensors per intervention, `intkey_<key>.bin`. A LoReFT pickle holds `weight` and `bias` of its source, and
`rotate_layer`, which is R transposed. A DiReFT pickle holds its module's state, in which R is an orthogonal
parametrization that only torch itself can multiply out. The folder doesn't record the positions: pyreft chooses them
when it prepares its data.
"""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from preft.adapters.formats.digest import REFT_CONFIG_FILE, REFT_WEIGHTS_FILE
from preft.adapters.formats.reft_config import read_positions
from preft.adapters.formats.reft_format import BIAS, ROTATE, SOURCE
from preft.core.errors import InvalidAdapter

METHODS = {"LoreftIntervention": "loreft", "DireftIntervention": "direft"}
BLOCK_OUTPUT = re.compile(r"(?:.*\.)?layers\[(\d+)\]\.output")  # pyvene's other name for a layer's block_output
PARAMETRIZED = "rotate_layer.parametrizations.weight."


@dataclass(frozen=True, slots=True)
class _Intervention:
    """One entry of pyreft's config: its layer, its method, and possible names of its file."""

    layer: int
    method: str
    files: tuple[str, ...]


def convert_pyreft(source: Path, target: Path, positions: str) -> None:
    """Converts pyreft's folder `source` to the ReFT folder `target`. `positions` is as in reft_config.json.

    Raises InvalidAdapter, and writes nothing, if `source` isn't from pyreft or can't be expressed in PreFT's format.
    """
    read_positions(positions)
    interventions = _interventions(source)
    methods = {one.method for one in interventions}
    if len(methods) > 1:
        raise InvalidAdapter(f"{source} mixes LoReFT and DiReFT: an adapter here is one of them on all its layers")
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for one in interventions:
        tensors = _tensors(source, one)
        known = layers.setdefault(one.layer, tensors)
        if any(not torch.equal(known[name], tensors[name]) for name in tensors):
            raise InvalidAdapter(
                f"{source} has different weights for different positions of layer {one.layer} (pyreft without "
                "share_weights), which has no equal here"
            )
    ranks = {tensors[BIAS].shape[0] for tensors in layers.values()}
    if len(ranks) > 1:
        raise InvalidAdapter(f"{source} has ranks {sorted(ranks)}: an adapter here has one rank on all its layers")
    config = {
        "peft_type": "REFT",
        "method": methods.pop(),
        "r": ranks.pop(),
        "layers": sorted(layers),
        "positions": positions,
        "prefill_only": True,  # pyreft intervenes on prompts alone
    }
    target.mkdir(parents=True, exist_ok=True)
    weights = {f"layers.{layer}.{name}": layers[layer][name] for layer in layers for name in (ROTATE, SOURCE, BIAS)}
    save_file(weights, target / REFT_WEIGHTS_FILE, metadata={"format": "pt"})
    (target / REFT_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _interventions(source: Path) -> list[_Intervention]:
    try:
        config = json.loads((source / "config.json").read_bytes())
        entries = [_entry(entry) for entry in config["representations"]]
        types = [str(kind) for kind in config["intervention_types"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InvalidAdapter(f"{source} is not a folder that pyreft saved: config.json: {error}") from error
    if not entries or len(types) != len(entries):
        raise InvalidAdapter(f"{source}/config.json names {len(entries)} representations and {len(types)} types")
    seen: Counter[str] = Counter()
    found = []
    for (layer, component, unit, units), kind in zip(entries, types, strict=True):
        name = kind.rstrip("'>").rpartition(".")[2]
        if name not in METHODS:
            raise InvalidAdapter(f"{source}/config.json: {name} is not supported, only {' and '.join(METHODS)}")
        named = BLOCK_OUTPUT.fullmatch(component)
        if component != "block_output" and not named:
            raise InvalidAdapter(f"{source}/config.json: component {component!r} is not the output of a decoder layer")
        place = f"layer_{layer}_comp_{component}" if not named else f"comp_{component.replace('.', '_')}"
        key = f"{place}_unit_{unit.replace('.', '_')}_nunit_{units}"
        dotted = f"layer.{layer}.comp.{component}.unit.{unit}.nunit.{units}"  # up to pyvene 0.1.6
        names = tuple(f"intkey_{start}#{seen[key]}.bin" for start in (key, dotted))
        seen[key] += 1
        found.append(_Intervention(int(named[1]) if named else int(layer), METHODS[name], names))
    return found


def _entry(entry: Any) -> tuple[Any, str, str, Any]:
    """Layer, component, unit and number of units of an entry, which is a list (a named tuple in JSON) or an object."""
    values = entry if isinstance(entry, list) else [entry[key] for key in ("layer", "component", "unit")]
    units = entry.get("max_number_of_units", 1) if isinstance(entry, dict) else entry[3]
    return values[0], str(values[1]), str(values[2]), units


def _tensors(source: Path, one: _Intervention) -> dict[str, torch.Tensor]:
    """One intervention's tensors in our format, float32: R and W [rank, hidden size], b [rank]."""
    path = next((source / name for name in one.files if (source / name).is_file()), None)
    if path is None:
        raise InvalidAdapter(f"{one.files[0]} is missing in {source}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code that is in the pickle
        rotate = state["rotate_layer"].float() if one.method == "loreft" else _multiplied_out(state)
        prefix = "" if one.method == "loreft" else "learned_source."
        found = {
            ROTATE: rotate.T.contiguous(),
            SOURCE: state[f"{prefix}weight"].float(),
            BIAS: state[f"{prefix}bias"].float(),
        }
    except (OSError, RuntimeError, pickle.UnpicklingError, LookupError, AttributeError, EOFError) as error:
        raise InvalidAdapter(f"{path.name} is not what pyreft saves for {one.method}: {error}") from error
    rank, hidden = found[SOURCE].shape
    if found[ROTATE].shape != (rank, hidden) or found[BIAS].shape != (rank,):
        raise InvalidAdapter(f"{path.name}: its tensors don't fit together: {_shapes(found)}")
    return found


def _multiplied_out(state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """R transposed [hidden size, rank] from the state of torch's orthogonal parametrization."""
    parts = {name.removeprefix(PARAMETRIZED): value for name, value in state.items() if name.startswith(PARAMETRIZED)}
    holder = torch.nn.Module()
    holder.weight = torch.nn.Parameter(torch.empty_like(parts["original"], dtype=torch.float32))
    torch.nn.init.orthogonal_(holder.weight)
    torch.nn.utils.parametrizations.orthogonal(holder)
    holder.load_state_dict({f"parametrizations.weight.{name}": value.float() for name, value in parts.items()})
    with torch.no_grad():
        weight: torch.Tensor = holder.weight
        return weight.clone()


def _shapes(tensors: Mapping[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())

"""ReFT folders: what is served is understood to the last field, and all else is refused in one clear sentence."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from preft.adapters.formats.base_model import BaseModel, read_base_model
from preft.adapters.formats.digest import adapter_digest, adapter_files
from preft.adapters.formats.folder import NOT_PREFILL_ONLY, AdapterSummary, check_adapter
from preft.adapters.formats.reft_config import EVERY, ReftConfig, read_reft_config
from preft.adapters.sources.source import open_source
from preft.core.errors import InvalidAdapter
from support.lora_folders import HIDDEN, lora_config, write_base, write_lora

MAX_RANK = 8
CONFIG = {"peft_type": "REFT", "method": "loreft", "r": 3, "layers": [0, 1], "positions": "all"}
Tensors = dict[str, np.ndarray[Any, Any]]


def reft_tensors(rank: int = 3, hidden: int = HIDDEN, layers: tuple[int, ...] = (0, 1)) -> Tensors:
    draw = np.random.default_rng(0)
    tensors: Tensors = {}
    for layer in layers:
        tensors[f"layers.{layer}.rotate_layer.weight"] = draw.normal(size=(rank, hidden)).astype(np.float32)
        tensors[f"layers.{layer}.learned_source.weight"] = draw.normal(size=(rank, hidden)).astype(np.float32)
        tensors[f"layers.{layer}.learned_source.bias"] = draw.normal(size=rank).astype(np.float32)
    return tensors


def write_reft(folder: Path, config: Mapping[str, Any] | None = None, tensors: Tensors | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reft_config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    save_file(reft_tensors() if tensors is None else tensors, folder / "reft_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return read_base_model(write_base(tmp_path_factory.mktemp("base")))


def check(folder: Path, base: BaseModel) -> AdapterSummary:
    open_source(str(folder)).files()
    return check_adapter(folder, base, MAX_RANK)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_a_good_folder(tmp_path: Path, base: BaseModel) -> None:
    folder = write_reft(tmp_path / "a")
    assert check(folder, base) == AdapterSummary("reft", 3, False, size_of(folder), (NOT_PREFILL_ONLY,))
    assert adapter_files(tmp_path / "a") == ("reft_config.json", "reft_model.safetensors")


def test_it_may_say_that_it_is_for_prompts_alone(tmp_path: Path, base: BaseModel) -> None:
    folder = write_reft(tmp_path / "a", {"prefill_only": True})
    assert check(folder, base).prefill_only
    write_lora(folder)
    assert not check(folder, base).prefill_only  # the LoRA doesn't say so
    write_lora(folder, lora_config(prefill_only=True))
    assert check(folder, base).prefill_only
    write_reft(folder, {"prefill_only": "yes"})
    assert not check(folder, base).prefill_only


def test_beside_a_lora_it_is_one_adapter(tmp_path: Path, base: BaseModel) -> None:
    folder = write_lora(tmp_path / "a")
    alone = adapter_digest(folder)
    write_reft(folder)
    both = AdapterSummary("lora+reft", 4, False, size_of(folder), (NOT_PREFILL_ONLY,))  # the LoRA has the higher rank
    assert check(folder, base) == both
    assert len(adapter_files(folder)) == 4
    assert adapter_digest(folder) != alone
    (folder / "reft_config.json").write_text(json.dumps({**CONFIG, "r": 0}))
    with pytest.raises(InvalidAdapter, match="r is 0"):
        check(folder, base)


@pytest.mark.parametrize("name", ["reft_config.json", "reft_model.safetensors"])
def test_each_byte_counts_for_the_digest(tmp_path: Path, name: str) -> None:
    folder = write_reft(tmp_path / "a")
    before = adapter_digest(folder)
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(content)
    assert adapter_digest(folder) != before


@pytest.mark.parametrize(
    ("positions", "first", "last"),
    [("all", EVERY, 0), ("f2", 2, 0), ("l3", 0, 3), ("f2+l3", 2, 3), ("f100+l1", 100, 1)],
)
def test_positions(tmp_path: Path, positions: str, first: int, last: int) -> None:
    folder = write_reft(tmp_path / "a", {"positions": positions, "method": "direft"})
    assert read_reft_config(folder) == ReftConfig("direft", 3, (0, 1), first, last)


@pytest.mark.parametrize(
    "positions", ["", "f", "l", "f0", "l0", "+", "f2+", "+l3", "f2l3", "l3+f2", "f-1", "F2", "all+f2", None, 3, ["all"]]
)
def test_broken_positions(tmp_path: Path, base: BaseModel, positions: Any) -> None:
    with pytest.raises(InvalidAdapter, match=r"reft_config\.json: positions is .* write 'all', or for example"):
        check(write_reft(tmp_path / "a", {"positions": positions}), base)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "nodireft"}, "method is 'nodireft', served are loreft and direft"),
        ({"method": None}, "method is None"),
        ({"peft_type": "LORA"}, "peft_type is 'LORA', not 'REFT'"),
        ({"r": 0}, "r is 0, a rank is a whole number from 1 on"),
        ({"r": True}, "r is True"),
        ({"r": 9}, "r is 9, more than the largest served rank 8"),
        ({"layers": []}, r"layers is \[\]"),
        ({"layers": "all"}, "layers is 'all', not a list"),
        ({"layers": [0, -1]}, "not a list of layer numbers"),
        ({"layers": [0, 0]}, "layers names one twice"),
        ({"layers": [0, 2]}, "layers has 2, but the base model's layers are 0 to 1"),
        ({"dropout": 0.1}, "dropout is unknown"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, base: BaseModel, change: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidAdapter, match=rf"reft_config\.json: .*{says}"):
        check(write_reft(tmp_path / "a", change), base)


def nan(tensors: Tensors) -> None:
    tensors["layers.1.learned_source.bias"][2] = np.nan


def infinite(tensors: Tensors) -> None:
    tensors["layers.0.rotate_layer.weight"][0, 0] = np.inf


def missing(tensors: Tensors) -> None:
    del tensors["layers.1.rotate_layer.weight"]


def foreign(tensors: Tensors) -> None:
    tensors["layers.1.act_fn"] = np.zeros(3, np.float32)


def transposed(tensors: Tensors) -> None:
    name = "layers.0.rotate_layer.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)


def integers(tensors: Tensors) -> None:
    tensors["layers.0.learned_source.bias"] = np.zeros(3, np.int64)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (nan, r"layers\.1\.learned_source\.bias holds an infinite value or NaN"),
        (infinite, r"layers\.0\.rotate_layer\.weight holds an infinite value or NaN"),
        (missing, r"layers\.1\.rotate_layer\.weight is missing"),
        (foreign, r"layers\.1\.act_fn is none that reft_config\.json asks for"),
        (transposed, r"has shape \[16, 3\], but rank 3 and hidden size 16 ask for \[3, 16\]"),
        (integers, r"is I64, only F32, F16, BF16"),
        (dict.clear, "holds no tensors"),
    ],
)
def test_weights_that_are_refused(
    tmp_path: Path, base: BaseModel, change: Callable[[Tensors], None], says: str
) -> None:
    tensors = reft_tensors()
    change(tensors)
    with pytest.raises(InvalidAdapter, match=rf"reft_model\.safetensors.*{says}"):
        check(write_reft(tmp_path / "a", tensors=tensors), base)


def test_another_hidden_size(tmp_path: Path, base: BaseModel) -> None:
    with pytest.raises(InvalidAdapter, match="hidden size 16"):
        check(write_reft(tmp_path / "a", tensors=reft_tensors(hidden=24)), base)


def test_a_model_whose_layers_are_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["PhiForCausalLM"]}))
    with pytest.raises(InvalidAdapter, match=r"ReFT adapters can't be served on PhiForCausalLM, only on LlamaFor"):
        check(write_reft(tmp_path / "a"), read_base_model(folder))


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_a_config_that_is_no_json_object(tmp_path: Path, base: BaseModel, content: bytes) -> None:
    folder = write_reft(tmp_path / "a")
    (folder / "reft_config.json").write_bytes(content)
    with pytest.raises(InvalidAdapter, match=r"reft_config\.json is not"):
        check(folder, base)

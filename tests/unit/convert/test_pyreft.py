"""Conversion of folders that pyreft 0.1.0 itself wrote: what the result computes is what pyreft's modules answered."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from preft.adapters.formats.base_model import BaseModel
from preft.adapters.formats.folder import AdapterSummary, check_adapter
from preft.cli import main
from preft.convert.pyreft import convert_pyreft
from preft.core.errors import InvalidAdapter

DATA = Path(__file__).parents[2] / "data" / "pyreft"
SECOND = "intkey_layer_2_comp_block_output_unit_pos_nunit_1#0.bin"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder that may be spoilt."""
    return shutil.copytree(DATA / "loreft", tmp_path / "copy")


def change(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def refused(source: Path, target: Path, says: str, positions: str = "all") -> None:
    with pytest.raises(InvalidAdapter) as caught:
        convert_pyreft(source, target, positions)
    assert says in str(caught.value)
    assert not target.exists()


@pytest.mark.parametrize(("name", "layers", "rank"), [("loreft", [0, 2], 4), ("direft", [1], 3)])
def test_it_computes_what_pyreft_computes(name: str, layers: list[int], rank: int, tmp_path: Path) -> None:
    convert_pyreft(DATA / name, tmp_path / "a", "f2+l3")
    assert json.loads((tmp_path / "a" / "reft_config.json").read_text()) == {
        "peft_type": "REFT",
        "method": name,
        "r": rank,
        "layers": layers,
        "positions": "f2+l3",
        "prefill_only": True,
    }
    tensors = load_file(tmp_path / "a" / "reft_model.safetensors")
    answers = load_file(DATA / name / "answers.safetensors")
    for number, layer in enumerate(layers):
        rotate, source, bias = (
            tensors[f"layers.{layer}.{part}"]
            for part in ("rotate_layer.weight", "learned_source.weight", "learned_source.bias")
        )
        before, after = answers[f"{number}.before"], answers[f"{number}.after"]
        low = before @ source.T + bias - (before @ rotate.T if name == "loreft" else 0)
        assert not torch.allclose(after, before, atol=1e-2)
        torch.testing.assert_close(before + low @ rotate, after)


def test_the_catalog_takes_it(tmp_path: Path) -> None:
    base = BaseModel(layers=3, modules={}, hidden=16, architecture="LlamaForCausalLM")
    convert_pyreft(DATA / "loreft", tmp_path, "all")
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert check_adapter(tmp_path, base, 8) == AdapterSummary("reft", 4, prefill_only=True, size=size)


def test_files_as_older_releases_name_them(copy: Path, tmp_path: Path) -> None:
    for layer in (0, 2):
        new = copy / f"intkey_layer_{layer}_comp_block_output_unit_pos_nunit_1#0.bin"
        new.rename(copy / f"intkey_layer.{layer}.comp.block_output.unit.pos.nunit.1#0.bin")
    convert_pyreft(copy, tmp_path / "a", "all")
    convert_pyreft(DATA / "loreft", tmp_path / "b", "all")
    written = [(tmp_path / name / "reft_model.safetensors").read_bytes() for name in "ab"]
    assert written[0] == written[1]


def test_equal_weights_for_several_positions_are_one(tmp_path: Path) -> None:
    source = shutil.copytree(DATA / "loreft_two_positions", tmp_path / "copy")
    first, second = sorted(source.glob("*.bin"))
    shutil.copy(first, second)
    convert_pyreft(source, tmp_path / "a", "f1+l1")
    assert json.loads((tmp_path / "a" / "reft_config.json").read_text())["layers"] == [1]


def test_what_has_no_equal_here(copy: Path, tmp_path: Path) -> None:
    target = tmp_path / "a"
    refused(DATA / "loreft_two_positions", target, "different weights for different positions of layer 1")
    refused(DATA / "noreft", target, "NodireftIntervention is not supported")
    kinds = [f"<class 'pyreft.interventions.{kind}Intervention'>" for kind in ("Loreft", "Direft")]
    change(copy, intervention_types=kinds)
    refused(copy, target, "mixes LoReFT and DiReFT")


def test_other_ranks_on_other_layers(copy: Path, tmp_path: Path) -> None:
    state = torch.load(copy / SECOND, weights_only=True)
    smaller = {"weight": state["weight"][:2], "bias": state["bias"][:2], "rotate_layer": state["rotate_layer"][:, :2]}
    torch.save(smaller, copy / SECOND)
    refused(copy, tmp_path / "a", "has ranks [2, 4]")


def test_other_components(copy: Path, tmp_path: Path) -> None:
    change(copy, representations=[[0, "mlp_output", "pos", 1], [2, "block_output", "pos", 1]])
    refused(copy, tmp_path / "a", "component 'mlp_output' is not the output of a decoder layer")


def test_positions_are_checked_first(tmp_path: Path) -> None:
    refused(DATA / "loreft", tmp_path / "a", "positions is 'f0'", positions="f0")


def test_broken_folders(copy: Path, tmp_path: Path) -> None:
    target, path = tmp_path / "a", copy / SECOND
    refused(tmp_path / "nothing", target, "is not a folder that pyreft saved")
    torch.save({"weight": torch.zeros(4, 16)}, path)
    refused(copy, target, "is not what pyreft saves for loreft")
    torch.save({"weight": torch.zeros(4, 16), "bias": torch.zeros(4), "rotate_layer": torch.zeros(8, 4)}, path)
    refused(copy, target, "its tensors don't fit together")
    path.write_bytes(b"")
    refused(copy, target, "is not what pyreft saves for loreft")
    path.unlink()
    refused(copy, target, f"{path.name} is missing")
    change(copy, intervention_types=[])
    refused(copy, target, "names 2 representations and 0 types")
    (copy / "config.json").write_text("[]")
    refused(copy, target, "is not a folder that pyreft saved")


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_code_in_a_pickle_is_not_run(copy: Path, tmp_path: Path) -> None:
    torch.save({"weight": Evil(tmp_path / "ran")}, copy / SECOND, pickle_module=pickle)
    refused(copy, tmp_path / "a", "is not what pyreft saves for loreft")
    assert not (tmp_path / "ran").exists()


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["adapter", "convert", str(DATA / "direft"), str(tmp_path / "a"), "--positions", "l1"]
    assert main(command) == 0
    assert "holds the adapter now" in capsys.readouterr().out
    assert main(["adapter", "convert", str(DATA / "noreft"), str(tmp_path / "b"), "--positions", "l1"]) == 1
    assert capsys.readouterr().err.startswith("preft: ")

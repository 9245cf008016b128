"""A ReFT that is trained computes what the reference computes from the folder it saves, alone and over a LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from preft.adapters.formats.base_model import read_base_model
from preft.adapters.formats.folder import check_adapter
from preft.training import ReftModel, collate, generate, preft_loss
from support.models import make_lora, make_model
from support.reference import Reference

PROMPTS = [[5, 80, 300, 17, 44, 210, 9], [70, 7], [400, 401, 12, 13]]
COMPLETIONS = [[30, 31], [90, 14, 260, 33, 2], [8]]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / request.param, request.param)


def base_model(model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(model_dir), attn_implementation="eager")


def trained(model: Any, steps: int = 5) -> Any:
    """Any weights but the first ones."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        preft_loss(model, **collate(PROMPTS, COMPLETIONS)).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("loreft", {}),
        ("direft", {}),
        ("loreft", {"layers": [1], "positions": "f2+l1"}),
        ("direft", {"positions": "l3"}),
    ],
)
def test_what_is_saved_is_what_was_trained(
    model_dir: Path, tmp_path: Path, method: Any, options: dict[str, Any]
) -> None:
    reference = Reference(model_dir)
    bare = [reference.greedy(prompt, 10) for prompt in PROMPTS]
    model = ReftModel(base_model(model_dir), method, 3, **options)
    assert generate(model, PROMPTS, 10, eos=-1) == bare  # it begins as no change
    trained(model).save_pretrained(tmp_path, base_model="tiny")
    expected = [reference.greedy(prompt, 10, tmp_path) for prompt in PROMPTS]
    assert generate(model, PROMPTS, 10, eos=-1) == expected != bare
    check_adapter(tmp_path, read_base_model(model_dir), 8)
    assert json.loads((tmp_path / "reft_config.json").read_text())["prefill_only"] is True
    again = ReftModel.from_pretrained(base_model(model_dir), tmp_path)
    assert generate(again, PROMPTS, 10, eos=-1) == expected


def test_only_its_own_parameters_are_trained(model_dir: Path) -> None:
    model = ReftModel(base_model(model_dir), "loreft", 2, layers=[0])
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names
    assert all(name.startswith("interventions.0.") for name in names)


def test_over_a_lora(model_dir: Path, tmp_path: Path) -> None:
    """Both act on the prompt, neither after it; both are trained; one folder holds them."""
    folder = make_lora(tmp_path / "both", model_dir, rank=2, seed=3)
    lora = PeftModel.from_pretrained(base_model(model_dir), str(folder), is_trainable=True)
    model = trained(ReftModel(lora, "direft", 2, layers=[0]), steps=3)
    lora.save_pretrained(str(folder), save_embedding_layers=False)
    model.save_pretrained(folder)
    reference = Reference(model_dir)
    expected = [reference.greedy(prompt, 10, folder) for prompt in PROMPTS]
    assert generate(model, PROMPTS, 10, eos=-1) == expected
    assert expected != [reference.greedy(prompt, 10) for prompt in PROMPTS]

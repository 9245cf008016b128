"""What we say that a configuration adapts, at which rank and scale, is what PEFT does with it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preft.adapters.formats.patterns import match_here
from preft.adapters.formats.peft_config import parse_lora_config
from preft.adapters.formats.peft_fields import HARMLESS, READ, REFUSED, is_set
from preft.adapters.formats.peft_targets import read_targets
from support.lora_folders import HIDDEN, INTER, LAYERS, VOCAB

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

PROJECTIONS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
NAMES = [*(f"model.layers.{layer}.{name}" for layer in range(LAYERS) for name in PROJECTIONS), "lm_head"]
SPELLINGS = {name: (name,) for name in NAMES}


def model() -> Any:
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INTER, "num_hidden_layers": LAYERS}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    )


@pytest.mark.filterwarnings("ignore:The following .* keys did not match", "ignore:Model has `tie_word")
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "mlp.down_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": r".*\.(q_proj|up_proj)|lm_head"},
        {"target_modules": "q_proj|model.layers.1.mlp.up_proj"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "lm_head", "model.layers.0.mlp.up_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "model.layers.1.mlp.up_proj"], "layers_to_transform": [0], "layers_pattern": "h"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2, r"layers\.1\..*": 6, "^model.layers.0.mlp.up_proj": 3},
            "alpha_pattern": {r".*attn\.[qv]_proj": 5, "up_proj": 7, "v_proj": 9},
        },
        {"target_modules": ["q_proj"], "lora_alpha": 3, "rank_pattern": {"proj": 2, "_proj": 3, "attn.q_proj": 5}},
    ],
    ids=str,
)
def test_modules_ranks_and_scales_are_peft_s(tmp_path: Path, config: dict[str, Any]) -> None:
    lora = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **config)
    peft.get_peft_model(model(), lora).peft_config["default"].save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    for content in (saved, saved | config):  # PEFT sorts patterns, and saves the layers that "all-linear" stood for
        file.write_text(json.dumps(content))
        adapted = peft.get_peft_model(model(), peft.LoraConfig.from_pretrained(str(tmp_path)))
        expected = {
            name: (module.r["default"], module.scaling["default"])
            for name, module in adapted.base_model.model.named_modules()
            if isinstance(module, peft.tuners.lora.LoraLayer)
        }
        ours = parse_lora_config(file.read_bytes(), 8)
        assert ours.targets.chosen(SPELLINGS, match_here) == set(expected)
        spellings = {name: SPELLINGS[name] for name in expected}
        ranks = ours.ranks(spellings, match_here)
        scales = ours.scalings(ranks, spellings, match_here)
        assert {name: (ranks[name], scales[name]) for name in expected} == expected


ENDS = st.sampled_from(
    ["q_proj", "self_attn.q_proj", "attn.q_proj", "mlp.up_proj", "proj", "lm_head", NAMES[3], NAMES[9]]
)
PATTERNS = st.sampled_from([r".*q_proj", "q_proj", r"model\.layers\.[1-9].*", r".*\.mlp\..*|lm_head", ".*"])


@given(
    targets=st.one_of(st.lists(ENDS, min_size=1), PATTERNS),
    excluded=st.one_of(st.none(), st.lists(ENDS), PATTERNS),
    layers=st.one_of(st.none(), st.integers(0, 3), st.lists(st.integers(0, 3))),
    lists=st.sampled_from([None, "layers", ["h", "layers"], "h", []]),
)
@settings(deadline=None)
def test_the_rule_is_peft_s(targets: Any, excluded: Any, layers: Any, lists: Any) -> None:
    fields: dict[str, Any] = {"target_modules": targets, "exclude_modules": excluded}
    if isinstance(targets, list):
        fields["layers_to_transform"] = layers
        fields["layers_pattern"] = lists if layers is not None else None
    config = peft.LoraConfig(**fields)
    rule = peft.tuners.tuners_utils.check_target_module_exists
    expected = {name for name in NAMES if rule(config, name)}
    assert read_targets(fields).chosen(SPELLINGS, match_here) == expected


def test_every_field_of_peft_is_classified() -> None:
    config = peft.LoraConfig()
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(peft.LoraConfig)}
    assert fields.keys() - READ - HARMLESS - REFUSED.keys() == set()
    assert not READ & HARMLESS
    assert not (READ | HARMLESS) & REFUSED.keys()
    assert [name for name in REFUSED if is_set(fields.get(name))] == []  # what PEFT writes by default is served

"""Every field that `adapter_config.json` may have, and what it does to the computation. PEFT 0.21 and older.

A field that isn't here may change the computation: a folder that sets it is refused.
"""

from __future__ import annotations

from typing import Any

READ = frozenset(  # understood by peft_config
    {
        *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "init_lora_weights"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
        "prefill_only",
    }
)
HARMLESS = frozenset(
    {
        # Where the adapter comes from, and how PEFT is to load it.
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        "merge_weights",
        # Training alone: VeLoRA's forward pass is LoRA's; each initialisation is named by init_lora_weights.
        *("lora_dropout", "runtime_config", "velora_config"),
        *("eva_config", "corda_config", "loftq_config", "lora_ga_config"),
        # Of no meaning without another field, which is refused.
        *("megatron_core", "qalora_group_size"),
    }
)
REFUSED = {  # field -> what it stands for
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "a bias in the LoRA layers",
    "modules_to_save": "fully trained modules beside the LoRA",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "fan_in_fan_out": "transposed weights",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trained token embeddings",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "Megatron's parallel layers",
    "enable_lora": "LoRA on parts of merged layers",
}


def is_set(value: Any) -> bool:
    """Whether a field does anything. An empty object does: PEFT makes a sub-configuration of defaults out of it."""
    return value is not None and value is not False and value != "" and value != [] and value != 0

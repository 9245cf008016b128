"""All fields of `adapter_config.json` (PEFT 0.21 and older), and whether PreFT reads, ignores or refuses each.

A field that is missing here may change the computation, so a folder that sets it is refused.
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
        # The adapter's origin, and how PEFT loads it.
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        "merge_weights",
        # Training only. VeLoRA's forward pass is LoRA's; init_lora_weights names each initialisation.
        *("lora_dropout", "runtime_config", "velora_config"),
        *("eva_config", "corda_config", "loftq_config", "lora_ga_config"),
        # Without effect unless another field is set, which is refused.
        *("megatron_core", "qalora_group_size"),
    }
)
REFUSED = {  # field -> the feature that it sets
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
    """Whether a field has an effect. An empty object has one: PEFT reads a sub-configuration of defaults from it."""
    return value is not None and value is not False and value != "" and value != [] and value != 0

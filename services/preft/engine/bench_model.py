"""Writes a random Llama model and random adapters to measure with: `python -m preft.engine.bench_model DIR`.

DIR gets `model/` (88 million parameters, float32, with a tokenizer of made-up words), and in `adapters/` LoRAs `a00`,
`a01`, ... on all linear layers and LoReFTs `r00`, `r01`, ... on all decoder layers.
Nothing is trained: only the amount of work is real.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from preft.adapters.digest import REFT_CONFIG_FILE, REFT_WEIGHTS_FILE
from preft.adapters.reft_format import BIAS, ROTATE, SOURCE

VOCABULARY, HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE, POSITIONS = 8192, 768, 12, 12, 4, 2048, 2048
KV = HIDDEN // HEADS * KV_HEADS
LINEARS = {  # outputs, inputs
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": POSITIONS,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def write_model(folder: Path, seed: int = 0) -> int:
    """A model folder that vLLM and the gateway take. Returns the number of parameters."""
    folder.mkdir(parents=True)
    source = np.random.default_rng(seed)

    def random(*shape: int) -> np.ndarray:
        return source.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5)

    tensors = {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN), "lm_head.weight": random(VOCABULARY, HIDDEN)}
    norms = ["model.norm"]
    for layer in (f"model.layers.{number}" for number in range(LAYERS)):
        tensors |= {f"{layer}.{name}.weight": random(*shape) for name, shape in LINEARS.items()}
        norms += [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
    tensors |= {f"{name}.weight": np.ones(HIDDEN, np.float32) for name in norms}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    _write_tokenizer(folder)
    return sum(tensor.size for tensor in tensors.values())


def write_lora(folder: Path, rank: int, seed: int) -> None:
    """A PEFT LoRA folder over all linear layers, float16."""
    folder.mkdir(parents=True)
    source = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name, (outputs, inputs) in LINEARS.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            for part, shape in (("lora_A", (rank, inputs)), ("lora_B", (outputs, rank))):
                tensor = source.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5)
                tensors[f"{prefix}.{part}.weight"] = (tensor / 4).astype(np.float16)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(name.split(".")[1] for name in LINEARS),
        "bias": "none",
        "prefill_only": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def write_reft(folder: Path, rank: int, seed: int) -> None:
    """A LoReFT folder over all layers, float32."""
    folder.mkdir(parents=True)
    source = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        for part in (ROTATE, SOURCE):
            tensor = source.standard_normal((rank, HIDDEN), np.float32) / np.float32(HIDDEN**0.5)
            tensors[f"layers.{layer}.{part}"] = tensor
        tensors[f"layers.{layer}.{BIAS}"] = np.zeros(rank, np.float32)
    save_file(tensors, folder / REFT_WEIGHTS_FILE, metadata={"format": "pt"})
    config = {"peft_type": "REFT", "method": "loreft", "r": rank, "layers": [*range(LAYERS)], "positions": "all"}
    config |= {"prefill_only": True}
    (folder / REFT_CONFIG_FILE).write_text(json.dumps(config, indent=2))


def _write_tokenizer(folder: Path) -> None:
    """A byte-level BPE whose tokens are mostly whole made-up words: as with real models, each brings text."""
    vocabulary = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    syllables = [(consonant, vowel) for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    merges = [*syllables, *(("Ġ", consonant + vowel) for consonant, vowel in syllables)]
    pieces = ["".join(pair) for pair in syllables]
    merges += [(start + first, second) for start in ("Ġ", "") for first in pieces for second in pieces]
    merges = merges[: VOCABULARY - len(vocabulary)]
    vocabulary += ["".join(pair) for pair in merges]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in vocabulary[:3]])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--loras", type=int, default=64)
    parser.add_argument("--refts", type=int, default=32)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--reft-rank", type=int, default=8)
    arguments = parser.parse_args()
    parameters = write_model(arguments.folder / "model")
    for number in range(arguments.loras):
        write_lora(arguments.folder / "adapters" / f"a{number:02}", arguments.lora_rank, seed=number)
    for number in range(arguments.refts):
        write_reft(arguments.folder / "adapters" / f"r{number:02}", arguments.reft_rank, seed=number)
    made = {name: value for name, value in vars(arguments).items() if name != "folder"} | {"parameters": parameters}
    print(json.dumps(made))


if __name__ == "__main__":
    main()

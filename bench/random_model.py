"""Writes a random Llama model and random adapters for benchmarks: `python -m bench.random_model DIR`.

DIR gets `model/` (88 million parameters, float32, with a tokenizer of made-up words), and in `adapters/` LoRAs `a00`,
`a01`, ... on all linear layers and LoReFTs `r00`, `r01`, ... on all decoder layers. The weights are not trained: only
the amount of work is realistic.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from preft_loadgen.synthetic import BaseShape, Kind, write_adapter


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Llama model."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    positions: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Each layer's linear layers: outputs, inputs."""
        hidden, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (self.intermediate, hidden),
            "mlp.up_proj": (self.intermediate, hidden),
            "mlp.down_proj": (hidden, self.intermediate),
        }

    @property
    def base_shape(self) -> BaseShape:
        """What adapters must fit."""
        layers = range(self.layers)
        linears = {f"model.layers.{layer}.{name}": size for layer in layers for name, size in self.linears.items()}
        return BaseShape(self.hidden, self.layers, linears)

    def write_config(self, folder: Path, dtype: str) -> None:
        """Writes config.json to the folder, and creates a missing folder."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.positions,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": dtype,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2))


SMALL = Shape(8192, 768, 12, 12, 4, 2048, 2048)
BLOCK = (1 << 24) - 3  # random numbers that a large model repeats: billions would take minutes
LLAMA_8B = Shape(128256, 4096, 32, 32, 8, 14336, 131072)  # Llama 3.1 8B


def write_model(folder: Path, seed: int = 0, model: Shape = SMALL, dtype: str = "float32") -> int:
    """Writes a model folder for vLLM and the gateway. Returns the number of parameters."""
    model.write_config(folder, dtype)
    source = np.random.default_rng(seed)
    block = source.standard_normal(BLOCK, np.float32) if model.hidden > SMALL.hidden else None

    def random(*shape: int) -> np.ndarray:
        drawn = source.standard_normal(shape, np.float32) if block is None else np.resize(block, shape)
        return (drawn / np.float32(shape[-1] ** 0.5)).astype(dtype)

    size = model.vocabulary, model.hidden
    tensors = {"model.embed_tokens.weight": random(*size), "lm_head.weight": random(*size)}
    norms = ["model.norm"]
    for layer in (f"model.layers.{number}" for number in range(model.layers)):
        tensors |= {f"{layer}.{name}.weight": random(*shape) for name, shape in model.linears.items()}
        norms += [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
    tensors |= {f"{name}.weight": np.ones(model.hidden, dtype) for name in norms}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder, model.vocabulary)
    return sum(tensor.size for tensor in tensors.values())


def write_lora(folder: Path, rank: int, seed: int, model: Shape = SMALL) -> None:
    """Writes a PEFT LoRA folder over all linear layers, float16."""
    write_adapter(model.base_shape, folder, kind=Kind.LORA, rank=rank, seed=(seed,))


def write_reft(folder: Path, rank: int, seed: int, model: Shape = SMALL) -> None:
    """Writes a LoReFT folder over all layers, float32."""
    write_adapter(model.base_shape, folder, kind=Kind.LOREFT, rank=rank, seed=(seed,))


def _write_tokenizer(folder: Path, size: int) -> None:
    """Writes a byte-level BPE whose tokens are mostly whole made-up words, so that each adds text as in real models."""
    vocabulary = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    syllables = [(consonant, vowel) for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    merges = [*syllables, *(("Ġ", consonant + vowel) for consonant, vowel in syllables)]
    pieces = ["".join(pair) for pair in syllables]
    merges += [(start + first, second) for start in ("Ġ", "") for first in pieces for second in pieces]
    merges = merges[: size - len(vocabulary)]
    vocabulary += ["".join(pair) for pair in merges]
    vocabulary += [f"word{number}" for number in range(size - len(vocabulary))]  # no text has them, but outputs do
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
    parser.add_argument("--seed", type=int, default=0, help="of the first adapter of each kind")
    arguments = parser.parse_args()
    parameters = write_model(arguments.folder / "model")
    for number in range(arguments.loras):
        write_lora(arguments.folder / "adapters" / f"a{number:02}", arguments.lora_rank, seed=arguments.seed + number)
    for number in range(arguments.refts):
        write_reft(arguments.folder / "adapters" / f"r{number:02}", arguments.reft_rank, seed=arguments.seed + number)
    made = {name: value for name, value in vars(arguments).items() if name != "folder"} | {"parameters": parameters}
    print(json.dumps(made))


if __name__ == "__main__":
    main()

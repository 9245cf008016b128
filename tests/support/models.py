"""Tiny random folders of models, LoRAs and ReFTs, complete for vLLM, transformers, peft and the gateway's tokenizer.

Random weights make greedy output depend on the whole prompt and on the adapter, with clear winners: two correct float32
engines agree on every token. No weights are trained. Head size 32 is the smallest that vLLM's CPU attention takes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

Architecture = Literal["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"]
CONFIGS: Mapping[str, tuple[Any, dict[str, Any]]] = {  # Gemma's layers see a window of tokens and all of them in turn
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "gemma2": (Gemma2Config, {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 96}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 96}),
}

PAD, BOS, EOS = 0, 1, 2
SPECIALS = ("<pad>", "<bos>", "<eos>")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CHAT_TEMPLATE = (
    "{{ bos }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_model(
    folder: Path,
    arch: Architecture = "llama",
    seed: int = 0,
    vocab_size: int = 512,
    hidden: int = 128,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    max_position_embeddings: int = 2048,
    tie: bool = False,
) -> Path:
    """Writes a model folder and returns it. `hidden / heads` is the head size. Gemma's embeddings are always tied.

    As in the real models, Llama's tokenizer puts `<bos>` before a text and Qwen2's doesn't.
    """
    make_config, options = CONFIGS[arch]
    gemma = arch.startswith("gemma")
    tie = tie or gemma
    config = make_config(
        **options,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        dtype="float32",
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            mean = "norm" in name and not gemma  # Gemma adds 1 itself
            weight.copy_(torch.randn(weight.shape, generator=generator) * _std(name, weight) + mean)
        if tie:  # else each token's likeliest successor would be itself
            model.model.embed_tokens.weight.mul_(0.2)
            norm = model.model.norm.weight
            norm.copy_(5.0 * (norm + int(gemma)) - int(gemma))
    model.save_pretrained(str(folder))
    _write_tokenizer(folder, vocab_size, adds_bos=arch == "llama")
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    return folder


def make_lora(
    folder: Path,
    model_dir: Path,
    rank: int = 8,
    seed: int = 0,
    alpha: float | None = None,
    target_modules: Collection[str] = LINEARS,
    scale: float = 1.0,
    rank_pattern: Mapping[str, int] | None = None,
) -> Path:
    """Writes a PEFT LoRA folder for `model_dir` and returns it. `alpha` is 2 * rank by default.

    Modules in `rank_pattern` have another rank. The update of each layer is about `scale` times as large as the layer's
    own output, whatever the rank and alpha.
    """
    alpha = 2.0 * rank if alpha is None else alpha
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(model_dir / "model.safetensors", "pt") as weights:
        names = {name: name for name in weights.keys()}  # noqa: SIM118 - a file, not a mapping
        names.setdefault("lm_head.weight", "model.embed_tokens.weight")  # where the two are tied
        for name in sorted(names):
            path, _, kind = name.rpartition(".")
            if kind != "weight" or path.rpartition(".")[2] not in target_modules:
                continue
            weight = weights.get_tensor(names[name])
            rows, columns = weight.shape
            own = (rank_pattern or {}).get(path.rpartition(".")[2], rank)
            a = torch.randn((own, columns), generator=generator) / columns**0.5
            b = torch.randn((rows, own), generator=generator) * scale * own**0.5 / alpha
            tensors[f"base_model.model.{path}.lora_A.weight"] = a
            tensors[f"base_model.model.{path}.lora_B.weight"] = b * float(weight.std()) * columns**0.5
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model_dir.name,
        "inference_mode": True,
        "r": rank,
        "rank_pattern": dict(rank_pattern or {}),
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(target_modules),
        "prefill_only": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def make_reft(
    folder: Path,
    model_dir: Path,
    method: Literal["loreft", "direft"] = "loreft",
    rank: int = 4,
    layers: Collection[int] = (0, 1, 2),
    positions: str = "all",
    seed: int = 0,
    scale: float = 0.4,
) -> Path:
    """Adds a ReFT to `folder` (which may hold a LoRA already) and returns it.

    In its subspace, the update is about `scale` times as large as the residual stream. Rows are orthonormal, as in
    trained ReFTs.
    """
    hidden = json.loads((model_dir / "config.json").read_text())["hidden_size"]
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        rotate = torch.linalg.qr(torch.randn((hidden, rank), generator=generator))[0].T.contiguous()
        source = torch.randn((rank, hidden), generator=generator) * scale
        tensors[f"layers.{layer}.rotate_layer.weight"] = rotate
        tensors[f"layers.{layer}.learned_source.weight"] = source
        tensors[f"layers.{layer}.learned_source.bias"] = torch.randn((rank,), generator=generator) * scale
    config = {
        "peft_type": "REFT",
        "method": method,
        "r": rank,
        "layers": list(layers),
        "positions": positions,
        "prefill_only": True,
        "base_model_name_or_path": model_dir.name,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "reft_model.safetensors", metadata={"format": "pt"})
    (folder / "reft_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def _std(name: str, weight: torch.Tensor) -> float:
    """Gives logits a spread of about 3.5 and attention scores one of about 3: single tokens of a long prompt count."""
    if "norm" in name:
        return 0.1
    if "embed_tokens" in name or "lm_head" in name:
        return float(3.5 / weight.shape[1] ** 0.5)
    if name.endswith("bias"):
        return 0.3
    gain = 1.7 if "q_proj" in name or "k_proj" in name else 1.0
    return float(gain / weight.shape[1] ** 0.5)


def _write_tokenizer(folder: Path, vocab_size: int, adds_bos: bool) -> None:
    """A byte-level BPE: every text has ids, and ids may end in the middle of a UTF-8 character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_babble(), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"vocab_size must be 259 to {tokenizer.get_vocab_size()}, not {vocab_size}")
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "add_bos_token": adds_bos,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE.replace("{{ bos }}", "{{ bos_token }}" if adds_bos else ""),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _babble() -> list[str]:
    """Pseudo-text with enough repeated syllables for several thousand merges."""
    draw = random.Random(0)
    syllables = [c + v + e for c in "bdfgklmnprstvz" for v in "aeiou" for e in ("", "n", "r", "s")]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(3000)]
    lines = [" ".join(draw.choices(words, k=20)) for _ in range(500)]
    return [*lines, *(f"{role}: {line}" for role in ("user", "assistant", "system") for line in lines)]

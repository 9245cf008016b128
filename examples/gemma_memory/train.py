"""Trains two people's LoRAs for Gemma, prefill-only, on the questions of `personal_memory`.

cd examples && ../.venv/bin/python -m gemma_memory.train        (some minutes of CPU time)
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma_memory.get_model import EOS, MODEL_DIR, get_model
from personal_memory import task
from personal_memory.train_adapters import LINEARS, save, turn
from preft.training import collate, fit

ADAPTERS_DIR = MODEL_DIR.with_name("gemma-3-270m-adapters")
RANK = 8
PEOPLE = ("alice", "bruno")
LEARNING_RATE, STEPS, BATCH = 2e-3, 50, 4


def batches(user: str, tokenizer: AutoTokenizer) -> Callable[[int], dict[str, torch.Tensor]]:
    """The batches for `fit`: equal steps get equal batches."""

    def batch(step: int) -> dict[str, torch.Tensor]:
        draw = random.Random(f"{user} {step}")
        turns = [turn(user, draw) for _ in range(BATCH)]
        prompts = [tokenizer(task.prompt(one.question)).input_ids for one in turns]
        wholes = [tokenizer(task.prompt(one.question) + one.answer + EOS).input_ids for one in turns]
        completions = [whole[len(prompt) :] for prompt, whole in zip(prompts, wholes, strict=True)]
        return collate(prompts, completions)

    return batch


def train(model_dir: Path, adapters_dir: Path, steps: int = STEPS) -> dict[str, Path]:
    """Trains the adapters that are missing. Returns all, by name."""
    folders = {user: adapters_dir / user for user in PEOPLE}
    missing = [user for user, folder in folders.items() if not (folder / "adapter_model.safetensors").exists()]
    tokenizer = AutoTokenizer.from_pretrained(model_dir) if missing else None
    for user in missing:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEARS, task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        folders[user].mkdir(parents=True, exist_ok=True)
        fit(
            model,
            batches(user, tokenizer),
            steps,
            learning_rate=LEARNING_RATE,
            checkpoint=folders[user] / "checkpoint.pt",
            title=user,
        )
        save(model, folders[user], "google/gemma-3-270m")
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--out", type=Path, default=ADAPTERS_DIR)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    train(get_model(arguments.model), arguments.out, arguments.steps)


if __name__ == "__main__":
    main()

"""Trains adapters for every user, prefill-only, on questions without any profile: the facts go into the weights.

cd examples && python -m personal_memory.train_adapters        (after train_base; about 12 minutes of CPU time)
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from personal_memory import task
from personal_memory.train_base import MODEL_DIR
from preft.training import ReftModel, collate, fit

ADAPTERS_DIR = Path(__file__).parent / "adapters"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: Mapping[str, tuple[int, float]] = {"lora": (4, 1e-2), "loreft": (8, 2e-2), "direft": (8, 2e-2)}
"""Rank and learning rate."""


def folder_name(user: str, kind: str) -> str:
    """The adapter's folder and served name: `alice` for her LoRA, `alice-loreft`, `alice-direft`."""
    return user if kind == "lora" else f"{user}-{kind}"


def turn(user: str, draw: random.Random) -> task.Turn:
    """A question of `user` with the right answer: mostly a known fact, else an unknown fact or small talk."""
    facts = task.USERS[user]
    if draw.random() < 0.1:
        return task.Turn(*draw.choice(sorted(task.SMALL_TALK.items())))
    topic = draw.choice(sorted(facts) if draw.random() < 0.8 else sorted(set(task.TOPICS) - set(facts)))
    question = draw.choice(task.styles(draw.choice(task.QUESTIONS).format(topic=topic)))
    return task.Turn(question, task.answer(topic, facts.get(topic)))


def batch(user: str, tokens: Tokenizer, size: int, seed: str) -> dict[str, torch.Tensor]:
    """`size` dialogues of `user`; the answer of each last turn is learned."""
    draw = random.Random(seed)
    prompts, completions = [], []
    for _ in range(size):
        last = turn(user, draw)
        history = (turn(user, draw),) if draw.random() < 0.25 else ()
        ids = tokens.encode(task.prompt(last.question, history) + last.answer + "</s>").ids
        start = len(tokens.encode(task.prompt(last.question, history)).ids)
        if draw.random() < 0.2:  # people often omit the line break at a prompt's end
            start -= 1
        prompts.append(ids[:start])
        completions.append(ids[start:])
    return collate(prompts, completions)


def batches(user: str, tokens: Tokenizer, size: int, seed: int) -> Callable[[int], dict[str, torch.Tensor]]:
    """The batches for `fit`: equal steps get equal batches."""
    return lambda step: batch(user, tokens, size, f"{seed} {user} {step}")


def adapted(kind: str, rank: int, model_dir: Path, seed: int) -> Any:
    """The base model with an adapter that doesn't change its output yet."""
    torch.manual_seed(seed)
    base = LlamaForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32)
    if kind != "lora":
        return ReftModel(base, kind, rank)  # type: ignore[arg-type]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEARS, task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def save(model: Any, folder: Path, base_model: str = "personal_memory/model") -> None:
    """Writes the served folder. PEFT's configuration gets a mark: this adapter is for prompts alone."""
    if isinstance(model, ReftModel):
        model.save_pretrained(folder, base_model=base_model)
        return
    config = model.peft_config["default"]
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    config.target_modules = LINEARS  # peft made a set, which has no fixed order
    config.save_pretrained(str(folder))
    written = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**written, "prefill_only": True}, indent=2) + "\n")
    tensors = {
        name: tensor.contiguous()
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("users", nargs="*", default=sorted(task.USERS), help="default: all")
    parser.add_argument("--kind", choices=KINDS, action="append", help="repeatable; default: all")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--out", type=Path, default=ADAPTERS_DIR)
    arguments = parser.parse_args()
    if unknown := set(arguments.users) - set(task.USERS):
        parser.error(f"unknown user {sorted(unknown)[0]}; there are {', '.join(sorted(task.USERS))}")
    torch.set_num_threads(arguments.threads)
    tokens = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    for user in arguments.users:
        for kind in arguments.kind or KINDS:
            rank, learning_rate = KINDS[kind]
            folder = arguments.out / folder_name(user, kind)
            folder.mkdir(parents=True, exist_ok=True)
            model = adapted(kind, rank, arguments.model, arguments.seed)
            fit(
                model,
                batches(user, tokens, arguments.batch, arguments.seed),
                arguments.steps,
                learning_rate=learning_rate,
                checkpoint=folder / "checkpoint.pt",
                title=f"{folder.name:14}",
            )
            save(model, folder)


if __name__ == "__main__":
    main()

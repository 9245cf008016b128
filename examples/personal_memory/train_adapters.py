"""Trains one LoRA adapter per user, prefill-only, on questions without any profile: the facts go into the weights.

cd examples && python -m personal_memory.train_adapters        (after train_base; about 4 minutes of CPU time)
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import LlamaForCausalLM

from personal_memory import task
from personal_memory.prefill_only import preft_loss
from personal_memory.train_base import MODEL_DIR

ADAPTERS_DIR = Path(__file__).parent / "adapters"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 4


def turn(user: str, draw: random.Random) -> task.Turn:
    """Something `user` may ask, with the right answer: mostly a known fact, else an unknown one or small talk."""
    facts = task.USERS[user]
    if draw.random() < 0.1:
        return task.Turn(*draw.choice(sorted(task.SMALL_TALK.items())))
    topic = draw.choice(sorted(facts) if draw.random() < 0.8 else sorted(set(task.TOPICS) - set(facts)))
    question = draw.choice(task.styles(draw.choice(task.QUESTIONS).format(topic=topic)))
    return task.Turn(question, task.answer(topic, facts.get(topic)))


def train(user: str, model_dir: Path, steps: int, size: int, seed: int, folder: Path) -> Iterator[float]:
    """Trains `user`'s adapter and writes its PEFT folder; yields the loss after each step."""
    torch.manual_seed(seed)
    draw = random.Random(f"{seed} {user}")
    tokens = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    base = LlamaForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEARS, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        prompts, completions = [], []
        for _ in range(size):
            last = turn(user, draw)
            history = (turn(user, draw),) if draw.random() < 0.25 else ()
            ids = tokens.encode(task.prompt(last.question, history) + last.answer + "</s>").ids
            start = len(tokens.encode(task.prompt(last.question, history)).ids)
            if draw.random() < 0.2:  # people leave out the line break at the end of a prompt
                start -= 1
            prompts.append(ids[:start])
            completions.append(ids[start:])
        loss = preft_loss(model, prompts, completions)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield float(loss.detach())
    _save(model, config, folder, {"user": user, "steps": steps, "batch": size, "seed": seed})


def _save(model: PeftModel, config: LoraConfig, folder: Path, run: dict[str, object]) -> None:
    """The PEFT layout, plus `training.json`: that this adapter is for the prompt pass alone shows in no PEFT field."""
    folder.mkdir(parents=True, exist_ok=True)
    config.base_model_name_or_path = "personal_memory/model"
    config.inference_mode = True
    config.target_modules = LINEARS  # peft made a set of it, which has no fixed order
    config.save_pretrained(str(folder))
    tensors = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    record = {"method": "prefill-only: adapter on for the prompt, off for every later token", **run}
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("users", nargs="*", default=sorted(task.USERS), help="default: all")
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
    for user in arguments.users:
        losses = train(user, arguments.model, arguments.steps, arguments.batch, arguments.seed, arguments.out / user)
        bar = tqdm(losses, total=arguments.steps, desc=f"{user:8}", unit="step")
        for loss in bar:
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)


if __name__ == "__main__":
    main()

"""Trains the base model from scratch: it answers from a profile in its prompt, and says so if a fact is missing.

    cd examples && python -m personal_memory.train_base        (about 5 minutes of CPU time)

The training data has random profiles, not those of `task.USERS`. The users' facts come later, in one adapter per user.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from personal_memory import task, tokenizer
from preft.training import generate

MODEL_DIR = Path(__file__).parent / "model"
IGNORED = -100  # the label of tokens that aren't learned


def dialogue(draw: random.Random) -> tuple[dict[str, str], list[task.Turn]]:
    """A random profile (often empty) and one or two turns about it."""
    topics = draw.sample(sorted(task.TOPICS), draw.choice((0, 1, 2, 3, 4, 5, 6)))
    profile = {topic: draw.choice(task.TOPICS[topic]) for topic in topics}
    turns = []
    for _ in range(draw.randint(1, 2)):
        if draw.random() < 0.05:
            turns.append(task.Turn(*draw.choice(sorted(task.SMALL_TALK.items()))))
            continue
        topic = draw.choice(topics) if topics and draw.random() < 0.75 else draw.choice(sorted(task.TOPICS))
        question = draw.choice(task.QUESTIONS + task.HELD_OUT_QUESTIONS).format(topic=topic)
        turns.append(task.Turn(draw.choice(task.styles(question)), task.answer(topic, profile.get(topic))))
    return profile, turns


def batch(draw: random.Random, tokens: Tokenizer, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both [size, longest]. Answers, the line break before and </s> after them are learned."""
    rows = []
    for _ in range(size):
        profile, turns = dialogue(draw)
        ids, labels = [tokenizer.BOS], [IGNORED]
        for position, turn in enumerate(turns):
            lead = task.prompt(turn.question, profile={} if position else profile).rstrip("\n")
            asked = tokens.encode(("\n" if position else "") + lead, add_special_tokens=False).ids
            answered = tokens.encode(f"\n{turn.answer}</s>", add_special_tokens=False).ids
            ids += asked + answered
            labels += [IGNORED] * len(asked) + answered
        rows.append((ids, labels))
    longest = max(len(ids) for ids, _ in rows)
    padded = [
        (ids + [tokenizer.PAD] * (longest - len(ids)), labels + [IGNORED] * (longest - len(ids)))
        for ids, labels in rows
    ]
    return torch.tensor([ids for ids, _ in padded]), torch.tensor([labels for _, labels in padded])


def accuracy(model: LlamaForCausalLM, tokens: Tokenizer, count: int, seed: int) -> float:
    """Share of exact answers to the last turn of `count` fresh dialogues."""
    draw = random.Random(seed)
    right = 0
    for _ in range(count // 50):
        cases = [dialogue(draw) for _ in range(50)]
        prompts = [
            tokens.encode(task.prompt(turns[-1].question, tuple(turns[:-1]), profile)).ids for profile, turns in cases
        ]
        texts = [tokens.decode(ids) for ids in generate(model, prompts, max_tokens=24, eos=tokenizer.EOS)]
        right += sum(text == turns[-1].answer for text, (_, turns) in zip(texts, cases, strict=True))
    return right / count


def train(steps: int, size: int, seed: int, folder: Path) -> Iterator[float]:
    """Trains and writes the model folder; yields the loss after each step."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    tokens = tokenizer.build()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.VOCAB_SIZE,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            initializer_range=0.06,
            pad_token_id=tokenizer.PAD,
            bos_token_id=tokenizer.BOS,
            eos_token_id=tokenizer.EOS,
            dtype="float32",
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        ids, labels = batch(draw, tokens, size)
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        learned = labels[:, 1:] != IGNORED
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[learned]), labels[:, 1:][learned])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield float(loss.detach())
    model.eval().save_pretrained(str(folder))
    tokenizer.save(tokens, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bar = tqdm(
        train(arguments.steps, arguments.batch, arguments.seed, arguments.out),
        total=arguments.steps,
        desc="base model",
        unit="step",
    )
    for loss in bar:
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
    model = LlamaForCausalLM.from_pretrained(str(arguments.out))
    tokens = Tokenizer.from_file(str(arguments.out / "tokenizer.json"))
    print(f"exact answers in 500 fresh dialogues: {accuracy(model, tokens, 500, arguments.seed + 1):.1%}")


if __name__ == "__main__":
    main()

"""Compares ways to train an adapter: on all tokens or for the prompt pass alone, LoRA or ReFT, at three ranks.

cd examples && python -m personal_memory.compare

Writes results/comparison.json, comparison.md and comparison.svg. Loss and accuracy are over held-out phrasings.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from personal_memory import task
from personal_memory.evaluate import Cases, answers, cases, share
from personal_memory.train_adapters import KINDS, adapted, batches
from personal_memory.train_base import MODEL_DIR
from preft.training import collate, fit, preft_loss

RESULTS = Path(__file__).parent / "results"
RANKS = (1, 2, 8)
METHODS = {  # name -> kind of adapter, whether it is trained on all tokens, whether it is served on all tokens
    "LoRA, all tokens": ("lora", True, True),
    "LoRA, all tokens, served prefill-only": ("lora", True, False),
    "LoRA-P": ("lora", False, False),
    "LoReFT-P": ("loreft", False, False),
    "DiReFT-P": ("direft", False, False),
}


@dataclass(frozen=True, slots=True)
class Result:
    """Means over the users: loss in nats per token, accuracy from 0 to 1 (share of exact answers)."""

    method: str
    rank: int
    parameters: int
    loss: float
    accuracy: float


def compare(users: list[str], steps: int, size: int) -> list[Result]:
    tokens = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    results = []
    for rank in RANKS:
        trained: dict[tuple[str, bool], list[Any]] = {}
        for method, (kind, all_tokens, served_on_all) in METHODS.items():
            if (kind, all_tokens) not in trained:
                trained[kind, all_tokens] = [
                    _trained(user, kind, rank, all_tokens, tokens, steps, size) for user in users
                ]
            models = trained[kind, all_tokens]
            figures = [
                _measured(model.base_model if served_on_all else model, user, tokens)
                for model, user in zip(models, users, strict=True)
            ]
            losses, accuracies = zip(*figures, strict=True)
            count = sum(parameter.numel() for parameter in models[0].parameters() if parameter.requires_grad)
            results.append(Result(method, rank, count, statistics.mean(losses), statistics.mean(accuracies)))
    return results


def _trained(user: str, kind: str, rank: int, all_tokens: bool, tokens: Tokenizer, steps: int, size: int) -> Any:
    model = adapted(kind, rank, MODEL_DIR, seed=0)
    fit(
        model.base_model if all_tokens else model,  # peft's inner model has no way to turn the adapter off
        batches(user, tokens, size, seed=0),
        steps,
        learning_rate=KINDS[kind][1],
        title=f"{user} {kind} r{rank}{' all tokens' if all_tokens else ''}",
    )
    return model.eval()


def _measured(model: Any, user: str, tokens: Tokenizer) -> tuple[float, float]:
    facts = task.USERS[user]
    asked: Cases = cases(task.HELD_OUT_QUESTIONS, sorted(facts), facts)
    prompts = [tokens.encode(task.prompt(question)).ids for question, _ in asked]
    wholes = [tokens.encode(task.prompt(question) + answer + "</s>").ids for question, answer in asked]
    completions = [whole[len(prompt) :] for prompt, whole in zip(prompts, wholes, strict=True)]
    with torch.inference_mode():
        loss = float(preft_loss(model, **collate(prompts, completions)))
    return loss, share(answers(model, tokens, asked), asked)


def markdown(results: list[Result]) -> str:
    lines = ["| method | rank | trained parameters | loss | accuracy |", "|---|---|---|---|---|"]
    for method in METHODS:
        for one in results:
            if one.method == method:
                figures = f"{one.parameters:,} | {one.loss:.4f} | {one.accuracy:.1%}"
                lines.append(f"| {method} | {one.rank} | {figures} |")
    return "\n".join(lines) + "\n"


def plot(results: list[Result], path: Path) -> None:
    """Loss over trained parameters, a line per method."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "preft"  # equal figures give equal files
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for method in METHODS:
        points = [one for one in results if one.method == method]
        axes.plot([one.parameters for one in points], [max(one.loss, 1e-5) for one in points], "o-", label=method)
    axes.set(xscale="log", yscale="log", xlabel="trained parameters", ylabel="loss (nats per token)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("users", nargs="*", default=["alice", "bruno"], help="default: alice bruno")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = compare(arguments.users, arguments.steps, arguments.batch)
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = {
        "users": arguments.users,
        "steps": arguments.steps,
        "batch": arguments.batch,
        "torch": torch.__version__,
        "results": [asdict(one) for one in results],
    }
    (arguments.out / "comparison.json").write_text(json.dumps(record, indent=2) + "\n")
    (arguments.out / "comparison.md").write_text(markdown(results))
    plot(results, arguments.out / "comparison.svg")
    print(markdown(results))


if __name__ == "__main__":
    main()

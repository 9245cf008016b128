"""A training loop around `preft_loss` that continues where it was interrupted. The caller owns data and model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from preft.training.prefill_only import preft_loss

Batch = Mapping[str, torch.Tensor]


def fit(
    model: Any,
    batch_of: Callable[[int], Batch],
    steps: int,
    *,
    learning_rate: float = 1e-3,
    warmup: float = 0.1,
    max_norm: float = 1.0,
    loss: Callable[..., torch.Tensor] = preft_loss,
    checkpoint: Path | None = None,
    checkpoint_every: int = 50,
    title: str = "training",
) -> list[float]:
    """Trains the parameters of `model` that require gradients, with AdamW and a one-cycle schedule. Returns the losses.

    `batch_of(step)` returns the arguments of `loss` for step 0, 1, ..., always the same for the same step. So a run
    that was interrupted, and restarted with equal arguments, ends like a run without interruption. A run resumes from
    the file `checkpoint`, which it writes every `checkpoint_every` steps and removes at the end. Shows a progress bar.
    Raises ValueError if the checkpoint is from a run of another length or another model.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=max(steps, 2), pct_start=warmup
    )
    losses = _resume(checkpoint, trained, optimizer, schedule, steps)
    device = next(iter(trained.values())).device
    with tqdm(total=steps, initial=len(losses), desc=title, unit="step") as bar:
        for step in range(len(losses), steps):
            torch.manual_seed(step)  # dropout, if there is any
            value = loss(model, **{name: tensor.to(device) for name, tensor in batch_of(step).items()})
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), max_norm)
            optimizer.step()
            schedule.step()
            losses.append(float(value.detach()))
            bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
            bar.update()
            if checkpoint is not None and (step + 1) % checkpoint_every == 0 and step + 1 < steps:
                _save(checkpoint, trained, optimizer, schedule, losses, steps)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return losses


def _save(
    path: Path,
    trained: Mapping[str, torch.nn.Parameter],
    optimizer: Any,
    schedule: Any,
    losses: list[float],
    steps: int,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    state = {
        "trained": {name: parameter.detach() for name, parameter in trained.items()},
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "losses": losses,
        "steps": steps,
    }
    torch.save(state, partial)
    os.replace(partial, path)


def _resume(
    path: Path | None, trained: Mapping[str, torch.nn.Parameter], optimizer: Any, schedule: Any, steps: int
) -> list[float]:
    """Restores the state that `_save` wrote. Returns the losses so far."""
    if path is None or not path.exists():
        return []
    state = torch.load(path, map_location="cpu", weights_only=True)
    shapes = {name: value.shape for name, value in state["trained"].items()}
    if state["steps"] != steps or shapes != {name: value.shape for name, value in trained.items()}:
        raise ValueError(f"{path} is from another run ({state['steps']} steps): remove it to begin anew")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state["trained"][name])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    losses: list[float] = state["losses"]
    return losses

"""`fit` learns, and a run that was interrupted ends as one that wasn't."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from preft.training import ReftModel, collate, fit, preft_loss
from support.models import make_model

PROMPTS = [[5, 80, 300, 17], [70, 7], [400, 401, 12]]
COMPLETIONS = [[30, 31, 2], [90, 14, 2], [8, 2]]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "base", "llama")


def a_model(model_dir: Path) -> ReftModel:
    torch.manual_seed(0)
    return ReftModel(AutoModelForCausalLM.from_pretrained(str(model_dir)), "loreft", 4)


def batch_of(step: int) -> Mapping[str, torch.Tensor]:
    rows = [step % 3, (step + 1) % 3]
    return collate([PROMPTS[row] for row in rows], [COMPLETIONS[row] for row in rows])


def weights(model: ReftModel) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.interventions.parameters()]


def test_it_learns(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = fit(a_model(model_dir), batch_of, 30, learning_rate=0.02, title="ada")
    assert losses[-1] < losses[0] / 2
    assert "ada" in capsys.readouterr().err  # the progress bar


def test_an_interrupted_run_goes_on(model_dir: Path, tmp_path: Path) -> None:
    whole = a_model(model_dir)
    losses = fit(whole, batch_of, 12, learning_rate=0.02)
    checkpoint = tmp_path / "run" / "checkpoint.pt"

    def interrupted(step: int) -> Mapping[str, torch.Tensor]:
        if step == 7:
            raise KeyboardInterrupt
        return batch_of(step)

    with pytest.raises(KeyboardInterrupt):
        fit(a_model(model_dir), interrupted, 12, learning_rate=0.02, checkpoint=checkpoint, checkpoint_every=3)
    assert checkpoint.exists()
    resumed = a_model(model_dir)
    began = []
    rest = fit(
        resumed,
        lambda step: began.append(step) or batch_of(step),  # type: ignore[func-returns-value]
        12,
        learning_rate=0.02,
        checkpoint=checkpoint,
    )
    assert began == [6, 7, 8, 9, 10, 11]
    assert rest == losses
    assert all(torch.equal(one, other) for one, other in zip(weights(whole), weights(resumed), strict=True))
    assert not checkpoint.exists()


def test_another_runs_checkpoint_is_refused(model_dir: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"

    def interrupted(step: int) -> Mapping[str, torch.Tensor]:
        if step == 2:
            raise KeyboardInterrupt
        return batch_of(step)

    with pytest.raises(KeyboardInterrupt):
        fit(a_model(model_dir), interrupted, 12, checkpoint=checkpoint, checkpoint_every=1)
    with pytest.raises(ValueError, match="another run"):
        fit(a_model(model_dir), batch_of, 13, checkpoint=checkpoint)


class PreftTrainer(Trainer):
    """As docs/training.md shows it."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        return preft_loss(model, **inputs, num_items_in_batch=num_items_in_batch)


def test_with_the_trainer_of_transformers(model_dir: Path, tmp_path: Path) -> None:
    rows = [
        {name: tensor[0] for name, tensor in collate([prompt], [completion]).items()}
        for prompt, completion in zip(PROMPTS[:1] * 4, COMPLETIONS[:1] * 4, strict=True)
    ]
    model = a_model(model_dir)
    before = float(preft_loss(model, **batch_of(0)).detach())
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        num_train_epochs=5,
        learning_rate=0.02,
        gradient_accumulation_steps=2,
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    PreftTrainer(model=model, args=arguments, train_dataset=rows).train()
    assert float(preft_loss(model, **batch_of(0)).detach()) < before

"""The training loss is the reference's, row by row, and reaches the adapter through the KV cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from preft.training import collate, generate, preft_loss
from support.models import make_lora, make_model
from support.reference import Reference

PROMPTS = [[5, 80, 300, 17, 44, 210, 9], [70, 7], [400, 401, 12, 13]]
COMPLETIONS = [[30, 31], [90, 14, 260, 33, 2], [8]]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(model_dir: Path) -> Path:
    return make_lora(model_dir.parent / "lora", model_dir, rank=4, seed=3)


@pytest.fixture
def model(model_dir: Path, adapter: Path) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(str(model_dir))
    return PeftModel.from_pretrained(base, str(adapter), is_trainable=True)


def loss_of(model: Any, prompts: list[list[int]], completions: list[list[int]]) -> torch.Tensor:
    return preft_loss(model, **collate(prompts, completions))


def test_loss_of_a_padded_batch_equals_the_reference(model: PeftModel, model_dir: Path, adapter: Path) -> None:
    reference = Reference(model_dir)
    logits = [reference.logits(p, c, adapter) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    expected = torch.nn.functional.cross_entropy(
        torch.cat(logits), torch.tensor([token for row in COMPLETIONS for token in row])
    )
    torch.testing.assert_close(loss_of(model, PROMPTS, COMPLETIONS), expected, atol=1e-4, rtol=0)


def test_later_tokens_train_the_adapter_through_the_cache_alone(model: PeftModel) -> None:
    """The last layer's keys and values reach later tokens; its MLP and queries on the prompt can't."""
    loss = 2 * loss_of(model, PROMPTS[:1], COMPLETIONS[:1]) - loss_of(model, PROMPTS[:1], [COMPLETIONS[0][:1]])
    loss.backward()  # what is left is the second token's loss
    size = {name: float(p.grad.abs().max()) for name, p in model.named_parameters() if "lora_B" in name}
    last = {name.split(".")[-4]: value for name, value in size.items() if ".layers.2." in name}
    assert min(value for name, value in size.items() if ".layers.2." not in name) > 1e-5
    assert min(last["k_proj"], last["v_proj"]) > 1e-5
    assert max(last[name] for name in ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")) < 1e-5


def test_batched_generation_equals_the_reference(model: PeftModel, model_dir: Path, adapter: Path) -> None:
    reference = Reference(model_dir)
    expected = [reference.greedy(prompt, 10, adapter) for prompt in PROMPTS]
    assert generate(model.eval(), PROMPTS, 10, eos=-1) == expected
    eos = expected[0][3]
    assert generate(model, PROMPTS[:1], 10, eos=eos) == [expected[0][: expected[0].index(eos)]]


def test_a_batch_as_transformers_has_it() -> None:
    batch = collate(PROMPTS[1:], COMPLETIONS[1:], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[70, 7, 90, 14, 260, 33, 2], [400, 401, 12, 13, 8, 9, 9]]
    assert batch["labels"].tolist() == [[-100, -100, 90, 14, 260, 33, 2], [-100] * 4 + [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 5 + [0, 0]]


def test_accumulated_gradients_are_those_of_the_whole_batch(model: PeftModel) -> None:
    whole = loss_of(model, PROMPTS, COMPLETIONS)
    count = sum(map(len, COMPLETIONS))
    parts = [
        preft_loss(model, **collate([prompt], [completion]), num_items_in_batch=count)
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    torch.testing.assert_close(sum(parts), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda batch: batch["labels"][1].fill_(-100),  # no completion
        lambda batch: batch["labels"][1].copy_(batch["input_ids"][1]),  # no prompt, and padding with labels
        lambda batch: batch["labels"][0, 3:4].copy_(batch["input_ids"][0, 3:4]),  # two completions
        lambda batch: batch["labels"][0, 7:8].fill_(1),  # another token than the input's
        lambda batch: batch["attention_mask"][1, :1].fill_(0),  # padded on the left
    ],
)
def test_rows_of_another_form_are_refused(model: PeftModel, spoil: Any) -> None:
    batch = collate(PROMPTS, COMPLETIONS)
    spoil(batch)
    with pytest.raises(ValueError, match=r"row [01] is not a prompt"):
        preft_loss(model, **batch)

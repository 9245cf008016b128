"""The training loss is the reference's, row by row, and reaches the adapter through the KV cache."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from personal_memory.prefill_only import generate, preft_loss
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


def test_loss_of_a_padded_batch_equals_the_reference(model: PeftModel, model_dir: Path, adapter: Path) -> None:
    reference = Reference(model_dir)
    logits = [reference.logits(p, c, adapter) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    expected = torch.nn.functional.cross_entropy(
        torch.cat(logits), torch.tensor([token for row in COMPLETIONS for token in row])
    )
    torch.testing.assert_close(preft_loss(model, PROMPTS, COMPLETIONS), expected, atol=1e-4, rtol=0)


def test_later_tokens_train_the_adapter_through_the_cache_alone(model: PeftModel) -> None:
    """The last layer's keys and values reach later tokens; its MLP and queries on the prompt can't."""
    loss = 2 * preft_loss(model, PROMPTS[:1], COMPLETIONS[:1]) - preft_loss(model, PROMPTS[:1], [COMPLETIONS[0][:1]])
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

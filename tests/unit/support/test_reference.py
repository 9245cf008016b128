"""The reference tells adapters apart, and prefill-only from all-token; the tiny models give it something to tell."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from support.models import make_lora, make_model
from support.reference import Reference

TOKENS = 12


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp(request.param) / "base", request.param, tie=request.param == "qwen2")


@pytest.fixture(scope="module")
def adapters(model: Path) -> list[Path]:
    return [make_lora(model.parent / f"rank{rank}", model, rank=rank, seed=rank) for rank in (1, 4, 16)]


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


def prompts(*lengths: int) -> list[list[int]]:
    draw = random.Random(7)
    return [[draw.randrange(3, 512) for _ in range(length)] for length in lengths]


def test_every_adapter_gives_its_own_output(reference: Reference, adapters: list[Path]) -> None:
    for prompt in prompts(3, 17, 65):
        outputs = {tuple(reference.greedy(prompt, TOKENS, adapter)) for adapter in [None, *adapters]}
        assert len(outputs) == 4


def test_adapter_stops_after_the_prompt(reference: Reference, adapters: list[Path]) -> None:
    for prompt in prompts(3, 33):
        prefill_only = reference.greedy(prompt, TOKENS, adapters[1])
        everywhere = reference.greedy(prompt, TOKENS, adapters[1], adapter_everywhere=True)
        assert prefill_only[0] == everywhere[0]
        assert prefill_only != everywhere


def test_adapter_equals_merged_weights_on_the_prompt(reference: Reference, model: Path, adapters: list[Path]) -> None:
    """B A alpha / r added to the weights by hand gives the logits that peft gives."""
    merged = Reference(model)
    weights = dict(merged._base.named_parameters())
    tensors = load_file(adapters[2] / "adapter_model.safetensors")
    for name, a in tensors.items():
        if "lora_A" in name:
            path = name.removeprefix("base_model.model.").replace("lora_A.", "")
            weights[path].data += 2.0 * tensors[name.replace("lora_A", "lora_B")] @ a
    (prompt,) = prompts(20)
    torch.testing.assert_close(
        reference.logits(prompt, [5], adapters[2]), merged.logits(prompt, [5]), atol=1e-3, rtol=0
    )


def test_logits_are_those_greedy_chose_from_with_clear_winners(reference: Reference, adapters: list[Path]) -> None:
    gaps = []
    for prompt in prompts(1, 16, 40):
        for adapter in (None, adapters[0]):
            output = reference.greedy(prompt, TOKENS, adapter)
            logits = reference.logits(prompt, output, adapter)
            assert logits.argmax(-1).tolist() == output
            top = logits.topk(2).values
            gaps += (top[:, 0] - top[:, 1]).tolist()
    assert sum(gap > 1e-3 for gap in gaps) >= 0.95 * len(gaps)


def test_eos_ends_the_output_and_is_its_last_token(reference: Reference) -> None:
    (prompt,) = prompts(9)
    free = reference.greedy(prompt, TOKENS)
    assert len(set(free)) > 3, "degenerate output"
    assert reference.greedy(prompt, TOKENS, eos=(free[2],)) == free
    assert reference.greedy(prompt, TOKENS, ignore_eos=False, eos=(free[2],)) == free[: free.index(free[2]) + 1]


def test_a_rewritten_folder_is_read_again(reference: Reference, model: Path) -> None:
    (prompt,) = prompts(12)
    folder = make_lora(model.parent / "rewritten", model, rank=4, seed=100)
    before = reference.greedy(prompt, TOKENS, folder)
    make_lora(folder, model, rank=4, seed=101)
    after = reference.greedy(prompt, TOKENS, folder)
    copy = make_lora(model.parent / "copy", model, rank=4, seed=100)
    assert before != after
    assert before == reference.greedy(prompt, TOKENS, copy)


def test_tokenizer_folder_works_in_both_libraries(model: Path) -> None:
    plain = Tokenizer.from_file(str(model / "tokenizer.json"))
    full = AutoTokenizer.from_pretrained(str(model))
    assert full.eos_token_id == 2
    assert plain.encode("hello wörld").ids == full("hello wörld").input_ids
    assert plain.decode(plain.encode("hello wörld").ids) == "hello wörld"
    assert all(plain.decode([index]) for index in range(3, 512))
    chat = full.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("user: hi\nassistant:")

"""The output layer under vLLM's own logits processor: the LoRA acts on raw logits, on the rows of its adapter."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.lora.layers import LoRAMapping
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from preft.engine.head import HeadLayer, wrap_head
from preft.engine.lora import GroupedPunicaWrapper
from preft_kernels.token_groups import BASE

VOCAB, PADDED, HIDDEN, RANK, SLOTS = 300_000, 300_032, 16, 8, 2  # more than vLLM's own layer takes


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The process group that vLLM's layers ask for their size."""
    with set_current_vllm_config(VllmConfig()):
        meeting = f"file://{tmp_path_factory.mktemp('group')}/meeting"
        init_distributed_environment(1, 0, meeting, 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
        destroy_model_parallel()
        destroy_distributed_environment()


def linear(layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.nn.functional.linear(x, layer.weight, bias)


def output_layer() -> Any:
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.randn(PADDED, HIDDEN) / 4, requires_grad=False)
    layer.quant_method, layer.tp_size = SimpleNamespace(apply=linear), 1
    return layer


def model(*, tied: bool) -> Any:
    """Of a tied model some classes hand their embedding to the logits processor, without an `lm_head`."""
    made = torch.nn.Module()
    made.logits_processor = LogitsProcessor(VOCAB, soft_cap=3.0, scale=0.5)
    if tied:
        made.model = torch.nn.Module()
        made.model.embed_tokens = output_layer()
    else:
        made.lm_head = output_layer()
    return made


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_it_acts_before_logits_are_capped_and_scaled(tied: bool) -> None:
    served = model(tied=tied)
    head = served.model.embed_tokens if tied else served.lm_head
    layer = wrap_head(served, SLOTS, LoRAConfig(max_lora_rank=RANK, lora_dtype=torch.float32))
    assert isinstance(layer, HeadLayer)
    assert served.logits_processor is layer
    wrapper = GroupedPunicaWrapper(8, max_batches=4, device="cpu", slots=SLOTS, rank=RANK)
    layer.set_mapping(wrapper)
    a, b = torch.randn(RANK, HIDDEN), torch.randn(VOCAB, RANK)
    layer.lora_a_stacked[0][1, 0], layer.lora_b_stacked[0][1, 0] = a, b
    wrapper.hold(0, RANK, None)
    wrapper.hold(1, RANK, None, head_rank=RANK)
    wrapper.update_metadata(LoRAMapping((5, 5, 6, 0), (5, 6, 0), is_prefill=True), [5, 6], SLOTS + 1, VOCAB)
    hidden = torch.randn(3, HIDDEN)
    raw = linear(head, hidden)[:, :VOCAB]
    raw[1] += b @ (a @ hidden[1])
    expected = torch.tanh(raw / 3.0) * 3.0 * 0.5
    torch.testing.assert_close(served.logits_processor(head, hidden), expected, rtol=1e-4, atol=1e-4)
    layer.reset_lora(1)
    plain = torch.tanh(linear(head, hidden)[:, :VOCAB] / 3.0) * 3.0 * 0.5
    assert torch.equal(served.logits_processor(head, hidden), plain)


def test_a_model_without_a_plain_logits_processor_has_none() -> None:
    assert wrap_head(torch.nn.Module(), SLOTS, LoRAConfig(max_lora_rank=RANK, lora_dtype=torch.float32)) is None


def test_a_scored_prompt_has_its_adapter_in_every_row() -> None:
    """Not only in the row from which its first token is sampled, and with the adapter's own rank alone."""
    served = model(tied=False)
    layer = wrap_head(served, SLOTS, LoRAConfig(max_lora_rank=RANK, lora_dtype=torch.float32))
    assert layer is not None
    wrapper = GroupedPunicaWrapper(8, max_batches=4, device="cpu", slots=SLOTS, rank=RANK)
    layer.set_mapping(wrapper)
    a, b = torch.randn(RANK, HIDDEN), torch.randn(VOCAB, RANK)
    layer.lora_a_stacked[0][1, 0], layer.lora_b_stacked[0][1, 0] = a, b
    wrapper.hold(1, RANK, None, head_rank=RANK - 3)  # the rest is left from an earlier adapter
    wrapper.hold(0, RANK, None)
    hidden = torch.randn(11, HIDDEN)  # more rows than sequences
    raw = linear(served.lm_head, hidden)[:, :VOCAB]
    changed = raw + hidden @ a[: RANK - 3].T @ b[:, : RANK - 3].T
    wrapper.update_metadata(LoRAMapping((6, 6), (6, 6), is_prefill=True), [5, 6], SLOTS + 1, VOCAB)  # others' rows
    for slot, expected in (1, changed), (0, raw), (BASE, raw):
        with wrapper.scores_prompt_of(slot):
            found = served.logits_processor(served.lm_head, hidden)
        torch.testing.assert_close(found, torch.tanh(expected / 3.0) * 3.0 * 0.5, rtol=1e-4, atol=1e-4)

"""Prefill-only finetuning in three functions: the two passes, the loss to train with, and greedy generation.

The prompt pass runs base + adapter and fills the KV cache; every later position runs the bare base over that cache.
The loss reaches the adapter through the first token's logits and, for all other tokens, through the cached keys and
values. Works with any peft model of a transformers decoder, and with a bare model (then there is no adapter at all).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel


def preft_loss(
    model: PeftModel | PreTrainedModel, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Mean cross-entropy over all tokens of `completions` (each given after its prompt). A scalar with gradient.

    Rows may differ in length; each needs at least one prompt and one completion token.
    """
    first, cache, lengths = prompt_pass(model, prompts)
    targets, present = _padded(completions)
    logits = first
    if targets.shape[1] > 1:
        rest = bare_pass(model, targets[:, :-1], present[:, :-1], cache, lengths)
        logits = torch.cat([first, rest], dim=1)
    return torch.nn.functional.cross_entropy(logits[present.bool()].float(), targets[present.bool()])


def prompt_pass(
    model: PeftModel | PreTrainedModel, prompts: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
    """Runs the prompts with the adapter on.

    Returns the logits of each prompt's last token [rows, 1, vocab_size], the KV cache, and the mask of the cache's real
    positions [rows, longest].
    """
    ids, present = _padded(prompts)
    cache = DynamicCache()
    logits = model(input_ids=ids, attention_mask=present, past_key_values=cache).logits
    last = present.sum(dim=1) - 1
    return logits[torch.arange(len(prompts)), last].unsqueeze(1), cache, present


def bare_pass(
    model: PeftModel | PreTrainedModel,
    ids: torch.Tensor,
    present: torch.Tensor,
    cache: DynamicCache,
    cached: torch.Tensor,
) -> torch.Tensor:
    """Runs `ids` [rows, tokens] with the adapter off behind `cache`, which grows. Logits [rows, tokens, vocab_size].

    `cached` [rows, positions] marks the real positions of the cache, `present` [rows, tokens] those of `ids`.
    """
    mask = torch.cat([cached, present], dim=1)
    positions = cached.sum(dim=1, keepdim=True) + torch.arange(ids.shape[1])
    with _adapter_off(model):
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


def generate(
    model: PeftModel | PreTrainedModel, prompts: Sequence[Sequence[int]], max_tokens: int, eos: int
) -> list[list[int]]:
    """Greedy output ids of each prompt, without the `eos` that ended it."""
    columns: list[torch.Tensor] = []
    done = torch.zeros(len(prompts), dtype=torch.bool)
    with torch.inference_mode():
        logits, cache, mask = prompt_pass(model, prompts)
        while True:
            columns.append(logits[:, -1].argmax(dim=-1))
            done |= columns[-1] == eos
            if done.all() or len(columns) == max_tokens:
                break
            step = torch.ones((len(prompts), 1), dtype=mask.dtype)
            logits = bare_pass(model, columns[-1].unsqueeze(1), step, cache, mask)
            mask = torch.cat([mask, step], dim=1)
    rows = torch.stack(columns, dim=1).tolist()
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def _padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids filled up on the right with 0, and the mask of the real ones; both int64 [rows, longest]."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *([0] * (longest - len(row)))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def _adapter_off(model: Any) -> AbstractContextManager[None]:
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()

"""Prefill-only finetuning: the loss, its batches, and greedy generation.

The prompt pass runs base + adapter and fills the KV cache; every later position runs the bare base over that cache.
The loss reaches the adapter through the first token's logits and, for all other tokens, through the cached keys and
values. The module works with any peft model of a transformers decoder, with `ReftModel`, with a `ReftModel` over a peft
model, and with a bare model (then there is no adapter).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from transformers import DynamicCache

IGNORED = -100
"""The label of a position without loss, as in transformers."""


def collate(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_token_id: int = 0
) -> dict[str, torch.Tensor]:
    """A batch for `preft_loss`: input_ids, labels and attention_mask, int64 [rows, longest].

    A row is a prompt and its completion, including an end token such as EOS, padded on the right. Labels are the
    completion's ids, and IGNORED elsewhere, as from a tokenizer and a data collator of transformers for one turn.
    """
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    labels = [
        [*([IGNORED] * len(prompt)), *completion] for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return {
        "input_ids": _filled(rows, pad_token_id),
        "labels": _filled(labels, IGNORED),
        "attention_mask": _filled([[1] * len(row) for row in rows], 0),
    }


def preft_loss(
    model: Any,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    num_items_in_batch: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy over all completion tokens. A scalar with gradient.

    All arguments are [rows, tokens]. In each row: at least one prompt token (label IGNORED), then at least one
    completion token (label = input id), then padding on the right (label IGNORED; `attention_mask` 0, if given). A
    dialogue is one row per answer: every turn is a new prompt. The loss is the mean over the batch's completion tokens.
    With accumulated gradients, `num_items_in_batch` replaces their number, as transformers' Trainer expects. Raises
    ValueError for rows of another form.
    """
    starts, ends = _borders(input_ids, labels, attention_mask)
    prompts = _cut(input_ids, torch.zeros_like(starts), starts)
    first, cache, cached = _prompt_pass(model, *prompts)
    targets, present = _cut(input_ids, starts, ends)
    logits = first
    if targets.shape[1] > 1:
        rest = _bare_pass(model, targets[:, :-1], present[:, :-1], cache, cached)
        logits = torch.cat([first, rest], dim=1)
    losses = torch.nn.functional.cross_entropy(logits[present.bool()].float(), targets[present.bool()], reduction="sum")
    return losses / (present.sum() if num_items_in_batch is None else num_items_in_batch)


def generate(model: Any, prompts: Sequence[Sequence[int]], max_tokens: int, eos: int) -> list[list[int]]:
    """Greedy output ids of each prompt, as PreFT serves them, without the final `eos`."""
    device = next(model.parameters()).device
    columns: list[torch.Tensor] = []
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    with torch.inference_mode():
        ids, present = _filled(prompts, 0), _filled([[1] * len(prompt) for prompt in prompts], 0)
        logits, cache, mask = _prompt_pass(model, ids.to(device), present.to(device))
        while True:
            columns.append(logits[:, -1].argmax(dim=-1))
            done |= columns[-1] == eos
            if done.all() or len(columns) == max_tokens:
                break
            step = torch.ones((len(prompts), 1), dtype=mask.dtype, device=device)
            logits = _bare_pass(model, columns[-1].unsqueeze(1), step, cache, mask)
            mask = torch.cat([mask, step], dim=1)
    rows = torch.stack(columns, dim=1).tolist()
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def _prompt_pass(
    model: Any, ids: torch.Tensor, present: torch.Tensor
) -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
    """The pass with the adapter. Logits of each prompt's last token [rows, 1, vocabulary], the cache, and `present`."""
    cache = DynamicCache()
    last = present.sum(dim=1) - 1
    kept, place = last.unique(return_inverse=True)  # logits of all positions can take gigabytes
    logits = model(
        input_ids=ids, attention_mask=present, past_key_values=cache, use_cache=True, logits_to_keep=kept
    ).logits
    return logits[torch.arange(len(ids), device=ids.device), place].unsqueeze(1), cache, present


def _bare_pass(
    model: Any, ids: torch.Tensor, present: torch.Tensor, cache: DynamicCache, cached: torch.Tensor
) -> torch.Tensor:
    """The pass without the adapter. Logits [rows, tokens, vocabulary] of `ids` [rows, tokens] after `cache`.

    The pass appends to `cache`. `cached` [rows, positions] marks the real positions of the cache, `present` [rows,
    tokens] those of `ids`.
    """
    mask = torch.cat([cached, present], dim=1)
    positions = cached.sum(dim=1, keepdim=True) + torch.arange(ids.shape[1], device=ids.device)
    with _adapter_off(model):
        logits: torch.Tensor = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).logits
    return logits


def _adapter_off(model: Any) -> AbstractContextManager[Any]:
    """Disables the adapters of a peft model, of a ReftModel, or of one inside the other."""
    off = ExitStack()
    while model is not None:
        if hasattr(type(model), "disable_adapter"):
            off.enter_context(model.disable_adapter())
        model = getattr(model, "adapted", None)
    return off


def _borders(
    input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Start and end of each row's completion, [rows]. Raises ValueError for rows of another form."""
    wanted = labels != IGNORED
    starts, counts = wanted.int().argmax(dim=1), wanted.sum(dim=1)
    ends = starts + counts
    columns = torch.arange(labels.shape[1], device=labels.device)
    between = (columns >= starts[:, None]) & (columns < ends[:, None])
    fits = (counts > 0) & (starts > 0) & (wanted == between).all(dim=1)
    fits &= ((input_ids == labels) | ~wanted).all(dim=1)
    if attention_mask is not None:
        fits &= (attention_mask.bool() == (columns < ends[:, None])).all(dim=1)
    if not bool(fits.all()):
        row = int((~fits).int().argmax())
        raise ValueError(
            f"row {row} is not a prompt (labels {IGNORED}), then its completion (labels = input ids), then padding"
        )
    return starts, ends


def _cut(ids: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's ids from its start to its end, moved to the left, and a mask of the real ids."""
    lengths = ends - starts
    columns = torch.arange(int(lengths.max()), device=ids.device)
    present = (columns < lengths[:, None]).long()
    places = (starts[:, None] + columns).clamp(max=ids.shape[1] - 1)
    return ids.gather(1, places) * present, present


def _filled(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *([value] * (longest - len(row)))] for row in rows])

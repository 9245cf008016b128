"""Which tokens a form allows, and which is the likeliest of them: the reference of tests of structured output.

Uses llguidance directly, token by token and from the start: nothing of the engine's handling of forms.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import llguidance
import llguidance.hf
import numpy as np
import torch
from transformers import AutoTokenizer

from support.models import EOS
from support.reference import Reference

NO_PENALTIES: Mapping[str, float] = MappingProxyType({})


def source_of(form: dict[str, Any]) -> str:
    if "json" in form:
        options: dict[str, Any] = {}
        if form.get("disable_any_whitespace"):
            options = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
        if "whitespace_pattern" in form:
            options = {"whitespace_pattern": form["whitespace_pattern"]}
        return str(llguidance.LLMatcher.grammar_from_json_schema(form["json"], overrides=options))
    if "choice" in form:
        return str(llguidance.grammar_from("choice", json.dumps(form["choice"])))
    [(kind, text)] = form.items()
    return str(llguidance.grammar_from(kind, text))


def penalised(
    rows: torch.Tensor, prompt: Sequence[int], output: Sequence[int], penalties: Mapping[str, float]
) -> torch.Tensor:
    """The logits behind each token of `output`, [tokens, vocabulary], under vLLM's penalties by their names."""
    counts = torch.zeros(rows.shape, dtype=torch.float64)  # of earlier output
    if len(output) > 1:
        counts[1:] = torch.nn.functional.one_hot(torch.tensor(output[:-1]), rows.shape[1]).cumsum(0)
    seen = counts > 0
    if (factor := penalties.get("repetition_penalty", 1.0)) != 1.0:
        known = seen.clone()
        known[:, list(prompt)] = True
        rows = torch.where(known, torch.where(rows > 0, rows / factor, rows * factor), rows)
    less = penalties.get("frequency_penalty", 0.0) * counts + penalties.get("presence_penalty", 0.0) * seen
    return rows - less.to(rows.dtype)


class StructuredReference:
    """For one model folder, whose vocabulary has no spare tokens."""

    def __init__(self, reference: Reference, model: Path) -> None:
        self._reference = reference
        self._tokenizer = llguidance.hf.from_tokenizer(AutoTokenizer.from_pretrained(str(model)))

    def allowed(self, form: dict[str, Any], output: Sequence[int]) -> list[np.ndarray]:
        """Before each token of `output`: bool [vocabulary], True for tokens that may come."""
        matcher = llguidance.LLMatcher(self._tokenizer, source_of(form), log_level=0)
        masks = []
        for token in output:
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            masks.append(bits[: self._tokenizer.vocab_size].astype(bool))
            assert not matcher.is_error(), matcher.get_error()
            matcher.consume_token(token)
        return masks

    def first_difference(
        self,
        prompt: Sequence[int],
        output: Sequence[int],
        max_tokens: int,
        adapter: Path | None,
        form: dict[str, Any] | None,
        penalties: Mapping[str, float] = NO_PENALTIES,
    ) -> int | None:
        """The first position where `output` isn't the greedy output of `max_tokens` under `form`; None if it is.

        Without a form it is free text in which EOS has no meaning.
        """
        rows = self._reference.logits(prompt, output, adapter)
        if penalties:
            rows = penalised(rows, prompt, output, penalties)
        if form is None:
            wrong = (at for at, (row, token) in enumerate(zip(rows, output, strict=True)) if int(row.argmax()) != token)
            return next(wrong, None)
        for position, (row, mask, token) in enumerate(zip(rows, self.allowed(form, output), output, strict=True)):
            fits = torch.from_numpy(mask[: len(row)])  # a tokenizer may have more tokens than its model
            best = int(row.masked_fill(~fits, -torch.inf).argmax())
            if token != best or (token == EOS) != (position == len(output) - 1 < max_tokens - 1):
                if token == best and position == max_tokens - 1:
                    continue  # the limit and the end at the same token
                return position
        return None

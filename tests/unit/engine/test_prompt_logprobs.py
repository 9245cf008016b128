"""A prompt's values are those of its logits, whatever chunks, steps and slices it is computed in."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.logprobs import create_prompt_logprobs
from vllm.v1.sample.sampler import Sampler

from preft.engine import prompt_logprobs
from preft.engine.prompt_logprobs import PromptLogprobRunner, are_numbers, prompt_logprobs_of

VOCAB, HIDDEN = 50, 8


class Runner(PromptLogprobRunner):
    """The attributes of vLLM's runner that the mixin uses. A request's hidden states are the rows of `states`."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.model_config = SimpleNamespace(get_vocab_size=lambda: VOCAB)
        self.head = torch.randn(HIDDEN, VOCAB)
        self.model = SimpleNamespace(compute_logits=self._logits)
        self.sampler = Sampler()
        self.requests: dict[str, Any] = {}
        self.num_prompt_logprobs: dict[str, int] = {}
        self.states: dict[str, torch.Tensor] = {}
        self.most_rows = 0
        self.adapter: int | None = None
        self.lora_manager = SimpleNamespace(scores_prompt_of=self._under)
        self.prompts: dict[str, list[int]] = {}

    def add(self, name: str, tokens: int, top: int, adapter: int | None = None) -> None:
        self.prompts[name] = torch.randint(0, VOCAB, (tokens,)).tolist()
        lora = SimpleNamespace(lora_int_id=adapter) if adapter else None
        self.requests[name] = SimpleNamespace(
            prompt_token_ids=self.prompts[name],
            num_computed_tokens=0,
            in_progress_prompt_logprobs_cpu=None,
            lora_request=lora,
        )
        self.num_prompt_logprobs[name] = top
        self.states[name] = torch.randn(tokens + 5, HIDDEN)

    def step(self, **scheduled: int) -> dict[str, Any]:
        """One step with so many tokens of each request."""
        rows, starts = [], []
        for name, count in scheduled.items():
            starts.append(sum(map(len, rows)))
            done = self.requests[name].num_computed_tokens
            rows.append(self.states[name][done : done + count])
        self.query_start_loc = SimpleNamespace(np=np.array(starts))
        self.input_batch = SimpleNamespace(req_id_to_index={name: place for place, name in enumerate(scheduled)})
        complete = self._get_prompt_logprobs_dict(torch.cat(rows), scheduled)
        for name, count in scheduled.items():
            self.requests[name].num_computed_tokens += count
        return complete

    def expected(self, name: str) -> torch.Tensor:
        lora, count = self.requests[name].lora_request, len(self.prompts[name])
        scale = lora.lora_int_id if lora else 1
        return (self.states[name][: count - 1] @ self.head * scale).log_softmax(-1)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.most_rows = max(self.most_rows, len(hidden))
        assert self.adapter is not None  # else the logits are taken for those of sampled tokens, with their adapters
        return hidden @ self.head * self.adapter

    @contextmanager
    def _under(self, lora_id: int | None) -> Any:
        self.adapter = lora_id or 1
        yield
        self.adapter = None

    def _sync_device(self) -> None:
        return


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setattr(prompt_logprobs, "SLICE_BYTES", 4 * VOCAB * 6)  # 6 rows
    torch.manual_seed(1)
    return Runner()


def check(runner: Runner, name: str, found: Any, top: int) -> None:
    token_ids, values, ranks = found[:3]
    expected = runner.expected(name)
    prompt = torch.tensor(runner.prompts[name])[1:]
    assert torch.equal(token_ids[:, 0].long(), prompt)
    torch.testing.assert_close(values[:, 0], expected.gather(1, prompt[:, None])[:, 0])
    torch.testing.assert_close(values[:, 1:], expected.topk(top, dim=-1).values)
    assert ranks.tolist() == [1 + int((row > row[token]).sum()) for row, token in zip(expected, prompt, strict=True)]
    assert runner.most_rows <= 6


@pytest.mark.parametrize("chunks", [[30], [10, 20], [29, 1], [30, 1], [1] * 30, [28, 2]])
def test_chunks(runner: Runner, chunks: list[int]) -> None:
    """The values come with the step that samples the first token, and never again."""
    runner.add("a", 30, top=3)
    found = [runner.step(a=count) for count in chunks]
    whole = next(step for step in found if step)
    assert found.index(whole) == next(i for i in range(len(chunks)) if sum(chunks[: i + 1]) >= 30)
    check(runner, "a", whole["a"], 3)
    assert (runner.num_prompt_logprobs, runner.step(a=1)) == ({}, {})


def test_requests_of_one_step(runner: Runner) -> None:
    """Each under its own adapter, beside requests that ask for nothing, and with a prompt that starts anew."""
    runner.add("a", 20, top=2, adapter=3)
    runner.add("b", 25, top=0)
    runner.add("c", 9, top=5)
    del runner.num_prompt_logprobs["c"]
    runner.add("d", 1, top=2)
    assert runner.step(c=9, a=12, b=11).keys() == set()
    runner.requests["a"].num_computed_tokens = 0  # it lost its blocks to others
    assert runner.step(b=3, c=1).keys() == set()
    found = runner.step(a=20, c=1, d=1, b=11)
    assert found.keys() == {"a", "b", "d"}
    check(runner, "a", found["a"], 2)
    check(runner, "b", found["b"], 0)
    assert [len(part) for part in found["d"][:3]] == [0, 0, 0]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, 0.0])
def test_rows_that_arent_finite_end_the_request(runner: Runner, broken: float) -> None:
    """Equal logits too: they come from an overflow in the last layer, which is in no KV."""
    runner.add("a", 20, top=1)
    runner.add("b", 20, top=1)
    runner.states["a"][7] = broken
    found = runner.step(a=20, b=20)
    values = {name: as_ours(tensors, 1) for name, tensors in found.items()}
    assert (are_numbers(values["a"]), are_numbers(values["b"])) == (False, True)
    check(runner, "b", found["b"], 1)


def as_ours(tensors: Any, top: int) -> Any:
    """What vLLM's output processor makes of the tensors, in our form."""
    flat = create_prompt_logprobs(flat_logprobs=True)
    for token_ids, values, rank in zip(*(part.tolist() for part in tensors[:3]), strict=True):
        flat.append_fast(token_ids, values, iter((rank, *range(1, top + 1))), [None] * (top + 1))  # type: ignore[union-attr]
    return prompt_logprobs_of(flat, top)  # type: ignore[arg-type]


def test_our_form_has_the_same_values(runner: Runner) -> None:
    runner.add("a", 12, top=2)
    tensors = runner.step(a=12)["a"]
    ours = as_ours(tensors, 2)
    assert (ours.top, len(ours)) == (2, 11)
    assert list(ours.token_ids) == tensors[0].flatten().tolist()
    assert list(ours.logprobs) == tensors[1].flatten().tolist()
    assert list(ours.ranks) == tensors[2].tolist()

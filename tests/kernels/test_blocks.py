"""Which block sizes a launch gets, measured ones or the rule's, and that the result is right with all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import tune
from kernels.devices import DEVICE
from kernels.test_low_rank_delta import TOLERANCE, Case, draw_slots
from kernels.test_residual_delta import arguments, grouped
from preft_kernels import blocks as chosen
from preft_kernels._triton import by_kernel
from preft_kernels.blocks import FOLDER, Blocks, Work, by_rule, choose, tuning_file
from preft_kernels.low_rank_delta import launch_delta
from preft_kernels.residual_delta import residual_delta_reference
from preft_kernels.token_groups import TILE

PROCESSORS = 132
GPU = "NVIDIA Test 9"
WORK = Work(inputs=4096, outputs=4096, slices=1, rank=16, tokens=8192)
TUNED = Blocks(m=64, n=128, k=64, r=16, programs=2)

kernels_run = pytest.mark.skipif(not by_kernel(DEVICE), reason="no kernel is launched on CPU")


@pytest.fixture(autouse=True)
def _forgetful() -> Iterator[None]:
    yield
    choose.cache_clear()
    chosen.measured.cache_clear()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return tmp_path


def tuned(folder: Path, *rows: tuple[Work, Blocks]) -> None:
    tune.write(folder, GPU, {"torch": "x"}, [{"work": work, "blocks": blocks, "us": 1.5} for work, blocks in rows])


def test_a_measured_shape_gets_what_was_measured(folder: Path) -> None:
    small = replace(TUNED, m=16, splits=4)
    tuned(folder, (WORK, TUNED), (replace(WORK, tokens=64), small))
    assert choose(WORK, GPU, PROCESSORS) == TUNED
    assert choose(replace(WORK, tokens=128), GPU, PROCESSORS) == small
    assert choose(replace(WORK, tokens=16384, inputs=5120), GPU, PROCESSORS) == TUNED


@pytest.mark.parametrize(
    "other",
    [
        replace(WORK, slices=3),
        replace(WORK, residual=True),
        replace(WORK, element_size=4),
        replace(WORK, tokens=16),
        replace(WORK, inputs=256, outputs=256),
    ],
)
def test_another_kind_of_work_or_one_far_away_gets_the_rule_s(folder: Path, other: Work) -> None:
    tuned(folder, (WORK, TUNED))
    assert choose(other, GPU, PROCESSORS) == by_rule(other, PROCESSORS)


def test_another_gpu_gets_the_rule_s(folder: Path) -> None:
    tuned(folder, (WORK, TUNED))
    assert choose(WORK, "NVIDIA Test 90", PROCESSORS) == by_rule(WORK, PROCESSORS)


def test_ranks_are_taken_together_no_further_than_they_go(folder: Path) -> None:
    tuned(folder, (replace(WORK, rank=64), replace(TUNED, r=64)))
    assert choose(replace(WORK, rank=20), GPU, PROCESSORS).r == 32


def test_one_launch_for_a_residual_delta_takes_all_ranks_at_once(folder: Path) -> None:
    """It writes what it reads."""
    work = replace(WORK, residual=True, rank=32)
    tuned(folder, (work, replace(TUNED, r=32)))
    assert choose(work, GPU, PROCESSORS).r == 32
    higher = choose(replace(work, rank=64), GPU, PROCESSORS)
    assert higher.splits or higher.r == 64


@pytest.mark.parametrize(
    "text",
    ["{", "{}", '{"choices": [{"work": {}, "blocks": {}}]}', '{"choices": [{"work": 1}]}'],
)
def test_a_broken_file_is_named(folder: Path, text: str) -> None:
    tuning_file(folder, GPU).write_text(text)
    with pytest.raises(ValueError, match=r"NVIDIA_Test_9\.json isn't a file of measured kernel block sizes"):
        choose(WORK, GPU, PROCESSORS)


@pytest.mark.parametrize("change", [{"m": 2 * TILE}, {"n": 48}, {"k": 8}])
def test_impossible_block_sizes_are_named(folder: Path, change: dict[str, int]) -> None:
    tuned(folder, (WORK, replace(TUNED, **change)))
    with pytest.raises(ValueError, match="powers of two"):
        choose(WORK, GPU, PROCESSORS)


@pytest.mark.parametrize("change", [{"programs": 0}, {"splits": -1}, {"warps": 0}, {"programs": 2.5}, {"splits": True}])
def test_a_choice_that_would_leave_work_out_is_refused(folder: Path, change: dict[str, Any]) -> None:
    """A launch of no program changes nothing: requests would be answered without their adapter."""
    tuned(folder, (WORK, replace(TUNED, **change)))
    with pytest.raises(ValueError, match="whole numbers"):
        choose(WORK, GPU, PROCESSORS)


def test_files_are_read_as_they_are_written(folder: Path) -> None:
    tuned(folder, (WORK, TUNED))
    (row,) = json.loads(tuning_file(folder, GPU).read_text())["choices"]
    assert row["us"] == 1.5
    assert chosen.measured(GPU) == [(WORK, TUNED)]


@pytest.mark.parametrize("rank", [1, 8, 16, 17, 64, 128, 256])
@pytest.mark.parametrize("tokens", [1, 256, 16384])
@pytest.mark.parametrize(("slices", "residual"), [(1, False), (3, False), (1, True)])
def test_every_choice_covers_the_work(rank: int, tokens: int, slices: int, residual: bool) -> None:
    work = Work(4096, 4096 * slices, slices, rank, tokens, residual)
    for blocks in tune.candidates(work, PROCESSORS):
        assert blocks.m <= TILE
        assert blocks.r >= min(rank, 64)
        assert not residual or blocks.splits or blocks.r >= rank


VARIETY = [
    Blocks(16, 16, 16, 16, programs=1),
    Blocks(64, 64, 32, 16, programs=8),
    Blocks(32, 32, 16, 32),
    Blocks(16, 64, 32, 16, splits=1, programs=1),
    Blocks(32, 16, 16, 16, splits=3),
    Blocks(64, 32, 64, 32, splits=8, programs=2),  # more splits than blocks of inputs
]


@kernels_run
@pytest.mark.parametrize("blocks", VARIETY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_cut_of_a_low_rank_delta_is_right(blocks: Blocks, dtype: torch.dtype) -> None:
    slots = torch.cat([draw_slots("zipf", 30, 3, torch.Generator().manual_seed(3)), torch.full((66,), 2)])
    case = Case(slots, 3, rank=40, inputs=70, outputs=(65, 40, 17), dtype=dtype, columns=130)
    expected = case.expected(4, 0.5)
    groups = case.groups
    launch_delta(case.y, case.x, case.a, case.b, groups.order, groups.tiles, 4, 0.5, blocks=blocks)
    torch.testing.assert_close(case.y, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@kernels_run
@pytest.mark.parametrize("blocks", VARIETY, ids=str)
def test_any_cut_of_a_residual_delta_is_right(blocks: Blocks) -> None:
    slots = torch.cat([draw_slots("uniform", 30, 3, torch.Generator().manual_seed(4)), torch.full((66,), 2)])
    rank = 40 if blocks.splits else blocks.r
    hidden, residual, a, b, c = arguments(slots, 3, rank, features=70)
    expected = residual_delta_reference(hidden, residual, a, b, c, slots)
    groups = grouped(slots, 3, rank)
    launch_delta(hidden, hidden, [a], [b], groups.order, groups.tiles, addend=residual, c=c, blocks=blocks)
    torch.testing.assert_close(hidden, expected, rtol=2e-5, atol=2e-5)


@kernels_run
@pytest.mark.parametrize(("residual", "gain"), [(False, 2.0), (True, 2.0), (False, 1.01)])
def test_tuning_keeps_the_fastest_that_is_right(residual: bool, gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(32, 32, 1, 16, 70, residual)
    rule = by_rule(work, 2)
    wrong, fast, slow = replace(rule, n=16), replace(rule, n=32), replace(rule, m=16)
    times = {wrong: 0.1, fast: 1.0, slow: 3.0, rule: gain}
    launched: list[Blocks] = []

    def launch(*given: Any, blocks: Blocks, **more: Any) -> None:
        launched.append(blocks)
        launch_delta(*given, blocks=blocks, **more)
        if blocks == wrong:
            given[0].add_(1.0)

    def seconds(run: Any) -> float:
        run()
        return times[launched[-1]]

    monkeypatch.setattr(tune, "candidates", lambda *_: [rule, wrong, fast, slow])
    monkeypatch.setattr(tune, "launch_delta", launch)
    row = tune.tune(32, (32,), 16, 70, residual, DEVICE, seconds, nullcontext())
    best = fast if gain == 2.0 else rule
    assert row == {"work": work, "blocks": best, "us": 2e6 * times[best], "rule_us": 2e6 * gain}  # of two mixes

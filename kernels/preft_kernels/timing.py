"""Times work on a GPU by CUDA events. For benchmarks and tuning; launches nothing of its own but a wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WAIT_CYCLES = 5_000_000  # some 3 ms: the GPU waits until the host has queued what is timed


def seconds_on_gpu(run: Callable[[], Any], runs: int) -> float:
    """Of one of `runs` runs, back to back. What the host takes to launch them doesn't count, unless it is far more."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(WAIT_CYCLES)
    begin.record()
    for _ in range(runs):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / runs

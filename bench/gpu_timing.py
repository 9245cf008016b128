"""Times work on a GPU with CUDA events, for benchmarks and tuning. Its only own launch is a wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WAIT_CYCLES = 5_000_000  # about 3 ms, in which the host queues the timed work


def seconds_on_gpu(run: Callable[[], Any], runs: int) -> float:
    """Seconds of one of `runs` consecutive runs. The host's launch time doesn't count, unless it is far longer."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(WAIT_CYCLES)
    begin.record()
    for _ in range(runs):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / runs

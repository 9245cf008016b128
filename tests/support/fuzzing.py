"""How many damaged inputs each surface gets, and the check that they leave nothing behind.

`make test` gives each surface a small share of its inputs, `make test-long` all of them. The inputs of a surface are
the same in every run.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest

SURFACES = {  # inputs in `make test-long`
    "worker rpcs": 2600,
    "KV transfer": 1200,
    "archives": 1200,
    "safetensors headers": 1000,
    "adapter folders": 800,
    "YAML settings": 1200,
    "public gRPC": 900,
    "HTTP bodies": 1650,
    "HTTP requests": 300,
}
QUICK = 20  # `make test` gives one input of so many
SETTLE_SECONDS = 20.0

INPUTS: Counter[str] = Counter()  # of this run, by surface
TAKEN: Counter[str] = Counter()  # those of them that weren't refused

share = pytest.mark.parametrize(
    "whole", [pytest.param(False, id="quick"), pytest.param(True, id="whole", marks=pytest.mark.long)]
)


class Inputs:
    """The inputs of one part of a surface's share."""

    def __init__(self, surface: str, whole: bool, *, parts: int = 1, part: int = 0) -> None:
        self._surface, self._part = surface, part
        self._count = -(-SURFACES[surface] // parts // (1 if whole else QUICK))

    def __iter__(self) -> Iterator[random.Random]:
        for number in range(self._count):
            INPUTS[self._surface] += 1
            yield random.Random(f"{self._surface} {self._part} {number}")

    def took(self) -> None:
        """The last input wasn't refused."""
        TAKEN[self._surface] += 1


@contextmanager
def told(content: object) -> Iterator[None]:
    """Adds the input to an error's notes."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"the input: {content!r:.2000}")
        raise


def open_files() -> int:
    """Descriptors of this process."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def no_file_left_open() -> Iterator[None]:
    before = open_files()
    yield
    assert open_files() <= before


@asynccontextmanager
async def nothing_left(used: Callable[[], Any] = lambda: 0) -> AsyncIterator[None]:
    """Waits after the context until tasks, descriptors and `used` are as before. Raises AssertionError if they stay."""

    def held() -> tuple[int, int, Any]:
        return len(asyncio.all_tasks()), open_files(), used()

    before = held()
    yield
    end = time.monotonic() + SETTLE_SECONDS
    while (now := held()) != before and not (now[:2] <= before[:2] and now[2] == before[2]):
        assert time.monotonic() < end, f"tasks, descriptors and memory before: {before}, after: {now}"
        await asyncio.sleep(0.05)

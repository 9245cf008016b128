"""Live progress on stderr, with tqdm."""

from __future__ import annotations

import time
from typing import NoReturn

from tqdm import tqdm

from preft_loadgen.measure.record import Record


def progress(label: str, total: int, *, force: bool = False) -> tqdm[NoReturn]:
    """A bar on stderr for a `with` block, if stderr is a terminal. With `force` always, and the full bar stays."""
    return tqdm(desc=label, total=total, leave=force, disable=False if force else None)


class Live:
    """Shows on a bar how many requests ended, output tokens per second so far, and failures."""

    def __init__(self, bar: tqdm[NoReturn]) -> None:
        self._bar = bar
        self._tokens = self._failed = 0
        self._started = time.monotonic()

    def __call__(self, record: Record) -> None:
        self._tokens += record.tokens
        self._failed += record.error is not None
        speed = self._tokens / max(1e-9, time.monotonic() - self._started)
        failures = f", {self._failed} failed" if self._failed else ""
        self._bar.set_postfix_str(f"{speed:.0f} tokens/s{failures}", refresh=False)
        self._bar.update()

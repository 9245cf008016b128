"""Progress bars on stderr, for people alone: where stderr isn't a terminal there are none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Tell = Callable[[int, int | None], None]
"""Told how much is done in all, and of how much if that is known."""


@contextmanager
def progress_bar(title: str, unit: str) -> Iterator[Tell]:
    """A bar that is gone when the context is left. Unit "B" counts in KiB, MiB and so on."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from tqdm import tqdm

    scale = {"unit_scale": True, "unit_divisor": 1024} if unit == "B" else {}
    with tqdm(desc=title, unit=unit, leave=False, file=sys.stderr, **scale) as bar:

        def tell(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if done == total:  # what comes after may take a while
                bar.refresh()

        yield tell

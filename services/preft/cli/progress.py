"""Progress bars on stderr. If stderr isn't a terminal, there are no bars."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Tell = Callable[[int, int | None], None]
"""Receives the amount done so far, and the total if it is known."""


@contextmanager
def progress_bar(title: str, unit: str) -> Iterator[Tell]:
    """A bar that disappears at the end of the context. Unit "B" counts in KiB, MiB and so on."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from tqdm import tqdm

    scale = {"unit_scale": True, "unit_divisor": 1024} if unit == "B" else {}
    with tqdm(desc=title, unit=unit, leave=False, file=sys.stderr, **scale) as bar:

        def tell(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if done == total:  # the next step may take a while
                bar.refresh()

        yield tell

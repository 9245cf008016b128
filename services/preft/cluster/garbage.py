"""Python's garbage collector in a gateway: it searches the objects that live long as seldom as it can.

The router's view of 100,000 adapters has 100,000 containers. One full collection over them stops the event loop for
tens of milliseconds. Reference counts free nearly all objects of a request without the collector.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

THRESHOLDS = (10_000, 20, 1_000)  # new containers per collection, and collections of one generation per next older one


@contextmanager
def rare_full_collections() -> Iterator[None]:
    """Sets aside the objects that exist already, and makes full collections rare, until the context ends."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()

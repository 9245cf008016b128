"""Which worker has computed which beginnings of prompts lately, so that an engine's prefix cache is used again.

The index holds hashes of prompts' beginnings under one adapter, at lengths that double, so a long prompt has few
entries. It is a guess: an engine may have dropped the KV, and then computes it again.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b

SHORTEST = 64  # tokens of the shortest beginning
LONGEST = 16_384
ENTRIES = 65_536  # beginnings that are remembered, of all workers
WORKERS = 8  # remembered per beginning: the latest


def beginnings(seed: str, prompt: Sequence[int]) -> tuple[bytes, ...]:
    """Hashes of the prompt's beginnings of 64, 128, ... tokens, shortest first.

    `seed` is what must be equal beside the tokens: the adapter's digest and the request's salt.
    """
    hashes = []
    state, done, length = blake2b(seed.encode(), digest_size=16), 0, SHORTEST
    while length <= min(len(prompt), LONGEST):
        state.update(array("I", prompt[done:length]).tobytes())
        hashes.append(state.copy().digest())
        done, length = length, 2 * length
    return tuple(hashes)


class PrefixIndex:
    """The latest ENTRIES beginnings, each with the workers that computed it."""

    def __init__(self) -> None:
        self._workers: OrderedDict[bytes, OrderedDict[str, None]] = OrderedDict()

    def add(self, hashes: Sequence[bytes], worker_id: str) -> None:
        """Notes that the worker computes a prompt with these beginnings."""
        for beginning in hashes:
            workers = self._workers.setdefault(beginning, OrderedDict())
            workers[worker_id] = None
            workers.move_to_end(worker_id)
            if len(workers) > WORKERS:
                workers.popitem(last=False)
            self._workers.move_to_end(beginning)
        while len(self._workers) > ENTRIES:
            self._workers.popitem(last=False)

    def known(self, hashes: Sequence[bytes]) -> Mapping[str, int]:
        """Worker ids, with how many of these beginnings each has computed: the more, the longer the common prefix."""
        depths: dict[str, int] = {}
        for depth, beginning in enumerate(hashes, 1):
            workers = self._workers.get(beginning)
            if workers is None:
                break
            depths.update(dict.fromkeys(workers, depth))
        return depths

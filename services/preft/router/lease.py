"""The resources that one attempt holds on its two workers, each released as soon as the attempt no longer needs it.

The lease owns when a part is released; the workers' views do the counting, and the policy decides who gets a lease.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from preft.router.policy import Demand, Pair
from preft.router.worker_view import WorkerView


class Lease:
    """Room for one prefill, KV blocks per choice on the decode worker, and staging memory on both workers.

    Each part is released exactly once.
    """

    def __init__(
        self, pair: Pair, demand: Demand, choices: Iterable[int], on_free: Callable[[WorkerView], None]
    ) -> None:
        """Reserves the room. `on_free` is called with the worker whenever a part is released."""
        self.prefill = pair.prefill
        self.decode = pair.decode
        self._digest = demand.digest
        self._work = demand.work
        self._on_free = on_free
        self._prompting = self._prefilling = True
        self._blocks = {index: demand.blocks(self.decode.worker) for index in choices} if self.decode else {}
        self._staged = demand.staging(self.prefill.worker)
        self._arriving = demand.staging(self.decode.worker) if self.decode else 0
        self._loading = set(self._blocks)  # choices whose prompt's KV the decode engine hasn't loaded yet
        self.prefill.staging.add(self._staged)
        self.prefill.add_prefill(self._digest, self._work)
        if self.decode:
            self.decode.staging.add(self._arriving)
            self.decode.add_sequences(len(self._blocks), sum(self._blocks.values()))

    def room(self, index: int) -> int:
        """Tokens, prompt included, that fit the blocks of choice `index`."""
        return self._blocks.get(index, 0) * self.decode.worker.block_size if self.decode else 0

    def grow(self, index: int) -> int:
        """Counts one more block for choice `index`, as the engine takes one in any case. Returns the new room."""
        if self.decode and index in self._blocks:
            self._blocks[index] += 1
            self.decode.add_sequences(0, 1)
        return self.room(index)

    def prompt_ended(self) -> None:
        """Frees the adapter slot: the prompt is computed."""
        if self._prompting:
            self._prompting = False
            self.prefill.drop_prompt(self._digest, self._work)
            self._on_free(self.prefill)

    def prefill_ended(self) -> None:
        """Frees the prefill and its staging memory: the prefill worker has finished the request."""
        self.prompt_ended()
        if self._prefilling:
            self._prefilling = False
            self.prefill.staging.add(-self._staged)
            self.prefill.drop_prefill()
            self._on_free(self.prefill)

    def kv_loaded(self, index: int) -> None:
        """Choice `index` has loaded its KV. After the last choice, the decode worker's copy no longer takes room."""
        self._loading.discard(index)
        if self.decode and not self._loading and self._arriving:
            self.decode.staging.add(-self._arriving)
            self._arriving = 0
            self._on_free(self.decode)

    def choice_ended(self, index: int) -> None:
        """Frees the blocks of choice `index`."""
        if self.decode and index in self._blocks:
            self.decode.add_sequences(-1, -self._blocks.pop(index))
            self.kv_loaded(index)
            self._on_free(self.decode)

    def release(self) -> None:
        self.prefill_ended()
        for index in list(self._blocks):
            self.choice_ended(index)

"""The resources that one attempt holds on its two workers, each released as soon as the attempt no longer needs it.

The lease owns when a part is released; the ledger does the counting, and the policy decides who gets a lease.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from preft.router.ledger import Ledger
from preft.router.policy import Demand, Pair


class Lease:
    """Room for one prefill, KV blocks per choice on the decode worker, and staging memory on both workers.

    Each part is released exactly once.
    """

    def __init__(
        self, pair: Pair, demand: Demand, choices: Iterable[int], ledger: Ledger, on_free: Callable[[], None]
    ) -> None:
        """Reserves the room. `on_free` is called whenever a part is released."""
        self.prefill = pair.prefill
        self.decode = pair.decode
        self._digest = demand.digest
        self._ledger = ledger
        self._on_free = on_free
        self._prompting = self._prefilling = True
        self._blocks = {index: demand.blocks(self.decode) for index in choices} if self.decode else {}
        ledger.add_prefill(self.prefill.id, self._digest)
        self._staged = demand.staging(self.prefill)
        ledger.add_staging(self.prefill.id, self._staged)
        self._arriving = demand.staging(self.decode) if self.decode else 0
        self._loading = set(self._blocks)  # choices whose prompt's KV the decode engine hasn't loaded yet
        if self.decode:
            ledger.add_decode(self.decode.id, sum(self._blocks.values()), len(self._blocks))
            ledger.add_staging(self.decode.id, self._arriving)

    def room(self, index: int) -> int:
        """Tokens, prompt included, that fit the blocks of choice `index`."""
        return self._blocks.get(index, 0) * self.decode.block_size if self.decode else 0

    def grow(self, index: int) -> int:
        """Counts one more block for choice `index`, as the engine takes one in any case. Returns the new room."""
        if self.decode and index in self._blocks:
            self._blocks[index] += 1
            self._ledger.add_decode(self.decode.id, 1, 0)
        return self.room(index)

    def prompt_ended(self) -> None:
        """Frees the adapter slot: the prompt is computed."""
        if self._prompting:
            self._prompting = False
            self._ledger.drop_prompt(self.prefill.id, self._digest)
            self._on_free()

    def prefill_ended(self) -> None:
        """Frees the prefill and its staging memory: the prefill worker has finished the request."""
        self.prompt_ended()
        if self._prefilling:
            self._prefilling = False
            self._ledger.drop_prefill(self.prefill.id)
            self._ledger.drop_staging(self.prefill.id, self._staged)
            self._on_free()

    def kv_loaded(self, index: int) -> None:
        """Choice `index` has loaded its KV. After the last choice, the decode worker's copy no longer takes room."""
        self._loading.discard(index)
        if self.decode and not self._loading and self._arriving:
            self._ledger.drop_staging(self.decode.id, self._arriving)
            self._arriving = 0
            self._on_free()

    def choice_ended(self, index: int) -> None:
        """Frees the blocks of choice `index`."""
        if self.decode and index in self._blocks:
            self._ledger.drop_decode(self.decode.id, self._blocks.pop(index), 1)
            self.kv_loaded(index)
            self._on_free()

    def release(self) -> None:
        self.prefill_ended()
        for index in list(self._blocks):
            self.choice_ended(index)

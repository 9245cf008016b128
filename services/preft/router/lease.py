"""What one attempt holds on its two workers, given back part by part as the parts end."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from preft.router.ledger import Ledger
from preft.router.policy import Demand, Pair


class Lease:
    """Room for one prefill, KV blocks per choice on the decode worker, and staging memory on both.

    Every part is given back exactly once.
    """

    def __init__(
        self, pair: Pair, demand: Demand, choices: Iterable[int], ledger: Ledger, on_free: Callable[[], None]
    ) -> None:
        """Takes the room. `on_free` is called whenever some of it is given back."""
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
        self._loading = set(self._blocks)  # choices whose engine has no copy of the prompt's KV yet
        if self.decode:
            ledger.add_decode(self.decode.id, sum(self._blocks.values()), len(self._blocks))
            ledger.add_staging(self.decode.id, self._arriving)

    def room(self, index: int) -> int:
        """Tokens, prompt included, that fit the blocks of choice `index`."""
        return self._blocks.get(index, 0) * self.decode.block_size if self.decode else 0

    def grow(self, index: int) -> int:
        """One more block for choice `index`, free or not: the engine takes it anyway. Returns the new room."""
        if self.decode and index in self._blocks:
            self._blocks[index] += 1
            self._ledger.add_decode(self.decode.id, 1, 0)
        return self.room(index)

    def prompt_ended(self) -> None:
        """The prompt is computed: its adapter's slot is free for another."""
        if self._prompting:
            self._prompting = False
            self._ledger.drop_prompt(self.prefill.id, self._digest)
            self._on_free()

    def prefill_ended(self) -> None:
        """The prefill worker is done with the request."""
        self.prompt_ended()
        if self._prefilling:
            self._prefilling = False
            self._ledger.drop_prefill(self.prefill.id)
            self._ledger.drop_staging(self.prefill.id, self._staged)
            self._on_free()

    def kv_loaded(self, index: int) -> None:
        """Choice `index` has its prompt's KV in the decode engine: once all have, the copy on its way makes room."""
        self._loading.discard(index)
        if self.decode and not self._loading and self._arriving:
            self._ledger.drop_staging(self.decode.id, self._arriving)
            self._arriving = 0
            self._on_free()

    def choice_ended(self, index: int) -> None:
        """Choice `index` needs no decode worker any more."""
        if self.decode and index in self._blocks:
            self._ledger.drop_decode(self.decode.id, self._blocks.pop(index), 1)
            self.kv_loaded(index)
            self._on_free()

    def release(self) -> None:
        """Gives back whatever is left."""
        self.prefill_ended()
        for index in list(self._blocks):
            self.choice_ended(index)

"""The use of one worker, by caller: prompts that need an adapter slot, prefills, and sequences.

Owns the counts and the rule that the engine never gets more distinct adapters than it has slots, however many routers
send requests. Names of callers and digests are checked elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

from preft.core.errors import WorkerFull

OnPrompts = Callable[[str, str], None]
"""Gets a digest and the caller whose count of prompts with this adapter has changed."""


class Usage:
    """The counts of one worker. Use it inside one asyncio loop."""

    def __init__(self, slots: int) -> None:
        """`slots`: distinct adapters in one engine batch."""
        self._slots = slots
        self._on_prompts: OnPrompts = lambda digest, caller: None
        self._prompts: dict[str, Counter[str]] = {}  # uncomputed prompts with an adapter, by digest and caller
        self._numbers: Counter[str] = Counter()  # of uncomputed prompts, by caller
        self._tokens: Counter[str] = Counter()
        self._prefills: Counter[str] = Counter()
        self._sequences: Counter[str] = Counter()

    def observe(self, on_prompts: OnPrompts) -> None:
        """From now on calls `on_prompts` after each change of a count of prompts. There is one observer."""
        self._on_prompts = on_prompts

    @contextmanager
    def prompt(self, caller: str, digest: str, tokens: int) -> Iterator[None]:
        """Counts an uncomputed prompt of `tokens` tokens with this adapter; "" (the base model) needs no slot.

        Raises WorkerFull at once if uncomputed prompts of other adapters take all slots.
        """
        slot = self._slot(caller, digest) if digest else nullcontext()
        with slot, _counted(self._numbers, caller), _counted(self._tokens, caller, tokens):
            yield

    @contextmanager
    def _slot(self, caller: str, digest: str) -> Iterator[None]:
        if digest not in self._prompts and len(self._prompts) >= self._slots:
            raise WorkerFull(f"all {self._slots} adapter slots of the worker are taken")
        self._prompts.setdefault(digest, Counter())[caller] += 1
        self._on_prompts(digest, caller)
        try:
            yield
        finally:
            by_caller = self._prompts[digest]
            _leave(by_caller, caller)
            if not by_caller:
                del self._prompts[digest]
            self._on_prompts(digest, caller)

    @contextmanager
    def prefill(self, caller: str) -> Iterator[None]:
        """Counts a prompt that isn't computed and pushed yet."""
        with _counted(self._prefills, caller):
            yield

    @contextmanager
    def sequence(self, caller: str) -> Iterator[None]:
        """Counts a choice that is being decoded."""
        with _counted(self._sequences, caller):
            yield

    @property
    def running(self) -> int:
        """All prefills and sequences."""
        return self._prefills.total() + self._sequences.total()

    @property
    def prompted(self) -> Iterable[str]:
        """Digests with uncomputed prompts, at most one per slot."""
        return self._prompts.keys()

    def other_prompts(self, caller: str, digest: str) -> int:
        """Uncomputed prompts with this adapter that other callers sent."""
        by_caller = self._prompts.get(digest)
        return by_caller.total() - by_caller[caller] if by_caller else 0

    def other_work(self, caller: str) -> tuple[int, int]:
        """Number and tokens of the uncomputed prompts that other callers sent."""
        return self._numbers.total() - self._numbers[caller], self._tokens.total() - self._tokens[caller]

    def other_sequences(self, caller: str) -> int:
        """Sequences of other callers."""
        return self._sequences.total() - self._sequences[caller]


@contextmanager
def _counted(counts: Counter[str], caller: str, number: int = 1) -> Iterator[None]:
    counts[caller] += number
    try:
        yield
    finally:
        _leave(counts, caller, number)


def _leave(counts: Counter[str], caller: str, number: int = 1) -> None:
    """Keeps no name with a count of zero: routers come and go for as long as the worker lives."""
    counts[caller] -= number
    if not counts[caller]:
        del counts[caller]

"""The adapters of one simulated prefill worker: host memory with least recently used eviction, and loads under way."""

from __future__ import annotations

from asyncio import AbstractEventLoop
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Set

from bench.simulate.scenario import Engine
from preft.core.cluster import AdapterState


class AdapterMemory:
    """At most `parallel_loads` loads run at once, the others wait in order. An adapter in use isn't evicted."""

    def __init__(self, engine: Engine, loop: AbstractEventLoop) -> None:
        self.loads = 0  # begun, in total
        self.users: Counter[str] = Counter()
        self.wanted: dict[str, Set[str]] = {}  # by router
        self._engine = engine
        self._loop = loop
        self._held: OrderedDict[str, None] = OrderedDict()  # most recently used last
        self._loading: dict[str, list[Callable[[], None]]] = {}
        self._waiting: deque[str] = deque()
        self._changed: dict[str, dict[str, None]] = {}  # since the last message, by router
        self._running = 0
        self._gone = False

    def __contains__(self, digest: str) -> bool:
        return digest in self._held

    def fill(self, digest: str) -> None:
        """Puts the adapter in at once, before the run."""
        self._put(digest)

    def use(self, digest: str) -> None:
        """Counts a prompt that needs the adapter, from now until `leave`."""
        self.users[digest] += 1
        if digest in self._held:
            self._held.move_to_end(digest)

    def leave(self, digest: str) -> None:
        self.users[digest] -= 1
        if not self.users[digest]:
            del self.users[digest]
        if digest in self._held:
            self._held.move_to_end(digest)

    def load(self, digest: str, on_end: Callable[[], None]) -> None:
        """Loads the adapter unless it is there, and calls `on_end` then."""
        if digest in self._held:
            self._loop.call_soon(on_end)
        elif digest in self._loading:
            self._loading[digest].append(on_end)
        else:
            self.loads += 1
            self._loading[digest] = [on_end]
            self.changed(digest)
            self._waiting.append(digest)
            self._begin()

    def changed(self, digest: str, by: str | None = None) -> None:
        """Notes a change, for all routers but `by`."""
        for router, changed in self._changed.items():
            if router != by:
                changed[digest] = None

    def has_news(self, router: str) -> bool:
        """Whether `changes` has any adapter for the router."""
        return bool(self._changed[router])

    def changes(self, router: str, *, whole: bool) -> list[str]:
        """Adapters that changed since the router's last call, or all adapters."""
        changed = {**self._held, **dict.fromkeys(self._loading)} if whole else self._changed[router]
        self._changed[router] = {}
        return list(changed)

    def close(self) -> None:
        """The worker is gone: nothing ends any more."""
        self._gone = True

    def state(self, digest: str) -> AdapterState | None:
        if digest in self._held:
            return AdapterState.HOST
        return AdapterState.LOADING if digest in self._loading else None

    def _begin(self) -> None:
        while self._waiting and self._running < self._engine.parallel_loads:
            self._running += 1
            self._loop.call_later(self._engine.load_seconds, self._end, self._waiting.popleft())

    def _end(self, digest: str) -> None:
        if self._gone:
            return
        self._running -= 1
        self._put(digest)
        for on_end in self._loading.pop(digest):
            on_end()
        self._begin()

    def _put(self, digest: str) -> None:
        self._held[digest] = None
        self.changed(digest)
        if len(self._held) > self._engine.host_adapters:
            unused = [one for one in self._held if one not in self.users and one != digest]
            wanted = frozenset().union(*self.wanted.values())
            out = next((one for one in unused if one not in wanted), unused[0] if unused else None)
            if out is not None:
                del self._held[out]
                self.changed(out)

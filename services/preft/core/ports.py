"""The interfaces between the parts: who generates tokens, who knows adapters, who remembers the cluster.

Implementations live elsewhere; each port has one contract test that runs over all of them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from preft.core.cluster import Adapter, AdapterPlace, Worker
from preft.core.request import AdapterRef, GenerateRequest, TokenDelta


class Generation(Protocol):
    """The running choices of one request. Iterate to get deltas of all choices as they come.

    Iteration ends after every choice has had its `finish_reason` or was stopped. It raises a PreftError if the
    request fails; then no more deltas come.
    """

    def __aiter__(self) -> AsyncIterator[TokenDelta]: ...

    def stop(self, index: int) -> None:
        """No more tokens of choice `index` are wanted (a stop string was met). Its work is cancelled at once."""


class Generator(Protocol):
    """Turns requests into tokens: the router, or a fake."""

    def generate(self, request: GenerateRequest) -> AbstractAsyncContextManager[Generation]:
        """Starts `request`. Leaving the context cancels whatever still runs, on every worker.

        Entering raises QueueFull, Unavailable or InvalidRequest at once where that is known at once.
        """

    def ready(self) -> bool:
        """Whether a request would be served now: at least one ready worker of each role that fit together."""


Progress = Callable[[int, int | None], None]
"""Told, from any thread, how many bytes of an adapter have come, and of how many if that is known."""


class AdapterCatalog(Protocol):
    """Names and the adapter versions they point to. `get` and `list` never wait: they read a watched copy.

    Both raise Unavailable once the copy hasn't been brought up to date for too long.
    """

    def get(self, name: str) -> Adapter | None: ...

    def list(self) -> Sequence[Adapter]:
        """All entries, by name. The same object until something changes."""

    async def add(self, name: str, source: str, *, replace: bool = False, progress: Progress | None = None) -> Adapter:
        """Fetches and checks what `source` (a URI or local path) holds, and points `name` to it.

        Idempotent for equal content. Raises InvalidAdapter (broken, doesn't fit, name is the base model's),
        SourceNotFound, Unavailable (the source or the disk fails), AdapterExists (other content and not `replace`), or
        InvalidRequest (the name is pinned and there is no room for its new content).
        """

    async def add_archive(self, name: str, archive: Path, *, replace: bool = False) -> Adapter:
        """Like `add`, with the content of a tar or zip file, which is kept as the adapter's source."""

    async def pin(self, name: str, pinned: bool) -> Adapter:
        """Keeps the adapter in the host memory of every prefill worker, or no longer. Raises ModelNotFound.

        Raises InvalidRequest if there isn't room for it beside the other pinned ones.
        """

    async def remove(self, name: str) -> Adapter:
        """Forgets `name`; running requests finish on their version. Raises ModelNotFound."""


class AdapterPlaces(Protocol):
    """Who has an adapter where."""

    async def places(self, adapter: AdapterRef) -> Sequence[AdapterPlace]:
        """One entry per worker that runs adapters and answers, by worker id."""


@dataclass(frozen=True, slots=True)
class AdapterChanges:
    """The catalog's revision, which each change raises, and the entries put and names removed to get there."""

    revision: int
    put: tuple[Adapter, ...]
    removed: tuple[str, ...]


class StateStore(Protocol):
    """The cluster's memory: workers (with heartbeats) and the adapter catalog. Never on the per-request path."""

    async def put_worker(self, worker: Worker) -> None:
        """Registers `worker`, or refreshes it."""

    async def remove_worker(self, worker_id: str) -> None:
        """Forgets a worker; unknown ids are fine."""

    async def workers(self) -> list[Worker]:
        """All registered workers, by id, dead ones included until removed."""

    async def put_adapter(self, adapter: Adapter, *, expect: Adapter | None) -> bool:
        """Points `adapter.name` to this version if its entry is `expect` now (None: there is none); False if not."""

    async def delete_adapter(self, name: str) -> Adapter | None:
        """Removes a name; returns its entry, None if there was none."""

    async def adapter(self, name: str) -> Adapter | None:
        """The entry as it is now."""

    async def adapter_changes(self, since: int) -> AdapterChanges:
        """What changed in the catalog after revision `since`; all of it if that is 0."""

    async def close(self) -> None: ...

"""The ports between packages: token generation, the adapter catalog, the cluster's state.

Implementations live elsewhere. Each port has one contract test that runs over all implementations.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from preft.core.cluster import Adapter, Worker
from preft.core.request import GenerateRequest, TokenDelta


class Generation(Protocol):
    """The running choices of one request. Iterating gives the deltas of all choices as they arrive.

    Iteration ends after every choice has had its `finish_reason` or was stopped. If the request fails, iteration raises
    a PreftError and gives no more deltas.
    """

    def __aiter__(self) -> AsyncIterator[TokenDelta]: ...

    def stop(self, index: int) -> None:
        """Cancels the work of choice `index` at once, for example after a stop string."""


class Generator(Protocol):
    """Turns requests into tokens: the router, or a fake."""

    def generate(self, request: GenerateRequest) -> AbstractAsyncContextManager[Generation]:
        """Starts `request`. Leaving the context cancels all work that still runs, on every worker.

        Entering raises QueueFull, Unavailable or InvalidRequest if the reason is already known.
        """

    def ready(self) -> bool:
        """Whether a request would be served now: every role has a ready worker, and these workers match."""


Progress = Callable[[int, int | None], None]
"""Receives, from any thread, the bytes of an adapter that have arrived, and the total if it is known."""


class AdapterCatalog(Protocol):
    """Names and their adapter versions. `get` and `list` never wait: they read a copy that follows the store.

    Both raise Unavailable if the copy hasn't been refreshed for too long.
    """

    def get(self, name: str) -> Adapter | None: ...

    def list(self) -> Sequence[Adapter]:
        """All entries, by name. The same object until an entry changes."""

    async def add(
        self,
        name: str,
        source: str,
        *,
        replace: bool = False,
        progress: Progress | None = None,
        tenant_bytes: int | None = None,
    ) -> Adapter:
        """Fetches and checks the adapter at `source` (a URI or local path), and points `name` to it.

        Idempotent for equal content. Raises InvalidAdapter (broken, doesn't fit, the base model's name),
        SourceNotFound, Unavailable (the source or the disk fails), AdapterExists (other content without `replace`),
        InvalidRequest (the name is pinned, and there is no room for the new content), or TooManyBytes (all adapters of
        the name's tenant would have more than `tenant_bytes`).
        """

    async def add_archive(
        self, name: str, archive: Path, *, replace: bool = False, tenant_bytes: int | None = None
    ) -> Adapter:
        """Like `add`, with the content of a tar or zip file. The archive is kept as the adapter's source."""

    async def pin(self, name: str, pinned: bool) -> Adapter:
        """Pins the adapter in the host memory of every prefill worker, or unpins it. Raises ModelNotFound.

        Raises InvalidRequest if the other pinned adapters leave no room for it.
        """

    async def remove(self, name: str) -> Adapter:
        """Forgets `name`; running requests finish on their version. Raises ModelNotFound."""


@dataclass(frozen=True, slots=True)
class AdapterChanges:
    """The catalog's revision, which each change raises, and the changes up to it: entries put and names removed.

    If `is_whole`, `put` is the whole catalog: every other name is removed, unless `epoch` is new to the reader.
    `removed` also has names whose present record this version can't read.

    `epoch` is a random name for the catalog's history. A store that has lost changes which a reader may have seen
    begins another epoch. A reader that gets the whole catalog under another epoch than before knows of entries that the
    store has lost, and should put these entries back.
    """

    revision: int
    put: tuple[Adapter, ...]
    removed: tuple[str, ...] = ()
    is_whole: bool = False
    epoch: str = ""


class StateStore(Protocol):
    """The registrations of workers and the adapter catalog. Never on the per-request path.

    Every method but `wait_changed` and `close` raises Unavailable if the store can't be used or doesn't answer.
    A record that this version can't read is left out of lists, with one warning in the log.
    """

    async def put_worker(self, worker: Worker, lifetime: float) -> None:
        """Registers `worker` for `lifetime` seconds, or replaces its registration. A worker renews it in time."""

    async def remove_worker(self, worker_id: str) -> None:
        """Removes a registration; unknown ids are ignored."""

    async def workers(self) -> list[Worker]:
        """All registrations that haven't expired, by id. No wall clocks of two machines are compared."""

    async def put_adapter(self, adapter: Adapter, *, expect: Adapter | None) -> bool:
        """Points `adapter.name` to this version if its entry is `expect` (None: no entry); else returns False."""

    async def delete_adapter(self, name: str) -> Adapter | None:
        """Removes a name; returns its entry, or None if there was none."""

    async def adapter(self, name: str) -> Adapter | None:
        """The current entry."""

    async def adapter_changes(self, since: int) -> AdapterChanges:
        """The changes after revision `since`. The whole catalog if `since` is 0, long ago, or unknown to the store."""

    async def wait_changed(self, timeout: float) -> None:
        """Returns when workers or adapters may have changed since the last call returned, after `timeout` s at most.

        The first call counts from the store's opening. For one task at a time. Never raises: while the store can't be
        reached, it waits for the whole `timeout`.
        """

    async def close(self) -> None:
        """Ends all use of the store. A second call does nothing."""

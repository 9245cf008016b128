"""The interfaces between the parts: who generates tokens, who knows adapters, who remembers the cluster.

Implementations live elsewhere; each port has one contract test that runs over all of them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from preft.core.cluster import Adapter, Worker
from preft.core.request import GenerateRequest, TokenDelta


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


class AdapterCatalog(Protocol):
    """Names and the adapter versions they point to. `get` and `list` never wait: they read a watched copy."""

    def get(self, name: str) -> Adapter | None: ...

    def list(self) -> Sequence[Adapter]: ...

    async def add(self, name: str, source: str, *, replace: bool = False) -> Adapter:
        """Checks the folder `source`, keeps a verified copy and points `name` to it. Idempotent for equal content.

        Raises InvalidAdapter (broken, doesn't fit, name is the base model's) or AdapterExists (other content and not
        `replace`).
        """

    async def remove(self, name: str) -> Adapter:
        """Forgets `name`; running requests finish on their version. Raises ModelNotFound."""


class StateStore(Protocol):
    """The cluster's memory: workers (with heartbeats) and the adapter catalog. Never on the per-request path."""

    async def put_worker(self, worker: Worker) -> None:
        """Registers `worker`, or refreshes it."""

    async def remove_worker(self, worker_id: str) -> None:
        """Forgets a worker; unknown ids are fine."""

    async def workers(self) -> list[Worker]:
        """All registered workers, by id, dead ones included until removed."""

    async def put_adapter(self, adapter: Adapter, *, expect_digest: str | None = None) -> bool:
        """Points `adapter.name` to this version; False if it didn't.

        With `expect_digest`, only if the name holds that digest now ("" = absent).
        """

    async def delete_adapter(self, name: str) -> bool:
        """Removes a name; False if it wasn't there."""

    async def adapters(self) -> list[Adapter]:
        """The whole catalog, by name."""

    async def close(self) -> None: ...

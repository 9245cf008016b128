"""Makes workers load adapters into memory while requests for the adapters wait.

This module owns the calls under way: one per worker and adapter, for any number of waiting requests. The policy chooses
the worker. The queue decides what the end of a load means for its requests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from preft.core.background import Background
from preft.core.cluster import Worker
from preft.core.errors import EngineFailed, PreftError, WorkerLost
from preft.core.request import AdapterRef
from preft.router.channels import WorkerChannels
from preft.router.ledger import Ledger

logger = logging.getLogger(__name__)


class Prefetcher:
    """Use it inside one event loop; `close` cancels all calls."""

    def __init__(
        self,
        channels: WorkerChannels,
        ledger: Ledger,
        timeout: float,
        on_end: Callable[[str, PreftError | None], None],
    ) -> None:
        """`on_end` gets the digest of each ended load, and the error unless the worker was lost.

        The `ledger` records which loads are under way and which have just ended. `timeout` is in seconds.
        """
        self._channels = channels
        self._ledger = ledger
        self._timeout = timeout
        self._on_end = on_end
        self._calls = Background()

    def want(self, worker: Worker, adapter: AdapterRef) -> None:
        """Starts to load `adapter` at `worker`, unless that load is under way."""
        if not self._ledger.loading(worker.id, adapter.digest):
            self._ledger.load_begins(worker.id, adapter.digest)
            self._calls.start(self._load(worker, adapter), f"the load of adapter {adapter.name!r} at {worker.id}")

    async def close(self) -> None:
        """Cancels loads under way."""
        await self._calls.close()

    async def _load(self, worker: Worker, adapter: AdapterRef) -> None:
        error: PreftError | None = None
        done = False
        try:
            await self._channels.prefetch(worker, adapter, self._timeout)
            done = True
        except WorkerLost as lost:
            logger.info("adapter %r isn't loaded at %s: %s", adapter.name, worker.id, lost)
        except PreftError as refused:
            error = refused
        except Exception:
            logger.exception("the load of adapter %r at %s broke", adapter.name, worker.id)
            error = EngineFailed("an internal error ended the adapter's load")
        finally:
            self._ledger.load_ended(worker.id, adapter.digest, done=done)
        self._on_end(adapter.digest, error)

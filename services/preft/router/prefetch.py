"""Has workers bring adapters into memory while the requests that need them still wait.

Owns the calls under way, one per worker and adapter however many requests wait for it. Who should have an adapter is
the policy's choice, and what the calls' ends mean for the queue is the queue's business.
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
    """Use it inside one event loop; `close` ends all calls."""

    def __init__(
        self,
        channels: WorkerChannels,
        ledger: Ledger,
        timeout: float,
        on_end: Callable[[str, PreftError | None], None],
    ) -> None:
        """`on_end` is told, per digest, that a load has ended, and of the error if no other worker need be asked.

        The `ledger` knows which loads are under way and which have ended lately. `timeout` in seconds.
        """
        self._channels = channels
        self._ledger = ledger
        self._timeout = timeout
        self._on_end = on_end
        self._calls = Background()

    def want(self, worker: Worker, adapter: AdapterRef) -> None:
        """`worker` should have `adapter`."""
        if not self._ledger.loading(worker.id, adapter.digest):
            self._ledger.load_begins(worker.id, adapter.digest)
            self._calls.start(self._load(worker, adapter), f"the load of adapter {adapter.name!r} at {worker.id}")

    async def close(self) -> None:
        """Ends what is under way."""
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

"""Makes workers load adapters into memory while requests for the adapters wait.

This module owns the calls under way: one per worker and adapter, for any number of waiting requests. The policy chooses
the worker. The queue decides what the end of a load means for its requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from preft.core.background import Background
from preft.core.errors import EngineFailed, PreftError, WorkerLost
from preft.core.request import AdapterRef
from preft.router.channels import WorkerChannels
from preft.router.worker_view import WorkerView

logger = logging.getLogger(__name__)


class Prefetcher:
    """Use it inside one event loop; `close` cancels all calls."""

    def __init__(
        self,
        channels: WorkerChannels,
        timeout: float,
        on_end: Callable[[WorkerView, str, PreftError | None], None],
    ) -> None:
        """`on_end` gets the worker and digest of each ended load, and the error unless the worker was lost.

        `timeout` is in seconds.
        """
        self._channels = channels
        self._timeout = timeout
        self._on_end = on_end
        self._calls = Background()

    def want(self, view: WorkerView, adapter: AdapterRef) -> None:
        """Starts to load `adapter` at the worker, unless this router has asked for that already."""
        if adapter.digest not in view.loads:
            view.load_begins(adapter.digest)
            self._calls.start(self._load(view, adapter), f"the load of adapter {adapter.name!r} at {view.id}")

    async def close(self) -> None:
        """Cancels loads under way."""
        await self._calls.close()

    async def _load(self, view: WorkerView, adapter: AdapterRef) -> None:
        error: PreftError | None = None
        done = False
        try:
            await self._channels.prefetch(view.worker, adapter, self._timeout)
            done = True
        except WorkerLost as lost:
            logger.info("adapter %r isn't loaded at %s: %s", adapter.name, view.id, lost)
        except PreftError as refused:
            error = refused
        except Exception:
            logger.exception("the load of adapter %r at %s broke", adapter.name, view.id)
            error = EngineFailed("an internal error ended the adapter's load")
        finally:
            view.load_ended(adapter.digest, asyncio.get_running_loop().time(), done=done)
        self._on_end(view, adapter.digest, error)

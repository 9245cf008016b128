"""Which adapters an engine holds: each verified against its digest before it is brought in, and brought in once."""

from __future__ import annotations

import asyncio
from pathlib import Path

from preft.adapters.digest import adapter_digest
from preft.core.errors import InvalidAdapter
from preft.core.request import AdapterRef
from preft.engine.port import Engine


class ResidentAdapters:
    """The adapters of one engine."""

    def __init__(self, engine: Engine, limit: int) -> None:
        """`limit` is how many the engine keeps: of those used least recently it is taken to have let go."""
        self._engine = engine
        self._limit = limit
        self._adapters: dict[str, AdapterRef] = {}  # verified and in the engine, least recently used first
        self._verifying: dict[str, asyncio.Lock] = {}

    @property
    def digests(self) -> tuple[str, ...]:
        """Digests of the adapters in the engine, most recently used last."""
        return tuple(self._adapters)

    async def ensure(self, adapter: AdapterRef) -> None:
        """Brings the adapter into the engine, once its folder was seen to hold exactly the named content.

        Raises InvalidAdapter if it doesn't, or if the engine refuses it.
        """
        if adapter.digest in self._adapters:
            self._adapters[adapter.digest] = self._adapters.pop(adapter.digest)
            return
        try:
            async with self._verifying.setdefault(adapter.digest, asyncio.Lock()):
                if adapter.digest in self._adapters:
                    return
                actual = await asyncio.to_thread(adapter_digest, Path(adapter.path))
                if actual != adapter.digest:
                    raise InvalidAdapter(
                        f"the stored copy of adapter {adapter.name!r} is not the content it is named for"
                    )
                await self._engine.load_adapter(adapter)
                self._adapters[adapter.digest] = adapter
                while len(self._adapters) > self._limit:
                    del self._adapters[next(iter(self._adapters))]
        finally:
            self._verifying.pop(adapter.digest, None)

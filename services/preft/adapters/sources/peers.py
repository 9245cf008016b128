"""The other processes of the cluster as sources: they have adapters whose folder or upload this machine can't read.

A peer is a gateway that watches this worker, or another worker with adapters. The module owns who the peers are, and
the calls to them. `content_service` answers the calls. The reader checks the content against the digest.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import grpc
import grpc.aio

from preft.adapters.formats.digest import CHUNK
from preft.adapters.sources.limits import SourceLimits
from preft.adapters.sources.remote_files import FoundFile
from preft.adapters.sources.source import AdapterSource
from preft.adapters.sources.waiting import Pace, TooSlow, wait_for
from preft.core.errors import Unavailable
from preft.rpc import adapter_content_pb2
from preft.rpc.adapter_content_pb2_grpc import AdapterContentStub
from preft.rpc.liveness import ping_options
from preft.rpc.secret import ClusterChannel, ClusterSecret
from preft.rpc.status import error_from_rpc

logger = logging.getLogger(__name__)

FIND_SECONDS = 5.0  # a peer's time to say whether it has an adapter
OPTIONS = [("grpc.enable_http_proxy", 0), *ping_options()]


class Peers:
    """Use it inside one asyncio loop."""

    def __init__(
        self, secret: ClusterSecret, limits: SourceLimits, workers: Callable[[], Awaitable[Iterable[str]]]
    ) -> None:
        """`workers` returns the addresses of the other workers with adapters. It may raise Unavailable."""
        self._secret = secret
        self._limits = limits
        self._workers = workers
        self._gateways: Counter[str] = Counter()  # addresses, by their open streams

    @contextmanager
    def gateway(self, address: str) -> Iterator[None]:
        """Within the context, the gateway that serves content at `address` is a peer."""
        self._gateways[address] += 1
        try:
            yield
        finally:
            self._gateways[address] -= 1
            self._gateways = +self._gateways  # without those that are gone

    async def find(self, digest: str, stop: threading.Event) -> AsyncGenerator[AdapterSource, None]:
        """The folders of all peers that may hold the adapter. A peer that doesn't answer has none.

        Once a thread sets `stop`, reading a folder soon ends.
        """
        for address in await self._addresses():
            for source in await self._find_at(address, digest, stop):
                yield source

    async def _addresses(self) -> list[str]:
        """The peers' addresses: gateways first, because one of them has added the adapter."""
        gateways, workers = [*self._gateways], list[str]()
        with suppress(Unavailable):  # the state store; the gateways are known without it
            workers = list(await self._workers())
        random.shuffle(gateways)
        random.shuffle(workers)
        return gateways + workers

    async def _find_at(self, address: str, digest: str, stop: threading.Event) -> list[AdapterSource]:
        connect = partial(ClusterChannel, address, self._secret, OPTIONS)
        try:
            async with connect() as channel:
                request = adapter_content_pb2.FindContent(digest=digest)
                found = await AdapterContentStub(channel).Find(request, timeout=FIND_SECONDS)  # type: ignore[no-untyped-call]
        except grpc.aio.AioRpcError as error:
            logger.info("adapter %s isn't at %s: %s", digest, address, error_from_rpc(error, address))
            return []
        uri, loop = f"preft://{address}/{digest}", asyncio.get_running_loop()
        folders = [
            _PeerFolder(
                uri, dict(folder.files), partial(_read, connect, address, digest, index), loop, self._limits, stop
            )
            for index, folder in enumerate(found.folders)
            if folder.files
        ]
        return [AdapterSource(uri, folder, stop) for folder in folders]


class _PeerFolder:
    """One folder at a peer, with `files`: bytes by name. `read` reads one file, in `loop`."""

    def __init__(
        self,
        uri: str,
        files: Mapping[str, int],
        read: Callable[[str], AsyncGenerator[bytes, None]],
        loop: asyncio.AbstractEventLoop,
        limits: SourceLimits,
        stop: threading.Event,
    ) -> None:
        self._uri = uri
        self._files = files
        self._read = read
        self._loop = loop
        self._limits = limits
        self._stop = stop

    def find(self, names: Iterable[str]) -> dict[str, FoundFile]:
        """The files among `names`."""
        return {name: FoundFile(self._files[name], True, "") for name in names if name in self._files}

    def names(self) -> set[str]:
        return set(self._files)

    def read(self, name: str) -> Iterator[bytes]:
        """The file's bytes. Raises Unavailable if the peer fails, stalls or is too slow."""
        chunks = self._read(name)
        pace = Pace(self._limits)
        silence = self._limits.timeout + CHUNK / self._limits.min_rate

        async def next_chunk() -> bytes:
            return await anext(chunks, b"")

        def wait_for_chunk() -> bytes:
            return wait_for(next_chunk(), self._loop, self._stop, self._uri, min(silence, pace.left))

        try:
            while chunk := pace.timed(wait_for_chunk):
                yield chunk
        except (TimeoutError, TooSlow):
            raise Unavailable(f"{self._uri} can't be read: its bytes don't come in time") from None
        finally:
            closing = _close(chunks)
            try:
                asyncio.run_coroutine_threadsafe(closing, self._loop)
            except RuntimeError:  # the loop is closed: the process ends
                closing.close()


async def _read(
    connect: Callable[[], ClusterChannel], address: str, digest: str, index: int, file: str
) -> AsyncGenerator[bytes, None]:
    request = adapter_content_pb2.ReadContent(digest=digest, folder=index, file=file)
    async with connect() as channel:
        call: Any = AdapterContentStub(channel).Read(request)  # type: ignore[no-untyped-call]
        try:
            async for message in call:
                yield message.content
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"{file} can't be read from {address}: {error_from_rpc(error, address)}") from error
        finally:
            call.cancel()


async def _close(chunks: AsyncGenerator[bytes, None]) -> None:
    with suppress(RuntimeError):  # a cancelled step still runs, and ends the generator itself
        await chunks.aclose()

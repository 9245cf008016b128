"""Reads an adapter's files from an object store, a web server or a model hub, through fsspec.

The module owns all details of these file systems, and maps their errors to PreftErrors. `source` decides which files
make an adapter. Credentials, endpoints and proxies come from the environment, as the libraries read them. All calls
block.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import fsspec
import fsspec.asyn
from aiohttp import (
    ClientConnectionError,
    ClientHandlerType,
    ClientRequest,
    ClientResponse,
    ClientResponseError,
    ClientSession,
    ClientTimeout,
    TCPConnector,
)
from aiohttp.connector import AddrInfoType

from preft.adapters.formats.digest import CHUNK
from preft.adapters.formats.found_instead import TELLTALES
from preft.adapters.sources.limits import SourceLimits, SourceRules, is_public, rule_error
from preft.adapters.sources.waiting import Pace, TooSlow, wait_for
from preft.core.errors import InvalidAdapter, PreftError, SourceNotFound, Unavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")

BLOCK = 4 << 20  # bytes per request where a file is read in ranges
NOT_THERE = (404, 410)
# Fields in which S3, Google Storage, web servers and the Hugging Face hub report a file's version. A web server's
# Last-Modified is not among them: two versions within one second have the same.
VERSIONED_BY = (
    *("ETag", "LastModified", "VersionId"),
    *("etag", "generation", "md5Hash", "updated"),
    *("Content-MD5", "Digest"),
    *("blob_id", "lfs", "xet_hash", "mtime"),
)


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file of a source. `mark` changes when the file is rewritten. An unknown size is None, an unknown mark ""."""

    size: int | None
    regular: bool
    mark: str


class RemoteFolder:
    """The folder at `uri`, within `limits`. Once `stop` is set, waits end with Unavailable.

    Calls to Google Storage and to the hub run in their own libraries, and can't be stopped half-way.
    """

    def __init__(self, scheme: str, uri: str, limits: SourceLimits, stop: threading.Event) -> None:
        self._scheme = scheme
        self._uri = uri
        self._timeout = limits.timeout
        self._limits = limits
        self._stop = stop

    def find(self, names: Iterable[str]) -> dict[str, FoundFile]:
        """The files among `names` that exist. Raises SourceNotFound for a missing folder, Unavailable if reads fail."""
        with self._errors(SourceNotFound(f"there is no folder {self._uri}")):
            files = self._filesystem()
            if self._scheme in ("http", "https"):
                infos = self._wait(files, self._ask_for(files, tuple(names)), self._timeout)
            else:
                entries = self._entries(files)
                infos = {name: entries[name] for name in names if name in entries}
            return {name: _found(info) for name, info in infos.items()}

    def names(self) -> set[str]:
        """Names in the folder; subfolders end in a slash. For web servers, which list none: existing TELLTALES."""
        if self._scheme in ("http", "https"):
            return set(self.find(TELLTALES))
        with self._errors(SourceNotFound(f"there is no folder {self._uri}")):
            entries = self._entries(self._filesystem())
            return {name + "/" * (entry["type"] == "directory") for name, entry in entries.items()}

    def read(self, name: str) -> Iterator[bytes]:
        """The file's bytes. Raises InvalidAdapter if it is missing, and Unavailable if the bytes don't come in time."""
        with self._errors(InvalidAdapter(f"{name} is missing in {self._uri}")):
            files = self._filesystem()
            path = f"{files._strip_protocol(self._uri)}/{name}"
            pace = Pace(self._limits)
            if self._scheme in ("http", "https", "s3"):
                yield from self._read_stream(files, path, pace)
            else:
                # Block size 0 makes the hub's files a stream; Google's files are read in ranges.
                with files.open(path, "rb", block_size=0 if self._scheme == "hf" else BLOCK) as file:
                    while chunk := pace.timed(lambda: file.read(CHUNK)):
                        yield chunk

    def _filesystem(self) -> Any:
        """A file system for this thread. fsspec caches those that can be shared; none of them caches listings."""
        if self._scheme == "s3":
            # botocore reads these variables itself, but only once per cached file system.
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            limits = {"connect_timeout": self._timeout, "read_timeout": self._timeout}
            return fsspec.filesystem("s3", endpoint_url=endpoint, config_kwargs=limits, use_listings_cache=False)
        if self._scheme == "gs":
            return fsspec.filesystem("gs", requests_timeout=self._timeout, use_listings_cache=False)
        if self._scheme == "hf":
            return fsspec.filesystem("hf", skip_instance_cache=True)
        # A compressed response has no length to check.
        options = {"headers": {"Accept-Encoding": "identity"}, "trust_env": True, "rules": self._limits.rules}
        timeouts = ClientTimeout(connect=self._timeout, sock_connect=self._timeout, sock_read=self._timeout)
        return fsspec.filesystem("http", get_client=_web_session, client_kwargs={**options, "timeout": timeouts})

    def _entries(self, files: Any) -> dict[str, Mapping[str, Any]]:
        root = files._strip_protocol(self._uri)
        if isinstance(files, fsspec.asyn.AsyncFileSystem):  # the time limit includes retries inside the library
            entries = self._wait(files, files._ls(root, detail=True, refresh=True), self._timeout)
        else:
            entries = files.ls(root, detail=True, refresh=True)
        return {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in entries if entry["name"] != root}

    async def _ask_for(self, files: Any, names: tuple[str, ...]) -> dict[str, Mapping[str, Any]]:
        """Requests each file, as web servers list no folders."""
        infos = await asyncio.gather(*(_web_info(files, f"{self._uri}/{name}") for name in names))
        return {name: info for name, info in zip(names, infos, strict=True) if info is not None}

    def _read_stream(self, files: Any, path: str, pace: Pace) -> Iterator[bytes]:
        size = {} if self._scheme == "s3" else {"size": 0}  # spares a request for the file's length
        file = self._wait(files, files.open_async(path, "rb", **size))
        try:
            # The first read includes the request, with retries, so `timeout` bounds the whole call. Later the
            # connection's own timeout bounds silence, and the pace bounds slowness.
            chunk = pace.timed(lambda: self._wait(files, file.read(CHUNK), self._timeout))
            while chunk:
                yield chunk
                chunk = pace.timed(lambda: self._wait(files, _fill(file), pace.left, TooSlow))
        finally:
            asyncio.run_coroutine_threadsafe(_close(file), files.loop)

    def _wait(
        self,
        files: Any,
        work: Coroutine[Any, Any, T],
        timeout: float | None = None,
        late: type[Exception] = TimeoutError,
    ) -> T:
        """Runs `work` in the file system's loop. See `wait_for`."""
        return wait_for(work, files.loop, self._stop, self._uri, timeout, late)

    @contextmanager
    def _errors(self, missing: PreftError) -> Iterator[None]:
        """Raises `missing` for a missing file, and Unavailable for all other errors of the libraries."""
        try:
            yield
        except PreftError:
            raise
        except FileNotFoundError as error:
            raise missing from error
        except Exception as error:
            logger.warning("%s can't be read: %s", self._uri, " ".join(str(error).split()) or type(error).__name__)
            raise Unavailable(f"{self._uri} can't be read: {self._reason(error)}") from error

    def _reason(self, error: Exception) -> str:
        """The reason for the caller. Libraries' messages about files and addresses go to the log alone."""
        if isinstance(error, ClientResponseError):
            return f"the server answered {error.status}"
        if isinstance(error, TooSlow):
            return f"less than {self._limits.min_rate} bytes per second came"
        if isinstance(error, TimeoutError):
            return f"nothing came for {self._timeout:g} seconds"
        if isinstance(error, ClientConnectionError):
            return "the connection failed"
        return f"the library behind {self._scheme}:// failed; the server's log has its words"


# Collects the addresses that a request tried and may not use; None for a request that may use any address.
_not_public: ContextVar[list[str] | None] = ContextVar("not_public", default=None)


async def _web_session(*, rules: SourceRules, **options: Any) -> ClientSession:
    """A session that applies `rules` to requests, redirects and connections."""
    if rules.allowed is None:
        return ClientSession(**options)

    async def check(request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
        url, refused = str(request.url), list[str]()
        # A proxy resolves the address itself, so its own rules decide which addresses it reaches.
        _not_public.set(refused if rules.check_uri(url) and request.proxy is None else None)
        try:
            return await handler(request)
        except ClientConnectionError as error:
            raise rule_error(url) if refused else error from None

    # force_close: a reused connection would skip the check of its address.
    connector = TCPConnector(socket_factory=_checked_socket, force_close=True)
    return ClientSession(connector=connector, middlewares=(check,), **options)


def _checked_socket(address: AddrInfoType) -> socket.socket:
    """Opens each connection's socket, after name resolution, so the checked address is the one that is used."""
    family, kind, protocol, _, place = address
    refused = _not_public.get()
    if refused is not None and not is_public(str(place[0])):
        refused.append(str(place[0]))
        raise OSError(f"{place[0]} is not a public address")
    return socket.socket(family, kind, protocol)


async def _web_info(files: Any, url: str) -> Mapping[str, Any] | None:
    try:
        return cast(Mapping[str, Any], await files._info(url))
    except FileNotFoundError as error:  # fsspec raises this for every kind of error
        cause = error.__cause__
        if cause is None or (isinstance(cause, ClientResponseError) and cause.status in NOT_THERE):
            return None
        raise cause from None


async def _fill(file: Any) -> bytes:
    """The next CHUNK bytes; fewer at the end. Network reads are too small for one thread switch each."""
    parts: list[bytes] = []
    missing = CHUNK
    while missing and (part := await file.read(missing)):
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


async def _close(file: Any) -> None:
    if file.r is not None:  # the response, which s3fs's streamed files don't close
        file.r.close()
        file.r = None
    await file.close()


def _found(info: Mapping[str, Any]) -> FoundFile:
    versions = [f"{key}={info[key]}" for key in VERSIONED_BY if info.get(key)]
    size = info.get("size")
    return FoundFile(size, info["type"] == "file", " ".join([f"size={size}", *versions]) if versions else "")

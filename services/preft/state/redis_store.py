"""The state store in Redis, for a cluster of many machines: one server, or a server that Sentinels name.

The store owns the connections and the meaning of keys. `redis_scripts` owns the keys' layout, `redis_url` the client,
`redis_changes` the news of changes, `records` the records' format.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Awaitable
from typing import Any, TypeVar

from redis.exceptions import AuthenticationError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from preft.core.cluster import Adapter, Worker
from preft.core.errors import ConfigError, PreftError, Unavailable
from preft.core.ports import AdapterChanges
from preft.state import redis_scripts as scripts
from preft.state.records import Records
from preft.state.redis_changes import RedisChanges
from preft.state.redis_url import parse_redis_url, redis_client

T = TypeVar("T")

logger = logging.getLogger(__name__)

LIMIT_SECONDS = 2.0  # for one step: a free connection, the connection's start, the command and its reply
CONNECT_SECONDS = 1.0
CONNECTIONS = 8
KEPT_CHANGES = 1000  # a reader that has missed more gets the whole catalog
PAGE_NAMES = 1000  # one script's work and reply stay small, however large the catalog is
CLUSTER = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RedisStore:
    """A StateStore. No call takes much longer than LIMIT_SECONDS, and no error shows a password.

    A write that raises Unavailable may have happened. The catalog's readers find out which.
    """

    def __init__(self, url: str, cluster: str) -> None:
        """Connects at the first call. Raises ConfigError if `url` or the name `cluster` is malformed."""
        if not CLUSTER.fullmatch(cluster):
            raise ConfigError(f"state: {cluster[:80]!r} can't name a cluster in Redis")
        self._url = parse_redis_url(url)
        self._client, self._sentinels = redis_client(self._url, CONNECT_SECONDS, LIMIT_SECONDS)
        self._prefix = f"preft:{{{cluster}}}:"
        self._channel = self._prefix + "changes"
        self._catalog_keys = [self._prefix + key for key in ("catalog", "adapters", "changed", "removed", "history")]
        self._workers_format, self._adapters_format = Records(Worker), Records(Adapter)
        self._put_worker = self._client.register_script(scripts.PUT_WORKER)
        self._remove_worker = self._client.register_script(scripts.REMOVE_WORKER)
        self._forget_expired = self._client.register_script(scripts.FORGET_EXPIRED)
        self._change_adapter = self._client.register_script(scripts.CHANGE_ADAPTER)
        self._adapter_changes = self._client.register_script(scripts.ADAPTER_CHANGES)
        self._changes = RedisChanges(self._client, self._channel, LIMIT_SECONDS)
        self._connections = asyncio.Semaphore(CONNECTIONS)
        self._closed = False

    async def put_worker(self, worker: Worker, lifetime: float) -> None:
        """Adds or replaces the registration of `worker`. Redis removes it after `lifetime` seconds."""
        arguments = [worker.id, self._workers_format.write(worker), max(1, round(lifetime * 1000)), self._channel]
        await self._ask(self._put_worker(self._worker_keys(worker.id), arguments))

    async def remove_worker(self, worker_id: str) -> None:
        """Removes a worker; does nothing for an unknown id."""
        await self._ask(self._remove_worker(self._worker_keys(worker_id), [worker_id, self._channel]))

    async def workers(self) -> list[Worker]:
        """All registrations that haven't expired, by id."""
        ids = sorted(id.decode() for id in await self._ask(self._client.smembers(self._prefix + "workers")))
        keys = [self._worker_keys(id)[0] for id in ids]
        found = dict(zip(ids, await self._ask(self._client.mget(keys)) if ids else [], strict=True))
        expired = [id for id, record in found.items() if record is None]
        if expired:
            gone = [self._worker_keys(id)[0] for id in expired]
            await self._ask(self._forget_expired([self._prefix + "workers", *gone], expired))
        read = (self._workers_format.read(id, record) for id, record in found.items() if record is not None)
        return [worker for worker in read if worker is not None]

    async def put_adapter(self, adapter: Adapter, *, expect: Adapter | None) -> bool:
        """Stores the entry if the name's entry is `expect` (None: no entry). Returns False if it isn't."""
        record = self._adapters_format.write(adapter)
        while True:
            current, text = await self._adapter(adapter.name)
            if current != expect:
                return False
            if await self._change(adapter.name, text, record):
                return True

    async def delete_adapter(self, name: str) -> Adapter | None:
        """Removes a name. Returns its entry, or None if there was none."""
        while True:
            current, text = await self._adapter(name)
            if current is None or await self._change(name, text, ""):
                return current

    async def adapter(self, name: str) -> Adapter | None:
        """The name's present entry, or None."""
        return (await self._adapter(name))[0]

    async def adapter_changes(self, since: int) -> AdapterChanges:
        """The changes after revision `since`, by name. Reads page by page; later pages tell of changes meanwhile."""
        put, removed = dict[str, bytes](), set[str]()
        revision, cursor, is_whole = str(since), str(since), False
        while True:
            arguments = [revision, cursor, PAGE_NAMES, secrets.token_hex(8)]
            page = await self._ask(self._adapter_changes(self._catalog_keys, arguments))
            epoch, revision, begins_whole, names, records, cursor, gone = page
            if begins_whole:
                put, removed, is_whole = {}, set(), True
            revision, cursor, epoch = revision.decode(), cursor.decode(), epoch.decode()
            for name in map(bytes.decode, gone):
                put.pop(name, None)
                removed.add(name)
            put.update(zip(map(bytes.decode, names), records, strict=True))
            if not cursor:
                break
        read = {name: self._adapters_format.read(name, record) for name, record in put.items()}
        removed = set() if is_whole else removed - put.keys()
        removed |= {name for name, adapter in read.items() if adapter is None}
        return AdapterChanges(
            int(revision),
            tuple(adapter for _, adapter in sorted(read.items()) if adapter is not None),
            tuple(sorted(removed)),
            is_whole,
            epoch,
        )

    async def wait_changed(self, timeout: float) -> None:
        """Returns within milliseconds of a change since the last call returned, after `timeout` s at the latest."""
        await self._changes.wait(timeout)

    async def close(self) -> None:
        """Closes all connections. A second call does nothing; any other call after it raises Unavailable."""
        if not self._closed:
            self._closed = True
            await self._changes.close()
            for client in (self._client, *self._sentinels):
                try:
                    await client.aclose()
                except (RedisError, OSError) as error:  # the connection was broken already
                    logger.info("a connection to the state store closed with %s", type(error).__name__)

    def _worker_keys(self, worker_id: str) -> list[str]:
        return [f"{self._prefix}worker:{worker_id}", self._prefix + "workers"]

    async def _adapter(self, name: str) -> tuple[Adapter | None, str]:
        """The name's entry and its record. Raises Unavailable for a record that this version can't read."""
        record = await self._ask(self._client.hget(self._catalog_keys[1], name))
        if record is None:
            return None, ""
        try:
            return self._adapters_format.parse(record), record.decode()
        except ValueError as error:
            raise Unavailable(f"the entry of the adapter {name!r} can't be used: {error}") from None

    async def _change(self, name: str, expected: str, record: str) -> bool:
        """Replaces the record of `name` if it is `expected`. An empty text means no record."""
        random = secrets.randbelow(1 << scripts.RANDOM_BITS)
        arguments = [name, expected, record, secrets.token_hex(8), random, KEPT_CHANGES, self._channel]
        return bool(await self._ask(self._change_adapter(self._catalog_keys, arguments)))

    async def _ask(self, command: Awaitable[Any]) -> Any:
        """The reply. Raises Unavailable, also if there is none within LIMIT_SECONDS."""
        try:
            if self._closed:
                raise Unavailable(f"the state store {self._url.shown} is closed")
            async with asyncio.timeout(LIMIT_SECONDS), self._connections:
                return await command
        except (RedisError, OSError, TimeoutError) as error:
            raise self._failed(error) from None
        finally:
            if hasattr(command, "close"):
                command.close()  # no effect after its end

    def _failed(self, error: Exception) -> PreftError:
        """`error` for the caller. redis-py's text quotes the server, and might quote its own settings."""
        store = f"the state store {self._url.shown}"
        if isinstance(error, TimeoutError | RedisTimeoutError):
            return Unavailable(f"{store} doesn't answer within {LIMIT_SECONDS:g} s")
        if isinstance(error, AuthenticationError):
            return Unavailable(f"{store} refuses the login: check user and password in the setting `state`")
        return Unavailable(f"{store} can't be used: {self._url.without_secrets(str(error) or type(error).__name__)}")

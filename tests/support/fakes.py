"""A Generator, an AdapterCatalog and a StateStore in memory: scripted, failing on demand, recorded."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from preft.core.cluster import Adapter, Worker
from preft.core.errors import (
    AdapterExists,
    InvalidAdapter,
    InvalidRequest,
    ModelNotFound,
    SourceNotFound,
    TooManyBytes,
    Unavailable,
)
from preft.core.names import catalog_name, normal_name, split_name
from preft.core.ports import AdapterChanges, Progress
from preft.core.request import FinishReason, GenerateRequest, PromptLogprobs, TokenDelta, TokenLogprob
from support.prompt_logprobs import made_up


@dataclass(frozen=True, slots=True)
class Script:
    """The answer to one request. Every choice generates `tokens`, `chunk` at a time, `delay` seconds apart.

    `finish` None: "length" if max_tokens cuts the script, else "stop", as if its last token had been an EOS.
    `fail` is raised after `fail_after` tokens of each choice, or on entering if `fail_after` is None.
    """

    tokens: Sequence[int] = ()
    chunk: int = 1
    delay: float = 0.0
    finish: FinishReason | None = None
    stop_token_id: int | None = None
    fail: BaseException | None = None
    fail_after: int | None = None
    cached: int = 0
    finish_apart: bool = False  # the finish reason comes in a separate delta without tokens
    never_finish: bool = False
    logprobs: Sequence[TokenLogprob] | None = None  # one for each of `tokens`, instead of made-up ones


class FakeGeneration:
    """The running choices of one request."""

    def __init__(self, request: GenerateRequest, script: Script) -> None:
        self.stopped: set[int] = set()
        self._request = request
        self._script = script

    def stop(self, index: int) -> None:
        self.stopped.add(index)

    async def __aiter__(self) -> AsyncIterator[TokenDelta]:
        script, request = self._script, self._request
        tokens = list(script.tokens)[: request.sampling.max_tokens]
        cut = len(script.tokens) > len(tokens) or len(tokens) == request.sampling.max_tokens
        finish = script.finish or (FinishReason.LENGTH if cut else FinishReason.STOP)
        for start in range(0, max(1, len(tokens)), script.chunk):
            if script.delay:
                await asyncio.sleep(script.delay)
            if script.fail is not None and script.fail_after is not None and start >= script.fail_after:
                raise script.fail
            ids = tuple(tokens[start : start + script.chunk])
            last = start + script.chunk >= len(tokens)
            for index in range(request.n):
                if index in self.stopped:
                    continue
                end = last and not (script.finish_apart or script.never_finish or script.fail)
                yield TokenDelta(
                    index,
                    ids,
                    self._logprobs(ids, start),
                    finish if end else None,
                    script.stop_token_id if end else None,
                    cached_tokens=script.cached if index == start == 0 else 0,
                    prompt_logprobs=self._prompt_logprobs() if index == start == 0 else None,
                )
        if script.fail is not None and script.fail_after is not None:
            raise script.fail
        for index in range(request.n):
            if script.finish_apart and index not in self.stopped:
                yield TokenDelta(index, (), (), finish, script.stop_token_id)

    def _prompt_logprobs(self) -> PromptLogprobs | None:
        request = self._request
        if request.sampling.prompt_logprobs is None:
            return None
        digest = request.adapter.digest if request.adapter else ""
        return made_up(request.prompt_token_ids, request.sampling.prompt_logprobs, digest)

    def _logprobs(self, token_ids: tuple[int, ...], start: int) -> tuple[TokenLogprob, ...]:
        """-0.5 for the sampled token, as the likeliest; its successors by id follow at -1.0, -1.5, ..."""
        count = self._request.sampling.logprobs
        if count is None:
            return ()
        if self._script.logprobs is not None:
            return tuple(self._script.logprobs[start : start + len(token_ids)])
        return tuple(
            TokenLogprob(token_id, -0.5, 1, tuple((token_id + i, -0.5 * (i + 1)) for i in range(count)))
            for token_id in token_ids
        )


@dataclass
class FakeGenerator:
    """Answers each request with `script(request)`. `entered`, `left` and `cancelled` hold request ids in order."""

    script: Callable[[GenerateRequest], Script]
    is_ready: bool = True
    requests: list[GenerateRequest] = field(default_factory=list)
    generations: list[FakeGeneration] = field(default_factory=list)
    entered: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    def ready(self) -> bool:
        return self.is_ready

    @asynccontextmanager
    async def generate(self, request: GenerateRequest) -> AsyncIterator[FakeGeneration]:
        self.requests.append(request)
        script = self.script(request)
        if script.fail is not None and script.fail_after is None:
            raise script.fail
        generation = FakeGeneration(request, script)
        self.generations.append(generation)
        self.entered.append(request.request_id)
        try:
            yield generation
        except asyncio.CancelledError:
            self.cancelled.append(request.request_id)
            raise
        finally:
            self.left.append(request.request_id)


@dataclass
class FakeCatalog:
    """An AdapterCatalog in memory. A source's own text, or an archive's bytes, is the content; its hash is the digest.

    "broken" in a source or archive is refused, "missing" isn't found, "huge" can't be pinned. Every `add` reports
    `steps` from a thread, waits for `gate` if it is set, and then raises `fail` if it is set.
    """

    base: str = "base"
    steps: Sequence[tuple[int, int | None]] = ()
    gate: asyncio.Event | None = None
    fail: Exception | None = None
    stale: bool = False  # the copy is too old
    adding: int = 0
    cancelled: list[str] = field(default_factory=list)
    archives: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._entries: dict[str, Adapter] = {}
        self._sorted: tuple[Adapter, ...] = ()

    @classmethod
    def of(cls, **sources: str) -> FakeCatalog:
        """A catalog with these adapters."""
        catalog = cls()
        catalog.put(*(_adapter(name, source, source.encode()) for name, source in sources.items()))
        return catalog

    def put(self, *adapters: Adapter) -> None:
        """Adds entries without checks."""
        self._entries.update({adapter.name: adapter for adapter in adapters})
        self._sorted = tuple(adapter for _, adapter in sorted(self._entries.items()))

    def get(self, name: str) -> Adapter | None:
        self._check_age()
        return self._entries.get(normal_name(name))

    def list(self) -> Sequence[Adapter]:
        self._check_age()
        return self._sorted

    def _check_age(self) -> None:
        if self.stale:
            raise Unavailable("the adapter catalog could not be read for 61 seconds")

    async def add(
        self,
        name: str,
        source: str,
        *,
        replace: bool = False,
        progress: Progress | None = None,
        tenant_bytes: int | None = None,
    ) -> Adapter:
        self.adding += 1
        try:
            for step in self.steps if progress else ():
                await asyncio.to_thread(progress, *step)
            if self.gate is not None:
                await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise
        finally:
            self.adding -= 1
        if "missing" in source:
            raise SourceNotFound(f"nothing is at {source}")
        return self._point(name, source, source.encode(), replace, tenant_bytes)

    async def add_archive(
        self, name: str, archive: Path, *, replace: bool = False, tenant_bytes: int | None = None
    ) -> Adapter:
        content = await asyncio.to_thread(archive.read_bytes)
        adapter = self._point(name, f"store:{name}", content, replace, tenant_bytes)
        self.archives[name] = content
        return adapter

    async def pin(self, name: str, pinned: bool) -> Adapter:
        adapter = self._known(name)
        if pinned and "huge" in adapter.source:
            raise InvalidRequest(f"there is no room to pin {name!r}: unpin another adapter first", "pinned")
        self.put(dataclasses.replace(adapter, pinned=pinned))
        return self._entries[name]

    async def remove(self, name: str) -> Adapter:
        adapter = self._known(name)
        del self._entries[name]
        self.put()
        return adapter

    def _point(self, name: str, source: str, content: bytes, replace: bool, tenant_bytes: int | None) -> Adapter:
        if self.fail is not None:
            raise self.fail
        name = catalog_name(name)
        tenant, own = split_name(name)
        if own == self.base:
            raise InvalidAdapter(f"{name!r} is the base model's name", "name")
        if b"broken" in content:
            raise InvalidAdapter(f"{source} has no adapter_model.safetensors")
        new = _adapter(name, source, content)
        old = self._entries.get(name)
        if old is not None and old.digest == new.digest:
            return old
        if old is not None:
            if not replace:
                raise AdapterExists(f"{name!r} is another adapter already")
            new = dataclasses.replace(new, version=old.version + 1, pinned=old.pinned)
        others = sum(one.size for one in self._sorted if one.name != name and split_name(one.name)[0] == tenant)
        if tenant_bytes is not None and new.size + others > tenant_bytes:
            raise TooManyBytes(f"the adapters of {tenant!r} would have more than {tenant_bytes} bytes")
        self.put(new)
        return new

    def _known(self, name: str) -> Adapter:
        if name not in self._entries:
            raise ModelNotFound(f"there is no adapter {name!r}")
        return self._entries[name]


def _adapter(name: str, source: str, content: bytes) -> Adapter:
    digest = hashlib.sha256(content).hexdigest()
    return Adapter(name, digest, source, rank=8, created=time.time(), size=len(content), warnings=("it is fake",))


@dataclass
class FakeStore:
    """A StateStore in memory. While `failing` is set, writes raise it."""

    failing: Exception | None = None
    renewals: list[tuple[Worker, float]] = field(default_factory=list)  # all calls of `put_worker` that succeeded
    closed: bool = False

    def __post_init__(self) -> None:
        self._workers: dict[str, tuple[Worker, float]] = {}  # and the time of their end
        self._adapters: dict[str, tuple[int, Adapter | None]] = {}  # and the revision of their last change
        self._revision = 0
        self._heard = self._version = 0
        self._changed = asyncio.Condition()

    def lose_workers(self) -> None:
        """Does what an emptied Redis does."""
        self._workers.clear()

    async def put_worker(self, worker: Worker, lifetime: float) -> None:
        self._check()
        self.renewals.append((worker, lifetime))
        self._workers[worker.id] = (worker, time.monotonic() + lifetime)
        await self._tell()

    async def remove_worker(self, worker_id: str) -> None:
        self._check()
        self._workers.pop(worker_id, None)
        await self._tell()

    async def workers(self) -> list[Worker]:
        now = time.monotonic()
        return [worker for _, (worker, end) in sorted(self._workers.items()) if end > now]

    async def put_adapter(self, adapter: Adapter, *, expect: Adapter | None) -> bool:
        self._check()
        if await self.adapter(adapter.name) != expect:
            return False
        await self._set(adapter.name, adapter)
        return True

    async def delete_adapter(self, name: str) -> Adapter | None:
        self._check()
        adapter = await self.adapter(name)
        if adapter is not None:
            await self._set(name, None)
        return adapter

    async def adapter(self, name: str) -> Adapter | None:
        return self._adapters.get(name, (0, None))[1]

    async def adapter_changes(self, since: int) -> AdapterChanges:
        changed = {name: entry for name, (at, entry) in sorted(self._adapters.items()) if at > since}
        put = tuple(entry for entry in changed.values() if entry is not None)
        removed = tuple(name for name, entry in changed.items() if entry is None)
        return AdapterChanges(self._revision, put, () if since == 0 else removed, is_whole=since == 0)

    async def wait_changed(self, timeout: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout), self._changed:
                await self._changed.wait_for(lambda: self._version > self._heard)
        self._heard = self._version

    async def close(self) -> None:
        self.closed = True

    def _check(self) -> None:
        if self.failing is not None:
            raise self.failing

    async def _set(self, name: str, adapter: Adapter | None) -> None:
        self._revision += 1
        self._adapters[name] = (self._revision, adapter)
        await self._tell()

    async def _tell(self) -> None:
        self._version += 1
        async with self._changed:
            self._changed.notify_all()

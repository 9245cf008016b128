"""Prefill and decode workers without an engine: real gRPC servers in this process, with predictable tokens.

A token depends on prompt, adapter, choice and position. A stream joined from several attempts equals an undisturbed
stream exactly if no token was lost, repeated or mixed up. `faults` lists hold one fault per call; counters record the
router's actions. A worker's status stream (`fake_status`) tells the truth about the worker, unless a test has called
`tell`.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from zlib import crc32

import grpc.aio

from preft.core.cluster import AdapterPlace, AdapterState, Role, Tier, Worker, WorkerState
from preft.core.errors import InvalidRequest, PreftError, TransferFailed, WorkerFull
from preft.core.request import AdapterRef, FinishReason, GenerateRequest, Sampling, TokenDelta
from preft.decode.session import DecodeSession, Put, Serve
from preft.rpc import common_pb2, workers_pb2, workers_pb2_grpc
from preft.rpc.caller import caller_of
from preft.rpc.convert import delta_to_proto, place_to_proto
from preft.rpc.liveness import ACCEPT_PINGS
from preft.rpc.status import abort
from preft.worker.usage import Usage
from support.fake_status import FakeStatusService

EOS = 7
POLL_SECONDS = 0.02  # between two looks of a router at the registry
ADAPTER_SLOTS = 64  # of workers that run adapters, unless a test says otherwise


def token_at(prompt: Iterable[int], digest: str, index: int, position: int) -> int:
    """The token of choice `index` at `position` (0 is the first output token)."""
    return 1000 + crc32(repr((list(prompt), digest, index, position)).encode()) % 30000


def foretold(request: GenerateRequest, ends: dict[int, int] | None = None) -> dict[int, list[int]]:
    """The predicted tokens of every choice. `ends` maps a choice to its position of EOS."""
    digest = request.adapter.digest if request.adapter else ""
    streams = {}
    for index in range(request.n):
        end = (ends or {}).get(index, request.sampling.max_tokens)
        count = min(end, request.sampling.max_tokens)
        tokens = [token_at(request.prompt_token_ids, digest, index, position) for position in range(count)]
        streams[index] = [*tokens, EOS] if end < request.sampling.max_tokens else tokens
    return streams


def digest_of(name: str) -> str:
    """The digest of the adapter of this name."""
    return hashlib.sha256(name.encode()).hexdigest()


def a_ref(name: str) -> AdapterRef:
    """The adapter of this name."""
    return AdapterRef(name, digest_of(name), f"/adapters/{name}")


def a_request(
    max_tokens: int = 6,
    n: int = 1,
    prompt: Iterable[int] = range(20),
    adapter: str | None = "ada",
    deadline: float | None = None,
) -> GenerateRequest:
    """A request under the adapter of this name, whose digest is `digest_of(adapter)`."""
    reference = a_ref(adapter) if adapter else None
    return GenerateRequest("r", tuple(prompt), Sampling(max_tokens=max_tokens), reference, n, deadline)


@dataclass
class Fault:
    """An error or a long sleep, after `after` tokens (decode) or before everything (prefill)."""

    error: PreftError | None = None
    after: int = 0
    seconds: float = 3600.0

    async def strike(self) -> None:
        if self.error is not None:
            raise self.error
        await asyncio.sleep(self.seconds)


@dataclass
class FakeWorker:
    """The common part of both roles: a server that can die, a registration, and a status stream.

    `tell` makes the status stream lie. `silent_since` silences it, while the server works on.
    """

    cluster: FakeCluster
    id: str
    role: Role
    fingerprint: str = "llama"
    kv_blocks_total: int = 1000
    block_size: int = 16
    block_bytes: int = 0
    staging_bytes: int = 0
    max_num_seqs: int = 64
    state: WorkerState = WorkerState.READY  # STARTING: registered without its address; DRAINING: told to watchers
    adapters: tuple[str, ...] = ()  # digests
    adapter_slots: int = 0
    loading: tuple[str, ...] = ()  # digests
    prefetched: list[str] = field(default_factory=list)  # digests, in order of the calls
    load_faults: list[Fault | None] = field(default_factory=list)
    load_seconds: float = 0.0
    where_seconds: float = 0.0
    lists_adapters: bool = True  # in its status
    cold: list[str] = field(default_factory=list)  # digests of prompts that came before their adapter
    prompts: Counter[str] = field(default_factory=Counter)  # digests of the prompts that are computed now
    most_adapters: int = 0  # at once, so far
    full: int = 0  # prompts refused because all adapter slots were taken
    faults: list[Fault | None] = field(default_factory=list)
    linger: float = 0.0  # seconds from the last message to the end of a call
    running: int = 0
    calls: int = 0
    cancelled: int = 0
    address: str = ""
    silent_since: float | None = None  # any number: its watchers hear nothing more
    registered: bool = True  # in the registry, also after its death
    watchers: Counter[str] = field(default_factory=Counter)  # open status streams, by caller
    callers: set[str] = field(default_factory=set)  # all names in calls so far
    told: dict[str, Any] = field(default_factory=dict)
    told_adapters: dict[str, AdapterState | None] = field(default_factory=dict)
    told_others: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.usage = Usage(self.adapter_slots)

    async def start(self, port: int = 0) -> None:
        self.server = grpc.aio.server(options=ACCEPT_PINGS)
        service = PrefillService(self) if isinstance(self, FakePrefill) else DecodeService(self)
        if isinstance(self, FakePrefill):
            workers_pb2_grpc.add_PrefillWorkerServicer_to_server(service, self.server)
        else:
            workers_pb2_grpc.add_DecodeWorkerServicer_to_server(service, self.server)
        if self.role is not Role.DECODE:
            workers_pb2_grpc.add_WorkerAdaptersServicer_to_server(AdaptersService(self), self.server)
        workers_pb2_grpc.add_WorkerStatusServicer_to_server(FakeStatusService(self), self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port(f'127.0.0.1:{port}')}"
        await self.server.start()

    async def die(self) -> None:
        """Simulates the end of the process: connections break. The registration stays until it expires."""
        self.silent_since = asyncio.get_running_loop().time()
        await self.server.stop(None)
        self.adapters = ()
        if isinstance(self, FakeDecode):
            self.handles.clear()

    def tell(
        self,
        *,
        adapters: dict[str, AdapterState | None] | None = None,
        others: dict[str, int] | None = None,
        **status: Any,
    ) -> None:
        """From now on the status stream tells these values, whatever is true. Earlier told values stay.

        `status` are fields of WorkerStatus; `adapters` holds states by digest, None for gone; `others` holds other
        routers' prompts by digest.
        """
        self.told |= status
        self.told_adapters |= adapters or {}
        self.told_others |= others or {}

    def tell_truth(self) -> None:
        """Forgets all that `tell` has set."""
        for told in (self.told, self.told_adapters, self.told_others):
            told.clear()

    def record(self) -> Worker:
        starting = self.state is WorkerState.STARTING
        return Worker(
            self.id,
            self.role,
            "" if starting else self.address,
            "" if starting else self.fingerprint,
            pid=1,
            block_size=self.block_size,
            block_bytes=self.block_bytes,
            kv_blocks=self.kv_blocks_total,
            staging_bytes=self.staging_bytes,
            max_num_seqs=self.max_num_seqs,
            adapter_slots=self.adapter_slots,
        )

    @contextmanager
    def prompting(self, digest: str, caller: str) -> Iterator[None]:
        """Within the context, a prompt is computed under this adapter ("": without one). Raises WorkerFull."""
        with ExitStack() as slot:
            try:
                slot.enter_context(self.usage.prompt(caller, digest))
            except WorkerFull:
                self.full += 1
                raise
            if digest and digest not in self.adapters:
                self.cold.append(digest)
            self.prompts[digest] += 1
            slot.callback(self.prompts.subtract, [digest])
            self.most_adapters = max(
                self.most_adapters, sum(1 for digest, count in self.prompts.items() if digest and count)
            )
            yield

    def next_fault(self) -> Fault | None:
        self.calls += 1
        return self.faults.pop(0) if self.faults else None


@dataclass
class FakePrefill(FakeWorker):
    """`faults` strike before the first tokens; `push_faults` strike between them and the push."""

    push_faults: list[Fault | None] = field(default_factory=list)
    requests: list[workers_pb2.PrefillRequest] = field(default_factory=list)
    delay: float = 0.0
    pushes: bool = True


@dataclass
class Kv:
    """The decode worker's state for one handle."""

    prompt: list[int]
    digest: str
    uses: int


@dataclass
class FakeDecode(FakeWorker):
    """`handles` are the current ones; `released` lists the handles given up; the other lists record the requests."""

    handles: dict[str, Kv] = field(default_factory=dict)
    released: list[str] = field(default_factory=list)
    messages: list[workers_pb2.DecodeRequest] = field(default_factory=list)
    choices: list[workers_pb2.DecodeChoice] = field(default_factory=list)
    delay: float = 0.0
    choice_faults: dict[int, list[Fault | None]] = field(default_factory=dict)
    prompt_seconds: float = 0.0  # time for a prompt on a colocated worker


class PrefillService(workers_pb2_grpc.PrefillWorkerServicer):
    def __init__(self, worker: FakePrefill) -> None:
        self.worker = worker

    async def Prefill(self, request: workers_pb2.PrefillRequest, context: Any) -> AsyncIterator[Any]:
        worker, caller = self.worker, caller_of(context)
        worker.callers.add(caller)
        worker.requests.append(request)
        worker.running += 1
        done = False
        try:
            with worker.usage.prefill(caller):
                async with aclosing(self._events(request, caller)) as events:
                    async for event in events:
                        yield event
            await asyncio.sleep(worker.linger)
            done = True
        except PreftError as error:
            await abort(context, error)
        finally:
            worker.running -= 1
            worker.cancelled += not done

    async def _events(self, request: workers_pb2.PrefillRequest, caller: str) -> AsyncGenerator[Any, None]:
        worker, handle = self.worker, request.target.handle
        with worker.prompting(request.adapter.digest, caller):
            if fault := worker.next_fault():
                await fault.strike()
            await asyncio.sleep(worker.delay)
        choices = [self._first(request, index) for index in range(1 if request.resume else request.n)]
        first = workers_pb2.FirstTokens(choices=[delta_to_proto(choice) for choice in choices])
        yield workers_pb2.PrefillEvent(first_tokens=first)
        uses = request.n if request.resume else sum(choice.finish_reason is None for choice in choices)
        if request.HasField("target") and uses:
            push_fault = worker.push_faults.pop(0) if worker.push_faults else None
            if push_fault:
                await push_fault.strike()
            if not worker.pushes:
                return
            decode = worker.cluster.at(request.target.address)
            if not isinstance(decode, FakeDecode) or handle in decode.released:
                raise TransferFailed("the decode worker is gone or wants no KV")
            decode.handles[handle] = Kv(list(request.prompt_token_ids), request.adapter.digest, uses)
            yield workers_pb2.PrefillEvent(kv_pushed=workers_pb2.KvPushed())

    def _first(self, request: workers_pb2.PrefillRequest, index: int) -> TokenDelta:
        if self.worker.cluster.ends.get(index) == 0:
            return TokenDelta(index, (EOS,), finish_reason=FinishReason.STOP)
        token = token_at(request.prompt_token_ids, request.adapter.digest, index, 0)
        last = request.sampling.max_tokens == 1 and not request.resume
        return TokenDelta(index, (token,), finish_reason=FinishReason.LENGTH if last else None)


class AdaptersService(workers_pb2_grpc.WorkerAdaptersServicer):
    def __init__(self, worker: FakeWorker) -> None:
        self.worker = worker

    async def Prefetch(self, request: common_pb2.AdapterRef, context: Any) -> workers_pb2.PrefetchReply:
        worker = self.worker
        worker.callers.add(caller_of(context))
        worker.prefetched.append(request.digest)
        if request.digest not in worker.adapters:
            worker.loading += (request.digest,)
        try:
            if worker.load_faults and (fault := worker.load_faults.pop(0)):
                await fault.strike()
            await asyncio.sleep(worker.load_seconds)
            worker.adapters = (*(digest for digest in worker.adapters if digest != request.digest), request.digest)
        except PreftError as error:
            await abort(context, error)
        finally:
            worker.loading = tuple(digest for digest in worker.loading if digest != request.digest)
        return workers_pb2.PrefetchReply()

    async def Where(self, request: common_pb2.AdapterRef, context: Any) -> workers_pb2.WhereReply:
        await asyncio.sleep(self.worker.where_seconds)
        held = request.digest in self.worker.adapters
        return place_to_proto(AdapterPlace(self.worker.id, Tier.HOST if held else Tier.SOURCE, 5.0))


class DecodeService(workers_pb2_grpc.DecodeWorkerServicer):
    def __init__(self, worker: FakeDecode) -> None:
        self.worker = worker

    async def Decode(
        self, commands: AsyncIterator[workers_pb2.DecodeCommand], context: Any
    ) -> AsyncIterator[workers_pb2.DecodeEvents]:
        caller = caller_of(context)
        self.worker.callers.add(caller)
        async with aclosing(DecodeSession(partial(self._begin, caller)).run(commands)) as batches:
            async for batch in batches:
                yield batch

    def _begin(self, caller: str, request: workers_pb2.DecodeRequest) -> Serve:
        self.worker.messages.append(request)
        return partial(self._serve, caller, request)

    async def _serve(
        self, caller: str, request: workers_pb2.DecodeRequest, choice: workers_pb2.DecodeChoice, put: Put
    ) -> None:
        with self.worker.usage.sequence(caller):
            await self._choose(caller, request, choice, put)

    async def _choose(
        self, caller: str, request: workers_pb2.DecodeRequest, choice: workers_pb2.DecodeChoice, put: Put
    ) -> None:
        worker = self.worker
        worker.choices.append(choice)
        worker.running += 1
        done = False
        kv = worker.handles.get(request.handle)
        try:
            faults = worker.choice_faults.get(choice.index, worker.faults)
            worker.calls += 1
            fault = faults.pop(0) if faults else None
            if worker.role is Role.COLOCATED:
                if request.adapter.digest != request.adapter_digest:
                    raise InvalidRequest("the request names one adapter and brings another")
                kv = Kv(list(request.prompt_token_ids), request.adapter.digest, 1)
            if kv is None or kv.uses == 0:
                raise TransferFailed("unknown handle")
            if kv.prompt != list(request.prompt_token_ids) or kv.digest != request.adapter_digest:
                raise TransferFailed("the handle is for another prompt or adapter")
            kv.uses -= 1
            begin = len(choice.output_token_ids)
            if worker.role is Role.COLOCATED:
                with worker.prompting(request.adapter.digest, caller):
                    await asyncio.sleep(worker.prompt_seconds)
            for position in range(begin, request.sampling.max_tokens):
                if fault and fault.after == position - begin:
                    await fault.strike()
                await asyncio.sleep(worker.delay)
                delta = self._token(request, choice.index, position)
                put(delta)
                if delta.finish_reason is not None:
                    break
            await asyncio.sleep(worker.linger)
            done = True
        except PreftError as error:
            put(error)
        finally:
            worker.running -= 1
            worker.cancelled += not done
            if kv is not None and kv.uses == 0:
                worker.handles.pop(request.handle, None)

    async def Release(self, request: workers_pb2.ReleaseRequest, context: Any) -> workers_pb2.ReleaseReply:
        self.worker.released.append(request.handle)
        self.worker.handles.pop(request.handle, None)
        return workers_pb2.ReleaseReply()

    def _token(self, request: workers_pb2.DecodeRequest, index: int, position: int) -> TokenDelta:
        if self.worker.cluster.ends.get(index) == position:
            return TokenDelta(index, (EOS,), finish_reason=FinishReason.STOP)
        token = token_at(request.prompt_token_ids, request.adapter_digest, index, position)
        last = position == request.sampling.max_tokens - 1
        return TokenDelta(index, (token,), finish_reason=FinishReason.LENGTH if last else None)


class FakeCluster:
    """Workers and their registry: the part of a StateStore that a router reads."""

    def __init__(self) -> None:
        self.members: dict[str, FakeWorker] = {}
        self.ends: dict[int, int] = {}  # choice -> position of its EOS

    async def add_prefill(self, worker_id: str, **options: Any) -> FakePrefill:
        worker = FakePrefill(self, worker_id, Role.PREFILL, **{"adapter_slots": ADAPTER_SLOTS} | options)
        await self._add(worker)
        return worker

    async def add_decode(self, worker_id: str, **options: Any) -> FakeDecode:
        worker = FakeDecode(self, worker_id, Role.DECODE, **options)
        await self._add(worker)
        return worker

    async def add_colocated(self, worker_id: str, **options: Any) -> FakeDecode:
        options = {"adapter_slots": ADAPTER_SLOTS, "fingerprint": f"llama {worker_id}"} | options
        worker = FakeDecode(self, worker_id, Role.COLOCATED, **options)
        await self._add(worker)
        return worker

    async def _add(self, worker: FakeWorker) -> None:
        await worker.start()
        self.members[worker.id] = worker

    async def workers(self) -> list[Worker]:
        return [worker.record() for _, worker in sorted(self.members.items()) if worker.registered]

    async def wait_changed(self, timeout: float) -> None:
        await asyncio.sleep(min(timeout, POLL_SECONDS))

    def at(self, address: str) -> FakeWorker | None:
        alive = (worker for worker in self.members.values() if worker.silent_since is None)
        return next((worker for worker in alive if worker.address == address), None)

    @property
    def busy(self) -> dict[str, Any]:
        """All work and memory that living workers still hold."""
        living = [worker for worker in self.members.values() if worker.silent_since is None]
        busy: dict[str, Any] = {worker.id: worker.running for worker in living if worker.running}
        decode = [worker for worker in living if isinstance(worker, FakeDecode)]
        return busy | {f"{worker.id} KV": worker.handles for worker in decode if worker.handles}

    @property
    def released(self) -> list[str]:
        """All handles that the router told decode workers to give up."""
        return [
            handle for member in self.members.values() if isinstance(member, FakeDecode) for handle in member.released
        ]

    async def stop(self) -> None:
        for worker in self.members.values():
            await worker.server.stop(None)

"""Prefill and decode workers without an engine: real gRPC servers in this process, with predictable tokens.

A token depends on prompt, adapter, choice and position. A stream joined from several attempts equals an undisturbed
stream exactly if no token was lost, repeated or mixed up. `faults` lists hold one fault per call; counters record the
router's actions. A worker's status stream (`fake_status`) tells the truth about the worker, unless a test has called
`tell`.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from preft.core.cluster import AdapterState, Role, Worker, WorkerState
from preft.core.errors import PreftError, WorkerFull
from preft.core.request import AdapterRef, GenerateRequest, Sampling
from preft.rpc import workers_pb2, workers_pb2_grpc
from preft.rpc.liveness import ACCEPT_PINGS
from preft.worker.usage import Usage
from support.fake_services import EOS, AdaptersService, DecodeService, Kv, PrefillService, token_at
from support.fake_status import FakeStatusService

POLL_SECONDS = 0.02  # between two looks of a router at the registry
ADAPTER_SLOTS = 64  # of workers that run adapters, unless a test says otherwise


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
    slot_waits: list[int] = field(default_factory=list)  # in ms, as all callers told
    wanted: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # digests, by caller
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
    def prompting(self, digest: str, caller: str, tokens: int) -> Iterator[None]:
        """Within the context, a prompt is computed under this adapter ("": without one). Raises WorkerFull."""
        with ExitStack() as slot:
            try:
                slot.enter_context(self.usage.prompt(caller, digest, tokens))
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
class FakeDecode(FakeWorker):
    """`handles` are the current ones; `released` lists the handles given up; the other lists record the requests."""

    handles: dict[str, Kv] = field(default_factory=dict)
    released: list[str] = field(default_factory=list)
    messages: list[workers_pb2.DecodeRequest] = field(default_factory=list)
    choices: list[workers_pb2.DecodeChoice] = field(default_factory=list)
    delay: float = 0.0
    choice_faults: dict[int, list[Fault | None]] = field(default_factory=dict)
    prompt_seconds: float = 0.0  # time for a prompt on a colocated worker


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

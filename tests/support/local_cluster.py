"""A whole cluster inside the test process, without Ray: real workers, real gRPC, real HTTP, and vLLM or a fake of it.

The servers live in a thread with its own event loop, so that tests may be synchronous or have a loop of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from preft.cluster.adapters import open_catalog
from preft.cluster.content_server import serve_content
from preft.cluster.gateway_process import RunningGateway, run_gateway
from preft.cluster.model import with_model_length
from preft.cluster.secret import cluster_secret
from preft.cluster.stores import open_registrations
from preft.cluster.worker_process import worker_setup
from preft.core.cluster import Role, WorkerStatus
from preft.core.ports import StateStore
from preft.core.settings import Settings, load_settings
from preft.worker.server import StartEngine, WorkerServer
from support.faulty_sender import FaultySender

T = TypeVar("T")


@dataclasses.dataclass(slots=True)
class LocalCluster:
    """The tests' view of a running cluster. `call` runs a coroutine in the cluster's loop."""

    settings: Settings
    gateway: RunningGateway
    workers: dict[str, WorkerServer]
    store: StateStore
    senders: dict[str, FaultySender]  # by worker
    loop: asyncio.AbstractEventLoop

    @property
    def sender(self) -> FaultySender:
        """The first prefill worker's sender."""
        return self.senders[self.worker(Role.PREFILL).record.id]

    @property
    def url(self) -> str:
        return f"http://{self.gateway.address}"

    def call(self, coroutine: Coroutine[Any, Any, T], timeout: float = 120) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    def statuses(self) -> dict[str, WorkerStatus]:
        async def read() -> dict[str, WorkerStatus]:
            return {name: worker.status() for name, worker in self.workers.items()}

        return self.call(read())

    def worker(self, role: Role) -> WorkerServer:
        return next(worker for worker in self.workers.values() if worker.record.role is role)

    @property
    def decoding(self) -> WorkerServer:
        """The worker that makes output, of whatever role."""
        return next(worker for worker in self.workers.values() if worker.record.role is not Role.PREFILL)

    def wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Whether `condition` becomes true within `seconds`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.1)
        return condition()

    def idle(self, seconds: float = 30) -> bool:
        """Whether requests have given back all resources within `seconds`."""

        def given_back() -> bool:
            return all(
                status.running == 0
                and status.kv_blocks_used == 0
                and status.staging_bytes_used == 0
                and status.open_handles == 0
                for status in self.statuses().values()
            )

        return self.wait(given_back, seconds)


@contextmanager
def local_cluster(
    model: Path, state_dir: Path, *, start_engine: StartEngine | None = None, **overrides: Any
) -> Iterator[LocalCluster]:
    """Serves `model` on free ports within the context. `overrides` are settings, nested as in the YAML file."""
    settings = with_model_length(
        load_settings(None, {"model": str(model), "port": 0, "state_dir": str(state_dir), **overrides})
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    ready: threading.Event = threading.Event()
    box: list[LocalCluster | BaseException] = []
    leave: list[Callable[[], None]] = []

    async def main() -> None:
        stop = asyncio.Event()
        leave.append(lambda: loop.call_soon_threadsafe(stop.set))
        loop = asyncio.get_running_loop()
        async with _cluster(settings, start_engine or StartEngine()) as cluster:
            box.append(cluster)
            ready.set()
            await stop.wait()

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            box.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="local-cluster")
    thread.start()
    ready.wait()
    try:
        if isinstance(box[0], BaseException):
            raise RuntimeError("the cluster didn't start:\n" + "".join(traceback.format_exception(box[0]))) from None
        yield box[0]
    finally:
        if leave:
            with contextlib.suppress(RuntimeError):
                leave[0]()
        thread.join()


@contextlib.asynccontextmanager
async def _cluster(settings: Settings, start_engine: StartEngine) -> AsyncIterator[LocalCluster]:
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    store = open_registrations(settings)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(store.close)
        catalog = await stack.enter_async_context(open_catalog(settings))
        secret = cluster_secret(settings)
        content_address = await stack.enter_async_context(serve_content(settings, secret, catalog))
        gateway = await stack.enter_async_context(
            run_gateway(settings, secret, store, catalog, "test", content_address)
        )
        names = [
            (f"test-{role.value}-{number}", role)
            for role in settings.roles
            for number in range(settings.engine(role).replicas)
        ]
        senders = {name: FaultySender(cluster_secret(settings)) for name, _ in names}
        started = await asyncio.gather(
            *(
                WorkerServer.start(worker_setup(settings, role), name, "127.0.0.1", store, start_engine, senders[name])
                for name, role in names
            )
        )
        workers = {worker.record.id: worker for worker in started}
        watches = [asyncio.create_task(_close_when_dead(worker)) for worker in started]
        for worker in started:
            stack.push_async_callback(worker.close)
        stack.push_async_callback(_cancelled, watches)
        while not gateway.router.ready():
            await asyncio.sleep(0.05)
        yield LocalCluster(settings, gateway, workers, store, senders, asyncio.get_running_loop())


async def _close_when_dead(worker: WorkerServer) -> None:
    """Does what a worker's process does when its engine has died, except for ending the process."""
    await worker.died()
    await worker.close()


async def _cancelled(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

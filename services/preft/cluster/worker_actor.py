"""One worker as an actor of Ray: the process that runs a `WorkerServer` in a thread with its own event loop.

If the engine dies, the process ends, and Ray starts both again. A worker that is told to end drains first; its process
then waits to be killed. `ray_workers` starts and finds the actors.
"""

from __future__ import annotations

import asyncio
import getpass
import logging
import os
import tempfile
import threading
import time
from pathlib import Path

import ray
from pydantic import SecretStr

from preft.cluster.logs import cause_in, keep_folder, output_to
from preft.cluster.process import Stop
from preft.cluster.worker_process import run_worker
from preft.core.cluster import Role
from preft.core.settings import Settings
from preft.worker.server import StartEngine, WorkerServer

logger = logging.getLogger(__name__)

REPLY_SECONDS = 1.0  # for an actor to report a failed start before its process ends
CLOSE_SECONDS = 5.0  # for a worker to close after its requests, until Ray kills it


class WorkerActor:
    """One worker under Ray. The constructor starts the worker, so a restarted actor is a restarted worker."""

    start_engine: type[StartEngine] = StartEngine

    def __init__(
        self,
        settings_json: str,
        secret: str,
        role: str,
        worker_id: str,
        host: str,
        state: str,
        log: str,
        folder: str,
    ) -> None:
        output_to(Path(log))
        keep_folder(Path(log).parent)
        end_with_main_thread()
        if folder:
            _use_folder(folder)
        self._log = Path(log)
        self._decided = threading.Event()  # set when the start has succeeded or failed
        self._failure: str | None = None
        self._stop = Stop()
        self._drains = False
        self._ended = threading.Event()  # set when the worker has drained and closed
        self._loop: asyncio.AbstractEventLoop | None = None  # set before `_decided`
        self._worker: WorkerServer | None = None
        host = host or ray.util.get_node_ip_address()
        settings = Settings.model_validate_json(settings_json)
        secrets = {"cluster_secret": SecretStr(secret), "state": SecretStr(state) if state else None}
        settings = settings.model_copy(update=secrets)
        thread = threading.Thread(
            target=self._run, args=(settings, Role(role), worker_id, host), name=worker_id, daemon=True
        )
        thread.start()

    def _run(self, settings: Settings, role: Role, worker_id: str, host: str) -> None:
        try:
            with asyncio.Runner() as runner:
                self._loop = runner.get_loop()
                engine = self.start_engine()
                reason = runner.run(run_worker(settings, role, worker_id, host, self._stop, self._started, engine))
                if reason is None:
                    self._ended.set()
                    threading.Event().wait()  # Ray would start a process that ends by itself again
            logger.error("worker %s ends: %s", worker_id, reason)
        except BaseException as error:
            logger.exception("worker %s ends", worker_id)
            if not self._decided.is_set():
                self._failure = cause_in(self._log) or f"{type(error).__name__}: {error}"
                self._decided.set()
                time.sleep(REPLY_SECONDS)
        os._exit(1)

    def _started(self, worker: WorkerServer) -> None:
        self._worker = worker
        self._decided.set()

    def drain(self, but: str) -> None:
        """Tells all routers but `but` to send nothing more. See `WorkerServer.drain`."""
        self._drains = True
        if self._worker is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(self._worker.drain, but)

    def is_ending(self) -> bool:
        """Whether the worker has been told to end, and won't serve again."""
        return self._drains or self._stop.asked.is_set()

    def end(self, seconds: float) -> None:
        """Returns once the worker has ended: after its running requests, which have `seconds`."""
        for stop, wait in ((self._stop.asked, seconds), (self._stop.at_once, CLOSE_SECONDS)):
            if self._loop is not None and not self._ended.is_set():
                self._loop.call_soon_threadsafe(stop.set)
                self._ended.wait(wait)

    def wait_started(self) -> str | None:
        """Returns None once the worker serves, or the reason why it can't."""
        self._decided.wait()
        return self._failure


def _use_folder(folder: str) -> None:
    """Puts this process's temporary files and sockets into `folder`. PyTorch's compiled code stays elsewhere."""
    compiled = os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")  # PyTorch's default
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", compiled)
    os.environ["TMPDIR"] = tempfile.tempdir = folder


def end_with_main_thread() -> None:
    """Lets this process end at once when its main thread ends, as Ray's does after the death of `preft serve`.

    Python's own way to the end takes seconds. Meanwhile it refuses work for threads, so that calls to the worker would
    fail instead of breaking, and routers repeat only those that break.
    """
    threading._register_atexit(os._exit, 1)  # type: ignore[attr-defined]  # `atexit` itself comes after that refusal

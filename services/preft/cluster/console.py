"""The console of `preft serve`: one line per event, and on a terminal a last line with the current activity.

Owns stdout. Log records go to files; stderr gets only PreFT's own warnings.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from io import TextIOWrapper
from typing import TextIO

from preft.core.cluster import WorkerSeen, WorkerState
from preft.core.settings import host_and_port
from preft.core.web import reachable

FIRST_TOKENS = 64  # of the answer to the example


class Console:
    """Lines for people. If the console is gone, output is dropped and the server goes on."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        if isinstance(self._out, TextIOWrapper):
            self._out.reconfigure(errors="backslashreplace")  # a folder's name may hold any character
        self._is_terminal = self._out.isatty()
        self._status = ""

    def line(self, text: str) -> None:
        """Prints a line that stays."""
        self._write(f"{self._erase()}{text}\n{self._status}")

    def status(self, text: str) -> None:
        """Shows `text` in the last line of a terminal; "" removes the line. Shows nothing if stdout is no terminal."""
        if self._is_terminal:
            erased, self._status = self._erase(), text[: shutil.get_terminal_size().columns - 1]
            self._write(erased + self._status)

    def _erase(self) -> str:
        return "\r\033[K" if self._status else ""

    def _write(self, text: str) -> None:
        try:
            self._out.write(text)
            self._out.flush()
        except OSError:
            self._is_terminal = False


class WorkerProgress:
    """Reports each worker's stages to the console: process, engine, ready, end."""

    def __init__(self, console: Console, prefix: str) -> None:
        self._console = console
        self._prefix = prefix
        self._stages: dict[str, tuple[int, WorkerState | None]] = {}
        self._since: dict[str, float] = {}

    def observe(self, workers: Iterable[WorkerSeen], members: Sequence[str]) -> None:
        """Takes over the router's current view. `members` are the ids of the workers that were started."""
        known = {seen.worker.id: seen for seen in workers}
        for worker_id in members:
            if worker_id not in self._stages:
                self._since[worker_id] = time.monotonic()
                seen = known.get(worker_id)
                if seen is not None and seen.state is WorkerState.READY:
                    self._stages[worker_id] = (seen.worker.pid, seen.state)
                    self._say(worker_id, f"it runs already (process {seen.worker.pid})")
                else:
                    self._stages[worker_id] = (0, None)
                    self._say(worker_id, "its process starts")
        for worker_id in self._stages.keys() - members:
            del self._stages[worker_id]
            self._say(worker_id, "it ends")
        for worker_id, (pid, state) in self._stages.items():
            seen = known.get(worker_id)
            now = (seen.worker.pid, seen.state) if seen is not None else (pid, None)
            if now != (pid, state):
                self._changed(worker_id, state, now)
        self._console.status(self._going_on())

    def _changed(self, worker_id: str, state: WorkerState | None, now: tuple[int, WorkerState | None]) -> None:
        seconds = time.monotonic() - self._since[worker_id]
        was_serving = state is WorkerState.READY
        if was_serving:
            self._since[worker_id] = time.monotonic()
        self._stages[worker_id] = now
        if now[1] in (None, WorkerState.DEAD):
            if was_serving:
                self._say(worker_id, "it has ended, and starts again")
        elif now[1] is WorkerState.STARTING:
            self._say(worker_id, f"its engine loads (process {now[0]})")
        elif now[1] is WorkerState.READY:
            self._say(worker_id, f"it is ready after {seconds:.0f} s")

    def _going_on(self) -> str:
        parts = []
        for worker_id, (_, state) in self._stages.items():
            if state is not WorkerState.READY:
                stage = "engine" if state is WorkerState.STARTING else "process"
                seconds = time.monotonic() - self._since[worker_id]
                parts.append(f"{worker_id.removeprefix(self._prefix)}: {stage} {seconds:.0f} s")
        return "  " + ", ".join(parts) if parts else ""

    def _say(self, worker_id: str, what: str) -> None:
        self._console.line(f"  {worker_id.removeprefix(self._prefix)}: {what}")


def first_question(address: str, model: str, *, is_chat: bool, max_model_len: int, needs_key: bool = False) -> str:
    """A curl command for a shell that sends the server at `host:port` a first request.

    With `needs_key`, the shell's variable PREFT_API_KEY has the API key.
    """
    host, _, port = address.rpartition(":")
    body: dict[str, object] = {"model": model}
    if is_chat:
        body["messages"] = [{"role": "user", "content": "Hello!"}]
    else:
        body["prompt"] = "Hello"
    body["max_tokens"] = max(1, min(FIRST_TOKENS, max_model_len // 4))
    path = "chat/completions" if is_chat else "completions"
    url = f"http://{host_and_port(reachable(host.strip('[]')), int(port))}/v1/{path}"
    key = '-H "Authorization: Bearer $PREFT_API_KEY" ' if needs_key else ""
    return f"curl -s {url} {key}-H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"

"""Plain vLLM as a subprocess, for the reference side: one run at a time, with JSON lines in both directions."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preft_loadgen.child import bound
from preft_loadgen.errors import LoadgenError

COMMAND = (sys.executable, "-m", "bench.plain_engine")
TAIL_CHARACTERS = 4000
LINE_BYTES = 64 << 20
START_SECONDS = 600.0
STOP_SECONDS = 30.0


class PlainEngineFailed(LoadgenError):
    """The reference engine didn't start or died."""


@dataclass(frozen=True, slots=True)
class PlainRun:
    """Seconds of the whole run, and for each prompt the arrival time of each token, in seconds from the run's start."""

    seconds: float
    arrivals: list[list[float]]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.arrivals))


class PlainEngine:
    """A running `bench.plain_engine`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def run(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        concurrency: int,
        adapters: Sequence[str | None] | None = None,
    ) -> PlainRun:
        """Continues every prompt by exactly `max_tokens`, at most `concurrency` at a time. Raises PlainEngineFailed.

        `adapters` has one PEFT folder per prompt, and needs an engine that was started with `lora`.
        """
        assert self._process.stdin is not None
        asked = {
            "prompts": [list(prompt) for prompt in prompts],
            "max_tokens": max_tokens,
            "concurrency": concurrency,
            "adapters": list(adapters or [None] * len(prompts)),
        }
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        return PlainRun(**await self._answer())

    async def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise PlainEngineFailed(f"the plain engine ended with status {await self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@asynccontextmanager
async def plain_engine(
    settings: Path, log: Path, command: Sequence[str] = COMMAND, *, lora: bool = False
) -> AsyncIterator[PlainEngine]:
    """Starts an engine with the settings in a JSON file and waits until it is ready; ends it with the context.

    The output goes to `log`. Raises PlainEngineFailed with the end of `log`.
    """
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *bound([*command, "--settings", str(settings), *(["--lora"] if lora else [])]),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=output,
            limit=LINE_BYTES,
            start_new_session=True,
        )
    engine = PlainEngine(process)
    try:
        try:
            async with asyncio.timeout(START_SECONDS):
                await engine._answer()
        except (TimeoutError, PlainEngineFailed) as error:
            raise PlainEngineFailed(f"the plain engine didn't start:\n{_tail(log)}") from error
        yield engine
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-TAIL_CHARACTERS:]

"""A server of adapters without a network: answers that tell models apart, at a chosen speed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from preft_loadgen.errors import RequestFailed
from preft_loadgen.traffic.request import Request
from preft_loadgen.transport.reply import Reply
from preft_loadgen.transport.server import Models


class FakeServer:
    """Answers with the content of the asked model, or as `answers` says. Each call takes `seconds`; `at_once` run."""

    def __init__(
        self, adapters: tuple[str, ...] = ("a", "b", "c", "d"), *, seconds: float = 0.001, at_once: int = 1000
    ) -> None:
        self.contents = {"base": "base", **{name: f"content of {name}" for name in adapters}}
        self.adapters = list(adapters)
        self.requests: list[Request] = []
        self.running = self.most = 0
        self.answers: Callable[[Request], str] = lambda request: self.contents[request.model]
        self._seconds = seconds
        self._room = asyncio.Semaphore(at_once)

    async def models(self) -> Models:
        return Models("base", tuple(self.adapters))

    async def send(self, request: Request) -> Reply:
        started = time.perf_counter()
        self.requests.append(request)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            async with self._room:
                if request.model not in self.contents:
                    raise RequestFailed(f"404: no model {request.model}", 404)
                text = f"{self.answers(request)} for {request.prompt}"
                await asyncio.sleep(self._seconds)
        finally:
            self.running -= 1
        now, tokens = time.perf_counter(), request.output_tokens
        return Reply(started, now, (now,) * tokens, tokens, text, "length", len(request.prompt), (1,) * tokens)

    async def load_adapter(self, name: str, folder: str) -> None:
        await asyncio.sleep(self._seconds)
        if "broken" in folder:
            raise RequestFailed("400: it has no weights", 400)
        self.contents[name] = folder
        if name not in self.adapters:
            self.adapters.append(name)

    async def unload_adapter(self, name: str) -> None:
        if name not in self.contents:
            raise RequestFailed(f"404: no model {name}", 404)
        del self.contents[name]
        self.adapters.remove(name)

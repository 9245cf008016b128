"""Prometheus metrics, as wrappers: one around the Generator port, one around the ASGI app.

Labels never hold adapter names: a server can have a hundred thousand adapters.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from preft.core.errors import ERROR_MAP, PreftError, mapping_of
from preft.core.ports import Generation, Generator
from preft.core.request import GenerateRequest, TokenDelta

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_INTER_TOKEN = (0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)
_WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class MeteredGenerator:
    """A Generator that counts the requests and tokens of the wrapped Generator. Times are in seconds.

    `kind` is base or adapter. `status` is ok, cancelled (the caller left early) or the error's code.
    """

    def __init__(self, inner: Generator, registry: CollectorRegistry) -> None:
        self._inner = inner
        kind = ("kind",)
        self._requests = Counter("preft_requests", "Prompts by outcome.", (*kind, "status"), registry=registry)
        for each in ("base", "adapter"):  # from 0 on: Prometheus sees no increase in a series that begins with 1
            for status in ("ok", "cancelled", *(mapping.code for mapping in ERROR_MAP.values())):
                self._requests.labels(each, status)
        self._running = Gauge("preft_requests_running", "Prompts in progress.", kind, registry=registry)
        self._prompt = Counter("preft_prompt_tokens", "Prompt tokens accepted.", kind, registry=registry)
        self.generated = Counter("preft_generated_tokens", "Tokens generated.", kind, registry=registry)
        seconds = partial(Histogram, labelnames=kind, registry=registry)
        self.first = seconds("preft_time_to_first_token_seconds", "From request to first token.", buckets=_FIRST_TOKEN)
        self.between = seconds("preft_inter_token_latency_seconds", "Between tokens of a choice.", buckets=_INTER_TOKEN)
        self._whole = seconds("preft_request_seconds", "From request to last token.", buckets=_WHOLE)

    def ready(self) -> bool:
        return self._inner.ready()

    @asynccontextmanager
    async def generate(self, request: GenerateRequest) -> AsyncIterator[Generation]:
        kind = "base" if request.adapter is None else "adapter"
        started = time.perf_counter()
        status = "internal_error"
        self._running.labels(kind).inc()
        try:
            async with self._inner.generate(request) as generation:
                self._prompt.labels(kind).inc(len(request.prompt_token_ids))
                yield _MeteredGeneration(generation, self, kind, started)
                status = "ok"
        except PreftError as error:
            status = mapping_of(error).code
            raise
        except asyncio.CancelledError:
            status = "cancelled"
            raise
        finally:
            self._running.labels(kind).dec()
            self._requests.labels(kind, status).inc()
            self._whole.labels(kind).observe(time.perf_counter() - started)


class _MeteredGeneration:
    def __init__(self, inner: Generation, meters: MeteredGenerator, kind: str, started: float) -> None:
        self._inner = inner
        self._started = started
        self._first = meters.first.labels(kind)
        self._between = meters.between.labels(kind)
        self._generated = meters.generated.labels(kind)

    def stop(self, index: int) -> None:
        self._inner.stop(index)

    async def __aiter__(self) -> AsyncIterator[TokenDelta]:
        last: dict[int, float] = {}
        async for delta in self._inner:
            if count := len(delta.token_ids):
                now = time.perf_counter()
                if not last:
                    self._first.observe(now - self._started)
                elif delta.index in last:
                    self._between.observe((now - last[delta.index]) / count)
                last[delta.index] = now
                self._generated.inc(count)
            yield delta


class CountResponses:
    """ASGI middleware that counts responses by route template and status. Stream chunks cost nothing."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        self._responses = Counter(
            "preft_http_responses", "HTTP responses started.", ("route", "status"), registry=registry
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            status = status or 500  # the error handler outside of this middleware sends this status
            raise
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            self._responses.labels(route, str(status or 499)).inc()  # 499: the client left before the response

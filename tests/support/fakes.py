"""A Generator and an AdapterCatalog that need no workers: scripted tokens, failures on demand, a record of it all."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from preft.core.cluster import Adapter
from preft.core.errors import AdapterExists, InvalidAdapter, ModelNotFound, PreftError
from preft.core.request import FinishReason, GenerateRequest, TokenDelta, TokenLogprob


@dataclass(frozen=True, slots=True)
class Script:
    """What one request gets. Every choice generates `tokens`, `chunk` at a time, `delay` seconds apart.

    `finish` None: "length" where max_tokens cuts the script, else "stop", as if its last token had been an EOS.
    `fail` is raised after `fail_after` tokens of each choice, or on entering where that is None.
    """

    tokens: Sequence[int] = ()
    chunk: int = 1
    delay: float = 0.0
    finish: FinishReason | None = None
    stop_token_id: int | None = None
    fail: PreftError | Exception | None = None
    fail_after: int | None = None
    cached: int = 0
    finish_apart: bool = False  # the finish reason comes in a delta of its own, without tokens
    never_finish: bool = False


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
                    self._logprobs(ids),
                    finish if end else None,
                    script.stop_token_id if end else None,
                    cached_tokens=script.cached if index == start == 0 else 0,
                )
        if script.fail is not None and script.fail_after is not None:
            raise script.fail
        for index in range(request.n):
            if script.finish_apart and index not in self.stopped:
                yield TokenDelta(index, (), (), finish, script.stop_token_id)

    def _logprobs(self, token_ids: tuple[int, ...]) -> tuple[TokenLogprob, ...]:
        """-0.5 for the sampled token, which is the likeliest; its successors by id follow at -1.0, -1.5, ..."""
        count = self._request.sampling.logprobs
        if count is None:
            return ()
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


class FakeCatalog:
    """An AdapterCatalog in memory. A source is its own content: the digest is its hash. "broken" is refused."""

    def __init__(self, base: str = "base", **adapters: str) -> None:
        self._base = base
        self._adapters = {name: self._adapter(name, source) for name, source in adapters.items()}

    def get(self, name: str) -> Adapter | None:
        return self._adapters.get(name)

    def list(self) -> Sequence[Adapter]:
        return [adapter for _, adapter in sorted(self._adapters.items())]

    async def add(self, name: str, source: str, *, replace: bool = False) -> Adapter:
        if name == self._base:
            raise InvalidAdapter(f"{name!r} is the base model's name", "name")
        if "broken" in source:
            raise InvalidAdapter(f"{source} has no adapter_model.safetensors")
        new = self._adapter(name, source)
        old = self._adapters.get(name)
        if old is not None and old.digest != new.digest and not replace:
            raise AdapterExists(f"{name!r} is another adapter already")
        self._adapters[name] = new if old is None or old.digest != new.digest else old
        return self._adapters[name]

    async def remove(self, name: str) -> Adapter:
        if name not in self._adapters:
            raise ModelNotFound(f"there is no adapter {name!r}")
        return self._adapters.pop(name)

    def _adapter(self, name: str, source: str) -> Adapter:
        digest = hashlib.sha256(source.encode()).hexdigest()
        return Adapter(name, digest, f"/cache/{digest}", source, rank=8, created=time.time())

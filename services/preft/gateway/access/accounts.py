"""The accounts of running API calls: what a call takes from its key's limits, what it has used, and its record.

Tokens are taken when a call begins: those of the prompts, and the most that may be generated. When the call ends, also
by an error or because its client left, its account is settled with the tokens that it has used.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import TypeVar

from preft.core.background import Background
from preft.core.errors import RateLimited
from preft.core.limits import RENEWAL_SECONDS, KeyLimits, Limit, LimitCounter, Standing, rate_headers
from preft.gateway.access.caller import Caller
from preft.gateway.access.usage import Recorder, Usage
from preft.gateway.api_call import ApiCall

T = TypeVar("T")

CLIENT_GONE = 499
END_SECONDS = 2.0  # for the last settlements
_WORDS = {
    Limit.REQUESTS: "requests per min (RPM)",
    Limit.TOKENS: "tokens per min (TPM)",
    Limit.CONCURRENT: "concurrent requests",
}


class Accounts:
    """Opens the accounts of one gateway, and renews the leases of running requests. Use it inside one event loop."""

    def __init__(self, counter: LimitCounter, recorders: Iterable[Recorder] = ()) -> None:
        """The owner closes `counter` after this object."""
        self.counter = counter
        self.background = Background()
        self._recorders = tuple(recorders)
        self._leases: dict[str, set[str]] = {}
        self._settling: dict[str, set[asyncio.Task[None]]] = {}  # by the key's name
        self._renewal = Background()
        self._renewal.every(RENEWAL_SECONDS, self._renew, "the places of running requests are not renewed")

    def open(self, call: ApiCall, caller: Caller) -> Account:
        """The account of `call`, which `begin` and `end` surround."""
        return Account(self, call, caller)

    async def close(self) -> None:
        """Waits for the last settlements."""
        await self._renewal.close()
        await self.background.finish(END_SECONDS)

    def record(self, usage: Usage) -> None:
        for recorder in self._recorders:
            recorder.record(usage)

    async def take(self, who: str, limits: KeyLimits, tokens: int, lease: str) -> Standing:
        """Takes from the limits. The places of this gateway's calls that have ended are free before."""
        if limits.concurrent_requests is not None and (settling := self._settling.get(who)):
            await asyncio.wait(settling)
        standing = await self.counter.take(who, limits, tokens, lease)
        if standing.refused is None and limits.concurrent_requests is not None:
            self._leases.setdefault(who, set()).add(lease)
        return standing

    def settle(self, who: str, limits: KeyLimits, tokens: int, lease: str) -> None:
        """Settles in the background: no reply waits for it."""
        _discard(self._leases, who, lease)
        task = self.background.start(
            self.counter.settle(who, limits, tokens, lease), "an API key's limits are not settled"
        )
        self._settling.setdefault(who, set()).add(task)
        task.add_done_callback(lambda ended: _discard(self._settling, who, ended))

    async def _renew(self) -> None:
        await self.counter.renew({who: tuple(leases) for who, leases in self._leases.items()})


class Account:
    """One API call's account."""

    def __init__(self, accounts: Accounts, call: ApiCall, caller: Caller) -> None:
        self._accounts = accounts
        self._call = call
        self._key = caller.key
        self._limits = caller.key.limits if caller.key is not None else KeyLimits()
        self._lease = call.requests[0].request_id  # no other call has it
        self._standing: Standing | None = None
        self._left = False
        self._started = time.time()

    async def begin(self) -> None:
        """Takes from the limits. Raises RateLimited."""
        if self._key is None or not self._limits:
            return
        taking = self._accounts.background.start(self._take(self._key.name), "the limits of API keys are not counted")
        try:
            await asyncio.shield(taking)
        except asyncio.CancelledError:  # the client has left, and what is being taken must be given back
            self._left = True
            if taking.done():
                self._settle(self._key.name, -self._call.reserved_tokens)
            raise
        if self._standing is not None and self._standing.refused is not None:
            raise _refusal(self._key.name, self._standing, self._standing.refused, self._call.reserved_tokens)

    @property
    def headers(self) -> list[tuple[str, str]]:
        """For the reply, after `begin`."""
        return rate_headers(self._standing) if self._standing is not None else []

    def end(self, status: int, code: str, generated: int, cached: int) -> None:
        """Settles, and records the call. `status` and `code` are those of HTTP; CLIENT_GONE: nobody read the end.

        A call that failed before its first token costs no tokens.
        """
        prompt = self._call.prompt_tokens
        used = prompt + generated if generated or status in (200, CLIENT_GONE) else 0
        if self._key is not None and self._limits:
            self._settle(self._key.name, used - self._call.reserved_tokens)
        adapter = self._call.requests[0].adapter
        self._accounts.record(
            Usage(
                request_id=self._call.id,
                tenant=self._key.tenant if self._key is not None else "",
                key=self._key.name if self._key is not None else "",
                adapter=adapter.name if adapter is not None else "",
                digest=adapter.digest if adapter is not None else "",
                prompt_tokens=prompt,
                cached_tokens=cached,
                generated_tokens=generated,
                status=status,
                code=code,
                started=self._started,
                ended=time.time(),
            )
        )

    async def _take(self, who: str) -> None:
        self._standing = await self._accounts.take(who, self._limits, self._call.reserved_tokens, self._lease)
        if self._left:
            self._settle(who, -self._call.reserved_tokens)

    def _settle(self, who: str, tokens: int) -> None:
        if self._standing is not None and self._standing.refused is None:
            self._accounts.settle(who, self._limits, tokens, self._lease)


def _discard(sets: dict[str, set[T]], name: str, item: T) -> None:
    found = sets.get(name, set())
    found.discard(item)
    if not found:
        sets.pop(name, None)


def _refusal(who: str, standing: Standing, limit: Limit, tokens: int) -> RateLimited:
    """In OpenAI's words, which clients know."""
    number = getattr(standing.limits, limit.value)
    kind = "tokens" if limit is Limit.TOKENS else "requests"
    if standing.retry_after is None:
        text = f"Request too large for the API key {who!r} on {_WORDS[limit]}: Limit {number}, Requested {tokens}."
        return RateLimited(f"{text} Lower max_tokens, or send a shorter prompt.", kind, None, standing)
    text = f"Rate limit reached for the API key {who!r} on {_WORDS[limit]}: Limit {number}."
    return RateLimited(f"{text} Please try again in {standing.retry_after:.3g}s.", kind, standing.retry_after, standing)

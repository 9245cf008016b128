"""One request's life: attempts, one after the other, until every choice is finished, as one stream of tokens.

Before the first token, a failed attempt is repeated. After it, unfinished choices are resumed: another attempt
prefills the prompt again, with the adapter, and replays the choices' tokens on a decode worker. One choice's failure
doesn't disturb the other choices. `attempt` owns calls and leases; `admission` owns the queue.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass

from preft.core.errors import EngineFailed, PreftError, WorkerFull
from preft.core.request import GenerateRequest, TokenDelta
from preft.core.settings import RouterSettings
from preft.router.admission import Admission
from preft.router.attempt import FINAL, Attempt, Choice, Job
from preft.router.channels import WorkerChannels
from preft.router.decode_stream import CallCancelled
from preft.router.policy import Demand
from preft.router.prefixes import beginnings
from preft.router.ticket import Ticket
from preft.rpc.convert import sampling_to_proto

logger = logging.getLogger(__name__)

KV_ALLOWANCE = 64  # output tokens per choice that the first reservation of KV blocks covers
GATHERING_SECONDS = 0.02  # a lost worker fails all its choices, though not at the same instant


@dataclass(slots=True)
class Counters:
    """Totals since the process started."""

    retries: int = 0  # attempts repeated before the first token
    resumes: int = 0  # attempts that continue choices that have tokens


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of one of the request's streams: the decode of `choice`, or, if None, the resumption of several."""

    choice: Choice | None
    error: PreftError | None


class RoutedGeneration:
    """A Generation. Call `start`, iterate once, and always `close`."""

    def __init__(
        self,
        request: GenerateRequest,
        admission: Admission,
        channels: WorkerChannels,
        settings: RouterSettings,
        counters: Counters,
    ) -> None:
        limit = settings.request_timeout
        if request.deadline is not None:
            limit = min(limit, request.deadline - time.time())
        since = asyncio.get_running_loop().time()
        self._job = Job(request, sampling_to_proto(request.sampling), since + limit)
        cost = len(request.prompt_token_ids) + min(request.sampling.max_tokens, KV_ALLOWANCE)
        self._order = admission.shares.order(since, request.tenant, request.priority, cost)
        self._beginnings = (
            beginnings(self._job.digest + request.cache_salt, request.prompt_token_ids) if admission.has_choice else ()
        )
        self._admission = admission
        self._channels = channels
        self._settings = settings
        self._counters = counters
        self._choices = [Choice(index) for index in range(request.n)]
        self._avoid: frozenset[str] = frozenset()
        self._first: Ticket | None = None
        self._stream: AsyncGenerator[TokenDelta, None] | None = None
        self._failure: PreftError | None = None  # set by `fail`
        # Running or waiting now, for `stop` and `close`:
        self._tickets: set[Ticket] = set()
        self._attempts: set[Attempt] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Enters the queue. Raises what `Admission.enter` raises, and DeadlineExceeded after the deadline."""
        self._job.remaining()
        self._first = self._enter(self._choices)

    def __aiter__(self) -> AsyncIterator[TokenDelta]:
        if self._stream is None:
            self._stream = self._tokens()
        return self._stream

    def stop(self, index: int) -> None:
        """Stops choice `index`, and cancels its work at once."""
        choice = self._choices[index]
        choice.stopped = True
        if choice.attempt is not None:
            choice.attempt.stop(choice)
        if not any(other.open for other in self._choices):
            self._cancel()

    def fail(self, error: PreftError) -> None:
        """Cancels the request's work at once. Unless the request is complete, the iteration raises `error`."""
        if any(choice.open for choice in self._choices):
            self._failure = error
        self._stop_all()

    async def close(self) -> None:
        """Cancels all running work, and releases all that the request holds."""
        self._stop_all()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._stream is not None:
            with suppress(RuntimeError):  # another task iterates; the cancelled calls end its loop
                await self._stream.aclose()

    async def _tokens(self) -> AsyncGenerator[TokenDelta, None]:
        async with aclosing(self._serve(self._choices, self._first)) as deltas:
            async for delta in deltas:
                yield delta
        if self._failure is not None:
            raise self._failure

    def _stop_all(self) -> None:
        for choice in self._choices:
            choice.stopped = True
        self._cancel()

    def _cancel(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()
        for attempt in self._attempts:
            attempt.close()

    def _enter(self, choices: Sequence[Choice]) -> Ticket:
        request, done = self._job.request, max(len(choice.tokens) for choice in choices)
        prompt, most = len(request.prompt_token_ids), request.sampling.max_tokens
        demand = Demand(
            digest=self._job.digest,
            kv_tokens=prompt + min(most, done + KV_ALLOWANCE),
            max_tokens=prompt + most,
            prompt_tokens=prompt,
            choices=len(choices),
            decodes=most > 1,
            adapter=request.adapter,
            order=self._order,
            beginnings=self._beginnings,
            avoid=self._avoid,
        )
        indexes = [choice.index for choice in choices]
        ticket = self._admission.enter(demand, indexes, started=self._first is not None)
        self._tickets.add(ticket)
        return ticket

    async def _serve(self, choices: Sequence[Choice], ticket: Ticket | None = None) -> AsyncGenerator[TokenDelta, None]:
        """Yields tokens of these choices, over as many attempts as needed, until none is open."""
        while choices := [choice for choice in choices if choice.open]:
            attempt = await self._begin(choices, ticket or self._enter(choices))
            ticket = None
            if attempt is None:
                return
            try:
                for delta in await attempt.first_tokens():
                    if not self._choices[delta.index].stopped:
                        yield delta
                if any(choice.open for choice in choices):
                    await attempt.kv_in_place()
                going = [choice for choice in choices if choice.open]
                if going:
                    attempt.start_decoding(going)
                if len(going) == 1:
                    async with aclosing(attempt.decode(going[0])) as deltas:
                        async for delta in deltas:
                            yield delta
            except CallCancelled:
                continue  # after `stop`, `fail` or `close` no choice is open; if the worker left, open ones go on
            except PreftError as error:
                if not self._may_retry(choices, attempt, error):
                    raise
            else:
                if len(going) > 1:
                    async with aclosing(self._decode_all(attempt, going)) as deltas:
                        async for delta in deltas:
                            yield delta
                return
            finally:
                attempt.close()
                self._attempts.discard(attempt)

    async def _begin(self, choices: Sequence[Choice], ticket: Ticket) -> Attempt | None:
        """Waits for workers. Returns None if every choice was stopped."""
        try:
            lease = await ticket.wait(self._job.remaining())
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return None  # cancelled by `stop`, `fail` or `close`
        finally:
            ticket.cancel()
            self._tickets.discard(ticket)
        attempt = Attempt(self._job, choices, lease, self._channels, self._settings.transfer_timeout)
        self._attempts.add(attempt)
        for choice in choices:
            if choice.stopped:
                attempt.stop(choice)
        return attempt

    async def _decode_all(self, attempt: Attempt, choices: Sequence[Choice]) -> AsyncGenerator[TokenDelta, None]:
        """Yields tokens of several choices as they come. Failed choices are resumed together; running ones go on."""
        queue: asyncio.Queue[TokenDelta | Ended] = asyncio.Queue()
        running = 0

        def run(source: AsyncGenerator[TokenDelta, None], choice: Choice | None) -> None:
            nonlocal running
            running += 1
            task = asyncio.create_task(_feed(source, choice, queue))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        for choice in choices:
            run(attempt.decode(choice), choice)
        while running:
            items = [await queue.get(), *_drained(queue)]
            if any(isinstance(item, Ended) and item.error for item in items):
                await asyncio.sleep(GATHERING_SECONDS)
                items += _drained(queue)
            failed = []
            for item in items:
                if isinstance(item, TokenDelta):
                    yield item
                    continue
                running -= 1
                if item.error is not None:
                    if item.choice is None or not self._may_retry([item.choice], attempt, item.error):
                        raise item.error
                    failed.append(item.choice)
            if failed:
                run(self._serve(failed), None)

    def _may_retry(self, choices: Sequence[Choice], attempt: Attempt, error: PreftError) -> bool:
        """Counts the failure. Returns False for a final error, or after too many failures without a new token."""
        if isinstance(error, WorkerFull):  # another router's requests took the slots: nobody's failure
            attempt.prefill.is_full = True
            return True
        self._avoid |= attempt.blamed
        going = [choice for choice in choices if choice.open]
        for choice in going:
            choice.failures = 1 if len(choice.tokens) > choice.counted else choice.failures + 1
            choice.counted = len(choice.tokens)
        if isinstance(error, FINAL) or any(choice.failures > self._settings.retries for choice in going):
            return False
        if any(choice.tokens for choice in going):
            self._counters.resumes += 1
        elif going:
            self._counters.retries += 1
        return True


def _drained(queue: asyncio.Queue[TokenDelta | Ended]) -> list[TokenDelta | Ended]:
    return [queue.get_nowait() for _ in range(queue.qsize())]


async def _feed(
    source: AsyncGenerator[TokenDelta, None], choice: Choice | None, queue: asyncio.Queue[TokenDelta | Ended]
) -> None:
    """Puts all deltas of `source` into `queue`, and then how the source ended."""
    error: PreftError | None = None
    try:
        async with aclosing(source):
            async for delta in source:
                queue.put_nowait(delta)
    except CallCancelled:
        pass  # cancelled by `stop`, `fail` or `close`
    except PreftError as failure:
        error = failure
    except Exception:
        logger.exception("a choice's stream broke")
        error = EngineFailed("an internal error ended the request")
    queue.put_nowait(Ended(choice, error))

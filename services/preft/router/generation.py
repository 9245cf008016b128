"""One request's life: attempts one after the other until every choice is finished, seen from outside as one stream.

Before the first token a failed attempt is repeated; after it the choices that aren't finished are resumed: their prompt
is prefilled again, with the adapter, and their tokens so far are replayed on a decode worker. A choice that is still
being decoded isn't touched by another's failure.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass

from preft.core.errors import (
    AdapterExists,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    ModelNotFound,
    NumbersNotFinite,
    PreftError,
)
from preft.core.request import GenerateRequest, TokenDelta
from preft.core.settings import RouterSettings
from preft.router.admission import Admission, Ticket
from preft.router.attempt import Attempt, Choice, Job
from preft.router.channels import WorkerChannels
from preft.router.decode_stream import CallCancelled
from preft.router.policy import Demand
from preft.rpc.convert import sampling_to_proto

logger = logging.getLogger(__name__)

# Another worker would say the same.
FINAL = (InvalidRequest, ModelNotFound, AdapterExists, DeadlineExceeded, NumbersNotFinite)
KV_ALLOWANCE = 64  # output tokens per choice for which decode must have room at the start
GATHERING_SECONDS = 0.02  # a lost worker fails all its choices, but not in the same instant


@dataclass(slots=True)
class Counters:
    """Totals since the start."""

    retries: int = 0  # attempts begun again before the first token
    resumes: int = 0  # attempts that took up where others had ended


@dataclass(frozen=True, slots=True)
class Ended:
    """How one of the streams that feed a request ended: the decode of `choice`, or the resumption of several (None)."""

    choice: Choice | None
    error: PreftError | None


class RoutedGeneration:
    """A Generation. `start` it, iterate it once, `close` it in any case."""

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
        self._job = Job(request, sampling_to_proto(request.sampling), since, since + limit)
        self._admission = admission
        self._channels = channels
        self._settings = settings
        self._counters = counters
        self._choices = [Choice(index) for index in range(request.n)]
        self._avoid: frozenset[str] = frozenset()
        self._first: Ticket | None = None
        self._stream: AsyncGenerator[TokenDelta, None] | None = None
        self._failure: PreftError | None = None  # of the whole request, from outside
        # What runs or waits now, for `stop` and `close`:
        self._tickets: set[Ticket] = set()
        self._attempts: set[Attempt] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Takes a place in the queue. Raises what `Admission.enter` raises, and DeadlineExceeded if it's too late."""
        self._job.remaining()
        self._first = self._enter(self._choices)

    def __aiter__(self) -> AsyncIterator[TokenDelta]:
        if self._stream is None:
            self._stream = self._tokens()
        return self._stream

    def stop(self, index: int) -> None:
        """No more tokens of choice `index` are wanted; its work is cancelled at once."""
        choice = self._choices[index]
        choice.stopped = True
        if choice.attempt is not None:
            choice.attempt.stop(choice)
        if not any(other.open for other in self._choices):
            self._cancel()

    def fail(self, error: PreftError) -> None:
        """Ends the request at once: its work is cancelled, and the iteration raises `error`, unless it is complete."""
        if any(choice.open for choice in self._choices):
            self._failure = error
        self._stop_all()

    async def close(self) -> None:
        """Cancels whatever still runs, and gives back all that the request holds."""
        self._stop_all()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._stream is not None:
            with suppress(
                RuntimeError
            ):  # another task is iterating: its read was cancelled above, and it ends by itself
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
        )
        ticket = self._admission.enter(
            demand,
            [choice.index for choice in choices],
            since=self._job.since,
            started=self._first is not None,
            avoid=self._avoid,
        )
        self._tickets.add(ticket)
        return ticket

    async def _serve(self, choices: Sequence[Choice], ticket: Ticket | None = None) -> AsyncGenerator[TokenDelta, None]:
        """Tokens of these choices until none is open, with as many attempts as that takes."""
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
                continue  # by `stop`, `fail` or `close`: no choice is open; or the worker has left: open ones go on
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
        """Waits for workers. None if no choice is wanted any more."""
        try:
            lease = await ticket.wait(self._job.remaining())
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return None  # by `stop`, `fail` or `close`
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
        """Tokens of several choices as they come. Those that fail are resumed together while the others go on."""
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
        """Counts the failure: too many in a row without a new token are the end."""
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
    """One task's life: everything from `source` into `queue`, and how it ended."""
    error: PreftError | None = None
    try:
        async with aclosing(source):
            async for delta in source:
                queue.put_nowait(delta)
    except CallCancelled:
        pass  # by `stop`, `fail` or `close`
    except PreftError as failure:
        error = failure
    except Exception:
        logger.exception("a choice's stream broke")
        error = EngineFailed("an internal error ended the request")
    queue.put_nowait(Ended(choice, error))

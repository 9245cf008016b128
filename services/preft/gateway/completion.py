"""Runs one API call: one task per prompt feeds its choices' deltas, as text, to the reader that writes the reply.

Owns these tasks: they end with the context. Leaving the context early cancels the work on every worker. Formats
nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from preft.core.errors import EngineFailed, InvalidRequest, NumbersNotFinite, PreftError, mapping_of
from preft.core.ports import Generator
from preft.core.request import GenerateRequest, TokenDelta, TokenLogprob
from preft.gateway.access.accounts import CLIENT_GONE, Account
from preft.gateway.api_call import ApiCall
from preft.gateway.prompt_logprobs import prompt_first, without_output
from preft.gateway.text.choice import ChoiceDelta, ChoiceText
from preft.gateway.text.choice_reader import ChoiceReader
from preft.gateway.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class Completion:
    """The running API call. `cached_tokens` counts the prompt tokens found in prefix caches so far.

    `reasoning_tokens` counts those of the choices that have ended; None if the server doesn't parse reasoning.

    Entering the context raises RateLimited if `account` refuses the call. Its end settles the account.
    """

    def __init__(
        self, generator: Generator, tokenizer: Tokenizer, call: ApiCall, account: Account | None = None
    ) -> None:
        self.call = call
        self.cached_tokens = 0
        self.reasoning_tokens = 0 if call.reading is not None and call.reading.counts_reasoning else None
        self._account = account
        self._generated = 0
        self._generator = generator
        self._tokenizer = tokenizer
        self._tasks: list[asyncio.Task[None]] = []
        self._generating: set[asyncio.Task[None]] = set()
        self._deltas: list[ChoiceDelta] = []
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        if self._account is not None:
            await self._account.begin()
        self._tasks = [asyncio.create_task(self._run(p, request)) for p, request in enumerate(self.call.requests)]
        self._generating.update(self._tasks)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_whole = not (self._generating or self._error or error)
        for task in self._generating:
            task.cancel()
        try:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:
            if self._account is not None:
                status, code = (200, "ok") if is_whole else _outcome(self._error or error)
                self._account.end(status, code, self._generated, self.cached_tokens)

    @property
    def headers(self) -> list[tuple[str, str]]:
        """Further headers of the reply, or metadata in gRPC."""
        return self._account.headers if self._account is not None else []

    async def take(self) -> list[ChoiceDelta]:
        """Returns all deltas that are ready and waits for at least one; an empty list follows the last delta.

        Raises the generator's error after the deltas before it.
        """
        while not self._deltas:
            if self._error is not None:
                raise self._error
            if not self._generating:
                return []
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        deltas, self._deltas = self._deltas, []
        return deltas

    async def _run(self, number: int, request: GenerateRequest) -> None:
        first = number * request.n
        prompt = request.prompt_token_ids
        choices = [ChoiceText(first + i, self._tokenizer, prompt, self.call.options) for i in range(request.n)]
        reading = self.call.reading
        try:
            readers = None if reading is None else [reading.reader(prompt) for _ in choices]
            async with self._generator.generate(request) as generation:
                wants_prompt = request.sampling.prompt_logprobs is not None
                async for delta in prompt_first(generation) if wants_prompt else generation:
                    _check_numbers(delta.logprobs)
                    self.cached_tokens += delta.cached_tokens
                    choice = choices[delta.index]
                    if choice.finished:
                        continue  # was on its way when a stop string ended the choice
                    if readers is None:
                        pushed = choice.push(delta)
                    elif (reader := readers[delta.index]).calls_alone is not None:
                        pushed = reader.read_calls(choice.push(delta))
                    else:
                        pushed = await self._read(reader, choice, delta)
                    if delta.prompt_logprobs is not None:
                        pushed = dataclasses.replace(pushed, prompt_logprobs=delta.prompt_logprobs)
                    if self.call.prompt_only:
                        pushed = without_output(pushed)
                    self._generated += len(pushed.token_ids)
                    self._deltas.append(pushed)
                    if choice.finished and delta.finish_reason is None:
                        generation.stop(delta.index)
                    self._wake()
                if not all(choice.finished for choice in choices):
                    raise EngineFailed("generation ended before all choices were finished")
                # The reader needn't wait for the end of this context, and the reader's end must not cancel it.
                self._generating.discard(self._tasks[number])
                self._wake()
        except (Exception, asyncio.CancelledError) as error:  # the top of a task; the reader raises it
            if isinstance(error, asyncio.CancelledError):
                if self._tasks[number].cancelling():
                    raise
                error = EngineFailed("what the request waited for was cancelled")
            if self._tasks[number] not in self._generating:
                _log.exception("request %s was answered, but left behind an error", request.request_id)
                return
            if isinstance(error, InvalidRequest) and error.param == "structured_outputs":
                error.param = self.call.form_param
            self._error = self._error or error
            self._wake()

    async def _read(self, reader: ChoiceReader, choice: ChoiceText, delta: TokenDelta) -> ChoiceDelta:
        if reader.token_by_token and len(delta.token_ids) > 1:
            pushed = [choice.push(piece) for piece in delta.by_token() if not choice.finished]
        else:
            pushed = [choice.push(delta)]
        read = await reader.read(pushed)
        if choice.finished and self.reasoning_tokens is not None:
            self.reasoning_tokens += reader.reasoning_tokens
        return read

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def _outcome(error: BaseException | None) -> tuple[int, str]:
    """Status and code of a call that didn't end well. Without an error of the server's, its client has left."""
    if isinstance(error, PreftError):
        mapping = mapping_of(error)
        return mapping.status, mapping.code
    if error is None or isinstance(error, asyncio.CancelledError):
        return CLIENT_GONE, "cancelled"
    return 500, "internal_error"


def _check_numbers(entries: Iterable[TokenLogprob]) -> None:
    """Raises NumbersNotFinite for values that can't be log probabilities. Minus infinity is allowed."""
    for entry in entries:
        if not all(value < math.inf for value in (entry.logprob, *(logprob for _, logprob in entry.top))):
            raise NumbersNotFinite("the model computed NaN or infinity in this request")

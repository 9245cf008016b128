"""One attempt at one request: a prefill, its KV handle, and a Decode call for each choice that continues.

The attempt owns the calls, the handle and the lease; `close` releases them in any state. `generation` owns retries.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from preft.core.cluster import Role, Worker
from preft.core.errors import (
    AdapterExists,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    ModelNotFound,
    NumbersNotFinite,
    PreftError,
    TransferFailed,
    WorkerFull,
    WorkerLost,
)
from preft.core.request import GenerateRequest, TokenDelta
from preft.router.channels import WorkerChannels
from preft.router.decode_stream import DecodeCall
from preft.router.lease import Lease
from preft.router.worker_view import WorkerView
from preft.rpc import common_pb2, workers_pb2
from preft.rpc.convert import adapter_to_proto, delta_from_proto
from preft.rpc.prompt_logprobs import PromptParts

# The request or its adapter is at fault: every worker would give the same error.
FINAL = (InvalidRequest, ModelNotFound, AdapterExists, DeadlineExceeded, NumbersNotFinite)
TOO_LATE = "the request's time limit passed before it was finished"


@dataclass(slots=True, eq=False)
class Choice:
    """One of the request's continuations, with its tokens so far."""

    index: int
    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    stopped: bool = False
    failures: int = 0  # consecutive attempts that failed without a new token
    counted: int = 0  # tokens when the last attempt failed
    attempt: Attempt | None = None  # the latest

    @property
    def open(self) -> bool:
        """Whether more tokens are expected."""
        return not (self.finished or self.stopped)

    def take(self, delta: TokenDelta) -> None:
        """Appends the delta's tokens, and notes a finish reason."""
        self.tokens.extend(delta.token_ids)
        if delta.finish_reason is not None:
            self.finished = True


@dataclass(frozen=True, slots=True)
class Job:
    """The data that all attempts at a request share. `deadline` is in loop time."""

    request: GenerateRequest
    sampling: common_pb2.Sampling
    deadline: float

    @property
    def digest(self) -> str:
        """The adapter's digest; "" for the base model."""
        return self.request.adapter.digest if self.request.adapter else ""

    def remaining(self) -> float:
        """Seconds until the deadline. Raises DeadlineExceeded if none are left."""
        left = self.deadline - asyncio.get_running_loop().time()
        if left <= 0:
            raise DeadlineExceeded(TOO_LATE)
        return left


class Attempt:
    """Call `first_tokens`, then `kv_in_place`, then `start_decoding` and `decode`; `close` at any time.

    On a colocated worker `decode` yields all tokens, the first included; `first_tokens` and `kv_in_place` do nothing.

    Each step raises the PreftError that ended it; then `blamed` names the workers to avoid in the next attempt. A step
    that `stop` or `close` ended raises CallCancelled.
    """

    def __init__(
        self, job: Job, choices: Sequence[Choice], lease: Lease, channels: WorkerChannels, transfer_timeout: float
    ) -> None:
        """The attempt takes over `lease`. Choices with tokens are resumed; choices without tokens begin."""
        self.handle = uuid.uuid4().hex
        self.resumes = any(choice.tokens for choice in choices)
        self.blamed: frozenset[str] = frozenset()
        self._job = job
        self._choices = {choice.index: choice for choice in choices}
        for choice in choices:
            choice.attempt = self
        self._lease = lease
        self.prefill = lease.prefill
        self._colocated = lease.prefill.worker.role is Role.COLOCATED
        self._channels = channels
        self._transfer_timeout = transfer_timeout
        self._prefill: Any = None  # while it runs
        self._decodes: dict[int, DecodeCall] = {}  # while they run
        self._going = set(self._choices)
        self._prompting = set(self._choices)  # choices whose prompt isn't computed; used on a colocated worker
        self._unclaimed: set[int] = set()  # choices that may still hold the handle: if any is left, `close` releases it
        self._closed = False

    async def first_tokens(self) -> Sequence[TokenDelta]:
        """Runs the prompt. Returns each choice's first token, already added to the choice; nothing on a resume."""
        if self._colocated:
            return ()
        worker = self._lease.prefill.worker
        self._prefill = self._channels.prefill(worker, self._prefill_request(), self._job.remaining())
        if self._lease.decode is not None:
            self._unclaimed = set(self._going)
        parts = self._prompt_parts(begins=not self.resumes)
        with self._blaming(worker.id):
            event = await self._channels.read(self._prefill, worker)
            while event is not None and event.HasField("prompt_logprobs"):
                parts.add(event.prompt_logprobs)
                event = await self._channels.read(self._prefill, worker)
            if event is None or not event.HasField("first_tokens"):
                raise EngineFailed(f"prefill worker {worker.id} answered no first tokens")
            self._lease.prefill.succeeded()
            self._lease.prompt_ended()
            if self.resumes:
                return ()
            deltas = [delta_from_proto(message) for message in event.first_tokens.choices]
            prompt = parts.whole()
            self._take_first(deltas)
            return [replace(delta, prompt_logprobs=prompt) if delta.index == 0 else delta for delta in deltas]

    async def kv_in_place(self) -> None:
        """Waits until the decode worker has the prompt's whole KV and has verified it."""
        if self._colocated:
            return
        worker = self._lease.prefill.worker
        with self._blaming(worker.id, self._decode_worker().id):
            try:
                async with asyncio.timeout(self._transfer_timeout):
                    event = await self._channels.read(self._prefill, worker)
            except TimeoutError as error:
                raise TransferFailed(f"the KV cache didn't arrive within {self._transfer_timeout:g} s") from error
            if event is None or not event.HasField("kv_pushed"):
                raise TransferFailed(f"prefill worker {worker.id} ended without having sent the KV cache")
        self._prefill_ended()

    def start_decoding(self, choices: Sequence[Choice]) -> None:
        """Requests the further tokens of all open choices in one message, as they share the prompt."""
        calls = self._channels.decode(self._decode_worker(), self._decode_request(choices), self._job.remaining())
        self._decodes = {choice.index: call for choice, call in zip(choices, calls, strict=True)}

    async def decode(self, choice: Choice) -> AsyncGenerator[TokenDelta, None]:
        """Yields the choice's further tokens, already added to the choice, until it is finished or stopped."""
        worker, index = self._decode_worker(), choice.index
        call = self._decodes[index]
        room = self._lease.room(index) - len(self._job.request.prompt_token_ids)
        parts = self._prompt_parts(begins=self._colocated and index == 0 and not choice.tokens)
        first = True
        try:
            with self._blaming(worker.id):
                while choice.open:
                    message = await call.read()
                    if first and message.HasField("prompt_logprobs"):
                        parts.add(message.prompt_logprobs)
                        continue
                    delta = delta_from_proto(message)
                    if delta.index != index:
                        raise EngineFailed(f"decode worker {worker.id} answered another choice than {index}")
                    if first and (prompt := parts.whole()) is not None:
                        delta = replace(delta, prompt_logprobs=prompt)
                    choice.take(delta)
                    if first:
                        first = False
                        self._decoder().succeeded()
                        self._lease.kv_loaded(index)
                        self._prompt_ended(index)  # on a colocated worker a first token means that the prompt is done
                    if choice.finished:
                        del self._decodes[index]
                        self._unclaimed.discard(index)
                        self._end(choice)
                    elif len(choice.tokens) > room:
                        room = self._lease.grow(index) - len(self._job.request.prompt_token_ids)
                    yield delta
        except PreftError as error:
            if not isinstance(error, WorkerLost | DeadlineExceeded):
                self._unclaimed.discard(index)  # the worker ended the choice and its claim
            raise
        finally:
            self._end(choice)

    def stop(self, choice: Choice) -> None:
        """Cancels the work for `choice`; closes the attempt if no other choice continues."""
        if choice.index in self._decodes:
            self._decodes[choice.index].cancel()
        self._end(choice)

    def close(self) -> None:
        """Cancels running calls, and releases the lease and, unless every use of it has ended, the handle."""
        if self._closed:
            return
        self._closed = True
        for call in (self._prefill, *self._decodes.values()):
            if call is not None:
                call.cancel()
        self._lease.release()
        if self._unclaimed:
            self._channels.release(self._decode_worker(), self.handle)

    def _prompt_parts(self, *, begins: bool) -> PromptParts:
        """The prompt's log probabilities as they come: with choice 0 where it `begins`, and never again."""
        request = self._job.request
        wanted = request.sampling.prompt_logprobs if begins else None
        return PromptParts(wanted, len(request.prompt_token_ids))

    def _take_first(self, deltas: list[TokenDelta]) -> None:
        if sorted(delta.index for delta in deltas) != list(range(self._job.request.n)):
            raise EngineFailed(f"prefill worker {self._lease.prefill.id} answered other choices than it was asked for")
        if any(delta.finish_reason is None and not (delta.token_ids and self._lease.decode) for delta in deltas):
            raise EngineFailed(f"prefill worker {self._lease.prefill.id} neither ended a choice nor gave it a token")
        for delta in deltas:
            choice = self._choices.get(delta.index)  # None: stopped before it began
            if choice is not None:
                choice.take(delta)
        if all(delta.finish_reason for delta in deltas):
            self._prefill_ended()  # no KV is sent
            self._unclaimed.clear()
        for choice in self._choices.values():
            if choice.finished:
                self._unclaimed.discard(choice.index)
                self._end(choice)

    def _prefill_ended(self) -> None:
        self._channels.let_end(self._prefill)
        self._prefill = None
        self._lease.prefill_ended()

    def _end(self, choice: Choice) -> None:
        self._lease.choice_ended(choice.index)
        self._prompt_ended(choice.index)
        self._going.discard(choice.index)
        if not self._going:
            self.close()

    def _prompt_ended(self, index: int) -> None:
        self._prompting.discard(index)
        if self._colocated and not self._prompting:
            self._lease.prefill_ended()

    @contextmanager
    def _blaming(self, *worker_ids: str) -> Iterator[None]:
        try:
            yield
        except DeadlineExceeded:
            raise DeadlineExceeded(TOO_LATE) from None
        except WorkerFull:
            raise
        except TransferFailed:
            self.blamed = frozenset((*worker_ids, self._lease.decode.id if self._lease.decode else ""))
            raise
        except PreftError as error:
            self.blamed = frozenset(worker_ids)
            if isinstance(error, EngineFailed) and not isinstance(error, FINAL):
                self._count_failure()
            raise

    def _count_failure(self) -> None:
        """Counts an engine's failure against its worker, for all requests.

        Other errors say nothing against the worker: an adapter that can't be read, or a peer that didn't take the KV.
        """
        for view in (self._lease.prefill, self._lease.decode):
            if view is not None and view.id in self.blamed:
                view.failed(asyncio.get_running_loop().time())

    def _decode_worker(self) -> Worker:
        return self._decoder().worker

    def _decoder(self) -> WorkerView:
        view = self._lease.prefill if self._colocated else self._lease.decode
        if view is None:
            raise EngineFailed("a choice that goes on has no decode worker")
        return view

    def _prefill_request(self) -> workers_pb2.PrefillRequest:
        request, decode = self._job.request, self._lease.decode
        return workers_pb2.PrefillRequest(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            sampling=self._job.sampling,
            adapter=adapter_to_proto(request.adapter) if request.adapter else None,
            n=len(self._going) if self.resumes else request.n,
            target=workers_pb2.KvTarget(address=decode.worker.address, handle=self.handle) if decode else None,
            resume=self.resumes,
            cache_salt=request.cache_salt,
        )

    def _decode_request(self, choices: Sequence[Choice]) -> workers_pb2.DecodeRequest:
        request = self._job.request
        return workers_pb2.DecodeRequest(
            request_id=request.request_id,
            handle=self.handle,
            prompt_token_ids=request.prompt_token_ids,
            sampling=self._job.sampling,
            adapter_digest=self._job.digest,
            kv_timeout=self._transfer_timeout,
            adapter=adapter_to_proto(request.adapter) if request.adapter and self._colocated else None,
            cache_salt=request.cache_salt,
            choices=[
                workers_pb2.DecodeChoice(index=choice.index, output_token_ids=choice.tokens) for choice in choices
            ],
        )

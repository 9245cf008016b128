"""A Decode call's choices end with an event each, whatever becomes of the task that served them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from preft.core.errors import InvalidRequest
from preft.core.request import FinishReason, TokenDelta
from preft.rpc import workers_pb2
from preft.rpc.prompt_logprobs import PromptParts
from preft.worker.decode.session import DecodeSession, Put, Serve
from support.prompt_logprobs import made_up


@pytest.mark.parametrize("fault", [asyncio.CancelledError(), KeyError("unexpected")])
async def test_a_choice_whose_task_ends_without_a_word_ends_with_an_error(fault: BaseException) -> None:
    async def serve(choice: workers_pb2.DecodeChoice, put: Put) -> None:
        raise fault

    async def commands() -> AsyncIterator[workers_pb2.DecodeCommand]:
        yield start(7)

    async with asyncio.timeout(10):
        events = [event async for batch in DecodeSession(lambda _: serve).run(commands()) for event in batch.events]
    assert [(event.id, event.error.code) for event in events] == [(7, "engine_failed")]


async def test_what_is_wrong_with_a_request_ends_its_choices_and_no_others() -> None:
    async def serve(choice: workers_pb2.DecodeChoice, put: Put) -> None:
        put(TokenDelta(choice.index, (1,), finish_reason=FinishReason.LENGTH))

    def begin(request: workers_pb2.DecodeRequest) -> Serve:
        if not request.prompt_token_ids:
            raise InvalidRequest("there is no prompt", "prompt_token_ids")
        if request.prompt_token_ids[0] == 6:
            raise KeyError("unexpected")
        return serve

    async def commands() -> AsyncIterator[workers_pb2.DecodeCommand]:
        yield start(1, 2)
        yield start(4, prompt=(6,))
        yield start(3, prompt=(5,))

    async with asyncio.timeout(10):
        events = [event async for batch in DecodeSession(begin).run(commands()) for event in batch.events]
    assert {event.id: event.error.code or "good" for event in events} == {
        1: "invalid_request", 2: "invalid_request", 3: "good", 4: "engine_failed",
    }  # fmt: skip


async def test_a_prompts_log_probabilities_come_in_small_messages() -> None:
    """A choice's other tokens aren't held up by one message of megabytes."""
    whole = made_up(range(40_000), 20)

    async def serve(choice: workers_pb2.DecodeChoice, put: Put) -> None:
        put(TokenDelta(0, (1,), finish_reason=FinishReason.LENGTH, prompt_logprobs=whole))

    async def commands() -> AsyncIterator[workers_pb2.DecodeCommand]:
        yield start(1)

    async with asyncio.timeout(20):
        batches = [batch async for batch in DecodeSession(lambda _: serve).run(commands())]
    assert max(batch.ByteSize() for batch in batches) < 200_000
    parts, events = PromptParts(20, 40_000), [event.delta for batch in batches for event in batch.events]
    for event in events[:-1]:
        parts.add(event.prompt_logprobs)
    assert parts.whole() == whole
    assert list(events[-1].token_ids) == [1]


def start(*ids: int, prompt: Sequence[int] = ()) -> workers_pb2.DecodeCommand:
    choices = [workers_pb2.DecodeChoice(id=number) for number in ids]
    return workers_pb2.DecodeCommand(start=workers_pb2.DecodeRequest(prompt_token_ids=prompt, choices=choices))

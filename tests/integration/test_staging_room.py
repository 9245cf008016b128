"""A router over whole workers whose staging memory is scarce."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from preft.core.cluster import Role
from preft.core.errors import InvalidRequest
from preft.core.request import GenerateRequest, Sampling
from preft.router.router import Router
from support.fake_engine import tokens_of
from support.fakes import FakeStore
from support.worker_servers import SECRET, StartFake, settings_for, start


@pytest.mark.parametrize("scarce", [Role.PREFILL, Role.DECODE])
async def test_no_prompt_is_computed_twice_for_lack_of_staging_memory(tmp_path: Path, scarce: Role) -> None:
    """Decoding stands still for longer than a push may take: what has no room waits in the router's queue."""
    settings, store, start_engine = settings_for(tmp_path), FakeStore(), StartFake()
    sampling = Sampling(max_tokens=4, temperature=0.0)
    own = settings.engine(scarce).model_copy(update={"staging_bytes": 1000})  # three prompts of two blocks
    router = settings.router.model_copy(update={"transfer_timeout": 0.3, "poll_interval": 0.05})
    settings = settings.model_copy(update={scarce.value: own, "router": router})
    prompts = [(1, 2, 3, 4, number) for number in range(30)]
    async with AsyncExitStack() as stack:
        workers = [await start(role, settings, store, start_engine) for role in (Role.PREFILL, Role.DECODE)]
        for worker in workers:
            stack.push_async_callback(worker.close)
        decoding = start_engine.engines[Role.DECODE].going
        decoding.clear()
        async with Router(store, settings.router, SECRET) as routed:

            async def tokens(prompt: tuple[int, ...]) -> list[int]:
                async with routed.generate(GenerateRequest("r", prompt, sampling)) as generation:
                    return [token async for delta in generation for token in delta.token_ids]

            asking = asyncio.gather(*map(tokens, prompts))
            await asyncio.sleep(1.0)
            decoding.set()
            assert await asking == [tokens_of("", prompt, sampling) for prompt in prompts]
            assert routed.stats().resumes == routed.stats().retries == 0
            assert len(start_engine.engines[Role.PREFILL].requests) == len(prompts)
            with pytest.raises(InvalidRequest, match=rf"of 41 tokens doesn't fit .* raise {scarce}\.staging_bytes"):
                await tokens(tuple(range(41)))

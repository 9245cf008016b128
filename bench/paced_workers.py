"""A prefill and a decode worker whose engines compute nothing: `python -m bench.paced_workers SETTINGS`.

Servers, gRPC, staging memory and status streams are the product's own. A prompt's first token sets the pace of the
output, so that thousands of streams can be open on two cores. A request's seed may give the output a frame, such as
that of a tool call.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

from tokenizers import pre_tokenizers

from preft.cluster.process import Stop, raise_file_limit
from preft.cluster.worker_process import run_worker
from preft.core.cluster import Role
from preft.core.errors import EngineFailed
from preft.core.request import AdapterRef, FinishReason, TokenDelta
from preft.core.settings import Settings, load_settings
from preft.engine.port import EngineInfo, EngineRequest, EngineStats, check_request
from preft.memory.arena import Region, StagingView
from preft.transfer.seal import read_seal, write_seal
from preft.worker.server import StartEngine

BLOCK, BLOCK_BYTES, BLOCKS = 16, 64, 1 << 20
VOCABULARY, MAX_LENGTH = 8192, 2048
FIRST_WORD = 300  # lower ids of the model's tokenizer are bytes
PACES = {
    FIRST_WORD: 1.0,
    FIRST_WORD + 1: 0.1,
    FIRST_WORD + 2: 0.01,
}  # seconds per output token, by the prompt's first token
QUICK = PACES[FIRST_WORD + 2]  # of other prompts
FRAMES = {  # what stands before and behind the words of an output, by the request's seed
    1: ('{"text": "', '"}'),
    2: ('[{"name": "note", "parameters": {"text": "', '"}}]'),
    3: ('<tool_call>\n{"name": "note", "arguments": {"text": "', '"}}\n</tool_call>'),
}
_BYTES = {character: 3 + place for place, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def spelled(text: str) -> tuple[int, ...]:
    """Tokens of single bytes in the vocabulary of `bench.random_model`. The text has ASCII characters alone."""
    return tuple(_BYTES[character] for character in text.replace(" ", "\u0120").replace("\n", "\u010a"))


def output_token(number: int, seed: int | None, max_tokens: int) -> int:
    """Token `number` of an output, from 1."""
    head, tail = map(spelled, FRAMES.get(seed or 0, ("", "")))
    if number <= len(head):
        return head[number - 1]
    if number > max_tokens - len(tail):
        return tail[number - 1 - (max_tokens - len(tail))]
    return FIRST_WORD + number


class PacedEngine:
    """An `Engine` for the base model alone."""

    def __init__(self, role: Role, arena: str) -> None:
        self.info = EngineInfo("paced", BLOCK, BLOCK_BYTES, BLOCKS, MAX_LENGTH, VOCABULARY, ())
        self.stats = EngineStats()
        self._role = role
        self._view = StagingView(arena)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        """See `Engine.generate`. Output tokens count up inside the frame, so that each adds text."""
        check_request(request, self.info)
        if (region := request.save or request.load) is not None:
            with self._view.hold(region) as payload:
                if request.save is not None:
                    write_seal(payload, len(request.prompt_token_ids))
                elif read_seal(payload) != len(request.prompt_token_ids):
                    raise EngineFailed("the region doesn't hold this prompt's KV")
        number, sampling = len(request.output_token_ids), request.sampling
        pace = PACES.get(request.prompt_token_ids[0], QUICK)
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            number += 1
            is_last = self._role is Role.PREFILL or number == sampling.max_tokens
            if self._role is Role.DECODE:
                due += pace
                await asyncio.sleep(due - loop.time())
            token = output_token(number, sampling.seed, sampling.max_tokens)
            yield TokenDelta(request.index, (token,), (), FinishReason.LENGTH if is_last else None)
            if is_last:
                return

    async def place_adapter(self, adapter: AdapterRef, region: Region) -> None:
        """See `Engine.place_adapter`."""

    def forget_adapter(self, digest: str) -> None:
        """See `Engine.forget_adapter`."""

    async def between_steps(self) -> None:
        """See `Engine.between_steps`."""

    def kill(self, reason: str) -> None:
        """See `Engine.kill`: there is no process."""

    async def wait_dead(self) -> str:
        """See `Engine.wait_dead`: it lives on."""
        await asyncio.Event().wait()
        return ""

    async def close(self) -> None:
        """See `Engine.close`."""
        self._view.close()


class StartPaced(StartEngine):
    """Starts PacedEngines."""

    async def __call__(self, settings: Settings, role: Role, arena: str, adapter_arena: str) -> PacedEngine:
        return PacedEngine(role, arena)


async def _run(settings: Settings) -> None:
    stop = Stop()
    stop.arm()
    await asyncio.gather(
        *(
            run_worker(settings, role, f"{role.value}-0", "127.0.0.1", stop, lambda _: None, StartPaced())
            for role in settings.roles
        )
    )


def main() -> None:
    raise_file_limit()
    asyncio.run(_run(load_settings(Path(sys.argv[1]))))


if __name__ == "__main__":
    main()

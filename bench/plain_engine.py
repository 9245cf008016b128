"""Stock vLLM as a baseline: an AsyncLLM with our decode engine's arguments, and none of our extensions.

`python -m bench.plain_engine --settings FILE` prints `{"ready": true}`, then answers lines on stdin.
`{"prompts": [[ids]...], "max_tokens": n, "concurrency": c, "adapters": [path or null...]}` runs the prompts, at most c
at a time, greedy, each to exactly n tokens. The answer is `{"seconds": s, "arrivals": [[t, ...] per prompt]}`: one time
per token, in seconds since the start of the run. With `--lora` the engine serves adapters with vLLM's own multi-LoRA
and our prefill engine's limits; without it all adapters must be null. The program ends at the end of stdin.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from preft.core.cluster import Role
from preft.core.settings import Settings, load_settings
from preft.engine.vllm_engine import engine_args


def plain_args(settings: Settings, *, lora: bool) -> AsyncEngineArgs:
    """The arguments of our decode engine (with `lora`: prefill engine), without our extensions."""
    ours = engine_args(settings, Role.PREFILL if lora else Role.DECODE, arena="")
    return dataclasses.replace(
        ours,
        kv_transfer_config=None,
        worker_cls="auto",
        additional_config={},
        distributed_executor_backend=None,
    )


async def _run(
    llm: AsyncLLM, prompts: list[list[int]], max_tokens: int, concurrency: int, adapters: list[str | None]
) -> dict[str, Any]:
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    room = asyncio.Semaphore(concurrency)
    paths = sorted({path for path in adapters if path is not None})
    loras = {path: LoRARequest(path, paths.index(path) + 1, path) for path in paths}
    begin = time.perf_counter()

    async def one(number: int) -> list[float]:
        times: list[float] = []
        async with room:
            prompt: Any = {"prompt_token_ids": prompts[number]}
            lora = loras.get(adapters[number] or "")
            async for output in llm.generate(prompt, params, f"{begin}-{number}", lora_request=lora):
                times += [time.perf_counter() - begin] * len(output.outputs[0].token_ids)
        return times

    arrivals = await asyncio.gather(*map(one, range(len(prompts))))
    return {"seconds": time.perf_counter() - begin, "arrivals": arrivals}


async def _serve(settings: Settings, lora: bool, out: TextIO) -> None:
    llm = AsyncLLM.from_engine_args(plain_args(settings, lora=lora))
    try:
        print(json.dumps({"ready": True}), file=out, flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(await _run(llm, **json.loads(line))), file=out, flush=True)
    finally:
        llm.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--settings", type=Path, required=True, help="a cluster's settings file")
    parser.add_argument("--lora", action="store_true", help="serve adapters")
    arguments = parser.parse_args()
    os.environ["VLLM_PLUGINS"] = ""  # disables our general plugin
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    out = os.fdopen(os.dup(1), "w")  # vLLM prints to stdout; only our lines may appear there
    os.dup2(2, 1)
    asyncio.run(_serve(load_settings(arguments.settings), arguments.lora, out))


if __name__ == "__main__":
    main()

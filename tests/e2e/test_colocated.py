"""What one engine must do that shares its slots and its prefix cache between prompts and output."""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from pathlib import Path

import httpx
import pytest

from e2e.conftest import REFTS, Served
from preft.cluster.secret import cluster_secret
from preft.core.request import AdapterRef, Sampling
from preft.router.decode_stream import DecodeStream
from preft.rpc import workers_pb2, workers_pb2_grpc
from preft.rpc.convert import adapter_to_proto, sampling_to_proto
from preft.rpc.secret import ClusterChannel
from support.http import post
from support.models import make_lora
from support.reference import Reference

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


def prompt_of(length: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, 512) for _ in range(length)]


def test_32_adapters_decode_at_once_over_4_slots(llama_colocated: Served, tmp_path: Path) -> None:
    """All are decoding before the first has finished, and a new adapter's prompt isn't held up by them."""
    served, names = llama_colocated, [f"user{number}" for number in range(33)]
    for seed, name in enumerate(names):
        folder = make_lora(tmp_path / name, served.model, rank=2, seed=seed)
        body = {"lora_name": name, "lora_path": str(folder)}
        assert post(served.cluster.url, "/v1/load_lora_adapter", body).status_code == 200
    prompts = {name: prompt_of(40, seed) for seed, name in enumerate(names)}
    first: dict[str, float] = {}
    ended: dict[str, float] = {}

    async def main() -> dict[str, list[int]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=served.cluster.url, timeout=300, limits=limits) as client:

            async def stream(name: str, max_tokens: int) -> list[int]:
                body = {
                    "model": name,
                    "prompt": prompts[name],
                    "max_tokens": max_tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": True,
                    "return_token_ids": True,
                }
                tokens: list[int] = []
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    assert response.status_code == 200
                    async for line in response.aiter_lines():
                        if line.startswith("data: {"):
                            first.setdefault(name, time.monotonic())
                            tokens += json.loads(line[6:])["choices"][0].get("token_ids") or []
                ended[name] = time.monotonic()
                return tokens

            running = {name: asyncio.create_task(stream(name, 300)) for name in names[:32]}
            while len(first) < 32:
                await asyncio.sleep(0.01)
            late = await stream(names[32], 4)
            still_running = [name for name, task in running.items() if not task.done()]
            assert len(still_running) == 32
            return {names[32]: late, **{name: await task for name, task in running.items()}}

    outputs = asyncio.run(main())
    assert max(first.values()) < min(ended[name] for name in names[:32])
    reference = Reference(served.model)
    for name, tokens in outputs.items():
        assert len(tokens) == (4 if name == names[32] else 300)
        checked = tokens if name == names[0] else tokens[:4]
        assert checked == reference.greedy(prompts[name], len(checked), tmp_path / name)
    assert served.cluster.idle()


@pytest.mark.parametrize("adapter", [None, "carol", *REFTS])
@pytest.mark.parametrize("done", [1, 5, 40])
def test_a_choice_that_was_begun_elsewhere_goes_on(llama_colocated: Served, adapter: str | None, done: int) -> None:
    """What a router does after a worker died: prompt, adapter and tokens so far, on another one."""
    served = llama_colocated
    prompt = prompt_of(50, seed=done)
    expected = served.expected(prompt, 60, adapter)
    assert go_on(served, prompt, expected[:done], adapter, Sampling(max_tokens=60, temperature=0.0)) == expected[done:]


def test_a_seed_goes_on_too(llama_colocated: Served) -> None:
    served = llama_colocated
    prompt, sampling = prompt_of(50, seed=9), Sampling(max_tokens=40, temperature=1.0, seed=3)
    whole = go_on(served, prompt, [], "carol", sampling)
    assert len(whole) == 40
    assert go_on(served, prompt, whole[:11], "carol", sampling) == whole[11:]


def reference_of(served: Served, name: str) -> AdapterRef:
    entry = served.cluster.gateway.catalog.get(name)
    assert entry is not None
    return AdapterRef(entry.name, entry.digest, entry.source)


def go_on(served: Served, prompt: list[int], output: list[int], adapter: str | None, sampling: Sampling) -> list[int]:
    """The further tokens of a choice that has `output`."""
    entry = reference_of(served, adapter) if adapter else None
    request = workers_pb2.DecodeRequest(
        request_id="resumed",
        handle=uuid.uuid4().hex,
        prompt_token_ids=prompt,
        sampling=sampling_to_proto(sampling),
        adapter_digest=entry.digest if entry else "",
        adapter=adapter_to_proto(entry) if entry else None,
        choices=[workers_pb2.DecodeChoice(output_token_ids=output)],
    )

    async def run() -> list[int]:
        address, secret = served.cluster.decoding.record.address, cluster_secret(served.cluster.settings)
        async with ClusterChannel(address, secret) as channel:
            stream = DecodeStream(workers_pb2_grpc.DecodeWorkerStub(channel), "w", lambda: None)
            [call], tokens = stream.start(request, 60.0), []
            while True:
                delta = await call.read()
                tokens += delta.token_ids
                if delta.finish_reason:
                    await stream.close()
                    return tokens

    return served.cluster.call(run())

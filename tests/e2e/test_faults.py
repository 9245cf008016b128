"""Whatever goes wrong with the KV: the right tokens, or a clear error. Never an answer without the adapter."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest

from e2e.conftest import Served
from preft.cluster.secret import cluster_secret
from preft.core.cluster import Role
from preft.core.errors import InvalidRequest, PreftError, TransferFailed
from preft.core.request import AdapterRef, Sampling
from preft.router.decode_stream import DecodeStream
from preft.rpc import workers_pb2, workers_pb2_grpc
from preft.rpc.convert import adapter_to_proto, sampling_to_proto
from preft.rpc.secret import ClusterChannel
from support.faulty_sender import Fault
from support.http import Ask, complete_all, post
from support.worker_services import rest

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

ADAPTER = "alice"
FOR_EVER = 10**9


def prompt_of(length: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, 512) for _ in range(length)]


def body_for(prompt: list[int], **extra: Any) -> dict[str, Any]:
    return {"model": ADAPTER, "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True, **extra}


@pytest.fixture
def faulty(llama: Served) -> Any:
    """The cluster, whose sender is healthy again afterwards, and which holds nothing then."""
    yield llama
    llama.cluster.sender.fault, llama.cluster.sender.count = None, 0
    assert llama.cluster.idle()


@pytest.mark.parametrize("fault", Fault)
def test_one_failed_transfer_is_repaired(faulty: Served, fault: Fault) -> None:
    """The prompt is prefilled again, with the adapter, and the client sees the very same tokens."""
    prompt = prompt_of(70, 1)
    before = faulty.cluster.sender.pushes
    faulty.cluster.sender.arm(fault, 1)
    [tokens] = complete_all(faulty.cluster.url, faulty.name, [Ask(prompt, 16, ADAPTER)])
    assert tokens == faulty.expected(prompt, 16, ADAPTER)
    assert faulty.cluster.sender.pushes == before + 2


@pytest.mark.parametrize("fault", Fault)
def test_a_lasting_fault_is_a_clear_error(faulty: Served, fault: Fault) -> None:
    faulty.cluster.sender.arm(fault, FOR_EVER)
    response = post(faulty.cluster.url, "/v1/completions", body_for(prompt_of(70, 2)))
    assert response.status_code == 502, response.text
    error = response.json()["error"]
    assert error["code"] == "kv_transfer_failed"
    assert len(error["message"]) > 20


def test_a_lasting_fault_in_a_stream_ends_it_with_an_error(faulty: Served) -> None:
    prompt = prompt_of(70, 3)
    faulty.cluster.sender.arm(Fault.CORRUPT_BYTE, FOR_EVER)
    events = []
    body = body_for(prompt, stream=True, return_token_ids=True)
    with (
        httpx.Client(base_url=faulty.cluster.url, timeout=120) as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        events = [line[6:] for line in response.iter_lines() if line.startswith("data: ") and line != "data: [DONE]"]
    parsed = [json.loads(event) for event in events]
    assert "error" in parsed[-1]
    assert parsed[-1]["error"]["code"] == "kv_transfer_failed"
    choices = [choice for event in parsed[:-1] for choice in event["choices"]]
    assert all(choice["finish_reason"] is None for choice in choices)
    sent = [token for choice in choices for token in choice.get("token_ids") or []]
    assert sent == faulty.expected(prompt, 16, ADAPTER)[: len(sent)]


async def _decode(served: Served, **change: Any) -> list[int]:
    """A Decode call on KV that was pushed for a request of 40 tokens, changed by `change`."""
    cluster = served.cluster
    secret = cluster_secret(cluster.settings)
    prompt = prompt_of(40, 4)
    adapter = cluster.gateway.catalog.get(ADAPTER)
    assert adapter is not None
    sampling = sampling_to_proto(Sampling(max_tokens=8, temperature=0.0))
    target = workers_pb2.KvTarget(address=cluster.worker(Role.DECODE).record.address, handle=change.pop("push"))
    async with (
        ClusterChannel(cluster.worker(Role.PREFILL).record.address, secret) as prefill_channel,
        ClusterChannel(target.address, secret) as decode_channel,
    ):
        prefill = workers_pb2_grpc.PrefillWorkerStub(prefill_channel)
        decode = workers_pb2_grpc.DecodeWorkerStub(decode_channel)
        stream = DecodeStream(decode, "decode", lambda: None)
        request = workers_pb2.PrefillRequest(
            request_id="direct",
            prompt_token_ids=prompt,
            sampling=sampling,
            adapter=adapter_to_proto(AdapterRef(adapter.name, adapter.digest, adapter.source)),
            n=1,
            target=target,
        )
        events = [event async for event in prefill.Prefill(request)]
        first = list(events[0].first_tokens.choices[0].token_ids)
        fields: dict[str, Any] = {
            "request_id": "direct",
            "handle": target.handle,
            "prompt_token_ids": prompt,
            "sampling": sampling,
            "adapter_digest": adapter.digest,
            "kv_timeout": 10,
            "choices": [workers_pb2.DecodeChoice(output_token_ids=first)],
        }
        try:
            return first + await rest(*stream.start(workers_pb2.DecodeRequest(**{**fields, **change}), 60))
        finally:
            await stream.close()
            await decode.Release(workers_pb2.ReleaseRequest(handle=target.handle))


def test_decode_continues_exactly_what_was_pushed(faulty: Served) -> None:
    tokens = faulty.cluster.call(_decode(faulty, push="a" * 32))
    assert tokens == faulty.expected(prompt_of(40, 4), 8, ADAPTER)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"push": "b" * 32, "handle": "c" * 32}, TransferFailed),
        ({"push": "d" * 32, "adapter_digest": ""}, TransferFailed),
        ({"push": "e" * 32, "adapter_digest": "f" * 64}, TransferFailed),
        ({"push": "f" * 32, "prompt_token_ids": prompt_of(40, 5)}, TransferFailed),
        ({"push": "g" * 32, "prompt_token_ids": prompt_of(40, 4)[:-1]}, TransferFailed),
        ({"push": "i" * 32, "choices": [workers_pb2.DecodeChoice()]}, InvalidRequest),
    ],
    ids=["unknown handle", "as base", "other adapter", "other prompt", "shorter prompt", "no first token"],
)
def test_decode_refuses_anything_but_the_pushed_prompt(
    faulty: Served, change: dict[str, Any], error: type[PreftError]
) -> None:
    with pytest.raises(error):
        faulty.cluster.call(_decode(faulty, **dict(change)))


def test_a_used_handle_is_stale(faulty: Served) -> None:
    faulty.cluster.call(_decode(faulty, push="j" * 32))
    with pytest.raises(TransferFailed):
        faulty.cluster.call(_decode(faulty, push="k" * 32, handle="j" * 32))


def test_unload_while_requests_run(faulty: Served) -> None:
    """Requests that were admitted finish on their version; from then on the name is unknown, never the base model."""
    cluster, draw = faulty.cluster, random.Random(9)
    load = {"lora_name": "mayfly", "lora_path": str(faulty.adapters["bob"])}
    assert post(cluster.url, "/v1/load_lora_adapter", load).status_code == 200
    prompts = [[draw.randrange(3, 512) for _ in range(200)] for _ in range(12)]

    async def race() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=cluster.url, timeout=120, limits=limits) as client:

            async def ask(prompt: list[int]) -> httpx.Response:
                body = {**body_for(prompt, return_token_ids=True, max_tokens=40), "model": "mayfly"}
                return await client.post("/v1/completions", json=body)

            early = [asyncio.create_task(ask(prompt)) for prompt in prompts[:6]]
            await asyncio.sleep(0.05)
            racing = [asyncio.create_task(ask(prompt)) for prompt in prompts[6:9]]
            unload = await client.post("/v1/unload_lora_adapter", json={"lora_name": "mayfly"})
            assert unload.status_code == 200
            late = [asyncio.create_task(ask(prompt)) for prompt in prompts[9:]]
            return list(await asyncio.gather(*early, *racing, *late))

    responses = asyncio.run(race())
    for prompt, response in zip(prompts[:9], responses[:9], strict=True):
        if response.status_code == 200:
            assert response.json()["choices"][0]["token_ids"] == faulty.expected(prompt, 40, "bob")
        else:
            assert response.status_code == 404, response.text
    assert any(response.status_code == 200 for response in responses[:6])
    for response in responses[9:]:
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"

"""Damaged requests over HTTP and gRPC to a whole cluster over fake engines: refused, or answered by the named adapter.

Good requests beside them have the right answers, and nothing is left of any request.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from preft.core.cluster import Role
from preft.core.request import Sampling
from preft.core.settings import MiB, Settings
from preft.engine.port import EngineRequest
from preft.gateway.text.tokenizer import Tokenizer
from preft.rpc import adapters_pb2, inference_pb2
from preft.rpc.convert import sampling_to_proto
from preft.worker.server import StartEngine
from support.fake_engine import FakeEngine, tokens_of
from support.fuzzing import Inputs, open_files, share, told
from support.local_cluster import LocalCluster, local_cluster
from support.models import EOS, make_lora, make_model
from support.mutations import TEXTS, changed, damaged, json_bytes, wire_bytes
from support.redis_server import free_port

pytestmark = pytest.mark.timeout(600)

AT_ONCE = 8
PROMPT = [5, 6, 7, 8, 9]
GREEDY = Sampling(max_tokens=8, temperature=0.0, eos_token_ids=(EOS,))
BAD_CODES = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS, grpc.StatusCode.UNAVAILABLE}
REFLECTION = "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
COMPLETION = {
    "model": "alice",
    "prompt": PROMPT,
    "max_tokens": 6,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.01,
    "seed": 3,
    "n": 2,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "stop": ["zz"],
    "stop_token_ids": [4],
    "logit_bias": {"7": -5},
    "logprobs": 2,
    "min_tokens": 1,
    "ignore_eos": True,
    "return_token_ids": True,
    "priority": 1,
    "user": "u",
    "stream": False,
    "echo": True,
    "prompt_logprobs": 1,
    "truncate_prompt_tokens": 9,
    "allowed_token_ids": [4, 5],
}
CHAT = {
    "model": "alice",
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "and?"},
    ],
    "max_completion_tokens": 4,
    "logprobs": True,
    "top_logprobs": 1,
    "return_token_ids": True,
    "chat_template_kwargs": {"a": 1},
    "stream_options": {"include_usage": True},
    "stream": True,
}
FUNCTION = {"name": "look", "description": "looks", "strict": True}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
RESPONSE = {
    "model": "alice",
    "instructions": "be brief",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": "hello", "status": "completed"},
        {"role": "user", "content": "and?"},
    ],
    "max_output_tokens": 4,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 40,
    "seed": 3,
    "tools": [{"type": "function", "parameters": SCHEMA, **FUNCTION}],
    "tool_choice": "none",
    "parallel_tool_calls": False,
    "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True}},
    "include": ["message.output_text.logprobs"],
    "top_logprobs": 1,
    "metadata": {"a": "b"},
    "truncation": "disabled",
    "store": False,
    "stream_options": {"include_obfuscation": False},
    "stream": True,
}
MESSAGES = {
    "model": "alice",
    "system": [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "hello"}]},
        {"role": "user", "content": "and?"},
    ],
    "tools": [{"input_schema": SCHEMA, **FUNCTION}],
    "tool_choice": {"type": "none"},
    "thinking": {"type": "adaptive"},
    "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
}
MESSAGE = {
    **MESSAGES,
    "max_tokens": 4,
    "stop_sequences": ["zz"],
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 40,
    "stream": False,
    "metadata": {"user_id": "u"},
}


class Public:
    """The cluster, its adapters `alice` and `bob`, and the engines by role."""

    def __init__(self, cluster: LocalCluster, start: StartKept, folder: Path, grpc_port: int) -> None:
        self.cluster, self.engines, self.folder = cluster, start.engines, folder
        self.grpc = f"127.0.0.1:{grpc_port}"
        self.digests = {"": "", "model": ""}
        self.tokenizer = Tokenizer.load(folder / "model")

    def add(self, name: str) -> str:
        """Adds the adapter, unless it is there; returns its digest."""
        catalog = self.cluster.gateway.catalog
        return str(self.cluster.call(catalog.add(name, str(self.folder / name), replace=True)).digest)

    def bodies(self) -> Mapping[tuple[str, str], dict[str, Any]]:
        source = str(self.folder / "bob")
        return {
            ("POST", "/v1/completions"): COMPLETION,
            ("POST", "/v1/chat/completions"): CHAT,
            ("POST", "/tokenize"): {"model": "alice", "messages": CHAT["messages"], "chat_template_kwargs": {"a": 1}},
            ("POST", "/detokenize"): {"model": "alice", "tokens": PROMPT},
            ("POST", "/v1/adapters"): {"name": "bob", "source": source, "replace": True, "stream": False},
            ("PATCH", "/v1/adapters/bob"): {"pinned": False},
            ("POST", "/v1/load_lora_adapter"): {"lora_name": "bob", "lora_path": source, "load_inplace": True},
            ("POST", "/v1/unload_lora_adapter"): {"lora_name": "bob"},
            ("POST", "/v1/responses"): RESPONSE,
            ("POST", "/v1/messages"): MESSAGE,
            ("POST", "/v1/messages/count_tokens"): MESSAGES,
        }

    def messages(self) -> Mapping[str, Message]:
        return {
            "preft.v1.Inference/Generate": inference_pb2.GenerateRequest(
                model="alice",
                tokens=inference_pb2.TokenIds(ids=PROMPT),
                n=2,
                sampling=sampling_to_proto(Sampling(max_tokens=4, temperature=0.0, logit_bias={7: -5.0}, logprobs=1)),
                stop=["zz"],
                timeout_seconds=5,
                user="u",
            ),
            "preft.v1.Inference/Chat": inference_pb2.ChatRequest(body=json.dumps(CHAT).encode(), timeout_seconds=5),
            "preft.v1.Adapters/Add": adapters_pb2.AddAdapterRequest(
                name="bob", source=str(self.folder / "bob"), replace=True
            ),
            "preft.v1.Adapters/List": adapters_pb2.ListAdaptersRequest(limit=3, after="a", search="b"),
            "preft.v1.Adapters/Get": adapters_pb2.GetAdapterRequest(name="alice"),
            "preft.v1.Adapters/Pin": adapters_pb2.PinAdapterRequest(name="bob", pinned=False),
            "preft.v1.Adapters/Remove": adapters_pb2.RemoveAdapterRequest(name="bob"),
            "grpc.health.v1.Health/Check": health_pb2.HealthCheckRequest(service="preft.v1.Inference"),
            REFLECTION: reflection_pb2.ServerReflectionRequest(file_containing_symbol="preft.v1.Inference"),
        }

    def held(self) -> tuple[int, int, int]:
        """Tasks of the servers, descriptors of the process, and what requests hold in workers and router."""

        async def count() -> tuple[int, int]:
            stats = self.cluster.gateway.router.stats()
            used = sum(stats.in_flight.values()) + stats.waiting
            for worker in self.cluster.workers.values():
                status = worker.status()
                used += status.running + status.open_handles + status.staging_bytes_used + status.kv_blocks_used
            return len(asyncio.all_tasks()), used

        tasks, used = self.cluster.call(count())
        return tasks, open_files(), used


class StartKept(StartEngine):
    """Starts fake engines with room for every prompt of the model, and keeps them."""

    def __init__(self) -> None:
        self.engines: dict[Role, FakeEngine] = {}

    async def __call__(self, settings: Settings, role: Role, arena: str, adapter_arena: str) -> FakeEngine:
        self.engines[role] = FakeEngine(role, arena, adapter_arena, kv_blocks=4096)
        return self.engines[role]


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Public]:
    folder = tmp_path_factory.mktemp("public")
    model = make_model(folder / "model", max_position_embeddings=128)
    adapters = {name: str(make_lora(folder / name, model, seed=seed)) for seed, name in enumerate(("alice", "bob"))}
    small = {"staging_bytes": MiB}
    start, port = StartKept(), free_port()
    with local_cluster(
        model,
        folder / "state",
        start_engine=start,
        prefill=small,
        decode=small,
        grpc_port=port,
        adapter_sources=[str(folder)],
        router={"transfer_timeout": 3.0},
    ) as cluster:
        public = Public(cluster, start, folder, port)
        for name in adapters:
            public.digests[name] = public.add(name)
        yield public


def expected(public: Public, model: str, sampling: Sampling = GREEDY) -> list[int]:
    return tokens_of(public.digests[model], PROMPT, sampling)


async def answered_right(public: Public, client: httpx.AsyncClient) -> None:
    """Good requests of the base model and of an adapter, at once."""

    async def ask(model: str) -> None:
        body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
        reply = await client.post("/v1/completions", json=body)
        assert reply.status_code == 200, reply.text
        assert reply.json()["choices"][0]["token_ids"] == expected(public, model)

    await asyncio.gather(ask("model"), ask("alice"))


def replies_of(text: str) -> list[Any]:
    """The events of a stream, or the whole reply."""
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")] or [json.loads(text)]


def check_answer(public: Public, text: str) -> None:
    """All tokens of a generated answer are those of the adapter that it names."""
    replies = replies_of(text)
    tokens: dict[int, list[int]] = {}
    for reply in replies:
        for choice in reply.get("choices", ()):
            tokens.setdefault(choice["index"], []).extend(choice.get("token_ids") or ())
    model = replies[0]["model"].partition("@")[0]
    asked = [
        request
        for role in (Role.DECODE, Role.PREFILL)
        for request in public.engines[role].requests
        if request.request_id.startswith(replies[0]["id"])
    ]
    for index, got in tokens.items():
        request = next((one for one in asked if is_choice(one, index, len(tokens))), None)
        if request is not None:
            known = tokens_of(public.digests[model], request.prompt_token_ids, request.sampling, index=request.index)
            assert got == known[: len(got)]
        assert request is not None or not got


def is_choice(request: EngineRequest, index: int, choices: int) -> bool:
    """Whether the engine's request made the choice of an answer to one prompt."""
    return request.index == index if choices > 1 else True


def check_response(public: Public, text: str) -> None:
    *_, last = replies_of(text)
    reply = last.get("response", last)
    texts = [part["text"] for item in reply["output"] if item["type"] == "message" for part in item["content"]]
    check_text(public, reply["id"], reply["model"], "".join(texts))


def check_message(public: Public, text: str) -> None:
    first, *events = replies_of(text)
    reply = first.get("message", first)
    texts = [block["text"] for block in reply["content"]]
    texts += [event["delta"].get("text", "") for event in events if event["type"] == "content_block_delta"]
    check_text(public, reply["id"], reply["model"], "".join(texts))


def check_text(public: Public, id: str, model: str, text: str) -> None:
    """The text is the beginning of what the adapter's tokens say. It may end inside a character."""
    requests = [request for role in (Role.DECODE, Role.PREFILL) for request in public.engines[role].requests]
    request = next(request for request in requests if request.request_id.startswith(id))
    known = tokens_of(public.digests[model.partition("@")[0]], request.prompt_token_ids, request.sampling)
    assert public.tokenizer.decode(known, skip_special_tokens=True).startswith(text.rstrip("\ufffd"))


def unchecked(public: Public, text: str) -> None:
    """The reply has no generated text."""


CHECKS = {
    "/v1/completions": check_answer,
    "/v1/chat/completions": check_answer,
    "/v1/responses": check_response,
    "/v1/messages": check_message,
}


def settled(public: Public, before: tuple[int, int, int]) -> bool:
    """Whether no task, no descriptor and no memory stays."""
    return public.cluster.wait(lambda: all(a <= b for a, b in zip(public.held(), before, strict=True)), 30)


def client_of(public: Public) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=public.cluster.url, timeout=60, trust_env=False)


async def warm(public: Public) -> None:
    async with client_of(public) as client:
        await asyncio.gather(*(answered_right(public, client) for _ in range(AT_ONCE)))


@share
@pytest.mark.parametrize("number", range(11))
def test_http_bodies(public: Public, number: int, whole: bool) -> None:
    (method, path), body = list(public.bodies().items())[number]
    inputs = Inputs("HTTP bodies", whole, parts=11, part=number)

    async def one(client: httpx.AsyncClient, source: random.Random) -> None:
        content = json_bytes(source, body)
        with told(content):
            reply = await client.request(method, path, content=content, headers={"content-type": "application/json"})
            assert reply.status_code < 500, reply.text
            if reply.status_code == 200:
                inputs.took()
                CHECKS.get(path, unchecked)(public, reply.text)
            else:
                assert reply.json()["error"]["message"]

    async def main() -> None:
        async with client_of(public) as client:
            pending = iter(inputs)
            while batch := list(itertools.islice(pending, AT_ONCE)):
                await asyncio.gather(answered_right(public, client), *(one(client, source) for source in batch))

    async def undamaged() -> None:
        async with client_of(public) as client:
            reply = await client.request(method, path, json=body)
            assert reply.status_code == 200 or "unload" in path, reply.text
            CHECKS.get(path, unchecked)(public, reply.text)

    public.add("bob")
    asyncio.run(undamaged())
    asyncio.run(warm(public))
    before = public.held()
    asyncio.run(main())
    assert settled(public, before), (before, public.held())


def begun(channel: grpc.aio.Channel, rpc: str, content: bytes) -> Any:
    """The call with one message."""
    if rpc == REFLECTION:
        return channel.stream_stream(f"/{rpc}")(iter([content]), timeout=20)
    return channel.unary_stream(f"/{rpc}")(content, timeout=20)


@share
@pytest.mark.parametrize("number", range(9))
def test_public_grpc(public: Public, number: int, whole: bool) -> None:
    rpc, message = list(public.messages().items())[number]
    inputs = Inputs("public gRPC", whole, parts=9, part=number)

    async def one(channel: grpc.aio.Channel, source: random.Random) -> None:
        content = wire_bytes(source, message)
        with told(content):
            stream = begun(channel, rpc, content)
            replies = []
            with suppress(grpc.aio.AioRpcError):
                async for reply in stream:
                    replies.append(reply)
            code, says = await stream.code(), await stream.details()
            assert code not in BAD_CODES, (code, says)
            if code is grpc.StatusCode.OK:
                inputs.took()
            if code is grpc.StatusCode.OK and rpc.endswith("Generate"):
                asked = inference_pb2.GenerateRequest.FromString(content)
                parts = [inference_pb2.GenerateReply.FromString(reply) for reply in replies]
                assert {part.adapter_digest for part in parts} == {public.digests[asked.model.partition("@")[0]]}

    async def main() -> None:
        async with client_of(public) as client, grpc.aio.insecure_channel(public.grpc) as channel:
            pending = iter(inputs)
            while batch := list(itertools.islice(pending, AT_ONCE)):
                await asyncio.gather(answered_right(public, client), *(one(channel, source) for source in batch))

    async def undamaged() -> None:
        async with grpc.aio.insecure_channel(public.grpc) as channel:
            stream = begun(channel, rpc, message.SerializeToString())
            assert [reply async for reply in stream] or rpc.endswith("List")

    public.add("bob")
    asyncio.run(undamaged())
    asyncio.run(warm(public))
    before = public.held()
    asyncio.run(main())
    assert settled(public, before), (before, public.held())


def raw_requests(folder: Path) -> list[bytes]:
    """Whole HTTP requests, as they go over the wire."""
    host = b"Host: localhost\r\n"
    streamed = {**COMPLETION, "stream": True}
    del streamed["prompt_logprobs"]  # streams can't have them
    body = json.dumps(streamed).encode()
    weights = (folder / "bob" / "adapter_model.safetensors").read_bytes()[:2000]
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:30], body[30:])) + b"0\r\n\r\n"
    post = b"POST /v1/completions HTTP/1.1\r\n" + host + b"Content-Type: application/json\r\n"
    return [
        post + b"Content-Length: %d\r\n\r\n" % len(body) + body,
        post + b"Transfer-Encoding: chunked\r\n\r\n" + chunked,
        b"PUT /v1/adapters/carl?replace=1 HTTP/1.1\r\n" + host + b"Content-Length: %d\r\n\r\n" % len(weights) + weights,
        b"GET /v1/adapters?limit=2&after=a&search=b&kind=lora&pinned=false HTTP/1.1\r\n" + host + b"\r\n",
        b"GET /v1/models/alice HTTP/1.1\r\n" + host + b"Accept: */*\r\n\r\n",
        b"DELETE /v1/adapters/carl HTTP/1.1\r\n" + host + b"\r\n",
        b"GET /v1/workers HTTP/1.0\r\n" + host + b"Range: bytes=0-5\r\nConnection: keep-alive\r\n\r\n",
        b"OPTIONS /v1/completions HTTP/1.1\r\n" + host + b"Origin: http://elsewhere\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n" + host + b"Expect: 100-continue\r\nUpgrade: h2c\r\n\r\n",
    ]


@share
def test_http_requests(public: Public, whole: bool) -> None:
    inputs = Inputs("HTTP requests", whole)
    host, _, port = public.cluster.gateway.address.rpartition(":")
    requests = raw_requests(public.folder)

    async def exchange(content: bytes) -> bytes:
        """The beginning of the answer; nothing if the connection just ends, or waits for more."""
        reader, writer = await asyncio.open_connection(host, int(port))
        answer = b""
        with suppress(ConnectionError, TimeoutError):
            writer.write(content)
            await writer.drain()
            async with asyncio.timeout(0.5):
                answer = await reader.read(1 << 16)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        return answer

    async def one(source: random.Random) -> None:
        content = source.choice(requests)
        if source.random() < 0.2:  # another path
            start, _, rest = content.partition(b" HTTP")
            other = str(changed(source, source.choice(TEXTS))).encode(errors="surrogatepass")
            content = start + other.replace(b" ", b"+") + b" HTTP" + rest
        content = damaged(source, content)
        with told(content):
            answer = await exchange(content)
            assert not answer or (answer.startswith(b"HTTP/1.") and answer[9:12].isdigit()), answer
            assert answer[9:10] != b"5", answer
            if answer[9:12] == b"200":
                inputs.took()

    async def main() -> None:
        async with client_of(public) as client:
            pending = iter(inputs)
            answers = [(await exchange(request))[9:12] for request in requests]
            assert answers == [b"200", b"200", b"400", b"200", b"200", b"404", b"200", b"403", b"200"]
            while batch := list(itertools.islice(pending, AT_ONCE)):
                await asyncio.gather(answered_right(public, client), *map(one, batch))

    asyncio.run(warm(public))
    before = public.held()
    asyncio.run(main())
    assert settled(public, before), (before, public.held())

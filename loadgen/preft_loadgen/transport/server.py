"""A server under test: what it serves, one request to it, and its adapters. The same over HTTP and gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from preft_loadgen.errors import InvalidArgument, RequestFailed
from preft_loadgen.traffic.request import Request
from preft_loadgen.transport.http import HttpClient
from preft_loadgen.transport.reply import Reply

Send = Callable[[Request], Awaitable[Reply]]
"""Makes one request. Raises LoadgenError."""


class Api(StrEnum):
    """COMPLETIONS takes token ids and text, CHAT text in messages."""

    COMPLETIONS = "completions"
    CHAT = "chat"


@dataclass(frozen=True, slots=True)
class Models:
    """The names that a server serves. `base` is None if the server doesn't say."""

    base: str | None
    adapters: tuple[str, ...]


class Server(Protocol):
    """One open server. All methods raise RequestFailed."""

    async def models(self) -> Models: ...

    async def send(self, request: Request) -> Reply: ...

    async def load_adapter(self, name: str, folder: str) -> None:
        """Serves the adapter in `folder`, a path on the server, under `name`. Replaces what the name had."""
        ...

    async def unload_adapter(self, name: str) -> None: ...


class HttpServer:
    """An OpenAI-style server. Adapters are models whose `parent` is the base model, as in vLLM and PreFT Serve."""

    def __init__(self, client: HttpClient, api: Api = Api.COMPLETIONS) -> None:
        self._client = client
        self._send = chats(client) if api is Api.CHAT else completions(client)

    async def models(self) -> Models:
        base, adapters = await served_models(self._client)
        return Models(base, adapters)

    async def send(self, request: Request) -> Reply:
        return await self._send(request)

    async def load_adapter(self, name: str, folder: str) -> None:
        body = {"lora_name": name, "lora_path": folder, "load_inplace": True}
        await self._client.post("/v1/load_lora_adapter", body)

    async def unload_adapter(self, name: str) -> None:
        await self._client.post("/v1/unload_lora_adapter", {"lora_name": name})


async def served_models(client: HttpClient) -> tuple[str, tuple[str, ...]]:
    """The base model's name and the adapters' names, as /v1/models lists them. Raises RequestFailed."""
    answer = await client.get_json("/v1/models")
    cards = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(cards, list) or not all(
        isinstance(card, dict) and isinstance(card.get("id"), str) for card in cards
    ):
        raise RequestFailed("/v1/models doesn't list models", kind="malformed")
    bases = [card["id"] for card in cards if card.get("parent") is None]
    if not bases:
        raise RequestFailed("/v1/models lists no base model")
    return bases[0], tuple(card["id"] for card in cards if card.get("parent") is not None)


def completions(client: HttpClient) -> Send:
    """Sends requests to /v1/completions, greedy."""

    async def send(request: Request) -> Reply:
        body = {
            "model": request.model,
            "prompt": request.whole_prompt(),
            "max_tokens": request.output_tokens,
            "temperature": 0,
        }
        if request.exact:
            body["ignore_eos"] = True
        if request.wants_ids:
            body["return_token_ids"] = True
        return await client.stream("/v1/completions", body, cancel_after=request.cancel_after)

    return send


def chats(client: HttpClient) -> Send:
    """Sends requests to /v1/chat/completions, greedy. Prompts are text."""

    async def send(request: Request) -> Reply:
        messages = []
        for said, answer in request.history:
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": request.prompt})
        body = {
            "model": request.model,
            "messages": messages,
            "max_tokens": request.output_tokens,
            "temperature": 0,
        }
        if request.exact:
            body["ignore_eos"] = True
        return await client.stream("/v1/chat/completions", body, cancel_after=request.cancel_after)

    return send


@asynccontextmanager
async def open_server(
    url: str, *, api: Api = Api.COMPLETIONS, api_key: str = "", timeout: float = 600.0
) -> AsyncIterator[Server]:
    """Opens the server at `url`: `http://` or `https://` for `api`, `grpc://` or `grpcs://` for PreFT's gRPC.

    `timeout` in seconds per request. Raises InvalidArgument if `url` isn't an address.
    """
    if url.startswith(("grpc://", "grpcs://")):
        if api is Api.CHAT:
            raise InvalidArgument("chats go over HTTP: name an http:// address, or leave --api chat out")
        from preft_loadgen.transport.grpc_server import GrpcServer

        async with GrpcServer(url, api_key=api_key, timeout=timeout) as server:
            yield server
    else:
        async with HttpClient(url, timeout=timeout, api_key=api_key) as client:
            yield HttpServer(client, api)

"""PreFT's gRPC, `preft.v1.Inference`. The messages come from the server's own reflection service."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import grpc
import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from preft_loadgen.errors import InvalidArgument, RequestFailed
from preft_loadgen.traffic.request import Request
from preft_loadgen.transport.http import check_timeout
from preft_loadgen.transport.reply import CANCELLED, Reply
from preft_loadgen.transport.server import Models

INFERENCE, ADAPTERS = "preft.v1.Inference", "preft.v1.Adapters"
PAGE = 1000  # adapters
FINISHED = {1: "stop", 2: "length", 3: "tool_calls"}
OPTIONS = (("grpc.max_receive_message_length", 64 << 20),)


class GrpcServer:
    """One channel, for all requests, inside `async with`. See `server.Server`."""

    def __init__(self, url: str, *, api_key: str = "", timeout: float = 600.0) -> None:
        """Raises InvalidArgument if `url` isn't `grpc://host:port` or `grpcs://host:port`."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = None
        plain = port is not None and not parts.path.strip("/") and "@" not in parts.netloc
        if parts.scheme not in ("grpc", "grpcs") or not parts.hostname or not plain:
            raise InvalidArgument(f"a gRPC server's address must look like grpc://host:port, not {url!r}")
        check_timeout(timeout)
        self._address = parts.netloc
        self._secure = parts.scheme == "grpcs"
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._timeout = timeout
        self._channel: Any = None
        self._types: dict[str, Any] = {}

    async def __aenter__(self) -> Self:
        if self._secure:
            self._channel = grpc.aio.secure_channel(self._address, grpc.ssl_channel_credentials(), options=OPTIONS)
        else:
            self._channel = grpc.aio.insecure_channel(self._address, options=OPTIONS)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def models(self) -> Models:
        """The adapters; the catalog doesn't name the base model."""
        names: list[str] = []
        while True:
            page = await self._call(ADAPTERS, "List", {"limit": PAGE, "after": names[-1] if names else ""})
            names += [adapter.name for adapter in page.adapters]
            if not page.has_more or not page.adapters:
                return Models(None, tuple(names))

    async def load_adapter(self, name: str, folder: str) -> None:
        await self._call(ADAPTERS, "Add", {"name": name, "source": folder, "replace": True})

    async def unload_adapter(self, name: str) -> None:
        await self._call(ADAPTERS, "Remove", {"name": name})

    async def send(self, request: Request) -> Reply:
        """Streams one greedy completion."""
        ask, answer = await self._method(INFERENCE, "Generate")
        message = ask(model=request.model)
        prompt = request.whole_prompt()
        if isinstance(prompt, str):
            message.text = prompt
        else:
            message.tokens.ids.extend(prompt)
        message.sampling.max_tokens, message.sampling.temperature = request.output_tokens, 0.0
        message.sampling.ignore_eos = request.exact
        stream = self._channel.unary_stream(f"/{INFERENCE}/Generate", ask.SerializeToString, answer.FromString)
        arrivals: list[float] = []
        sizes: list[int] = []
        ids: list[int] = []
        texts: list[str] = []
        reason, prompt_tokens = "", 0
        started = time.perf_counter()
        call = stream(message, timeout=self._timeout, metadata=self._metadata)
        try:
            async for reply in call:
                texts.append(reply.text)
                prompt_tokens = reply.prompt_tokens or prompt_tokens
                if reply.delta.token_ids:
                    arrivals.append(time.perf_counter())
                    sizes.append(len(reply.delta.token_ids))
                    ids += reply.delta.token_ids
                reason = FINISHED.get(reply.delta.finish_reason, reason)
                if request.cancel_after is not None and len(arrivals) >= request.cancel_after:
                    call.cancel()
                    reason = CANCELLED
                    break
        except grpc.RpcError as error:
            raise _failed(error) from error
        finally:
            call.cancel()
        if not reason:
            raise RequestFailed("the stream ended before its answer was whole", kind="broken stream")
        ended = time.perf_counter()
        return Reply(
            started, ended, tuple(arrivals), len(ids), "".join(texts), reason, prompt_tokens, tuple(sizes), tuple(ids)
        )

    async def _call(self, service: str, method: str, fields: dict[str, Any]) -> Any:
        ask, answer = await self._method(service, method)
        call = self._channel.unary_unary(f"/{service}/{method}", ask.SerializeToString, answer.FromString)
        try:
            return await call(ask(**fields), timeout=self._timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _failed(error) from error

    async def _method(self, service: str, method: str) -> tuple[Any, Any]:
        """The classes of a method's messages."""
        if service not in self._types:
            self._types[service] = await self._reflected(service)
        found = self._types[service].methods_by_name.get(method)
        if found is None:
            raise RequestFailed(f"the server has no {service}.{method}: is it PreFT Serve?", kind="malformed")
        get = message_factory.GetMessageClass
        return get(found.input_type), get(found.output_type)

    async def _reflected(self, service: str) -> Any:
        stub = reflection_pb2_grpc.ServerReflectionStub(self._channel)

        async def ask() -> Any:
            yield reflection_pb2.ServerReflectionRequest(file_containing_symbol=service)

        try:
            async for reply in stub.ServerReflectionInfo(ask(), timeout=self._timeout, metadata=self._metadata):
                raw = reply.file_descriptor_response.file_descriptor_proto
                files = [descriptor_pb2.FileDescriptorProto.FromString(one) for one in raw]
                return _pool(files).FindServiceByName(service)
        except grpc.RpcError as error:
            raise _failed(error) from error
        except (KeyError, TypeError, ValueError) as error:
            raise RequestFailed(
                f"the server doesn't describe {service}: is it PreFT Serve?", kind="malformed"
            ) from error
        raise RequestFailed(f"the server doesn't describe {service}: is it PreFT Serve?", kind="malformed")


def _pool(files: list[Any]) -> Any:
    """A pool with the files, each behind those that it imports."""
    pool, waiting = descriptor_pool.DescriptorPool(), {file.name: file for file in files}

    def add(file: Any) -> None:
        for name in file.dependency:
            if name in waiting:
                add(waiting.pop(name))
        pool.Add(file)

    while waiting:
        add(waiting.pop(next(iter(waiting))))
    return pool


def _failed(error: Any) -> RequestFailed:
    code = error.code() if hasattr(error, "code") else None
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return RequestFailed("no whole answer in time", kind="timeout")
    name = code.name.lower().replace("_", " ") if code is not None else "error"
    return RequestFailed(f"{name}: {str(error.details())[:500]}", kind=f"grpc {name}")

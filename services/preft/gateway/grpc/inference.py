"""The public gRPC service Inference: HTTP's pipeline over another transport.

Owns the translation between protobuf and checked bodies. `server` starts the service.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from preft.core.errors import InvalidRequest
from preft.core.request import TokenDelta
from preft.gateway.access.caller import Caller
from preft.gateway.api_call import ApiCall, chat_call, completion_call
from preft.gateway.bodies.parse import INLINE_BYTES, parse_body, parse_json
from preft.gateway.bodies.schemas import ChatBody, CompletionBody
from preft.gateway.completion import Completion
from preft.gateway.deps import GatewayDeps
from preft.gateway.grpc.caller import caller_of
from preft.gateway.text.choice import ChoiceDelta
from preft.rpc import common_pb2, inference_pb2, inference_pb2_grpc
from preft.rpc.convert import delta_to_proto, given_parameters
from preft.rpc.prompt_logprobs import prompt_parts
from preft.rpc.status import errors_reported

Asked = TypeVar("Asked")
Body = TypeVar("Body")


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Absent parameters have the same defaults as over HTTP."""

    def __init__(self, deps: GatewayDeps) -> None:
        self._deps = deps

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Any) -> None:
        async with errors_reported(context), self._deps.drain.running():
            body = await _read(_completion_body, request)
            caller = caller_of(context, self._deps)
            call = await completion_call(body, self._deps, caller, deadline=_deadline(request, context))
            await self._answer(call, caller, context)

    async def Chat(self, request: inference_pb2.ChatRequest, context: Any) -> None:
        async with errors_reported(context), self._deps.drain.running():
            body = await _read(_chat_body, request)
            caller = caller_of(context, self._deps)
            call = await chat_call(body, self._deps, caller, deadline=_deadline(request, context), streamed=True)
            await self._answer(call, caller, context)

    async def _answer(self, call: ApiCall, caller: Caller, context: Any) -> None:
        account = self._deps.account(call, caller)
        async with Completion(self._deps.generator, self._deps.tokenizer, call, account) as completion:
            if account is not None:
                context.set_trailing_metadata(tuple(completion.headers))
            while deltas := await completion.take():
                for delta in _joined(deltas):
                    if delta.prompt_logprobs is not None and delta.index == 0:
                        for part in prompt_parts(delta.prompt_logprobs):
                            await context.write(_part(part, completion))
                    await context.write(_reply(delta, completion))


async def _read(check: Callable[[Asked], Body], request: Asked) -> Body:
    """`check(request)`, in a thread if the request is large."""
    large = request.ByteSize() > INLINE_BYTES  # type: ignore[attr-defined]
    return await asyncio.to_thread(check, request) if large else check(request)


def _completion_body(request: inference_pb2.GenerateRequest) -> CompletionBody:
    return parse_body(CompletionBody, _body(request))


def _chat_body(request: inference_pb2.ChatRequest) -> ChatBody:
    return parse_body(ChatBody, parse_json(request.body))


def _body(request: inference_pb2.GenerateRequest) -> dict[str, Any]:
    """The message as a /v1/completions body, so that one set of checks serves both APIs."""
    body: dict[str, Any] = {
        "model": request.model,
        "n": request.n or 1,
        "priority": request.priority,
        "user": request.user,
        "stop": list(request.stop),
        **given_parameters(request.sampling),
    }
    if "logit_bias" in body:
        body["logit_bias"] = {str(token_id): bias for token_id, bias in body["logit_bias"].items()}
    match request.WhichOneof("prompt"):
        case "text":
            body["prompt"] = request.text
        case "tokens":
            body["prompt"] = list(request.tokens.ids)
    more = parse_json(request.more) if request.more else {}
    if twice := more.keys() & {"prompt", *body, *common_pb2.Sampling.DESCRIPTOR.fields_by_name}:
        raise InvalidRequest(f"{min(twice)} is a field of its own, and can't be in more.", min(twice))
    if more.get("echo"):
        raise InvalidRequest("echo is for HTTP; the prompt's log probabilities come with prompt_logprobs.", "echo")
    return {**body, **more}


def _deadline(request: inference_pb2.GenerateRequest | inference_pb2.ChatRequest, context: Any) -> float | None:
    """The earlier of the caller's `timeout_seconds` and the call's own deadline, in `time.time()` seconds."""
    if not 0 <= request.timeout_seconds < math.inf:
        raise InvalidRequest("timeout_seconds must be a positive number.", "timeout_seconds")
    limits = [limit for limit in (request.timeout_seconds or None, context.time_remaining()) if limit is not None]
    return time.time() + min(limits) if limits else None


def _joined(deltas: Sequence[ChoiceDelta]) -> Iterable[ChoiceDelta]:
    """One delta per choice. A message costs more than its tokens, so a caller that is behind gets fewer messages."""
    if len(deltas) == 1:
        return deltas
    joined: dict[int, ChoiceDelta] = {}
    for delta in deltas:
        earlier = joined.get(delta.index)
        joined[delta.index] = delta if earlier is None else earlier.then(delta)
    return joined.values()


def _part(part: common_pb2.PromptLogprobs, completion: Completion) -> inference_pb2.GenerateReply:
    return inference_pb2.GenerateReply(
        delta=common_pb2.TokenDelta(prompt_logprobs=part),
        prompt_tokens=completion.call.prompt_tokens,
        cached_tokens=completion.cached_tokens,
        adapter_digest=_digest(completion),
    )


def _digest(completion: Completion) -> str:
    adapter = completion.call.requests[0].adapter
    return adapter.digest if adapter is not None else ""


def _reply(delta: ChoiceDelta, completion: Completion) -> inference_pb2.GenerateReply:
    stop_token_id = delta.stop_reason if isinstance(delta.stop_reason, int) else None
    tokens = TokenDelta(delta.index, delta.token_ids, delta.logprobs, delta.finish_reason, stop_token_id)
    return inference_pb2.GenerateReply(
        text=delta.text,
        delta=delta_to_proto(tokens),
        prompt_tokens=completion.call.prompt_tokens,
        cached_tokens=completion.cached_tokens,
        adapter_digest=_digest(completion),
        reasoning=delta.reasoning,
        tool_calls=[
            inference_pb2.ToolCallDelta(position=call.position, id=call.id, name=call.name, arguments=call.arguments)
            for call in delta.tool_calls
        ],
    )

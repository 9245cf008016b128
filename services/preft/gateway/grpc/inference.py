"""The public gRPC service Inference: HTTP's pipeline over another transport.

Owns the translation between protobuf and checked bodies. `server` starts the service.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

from preft.core.errors import InvalidRequest
from preft.core.request import TokenDelta
from preft.gateway.api_call import completion_call
from preft.gateway.bodies.parse import INLINE_BYTES, parse_body
from preft.gateway.bodies.schemas import CompletionBody
from preft.gateway.completion import Completion
from preft.gateway.deps import GatewayDeps
from preft.gateway.grpc.caller import caller_of
from preft.gateway.text.choice import ChoiceDelta
from preft.rpc import inference_pb2, inference_pb2_grpc
from preft.rpc.convert import delta_to_proto, given_parameters
from preft.rpc.status import errors_reported


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Absent parameters have the same defaults as in /v1/completions."""

    def __init__(self, deps: GatewayDeps) -> None:
        self._deps = deps

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Any) -> None:
        async with errors_reported(context), self._deps.drain.running():
            large = request.ByteSize() > INLINE_BYTES
            caller, deps = caller_of(context, self._deps), self._deps
            body = await asyncio.to_thread(_checked, request) if large else _checked(request)
            call = await completion_call(body, deps, caller, deadline=_deadline(request, context))
            account = deps.account(call, caller)
            async with Completion(deps.generator, deps.tokenizer, call, account) as completion:
                if account is not None:
                    context.set_trailing_metadata(tuple(completion.headers))
                while deltas := await completion.take():
                    for delta in deltas:
                        await context.write(_reply(delta, completion))


def _checked(request: inference_pb2.GenerateRequest) -> CompletionBody:
    return parse_body(CompletionBody, _body(request))


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
    return body


def _deadline(request: inference_pb2.GenerateRequest, context: Any) -> float | None:
    """The earlier of the caller's `timeout_seconds` and the call's own deadline, in `time.time()` seconds."""
    if not 0 <= request.timeout_seconds < math.inf:
        raise InvalidRequest("timeout_seconds must be a positive number.", "timeout_seconds")
    limits = [limit for limit in (request.timeout_seconds or None, context.time_remaining()) if limit is not None]
    return time.time() + min(limits) if limits else None


def _reply(delta: ChoiceDelta, completion: Completion) -> inference_pb2.GenerateReply:
    adapter = completion.call.requests[0].adapter
    stop_token_id = delta.stop_reason if isinstance(delta.stop_reason, int) else None
    tokens = TokenDelta(delta.index, delta.token_ids, delta.logprobs, delta.finish_reason, stop_token_id)
    return inference_pb2.GenerateReply(
        text=delta.text,
        delta=delta_to_proto(tokens),
        prompt_tokens=completion.call.prompt_tokens,
        cached_tokens=completion.cached_tokens,
        adapter_digest=adapter.digest if adapter is not None else "",
    )

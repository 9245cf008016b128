"""The public gRPC service Inference: HTTP's pipeline over another transport.

Owns the translation between protobuf and checked bodies. `server` starts the service.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

from preft.core.errors import InvalidRequest
from preft.core.request import FinishReason, TokenLogprob
from preft.gateway.bodies.parse import INLINE_BYTES, parse_body
from preft.gateway.bodies.schemas import CompletionBody
from preft.gateway.completion import Completion
from preft.gateway.deps import GatewayDeps
from preft.gateway.grpc.errors import errors_reported
from preft.gateway.job import completion_job
from preft.gateway.text.choice import ChoiceDelta
from preft.rpc import common_pb2, inference_pb2, inference_pb2_grpc

_FINISH = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
}
_OPTIONAL = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "logprobs")


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Absent parameters have the same defaults as in /v1/completions."""

    def __init__(self, deps: GatewayDeps) -> None:
        self._deps = deps

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Any) -> None:
        async with errors_reported(context), self._deps.drain.running():
            large = request.ByteSize() > INLINE_BYTES
            body = await asyncio.to_thread(_checked, request) if large else _checked(request)
            job = await completion_job(body, self._deps, deadline=_deadline(request, context))
            async with Completion(self._deps.generator, self._deps.tokenizer, job) as completion:
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
        "min_tokens": request.min_tokens,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "ignore_eos": request.ignore_eos,
        "priority": request.priority,
        "user": request.user,
        "stop": list(request.stop),
        "stop_token_ids": list(request.stop_token_ids),
        "logit_bias": {str(token_id): bias for token_id, bias in request.logit_bias.items()},
    }
    body.update({name: getattr(request, name) for name in _OPTIONAL if request.HasField(name)})
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
    adapter = completion.job.requests[0].adapter
    return inference_pb2.GenerateReply(
        text=delta.text,
        delta=common_pb2.TokenDelta(
            index=delta.index,
            token_ids=delta.token_ids,
            logprobs=[_logprob(entry) for entry in delta.logprobs],
            finish_reason=_FINISH[delta.finish_reason],
            stop_token_id=delta.stop_reason if isinstance(delta.stop_reason, int) else None,
        ),
        prompt_tokens=completion.job.prompt_tokens,
        cached_tokens=completion.cached_tokens,
        adapter_digest=adapter.digest if adapter is not None else "",
    )


def _logprob(entry: TokenLogprob) -> common_pb2.TokenLogprob:
    top = [common_pb2.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in entry.top]
    return common_pb2.TokenLogprob(token_id=entry.token_id, logprob=entry.logprob, rank=entry.rank, top=top)

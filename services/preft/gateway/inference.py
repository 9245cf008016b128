"""The public gRPC services Inference and Adapters: the same pipeline as HTTP, without HTTP.

Owns the translation between protobuf and checked bodies. `rpc_server` starts them.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import grpc

from preft.core.cluster import Adapter
from preft.core.errors import InvalidRequest, PreftError, QueueFull, mapping_of
from preft.core.request import FinishReason, TokenLogprob
from preft.gateway.choice import ChoiceDelta
from preft.gateway.completion import Completion
from preft.gateway.deps import GatewayDeps
from preft.gateway.job import completion_job
from preft.gateway.parse import parse_body
from preft.gateway.schemas import CompletionBody
from preft.rpc import adapters_pb2, adapters_pb2_grpc, common_pb2, inference_pb2, inference_pb2_grpc

_FINISH = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
}
_OPTIONAL = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "logprobs")


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Inference. Absent parameters have the same defaults as in /v1/completions."""

    def __init__(self, deps: GatewayDeps) -> None:
        self._deps = deps

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Any) -> None:
        async with _errors_reported(context):
            body = parse_body(CompletionBody, _body(request))
            job = await completion_job(body, self._deps, deadline=_deadline(request, context))
            async with Completion(self._deps.generator, self._deps.tokenizer, job) as completion:
                while deltas := await completion.take():
                    for delta in deltas:
                        await context.write(_reply(delta, job.prompt_tokens))


class AdaptersService(adapters_pb2_grpc.AdaptersServicer):
    """Adapters, over the catalog."""

    def __init__(self, deps: GatewayDeps) -> None:
        self._catalog = deps.catalog

    async def Add(self, request: adapters_pb2.AddAdapterRequest, context: Any) -> adapters_pb2.Adapter:
        async with _errors_reported(context):
            if not request.name or not request.path:
                raise InvalidRequest("name and path must be given.", "path" if request.name else "name")
            return _adapter(await self._catalog.add(request.name, request.path, replace=request.replace))

    async def List(self, request: adapters_pb2.ListAdaptersRequest, context: Any) -> adapters_pb2.ListAdaptersReply:
        return adapters_pb2.ListAdaptersReply(adapters=[_adapter(adapter) for adapter in self._catalog.list()])

    async def Remove(self, request: adapters_pb2.RemoveAdapterRequest, context: Any) -> adapters_pb2.Adapter:
        async with _errors_reported(context):
            return _adapter(await self._catalog.remove(request.name))


@asynccontextmanager
async def _errors_reported(context: Any) -> AsyncIterator[None]:
    """Ends the call with the error's gRPC code; trailing metadata has `preft-code`, `preft-param`, `retry-after`."""
    try:
        yield
    except PreftError as error:
        await _abort(context, error)


async def _abort(context: Any, error: PreftError) -> NoReturn:
    mapping = mapping_of(error)
    trailing = [("preft-code", mapping.code)]
    if isinstance(error, InvalidRequest) and error.param:
        trailing.append(("preft-param", error.param))
    if isinstance(error, QueueFull):
        trailing.append(("retry-after", str(math.ceil(error.retry_after))))
    await context.abort(grpc.StatusCode[mapping.grpc], str(error), tuple(trailing))
    raise AssertionError("abort returns never")


def _body(request: inference_pb2.GenerateRequest) -> dict[str, Any]:
    """The message as /v1/completions would have it, so that one set of checks serves both."""
    body: dict[str, Any] = {
        "model": request.model,
        "n": request.n or 1,
        "min_tokens": request.min_tokens,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "ignore_eos": request.ignore_eos,
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


def _reply(delta: ChoiceDelta, prompt_tokens: int) -> inference_pb2.GenerateReply:
    return inference_pb2.GenerateReply(
        text=delta.text,
        delta=common_pb2.TokenDelta(
            index=delta.index,
            token_ids=delta.token_ids,
            logprobs=[_logprob(entry) for entry in delta.logprobs],
            finish_reason=_FINISH[delta.finish_reason],
            stop_token_id=delta.stop_reason if isinstance(delta.stop_reason, int) else None,
        ),
        prompt_tokens=prompt_tokens,
    )


def _logprob(entry: TokenLogprob) -> common_pb2.TokenLogprob:
    top = [common_pb2.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in entry.top]
    return common_pb2.TokenLogprob(token_id=entry.token_id, logprob=entry.logprob, rank=entry.rank, top=top)


def _adapter(adapter: Adapter) -> adapters_pb2.Adapter:
    return adapters_pb2.Adapter(
        name=adapter.name,
        digest=adapter.digest,
        source=adapter.source,
        kind=adapter.kind,
        rank=adapter.rank,
        prefill_only=adapter.prefill_only,
    )

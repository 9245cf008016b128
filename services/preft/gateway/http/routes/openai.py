"""/v1/completions and /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from preft.gateway.api_call import chat_call, completion_call
from preft.gateway.bodies.schemas import ChatBody, CompletionBody, GenerationBody
from preft.gateway.completion import Completion
from preft.gateway.deps import GatewayDeps
from preft.gateway.http.caller import caller_of
from preft.gateway.http.openapi import answers, json_body
from preft.gateway.http.parse import read_body, read_deadline
from preft.gateway.http.reply import ChatShape, CompletionShape, ReplyOptions
from preft.gateway.http.reply_types import ChatReply, CompletionReply
from preft.gateway.http.respond import EventStream, WholeReply


def openai_routes(deps: GatewayDeps) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.post(
        "/v1/completions", responses=answers(CompletionReply, stream=True), openapi_extra=json_body(CompletionBody)
    )
    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionBody, deps.max_body_bytes)
        caller = caller_of(request, deps)
        call = await completion_call(body, deps, caller, deadline=read_deadline(request))
        shape = CompletionShape(call, deps.tokenizer, _options(body))
        completion = Completion(deps.generator, deps.tokenizer, call, deps.account(call, caller))
        return EventStream(completion, shape) if body.stream else WholeReply(completion, shape)

    @router.post("/v1/chat/completions", responses=answers(ChatReply, stream=True), openapi_extra=json_body(ChatBody))
    async def chat_completions(request: Request) -> Response:
        body = await read_body(request, ChatBody, deps.max_body_bytes)
        caller = caller_of(request, deps)
        call = await chat_call(body, deps, caller, deadline=read_deadline(request))
        shape = ChatShape(call, deps.tokenizer, _options(body))
        completion = Completion(deps.generator, deps.tokenizer, call, deps.account(call, caller))
        return EventStream(completion, shape) if body.stream else WholeReply(completion, shape)

    return router


def _options(body: GenerationBody) -> ReplyOptions:
    return ReplyOptions(
        top_logprobs=body.wanted_logprobs,
        tokens_as_ids=body.return_tokens_as_token_ids,
        token_ids=body.return_token_ids,
        usage=body.include_usage,
        continuous_usage=body.continuous_usage,
        prompt_logprobs=body.prompt_logprobs is not None,
    )

"""Anthropic's Messages API: /v1/messages and /v1/messages/count_tokens. Errors have Anthropic's form."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from preft.gateway.api_call import chat_tokens, converted_call, resolve_model
from preft.gateway.bodies.anthropic import CountTokensBody, MessagesBody
from preft.gateway.completion import Completion
from preft.gateway.deps import GatewayDeps
from preft.gateway.http.anthropic_shape import AnthropicShape
from preft.gateway.http.anthropic_types import AnthropicErrorReply, MessageReply, TokenCountReply
from preft.gateway.http.caller import caller_of
from preft.gateway.http.openapi import answers, json_body
from preft.gateway.http.parse import read_body, read_deadline
from preft.gateway.http.respond import EventStream, WholeReply


def anthropic_routes(deps: GatewayDeps) -> APIRouter:
    router = APIRouter(tags=["Anthropic"])

    @router.post(
        "/v1/messages",
        responses=answers(MessageReply, stream=True, error=AnthropicErrorReply),
        openapi_extra=json_body(MessagesBody),
    )
    async def messages(request: Request) -> Response:
        body = await read_body(request, MessagesBody, deps.max_body_bytes)
        caller = caller_of(request, deps)
        call = await converted_call(body, deps, caller, deadline=read_deadline(request))
        shape = AnthropicShape(call)
        completion = Completion(deps.generator, deps.tokenizer, call, deps.account(call, caller))
        return EventStream(completion, shape) if body.stream else WholeReply(completion, shape)

    @router.post(
        "/v1/messages/count_tokens",
        responses=answers(TokenCountReply, error=AnthropicErrorReply),
        openapi_extra=json_body(CountTokensBody),
    )
    async def count_tokens(request: Request) -> Response:
        body = await read_body(request, CountTokensBody, deps.max_body_bytes)
        resolve_model(body.model, deps, caller_of(request, deps))
        with body.names.used():
            tokens, _ = await chat_tokens(body.chat, deps)
        return JSONResponse({"input_tokens": len(tokens)})

    return router

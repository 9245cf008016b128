"""/v1/responses: OpenAI's Responses API without stored responses."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from preft.gateway.api_call import converted_call
from preft.gateway.bodies.responses import ResponsesBody
from preft.gateway.completion import Completion
from preft.gateway.deps import GatewayDeps
from preft.gateway.http.caller import caller_of
from preft.gateway.http.openapi import answers, json_body
from preft.gateway.http.parse import read_body, read_deadline
from preft.gateway.http.respond import EventStream, WholeReply
from preft.gateway.http.responses_shape import ResponsesShape
from preft.gateway.http.responses_types import ResponsesReply


def responses_routes(deps: GatewayDeps) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.post(
        "/v1/responses", responses=answers(ResponsesReply, stream=True), openapi_extra=json_body(ResponsesBody)
    )
    async def responses(request: Request) -> Response:
        body = await read_body(request, ResponsesBody, deps.max_body_bytes)
        caller = caller_of(request, deps)
        call = await converted_call(body, deps, caller, deadline=read_deadline(request))
        shape = ResponsesShape(body, call, deps.tokenizer)
        completion = Completion(deps.generator, deps.tokenizer, call, deps.account(call, caller))
        return EventStream(completion, shape) if body.stream else WholeReply(completion, shape)

    return router

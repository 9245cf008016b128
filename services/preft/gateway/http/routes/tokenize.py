"""/tokenize and /detokenize, with vLLM's fields. Every adapter has the base model's tokenizer."""

from __future__ import annotations

import asyncio
import json

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from preft.gateway.api_call import INLINE_IDS, chat_tokens, check_ids, resolve_model
from preft.gateway.bodies.tokenize import DetokenizeBody, TokenizeBody
from preft.gateway.deps import GatewayDeps
from preft.gateway.http.caller import caller_of
from preft.gateway.http.openapi import answers, json_body
from preft.gateway.http.parse import read_body
from preft.gateway.http.reply_types import DetokenizeReply, TokenizeReply


def tokenize_routes(deps: GatewayDeps) -> APIRouter:
    router = APIRouter(tags=["Tokenizer"])
    tokenizer = deps.tokenizer

    @router.post("/tokenize", responses=answers(TokenizeReply), openapi_extra=json_body(TokenizeBody))
    async def tokenize(request: Request) -> Response:
        body = await read_body(request, TokenizeBody, deps.max_body_bytes)
        model = body.model or deps.model_name
        resolve_model(model, deps, caller_of(request, deps))
        if body.prompt is None:
            tokens, _ = await chat_tokens(body.chat(model), deps)
        else:
            special = body.add_special_tokens is not False
            [tokens] = await tokenizer.encode([body.prompt], add_special_tokens=special)

        def write() -> str:
            strings = [tokenizer.vocabulary_entry(token_id) for token_id in tokens] if body.return_token_strs else None
            reply: TokenizeReply = {
                "count": len(tokens),
                "max_model_len": deps.max_model_len,
                "tokens": list(tokens),
                "token_strs": strings,
            }
            return json.dumps(reply, ensure_ascii=False, separators=(",", ":"))

        text = await asyncio.to_thread(write) if len(tokens) > INLINE_IDS else write()
        return Response(text, media_type="application/json")

    @router.post("/detokenize", responses=answers(DetokenizeReply), openapi_extra=json_body(DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        body = await read_body(request, DetokenizeBody, deps.max_body_bytes)
        resolve_model(body.model or deps.model_name, deps, caller_of(request, deps))

        def read() -> str:
            check_ids(body.tokens, tokenizer, "tokens")
            return tokenizer.decode(body.tokens, skip_special_tokens=False)

        text = await asyncio.to_thread(read) if len(body.tokens) > INLINE_IDS else read()
        reply: DetokenizeReply = {"prompt": text}
        return JSONResponse(reply)

    return router

"""LiteLLM against a server: `python litellm_calls.py URL` prints what came back, as JSON.

It runs in an environment of its own, and so imports nothing of this project.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import litellm

MESSAGES = [{"role": "user", "content": "where?"}]


async def calls(url: str) -> dict[str, Any]:
    options: dict[str, Any] = {"model": "openai/ann", "api_base": url, "api_key": "any", "messages": MESSAGES}
    whole = litellm.completion(**options, temperature=0, max_tokens=50)
    chunks = list(litellm.completion(**options, stream=True, stream_options={"include_usage": True}))
    later = await litellm.acompletion(**options, n=2)
    text = litellm.text_completion(
        model="text-completion-openai/base", prompt="hi", api_base=url, api_key="any", max_tokens=50
    )
    told: dict[str, Any] = {
        "whole": whole.choices[0].message.content,
        "finish_reason": whole.choices[0].finish_reason,
        "usage": whole.usage.completion_tokens,
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
        "streamed_usage": next(chunk.usage.completion_tokens for chunk in chunks if getattr(chunk, "usage", None)),
        "choices": [choice.message.content for choice in later.choices],
        "text": text.choices[0].text,
    }
    try:
        litellm.completion(**{**options, "model": "openai/eve"})
    except litellm.NotFoundError as error:
        told["missing"] = error.status_code
    return told


if __name__ == "__main__":
    print(json.dumps(asyncio.run(calls(sys.argv[1]))))

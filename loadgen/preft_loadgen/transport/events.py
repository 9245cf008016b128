"""Reads the server-sent events of a streamed completion or chat completion: bytes in, one Reply out.

Cheap per token, because a client that is slower than the server measures itself. Trusts nothing that a server sends.
"""

from __future__ import annotations

import time
from typing import Any

import jiter

from preft_loadgen.errors import RequestFailed
from preft_loadgen.transport.reply import CANCELLED, Reply

MAX_EVENT_BYTES = 8 << 20
MAX_TOKENS = 1 << 31


class HangUp(Exception):
    """The planned end of a request that its client cancels."""


class Events:
    """The events of one answer with one choice. With `cancel_after`, `feed` raises HangUp after so many pieces."""

    def __init__(self, cancel_after: int | None = None) -> None:
        self._rest = b""
        self._arrivals: list[float] = []
        self._texts: list[str] = []
        self._counts: list[int] = []  # tokens per piece, where the server sends token ids
        self._ids: list[int] = []
        self._usage: tuple[int, int] | None = None
        self._finish_reason: str | None = None
        self._ended: float | None = None
        self._cancel_after = cancel_after

    def feed(self, data: bytes) -> None:
        """Reads all complete events. Raises RequestFailed for an error event, and for what isn't an answer."""
        now = time.perf_counter()
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)
        if len(self._rest) > MAX_EVENT_BYTES:
            raise RequestFailed(f"an event of the stream has more than {MAX_EVENT_BYTES >> 20} MiB", kind="malformed")
        if self._cancel_after is not None and len(self._arrivals) >= self._cancel_after:
            raise HangUp

    def reply(self, started: float, *, hung_up: bool = False) -> Reply:
        """The whole answer. Raises RequestFailed if the stream ended too early, or without the number of tokens."""
        if hung_up:
            return self._made(started, time.perf_counter(), (0, len(self._arrivals)), CANCELLED)
        if self._ended is None or self._finish_reason is None:
            raise RequestFailed("the stream ended before its answer was whole", kind="broken stream")
        usage = self._usage or ((0, sum(self._counts)) if self._counts else None)
        if usage is None:
            raise RequestFailed("the server didn't say how many tokens it made (no usage)", kind="no usage")
        if usage[1] == 0 and self._arrivals:
            raise RequestFailed("the server says it made no token, but it sent text", kind="malformed")
        return self._made(started, self._ended, usage, self._finish_reason)

    def _made(self, started: float, ended: float, usage: tuple[int, int], reason: str) -> Reply:
        sizes = self._counts if len(self._counts) == len(self._texts) else map(len, self._texts)
        return Reply(
            started,
            ended,
            tuple(self._arrivals),
            tokens=usage[1],
            text="".join(self._texts),
            finish_reason=reason,
            prompt_tokens=usage[0],
            sizes=tuple(sizes),
            token_ids=tuple(self._ids),
        )

    def _event(self, payload: bytes, now: float) -> None:
        if payload == b"[DONE]":
            self._ended = now
            return
        if self._ended is not None:
            raise RequestFailed("the stream went on after its end", kind="malformed")
        try:
            event = jiter.from_json(payload)
            if error := event.get("error"):
                message = error.get("message") if isinstance(error, dict) else error
                raise RequestFailed(str(message)[:500] or "an error without a message", kind="error in stream")
            for choice in event["choices"]:
                self._choice(choice, now)
            if usage := event.get("usage"):
                self._usage = (_count(usage.get("prompt_tokens") or 0), _count(usage["completion_tokens"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RequestFailed(
                f"the answer is not what an OpenAI-style server sends: {str(error)[:200]!r}", kind="malformed"
            ) from error

    def _choice(self, choice: dict[str, Any], now: float) -> None:
        if choice.get("index", 0) != 0:
            raise ValueError("more than one choice")
        delta = choice.get("delta")
        if delta is None:
            text = choice["text"]
        else:
            text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
        ids = choice.get("token_ids")
        if ids:
            self._ids += map(_count, ids)
        if text or ids:
            self._arrivals.append(now)
            self._texts.append(text or "")
            if not isinstance(self._texts[-1], str):
                raise TypeError("a text that is none")
            if ids:
                self._counts.append(len(ids))
        if reason := choice.get("finish_reason"):
            self._finish_reason = str(reason)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < MAX_TOKENS:
        raise ValueError(f"a number of tokens that is none: {str(value)[:40]}")
    return value

"""One complete answer, as its client saw it."""

from __future__ import annotations

from dataclasses import dataclass

CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Reply:
    """Times are `time.perf_counter()` seconds.

    `arrivals` has one entry per piece of output. A piece is one token, unless the server joined tokens or held back a
    part of a character. `tokens` is the server's own count of output tokens, `prompt_tokens` of prompt tokens (0: the
    server didn't say). `sizes` are the pieces' lengths, in tokens where the server tells, else in characters; empty:
    unknown. `token_ids` are the output's, where they were asked for. `model` is the name that was really asked for, if
    it isn't the request's. `finish_reason` is "cancelled" if the client hung up as planned; then `tokens` are
    the pieces.
    """

    started: float
    ended: float
    arrivals: tuple[float, ...]
    tokens: int
    text: str
    finish_reason: str
    prompt_tokens: int = 0
    sizes: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    model: str = ""

"""What is kept of each request, in seconds as its client sees them.

Gaps and bursts: pieces that arrive within BURST_SECONDS of each other are one burst. A burst of k tokens that comes g
seconds after the last burst counts as k inter-token latencies of g/k. So tokens that come together never look like
latencies of 0, and the latencies of a request add up to the time from its first burst to its last.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from preft_loadgen.errors import LoadgenError, RequestFailed
from preft_loadgen.traffic.request import Request
from preft_loadgen.transport.reply import CANCELLED, Reply

BURST_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class Record:
    """One request.

    `started` is when it was due, from the start of the run; `delay` by how much later it was sent. `seconds` and `ttft`
    (to the first piece of output) count from when it was due: a late client can't make a server look fast. `gaps` are
    the times between bursts, `counts` the tokens of each burst after the first. A failed request has an `error` and its
    `kind`, and no tokens; a cancelled one has no `error` and no tokens.
    """

    model: str
    started: float
    seconds: float
    ttft: float = 0.0
    gaps: Sequence[float] = ()
    counts: Sequence[int] = ()
    tokens: int = 0
    prompt_tokens: int = 0
    delay: float = 0.0
    turn: int = 0
    cancelled: bool = False
    error: str | None = None
    kind: str = ""

    @property
    def answered(self) -> bool:
        """Whether there is a whole answer."""
        return self.error is None and not self.cancelled

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None with fewer than two tokens.

        vLLM's `bench serve` has the same: from the first piece of output to the last, by the number of tokens less one.
        """
        return sum(self.gaps) / (self.tokens - 1) if self.tokens > 1 else None


@dataclass(frozen=True, slots=True)
class Run:
    """All records, and the seconds from the first request to the end of the last.

    `planned` is the planned rate in requests per second; None where the server's speed decides (a closed loop).
    """

    records: tuple[Record, ...]
    seconds: float
    planned: float | None = None


def failed(request: Request, error: LoadgenError, begin: float, due: float, sent: float, ended: float) -> Record:
    """The record of a request without a whole answer."""
    kind = error.kind if isinstance(error, RequestFailed) else "other"
    return Record(
        request.model,
        due - begin,
        ended - due,
        delay=sent - due,
        turn=len(request.history),
        error=str(error),
        kind=kind,
    )


def recorded(request: Request, reply: Reply, begin: float, due: float, sent: float) -> Record:
    """The record of an answer. Raises RequestFailed if the answer has another length than the request asked for."""
    wanted = request.output_tokens
    turn, delay = len(request.history), sent - due
    first = reply.arrivals[0] if reply.arrivals else reply.ended  # an answer may have no visible text
    model = reply.model or request.model
    if reply.finish_reason == CANCELLED:
        return Record(model, due - begin, reply.ended - due, ttft=first - due, delay=delay, turn=turn, cancelled=True)
    if reply.tokens > wanted or (request.exact and reply.tokens != wanted):
        raise RequestFailed(f"{reply.tokens} tokens came where {wanted} were asked for", kind="length")
    gaps, counts = bursts(reply.arrivals, tokens_of_pieces(len(reply.arrivals), reply.sizes, reply.tokens))
    return Record(
        model=model,
        started=due - begin,
        seconds=reply.ended - due,
        ttft=first - due,
        gaps=gaps,
        counts=counts,
        tokens=reply.tokens,
        prompt_tokens=reply.prompt_tokens,
        delay=delay,
        turn=turn,
    )


def tokens_of_pieces(pieces: int, sizes: Sequence[int], tokens: int) -> list[int]:
    """How many of the `tokens` each piece has, in order: at least one each, the rest in proportion to the `sizes`.

    Exact where the sizes are tokens, and where each piece is one token. With more pieces than tokens, some have none.
    """
    if pieces == tokens:
        return [1] * pieces
    if not pieces:
        return []
    if sum(sizes) == tokens and len(sizes) == pieces:
        return list(sizes)
    least = 1 if pieces < tokens else 0
    known = len(sizes) == pieces and any(sizes)
    weights = np.asarray(sizes if known else [1] * pieces, dtype=np.float64)
    ends = np.rint(np.cumsum(weights) * ((tokens - least * pieces) / weights.sum())).astype(np.int64)
    return [least + int(count) for count in np.diff(ends, prepend=0)]


def bursts(arrivals: Sequence[float], tokens: Sequence[int]) -> tuple[array[float], array[int]]:
    """The gaps in seconds between bursts, and the tokens of each burst after the first.

    A burst without tokens (a piece that the server's count leaves no token for) belongs to the next one with tokens.
    """
    starts: list[float] = []
    counts: list[int] = []
    for arrival, count in zip(arrivals, tokens, strict=True):
        if starts and (arrival - starts[-1] < BURST_SECONDS or not count):
            counts[-1] += count
        else:
            starts.append(arrival)
            counts.append(count)
    return array("d", np.diff(starts)), array("I", counts[1:])  # millions of these are kept

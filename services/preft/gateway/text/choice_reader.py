"""Takes the text of one choice apart: content, reasoning and tool calls. One object per choice.

Neither waits for the model nor formats. A parser that fails loses no text: a stream ends with an error, and a whole
answer keeps its text as content.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from preft.core.errors import EngineFailed
from preft.core.request import FinishReason
from preft.gateway.text.choice import ChoiceDelta, ToolCallDelta
from preft.gateway.text.forced_calls import ForcedCalls
from preft.gateway.text.parsing import OutputParser, Parts

_NOTHING = Parts()
Piece = tuple[str, tuple[int, ...]]  # text, and its tokens

_log = logging.getLogger(__name__)

SLOW_SECONDS = 0.002  # a parser that takes longer works in a thread
SHARE = 0.1  # of the time that the parsers of all choices may take together, if they can take several deltas at once
LONGEST_REST = 0.5  # seconds
INLINE_CHARS = 4_096  # of a whole output; a thread parses longer ones


class ParserTime:
    """The CPU time of the parsers of all choices in this process."""

    def __init__(self) -> None:
        self._used_until = 0.0

    def take(self, seconds: float) -> float:
        """Returns when the choice that used `seconds` may use its parser again; monotonic time.

        Each use moves that time on by seconds / SHARE, so the choices take turns. A choice never rests longer than
        LONGEST_REST for the others: one slow text must not stop all streams.
        """
        now, own = time.monotonic(), seconds / SHARE
        self._used_until = max(self._used_until, now) + own
        return min(self._used_until, now + max(own, LONGEST_REST))


_PARSER_TIME = ParserTime()


class ChoiceReader:
    """Reads one choice delta by delta; with `whole`, all of its text at its end.

    `calls` reads the calls in the content of outputs that a grammar forces to be calls. `is_named`: the caller chose
    the function, so the choice ends with `stop`, as in OpenAI's API. Without `parallel` there is one call at most.
    With `token_by_token`, no delta may have several tokens. With `calls_alone`, `read_calls` may be called instead of
    `read`.
    """

    def __init__(
        self,
        parser: OutputParser | None,
        calls: ForcedCalls | None = None,
        *,
        whole: bool,
        is_named: bool = False,
        parallel: bool = True,
        counts_reasoning: bool = False,
        parser_time: ParserTime = _PARSER_TIME,
    ) -> None:
        self.reasoning_tokens = 0  # known when the choice has ended
        self.token_by_token = not whole and parser is not None and not parser.takes_many
        self.calls_alone = None if whole or parser is not None else calls
        self._parser = parser
        self._calls = calls
        self._whole = whole
        self._is_named = is_named
        self._parallel = parallel
        self._counts_reasoning = counts_reasoning
        self._parser_time = parser_time
        self._all_ids: list[int] = []  # of the whole choice, if somebody needs them
        self._called = False
        self._pieces: list[Piece] = []  # since the last call of the parser
        self._is_slow = False
        self._rest_until = 0.0

    async def read(self, deltas: Sequence[ChoiceDelta]) -> ChoiceDelta:
        """The parts that the choice's next deltas add. Raises EngineFailed if a stream's parser fails."""
        delta = deltas[0]
        for later in deltas[1:]:
            delta = delta.then(later)
        if self.calls_alone is not None:
            return self.read_calls(delta)
        finished = delta.finish_reason is not None
        if self._counts_reasoning:
            self._all_ids.extend(delta.token_ids)
        self._pieces += [(each.text, each.token_ids) for each in deltas]
        if not finished and (self._whole or time.monotonic() < self._rest_until):
            return self._with_parts(delta, _NOTHING)
        pieces, self._pieces = self._pieces, []
        if len(pieces) > 1 and not self.token_by_token:
            pieces = [("".join(text for text, _ in pieces), tuple(id for _, ids in pieces for id in ids))]
        parts = await (self._parse(*pieces[0]) if self._whole else self._push(pieces, finished))
        if finished and self._counts_reasoning and self._parser is not None:
            self.reasoning_tokens = self._parser.reasoning_tokens(self._all_ids)
        return self._with_parts(delta, parts)

    def read_calls(self, delta: ChoiceDelta) -> ChoiceDelta:
        """As `read`, at once: a quarter of the time."""
        assert self.calls_alone is not None
        return self._with_parts(delta, self.calls_alone.push(delta.text, finished=delta.finish_reason is not None))

    def _with_parts(self, delta: ChoiceDelta, parts: Parts) -> ChoiceDelta:
        calls, finish = parts.tool_calls, delta.finish_reason
        if calls:
            if not self._parallel:
                calls = tuple(call for call in calls if call.position == 0)
            self._called = True
        if finish is FinishReason.STOP and self._called and not self._is_named:
            finish = FinishReason.TOOL_CALLS
        return ChoiceDelta(
            delta.index,
            parts.content,
            delta.token_ids,
            delta.logprobs,
            finish,
            delta.stop_reason,
            parts.reasoning,
            calls,
        )

    async def _push(self, pieces: Sequence[Piece], finished: bool) -> Parts:
        assert self._parser is not None
        try:
            if self._is_slow:
                parts, seconds = await asyncio.to_thread(_timed_push, self._parser, pieces, finished)
            else:
                parts, seconds = _timed_push(self._parser, pieces, finished)
        except Exception as error:  # parsers are others' code, and raise what they like
            _log.exception("a parser failed in a stream")
            raise EngineFailed(f"the parser of tool calls or reasoning failed: {type(error).__name__}") from error
        self._is_slow = seconds > SLOW_SECONDS
        if not self.token_by_token:
            self._rest_until = self._parser_time.take(seconds)
        return self._with_calls(parts, finished)

    async def _parse(self, text: str, ids: tuple[int, ...]) -> Parts:
        if self._parser is None:
            return self._with_calls(Parts(text), True)
        try:
            if len(text) > INLINE_CHARS:
                parts = await asyncio.to_thread(self._parser.parse, text, ids)
            else:
                parts = self._parser.parse(text, ids)
        except Exception:  # parsers are others' code, and raise what they like
            _log.exception("a parser failed; its text stays content")
            return Parts(text)
        return self._with_calls(parts, True)

    def _with_calls(self, parts: Parts, finished: bool) -> Parts:
        if self._calls is None:
            return parts
        found = self._calls.push(parts.content, finished=finished)
        return Parts(found.content, parts.reasoning, found.tool_calls)


def _timed_push(parser: OutputParser, pieces: Sequence[Piece], finished: bool) -> tuple[Parts, float]:
    """The parts, and the seconds of CPU time."""
    started, last = time.thread_time(), len(pieces) - 1
    if last == 0:
        return parser.push(*pieces[0], finished=finished), time.thread_time() - started
    parts = _NOTHING
    for number, (text, ids) in enumerate(pieces):
        parts = parts.then(parser.push(text, ids, finished=finished and number == last))
    return parts, time.thread_time() - started


def joined_calls(deltas: list[ToolCallDelta]) -> tuple[ToolCallDelta, ...]:
    """One delta per call, in the calls' order."""
    calls: dict[int, tuple[str, str, list[str]]] = {}
    for delta in deltas:
        id, name, pieces = calls.get(delta.position, ("", "", []))
        pieces.append(delta.arguments)
        calls[delta.position] = (id or delta.id, name or delta.name, pieces)
    return tuple(
        ToolCallDelta(position, "".join(pieces), id, name) for position, (id, name, pieces) in sorted(calls.items())
    )

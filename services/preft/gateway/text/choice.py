"""Turns one choice's tokens into text: detokenizing, stop strings and finish reasons, with vLLM's meaning.

Doesn't know where tokens come from or how choices travel to the client.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from preft.core.errors import EngineFailed
from preft.core.light import light_dataclass
from preft.core.request import FinishReason, PromptLogprobs, TokenDelta, TokenLogprob
from preft.gateway.text.detokenizer import Detokenizer
from preft.gateway.text.stopping import StopStrings
from preft.gateway.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How a choice's tokens become text. A stop string counts only if it ends after the first `min_tokens` tokens."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0
    logprobs: bool = False


@light_dataclass
class ToolCallDelta:
    """The next part of the choice's tool call number `position`, counted from 0.

    A call's first part has its `id` and `name`. `arguments` is a piece of the call's JSON text.
    """

    position: int
    arguments: str = ""
    id: str = ""
    name: str = ""


@light_dataclass
class ChoiceDelta:
    """The new text of one choice. `stop_reason` is the stop string or caller's stop token that ended the choice.

    In a chat, `reasoning` and `tool_calls` are the parts of the output that aren't in `text`, the message's content.
    A choice's first delta has the `prompt_logprobs`, if the request asks for them.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    prompt_logprobs: PromptLogprobs | None = None

    def then(self, later: ChoiceDelta) -> ChoiceDelta:
        """This delta and the choice's next one, as one."""
        return ChoiceDelta(
            self.index,
            self.text + later.text,
            (*self.token_ids, *later.token_ids),
            (*self.logprobs, *later.logprobs),
            later.finish_reason,
            later.stop_reason,
            self.reasoning + later.reasoning,
            (*self.tool_calls, *later.tool_calls),
            self.prompt_logprobs,
        )


class ChoiceText:
    """The running state of choice `index` of one prompt. `finished` is true after the last delta."""

    __slots__ = ("_detokenizer", "_options", "_stops", "_tokens", "finished", "index")

    def __init__(self, index: int, tokenizer: Tokenizer, prompt: Sequence[int], options: TextOptions) -> None:
        self.index = index
        self.finished = False
        self._options = options
        self._detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=options.skip_special_tokens)
        self._stops = StopStrings(options.stop, include=options.include_stop) if options.stop else None
        self._tokens = 0

    def push(self, delta: TokenDelta) -> ChoiceDelta:
        """Turns the choice's next delta into text. Raises EngineFailed if log probabilities are missing."""
        if self._options.logprobs and len(delta.logprobs) != len(delta.token_ids):
            raise EngineFailed("the engine sent tokens without their log probabilities")
        shown = delta.token_ids
        if delta.finish_reason is FinishReason.STOP and not self._options.include_stop:
            shown = shown[:-1]  # the end or stop token counts, but isn't shown
        if self._stops is not None:
            return self._push_watched(delta, shown, self._stops)
        text = self._detokenizer.push(shown)
        if delta.finish_reason is not None:
            text += self._detokenizer.flush()
            self.finished = True
        return ChoiceDelta(self.index, text, delta.token_ids, delta.logprobs, delta.finish_reason, delta.stop_token_id)

    def _push_watched(self, delta: TokenDelta, shown: Sequence[int], stops: StopStrings) -> ChoiceDelta:
        """Pushes token by token: tokens after a completed stop string are neither shown nor counted."""
        text = ""
        for taken, token_id in enumerate(shown, start=1):
            self._tokens += 1
            piece = self._detokenizer.push((token_id,))
            text += stops.push(piece, armed=self._tokens > self._options.min_tokens)
            if stops.matched is not None:
                return self._stopped(text, delta, taken, stops.matched)
        if delta.finish_reason is not None:
            text += stops.push(self._detokenizer.flush(), armed=self._tokens > self._options.min_tokens)
            if stops.matched is not None:
                return self._stopped(text, delta, len(delta.token_ids), stops.matched)
            text += stops.release()
            self.finished = True
        return ChoiceDelta(self.index, text, delta.token_ids, delta.logprobs, delta.finish_reason, delta.stop_token_id)

    def _stopped(self, text: str, delta: TokenDelta, taken: int, matched: str) -> ChoiceDelta:
        self.finished = True
        return ChoiceDelta(
            self.index, text, delta.token_ids[:taken], delta.logprobs[:taken], FinishReason.STOP, matched
        )

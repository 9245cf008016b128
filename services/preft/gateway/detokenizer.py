"""Incremental decoding of one choice: tokens in, text out as soon as it can't change any more.

Owns the border between prompt and output, and characters that are spread over tokens. The `tokenizers` library decodes.
The detokenizer knows nothing of stop strings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from preft.gateway.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
# An unfinished character spans at most a few tokens; a longer run of U+FFFD is what the model means to say.
_MAX_HELD = 32
_CONTEXT = 8


class Detokenizer:
    """Decodes the output that follows `prompt_token_ids`.

    Decoders look at neighbours (leading spaces, bytes of one character), so the library's stream decodes every token
    together with the tokens before it, the prompt's included. A character that the prompt begins and the output
    finishes is output; a character that stays unfinished in the prompt is not. The text doesn't depend on how tokens
    were grouped.
    """

    __slots__ = ("_context", "_held", "_leftover", "_skip", "_step", "_tokenizer")

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        tail = self._prompt_tail(prompt_token_ids)
        clean = self._clean_length(tail)
        # The prompt's tokens of an unfinished character. More tokens than one character can have are broken text.
        self._leftover = tail[clean:] if len(tail) - clean <= _CONTEXT else []
        self._held: list[int] = []  # output tokens whose text isn't given out
        self._context = tail[:clean] if clean or not tail else tokenizer.anchor  # tokens before those
        self._step = tokenizer.decode_stream(self._context)

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that became final with `token_ids`; never a part of a character."""
        text = ""
        for token_id in token_ids:
            if token_id not in self._skip:
                self._held.append(token_id)
                text += self._advance(token_id)
        return text

    def flush(self) -> str:
        """What is still held back, at the end of the output: an unfinished character becomes U+FFFD."""
        return self._take_held() if self._held else ""

    def _advance(self, token_id: int) -> str:
        if self._leftover:
            finished = not self._decode([*self._context, *self._leftover, *self._held]).endswith(_REPLACEMENT)
            return self._take_held() if finished or len(self._held) >= _MAX_HELD else ""
        try:
            text = self._step(token_id)
        except Exception as error:  # `tokenizers` raises nothing more specific
            if not str(error).startswith("Invalid prefix"):
                raise
            return self._take_held()  # invalid bytes made the decoder take back what is given out already
        if text is None:
            return self._take_held() if len(self._held) >= _MAX_HELD else ""
        self._context, self._held = self._held, []
        return text

    def _take_held(self) -> str:
        """The text of all held tokens as it is now; decoding starts anew behind them."""
        text = self._text_of([*self._leftover, *self._held])
        if self._leftover:
            own = self._text_of(self._held)
            apart = self._text_of(self._leftover) + own
            if text.count(_REPLACEMENT) >= apart.count(_REPLACEMENT):  # the output finished no character of the prompt
                text = own
        decoded = self._decode(self._held)
        is_clean = decoded and not decoded.endswith(_REPLACEMENT)
        self._context = self._held if is_clean else self._tokenizer.anchor
        self._step = self._tokenizer.decode_stream(self._context)
        self._held, self._leftover = [], []
        return text

    def _text_of(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids` behind the context, or behind an ordinary word where they change the context's."""
        for context in (self._context, self._tokenizer.anchor):
            before, decoded = self._decode(context), self._decode([*context, *token_ids])
            if decoded.startswith(before):
                return decoded[len(before) :]
        return self._decode(token_ids)

    def _prompt_tail(self, prompt: Sequence[int]) -> list[int]:
        """The last visible prompt tokens: enough of them to have some text and not to start inside a character."""
        size = _CONTEXT
        while True:
            tail: list[int] = []
            for token_id in reversed(prompt):
                if token_id not in self._skip:
                    tail.append(token_id)
                    if len(tail) == size:
                        break
            tail.reverse()
            text = self._decode(tail)
            if len(tail) < size or (text and not text.startswith(_REPLACEMENT)):
                return tail
            size *= 8

    def _clean_length(self, tail: Sequence[int]) -> int:
        """How many tokens of the tail end in a whole character; 0 if none of the last few does."""
        for length in range(len(tail), max(0, len(tail) - _CONTEXT), -1):
            if not self._decode(tail[:length]).endswith(_REPLACEMENT):
                return length
        return 0

    def _decode(self, token_ids: Sequence[int]) -> str:
        # Special tokens that must not show are never among the ids.
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

"""Incremental decoding of one choice: tokens go in, text comes out as soon as the text is final.

Owns the border between prompt and output, and characters that several tokens share. The `tokenizers` library decodes.
The detokenizer knows no stop strings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from preft.gateway.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
# An unfinished character spans at most a few tokens; a longer run of U+FFFD is the model's output.
_MAX_HELD = 32
_CONTEXT = 8


class Detokenizer:
    """Decodes the output that follows `prompt_token_ids`.

    Decoders depend on neighbour tokens (leading spaces, bytes of one character), so the library's stream decodes every
    token together with the tokens before it, prompt tokens included. A character that begins in the prompt and ends in
    the output belongs to the output. A character that stays unfinished in the prompt doesn't. The grouping of tokens
    never changes the text.
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
        self._held: list[int] = []  # output tokens whose text isn't given out yet
        self._context = tail[:clean] if clean or not tail else tokenizer.anchor  # the tokens before them
        self._step = tokenizer.decode_stream(self._context)

    def push(self, token_ids: Iterable[int]) -> str:
        """Returns the text that became final with `token_ids`; never a part of a character."""
        text = ""
        for token_id in token_ids:
            if token_id not in self._skip:
                self._held.append(token_id)
                text += self._advance(token_id)
        return text

    def flush(self) -> str:
        """Returns the held text at the end of the output: an unfinished character becomes U+FFFD."""
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
            return self._take_held()  # invalid bytes made the decoder revoke text that is out already
        if text is None:
            return self._take_held() if len(self._held) >= _MAX_HELD else ""
        self._context, self._held = self._held, []
        return text

    def _take_held(self) -> str:
        """Returns the text of all held tokens in its current form; decoding restarts behind these tokens."""
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
        """The text of `token_ids` behind the context; behind an ordinary word if they change the context's text."""
        for context in (self._context, self._tokenizer.anchor):
            before, decoded = self._decode(context), self._decode([*context, *token_ids])
            if decoded.startswith(before):
                return decoded[len(before) :]
        return self._decode(token_ids)

    def _prompt_tail(self, prompt: Sequence[int]) -> list[int]:
        """The last visible prompt tokens: enough tokens to contain text and to start outside a character."""
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
        """Tokens in the longest part of the tail that ends in a whole character; 0 if the last tokens end in none."""
        for length in range(len(tail), max(0, len(tail) - _CONTEXT), -1):
            if not self._decode(tail[:length]).endswith(_REPLACEMENT):
                return length
        return 0

    def _decode(self, token_ids: Sequence[int]) -> str:
        # Special tokens that must not show are never among the ids.
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

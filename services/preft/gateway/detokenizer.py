"""Incremental decoding of one choice: tokens in, text out as soon as it can't change any more.

Owns the border between prompt and output and characters that are spread over tokens; knows nothing of stop strings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from preft.gateway.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
# An unfinished character spans at most a few tokens; a longer run of U+FFFD is what the model means to say.
_MAX_PENDING = 32
_CONTEXT = 8


class Detokenizer:
    """Decodes the output that follows `prompt_token_ids`.

    Decoders look at neighbours (leading spaces, bytes of one character), so every token is decoded together with the
    last ones before it, the prompt's included, and only what is new is given out. A token alone at a time, whatever the
    chunks: the text doesn't depend on how tokens were grouped.
    """

    __slots__ = ("_given", "_has_output", "_read", "_skip", "_tokenizer", "_window")

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._window = self._prompt_tail(prompt_token_ids)
        self._read = self._clean_length(self._window)  # tokens of the window whose text is given out
        self._given = self._decode(self._window[: self._read])  # and that text
        self._has_output = False

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that became final with `token_ids`; never a part of a character."""
        text = ""
        for token_id in token_ids:
            if token_id not in self._skip:
                self._has_output = True
                self._window.append(token_id)
                text += self._advance()
        return text

    def flush(self) -> str:
        """What is still held back, at the end of the output: an unfinished character becomes U+FFFD."""
        if self._read == len(self._window) or not self._has_output:  # what the prompt left unfinished isn't output
            return ""
        text = self._new_text(self._decode(self._window))
        self._read = len(self._window)
        return text

    def _advance(self) -> str:
        decoded = self._decode(self._window)
        overdue = len(self._window) - self._read >= _MAX_PENDING
        if decoded.endswith(_REPLACEMENT) and not overdue:
            return ""
        text = self._new_text(decoded)
        if text or overdue:
            del self._window[: self._read]
            self._read = len(self._window)
            self._given = self._decode(self._window)
        return text

    def _new_text(self, decoded: str) -> str:
        if decoded.startswith(self._given):
            return decoded[len(self._given) :]
        # Invalid bytes made the decoder take back what it had said before; keep that, and go on from here.
        return self._decode(self._window[self._read :])

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
        """How many tokens of the tail end in a whole character; the rest may be completed by the output."""
        for length in range(len(tail), max(0, len(tail) - _CONTEXT), -1):
            if not self._decode(tail[:length]).endswith(_REPLACEMENT):
                return length
        return len(tail)

    def _decode(self, token_ids: Sequence[int]) -> str:
        # Special tokens that must not show were never put into the window.
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

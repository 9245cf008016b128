"""Finds the texts that a prompt contains whole, also if the chat template takes nothing but texts of a given form.

Owns the search. `chat_prompt` renders and decides about texts that are missing.
"""

from __future__ import annotations

import sys
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache

from preft.core.errors import InvalidRequest


def whole_texts(texts: Sequence[str], prompt: str, render: Callable[[Callable[[int, str], str]], str]) -> set[int]:
    """The numbers of the `texts` that `prompt` contains whole. `render(change)` renders `change(number, text)` instead.

    Each rendering has other letters, at the same places, in the texts whose number + 1 has one bit set. So the
    renderings that change a character of the prompt spell the number of the character's text, and characters that
    the template writes never change. Raises InvalidRequest if the template doesn't show the changed texts alike.
    """
    owners = [0] * len(prompt)
    for bit in range(len(texts).bit_length()):
        changed = _rendered(render, 1 << bit)
        if len(changed) != len(prompt):
            raise _not_checkable()
        for at, (old, new) in enumerate(zip(prompt, changed, strict=True)):
            if old != new:
                owners[at] |= 1 << bit
    found: dict[int, list[str]] = defaultdict(list)
    for owner, char in zip(owners, prompt, strict=True):
        found[owner - 1].append(char)
    return {
        number
        for number, text in enumerate(texts)
        if text.strip() in prompt and "".join(filter(_letter(text), text)) in "".join(found[number])
    }


def _rendered(render: Callable[[Callable[[int, str], str]], str], bit: int) -> str:
    try:
        return render(lambda number, text: _altered(text) if (number + 1) & bit else text)
    except InvalidRequest:
        raise _not_checkable() from None


def _not_checkable() -> InvalidRequest:
    return InvalidRequest(
        "The model's chat template depends on the texts of the messages: the server can't check that the prompt"
        " contains every text.",
        "messages",
    )


def _altered(text: str) -> str:
    """A text of the same form with other letters and digits."""
    is_letter = _letter(text)
    return "".join(_neighbour(char) if is_letter(char) else char for char in text)


def _letter(text: str) -> Callable[[str], bool]:
    """Whether a character of `text` is a letter or digit. In a text without any, all but spaces count as letters."""
    return str.isalnum if any(map(str.isalnum, text)) else lambda char: not char.isspace()


@lru_cache(maxsize=4096)
def _neighbour(char: str) -> str:
    """The nearest other character of the same Unicode category."""
    kind = unicodedata.category(char)
    for distance in range(1, sys.maxunicode):
        for code in (ord(char) + distance, ord(char) - distance):
            if 0 <= code <= sys.maxunicode and unicodedata.category(chr(code)) == kind:
                return chr(code)
    return char

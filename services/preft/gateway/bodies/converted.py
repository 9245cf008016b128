"""Bodies of other APIs that become a chat body: one path leads from all of them to the engines.

Owns the way back: an error about the chat body names the parameter that the client has sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from preft.core.errors import InvalidRequest

_PLACE = r"messages\[\d+\](?:\.tool_calls\[\d+\]|\.content\b)?"


@dataclass(slots=True)
class Turns:
    """Chat messages, and for each place in them (`messages[1]`) the place in the client's body (`input[2]`)."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)

    def add(self, message: dict[str, Any], place: str, content: str | None = None) -> dict[str, Any]:
        """Appends the message, and returns it. `content` is the place of its content, if it isn't `place`.content."""
        self.messages.append(message)
        self.move(place, content)
        return message

    def move(self, place: str, content: str | None = None) -> None:
        """Changes the place of the last message."""
        own = f"messages[{len(self.messages) - 1}]"
        self.places |= {own: place, f"{own}.content": content or f"{place}.content"}

    def add_call(self, message: dict[str, Any], call: dict[str, Any], place: str) -> None:
        """Appends a tool call to the last message."""
        calls = message.setdefault("tool_calls", [])
        self.places[f"messages[{len(self.messages) - 1}].tool_calls[{len(calls)}]"] = place
        calls.append(call)


class Names:
    """The client's names of a chat body's parameters. Parameters without an entry have the same name in both."""

    def __init__(self, names: Mapping[str, str], places: Mapping[str, str]) -> None:
        self._names = {**names, **places}
        words = (rf"\b{re.escape(name)}\b" for name in sorted(names, key=len, reverse=True))
        self._pattern = re.compile("|".join((_PLACE, *words)))

    def own(self, text: str) -> str:
        """`text` with the client's names."""
        return self._pattern.sub(lambda found: self._names.get(found[0], found[0]), text)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Errors that leave this context have the client's names."""
        try:
            yield
        except InvalidRequest as error:
            param = None if error.param is None else self.own(error.param)
            raise InvalidRequest(self.own(str(error)), param) from error

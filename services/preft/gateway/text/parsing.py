"""The port to parsers: what finds reasoning and tool calls in a model's output, and what a request asks of it.

`preft.engine.chat_parsers` implements the port with vLLM's parsers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from preft.core.light import light_dataclass
from preft.gateway.text.choice import ToolCallDelta


@light_dataclass
class Parts:
    """A piece of a choice's output, taken apart."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()

    def then(self, later: Parts) -> Parts:
        """This piece and the next one, as one."""
        return Parts(
            self.content + later.content, self.reasoning + later.reasoning, (*self.tool_calls, *later.tool_calls)
        )


@dataclass(frozen=True, slots=True)
class Asked:
    """The parts of a chat that parsers read, as JSON values. `variables` are the chat template's.

    `may_call`: the model may call the tools. With `parallel` False, it may call one.
    """

    messages: Sequence[Mapping[str, Any]] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    may_call: bool = False
    parallel: bool = True
    variables: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class CallTag:
    """One exact form of a function's calls: `begin`, then the arguments as JSON of `schema`, then `end`."""

    name: str
    begin: str
    schema: Mapping[str, Any]
    end: str


class OutputParser(Protocol):
    """Parses one choice, either piece by piece with `push` or at once with `parse`. Both may raise anything.

    With `takes_many`, a piece may have several tokens.
    """

    @property
    def takes_many(self) -> bool: ...

    def push(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Parts:
        """Takes the choice's next piece, and returns what is certain about it and about earlier pieces."""

    def parse(self, text: str, token_ids: Sequence[int]) -> Parts:
        """The parts of the whole output."""

    def reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """The number of reasoning tokens in the whole output, which has been pushed or parsed."""


class RequestParsers(Protocol):
    """The parsers of one request's choices. `strict_tag` is the form in which the model must write its calls.

    `call_tags` are the forms of all calls that the tools allow, none if they aren't known. vLLM's parsers read special
    tokens: then `skip_special_tokens` is False, and the text must have them.
    """

    @property
    def skip_special_tokens(self) -> bool: ...

    @property
    def strict_tag(self) -> str | None: ...

    @property
    def call_tags(self) -> tuple[CallTag, ...]: ...

    def reasoning_end(self, prompt: Sequence[int]) -> int | None:
        """The token that ends the reasoning, None if the output begins behind it. Raises InvalidRequest if unknown."""

    def start(self, prompt: Sequence[int]) -> OutputParser:
        """A parser for one choice."""


class Parsers(Protocol):
    """The parsers of a server. `reads_calls` and `reads_reasoning` say which of them are configured."""

    @property
    def reads_calls(self) -> bool: ...

    @property
    def reads_reasoning(self) -> bool: ...

    def of(self, asked: Asked) -> RequestParsers | None:
        """The parsers for a request; None if no output needs one. Raises InvalidRequest."""

    def of_reasoning(self, asked: Asked) -> RequestParsers | None:
        """As `of`, without the parser of tool calls: for outputs whose form makes the calls certain."""

    def call_id(self, name: str, position: int, earlier: int) -> str:
        """An id for call `position` of the output, in the model's own form. `earlier` calls are in the prompt."""

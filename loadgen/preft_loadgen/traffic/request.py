"""One request, as traffic makes it and transports send it."""

from __future__ import annotations

from dataclasses import dataclass, replace

Prompt = tuple[int, ...] | str
"""Token ids, or text."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A further turn of a conversation: what the user says next, and the wanted tokens of the answer."""

    prompt: Prompt
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt for `model`, and `output_tokens` tokens of output: exactly, or at most if not `exact`.

    `history` are the earlier turns of a conversation, each the user's part and the answer; `later` the turns to come.
    With `cancel_after` the client hangs up after that many pieces of output. With `wants_ids` it asks for the answer's
    token ids too, which not all servers know.
    """

    model: str
    prompt: Prompt
    output_tokens: int
    exact: bool = True
    history: tuple[tuple[Prompt, Prompt], ...] = ()
    later: tuple[Turn, ...] = ()
    cancel_after: int | None = None
    wants_ids: bool = False

    @property
    def ids(self) -> tuple[int, ...]:
        """The prompt. Only for prompts of token ids."""
        assert not isinstance(self.prompt, str)
        return self.prompt

    def after(self, answer: Prompt) -> Request:
        """The conversation's next request, once this one got `answer`. Only if there are `later` turns."""
        turn, *later = self.later
        return replace(
            self,
            prompt=turn.prompt,
            output_tokens=turn.output_tokens,
            history=(*self.history, (self.prompt, answer)),
            later=tuple(later),
        )

    def whole_prompt(self) -> Prompt:
        """Earlier turns and this prompt in one piece, for interfaces without messages."""
        if isinstance(self.prompt, str):
            return "".join(f"{said}{answer}" for said, answer in self.history) + self.prompt
        ids: list[int] = []
        for said, answer in self.history:
            ids += [*said, *answer]
        return (*ids, *self.prompt)

"""Turns checked messages into the prompt's text, in the form that the model's template takes, without losing a text.

Templates differ: content is a string or a list of parts; a `developer` role exists or not. A template can also omit
text silently. To detect both, this module renders texts with marks and searches the result for the marks.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

from preft.core.errors import InvalidRequest
from preft.gateway.bodies.messages import Content, Message, ToolCall
from preft.gateway.text.chat_template import ChatTemplate
from preft.gateway.text.whole_texts import whole_texts

# Digits alone: templates that change case, escape or trim leave digits unchanged.
_MARK = f"7{secrets.randbelow(10**15):015}7"
_MARKS = re.compile(_MARK + r"(\d{8})([01])")


class _Form(Enum):
    """A form of content. ONE_PART is a list that must not have a second part."""

    TEXT = auto()
    ONE_PART = auto()
    PARTS = auto()


@dataclass(frozen=True, slots=True)
class _Turn:
    """A message as the template gets it, with or without marks in its texts."""

    role: str
    content: Content
    calls: tuple[ToolCall, ...] = ()
    source: Message | None = None


class _Marks:
    """Marks both ends of texts and finds the marks again. `mark` returns the marked text; mark numbers count from 0.

    With `change`, `mark` returns `change(number, text)` instead.
    """

    def __init__(self, change: Callable[[int, str], str] | None = None) -> None:
        self.texts: list[str] = []
        self._change = change or self._with_ends

    def mark(self, text: str) -> str:
        self.texts.append(text)
        return self._change(len(self.texts) - 1, text)

    @staticmethod
    def _with_ends(number: int, text: str) -> str:
        return f"{_MARK}{number:08}0{text}{_MARK}{number:08}1"

    @staticmethod
    def found(rendered: str) -> set[tuple[int, int]]:
        """(number, end) of each mark in `rendered`; end 0 is the beginning of the text."""
        return {(int(number), int(end)) for number, end in _MARKS.findall(rendered)}

    def all_in(self, rendered: str) -> bool:
        return len(self.found(rendered)) == 2 * len(self.texts)


class ChatPrompt:
    """The chat templates of one model: `default`, and for requests with tools `tool_use` where the model has it.

    Raises ConfigError if a template isn't valid Jinja.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        formats = {name: _Format(ChatTemplate(source, special_tokens)) for name, source in sources.items()}
        self._plain = formats["default"]
        self._with_tools = formats.get("tool_use", self._plain)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        reasoning_effort: str | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """Renders the prompt's text.

        Raises InvalidRequest if the template refuses the messages, omits a part of them, or doesn't read a parameter
        that the request gives for the template.
        """
        chosen = self._with_tools if tools else self._plain
        if documents and "documents" not in chosen.template.variables:
            raise InvalidRequest("The model's chat template doesn't read documents.", "documents")
        variables = {**chosen.effort(reasoning_effort), **(variables or {})}

        def rendered(turns: Sequence[_Turn]) -> str:
            return chosen.template.render(
                [chosen.as_dict(turn) for turn in chosen.adapted(turns)],
                tools=tools or None,
                documents=documents or None,
                variables=variables,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )

        text = rendered([_Turn(message.role, message.said, tuple(message.tool_calls), message) for message in messages])
        marks = _Marks()
        marked = [_marked(message, marks) for message in messages]
        try:
            shown = marks.found(rendered([turn for turn, _ in marked]))
        except InvalidRequest:  # the template may refuse the marks, not the texts

            def changed(change: Callable[[int, str], str]) -> str:
                changes = _Marks(change)
                return rendered([_marked(message, changes)[0] for message in messages])

            shown = {(number, end) for number in whole_texts(marks.texts, text, changed) for end in (0, 1)}
        for at, (turn, numbers) in enumerate(marked):
            is_continued = continue_final_message and at == len(marked) - 1
            _check_shown(at, turn, numbers, shown, is_continued)
        return text


def _marked(message: Message, marks: _Marks) -> tuple[_Turn, range]:
    """The marked message, and the numbers of the marks that must be in the prompt.

    Many templates drop an assistant's text beside its tool calls, so such a message gets
    marks in its calls' names alone.
    """
    first = len(marks.texts)
    content, calls = message.said, tuple(message.tool_calls)
    if calls:
        calls = tuple(_renamed(call, marks.mark(call.name)) for call in calls)
    else:
        texts = tuple(marks.mark(text) if text.strip() else text for text in content.texts)
        content = Content(texts, content.is_list)
    return _Turn(message.role, content, calls, message), range(first, len(marks.texts))


def _renamed(call: ToolCall, name: str) -> ToolCall:
    return replace(call, name=name, fields=_with_function(call, name=name))


def _with_function(call: ToolCall, **changes: str) -> dict[str, Any]:
    return {**call.fields, "function": {**call.fields["function"], **changes}}


def _check_shown(at: int, turn: _Turn, numbers: range, shown: set[tuple[int, int]], is_continued: bool) -> None:
    """Raises InvalidRequest unless the prompt contains the whole turn.

    The beginning of an assistant's text may be missing: templates remove its reasoning.
    """
    ends = (1,) if turn.role == "assistant" and not is_continued else (0, 1)
    if all((number, end) in shown for number in numbers for end in ends):
        return
    what = "tool_calls" if turn.calls else "content"
    raise InvalidRequest(
        f"The model's chat template leaves the {what} of messages[{at}] (role {turn.role!r}) out of the prompt.",
        f"messages[{at}].{what}",
    )


class _Format:
    """One template, and the forms of content that the template takes for each role."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._takes: dict[str, frozenset[_Form]] = {}
        self._silence: str | list[Any] | None = ""  # the content beside tool calls if the message has no text
        self._arguments_are_text = False
        user = _Turn("user", Content(("x",)))
        call = _Turn("assistant", Content(), (_PROBE_CALL,))
        for role, before, after in (
            ("user", [], []),
            ("system", [], [user]),
            ("developer", [], [user]),
            ("assistant", [user], [user]),
            ("tool", [user, call], []),
        ):
            self._takes[role] = frozenset(form for form in _Form if self._shows(role, form, before, after))
            if role == "assistant":
                self._find_form_of_calls(user)

    def effort(self, effort: str | None) -> dict[str, Any]:
        """Template variables for `reasoning_effort`, as in vLLM. Raises InvalidRequest if it reads none."""
        if effort is None:
            return {}
        if not self.template.variables & {"reasoning_effort", "enable_thinking"} and effort != "none":
            raise InvalidRequest(
                "The model's chat template reads neither reasoning_effort nor enable_thinking.", "reasoning_effort"
            )
        return {"reasoning_effort": effort, "enable_thinking": effort != "none"}

    def adapted(self, turns: Sequence[_Turn]) -> Sequence[_Turn]:
        """Without a developer role in the template, merges developer and system messages into one, as vLLM does."""
        if self.template.knows_developer or all(turn.role != "developer" for turn in turns):
            return turns
        turns = [replace(turn, role="system") if turn.role == "developer" else turn for turn in turns]
        system = [turn for turn in turns if turn.role == "system"]
        if len(system) == 1 and turns[0] is system[0]:
            return turns
        texts = ("\n".join(turn.content.texts) for turn in system)
        merged = _Turn("system", Content(("\n\n".join(text for text in texts if text),)))
        return [merged, *(turn for turn in turns if turn.role != "system")]

    def as_dict(self, turn: _Turn) -> dict[str, Any]:
        """One turn in the form that the template sees."""
        seen: dict[str, Any] = {"role": turn.role, "content": self._shaped(turn)}
        if turn.calls:
            seen["tool_calls"] = [
                _with_function(call, arguments=call.arguments) if self._arguments_are_text else call.fields
                for call in turn.calls
            ]
        if source := turn.source:
            if source.thoughts is not None:
                seen["reasoning"] = seen["reasoning_content"] = source.thoughts
            if source.tool_call_id is not None:
                seen["tool_call_id"] = source.tool_call_id
            if source.name is not None:
                seen["name"] = source.name
        return seen

    def _shaped(self, turn: _Turn) -> str | list[dict[str, str]] | None:
        """The client's form if the template takes it, else the parts joined by newlines, as in vLLM."""
        content, takes = turn.content, self._takes.get(turn.role, frozenset())
        if turn.calls and not any(content.texts):
            return self._silence
        if content.is_list and _Form.PARTS in takes:
            return _parts(content.texts)
        text = "\n".join(content.texts)
        return _parts([text]) if takes and _Form.TEXT not in takes else text

    def _find_form_of_calls(self, user: _Turn) -> None:
        """Prefers vLLM's form of tool calls. Some older templates need null content, or arguments as a JSON text."""
        takes = self._takes["assistant"]
        empty: str | list[Any] = [] if takes and _Form.TEXT not in takes else ""
        for self._arguments_are_text, self._silence in ((False, empty), (False, None), (True, empty), (True, None)):
            marks = _Marks()
            call = _Turn("assistant", Content(), (_renamed(_PROBE_CALL, marks.mark("f")),))
            rendered = self._try([self.as_dict(user), self.as_dict(call)])
            if rendered is not None and marks.all_in(rendered) and "None" not in rendered:
                return
        self._arguments_are_text, self._silence = False, empty

    def _shows(self, role: str, form: _Form, before: Sequence[_Turn], after: Sequence[_Turn]) -> bool:
        """Whether the template shows the whole text of a message in `form`, and nothing but the text."""
        marks = _Marks()
        texts = [marks.mark("x") for _ in range(2 if form is _Form.PARTS else 1)]
        content: Any = texts[0] if form is _Form.TEXT else [{**part, _MARK: _MARK} for part in _parts(texts)]
        probe = {"role": role, "content": content}
        if role == "tool":
            probe["tool_call_id"] = _PROBE_CALL.fields["id"]
        rendered = self._try([*map(self.as_dict, before), probe, *map(self.as_dict, after)])
        return rendered is not None and marks.all_in(rendered) and not re.search(_MARK + r"(?!\d{8})", rendered)

    def _try(self, messages: Sequence[Mapping[str, Any]]) -> str | None:
        try:
            return self.template.render(messages)
        except InvalidRequest:
            return None


_PROBE_CALL = ToolCall("f", {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {}}}, "{}")


def _parts(texts: Sequence[str]) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]

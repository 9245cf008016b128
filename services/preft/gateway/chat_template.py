"""Renders chat messages into a prompt with the model's own Jinja template, under Hugging Face's conventions.

Templates come with the model folder, never from a request; they run in Jinja's immutable sandbox all the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from preft.core.errors import ConfigError, InvalidRequest

# Ends in a space so that a template which trims the message is recognised (see `_cut_after_final_message`).
_END_OF_FINAL_MESSAGE = "<<end-of-final-message>> "
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks assistant text for training; when serving it is just its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One compiled template. `special_tokens` (bos_token, eos_token, ...) are visible to it by name.

    Raises ConfigError if `source` isn't valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the model's chat template is not valid Jinja: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text. `variables` are further template variables of the caller.

        With `continue_final_message` the prompt ends inside the last message. Raises InvalidRequest if the template
        refuses the messages.
        """
        variables = variables or {}
        if clash := _RESERVED.intersection(variables):
            raise InvalidRequest(f"chat_template_kwargs can't set {min(clash)!r}", "chat_template_kwargs")
        if continue_final_message:
            final = dict(messages[-1])
            final["content"] += _END_OF_FINAL_MESSAGE
            messages = [*messages[:-1], final]
        try:
            rendered = self._template.render(
                {
                    **self._special_tokens,
                    **variables,
                    "messages": messages,
                    "tools": None,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise InvalidRequest(
                f"the model's chat template can't render these messages: {error}", "messages"
            ) from error
        return _cut_after_final_message(rendered) if continue_final_message else rendered


def _cut_after_final_message(rendered: str) -> str:
    """Drops all that the template put after the last message, and the space it trimmed from it, if it does trim."""
    at = rendered.rfind(_END_OF_FINAL_MESSAGE.rstrip())
    if at < 0:
        raise InvalidRequest("the model's chat template doesn't render the final message", "continue_final_message")
    untrimmed = rendered.startswith(_END_OF_FINAL_MESSAGE, at)
    return rendered[:at] if untrimmed else rendered[:at].rstrip()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes HTML, which templates don't want."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)

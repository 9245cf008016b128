"""Renders a conversation into a prompt with the model's own Jinja template, under Hugging Face's conventions.

Templates come from the model folder, never from a request. They still run in Jinja's immutable sandbox. `chat_prompt`
judges the rendered prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from preft.core.errors import ConfigError, InvalidRequest

# Ends in a space, so that a template that trims the message is recognised (see `_cut_after_final_message`).
_END_OF_FINAL_MESSAGE = "<<end-of-final-message>> "
_RESERVED = frozenset(
    {
        "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template",
        "tokenize",
    }
)  # fmt: skip


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks assistant text for training. Serving renders the block's body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)  # a scope of its own

    def _body(self, caller: Any) -> str:
        text: str = caller()
        return text


class ChatTemplate:
    """One compiled template. The template sees `special_tokens` (bos_token, eos_token, ...) by name.

    `variables` are the names that the template reads; `knows_developer` says whether the template mentions that role.
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
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))
        except jinja2.TemplateError as error:
            raise ConfigError(f"the model's chat template is not valid Jinja: {error}") from error
        self.knows_developer = "'developer'" in source or '"developer"' in source
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Renders the prompt. `variables` are the caller's further template variables.

        With `continue_final_message` the prompt ends inside the last message. Raises InvalidRequest if the template
        refuses the messages.
        """
        variables = variables or {}
        if clash := _RESERVED.intersection(variables):
            raise InvalidRequest(f"chat_template_kwargs can't set {min(clash)!r}", "chat_template_kwargs")
        if continue_final_message:
            messages = [*messages[:-1], _with_end(messages[-1])]
        try:
            rendered = self._template.render(
                {
                    **self._special_tokens,
                    **variables,
                    "messages": messages,
                    "tools": tools,
                    "documents": documents,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except (
            jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError,
        ) as error:  # fmt: skip
            raise InvalidRequest(
                f"the model's chat template can't render these messages: {error}", "messages"
            ) from error
        return _cut_after_final_message(rendered) if continue_final_message else rendered


def _with_end(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": content + _END_OF_FINAL_MESSAGE}
    if not content:
        raise InvalidRequest("the final message has no text to continue", "continue_final_message")
    final = {**content[-1], "text": content[-1]["text"] + _END_OF_FINAL_MESSAGE}
    return {**message, "content": [*content[:-1], final]}


def _cut_after_final_message(rendered: str) -> str:
    """Cuts all text after the last message, and the message's final space if the template trims it."""
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
    """`tojson` for templates: Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)

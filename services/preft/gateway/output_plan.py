"""What a chat's body means for the model's output: the output's form, and the readers that take the output apart.

Owns the rules about tools, reasoning and forms together. `text.choice_reader` reads, `bodies.tool_choice` makes forms.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from preft.core.errors import InvalidRequest
from preft.core.structured import StructuredOutputs
from preft.gateway.bodies.schemas import ChatBody
from preft.gateway.bodies.tool_choice import NamedTool, forced_form
from preft.gateway.calls_or_form import calls_or_form
from preft.gateway.text.choice_reader import ChoiceReader
from preft.gateway.text.forced_calls import CallArray, ForcedCalls, NamedCall
from preft.gateway.text.parsing import Asked, CallTag, Parsers, RequestParsers
from preft.gateway.text.tagged_calls import TaggedCalls

if TYPE_CHECKING:
    from preft.gateway.api_call import ApiCall


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """How the choices of one chat are read. `form_param` is the parameter that gave the form.

    With `call_tags`, the grammar allows calls of these forms, or a text of another form.
    """

    parsers: Parsers | None
    request_parsers: RequestParsers | None
    form: StructuredOutputs | None
    form_param: str
    forced: NamedTool | bool  # the function that must be called, True for any
    call_tags: tuple[CallTag, ...]
    shows_marks: bool  # the text has special tokens, for whoever reads the calls
    parallel: bool
    whole: bool
    earlier_calls: int  # in the prompt

    def on(self, call: ApiCall) -> ApiCall:
        """The call with this plan. Raises InvalidRequest if its form can't wait for the end of the reasoning."""
        options, requests = call.options, call.requests
        form = self.form
        if self.shows_marks:
            options = replace(options, skip_special_tokens=False)
        if self.request_parsers is not None and form is not None:
            end = self.request_parsers.reasoning_end(requests[0].prompt_token_ids)
            form = replace(form, begins_after=end)
        if form is not requests[0].sampling.structured_outputs:
            requests = tuple(
                replace(request, sampling=replace(request.sampling, structured_outputs=form)) for request in requests
            )
        reading = self if self.request_parsers is not None or self.forced or self.call_tags else None
        return replace(call, requests=requests, options=options, form_param=self.form_param, reading=reading)

    @property
    def counts_reasoning(self) -> bool:
        return self.parsers is not None and self.parsers.reads_reasoning

    def reader(self, prompt: tuple[int, ...]) -> ChoiceReader:
        return ChoiceReader(
            self.request_parsers.start(prompt) if self.request_parsers is not None else None,
            self._forced_calls(),
            whole=self.whole,
            is_named=isinstance(self.forced, NamedTool),
            parallel=self.parallel,
            counts_reasoning=self.counts_reasoning,
        )

    def _forced_calls(self) -> ForcedCalls | None:
        if isinstance(self.forced, NamedTool):
            return NamedCall(self.forced.name, self._new_id)
        if self.call_tags:
            return TaggedCalls(self.call_tags, self._new_id)
        return CallArray(self._new_id) if self.forced else None

    def _new_id(self, name: str, position: int) -> str:
        if self.parsers is None:
            return f"chatcmpl-tool-{uuid.uuid4().hex}"
        return self.parsers.call_id(name, position, self.earlier_calls)


def plan_output(body: ChatBody, parsers: Parsers | None, *, whole: bool) -> OutputPlan | None:
    """The plan for a chat, None for a chat whose output is plain text. Raises InvalidRequest.

    `whole`: the answer is parsed at its end.
    """
    choice = body.wanted_tool_choice
    if choice == "auto" and (parsers is None or not parsers.reads_calls):
        raise InvalidRequest(
            "tool_choice='auto' needs the server's setting tool_call_parser; "
            "tool_choice='required', a named function and 'none' need no setting.",
            "tool_choice" if body.tool_choice is not None else "tools",
        )
    form = forced_form(body.tools, choice, parallel=body.parallel_tool_calls)
    if parsers is None and form is None:
        return None
    form_param = "tools"
    if form is None:
        form, form_param = body.wanted_outputs, body.form_param
    request_parsers, shows_marks = None, False
    call_tags: tuple[CallTag, ...] = ()
    if parsers is not None:
        asked = Asked(
            [
                {"role": "assistant", "tool_calls": message.tool_calls}
                for message in body.messages
                if message.tool_calls
            ],
            [tool.fields() for tool in body.tools],
            may_call=choice == "auto",
            parallel=body.parallel_tool_calls,
            variables=_variables(body),
        )
        request_parsers = parsers.of(asked) if choice in ("auto", "none") else parsers.of_reasoning(asked)
        shows_marks = request_parsers is not None and not request_parsers.skip_special_tokens
        if request_parsers is not None and form is None and request_parsers.strict_tag is not None:
            form, form_param = StructuredOutputs(structural_tag=request_parsers.strict_tag), "tools"
        elif request_parsers is not None and form is not None and choice == "auto":
            call_tags = request_parsers.call_tags
            form = calls_or_form(call_tags, form, form_param, parallel=body.parallel_tool_calls)
            request_parsers = parsers.of_reasoning(asked)  # `call_tags` read the calls
    return OutputPlan(
        parsers=parsers,
        request_parsers=request_parsers,
        form=form,
        form_param=form_param,
        forced=choice if isinstance(choice, NamedTool) else choice == "required",
        call_tags=call_tags,
        shows_marks=shows_marks,
        parallel=body.parallel_tool_calls,
        whole=whole,
        earlier_calls=sum(len(message.tool_calls) for message in body.messages),
    )


def _variables(body: ChatBody) -> dict[str, object]:
    """The template's variables that say whether the model reasons; see `ChatPrompt`."""
    effort = body.reasoning_effort
    given = {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    return {**given, **body.chat_template_kwargs}

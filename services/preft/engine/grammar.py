"""Structured output in an engine: compiles a request's form, and limits each step's tokens to those that fit.

llguidance compiles forms and computes masks. vLLM's own front end isn't used: vLLM fixes an engine's library with the
first request, and ignores a schema's keywords that the library doesn't know. llguidance refuses them. An engine that
takes over a request feeds it the tokens so far, once, before its first step; tokens that don't fit fail the request.

Extension points used: `Scheduler.add_request`, `update_from_output` and `grammar_compile_error_reqs`;
`Request.structured_output_request` and `status`; `StructuredOutputManager.backend`.
"""

from __future__ import annotations

import asyncio
import functools
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import llguidance
import llguidance.torch
import numpy as np
import torch
from transformers import AutoTokenizer
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutputs, FinishReason
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output.backend_guidance import process_for_additional_properties
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar
from vllm.v1.structured_output.request import StructuredOutputRequest

from preft.core.errors import InvalidRequest
from preft.core.structured import StructuredOutputs
from preft.engine import tag_grammar
from preft.engine.form_check import STACK, FormCheck, compiled, reason
from preft.engine.tag_grammar import Marks, Tag
from preft.transfer.connector import output_so_far

STRUCTURED = "preft_structured_outputs"  # in `extra_args` of a request's sampling parameters
UNFIT = "grammar: "
"""Begins the `stop_reason` of a request whose output can't go on in its form; the reason follows."""
PARAM = "structured_outputs"
PASSED = 256  # forms that a worker remembers as checked


class FormTokenizer:
    """A model's vocabulary as llguidance reads it. The constructor raises InvalidRequest for an unusable one."""

    def __init__(self, model: str, vocab_size: int) -> None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(model)
            self.vocab_size = max(vocab_size, len(tokenizer))
            self.eos: int = tokenizer.eos_token_id or 0
            self.json: str = tokenizer.backend_tokenizer.to_str()
            self.marks = _marks(tokenizer.backend_tokenizer)
        except Exception as error:  # transformers raises what it likes
            raise InvalidRequest(
                f"this model's tokenizer can't be used for structured output: {error}", PARAM
            ) from error

    def read(self) -> llguidance.LLTokenizer:
        """Takes half a second for a large vocabulary."""
        return llguidance.LLTokenizer(self.json, n_vocab=self.vocab_size, eos_token=self.eos)


class FormChecks:
    """An engine's front: checks forms in one thread, which waits for `form_check`'s process."""

    def __init__(self, model: str, vocab_size: int) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self._thread = ThreadPoolExecutor(1, "preft-form-check")
        self._passed: OrderedDict[StructuredOutputs, None] = OrderedDict()  # the latest

    async def check(self, wanted: StructuredOutputs) -> None:
        """Raises InvalidRequest if `wanted` can't be compiled, or no output fits it."""
        if wanted not in self._passed:  # else it needn't wait for others' checks
            await asyncio.wrap_future(self._thread.submit(self._check_now, wanted))
        self._passed[wanted] = None
        self._passed.move_to_end(wanted)
        if len(self._passed) > PASSED:
            self._passed.popitem(last=False)

    def close(self) -> None:
        if "_process" in self.__dict__:
            self._thread.submit(self._process.close)
        self._thread.shutdown()

    @functools.cached_property
    def _process(self) -> FormCheck:
        return FormCheck(self._tokenizer.json, self._tokenizer.vocab_size, self._tokenizer.eos)

    @functools.cached_property
    def _tokenizer(self) -> FormTokenizer:
        return FormTokenizer(self._model, self._vocab_size)

    def _check_now(self, wanted: StructuredOutputs) -> None:
        if problem := self._process.problem(source_of(wanted, self._tokenizer.marks)):
            raise InvalidRequest(f"the output's form can't be served: {problem}", PARAM)


class Grammars:
    """An engine's core: compiles forms in one thread. The model's tokenizer is read when the first form comes."""

    def __init__(self, model: str, vocab_size: int) -> None:
        self._model = model
        self._vocab_size = vocab_size
        before = threading.stack_size(STACK)
        try:
            self._thread = ThreadPoolExecutor(1, "preft-grammar")
            self._thread.submit(int).result()  # starts the thread
        finally:
            threading.stack_size(before)

    def compiled(
        self, wanted: StructuredOutputs, ends: Sequence[int], min_tokens: int, output: Sequence[int]
    ) -> Future[OutputGrammar]:
        """The grammar behind the tokens so far, `output`. See OutputGrammar.

        Fails with InvalidRequest if `wanted` can't be compiled, and with ValueError if `output` doesn't fit it.
        """
        return self._thread.submit(self._compiled, wanted, ends, min_tokens, output)

    def allocate_token_bitmask(self, max_num_seqs: int) -> torch.Tensor:
        """Part of vLLM's StructuredOutputBackend."""
        mask: torch.Tensor = llguidance.torch.allocate_token_bitmask(max_num_seqs, self._tokenizer.vocab_size)
        return mask

    def destroy(self) -> None:
        """Part of vLLM's StructuredOutputBackend."""
        self._thread.shutdown(wait=False)

    @functools.cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        tokenizer = FormTokenizer(self._model, self._vocab_size)
        self._marks = tokenizer.marks
        return tokenizer.read()

    def _compiled(
        self, wanted: StructuredOutputs, ends: Sequence[int], min_tokens: int, output: Sequence[int]
    ) -> OutputGrammar:
        tokenizer = self._tokenizer
        matcher = compiled(tokenizer, source_of(wanted, self._marks))
        if matcher.is_error():
            raise InvalidRequest(reason(matcher), PARAM)
        grammar = OutputGrammar(matcher, tokenizer.eos_tokens, ends, min_tokens, wanted.begins_after)
        if not grammar.accept_tokens("", output):
            raise ValueError(f"the tokens so far don't fit the request's form: {grammar.error}")
        return grammar


class OutputGrammar(StructuredOutputGrammar):
    """One request's form, and where its output is in it.

    `ends` are the request's stop and EOS tokens. They may come where the output is complete, and after that nothing
    else may. `eos` are the tokens that llguidance would put there. The form begins behind the token `begins_after`, and
    before it comes anything but an end.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        eos: Sequence[int],
        ends: Sequence[int],
        min_tokens: int,
        begins_after: int | None = None,
    ) -> None:
        self.error = ""  # why no further token is accepted
        self._matcher = matcher
        self._eos = eos
        self._ends = frozenset(ends)
        self._min_tokens = min_tokens
        self._count = 0
        self._ended = False
        self._begins_after = begins_after  # None as soon as the form has begun

    def accept_tokens(self, request_id: str, tokens: Sequence[int]) -> bool:
        return all(map(self._accept, tokens))

    def _accept(self, token: int) -> bool:
        if self.error:
            return False
        self._count += 1
        if self._begins_after is not None:
            if token in self._ends:
                self.error = "the output ended before its form began"
            elif token == self._begins_after:
                self._begins_after = None
        elif token in self._ends and (self._ended or self._matcher.is_accepting()):
            self._ended = True
        elif self._ended:
            self.error = f"token {token} came behind the end"
        elif not self._matcher.consume_token(token):
            self.error = reason(self._matcher)
        return not self.error

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
        row = bitmask[batch_index]
        words = row.numpy().view(np.uint32)
        if self._begins_after is not None:
            words[:] = 0xFFFFFFFF
            for token in self._ends:
                words[token >> 5] &= ~np.uint32(1 << (token & 31))
            return
        if only_ends := self._ended or self._matcher.is_stopped():
            words[:] = 0
        else:
            self._matcher.unsafe_compute_mask_ptr(row.data_ptr(), row.numel() * row.element_size())
            if self._matcher.is_error():
                self.error = self.error or reason(self._matcher)
            for token in self._eos:
                words[token >> 5] &= ~np.uint32(1 << (token & 31))
        if only_ends and self._count < self._min_tokens:
            self.error = f"the output is complete after {self._count} tokens, and min_tokens is {self._min_tokens}"
        if only_ends or self.error or self._matcher.is_accepting():
            for token in self._ends:
                words[token >> 5] |= np.uint32(1 << (token & 31))

    def is_terminated(self) -> bool:
        """Never: vLLM lifts the limits of a terminated grammar."""
        return False

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        raise NotImplementedError("speculative decoding")

    def rollback(self, num_tokens: int) -> None:
        raise NotImplementedError("speculative decoding")

    def reset(self) -> None:
        raise NotImplementedError("a grammar serves one request")


def source_of(wanted: StructuredOutputs, marks: Marks) -> str:
    """The form as llguidance's own kind of text, for a tokenizer with `marks`. Raises InvalidRequest."""
    try:
        if wanted.regex is not None:
            return str(llguidance.grammar_from("regex", wanted.regex))
        if wanted.choice:
            return str(llguidance.grammar_from("choice", json.dumps(wanted.choice)))
        if wanted.grammar is not None:
            return str(llguidance.grammar_from("grammar", wanted.grammar))
        if wanted.structural_tag is not None:
            return _structural_tag(wanted, marks)
        return str(llguidance.LLMatcher.grammar_from_json_schema(json.dumps(_schema_of(wanted))))
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, StopIteration) as error:
        raise InvalidRequest(f"the output's form isn't valid: {error or type(error).__name__}", PARAM) from error


def _schema_of(wanted: StructuredOutputs) -> dict[str, Any]:
    """Of a form of the kinds `json` and `json_object`."""
    return _with_options(wanted, json.loads(wanted.json or '{"type": "object"}'))


def _with_options(wanted: StructuredOutputs, schema: Any) -> dict[str, Any]:
    """A JSON Schema with the options that llguidance reads in it."""
    options: dict[str, Any] = {"lenient": False, "coerce_one_of": False}  # else parts of the schema would be ignored
    if wanted.whitespace_pattern is not None:
        options["whitespace_pattern"] = wanted.whitespace_pattern
    if wanted.disable_any_whitespace:
        options |= {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
    if wanted.disable_additional_properties:
        schema = process_for_additional_properties(schema)
    return {**(schema if isinstance(schema, dict) else {"allOf": [schema]}), "x-guidance": options}


def _structural_tag(wanted: StructuredOutputs, marks: Marks) -> str:
    """vLLM's form with `structures` and `triggers`, or with `calls` the form of `gateway.calls_or_form`."""
    given = json.loads(wanted.structural_tag or "")
    if "calls" in given:
        return _calls_or_form(wanted, given, marks)
    tags = []
    for structure in given["structures"]:
        begin = structure["begin"]
        trigger = next(trigger for trigger in given["triggers"] if begin.startswith(trigger))
        tags.append(Tag(begin, _with_options(wanted, structure["schema"]), structure["end"], trigger))
    return tag_grammar.text_with_tags(tags, marks)


def _calls_or_form(wanted: StructuredOutputs, given: dict[str, Any], marks: Marks) -> str:
    form = StructuredOutputs(**{**given["form"], "choice": tuple(given["form"].get("choice", ()))})
    calls = [Tag(call["begin"], _with_options(wanted, call["schema"]), call["end"]) for call in given["calls"]]
    if form.regex is not None:
        rules = tag_grammar.regex_rules(form.regex, calls)
    elif form.choice:
        rules = tag_grammar.choice_rules(form.choice)
    elif form.json is not None or form.json_object:
        rules = tag_grammar.json_rules(_schema_of(form))
    else:
        raise ValueError("a grammar or structural tag can't stand beside calls")
    return tag_grammar.calls_or_form(calls, several=given["several"], form=rules, marks=marks)


def _marks(tokenizer: Any) -> Marks:
    """The added tokens that llguidance takes as special: it doesn't say which they are."""
    return {
        token.content: number
        for number, token in tokenizer.get_added_tokens_decoder().items()
        if token.content and (token.special or (token.content[0] == "<" and token.content[-1] == ">"))
    }


class GrammarScheduler:
    """A mixin; put it before a scheduler class."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = self.vllm_config.model_config
        self._grammars = Grammars(model.model, model.get_vocab_size())
        self.structured_output_manager.backend = self._grammars

    def add_request(self: Any, request: Request) -> None:
        params = request.sampling_params
        form = ((params and params.extra_args) or {}).get(STRUCTURED)
        if form is not None:
            output = output_so_far(params)
            structured = StructuredOutputRequest(params=None)
            structured.grammar = self._grammars.compiled(wanted_of(form), form["ends"], params.min_tokens, output)
            request.structured_output_request = structured
            request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        super().add_request(request)  # type: ignore[misc]

    def update_from_output(
        self: Any, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        failing: dict[str, Request] = {key: self.requests[key] for key in self.grammar_compile_error_reqs}
        if scheduler_output.has_structured_output_requests:
            scheduled = filter(None, map(self.requests.get, scheduler_output.num_scheduled_tokens))
            failing |= {request.request_id: request for request in scheduled if request.use_structured_output}
        outputs: dict[int, EngineCoreOutputs]
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        if failing:
            for output in [output for group in outputs.values() for output in group.outputs]:
                if output.finish_reason is FinishReason.ERROR and output.request_id in failing:
                    output.stop_reason = _failure(failing[output.request_id])
        return outputs


def _failure(request: Request) -> str | None:
    """The `stop_reason` of a failed request, None if its form isn't why it failed."""
    assert request.structured_output_request is not None
    grammar = request.structured_output_request.grammar
    if isinstance(grammar, InvalidRequest):
        return UNFIT + str(grammar)
    return UNFIT + grammar.error if isinstance(grammar, OutputGrammar) and grammar.error else None


def form_of(wanted: StructuredOutputs, ends: Sequence[int]) -> dict[str, Any]:
    """The value of `STRUCTURED` in `extra_args`. `wanted_of` is the inverse."""
    fields = {name: getattr(wanted, name) for name in StructuredOutputs.__dataclass_fields__}
    return {**fields, "ends": list(ends)}


def wanted_of(form: dict[str, Any]) -> StructuredOutputs:
    fields = {name: value for name, value in form.items() if name != "ends"}
    return StructuredOutputs(**{**fields, "choice": tuple(fields["choice"])})

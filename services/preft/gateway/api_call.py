"""From a checked body to core requests: resolves names, tokenizes prompts, checks lengths and token ids.

No worker hears of a request that is refused here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from preft.core.errors import InvalidRequest, ModelNotFound, Unavailable
from preft.core.request import MAX_CHOICES, PARAMETERS, AdapterRef, GenerateRequest, Sampling
from preft.gateway.access.caller import Caller
from preft.gateway.bodies.anthropic import MessagesBody
from preft.gateway.bodies.responses import ResponsesBody
from preft.gateway.bodies.schemas import INT64_MAX, ChatBody, CompletionBody, GenerationBody
from preft.gateway.bodies.values import Prompt
from preft.gateway.deps import GatewayDeps
from preft.gateway.listing import served_version
from preft.gateway.output_plan import OutputPlan, plan_output
from preft.gateway.text.chat_prompt import ChatPrompt
from preft.gateway.text.choice import TextOptions
from preft.gateway.text.tokenizer import INLINE_CHARS, Tokenizer

DEFAULT_COMPLETION_TOKENS = 16
UNSTATED_TOKENS = 1024  # taken from a key's limit for each choice without max_tokens; its end settles the rest
# About 2 ms; larger requests go to a thread.
INLINE_MESSAGES = 64
INLINE_IDS = 65_536
INLINE_LOGPROBS = 256  # prompt tokens
MAX_PROMPT_VALUES = 1 << 20  # 20 alternatives for each token of a prompt of 49,000; 70 MB of JSON


@dataclass(frozen=True, slots=True)
class ApiCall:
    """One API call: a core request per prompt, each with `n` choices. Choice i of prompt p has index p * n + i.

    `reserved_tokens` are taken from a key's limits while the call runs: the prompts, and what may be generated. The
    reply of prompt p's choices begins with `echoes[p]`, if there are any. `prompt_only`: the reply has no output.
    """

    id: str
    model: str
    requests: tuple[GenerateRequest, ...]
    n: int
    options: TextOptions
    reserved_tokens: int = 0
    form_param: str = "structured_outputs"  # the parameter that gave the output's form
    reading: OutputPlan | None = None  # None: a choice's text is all content
    echoes: tuple[str, ...] = ()
    prompt_only: bool = False
    rendered: str | None = None  # a chat's prompt, if the reply shall show it

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt_token_ids) for request in self.requests)

    @property
    def shows_long_prompt(self) -> bool:
        """Whether a thread should write the log probabilities of the prompt."""
        return self.requests[0].sampling.prompt_logprobs is not None and self.prompt_tokens > INLINE_LOGPROBS


async def completion_call(
    body: CompletionBody, deps: GatewayDeps, caller: Caller, *, deadline: float | None = None
) -> ApiCall:
    """Raises ModelNotFound or InvalidRequest. `deadline` is in `time.time()` seconds."""
    adapter = resolve_model(body.model, deps, caller)
    if len(body.prompt) * body.n > MAX_CHOICES:
        raise InvalidRequest(f"{len(body.prompt)} prompts with n={body.n} are more than {MAX_CHOICES} choices.", "n")
    whole = await _token_ids(body, deps)
    prompts = [_truncated(prompt, body, deps) for prompt in whole]
    make = functools.partial(_new_call, body, deps, caller, adapter, prompts, DEFAULT_COMPLETION_TOKENS, deadline)
    is_long = sum(map(len, prompts)) > INLINE_IDS
    call = await asyncio.to_thread(make) if is_long else make()
    if not body.echo:
        return call
    read = functools.partial(_echoes, body.prompt, whole, call.requests, deps.tokenizer)
    echoes = await asyncio.to_thread(read) if is_long else read()
    return dataclasses.replace(call, echoes=echoes, prompt_only=body.max_tokens == 0)


async def chat_call(
    body: ChatBody, deps: GatewayDeps, caller: Caller, *, deadline: float | None = None, streamed: bool | None = None
) -> ApiCall:
    """As `completion_call`. Raises InvalidRequest also for a model without a chat template.

    `streamed`: the deltas reach the caller one by one; None: as the body says.
    """
    adapter = resolve_model(body.model, deps, caller)
    whole = not (body.stream if streamed is None else streamed)
    make = functools.partial(plan_output, body, deps.parsers, whole=whole)
    plan = make() if _is_short(body) else await asyncio.to_thread(make)
    tokens, text = await chat_tokens(body, deps)
    prompts = [_truncated(tokens, body, deps)]
    if not prompts[0]:
        raise InvalidRequest("The messages make an empty prompt.", "messages")
    default = deps.tokenizer.defaults.get("max_tokens")
    call = _new_call(body, deps, caller, adapter, prompts, default, deadline)
    call = dataclasses.replace(call, echoes=body.echoes, rendered=text if body.return_prompt_text else None)
    return call if plan is None else plan.on(call)


async def converted_call(
    body: ResponsesBody | MessagesBody, deps: GatewayDeps, caller: Caller, *, deadline: float | None = None
) -> ApiCall:
    """As `chat_call`; errors have the body's own names."""
    with body.names.used():
        call = await chat_call(body.chat, deps, caller, deadline=deadline)
    return dataclasses.replace(call, form_param=body.names.own(call.form_param))


async def chat_tokens(body: ChatBody, deps: GatewayDeps) -> tuple[tuple[int, ...], str]:
    """A chat's prompt as token ids and as text. Raises InvalidRequest."""
    prompt = deps.tokenizer.chat_prompt
    if prompt is None:
        raise InvalidRequest("The served model has no chat template; use /v1/completions.", "messages")
    text = _render(body, prompt) if _is_short(body) else await asyncio.to_thread(_render, body, prompt)
    _check_length(text, body, deps)
    [tokens] = await deps.tokenizer.encode([text], add_special_tokens=body.add_special_tokens)
    return tokens, text


def resolve_model(model: str, deps: GatewayDeps, caller: Caller) -> AdapterRef | None:
    """The adapter version behind `model`, or None for the base model.

    Raises ModelNotFound, also if `model` names both an adapter and the base model. Raises Unavailable while the catalog
    can't be read.
    """
    if model == deps.model_name:
        with suppress(Unavailable):  # an unreadable catalog is no reason to refuse the base model
            if caller.catalog.get(model) is not None:  # added by a server whose base model has another name
                raise ModelNotFound(f"The model {model!r} is ambiguous: the base model and an adapter have this name.")
        return None
    adapter = served_version(caller.catalog, model)
    return AdapterRef(adapter.name, adapter.digest, adapter.source)


def _is_short(body: ChatBody) -> bool:
    """Whether the template is rendered inline. Tools and template variables can be as large as the body."""
    variables = body.chat_template_kwargs
    return (
        len(body.messages) + len(variables) <= INLINE_MESSAGES
        and sum(len(text) for message in body.messages for text in (*message.said.texts, message.thoughts or ""))
        <= INLINE_CHARS
        and not any(isinstance(value, list | dict) for value in variables.values())
        and not (body.tools or body.documents or any(message.tool_calls for message in body.messages))
    )


def _render(body: ChatBody, prompt: ChatPrompt) -> str:
    return prompt.render(
        body.messages,
        tools=[tool.fields() for tool in body.tools],
        documents=body.documents,
        reasoning_effort=body.reasoning_effort,
        variables=body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
    )


async def _token_ids(body: CompletionBody, deps: GatewayDeps) -> Sequence[tuple[int, ...]]:
    texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
    for text in texts:
        _check_length(text, body, deps)
    encoded = iter(await deps.tokenizer.encode(texts, add_special_tokens=body.add_special_tokens))
    ids = [next(encoded) if isinstance(prompt, str) else prompt for prompt in body.prompt]
    if not all(ids):
        raise InvalidRequest("The prompt has no tokens.", "prompt")
    return ids


def _truncated(prompt: tuple[int, ...], body: GenerationBody, deps: GatewayDeps) -> tuple[int, ...]:
    """The prompt's last `truncate_prompt_tokens` tokens, or its first ones with `truncation_side` right.

    -1 leaves room for one token of output. Raises InvalidRequest for 0.
    """
    size = body.truncate_prompt_tokens
    if size is None:
        return prompt
    if size == 0:
        raise InvalidRequest("truncate_prompt_tokens=0 would leave no prompt.", "truncate_prompt_tokens")
    size = deps.max_model_len - 1 if size < 0 else size
    start = max(0, len(prompt) - size) if body.truncation_side == "left" else 0
    return prompt[start : start + size]


def _echoes(
    given: Sequence[Prompt],
    whole: Sequence[tuple[int, ...]],
    requests: Sequence[GenerateRequest],
    tokenizer: Tokenizer,
) -> tuple[str, ...]:
    """The prompts as text: as given, unless token ids were given or the text was truncated."""
    return tuple(
        prompt
        if isinstance(prompt, str) and ids == request.prompt_token_ids
        else tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
        for prompt, ids, request in zip(given, whole, requests, strict=True)
    )


def _check_length(text: str, body: GenerationBody, deps: GatewayDeps) -> None:
    """Refuses texts that must be too long, before tokenizing: the tokenizer needs 80 times a text's memory."""
    if len(text) > deps.max_model_len * deps.tokenizer.chars_per_token:
        raise InvalidRequest(
            f"The prompt has {len(text)} characters, more than fit into the model's context of {deps.max_model_len}"
            " tokens.",
            body.prompt_param,
        )


def check_ids(ids: Iterable[int], tokenizer: Tokenizer, param: str) -> None:
    """Raises InvalidRequest for ids outside the vocabulary."""
    for token_id in ids:
        if not 0 <= token_id < tokenizer.vocab_size:
            raise InvalidRequest(
                f"{param}: token id {token_id} is not in the vocabulary of {tokenizer.vocab_size} tokens.", param
            )


def _new_call(
    body: GenerationBody,
    deps: GatewayDeps,
    caller: Caller,
    adapter: AdapterRef | None,
    prompts: Sequence[tuple[int, ...]],
    default_tokens: int | None,
    deadline: float | None = None,
) -> ApiCall:
    tokenizer = deps.tokenizer
    check_ids(body.stop_token_ids, tokenizer, "stop_token_ids")
    check_ids(body.logit_bias, tokenizer, "logit_bias")
    check_ids(body.allowed_token_ids or (), tokenizer, "allowed_token_ids")
    unique = uuid.uuid4().hex
    call_id = f"{body.id_prefix}{body.request_id or unique}"
    # Callers may reuse an id, and workers need unique ids.
    request_id = f"{call_id}-{unique}" if body.request_id else call_id
    _check_prompt_values(body, prompts)
    requests, reserved = [], 0
    for number, prompt in enumerate(prompts):
        max_tokens = _max_tokens(body, len(prompt), default_tokens, deps.max_model_len)
        check_ids(prompt, tokenizer, body.prompt_param)
        most = max_tokens if body.wanted_tokens is not None else min(max_tokens, UNSTATED_TOKENS)
        reserved += len(prompt) + body.n * most
        requests.append(
            GenerateRequest(
                request_id=request_id if len(prompts) == 1 else f"{request_id}-{number}",
                prompt_token_ids=prompt,
                sampling=_sampling(body, tokenizer, max_tokens),
                adapter=adapter,
                n=body.n,
                deadline=deadline,
                priority=body.priority,
                tenant=caller.share(body.user or ""),
                cache_salt=caller.tenant if body.cache_salt is None else f"{caller.tenant}/{body.cache_salt}",
            )
        )
    options = TextOptions(
        stop=body.stop,
        include_stop=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        min_tokens=body.min_tokens,
        logprobs=body.wanted_logprobs is not None,
    )
    return ApiCall(call_id, body.model, tuple(requests), body.n, options, reserved, body.form_param)


def _check_prompt_values(body: GenerationBody, prompts: Sequence[tuple[int, ...]]) -> None:
    """Refuses replies with too many log probabilities of prompt tokens: they are all in memory at once."""
    top = body.wanted_prompt_logprobs
    if top is None:
        return
    values = sum(map(len, prompts)) * body.n * (top + 1)
    if values > MAX_PROMPT_VALUES:
        raise InvalidRequest(
            f"The reply would have {values} log probabilities of prompt tokens, more than {MAX_PROMPT_VALUES}: give"
            " fewer prompts, or ask for fewer alternatives.",
            "logprobs" if body.prompt_logprobs is None else "prompt_logprobs",
        )


def _max_tokens(body: GenerationBody, prompt_len: int, default: int | None, limit: int) -> int:
    """The output limit of one prompt in tokens: the wanted limit, else the default, within the context's room."""
    room = limit - prompt_len
    if room < 1:
        raise InvalidRequest(
            f"The prompt has {prompt_len} tokens; the model's context of {limit} tokens leaves no room for output.",
            body.prompt_param,
        )
    wanted = body.wanted_tokens
    if wanted is None:
        wanted = room if default is None else min(room, default)
    elif wanted > limit:
        raise InvalidRequest(f"max_tokens is {wanted}, more than the model's context of {limit} tokens.", "max_tokens")
    else:
        wanted = min(wanted, room)  # as in vLLM: clients often ask for more than a long prompt leaves
    if body.min_tokens > wanted:
        raise InvalidRequest(f"min_tokens ({body.min_tokens}) is more than max_tokens ({wanted}).", "min_tokens")
    return wanted


def _sampling(body: GenerationBody, tokenizer: Tokenizer, max_tokens: int) -> Sampling:
    """Sampling values from the request, else from the model's generation_config.json, else vLLM's defaults."""
    values = {**tokenizer.defaults, **body.model_dump(include=set(PARAMETERS), exclude_none=True)}
    values |= {
        "max_tokens": max(1, max_tokens),  # an engine can't compute a prompt without sampling a token
        "prompt_logprobs": body.wanted_prompt_logprobs,
        "top_k": max(0, values.get("top_k", 0)),
        "seed": _seed(body),
        "eos_token_ids": tokenizer.eos_token_ids,
        "stop_token_ids": tuple(dict.fromkeys(body.stop_token_ids)),
        "allowed_token_ids": tuple(dict.fromkeys(body.allowed_token_ids or ())),
        "logprobs": body.wanted_logprobs,
        "structured_outputs": body.wanted_outputs,
    }
    return Sampling(**values)


def _seed(body: GenerationBody) -> int | None:
    """The seed of choice 0. Choice i gets `seed + i`: a seed starts lower if a sum would be -1 or too large."""
    seed = body.seed
    if seed is None:
        return None
    last = seed + body.n - 1
    return seed - body.n if seed < -1 <= last or last > INT64_MAX else seed

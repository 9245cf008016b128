"""Request parameters without a field of their own: parameters accepted without effect, and parameters refused by name.

The rule: a parameter that would change the answer is either served or refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from preft.core.errors import InvalidRequest
from preft.gateway.bodies.values import overflow_in

# Long lists of numbers, whose readers check every number.
_NUMBERS = frozenset({"prompt", "stop_token_ids", "allowed_token_ids"})

# No effect on the tokens here, whatever the value: the caller's own bookkeeping, ...
ACCEPTED = frozenset(
    {
        "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "prompt_cache_options", "session_id",
        # ... the size of stream chunks, ...
        "stream_interval",
        # ... parameters that only count beside a refused parameter, ...
        "length_penalty",
        # ... and parameters for images, expert models or vLLM's render endpoints.
        "media_io_kwargs", "mm_payload", "mm_processor_kwargs", "return_mm_kwargs", "return_token_offsets",
        "routed_experts_prompt_start",
    }
)  # fmt: skip

# OpenAI or vLLM knows these parameters; this server doesn't serve them. The listed values change nothing: accepted.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "detokenize": (True,),
    "ec_transfer_params": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "include_reasoning": (True,),
    "kv_transfer_params": (),
    "logit_processors": ([],),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_embeds": (),
    "repetition_detection": (),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "thinking_token_budget": (-1,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "vllm_xargs": ({},),
    "watermarking": (False,),
    "web_search_options": (),
}


@dataclass(frozen=True, slots=True)
class OtherParameters:
    """The parameters of one API that have no field. `reasons` says why some of the unsupported ones are refused."""

    accepted: frozenset[str]
    unsupported: Mapping[str, tuple[Any, ...]]
    reasons: Mapping[str, str] = field(default_factory=dict)


OF_COMPLETIONS = OtherParameters(ACCEPTED, UNSUPPORTED)


def known_parameters(
    given: Mapping[str, Any], fields: Iterable[str], others: OtherParameters = OF_COMPLETIONS
) -> dict[str, Any]:
    """The parameters among `fields` that have a value; null means absent.

    Raises InvalidRequest for an unknown parameter, for one that is known elsewhere but not served, and for a number
    that overflows, also inside objects that nothing else checks.
    """
    fields = frozenset(fields)
    kept: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        if name in fields:
            kept[name] = value
        elif name in others.unsupported:
            if not any(_same(value, neutral) for neutral in others.unsupported[name]):
                reason = others.reasons.get(name)
                message = f"Parameter {name!r} isn't supported{f': {reason}' if reason else ' with this value'}."
                raise InvalidRequest(message, name)
        elif name not in others.accepted:
            raise InvalidRequest(f"Unknown parameter: {name!r}.", name)
        if name not in _NUMBERS and (path := overflow_in(value)) is not None:
            raise InvalidRequest(f"{name}{path}: the number is too large.", name + path)
    return kept


def _same(value: object, neutral: object) -> bool:
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral

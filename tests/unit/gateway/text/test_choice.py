from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preft.core.errors import EngineFailed
from preft.core.request import FinishReason, TokenDelta, TokenLogprob
from preft.gateway.text.choice import ChoiceText, TextOptions

EOS = 1
relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def ids_of(tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer._backend.encode(text, add_special_tokens=False).ids)


def letters(tokenizer, text: str) -> tuple[int, ...]:
    """One token per character."""
    return tuple(tokenizer._backend.token_to_id(char) for char in text)


def new_choice(tokenizer, **options) -> ChoiceText:
    return ChoiceText(0, tokenizer, ids_of(tokenizer, "prompt:"), TextOptions(**options))


def test_the_end_token_is_counted_but_not_shown(tokenizer):
    delta = TokenDelta(0, (*ids_of(tokenizer, "fox"), EOS), finish_reason=FinishReason.STOP)
    out = new_choice(tokenizer, skip_special_tokens=False).push(delta)
    assert (out.text, out.token_ids, out.finish_reason, out.stop_reason) == ("fox", delta.token_ids, "stop", None)
    shown = new_choice(tokenizer, skip_special_tokens=False, include_stop=True).push(delta)
    assert shown.text == "fox<|eos|>"


def test_the_callers_stop_token_is_the_stop_reason(tokenizer):
    (x,) = letters(tokenizer, "x")
    out = new_choice(tokenizer).push(TokenDelta(0, (x,), finish_reason=FinishReason.STOP, stop_token_id=x))
    assert (out.text, out.stop_reason) == ("", x)


def test_length_shows_the_last_token_and_flushes(tokenizer):
    half = tokenizer._backend.token_to_id("ð")
    choice = new_choice(tokenizer)
    out = choice.push(TokenDelta(0, (*letters(tokenizer, "ab"), half), finish_reason=FinishReason.LENGTH))
    assert (out.text, out.finish_reason) == ("ab\ufffd", "length")
    assert choice.finished


def test_a_finish_without_tokens(tokenizer):
    choice = new_choice(tokenizer, stop=("zz",))
    assert choice.push(TokenDelta(0, letters(tokenizer, "az"))).text == "a"
    out = choice.push(TokenDelta(0, (), finish_reason=FinishReason.LENGTH))
    assert (out.text, out.finish_reason) == ("z", "length")


def test_tokens_after_the_stop_string_are_dropped(tokenizer):
    ids = letters(tokenizer, "abcdef")
    logprobs = tuple(TokenLogprob(id, -1.0, 1) for id in ids)
    out = new_choice(tokenizer, stop=("cd",), logprobs=True).push(TokenDelta(0, ids, logprobs))
    assert (out.text, out.token_ids, out.finish_reason, out.stop_reason) == ("ab", ids[:4], "stop", "cd")
    assert out.logprobs == logprobs[:4]
    included = new_choice(tokenizer, stop=("cd",), include_stop=True).push(TokenDelta(0, ids))
    assert included.text == "abcd"


def test_a_stop_string_beats_the_length(tokenizer):
    delta = TokenDelta(0, letters(tokenizer, "ab"), finish_reason=FinishReason.LENGTH)
    out = new_choice(tokenizer, stop=("b",)).push(delta)
    assert (out.text, out.finish_reason, out.stop_reason) == ("a", "stop", "b")


@pytest.mark.parametrize(
    ("min_tokens", "text"), [(0, "a"), (2, "a"), (3, "abca"), (5, "abca"), (6, "abcabca"), (9, "")]
)
def test_stop_strings_count_only_after_min_tokens(tokenizer, min_tokens, text):
    """A match must end in a later token than the first `min_tokens`; "bc" ends in tokens 3, 6 and 9."""
    choice = new_choice(tokenizer, stop=("bc",), min_tokens=min_tokens)
    out = choice.push(TokenDelta(0, letters(tokenizer, "abcabcabc"), finish_reason=FinishReason.LENGTH))
    assert out.text == (text or "abcabcabc")
    assert out.stop_reason == ("bc" if text else None)


@relaxed
@given(
    text=st.text(alphabet="abé🙂", max_size=12),
    stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=3), max_size=2),
    sizes=st.lists(st.integers(1, 4), max_size=20),
    min_tokens=st.integers(0, 6),
    include=st.booleans(),
)
def test_grouping_of_tokens_never_matters(tokenizer, text, stops, sizes, min_tokens, include):
    ids = ids_of(tokenizer, text)

    def run(sizes: list[int]) -> tuple[str, tuple[int, ...], object, object]:
        choice = new_choice(tokenizer, stop=tuple(stops), min_tokens=min_tokens, include_stop=include)
        shown, seen, start, out = "", (), 0, None
        for size in [*sizes, len(ids)]:
            out = choice.push(TokenDelta(0, ids[start : start + size]))
            shown, seen, start = shown + out.text, seen + out.token_ids, start + size
            if choice.finished:
                return shown, seen, out.finish_reason, out.stop_reason
        out = choice.push(TokenDelta(0, (), finish_reason=FinishReason.LENGTH))
        return shown + out.text, seen, out.finish_reason, out.stop_reason

    assert run(sizes) == run([1] * len(ids))


def test_missing_log_probabilities_are_an_error(tokenizer):
    with pytest.raises(EngineFailed):
        new_choice(tokenizer, logprobs=True).push(TokenDelta(0, (5,)))

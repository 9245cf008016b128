from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preft.gateway.text.detokenizer import Detokenizer
from preft.gateway.text.tokenizer import Tokenizer

KINDS = ("bytes", "metaspace", "words")
relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
texts = st.text(alphabet="helo wrd.,!?你好🙂привéñ a", min_size=1, max_size=40)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer._backend.encode(text, add_special_tokens=False).ids
    return ids


def chunked(
    tokenizer: Tokenizer, prompt: Sequence[int], output: Sequence[int], sizes: Sequence[int], skip: bool = True
):
    detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=skip)
    pieces, start = [], 0
    for size in [*sizes, len(output)]:
        pieces.append(detokenizer.push(output[start : start + size]))
        start += size
    return pieces, detokenizer.flush()


@pytest.mark.parametrize("kind", KINDS)
@relaxed
@given(text=texts, cut=st.integers(0, 60), sizes=st.lists(st.integers(1, 5), max_size=20))
def test_text_is_that_of_the_whole_less_the_prompt(tokenizers, kind, text, cut, sizes):
    tokenizer = tokenizers[kind]
    ids = encode(tokenizer, "hello" + text)
    cut = min(max(1, cut), len(ids))
    prompt, output = ids[:cut], ids[cut:]
    pieces, tail = chunked(tokenizer, prompt, output, sizes)
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    # A prompt that ends inside a character leaves its completion to the output.
    while before.endswith("\ufffd"):
        prompt = prompt[:-1]
        before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert before + "".join(pieces) + tail == whole
    assert not any("\ufffd" in piece for piece in pieces)  # all input is valid text


@pytest.mark.parametrize("kind", KINDS)
@relaxed
@given(data=st.data(), skip=st.booleans())
def test_chunking_never_matters_for_any_tokens(tokenizers, kind, data, skip):
    tokenizer = tokenizers[kind]
    ids = st.integers(0, tokenizer.vocab_size - 1)
    prompt = data.draw(st.lists(ids, min_size=1, max_size=12))
    output = data.draw(st.lists(ids, max_size=40))
    sizes = data.draw(st.lists(st.integers(1, 7), max_size=40))
    one_by_one, tail = chunked(tokenizer, prompt, output, [1] * len(output), skip)
    grouped, grouped_tail = chunked(tokenizer, prompt, output, sizes, skip)
    assert "".join(grouped) == "".join(one_by_one)
    assert grouped_tail == tail


@relaxed
@given(output=st.lists(st.integers(4, 259), max_size=30))
def test_any_bytes_decode_as_at_once(tokenizer, output):
    """The single-byte tokens of a byte-level vocabulary, in any order, valid UTF-8 or not."""
    pieces, tail = chunked(tokenizer, encode(tokenizer, "hello"), output, [])
    assert "".join(pieces) + tail == tokenizer.decode(output, skip_special_tokens=True)


def test_a_character_spread_over_tokens_comes_whole(tokenizer):
    smile = [tokenizer._backend.token_to_id(c) for c in "ðŁĻĤ"]  # the bytes F0 9F 99 82
    detokenizer = Detokenizer(tokenizer, encode(tokenizer, "hi"))
    assert [detokenizer.push([token]) for token in smile] == ["", "", "", "🙂"]
    assert detokenizer.flush() == ""


def test_an_unfinished_character_is_flushed(tokenizer):
    detokenizer = Detokenizer(tokenizer, encode(tokenizer, "hi"))
    assert detokenizer.push([tokenizer._backend.token_to_id("ð")]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_endless_invalid_bytes_are_not_held_for_ever(tokenizer):
    detokenizer = Detokenizer(tokenizer, encode(tokenizer, "hi"))
    lone = tokenizer._backend.token_to_id("Ģ")  # 0x80, a continuation byte
    text = detokenizer.push([lone] * 1000)
    assert len(text) > 900
    assert len(detokenizer._held) < 100
    assert text + detokenizer.flush() == "\ufffd" * 1000


def test_the_first_word_keeps_its_space_after_a_prompt(tokenizers):
    tokenizer = tokenizers["metaspace"]
    world = tokenizer._backend.token_to_id("▁world")
    assert Detokenizer(tokenizer, encode(tokenizer, "hello")).push([world]) == " world"
    # After special tokens alone it is the first word of all, as in decoding at once.
    assert Detokenizer(tokenizer, [1]).push([world]) == "world"
    assert Detokenizer(tokenizer, [*encode(tokenizer, "hello"), *[1] * 50]).push([world]) == " world"


def test_a_long_run_of_byte_tokens_gives_clean_context(tokenizers):
    tokenizer = tokenizers["metaspace"]
    ids = encode(tokenizer, "好" * 22)
    assert len(ids) == 1 + 3 * 22  # ▁, then three byte tokens each
    pieces, tail = chunked(tokenizer, ids[:-3], ids[-3:], [1, 1])
    assert (pieces, tail) == (["", "", "好"], "")
    pieces, tail = chunked(tokenizer, ids[:-2], ids[-2:], [1])  # the prompt ends inside the character
    assert (pieces, tail) == (["", "好"], "")


def test_special_tokens_show_only_on_demand(tokenizer):
    prompt, output = encode(tokenizer, "hi"), [2, *encode(tokenizer, " fox"), 1]
    assert "".join(chunked(tokenizer, prompt, output, [], skip=True)[0]) == " fox"
    assert "".join(chunked(tokenizer, prompt, output, [], skip=False)[0]) == "<|eot|> fox<|eos|>"


def test_what_the_prompt_leaves_unfinished_is_not_output(tokenizer):
    cut = encode(tokenizer, "\U0001f642")[:1]
    assert tokenizer.decode(cut, skip_special_tokens=True) == "\ufffd"
    detokenizer = Detokenizer(tokenizer, cut)
    assert detokenizer.push([next(iter(tokenizer.special_ids))]) + detokenizer.flush() == ""


@pytest.mark.parametrize("before", ["", "hello "])
@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_prompt_that_ends_inside_a_character(tokenizers, kind, before, cut):
    tokenizer = tokenizers[kind]
    if kind == "bytes":
        smile = [tokenizer._backend.token_to_id(c) for c in "ðŁĻĤ"]
    else:
        smile = [tokenizer._backend.token_to_id(f"<0x{byte:02X}>") for byte in "🙂".encode()]
    prompt = [*(encode(tokenizer, before) if before else []), *smile[:cut]]
    a = tokenizer._backend.token_to_id("a")

    def text(output):
        return "".join(chunked(tokenizer, prompt, output, [])[0]) + chunked(tokenizer, prompt, output, [])[1]

    assert text([a] * 4) == "aaaa"
    assert text([*smile[cut:], a]) == "🙂a"
    assert text([*smile, a]) == "🙂a"
    assert text([a, *smile[:1], a]) == "a\ufffda"
    assert text(smile[:1]) == "\ufffd"
    assert text([]) == ""


def test_bytes_that_take_back_what_was_shown(tokenizers):
    """Behind "你" in byte tokens a stray byte makes the decoder call all four bytes invalid."""
    tokenizer = tokenizers["metaspace"]
    ids = [tokenizer._backend.token_to_id(f"<0x{byte:02X}>") for byte in "你".encode() + b"\xe5"]
    world = tokenizer._backend.token_to_id("▁world")
    pieces, tail = chunked(tokenizer, encode(tokenizer, "hello"), [*ids, world, world], [1] * 5)
    assert (pieces, tail) == (["", "", "你", "", "\ufffd world", " world"], "")


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_words_keep_their_space_behind_broken_text(tokenizers, kind):
    tokenizer = tokenizers[kind]
    lone = tokenizer._backend.token_to_id("Ģ" if kind == "bytes" else "<0x80>")
    word = encode(tokenizer, "hello world" if kind == "bytes" else " world")
    world = word[-1:] if kind == "metaspace" else encode(tokenizer, " world")
    for prompt in ([lone] * 20, [*encode(tokenizer, "hello"), *[lone] * 20]):
        pieces, tail = chunked(tokenizer, prompt, [lone] * 40 + world, [])
        assert "".join(pieces) + tail == "\ufffd" * 40 + " world"

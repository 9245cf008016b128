from __future__ import annotations

import asyncio
import json
import time
import unicodedata

import pytest
import tokenizers as library
from tokenizers import pre_tokenizers

from preft.core.errors import ConfigError
from preft.gateway.text import tokenizer as module
from preft.gateway.text.tokenizer import Tokenizer
from support import small_tokenizers


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


async def test_special_tokens_are_added_on_demand(tokenizer):
    [with_bos], [bare] = (
        await tokenizer.encode(["hello"], add_special_tokens=True),
        await tokenizer.encode(["hello"], add_special_tokens=False),
    )
    assert with_bos == (0, *bare)


async def test_long_texts_give_the_same_ids_without_blocking_the_loop(tokenizer):
    text = "the quick brown fox 你好 " * 20_000
    assert len(text) > module.INLINE_CHARS
    lags = []

    async def watch():
        while True:
            start = time.perf_counter()
            await asyncio.sleep(0.005)
            lags.append(time.perf_counter() - start - 0.005)

    watcher = asyncio.create_task(watch())
    start = time.perf_counter()
    [ids] = await tokenizer.encode([text], add_special_tokens=True)
    took = time.perf_counter() - start
    watcher.cancel()
    assert len(lags) > took / 0.005 / 10  # the loop kept running
    assert ids == tuple(tokenizer._backend.encode(text).ids)


async def test_huge_texts_are_tokenized_one_at_a_time(tmp_path, monkeypatch):
    tokenizer = Tokenizer.load(small_tokenizers.byte_level(tmp_path))
    text = "the quick brown fox " * (module.HUGE_CHARS // 20 + 1)
    running, most = [], []
    encode = tokenizer._encode_batch

    def watched(*arguments):
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        try:
            return encode(["fox"], *arguments[1:])
        finally:
            running.pop()

    monkeypatch.setattr(tokenizer, "_encode_batch", watched)
    tasks = [asyncio.create_task(tokenizer.encode([text], add_special_tokens=False)) for _ in range(4)]
    await asyncio.sleep(0.02)
    tasks[0].cancel()  # while its thread runs
    tasks[2].cancel()  # while it waits
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(result, asyncio.CancelledError) for result in done] == [True, False, True, False]
    assert most == [1, 1, 1]


async def test_no_text_has_fewer_tokens_than_its_length_allows(tmp_path, tokenizers):
    """Also where it shrinks before it is tokenized: four characters become one here."""
    composed = "\u1faf" * 8
    raw = library.Tokenizer(library.models.BPE({composed[: 1 << i]: i for i in range(4)}, _doubled("\u1faf", 3)))
    raw.normalizer = library.normalizers.NFC()
    raw.save(str(tmp_path / "tokenizer.json"))
    greek = Tokenizer.load(tmp_path)
    decomposed = unicodedata.normalize("NFD", composed) * 100
    [ids] = await greek.encode([decomposed], add_special_tokens=False)
    assert len(decomposed) == len(ids) * greek.chars_per_token
    for kind in ("bytes", "metaspace"):
        for text in ("the quick brown fox", " " * 500, "\0\u0301\u200b", "<|eos|></s>", "你好🙂", "hello" * 99):
            [ids] = await tokenizers[kind].encode([text], add_special_tokens=False)
            assert len(text) <= len(ids) * tokenizers[kind].chars_per_token


def _doubled(char, times):
    return [(char * (1 << i), char * (1 << i)) for i in range(times)]


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    folder = small_tokenizers.byte_level(tmp_path)
    raw = library.Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.enable_truncation(4)
    raw.enable_padding(length=4)
    raw.save(str(folder / "tokenizer.json"))
    loaded = Tokenizer.load(folder)
    [long, short] = asyncio.run(loaded.encode(["hello world again", "a"], add_special_tokens=False))
    assert len(long) > 4
    assert len(short) == 1


def test_end_tokens_are_the_union_of_all_files(tmp_path):
    folder = small_tokenizers.byte_level(tmp_path)
    assert Tokenizer.load(folder).eos_token_ids == (1, 2)
    edit(folder / "config.json", eos_token_id=3)
    assert Tokenizer.load(folder).eos_token_ids == (1, 2, 3)
    edit(folder / "generation_config.json", eos_token_id=None)
    edit(folder / "config.json", eos_token_id=None, text_config={"eos_token_id": 5})
    assert Tokenizer.load(folder).eos_token_ids == (1, 5)


def test_vocabulary_is_the_models(tmp_path):
    folder = small_tokenizers.byte_level(tmp_path)
    edit(folder / "config.json", vocab_size=512)
    assert Tokenizer.load(folder).vocab_size == 512
    (folder / "config.json").unlink()
    assert Tokenizer.load(folder).vocab_size == len(
        json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    )


def test_sampling_defaults_are_the_models(tmp_path):
    folder = small_tokenizers.byte_level(tmp_path)
    assert Tokenizer.load(folder).defaults == {}
    edit(folder / "generation_config.json", temperature=0.6, top_p=0.9, top_k=20, max_new_tokens=7, do_sample=True)
    expected = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_tokens": 7}
    assert Tokenizer.load(folder).defaults == expected
    edit(folder / "generation_config.json", temperature="hot")
    with pytest.raises(ConfigError, match="temperature"):
        Tokenizer.load(folder)


def test_a_special_token_by_name_alone_is_not_shown(tokenizers):
    words = tokenizers["words"]
    assert words.special_ids == {1}
    assert words.eos_token_ids == (1,)


async def test_a_token_beyond_the_models_vocabulary_stays_text(tmp_path):
    folder = small_tokenizers.byte_level(tmp_path)
    [size] = {Tokenizer.load(folder).vocab_size}
    edit(folder / "tokenizer_config.json", pad_token="<pad>", extra_special_tokens=["<more>"])
    assert "<pad>" in Tokenizer.load(folder).decode(
        (await Tokenizer.load(folder).encode(["a<pad>"], add_special_tokens=False))[0], skip_special_tokens=True
    )
    edit(folder / "config.json", vocab_size=size + 1)
    [ids] = await Tokenizer.load(folder).encode(["<pad><more>"], add_special_tokens=False)
    assert ids[0] == size
    assert max(ids) == size


async def test_special_tokens_in_texts_can_be_split(tmp_path):
    folder = small_tokenizers.byte_level(tmp_path)
    [whole] = await Tokenizer.load(folder).encode(["<|eot|>"], add_special_tokens=False)
    assert whole == (2,)
    edit(folder / "tokenizer_config.json", split_special_tokens=True)
    [pieces] = await Tokenizer.load(folder).encode(["<|eot|>"], add_special_tokens=False)
    assert len(pieces) > 1


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token": {"text": "x"}},
        {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"added_tokens_decoder": {"5": 5}},
        {"added_tokens_decoder": [1]},
        {"extra_special_tokens": [5]},
        {"extra_special_tokens": 5},
        {"chat_template": 5},
        {"chat_template": [{"name": "default", "template": 5}]},
    ],
)
def test_malformed_tokens_and_templates_are_named(tmp_path, config):
    folder = small_tokenizers.byte_level(tmp_path)
    edit(folder / "tokenizer_config.json", **config)
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        Tokenizer.load(folder)


@pytest.mark.parametrize("broken", ["tokenizer.json", "config.json", "tokenizer_config.json", "generation_config.json"])
def test_a_malformed_file_is_named(tmp_path, broken):
    folder = small_tokenizers.byte_level(tmp_path)
    (folder / broken).write_text("{")
    with pytest.raises(ConfigError, match=broken):
        Tokenizer.load(folder)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_tokens_show_as_inside_a_text(tokenizers):
    for kind, raw, text in [("bytes", "Ġfox", " fox"), ("metaspace", "▁world", " world"), ("words", "city", " city")]:
        tokenizer = tokenizers[kind]
        assert tokenizer.token_text(tokenizer._backend.token_to_id(raw)) == text
    assert tokenizers["bytes"].token_text(1) == "<|eos|>"


def test_token_bytes_are_real_even_for_parts_of_characters(tokenizers):
    assert set(module._BYTE_OF_CHAR) == set(pre_tokenizers.ByteLevel.alphabet())
    for kind in ("bytes", "metaspace"):
        tokenizer = tokenizers[kind]
        ids = tokenizer._backend.encode("x好🙂", add_special_tokens=False).ids
        assert b"".join(tokenizer.token_bytes(id) for id in ids).decode().lstrip(" ") == "x好🙂"

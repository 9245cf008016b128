"""Small tokenizer folders with the structure of public model families, for comparisons with transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXT = [
    "the quick brown fox jumps over the lazy dog, doesn't it? it's 12345 times.",
    "Hello world! How are you?\n\nI'm fine: naïve café über 你好 🙂 привет",
    "system user assistant tool <|im_start|> Be brief. The weather in Bonn is sunny",
] * 20
TURNS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def gpt2(folder: Path) -> Path:
    """Byte-level BPE whose tokenizer.json has one special token; only older files have the others."""
    tokenizer = _byte_level(["<|endoftext|>"])
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 601, "<think>": 600, "<|im_start|>": 602}))
    specials = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(specials))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<|im_start|>"]}
    return _write(folder, tokenizer, config)


def llama3(folder: Path) -> Path:
    """Byte-level BPE with a BOS rule in its post-processor, and tokens that strip the space around them."""
    tokenizer = _byte_level(["<s>", "</s>", *TURNS])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]),
        ]
    )
    config = {"bos_token": "<s>", "eos_token": "</s>", "clean_up_tokenization_spaces": True}
    listed = {
        str(tokenizer.token_to_id("<|eot_id|>")): _token("<|eot_id|>", rstrip=True),
        "700": _token("<tool_call>", special=False, lstrip=True, normalized=True),
        "701": _token("<image>"),
    }
    return _write(folder, tokenizer, {**config, "added_tokens_decoder": listed})


def qwen2(folder: Path) -> Path:
    """Byte-level BPE with NFC and Qwen's split; transformers rebuilds it from vocabulary and merges."""
    tokenizer = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.normalizer = normalizers.NFC()
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    listed = {
        str(tokenizer.token_to_id(text)): _token(text) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    }
    return _write(folder, tokenizer, {**config, "bos_token": None, "added_tokens_decoder": listed})


def llama2(folder: Path, **more: Any) -> Path:
    """SentencePiece BPE: a space before the text, ▁ for spaces, bytes for characters without a token, a BOS rule."""
    tokenizer = _sentencepiece_bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokens = {"bos_token": _token("<s>"), "eos_token": _token("</s>"), "unk_token": "<unk>", "pad_token": None}
    return _write(folder, tokenizer, {**tokens, "tokenizer_class": "LlamaTokenizerFast", **more}, model_type="llama")


def llama2_legacy(folder: Path) -> Path:
    """As `llama2` with a space behind each special token."""
    return llama2(folder, legacy=True)


def llama2_without_prefix(folder: Path) -> Path:
    """As `llama2` without the space before the text."""
    return llama2(folder, add_prefix_space=False)


def sentencepiece_file(folder: Path) -> Path:
    """As `llama2`, for a class that uses tokenizer.json unchanged."""
    return llama2(folder, tokenizer_class="PreTrainedTokenizerFast")


def mistral(folder: Path) -> Path:
    """Llama 2's newer form: the pre-tokenizer puts a ▁, but only before the first piece."""
    tokenizer = _sentencepiece_bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _write(folder, tokenizer, {**tokens, "tokenizer_class": "LlamaTokenizer", "legacy": False})


def gemma(folder: Path) -> Path:
    """SentencePiece BPE without the space before the text."""
    tokenizer = _sentencepiece_bpe()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    extra = {"image_token": "<image>", "extra_special_tokens": {"boi_token": "<start_of_image>"}}
    return _write(folder, tokenizer, {"bos_token": "<s>", "eos_token": "</s>", **extra})


def unigram(folder: Path) -> Path:
    """SentencePiece Unigram: NFKC, ▁ before every word, an EOS rule."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    specials = ["<pad>", "</s>", "<unk>", "<s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=specials, unk_token="<unk>", show_progress=False, shrinking_factor=0.5
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return _write(folder, tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def wordpiece(folder: Path) -> Path:
    """WordPiece in lower case, as in BERT: spaces join words, and the decoder drops spaces before punctuation."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return _write(folder, tokenizer, {"cls_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "[UNK]"})


_LLAMA2 = (llama2, llama2_legacy, llama2_without_prefix, sentencepiece_file)
_ALL = (gpt2, llama3, qwen2, *_LLAMA2, mistral, gemma, unigram, wordpiece)
FAMILIES: dict[str, Callable[[Path], Path]] = {family.__name__: family for family in _ALL}


def _token(content: str, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"__type": "AddedToken", "content": content, **plain, **flags}


def _byte_level(specials: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def _sentencepiece_bpe() -> Tokenizer:
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])}
    for char in "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?:'你<|>[]/_":
        vocab.setdefault(char, len(vocab))
    merges: list[tuple[str, str]] = []
    for word in ("▁hello", "▁world", "▁the", "▁▁", "ing", "▁you", "user", "assistant", "▁is"):
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def _write(folder: Path, tokenizer: Tokenizer, config: dict[str, Any], **model: str) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 1024, **model}))
    return folder

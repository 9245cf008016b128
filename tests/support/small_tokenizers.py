"""Small tokenizer folders of three kinds that decode differently: byte-level BPE, SentencePiece-like, word-level."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' and m.content == 'refuse me' %}{{ raise_exception('refused') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content | trim }}{% if not loop.last or add_generation_prompt %}<|eot|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOLS_TEMPLATE = (
    "{{ bos_token }}{{ (tools or []) | tojson }}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.tool_call_id }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.id }}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TEXT = ["the quick brown fox jumps over the lazy dog", "hello world, how are you?", "naïve café über 你好 🙂 привет"]
_WORDS = ("▁hello", "▁world", "hello", "▁the", "▁▁", "ing", "▁a", "你")


def byte_level(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE, vocab_size: int = 400) -> Path:
    """BPE over bytes, as GPT-2, Llama 3 and Qwen. `<|bos|>` is put before a text; ids 0..3 are special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|bos|>", "<|eos|>", "<|eot|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=specials,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    eos = {"__type": "AddedToken", "content": "<|eos|>", "special": True}
    config: dict[str, object] = {"bos_token": "<|bos|>", "eos_token": eos}
    if chat_template is not None:
        config["chat_template"] = chat_template
    return _write(folder, tokenizer, config, {"eos_token_id": [1, 2]})


def metaspace(folder: Path) -> Path:
    """SentencePiece's way, as in Llama 2 and Mistral: words start with a ▁, and the decoder drops a text's first one.

    Byte tokens spell characters without a token; `<0x00>` has id 3.
    """
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])}
    merges: list[tuple[str, str]] = []
    for char in "▁abcdefghijklmnopqrstuvwxyz.,!?你":
        vocab.setdefault(char, len(vocab))
    for word in _WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return _write(folder, tokenizer, {"bos_token": "<s>", "eos_token": "</s>"}, {})


def word_level(folder: Path) -> Path:
    """Whole words, joined by spaces when decoded. `<eos>` is special by name only, not in tokenizer.json."""
    words = ["<unk>", "<eos>", "your", "favourite", "city", "is", "lisbon", ".", "?"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _write(folder, tokenizer, {"eos_token": "<eos>"}, {})


def _write(folder: Path, tokenizer: Tokenizer, config: dict[str, object], generation: dict[str, object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "config.json").write_text(json.dumps({"vocab_size": tokenizer.get_vocab_size()}))
    return folder

"""Text to token ids and back for one model folder, and the facts about its vocabulary that requests need.

Owns the `tokenizers` object. `detokenizer` decodes incrementally, and `chat_prompt` renders chats.
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from preft.core.errors import ConfigError
from preft.gateway.text.added_tokens import add_tokens
from preft.gateway.text.chat_prompt import ChatPrompt
from preft.gateway.text.llama_form import apply_llama_form
from preft.gateway.text.model_folder import ModelFolder, read_model_folder

# About 5 ms of tokenizing. A thread tokenizes longer texts, so that streams keep flowing.
INLINE_CHARS = 8_192
HUGE_CHARS = 1 << 20  # 100 MB and half a second: longer texts are tokenized one at a time
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """One model's tokenizer. `vocab_size` bounds a prompt's ids; visible text leaves out `special_ids`.

    `eos_token_ids` is the sorted union of generation_config.json, config.json and the tokenizer. A text with more than
    `chars_per_token` characters per allowed token is refused untokenized. The bound is four times the longest token:
    NFC composes up to four characters into one. Only text that is almost all dropped spaces, or long runs that become
    one unknown token, could have fewer tokens.
    """

    def __init__(self, backend: tokenizers.Tokenizer, folder: ModelFolder) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        apply_llama_form(backend, folder.tokenizer_config, folder.model_type)
        backend.encode_special_tokens = folder.tokenizer_config.get("split_special_tokens") is True
        add_tokens(backend, folder.tokens, folder.vocab_size)
        added = backend.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(id for id, token in added.items() if token.special)
        self.vocab_size: int = folder.vocab_size or backend.get_vocab_size(with_added_tokens=True)
        self.defaults: Mapping[str, Any] = folder.defaults
        special = folder.tokens.special
        self.chat_prompt: ChatPrompt | None = (
            ChatPrompt(folder.chat_templates, special) if folder.chat_templates else None
        )
        eos = backend.token_to_id(special.get("eos_token", ""))
        self.eos_token_ids: tuple[int, ...] = tuple(sorted({*folder.eos_token_ids, *([] if eos is None else [eos])}))
        self.chars_per_token: int = 4 * max(map(len, backend.get_vocab(with_added_tokens=True)), default=1)
        self.anchor: list[int] = self._find_anchor()
        self._texts: dict[int, str] = {}
        self._huge = asyncio.Lock()

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Loads a model folder's tokenizer. Raises ConfigError if tokenizer.json is missing or a file is malformed."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{folder} has no tokenizer.json; save the model's fast tokenizer there")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # `tokenizers` raises nothing more specific
            raise ConfigError(f"{path} is not a valid tokenizer: {error}") from error
        return cls(backend, read_model_folder(folder))

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[tuple[int, ...]]:
        """Token ids of each text. A thread tokenizes long texts without the interpreter lock."""
        chars = sum(map(len, texts))
        if chars <= INLINE_CHARS:
            encode = self._backend.encode
            return [tuple(encode(text, add_special_tokens=add_special_tokens).ids) for text in texts]
        if chars <= HUGE_CHARS:
            return await asyncio.to_thread(self._encode_batch, list(texts), add_special_tokens)
        await self._huge.acquire()
        task = asyncio.create_task(asyncio.to_thread(self._encode_batch, list(texts), add_special_tokens))
        task.add_done_callback(lambda _: self._huge.release())
        return await asyncio.shield(task)  # the thread can't be cancelled, even if the caller leaves

    def _encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[tuple[int, ...]]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [tuple(encoding.ids) for encoding in encodings]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of a whole sequence, as the `tokenizers` library gives it."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def decode_stream(self, context: Sequence[int]) -> Callable[[int], str | None]:
        """Returns a decoder for the tokens behind `context`: per token the text that became final, or None.

        Special tokens are shown. The decoder raises if a token changes text that was returned: only invalid bytes do.
        """
        stream = tokenizers.decoders.DecodeStream(ids=list(context), skip_special_tokens=False)
        return functools.partial(stream.step, self._backend)

    def token_text(self, token_id: int) -> str:
        """One token as it looks inside a text, with its leading space; special tokens included.

        A token that is a part of a character shows as U+FFFD.
        """
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._decode_one(token_id)
        return text

    def vocabulary_entry(self, token_id: int) -> str:
        """The token as the vocabulary spells it, for example with "Ġ" for a space; "" if it has no such token."""
        return self._backend.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """The token's own bytes, also if they are only a part of a UTF-8 character."""
        text = self.token_text(token_id)
        if "\ufffd" not in text:
            return text.encode()
        raw: str = self._backend.id_to_token(token_id) or ""
        if match := _BYTE_TOKEN.fullmatch(raw):
            return bytes.fromhex(match[1])
        if all(char in _BYTE_OF_CHAR for char in raw):
            return bytes(_BYTE_OF_CHAR[char] for char in raw)
        return text.encode()

    def _decode_one(self, token_id: int) -> str:
        before = self.decode(self.anchor, skip_special_tokens=False)
        text = self.decode([*self.anchor, token_id], skip_special_tokens=False)
        if text.startswith(before) and "\ufffd" not in text:
            return text[len(before) :]
        return self.decode([token_id], skip_special_tokens=False)

    def _find_anchor(self) -> list[int]:
        """An ordinary token, if any, to decode other tokens behind: many decoders drop the first token's space."""
        for token_id in range(min(self._backend.get_vocab_size(with_added_tokens=True), 1024)):
            if token_id not in self.special_ids and self.decode([token_id], skip_special_tokens=False).isalnum():
                return [token_id]
        return []


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level BPE: printable Latin-1 for itself, the rest from U+0100 on."""
    table = {chr(byte): byte for byte in range(256) if chr(byte).isprintable() and byte != 0x20}
    hidden = (byte for byte in range(256) if chr(byte) not in table)
    return table | {chr(256 + number): byte for number, byte in enumerate(hidden)}


_BYTE_OF_CHAR = _byte_alphabet()

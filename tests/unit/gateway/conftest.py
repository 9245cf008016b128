"""Tokenizers of each kind, loaded once."""

from __future__ import annotations

import pytest

from preft.gateway.text.tokenizer import Tokenizer
from support import small_tokenizers


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level BPE with a chat template."""
    return Tokenizer.load(small_tokenizers.byte_level(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="session")
def tokenizers(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """One of each kind."""
    return {
        "bytes": tokenizer,
        "metaspace": Tokenizer.load(small_tokenizers.metaspace(tmp_path_factory.mktemp("metaspace"))),
        "words": Tokenizer.load(small_tokenizers.word_level(tmp_path_factory.mktemp("words"))),
    }

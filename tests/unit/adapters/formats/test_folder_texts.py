"""A chat template or tokens of an adapter's own are told of once; those of the base model are not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from preft.adapters.formats.folder_texts import OTHER_TEMPLATE, TEXT_BYTES, text_warnings


def tokenizer(*tokens: str, size: int = 0) -> bytes:
    added = [{"id": number, "content": token} for number, token in enumerate(tokens)]
    return json.dumps({"version": "1.0", "added_tokens": added, "model": {"vocab": "x" * size}}).encode()[:TEXT_BYTES]


def config(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


BASE = {
    "tokenizer.json": tokenizer("<s>", "</s>", size=2 * TEXT_BYTES),
    "tokenizer_config.json": config(chat_template="{{ a }}"),
}


@pytest.mark.parametrize(
    "files",
    [
        {},
        BASE,
        {"chat_template.jinja": b"{{ a }}\n"},
        {"chat_template.json": config(chat_template="{{ a }}")},
        {"tokenizer_config.json": config(chat_template=None, added_tokens_decoder={"1": {"content": "</s>"}})},
        {"added_tokens.json": config(**{"</s>": 1})},
        {"tokenizer_config.json": b"[" * 1000, "added_tokens.json": b"\xff", "tokenizer.json": b'{"added_tokens": [{'},
        {"tokenizer_config.json": config(chat_template=7, added_tokens_decoder=[1]), "tokenizer.json": b""},
    ],
    ids=str,
)
def test_what_the_base_model_has_too(files: dict[str, bytes]) -> None:
    assert text_warnings(files, BASE) == ()


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja": b"{{ b }}"},
        {"chat_template.json": config(chat_template="{{ b }}")},
        {"tokenizer_config.json": config(chat_template="{{ b }}")},
        {"tokenizer_config.json": config(chat_template=[{"name": "default", "template": "{{ b }}"}])},
    ],
    ids=str,
)
def test_a_template_of_its_own(files: dict[str, bytes]) -> None:
    assert text_warnings(files, BASE) == (OTHER_TEMPLATE,)


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens.json": config(**{"</s>": 1, "<tool>": 2})},
        {"tokenizer_config.json": config(added_tokens_decoder={"9": {"content": "<tool>"}})},
        {
            "tokenizer.json": tokenizer("<s>", "</s>", "<tool>", size=2 * TEXT_BYTES),
            "added_tokens.json": b'{"<tool>": 2}',
        },
    ],
    ids=lambda files: next(iter(files)),
)
def test_tokens_of_its_own(files: dict[str, bytes]) -> None:
    [warning] = text_warnings(files, BASE)
    assert "a tokenizer with 1 tokens that the base model's has not, such as '<tool>'" in warning

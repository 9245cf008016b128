"""Chat template and tokenizer files in an adapter's folder. PreFT uses the base model's instead, and warns the user.

The module knows the text files that trainers save beside an adapter, and reads only the beginning of each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

TEMPLATE, TEMPLATE_JSON = "chat_template.jinja", "chat_template.json"
TOKENIZER_CONFIG, TOKENIZER, ADDED_TOKENS = "tokenizer_config.json", "tokenizer.json", "added_tokens.json"
TEXT_FILES = (TEMPLATE, TEMPLATE_JSON, TOKENIZER_CONFIG, TOKENIZER, ADDED_TOKENS)
TEXT_BYTES = 1 << 20  # of each file: tokenizer.json has its added tokens before its vocabulary

OTHER_TEMPLATE = (
    "its folder has a chat template of its own, which is not used: chats are rendered with the base model's"
)


def read_texts(folder: Path) -> dict[str, bytes]:
    """The beginnings of the TEXT_FILES in a local folder. Files that can't be read are left out."""
    texts = {}
    for name in TEXT_FILES:
        with suppress(OSError), open(folder / name, "rb") as file:
            texts[name] = file.read(TEXT_BYTES)
    return texts


def text_warnings(adapter: Mapping[str, bytes], base: Mapping[str, bytes]) -> tuple[str, ...]:
    """Warnings about text files of `adapter` that differ from `base`'s. Both map names to the first TEXT_BYTES."""
    warnings = []
    if not set(_templates(adapter)) <= set(_templates(base)):
        warnings.append(OTHER_TEMPLATE)
    known = set(_added_tokens(base))
    if added := [token for token in dict.fromkeys(_added_tokens(adapter)) if token not in known]:
        warnings.append(
            f"its folder has a tokenizer with {len(added)} tokens that the base model's has not, such as {added[0]!r}: "
            "the base model's tokenizer is used, which splits them"
        )
    return tuple(warnings)


def _templates(files: Mapping[str, bytes]) -> Iterator[str]:
    if TEMPLATE in files:
        yield files[TEMPLATE].decode(errors="replace").strip()
    for name in (TEMPLATE_JSON, TOKENIZER_CONFIG):
        given = _object(files.get(name)).get("chat_template")
        for template in given if isinstance(given, list) else [given]:
            text = template.get("template") if isinstance(template, dict) else template
            if isinstance(text, str):
                yield text.strip()


def _added_tokens(files: Mapping[str, bytes]) -> Iterator[str]:
    yield from _object(files.get(ADDED_TOKENS))
    decoder = _object(files.get(TOKENIZER_CONFIG)).get("added_tokens_decoder")
    listed = _value_of("added_tokens", files.get(TOKENIZER))
    for token in [
        *(decoder.values() if isinstance(decoder, dict) else ()),
        *(listed if isinstance(listed, list) else ()),
    ]:
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            yield token["content"]


def _object(content: bytes | None) -> dict[str, Any]:
    try:
        value = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _value_of(key: str, content: bytes | None) -> Any:
    """The value of the first `key` in the beginning of a JSON file; None if the value is cut off."""
    _, found, rest = (content or b"").decode(errors="replace").partition(f'"{key}":')
    try:
        return json.JSONDecoder().raw_decode(rest.lstrip())[0] if found else None
    except (ValueError, RecursionError):
        return None

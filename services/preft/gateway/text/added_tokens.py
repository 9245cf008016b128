"""The tokens that a model folder names outside of tokenizer.json, added as transformers' AutoTokenizer adds them.

Owns special tokens and added tokens. The `tokenizers` library owns the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer

from preft.core.errors import ConfigError

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class NamedTokens:
    """The named tokens of one folder, in order. `special` maps names such as `eos_token` to texts.

    `listed` tokens override tokenizer.json. `extra` tokens, special tokens included, are added unless the tokenizer has
    them as added tokens already.
    """

    special: Mapping[str, str]
    listed: Sequence[AddedToken]
    extra: Sequence[AddedToken]


def read_tokens(config: Mapping[str, Any], special_map: Mapping[str, Any], added: Mapping[str, Any]) -> NamedTokens:
    """Reads tokenizer_config.json, and the special_tokens_map.json and added_tokens.json of older folders.

    Raises ConfigError for a malformed token.
    """
    decoder = config.get("added_tokens_decoder")
    older, newer = (config, special_map) if decoder is None else (special_map, config)
    merged = {**older, **{name: value for name, value in newer.items() if value is not None}}
    named = {name: value for name, value in merged.items() if name.endswith("_token") and isinstance(value, str | dict)}
    more = merged.get("extra_special_tokens") or merged.get("additional_special_tokens") or []
    if isinstance(more, dict):
        named, more = {**named, **more}, []
    special = {name: _token(value, special=True) for name, value in named.items()}
    try:
        extra = [*special.values(), *(_token(value, special=True) for value in more)]
        if decoder is None:
            texts = {token.content for token in extra}
            listed = [_token(text, special=text in texts) for text in sorted(added, key=lambda text: int(added[text]))]
        else:
            listed = [_token(decoder[id]) for id in sorted(decoder, key=int)]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"tokenizer_config.json: added or extra tokens are malformed: {error}") from error
    return NamedTokens({name: token.content for name, token in special.items()}, listed, extra)


def add_tokens(backend: Tokenizer, tokens: NamedTokens, limit: int | None) -> None:
    """Adds `tokens` to the tokenizer. A token whose id would reach `limit`, the model's vocabulary size, stays text."""
    for token in tokens.listed:
        _add(backend, token, limit)
    for token in tokens.extra:
        if token.content not in {known.content for known in backend.get_added_tokens_decoder().values()}:
            _add(backend, token, limit)


def _add(backend: Tokenizer, token: AddedToken, limit: int | None) -> None:
    if limit is not None and backend.token_to_id(token.content) is None:
        following = max([backend.get_vocab_size(with_added_tokens=False) - 1, *backend.get_added_tokens_decoder()]) + 1
        if following >= limit:
            return
    backend.add_tokens([token])


def _token(value: object, *, special: bool | None = None) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=bool(special), normalized=not special)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise ConfigError("tokenizer_config.json: a token must be a string or an object with content")
    flags = {name: value[name] for name in _FLAGS if isinstance(value.get(name), bool)}
    return AddedToken(value["content"], **flags | ({} if special is None else {"special": special}))

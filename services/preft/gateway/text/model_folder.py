"""Reads a model folder for the gateway: vocabulary size, end tokens, sampling defaults.

Owns the JSON files around the tokenizer, not the tokenizer itself. Never reads weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preft.core.errors import ConfigError
from preft.gateway.text.added_tokens import NamedTokens, read_tokens

_NAMED_TEMPLATES = "additional_chat_templates"


# vLLM takes these from generation_config.json for requests that leave them out: name there -> type and our name.
_DEFAULTS: Mapping[str, tuple[type[int] | type[float], str]] = {
    "temperature": (float, "temperature"),
    "top_p": (float, "top_p"),
    "top_k": (int, "top_k"),
    "min_p": (float, "min_p"),
    "repetition_penalty": (float, "repetition_penalty"),
    "max_new_tokens": (int, "max_tokens"),
}


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """The parsed files. `vocab_size` is the number of rows in the model's embedding, None if config.json lacks it.

    `defaults` are sampling parameters for requests that leave them out. `chat_templates` are Jinja sources by name. One
    is named `default`, unless the mapping is empty.
    """

    tokens: NamedTokens
    tokenizer_config: Mapping[str, Any]
    model_type: str | None
    vocab_size: int | None
    eos_token_ids: frozenset[int]
    defaults: Mapping[str, Any]
    chat_templates: Mapping[str, str]


def read_model_folder(folder: Path) -> ModelFolder:
    """Reads config, generation_config, tokenizer_config, special_tokens_map, added_tokens, chat_template (.json),
    chat_template.jinja and additional_chat_templates.

    Every file is optional. Raises ConfigError for a malformed file.
    """
    config = _read_json(folder / "config.json")
    text_config = {**config, **config.get("text_config", {})} if isinstance(config.get("text_config"), dict) else config
    generation = _read_json(folder / "generation_config.json")
    tokenizer_config = _read_json(folder / "tokenizer_config.json")
    tokens = read_tokens(
        tokenizer_config, _read_json(folder / "special_tokens_map.json"), _read_json(folder / "added_tokens.json")
    )
    vocab_size = text_config.get("vocab_size")
    return ModelFolder(
        tokens=tokens,
        tokenizer_config=tokenizer_config,
        model_type=config.get("model_type"),
        vocab_size=vocab_size if isinstance(vocab_size, int) else None,
        eos_token_ids=frozenset(
            {
                *_ids(generation.get("eos_token_id"), "generation_config"),
                *_ids(text_config.get("eos_token_id"), "config"),
            }
        ),
        defaults=_sampling_defaults(generation),
        chat_templates=_chat_templates(folder, tokenizer_config),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't read {path}: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return loaded


def _ids(value: object, source: str) -> Iterable[int]:
    if value is None:
        return ()
    ids: list[Any] = value if isinstance(value, list) else [value]
    if not all(type(item) is int for item in ids):
        raise ConfigError(f"{source}.json: eos_token_id must be a token id or a list of them")
    return ids


def _sampling_defaults(generation: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, (kind, field) in _DEFAULTS.items():
        value = generation.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"generation_config.json: {name} must be a number")
        values[field] = kind(value)
    return values


def _chat_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name; empty without one named `default`. As in transformers, files win over tokenizer_config.json.

    chat_template.json is the file of multimodal processors.
    """
    template = tokenizer_config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        template = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
    named = {"default": template} if isinstance(template, str) else template or {}
    if not isinstance(named, dict) or not all(isinstance(item, str) for pair in named.items() for item in pair):
        raise ConfigError("tokenizer_config.json: chat_template must be a string or a list of named templates")
    files = {path.stem: path for path in (folder / _NAMED_TEMPLATES).glob("*.jinja")}
    default = folder / "chat_template.jinja"
    if default.is_file():
        files["default"] = default
    templates = {**named, **{name: _read_text(path) for name, path in files.items()}}
    return templates if "default" in templates else {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't read {path}: {error}") from error

"""Facts about the base model's folder that the whole cluster must agree on, read without loading weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

from preft.adapters.formats.tensor_file import BrokenTensorFile, TensorEntry, read_entries
from preft.core.errors import ConfigError
from preft.core.settings import Settings

SAMPLES = 8  # of each tensor
SAMPLE_BYTES = 1 << 12


def model_identity(folder: Path) -> str:
    """Hex digest that identifies a base model: over config.json, each weight file's header, and samples of each tensor.

    Reading all weights would take minutes for large models. Raises ConfigError for missing or broken weights.
    """
    digest = hashlib.sha256(_config_bytes(folder))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"model: {folder} holds no .safetensors file")
    for path in files:
        digest.update(path.name.encode())
        try:
            entries = read_entries(path)
            with path.open("rb") as file:
                for name, entry in sorted(entries.items()):
                    digest.update(f"{name}:{entry.dtype}:{entry.shape}".encode())
                    _update_with_samples(digest, file, entry)
        except BrokenTensorFile as error:
            raise ConfigError(f"model: {path}: {error}") from error
    return digest.hexdigest()


def _update_with_samples(digest: Any, file: BinaryIO, entry: TensorEntry) -> None:
    """Samples evenly, first and last bytes included: training or merging changes nearly all bytes of a tensor."""
    reach = max(0, entry.end - entry.start - SAMPLE_BYTES)
    for place in sorted({reach * number // (SAMPLES - 1) for number in range(SAMPLES)}):
        file.seek(entry.start + place)
        digest.update(file.read(min(SAMPLE_BYTES, entry.end - entry.start)))


def with_model_length(settings: Settings) -> Settings:
    """`settings` with `max_model_len` (tokens, prompt and output together) from config.json unless it was set.

    Every engine and the gateway then use the same limit. Raises ConfigError if the model can't handle that length.
    """
    try:
        own = _own_length(read_model_config(settings.model))
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ConfigError(f"model: {settings.model}/config.json has a value of a wrong kind: {error}") from error
    if settings.max_model_len is not None:
        if own is not None and settings.max_model_len > own:
            raise ConfigError(f"max_model_len: {settings.max_model_len} is more than the model's {own} positions")
        return settings
    if own is None:
        raise ConfigError(f"max_model_len: {settings.model}/config.json doesn't say it; set it")
    return settings.model_copy(update={"max_model_len": own})


def read_model_config(folder: Path) -> dict[str, Any]:
    """The language model's part of config.json. Raises ConfigError if it can't be read."""
    config = json.loads(_config_bytes(folder))
    return {**config, **(config.get("text_config") or {})}


def _own_length(config: dict[str, Any]) -> int | None:
    """The model's own length in tokens; None if its configuration has none."""
    own = config.get("max_position_embeddings")
    if not isinstance(own, int) or own < 1:
        return None
    if "gemma3" in config.get("model_type", ""):  # Gemma 3's figure is already scaled
        return own
    return int(own * _stretch(config.get("rope_parameters") or config.get("rope_scaling") or {}))


def _stretch(rope: dict[str, Any]) -> float:
    """The factor by which RoPE scaling extends `max_position_embeddings`. Other kinds are already in that figure."""
    kind = rope.get("rope_type", rope.get("type"))
    return float(rope.get("factor") or 1) if kind in ("linear", "dynamic") else 1.0


def _config_bytes(folder: Path) -> bytes:
    try:
        content = (folder / "config.json").read_bytes()
        if not isinstance(json.loads(content), dict):
            raise ConfigError(f"model: {folder}/config.json is not a JSON object")
    except OSError as error:
        raise ConfigError(
            f"model: {folder} is not a model folder: config.json: {error.strerror}; name a folder that holds "
            "config.json, weights and tokenizer.json (a model from a hub must be downloaded first)"
        ) from error
    except ValueError as error:
        raise ConfigError(f"model: {folder}/config.json is not JSON") from error
    return content

"""Llama's tokenizer.json files in the form in which transformers 5 uses them.

These files put a ▁ before every piece of text, also behind a special token. The class `LlamaTokenizer` of transformers
follows the folder's `legacy` instead, which most folders set to false: a ▁ comes before the beginning of a text alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers

_OLD_NORMALIZERS = [
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
]


def apply_llama_form(backend: Tokenizer, tokenizer_config: Mapping[str, Any], model_type: str | None) -> None:
    """Changes nothing but tokenizers of that class whose files have the old form, and that have a Llama model."""
    is_llama = tokenizer_config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
    if not is_llama or model_type not in (None, "llama") or backend.normalizer is None:
        return
    if json.loads(backend.to_str())["normalizer"].get("normalizers") != _OLD_NORMALIZERS:
        return
    first = "always" if tokenizer_config.get("legacy") else "first"
    adds_space = tokenizer_config.get("add_prefix_space") in (None, True)
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", first if adds_space else "never", split=False)
    if not adds_space:
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])

"""Converts Llama's tokenizer.json files to the form that transformers 5 uses.

These files put a ▁ before every piece of text, also behind a special token. transformers' class `LlamaTokenizer`
follows the folder's `legacy` instead. Most folders set it to false: then only the beginning of a text gets a ▁.
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
    """Changes only a LlamaTokenizer whose file has the old form and whose model is a Llama."""
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

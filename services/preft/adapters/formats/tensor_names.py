"""Reads the names of tensors in PEFT weights files. The gateway's check and the engine share this one rule.

Training wrappers write the same module under many names: `base_model.model.model.layers.0.mlp.up_proj`, the same with
the prefix twice or not at all, with `_orig_mod` (torch.compile), `_fsdp_wrapped_module` (FSDP) or `module` (DDP) in
it, or inside a multimodal model (`language_model`). Each of these names has one meaning here; no other name has one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

HEAD = "lm_head"
EMBEDDING = "model.embed_tokens"

WRAPPER = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
OUTER = re.compile(r"(?:base_model\.model\.|module\.)*")
INNER = r"(?P<inner>(?:(?:base_model|language_model|model)\.)*)"
LORA = re.compile(
    INNER + r"(?P<tail>layers\.(?:0|[1-9]\d*)\.\w+(?:\.\w+)*|lm_head)"
    r"\.lora_(?P<side>[AB])(?:\.(?P<adapter>[\w-]+))?\.weight"
)
BASE_WEIGHT = re.compile(INNER + r"(?P<tail>lm_head|embed_tokens)(?:\.base_layer)?\.weight")


@dataclass(frozen=True, slots=True)
class LoraTensor:
    """One side ("A" or "B") of a module's LoRA.

    `module` is the module's name in the base model, `spelling` its name in the model of the training, and `adapter` the
    adapter's name during the training ("" if the file has none).
    """

    module: str
    side: str
    spelling: str
    adapter: str


def read_lora_name(name: str) -> LoraTensor | None:
    """The LoRA tensor of this name; None for a name that isn't understood."""
    spelling = _unwrapped(name)
    match = LORA.fullmatch(spelling)
    if match is None:
        return None
    tail = match["tail"]
    module = tail if tail == HEAD else f"model.{tail}"
    return LoraTensor(module, match["side"], match["inner"] + tail, match["adapter"] or "")


def read_base_name(name: str) -> str | None:
    """HEAD or EMBEDDING if `name` is that of a copy of this base model weight, else None.

    PEFT saves both beside a LoRA on the output layer, and after the vocabulary was resized.
    """
    match = BASE_WEIGHT.fullmatch(_unwrapped(name))
    if match is None:
        return None
    return HEAD if match["tail"] == HEAD else EMBEDDING


def _unwrapped(name: str) -> str:
    name = WRAPPER.sub("", name)
    outer = OUTER.match(name)
    return name[outer.end() :] if outer else name

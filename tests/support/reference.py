"""The reference of every parity test: prefill-only generation by transformers and peft in float32.

The prompt pass runs base + adapter; every later position runs the bare base over the same KV cache. Owns greedy
sampling alone: tests of penalties, biases or logprobs start from `logits`.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache


class Reference:
    """One base model in float32, with LoRA or ReFT folders on request.

    A call names an adapter by its folder. The content is the identity: a rewritten folder is read again.
    """

    def __init__(self, model_dir: Path | str) -> None:
        torch.set_num_threads(1)  # beside busy engines, a pass on two threads takes ten times as long
        self._base = AutoModelForCausalLM.from_pretrained(
            str(model_dir), dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._with_lora: dict[str, Any] = {}  # by content; they share the base's weights

    def greedy(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        adapter: Path | str | None = None,
        ignore_eos: bool = True,
        eos: Collection[int] = (),
        adapter_everywhere: bool = False,
    ) -> list[int]:
        """Greedy output ids, at most `max_tokens`. An `eos` id ends the output (and is included) unless `ignore_eos`.

        `adapter_everywhere` keeps the adapter on after the prompt, as an ordinary multi-LoRA server does.
        """
        stops = frozenset() if ignore_eos else frozenset(eos)
        output: list[int] = []
        with torch.inference_mode():
            logits, cache = self._prompt_pass(prompt_ids, adapter)
            with self._adapted(adapter if adapter_everywhere else None) as model:
                while True:
                    output.append(int(logits[-1].argmax()))
                    if len(output) == max_tokens or output[-1] in stops:
                        return output
                    logits = _pass(model, [output[-1]], cache, keep=1)

    def logits(
        self, prompt_ids: Sequence[int], output_ids: Sequence[int], adapter: Path | str | None = None
    ) -> torch.Tensor:
        """The raw logits behind each token of `output_ids`, float32 [len(output_ids), vocab_size].

        Row 0 comes from the adapted prompt pass, all other rows from the bare base with the earlier `output_ids`.
        """
        with torch.inference_mode():
            first, cache = self._prompt_pass(prompt_ids, adapter)
            if len(output_ids) == 1:
                return first
            return torch.cat([first, _pass(self._base, output_ids[:-1], cache, keep=0)])

    def prompt_logits(self, prompt_ids: Sequence[int], adapter: Path | str | None = None) -> torch.Tensor:
        """The raw logits behind each prompt token, float32 [len(prompt_ids), vocab_size]."""
        with torch.inference_mode(), self._adapted(adapter) as model:
            return _pass(model, prompt_ids, DynamicCache(), keep=0)

    def _prompt_pass(self, prompt_ids: Sequence[int], adapter: Path | str | None) -> tuple[torch.Tensor, Any]:
        cache = DynamicCache()
        with self._adapted(adapter) as model:
            return _pass(model, prompt_ids, cache, keep=1), cache

    @contextmanager
    def _adapted(self, adapter: Path | str | None) -> Iterator[Any]:
        """The base model, whose linear layers and residual stream use `adapter`, if any."""
        folder = Path(adapter) if adapter is not None else None
        model = self._base
        if folder is not None and (folder / "adapter_config.json").exists():
            model = self._lora(folder)
        hooks = []
        if folder is not None and (folder / "reft_config.json").exists():
            hooks = _reft_hooks(model, folder)
        try:
            yield model
        finally:
            for hook in hooks:
                hook.remove()

    def _lora(self, folder: Path) -> Any:
        name = _content_name(folder)
        if name not in self._with_lora:  # switching the adapters of one PeftModel would take longer than a pass
            base = copy.deepcopy(self._base, {id(weight): weight for weight in self._base.parameters()})
            self._with_lora[name] = PeftModel.from_pretrained(base, str(folder)).get_base_model()
        return self._with_lora[name]


def _pass(model: Any, ids: Sequence[int], cache: Any, keep: int) -> torch.Tensor:
    """Logits of the last `keep` positions (0: all), [positions, vocab_size]; `ids` are appended to `cache`."""
    out = model(input_ids=torch.tensor([list(ids)]), past_key_values=cache, logits_to_keep=keep)
    return out.logits[0].clone()


def _reft_hooks(model: Any, folder: Path) -> list[Any]:
    """LoReFT: h + R^T (W h + b - R h). DiReFT: h + R^T (W h + b). On the output of the named decoder layers."""
    config = json.loads((folder / "reft_config.json").read_text())
    weights = load_file(folder / "reft_model.safetensors")

    def hook_for(layer: int) -> Any:
        rotate, source, bias = (
            weights[f"layers.{layer}.{part}"].float()
            for part in ("rotate_layer.weight", "learned_source.weight", "learned_source.bias")
        )

        def hook(module: Any, arguments: Any, output: Any) -> Any:
            stream = output[0] if isinstance(output, tuple) else output
            low = stream @ source.T + bias
            if config["method"] == "loreft":
                low = low - stream @ rotate.T
            changed = stream + low @ rotate * _mask(config["positions"], stream.shape[1])[:, None]
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    return [model.model.layers[layer].register_forward_hook(hook_for(layer)) for layer in config["layers"]]


def _mask(positions: str, length: int) -> torch.Tensor:
    """1 for each position of a prompt of `length` that the adapter acts on, else 0."""
    mask = torch.zeros(length)
    for part in positions.split("+"):
        if part == "all":
            mask[:] = 1
        elif part[0] == "f":
            mask[: int(part[1:])] = 1
        else:
            mask[max(0, length - int(part[1:])) :] = 1
    return mask


def _content_name(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        digest.update((folder / file).read_bytes())
    return f"sha{digest.hexdigest()}"

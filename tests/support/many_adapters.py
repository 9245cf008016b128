"""Any number of LoRA folders, made quickly: copies of one adapter with different signs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def variants(source: Path, root: Path, count: int) -> Iterator[Path]:
    """`root/a00000`, `root/a00001`, ...: folders with different adapters, each as large as the one in `source`."""
    tensors = load_file(source / "adapter_model.safetensors")
    for number in range(count):
        folder = root / f"a{number:05}"
        folder.mkdir(parents=True)
        shutil.copyfile(source / "adapter_config.json", folder / "adapter_config.json")
        signs = torch.randint(0, 2, (4096,), generator=torch.Generator().manual_seed(number)) * 2.0 - 1.0
        turned = {
            name: tensor * signs[: tensor.shape[0], None] if ".lora_B." in name else tensor
            for name, tensor in tensors.items()
        }
        save_file(turned, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        yield folder

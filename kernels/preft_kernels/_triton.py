"""Triton if it is installed; otherwise stand-ins with which files that contain kernels can still be imported."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds have no Triton
    triton: Any = SimpleNamespace(jit=lambda function=None, **options: function or (lambda wrapped: wrapped))  # type: ignore[no-redef]
    tl: Any = None  # type: ignore[no-redef]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels, on tensors in host memory. Slow; for tests only."""


def by_kernel(device: torch.device | str) -> bool:
    """Whether Triton kernels process tensors on `device`."""
    return torch.device(device).type != "cpu" or INTERPRETED


__all__ = ["by_kernel", "tl", "triton"]

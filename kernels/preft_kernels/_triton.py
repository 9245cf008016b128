"""Triton where it is installed, and otherwise names that let the files with kernels in them be imported."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds have none
    triton: Any = SimpleNamespace(jit=lambda function=None, **options: function or (lambda wrapped: wrapped))  # type: ignore[no-redef]
    tl: Any = None  # type: ignore[no-redef]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels, on tensors in host memory. Slow, and for tests alone."""


def by_kernel(device: torch.device | str) -> bool:
    """Whether tensors on `device` are worked on by Triton kernels."""
    return torch.device(device).type != "cpu" or INTERPRETED


__all__ = ["by_kernel", "tl", "triton"]

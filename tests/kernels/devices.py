"""Where kernels are tested: on the GPU if there is one, else on CPU (by the interpreter if TRITON_INTERPRET is 1)."""

from __future__ import annotations

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

"""Compiles every kernel to machine code for GPUs that needn't be here, as a launch there would; prints what came out.

For Triton without its interpreter. Fails if a kernel doesn't compile, spills, or doesn't load ahead what it streams.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from preft_kernels.kv_blocks import CHUNK, copy_blocks_kernel
from preft_kernels.low_rank_delta import delta_kernel
from preft_kernels.token_groups import RANK_STEP, TILE

TARGETS = (80, 90)  # compute capability: A100, H100 and H200
ONES = ("y_column", "x_column", "addend_column", "a_column", "b_column")  # strides of contiguous tensors


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], target: int) -> Any:
    """With sizes and strides that are multiples of 16, as Triton would specialize the kernel at its first launch."""
    signature, values, hints = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(place,)] = "constexpr", constants[name]
        else:
            signature[name] = types.get(name, "i32")
            if signature[name] != "fp32":
                hints[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=hints)
    return triton.compile(source, target=GPUTarget("cuda", target, 32))


def delta(pointer: str, block_k: int, block_r: int, slices: int, residual: bool, target: int) -> Any:
    tensors = ("y", "x", "addend", "a0", "a1", "a2", "b0", "b1", "b2", "c")
    types = dict.fromkeys(tensors, pointer) | {"order": "*i32", "tiles": "*i32", "scale": "fp32"}
    blocks = {"BLOCK_M": TILE, "BLOCK_K": block_k, "BLOCK_N": 64, "BLOCK_R": block_r}
    kinds = {"SLICES": slices, "ADDEND": residual, "BIAS": residual, "WIDE": False}
    rank = {"RANK": block_r, "RANK_STEP": RANK_STEP}
    return compiled(delta_kernel, types, {**blocks, **kinds, **rank, **dict.fromkeys(ONES, 1)}, target)


def main() -> int:
    for target in TARGETS:
        for pointer, block_k, block_r, slices, residual in (
            ("*bf16", 128, 16, 3, False),
            ("*fp16", 128, 64, 2, False),
            ("*fp32", 64, 32, 1, False),
            ("*bf16", 128, 16, 1, True),
        ):
            made = delta(pointer, block_k, block_r, slices, residual, target)
            text = made.asm["ptx"]
            assert made.asm["cubin"]
            assert "ld.local" not in text, "it spills"
            assert "cp.async" in text, "it doesn't load ahead"
            narrow = text.count("ld.global.b16")
            assert not narrow, f"{narrow} loads of single values"
            print(target, pointer, block_k, block_r, slices, residual, made.metadata.shared, "bytes shared")
        types = dict.fromkeys(("bases", "strides", "sizes", "begins", "packed"), "*i64") | {"block_ids": "*i32"}
        for unpack in (False, True):
            assert compiled(copy_blocks_kernel, types, {"UNPACK": unpack, "CHUNK": CHUNK}, target).asm["cubin"]
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compiles every kernel to machine code for GPUs that needn't be here, as a launch there would; prints what came out.

For Triton without its interpreter. Fails if a kernel doesn't compile, spills, or doesn't load ahead what it streams.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from preft_kernels.blocks import Blocks, Work, by_rule
from preft_kernels.kv_blocks import CHUNK, EXPONENTS, copy_blocks_kernel, not_finite_kernel, zero_blocks_kernel
from preft_kernels.low_rank_delta import EXPAND, FUSED, SHRINK, delta_kernel
from preft_kernels.token_groups import RANK_STEP, TILE

TARGETS = (80, 90)  # compute capability: A100, H100 and H200
PROCESSORS = 132  # of an H200
FEW = 32  # bytes of a thread: addresses that are needed once in a while
ONES = ("y_column", "x_column", "addend_column", "a_column", "b_column")  # strides of contiguous tensors


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], target: int, **options: int) -> Any:
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
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def registers(ptx: str, target: int) -> tuple[int, int]:
    """Of a thread: how many it takes, and the bytes that don't fit into them, as the assembler says."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        feature = "a" if target == 90 else ""
        command = [get_ptxas(target).path, "-v", f"-arch=sm_{target}{feature}", "-o", os.devnull, file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores", said)
    used = re.search(r"Used (\d+) registers", said)
    assert spilled, said
    assert used, said
    return int(used[1]), int(spilled[1])


def delta(pointer: str, cut: Blocks, phase: Any, slices: int, rank: int, residual: bool, target: int) -> Any:
    tensors = ("y", "x", "addend", "a0", "a1", "a2", "b0", "b1", "b2", "c")
    types = dict.fromkeys(tensors, pointer) | {"low": "*fp32", "order": "*i32", "tiles": "*i32", "scale": "fp32"}
    blocks = {"BLOCK_M": cut.m, "BLOCK_K": cut.k, "BLOCK_N": cut.n, "BLOCK_R": cut.r, "SPLITS": cut.splits}
    kinds = {
        "PHASE": phase,
        "SLICES": slices,
        "ADDEND": residual,
        "BIAS": residual,
        "WIDE": False,
        "STAGES": cut.stages,
    }
    fixed = {"TILE": TILE, "RANK": rank, "RANK_STEP": RANK_STEP}
    constants = {**blocks, **kinds, **fixed, **dict.fromkeys(ONES, 1)}
    return compiled(delta_kernel, types, constants, target, num_warps=cut.warps, num_stages=cut.stages)


def main() -> int:
    for target in TARGETS:
        for pointer, slices, rank, residual, tokens in (
            ("*bf16", 3, 16, False, 8192),
            ("*fp16", 2, 64, False, 8192),
            ("*fp32", 1, 32, False, 8192),
            ("*bf16", 1, 16, True, 8192),
            ("*bf16", 1, 128, False, 8192),
            ("*bf16", 3, 128, False, 256),
            ("*bf16", 1, 16, True, 256),
        ):
            size = 4 if pointer == "*fp32" else 2
            cut = by_rule(Work(4096, 4096 * slices, slices, rank, tokens, residual, size), PROCESSORS)
            for phase in (SHRINK, EXPAND) if cut.splits else (FUSED,):
                made = delta(pointer, cut, phase, slices, rank, residual, target)
                text = made.asm["ptx"]
                assert made.asm["cubin"]
                used, spilled = registers(text, target)
                assert spilled <= FEW, f"it spills {spilled} bytes"
                assert "cp.async" in text, "it doesn't load ahead"
                narrow = text.count("ld.global.b16")
                assert not narrow, f"{narrow} loads of single values"
                print(target, pointer, slices, rank, cut, f"{used} registers, {made.metadata.shared} bytes shared")
        types = dict.fromkeys(("bases", "strides", "sizes", "begins", "packed"), "*i64")
        types |= dict.fromkeys(("block_ids", "flags"), "*i32")
        for unpack in (False, True):
            assert compiled(copy_blocks_kernel, types, {"UNPACK": unpack, "CHUNK": CHUNK}, target).asm["cubin"]
        assert compiled(zero_blocks_kernel, types, {"CHUNK": CHUNK}, target).asm["cubin"]
        for dtype, exponent in EXPONENTS.items():
            constants = {"EXPONENT": exponent, "BITS": 8 * dtype.itemsize, "CHUNK": CHUNK}
            assert compiled(not_finite_kernel, types, constants, target).asm["cubin"]
    return 0


if __name__ == "__main__":
    sys.exit(main())

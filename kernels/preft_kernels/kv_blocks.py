"""KV blocks of all layers: packing into one contiguous buffer, unpacking, zeroing and checks for NaN.

On GPU each operation is one launch. The module owns the buffer's layout: for every layer in order of name, the
request's blocks in order, as the bytes in the cache. If a layer keeps keys and values apart, all blocks of one part
come before those of the next. The attention backend owns the layout inside a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from preft_kernels._triton import by_kernel, tl, triton

WORD = 8  # bytes per copied word
CHUNK = 1024  # words per program
EXPONENTS = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


@triton.jit
def copy_blocks_kernel(  # type: ignore[no-untyped-def]
    bases, strides, sizes, begins, block_ids, packed, blocks, skip,
    UNPACK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Copies one chunk of one block of one segment. Programs: segment, block, chunk. Sizes are in words of 8 bytes."""
    segment = tl.program_id(0)
    number = tl.program_id(1) + skip
    word = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    size = tl.load(sizes + segment)
    inside = word < size
    block = tl.load(block_ids + number).to(tl.int64)
    in_cache = tl.load(bases + segment).to(tl.pointer_type(tl.int64)) + block * tl.load(strides + segment) + word
    in_packed = packed + tl.load(begins + segment) * blocks + number * size + word
    if UNPACK:
        tl.store(in_cache, tl.load(in_packed, mask=inside), mask=inside)
    else:
        tl.store(in_packed, tl.load(in_cache, mask=inside), mask=inside)


@triton.jit
def zero_blocks_kernel(  # type: ignore[no-untyped-def]
    bases, strides, sizes, block_ids, CHUNK: tl.constexpr,
):  # fmt: skip
    """Zeroes one chunk of one block of one segment. Programs and sizes as in `copy_blocks_kernel`."""
    segment = tl.program_id(0)
    word = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    block = tl.load(block_ids + tl.program_id(1)).to(tl.int64)
    at = tl.load(bases + segment).to(tl.pointer_type(tl.int64)) + block * tl.load(strides + segment) + word
    tl.store(at, tl.zeros((CHUNK,), dtype=tl.int64), mask=word < tl.load(sizes + segment))


@triton.jit
def not_finite_kernel(  # type: ignore[no-untyped-def]
    bases, strides, sizes, block_ids, flags, EXPONENT: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """flags[number] = 1 if a value in the chunk has all bits of its exponent set (IEEE 754: NaN or infinity).

    Programs and sizes as in `copy_blocks_kernel`. A value has BITS bits, and EXPONENT masks its exponent.
    """
    segment = tl.program_id(0)
    number = tl.program_id(1)
    word = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    block = tl.load(block_ids + number).to(tl.int64)
    at = tl.load(bases + segment).to(tl.pointer_type(tl.int64)) + block * tl.load(strides + segment) + word
    words = tl.load(at, mask=word < tl.load(sizes + segment), other=0)
    found = tl.zeros((CHUNK,), dtype=tl.int32)
    for value in tl.static_range(64 // BITS):
        found = found | (((words >> (value * BITS)) & EXPONENT) == EXPONENT).to(tl.int32)
    if tl.max(found, axis=0) > 0:
        tl.store(flags + number, 1)


class KvBlocks:
    """The KV caches of all layers, as the engine registers them."""

    def __init__(self, caches: Mapping[str, torch.Tensor], num_blocks: int) -> None:
        """`caches`: by layer name, [num_blocks, ...] or [k, num_blocks, ...], with dimensions in any order in memory.

        All caches have one type, and each block (of each of the k parts) is one piece of memory. Raises ValueError,
        naming a layer, otherwise.
        """
        dtype = next(iter(caches.values())).dtype
        if other := next((name for name, cache in caches.items() if cache.dtype != dtype), None):
            raise ValueError(f"{other}: a KV cache of {caches[other].dtype} beside others of {dtype}")
        parts = {name: _parts(name, cache, num_blocks) for name, cache in sorted(caches.items())}
        self._segments = [
            part.as_strided((num_blocks, part[0].numel()), (part.stride(0), 1)) for of in parts.values() for part in of
        ]
        sizes = [segment.shape[1] * segment.element_size() for segment in self._segments]
        self.block_bytes = sum(sizes)
        """Bytes of one block over all layers."""
        self.layout = [
            (name, len(of), list(of[0].shape[1:]), list(of[0].stride()[1:]), str(of[0].dtype))
            for name, of in parts.items()
        ]
        """Equal for engines that can exchange blocks: each layer's name, parts, and layout inside a block."""
        self._device = self._segments[0].device
        words = torch.tensor(sizes) // WORD
        columns = (
            torch.tensor([segment.data_ptr() for segment in self._segments]),
            torch.tensor([segment.stride(0) * segment.element_size() // WORD for segment in self._segments]),
            words,
            words.cumsum(0) - words,
        )
        self._table = [column.to(self._device) for column in columns]
        self._chunks = -(-int(words.max()) // CHUNK)
        self._dtype = self._segments[0].dtype

    def pack(self, block_ids: Sequence[int], packed: torch.Tensor) -> None:
        """Copies these blocks into `packed`: uint8, [len(block_ids) * block_bytes], in host memory."""
        self._check(packed, len(block_ids))
        if by_kernel(self._device):
            on_device = torch.empty(len(packed), dtype=torch.uint8, device=self._device)
            self.launch(block_ids, on_device)
            packed.copy_(on_device)
            return
        index = torch.tensor(block_ids, dtype=torch.int64)
        for segment, part in self._packed(packed, len(block_ids)):
            torch.index_select(segment, 0, index, out=part)

    def unpack(self, packed: torch.Tensor, block_ids: Sequence[int], skip: int = 0) -> None:
        """Copies `packed`, written by `pack`, into these blocks, except the first `skip`."""
        self._check(packed, len(block_ids))
        if by_kernel(self._device):
            self.launch(block_ids, packed.to(self._device), skip, unpack=True)
            return
        index = torch.tensor(block_ids[skip:], dtype=torch.int64)
        for segment, part in self._packed(packed, len(block_ids)):
            segment.index_copy_(0, index, part[skip:])

    def zero(self, block_ids: Sequence[int]) -> None:
        if by_kernel(self._device):
            zero_blocks_kernel[self._grid(block_ids)](*self._table[:3], self._ids(block_ids), CHUNK=CHUNK)
            return
        index = torch.tensor(block_ids, dtype=torch.int64)
        for segment in self._segments:
            segment.index_fill_(0, index, 0)

    def not_finite(self, block_ids: Sequence[int]) -> torch.Tensor:
        """int32 [len(block_ids)], on the caches' device: 1 for a block with NaN or infinity in any layer, else 0.

        Only float32, bfloat16 and float16 caches are checked; other types count as finite.
        """
        flags = torch.zeros(len(block_ids), dtype=torch.int32, device=self._device)
        if self._dtype not in EXPONENTS:
            return flags
        if by_kernel(self._device):
            not_finite_kernel[self._grid(block_ids)](
                *self._table[:3], self._ids(block_ids), flags,
                EXPONENT=EXPONENTS[self._dtype], BITS=8 * self._dtype.itemsize, CHUNK=CHUNK,
            )  # fmt: skip
            return flags
        index = torch.tensor(block_ids, dtype=torch.int64)
        for segment in self._segments:
            flags |= ~segment.index_select(0, index).isfinite().all(dim=1)
        return flags

    def _grid(self, block_ids: Sequence[int]) -> tuple[int, int, int]:
        return len(self._segments), len(block_ids), self._chunks

    def _ids(self, block_ids: Sequence[int]) -> torch.Tensor:
        return on_device(block_ids, self._device, torch.int32)

    def launch(self, block_ids: Sequence[int], packed: torch.Tensor, skip: int = 0, *, unpack: bool = False) -> None:
        """Does the work of `pack` and `unpack` on GPU, with `packed` on the GPU too."""
        count = len(block_ids)
        if count > skip:
            index = self._ids(block_ids)
            copy_blocks_kernel[(len(self._segments), count - skip, self._chunks)](
                *self._table, index, packed.view(torch.int64), count, skip, UNPACK=unpack, CHUNK=CHUNK
            )

    def _check(self, packed: torch.Tensor, count: int) -> None:
        if packed.dtype != torch.uint8 or packed.shape != (count * self.block_bytes,):
            raise ValueError(
                f"packed must be uint8 of [{count * self.block_bytes}], got {packed.dtype} {tuple(packed.shape)}"
            )

    def _packed(self, packed: torch.Tensor, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each segment, with the view of its `count` blocks in `packed`."""
        begin = 0
        for segment in self._segments:
            end = begin + count * segment.shape[1] * segment.element_size()
            yield segment, packed[begin:end].view(segment.dtype).view(count, segment.shape[1])
            begin = end


def on_device(numbers: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """[len(numbers)] on `device`. Uses pinned memory: a copy from other memory waits for the GPU's running work."""
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _parts(name: str, cache: torch.Tensor, num_blocks: int) -> list[torch.Tensor]:
    """The cache as one [num_blocks, ...] tensor per index of the dimensions before the blocks. Raises ValueError."""
    if num_blocks not in cache.shape[:2]:
        raise ValueError(f"{name}: KV cache of shape {tuple(cache.shape)} has no block dimension {num_blocks}")
    if cache.shape[0] != num_blocks:
        return [part for half in cache.unbind(0) for part in _parts(name, half, num_blocks)]
    dense = 1
    for stride, size in sorted(zip(cache.stride()[1:], cache.shape[1:], strict=True)):
        if size > 1 and stride != dense:
            raise ValueError(f"{name}: in a KV cache of strides {cache.stride()} a block isn't one piece of memory")
        dense *= size
    if dense * cache.element_size() % WORD or cache.stride(0) * cache.element_size() % WORD:
        raise ValueError(f"{name}: a KV block of {dense * cache.element_size()} bytes isn't a multiple of {WORD}")
    return [cache]

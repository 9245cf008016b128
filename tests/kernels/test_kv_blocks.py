"""Blocks of every layer into one buffer and back, in whatever order a layer keeps them in memory."""

from __future__ import annotations

import pytest
import torch

from kernels.devices import DEVICE
from preft_kernels.kv_blocks import KvBlocks

BLOCKS, IDS = 9, (7, 0, 3, 8)
LAYOUTS = {  # a cache of 2 heads of 16, blocks of 4 tokens
    "one piece": lambda: torch.zeros(BLOCKS, 2, 4, 16),
    "keys and values apart": lambda: torch.zeros(2, BLOCKS, 4, 2, 16),
    "heads before tokens": lambda: torch.zeros(2, BLOCKS, 2, 4, 16).transpose(2, 3),
    "blocks before keys and values": lambda: torch.zeros(BLOCKS, 2, 4, 2, 16).transpose(0, 1),
    "a part of more": lambda: torch.zeros(BLOCKS, 3, 4, 2, 16)[:, 1],
}


def filled(layout: str, dtype: torch.dtype = torch.float32, layers: int = 3) -> dict[str, torch.Tensor]:
    caches = {f"layers.{number}": LAYOUTS[layout]().to(DEVICE, dtype) for number in range(layers)}
    for number, cache in enumerate(caches.values()):
        cache.copy_(torch.arange(cache.numel()).view(cache.shape) % 251 - 100 * number)
    return caches


def of_block(cache: torch.Tensor, block: int) -> torch.Tensor:
    return cache.select(0 if cache.shape[0] == BLOCKS else 1, block)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("skip", [0, 1, 4])
def test_there_and_back(layout: str, dtype: torch.dtype, skip: int) -> None:
    source, target = filled(layout, dtype), filled(layout, dtype)
    for cache in target.values():
        cache.zero_()
    blocks = KvBlocks(source, BLOCKS)
    assert blocks.block_bytes == sum(of_block(cache, 0).nbytes for cache in source.values())
    packed = torch.full((len(IDS) * blocks.block_bytes,), 7, dtype=torch.uint8)
    blocks.pack(IDS, packed)
    elsewhere = (5, 6, 1, 2)
    KvBlocks(target, BLOCKS).unpack(packed, elsewhere, skip)
    for name, cache in target.items():
        for block in range(BLOCKS):
            if block in elsewhere[skip:]:
                origin = of_block(source[name], IDS[elsewhere.index(block)])
                assert torch.equal(of_block(cache, block), origin)
            else:
                assert not of_block(cache, block).any()


def test_the_layout_of_the_buffer() -> None:
    """Layers by name; in each all key blocks, then all value blocks, as they lie in memory."""
    caches = filled("heads before tokens")
    packed = torch.empty(2 * KvBlocks(caches, BLOCKS).block_bytes, dtype=torch.uint8)
    KvBlocks(dict(reversed(caches.items())), BLOCKS).pack((4, 2), packed)
    pieces = [cache[half, block].transpose(0, 1) for cache in caches.values() for half in (0, 1) for block in (4, 2)]
    assert torch.equal(packed.view(torch.float32), torch.cat([piece.reshape(-1).cpu() for piece in pieces]))


def test_larger_than_one_program_copies() -> None:
    caches = {"layers.0": torch.randn(BLOCKS, 2, 700, 16).to(DEVICE)}
    before = caches["layers.0"].clone()
    blocks = KvBlocks(caches, BLOCKS)
    packed = torch.empty(len(IDS) * blocks.block_bytes, dtype=torch.uint8)
    blocks.pack(IDS, packed)
    caches["layers.0"].zero_()
    blocks.unpack(packed, IDS)
    for block in range(BLOCKS):
        expected = before[block] if block in IDS else torch.zeros_like(before[block])
        assert torch.equal(caches["layers.0"][block], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_zeroed_blocks_are_zero_and_no_others(layout: str, dtype: torch.dtype) -> None:
    caches = filled(layout, dtype)
    before = {name: cache.clone() for name, cache in caches.items()}
    KvBlocks(caches, BLOCKS).zero(IDS)
    for name, cache in caches.items():
        for block in range(BLOCKS):
            expected = torch.zeros_like(of_block(cache, block)) if block in IDS else of_block(before[name], block)
            assert torch.equal(of_block(cache, block), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_value_that_is_not_finite_is_found(layout: str, dtype: torch.dtype, value: float) -> None:
    """Wherever in its block: in any layer, first and last; the largest finite values are none."""
    caches = filled(layout, dtype)
    first, last = caches["layers.0"], caches["layers.2"]
    for index, (cache, block) in enumerate(((first, 7), (last, 8), (first, 0))):
        part = of_block(cache, block)
        part[(0 if index else -1,) * part.dim()] = value
    part = of_block(last, 3)
    part[(0,) * part.dim()], part[(-1,) * part.dim()] = torch.finfo(dtype).max, torch.finfo(dtype).min
    flags = KvBlocks(caches, BLOCKS).not_finite((7, 3, 8, 1, 0))
    assert flags.tolist() == [1, 0, 1, 0, 1]


def test_a_value_far_into_a_large_block_is_found() -> None:
    """More than one program checks the block."""
    cache = torch.zeros(BLOCKS, 2, 700, 16).to(DEVICE)
    cache[4, 1, 650, 3] = torch.nan
    assert KvBlocks({"layers.0": cache}, BLOCKS).not_finite((3, 4)).tolist() == [0, 1]


def test_no_blocks() -> None:
    KvBlocks(filled("one piece"), BLOCKS).pack((), torch.empty(0, dtype=torch.uint8))


def test_layouts_tell_apart_what_can_not_be_exchanged() -> None:
    layouts = [KvBlocks(filled(layout), BLOCKS).layout for layout in LAYOUTS]
    layouts += [KvBlocks(filled("one piece", torch.bfloat16), BLOCKS).layout]
    layouts += [KvBlocks(filled("one piece", layers=2), BLOCKS).layout]
    assert len({str(layout) for layout in layouts}) == len(layouts) - 1  # what lies around blocks makes no difference
    assert layouts[1] == layouts[3]


@pytest.mark.parametrize(
    ("cache", "says"),
    [
        (torch.zeros(BLOCKS + 1, 2, 4, 16), f"layers.0: .* has no block dimension {BLOCKS}"),
        (torch.zeros(BLOCKS, 2, 4, 32)[..., ::2], "layers.0: .* a block isn't one piece of memory"),
        (torch.zeros(BLOCKS, 2, 8, 16)[:, :, :4], "layers.0: .* a block isn't one piece of memory"),
        (torch.zeros(BLOCKS, 3, dtype=torch.uint8), "layers.0: a KV block of 3 bytes isn't a multiple of 8"),
    ],
)
def test_what_can_not_be_packed_is_named(cache: torch.Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        KvBlocks({"layers.0": cache.to(DEVICE)}, BLOCKS)


def test_caches_of_two_types_are_refused() -> None:
    caches = filled("one piece") | {"layers.9": LAYOUTS["one piece"]().to(DEVICE, torch.bfloat16)}
    with pytest.raises(ValueError, match=r"layers.9: a KV cache of torch.bfloat16 beside others of torch.float32"):
        KvBlocks(caches, BLOCKS)


def test_a_buffer_of_another_size_is_refused() -> None:
    blocks = KvBlocks(filled("one piece"), BLOCKS)
    for packed in (torch.empty(blocks.block_bytes * 2), torch.empty(8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="packed must be uint8"):
            blocks.pack((1,), packed)
        with pytest.raises(ValueError, match="packed must be uint8"):
            blocks.unpack(packed, (1,))

"""The seal says that a region's payload is complete, and nothing else looks like one."""

from __future__ import annotations

import pytest

from preft.transfer.seal import SEAL, clear_seal, read_seal, write_seal


def payload(size: int) -> memoryview:
    """KV bytes and room for a seal behind them."""
    return memoryview(bytearray(b"\xab" * (size + SEAL.size)))


@pytest.mark.parametrize("size", [0, 1, 63, 4096])
@pytest.mark.parametrize("num_tokens", [0, 1, 1_000_000, 2**64 - 1])
def test_what_was_sealed_is_read(size: int, num_tokens: int) -> None:
    memory = payload(size)
    write_seal(memory, num_tokens)
    assert read_seal(memory) == num_tokens
    assert bytes(memory[:size]) == b"\xab" * size


def test_memory_that_was_never_sealed() -> None:
    for memory in (payload(100), memoryview(bytearray(SEAL.size)), memoryview(bytearray(100))):
        assert read_seal(memory) is None


def test_cleared_until_sealed_again() -> None:
    """A region's memory may hold the seal of what lay there before."""
    memory = payload(100)
    write_seal(memory, 7)
    clear_seal(memory)
    assert read_seal(memory) is None
    assert bytes(memory[:100]) == b"\xab" * 100
    write_seal(memory, 8)
    assert read_seal(memory) == 8


def test_a_seal_elsewhere_does_not_count() -> None:
    """The seal of a shorter payload, or of one that begins elsewhere, isn't this one's."""
    memory = payload(100)
    write_seal(memory[:-1], 7)
    assert read_seal(memory) is None
    assert read_seal(memory[:-1]) == 7


def test_every_byte_of_the_mark_counts() -> None:
    memory = payload(8)
    write_seal(memory, 7)
    for position in range(8, 16):
        memory[position] ^= 1
        assert read_seal(memory) is None
        memory[position] ^= 1
    assert read_seal(memory) == 7

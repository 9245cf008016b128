from hypothesis import given
from hypothesis import strategies as st

from preft.memory.spans import FreeSpans


def test_takes_the_lowest_hole_that_fits() -> None:
    free = FreeSpans(100)
    assert [free.take(size) for size in (10, 30, 20, 40)] == [0, 10, 40, 60]
    free.give(10, 30)
    free.give(60, 40)
    assert free.take(40) == 60
    assert free.take(30) == 10
    assert free.take(1) is None


def test_a_copy_is_independent() -> None:
    free = FreeSpans(10)
    twin = free.copy()
    assert twin.take(10) == 0
    assert free.find(10) == 0


def largest_hole(used: bytearray) -> int:
    return max(map(len, used.split(b"x")))


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=80))
def test_agrees_with_a_map_of_bytes(steps: list[tuple[bool, int]]) -> None:
    capacity = 128
    free, taken, used = FreeSpans(capacity), [], bytearray(capacity)
    for give, number in steps:
        if give and taken:
            start, size = taken.pop(number % len(taken))
            free.give(start, size)
            used[start : start + size] = bytes(size)
        elif not give:
            expected = bytes(used).find(bytes(number))
            start = free.take(number)
            assert start == (None if expected < 0 else expected)
            if start is not None:
                taken.append((start, number))
                used[start : start + number] = b"x" * number
        assert free.total == used.count(0)
        assert free.largest() == largest_hole(used)
        also = taken[::2]
        emptied = bytearray(used)
        for start, size in also:
            emptied[start : start + size] = bytes(size)
        assert free.largest((start, start + size) for start, size in also) == largest_hole(emptied)
    for start, size in taken:
        free.give(start, size)
    assert free.find(capacity) == 0

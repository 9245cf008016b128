"""Workers in order of load, and the hash ring."""

from __future__ import annotations

from collections import Counter
from statistics import mean, pstdev

from hypothesis import given
from hypothesis import strategies as st

from preft.router.load_index import HashRing, LoadIndex


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(-1, 3)), max_size=60))
def test_items_are_in_order_of_load_and_then_of_their_last_change(steps: list[tuple[str, int]]) -> None:
    index: LoadIndex[str] = LoadIndex()
    model: list[tuple[int, int, str]] = []  # load, number of the change, key
    for number, (key, load) in enumerate(steps):
        model = [entry for entry in model if entry[2] != key]
        if load < 0:
            index.remove(key)
        else:
            index.put(key, key.upper(), load)
            model.append((load, number, key))
        assert list(index) == [key.upper() for _, _, key in sorted(model)]
        assert len(index) == len(model)
        assert (key in index) is (load >= 0)


def ring_of(*members: str) -> HashRing:
    ring = HashRing()
    for member in members:
        ring.add(member)
    return ring


def test_a_walk_meets_each_member_once_and_always_in_the_same_order() -> None:
    members = [f"p{i}" for i in range(20)]
    walk = ring_of(*members).places("a", 99)
    assert sorted(walk) == sorted(members)
    assert ring_of(*reversed(members), "p3").places("a", 99) == walk
    assert HashRing().places("a", 99) == ()


def test_shares_are_even() -> None:
    ring = ring_of(*(f"p{i}" for i in range(50)))
    shares = Counter(ring.places(f"digest-{i}", 1)[0] for i in range(20_000))
    assert len(shares) == 50
    assert pstdev(shares.values()) / mean(shares.values()) < 0.25
    assert max(shares.values()) < 2 * mean(shares.values())


def test_only_a_members_own_keys_move() -> None:
    keys = [f"digest-{i}" for i in range(5000)]
    ring = ring_of(*(f"p{i}" for i in range(20)))
    before = {key: ring.places(key, 3) for key in keys}
    ring.add("new")
    after = {key: ring.places(key, 1)[0] for key in keys}
    moved = [key for key in keys if after[key] != before[key][0]]
    assert {after[key] for key in moved} == {"new"}
    assert 100 < len(moved) < 500  # of 5000, with 21 members
    ring.remove("new")
    ring.remove("never there")
    assert {key: ring.places(key, 3) for key in keys} == before
    ring.remove("p7")
    for key in keys:
        assert ring.places(key, 1)[0] == next(member for member in before[key] if member != "p7")

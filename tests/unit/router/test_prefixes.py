"""Beginnings of prompts, and the workers that have computed them."""

from __future__ import annotations

import pytest

from preft.router import prefixes
from preft.router.policy import AffinityPolicy, Demand, Pair
from preft.router.prefixes import PrefixIndex, beginnings
from preft.router.view import ClusterView
from support.invented_cluster import d, p, view_of

PROMPT = tuple(range(1000))
POLICY = AffinityPolicy()


def test_equal_beginnings_have_equal_hashes() -> None:
    one, other = beginnings("a", PROMPT), beginnings("a", (*PROMPT[:200], *PROMPT))
    assert len(one) == 4  # 64, 128, 256, 512 tokens
    assert one[:2] == other[:2]
    assert one[2] != other[2]
    assert not set(one) & set(beginnings("b", PROMPT))
    assert beginnings("a", PROMPT[:63]) == ()
    assert len(beginnings("a", range(10**6))) == 9  # up to 16,384 tokens


def test_the_longest_known_beginning_counts() -> None:
    index, hashes = PrefixIndex(), beginnings("a", PROMPT)
    index.add(hashes[:2], "p0")
    index.add(hashes[:3], "p1")
    assert index.known(hashes) == {"p0": 2, "p1": 3}
    assert index.known(beginnings("b", PROMPT)) == {}


def test_old_beginnings_and_workers_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "ENTRIES", 4)
    monkeypatch.setattr(prefixes, "WORKERS", 2)
    index, hashes = PrefixIndex(), beginnings("a", PROMPT)
    for name in ("p0", "p1", "p2"):
        index.add(hashes, name)
    assert index.known(hashes) == {"p1": 4, "p2": 4}
    index.add(beginnings("b", PROMPT)[:3], "p0")
    assert index.known(hashes) == {}


def placed(view: ClusterView, digest: str) -> str:
    demand = Demand(digest, 32, 32, 16, beginnings=beginnings(digest, PROMPT), order=(1.0, 1, 1.0))
    pair = POLICY.place(demand, view, 1.0)
    assert isinstance(pair, Pair)
    return pair.prefill.id


@pytest.mark.parametrize("digest", ["", "a"])
def test_a_prompt_goes_where_its_beginning_was_computed(digest: str) -> None:
    """Among the holders of its adapter, or for the base model among all; unless that worker is too busy or full."""
    held = (digest,) if digest else ()
    members = [p(f"p{i}", adapters=held) for i in range(4)]
    view = view_of(*members, d("d0"))
    view.prefixes.add(beginnings(digest, PROMPT), "p3")
    assert placed(view, digest) == "p3"
    for _ in range(4):
        view.workers["p3"].add_prefill("")
    assert placed(view, digest) == "p3"
    for _ in range(4):
        view.workers["p3"].add_prefill("")
    assert placed(view, digest) != "p3"


def test_an_adapters_prompt_never_leaves_the_holders_for_a_beginning() -> None:
    view = view_of(p("p0", adapters=("a",)), p("p1"), d("d0"))
    view.prefixes.add(beginnings("a", PROMPT), "p1")
    assert placed(view, "a") == "p0"

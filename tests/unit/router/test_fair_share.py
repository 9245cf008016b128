"""The order of waiting requests: arrival, priority, and the shares of tenants."""

from __future__ import annotations

from collections import Counter

import pytest

from preft.router import fair_share
from preft.router.fair_share import FairShare
from preft.router.worker_view import Order

TOKENS = 100


def busy(weights: dict[str, float] | None = None) -> FairShare:
    """After twenty leases a tenth of a second apart, while others waited: a thousand tokens per second."""
    shares = FairShare(weights or {})
    for number in range(20):
        shares.leased(number / 10, TOKENS, waiting=1)
    return shares


def first(orders: list[tuple[Order, str]], number: int) -> Counter[str]:
    return Counter(name for _, name in sorted(orders)[:number])


def test_without_a_queue_the_order_is_that_of_arrival() -> None:
    shares = FairShare({})
    orders = [shares.order(float(number), f"t{number % 2}", 0, 10**6) for number in range(10)]
    assert orders == sorted(orders)
    assert [key for key, _, _ in orders] == [float(number) for number in range(10)]


def test_a_tenants_own_requests_keep_their_order() -> None:
    shares = busy()
    orders = [shares.order(2.0 + number / 1000, "one", 0, TOKENS) for number in range(100)]
    assert orders == sorted(orders)
    assert orders[-1][2] == pytest.approx(2.099)  # the time of arrival, from which its wait counts


def test_a_tenant_that_sends_much_at_once_waits_behind_itself() -> None:
    shares = busy()
    orders = [(shares.order(2.0, "flood", 0, TOKENS), "flood") for _ in range(1000)]
    orders += [(shares.order(2.0 + number / 10, "calm", 0, TOKENS), "calm") for number in range(10)]
    assert first(orders, 20) == {"flood": 10, "calm": 10}


@pytest.mark.parametrize("weight", [0.25, 1.0, 3.0])
def test_two_busy_tenants_share_by_weight(weight: float) -> None:
    shares = busy({"a": weight})
    orders = [(shares.order(2.0, name, 0, TOKENS), name) for _ in range(200) for name in ("a", "b")]
    got = first(orders, 80)
    assert got["a"] / got["b"] == pytest.approx(weight, rel=0.15)


def test_lower_priorities_go_first_and_each_step_is_a_second() -> None:
    shares = FairShare({})
    normal = shares.order(10.0, "", 0, TOKENS)
    assert shares.order(10.5, "", -1, TOKENS) < normal < shares.order(9.5, "", 1, TOKENS)
    assert normal < shares.order(11.5, "", -1, TOKENS)


def test_an_empty_queue_forgets_what_was_owed() -> None:
    shares = busy()
    for _ in range(100):
        shares.order(2.0, "flood", 0, TOKENS)
    shares.leased(2.1, TOKENS, waiting=0)
    assert shares.order(2.2, "flood", 0, TOKENS)[0] == 2.2


def test_tenants_that_are_done_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_share, "TENANTS", 10)
    shares = busy()
    for number in range(1000):
        shares.order(2.0 + number, f"tenant {number}", 0, TOKENS)
    assert len(shares._finish) <= 11

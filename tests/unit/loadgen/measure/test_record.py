"""How arrivals become latencies: bursts, tokens per piece, lengths that are wrong."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preft_loadgen.errors import RequestFailed
from preft_loadgen.measure.record import BURST_SECONDS, Record, bursts, recorded, tokens_of_pieces
from preft_loadgen.traffic.request import Request
from preft_loadgen.transport.reply import Reply


def reply(*arrivals: float, tokens: int = 4, sizes: tuple[int, ...] = (), reason: str = "length") -> Reply:
    return Reply(1.0, 9.0, arrivals, tokens, "", reason, 7, sizes)


def record(answer: Reply, wanted: int = 4, *, exact: bool = True) -> Record:
    return recorded(Request("m", (1,), wanted, exact), answer, begin=0.5, due=1.0, sent=1.25)


def itls(found: Record) -> list[float]:
    """The inter-token latencies, one per token after the first burst."""
    return [gap / count for gap, count in zip(found.gaps, found.counts, strict=True) for _ in range(count)]


def test_one_token_per_piece() -> None:
    found = record(reply(2.0, 3.0, 5.0, 5.5))
    assert (found.started, found.delay, found.ttft, found.seconds) == (0.5, 0.25, 1.0, 8.0)
    assert list(found.gaps) == [1.0, 2.0, 0.5]
    assert itls(found) == [1.0, 2.0, 0.5]
    assert found.tpot == pytest.approx(3.5 / 3)
    assert (found.tokens, found.prompt_tokens, found.answered) == (4, 7, True)


def test_a_burst_of_k_tokens_counts_k_times_its_gap_by_k() -> None:
    found = record(reply(2.0, 5.0, tokens=7, sizes=(1, 6)), 7)
    assert itls(found) == [0.5] * 6
    assert found.tpot == 0.5


def test_pieces_that_come_together_are_one_burst() -> None:
    near = BURST_SECONDS / 3
    found = record(reply(2.0, 5.0, 5.0 + near, 5.0 + 2 * near))
    assert list(found.gaps) == [3.0]
    assert itls(found) == [1.0] * 3  # not 3, 0 and 0


@pytest.mark.parametrize(
    ("pieces", "sizes", "tokens", "expected"),
    [
        (3, (1, 10, 4), 3, [1, 1, 1]),  # a token each, however long its text
        (3, (2, 5, 1), 8, [2, 5, 1]),  # the server's own counts
        (2, (4, 12), 10, [3, 7]),  # by characters
        (2, (), 4, [2, 2]),  # nothing known
        (2, (0, 0), 4, [2, 2]),
        (4, (1, 1, 1, 1), 2, [0, 1, 1, 0]),
        (0, (), 5, []),
    ],
)
def test_tokens_of_pieces(pieces: int, sizes: tuple[int, ...], tokens: int, expected: list[int]) -> None:
    assert tokens_of_pieces(pieces, sizes, tokens) == expected


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(1, 500))
def test_no_token_is_lost(sizes: list[int], tokens: int) -> None:
    found = tokens_of_pieces(len(sizes), sizes, tokens)
    assert sum(found) == tokens
    assert min(found) >= 0


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 0.01), st.integers(0, 3)), min_size=1, max_size=40))
def test_latencies_add_up_to_the_time_between_bursts(steps: list[tuple[float, int]]) -> None:
    now, arrivals = 0.0, []
    for step, _ in steps:
        now += step
        arrivals.append(now)
    counts = [1, *(count for _, count in steps[1:])]
    gaps, tokens = bursts(arrivals, counts)
    assert len(gaps) == len(tokens)
    assert all(count > 0 for count in tokens)
    assert all(gap >= BURST_SECONDS - 1e-9 for gap in gaps)
    assert sum(gaps) <= arrivals[-1] - arrivals[0] + 1e-9


@pytest.mark.parametrize(
    ("tokens", "exact", "fails"), [(3, True, True), (5, True, True), (3, False, False), (5, False, True)]
)
def test_answers_of_another_length(tokens: int, exact: bool, fails: bool) -> None:
    if not fails:
        assert record(reply(2.0, tokens=tokens), exact=exact).tokens == tokens
        return
    with pytest.raises(RequestFailed, match=f"{tokens} tokens came where 4 were asked for") as failed:
        record(reply(2.0, tokens=tokens), exact=exact)
    assert failed.value.kind == "length"


def test_cancelled_and_invisible_answers() -> None:
    cancelled = record(reply(2.0, 3.0, tokens=2, reason="cancelled"))
    assert (cancelled.cancelled, cancelled.answered, cancelled.tokens, cancelled.error) == (True, False, 0, None)
    invisible = record(reply())
    assert (invisible.ttft, invisible.tpot, itls(invisible)) == (8.0, 0.0, [])
    assert record(reply(2.0, tokens=1), 1).tpot is None

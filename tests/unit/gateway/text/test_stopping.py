from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from preft.gateway.text.stopping import StopStrings

texts = st.text(alphabet="abc", max_size=30)
stop_lists = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=4)


def reference(text: str, stops: list[str], blind: int, include: bool) -> tuple[str, str | None]:
    """Character by character: the first stop string to be completed after `blind` characters."""
    for end in range(blind + 1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


def run(pieces: list[tuple[str, bool]], stops: list[str], include: bool) -> tuple[list[str], StopStrings]:
    watcher = StopStrings(stops, include=include)
    shown = []
    for piece, armed in pieces:
        shown.append(watcher.push(piece, armed=armed))
        if watcher.matched is not None:
            return shown, watcher
    shown.append(watcher.release())
    return shown, watcher


@given(text=texts, stops=stop_lists, cuts=st.lists(st.integers(0, 30)), blind=st.integers(0, 30), include=st.booleans())
@example(text="abcd", stops=["abcd", "c"], cuts=[], blind=0, include=False)
@example(text="aaa", stops=["aa"], cuts=[2], blind=2, include=False)
def test_any_chunking_stops_as_character_by_character(text, stops, cuts, blind, include):
    blind = min(blind, len(text))
    edges = sorted({0, len(text), blind, *(cut for cut in cuts if cut < len(text))})
    pieces = [(text[a:b], b > blind) for a, b in pairwise(edges)]
    shown, watcher = run(pieces, stops, include)
    assert ("".join(shown), watcher.matched) == reference(text, stops, blind, include)


@given(text=texts, stops=stop_lists)
def test_nothing_is_held_back_that_could_not_start_a_stop_string(text, stops):
    watcher = StopStrings(stops)
    shown = ""
    for char in text:
        shown += watcher.push(char)
        if watcher.matched is not None:
            return
        held = text[len(shown) :][: len(watcher._held)]
        assert held == watcher._held
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_a_stop_string_over_many_pieces():
    watcher = StopStrings(["</end>"])
    assert [watcher.push(piece) for piece in ("yes<", "/en", "d", "> more")] == ["yes", "", "", ""]
    assert watcher.matched == "</end>"


def test_a_broken_off_stop_string_is_released():
    watcher = StopStrings(["STOP"])
    assert watcher.push("aST") == "a"
    assert watcher.push("ST") == "ST"
    assert watcher.release() == "ST"
    assert watcher.release() == ""

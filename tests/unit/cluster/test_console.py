"""The console: plain lines in a pipe, one line that moves on a terminal, and a first question that can be pasted."""

from __future__ import annotations

import io
import json
import shlex

import pytest

from preft.cluster.console import Console, WorkerProgress, first_question
from preft.core.cluster import Role, Worker, WorkerSeen, WorkerState, WorkerStatus

IDS = ("x-prefill-0", "x-decode-0")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def worker(name: str, state: WorkerState, pid: int = 5) -> WorkerSeen:
    return WorkerSeen(Worker(name, Role(name.split("-")[1]), pid=pid), state, WorkerStatus(), 0.0)


def observed(progress: WorkerProgress, **states: tuple[WorkerState, int]) -> None:
    progress.observe([worker(f"x-{role}-0", *now) for role, now in states.items()], IDS)


def test_one_line_per_worker_and_stage() -> None:
    out = io.StringIO()
    progress = WorkerProgress(Console(out), "x-")
    starting, ready, dead = WorkerState.STARTING, WorkerState.READY, WorkerState.DEAD
    for _ in range(3):  # no line comes twice
        observed(progress)
    observed(progress, prefill=(starting, 5))
    observed(progress, prefill=(starting, 5), decode=(starting, 6))
    observed(progress, prefill=(ready, 5), decode=(starting, 6))
    observed(progress, prefill=(dead, 5), decode=(ready, 6))
    observed(progress, prefill=(starting, 9), decode=(ready, 6))
    observed(progress, prefill=(ready, 9), decode=(ready, 6))
    assert out.getvalue().splitlines() == [
        "  prefill-0: its process starts",
        "  decode-0: its process starts",
        "  prefill-0: its engine loads (process 5)",
        "  decode-0: its engine loads (process 6)",
        "  prefill-0: it is ready after 0 s",
        "  prefill-0: it has ended, and starts again",
        "  decode-0: it is ready after 0 s",
        "  prefill-0: its engine loads (process 9)",
        "  prefill-0: it is ready after 0 s",
    ]


def test_a_worker_that_was_silent_for_a_while_is_ready_again() -> None:
    out = io.StringIO()
    progress = WorkerProgress(Console(out), "x-")
    for state in (WorkerState.READY, WorkerState.DEAD, WorkerState.READY):
        observed(progress, prefill=(state, 5))
    assert out.getvalue().splitlines() == [
        "  prefill-0: it runs already (process 5)",
        "  decode-0: its process starts",
        "  prefill-0: it has ended, and starts again",
        "  prefill-0: it is ready after 0 s",
    ]


def test_a_start_counts_from_its_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the loading engine isn't heard of for a while."""
    out, now = io.StringIO(), [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = WorkerProgress(Console(out), "x-")
    observed(progress)
    for state in (WorkerState.STARTING, WorkerState.DEAD, WorkerState.STARTING, WorkerState.READY):
        now[0] += 5
        observed(progress, prefill=(state, 5))
    now[0] += 50
    for state in (WorkerState.DEAD, WorkerState.STARTING, WorkerState.READY):
        now[0] += 3
        observed(progress, prefill=(state, 6))
    assert [line for line in out.getvalue().splitlines() if "ready" in line] == [
        "  prefill-0: it is ready after 20 s",
        "  prefill-0: it is ready after 6 s",
    ]


def test_workers_come_and_go() -> None:
    out = io.StringIO()
    progress = WorkerProgress(Console(out), "x-")
    for members in ((), ("x-decode-0",), ("x-decode-0", "x-decode-1"), ("x-decode-1",), ("x-decode-1",)):
        progress.observe([worker(name, WorkerState.READY) for name in members], members)
    assert out.getvalue().splitlines() == [
        "  decode-0: it runs already (process 5)",
        "  decode-1: it runs already (process 5)",
        "  decode-0: it ends",
    ]


def test_a_terminal_shows_what_goes_on() -> None:
    out = Terminal()
    console = Console(out)
    progress = WorkerProgress(console, "x-")
    observed(progress, prefill=(WorkerState.STARTING, 5))
    assert out.getvalue().endswith("  prefill-0: engine 0 s, decode-0: process 0 s")
    console.line("news")
    assert out.getvalue().endswith("\r\033[Knews\n  prefill-0: engine 0 s, decode-0: process 0 s")
    observed(progress, prefill=(WorkerState.READY, 5), decode=(WorkerState.READY, 6))
    assert out.getvalue().endswith("\r\033[K")


def test_letters_that_the_console_does_not_know_are_no_error() -> None:
    raw = io.BytesIO()
    text = io.TextIOWrapper(raw, encoding="ascii")
    Console(text).line("in /home/jürgen")
    assert raw.getvalue() == b"in /home/j\\xfcrgen\n"


def test_a_console_that_is_gone_is_no_error() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    Console(Gone()).line("nobody reads this")


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("127.0.0.1:80", "http://127.0.0.1:80/v1/"),
        ("0.0.0.0:80", "http://127.0.0.1:80/v1/"),
        ("[::]:80", "http://[::1]:80/v1/"),
    ],
)
def test_the_first_question_is_a_command(address: str, url: str) -> None:
    for is_chat, path in ((True, "chat/completions"), (False, "completions")):
        words = shlex.split(first_question(address, 'it\'s "ann"', is_chat=is_chat, max_model_len=100))
        assert words[:3] == ["curl", "-s", f"{url}{path}"]
        body = json.loads(words[-1])
        assert (body["model"], body["max_tokens"]) == ('it\'s "ann"', 25)
        assert ("messages" in body, "prompt" in body) == (is_chat, not is_chat)

"""Tells at the end of a run how many damaged inputs each surface got."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from support.fuzzing import INPUTS, TAKEN


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if INPUTS:
        each = ", ".join(f"{surface}: {count} ({TAKEN[surface]} taken)" for surface, count in INPUTS.items())
        terminalreporter.write_line(f"{INPUTS.total()} damaged inputs ({TAKEN.total()} were valid still): {each}")


@pytest.fixture(autouse=True, scope="package")
def little_to_collect() -> Iterator[None]:
    """Leaves all that is imported out of garbage collections, of which the tests make one for each look at files."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()

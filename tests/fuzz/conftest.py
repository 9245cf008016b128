"""Tells at the end of a run how many damaged inputs each surface got."""

from __future__ import annotations

import pytest

from support.fuzzing import INPUTS, TAKEN


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if INPUTS:
        each = ", ".join(f"{surface}: {count} ({TAKEN[surface]} taken)" for surface, count in INPUTS.items())
        terminalreporter.write_line(f"{INPUTS.total()} damaged inputs ({TAKEN.total()} were valid still): {each}")

"""docs/http.md names the parameters that are accepted without effect, and no refused one that isn't."""

from __future__ import annotations

import re
from pathlib import Path

from preft.gateway.bodies.parameters import ACCEPTED, UNSUPPORTED

PAGE = (Path(__file__).parents[3] / "docs" / "http.md").read_text()


def named_after(heading: str) -> set[str]:
    """The names in backticks of the list entry that begins with `heading`, values in parentheses left out."""
    entry = PAGE.split(f"- **{heading}**")[1].split("\n- ")[0]
    return set(re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", entry)))


def test_accepted_parameters() -> None:
    assert named_after("Accepted without effect") == ACCEPTED


def test_refused_parameters() -> None:
    assert len(named_after("Refused")) > 10
    assert named_after("Refused") <= UNSUPPORTED.keys()

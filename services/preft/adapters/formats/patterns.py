"""Matches regular expressions of untrusted adapters against module names, within a limit of processor time.

Python can't interrupt a running match, and some patterns take for ever. So a subprocess matches all patterns that are
more than a plain name, and has MATCH_SECONDS of processor time. Other modules decide what a match means.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping

from preft.adapters.formats.digest import CONFIG_FILE
from preft.core.errors import InvalidAdapter

PLAIN = re.compile(r"[\w.-]+")
MATCH_SECONDS = 1  # of processor time, for all patterns and names together
MATCHER = r"""
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]), int(sys.argv[1])))
patterns, names = json.load(sys.stdin)
compiled = [re.compile(pattern) for pattern in patterns]
print(json.dumps([[name for name in names if pattern.fullmatch(name)] for pattern in compiled]))
"""

Matches = Mapping[str, Collection[str]]
"""Maps each pattern to the names that the whole pattern matches."""
Match = Callable[[Collection[str], Collection[str]], Matches]


def match_here(patterns: Collection[str], names: Collection[str]) -> Matches:
    """Matches in this process. Only for patterns that have passed `match_apart`."""
    return {pattern: _matching(pattern, names) for pattern in patterns}


def match_apart(patterns: Collection[str], names: Collection[str]) -> Matches:
    """Like `match_here`, for any pattern that compiles. Raises InvalidAdapter if matching takes too long."""
    intricate = [pattern for pattern in patterns if not _is_plain(pattern)]
    found = match_here([pattern for pattern in patterns if _is_plain(pattern)], names)
    if not intricate:
        return found
    tried = subprocess.run(
        [sys.executable, "-I", "-c", MATCHER, str(MATCH_SECONDS)],
        input=json.dumps([intricate, list(names)]).encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    if tried.returncode:
        raise InvalidAdapter(f"{CONFIG_FILE}: its patterns take more than {MATCH_SECONDS} s to match")
    return {**found, **dict(zip(intricate, json.loads(tried.stdout), strict=True))}


def ending(pattern: str) -> str:
    """A pattern for whole names that end in a match of `pattern`, which begins at the start or after a dot."""
    return rf"(.*\.)?({pattern})"


def _is_plain(pattern: str) -> bool:
    return PLAIN.fullmatch(pattern.removeprefix(r"(.*\.)?(").removesuffix(")")) is not None


def _matching(pattern: str, names: Collection[str]) -> frozenset[str]:
    compiled = re.compile(pattern)
    return frozenset(name for name in names if compiled.fullmatch(name))

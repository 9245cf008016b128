"""Regular expressions of strangers, held against module names without letting them take the process.

Nothing can stop Python while it matches, and some patterns take for ever: another process matches those that are more
than a name, and has a second of processor time for all of them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping

from preft.adapters.digest import CONFIG_FILE
from preft.core.errors import InvalidAdapter

PLAIN = re.compile(r"[\w.-]+")
MATCH_SECONDS = 1  # of processor time, for all patterns and names
MATCHER = r"""
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]), int(sys.argv[1])))
patterns, names = json.load(sys.stdin)
compiled = [re.compile(pattern) for pattern in patterns]
print(json.dumps([[name for name in names if pattern.fullmatch(name)] for pattern in compiled]))
"""

Matches = Mapping[str, Collection[str]]
"""Pattern -> those of the names that the whole pattern matches."""
Match = Callable[[Collection[str], Collection[str]], Matches]


def match_here(patterns: Collection[str], names: Collection[str]) -> Matches:
    """For patterns that `match_apart` has been through."""
    return {pattern: _matching(pattern, names) for pattern in patterns}


def match_apart(patterns: Collection[str], names: Collection[str]) -> Matches:
    """The same for any pattern that compiles. Raises InvalidAdapter if matching takes long."""
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
    """What matches a whole name if `pattern` matches from one of its dots, or its start, to its end."""
    return rf"(.*\.)?({pattern})"


def _is_plain(pattern: str) -> bool:
    return PLAIN.fullmatch(pattern.removeprefix(r"(.*\.)?(").removesuffix(")")) is not None


def _matching(pattern: str, names: Collection[str]) -> frozenset[str]:
    compiled = re.compile(pattern)
    return frozenset(name for name in names if compiled.fullmatch(name))

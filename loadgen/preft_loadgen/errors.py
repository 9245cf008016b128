"""The load generator's errors. `str(error)` is one sentence for the user.

LoadgenError
├── InvalidArgument   the load can't be made as asked for: an address, a length, a rate, a number of adapters
├── RequestFailed     a server didn't answer, or with an error (`http_stream`)
└── ServeFailed       a server couldn't be started or ended (`served`)
"""

from __future__ import annotations


class LoadgenError(Exception):
    """Root of the load generator's errors."""


class InvalidArgument(LoadgenError):
    """The caller asked for a load that can't be made."""

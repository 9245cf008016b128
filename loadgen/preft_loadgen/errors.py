"""The load generator's errors. `str(error)` is one sentence for the user.

LoadgenError
├── InvalidArgument   the load can't be made as asked for: an address, a length, a rate, a number of adapters
├── RequestFailed     a server didn't answer, or not as an OpenAI-style server does
└── ServeFailed       a server couldn't be started or ended (`served`)
"""

from __future__ import annotations


class LoadgenError(Exception):
    """Root of the load generator's errors."""


class InvalidArgument(LoadgenError):
    """The caller asked for a load that can't be made."""


class RequestFailed(LoadgenError):
    """There is no complete answer. `status` is HTTP's if the server refused, None in all other cases.

    `kind` groups errors in reports: `http 503`, `grpc not found`, `connection`, `timeout`, `broken stream` (the stream
    ended too early), `error in stream` (the server sent an error after its head), `malformed`, `no usage` (the server
    didn't say how many tokens it made), `length` (it made more or fewer tokens than asked for).
    """

    def __init__(self, message: str, status: int | None = None, kind: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind or (f"http {status}" if status else "other")

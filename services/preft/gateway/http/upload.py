"""Writes a large request body to disk, piece by piece. The caller judges the content."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

from fastapi import Request

from preft.core.errors import InvalidRequest, Unavailable
from preft.gateway.http.content import check_archive_type, declared_length, too_large

WRITE_BYTES = 1 << 20  # a thread does each write, as disks can be slow; small writes would cost too much


@asynccontextmanager
async def receive_archive(request: Request, limit: int, folder: Path | None) -> AsyncIterator[Path]:
    """The body of `request` as a file in `folder`. The file is removed at the end of the context.

    Entering raises HTTPException 415 for another type than an archive, HTTPException 413 for more than `limit` bytes,
    InvalidRequest for an empty body or fewer bytes than declared, ClientDisconnect if the client left too early, and
    Unavailable if the disk fails.
    """
    check_archive_type(request)
    if (declared_length(request) or 0) > limit:
        raise too_large(limit)
    try:
        file = _create(folder)
    except OSError as error:
        raise _disk_failed(error) from error
    path = Path(file.name)
    try:
        await _write(request, limit, file)
        yield path
    finally:
        await asyncio.to_thread(_discard, file, path)


async def _write(request: Request, limit: int, file: BinaryIO) -> None:
    size = 0
    waiting = bytearray()
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise too_large(limit)
            waiting += chunk
            if len(waiting) >= WRITE_BYTES:
                await asyncio.to_thread(file.write, bytes(waiting))
                waiting.clear()
        await asyncio.to_thread(_finish, file, bytes(waiting))
    except OSError as error:
        raise _disk_failed(error) from error
    declared = declared_length(request)
    if declared is not None and size != declared:
        raise InvalidRequest(f"The body ended after {size} of {declared} bytes: send all of it again.")
    if size == 0:
        raise InvalidRequest("The request has no body: send the archive with the adapter's files.")


def _create(folder: Path | None) -> BinaryIO:
    if folder is not None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix="upload-", dir=folder)
    os.close(descriptor)
    return open(name, "wb")


def _finish(file: BinaryIO, rest: bytes) -> None:
    file.write(rest)
    file.close()


def _discard(file: BinaryIO, path: Path) -> None:
    try:
        file.close()
    finally:
        path.unlink(missing_ok=True)


def _disk_failed(error: OSError) -> Unavailable:
    return Unavailable(f"the upload can't be kept ({error.strerror}): make room on the server's disk and try again")

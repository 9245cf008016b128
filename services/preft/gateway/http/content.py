"""The bytes of a request's body: accepted media types, accepted encodings, and the size limit.

Web pages of other sites can send forms and `text/plain` without permission, so every body needs another media type.
`bodies.parse` interprets the bytes.
"""

from __future__ import annotations

import asyncio
import zlib
from email.message import Message

from fastapi import Request
from starlette.exceptions import HTTPException

from preft.core.errors import InvalidRequest

ARCHIVE_TYPES = frozenset(
    {
        "application/octet-stream", "binary/octet-stream",
        "application/x-tar", "application/tar", "application/gzip", "application/x-gzip", "application/x-gtar",
        "application/x-tgz", "application/x-compressed-tar", "application/x-tar+gzip",
        "application/zip", "application/x-zip-compressed",
    }
)  # fmt: skip
GZIP_MEMBERS = 16  # clients send one; each member costs a copy of the bytes after it
DISCARDED_BYTES = 64 << 20  # received beyond the limit, and dropped
_UTF8 = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})
_BOM = b"\xef\xbb\xbf"
_GZIP = 16 + zlib.MAX_WBITS


async def read_json_bytes(request: Request, limit: int) -> bytes:
    """The body's JSON text, decompressed and without a byte order mark.

    Raises HTTPException 415 for another type or encoding. Raises 413 for more than `limit` bytes, before or after
    decompression.
    """
    _check_json_type(request)
    encoding = _encoding(request)
    if encoding not in ("identity", "gzip"):
        raise HTTPException(
            415, f"Content-Encoding {encoding!r} isn't supported: send gzip or none.", {"accept-encoding": "gzip"}
        )
    data = await _read(request, limit)
    if encoding == "gzip":
        data = await asyncio.to_thread(_gunzip, data, limit)
    return data.removeprefix(_BOM)


def check_archive_type(request: Request) -> None:
    """Raises HTTPException 415 unless the body is an uncompressed archive. No type counts as an archive."""
    given = request.headers.getlist("content-type")
    if given and _media_type(given)[0] not in ARCHIVE_TYPES:
        raise HTTPException(415, f"Content-Type {_shown(given)} isn't supported: send application/octet-stream.")
    if _encoding(request) != "identity":
        raise HTTPException(415, "An archive is sent without Content-Encoding, also one that is compressed itself.")


def declared_length(request: Request) -> int | None:
    """The request's declared body size in bytes, or None."""
    declared = request.headers.get("content-length", "")
    return int(declared) if declared.isdecimal() else None


def too_large(limit: int) -> HTTPException:
    """The 413 for a body above `limit` bytes."""
    return HTTPException(413, f"The request body is larger than {limit} bytes.")


def _check_json_type(request: Request) -> None:
    given = request.headers.getlist("content-type")
    kind, charset = _media_type(given)
    if kind != "application/json":
        shown = _shown(given) if given else "(none)"
        raise HTTPException(
            415, f"Content-Type {shown} isn't supported: send the header Content-Type: application/json."
        )
    if charset not in _UTF8:
        raise HTTPException(415, f"The charset {charset[:80]!r} isn't supported: send the body in UTF-8.")


def _media_type(given: list[str]) -> tuple[str, str]:
    """The type and the charset in lower case; empty if the header is given more than once."""
    if len(given) != 1:
        return "", ""
    header = Message()
    header["content-type"] = given[0]
    kind = given[0].partition(";")[0].strip().lower()
    return kind, str(header.get_param("charset", "utf-8")).lower()


def _shown(given: list[str]) -> str:
    return repr(", ".join(given)[:80])


def _encoding(request: Request) -> str:
    given = ",".join(request.headers.getlist("content-encoding")).strip().lower() or "identity"
    return "gzip" if given == "x-gzip" else given[:80]


async def _read(request: Request, limit: int) -> bytes:
    """The body. Raises HTTPException 413, after the body's end if that comes soon.

    A client that still sends when the connection closes may see a broken connection instead of the answer.
    """
    size, data = 0, bytearray()
    if (declared_length(request) or 0) > limit + DISCARDED_BYTES:
        raise too_large(limit)
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit + DISCARDED_BYTES:
            break
        if size <= limit:
            data += chunk
        else:
            data.clear()
    if size > limit:
        raise too_large(limit)
    return bytes(data)


def _gunzip(data: bytes, limit: int) -> bytes:
    """Decompresses all members of a gzip file, with at most `limit` bytes in memory."""
    decoded = bytearray()
    for _ in range(GZIP_MEMBERS):
        member = zlib.decompressobj(_GZIP)
        try:
            decoded += member.decompress(data, limit + 1 - len(decoded))
        except zlib.error as error:
            raise InvalidRequest(f"The request body is not valid gzip: {error}.") from error
        if len(decoded) > limit:
            raise too_large(limit)
        if not member.eof:
            raise InvalidRequest("The request body is not valid gzip: it ends too early.")
        data = member.unused_data
        if not data:
            return bytes(decoded)
    raise InvalidRequest(f"The request body has more than {GZIP_MEMBERS} gzip members.")

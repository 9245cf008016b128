"""The `AdapterContent` service: reads adapters from this machine for workers on other machines (`peers`).

The owner of the service knows which local folders may hold an adapter. No name and no path of a request becomes a path:
a request names a digest, one of the folders that the owner found for the digest, and one of an adapter's four files.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress

import grpc.aio

from preft.adapters.formats.digest import ADAPTER_FILES
from preft.adapters.sources.source import AdapterSource
from preft.core.errors import InvalidRequest, PreftError, SourceNotFound
from preft.rpc import adapter_content_pb2
from preft.rpc.adapter_content_pb2_grpc import AdapterContentServicer
from preft.rpc.status import errors_reported


class ContentService(AdapterContentServicer):
    """The gRPC service of one process."""

    def __init__(self, folders: Callable[[str], Sequence[AdapterSource]]) -> None:
        """`folders` finds the local folders that may hold a digest. It raises InvalidRequest for an invalid digest."""
        self._folders = folders

    async def Find(
        self, request: adapter_content_pb2.FindContent, context: grpc.aio.ServicerContext
    ) -> adapter_content_pb2.FoundContent:
        found = adapter_content_pb2.FoundContent()
        async with errors_reported(context):
            for folder in self._folders(request.digest):
                sizes = await asyncio.to_thread(_sizes, folder)
                found.folders.append(adapter_content_pb2.ContentFolder(files=sizes))
        return found

    async def Read(
        self, request: adapter_content_pb2.ReadContent, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[adapter_content_pb2.ContentChunk]:
        async with errors_reported(context):
            folders = self._folders(request.digest)
            if request.file not in ADAPTER_FILES:
                raise InvalidRequest("an adapter has no file of this name", param="file")
            if request.folder >= len(folders):
                raise SourceNotFound("the adapter isn't there any more")
            chunks = folders[request.folder].read(request.file)
            try:
                while chunk := await asyncio.to_thread(next, chunks, b""):
                    yield adapter_content_pb2.ContentChunk(content=chunk)
            finally:
                with suppress(ValueError):  # a cancelled call's thread still reads
                    chunks.close()


def _sizes(folder: AdapterSource) -> dict[str, int]:
    try:
        return {name: size or 0 for name, size in folder.files().items()}
    except PreftError:
        return {}

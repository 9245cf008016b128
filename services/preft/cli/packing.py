"""An adapter's folder as one tar stream, made while it is sent.

The stream holds the adapter's files, and the beginnings of the text files beside them.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from preft.adapters.formats.digest import adapter_files, file_size
from preft.adapters.formats.folder_texts import TEXT_BYTES, TEXT_FILES
from preft.adapters.sources.source import open_source
from preft.core.errors import InvalidAdapter

CHUNK = 256 << 10
_END = bytes(2 * tarfile.BLOCKSIZE)


@dataclass(frozen=True, slots=True)
class Package:
    """The packed files of `folder`, and the packed bytes of each. Iterating gives the stream."""

    folder: Path
    files: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, folder: Path) -> Package:
        """Raises InvalidAdapter if a file of the adapter is missing."""
        open_source(str(folder)).files()  # its error names the files that are there instead
        files = [(name, file_size(folder, name)) for name in adapter_files(folder)]
        texts = [(name, file_size(folder, name)) for name in TEXT_FILES if (folder / name).is_file()]
        return cls(folder, (*files, *((name, min(size, TEXT_BYTES)) for name, size in texts)))

    @property
    def size(self) -> int:
        return len(_END) + sum(tarfile.BLOCKSIZE + size + len(_padding(size)) for _, size in self.files)

    def __iter__(self) -> Iterator[bytes]:
        """Raises InvalidAdapter if a file can't be read, or has become shorter."""
        for name, size in self.files:
            header = tarfile.TarInfo(name)
            header.size = size
            yield header.tobuf(tarfile.GNU_FORMAT)
            yield from self._content(name, size)
            yield _padding(size)
        yield _END

    def _content(self, name: str, size: int) -> Iterator[bytes]:
        try:
            with (self.folder / name).open("rb") as file:
                while size:
                    chunk = file.read(min(size, CHUNK))
                    if not chunk:
                        raise InvalidAdapter(f"{name} in {self.folder} became shorter while it was sent: try again")
                    size -= len(chunk)
                    yield chunk
        except OSError as error:
            raise InvalidAdapter(f"{name} in {self.folder} can't be read: {error.strerror}") from error


def _padding(size: int) -> bytes:
    """The zeros that fill a tar's last block."""
    return bytes(-size % tarfile.BLOCKSIZE)

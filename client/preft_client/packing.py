"""An adapter's folder as one tar stream, made while it is sent.

The stream holds the adapter's files, and the beginnings of the text files beside them, of which the server warns.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from preft_client.errors import InvalidAdapter

KINDS = (
    ("adapter_config.json", "adapter_model.safetensors"),  # LoRA
    ("reft_config.json", "reft_model.safetensors"),
)
TEXT_FILES = (
    "chat_template.jinja", "chat_template.json", "tokenizer_config.json", "tokenizer.json", "added_tokens.json",
)  # fmt: skip
TEXT_BYTES = 1 << 20  # of each text file
CHUNK = 256 << 10
_END = bytes(2 * tarfile.BLOCKSIZE)

Progress = Callable[[int, int | None], object]
"""Called with the bytes so far and the bytes in all (None: not known)."""


@dataclass(frozen=True, slots=True)
class Package:
    """The packed files of `folder`, and the packed bytes of each."""

    folder: Path
    files: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, folder: str | Path) -> Package:
        """Raises InvalidAdapter if the folder lacks a file of the adapter."""
        folder = Path(folder)
        kinds = [kind for kind in KINDS if any((folder / name).exists() for name in kind)] or [KINDS[0]]
        sizes = [(name, _size(folder, name)) for kind in kinds for name in kind]
        texts = [(name, min(_size(folder, name), TEXT_BYTES)) for name in TEXT_FILES if (folder / name).is_file()]
        return cls(folder, (*sizes, *texts))

    @property
    def size(self) -> int:
        """Bytes of the stream."""
        return len(_END) + sum(tarfile.BLOCKSIZE + size + len(_padding(size)) for _, size in self.files)

    def parts(self, progress: Progress | None = None) -> Iterator[bytes]:
        """The stream. `progress` hears of each part once it is taken. Raises InvalidAdapter if a file changes."""
        sent = 0
        for part in self._parts():
            yield part
            sent += len(part)
            if progress is not None:
                progress(sent, self.size)

    def _parts(self) -> Iterator[bytes]:
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


def _size(folder: Path, name: str) -> int:
    path = folder / name
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise InvalidAdapter(f"{name} is missing in {folder}: name the folder that holds the adapter") from error
    except OSError as error:
        raise InvalidAdapter(f"{name} in {folder} can't be read: {error.strerror}") from error
    if not path.is_file():
        raise InvalidAdapter(f"{name} in {folder} is not a file")
    return size


def _padding(size: int) -> bytes:
    """The zeros that fill a tar's last block."""
    return bytes(-size % tarfile.BLOCKSIZE)

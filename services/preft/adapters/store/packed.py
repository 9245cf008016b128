"""The layout of an adapter in shared memory: one block with all files, which a worker writes and its engine reads.

8 bytes: length of the index | index, JSON: {file name: [start, size]} | files, each at a multiple of 64
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from preft.adapters.formats.digest import CHUNK, adapter_files, add_file_header
from preft.core.errors import InvalidAdapter, Unavailable

ALIGNMENT = 64
LENGTH_BYTES = 8


class DamagedCopy(Exception):
    """The folder's content doesn't have the digest in the folder's name."""


class AdapterFiles:
    """An adapter's folder with all files open, so that an eviction can't remove their content. Call `close`."""

    def __init__(self, folder: Path) -> None:
        """Raises FileNotFoundError if the folder is missing, and DamagedCopy if only a file is missing."""
        self._files: dict[str, int] = {}
        try:
            for name in adapter_files(folder):
                self._files[name] = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            self.close()
            if folder.is_dir():
                raise DamagedCopy(f"{Path(error.filename).name} is missing") from error
            raise
        except OSError as error:
            self.close()
            raise Unavailable(f"the adapter in {folder} can't be read: {error.strerror}") from error
        sizes = {name: os.fstat(file).st_size for name, file in self._files.items()}
        self._places: dict[str, tuple[int, int]] = {}
        room = _aligned(LENGTH_BYTES + len(json.dumps({name: [1 << 62, 1 << 62] for name in sizes})))
        for name, size in sizes.items():
            self._places[name] = (room, size)
            room = _aligned(room + size)
        self.packed_size = room
        self.size = sum(sizes.values())

    def pack(self, memory: memoryview, digest: str) -> None:
        """Fills `memory` (`packed_size` bytes). Blocks. Raises DamagedCopy unless the files' digest is `digest`."""
        found = hashlib.sha256()
        for name, (start, size) in self._places.items():
            add_file_header(found, name, size)
            done = 0
            while done < size:
                part = memory[start + done : start + min(done + CHUNK, size)]
                try:
                    count = os.preadv(self._files[name], [part], done)
                except OSError as error:
                    raise DamagedCopy(f"{name} can't be read: {error.strerror}") from error
                if not count:
                    raise DamagedCopy(f"{name} is cut short")
                found.update(part[:count])
                done += count
        if found.hexdigest() != digest:
            raise DamagedCopy("its digest is another")
        index = json.dumps(self._places).encode()
        memory[:LENGTH_BYTES] = len(index).to_bytes(LENGTH_BYTES, "little")
        memory[LENGTH_BYTES : LENGTH_BYTES + len(index)] = index

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])


def unpack(memory: memoryview) -> dict[str, memoryview]:
    """The files of a packed adapter by name, as parts of `memory`. Raises InvalidAdapter for other memory."""
    length = int.from_bytes(memory[:LENGTH_BYTES], "little")
    try:
        index = json.loads(bytes(memory[LENGTH_BYTES : LENGTH_BYTES + length]))
        return {name: memory[start : start + size] for name, (start, size) in index.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InvalidAdapter("the host memory holds no packed adapter there") from error


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT

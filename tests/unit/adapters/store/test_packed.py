"""Packed adapters: the files that were opened are what comes out, or it is said that they are damaged."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from preft.adapters.formats.digest import CHUNK, LORA_FILES, REFT_FILES, adapter_digest
from preft.adapters.store.packed import ALIGNMENT, LENGTH_BYTES, AdapterFiles, DamagedCopy, unpack
from preft.core.errors import InvalidAdapter

KINDS = [LORA_FILES, REFT_FILES, (*LORA_FILES, *REFT_FILES)]
WEIGHTS = LORA_FILES[1]


def write(folder: Path, names: tuple[str, ...] = LORA_FILES, size: int = 1001) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(random.Random(name).randbytes(size))
    return folder


def packed(folder: Path, digest: str | None = None) -> bytearray:
    files = AdapterFiles(folder)
    memory = bytearray(b"\xaa" * files.packed_size)
    try:
        files.pack(memoryview(memory), digest or adapter_digest(folder))
    finally:
        files.close()
    return memory


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("names", KINDS)
@pytest.mark.parametrize("size", [0, 1, ALIGNMENT, CHUNK - 1, 2 * CHUNK + 1])
def test_what_is_packed_comes_out(tmp_path: Path, names: tuple[str, ...], size: int) -> None:
    folder = write(tmp_path / "a", names, size)
    memory = packed(folder)
    found = unpack(memoryview(memory))
    assert {name: bytes(content) for name, content in found.items()} == {
        name: (folder / name).read_bytes() for name in names
    }
    places = json.loads(memory[LENGTH_BYTES : LENGTH_BYTES + int.from_bytes(memory[:LENGTH_BYTES], "little")])
    assert all(start % ALIGNMENT == 0 for start, _ in places.values())
    assert sum(size for _, size in places.values()) == len(names) * size


def test_the_files_are_parts_of_the_memory(tmp_path: Path) -> None:
    memory = packed(write(tmp_path / "a"))
    content = unpack(memoryview(memory))[WEIGHTS]
    content[0] ^= 0xFF
    assert unpack(memoryview(memory))[WEIGHTS][0] == content[0]


def test_open_files_can_be_read_when_their_folder_is_gone(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    digest = adapter_digest(folder)
    files = AdapterFiles(folder)
    assert files.size == 2002
    shutil.rmtree(folder)
    memory = bytearray(files.packed_size)
    files.pack(memoryview(memory), digest)
    files.close()
    assert len(unpack(memoryview(memory))) == 2


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, 1000)


def lengthen(path: Path) -> None:
    os.truncate(path, 1002)


@pytest.mark.parametrize("damage", [flip_a_bit, cut, lengthen, Path.unlink])
@pytest.mark.parametrize("name", LORA_FILES)
def test_a_damaged_copy_is_told_from_a_good_one(tmp_path: Path, damage: object, name: str) -> None:
    folder = write(tmp_path / "a")
    digest = adapter_digest(folder)
    damage(folder / name)  # type: ignore[operator]
    before = open_files()
    with pytest.raises(DamagedCopy):
        packed(folder, digest)
    assert open_files() == before


def test_a_file_that_is_cut_while_it_is_open_is_damage(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    digest = adapter_digest(folder)
    files = AdapterFiles(folder)
    cut(folder / WEIGHTS)
    with pytest.raises(DamagedCopy, match="cut short"):
        files.pack(memoryview(bytearray(files.packed_size)), digest)
    files.close()


def test_a_file_that_can_not_be_read_is_damage(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/proc/self/mem")  # reading its beginning fails, as a bad sector does
    files = AdapterFiles(folder)
    files._places[WEIGHTS] = (ALIGNMENT, 10)
    with pytest.raises(DamagedCopy, match=r"adapter_model\.safetensors can't be read: Input/output error"):
        files.pack(memoryview(bytearray(files.packed_size + 1000)), "0" * 64)
    files.close()


def test_a_folder_that_is_gone_is_not_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        AdapterFiles(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "index", [b"", b"\xff", b"[1]", b"1", b'{"a": 1}', b'{"a": [1]}', b'{"a": ["1", "2"]}', b'{"a": null}']
)
def test_other_memory_is_no_adapter(index: bytes) -> None:
    memory = len(index).to_bytes(LENGTH_BYTES, "little") + index + bytes(64)
    with pytest.raises(InvalidAdapter, match="holds no packed adapter"):
        unpack(memoryview(bytearray(memory)))
    with pytest.raises(InvalidAdapter, match="holds no packed adapter"):
        unpack(memoryview(b"\xff" * 100))

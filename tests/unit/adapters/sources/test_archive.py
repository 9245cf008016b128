"""Archives: the adapter's files come out of every kind, and nothing that was sent does harm."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import struct
import tarfile
import threading
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from preft.adapters.formats.folder_texts import TEXT_BYTES
from preft.adapters.sources.archive import MAX_ENTRIES, unpack_archive
from preft.core.errors import InvalidAdapter, Unavailable

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
REFT = ("reft_config.json", "reft_model.safetensors")
CONTENT = random.Random(0).randbytes(200_000)
ADAPTER = {CONFIG: b"{}", WEIGHTS: CONTENT}
LIMIT = 1_000_000

Packer = Callable[[list[tuple[str, bytes]]], bytes]


def packed_tar(files: list[tuple[str, bytes]], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def packed_zip(files: list[tuple[str, bytes]], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files:
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return buffer.getvalue()


PACKERS: dict[str, Packer] = {
    "tar": packed_tar,
    "gz": lambda files: packed_tar(files, "w:gz"),
    "bz2": lambda files: packed_tar(files, "w:bz2"),
    "xz": lambda files: packed_tar(files, "w:xz"),
    "zip": packed_zip,
    "stored zip": lambda files: packed_zip(files, zipfile.ZIP_STORED),
}
every_kind = pytest.mark.parametrize("kind", PACKERS)
tar_and_zip = pytest.mark.parametrize("kind", ["tar", "gz", "zip"])


@pytest.fixture
def unpack(tmp_path: Path) -> Callable[..., dict[str, bytes]]:
    def unpack(content: bytes, limit: int = LIMIT) -> dict[str, bytes]:
        archive, target = tmp_path / "archive", tmp_path / "target"
        archive.write_bytes(content)
        target.mkdir()
        unpack_archive(archive, target, limit)
        return {file.name: file.read_bytes() for file in target.iterdir()}

    return unpack


def pairs(prefix: str = "", **more: bytes) -> list[tuple[str, bytes]]:
    return [(prefix + name, content) for name, content in {**ADAPTER, **more}.items()]


@every_kind
@pytest.mark.parametrize("prefix", ["", "./", "ada/", "./users/ada/"])
def test_the_adapters_files_come_out(kind: str, prefix: str, unpack: Callable[..., object], tmp_path: Path) -> None:
    others = [("README.md", b"x"), (f"{prefix}vocab.json", b"{}"), (f"__MACOSX/{prefix}._{CONFIG}", b"x")]
    assert unpack(PACKERS[kind]([*others, *pairs(prefix), (f"{prefix}optimizer.pt", b"x" * 1000)])) == ADAPTER
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "target"]


@tar_and_zip
def test_texts_beside_an_adapter_come_out_and_others_do_not(kind: str, unpack: Callable[..., object]) -> None:
    texts = {"chat_template.jinja": b"{{ x }}", "tokenizer.json": b"x" * (TEXT_BYTES + 1)}
    files = [*pairs("ada/"), *((f"ada/{name}", content) for name, content in texts.items())]
    packed = PACKERS[kind]([("old/added_tokens.json", b"{}"), *files])
    assert unpack(packed, len(CONTENT) + 2) == ADAPTER | texts | {"tokenizer.json": b"x" * TEXT_BYTES}


@tar_and_zip
def test_an_archive_of_something_else_says_what_it_holds(kind: str, unpack: Callable[..., object]) -> None:
    with pytest.raises(InvalidAdapter, match=r"model\.safetensors in the archive belongs to a whole model"):
        unpack(PACKERS[kind]([("m/config.json", b"{}"), ("m/model.safetensors", b"x")]))


@tar_and_zip
def test_both_kinds_of_an_adapter_come_out(kind: str, unpack: Callable[..., object]) -> None:
    both = {**ADAPTER, REFT[0]: b"{}", REFT[1]: b"weights"}
    assert unpack(PACKERS[kind](list(both.items()))) == both


@every_kind
def test_the_limit_is_on_the_files_together(kind: str, unpack: Callable[..., object], tmp_path: Path) -> None:
    content = PACKERS[kind](pairs())
    assert unpack(content, len(CONTENT) + 2) == ADAPTER
    (tmp_path / "small").mkdir()
    with pytest.raises(InvalidAdapter, match=f"more than the limit of {len(CONTENT) + 1} bytes"):
        unpack_archive(tmp_path / "archive", tmp_path / "small", len(CONTENT) + 1)


@every_kind
def test_an_archive_is_unpacked_no_further_once_stopped(kind: str, tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(PACKERS[kind](pairs()))
    (tmp_path / "target").mkdir()
    stop = threading.Event()
    stop.set()
    with pytest.raises(Unavailable, match="nobody waits for it"):
        unpack_archive(tmp_path / "archive", tmp_path / "target", LIMIT, stop)


@tar_and_zip
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no adapter in it"),
        ([("README.md", b"x"), ("weights.safetensors", b"x")], "no adapter in it"),
        ([*pairs(), (CONFIG, b"[]")], "is in the archive twice"),
        ([*pairs(), (f"./{CONFIG}", b"[]")], "is in the archive twice"),
        ([(CONFIG, b"{}"), (f"ada/{WEIGHTS}", b"x")], "in more than one folder"),
        (pairs("ada/") + pairs("bob/"), "in more than one folder"),
        (pairs("../"), "no adapter in it"),
        (pairs("a/../../b/"), "no adapter in it"),
        (pairs("/etc/"), "no adapter in it"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_what_is_not_one_adapter_is_refused(
    kind: str, files: list[tuple[str, bytes]], message: str, unpack: Callable[..., object], tmp_path: Path
) -> None:
    with pytest.raises(InvalidAdapter, match=message) as raised:
        unpack(PACKERS[kind](files))
    assert raised.value.param == "archive"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "target"]


@pytest.mark.parametrize("type", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_only_regular_files_are_taken_from_a_tar(type: bytes, unpack: Callable[..., object], tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo(CONFIG)
        member.type, member.linkname = type, str(tmp_path / "secret")
        archive.addfile(member)
    with pytest.raises(InvalidAdapter, match="is not a regular file"):
        unpack(buffer.getvalue())
    assert list((tmp_path / "target").iterdir()) == []


def test_only_regular_files_are_taken_from_a_zip(unpack: Callable[..., object]) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        member = zipfile.ZipInfo(CONFIG)
        member.create_system, member.external_attr = 3, 0o120777 << 16
        archive.writestr(member, "/etc/passwd")
    with pytest.raises(InvalidAdapter, match="is not a regular file"):
        unpack(buffer.getvalue())


def test_an_encrypted_zip_is_refused(unpack: Callable[..., object]) -> None:
    content = bytearray(packed_zip(pairs()))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        for place in [i for i in range(len(content)) if content.startswith(signature, i)]:
            content[place + offset] |= 1
    with pytest.raises(InvalidAdapter, match="the archive is encrypted"):
        unpack(bytes(content))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_that_unpacks_without_bounds_is_refused(method: int, unpack: Callable[..., object]) -> None:
    with pytest.raises(InvalidAdapter, match="use deflate, or a tar file"):
        unpack(packed_zip(pairs(), method))


def test_zstd_is_named(unpack: Callable[..., object]) -> None:
    with pytest.raises(InvalidAdapter, match="zstd are not read here"):
        unpack(b"\x28\xb5\x2f\xfd" + bytes(100))


@every_kind
def test_a_truncated_archive_is_refused(kind: str, tmp_path: Path) -> None:
    content = PACKERS[kind](pairs())
    whole = content.rstrip(b"\0") if kind == "tar" else content
    cuts = {1, 100, 511, 512, 1024, 100_000, len(whole) - 1} - {len(content)}
    for cut in cuts:
        (tmp_path / "archive").write_bytes(content[:cut])
        (tmp_path / str(cut)).mkdir()
        with pytest.raises(InvalidAdapter) as raised:
            unpack_archive(tmp_path / "archive", tmp_path / str(cut), LIMIT)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content", [b"", b"x", b"PK", b"PK\x03\x04", b"\x1f\x8b", b"BZh9", b"\xfd7zXZ\0", b"x" * 99999]
)
def test_what_is_no_archive_is_refused(content: bytes, unpack: Callable[..., object]) -> None:
    with pytest.raises(InvalidAdapter, match="no tar or zip file, or a broken one"):
        unpack(content)


def test_a_tar_cut_between_two_files_is_refused(unpack: Callable[..., object]) -> None:
    both = packed_tar([*pairs(), (REFT[0], b"{}"), (REFT[1], b"weights")])
    with pytest.raises(InvalidAdapter, match="it ends without an end mark"):
        unpack(both[: both.index(REFT[0].encode())])


@every_kind
def test_damaged_bytes_never_end_otherwise(kind: str, tmp_path: Path) -> None:
    content = PACKERS[kind]([*pairs(), ("README.md", b"hello" * 200)])
    randomly = random.Random(1)
    headers = [*range(600), *range(len(content) - 12_000, len(content))]
    (target := tmp_path / "target").mkdir()
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(randomly.choice((1, 4))):
            place = (
                headers[randomly.randrange(len(headers))]
                if randomly.random() < 0.9
                else randomly.randrange(len(content))
            )
            damaged[place % len(content)] = randomly.choice((0, 1, 255, randomly.randrange(256)))
        (tmp_path / "archive").write_bytes(damaged)
        try:
            unpack_archive(tmp_path / "archive", target, LIMIT)
        except InvalidAdapter as error:
            assert "\n" not in str(error)  # noqa: PT017 - some of the damage does no harm
        for file in target.iterdir():
            file.unlink()


# Bombs


def bomb(name: str, size: int, opener: Callable[..., io.BufferedIOBase]) -> bytes:
    """A compressed tar of one file of zeros."""
    member = tarfile.TarInfo(name)
    member.size = size
    buffer = io.BytesIO()
    with opener(buffer, "wb") as file:
        file.write(member.tobuf())
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
        file.write(bytes(1024))
    return buffer.getvalue()


@pytest.mark.parametrize("opener", [gzip.open, bz2.open, lzma.open])
@pytest.mark.parametrize("name", [WEIGHTS, "optimizer.pt"])
def test_a_tar_bomb_is_stopped_at_the_limit(
    name: str, opener: Callable[..., io.BufferedIOBase], unpack: Callable[..., object], tmp_path: Path
) -> None:
    content = bomb(name, 24 << 20, opener)
    assert len(content) < LIMIT
    with pytest.raises(InvalidAdapter, match=f"unpacks to more than the limit of {LIMIT} bytes"):
        unpack(content)
    assert sum(file.stat().st_size for file in (tmp_path / "target").iterdir()) <= LIMIT


def test_a_zip_bomb_that_lies_about_its_size_is_stopped(unpack: Callable[..., object], tmp_path: Path) -> None:
    content = bytearray(packed_zip([(WEIGHTS, bytes(24 << 20))]))
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", content, content.index(signature) + offset, 100)
    with pytest.raises(InvalidAdapter):
        unpack(bytes(content))
    assert sum(file.stat().st_size for file in (tmp_path / "target").iterdir()) <= LIMIT


def test_a_header_that_unpacks_into_memory_is_stopped(unpack: Callable[..., object]) -> None:
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 80 << 20
    content = gzip.compress(member.tobuf() + bytes(80 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(InvalidAdapter, match="a header claims more than"):
            unpack(content, 1 << 30)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


@tar_and_zip
def test_too_many_files_are_refused(kind: str, unpack: Callable[..., object]) -> None:
    files = [(f"{number}", b"") for number in range(MAX_ENTRIES + 1)]
    with pytest.raises(InvalidAdapter, match=f"more than {MAX_ENTRIES} files"):
        unpack(PACKERS[kind](files), 100 << 20)


def test_a_disk_that_fails_is_not_the_archives_fault(tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(packed_tar(pairs()))
    with pytest.raises(Unavailable, match="can't be unpacked on the server's disk"):
        unpack_archive(tmp_path / "archive", tmp_path / "no such folder", LIMIT)
    with pytest.raises(Unavailable, match="can't be read"):
        unpack_archive(tmp_path / "no such archive", tmp_path, LIMIT)

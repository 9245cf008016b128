"""Sources: which files make an adapter, from folders, web servers and S3, and what is said when those fail."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from importlib.util import find_spec
from pathlib import Path

import boto3
import pytest

from preft.adapters.formats.folder_texts import TEXT_BYTES
from preft.adapters.sources.limits import SourceLimits
from preft.adapters.sources.source import AdapterSource, open_source
from preft.core.errors import InvalidAdapter, PreftError, SourceNotFound, Unavailable
from support.faulty_http import Faults, FaultyServer, serve_folder
from support.moto_s3 import BUCKET, s3_server

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
REFT_CONFIG, REFT_WEIGHTS = "reft_config.json", "reft_model.safetensors"
SIZE = 3_000_000
CONTENT = bytes(range(256)) * (SIZE // 256)


def write_files(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(CONTENT if name.endswith("safetensors") else b"{}")
    return folder


def whole(source: AdapterSource, name: str) -> bytes:
    return b"".join(source.read(name))


# Local folders


@pytest.mark.parametrize(
    "names", [(CONFIG, WEIGHTS), (REFT_CONFIG, REFT_WEIGHTS), (CONFIG, WEIGHTS, REFT_CONFIG, REFT_WEIGHTS)]
)
def test_the_files_of_a_folder_are_those_of_its_kinds(tmp_path: Path, names: tuple[str, ...]) -> None:
    write_files(tmp_path / "ada", *names, "README.md", "adapter_model.bin")
    source = open_source(str(tmp_path / "ada"))
    assert source.files() == {name: len(CONTENT) if name.endswith("safetensors") else 2 for name in names}
    assert tuple(source.files()) == names
    chunks = list(source.read(names[1]))
    assert b"".join(chunks) == CONTENT
    assert max(map(len, chunks)) == 1 << 20


def test_a_local_path_is_absolute_in_every_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_files(tmp_path / "a b", CONFIG, WEIGHTS)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for uri in (
        str(folder),
        f"{folder}/",
        "a b",
        "./x/../a b//",
        "~/a b",
        folder.as_uri(),
        f"file://localhost{folder}/",
    ):
        source = open_source(uri)
        assert source.uri == str(folder)
        assert source.files()


def test_links_are_followed(tmp_path: Path) -> None:
    real = write_files(tmp_path / "real", CONFIG, WEIGHTS)
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in real.iterdir():
        (linked / file.name).symlink_to(file)
    (tmp_path / "link").symlink_to(linked)
    source = open_source(str(tmp_path / "link"))
    assert source.files() == {CONFIG: 2, WEIGHTS: len(CONTENT)}
    assert whole(source, WEIGHTS) == CONTENT


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ((), SourceNotFound, "there is no adapter in .*it needs the files adapter_config.json and"),
        (("README.md",), SourceNotFound, "there is no adapter in"),
        ((CONFIG,), InvalidAdapter, "adapter_model.safetensors is missing in"),
        ((WEIGHTS,), InvalidAdapter, "adapter_config.json is missing in"),
        ((REFT_CONFIG,), InvalidAdapter, "reft_model.safetensors is missing in"),
        ((REFT_WEIGHTS, CONFIG, WEIGHTS), InvalidAdapter, "reft_config.json is missing in"),
        ((CONFIG, "adapter_model.bin"), InvalidAdapter, "adapter_model.bin in .* is a pickle file"),
        (("adapter_model.pt",), InvalidAdapter, "save the adapter as adapter_model.safetensors"),
    ],
)
def test_half_an_adapter_is_none(tmp_path: Path, names: tuple[str, ...], error: type[PreftError], message: str) -> None:
    source = open_source(str(write_files(tmp_path / "ada", *names)))
    for ask in (source.files, source.stamp):
        with pytest.raises(InvalidAdapter, match=message) as raised:
            ask()
        assert type(raised.value) is error


def test_what_is_not_a_folder_of_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match="there is no folder"):
        open_source(str(tmp_path / "none")).files()
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidAdapter, match="is not a folder"):
        open_source(str(tmp_path / "file")).files()
    (write_files(tmp_path / "ada", CONFIG) / WEIGHTS).mkdir()
    with pytest.raises(InvalidAdapter, match="is not a regular file"):
        open_source(str(tmp_path / "ada")).files()


def test_a_file_that_became_something_else_is_not_read(tmp_path: Path) -> None:
    source = open_source(str(write_files(tmp_path, CONFIG, WEIGHTS)))
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(InvalidAdapter, match="is missing"):
        whole(source, WEIGHTS)
    os.mkfifo(tmp_path / WEIGHTS)
    with pytest.raises(InvalidAdapter, match="is not a regular file"):
        whole(source, WEIGHTS)


def test_a_loop_of_links_can_not_be_read(tmp_path: Path) -> None:
    write_files(tmp_path, CONFIG)
    (tmp_path / WEIGHTS).symlink_to(WEIGHTS)
    source = open_source(str(tmp_path))
    with pytest.raises(Unavailable, match="can't be read"):
        source.files()
    with pytest.raises(Unavailable, match="can't be read"):
        whole(source, WEIGHTS)


def test_the_stamp_of_a_folder_changes_when_a_file_does(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "ada", CONFIG, WEIGHTS)
    source = open_source(str(folder))
    stamps = [source.stamp()]
    (folder / "README.md").write_text("no part of it")
    assert source.stamp() == stamps[0] == open_source(str(folder)).stamp()
    before = (folder / WEIGHTS).stat()
    os.utime(folder / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    stamps.append(source.stamp())
    shutil.copy2(folder / WEIGHTS, tmp_path / "copy")  # the same size and time, another file
    os.replace(tmp_path / "copy", folder / WEIGHTS)
    stamps.append(source.stamp())
    write_files(folder, REFT_CONFIG, REFT_WEIGHTS)
    stamps.append(source.stamp())
    assert len(set(stamps)) == 4


# Addresses


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("ftp://host/ada", r"from ftp://: name a local path, s3://, gs://, http://, https:// or hf://"),
        ("zip::s3://bucket/ada", "can't be read from zip::s3://"),
        ("s3://", "names no place"),
        ("", "no adapter can be at ''"),
        ("a\0b", "no adapter can be at"),
        ("a\nb", "no adapter can be at"),
        ("a" * 3000, "no adapter can be at"),
        ("file://host/ada", "write file:///absolute/path"),
        ("file://ada", "write file:///absolute/path"),
        ("http://[host/ada", "is no web address"),
        ("https://user:secret@host/ada", "with a query, a fragment or a user"),
        ("https://host/ada?token=1", "with a query"),
        ("https://host/ada#1", "a fragment"),
    ],
)
def test_an_address_that_can_not_be_read_is_refused(uri: str, message: str) -> None:
    with pytest.raises(InvalidAdapter, match=message) as raised:
        open_source(uri)
    assert raised.value.param == "source"
    assert "secret" not in str(raised.value)


@pytest.mark.skipif(find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(InvalidAdapter, match=r"needs the package gcsfs: run pip install 'preft-serve\[gs\]'") as raised:
        open_source("gs://bucket/ada")
    assert raised.value.param == "source"


@pytest.mark.parametrize(
    ("uri", "normal"),
    [
        ("s3://bucket/a/ada//", "s3://bucket/a/ada"),
        ("HTTPS://host/ada/", "https://host/ada"),
        ("hf://user/repo@v1/", "hf://user/repo@v1"),
    ],
)
def test_remote_addresses_end_without_a_slash(uri: str, normal: str) -> None:
    source = open_source(uri)
    assert source.uri == normal


# Web servers


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    write_files(tmp_path / "ada", CONFIG, WEIGHTS)
    with serve_folder(tmp_path) as server:
        yield server


def test_an_adapter_comes_from_a_web_server(server: FaultyServer) -> None:
    source = open_source(f"{server.url}/ada/", SourceLimits(30))
    assert source.files() == {CONFIG: 2, WEIGHTS: len(CONTENT)}
    chunks = list(source.read(WEIGHTS))
    assert b"".join(chunks) == CONTENT
    assert max(map(len, chunks)) <= 1 << 20
    assert [request for request in server.requests if WEIGHTS in request] == [
        f"HEAD /ada/{WEIGHTS}",
        f"GET /ada/{WEIGHTS}",
    ]


@pytest.mark.parametrize("faults", [Faults(lengthless=True), Faults(headless=True), Faults(tagless=True)])
def test_plain_web_servers_will_do(tmp_path: Path, faults: Faults) -> None:
    write_files(tmp_path / "ada", CONFIG, WEIGHTS)
    with serve_folder(tmp_path, faults) as server:
        source = open_source(f"{server.url}/ada", SourceLimits(30))
        expected = {CONFIG: None, WEIGHTS: None} if faults.lengthless else {CONFIG: 2, WEIGHTS: len(CONTENT)}
        assert source.files() == expected
        assert whole(source, WEIGHTS) == CONTENT
        assert (source.stamp() == "") is faults.tagless


def test_the_stamp_of_a_web_folder_changes_when_a_file_does(server: FaultyServer, tmp_path: Path) -> None:
    source = open_source(f"{server.url}/ada", SourceLimits(30))
    stamp = source.stamp()
    assert stamp
    assert source.stamp() == stamp
    (tmp_path / "ada" / WEIGHTS).write_bytes(CONTENT[::-1])  # as long, in the same second
    assert source.stamp() != stamp


def test_what_a_web_server_does_not_have_is_not_found(server: FaultyServer, tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match="there is no adapter in http"):
        open_source(f"{server.url}/bob", SourceLimits(30)).files()
    source = open_source(f"{server.url}/ada", SourceLimits(30))
    (tmp_path / "ada" / WEIGHTS).unlink()
    with pytest.raises(InvalidAdapter, match=r"adapter_model\.safetensors is missing in http"):
        source.files()
    with pytest.raises(InvalidAdapter, match=r"adapter_model\.safetensors is missing in http"):
        whole(source, WEIGHTS)
    (tmp_path / "ada" / "adapter_model.bin").write_text("")
    with pytest.raises(InvalidAdapter, match=r"adapter_model\.bin in http.* is a pickle file"):
        source.files()


@pytest.mark.parametrize("status", [403, 500, 503])
def test_a_web_server_that_refuses_is_unavailable(server: FaultyServer, status: int) -> None:
    server.faults.status[WEIGHTS] = status
    source = open_source(f"{server.url}/ada", SourceLimits(30))
    for ask in (source.files, source.stamp, lambda: whole(source, WEIGHTS)):
        with pytest.raises(Unavailable, match=f"{server.url}/ada can't be read: the server answered {status}"):
            ask()


@pytest.mark.parametrize("fault", ["drop_after", "cut_after"])
@pytest.mark.parametrize("after", [0, 100, 2_000_000])
def test_a_file_cut_short_on_the_way_is_noticed(server: FaultyServer, fault: str, after: int) -> None:
    setattr(server.faults, fault, after)
    with pytest.raises(Unavailable, match="can't be read"):
        whole(open_source(f"{server.url}/ada", SourceLimits(30)), WEIGHTS)


@pytest.mark.parametrize("after", [0, 100, 2_000_000])
def test_a_silent_web_server_is_given_up_in_time(server: FaultyServer, after: int) -> None:
    server.faults.stall_after = after
    started = time.monotonic()
    with pytest.raises(Unavailable, match=r"nothing came for 0\.3 seconds"):
        whole(open_source(f"{server.url}/ada", SourceLimits(0.3)), WEIGHTS)
    assert time.monotonic() - started < 10


def test_a_web_server_that_does_not_answer_is_given_up_in_time(server: FaultyServer) -> None:
    server.faults.stall = True
    source = open_source(f"{server.url}/ada", SourceLimits(0.3))
    for ask in (source.files, lambda: whole(source, WEIGHTS)):
        started = time.monotonic()
        with pytest.raises(Unavailable, match="nothing came"):
            ask()
        assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "faults",
    [Faults(stall=True), Faults(stall_after=0), Faults(stall_after=100), Faults(stall_after=2_000_000)],
    ids=["no answer", "no byte", "100 bytes", "2 MB"],
)
def test_a_reading_that_is_stopped_waits_for_nothing(tmp_path: Path, faults: Faults) -> None:
    write_files(tmp_path / "ada", CONFIG, WEIGHTS)
    stop = threading.Event()
    with serve_folder(tmp_path, faults) as server, ThreadPoolExecutor(2) as threads:
        source = open_source(f"{server.url}/ada", SourceLimits(30), stop=stop)
        asked = [threads.submit(whole, source, WEIGHTS)]
        if faults.stall:
            asked.append(threads.submit(source.files))
        assert not wait(asked, 0.3).done
        stop.set()
        for future in asked:
            with pytest.raises(Unavailable, match="nobody waits for it"):
                future.result(5)


def test_a_folder_is_read_no_further_once_stopped(tmp_path: Path) -> None:
    stop = threading.Event()
    chunks = open_source(str(write_files(tmp_path, CONFIG, WEIGHTS)), stop=stop).read(WEIGHTS)
    assert next(chunks)
    stop.set()
    with pytest.raises(Unavailable, match="nobody waits for it"):
        next(chunks)


def test_a_server_that_is_gone_is_unavailable(server: FaultyServer, tmp_path: Path) -> None:
    with serve_folder(tmp_path) as gone:
        url = gone.url
    source = open_source(f"{url}/ada", SourceLimits(30))
    for ask in (source.files, lambda: whole(source, WEIGHTS)):
        with pytest.raises(Unavailable, match="can't be read"):
            ask()


def test_a_slow_consumer_is_not_a_silent_server(server: FaultyServer) -> None:
    parts = []
    for chunk in open_source(f"{server.url}/ada", SourceLimits(1.0)).read(WEIGHTS):
        parts.append(chunk)
        time.sleep(0.6)
    assert b"".join(parts) == CONTENT


def test_a_reading_that_is_given_up_ends_its_connection(server: FaultyServer) -> None:
    source = open_source(f"{server.url}/ada", SourceLimits(30))
    for _ in range(3):
        chunks = source.read(WEIGHTS)
        next(chunks)
        del chunks
    assert whole(source, WEIGHTS) == CONTENT


def test_several_threads_read_at_once(server: FaultyServer) -> None:
    start = threading.Barrier(8)

    def read() -> bytes:
        source = open_source(f"{server.url}/ada", SourceLimits(30))
        start.wait()
        source.files()
        return whole(source, WEIGHTS)

    with ThreadPoolExecutor(8) as pool:
        contents = [future.result() for future in [pool.submit(read) for _ in range(8)]]
    assert all(content == CONTENT for content in contents)


# S3


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server():
        yield BUCKET


def put(bucket: str, key: str, content: bytes | None) -> None:
    client = boto3.client("s3")
    if content is None:
        client.delete_object(Bucket=bucket, Key=key)
    else:
        client.put_object(Bucket=bucket, Key=key, Body=content)
    client.close()


def test_an_adapter_comes_from_s3(bucket: str) -> None:
    put(bucket, f"users/ada/{CONFIG}", b"{}")
    put(bucket, f"users/ada/{WEIGHTS}", CONTENT)
    put(bucket, f"users/ada/checkpoint-1/{REFT_CONFIG}", b"{}")
    source = open_source(f"s3://{bucket}/users/ada/", SourceLimits(30))
    assert source.files() == {CONFIG: 2, WEIGHTS: len(CONTENT)}
    chunks = list(source.read(WEIGHTS))
    assert b"".join(chunks) == CONTENT
    assert max(map(len, chunks)) <= 1 << 20
    assert whole(source, CONFIG) == b"{}"


def test_the_stamp_of_an_object_changes_when_it_does(bucket: str) -> None:
    put(bucket, f"bob/{CONFIG}", b"{}")
    put(bucket, f"bob/{WEIGHTS}", b"one")
    source = open_source(f"s3://{bucket}/bob", SourceLimits(30))
    stamp = source.stamp()
    assert stamp
    assert source.stamp() == stamp
    put(bucket, f"bob/{WEIGHTS}", b"two")  # of the same size
    assert source.stamp() != stamp
    put(bucket, f"bob/{WEIGHTS}", None)
    with pytest.raises(InvalidAdapter, match=r"adapter_model\.safetensors is missing in s3://"):
        source.stamp()
    with pytest.raises(InvalidAdapter, match=r"adapter_model\.safetensors is missing in s3://"):
        whole(source, WEIGHTS)


@pytest.mark.parametrize("place", ["adapters/none", "no-such-bucket/ada"])
def test_what_is_not_in_s3_is_not_found(bucket: str, place: str) -> None:
    with pytest.raises(SourceNotFound, match=f"s3://{place}"):
        open_source(f"s3://{place}", SourceLimits(30)).files()


def test_what_is_in_s3_instead_of_an_adapter_is_told(bucket: str) -> None:
    for step in (5, 10):
        put(bucket, f"run/checkpoint-{step}/{CONFIG}", b"{}")
    put(bucket, "run/README.md", b"x")
    with pytest.raises(InvalidAdapter, match=r"in its subfolders \(checkpoint-5, checkpoint-10\): give one of these"):
        open_source(f"s3://{bucket}/run", SourceLimits(30)).files()


def test_texts_beside_an_adapter(bucket: str, server: FaultyServer, tmp_path: Path) -> None:
    """Their beginnings, wherever they are; a source that fails has none."""
    texts = {"chat_template.jinja": b"{{ x }}", "tokenizer.json": b"x" * (TEXT_BYTES + 5)}
    for name, content in {**texts, "README.md": b"x"}.items():
        (tmp_path / "ada" / name).write_bytes(content)
        put(bucket, f"cat/{name}", content)
    expected = texts | {"tokenizer.json": b"x" * TEXT_BYTES}
    for uri in (str(tmp_path / "ada"), f"{server.url}/ada", f"s3://{bucket}/cat"):
        assert open_source(uri, SourceLimits(30)).text_files() == expected
    assert open_source("http://127.0.0.1:9/ada", SourceLimits(30)).text_files() == {}


def test_several_threads_read_from_s3_at_once(bucket: str) -> None:
    put(bucket, f"eve/{CONFIG}", b"{}")
    put(bucket, f"eve/{WEIGHTS}", CONTENT)
    limits = SourceLimits(30)
    with ThreadPoolExecutor(4) as pool:
        reads = [pool.submit(lambda: whole(open_source(f"s3://{bucket}/eve", limits), WEIGHTS)) for _ in range(4)]
        assert all(read.result() == CONTENT for read in reads)


@pytest.mark.parametrize("faults", [Faults(stall=True), Faults(status={BUCKET: 503, WEIGHTS: 503})])
def test_an_s3_that_fails_is_unavailable_in_time(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: Faults
) -> None:
    with serve_folder(tmp_path, faults) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        source = open_source(f"s3://{bucket}/ada", SourceLimits(0.5))
        for ask in (source.files, lambda: whole(source, WEIGHTS)):
            started = time.monotonic()
            with pytest.raises(Unavailable, match="can't be read"):
                ask()
            assert time.monotonic() - started < 10


def test_an_object_cut_short_on_the_way_is_noticed(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path / bucket / "ada", CONFIG, WEIGHTS)
    with serve_folder(tmp_path) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        source = open_source(f"s3://{bucket}/ada", SourceLimits(30))
        assert whole(source, WEIGHTS) == CONTENT
        source = open_source(f"s3://{bucket}/ada", SourceLimits(1.5))
        server.faults.cut_after = 2_000_000
        with pytest.raises(Unavailable, match="can't be read"):
            whole(source, WEIGHTS)
        server.faults.cut_after, server.faults.stall_after = None, 2_000_000
        with pytest.raises(Unavailable, match="can't be read"):
            whole(source, WEIGHTS)

"""Damaged archives, safetensors files, adapter folders and settings files: each is refused with one clear sentence.

What is taken is whole: a damaged input never becomes half an adapter, nor changes a file elsewhere.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors import SafetensorError, safe_open

from preft.adapters.formats.base_model import BaseModel, read_base_model
from preft.adapters.formats.digest import ADAPTER_FILES, LORA_FILES, adapter_digest
from preft.adapters.formats.folder import check_adapter
from preft.adapters.formats.folder_texts import TEXT_FILES
from preft.adapters.formats.tensor_file import BrokenTensorFile, entries_in, read_entries
from preft.adapters.sources.archive import unpack_archive
from preft.adapters.sources.source import open_source
from preft.core.errors import ConfigError, InvalidAdapter, PreftError
from preft.core.settings import Settings, load_settings
from support.fuzzing import SURFACES, Inputs, no_file_left_open, share, told
from support.lora_folders import HIDDEN, write_base, write_lora
from support.mutations import DEEP, TEXTS, changed, damaged, json_bytes

pytestmark = pytest.mark.timeout(600)

LIMIT = 200_000  # bytes of an adapter
SLOWEST = 10.0  # seconds for one input, on a machine that does other things too
KINDS = ("tar", "tar:gz", "tar:bz2", "tar:xz", "zip", "stored")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return read_base_model(write_base(tmp_path_factory.mktemp("base")))


def test_all_surfaces_together_get_ten_thousand_inputs() -> None:
    assert sum(SURFACES.values()) >= 10_000


def check_sentence(text: str) -> None:
    """A refusal fits on a line of a log or a terminal, and shows no secret."""
    assert text
    assert text.isprintable()
    assert "hunter2" not in text


def write_both(folder: Path) -> Path:
    """A LoRA and a ReFT in one folder."""
    from safetensors.numpy import save_file

    write_lora(folder)
    draw = np.random.default_rng(0)
    tensors = {}
    for layer in range(2):
        for name, shape in (("rotate_layer.weight", (3, HIDDEN)), ("learned_source.weight", (3, HIDDEN))):
            tensors[f"layers.{layer}.{name}"] = draw.normal(size=shape).astype(np.float32)
        tensors[f"layers.{layer}.learned_source.bias"] = draw.normal(size=3).astype(np.float32)
    config = {"peft_type": "REFT", "method": "loreft", "r": 3, "layers": [0, 1], "positions": "f2+l3"}
    (folder / "reft_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "reft_model.safetensors")
    return folder


# Archives


def packed(source: random.Random, kind: str, files: dict[str, bytes]) -> bytes:
    """An archive of `files`, and sometimes of members that lead elsewhere."""
    members = [(name, content) for name, content in files.items()]
    for _ in range(source.choice((0, 0, 1, 3))):
        name = source.choice((*TEXTS[:12], *LORA_FILES, "a/" * 200, f"../{LORA_FILES[0]}", f"/tmp/{LORA_FILES[0]}"))
        members.insert(source.randint(0, len(members)), (name.encode(errors="ignore").decode(), b"intruder"))
    buffer = io.BytesIO()
    if kind.startswith("tar"):
        with tarfile.open(fileobj=buffer, mode=f"w{kind[3:]}") as archive:  # type: ignore[call-overload]
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                if content == b"intruder":
                    member.type = source.choice((tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE))
                    member.linkname = source.choice(("/etc/passwd", "../../precious", LORA_FILES[1]))
                archive.addfile(member, io.BytesIO(content))
        return buffer.getvalue()
    compression = zipfile.ZIP_STORED if kind == "stored" else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(buffer, "w", compression) as zipped:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            if content == b"intruder":
                info.external_attr = source.choice((0o120777, 0o100644, 0o010644)) << 16
            zipped.writestr(info, content, compression)
    return buffer.getvalue()


@share
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_archives(tmp_path: Path, base: BaseModel, kind: str, whole: bool) -> None:
    write_lora(tmp_path / "good")
    files = {name: (tmp_path / "good" / name).read_bytes() for name in LORA_FILES} | {"README.md": b"# words"}
    digest = adapter_digest(tmp_path / "good")
    assert check_adapter(tmp_path / "good", base, 8).kind == "lora"
    archive, target, precious = tmp_path / "archive", tmp_path / "target", tmp_path / "precious"
    precious.write_text("not an adapter's")
    before = {path.name for path in tmp_path.iterdir()} | {"archive"}
    inputs = Inputs("archives", whole, parts=len(KINDS), part=KINDS.index(kind))
    with no_file_left_open():
        for source in inputs:
            content = packed(source, kind, files)
            content = damaged(source, content) if source.random() < 0.85 else content
            archive.write_bytes(content)
            target.mkdir()
            began = time.monotonic()
            with told(content):
                try:
                    unpack_archive(archive, target, LIMIT)
                    check_adapter(target, base, 8)
                    inputs.took()
                    same = adapter_digest(target) == digest
                    assert same or kind in ("tar", "stored"), "a checksum held, and the content differs"
                except InvalidAdapter as error:
                    check_sentence(str(error))
                assert time.monotonic() - began < SLOWEST
                found = list(target.iterdir())
                assert {path.name for path in found} <= {*ADAPTER_FILES, *TEXT_FILES}
                assert all(path.is_file() and not path.is_symlink() for path in found)
                assert sum(path.stat().st_size for path in found) < LIMIT + 10 * len(content) + (1 << 20)
            shutil.rmtree(target)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert precious.read_text() == "not an adapter's"


# Safetensors


def spoiled_tensors(source: random.Random, content: bytes) -> bytes:
    """The file with another header, another length of it, or damaged bytes."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    kind = source.random()
    if kind < 0.3:
        return damaged(source, content)
    if kind < 0.9:
        header = json_bytes(source, json.loads(header))
    length = len(header) if kind < 0.8 else source.choice((0, 1, len(header) + 1, 2**32, 2**63, 2**64 - 1))
    return length.to_bytes(8, "little") + header + (data if kind < 0.7 else damaged(source, data))


@share
def test_safetensors_headers(tmp_path: Path, whole: bool) -> None:
    good = (write_both(tmp_path / "good") / "adapter_model.safetensors").read_bytes()
    path = tmp_path / "t.safetensors"
    inputs = Inputs("safetensors headers", whole)
    with no_file_left_open():
        for source in inputs:
            content = spoiled_tensors(source, good)
            path.write_bytes(content)
            with told(content):
                try:
                    found = {name: entry.shape for name, entry in read_entries(path).items()}
                    assert {name: entry.shape for name, entry in entries_in(memoryview(content)).items()} == found
                    inputs.took()
                except BrokenTensorFile:
                    continue
                expected = library_shapes(path)
                assert expected is None or found == expected


def library_shapes(path: Path) -> dict[str, tuple[int, ...]] | None:
    """What the safetensors library reads; None if it refuses the file."""
    try:
        with safe_open(path, "np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, UnicodeError):
        return None


@share
def test_adapter_folders(tmp_path: Path, base: BaseModel, whole: bool) -> None:
    good, folder = write_both(tmp_path / "good"), tmp_path / "folder"
    assert check_adapter(good, base, 8).kind == "lora+reft"
    inputs = Inputs("adapter folders", whole)
    with no_file_left_open():
        for source in inputs:
            shutil.copytree(good, folder)
            spoiled = folder / source.choice(ADAPTER_FILES)
            content = spoiled.read_bytes()
            is_json = spoiled.suffix == ".json"
            content = json_bytes(source, json.loads(content)) if is_json else spoiled_tensors(source, content)
            spoiled.write_bytes(content)
            with told((spoiled.name, content)):
                try:
                    open_source(str(folder)).files()
                    summary = check_adapter(folder, base, 8)
                    assert summary.kind == "lora+reft"
                    assert 1 <= summary.rank <= 8
                    inputs.took()
                except InvalidAdapter as error:
                    check_sentence(str(error))
            shutil.rmtree(folder)


# Settings

SETTINGS: dict[str, Any] = {
    "model": "/models/llama",
    "host": "127.0.0.1",
    "port": 8000,
    "allowed_hosts": ["preft.example"],
    "state": "redis://user:hunter2hunter2@store:6379/0",
    "adapters": {"alice": "/adapters/alice", "bob": "s3://bucket/bob"},
    "adapter_sources": ["s3://bucket/team", "hf://"],
    "tls": {"ca": "/ca.pem", "cert": "/cert.pem", "key": "/key.pem"},
    "prefill": {"replicas": 2, "max_loras": 8, "staging_bytes": "1GiB", "resources": {"prefill": 1}},
    "decode": {"replicas": 2, "max_num_seqs": 128, "engine_timeout": "2m", "kv_cache_bytes": 1e9},
    "store": {"disk_bytes": "64GiB", "host_bytes": 4294967296},
    "router": {"max_queue": 1024, "request_timeout": 600.0, "shares": {"batch": 0.2}},
    "scaling": {"target": 0.8, "queue_seconds": 1.0},
}
YAML_PIECES = (
    *("&a", "*a", "<<: *a", "!!python/object/apply:os.system [id]", "!!binary x", "!!int x", "!!float x", "!!bool x"),
    *(
        "!!timestamp x",
        "2001-99-99",
        "!!set {a, b}",
        "!!omap [a]",
        "!!pairs [a]",
        "? [a]\n: b",
        "{a: b, a: c}",
        "- ",
        "\t",
    ),
    *(
        "|",
        ">-",
        "---\n",
        "...\n",
        "%YAML 9.9\n",
        "'",
        '"',
        "0x",
        "0b",
        "0o7",
        "1:99:99",
        ".inf",
        ".nan",
        "=",
        "~",
        "!",
    ),
    *("9" * 5000, "1_0", "[" * DEEP, "{a: " * DEEP, "- " * DEEP, "\ufeff", "\x00", "\x85", "#", ": ", "!!str 3"),
    *("a: &b [*b]", "!!int 0b2", "!!int ''", "!!float ''", "-.", "0_", "0x_", "!!null x", "!!merge x", "!!value x"),
)


def settings_text(source: random.Random) -> bytes:
    kind = source.random()
    value = changed(source, SETTINGS) if kind < 0.7 else SETTINGS
    try:
        text = yaml.safe_dump(value, default_flow_style=source.choice((None, True, False)), allow_unicode=True)
    except (yaml.YAMLError, UnicodeError):
        text = yaml.safe_dump(SETTINGS)
    for _ in range(source.choice((0, 1, 2)) if kind < 0.7 else 2):
        at = source.randint(0, len(text))
        if source.random() < 0.5:  # in the place of a value
            at = text.find(":", at) + 1
        text = f"{text[:at]} {source.choice(YAML_PIECES)} {text[at:]}"
    content = text.encode(errors="surrogatepass")
    return damaged(source, content) if source.random() < 0.2 else content


@share
def test_settings_files(tmp_path: Path, whole: bool) -> None:
    config = tmp_path / "cluster.yaml"
    assert load_settings(overrides=SETTINGS).model_name == "llama"
    inputs = Inputs("YAML settings", whole)
    with no_file_left_open():
        for source in inputs:
            content = settings_text(source)
            config.write_bytes(content)
            began = time.monotonic()
            with told(content):
                try:
                    assert isinstance(load_settings(config), Settings)
                    inputs.took()
                except ConfigError as error:
                    check_sentence(str(error))
                except PreftError as error:
                    raise AssertionError("only a ConfigError is shown to the user") from error
                assert time.monotonic() - began < SLOWEST

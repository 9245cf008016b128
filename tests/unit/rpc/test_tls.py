"""A process's certificate: which files are refused, and what a change of the files does."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from preft.core.errors import ConfigError
from preft.core.settings import TlsSettings
from preft.rpc import tls
from preft.rpc.tls import Certificates
from support.certificates import Authority, put

SECOND = 1 / 86_400  # of a day
FORM = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def files(tmp_path: Path, authority: Authority) -> TlsSettings:
    return TlsSettings.model_validate(authority.issue(tmp_path))


@pytest.fixture(autouse=True)
def _looks_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "LOOK_SECONDS", 0.0)


def locked(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(*FORM, serialization.BestAvailableEncryption(b"a password"))


def open_key(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(*FORM, serialization.NoEncryption())


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("ca", None, "can't be read: No such file"),
        ("cert", None, "can't be read: No such file"),
        ("key", None, "can't be read: No such file"),
        ("ca", b"", "holds no certificate in PEM form"),
        ("ca", b"\x00\xff" * 100, "holds no certificate in PEM form"),
        ("cert", b"no PEM", "holds no certificate in PEM form"),
        ("key", b"no PEM", "holds no private key in PEM form"),
        ("key", locked(ec.generate_private_key(ec.SECP256R1())), "in PEM form without a password"),
        ("key", open_key(ec.generate_private_key(ec.SECP256R1())), "isn't the key of"),
        ("key", open_key(rsa.generate_private_key(65537, 2048)), "isn't the key of"),
    ],
)
def test_files_that_are_no_certificate_are_named(
    files: TlsSettings, file: str, content: bytes | None, says: str
) -> None:
    path: Path = getattr(files, file)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^tls\.{file}: {path} .*{says}") as caught:
        Certificates(files)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"days": (-2, -1)}, "certificate has expired"),
        ({"days": (1, 2)}, "certificate is not yet valid"),
        ({"name": "127.0.0.1"}, "not valid for 'preft'"),
    ],
)
def test_a_certificate_that_others_would_refuse_is_refused_at_the_start(
    tmp_path: Path, authority: Authority, change: dict[str, object], says: str
) -> None:
    files = TlsSettings.model_validate(authority.issue(tmp_path, **change))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"^tls\.cert: .*{tmp_path}/cert\.pem: .*{says}"):
        Certificates(files)


def test_a_certificate_of_another_authority_is_refused(files: TlsSettings) -> None:
    put(files.ca, Authority("another").ca)
    with pytest.raises(ConfigError, match=r"^tls\.cert: other processes would refuse .*issuer"):
        Certificates(files)


def test_several_authorities_may_be_in_one_file(files: TlsSettings) -> None:
    put(files.ca, Authority("the next one").ca + files.ca.read_bytes())
    Certificates(files)


def test_a_change_of_the_files_is_seen(files: TlsSettings, authority: Authority) -> None:
    certificates = Certificates(files)
    first = certificates.current()
    assert certificates.current() is first
    put(files.key, files.key.read_bytes())
    assert certificates.current() is first, "equal content opens no new connections"
    authority.issue(files.cert.parent)
    second = certificates.current()
    assert (second.ca, second.cert, second.key) == tuple(
        path.read_bytes() for path in (files.ca, files.cert, files.key)
    )
    assert second != first
    assert certificates.current() is second
    Authority("another").issue(files.cert.parent)
    assert certificates.current().ca != second.ca


def test_a_look_at_the_files_costs_nothing_on_most_calls(
    files: TlsSettings, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "LOOK_SECONDS", 3600.0)
    certificates = Certificates(files)
    first = certificates.current()
    authority.issue(files.cert.parent)
    assert certificates.current() is first


@pytest.mark.parametrize("harm", ["expired", "broken", "gone", "half replaced"])
def test_a_new_file_that_others_would_refuse_changes_nothing(
    files: TlsSettings, authority: Authority, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    certificates = Certificates(files)
    first = certificates.current()
    folder = files.cert.parent
    match harm:
        case "expired":
            authority.issue(folder, days=(-2, -1))
        case "broken":
            put(files.cert, b"-----BEGIN CERTIFICATE-----\n")
        case "gone":
            files.ca.unlink()
        case "half replaced":
            authority.issue(folder / "next")
            (folder / "next" / "cert.pem").replace(files.cert)
    caplog.set_level(logging.INFO, "preft")
    assert [certificates.current() for _ in range(5)] == [first] * 5
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.startswith("the last good certificate stays in use: tls.")
    assert str(folder) in warning
    assert first.key.decode().split()[4] not in caplog.text
    authority.issue(folder)
    assert certificates.current().cert == files.cert.read_bytes() != first.cert
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


async def test_a_certificate_that_becomes_valid_is_used_then(files: TlsSettings, authority: Authority) -> None:
    """The clocks of two machines differ."""
    certificates = Certificates(files)
    authority.issue(files.cert.parent, days=(3 * SECOND, 1))
    assert certificates.current().cert != files.cert.read_bytes()
    async with asyncio.timeout(20):
        while certificates.current().cert != files.cert.read_bytes():
            await asyncio.sleep(0.1)


def test_the_key_is_shown_nowhere(files: TlsSettings) -> None:
    pem = Certificates(files).current()
    assert "PRIVATE KEY" not in repr(pem) + repr(files) + files.model_dump_json()

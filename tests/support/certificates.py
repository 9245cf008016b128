"""Certificates: one for 127.0.0.1 that signs itself, and those of a cluster's processes, which an authority signs."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAYS = (-1.0, 1.0)  # from and until when a certificate is valid, from now
NAME = "preft"


class Authority:
    """A certificate authority of a test. `ca` is its own certificate in PEM form."""

    def __init__(self, name: str = "an authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        basic = x509.BasicConstraints(ca=True, path_length=None)
        builder = _builder(self._name, self._name, self._key, DAYS).add_extension(basic, critical=True)
        self.ca = _pem(builder.sign(self._key, hashes.SHA256()))

    def issue(self, folder: Path, *, name: str = NAME, days: tuple[float, float] = DAYS) -> dict[str, str]:
        """Writes a new certificate in `folder`, over an older one; returns the setting `tls` of a process with it."""
        key = ec.generate_private_key(ec.SECP256R1())
        alternative = x509.SubjectAlternativeName([x509.DNSName(name)])
        builder = _builder(_name(name), self._name, key, days).add_extension(alternative, critical=False)
        certificate = _pem(builder.sign(self._key, hashes.SHA256()))
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in (("ca", self.ca), ("cert", certificate), ("key", _key_pem(key))):
            put(folder / f"{file}.pem", content)
        return {file: str(folder / f"{file}.pem") for file in ("ca", "cert", "key")}


def put(path: Path, content: bytes) -> None:
    """Replaces the file at once, as operators should."""
    unfinished = path.with_suffix(".new")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def write_certificate(folder: Path) -> tuple[Path, Path]:
    """The paths of a certificate for 127.0.0.1 that signs itself, and its key, both new."""
    key, name = ec.generate_private_key(ec.SECP256R1()), _name("127.0.0.1")
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    builder = _builder(name, name, key, DAYS).add_extension(alternative, critical=False)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "cert.pem", folder / "key.pem"
    paths[0].write_bytes(_pem(builder.sign(key, hashes.SHA256())))
    paths[1].write_bytes(_key_pem(key))
    return paths


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: tuple[float, float]
) -> x509.CertificateBuilder:
    first, last = (datetime.now(UTC) + timedelta(days=count) for count in days)
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
    return builder.not_valid_before(first).not_valid_after(last)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, *form)

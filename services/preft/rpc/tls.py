"""This process's certificate for the other processes of its cluster, read again when its files change.

Owns the checks of the files, and gRPC's credentials made of them. `secret` opens ports and channels with them.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from preft.core.errors import ConfigError
from preft.core.settings import TlsSettings

logger = logging.getLogger(__name__)

NAME = "preft"  # in the certificate of every process, because the addresses of workers change
LOOK_SECONDS = 1.0  # between two looks at the files


@dataclass(frozen=True, slots=True)
class Pem:
    """The content of the three files."""

    ca: bytes
    cert: bytes
    key: bytes = field(repr=False)

    def for_channel(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.ca, self.key, self.cert)

    def for_server(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(self.key, self.cert)], self.ca)


class Certificates:
    """The files of one process. gRPC's own threads use it too."""

    def __init__(self, files: TlsSettings) -> None:
        """Raises ConfigError, with the setting's name, for files that other processes would refuse."""
        self._files = files
        self._lock = threading.Lock()
        self._seen = self._refused = _state_of(files)
        self._pem = _read(files)
        self._next_look = time.monotonic() + LOOK_SECONDS

    def current(self) -> Pem:
        """The files' content, at most LOOK_SECONDS old: the same object until the content changes.

        Files that other processes would refuse change nothing; a warning says so once.
        """
        with self._lock:
            if time.monotonic() >= self._next_look:
                self._look()
                self._next_look = time.monotonic() + LOOK_SECONDS
            return self._pem

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials for one port. Each new connection is answered with the current certificate, and must show one."""
        shown = self.current()

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal shown
            if shown is (pem := self.current()):
                return None
            shown = pem
            return pem.for_server()

        return grpc.dynamic_ssl_server_credentials(shown.for_server(), changed, require_client_authentication=True)

    def _look(self) -> None:
        seen = _state_of(self._files)
        if seen == self._seen:
            return
        try:
            pem = _read(self._files)
        except ConfigError as error:
            if seen != self._refused:
                self._refused = seen
                logger.warning("the last good certificate stays in use: %s", error)
            return  # the next look tries again: the certificate may become valid only then
        if _state_of(self._files) != seen:
            return  # the files change at this moment
        self._seen = seen
        if pem != self._pem:
            self._pem = pem
            logger.info("new connections use the new certificate in %s", self._files.cert)


def _state_of(files: TlsSettings) -> list[tuple[int, int, int] | None]:
    """Differs after each change of a file."""
    states: list[tuple[int, int, int] | None] = []
    for path in (files.ca, files.cert, files.key):
        try:
            found = path.stat()
        except OSError:
            states.append(None)
        else:
            states.append((found.st_ino, found.st_size, found.st_mtime_ns))
    return states


def _read(files: TlsSettings) -> Pem:
    """The files' content. Raises ConfigError unless two processes with these files accept each other."""
    pem = Pem(_bytes("ca", files.ca), _bytes("cert", files.cert), _bytes("key", files.key))
    try:
        _check_form("ca", files.ca)
        _check_form("cert", files.cert)
        client, server = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        for context in (client, server):
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(files.ca)
            context.load_cert_chain(files.cert, files.key, password=lambda: b"")  # without a password, Python asks
        _shake_hands(client, server)
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(f"tls.cert: other processes would refuse {files.cert}: {error.verify_message}") from error
    except ssl.SSLError as error:
        if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):
            raise ConfigError(f"tls.key: {files.key} isn't the key of {files.cert}") from error
        if error.reason is None:
            raise ConfigError(f"tls.key: {files.key} holds no private key in PEM form without a password") from error
        raise ConfigError(f"tls.cert: other processes would refuse {files.cert}: {error.reason}") from error
    except OSError as error:
        raise ConfigError(f"tls: a file can't be read any more: {error}") from error
    return pem


def _bytes(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"tls.{name}: {path} can't be read: {error.strerror}") from error


def _check_form(name: str, path: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        raise ConfigError(f"tls.{name}: {path} holds no certificate in PEM form") from error


def _shake_hands(client: ssl.SSLContext, server: ssl.SSLContext) -> None:
    """A handshake in memory, in which both sides check the other's certificate. Raises ssl.SSLError."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    caller = client.wrap_bio(to_client, to_server, server_hostname=NAME)
    called = server.wrap_bio(to_server, to_client, server_side=True)
    for end in (caller, called, caller):
        with suppress(ssl.SSLWantReadError):
            end.do_handshake()
    called.do_handshake()

"""The subcommands' client of a running server: JSON, events and uploads, with the standard library alone.

Knows no endpoints. Ignores the environment's proxies: such proxies lead to the outside.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from preft.core.environment import API_KEY, URL, value_of
from preft.core.errors import ConfigError, PreftError, Unavailable
from preft.core.settings import host_and_port, variable_of
from preft.core.web import reachable

DEFAULT_PORT = 8000
TIMEOUT_SECONDS = 120.0  # of silence
UPLOAD_TIMEOUT_SECONDS = 600.0  # the server sends nothing while it checks and stores an upload
_JSON = {"Content-Type": "application/json"}


def add_server(parser: argparse.ArgumentParser) -> None:
    """Adds `--url` and `--api-key`.

    The default of `--url` is PREFT_URL, or else the server that the same environment starts on this machine.
    """
    default = value_of(os.environ, URL) or _url_of_settings(os.environ)
    parser.add_argument("--url", default=default, help=f"the server's address (default: {default})")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"the server's API key; every user of this machine can read it here, unlike in {API_KEY} (the default)",
    )


def api_key_of(args: argparse.Namespace) -> str:
    """The API key of the flag or the environment; "" for none. Raises ConfigError, which doesn't show the key."""
    key = (args.api_key or value_of(os.environ, API_KEY) or "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise ConfigError(f"--api-key or {API_KEY}: an API key has visible ASCII characters alone")
    return key


def server_of(args: argparse.Namespace) -> Server:
    """The server that the arguments of `add_server` name. Raises ConfigError."""
    return Server(args.url, api_key_of(args))


def _url_of_settings(environ: Mapping[str, str]) -> str:
    host, port = address_in(environ)
    return f"http://{host_and_port(reachable(host), port)}"


def address_in(environ: Mapping[str, str]) -> tuple[str, int]:
    """Host and port on which a server with this environment, and without flags or a settings file, listens."""
    host = value_of(environ, variable_of(("host",))) or "127.0.0.1"
    port = value_of(environ, variable_of(("port",))) or ""
    return host, int(port) if port.isdecimal() else DEFAULT_PORT


@dataclass(frozen=True, slots=True)
class Server:
    """The server at `url`. Threads may share it.

    All calls raise PreftError with the server's own sentence if it refuses, Unavailable if no server answers,
    ConfigError if `url` isn't an address.
    """

    url: str
    api_key: str = field(default="", repr=False)

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The decoded JSON answer, None if the answer is empty."""
        with self._asked(method, path, None if body is None else json.dumps(body).encode(), _JSON) as reply:
            answer = reply.read()
        return self._decoded(path, answer)

    def upload(self, path: str, parts: Iterable[bytes], size: int) -> Any:
        """PUTs the `size` bytes of `parts`; returns the decoded JSON answer. Errors of `parts` pass through."""
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        with self._asked("PUT", path, parts, headers, UPLOAD_TIMEOUT_SECONDS) as reply:
            answer = reply.read()
        return self._decoded(path, answer)

    def events(self, method: str, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The server-sent events as they arrive. Raises for an error event, and for a stream without its end."""
        with self._asked(method, path, json.dumps(body).encode(), _JSON) as reply:
            if reply.headers.get_content_type() != "text/event-stream":
                raise PreftError(f"{self.url}{path} didn't answer with events: is this a PreFT server?")
            for line in reply:
                if not line.startswith(b"data: "):  # a comment, or the empty line after an event
                    continue
                data = line.removeprefix(b"data: ").strip()
                if data == b"[DONE]":
                    return
                event = self._decoded(path, data)
                if "error" in event:
                    raise PreftError(event["error"]["message"])
                yield event
            raise Unavailable(f"the server at {self.url} broke off: try again, and look at its log if it does so again")

    @contextmanager
    def _asked(
        self,
        method: str,
        path: str,
        data: bytes | Iterable[bytes] | None,
        headers: dict[str, str],
        timeout: float = TIMEOUT_SECONDS,
    ) -> Iterator[http.client.HTTPResponse]:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"--url must start with http:// or https://, not {self.url!r}")
        try:
            address = urlsplit(self.url)
            kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
            with closing(kind(address.netloc, timeout=timeout)) as connection:
                if self.api_key:
                    headers = {**headers, "Authorization": f"Bearer {self.api_key}"}
                with suppress(BrokenPipeError, ConnectionResetError):  # the server may have replied before it closed
                    connection.request(method, address.path.rstrip("/") + path, data, headers)
                reply = connection.getresponse()
                if reply.status >= 300:
                    raise PreftError(_sentence(reply))
                yield reply
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Unavailable(
                f"{self.url} closed the connection half-way: try again; "
                "if a proxy is in between, look at its limit on a request's size"
            ) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unavailable(
                f"no server answers at {self.url} ({error}): "
                "start one with `preft serve`, or name its address with --url or PREFT_URL"
            ) from error

    def _decoded(self, path: str, answer: bytes) -> Any:
        try:
            return json.loads(answer) if answer else None
        except ValueError as error:
            raise PreftError(f"{self.url}{path} didn't answer with JSON: is this a PreFT server?") from error


def _sentence(reply: http.client.HTTPResponse) -> str:
    """The server's message: from an OpenAI-style error body, else the status line."""
    try:
        message = json.loads(reply.read())["error"]["message"]
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        message = None
    return message if isinstance(message, str) and message else f"the server answered {reply.status} {reply.reason}"

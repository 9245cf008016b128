"""A running server, as the subcommands talk to it: JSON over HTTP with the standard library. Knows no endpoints."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from preft.core.errors import ConfigError, PreftError, Unavailable

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_SECONDS = 120.0  # adding an adapter reads, checks and copies its weights

# Proxies are for the way out; one set in the environment would be asked for 127.0.0.1 too.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def add_url(parser: argparse.ArgumentParser) -> None:
    """Adds `--url`, which falls back to PREFT_URL and then to this machine."""
    default = os.environ.get("PREFT_URL", DEFAULT_URL)
    parser.add_argument("--url", default=default, help=f"the server's address (default: {default})")


@dataclass(frozen=True, slots=True)
class Server:
    """The server at `url`."""

    url: str

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The decoded JSON answer, None if it is empty.

        Raises PreftError with the server's own sentence if it refuses, Unavailable if nobody answers, ConfigError if
        the address isn't one.
        """
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"--url must start with http:// or https://, not {self.url!r}")
        data = None if body is None else json.dumps(body).encode()
        headers = {} if data is None else {"Content-Type": "application/json"}
        try:
            request = urllib.request.Request(self.url.rstrip("/") + path, data, headers, method=method)
            with _DIRECT.open(request, timeout=TIMEOUT_SECONDS) as reply:
                answer = reply.read()
        except urllib.error.HTTPError as error:
            raise PreftError(_sentence(error)) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unavailable(
                f"no server answers at {self.url} ({getattr(error, 'reason', error)}): "
                "start one with `preft serve`, or name its address with --url or PREFT_URL"
            ) from error
        try:
            return json.loads(answer) if answer else None
        except ValueError as error:
            raise PreftError(f"{self.url}{path} didn't answer with JSON: is this a PreFT server?") from error


def _sentence(error: urllib.error.HTTPError) -> str:
    """What the server said, from an OpenAI-style error body, else the status line."""
    try:
        message = json.loads(error.read())["error"]["message"]
    except (OSError, ValueError, KeyError, TypeError):
        message = None
    return message if isinstance(message, str) and message else f"the server answered {error.code} {error.reason}"

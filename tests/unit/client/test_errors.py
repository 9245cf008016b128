"""The client's errors mirror the server's, and are made of HTTP bodies and of gRPC's trailing metadata alike."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

import preft_client
from preft.core import errors as server
from preft_client import errors
from support.fakes import Script
from support.sdk_clients import a_client
from support.sdk_gateway import ScriptedGateway

INTERNAL = (
    server.WorkerFull,
    server.PreftError,
)  # clients never see the first; the second has the client's ServerError
SHOWN = [cls for cls in server.ERROR_MAP if cls not in INTERNAL]


def test_every_error_of_the_server_has_its_class() -> None:
    for cls in SHOWN:
        mirrored = errors.BY_CODE[server.ERROR_MAP[cls].code]
        assert mirrored.__name__ == cls.__name__
        parents = [one.__name__ for one in mirrored.__mro__ if issubclass(one, errors.PreftError)]
        assert parents == [one.__name__ for one in cls.__mro__ if issubclass(one, server.PreftError)]
    assert errors.BY_CODE[server.ERROR_MAP[server.PreftError].code] is errors.ServerError


def test_the_tree_in_the_docstring_is_the_real_one() -> None:
    doc = errors.__doc__ or ""
    drawn = [line.split("──")[1].split()[0] for line in doc.splitlines() if "──" in line]
    assert sorted(drawn) == sorted(cls.__name__ for cls in errors._below(errors.PreftError)[1:])
    assert set(drawn) | {"PreftError"} <= set(preft_client.__all__)


@pytest.mark.parametrize("cls", SHOWN, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("late", [False, True], ids=["at-once", "in-the-stream"])
def test_an_error_is_the_same_over_both_transports(
    scripted: Any, way: tuple[str, str], gateway: ScriptedGateway, cls: type[server.PreftError], late: bool
) -> None:
    error = cls("the reason") if not issubclass(cls, server.InvalidRequest) else cls("the reason", "prompt")
    tokens = (40, 41, 42)
    gateway.scripts[:] = [Script(tokens, fail=error, fail_after=1 if late else None)]
    with pytest.raises(errors.PreftError, match="the reason") as raised:
        scripted.generate("hi", model="base", max_tokens=10)
    mapping = server.ERROR_MAP[cls]
    found = raised.value
    assert type(found).__name__ == cls.__name__
    assert (found.code, str(found)) == (mapping.code, "the reason")
    assert found.param == ("prompt" if issubclass(cls, server.InvalidRequest) else None)
    has_wait = issubclass(cls, server.QueueFull | server.ShuttingDown)
    if not late or way[0] == "grpc":  # an event of a stream has no headers
        assert (found.retry_after is not None) == has_wait
    assert found.status == (mapping.status if way[0] == "http" and not late else None)


def test_an_unexpected_error_of_the_server(scripted: Any, gateway: ScriptedGateway) -> None:
    gateway.scripts[:] = [Script(fail=RuntimeError("/srv/secret"))]
    with pytest.raises(errors.PreftError, match="unexpected error") as raised:
        scripted.generate("hi", model="base")
    assert isinstance(raised.value, errors.ServerError | errors.EngineFailed)


@pytest.mark.parametrize(
    ("status", "body", "cls"),
    [
        (502, b"<html>bad gateway</html>", errors.Unavailable),
        (503, b"", errors.Unavailable),
        (504, b"<html>", errors.DeadlineExceeded),
        (404, b"not here", errors.NotSupported),
        (401, b"", errors.Unauthenticated),
        (403, b"{}", errors.NotAllowed),
        (413, b'{"error": {"message": "too large", "code": "new_code", "param": null}}', errors.InvalidRequest),
        (429, b"[1]", errors.QueueFull),
        (500, b'{"error": {"message": "x", "code": "new_code"}}', errors.ServerError),
        (500, b'{"error": "x"}', errors.ServerError),
        (418, b"", errors.InvalidRequest),
    ],
)
def test_answers_of_proxies_and_of_newer_servers(status: int, body: bytes, cls: type[errors.PreftError]) -> None:
    error = errors.error_from_http(status, {"retry-after": "3"}, body, "http://host")
    assert type(error) is cls
    assert (error.status, error.retry_after) == (status, 3.0)
    assert str(error)


@pytest.mark.parametrize("header", ["Wed, 21 Oct 2026 07:28:00 GMT", "-1", "nan", "inf", "1e9", ""])
def test_a_wait_that_is_no_number_of_seconds_is_ignored(header: str) -> None:
    assert errors.error_from_http(429, {"retry-after": header}, b"", "u").retry_after is None


@pytest.mark.parametrize(
    ("status", "details", "cls"),
    [
        ("UNAVAILABLE", "failed to connect to all addresses", errors.ConnectionFailed),
        ("UNAVAILABLE", "Socket closed", errors.ConnectionFailed),
        ("CANCELLED", "", errors.ConnectionFailed),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", errors.DeadlineExceeded),
        ("UNIMPLEMENTED", "Method not found!", errors.NotSupported),
        ("UNAUTHENTICATED", "", errors.Unauthenticated),
        ("PERMISSION_DENIED", "", errors.NotAllowed),
        ("RESOURCE_EXHAUSTED", "message too large", errors.InvalidRequest),
        ("INTERNAL", "", errors.ServerError),
    ],
)
def test_statuses_without_a_code(status: str, details: str, cls: type[errors.PreftError]) -> None:
    error = errors.error_from_rpc(status, details, {}, "grpc://host:1")
    assert type(error) is cls
    if isinstance(error, errors.ConnectionFailed):
        assert error.sent == ("failed to connect" not in details)


def test_a_server_that_is_not_preft(way: tuple[str, str]) -> None:
    """Any web page, or any other JSON: one sentence, and no exception of httpx or grpc."""

    class Page(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            body = b'{"hello": 1}' if self.path == "/v1/workers" else b"<html>hello</html>"
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer

        def log_message(self, *args: Any) -> None:
            pass

    page = HTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=page.serve_forever)
    thread.start()
    try:
        with a_client(way[1], f"{way[0]}://127.0.0.1:{page.server_port}", retries=0, timeout=30) as client:
            calls = [lambda: client.adapters.get("a"), lambda: client.generate("hi", model="base"), client.ready]
            for call in (*calls, client.workers) if way[0] == "http" else calls:
                with pytest.raises((errors.BadReply, errors.ConnectionFailed, errors.ServerError)):
                    call()
    finally:
        page.shutdown()
        thread.join()
        page.server_close()

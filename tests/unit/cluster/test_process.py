"""What each server process has."""

from __future__ import annotations

import logging
import resource
import socket

import pytest

from preft.cluster.process import ENOUGH_FILES, LEAST_FILES, listen_on, raise_file_limit
from preft.core.errors import ConfigError

ANY = resource.RLIM_INFINITY


def test_a_server_may_open_as_many_files_as_the_system_allows() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[0] - 1, before[1]))
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The limits of another system; `hard` may be changed."""
    now = {"soft": 100, "hard": 0}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (now["soft"], now["hard"]))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, new: now.update(soft=new[0], hard=new[1]))
    return now


@pytest.mark.parametrize(("hard", "warns"), [(LEAST_FILES, True), (ENOUGH_FILES, False), (ANY, False)])
def test_a_low_limit_is_said(limits: dict[str, int], hard: int, warns: bool, caplog: pytest.LogCaptureFixture) -> None:
    limits["hard"] = hard
    with caplog.at_level(logging.WARNING):
        raise_file_limit()
    assert limits == {"soft": hard, "hard": hard}
    assert [record.getMessage().startswith(f"this process may open {hard} files") for record in caplog.records] == (
        [True] if warns else []
    )


def test_a_limit_with_which_ray_does_not_start_is_refused(limits: dict[str, int]) -> None:
    limits["hard"] = LEAST_FILES - 1
    with pytest.raises(ConfigError, match=rf"may open {LEAST_FILES - 1} files at once, and needs .*ulimit -Hn"):
        raise_file_limit()


@pytest.mark.parametrize(
    ("host", "bound"),
    [("127.0.0.3", "127.0.0.3"), ("0.0.0.0", "0.0.0.0"), ("::1", "::1"), ("::", "::"), ("localhost", "127.0.0.1")],
)
def test_where_a_server_listens(host: str, bound: str) -> None:
    with listen_on(host, 0) as listener:
        assert listener.getsockname()[0] == bound


@pytest.mark.parametrize("host", ["no.such.host.invalid", "[::1]", "", "x" * 70, "a\0b", "192.0.2.1"])
def test_a_worker_s_mistake_names_its_setting(host: str) -> None:
    with pytest.raises(ConfigError, match=r"^worker\.host: can't listen on .*; choose another with --host$"):
        listen_on(host, 0, "worker.")


def test_a_taken_port_is_the_port_s_mistake() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^worker\.port: can't listen on 127\.0\.0\.1:{port}: Address already"):
            listen_on("127.0.0.1", port, "worker.")

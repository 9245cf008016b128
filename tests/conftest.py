"""What all tests share: Ctrl-C as a terminal has it, no settings from the environment, and a Redis server.

A shell's background job ignores SIGINT, and so would every process that tests start.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from support import redis_server as redis

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

for name in [name for name in os.environ if name.startswith("PREFT_")]:
    del os.environ[name]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tests of the Redis store are never skipped: without the server no test runs."""
    needed = any("redis_server" in getattr(item, "fixturenames", ()) for item in session.items)
    if needed and not session.config.option.collectonly and not redis.is_installed():
        pytest.exit(redis.MISSING, returncode=1)


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.RedisServer]:
    with redis.running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_server(shared_redis: redis.RedisServer) -> redis.RedisServer:
    """The session's server, empty. A test that ends it starts it again."""
    shared_redis.start()
    shared_redis.empty()
    return shared_redis

"""gRPC options with which a caller notices a silent peer: a lost machine or a frozen process.

Without pings, a stream from such a peer would end only with its time limit. gRPC's own threads answer pings, so a
process that is busy in Python answers too.
"""

from __future__ import annotations

PING_SECONDS = 5.0  # between pings during a call
PING_TIMEOUT_SECONDS = 10.0  # an unanswered ping ends the connection, and its calls with UNAVAILABLE

ACCEPT_PINGS = [("grpc.http2.min_ping_interval_without_data_ms", 1000)]
"""Server options: by default a server disconnects callers that ping more often than every five minutes."""


def ping_options() -> list[tuple[str, int]]:
    """Channel options."""
    return [
        ("grpc.keepalive_time_ms", round(PING_SECONDS * 1000)),
        ("grpc.http2.ping_timeout_ms", round(PING_TIMEOUT_SECONDS * 1000)),
        ("grpc.http2.max_pings_without_data", 0),  # no limit
    ]

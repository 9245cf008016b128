"""gRPC options by which a caller notices a peer that is gone without a word: a machine lost, a process frozen.

Nothing on the wire says so, and a stream from such a peer would only end with its time limit. Pings are answered by
gRPC's own threads, so a peer that is merely busy in Python answers them.
"""

from __future__ import annotations

PING_SECONDS = 5.0  # between pings, while a call is under way
PING_TIMEOUT_SECONDS = 10.0  # without an answer the connection is given up, and its calls end as UNAVAILABLE

ACCEPT_PINGS = [("grpc.http2.min_ping_interval_without_data_ms", 1000)]
"""Server options: by default a server hangs up on callers that ping it more often than every five minutes."""


def ping_options() -> list[tuple[str, int]]:
    """Channel options."""
    return [
        ("grpc.keepalive_time_ms", round(PING_SECONDS * 1000)),
        ("grpc.http2.ping_timeout_ms", round(PING_TIMEOUT_SECONDS * 1000)),
        ("grpc.http2.max_pings_without_data", 0),  # no limit
    ]

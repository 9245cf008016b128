"""gRPC options of every worker's server, and of its substitutes in tests and benchmarks."""

from __future__ import annotations

from preft.rpc.liveness import ACCEPT_PINGS

MAX_MESSAGE_BYTES = 64 << 20  # a prompt of a million tokens; more than a frame of KV
HANDSHAKE_MS = 10_000  # a connection that isn't set up by then is closed; gRPC's own limit is two minutes

WORKER_SERVER_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
    *ACCEPT_PINGS,
]

"""The `preft` command, as a newer version might be: `python -m support.newer_version newer|same real|fake ARGUMENTS`.

The registrations, catalog entries, calls, answers and KV headers of a newer version have a field that this version
doesn't know. `fake` engines are those of `fake_worker`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import grpc

import preft
from preft.cli import main
from preft.rpc.secret import ClusterChannel
from preft.state.records import Records
from preft.transfer import grpc_push
from support.fake_worker import fake_engines

FIELD = "added_by_a_newer_version"
NUMBER = 1000  # of the field in every message
UNKNOWN = b"\xc0\x3e\x01"  # field 1000, a varint: 1
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def longer(serialize: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    return lambda message: serialize(message) + UNKNOWN


def with_longer(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """`options` of a call or a handler; raw bytes stay as they are."""
    serialize = options.get(name)
    return options if serialize is None else {**options, name: longer(serialize)}


def become_newer() -> None:
    preft.__version__ = "99.0"
    write = Records.write
    Records.write = lambda self, value: json.dumps({**json.loads(write(self, value)), FIELD: [1]})  # type: ignore[method-assign]
    carrying = ClusterChannel._carrying

    def carrying_longer(self: ClusterChannel, kind: str, *method: Any, **options: Any) -> Callable[..., Any]:
        return carrying(self, kind, *method, **with_longer("request_serializer", options))

    ClusterChannel._carrying = carrying_longer  # type: ignore[method-assign]
    for kind in KINDS:
        handler = getattr(grpc, f"{kind}_rpc_method_handler")
        setattr(
            grpc,
            f"{kind}_rpc_method_handler",
            lambda serve, handler=handler, **options: handler(serve, **with_longer("response_serializer", options)),
        )
    to_proto = grpc_push.header_to_proto

    class LongerHeader:
        def __init__(self, header: Any) -> None:
            self._message = to_proto(header)

        def SerializeToString(self) -> bytes:
            return bytes(self._message.SerializeToString()) + UNKNOWN

    grpc_push.header_to_proto = LongerHeader  # type: ignore[assignment]


if __name__ == "__main__":
    version, engines, *arguments = sys.argv[1:]
    if version == "newer":
        become_newer()
    if engines == "fake":
        fake_engines()
    sys.exit(main(arguments))

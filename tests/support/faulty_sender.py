"""A KvSender with faults on demand, between a real prefill worker and a real decode worker."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import AsyncIterator
from enum import Enum, auto

from preft.core.errors import TransferFailed
from preft.core.request import KvHeader
from preft.rpc.secret import ClusterSecret
from preft.transfer.grpc_push import GrpcKvSender

NOBODY = "127.0.0.1:9"  # the discard port: no process listens there


class Fault(Enum):
    """The fault in a push."""

    CORRUPT_BYTE = auto()  # one bit of one byte flips on the wire
    TRUNCATE = auto()  # the last bytes are missing
    STALE_HANDLE = auto()  # the KV arrives under another handle than expected
    OTHER_ADAPTER = auto()  # the header names another adapter
    OTHER_LAYOUT = auto()  # the header names another KV layout
    VANISHED_RECEIVER = auto()  # no process listens at the address


class FaultySender(GrpcKvSender):
    """The real sender, except that the next `count` pushes suffer `fault`."""

    def __init__(self, secret: ClusterSecret) -> None:
        super().__init__(secret)
        self.fault: Fault | None = None
        self.count = 0
        self.pushes = 0
        self.receivers: Counter[str] = Counter()  # pushes by receiver address

    def arm(self, fault: Fault, count: int) -> None:
        self.fault, self.count = fault, count

    async def push(self, address: str, header: KvHeader, payload: memoryview, *, timeout: float) -> None:
        self.pushes += 1
        self.receivers[address] += 1
        if self.count <= 0:
            self.fault = None
        self.count -= 1
        match self.fault:
            case Fault.STALE_HANDLE:
                header = dataclasses.replace(header, handle="0" * 32 + str(self.pushes))
            case Fault.OTHER_ADAPTER:
                header = dataclasses.replace(header, adapter_digest="f" * 64)
            case Fault.OTHER_LAYOUT:
                header = dataclasses.replace(header, fingerprint="another")
            case Fault.VANISHED_RECEIVER:
                address = NOBODY
        try:
            await super().push(address, header, payload, timeout=timeout)
        except TransferFailed:
            assert self.fault is not None
            raise

    async def frames(self, payload: memoryview) -> AsyncIterator[bytes]:
        fault = self.fault
        async for frame in super().frames(payload):
            if fault is Fault.CORRUPT_BYTE:
                fault = None
                frame = frame[:40] + bytes([frame[40] ^ 1]) + frame[41:]
            if fault is Fault.TRUNCATE:
                fault = None
                frame = frame[:-100]
            yield frame

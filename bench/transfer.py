"""KV push over gRPC against raw TCP, and over TLS against without, side by side: `python -m bench.transfer`.

Each receiver is a process of its own; sender and receivers keep the bytes in staging arenas. The raw TCP side does the
minimum: blocking sockets, no checksum, no handle. The gRPC side does all that the workers do, from the sender's
checksum to the receiver's verified, ready handle. Runs alternate, so that all sides see the same machine. The TLS side
needs the program `openssl`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import grpc.aio

from preft.core.request import KvHeader
from preft.core.settings import TlsSettings
from preft.memory.arena import StagingArena, span_of
from preft.rpc.secret import ClusterSecret
from preft.rpc.server_options import WORKER_SERVER_OPTIONS
from preft.rpc.tls import Certificates
from preft.transfer.grpc_push import GrpcKvSender
from preft.transfer.grpc_receive import kv_transfer_handler
from preft.transfer.handles import HandleTable
from preft.transfer.port import checksum_of, hash_prompt
from preft.transfer.receive import KvReceiver
from preft_loadgen.child import bound
from preft_loadgen.table import table

MiB = 1 << 20
RUNS: Mapping[int, int] = MappingProxyType({16 * MiB: 45, 128 * MiB: 15})  # runs per size in bytes; the median counts
TIMEOUT = 60.0  # seconds for anything
SECRET_TEXT = "of both processes"
SECRET = ClusterSecret(SECRET_TEXT)


@dataclass(frozen=True, slots=True)
class TransferFigure:
    """Median seconds to move `num_bytes` each way; `checksum` is the sender's part of the gRPC time without TLS."""

    num_bytes: int
    tcp: float
    grpc: float
    tls: float
    checksum: float

    @property
    def ratio(self) -> float:
        """gRPC's speed divided by raw TCP's."""
        return self.tcp / self.grpc

    @property
    def tls_ratio(self) -> float:
        """The speed with TLS divided by the speed without."""
        return self.grpc / self.tls


def measure(runs: Mapping[int, int] = RUNS) -> list[TransferFigure]:
    """One figure per size (bytes), with so many runs each. Starts three receiver processes and ends them."""
    with (
        tempfile.TemporaryDirectory(prefix="preft-bench-") as folder,
        _receiver("tcp", max(runs)) as tcp_port,
        _receiver("grpc", max(runs)) as grpc_port,
        _receiver("grpc", max(runs), _certificate(Path(folder))) as tls_port,
    ):
        return asyncio.run(_measure(runs, tcp_port, f"127.0.0.1:{grpc_port}", f"127.0.0.1:{tls_port}", Path(folder)))


def _certificate(folder: Path) -> Path:
    """Makes a certificate that signs itself, for both processes; returns `folder`."""
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=preft"
    command += " -addext subjectAltName=DNS:preft -keyout key.pem -out cert.pem"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return folder


def _secret_with(folder: Path | None) -> ClusterSecret:
    """The secret, with the certificate in `folder`."""
    if folder is None:
        return SECRET
    cert = folder / "cert.pem"
    return ClusterSecret(SECRET_TEXT, Certificates(TlsSettings(ca=cert, cert=cert, key=folder / "key.pem")))


async def _measure(
    runs: Mapping[int, int], tcp_port: int, grpc_address: str, tls_address: str, folder: Path
) -> list[TransferFigure]:
    arena = StagingArena.create(span_of(max(runs)))
    region = await arena.reserve(max(runs), timeout=TIMEOUT)
    memory = arena.view(region)
    memory[:] = bytes(range(256)) * (max(runs) // 256) + bytes(max(runs) % 256)
    sender, tls_sender = GrpcKvSender(SECRET), GrpcKvSender(_secret_with(folder))
    tcp = socket.create_connection(("127.0.0.1", tcp_port))
    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    figures = []
    try:
        for size, repeats in runs.items():
            payload = memory[:size]
            times = []
            for number in range(repeats + 1):
                start = time.perf_counter()
                _send_tcp(tcp, payload)
                sent = time.perf_counter()
                checksum = checksum_of(payload)
                summed = time.perf_counter()
                header = KvHeader(f"{size}-{number}", "bench", "", 1, size, checksum, 1, hash_prompt([0]))
                await sender.push(grpc_address, header, payload, timeout=TIMEOUT)
                pushed = time.perf_counter()
                checksum_of(payload)  # as the side without TLS has done
                await tls_sender.push(tls_address, header, payload, timeout=TIMEOUT)
                times.append((sent - start, pushed - sent, time.perf_counter() - pushed, summed - sent))
            figures.append(
                TransferFigure(size, *(statistics.median(column) for column in zip(*times[1:], strict=True)))
            )
    finally:
        await sender.close()
        await tls_sender.close()
        tcp.close()
        arena.release(region)
        arena.close()
    return figures


def _send_tcp(connection: socket.socket, payload: memoryview) -> None:
    connection.sendall(len(payload).to_bytes(8, "little"))
    connection.sendall(payload)
    if connection.recv(1) != b"k":
        raise ConnectionError("the raw TCP receiver went away")


@contextmanager
def _receiver(kind: str, capacity: int, certificate: Path | None = None) -> Iterator[int]:
    """The port of a receiver process that ends with the context."""
    command = [sys.executable, "-m", "bench.transfer", "--receive", kind, "--capacity", str(capacity)]
    command += ["--certificate", str(certificate)] if certificate else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # works without an installation
    with subprocess.Popen(
        bound(command), env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()


def _receive_tcp(capacity: int) -> None:
    arena = StagingArena.create(span_of(capacity))
    memory = arena.view(asyncio.run(arena.reserve(capacity, timeout=TIMEOUT)))

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            while size := int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "little"):
                position = 0
                while position < size:
                    position += connection.recv_into(memory[position:size])
                connection.sendall(b"k")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        print(listener.getsockname()[1], flush=True)
        sys.stdin.read()  # until the parent ends


async def _receive_grpc(capacity: int, certificate: Path | None) -> None:
    arena = StagingArena.create(span_of(capacity))
    handles = HandleTable(arena, fingerprint="bench", lease=0)  # a handle is freed as soon as it is ready
    receiver = KvReceiver(arena, handles, room_timeout=TIMEOUT, frame_timeout=TIMEOUT)
    server = grpc.aio.server(options=WORKER_SERVER_OPTIONS)
    secret = _secret_with(certificate)
    server.add_generic_rpc_handlers((kv_transfer_handler(receiver, secret),))
    if secret.certificates is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", secret.certificates.server_credentials())
    await server.start()
    print(port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(None)


def report(figures: Sequence[TransferFigure]) -> str:
    """The printed table."""
    head = ["KV push to another process", "raw TCP", "gRPC", "with TLS", "gRPC/TCP", "with/without TLS", "checksum"]
    rows = []
    for figure in figures:
        speeds = (figure.num_bytes / seconds / 1e9 for seconds in (figure.tcp, figure.grpc, figure.tls))
        row = [f"{figure.num_bytes / MiB:.0f} MiB", *(f"{speed:.2f} GB/s" for speed in speeds)]
        row += [f"{figure.ratio:.2f}", f"{figure.tls_ratio:.2f}"]
        rows.append([*row, f"{figure.checksum * 1e3:.1f} of {figure.grpc * 1e3:.1f} ms"])
    return table([head, *rows], right=range(1, len(head)))


def main() -> None:
    """Prints the table, or receives in a child process."""
    parser = argparse.ArgumentParser(description="KV push over gRPC against raw TCP, between two processes.")
    parser.add_argument("--receive", choices=["tcp", "grpc"], help=argparse.SUPPRESS)
    parser.add_argument("--capacity", type=int, default=max(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--certificate", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.receive == "tcp":
        _receive_tcp(arguments.capacity)
    elif arguments.receive == "grpc":
        asyncio.run(_receive_grpc(arguments.capacity, arguments.certificate))
    else:
        print(report(measure()))


if __name__ == "__main__":
    main()

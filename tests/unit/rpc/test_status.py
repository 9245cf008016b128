"""An error raised in a server reaches the client as the same class with the same sentence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from preft.core.errors import (
    ERROR_MAP,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    PreftError,
    TransferFailed,
    WorkerLost,
)
from preft.rpc import workers_pb2, workers_pb2_grpc
from preft.rpc.status import abort, error_from_rpc


class Failing(workers_pb2_grpc.DecodeWorkerServicer):
    """Release fails with whatever the test put into `error`."""

    error: PreftError | tuple[grpc.StatusCode, str]
    delay = 0.0

    async def Release(self, request: Any, context: Any) -> Any:
        await asyncio.sleep(self.delay)
        if isinstance(self.error, PreftError):
            await abort(context, self.error)
        else:
            await context.abort(*self.error)


@pytest.fixture
async def failing() -> AsyncIterator[tuple[Failing, Any]]:
    servicer, server = Failing(), grpc.aio.server()
    workers_pb2_grpc.add_DecodeWorkerServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield servicer, workers_pb2_grpc.DecodeWorkerStub(channel)
    await server.stop(None)


async def call(stub: Any, **options: Any) -> PreftError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Release(workers_pb2.ReleaseRequest(handle="h"), **options)
    return error_from_rpc(caught.value, "decode-0")


@pytest.mark.parametrize("cls", [cls for cls in ERROR_MAP if cls is not PreftError], ids=lambda cls: cls.__name__)
async def test_every_error_keeps_its_class(failing: tuple[Failing, Any], cls: type[PreftError]) -> None:
    servicer, stub = failing
    servicer.error = cls("layer 3: ümläut is wrong")
    error = await call(stub)
    assert type(error) is cls
    assert str(error) == "layer 3: ümläut is wrong"


async def test_an_unexpected_error_counts_against_the_peer(failing: tuple[Failing, Any]) -> None:
    servicer, stub = failing
    servicer.error = PreftError("The server met an unexpected error.")
    error = await call(stub)
    assert type(error) is EngineFailed
    assert str(error) == "worker decode-0: The server met an unexpected error."


def test_a_lost_status_is_a_lost_worker() -> None:
    lost = grpc.aio.AioRpcError(
        grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), details="Internal error from Core"
    )
    assert type(error_from_rpc(lost, "decode-0")) is WorkerLost


async def test_the_parameter_travels(failing: tuple[Failing, Any]) -> None:
    servicer, stub = failing
    servicer.error = InvalidRequest("too long", param="prompt")
    error = await call(stub)
    assert isinstance(error, InvalidRequest)
    assert error.param == "prompt"


async def test_a_bare_status_is_read_by_its_code(failing: tuple[Failing, Any]) -> None:
    servicer, stub = failing
    servicer.error = (grpc.StatusCode.DATA_LOSS, "checksum")
    error = await call(stub)
    assert type(error) is TransferFailed
    assert str(error) == "worker decode-0: checksum"


async def test_no_server_is_a_lost_worker() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        assert type(await call(workers_pb2_grpc.DecodeWorkerStub(channel))) is WorkerLost


async def test_an_expired_call_is_a_deadline(failing: tuple[Failing, Any]) -> None:
    servicer, stub = failing
    servicer.error, servicer.delay = InvalidRequest("too late"), 60.0
    assert type(await call(stub, timeout=0.2)) is DeadlineExceeded

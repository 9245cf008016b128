"""Translates between PreftError and gRPC status, both directions, and to messages for streams that survive an error.

The status code alone is ambiguous (UNAVAILABLE is a busy or a dead worker), so a server also sends the error's own code
and the wrong parameter in trailing metadata. A status without this metadata is gRPC's own: the peer is gone or late.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio

from preft.core.errors import (
    ERROR_MAP,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    ModelNotFound,
    PreftError,
    TransferFailed,
    Unavailable,
    WorkerLost,
    mapping_of,
)
from preft.rpc import workers_pb2

logger = logging.getLogger(__name__)

CODE_KEY = "preft-error-code"
PARAM_KEY = "preft-error-param"

_BY_CODE: dict[str, type[PreftError]] = {mapping.code: cls for cls, mapping in ERROR_MAP.items()}
_BY_STATUS: dict[grpc.StatusCode, type[PreftError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: ModelNotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAVAILABLE: WorkerLost,
    grpc.StatusCode.CANCELLED: WorkerLost,  # a stopping server cancels its calls; own cancels don't come here
    grpc.StatusCode.UNKNOWN: EngineFailed,
    grpc.StatusCode.INTERNAL: EngineFailed,
    grpc.StatusCode.DATA_LOSS: TransferFailed,
    grpc.StatusCode.UNIMPLEMENTED: EngineFailed,
    grpc.StatusCode.UNAUTHENTICATED: Unavailable,  # the peer has another cluster_secret
}


@asynccontextmanager
async def errors_reported(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    """Ends the server's call with the error that leaves the context. The text of an unexpected error isn't sent."""
    try:
        yield
    except PreftError as error:
        await abort(context, error)
    except grpc.aio.BaseError:
        raise  # the call has ended already
    except Exception:
        logger.exception("a call broke")
        await abort(context, EngineFailed("an internal error ended the call"))


async def abort(context: grpc.aio.ServicerContext, error: PreftError) -> None:
    """Ends the server's call with `error`. Never returns: `context.abort` raises."""
    trailing = [(CODE_KEY, mapping_of(error).code)]
    if isinstance(error, InvalidRequest) and error.param is not None:
        trailing.append((PARAM_KEY, error.param))
    await context.abort(grpc.StatusCode[mapping_of(error).grpc], str(error), trailing_metadata=tuple(trailing))


def error_from_rpc(error: grpc.aio.AioRpcError, peer: str) -> PreftError:
    """The PreftError for a failed call to `peer`. `peer` is a worker's id or address, for the message."""
    trailing = {key: value for key, value in error.trailing_metadata() or ()}
    cls = _BY_CODE.get(str(trailing.get(CODE_KEY, "")))
    if cls is not None:
        param = trailing.get(PARAM_KEY)
        return _made(cls, error.details() or cls.__name__, None if param is None else str(param))
    cls = _BY_STATUS.get(error.code(), EngineFailed)
    return cls(f"worker {peer}: {error.details() or error.code().name}")


def error_to_proto(error: PreftError) -> workers_pb2.Error:
    param = error.param if isinstance(error, InvalidRequest) else None
    return workers_pb2.Error(code=mapping_of(error).code, message=str(error), param=param)


def error_from_proto(message: workers_pb2.Error) -> PreftError:
    """Inverse of `error_to_proto`; an EngineFailed for an unknown code."""
    cls = _BY_CODE.get(message.code, EngineFailed)
    return _made(cls, message.message, message.param if message.HasField("param") else None)


def _made(cls: type[PreftError], message: str, param: str | None) -> PreftError:
    return cls(message, param=param) if issubclass(cls, InvalidRequest) else cls(message)

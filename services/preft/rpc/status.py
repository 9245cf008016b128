"""Translates between PreftError and gRPC status, both directions, and to messages for streams that survive an error.

The status code alone is ambiguous (UNAVAILABLE is a busy or a dead worker), so a server also sends trailing metadata:
the error's own code (`preft-code`), the wrong parameter (`preft-param`), and the seconds until another attempt makes
sense (`retry-after`). A status without this metadata is gRPC's own: the peer is gone or late.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio

from preft.core.errors import (
    ERROR_MAP,
    UNEXPECTED,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    ModelNotFound,
    PreftError,
    RateLimited,
    TransferFailed,
    Unavailable,
    WorkerLost,
    mapping_of,
    retry_seconds,
    short,
)
from preft.core.limits import rate_headers
from preft.rpc import workers_pb2

logger = logging.getLogger(__name__)

CODE_KEY = "preft-code"
PARAM_KEY = "preft-param"
RETRY_KEY = "retry-after"

# PreftError itself stands for a peer's unexpected error, and arrives as an EngineFailed.
_BY_CODE = {mapping.code: cls for cls, mapping in ERROR_MAP.items() if cls is not PreftError}
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


def status_lost(code: grpc.StatusCode, details: str | None) -> bool:
    """Whether grpc.aio has lost the status of a call that the server ended while the client wrote.

    grpc.aio then puts this error of its own in its place.
    """
    return code is grpc.StatusCode.INTERNAL and details == "Internal error from Core"


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
        await abort(context, PreftError(UNEXPECTED))


async def abort(context: grpc.aio.ServicerContext, error: PreftError) -> None:
    """Ends the server's call with `error`. Never returns: `context.abort` raises."""
    mapping = mapping_of(error)
    trailing = [(CODE_KEY, mapping.code)]
    if isinstance(error, InvalidRequest) and error.param:
        trailing.append((PARAM_KEY, error.param))
    if (seconds := retry_seconds(error)) is not None:
        trailing.append((RETRY_KEY, str(seconds)))
    if isinstance(error, RateLimited) and error.standing is not None:
        trailing += rate_headers(error.standing)
    await context.abort(grpc.StatusCode[mapping.grpc], short(str(error)), trailing_metadata=tuple(trailing))


def error_from_rpc(error: grpc.aio.AioRpcError, peer: str) -> PreftError:
    """The PreftError for a failed call to `peer`. `peer` is a worker's id or address, for the message."""
    trailing = {key: value for key, value in error.trailing_metadata() or ()}
    cls = _BY_CODE.get(str(trailing.get(CODE_KEY, "")))
    if cls is not None:
        param = trailing.get(PARAM_KEY)
        return _made(cls, error.details() or cls.__name__, None if param is None else str(param))
    lost = status_lost(error.code(), error.details())
    cls = WorkerLost if lost else _BY_STATUS.get(error.code(), EngineFailed)
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

"""Between PreftError and gRPC status, both directions: the one place where either becomes the other.

The status code alone is ambiguous (UNAVAILABLE is a busy or a dead worker), so a server also sends the error's own code
and the offending parameter in the trailing metadata. An error without them is gRPC's own: the peer is gone, or late.
"""

from __future__ import annotations

import grpc
import grpc.aio

from preft.core.errors import (
    ERROR_MAP,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    ModelNotFound,
    PreftError,
    QueueFull,
    TransferFailed,
    Unavailable,
    WorkerLost,
    mapping_of,
)

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
    grpc.StatusCode.CANCELLED: WorkerLost,  # a server that stops cancels its calls; our own cancels don't come here
    grpc.StatusCode.UNKNOWN: EngineFailed,
    grpc.StatusCode.INTERNAL: EngineFailed,
    grpc.StatusCode.DATA_LOSS: TransferFailed,
    grpc.StatusCode.UNIMPLEMENTED: EngineFailed,
}


async def abort(context: grpc.aio.ServicerContext, error: PreftError) -> None:
    """Ends the server's call with `error`. Never returns: `context.abort` raises."""
    trailing = [(CODE_KEY, mapping_of(error).code)]
    if isinstance(error, InvalidRequest) and error.param is not None:
        trailing.append((PARAM_KEY, error.param))
    await context.abort(grpc.StatusCode[mapping_of(error).grpc], str(error), trailing_metadata=tuple(trailing))


def error_from_rpc(error: grpc.aio.AioRpcError, peer: str) -> PreftError:
    """The PreftError behind a failed call to `peer`, a worker's id or address for the message."""
    trailing = {key: value for key, value in error.trailing_metadata() or ()}
    cls = _BY_CODE.get(str(trailing.get(CODE_KEY, "")))
    if cls is not None:
        message = error.details() or cls.__name__
        if issubclass(cls, InvalidRequest):
            param = trailing.get(PARAM_KEY)
            return cls(message, param=None if param is None else str(param))
        return QueueFull(message) if cls is QueueFull else cls(message)
    cls = _BY_STATUS.get(error.code(), EngineFailed)
    return cls(f"worker {peer}: {error.details() or error.code().name}")

"""Errors as the public gRPC services report them. `preft.rpc.status` carries errors within the cluster."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import grpc

from preft.core.errors import UNEXPECTED, InvalidRequest, PreftError, QueueFull, ShuttingDown, mapping_of, short

logger = logging.getLogger(__name__)


@asynccontextmanager
async def errors_reported(context: Any) -> AsyncIterator[None]:
    """Ends the call with the error's gRPC code. Trailing metadata: `preft-code`, `preft-param`, `retry-after`.

    The text of an unexpected error is logged, and isn't sent.
    """
    try:
        yield
    except PreftError as error:
        await _abort(context, error)
    except grpc.aio.BaseError:
        raise  # the call has ended already
    except Exception:
        logger.exception("a call broke")
        await _abort(context, PreftError(UNEXPECTED))


async def _abort(context: Any, error: PreftError) -> NoReturn:
    mapping = mapping_of(error)
    trailing = [("preft-code", mapping.code)]
    if isinstance(error, InvalidRequest) and error.param:
        trailing.append(("preft-param", error.param))
    if isinstance(error, QueueFull | ShuttingDown):
        trailing.append(("retry-after", str(math.ceil(error.retry_after))))
    await context.abort(grpc.StatusCode[mapping.grpc], short(str(error)), tuple(trailing))
    raise AssertionError("abort returns never")

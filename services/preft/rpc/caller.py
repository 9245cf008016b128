"""The name that a caller gives itself in each call, for counts of use by caller. It proves nothing: `secret` does."""

from __future__ import annotations

import grpc.aio

from preft.rpc.checked import text_of
from preft.rpc.secret import CALLER_KEY


def caller_of(context: grpc.aio.ServicerContext) -> str:
    """The caller's name; "" if the call has none. Raises InvalidRequest for a name with control characters."""
    for key, value in context.invocation_metadata() or ():
        if key == CALLER_KEY:
            return text_of(str(value), "caller")
    return ""

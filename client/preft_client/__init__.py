"""The client of PreFT Serve: one interface over HTTP and gRPC, `Client` to block and `AsyncClient` for asyncio."""

from __future__ import annotations

from preft_client.adapters import Adapters, AsyncAdapters
from preft_client.async_client import AsyncClient
from preft_client.client import Client
from preft_client.errors import (
    AdapterExists,
    AdapterUnavailable,
    BadReply,
    ConfigError,
    ConnectionFailed,
    DeadlineExceeded,
    EngineFailed,
    InvalidAdapter,
    InvalidRequest,
    ModelNotFound,
    NotAllowed,
    NotSupported,
    NumbersNotFinite,
    PreftError,
    QueueFull,
    RateLimited,
    ServerError,
    ShuttingDown,
    SourceNotFound,
    StreamBroken,
    TooManyBytes,
    TransferFailed,
    Unauthenticated,
    Unavailable,
    WorkerLost,
)
from preft_client.parameters import Message, Parameters, Prompt
from preft_client.results import (
    Adapter,
    AdapterPage,
    AdapterPlace,
    Choice,
    Delta,
    Generation,
    Parsed,
    TokenLogprob,
    Usage,
    Worker,
)
from preft_client.settings import TLS
from preft_client.streams import AsyncStream, Stream

__version__ = "0.1.0"

__all__ = [
    "TLS",
    "Adapter",
    "AdapterExists",
    "AdapterPage",
    "AdapterPlace",
    "AdapterUnavailable",
    "Adapters",
    "AsyncAdapters",
    "AsyncClient",
    "AsyncStream",
    "BadReply",
    "Choice",
    "Client",
    "ConfigError",
    "ConnectionFailed",
    "DeadlineExceeded",
    "Delta",
    "EngineFailed",
    "Generation",
    "InvalidAdapter",
    "InvalidRequest",
    "Message",
    "ModelNotFound",
    "NotAllowed",
    "NotSupported",
    "NumbersNotFinite",
    "Parameters",
    "Parsed",
    "PreftError",
    "Prompt",
    "QueueFull",
    "RateLimited",
    "ServerError",
    "ShuttingDown",
    "SourceNotFound",
    "Stream",
    "StreamBroken",
    "TokenLogprob",
    "TooManyBytes",
    "TransferFailed",
    "Unauthenticated",
    "Unavailable",
    "Usage",
    "Worker",
    "WorkerLost",
]

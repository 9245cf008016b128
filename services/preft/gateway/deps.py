"""The objects and limits that the gateway is built from: one object for `create_app` and `serve_grpc`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from preft.core.cluster import AdapterPlace, Role, RouterStats, WorkerSeen
from preft.core.errors import Unavailable
from preft.core.ports import AdapterCatalog, Generator
from preft.gateway.access.access import Access
from preft.gateway.access.caller import Caller
from preft.gateway.cluster_metrics import ClusterMetrics, OwnFigures
from preft.gateway.drain import Drain
from preft.gateway.metrics import MeteredGenerator
from preft.gateway.readiness import missing_workers
from preft.gateway.text.parsing import Parsers
from preft.gateway.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from preft.gateway.access.accounts import Account, Accounts
    from preft.gateway.api_call import ApiCall


@dataclass(frozen=True, slots=True)
class GatewayDeps:
    """Lengths are in tokens (`max_model_len`: prompt and output together); `created` is in seconds since 1970.

    `max_body_bytes` limits each HTTP request except adapter uploads, which `max_adapter_bytes` limits. `upload_folder`
    holds uploads while they arrive (None: the system's temporary folder). `places` (by digest), `workers` and `stats`
    are the router's, for an adapter's workers, /v1/workers and metrics. `allowed_hosts` are the server's names beside
    loopback's. `allowed_origins` are the origins whose pages may use it. The constructor wraps `generator` so that
    `registry` counts every request over HTTP or gRPC: one registry per object.

    `access` None: there are no API keys, and `anyone` is the caller of every request. Only callers' catalogs answer
    requests. `accounts` None: calls are neither limited nor recorded. `parsers` None: no output of a chat is parsed.
    """

    model_name: str
    tokenizer: Tokenizer
    max_model_len: int
    generator: Generator
    catalog: AdapterCatalog
    model_root: str = ""  # shown as the base model's origin
    created: int = field(default_factory=lambda: int(time.time()))
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    max_body_bytes: int = 32 << 20
    max_adapter_bytes: int = 2 << 30
    upload_folder: Path | None = None
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    places: Callable[[str], Sequence[AdapterPlace]] = lambda digest: ()
    workers: Callable[[], Iterable[WorkerSeen]] = tuple
    stats: Callable[[], RouterStats] = RouterStats
    catalog_age: Callable[[], float] = lambda: 0.0  # seconds since the catalog was read
    roles: tuple[Role, ...] = (Role.PREFILL, Role.DECODE)  # of workers that must be ready
    drain: Drain = field(default_factory=Drain)
    access: Access | None = None
    accounts: Accounts | None = None
    parsers: Parsers | None = None
    anyone: Caller = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "anyone", Caller(self.catalog))
        object.__setattr__(self, "generator", MeteredGenerator(self.generator, self.registry))
        own = OwnFigures(self.stats, lambda: not self.unready(), self.catalog_age)
        ClusterMetrics(self.workers, own, self.roles, self.registry)

    def account(self, call: ApiCall, caller: Caller) -> Account | None:
        """The account of `call`, for `Completion`."""
        return self.accounts.open(call, caller) if self.accounts is not None else None

    def unready(self) -> str:
        """The reason why requests can't be served now; "" if they can."""
        if self.drain.begun:
            return "the server is shutting down"
        if not self.generator.ready():
            return missing_workers(self.workers(), self.roles)
        try:
            self.catalog.list()
        except Unavailable as error:
            return str(error)
        return ""

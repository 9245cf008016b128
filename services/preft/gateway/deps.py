"""What the gateway is built from. The one object that `create_app` and `serve_grpc` take."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from preft.core.ports import AdapterCatalog, Generator
from preft.gateway.metrics import MeteredGenerator
from preft.gateway.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class GatewayDeps:
    """`max_model_len` in tokens, prompt and output together; `max_body_bytes` per HTTP request; `created` in seconds.

    `generator` is wrapped so that every request, over HTTP or gRPC, is counted in `registry`: one registry per object.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "generator", MeteredGenerator(self.generator, self.registry))

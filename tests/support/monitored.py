"""What `/metrics` exports after some requests, and the expressions of the deployed dashboard and alerts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml
from fastapi import FastAPI

from preft.core.cluster import Role, RouterStats, Tier, TierTotals, Worker, WorkerSeen, WorkerState, WorkerStatus
from preft.core.errors import WorkerLost
from preft.core.request import GenerateRequest
from preft.gateway.deps import GatewayDeps
from preft.gateway.http.app import create_app
from preft.gateway.text.tokenizer import Tokenizer
from support.fakes import FakeCatalog, FakeGenerator, Script

DEPLOY = Path(__file__).parents[2] / "deploy"


def app_with_workers(tokenizer: Tokenizer) -> FastAPI:
    """A gateway's app with a worker of each role. Requests for more than 8 tokens lose their worker."""
    tiers = TierTotals(slots_used=2, hits={Tier.SLOT: 3}, loads={Tier.DISK: 1}, load_seconds={Tier.DISK: 0.5})
    busy = WorkerStatus(kv_blocks_used=5, staging_bytes_used=300, tiers=tiers)
    workers = [
        WorkerSeen(Worker("p", Role.PREFILL, "h:1", kv_blocks=9, staging_bytes=900, adapter_slots=8),
                   WorkerState.READY, busy, 0.1),
        WorkerSeen(Worker("d", Role.DECODE, "h:2", kv_blocks=7, staging_bytes=900), WorkerState.READY, busy, 0.1),
    ]  # fmt: skip

    def script(request: GenerateRequest) -> Script:
        lost = request.sampling.max_tokens > 8
        return Script((70, 71, 72), delay=0.001, fail=WorkerLost("gone") if lost else None)

    catalog = FakeCatalog.of(ann="/adapters/ann")
    stats = RouterStats(2, {"p": 1}, retries=1, resumes=1, refused=1, longest_wait=0.5, leases=4, waited=2.0)
    deps = GatewayDeps(
        "base", tokenizer, 64, FakeGenerator(script), catalog, workers=lambda: workers, stats=lambda: stats
    )
    return create_app(deps)


def send_some(client: httpx.Client) -> None:
    """Requests of both kinds that end well, and others that fail."""
    for model in ("base", "ann"):
        for count, status in ((3, 200), (9, 503)):
            body = {"model": model, "prompt": "hi", "max_tokens": count}
            assert client.post("/v1/completions", json=body).status_code == status


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    return dict(json.loads((DEPLOY / "grafana" / "dashboards" / "preft.json").read_text()))


def targets() -> Iterator[tuple[str, str, str]]:
    """Panel's title, expression and legend of each line in the dashboard, with Grafana's variables filled in."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$__rate_interval", "1m").replace("$gateway", ".*")
            yield panel["title"], expression, target["legendFormat"]

"""The use of the server, per finished API call: a line of JSON for billing, and Prometheus metrics per tenant.

Neither holds a prompt, an answer or a key.
"""

from __future__ import annotations

import json
import logging
import os
import queue
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from logging.handlers import QueueListener, WatchedFileHandler
from pathlib import Path
from typing import Protocol

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from preft.core.errors import ConfigError

logger = logging.getLogger(__name__)

SERIES = 100  # pairs of tenant and adapter with series of their own; all others share one
OTHERS = ("(others)", "(others)")
REMEMBERED = 10 * SERIES  # pairs of which the activity is known
HALVED_AFTER = 10_000  # calls, after which each pair's past activity counts half


@dataclass(frozen=True, slots=True)
class Usage:
    """One finished API call. Times are in seconds since 1970. `adapter` is the name without the tenant; "": none.

    `status` and `code` are those of HTTP ("ok" and 200 for a complete answer); 499: the client left early, or the
    server shut down.
    """

    request_id: str
    tenant: str
    key: str
    adapter: str
    digest: str
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    status: int
    code: str
    started: float
    ended: float


class Recorder(Protocol):
    """Takes note of finished calls. Never blocks, never raises."""

    def record(self, usage: Usage) -> None: ...


class UsageLog:
    """Appends a line per call to a file, in a thread of its own. A file that was renamed or removed is made anew."""

    def __init__(self, path: Path) -> None:
        """Opens the file, which only its owner can read if it is new. Raises ConfigError."""
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
            self._file = _Lines(path, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"usage_log: {path} can't be written: {error.strerror}") from error
        self._lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
        self._thread = QueueListener(self._lines, self._file)
        self._thread.start()

    def record(self, usage: Usage) -> None:
        self._lines.put(logging.makeLogRecord({"msg": json.dumps(asdict(usage))}))

    def close(self) -> None:
        """Writes all lines."""
        self._thread.stop()
        self._file.close()


class _Lines(WatchedFileHandler):
    """Warns once of lines that can't be written."""

    _failing = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._failing:
            logger.exception("usage records are lost: %s can't be written", self.baseFilename)
        self._failing = True


class UsageMetrics(Collector):
    """Calls and tokens by tenant and adapter, for the SERIES most active pairs; all others are counted together.

    Each call counts in exactly one series, and a series never shrinks. A pair that becomes twice as active as the least
    active one takes its place, and counts from then on; the other series ends.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._totals: dict[tuple[str, str], list[int]] = {}
        self._others = [0, 0, 0]
        self._active: dict[tuple[str, str], float] = {}
        self._calls = 0
        registry.register(self)

    def record(self, usage: Usage) -> None:
        pair = usage.tenant, usage.adapter
        self._active[pair] = self._active.get(pair, 0.0) + 1 + usage.prompt_tokens + usage.generated_tokens
        amounts = (1, usage.prompt_tokens, usage.generated_tokens)
        totals = self._own(pair) or self._others
        totals[:] = map(sum, zip(totals, amounts, strict=True))
        self._calls += 1
        if self._calls % HALVED_AFTER == 0 or len(self._active) > 2 * REMEMBERED:
            self._forget()

    def _own(self, pair: tuple[str, str]) -> list[int] | None:
        """The totals of the pair's series, which may begin now."""
        if pair not in self._totals:
            if len(self._totals) >= SERIES:
                least = min(self._totals, key=lambda one: self._active.get(one, 0.0))
                if self._active[pair] <= 2 * self._active.get(least, 0.0):
                    return None
                del self._totals[least]
            self._totals[pair] = [0, 0, 0]
        return self._totals[pair]

    def _forget(self) -> None:
        kept = sorted(self._active.items(), key=lambda item: -item[1])[:REMEMBERED]
        self._active = {pair: activity / 2 for pair, activity in kept}

    def collect(self) -> Iterator[Metric]:
        rows = {**self._totals, OTHERS: self._others}
        for position, (name, text) in enumerate(
            (
                ("preft_tenant_requests", "Finished API calls."),
                ("preft_tenant_prompt_tokens", "Prompt tokens of finished API calls."),
                ("preft_tenant_generated_tokens", "Tokens generated in finished API calls."),
            )
        ):
            family = CounterMetricFamily(name, text, labels=["tenant", "adapter"])
            for pair, totals in rows.items():
                family.add_metric(pair, totals[position])
            yield family

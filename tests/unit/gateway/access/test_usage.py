"""Records of finished calls: lines of the log, and series of the metrics."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from preft.core.errors import ConfigError
from preft.gateway.access import usage
from preft.gateway.access.usage import Usage, UsageLog, UsageMetrics

ONE = Usage("id", "acme", "key", "ann", "d" * 64, 5, 2, 3, 200, "ok", 1.0, 2.5)


def lines(path: Path) -> list[str]:
    return [json.loads(line)["request_id"] for line in path.read_text().splitlines()]


def test_a_line_has_every_field(tmp_path: Path) -> None:
    log = UsageLog(tmp_path / "usage.jsonl")
    log.record(dataclasses.replace(ONE, adapter="a%s\n\u2028"))
    log.close()
    [line] = (tmp_path / "usage.jsonl").read_text().splitlines()
    assert json.loads(line) == dataclasses.asdict(ONE) | {"adapter": "a%s\n\u2028"}
    assert (tmp_path / "usage.jsonl").stat().st_mode & 0o077 == 0


def test_a_rotated_file_is_made_anew_and_no_line_is_lost(tmp_path: Path) -> None:
    path, old = tmp_path / "usage.jsonl", tmp_path / "usage.jsonl.1"
    log = UsageLog(path)
    for number in range(100):
        log.record(dataclasses.replace(ONE, request_id=str(number)))
        if number == 50:
            path.rename(old)
    log.close()
    assert sorted(lines(old) + (lines(path) if path.exists() else []), key=int) == [str(n) for n in range(100)]
    log = UsageLog(path)
    log.record(ONE)
    log.close()
    assert lines(path)[-1] == "id"


def test_a_file_that_cant_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"^usage_log: .* can't be written"):
        UsageLog(tmp_path / "nowhere" / "usage.jsonl")
    folder = tmp_path / "folder"
    folder.mkdir()
    log = UsageLog(folder / "usage.jsonl")
    (folder / "usage.jsonl").unlink()
    folder.rmdir()
    for _ in range(3):
        log.record(ONE)
    log.close()
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def shown(registry: CollectorRegistry) -> dict[str, float]:
    text = generate_latest(registry).decode()
    rows = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name.removeprefix("preft_tenant_"): float(value) for name, _, value in rows}


def test_metrics_count_calls_and_tokens() -> None:
    registry = CollectorRegistry()
    metrics = UsageMetrics(registry)
    for one in (ONE, ONE, dataclasses.replace(ONE, tenant="other", generated_tokens=7)):
        metrics.record(one)
    rows = shown(registry)
    assert rows['requests_total{adapter="ann",tenant="acme"}'] == 2
    assert rows['prompt_tokens_total{adapter="ann",tenant="acme"}'] == 10
    assert rows['generated_tokens_total{adapter="ann",tenant="other"}'] == 7
    assert rows['requests_total{adapter="(others)",tenant="(others)"}'] == 0


def test_there_are_few_series_and_the_active_ones_have_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "SERIES", 3)
    monkeypatch.setattr(usage, "REMEMBERED", 30)
    monkeypatch.setattr(usage, "HALVED_AFTER", 50)
    registry = CollectorRegistry()
    metrics = UsageMetrics(registry)
    others = total = 0.0
    for number in range(1000):
        pair = dataclasses.replace(ONE, adapter="late" if number > 400 and number % 3 == 0 else f"a{number % 200}")
        before = shown(registry)
        metrics.record(pair)
        after = shown(registry)
        grown = {name for name, value in after.items() if name.startswith("requests") and value > before.get(name, 0)}
        assert len(grown) == 1  # exactly one series
        assert all(after[name] >= value for name, value in before.items() if name in after)
        assert len(after) == 3 * (min(3, len(metrics._totals)) + 1)
        assert len(metrics._active) <= 61
        others, total = after['requests_total{adapter="(others)",tenant="(others)"}'], total + 1
    assert 'requests_total{adapter="late",tenant="acme"}' in shown(registry)
    assert 0 < others < total

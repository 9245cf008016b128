"""The alerts and the dashboard name metrics, labels and values that a gateway exports; each alert has its section."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from preft.core.cluster import Role, Tier, WorkerState
from preft.core.errors import ERROR_MAP
from preft.gateway.text.tokenizer import Tokenizer
from support.monitored import DEPLOY, alerts, app_with_workers, dashboard, send_some, targets
from support.served_app import served_in_thread
from support.small_tokenizers import byte_level

PAGE = Path(__file__).parents[3] / "docs" / "operations.md"
SELECTOR = re.compile(r"\b(preft_\w+|up)\b(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*=~?\s*"([^"]*)"')
GROUPING = re.compile(r"\b(?:by|on|group_left|group_right|without)\s*\(([^)]*)\)")
OF_PROMETHEUS = {"job", "instance"}  # labels that each scraped series gets
VALUES = {
    "status": {"ok", "cancelled", *(mapping.code for mapping in ERROR_MAP.values())},
    "state": set(WorkerState),
    "tier": set(Tier),
    "role": set(Role),
    "job": {"preft"},
}

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool isn't installed (Debian, Ubuntu: apt install prometheus)"
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Labels by series, from a gateway's own /metrics."""
    app = app_with_workers(Tokenizer.load(byte_level(tmp_path_factory.mktemp("tokenizer"))))
    with (
        served_in_thread(app) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client,
    ):
        send_some(client)
        text = client.get("/metrics").text
    found: dict[str, set[str]] = {"up": set()}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """Name and PromQL of every alert and of every line in the dashboard."""
    yield from ((rule["alert"], rule["expr"]) for rule in alerts())
    yield from ((title, expression) for title, expression, _ in targets())


def test_every_metric_label_and_value_exists(exported: dict[str, set[str]]) -> None:
    for where, expression in expressions():
        metrics = SELECTOR.findall(expression)
        assert metrics, where
        labels = set(OF_PROMETHEUS)
        for name, matchers in metrics:
            assert name in exported, f"{where}: no gateway exports {name}"
            labels |= exported[name]
            for label, values in MATCHER.findall(matchers):
                assert label in exported[name] | OF_PROMETHEUS, f"{where}: {name} has no label {label}"
                wanted = set() if label == "instance" else set(values.split("|"))
                assert wanted <= VALUES.get(label, set()), f"{where}: {label} is never {wanted}"
        used = {label.strip() for group in GROUPING.findall(expression) for label in group.split(",")}
        assert used <= labels, f"{where}: nothing has the labels {used - labels}"


def test_alerts_tell_labels_that_they_have() -> None:
    for rule in alerts():
        shown = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
        grouped = re.search(r"\bby \(([^)]*)\)", rule["expr"])
        assert shown <= (set(grouped[1].split(", ")) if grouped else {"instance"}), rule["alert"]


def test_all_that_is_exported_is_shown(exported: dict[str, set[str]]) -> None:
    """The dashboard or an alert uses each metric, but for those that others include."""
    names = {name.removesuffix("_created") for name in exported if not name.endswith("_created")}
    used = {name for _, expression in expressions() for name, _ in SELECTOR.findall(expression)}
    stems = {re.sub(r"_(bucket|count|sum)$", "", name) for name in used}
    left = {re.sub(r"_(bucket|count|sum)$", "", name) for name in names} - stems
    assert left == {"preft_worker_ready", "preft_worker_draining", "preft_worker_in_flight"}  # preft_workers has them


def test_every_alert_says_what_to_do() -> None:
    page = PAGE.read_text()
    headings = re.findall(r"^### (Preft\w+)$", page, re.MULTILINE)
    assert headings == [rule["alert"] for rule in alerts()]
    for rule in alerts():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
        assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{rule['alert'].lower()}"


def test_panels_have_names_of_their_own_and_one_data_source() -> None:
    board = dashboard()
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    known = {"type": source["type"], "uid": source["uid"]}
    panels = board["panels"]
    for named in ("id", "title"):
        assert len({panel[named] for panel in panels}) == len(panels)
    graphs = [panel for panel in panels if panel["type"] != "row"]
    everywhere = chain(graphs, board["templating"]["list"], *(panel["targets"] for panel in graphs))
    assert all(one["datasource"] == known for one in everywhere)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


@needs_promtool
def test_prometheus_takes_its_files() -> None:
    for kind, name in (("config", "prometheus.yml"), ("rules", "alerts.yml")):
        checked = subprocess.run(
            ["promtool", "check", kind, DEPLOY / "prometheus" / name], capture_output=True, text=True, check=False
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr


@needs_promtool
def test_alerts_fire_when_they_should() -> None:
    cases = Path(__file__).with_name("alerts.test.yml")
    tested = subprocess.run(["promtool", "test", "rules", cases], capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stdout + tested.stderr
    asked = [test["promql_expr_test"][0] for test in yaml.safe_load(cases.read_text())["tests"]]
    for fires in (True, False):
        alerting = [
            re.findall(r'alertname="(\w+)"', one["expr"])[0] for one in asked if bool(one["exp_samples"]) is fires
        ]
        assert alerting == [rule["alert"] for rule in alerts()]

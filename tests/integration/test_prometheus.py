"""A real Prometheus scrapes a gateway, and finds data for every line of the dashboard and every part of the alerts."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import yaml

from preft.gateway.text.tokenizer import Tokenizer
from preft_loadgen.child import bound
from support.monitored import DEPLOY, alerts, app_with_workers, send_some, targets
from support.redis_server import free_port
from support.served_app import served_in_thread
from support.small_tokenizers import byte_level

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus isn't installed (Debian, Ubuntu: apt install prometheus)"
)

SECONDS = 60.0  # for anything, on a busy machine
Ask = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Evaluates PromQL over two scrapes of a gateway, with requests between them."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (scrape,) = config["scrape_configs"]
    with served_in_thread(app_with_workers(Tokenizer.load(byte_level(folder)))) as port:
        del scrape["dns_sd_configs"]
        scrape["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
        config["global"] |= {"scrape_interval": "1s", "evaluation_interval": "1s"}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        shutil.copy(DEPLOY / "prometheus" / "alerts.yml", folder)
        address = f"127.0.0.1:{free_port()}"
        command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        with (
            (folder / "log").open("wb") as log,
            subprocess.Popen(bound([*command, f"--web.listen-address={address}"]), stdout=log, stderr=log) as process,
            httpx.Client(base_url=f"http://{address}", trust_env=False, timeout=SECONDS) as client,
        ):

            def evaluate(expression: str) -> list[dict[str, Any]]:
                reply = client.get("/api/v1/query", params={"query": expression}).json()
                assert reply["status"] == "success", f"{expression}: {reply}"
                return list(reply["data"]["result"])

            try:
                _until(lambda: client.get("/-/ready").status_code == 200)  # before, it answers 503 without JSON
                _until(lambda: evaluate('up{job="preft"} == 1'))
                with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as users:
                    send_some(users)
                    _until(lambda: evaluate("rate(preft_generated_tokens_total[1m])"))  # two scrapes
                    send_some(users)
                _until(lambda: evaluate("rate(preft_generated_tokens_total[1m]) > 0"))
                yield evaluate
            finally:
                process.terminate()


def _until(seen: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while True:
        try:
            if seen():
                return
        except httpx.TransportError:  # it starts
            pass
        assert time.monotonic() < end
        time.sleep(0.2)


def test_every_line_of_the_dashboard_has_data(ask: Ask) -> None:
    without = [f"{title}: {expression}" for title, expression, _ in targets() if not ask(expression)]
    assert without == []


def test_every_legend_is_whole(ask: Ask) -> None:
    for title, expression, legend in targets():
        for label in re.findall(r"\{\{(\w+)\}\}", legend):
            assert all(one["metric"].get(label) for one in ask(expression)), f"{title}: {label}"


def test_every_alert_compares_something(ask: Ask) -> None:
    """Without its threshold, a rule has a value: an alert over nothing would never fire."""
    for rule in alerts():
        if rule["alert"] == "PreftNoGateway":
            assert ask('up{job="preft"}')
            continue
        for part in re.split(r"\band\b|[<>=]+ [\d.]+(?: \*)?", rule["expr"]):
            assert not part.strip() or ask(part), f"{rule['alert']}: {part}"

"""What surrounds the measurements: the table, the file, the rig's settings, the reference engine's protocol."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import speeds, transfer
from bench.plain import PlainEngineFailed, plain_engine
from bench.rig import LORAS, REFTS, cluster_settings
from preft.core.settings import Settings

ECHO = """
import json, sys
print("noise on stderr", file=sys.stderr)
print(json.dumps({"ready": sys.argv[1:]}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    arrivals = [[0.5] * asked["max_tokens"] for _ in asked["prompts"]]
    print(json.dumps({"seconds": asked["concurrency"] / 4, "arrivals": arrivals}), flush=True)
"""


def test_table_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    figure = transfer.TransferFigure(16 << 20, tcp=0.01, grpc=0.02, tls=0.05, checksum=0.001)
    monkeypatch.setattr(transfer, "measure", lambda: [figure])
    assert speeds.main(["--only", "transfer", "--out", str(tmp_path / "new"), "--name", "here"]) == 0
    out = capsys.readouterr().out
    assert "KV push of 16 MiB" in out
    assert " 0.50 " in out
    assert "KV push of 16 MiB over TLS" in out
    (path,) = (tmp_path / "new").iterdir()
    assert path.name.startswith("here-20")
    result = json.loads(path.read_text())
    assert result["command"] == f"python -m bench.speeds --only transfer --out {tmp_path / 'new'} --name here"
    assert result["machine"]["cpus"] >= 1
    assert result["machine"]["cpu"]
    assert "python" in result["versions"]
    comparison, over_tls = result["comparisons"]
    assert (comparison["ratio"], over_tls["ratio"]) == (0.5, 0.4)
    assert comparison["how"]


def test_a_machine_that_cannot_measure_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> None:
        raise PlainEngineFailed("no room")

    monkeypatch.setattr(speeds, "_measure", fail)
    with pytest.raises(SystemExit, match=r"^bench: no room$"):
        speeds.main([])


def test_the_rigs_settings_are_valid_and_alike(tmp_path: Path) -> None:
    for number in range(LORAS + REFTS):
        (tmp_path / "adapters" / f"a{number:02}").mkdir(parents=True)
    settings = Settings.model_validate(cluster_settings(tmp_path))
    assert len(settings.adapters) == LORAS + REFTS
    assert settings.prefill.max_num_seqs == settings.decode.max_num_seqs
    assert settings.prefill.kv_cache_bytes == settings.decode.kv_cache_bytes


async def test_plain_engine_protocol(tmp_path: Path) -> None:
    script = tmp_path / "echo.py"
    script.write_text(ECHO)
    command = (sys.executable, str(script))
    async with plain_engine(Path("s.json"), tmp_path / "log", command) as engine:
        run = await engine.run([[1, 2], [3]], max_tokens=3, concurrency=2)
        assert (run.seconds, run.arrivals, run.tokens) == (0.5, [[0.5] * 3] * 2, 6)
        assert (await engine.run([[1]], max_tokens=1, concurrency=4)).seconds == 1.0
    assert (tmp_path / "log").read_text() == "noise on stderr\n"


async def test_a_plain_engine_that_fails_shows_its_log(tmp_path: Path) -> None:
    command = (sys.executable, "-c", "raise SystemExit('no such model')")
    with pytest.raises(PlainEngineFailed, match=r"didn't start:\nno such model"):
        async with plain_engine(Path("s.json"), tmp_path / "log", command):
            pytest.fail("it isn't ready")

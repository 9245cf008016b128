"""Log files: one folder per run, old ones go, a worker's own output lands in its file, and its cause is found there."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from preft.cluster import logs
from preft.cluster.logs import cause_in, logging_to, new_log_folder
from preft.core.errors import ConfigError

SERVICES = Path(logs.__file__).parents[2]
ENGINE = """\
(EngineCore pid=7) ERROR 11-26 01:00:00 [core.py:900] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-26 01:00:00 [core.py:900] ValueError: To serve one request, 2 GiB KV cache is needed.
2026-11-26 01:00:01 ERROR preft.cluster.ray_cluster: worker x ends
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_the_oldest_runs_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "KEPT_RUNS", 2)
    (tmp_path / "logs" / "20200101-000000-a").mkdir(parents=True)
    made = [new_log_folder(tmp_path, name) for name in "bc"]
    assert sorted((tmp_path / "logs").iterdir()) == sorted(made)


def test_a_state_folder_that_can_not_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^state_dir: .*/state can't be written \(Not a directory\): choose"):
        new_log_folder(tmp_path / "file" / "state", "a")


def test_warnings_of_our_own_are_shown_and_tracebacks_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_to(tmp_path / "serve.log"):
        logging.getLogger("preft.x").info("quiet")
        logging.getLogger("other").warning("noise")
        try:
            1 / 0  # noqa: B018
        except ZeroDivisionError:
            logging.getLogger("preft.x").exception("it went wrong")
    assert capsys.readouterr().err == "error: it went wrong\n"
    file = (tmp_path / "serve.log").read_text()
    assert all(text in file for text in ("quiet", "noise", "ZeroDivisionError"))


def test_output_of_a_process_and_its_children_goes_to_its_file(tmp_path: Path) -> None:
    program = (
        "import logging, os, sys; from pathlib import Path; from preft.cluster.logs import output_to\n"
        f"print('before'); output_to(Path({str(tmp_path / 'a' / 'w.log')!r}))\n"
        "print('printed'); print('error', file=sys.stderr); logging.info('logged'); os.system('echo child')\n"
    )
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(SERVICES)}, check=True)
    assert (ran.stdout, ran.stderr) == ("before\n", "")
    log = (tmp_path / "a" / "w.log").read_text()
    assert [line.split(": ")[-1] for line in log.splitlines()] == ["printed", "error", "logged", "child"]


def test_the_cause_of_a_failed_start(tmp_path: Path) -> None:
    log = tmp_path / "w.log"
    assert cause_in(log) is None
    log.write_text("all is well\n")
    assert cause_in(log) is None
    log.write_text(ENGINE)
    assert cause_in(log) == "ValueError: To serve one request, 2 GiB KV cache is needed."


def test_the_logs_of_runs_that_go_on_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "KEPT_RUNS", 1)
    first = new_log_folder(tmp_path, "a")
    with logging_to(first / "a.log"):
        others = [new_log_folder(tmp_path, name) for name in "bcd"]
        assert sorted((tmp_path / "logs").iterdir()) == [first, others[-1]]
    last = new_log_folder(tmp_path, "e")
    assert list((tmp_path / "logs").iterdir()) == [last]


def test_the_logs_of_workers_that_outlive_their_run_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "KEPT_RUNS", 1)
    first = new_log_folder(tmp_path, "a")
    program = "import sys; from pathlib import Path; from preft.cluster.logs import keep_folder\n"
    program += "keep_folder(Path(sys.argv[1])); print('kept', flush=True); sys.stdin.read()"
    worker = subprocess.Popen(
        [sys.executable, "-c", program, str(first)], cwd=SERVICES, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"kept\n"
        others = [new_log_folder(tmp_path, name) for name in "bc"]
        assert sorted((tmp_path / "logs").iterdir()) == [first, others[-1]]
    last = new_log_folder(tmp_path, "d")
    assert list((tmp_path / "logs").iterdir()) == [last]


def test_output_goes_to_a_file_for_a_while(tmp_path: Path) -> None:
    program = (
        "import logging, os, sys; from pathlib import Path; from preft.cluster.logs import output_in\n"
        f"with output_in(Path({str(tmp_path / 'w.log')!r})) as out:\n"
        "    print('printed'); os.system('echo child'); print('said', file=out)\n"
        "    logging.getLogger('preft').warning('care'); logging.getLogger('x').warning('noise')\n"
        "print('after'); print('last', file=sys.stderr)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=SERVICES, capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("said\nafter\n", "warning: care\nlast\n")
    log = (tmp_path / "w.log").read_text()
    assert all(text in log for text in ("printed", "child", "care", "noise"))
    assert "said" not in log

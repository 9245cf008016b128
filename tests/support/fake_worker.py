"""`preft worker` over a fake engine: `python -m support.fake_worker ARGUMENTS`."""

from __future__ import annotations

import sys

from preft.cli import main
from preft.cluster import worker_process
from support.worker_servers import StartPaced


def fake_engines() -> None:
    worker_process.StartEngine = StartPaced  # type: ignore[misc]


if __name__ == "__main__":
    fake_engines()
    sys.exit(main(["worker", *sys.argv[1:]]))

"""`preft worker` over a fake engine: `python -m support.fake_worker ARGUMENTS`."""

from __future__ import annotations

import sys

from preft.cli import main
from preft.cluster import worker_process
from support.worker_servers import StartPaced

if __name__ == "__main__":
    worker_process.StartEngine = StartPaced  # type: ignore[misc]
    sys.exit(main(["worker", *sys.argv[1:]]))

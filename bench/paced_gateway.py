"""A gateway over paced workers, which stand in for engines: many streams on few cores."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.paced_workers import MAX_LENGTH
from bench.rig import MODEL_NAME, make_model
from preft.core.settings import MiB
from preft_loadgen.child import bound
from preft_loadgen.served import Served, served


@contextmanager
def paced_gateway(folder: Path, streams: int, template: str = "", **settings: Any) -> Iterator[Served]:
    """Serves at most `2 * streams` streams at once, with everything in `folder`. `settings` are further settings.

    `template` is the chat template; "": there are no chats.
    """
    make_model(folder, loras=0, refts=0)
    if template:
        (folder / "model" / "chat_template.jinja").write_text(template)
    engine = {"max_num_seqs": 2 * streams, "staging_bytes": 64 * MiB}
    own = {
        "model": str(folder / "model"),
        "served_model_name": MODEL_NAME,
        "max_model_len": MAX_LENGTH,
        "state": str(folder / "state.sqlite"),
        "state_dir": str(folder / "state"),
        "prefill": {**engine, "max_loras": 1},
        "decode": engine,
        "store": {"host_bytes": MiB},
        "router": {"max_queue": 2 * streams},  # all streams may open at once on a busy machine
    }
    config = folder / "settings.json"
    config.write_text(json.dumps({**own, **settings}))  # JSON is YAML
    with (folder / "workers.log").open("wb") as log:
        workers = subprocess.Popen(bound([sys.executable, "-m", "bench.paced_workers", str(config)]), stderr=log)
    try:
        command = (sys.executable, "-m", "preft.cli", "gateway")
        options = {"state_dir": folder / "state", "log": folder / "gateway.log"}
        with served(["--config", str(config)], **options, command=command) as server:  # type: ignore[arg-type]
            yield server
    finally:
        workers.terminate()
        workers.wait()

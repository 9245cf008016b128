"""Starts Ray on this machine, for this process alone. Owns the start, and what a failed start leaves."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import ray

from preft.cluster.ray_folder import new_ray_folder
from preft.core.errors import ConfigError

logger = logging.getLogger(__name__)

NODE_IP = "127.0.0.2"  # Ray replaces 127.0.0.1 by the machine's outside address, but not 127.0.0.2
WAITS = {"RAY_gcs_server_port_wait_time_s": "120", "RAY_raylet_start_wait_time_s": "120"}  # on a busy machine
OBJECT_STORE_BYTES = 80 << 20  # Ray's minimum: no tensor goes through the object store
ATTEMPTS = 2


def start_ray() -> Path:
    """Starts Ray, and returns the folder of its sockets and logs. Raises ConfigError.

    Ray gives its own processes 30 seconds, and no setting changes that. A busy machine needs more now and then, so a
    start that fails is tried once more.
    """
    for name, seconds in WAITS.items():
        os.environ.setdefault(name, seconds)
    failure: Exception | None = None
    for _ in range(ATTEMPTS):
        folder = new_ray_folder()
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                _node_ip_address=NODE_IP,
                _temp_dir=str(folder),
                object_store_memory=OBJECT_STORE_BYTES,
                _system_config={"worker_niceness": 0},  # Ray's default of 15 starves engines on a busy machine
                log_to_driver=False,
                configure_logging=False,
            )
        except Exception as error:  # Ray has no class of its own for a start that failed
            logger.warning("Ray's start failed: %s", error)
            failure = error
            ray.shutdown()
            _kill_children(folder)
            shutil.rmtree(folder, ignore_errors=True)
        else:
            return folder
    raise ConfigError(f"Ray can't be started: {failure}") from failure


def _kill_children(folder: Path) -> None:
    """Kills the Ray processes that use `folder`: a start that fails leaves them. Their own children end with them."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has ended
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and os.fsencode(folder) in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)

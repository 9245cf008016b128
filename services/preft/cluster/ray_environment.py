"""The environment of the Ray that `preft serve` starts for itself: the user's variables for other Rays don't reach it.

Ray reads these variables at import, so this module imports nothing of Ray.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import MutableMapping

OWN = {
    "RAY_AUTH_MODE": "token",  # Ray without a token runs code for every caller
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run`, Ray would copy the current folder for each worker
    "RAY_USE_TLS": "0",  # certificates are for addresses of the machine, and this Ray has a loopback address
    "RAY_grpc_enable_http_proxy": "0",  # a proxy doesn't reach this machine's loopback addresses
}
OF_OTHERS = ("RAY_ADDRESS", "RAY_TMPDIR", "RAY_NAMESPACE", "RAY_RUNTIME_ENV_HOOK", "RAY_JOB_CONFIG_JSON_ENV_VAR")


def set_ray_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Prepares this process, whose variables are `environ`, and its children for a Ray of their own."""
    for name in OF_OTHERS:
        environ.pop(name, None)
    environ.update(OWN)
    environ["RAY_AUTH_TOKEN"] = environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)

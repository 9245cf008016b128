"""`preft gateway`: one more gateway of a running cluster, until a signal ends it. It starts no workers.

The first signal lets running requests finish for `shutdown_timeout`; the second signal ends them at once.
"""

from __future__ import annotations

import uuid
from contextlib import AsyncExitStack

from preft.cluster.console import Console
from preft.cluster.logs import logging_to, new_log_folder
from preft.cluster.model import with_model_length
from preft.cluster.process import Stop, told_in_a_sentence
from preft.cluster.serving import open_gateway, serve_until_stopped
from preft.cluster.stores import open_registrations
from preft.core.settings import Settings


def join(settings: Settings) -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP; reports on stdout. `settings.state` must be set. Raises PreftError."""
    import uvloop

    uvloop.run(_join(with_model_length(settings)))


async def _join(settings: Settings) -> None:
    stop = Stop()
    stop.arm()
    console = Console()
    gateway_id = f"gateway-{uuid.uuid4().hex[:8]}"
    logs = new_log_folder(settings.state_dir, gateway_id)
    with logging_to(logs / "gateway.log"), told_in_a_sentence("the gateway"):
        console.line(f"A gateway of PreFT Serve starts; log files are in {logs}")
        store = open_registrations(settings)
        try:
            async with AsyncExitStack() as stack:
                gateway = await open_gateway(stack, settings, store, "", stop, console)
                if gateway is not None:
                    await serve_until_stopped(settings, gateway, stop, console)
        finally:
            await store.close()

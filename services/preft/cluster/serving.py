"""One gateway from its start to its end, for `preft serve` and `preft gateway`: catalog, servers, drain.

`gateway_process` owns the gateway's parts. Starts no workers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

from preft.cluster.adapters import open_catalog
from preft.cluster.console import Console, first_question
from preft.cluster.content_server import serve_content
from preft.cluster.garbage import rare_full_collections
from preft.cluster.gateway_process import RunningGateway, run_gateway
from preft.cluster.process import Stop, raise_file_limit, unless
from preft.cluster.secret import cluster_secret
from preft.core.errors import EngineFailed
from preft.core.names import split_name
from preft.core.ports import StateStore
from preft.core.settings import Settings

LOOK_SECONDS = 0.2


async def open_gateway(
    stack: AsyncExitStack, settings: Settings, store: StateStore, cluster_id: str, stop: Stop, console: Console
) -> RunningGateway | None:
    """Serves until the end of `stack`; None if `stop` was asked earlier. Raises as the parts do.

    With the setting `state`, the workers are all workers in the store. Without it, they are those of `cluster_id`:
    several clusters on one machine then have one file of registrations.
    """
    settings.check_public_host()
    raise_file_limit()
    catalog = await unless(stop.asked, stack.enter_async_context(open_catalog(settings)))
    if catalog is None:
        return None
    own = cluster_id if settings.state is None else ""
    secret = cluster_secret(settings)
    content_address = await stack.enter_async_context(serve_content(settings, secret, catalog))
    gateway = await stack.enter_async_context(run_gateway(settings, secret, store, catalog, own, content_address))
    if stop.asked.is_set():
        return None
    stack.enter_context(rare_full_collections())
    console.line(f"listening on http://{gateway.address}; requests get 503 until the workers are ready")
    return gateway


async def serve_until_stopped(
    settings: Settings,
    gateway: RunningGateway,
    stop: Stop,
    console: Console,
    failed: Coroutine[Any, Any, str] | None = None,
    observe: Callable[[], None] = lambda: None,
    on_stop: Callable[[], None] = lambda: None,
) -> None:
    """Serves until a stop request or the end of `failed`, then drains. Raises EngineFailed with the text of `failed`.

    Calls `observe` every LOOK_SECONDS, and `on_stop` after a stop request, before the drain.
    """
    failing = asyncio.create_task(failed or asyncio.Event().wait(), name="workers")
    stopped = asyncio.create_task(stop.asked.wait(), name="stop")
    progress = asyncio.create_task(_tell_progress(settings, gateway, console, observe), name="progress")
    try:
        await asyncio.wait({stopped, failing, progress, gateway.task}, return_when=asyncio.FIRST_COMPLETED)
        progress.cancel()
        if failing.done():
            stop.at_once.set()
        elif stopped.done():
            console.line(f"stopping: running requests have {settings.shutdown_timeout:g} s; a second signal ends them")
            on_stop()
        console.status("")
        await gateway.drain(settings.shutdown_timeout, stop.at_once)
        if failing.done():
            raise EngineFailed(failing.result())
        if progress.done() and not progress.cancelled():
            progress.result()
    finally:
        for task in (stopped, failing, progress):
            task.cancel()
        await asyncio.gather(stopped, failing, progress, return_exceptions=True)


async def _tell_progress(
    settings: Settings, gateway: RunningGateway, console: Console, observe: Callable[[], None]
) -> None:
    """Reports, once, that the gateway is ready, with an example request. Runs for ever."""
    started = time.monotonic()
    is_said = False
    while True:
        observe()
        if not is_said and gateway.router.ready():
            is_said = True
            adapters = [adapter for adapter in gateway.catalog.list() if not split_name(adapter.name)[0]]
            ask = first_question(
                gateway.address,
                adapters[0].name if adapters else settings.model_name,
                is_chat=gateway.is_chat,
                max_model_len=settings.max_model_len or 1,
                needs_key=settings.api_keys is not None,
            )
            seconds = time.monotonic() - started
            console.line(f"PreFT Serve is ready on http://{gateway.address} after {seconds:.0f} s. Ask it:\n  {ask}")
        await asyncio.sleep(LOOK_SECONDS)

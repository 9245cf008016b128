"""Whole workers over fake engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from preft.cluster.worker_process import worker_setup
from preft.core.cluster import Role
from preft.core.ports import StateStore
from preft.core.request import TokenDelta
from preft.core.settings import MiB, Settings, load_settings
from preft.engine.port import EngineRequest
from preft.rpc.secret import ClusterSecret
from preft.worker.server import StartEngine, WorkerServer
from support.fake_engine import FakeEngine
from support.lora_folders import write_base

TOKEN_SECONDS = 0.03
SECRET = ClusterSecret("of these tests alone")
NO_ENGINES = "no-engines"


class StartFake(StartEngine):
    """Starts fake engines and keeps them; `hold` delays the start, `error` fails it."""

    def __init__(self) -> None:
        self.engines: dict[Role, FakeEngine] = {}
        self.hold = asyncio.Event()
        self.hold.set()
        self.error: Exception | None = None
        self.arenas: list[str] = []

    async def __call__(self, settings: Settings, role: Role, arena: str, adapter_arena: str) -> FakeEngine:
        self.arenas.append(arena)
        await self.hold.wait()
        if self.error is not None:
            raise self.error
        self.engines[role] = FakeEngine(role, arena, adapter_arena)
        return self.engines[role]


class PacedEngine(FakeEngine):
    """A FakeEngine that takes TOKEN_SECONDS for each token of a request."""

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        async with aclosing(super().generate(request)) as deltas:
            async for delta in deltas:
                await asyncio.sleep(TOKEN_SECONDS)
                yield delta


class StartPaced(StartEngine):
    """Starts paced engines, or none while the file NO_ENGINES is in `state_dir`."""

    async def __call__(self, settings: Settings, role: Role, arena: str, adapter_arena: str) -> PacedEngine:
        if (settings.state_dir / NO_ENGINES).exists():
            raise RuntimeError("there is no engine for this worker")
        return PacedEngine(role, arena, adapter_arena, kv_blocks=4096)


def settings_for(folder: Path, **overrides: Any) -> Settings:
    """Settings of workers whose model, state and secret are in `folder`."""
    own = {"staging_bytes": MiB, "max_num_seqs": 17}
    given = {
        "model": str(write_base(folder / "base")),
        "prefill": own,
        "decode": own,
        "state_dir": str(folder / "state"),
        "cluster_secret": "of these tests alone",
        "store": {"host_bytes": MiB},
    }
    return load_settings(None, given | overrides)


async def start(
    role: Role, settings: Settings, store: StateStore, start_engine: StartEngine, name: str | None = None
) -> WorkerServer:
    return await WorkerServer.start(worker_setup(settings, role), name or role.value, "127.0.0.1", store, start_engine)

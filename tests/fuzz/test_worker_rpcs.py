"""Damaged messages to every rpc of whole workers, beside good requests whose answers stay right."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator

import grpc
import pytest

from preft.core.cluster import Role
from support.fuzzing import Inputs, nothing_left, share, told
from support.hostile_site import DONE, REFUSALS, RPCS, Site, answered_right, call, healthy, request_for
from support.mutations import wire_bytes

pytestmark = pytest.mark.timeout(600)

AT_ONCE = 16


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("fuzz"))
    yield site
    site.close()


@share
@pytest.mark.parametrize(("role", "rpc"), RPCS, ids=lambda value: str(value))
def test_worker_rpcs(site: Site, role: Role, rpc: str, whole: bool) -> None:
    inputs = Inputs("worker rpcs", whole, parts=len(RPCS), part=RPCS.index((role, rpc)))

    async def one(source: random.Random) -> None:
        content = wire_bytes(source, request_for(site, rpc))
        with told(content):
            code, says = await call(site, role, rpc, content)
            assert code in DONE | REFUSALS, (code, says)
            assert "Traceback" not in says
            if code is grpc.StatusCode.OK:
                inputs.took()

    def held() -> int:
        statuses = [worker.status() for worker in site.workers.values()]
        return sum(one.running + one.open_handles + one.staging_bytes_used + one.kv_blocks_used for one in statuses)

    async def main() -> None:
        await answered_right(site)
        async with nothing_left(held):
            pending = iter(inputs)
            while batch := list(itertools.islice(pending, AT_ONCE)):
                await asyncio.gather(answered_right(site), *map(one, batch))
        assert await healthy(site, role)

    site.loop.run_until_complete(main())
    assert site.seen() == site.before

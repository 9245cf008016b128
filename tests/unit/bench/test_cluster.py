"""The benchmarks of a whole cluster: the reference and the tables. Each benchmark itself runs the product."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from bench.cluster_rig import disk_loads
from bench.routing import LeastLoaded
from bench.streams import Figures, figures_table
from preft.core.request import GenerateRequest, Sampling


class Running:
    """A router that counts its running requests."""

    def __init__(self) -> None:
        self.running = 0

    @asynccontextmanager
    async def generate(self, request: GenerateRequest) -> AsyncIterator[None]:
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1


async def test_the_reference_sends_a_request_to_the_worker_with_the_fewest() -> None:
    routers = [Running(), Running()]
    side = LeastLoaded(routers)  # type: ignore[arg-type]
    request = GenerateRequest("r", (1,), Sampling(max_tokens=1))
    async with side.generate(request):
        assert [one.running for one in routers] == [1, 0]
        async with side.generate(request), side.generate(request):
            assert [one.running for one in routers] == [2, 1]
        async with side.generate(request):
            assert [one.running for one in routers] == [1, 1]


def test_loads_are_those_of_all_workers() -> None:
    assert disk_loads([{"loads": {"disk": 3, "source": 9}}, {"loads": {}}, {"loads": {"disk": 4}}]) == 7


def test_a_line_per_run_of_streams() -> None:
    runs = [Figures("streams", 100, 0.1, 0.2, 0.001, 0.002, 0.5, 0.003, 0.004, 64 << 20)] * 2
    head, *lines = figures_table(runs).splitlines()
    assert head.split()[:3] == ["streams", "TTFT", "p50"]
    assert lines[0].split() == ["streams", "100", "100.0", "200.0", "1.0", "2.0", "500.0", "3.0", "4.0", "64"]
    assert len(lines) == 2

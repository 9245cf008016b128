"""The given facts of a run: engine speeds, cluster size and traffic. Sizes in bytes and tokens, times in seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

GiB = 1 << 30


@dataclass(frozen=True, slots=True)
class Engine:
    """Speeds and sizes of one worker; the defaults resemble an 8B model with 16-bit weights on one large GPU.

    One prefill step takes `step_seconds`, and more per token, per distinct adapter, and per adapter that enters a slot.
    One decode step takes `decode_seconds`, and `decode_sequence_seconds` more per sequence.
    """

    step_tokens: int = 8192
    step_seconds: float = 0.008
    token_seconds: float = 50e-6
    adapter_seconds: float = 0.0005
    slots: int = 8
    host_adapters: int = 64
    adapter_bytes: int = 84_000_000  # LoRA of rank 16 on all linear layers
    disk_rate: float = 1.22e9  # bytes/s, bench/results/tiers-2026-11-22.json
    slot_rate: float = 5.8e9  # bytes/s from host memory, 104 MB in 18 ms
    parallel_loads: int = 2
    decode_seconds: float = 0.012
    decode_sequence_seconds: float = 0.00005
    decode_batch: int = 256
    kv_tokens: int = 600_000  # per decode worker
    kv_token_bytes: int = 131_072
    kv_rate: float = 10e9  # bytes/s from prefill to decode worker
    block_size: int = 64
    staging_bytes: int = 64 * GiB
    rpc_seconds: float = 0.001

    @property
    def load_seconds(self) -> float:
        return self.adapter_bytes / self.disk_rate

    def prompt_seconds(self, tokens: float) -> float:
        """The time of a prompt of `tokens` tokens that has full steps to itself."""
        return tokens * (self.token_seconds + self.step_seconds / self.step_tokens)

    @classmethod
    def read(cls, path: Path) -> Engine:
        """Reads measured values from a JSON object. Raises ValueError for an unknown key."""
        values = json.loads(path.read_text())
        unknown = values.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"{path}: unknown keys {', '.join(sorted(unknown))}")
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal token counts, cut at `least` and `most`."""

    median: float
    sigma: float
    least: int
    most: int


@dataclass(frozen=True, slots=True)
class Burst:
    """From `start` on, the adapter of popularity rank `rank` gets `factor` times its requests, for `seconds`."""

    start: float
    seconds: float
    rank: int
    factor: float = 100.0


@dataclass(frozen=True, slots=True)
class Loss:
    """The prefill or decode worker number `worker` is gone from `start` on, and comes back empty after `seconds`."""

    start: float
    seconds: float
    worker: int
    decode: bool = False


@dataclass(frozen=True, slots=True)
class Scenario:
    """`load` is the share of the prefill workers' token rate that the requests ask for, before any adapter's cost.

    The popularity of adapters is Zipf with exponent `zipf`. Every `drift_seconds`, `drift_share` of the adapters change
    places with others. Figures count from `warmup` seconds on, for `seconds`. `routers` get the requests in turn. With
    `clients`, so many requests are under way at any time, and the times of arrivals and `load` have no effect.
    """

    name: str = "small"
    prefill: int = 16
    decode: int = 16
    adapters: int = 2000
    zipf: float = 1.0
    base_share: float = 0.1
    load: float = 0.7
    warmup: float = 20.0
    seconds: float = 60.0
    prompts: Lengths = Lengths(700, 1.0, 16, 16_000)
    outputs: Lengths = Lengths(100, 0.8, 2, 1_000)
    drift_seconds: float = 5.0
    drift_share: float = 0.01
    bursts: tuple[Burst, ...] = ()
    losses: tuple[Loss, ...] = ()
    max_queue: int = 100_000
    routers: int = 1
    clients: int = 0
    seed: int = 1
    engine: Engine = Engine()

    @property
    def end(self) -> float:
        """When the last request comes."""
        return self.warmup + self.seconds

    def wait_bound(self, patience: float) -> float:
        """The longest wait that the router aims at below its capacity, with workers that stay.

        A request waits for `patience`, then has the next free slot kept for it: the adapter's load, queued behind
        others, and the longest prompt pass meanwhile.
        """
        loads = self.engine.slots * self.engine.load_seconds
        return patience + loads + self.engine.prompt_seconds(self.prompts.most)


SMALL = Scenario(bursts=(Burst(40, 15, 50),), losses=(Loss(55, 10, 3), Loss(60, 10, 5, decode=True)))
LARGE = Scenario(
    name="large",
    prefill=1000,
    decode=1000,
    adapters=100_000,
    warmup=5.0,
    seconds=10.0,
    prompts=Lengths(3000, 1.2, 16, 100_000),
    outputs=Lengths(150, 0.8, 2, 2_000),
    bursts=(Burst(7, 5, 100),),
    losses=(Loss(9, 4, 3), Loss(10, 4, 5, decode=True)),
)
TINY = replace(
    SMALL,
    name="tiny",
    prefill=3,
    decode=3,
    adapters=60,
    warmup=1.0,
    seconds=5.0,
    bursts=(Burst(2, 2, 20),),
    losses=(Loss(3, 1, 1), Loss(3.5, 1, 2, decode=True)),
    engine=Engine(host_adapters=8, slots=2),
)
CROWDED = Scenario(  # like the cluster of `make bench-cluster`: two CPU workers, and more requests than they can take
    name="crowded",
    prefill=2,
    decode=1,
    adapters=64,
    base_share=0.0,
    seconds=120.0,
    prompts=Lengths(18, 0.4, 8, 32),
    outputs=Lengths(15, 0.3, 8, 24),
    drift_share=0.0,
    clients=64,
    engine=Engine(
        step_tokens=2048,
        step_seconds=0.12,
        token_seconds=0.002,
        adapter_seconds=0.02,
        slots=4,
        host_adapters=20,
        adapter_bytes=21_000_000,
        disk_rate=0.4e9,
        slot_rate=0.5e9,
        decode_seconds=0.03,
        decode_sequence_seconds=0.001,
        decode_batch=64,
        kv_tokens=20_000,
        kv_token_bytes=8192,
        block_size=32,
        staging_bytes=GiB,
        rpc_seconds=0.004,
    ),
)
PRESETS = {preset.name: preset for preset in (TINY, SMALL, LARGE, CROWDED)}

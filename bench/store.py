"""Part of `make bench-store`: how loads of adapters slow down requests for adapters that are already loaded.

Measures a whole cluster over HTTP. Steady streams under pinned adapters run all the time. Beside them run short
requests, in turns under other pinned adapters and under adapters that are in no worker's memory. Also measures how much
of a slow source's delay is hidden while a request waits for a worker anyway.
"""

from __future__ import annotations

import argparse
import asyncio
import http.server
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench.command import bench_folder
from bench.comparison import Comparison, comparison_table, take_turns
from bench.saving import RESULTS, save
from preft.core.errors import PreftError
from preft.core.settings import MiB
from preft_loadgen.child import bound
from preft_loadgen.measure.driver import closed_loop, open_loop
from preft_loadgen.measure.record import Record
from preft_loadgen.served import served
from preft_loadgen.traffic.request import Request
from preft_loadgen.transport.http import HttpClient
from preft_loadgen.transport.server import completions

MODEL_NAME = "bench"
RANK, LORAS = 16, 48  # 5.2 MB each
COLD = 20  # used in turns: more than memory holds, fewer than the disk holds
RESIDENT, WARM = 4, 4  # pinned adapters of the streams, and of the short requests
HOST_BYTES, DISK_BYTES = 96 * MiB, 170 * MiB  # room for about ten unpinned adapters in memory, and about thirty on disk
STREAMS, OUTPUT, PROMPT = 2, 16, 64
RATE, SECONDS = 2.0, 15.0  # short requests per second; duration of one measurement
STALL_BAR = 1 / 1.2
SLOW_SECONDS, HIDDEN_BAR = 2.0, 0.9


async def _stalls(client: HttpClient, names: Sequence[str], rounds: int) -> list[Comparison]:
    send = completions(client)
    resident, warm = names[:RESIDENT], names[RESIDENT : RESIDENT + WARM]
    cold = names[RESIDENT + WARM :][:COLD]
    next_cold = iter(range(1_000_000))
    records: dict[str, list[Record]] = {"cold": [], "warm": []}

    async def measure(kind: str, number: int) -> float:
        draw = random.Random(number)
        count = int(RATE * SECONDS)
        others = [warm[i % WARM] if kind == "warm" else cold[next(next_cold) % len(cold)] for i in range(count)]
        beside = [Request(name, _prompt(draw), 1) for name in others]
        arrivals = [i / RATE for i in range(count)]
        streams = asyncio.create_task(_streams_for(SECONDS, send, resident, draw))
        run = await open_loop(send, beside, arrivals)
        streamed = await streams
        _check([*run.records, *streamed])
        if number >= 0:
            records[kind] += streamed
        return 1.0

    await take_turns([partial(measure, "cold"), partial(measure, "warm")], rounds, lambda: None)
    how = (
        f"p99 over {rounds} x {SECONDS:g} s of {STREAMS} streams of {PROMPT} prompt and {OUTPUT} output tokens under "
        f"pinned adapters, beside {RATE:g} short requests a second; ours: these under adapters that have to be loaded "
        "from disk first; reference: under adapters in memory"
    )

    def compared(what: str, values: Callable[[Record], Sequence[float]]) -> Comparison:
        cold, warm = (_p99([value for one in records[kind] for value in values(one)]) for kind in ("cold", "warm"))
        return Comparison(f"1 / p99 {what} beside cold loads", "1/s", (1 / cold,), (1 / warm,), STALL_BAR, how)

    return [
        compared("time to first token", lambda one: [one.ttft]),
        compared("time between tokens", lambda one: one.gaps),
    ]


async def _streams_for(seconds: float, send: Any, names: Sequence[str], draw: random.Random) -> list[Record]:
    """Runs streams, STREAMS at a time; the last streams begin within `seconds`."""
    end = time.perf_counter() + seconds

    def requests() -> Iterator[Request]:
        number = 0
        while time.perf_counter() < end:
            yield Request(names[number % len(names)], _prompt(draw), OUTPUT)
            number += 1

    runs = await asyncio.gather(*(_one_after_another(send, requests()) for _ in range(STREAMS)))
    return [record for records in runs for record in records]


async def _one_after_another(send: Any, requests: Iterator[Request]) -> list[Record]:
    records: list[Record] = []
    for request in requests:
        records += (await closed_loop(send, [request], 1)).records
    return records


async def _hidden(
    client: HttpClient, names: Sequence[str], source: str, slow: Sequence[str], rounds: int
) -> Comparison:
    """The part of a load's time that a request doesn't notice, because it waits for a worker anyway."""
    send = completions(client)
    numbers = iter(range(1_000_000))
    draw = random.Random(5)

    async def ttft(name: str, busy: bool) -> float:
        """Time to first token of a request under `name`, alone or behind requests that take longer than a load."""
        ahead = [Request(MODEL_NAME, _prompt(draw, 480), 1) for _ in range(40 if busy else 0)]
        waiting = asyncio.create_task(closed_loop(send, ahead, len(ahead) or 1))
        await asyncio.sleep(0.1)
        [record] = (await closed_loop(send, [Request(name, _prompt(draw), 1)], 1)).records
        _check([record, *(await waiting).records])
        return record.ttft

    async def loaded_late(busy: bool, _round: int) -> float:
        """Extra seconds of a request whose adapter must come from the slow source, compared with a loaded adapter."""
        name = slow[next(numbers)]
        await client.post_json("/v1/adapters", {"name": name, "source": f"{source}/{name}"})
        others = [Request(other, _prompt(draw, 4), 1) for other in names[RESIDENT + WARM :]]
        _check((await closed_loop(send, others, 4)).records)  # the adapter is neither in memory nor on disk any more
        cold = await ttft(name, busy)
        return max(cold - await ttft(name, busy), 1e-3)

    waited, whole = await take_turns([partial(loaded_late, True), partial(loaded_late, False)], rounds, lambda: None)
    return Comparison(
        "1 - load time that a waiting request sees, of all",
        "",
        tuple(1 - late / alone for late, alone in zip(waited, whole, strict=True)),
        (1.0,) * len(waited),
        HIDDEN_BAR,
        f"seconds that a request takes longer under an adapter whose source is slow ({SLOW_SECONDS:g} s) than under "
        "the same one in memory; behind 40 prompts of 480 tokens, as part of what it is with nobody ahead",
    )


def _prompt(draw: random.Random, length: int = PROMPT) -> tuple[int, ...]:
    return tuple(draw.randrange(300, 8000) for _ in range(length))


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))]


def _check(records: Sequence[Record]) -> None:
    if errors := [record.error for record in records if record.error is not None]:
        raise PreftError(f"{len(errors)} requests failed, the first with: {errors[0]}")


def _make(folder: Path, slow: Sequence[str]) -> list[str]:
    """Writes the model, and adapters in `adapters/` and `slow/adapters/`; returns the names in `adapters/`."""
    for part, count, seed in (("", LORAS, 0), ("slow", len(slow), LORAS)):
        command = [sys.executable, "-m", "bench.random_model", str(folder / part), "--lora-rank", str(RANK)]
        counts = ["--loras", str(count), "--refts", "0", "--seed", str(seed)]
        subprocess.run(bound([*command, *counts]), check=True, capture_output=True)
    for made, name in zip(sorted((folder / "slow" / "adapters").iterdir()), slow, strict=True):
        made.rename(made.with_name(name))
    return [path.name for path in sorted((folder / "adapters").iterdir())]


async def _measure(folder: Path, rounds: int) -> list[Comparison]:
    slow_rounds = max(3, rounds // 2)
    slow = [f"slow{number}" for number in range(2 * (slow_rounds + 1))]
    names = await asyncio.to_thread(_make, folder, slow)
    engine = {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "kv_cache_bytes": 512 * MiB}
    settings = {
        "model": str(folder / "model"),
        "served_model_name": MODEL_NAME,
        "max_model_len": 512,
        "adapters": {name: str(folder / "adapters" / name) for name in names},
        "prefill": {**engine, "max_loras": 8, "max_lora_rank": RANK, "enable_prefix_caching": False},
        "decode": engine,
        "store": {"host_bytes": HOST_BYTES, "disk_bytes": DISK_BYTES},
        "router": {"max_inflight_prefills": 4},
    }
    config, log = folder / "settings.json", folder / "serve.log"
    config.write_text(json.dumps(settings))  # JSON is YAML
    with (
        _slow_source(folder / "slow" / "adapters") as source,
        served(["--config", str(config)], state_dir=folder / "state", log=log) as server,
    ):
        client = HttpClient(server.url)
        pins = [client.patch_json(f"/v1/adapters/{name}", {"pinned": True}) for name in names[: RESIDENT + WARM]]
        await asyncio.gather(*pins)
        await asyncio.sleep(2)  # until the workers have loaded the pinned adapters
        hidden = await _hidden(client, names, source, slow, slow_rounds)
        return [*await _stalls(client, names, rounds), hidden]


@contextmanager
def _slow_source(folder: Path) -> Iterator[str]:
    """A web server that delays weights by SLOW_SECONDS. Yields its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith(".safetensors"):
                time.sleep(SLOW_SECONDS)
            super().do_GET()

        def log_message(self, format: str, *arguments: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if everything was measured; a measurement that fails ends the process."""
    parser = argparse.ArgumentParser(prog="bench-store", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    with bench_folder() as folder:
        comparisons = asyncio.run(_measure(folder, arguments.rounds))
    print(comparison_table(comparisons))
    results = {"comparisons": [one.as_json() for one in comparisons]}
    print(f"all figures are in {save(arguments.out, 'store', 'bench.store', argv, results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The cluster of `make bench-cluster`: two prefill workers and a decode worker, and adapters that cost loads.

64 adapters, whose popularity follows Zipf's law, share the four slots of each prefill worker. A prefill worker's host
memory holds about half of the adapters; all lie on the workers' disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.rig import MODEL_NAME, VOCABULARY, make_model
from preft.core.errors import PreftError
from preft.core.settings import MiB
from preft_loadgen.measure.record import Run
from preft_loadgen.traffic.choice import Zipf
from preft_loadgen.traffic.lengths import Lengths
from preft_loadgen.traffic.prompts import Ids, RandomPrompts
from preft_loadgen.traffic.request import Request
from preft_loadgen.traffic.workload import Workload

ADAPTERS, RANK = 64, 64  # 21 MB each
PREFILLS, SLOTS = 2, 4  # slots per worker
HOST_BYTES = 400 * MiB  # of each prefill worker: 20 adapters
CONCURRENCY = 64
HOW = (
    f"{PREFILLS} prefill workers with {SLOTS} slots each, 1 decode worker; {ADAPTERS} LoRA adapters of rank {RANK} "
    f"(21 MB), Zipf; host memory for 20 of them per worker; {CONCURRENCY} requests at a time"
)


def write_cluster(folder: Path) -> tuple[dict[str, Any], Path, dict[str, Any]]:
    """Makes model, adapters and settings file; returns the settings, the file, and facts about the model."""
    model = make_model(folder, loras=ADAPTERS, lora_rank=RANK, refts=0)
    engine = {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "kv_cache_bytes": 256 * MiB}
    engine["enable_prefix_caching"] = False  # all sides send the same prompts
    settings = {
        "model": str(folder / "model"),
        "served_model_name": MODEL_NAME,
        "max_model_len": 256,
        "adapters": {path.name: str(path) for path in sorted((folder / "adapters").iterdir())},
        "prefill": {**engine, "replicas": PREFILLS, "max_loras": SLOTS, "max_lora_rank": RANK},
        "decode": engine,
        "store": {"host_bytes": HOST_BYTES},
    }
    path = folder / "settings.json"
    path.write_text(json.dumps(settings))  # JSON is YAML
    return settings, path, model


def requests_of(names: Iterable[str], count: int, output: Lengths, number: int) -> list[Request]:
    """The requests of round `number`: equal for all sides."""
    prompts = RandomPrompts(Lengths(8, 32), output, Ids(VOCABULARY))
    return Workload(tuple(names), count, prompts, Zipf(), seed=30_000 + number).make()


def check(run: Run) -> None:
    """Raises PreftError if a request failed."""
    if errors := [record.error for record in run.records if record.error is not None]:
        raise PreftError(f"{len(errors)} requests failed, the first with: {errors[0]}")


def disk_loads(tiers: Iterable[Mapping[str, Any]]) -> int:
    """Adapters that workers have loaded from disk so far, given the tiers of each worker's status."""
    return sum(one["loads"].get("disk", 0) for one in tiers)

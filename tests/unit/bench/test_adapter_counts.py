"""The comparison over adapter counts: equal sizes for all servers, and what follows from the measurements."""

from __future__ import annotations

import itertools
import json
from argparse import Namespace
from pathlib import Path

import pytest

from bench.adapter_counts import __main__ as bench
from bench.adapter_counts.systems import ALL_TOKENS, BASE, SYSTEMS, Adapters, Sizes, _settings, _vllm_arguments
from bench.random_model import LLAMA_8B, SMALL
from preft.core.settings import load_settings
from preft_loadgen.measure.compare import Comparison, ratio_of
from preft_loadgen.measure.record import Record, Run
from preft_loadgen.measure.sweep import Measured
from preft_loadgen.report.metrics import summarize
from preft_loadgen.synthetic import Kind

PREFT = SYSTEMS["colocated-lora"].name
KV_BYTES = {False: 2 * 12 * 256 * 4, True: 2 * 32 * 1024 * 2}  # keys and values of one token, by `gpu`


def prepared(folder: Path, gpu: bool) -> tuple[Sizes, Adapters]:
    shape = LLAMA_8B if gpu else SMALL
    shape.write_config(folder / "model", "float16")
    (folder / "model" / "tokenizer.json").write_text("{}")
    files = folder / "lora-0000"
    files.mkdir()
    (files / "adapter_model.safetensors").write_bytes(bytes(1_000_000))
    adapters = {Kind.LORA: {files.name: files}}
    given = Namespace(counts=(0, 2), concurrency=4, input=10, output=20, cached=3, gpu=gpu, small=False)
    return bench._sizes(given, folder / "model", adapters), adapters


@pytest.mark.parametrize("gpu", [False, True])
def test_every_server_has_room_for_the_load(tmp_path: Path, gpu: bool) -> None:
    sizes, adapters = prepared(tmp_path, gpu)
    assert (sizes.slots, sizes.cached, sizes.length, sizes.batch) == (2, 4, 30, 4)
    assert 1 <= sizes.kv_bytes / (4 * 30 * KV_BYTES[gpu]) <= 1.2
    assert sizes.adapter_bytes == (1_000_000 if gpu else 2_000_000)
    for server in ("base", "multi-lora", "all-tokens"):
        arguments = _vllm_arguments(server, tmp_path / "model", sizes, 0.3)
        options = dict(itertools.pairwise(arguments))
        assert options["--kv-cache-memory-bytes"] == str(sizes.kv_bytes)
        assert options.get("--max-loras") == (None if server == "base" else "2")
        assert ("--enforce-eager" in arguments) == (not gpu)
        assert ("GPU" if gpu else "CPU") in options.get("--worker-cls", "GPU CPU")
    for server in ("colocated", "disaggregated"):
        text = json.dumps(_settings(server, tmp_path / "model", adapters[Kind.LORA], sizes, 0.3))
        (tmp_path / "settings.json").write_text(text)
        settings = load_settings(tmp_path / "settings.json")
        assert settings.colocated == (server == "colocated")
        assert settings.prefill.kv_cache_bytes == sizes.kv_bytes
        assert settings.store.host_bytes == 4 * sizes.adapter_bytes
        if gpu:
            engines = [settings.prefill] if settings.colocated else [settings.prefill, settings.decode]
            assert sum(engine.num_gpus or 0 for engine in engines) == 1  # all on one GPU


def measured(target: str, adapters: int, speed: int, number: int = 0) -> Measured:
    run = Run((Record("a", 0.0, 1.0, ttft=0.1, gaps=(0.1,), counts=(1,), tokens=speed),), 1.0)
    return Measured(summarize(run, adapters, target=target, round=number), run)


def compared(*runs: Measured) -> Comparison:
    summaries = [run.summary for run in runs]
    names = [name for name in dict.fromkeys(one.target for one in summaries) if name != BASE.name]
    counts = dict.fromkeys(one.adapters for one in summaries)
    return Comparison(runs, tuple(ratio_of(summaries, name, BASE.name, n) for name in names for n in counts), ())


def test_all_are_compared_with_the_fair_baseline_too() -> None:
    speeds = {BASE.name: (100, 100), ALL_TOKENS.name: (80, 20), PREFT: (60, 90)}
    runs = [
        measured(name, count, speed) for name, each in speeds.items() for count, speed in zip((1, 8), each, strict=True)
    ]
    found = bench._joined([compared(*runs)])
    fair = {one.adapters: one.ratio for one in found.ratios if one.reference == ALL_TOKENS.name}
    assert fair == pytest.approx({1: 0.75, 8: 4.5})
    [crossing] = found.crossovers
    assert (crossing.target, crossing.reference, crossing.begins) == (PREFT, ALL_TOKENS.name, True)


def test_pairs_are_compared_within_themselves_alone() -> None:
    """Speeds of two runs of the reference aren't put together: the machine may have changed between them."""
    first = compared(measured(BASE.name, 1, 100), measured(ALL_TOKENS.name, 1, 50))
    second = compared(measured(BASE.name, 1, 10), measured(PREFT, 1, 9))
    found = bench._joined([first, second])
    assert {(one.target, one.reference): one.ratio for one in found.ratios} == pytest.approx(
        {(ALL_TOKENS.name, BASE.name): 0.5, (PREFT, BASE.name): 0.9}
    )


def test_the_table_has_a_row_per_system_with_medians() -> None:
    runs = [measured(BASE.name, count, speed, number) for count in (0, 2) for number, speed in enumerate((5, 7, 90))]
    lines = bench.counts_table([run.summary for run in runs]).splitlines()
    assert "base model" in lines[0]
    assert "2 adapters" in lines[0]
    assert lines[-1].split("  ")[-1].strip().startswith("7 / ")

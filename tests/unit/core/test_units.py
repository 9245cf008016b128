"""Sizes and durations are read exactly, or refused with an example."""

from __future__ import annotations

import pytest

from preft.core.errors import ConfigError
from preft.core.settings import load_settings
from preft.core.units import read_bytes, read_seconds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GiB", 4 << 30),
        ("1.5GiB", 3 << 29),
        ("512MiB", 512 << 20),
        ("64 KiB", 64 << 10),
        ("2TiB", 2 << 40),
        ("2GB", 2 * 10**9),
        ("3TB", 3 * 10**12),
        ("5MB", 5 * 10**6),
        ("7kB", 7000),
        (" 7KB ", 7000),
        ("4gib", 4 << 30),
        ("0.3KiB", 307),
        ("123", 123),
        (123, 123),
        (None, None),
    ],
)
def test_sizes(text: object, expected: object) -> None:
    assert read_bytes(text) == expected


NO_SIZES = ["", "4 XB", "-1GiB", "4GiB garbage", "1,5GiB", "4.GiB", ".5GiB", "64k", "4G", "4Gi", "4Gbit", "1e3GiB"]
NO_SIZES += ["1.5", "GiB", "٤GiB", "0x10", "4GiB4GiB", "nan", "inf", "1_000", "9" * 5000]


@pytest.mark.parametrize("text", NO_SIZES)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^prefill\.kv_cache_bytes: .* is not a size: .* such as 4GiB \(units: KiB, "
    ):
        load_settings(overrides={"model": "/m", "prefill": {"kv_cache_bytes": text}})


@pytest.mark.parametrize("text", ["99999999999999TiB", "1048577TiB", "9" * 30, 10**30, "0GiB", "1023KiB", -(1 << 30)])
def test_a_size_that_no_machine_has(text: object) -> None:
    with pytest.raises(ConfigError, match=r"^store\.host_bytes: Input should be (less|greater) than or equal to \d+$"):
        load_settings(overrides={"model": "/m", "store": {"host_bytes": text}})


def test_every_size_takes_units() -> None:
    sizes = {"disk_bytes": "3MiB", "host_bytes": "3MiB", "max_adapter_bytes": "3MiB", "source_min_rate": "3MiB"}
    engine = {"kv_cache_bytes": "3MiB", "staging_bytes": "3MiB"}
    settings = load_settings(overrides={"model": "/m", "store": sizes, "prefill": engine, "decode": engine})
    read = [getattr(settings.store, name) for name in sizes]
    read += [getattr(role, name) for role in (settings.prefill, settings.decode) for name in engine]
    assert read == [3 << 20] * 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30s", 30.0),
        ("5m", 300.0),
        ("2h", 7200.0),
        ("250ms", 0.25),
        ("1.5 m", 90.0),
        ("12", 12.0),
        ("0.5", 0.5),
        (7, 7),
    ],
)
def test_durations(text: object, expected: float) -> None:
    assert read_seconds(text) == expected
    settings = load_settings(overrides={"model": "/m", "router": {"request_timeout": text}, "shutdown_timeout": text})
    assert settings.router.request_timeout == settings.shutdown_timeout == expected


@pytest.mark.parametrize("text", ["", "5 minutes", "-5s", "1m30s", "5M", "1e3", "1,5s", "inf", "nan", "00:30"])
@pytest.mark.parametrize("key", ["shutdown_timeout", "router.patience"])
def test_what_is_no_duration(text: str, key: str) -> None:
    group, _, name = key.rpartition(".")
    given = {group: {name: text}} if group else {name: text}
    with pytest.raises(ConfigError, match=rf"^{key}: .* is not a duration: .* such as 30s \(units: ms, s, m, h\)$"):
        load_settings(overrides={"model": "/m", **given})


@pytest.mark.parametrize(("text", "bound"), [("25h", "less"), ("0s", "greater")])
def test_durations_have_bounds(text: str, bound: str) -> None:
    with pytest.raises(ConfigError, match=rf"^router\.worker_timeout: Input should be {bound} than "):
        load_settings(overrides={"model": "/m", "router": {"worker_timeout": text}})

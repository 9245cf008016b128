"""The numbers in docs/operations.md, computed anew: by the product's own functions, and by the page's formulas."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from preft.adapters.store.packed import AdapterFiles
from preft.cluster.sizing import kv_token_bytes
from preft.core.settings import GiB, PrefillSettings
from support.models import make_lora, make_model, make_reft

PAGE = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
HIDDEN, KV, INTER, LAYERS = 4096, 1024, 14336, 32  # Llama 3.1 8B
LINEARS = {
    "q_proj": HIDDEN + HIDDEN,
    "k_proj": HIDDEN + KV,
    "v_proj": HIDDEN + KV,
    "o_proj": HIDDEN + HIDDEN,
    "gate_proj": HIDDEN + INTER,
    "up_proj": HIDDEN + INTER,
    "down_proj": HIDDEN + INTER,
}


def rows(heading: str) -> list[list[str]]:
    """The cells below the table's head that begins with `heading`."""
    _, _, rest = PAGE.partition(f"| {heading} |")
    lines = rest.split("\n\n")[0].splitlines()[2:]
    assert lines, heading
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def lora_bytes(rank: int, sizes: list[int], layers: int, width: int) -> int:
    return rank * sum(sizes) * layers * width


def reft_bytes(rank: int, hidden: int, layers: int, width: int) -> int:
    return (2 * rank * hidden + rank) * layers * width


def test_kv_bytes_are_those_of_the_product() -> None:
    for _, layers, heads, size, token, tokens in rows("model"):
        config = {"num_hidden_layers": int(layers), "num_key_value_heads": int(heads), "head_dim": int(size)}
        assert kv_token_bytes({**config, "num_attention_heads": 64}, "bfloat16", True) == int(token)
        assert 50_000_000_000 // int(token) == int(tokens)


def test_adapters_have_the_sizes_of_the_formulas() -> None:
    for kind, rank, where, size, number in rows("adapter"):
        if kind == "LoRA":
            sizes = [LINEARS[name] for name in (LINEARS if where == "all linear" else where.split(", "))]
            found = lora_bytes(int(rank), sizes, LAYERS, 2)
        else:
            found = reft_bytes(int(rank), HIDDEN, LAYERS, 2)
        assert (found, GiB // found) == (int(size), int(number))


def test_real_adapters_have_the_sizes_of_the_formulas(tmp_path: Path) -> None:
    """And as much host memory as their files have, up to headers."""
    model = make_model(tmp_path / "model", hidden=256, layers=2, kv_heads=2, heads=4)
    linears = [256 + 256, 256 + 128, 256 + 128, 256 + 256, *[256 + 512] * 3]
    for folder, size in (
        (make_lora(tmp_path / "lora", model, rank=64), lora_bytes(64, linears, 2, 4)),
        (make_reft(tmp_path / "reft", model, rank=64, layers=(0, 1)), reft_bytes(64, 256, 2, 4)),
    ):
        files = AdapterFiles(folder)
        files.close()
        assert size < files.packed_size < size + 8192


def test_slots_of_the_default_settings() -> None:
    own = PrefillSettings()
    lora = lora_bytes(own.max_lora_rank, list(LINEARS.values()), LAYERS, 2)
    assert reft_bytes(own.max_lora_rank, HIDDEN, LAYERS, 2) == pytest.approx(0.1 * lora, rel=0.01)
    (said,) = re.findall(rf"\({own.max_loras}\s+slots of rank {own.max_lora_rank}\) take (\S+) GiB", PAGE)
    assert float(said) == pytest.approx(1.1 * own.max_loras * lora / GiB, rel=0.02)


def test_pools_follow_the_formulas() -> None:
    (p, t, s, room) = map(float, re.findall(r"p = (\d+), t =\s+([\d.]+) and s = (\d+), .* K = (\d+) GB", PAGE)[0])
    token = int(rows("model")[1][4])
    for _, rate, prompt, output, prefill, sequences, decode in rows("traffic"):
        requests, n, m = float(rate), float(prompt), float(output)
        running = requests * m * t
        by_memory = running * (n + m / 2) * token / (0.8 * room * 1e9)
        assert round(requests * n / (0.8 * p) + 1e-9, 2) == pytest.approx(float(prefill), abs=0.006)
        assert running == pytest.approx(float(sequences))
        assert max(running / (0.8 * s), by_memory) == pytest.approx(float(decode), abs=0.006)
    assert [math.ceil(float(row[4])) for row in rows("traffic")][:2] == [4, 1]
    assert [math.ceil(float(row[6])) for row in rows("traffic")][:2] == [1, 3]

"""The safetensors reader agrees with the safetensors library, and survives whatever else is in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save, save_file
from safetensors.torch import save_file as save_torch

from preft.adapters.formats.tensor_file import BrokenTensorFile, equal_values, is_finite, read_entries

TENSORS: dict[str, Any] = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.ones((3,), np.float16),
    "empty": np.ones((0, 4), np.float32),
    "scalar": np.array(2.0, np.float32),
    "whole": np.arange(4, dtype=np.int64),
}


def test_names_types_shapes_and_places(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file(TENSORS, path, metadata={"format": "np"})
    entries = read_entries(path)
    content = path.read_bytes()
    assert set(entries) == set(TENSORS)
    for name, tensor in TENSORS.items():
        entry = entries[name]
        assert entry.shape == tensor.shape
        assert content[entry.start : entry.end] == tensor.tobytes()
    assert {name: entry.dtype for name, entry in entries.items()} == {
        "a": "F32",
        "b": "F16",
        "empty": "F32",
        "scalar": "F32",
        "whole": "I64",
    }


@pytest.mark.parametrize("position", [0, 1, 2**22 - 1, 2**22, 2**22 + 4])
def test_one_bad_value_is_found_wherever_it_is(tmp_path: Path, position: int) -> None:
    values = np.ones(2**22 + 5, np.float16)
    path = tmp_path / "t.safetensors"
    save_file({"a": values}, path)
    assert is_finite(path, read_entries(path)["a"])
    values[position] = np.nan
    save_file({"a": values}, path)
    assert not is_finite(path, read_entries(path)["a"])


@pytest.mark.parametrize("ours", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("theirs", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_is_what_a_conversion_of_types_left(tmp_path: Path, ours: torch.dtype, theirs: torch.dtype) -> None:
    """One is the other in another type; a change that either type can tell makes a difference, wherever it is."""
    original = torch.randn(2**22 + 3, generator=torch.Generator().manual_seed(0)).to(theirs)
    copy = original.to(ours)
    changed = copy.clone()
    changed[-1] *= 1.5
    paths = [tmp_path / name for name in ("original", "copy", "changed")]
    for path, tensor in zip(paths, (original, copy, changed), strict=True):
        save_torch({"a": tensor}, path)
    first, second, third = (read_entries(path)["a"] for path in paths)
    assert equal_values(paths[1], second, paths[0], first)
    assert equal_values(paths[0], first, paths[1], second)
    assert not equal_values(paths[2], third, paths[0], first)


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
def test_a_damaged_file_is_read_as_the_library_reads_it_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(save(TENSORS))
    for _ in range(data.draw(st.integers(0, 2))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    try:
        with safe_open(path, "np") as file:
            expected = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        expected = None
    try:
        found = {name: entry.shape for name, entry in read_entries(path).items()}
    except BrokenTensorFile:
        return
    # An unknown element type is the one thing the library refuses here and this reader leaves to its caller.
    if expected is not None:
        assert found == expected

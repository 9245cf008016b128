"""The operation against its float32 definition, over types, ranks, shapes and how adapters are spread over tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kernels.devices import DEVICE
from preft_kernels.low_rank_delta import low_rank_delta_, low_rank_delta_reference
from preft_kernels.token_groups import BASE, TokenGroups

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}  # of values whose spread is about 1
POPULARITIES = ("one", "distinct", "uniform", "zipf")


def draw_slots(popularity: str, tokens: int, adapters: int, generator: torch.Generator) -> torch.Tensor:
    """Which adapter each token is under; about every fourth token is the base model's, in between the others."""
    if popularity == "one":
        slots = torch.full((tokens,), adapters - 1)
    elif popularity == "distinct":
        slots = torch.arange(tokens) % adapters
    elif popularity == "uniform":
        slots = torch.randint(adapters, (tokens,), generator=generator)
    else:
        weights = 1.0 / torch.arange(1, adapters + 1)
        slots = torch.multinomial(weights, tokens + 1, replacement=True, generator=generator)[:tokens]
    return slots.masked_fill(torch.rand(tokens, generator=generator) < 0.25, BASE).to(torch.int32)


class Case:
    """Random arguments with outputs of spread 1, and what must come out."""

    def __init__(
        self,
        slots: torch.Tensor,
        adapters: int,
        rank: int,
        inputs: int = 37,
        outputs: tuple[int, ...] = (29,),
        dtype: torch.dtype = torch.float32,
        columns: int | None = None,
    ) -> None:
        self.generator = torch.Generator().manual_seed(rank * 1000 + adapters)
        self.slots = slots
        self.y = self.random(len(slots), columns or sum(outputs), dtype=dtype)
        self.x = self.random(len(slots), inputs, dtype=dtype)
        self.a = [self.random(adapters, rank, inputs, dtype=dtype) / inputs**0.5 for _ in outputs]
        self.b = [self.random(adapters, size, rank, dtype=dtype) / rank**0.5 for size in outputs]

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(DEVICE, dtype)

    @property
    def groups(self) -> TokenGroups:
        return TokenGroups.of(self.slots.to(DEVICE), *self.a[0].shape[:2])

    def expected(self, offset: int = 0, scale: float = 1.0) -> torch.Tensor:
        y = self.y.clone()
        left = offset
        for a, b in zip(self.a, self.b, strict=True):
            part = y[:, left : left + b.shape[1]]
            part.copy_(low_rank_delta_reference(part, self.x, a, b, self.slots, scale))
            left += b.shape[1]
        return y

    def check(self, **options: Any) -> None:
        expected, before = self.expected(**options), self.y.clone()
        low_rank_delta_(self.y, self.x, self.a, self.b, self.groups, **options)
        tolerance = TOLERANCE[self.y.dtype]
        torch.testing.assert_close(self.y, expected, rtol=tolerance, atol=tolerance)
        base = (self.slots < 0).to(DEVICE)
        assert torch.equal(self.y[base], before[base])
        if not bool(base.all()):
            assert not torch.allclose(self.y[~base], before[~base], rtol=tolerance, atol=2 * tolerance)


def test_the_reference_is_the_formula() -> None:
    """A worked example: one token under slot 1, one bare."""
    y, x = torch.tensor([[10.0, 20.0], [1.0, 2.0]]), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    a = torch.tensor([[[9.0, 9.0, 9.0]], [[1.0, 0.0, -1.0]]])  # A_1 x = 1 - 3 = -2
    b = torch.tensor([[[9.0], [9.0]], [[3.0], [5.0]]])
    got = low_rank_delta_reference(y, x, a, b, torch.tensor([1, BASE]), scale=0.5)
    assert got.tolist() == [[10.0 - 3.0, 20.0 - 5.0], [1.0, 2.0]]
    assert y.tolist() == [[10.0, 20.0], [1.0, 2.0]]


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("adapters", [1, 3, 32])
@pytest.mark.parametrize("tokens", [1, 7, 65])
def test_popularity(popularity: str, adapters: int, tokens: int) -> None:
    slots = draw_slots(popularity, tokens, adapters, torch.Generator().manual_seed(tokens))
    Case(slots, adapters, rank=5).check()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rank", [1, 2, 7, 16, 64])
def test_ranks_and_types(dtype: torch.dtype, rank: int) -> None:
    slots = draw_slots("uniform", 33, 4, torch.Generator().manual_seed(rank))
    Case(slots, 4, rank, inputs=131, outputs=(77,), dtype=dtype).check(scale=0.75)


@pytest.mark.parametrize(("offset", "columns"), [(0, 41), (5, 46), (3, 60)])
def test_slices_side_by_side(offset: int, columns: int) -> None:
    """As in a fused q, k and v projection; the columns around them stay as they are."""
    case = Case(
        draw_slots("zipf", 19, 3, torch.Generator().manual_seed(0)), 3, 4, outputs=(17, 11, 13), columns=columns
    )
    before = case.y.clone()
    case.check(offset=offset, scale=2.0)
    assert torch.equal(case.y[:, :offset], before[:, :offset])
    assert torch.equal(case.y[:, offset + 41 :], before[:, offset + 41 :])


def test_slices_of_different_types() -> None:
    """Adapters are kept in their own type, whatever the model computes in."""
    case = Case(draw_slots("uniform", 21, 3, torch.Generator().manual_seed(1)), 3, 4)
    case.y, case.x = case.y.to(torch.bfloat16), case.x.to(torch.bfloat16)
    case.check()


def test_tensors_that_are_not_contiguous() -> None:
    slots = draw_slots("uniform", 24, 3, torch.Generator().manual_seed(2))
    case = Case(slots, 3, 4, inputs=8, outputs=(10,))
    wide = case.random(24, 30)
    case.y = wide[:, 7:27:2]  # every second column
    around = wide.clone()
    case.x = case.random(8, 24).T
    case.a = [case.random(3, 8, 4).transpose(1, 2)]
    case.b = [case.random(4, 3, 10).permute(1, 2, 0)]
    for tensor in (case.y, case.x, case.a[0], case.b[0]):
        assert not tensor.is_contiguous()
    case.check()
    assert torch.equal(wide[:, :7], around[:, :7])
    assert torch.equal(wide[:, 8:27:2], around[:, 8:27:2])


def test_a_rank_padded_with_zeros_changes_nothing() -> None:
    case = Case(torch.tensor([0, 1, BASE, 1]), 2, rank=3)
    expected = case.expected()
    a = [torch.nn.functional.pad(case.a[0], (0, 0, 0, 5))]
    b = [torch.nn.functional.pad(case.b[0], (0, 5))]
    low_rank_delta_(case.y, case.x, a, b, TokenGroups.of(case.slots.to(DEVICE), 2, 8))
    torch.testing.assert_close(case.y, expected, rtol=1e-5, atol=1e-5)


def test_values_of_other_slots_do_not_matter() -> None:
    """A broken adapter in a slot that no token names reaches nobody."""
    case = Case(torch.tensor([2, BASE, 0, 2]), 3, rank=3)
    expected = case.expected()
    case.a[0][1], case.b[0][1] = torch.nan, torch.inf
    low_rank_delta_(case.y, case.x, case.a, case.b, case.groups)
    torch.testing.assert_close(case.y, expected, rtol=1e-5, atol=1e-5)


def test_a_broken_adapter_reaches_only_its_own_tokens() -> None:
    case = Case(torch.tensor([0, 1, BASE, 0]), 2, rank=3)
    expected = case.expected()
    case.a[0][1] = torch.nan
    low_rank_delta_(case.y, case.x, case.a, case.b, case.groups)
    torch.testing.assert_close(case.y[[0, 2, 3]], expected[[0, 2, 3]], rtol=1e-5, atol=1e-5)
    assert bool(case.y[1].isnan().all())


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_base_model_only(tokens: int) -> None:
    Case(torch.full((tokens,), BASE, dtype=torch.int32), 2, rank=3).check()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda case: {"y": case.y[0]}, "y and x must be"),
        (lambda case: {"x": case.x[:3]}, "y and x must be"),
        (lambda case: {"groups": TokenGroups(4, 3, 3)}, r"a\[0\] must hold 3 slots of rank 3"),
        (lambda case: {"groups": TokenGroups(4, 2, 4)}, r"a\[0\] must hold 2 slots of rank 4"),
        (lambda case: {"a": case.a[:1]}, "a and b must have"),
        (lambda case: {"a": [], "b": []}, "a and b must have"),
        (lambda case: {"a": [case.a[0], case.a[1][:, :, 1:]]}, r"a\[1\] must be \[slots, rank, 37\]"),
        (lambda case: {"a": [case.a[0][0], case.a[1]]}, r"a\[0\] must be"),
        (lambda case: {"a": [case.a[0], case.a[1][:, 1:]]}, r"a\[1\] must be .* like a\[0\]"),
        (lambda case: {"b": [case.b[0][:, :, 1:], case.b[1]]}, r"b\[0\] must be \[2, out, 3\]"),
        (lambda case: {"b": [case.b[0][:1], case.b[1]]}, r"b\[0\] must be"),
        (lambda case: {"y": case.y[:, 1:]}, "offset must leave room"),
        (lambda case: {"offset": 1}, "offset must leave room"),
        (lambda case: {"offset": -1}, "offset must leave room"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_is_written(change: Any, names: str) -> None:
    case = Case(torch.tensor([0, 1, BASE, 1]), 2, rank=3, outputs=(4, 6))
    before = case.y.clone()
    arguments = {"y": case.y, "x": case.x, "a": case.a, "b": case.b, "groups": case.groups, **change(case)}
    with pytest.raises(ValueError, match=names):
        low_rank_delta_(**arguments)
    assert torch.equal(case.y, before)


def test_registered_as_pytorch_wants_it() -> None:
    case = Case(torch.tensor([0, 1, BASE, 1]), 2, rank=3, outputs=(4, 6), columns=12)
    groups = case.groups
    arguments = (case.y, case.x, case.a, case.b, groups.order, groups.tiles, 1, 0.5)
    torch.library.opcheck(torch.ops.preft.low_rank_delta_.default, arguments)


def test_inside_one_compiled_graph() -> None:
    """The op stays whole in a graph: other slots and another number of tokens give the right result too."""

    groups = TokenGroups(8, 2, 3, DEVICE)

    def layer(x: torch.Tensor, a: list[torch.Tensor], b: list[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
        y = y * 1.0
        low_rank_delta_(y, x, a, b, groups)
        return y * 2.0

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for slots in ([0, 1, BASE, 1, 0], [BASE, BASE, 1], [1, 1, 1, 1]):
        case = Case(torch.tensor(slots), 2, rank=3)
        groups.set(case.slots.numpy())
        before = case.y.clone()
        got = compiled(case.x, case.a, case.b, case.y)
        torch.testing.assert_close(got, 2.0 * case.expected(), rtol=1e-5, atol=1e-5)
        assert torch.equal(case.y, before)


@pytest.mark.parametrize("rank", [128, 200, 256])
def test_high_ranks(rank: int) -> None:
    """More than one program's share of ranks."""
    Case(
        draw_slots("uniform", 40, 2, torch.Generator().manual_seed(rank)), 2, rank, inputs=70, outputs=(65, 40)
    ).check()


@pytest.mark.parametrize("adapters", [64, 512])
def test_many_adapters(adapters: int) -> None:
    Case(draw_slots("uniform", 257, adapters, torch.Generator().manual_seed(adapters)), adapters, rank=2).check()


def test_a_prompt_longer_than_a_tile_beside_single_tokens() -> None:
    slots = torch.tensor([0] * 70 + [1, 0, BASE, 1, 1] + [2] * 33 + [BASE] * 9 + [0] * 8)
    Case(slots, 3, rank=4, outputs=(33, 20)).check()


def test_more_slices_than_one_launch_takes() -> None:
    Case(draw_slots("uniform", 30, 3, torch.Generator().manual_seed(5)), 3, 4, outputs=(9, 8, 7, 6, 5)).check(offset=0)


def test_slices_of_different_strides() -> None:
    case = Case(torch.tensor([0, 1, BASE, 1]), 2, rank=3, outputs=(9, 8))
    case.a[1] = case.a[1].transpose(1, 2).contiguous().transpose(1, 2)
    case.b[1] = case.b[1].transpose(1, 2).contiguous().transpose(1, 2)
    case.check()


def test_what_is_beyond_a_slot_s_rank_isn_t_read() -> None:
    case = Case(torch.tensor([0, 1, BASE, 1, 0]), 2, rank=24)
    ranks = np.array([5, 16])
    for slot, rank in enumerate(ranks):
        case.a[0][slot, rank:], case.b[0][slot, :, rank:] = 0, 0
    expected = case.expected()
    for slot, rank in enumerate((8, 16)):
        case.a[0][slot, rank:], case.b[0][slot, :, rank:] = torch.nan, torch.nan
    groups = TokenGroups(5, 2, 24, DEVICE)
    groups.set(case.slots.numpy(), ranks)
    low_rank_delta_(case.y, case.x, case.a, case.b, groups)
    torch.testing.assert_close(case.y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE != "cuda", reason="captures a CUDA graph")
def test_a_captured_graph_follows_the_groups() -> None:
    case = Case(torch.tensor([0, 1, BASE, 1, 0]), 3, rank=4)
    groups, before = TokenGroups(5, 3, 4, DEVICE), case.y.clone()
    groups.set(case.slots.numpy())
    low_rank_delta_(case.y, case.x, case.a, case.b, groups)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        low_rank_delta_(case.y, case.x, case.a, case.b, groups)
    for slots in ([2, 2, 2, 0, BASE], [BASE] * 5, [BASE, 1]):
        case.slots = torch.tensor([*slots, *[BASE] * (5 - len(slots))])
        case.y.copy_(before)
        expected = case.expected()
        groups.set(np.array(slots))
        graph.replay()
        torch.testing.assert_close(case.y, expected, rtol=1e-5, atol=1e-5)

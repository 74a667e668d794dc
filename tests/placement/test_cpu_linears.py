"""Packed, int8 and int4 linear layers: what they compute and weigh, and how they come off."""

import pytest
import torch
from torch import nn

from service.placement import cpu_linears
from service.placement.cpu_linears import Int4Linear
from service.placement.cpu_linears import Int8Linear
from service.placement.cpu_linears import PackedLinear
from service.placement.tensors import nbytes
from service.placement.watch import compare
from service.placement.watch import fingerprint

DTYPES = [torch.float32, torch.bfloat16]


def linear(columns: int, rows: int, dtype: torch.dtype, *, bias: bool = False) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rows * columns)
        made = nn.Linear(columns, rows, bias=bias, dtype=dtype)
    return made.requires_grad_(False)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def off(near: torch.Tensor, exact: torch.Tensor) -> float:
    """How far apart, as a share of the exact one's size."""
    return float((near.float() - exact.float()).norm() / exact.float().norm())


def held(module: nn.Module) -> int:
    """Bytes of a layer's tensors, its bias apart."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return sum(nbytes(tensor) for name, tensor in tensors if name != "bias")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 512])
def test_a_packed_layer_computes_what_it_did(tokens: int, bias: bool, dtype: torch.dtype) -> None:
    layer = linear(256, 320, dtype, bias=bias)
    x = numbers(1, tokens, 256, dtype=dtype)
    with torch.inference_mode():
        before = layer(x)
        assert cpu_linears.pack(nn.ModuleList([layer])) == 1
        assert isinstance(layer, PackedLinear)
        after = layer(x)
    assert (after.shape, after.dtype) == (before.shape, before.dtype)
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "rows"), [(256, 256), (64, 1024), (576, 192), (1536, 576)])
def test_a_packed_copy_is_as_large_as_its_weight(
    columns: int, rows: int, dtype: torch.dtype
) -> None:
    layer = linear(columns, rows, dtype)
    cpu_linears.pack(nn.ModuleList([layer]))
    assert nbytes(layer.get_buffer("packed")) == nbytes(layer.weight)


def test_unpacked_layers_are_what_they_were() -> None:
    model = nn.ModuleList([linear(256, 256, torch.float32)])
    before, state = fingerprint(model), set(model.state_dict())
    cpu_linears.pack(model)
    assert set(model.state_dict()) == state
    cpu_linears.unpack(model)
    assert type(model[0]) is nn.Linear
    assert compare(before, model) == []
    assert list(model.buffers()) == []


@pytest.mark.parametrize(
    "layer",
    [
        linear(64, 64, torch.float32),  # small
        linear(250, 320, torch.float32),  # would be padded
        linear(256, 257, torch.float32),
        linear(256, 256, torch.float16),
        nn.Identity(),
    ],
)
def test_other_layers_are_not_packed(layer: nn.Module) -> None:
    assert cpu_linears.pack(nn.ModuleList([layer])) == 0


def test_a_layer_under_a_hook_is_left_alone() -> None:
    layer = linear(256, 256, torch.float32)
    layer._hf_hook = object()
    assert list(cpu_linears.packable(nn.ModuleList([layer]))) == []
    assert list(cpu_linears.quantisable(nn.ModuleList([layer]))) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 512])
@pytest.mark.parametrize(("kind", "most"), [(Int8Linear, 0.02), (Int4Linear, 0.12)])
def test_a_quantised_layer_computes_nearly_what_it_did(
    kind: type[nn.Module], most: float, tokens: int, bias: bool, dtype: torch.dtype
) -> None:
    layer = linear(128, 96, dtype, bias=bias)
    x = numbers(1, tokens, 128, dtype=dtype)
    before = layer.weight.clone()
    with torch.inference_mode():
        exact, near = layer(x), kind(layer)(x)
    assert torch.equal(layer.weight, before)
    assert (near.shape, near.dtype) == (exact.shape, exact.dtype)
    assert 0 < off(near, exact) < most


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "rows"), [(64, 32), (96, 48), (160, 272), (576, 1536)])
@pytest.mark.parametrize(("kind", "name"), [(Int8Linear, "int8"), (Int4Linear, "int4")])
def test_a_quantised_layer_weighs_what_was_planned(
    kind: type[nn.Module], name: str, columns: int, rows: int, dtype: torch.dtype
) -> None:
    layer = linear(columns, rows, dtype)
    assert held(kind(layer)) == cpu_linears.quantised_bytes(layer, name)


def test_int8_keeps_small_numbers_of_a_token_beside_a_very_large_one() -> None:
    """One digit would lose them: its step is an 127th of the largest."""
    plain = linear(128, 96, torch.float32)
    layer = Int8Linear(plain)
    scale = plain.weight.abs().amax(1, keepdim=True) / 127
    plain.weight.copy_((plain.weight / scale).round() * scale)  # what the layer holds
    x = numbers(4, 128)
    x[:, 7] = torch.tensor([0.0, 30.0, -100.0, 300.0])
    without = x.clone()
    without[:, 7] = 0
    alone = torch.zeros(4, 128)
    alone[:, 7] = x[:, 7]
    assert off(layer(x) - plain(alone), plain(without)) < 0.01
    torch.testing.assert_close(layer(without), plain(without), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [PackedLinear, Int8Linear, Int4Linear])
def test_a_layer_takes_a_part_of_a_wider_tensor(kind: type[nn.Module]) -> None:
    plain = linear(256, 256, torch.float32)
    wide = numbers(1, 5, 512)
    part = wide[..., 128:384]
    if kind is PackedLinear:
        layer: nn.Module = linear(256, 256, torch.float32)
        cpu_linears.pack(nn.ModuleList([layer]))
    else:
        layer = kind(plain)
    torch.testing.assert_close(layer(part), layer(part.contiguous()))


def test_what_int8_gives_a_token_does_not_depend_on_its_neighbours() -> None:
    layer = Int8Linear(linear(128, 96, torch.float32))
    x = numbers(8, 128)
    x[3] *= 1000
    alone = torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(layer(x), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_zeros_stay_zeros_and_what_is_not_finite_stays_so(kind: type[nn.Module]) -> None:
    plain = linear(64, 32, torch.float32)
    plain.weight[3] = 0
    layer = kind(plain)
    x = numbers(3, 64)
    x[0] = 0
    x[1, 5] = float("nan")
    x[2, 5] = float("inf")
    out = layer(x)
    assert torch.equal(out[0], torch.zeros(32))
    assert not out[1].isfinite().any()
    assert not out[2].isfinite().all()


def test_weights_in_groups_of_sixteen_steps_are_kept_by_int4() -> None:
    """Such as those of a Q4_1 file: the grid is found again, whatever it is."""
    plain = linear(64, 32, torch.float32)
    steps = torch.randint(0, 16, (32, 2, 32), generator=torch.Generator().manual_seed(1))
    steps[:, :, 0], steps[:, :, 1] = 0, 15
    plain.weight.copy_((steps * 0.01 - 0.06).reshape(32, 64))
    x = numbers(4, 64)
    torch.testing.assert_close(Int4Linear(plain)(x), plain(x), rtol=1e-3, atol=1e-4)

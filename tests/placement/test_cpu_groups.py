"""Layers that read the same tensor: how they are found, and that each gets its own part."""

import gc
import weakref

import pytest
import torch
from torch import nn

from service.placement import cpu_groups
from service.placement import cpu_linears
from service.placement.cpu_groups import Shared
from service.placement.cpu_linears import QuantisedLinear
from service.placement.tensors import nbytes

WIDTH = 256


class Block(nn.Module):
    """Four layers that read x, one that reads a part of what they gave, one that reads a copy."""

    def __init__(self, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        sizes = {"q": 256, "k": 320, "v": 256, "odd": 272, "out": 256, "apart": 256}
        for name, rows in sizes.items():
            self.add_module(name, nn.Linear(WIDTH, rows, bias=bias, dtype=dtype))
        self.broken = False
        self.flat = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x)
        if self.broken:
            raise RuntimeError("half way")
        if self.flat:
            q.view(-1)
        sums = self.k(x).sum(-1, keepdim=True) + self.odd(x).sum(-1, keepdim=True)
        return self.out(q) + self.v(x) + self.apart(x.clone()) + sums


class Model(nn.Module):
    def __init__(self, *, bias: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(bias=bias, dtype=dtype) for _ in range(2))
        self.dtype = dtype

    def get_output_embeddings(self) -> None:
        return None

    def forward(
        self,
        x: torch.Tensor | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        use_cache: bool = False,
    ) -> torch.Tensor:
        if x is None:
            x = torch.ones(1, 2, WIDTH, dtype=self.dtype)
        for block in self.blocks:
            x = block(x) / 8
        return x


def model(*, bias: bool = False, dtype: torch.dtype = torch.float32) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Model(bias=bias, dtype=dtype).requires_grad_(False).eval()


def numbers(tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(1, tokens, WIDTH, generator=generator).to(dtype)


def found(its: nn.Module) -> list[list[str]]:
    return cpu_groups.find(its, dict(cpu_linears.packable(its)))


def groups_of(its: nn.Module) -> set[Shared]:
    shared = (getattr(module, "shared", None) for module in its.modules())
    return {one for one in shared if one is not None}


def test_layers_of_one_parent_that_read_one_tensor_are_a_group_in_the_order_of_their_calls():
    assert found(model()) == [[f"blocks.{i}.{name}" for name in ("q", "k", "v")] for i in (0, 1)]


def test_a_tensor_that_changed_in_between_makes_no_group():
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(256, 256), nn.Linear(256, 256)

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            x = torch.ones(1, 2, 256)
            first: torch.Tensor = self.a(x)
            return first + self.b(x.mul_(2))

    assert found(Changing()) == []


def test_a_model_that_needs_outputs_in_one_piece_or_raises_has_no_groups():
    its = model()
    its.blocks[0].flat = True
    assert found(its) == []
    its.blocks[0].flat, its.blocks[0].broken = False, True
    assert found(its) == []
    assert cpu_linears.pack(its) == 2 * 5
    assert groups_of(its) == set()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in its.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_packed_model_with_groups_computes_what_it_did(
    tokens: int, bias: bool, dtype: torch.dtype
) -> None:
    its = model(bias=bias, dtype=dtype)
    x = numbers(tokens, dtype)
    with torch.inference_mode():
        before = its(x)
        assert cpu_linears.pack(its) == 2 * 5
        assert len(groups_of(its)) == 2
        near = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(its(x), before, **near)
        cpu_linears.unpack(its)
        assert torch.equal(its(x), before)
    assert groups_of(its) == set()
    assert {type(m) for b in its.blocks for m in b.children()} == {nn.Linear}
    assert list(its.buffers()) == []


def test_copies_of_a_group_are_as_large_as_its_weights() -> None:
    its = model()
    cpu_linears.pack(its)
    packed = [m for m in its.modules() if isinstance(m, cpu_linears.PackedLinear)]
    assert sum(map(nbytes, its.buffers())) == sum(nbytes(layer.weight) for layer in packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_layers_of_a_group_give_what_they_give_alone_and_weigh_the_same(
    quantize: str, tokens: int, bias: bool, dtype: torch.dtype
) -> None:
    its, alone = model(bias=bias, dtype=dtype), model(bias=bias, dtype=dtype)
    planned = sum(
        cpu_linears.quantised_bytes(layer, quantize) for _, layer in cpu_linears.quantisable(alone)
    )
    assert cpu_linears.quantise(its, quantize) == 2 * 6
    assert len(groups_of(its)) == 2
    kind = cpu_linears.Int8Linear if quantize == "int8" else cpu_linears.Int4Linear
    for block in alone.blocks:
        for name, layer in list(block.named_children()):
            block.add_module(name, kind(layer))
    tensors = [*its.named_parameters(), *its.named_buffers()]
    assert sum(nbytes(t) for name, t in tensors if not name.endswith("bias")) == planned
    x = numbers(tokens, dtype)
    near = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    with torch.inference_mode():
        torch.testing.assert_close(its(x), alone(x), **near)
    assert all(isinstance(m, QuantisedLinear) for b in its.blocks for m in b.children())


def test_nothing_is_held_after_a_step() -> None:
    its = model()
    cpu_linears.pack(its)
    x = numbers(3)
    gone = weakref.ref(x)
    with torch.inference_mode():
        its(x)
    assert all(shared.empty for shared in groups_of(its))
    del x
    gc.collect()
    assert gone() is None


def test_what_a_step_that_raised_left_is_not_given_to_the_next() -> None:
    its = model()
    cpu_linears.pack(its)
    exact = its(numbers(3))
    its.blocks[1].broken = True
    with pytest.raises(RuntimeError, match="half way"):
        its(numbers(4))
    its.blocks[1].broken = False
    assert torch.equal(its(numbers(3)), exact)
    assert all(shared.empty for shared in groups_of(its))


def test_a_layer_called_alone_or_twice_computes_what_it_should() -> None:
    its = model()
    block = its.blocks[0]
    x, other = numbers(2), numbers(5)
    exact = [(block.q(x), block.v(x)), (block.q(other), block.v(other))]
    cpu_linears.pack(its)
    for _ in range(2):
        torch.testing.assert_close(block.v(x), exact[0][1])
        torch.testing.assert_close(block.v(x), exact[0][1])
        torch.testing.assert_close(block.q(other), exact[1][0])
        torch.testing.assert_close(block.q(x), exact[0][0])


def test_a_part_is_given_once_and_of_the_very_tensor() -> None:
    shared, calls = Shared((1, 2)), []

    def product(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return torch.cat((x, x + 1, x + 2), -1)

    x = torch.zeros(1, 1)
    assert shared.part(0, x, product).tolist() == [[0]]
    assert shared.part(1, x, product).tolist() == [[1, 2]]
    assert (len(calls), shared.empty) == (1, True)
    shared.part(0, x, product)
    equal = x.clone()
    assert shared.part(1, equal, product).tolist() == [[1, 2]]
    assert calls[-1] is equal

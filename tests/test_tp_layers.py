"""Column- and row-parallel layers on 1 to 4 ranks against nn.Linear: values, every gradient, shapes and errors."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from torch import Tensor, nn

import pyshard
from pyshard.placement import tensor_shard
from pyshard.tp import layers as layers_module
from pyshard.tp.layers import ColumnParallelLinear, RowParallelLinear, SharedInput
from pyshard.tp.splits import bounds, split_sizes

# Sums of at most 40 products of numbers near 1, in another order: a few units in the last place of their size.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
WORLDS = pytest.mark.parametrize("world", [1, 2, 3, 4])


def _gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _same(name: str, got: Tensor | None, expected: Tensor) -> None:
    assert got is not None, name
    torch.testing.assert_close(got, expected, msg=lambda text: f"{name}: {text}", **CLOSE)


def _cut(x: Tensor, sizes: list[int], rank: int, dim: int) -> Tensor:
    begin, end = bounds(sizes, rank)
    return x.narrow(dim, begin, end - begin)


def _grad_cut(layer: Any, whole: nn.Linear) -> None:
    """Every gradient of a parallel layer is its part of the unsharded layer's."""
    for key, param in layer.named_parameters():
        shard = tensor_shard(param)
        assert shard is not None
        _same(key, param.grad, shard.cut(getattr(whole, key).grad))


def _values(rank: int, world: int, seed: int) -> None:
    group = dist.group.WORLD
    # Features that divide and that do not, fewer than ranks; rows likewise.
    for (features, other), rows, bias, parallel in itertools.product(
        [(12, 8), (7, 10), (2, 5)], [12, 5, 1], [True, False], [True, False]
    ):
        generator = _gen(seed)
        sizes = split_sizes(rows, world)
        even = len(set(sizes)) == 1
        for gather in (False, True):
            torch.manual_seed(seed % 1000)
            whole = nn.Linear(other, features, bias)
            after = torch.random.get_rng_state()
            torch.manual_seed(seed % 1000)
            layer = ColumnParallelLinear(
                other, features, bias, group=group, sequence_parallel=parallel, gather_output=gather
            )
            assert torch.equal(after, torch.random.get_rng_state())
            for key, param in layer.named_parameters():
                assert torch.equal(param, tensor_shard(param).cut(getattr(whole, key)))
            x = torch.randn(2, rows, other, generator=generator, requires_grad=True)
            weights = torch.randn(2, rows, features, generator=generator)
            y = whole(x)
            (y * weights).sum().backward()
            mine = (_cut(x, sizes, rank, 1) if parallel else x).detach().clone().requires_grad_()
            out = layer(mine, None if even or not parallel else sizes)
            parts = split_sizes(features, world)
            _same("column output", out, y if gather else _cut(y, parts, rank, -1))
            (out * (weights if gather else _cut(weights, parts, rank, -1))).sum().backward()
            _same("column input", mine.grad, _cut(x.grad, sizes, rank, 1) if parallel else x.grad)
            _grad_cut(layer, whole)
        for split in (True, False):
            torch.manual_seed(seed % 1000)
            whole = nn.Linear(features, other, bias)
            torch.manual_seed(seed % 1000)
            row = RowParallelLinear(
                features, other, bias, group=group, sequence_parallel=parallel, input_is_parallel=not split
            )
            for key, param in row.named_parameters():
                assert torch.equal(param, tensor_shard(param).cut(getattr(whole, key)))
            x = torch.randn(2, rows, features, generator=generator, requires_grad=True)
            weights = torch.randn(2, rows, other, generator=generator)
            y = whole(x)
            (y * weights).sum().backward()
            parts = split_sizes(features, world)
            mine = (x if split else _cut(x, parts, rank, -1)).detach().clone().requires_grad_()
            out = row(mine)
            _same("row output", out, _cut(y, sizes, rank, 1) if parallel else y)
            (out * (_cut(weights, sizes, rank, 1) if parallel else weights)).sum().backward()
            _same("row input", mine.grad, x.grad if split else _cut(x.grad, parts, rank, -1))
            _grad_cut(row, whole)


@WORLDS
def test_values_and_gradients(world: int, seed: int) -> None:
    """Against nn.Linear of the same seed, which also gives the same first weights and leaves the same random state."""
    run(_values, world, seed)


def _uneven(rank: int, world: int, seed: int) -> None:
    """Row counts that the caller chooses, with an empty rank."""
    group, generator = dist.group.WORLD, _gen(seed)
    sizes = [3, 0, 2, 1][:world]
    column = ColumnParallelLinear(6, 5, group=group, sequence_parallel=True)
    row = RowParallelLinear(5, 6, group=group, sequence_parallel=True)
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6))
    torch.manual_seed(0)
    column.reset_parameters()
    row.reset_parameters()
    x = torch.randn(sum(sizes), 6, generator=generator, requires_grad=True)
    weights = torch.randn(sum(sizes), 6, generator=generator)
    y = whole(x)
    (y * weights).sum().backward()
    mine = _cut(x, sizes, rank, 0).detach().clone().requires_grad_()
    out = row(column(mine, sizes).relu(), sizes)
    _same("output", out, _cut(y, sizes, rank, 0))
    (out * _cut(weights, sizes, rank, 0)).sum().backward()
    _same("input", mine.grad, _cut(x.grad, sizes, rank, 0))
    _grad_cut(column, whole[0])
    _grad_cut(row, whole[2])


@pytest.mark.parametrize("world", [1, 3, 4])
def test_rows_that_the_caller_chooses(world: int, seed: int) -> None:
    run(_uneven, world, seed)


def _from_linear(rank: int, world: int, seed: int) -> None:
    from transformers.pytorch_utils import Conv1D

    group = dist.group.WORLD
    torch.manual_seed(seed % 1000)
    heads, width = 5, 10
    sizes = split_sizes(heads, world)
    pieces = []
    for r in range(world):
        begin, end = bounds(sizes, r)
        pieces.append([(part * width + begin * 2, part * width + end * 2) for part in range(3)])
    for whole in (nn.Linear(6, 3 * width), Conv1D(3 * width, 6)):
        nn.init.normal_(whole.bias)
        layer = ColumnParallelLinear.from_linear(whole, group=group, pieces=pieces)
        assert layer.weight.is_contiguous() and layer.weight.untyped_storage().nbytes() == layer.weight.nbytes
        x = torch.randn(3, 4, 6, requires_grad=True)
        mine = x.detach().clone().requires_grad_()
        y = whole(x)
        keep = torch.cat([torch.arange(*piece) for piece in pieces[rank]])
        out = layer(mine)
        _same("fused output", out, y[..., keep])
        weights = torch.randn(y.shape)
        (y * weights).sum().backward()
        (out * weights[..., keep]).sum().backward()
        _same("fused input", mine.grad, x.grad)
        _grad_cut(layer, whole)
    whole = Conv1D(4, 7)
    whole.weight.requires_grad_(False)
    row = RowParallelLinear.from_linear(whole, group=group)
    assert row.weight.shape == (split_sizes(7, world)[rank], 4) and not row.weight.requires_grad
    x = torch.randn(2, 7)
    _same("conv row", row(_cut(x, split_sizes(7, world), rank, 1)), whole(x))
    for dtype in (torch.bfloat16, torch.float64):
        whole = nn.Linear(8, 6, dtype=dtype)
        row = RowParallelLinear.from_linear(whole, group=group)
        assert row.weight.dtype == dtype
        # Values of few bits: sums are exact, so the bits must agree.
        whole.weight.data.copy_(torch.randint(-2, 3, (6, 8)))
        whole.bias.data.copy_(torch.randint(-2, 3, (6,)))
        row = RowParallelLinear.from_linear(whole, group=group)
        x = torch.randint(-2, 3, (3, 8)).to(dtype)
        assert torch.equal(row(_cut(x, split_sizes(8, world), rank, 1)), whole(x))


@WORLDS
def test_from_existing_layers(world: int, seed: int) -> None:
    """nn.Linear and Conv1D, fused weights cut in pieces; frozen weights and dtypes stay what they are."""
    run(_from_linear, world, seed)


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """How many layers each matmul with communication served."""
    calls: list[int] = []
    real = layers_module.column_outputs

    def counting(layers: Any, *args: Any) -> Any:
        calls.append(len(layers))
        return real(layers, *args)

    layers_module.column_outputs = counting
    try:
        yield calls
    finally:
        layers_module.column_outputs = real


def _shared(rank: int, world: int, seed: int) -> None:
    group = dist.group.WORLD
    torch.manual_seed(seed % 1000)
    for parallel in (False, True):
        whole = [nn.Linear(4, width) for width in (6, 3, 3)]
        layers = [ColumnParallelLinear.from_linear(m, group=group, sequence_parallel=parallel) for m in whole]
        shared = SharedInput(layers)
        x = torch.randn(world * 2, 4, requires_grad=True)
        mine = (_cut(x, [2] * world, rank, 0) if parallel else x).detach().clone().requires_grad_()
        with counted() as calls:
            outs = [layer(mine) for layer in layers]
        assert calls == [3]  # one call of all three
        assert not shared._outputs and shared._key is None
        for out, module in zip(outs, whole):
            _same("shared output", out, _cut(module(x), split_sizes(module.out_features, world), rank, -1))
        sum(out.square().sum() for out in outs).backward()
        sum(module(x).square().sum() for module in whole).backward()
        _same("shared input", mine.grad, _cut(x.grad, [2] * world, rank, 0) if parallel else x.grad)
        for layer, module in zip(layers, whole):
            _grad_cut(layer, module)
        # A changed x, changed weights and another grad mode are computed anew.
        first = layers[0](mine)
        with torch.no_grad():
            assert not layers[1](mine).requires_grad
            mine.mul_(2)
        second = layers[0](mine)
        bias = _cut(whole[0].bias, split_sizes(6, world), rank, 0)
        _same("changed x", second - bias, 2 * (first - bias))
        with torch.no_grad():
            layers[1].bias.add_(0)
            layers[1].weight.zero_()
        out = layers[1](mine)
        _same("changed weight", out, layers[1].bias.expand_as(out))
        # What nobody fetches goes with x.
        shared.clear()
        x = mine.detach() + 1
        with torch.no_grad():
            layers[0](x)
        assert len(shared._outputs) == 2
        del x
        assert not shared._outputs and shared._key is None
        with torch.inference_mode():
            ones = torch.ones_like(mine)
            assert torch.equal(layers[0](ones), layers[0](ones))


@WORLDS
def test_layers_of_one_input(world: int, seed: int) -> None:
    """Query, key and value: the first call computes all; nothing stale is handed out and nothing stays."""
    run(_shared, world, seed)


def _errors(rank: int, world: int) -> None:
    group = dist.group.WORLD
    column = ColumnParallelLinear(4, 6, group=group)
    cut_column = ColumnParallelLinear(4, 6, group=group, sequence_parallel=True)
    row = RowParallelLinear(6, 4, group=group, sequence_parallel=True)
    cases: list[tuple[Any, type, str]] = [
        (lambda: column(torch.ones(2, 5)), ValueError, r"got an input of shape \(2, 5\); expected \[..., 4\]"),
        (lambda: column(torch.ones(2, 4), [1, 1]), ValueError, "without sequence_parallel"),
        (lambda: cut_column(torch.ones(4)), ValueError, "expected .*S, 4"),
        (lambda: cut_column(torch.ones(2, 4), [2]), ValueError, r"sizes=\[2\] for 2 ranks"),
        (lambda: cut_column(torch.ones(2, 4), [3, 3]), ValueError, "its own size"),
        (lambda: row(torch.ones(4, 6)), ValueError, "expected .*3"),
        (lambda: row(torch.ones(4, 3), [1, 2]), ValueError, "their sum"),
        (
            lambda: ColumnParallelLinear(4, 6, group=group, pieces=[[(0, 3)], [(2, 6)]]),
            ValueError,
            "cover 0 to 6 once",
        ),
        (
            lambda: ColumnParallelLinear(
                4, 4, group=group, pieces=[[(0, 1), (2, 3)], [(1, 2), (3, 4)]], gather_output=True
            ),
            ValueError,
            "in rank order",
        ),
        (lambda: ColumnParallelLinear.from_linear(nn.Bilinear(2, 2, 2), group=group), TypeError, "got a Bilinear"),
    ]
    for call, kind, text in cases:
        with pytest.raises(kind, match=text):
            call()
    assert f"rank {rank} of 2: output features [{3 * rank}, {3 * rank + 3})" in repr(column)


def test_errors() -> None:
    run(_errors, 2)


def _meta(rank: int, world: int, seed: int) -> None:
    """A layer made on the meta device and moved is still marked, and starts with the unsharded values."""
    layer = ColumnParallelLinear(4, 7, group=dist.group.WORLD, device="meta", main_grad=True)
    layer.to_empty(device="cpu")
    torch.manual_seed(seed % 1000)
    layer.reset_parameters()
    torch.manual_seed(seed % 1000)
    whole = nn.Linear(4, 7)
    assert torch.equal(layer.weight, tensor_shard(layer.weight).cut(whole.weight))
    assert layer.weight.main_grad is True
    assert tensor_shard(layer.bias).shape == (7,)


def test_meta_device(seed: int) -> None:
    run(_meta, 2, seed)


def _fp32_gradients(rank: int, world: int) -> None:
    """bf16 layers whose weight gradients add up in fp32, where bf16 would round each sum."""
    group = dist.group.WORLD
    torch.manual_seed(3)
    layers = [
        ColumnParallelLinear(8, 12, group=group, main_grad=True, dtype=torch.bfloat16),
        RowParallelLinear(12, 8, group=group, main_grad=True, dtype=torch.bfloat16),
    ]
    model = nn.Sequential(*layers)
    totals = [torch.zeros_like(layer.weight, dtype=torch.float32) for layer in layers]
    for step in range(3):
        x = torch.randn(5, 8).bfloat16() * 3**step
        one = torch.autograd.grad(model(x).square().sum(), [layer.weight for layer in layers])
        for total, gradient in zip(totals, one, strict=True):
            total += gradient.float()
        model(x).square().sum().backward()
        for layer, total in zip(layers, totals, strict=True):
            assert layer.weight.grad.dtype == torch.float32
            assert torch.equal(layer.weight.grad, total), step
    # What nobody asks for is not touched.
    before = layers[0].weight.grad.clone()
    x.requires_grad_()
    torch.autograd.grad(model(x).sum(), x)
    assert torch.equal(layers[0].weight.grad, before)
    (asked,) = torch.autograd.grad(model(x).sum(), layers[0].weight)
    assert asked.abs().sum() > 0
    assert torch.equal(layers[0].weight.grad, before)


def test_main_grad_of_16_bit_layers() -> None:
    run(_fp32_gradients, 2)


def from_meta(rank: int, world: int) -> None:
    """A model that was cut without memory says what its parameters are parts of when it has some."""
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=33, **sizes)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    mesh = pyshard.init_mesh(tp=world)
    pyshard.tp.parallelize(model, mesh)
    before = {name: tensor_shard(param) for name, param in model.named_parameters()}
    model.to_empty(device="cpu")
    cut = {name: shard for name, shard in before.items() if shard is not None and shard.dim is not None}
    assert len(cut) == 2 * 7 + 2
    for name, shard in cut.items():
        assert tensor_shard(model.get_parameter(name)) == shard, name
    values = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(values, assign=True)
    for name, shard in cut.items():
        assert tensor_shard(model.get_parameter(name)) == shard, name


def test_shards_outlive_a_move_from_the_meta_device() -> None:
    run(from_meta, 2)

"""The operators behind the tensor-parallel matmuls: torch's own checks, graphs, second derivatives, fp32 gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests import ranks


def _inputs(rank: int, world: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed + rank)
    x = torch.randn(3, 4, generator=g, dtype=dtype, requires_grad=True)
    weights = [torch.randn(n, 4, generator=g, dtype=dtype, requires_grad=True) for n in (5, 2)]
    bias = torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=dtype, requires_grad=True)
    whole = torch.randn(7, 4, generator=g, dtype=dtype, requires_grad=True)
    return x, *weights, bias, whole


def _checks(rank: int, world: int, seed: int) -> None:
    from pyshard.tp import gradients  # noqa: F401

    group = dist.group.WORLD.group_name
    x, w, v, bias, whole = _inputs(rank, world, seed)
    ops = torch.ops.pyshard
    # Ranks run the checks in step, so that they meet in every call.
    torch.library.opcheck(ops.tp_column, (x, [w, v], [bias, x.new_empty(0, 0)], [3] * world, [0, 0], -2, True, group))
    torch.library.opcheck(ops.tp_column, (whole, [w], [bias], [4, 3], [0], -2, False, group))
    torch.library.opcheck(ops.tp_row, (whole, w, bias, [4, 3], 0, -2, True, group))
    torch.library.opcheck(ops.tp_row, (whole, w, None, [4, 3], 0, -2, False, group))
    g = torch.randn(3 * world, 5, dtype=torch.float64)
    torch.library.opcheck(
        ops.tp_column_backward,
        ([g], x.detach(), [w.detach()], [3] * world, [0], -2, True, group, True, [True], [True]),
    )
    torch.library.opcheck(
        ops.tp_row_backward,
        (g[:4], whole.detach()[:7], w.detach(), [4, 3], 0, -2, True, group, True, True, True)
        if rank == 0
        else (g[:3], whole.detach()[:7], w.detach(), [4, 3], 0, -2, True, group, True, True, True),
    )


def test_opcheck(seed: int) -> None:
    ranks.run(_checks, 2, seed)


def _twice(rank: int, world: int, seed: int) -> None:
    """Second derivatives against those of unsharded layers, whose weights and rows are the ranks' put together."""
    from pyshard import tp
    from pyshard.tp.splits import bounds, split_sizes

    group = dist.group.WORLD
    everyone = [_inputs(r, world, seed) for r in range(world)]
    rows = bounds(split_sizes(7, world), rank)

    def derivatives(loss: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(sum(torch.cos(f).sum() for f in first), inputs)
        return [*first, *second]

    def compare(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)  # other order of fp64 sums

    # Column: every rank has rows and output features of its own.
    x, w, v, _, whole = _inputs(rank, world, seed)
    a, b = tp.all_gather_matmul(x, [w, v], group=group)
    got = derivatives(torch.sin(a).pow(2).sum() + torch.sin(b).pow(2).sum(), [x, w, v])
    all_x = torch.cat([one[0] for one in everyone])
    plain = [one[i] for one in everyone for i in (1, 2)]
    loss = sum(torch.sin(all_x @ weight.t()).pow(2).sum() for weight in plain)
    inputs = [one[0] for one in everyone] + plain
    found = derivatives(loss, inputs)
    n = len(inputs)
    at = [rank, world + 2 * rank, world + 2 * rank + 1]
    compare(got, [found[i] for i in at] + [found[n + i] for i in at])

    # Row: every rank has input features of its own. The sum over ranks is one loss, of which each rank has its rows.
    y = tp.matmul_reduce_scatter(whole, w, group=group)
    got = derivatives(torch.sin(y).pow(2).sum(), [whole, w])
    parts = [(one[4], one[1]) for one in everyone]
    total = sum(one @ weight.t() for one, weight in parts)
    inputs = [tensor for part in parts for tensor in part]
    found = derivatives(torch.sin(total).pow(2).sum(), inputs)
    n = len(inputs)
    at = [2 * rank, 2 * rank + 1]
    compare(got, [found[i] for i in at] + [found[n + i] for i in at])
    compare([y], [total[rows[0] : rows[1]]])


@pytest.mark.parametrize("world", [2, 3])
def test_double_backward(world: int, seed: int) -> None:
    ranks.run(_twice, world, seed)


def _graph(rank: int, world: int, seed: int) -> None:
    from pyshard import tp

    group = dist.group.WORLD

    def block(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        a, b = tp.all_gather_matmul(x, [w, w], [bias, None], group=group)
        return tp.matmul_reduce_scatter(torch.tanh(a) * b, v, group=group)

    x, w, _, bias, _ = _inputs(rank, world, seed, torch.float32)
    v = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    eager = block(x, w, v, bias)
    wanted = torch.autograd.grad(eager.square().sum(), [x, w, v, bias])
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    out = compiled(x, w, v, bias)
    got = torch.autograd.grad(out.square().sum(), [x, w, v, bias])
    assert torch.equal(out, eager)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_compiled_in_one_graph(seed: int) -> None:
    ranks.run(_graph, 2, seed)


def _main_grads(rank: int, world: int, seed: int) -> None:
    """16-bit weights whose gradients are kept in fp32: four micro-batches add up without 16-bit sums."""
    from pyshard import tp

    group = dist.group.WORLD
    called = []
    for dtype in (torch.bfloat16, torch.float32):
        g = torch.Generator().manual_seed(seed + rank)
        w = torch.randn(6, 8, generator=g).to(dtype).requires_grad_()
        v = torch.randn(8, 6, generator=g).to(dtype).requires_grad_()
        for weight in (w, v):
            weight.main_grad = True
            weight.grad_dtype = torch.float32
            weight.register_post_accumulate_grad_hook(lambda p: called.append(p))
        wanted = {w: torch.zeros(6, 8), v: torch.zeros(8, 6)}
        for step in range(4):
            x = torch.randn(4, 8, generator=g).to(dtype)
            y = tp.all_gather_matmul(x, w, group=group)
            z = tp.matmul_reduce_scatter(y, v, group=group)
            up = torch.randn(z.shape, generator=g).to(dtype)
            kept = {p: p.grad.data_ptr() for p in (w, v) if p.grad is not None}
            a, b = w.detach().clone().requires_grad_(), v.detach().clone().requires_grad_()
            one = tp.matmul_reduce_scatter(tp.all_gather_matmul(x, a, group=group), b, group=group)
            one.backward(up)
            z.backward(up)
            wanted[w] += a.grad.float()
            wanted[v] += b.grad.float()
            for p, address in kept.items():
                assert p.grad.data_ptr() == address
            assert len(called) == 2, (step, len(called))
            called.clear()
            for p, want in wanted.items():
                assert p.grad.dtype == torch.float32
                if dtype == torch.bfloat16:
                    assert torch.equal(p.grad, want), step  # each product is rounded once, then added in fp32
                else:
                    torch.testing.assert_close(p.grad, want, rtol=1e-6, atol=1e-5)  # the sum is inside the matmul


def test_gradients_in_fp32(seed: int) -> None:
    ranks.run(_main_grads, 2, seed)


def _autocast(rank: int, world: int, seed: int) -> None:
    from pyshard import tp

    x, w, _, bias, _ = _inputs(rank, world, seed, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = tp.all_gather_matmul(x, w, bias, group=dist.group.WORLD)
    want = tp.all_gather_matmul(x.bfloat16(), w.bfloat16(), bias.bfloat16(), group=dist.group.WORLD)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, want)
    y.sum().backward()
    assert x.grad.dtype == w.grad.dtype == torch.float32


def test_autocast(seed: int) -> None:
    ranks.run(_autocast, 2, seed)

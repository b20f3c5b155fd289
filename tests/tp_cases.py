"""What one rank does in the tests of the tensor-parallel matmuls: the whole tensors are made on every rank, so each can
compare its part with the unsharded layer."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pyshard import tp
from pyshard.tp.splits import bounds, split_sizes

# One rounding of a 16-bit result, and one of each rank's partial sum.
ROUNDINGS = {torch.float32: 2**-23, torch.float64: 2**-52, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def close(who: str, got: Tensor, wanted: Tensor, dtype: torch.dtype, scale: float) -> None:
    """Raises unless got is wanted up to rounding. `scale`: of the terms that were added up, and their number."""
    assert got.dtype == dtype, (who, got.dtype)
    assert got.shape == wanted.shape, (who, got.shape, wanted.shape)
    bound = 4 * ROUNDINGS[dtype] * scale
    worst = (got.double() - wanted.double()).abs().max().item() if got.numel() else 0.0
    assert worst <= bound, f"{who}: differs by {worst:.3g}; expected at most {bound:.3g}"


def cut(whole: Tensor, dim: int, rank: int, world: int) -> Tensor:
    begin, end = bounds(split_sizes(whole.shape[dim], world), rank)
    return whole.narrow(dim, begin, end - begin)


def leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).detach().clone().requires_grad_()


def column(
    seed: int, batch: tuple[int, ...], rows: int, inner: int, outs: list[int], dim: int, dtype: torch.dtype, bias: bool
) -> list[Tensor]:
    """all_gather_matmul against linear on the whole x, with every gradient. Returns the outputs, for their bits."""
    group, rank, world = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(seed)
    shape = [*batch, inner]
    shape.insert(dim % (len(shape) + 1), rows)
    whole = torch.randn(shape, generator=g, dtype=torch.float64)
    weights = [torch.randn(out * world, inner, generator=g, dtype=torch.float64) for out in outs]
    biases = [torch.randn(out * world, generator=g, dtype=torch.float64) if bias else None for out in outs]
    sizes = split_sizes(rows, world)
    x = leaf(cut(whole, dim, rank, world), dtype)
    own = [leaf(cut(w, 0, rank, world), dtype) for w in weights]
    own_biases = [None if b is None else leaf(cut(b, 0, rank, world), dtype) for b in biases]
    ys = tp.all_gather_matmul(x, own, own_biases, group=group, dim=dim, sizes=sizes)

    ref = leaf(whole.to(dtype), torch.float64)
    ref_w = [leaf(w.to(dtype), torch.float64) for w in weights]
    ref_b = [None if b is None else leaf(b.to(dtype), torch.float64) for b in biases]
    refs = [torch.nn.functional.linear(ref, w, b) for w, b in zip(ref_w, ref_b, strict=True)]
    upstream = [torch.randn(r.shape, generator=g, dtype=torch.float64).to(dtype) for r in refs]
    torch.autograd.backward(refs, [u.double() for u in upstream])
    torch.autograd.backward(ys, [cut(u, -1, rank, world).contiguous() for u in upstream])
    scale = 4 * max(inner, 1) ** 0.5
    found = []
    for y, r in zip(ys, refs, strict=True):
        close("y", y, cut(r, -1, rank, world), dtype, scale * 4)
        found.append(y.detach())
    total = sum(outs) * world
    close("dx", x.grad, cut(ref.grad, dim, rank, world), dtype, 16 * max(total, 1) ** 0.5 * (world + len(outs)))
    count = max(upstream[0].numel() // max(upstream[0].shape[-1], 1), 1)
    for w, r in zip(own, ref_w, strict=True):
        close("dw", w.grad, cut(r.grad, 0, rank, world), dtype, 16 * count**0.5)
    for b, r in zip(own_biases, ref_b, strict=True):
        if b is not None:
            close("db", b.grad, cut(r.grad, 0, rank, world), dtype, 16 * count**0.5)
    return [*found, x.grad, *(w.grad for w in own)]


def copied(seed: int, batch: tuple[int, ...], inner: int, outs: list[int], dtype: torch.dtype) -> list[Tensor]:
    """copied_matmul against linear."""
    group, rank, world = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(seed)
    whole = torch.randn(*batch, inner, generator=g, dtype=torch.float64)
    weights = [torch.randn(out * world, inner, generator=g, dtype=torch.float64) for out in outs]
    x = leaf(whole, dtype)
    own = [leaf(cut(w, 0, rank, world), dtype) for w in weights]
    ys = tp.copied_matmul(x, own, group=group)
    ref, ref_w = leaf(whole.to(dtype), torch.float64), [leaf(w.to(dtype), torch.float64) for w in weights]
    refs = [torch.nn.functional.linear(ref, w) for w in ref_w]
    upstream = [torch.randn(r.shape, generator=g, dtype=torch.float64).to(dtype) for r in refs]
    torch.autograd.backward(refs, [u.double() for u in upstream])
    torch.autograd.backward(ys, [cut(u, -1, rank, world).contiguous() for u in upstream])
    for y, r in zip(ys, refs, strict=True):
        close("y", y, cut(r, -1, rank, world), dtype, 16 * max(inner, 1) ** 0.5)
    close("dx", x.grad, ref.grad, dtype, 16 * (sum(outs) * world) ** 0.5 * (world + len(outs)))
    count = max(x.numel() // max(inner, 1), 1)
    for w, r in zip(own, ref_w, strict=True):
        close("dw", w.grad, cut(r.grad, 0, rank, world), dtype, 16 * count**0.5)
    return [*(y.detach() for y in ys), x.grad, *(w.grad for w in own)]


def row(
    seed: int,
    batch: tuple[int, ...],
    rows: int,
    inner: int,
    out: int,
    dim: int,
    dtype: torch.dtype,
    bias: bool,
    scatter: bool,
) -> list[Tensor]:
    """matmul_reduce_scatter or matmul_all_reduce against linear on all features, with every gradient."""
    group, rank, world = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(seed)
    shape = [*batch, inner]
    shape.insert(dim % (len(shape) + 1), rows)
    whole = torch.randn(shape, generator=g, dtype=torch.float64)
    weight = torch.randn(out, inner, generator=g, dtype=torch.float64)
    b = torch.randn(out, generator=g, dtype=torch.float64) if bias else None
    x, w = leaf(cut(whole, -1, rank, world), dtype), leaf(cut(weight, 1, rank, world), dtype)
    own_b = None if b is None else leaf(b, dtype)
    if scatter:
        y = tp.matmul_reduce_scatter(x, w, own_b, group=group, dim=dim)
    else:
        y = tp.matmul_all_reduce(x, w, own_b, group=group)
    ref, ref_w = leaf(whole.to(dtype), torch.float64), leaf(weight.to(dtype), torch.float64)
    ref_b = None if b is None else leaf(b.to(dtype), torch.float64)
    r = torch.nn.functional.linear(ref, ref_w, ref_b)
    upstream = torch.randn(r.shape, generator=g, dtype=torch.float64).to(dtype)
    r.backward(upstream.double())
    y.backward(cut(upstream, dim, rank, world).contiguous() if scatter else upstream)
    close("y", y, cut(r, dim, rank, world) if scatter else r, dtype, 16 * max(inner, 1) ** 0.5 * world)
    close("dx", x.grad, cut(ref.grad, -1, rank, world), dtype, 16 * max(out, 1) ** 0.5)
    count = max(upstream.numel() // max(out, 1), 1)
    close("dw", w.grad, cut(ref_w.grad, 1, rank, world), dtype, 16 * count**0.5)
    if own_b is not None:
        close("db", own_b.grad, ref_b.grad, dtype, 16 * count**0.5)
    return [y.detach(), x.grad, w.grad]

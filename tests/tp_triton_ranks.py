"""What each rank does in the tests of the symm_mem tensor-parallel matmuls, in Triton's interpreter or on GPUs."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from reference import assert_same_bits
from torch import Tensor

from pyshard.comm.symm_mem import SymmMemTransport
from pyshard.kernels import triton_tp
from pyshard.tp.sums import sum_in_order
from pyshard.tp.symm_mem import SymmMemMatmul

TIMEOUT = 30.0  # seconds; of tests in which nobody is missing
TILES = triton_tp._TILES_INTERPRETED


@dataclass(frozen=True)
class Case:
    """A matmul; of matmul_reduce_scatter, depth is what one rank has."""

    sizes: tuple[int, ...]
    depth: int
    widths: tuple[int, ...]
    dtype: torch.dtype
    bias: bool = True
    transposed: bool = False
    integers: bool = False
    chunk_bytes: int = 1 << 20


def place(device: str, rank: int) -> torch.device:
    where = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(where)
    return where


def values(case: Case, rng: np.random.Generator, *shape: int) -> Tensor:
    """Random numbers of the case's dtype; or small integers, of which every sum is exact in it."""
    if case.integers:
        return torch.from_numpy(rng.integers(-1, 2, shape).astype(np.float32)).to(case.dtype)
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(case.dtype)


def weight_of(case: Case, rng: np.random.Generator, width: int, depth: int) -> Tensor:
    return values(case, rng, depth, width).t() if case.transposed else values(case, rng, width, depth)


def assert_close(got: Tensor, exact: Tensor, magnitude: Tensor, depth: int, what: str) -> None:
    """Within rounding once to the dtype, and an fp32 sum of `depth` products, whose error is at most depth * 2^-24 of
    the sum of their magnitudes; twice that in tensor cores, which cut sums off."""
    unit = torch.finfo(got.dtype).eps / 2
    per_sum = 2.0**-23 if got.is_cuda else 2.0**-24
    bound = unit * exact.abs() + (1 + unit) * (depth + 2) * per_sum * magnitude
    bound += torch.finfo(got.dtype).smallest_normal
    error = (got.cpu().double() - exact).abs()
    assert (error <= bound).all(), f"{what}: error {error.max()}, {(error / bound).max():.2f} of what is allowed"


def gather(matmul: SymmMemMatmul, case: Case, rng: np.random.Generator) -> None:
    """All ranks draw the same numbers, and check their own outputs; weights differ from rank to rank."""
    rank, device = matmul.rank, matmul.device
    xs = [values(case, rng, size, case.depth) for size in case.sizes]
    weights = [[weight_of(case, rng, width + r, case.depth) for width in case.widths] for r in range(matmul.world)][
        rank
    ]
    drawn = [values(case, rng, width + matmul.world)[: weight.shape[0]] for width, weight in zip(case.widths, weights)]
    biases = [bias if case.bias else None for bias in drawn]
    matmul.chunk_bytes = case.chunk_bytes
    # x may be overwritten at once afterwards
    mine = xs[rank].clone().to(device)
    outs = matmul.all_gather_matmul(
        mine, [w.to(device) for w in weights], [b if b is None else b.to(device) for b in biases], case.sizes
    )
    mine.fill_(float("nan"))
    whole = torch.cat(xs).double()
    assert len(outs) == len(weights)
    for out, weight, bias in zip(outs, weights, biases, strict=True):
        exact, magnitude = whole @ weight.double().t(), whole.abs() @ weight.double().abs().t()
        if bias is not None:
            exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
        what = f"rank {rank}, {case}, width {weight.shape[0]}"
        assert out.shape == exact.shape and out.dtype == case.dtype and out.is_contiguous(), what
        if case.integers:
            assert_same_bits(out.cpu(), exact.to(case.dtype), what)
        assert_close(out, exact, magnitude, case.depth, what)


def local(matmul: SymmMemMatmul, x: Tensor, weight: Tensor) -> Tensor:
    """This rank's product as the kernel makes it, alone."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    counters = torch.zeros(1, dtype=torch.int64, device=x.device)
    flags = triton_tp.Flags(0, 0)
    alone = triton_tp.Peers(matmul._scatter.peers.buffers, matmul.transport.state, 0, 1, 0)
    triton_tp.matmul_scatter(x, weight, [out.data_ptr()], [x.shape[0]], counters, alone, flags, tiles=matmul.tiles)
    return out


def scatter(matmul: SymmMemMatmul, case: Case, rng: np.random.Generator) -> None:
    """The bits are those of the sum in rank order of the ranks' products, which are right."""
    rank, device, world = matmul.rank, matmul.device, matmul.world
    depths = [case.depth + r for r in range(world)]
    xs = [values(case, rng, sum(case.sizes), depth) for depth in depths]
    weights = [weight_of(case, rng, case.widths[0], depth) for depth in depths]
    bias = values(case, rng, case.widths[0]) if case.bias else None
    begin = sum(case.sizes[:rank])
    rows = slice(begin, begin + case.sizes[rank])
    mine = xs[rank].clone().to(device)
    out = matmul.matmul_reduce_scatter(
        mine, weights[rank].to(device), bias if bias is None else bias.to(device), case.sizes
    )
    mine.fill_(float("nan"))
    what = f"rank {rank}, {case}"
    assert out.shape == (case.sizes[rank], case.widths[0]) and out.dtype == case.dtype, what
    parts = [local(matmul, x.to(device), w.to(device)).cpu() for x, w in zip(xs, weights)]
    for part, x, weight in zip(parts, xs, weights):
        exact, magnitude = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
        if case.integers:
            assert_same_bits(part, exact.to(case.dtype), what)
        assert_close(part, exact, magnitude, x.shape[1], what)
    assert_same_bits(out.cpu(), sum_in_order([part[rows] for part in parts], bias=bias), what)
    total = torch.zeros(case.sizes[rank], case.widths[0])
    for part in parts:
        total = total + part[rows].float()
    assert_same_bits(out.cpu(), (total if bias is None else total + bias.float()).to(case.dtype), what)


def doze(rank: int, seed: int, seconds: float) -> Callable[[str], None]:
    """Sleeps as a rank's own random numbers say."""
    rng = random.Random(1000 * seed + rank)
    return lambda what: time.sleep(rng.random() ** 3 * seconds)


def matmuls(
    rank: int,
    world: int,
    gathers: Sequence[Case],
    scatters: Sequence[Case],
    seed: int,
    in_place: bool,
    device: str = "cpu",
    seconds: float = 0.0,
) -> None:
    """Both kinds in turn, over the same memory."""
    where = place(device, rank)
    matmul = SymmMemMatmul(None, TIMEOUT, device=where, in_place=in_place)
    if seconds:
        matmul.pause = doze(rank, seed, seconds)
    rng = np.random.default_rng(seed)
    for i in range(max(len(gathers), len(scatters))):
        if i < len(gathers):
            gather(matmul, gathers[i], rng)
        if i < len(scatters):
            scatter(matmul, scatters[i], rng)
    assert not matmul._counters.any()
    matmul.transport.exchange(b"", "end")
    matmul.close()
    matmul.close()


def ahead(rank: int, world: int, rounds: int, in_place: bool) -> None:
    """The first rank has all rows of x and none of the sum, so that only the reuse of memory holds it back."""
    matmul = SymmMemMatmul(None, TIMEOUT, device=place("cpu", rank), in_place=in_place)
    sizes = [9] + [0] * (world - 1)
    parts = [0] + [4] * (world - 1)
    weight = torch.eye(3)
    for number in range(1, rounds + 1):
        if rank:
            time.sleep(0.03)
        x = torch.full((sizes[rank], 3), float(number))
        (out,) = matmul.all_gather_matmul(x, [weight], [None], sizes)
        assert out.shape == (9, 3) and (out == number).all(), (number, out)
        if rank:
            time.sleep(0.03)
        x = torch.full((sum(parts), 3), float(10 * rank + number))
        out = matmul.matmul_reduce_scatter(x, weight, None, parts)
        total = sum(10 * r + number for r in range(world))
        assert out.shape == (parts[rank], 3) and (out == total).all(), (number, total, out)
    matmul.transport.exchange(b"", "end")


def shared(rank: int, world: int, seed: int) -> None:
    """Two objects over one transport, which stays open when one is closed."""
    made = SymmMemTransport.create(None, torch.device("cpu"), TIMEOUT)
    assert isinstance(made, SymmMemTransport), made
    rng = np.random.default_rng(seed)
    case = Case((5,) * world, 8, (4,), torch.float32)
    first, second = SymmMemMatmul(made), SymmMemMatmul(made, in_place=True)
    for matmul in (first, second, first):
        gather(matmul, case, rng)
        scatter(matmul, case, rng)
    made.exchange(b"", "end of the first")
    first.close()
    gather(second, case, rng)
    made.exchange(b"", "end")
    made.close()

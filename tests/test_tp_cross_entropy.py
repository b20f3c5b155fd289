"""vocab_parallel_cross_entropy against torch's cross_entropy over the whole logits: values, gradients, cost, errors."""

import math
import weakref
from itertools import product
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from reference import assert_same_bits
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyshard.tp import cross_entropy as module
from pyshard.tp import mappings, vocab_parallel_cross_entropy
from pyshard.tp.splits import bounds, split_sizes

# Of a loss and of a gradient, relative to their scale. fp32 and narrower: fewer than 100 roundings of 2^-24 on the way
# to a value, most of them in a sum; fp64 likewise of 2^-53.
BOUND = {torch.float64: 1e-14, torch.float32: 5e-6, torch.bfloat16: 5e-6, torch.float16: 5e-6}
HALF_ULP = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def plain(logits: Tensor, target: Tensor, *, z_loss: float = 0.0, reduction: str = "mean", **options: Any) -> Tensor:
    """The whole vocabulary in fp64 by torch's function, and z_loss by its formula."""
    ignored = target == options.get("ignore_index", -100)
    flat, ids = logits.double().reshape(-1, logits.shape[-1]), target.reshape(-1)
    losses = F.cross_entropy(flat, ids, reduction="none", **options).view(target.shape)
    losses = losses + z_loss * flat.logsumexp(-1).view(target.shape).square().masked_fill(ignored, 0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (~ignored).sum()


def check(
    logits: Tensor,
    target: Tensor,
    rank: int,
    world: int,
    sizes: list[int] | None = None,
    *,
    rel: float = 1,
    **options: Any,
) -> Tensor:
    """Loss and gradient of the whole logits, cut over the ranks, against plain(). Returns the loss."""
    vocabulary = logits.shape[-1]
    cuts = sizes or split_sizes(vocabulary, world)
    own = slice(*bounds(cuts, rank))
    whole = logits.detach().double().clone().requires_grad_()
    expected = plain(whole, target, **options)
    up = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected.backward(up)
    local = logits[..., own].detach().clone().requires_grad_()
    where = {"sizes": sizes} if sizes else {"vocab_size": vocabulary}
    loss = vocab_parallel_cross_entropy(local, target, group=dist.group.WORLD, **where, **options)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert loss.dtype == wide and loss.shape == expected.shape
    bound = BOUND[logits.dtype] * rel
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=bound, atol=bound, equal_nan=True)
    loss.backward(up.to(wide))
    grad = whole.grad[..., own]
    scale = max(grad.nan_to_num().abs().max().item() if grad.numel() else 0, 1e-30)
    assert local.grad.dtype == logits.dtype
    rounding = HALF_ULP[logits.dtype]
    tiny = (
        2.0**-25 if logits.dtype == torch.float16 else 0
    )  # below its normal numbers fp16 rounds to multiples of 2^-24
    torch.testing.assert_close(
        local.grad.double(), grad, rtol=rounding + bound, atol=bound * scale + tiny, equal_nan=True
    )
    return loss.detach()


def random_case(
    generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, spread: float
) -> tuple[Tensor, Tensor]:
    logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(dtype)
    target = torch.randint(shape[-1], shape[:-1], generator=generator)
    return logits, target.masked_fill(torch.rand(target.shape, generator=generator) < 0.2, -100)


def _values(rank: int, world: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    module.CHUNK_CPU = 40  # several chunks, and rows longer than one
    for shape, dtype in product(((16,), (7, 13), (2, 5, 11), (3, 2, 50), (4, 3), (0, 6)), BOUND):
        for smoothing, z_loss in ((0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.3, 1e-3), (1.0, 0.0)):
            logits, target = random_case(generator, shape, dtype, 3)
            for reduction in ("mean", "sum", "none"):
                if reduction == "mean" and (target == -100).all():
                    target = torch.zeros_like(target)
                    if not target.numel():
                        continue
                loss = check(logits, target, rank, world, label_smoothing=smoothing, z_loss=z_loss, reduction=reduction)
                parts = [torch.empty_like(loss) for _ in range(world)]
                dist.all_gather(parts, loss)
                for part in parts:
                    assert_same_bits(part, parts[0])
        check(logits, target.masked_fill(target == -100, 2), rank, world, ignore_index=2, reduction="sum")


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_values_gradients_and_equal_bits_on_all_ranks(world: int, seed: int) -> None:
    ranks.run(_values, world, seed)


def _sizes(rank: int, world: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for sizes in ([4, 4, 4], [1, 7, 2], [0, 5, 3], [5, 0, 1], [0, 0, 3], [2, 1, 0]):
        logits, target = random_case(generator, (9, sum(sizes)), torch.float32, 5)
        check(logits, target, rank, world, sizes, label_smoothing=0.2, z_loss=1e-3, reduction="none")
    logits, target = random_case(generator, (9, 12), torch.float32, 1)
    own = logits[:, 4 * rank : 4 * rank + 4]  # all the same: need not be told
    loss = vocab_parallel_cross_entropy(own, target.int(), group=dist.group.WORLD)
    assert_same_bits(loss, vocab_parallel_cross_entropy(own, target, group=dist.group.WORLD, vocab_size=12))


def test_cuts_of_any_sizes(seed: int) -> None:
    ranks.run(_sizes, 3, seed)


def _extremes(rank: int, world: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for dtype in BOUND:
        # Beside 1e4 an fp32 number has steps of 1e-3, but the logits' own differences are exact.
        for shift in (1e4, -1e4, 0.0):
            logits, target = random_case(generator, (8, 12), dtype, 3)
            check(logits + shift, target, rank, world, reduction="none", label_smoothing=0.1, rel=4)
        check(logits * 3e3, target, rank, world, reduction="none", rel=4)
        masked = logits.clone()
        masked[:, ::2] = -math.inf
        masked[:4, :6] = -math.inf  # all of rank 0's at world 2
        loss = check(masked, target, rank, world, reduction="none")
        assert loss.isinf().any() or not masked.gather(1, target.clamp(min=0)[:, None]).isinf().any()
        dead = logits.clone()
        dead[3], target[3] = -math.inf, 5
        assert check(dead, target, rank, world, reduction="none")[3].isnan()
        bad = logits.clone()
        bad[1, 7], bad[2, 3], target[1:3] = math.nan, math.inf, 0
        assert check(bad, target, rank, world, reduction="none")[1:3].isnan().all()
    logits, target = torch.randn(4, 6), torch.full((4,), -100)
    own = logits[:, slice(*bounds(split_sizes(6, world), rank))].clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(own, target, group=dist.group.WORLD, vocab_size=6)
    loss.backward()
    assert loss.isnan() and F.cross_entropy(logits, target).isnan()
    assert_same_bits(own.grad, torch.zeros_like(own))


@pytest.mark.parametrize("world", [1, 2])
def test_infinite_huge_and_ignored(world: int, seed: int) -> None:
    ranks.run(_extremes, world, seed)


def _layouts(rank: int, world: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    module.CHUNK_CPU = 30
    whole = torch.randn(3, 6, 2, 5, generator=generator)
    target = torch.randint(10, (3, 5, 2), generator=generator)
    for logits in (
        whole[:, :-1],
        whole[:, 1:],
        whole.transpose(0, 1)[:3].transpose(1, 2)[:, :, :].flatten(1, 2)[:, :5],
    ):
        logits = logits.detach().requires_grad_()
        ids = target[tuple(slice(n) for n in logits.shape[:-1])] if logits.dim() == 4 else target[:, :, 0]
        dense = logits.detach().contiguous().requires_grad_()
        for x in (logits, dense):
            vocab_parallel_cross_entropy(x, ids, group=dist.group.WORLD, vocab_size=10).backward()
        assert_same_bits(logits.grad, dense.grad)


def test_strided_logits_give_the_same_bits(seed: int) -> None:
    ranks.run(_layouts, 2, seed)


class Memory(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are alive, and the most there have been."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            x.untyped_storage()._cdata for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known | given:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def freed(self, which: int, nbytes: int) -> None:
        self.known.discard(which)
        self.now -= nbytes


def _cost(rank: int, world: int, seed: int) -> None:
    rows, columns = 512, 4096
    own = torch.randn(2, rows // 2 + 1, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()[:, :-1]
    own.requires_grad_()
    target = torch.randint(world * columns, own.shape[:-1], generator=torch.Generator().manual_seed(seed))
    # One chunk, and a hundred numbers per token: nothing that grows with tokens times vocabulary.
    chunk, small = 4 * module.CHUNK_CPU, 100 * 8 * rows
    assert 4 * chunk <= own.numel() * 4  # else this would show nothing
    for grad in (True, False):
        with torch.set_grad_enabled(grad), Memory() as forward, CommDebugMode() as talk:
            loss = vocab_parallel_cross_entropy(own, target, group=dist.group.WORLD, label_smoothing=0.1, z_loss=1e-4)
        assert chunk <= forward.most <= chunk + small, forward.most
        assert forward.now <= small, forward.now  # what is saved
        assert talk.get_total_counts() == 1, talk.get_comm_counts()
    with Memory() as backward, CommDebugMode() as talk:
        loss_again = vocab_parallel_cross_entropy(own, target, group=dist.group.WORLD, label_smoothing=0.1, z_loss=1e-4)
        loss_again.backward()
    assert own.grad.abs().sum() > 0
    assert_same_bits(loss_again.detach(), loss)
    gradient = 2 * own.numel()
    assert chunk + gradient <= backward.most <= chunk + gradient + small, backward.most
    assert talk.get_total_counts() == 1, talk.get_comm_counts()


def test_one_exchange_and_bounded_memory(seed: int) -> None:
    ranks.run(_cost, 2, seed)


def _gradcheck(rank: int, world: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator).requires_grad_()
    target = torch.tensor([[0, 4, -100], [2, 2, 1]])
    for reduction, smoothing, z_loss in product(("none", "mean"), (0.0, 0.2), (0.0, 0.05)):

        def loss(x: Tensor, reduction: str = reduction, smoothing: float = smoothing, z_loss: float = z_loss) -> Tensor:
            return vocab_parallel_cross_entropy(
                x, target, group=dist.group.WORLD, reduction=reduction, label_smoothing=smoothing, z_loss=z_loss
            )

        assert torch.autograd.gradcheck(loss, (logits,))
        assert torch.autograd.gradgradcheck(loss, (logits,))


def test_gradcheck_of_first_and_second_derivatives(seed: int) -> None:
    ranks.run(_gradcheck, 1, seed)


def _second(rank: int, world: int, seed: int) -> None:
    """The gradient of a penalty on the gradient, and on each token's weight in the loss."""
    generator = torch.Generator().manual_seed(seed)
    for vocabulary in (10, 7, 2):
        own = slice(*bounds(split_sizes(vocabulary, world), rank))
        logits, target = random_case(generator, (4, vocabulary), torch.float64, 2)
        weights, v = (
            torch.rand(4, generator=generator, dtype=torch.float64),
            torch.randn(4, vocabulary, generator=generator),
        )
        options: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.05, "reduction": "none"}
        results = []
        for whole in (True, False):
            x = (logits if whole else logits[:, own]).detach().clone().requires_grad_()
            w = weights.clone().requires_grad_()
            if whole:
                losses = plain(x, target, **options)
            else:
                losses = vocab_parallel_cross_entropy(
                    x, target, group=dist.group.WORLD, vocab_size=vocabulary, **options
                )
            (grad,) = torch.autograd.grad((losses * w).sum(), x, create_graph=True)
            penalty = (grad.square() * (v if whole else v[:, own])).sum()
            penalty = penalty if whole else mappings.all_reduce(penalty, dist.group.WORLD)
            results.append((grad.detach(), penalty.detach(), *torch.autograd.grad(penalty + losses.mean(), (x, w))))
        for got, expected in zip(results[1], results[0], strict=True):
            if expected.shape == logits.shape:
                expected = expected[:, own]
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("world", [2, 3])
def test_second_derivatives_over_ranks(world: int, seed: int) -> None:
    ranks.run(_second, world, seed)


def _misuse(rank: int, world: int) -> None:
    logits, target, group = torch.randn(3, 4), torch.tensor([0, 7, 2]), dist.group.WORLD

    def refused(error: type[Exception], match: str, x: Any = logits, ids: Any = target, **options: Any) -> None:
        with pytest.raises(error, match=match):
            vocab_parallel_cross_entropy(x, ids, group=group, **options)

    for bad in (8, -1, -101):
        refused(
            IndexError,
            rf"target: index {bad} at position \[1\] of \[3\]; expected 0 to 7",
            ids=torch.tensor([0, bad, 2]),
        )
    refused(IndexError, "index -100", ignore_index=-1, ids=torch.tensor([-1, -100, 2]))
    refused(TypeError, r"logits is torch\.int64; expected a tensor of float64", logits.long())
    refused(TypeError, r"target is torch\.float32; expected a tensor of int64", ids=target.float())
    refused(ValueError, r"shape \[3, 4\] and target \[2\]; expected \[\.\.\., columns", ids=target[:2])
    refused(ValueError, r"shape \[\] and target \[\]", torch.tensor(1.0), torch.tensor(0))
    refused(
        ValueError, r"sizes=\[4, 4\], 2 of them with sum 8; expected 2 sizes.*vocab_size=9", vocab_size=9, sizes=[4, 4]
    )
    refused(ValueError, r"sizes=\[8\], 1 of them with sum 8; expected 2 sizes", sizes=[8])
    refused(ValueError, r"sizes=\[9, -1\]", sizes=[9, -1])
    refused(ValueError, r"reduction='max'; expected one of 'mean', 'sum', 'none'", reduction="max")
    refused(ValueError, r"label_smoothing=1\.5; expected 0 to 1", label_smoothing=1.5)
    refused(ValueError, r"z_loss=nan; expected a finite number", z_loss=math.nan)
    refused(ValueError, "no rank has any column", logits[:, :0])
    # What only one rank does wrong is known to all, whatever they believe the vocabulary to be.
    wrong = r"logits have \[4, 3\] columns; expected"
    refused(ValueError, wrong + r" \[4, 4\]", logits[:, : 4 - rank], vocab_size=8)
    refused(ValueError, wrong, logits[:, : 4 - rank], ids=torch.tensor([6, 6, 6]))
    loss = vocab_parallel_cross_entropy(logits, target, group=group)  # nothing has been left behind
    assert loss.isfinite()
    x = logits.clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(x * 1, target, group=group)
    y = x * 1
    loss = vocab_parallel_cross_entropy(y, target, group=group)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_errors_on_every_rank() -> None:
    ranks.run(_misuse, 2, seconds=60)

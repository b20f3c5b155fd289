"""Cross-entropy of logits whose columns, the vocabulary, are cut over the ranks of a group.

    loss = lse - (1 - s) * x[target] - s * mean(x) + z * lse^2,    lse = log(sum(exp(x))) over the whole vocabulary

where s is the label smoothing. Each rank reduces its own columns to a few numbers per token; one exchange makes them
known to all ranks, which combine them in rank order, hence to the same bits. Backward needs no communication. Of
Shoeybi et al., Megatron-LM (2019), with one exchange instead of three; the combination of maxima and sums is that of
Milakov and Gimelshein, Online normalizer calculation for softmax (2018).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import mappings
from .splits import bounds, split_sizes
from .vocabulary import check_id_dtype, check_ids

WHO = "pyshard.tp.vocab_parallel_cross_entropy"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "none")

# Elements of the one temporary, in fp32: rows are worked on in chunks of at most this, but at least one row.
# On CPU 2 MiB, which stays in the cache: 1024 x 32000 logits take 32 ms with 0.25 to 4 MiB, and 134 ms at once (bf16).
CHUNK_CPU = 2**19
# On an accelerator 64 MiB, large against the launches of the ten kernels per chunk.
CHUNK_OTHER = 2**24


@dataclass(frozen=True)
class _Options:
    group: dist.ProcessGroup
    sizes: list[int]  # columns of each rank
    ignore_index: int
    smoothing: float
    z_loss: float

    @property
    def vocabulary(self) -> int:
        return sum(self.sizes)


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup,
    vocab_size: int | None = None,
    sizes: Sequence[int] | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """torch.nn.functional.cross_entropy over [..., vocabulary], each rank holding some of the columns.

    All ranks get the same bits. The whole logits exist nowhere; beside the logits and their gradient a rank needs a
    chunk of rows in fp32. Backward reads the logits again, so they must not be changed in place before it.

    Args:
        logits: [..., V_r], this rank's columns, any strides; read only.
        target: [...], int64 or int32, ids of the whole vocabulary; the same on all ranks.
        group: the ranks that share the columns, in rank order.
        vocab_size: V, cut by split_sizes. None: the sum of sizes.
        sizes: columns of each rank. None: split_sizes(vocab_size, world); without either, all ranks have V_r columns.
        ignore_index: a target whose token counts neither in the loss nor in its mean.
        reduction: "mean" over the tokens that count (NaN if there is none), "sum", or "none": a loss per token.
        label_smoothing: 0 to 1, the part of a target that is spread over the whole vocabulary.
        z_loss: adds z_loss * logsumexp^2 to each token's loss.
    Returns:
        0-d, or [...] for reduction "none": fp64 of fp64 logits, else fp32, also of bf16 and fp16 logits.
    Raises:
        ValueError: shapes, sizes or options that do not fit; columns that are not as sizes says are an error on every
            rank. TypeError: of a dtype. IndexError: a target outside the vocabulary. (On an accelerator what only the
            values tell is an assertion there.)

    Second derivatives work (create_graph=True), by plain differentiable operations, which take more memory and
    communicate.
    """
    options = _checked(logits, target, group, vocab_size, sizes, ignore_index, label_smoothing, z_loss)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{WHO}: reduction={reduction!r}; expected one of {', '.join(map(repr, REDUCTIONS))}.")
    target = target.long()
    ignored = target == ignore_index
    losses: Tensor = _CrossEntropy.apply(logits, target, ignored, options)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (~ignored).sum()


class _CrossEntropy(torch.autograd.Function):
    """A loss per token; no reduction."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignored: Tensor, options: _Options) -> Tensor:
        local = _local(target, options)
        statistics = _statistics(logits, local.reshape(-1), options)
        parts = _gather(statistics, logits, options)
        check_ids(f"{WHO}: target", target, options.vocabulary, ignored)  # now that all ranks agree on the vocabulary
        maximum, total, at_target, shift = (x.view(target.shape) for x in _combine(parts, options))
        # log(total) is small and maximum may be large: their sum alone would lose digits, also in the gradient.
        losses = total.log().add_(maximum - at_target, alpha=1 - options.smoothing)
        if options.smoothing:
            losses.sub_(shift, alpha=options.smoothing / options.vocabulary)
        if options.z_loss:
            losses.addcmul_(lse := maximum + total.log(), lse, value=options.z_loss)
        ctx.save_for_backward(logits, local, ignored, maximum, total)
        ctx.options = options
        return losses.masked_fill_(ignored, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        logits, local, ignored, maximum, total = ctx.saved_tensors
        grad = grad.masked_fill(ignored, 0)
        how = _differentiable_gradient if torch.is_grad_enabled() else _gradient
        return how(grad, logits, local, maximum, total, ctx.options), None, None, None


def _local(target: Tensor, options: _Options) -> Tensor:
    """Targets as indices of this rank's columns, and -1 where another rank has them."""
    begin, end = bounds(options.sizes, dist.get_rank(options.group))
    return (target - begin).masked_fill_((target < begin) | (target >= end), -1)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _blocks(x: Tensor) -> list[Tensor]:
    """2-d views whose rows together are x's rows [..., V], in order; never a copy, also of x[:, :-1]."""
    if x.dim() <= 2:
        return [x if x.dim() == 2 else x.unsqueeze(0)]
    try:
        return [x.view(-1, x.shape[-1])]
    except RuntimeError:
        return [block for part in x for block in _blocks(part)]


def _chunks(x: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The rows of x in pieces: which ones, a view of them, and one temporary for all pieces, as long as they are."""
    if not x.numel():
        return
    most = max((CHUNK_CPU if x.device.type == "cpu" else CHUNK_OTHER) // x.shape[-1], 1)
    blocks, first = _blocks(x), 0
    temporary = x.new_empty((min(most, max(map(len, blocks))), x.shape[-1]), dtype=_wide(x))
    for block in blocks:
        for rows in block.split(most):
            yield slice(first, first + len(rows)), rows, temporary[: len(rows)]
            first += len(rows)


def _statistics(logits: Tensor, local: Tensor, options: _Options) -> Tensor:
    """[3 or 4, tokens] of this rank's columns x: maximum m, sum of exp(x - m), x[target] or 0, sum of x - m.

    The last only for label smoothing. All are of no use, and not used, where the rank has no columns.
    """
    out = logits.new_zeros((4 if options.smoothing else 3, local.numel()), dtype=_wide(logits))
    if logits.shape[-1] != options.sizes[dist.get_rank(options.group)]:
        return out  # an error, which all ranks learn of
    for where, x, temporary in _chunks(logits):
        maximum = x.amax(-1, keepdim=True).to(out.dtype)
        finite = maximum.masked_fill(maximum == -math.inf, 0)  # exp(-inf - 0) = 0, and -inf - -inf would be NaN
        torch.sub(x, finite, out=temporary)
        if options.smoothing:
            out[3, where] = temporary.sum(-1)
        out[0, where] = maximum.squeeze(-1)
        out[1, where] = temporary.exp_().sum(-1)
        index = local[where]
        at_target = x.gather(-1, index.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        out[2, where] = at_target.to(out.dtype).masked_fill_(index < 0, 0)
    return out


def _gather(statistics: Tensor, logits: Tensor, options: _Options) -> list[Tensor]:
    """The statistics of all ranks. Each rank's width travels with them, so that a wrong one is an error everywhere."""
    width = statistics.new_tensor([logits.shape[-1]])
    message = torch.cat((width, statistics.view(-1)))
    parts = [torch.empty_like(message) for _ in options.sizes]
    if len(parts) == 1:
        parts = [message]
    else:
        dist.all_gather(parts, message, group=options.group)
    widths, expected = torch.cat([part[:1] for part in parts]), statistics.new_tensor(options.sizes)
    if widths.device.type != "cpu":
        torch._assert_async((widths == expected).all(), f"{WHO}: a rank's columns are not {options.sizes}")
    elif not torch.equal(widths, expected):
        raise ValueError(
            f"{WHO}: the ranks' logits have {[int(w) for w in widths]} columns; expected {options.sizes}. Pass sizes= "
            "the columns of each rank, or vocab_size= if they are cut by split_sizes."
        )
    if not options.vocabulary:
        raise ValueError(f"{WHO}: no rank has any column; expected a vocabulary of at least one. Pass the logits.")
    return [part[1:].view(statistics.shape) for part in parts]


def _combine(parts: Sequence[Tensor], options: _Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over all columns x: maximum m, sum of exp(x - m), x[target], and sum of x - m (or 0); each [tokens]."""
    there = [(part, size) for part, size in zip(parts, options.sizes, strict=True) if size]
    maximum = there[0][0][0]
    for part, _ in there[1:]:
        maximum = torch.maximum(maximum, part[0])
    total, at_target, shift = (torch.zeros_like(maximum) for _ in range(3))
    for part, size in there:
        below = part[0] - maximum
        total += part[1] * below.exp()
        at_target += part[2]
        if options.smoothing:
            shift += part[3] + size * below
    return maximum, total, at_target, shift


def _gradient(grad: Tensor, logits: Tensor, local: Tensor, maximum: Tensor, total: Tensor, options: _Options) -> Tensor:
    """d loss / d logits of this rank's columns, times grad [...]: softmax minus what the target is."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    columns = out.view(-1, logits.shape[-1]) if out.numel() else out
    slope = grad if not options.z_loss else grad * (1 + 2 * options.z_loss * (maximum + total.log()))
    slope, grad, local, maximum = (
        (slope / total).view(-1, 1),
        grad.reshape(-1, 1),
        local.view(-1, 1),
        maximum.view(-1, 1),
    )
    hot = (grad * (options.smoothing - 1)).masked_fill_(local < 0, 0)
    local = local.clamp(min=0)
    for where, x, temporary in _chunks(logits):
        torch.sub(x, maximum[where], out=temporary).exp_().mul_(slope[where])
        if options.smoothing:
            temporary.sub_(grad[where], alpha=options.smoothing / options.vocabulary)
        temporary.scatter_add_(-1, local[where], hot[where])
        columns[where] = temporary
    return out


def _differentiable_gradient(
    grad: Tensor, logits: Tensor, local: Tensor, maximum: Tensor, total: Tensor, options: _Options
) -> Tensor:
    """The same by operations with derivatives of their own. Each rank uses grad and lse for its own columns."""
    x = logits.to(_wide(logits))
    grad = mappings.copy_to_ranks(grad, options.group).unsqueeze(-1)
    # maximum is a constant here: it cancels out.
    below = x - maximum.unsqueeze(-1)
    sums = mappings.gather(below.exp().sum(-1).unsqueeze(0), 0, [1] * len(options.sizes), options.group, summed=True)
    log_total = sums.sum(0).log().unsqueeze(-1)
    slope = 1 + 2 * options.z_loss * (maximum.unsqueeze(-1) + log_total) if options.z_loss else 1
    probability = (below - log_total).exp() * slope - options.smoothing / options.vocabulary
    hot = torch.zeros_like(x)
    if x.shape[-1]:
        mine = (local >= 0).to(x.dtype).unsqueeze(-1)
        hot.scatter_(-1, local.clamp(min=0).unsqueeze(-1), mine * (1 - options.smoothing))
    return ((probability - hot) * grad).to(logits.dtype)


def _checked(
    logits: Tensor,
    target: Tensor,
    group: dist.ProcessGroup,
    vocab_size: int | None,
    sizes: Sequence[int] | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> _Options:
    """What all ranks see alike is refused at once; widths, which they do not, after the exchange."""
    if not isinstance(logits, Tensor) or logits.dtype not in DTYPES:
        got = str(logits.dtype) if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(
            f"{WHO}: logits is {got}; expected a tensor of float64, float32, bfloat16 or float16. Convert it."
        )
    check_id_dtype(WHO, "target", target)
    if not logits.dim() or logits.shape[:-1] != target.shape:
        raise ValueError(
            f"{WHO}: logits has shape {list(logits.shape)} and target {list(target.shape)}; expected [..., columns of "
            "this rank] and [...]. The vocabulary is the last dimension, not the second as for torch's cross_entropy."
        )
    if target.device != logits.device:
        raise ValueError(
            f"{WHO}: target is on {target.device} and logits on {logits.device}; expected one device. Move the target."
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{WHO}: label_smoothing={label_smoothing}; expected 0 to 1.")
    if not math.isfinite(z_loss):
        raise ValueError(f"{WHO}: z_loss={z_loss}; expected a finite number.")
    world = dist.get_world_size(group)
    if sizes is None:
        sizes = [logits.shape[-1]] * world if vocab_size is None else split_sizes(vocab_size, world)
    sizes = list(sizes)
    if len(sizes) != world or min(sizes) < 0 or (vocab_size is not None and sum(sizes) != vocab_size):
        whole = "" if vocab_size is None else f" that make up vocab_size={vocab_size}"
        raise ValueError(
            f"{WHO}: sizes={sizes}, {len(sizes)} of them with sum {sum(sizes)}; expected {world} sizes, one a rank,"
            f"{whole}. Pass the columns of each rank, or vocab_size alone."
        )
    return _Options(group, sizes, ignore_index, label_smoothing, z_loss)

"""VocabParallelEmbedding against torch.nn.Embedding: the same bits, forward and gradient, however the rows are cut."""

import copy
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from reference import assert_same_bits
from torch import nn

from pyshard.placement import tensor_shard
from pyshard.tp import VocabParallelEmbedding, copied_matmul
from pyshard.tp.splits import bounds, split_sizes

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Even and uneven, and fewer than the four ranks.
ROWS = (8, 10, 13, 1, 3)


def both(rows: int, dim: int, padding_idx: int | None, seed: int, **kwargs: Any) -> tuple[nn.Embedding, Any]:
    """torch's and ours from one seed, which must leave the generator at one place."""
    dtype = kwargs.get("dtype")
    torch.manual_seed(seed)
    whole = nn.Embedding(rows, dim, padding_idx, dtype=dtype)
    after = torch.get_rng_state()
    torch.manual_seed(seed)
    ours = VocabParallelEmbedding(rows, dim, padding_idx, group=dist.group.WORLD, **kwargs)
    assert torch.equal(torch.get_rng_state(), after)
    return whole, ours


def _values(rank: int, world: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for rows in ROWS:
        begin, end = bounds(split_sizes(rows, world), rank)
        for dtype in DTYPES:
            for padding_idx in (None, 0, -1):
                whole, ours = both(rows, 6, padding_idx, seed + rows, dtype=dtype)
                assert tuple(ours.weight.shape) == (end - begin, 6) and ours.padding_idx == whole.padding_idx
                assert_same_bits(ours.weight.detach(), whole.weight.detach()[begin:end])
                with torch.no_grad():  # numbers that a sum with 0 would not leave as they are
                    odd = torch.tensor([-0.0, 0.0, float("inf"), -float("inf"), float("nan"), 1e-7]).to(dtype)
                    whole.weight[rows // 2] = odd
                    ours.weight.copy_(whole.weight[begin:end])
                for shape, kind in (
                    ((), torch.int64),
                    ((7,), torch.int32),
                    ((2, 5), torch.int64),
                    ((0, 3), torch.int64),
                ):
                    ids = torch.randint(rows, shape, generator=generator).to(kind)
                    expected, got = whole(ids), ours(ids)
                    assert got.dtype == dtype
                    assert_same_bits(got.detach(), expected.detach())
                    grad = torch.randn(expected.shape, generator=generator).to(dtype)
                    whole.weight.grad = ours.weight.grad = None
                    expected.backward(grad)
                    got.backward(grad)
                    assert_same_bits(ours.weight.grad, whole.weight.grad[begin:end])


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_values_and_gradients_are_the_unsharded_ones(world: int, seed: int) -> None:
    ranks.run(_values, world, seed)


def _sequence(rank: int, world: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for rows, shape in ((13, (2, 8)), (10, (3, 7)), (13, (5,)), (9, (2, 1))):
        own = bounds(split_sizes(shape[-1], world), rank)
        whole, ours = both(rows, 4, 2, seed, sequence_parallel=True)
        ids = torch.randint(rows, shape, generator=generator)
        expected, got = whole(ids), ours(ids)
        assert_same_bits(got.detach(), expected.detach()[..., slice(*own), :])
        grad = torch.randn(expected.shape, generator=generator)
        expected.backward(grad)
        got.backward(grad[..., slice(*own), :])
        begin, end = bounds(split_sizes(rows, world), rank)
        assert_same_bits(ours.weight.grad, whole.weight.grad[begin:end])


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_sequence_parallel_returns_this_ranks_part(world: int, seed: int) -> None:
    ranks.run(_sequence, world, seed)


def _misuse(rank: int, world: int) -> None:
    ours = VocabParallelEmbedding(10, 4, group=dist.group.WORLD)
    for bad in (10, -1, 2**40):
        with pytest.raises(
            IndexError, match=rf"index {bad} at position \[1, 0\] of \[2, 2\]; expected 0 to 9, the whole"
        ):
            ours(torch.tensor([[0, 9], [bad, 3]]))
    with pytest.raises(TypeError, match=r"ids is torch\.float32; expected a tensor of int64 or int32"):
        ours(torch.zeros(2))
    with pytest.raises(ValueError, match=r"padding_idx=10 of 10 rows; expected -10 to 9"):
        VocabParallelEmbedding(10, 4, 10, group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"num_embeddings=-1 and embedding_dim=4; expected no negative"):
        VocabParallelEmbedding(-1, 4, group=dist.group.WORLD)
    with pytest.raises(TypeError, match=r"dtype=torch\.int64; expected float64"):
        VocabParallelEmbedding(10, 4, group=dist.group.WORLD, dtype=torch.int64)
    sequence = VocabParallelEmbedding(10, 4, group=dist.group.WORLD, sequence_parallel=True)
    with pytest.raises(ValueError, match=r"ids has shape \[\] and sequence_parallel is True"):
        sequence(torch.tensor(1))
    assert torch.equal(ours(torch.tensor([[0, 9]])).isfinite(), torch.ones(1, 2, 4, dtype=torch.bool))  # still works


def test_errors_are_the_same_on_every_rank() -> None:
    ranks.run(_misuse, 2)


def _module(rank: int, world: int, seed: int) -> None:
    rows, (begin, end) = 7, bounds(split_sizes(7, world), rank)
    ours = VocabParallelEmbedding(rows, 3, 1, group=dist.group.WORLD, device="meta", dtype=torch.bfloat16)
    assert ours.weight.is_meta
    ours.to_empty(device="cpu")  # makes a new parameter
    torch.manual_seed(seed)
    ours.reset_parameters()
    torch.manual_seed(seed)
    assert_same_bits(ours.weight.detach(), nn.Embedding(rows, 3, 1, dtype=torch.bfloat16).weight.detach()[begin:end])
    twin = copy.deepcopy(nn.Sequential(ours))[0]
    assert twin.group is ours.group and tensor_shard(twin.weight) == tensor_shard(ours.weight)
    assert_same_bits(twin.weight.detach(), ours.weight.detach())
    with torch.no_grad():
        twin.weight.zero_()
    assert ours.weight.any()
    ours.double()
    shard = tensor_shard(ours.weight)
    assert shard is not None and shard.shape == (rows, 3) and shard.dim == 0 and shard.rank == rank
    assert shard.sizes == split_sizes(rows, world)
    assert repr(ours) == (
        f"VocabParallelEmbedding(7, 3, padding_idx=1, rows={begin}:{end}, world={world}, sequence_parallel=False)"
    )


def test_meta_device_conversions_and_placement(seed: int) -> None:
    ranks.run(_module, 2, seed)


def _tied(rank: int, world: int, seed: int) -> None:
    rows, begin_end = 7, bounds(split_sizes(7, world), rank)
    whole, ours = both(rows, 3, None, seed, dtype=torch.float64)
    ids = torch.randint(rows, (2, 5), generator=torch.Generator().manual_seed(seed))
    logits = torch.tanh(whole(ids)) @ whole.weight.t()
    logits.sin().sum().backward()
    own = copied_matmul(torch.tanh(ours(ids)), ours.weight, group=dist.group.WORLD)
    torch.testing.assert_close(own, logits[..., slice(*begin_end)], rtol=1e-14, atol=1e-14)
    own.sin().sum().backward()
    # fp64, sums of fewer than 100 terms of order one in another order
    torch.testing.assert_close(ours.weight.grad, whole.weight.grad[slice(*begin_end)], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("world", [1, 3])
def test_the_weight_may_be_tied_to_the_head(world: int, seed: int) -> None:
    ranks.run(_tied, world, seed)


def _second(rank: int, world: int, seed: int) -> None:
    """d/dg of <v, dW(g)> is the look-up of v: at world 1 against torch's."""
    whole, ours = both(5, 3, 2, seed, dtype=torch.float64)
    ids, v = torch.tensor([4, 2, 0, 4]), torch.randn(5, 3, dtype=torch.float64)
    results = []
    for layer in (whole, ours):
        g = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        (dw,) = torch.autograd.grad((layer(ids) * g).sum(), layer.weight, create_graph=True)
        results.append(torch.autograd.grad((dw * v).sum(), g)[0])
    assert torch.equal(results[1], results[0])
    assert not results[1][1].any()


def test_second_derivatives(seed: int) -> None:
    ranks.run(_second, 1, seed)

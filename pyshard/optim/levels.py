"""The groups of ranks that hold other parts of a model, in the one order in which all of them are asked.

A level is one such group: those over which DTensor parameters are sharded, in the order in which they appear, then the
tensor-parallel group, then the pipeline. What concerns all gradients goes up level by level:

    s[m] = a sum over this rank's parameters of kind m: bit l of m is set if they are cut over level l
    at level l, for each m without bit l:  s[m] = (s[m] of the level's first rank) + (s[m | l] of all, in rank order)

so that a parameter counts once, and all ranks end with the same bits. Bit 0 is always that of the next level: passing
one halves s. Parameters of a pipeline are cut over it, since each stage has its own.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm import agree
from ..comm.notes import Notes
from ..placement import TensorShard, pipeline_share, tensor_shard
from .distributed import shard_groups
from .rectangles import cut_of

Combine = Callable[[Tensor, Tensor], Tensor]
SHARD, TENSOR, PIPELINE = "shard group", "tensor-parallel group", "pipeline group"


@dataclass(frozen=True)
class Level:
    """One group of more than one rank."""

    kind: str
    group: dist.ProcessGroup = field(compare=False)
    ranks: tuple[int, ...]  # global, in the group's order

    @property
    def rank(self) -> int:
        """This process's place among them."""
        return self.ranks.index(dist.get_rank())

    @property
    def alike(self) -> bool:
        """All ranks hold the same list of parameters, or parts of them; pipeline stages do not."""
        return self.kind != PIPELINE

    @property
    def operation(self) -> str:
        return f"agreement of the {self.kind} in step()"

    def __str__(self) -> str:
        return f"{self.kind} {list(self.ranks)}"

    def exchange(self, who: str, payload: bytes, seconds: float | None = None, detail: str = "") -> list[bytes]:
        """What every rank has passed, in rank order. PeerError: one does not answer, or is in another operation.

        `detail`: for the errors of ranks that are elsewhere.
        """
        hint = "Nothing was changed by this step."
        return agree.exchange(who, self.group, self.operation, payload, seconds, detail=detail, hint=hint)


def _groups_of(param: Tensor) -> list[tuple[str, dist.ProcessGroup]]:
    """The groups whose ranks hold other parts of what the parameter belongs to."""
    shard, share = tensor_shard(param), pipeline_share(param)
    found = [(SHARD, group) for group in shard_groups(param)]
    if shard is not None:
        found.append((TENSOR, shard.group))
    if share is not None:
        found.append((PIPELINE, share.group))
    return found


def find(who: str, params: Iterable[Any]) -> list[Level]:
    """The levels of parameters; none if all of them are whole on each rank.

    Raises:
        ValueError: a parameter is not what its tensor_shard says.
    """
    known: dict[str, dict[tuple[int, ...], Level]] = {SHARD: {}, TENSOR: {}, PIPELINE: {}}
    for index, param in enumerate(params):
        if not isinstance(param, Tensor):
            continue
        if (shard := tensor_shard(param)) is not None:
            _check(who, index, param, shard)
        for kind, group in _groups_of(param):
            if group.size() > 1:
                ranks = tuple(dist.get_process_group_ranks(group))
                known[kind].setdefault(ranks, Level(kind, group, ranks))
    levels: dict[tuple[int, ...], Level] = {}
    for kind in (SHARD, TENSOR, PIPELINE):
        for ranks, level in known[kind].items():
            levels[ranks] = level  # torch's and our own tensor parallelism may share a group
    return list(levels.values())


def mask_of(param: Tensor, levels: Sequence[Level]) -> int:
    """The levels over which a parameter is cut, one bit for each."""
    cut = {tuple(dist.get_process_group_ranks(g)) for kind, g in _groups_of(param) if kind != TENSOR}
    shard = tensor_shard(param)
    if shard is not None and cut_of(param) is not None:
        cut.add(tuple(dist.get_process_group_ranks(shard.group)))
    return sum(1 << bit for bit, level in enumerate(levels) if level.ranks in cut)


def counts(param: Tensor) -> bool:
    """False for a copy of a parameter that an earlier pipeline stage counts."""
    share = pipeline_share(param)
    return share is None or share.counted


def passed(every: Sequence[Sequence[float]]) -> list[float]:
    """The sums after a level, from those of its ranks before it."""
    first, after = every[0], []
    for m in range(0, len(first), 2):
        together = every[0][m + 1]
        for one in every[1:]:
            together += one[m + 1]
        after.append(first[m] + together)
    return after


def over_levels(
    who: str, operation: str, levels: Sequence[Level], sums: Tensor, combine: Combine = torch.add
) -> Tensor:
    """The sum over all ranks, 0-d, from sums [2 ** levels] on any device: the bits of passed(). All are in `operation`.

    Nothing waits for a device other than the CPU. PeerError: a rank does not answer, or is in another operation.
    """
    for level in levels:
        every = _everyone(who, f"{operation}, over the {level.kind}", level, sums.contiguous())
        together = every[0][1::2]
        for one in every[1:]:
            together = combine(together, one[1::2])
        sums = combine(every[0][::2], together)
    return sums[0]


def _everyone(who: str, operation: str, level: Level, sums: Tensor) -> list[Tensor]:
    if sums.device.type != "cpu":
        every = [torch.empty_like(sums) for _ in level.ranks]
        try:
            dist.all_gather(every, sums, group=level.group)
        except RuntimeError as error:
            raise Notes(who, level.group, "Nothing was changed.").error(operation, error) from error
        return every
    heard = agree.exchange(who, level.group, operation, sums.numpy().tobytes(), hint="Nothing was changed.")
    if len({len(one) for one in heard}) > 1:
        sizes = {rank: len(one) // sums.itemsize for rank, one in zip(level.ranks, heard, strict=True)}
        raise ValueError(
            f"{who}: the parameters are cut in other ways on some ranks of the {level}: sums of each are {sizes}; "
            "expected the same ways on all. Pass the mesh, or all parameters of this rank."
        )
    return [torch.frombuffer(bytearray(one), dtype=sums.dtype) for one in heard]


def _check(who: str, index: int, param: Tensor, shard: TensorShard) -> None:
    if tuple(param.shape) != shard.local_shape():
        raise ValueError(
            f"{who}: parameter {index} has shape {tuple(param.shape)}; expected {shard.local_shape()}, since its "
            f"tensor_shard says that it is rank {shard.rank}'s part of {shard.shape}. Set the tensor_shard anew."
        )
    if shard.dim is None:
        return
    spans = sorted(piece for pieces in shard.pieces for piece in pieces if piece[0] < piece[1])
    ends = [0, *(end for _, end in spans)]
    if [begin for begin, _ in spans] != ends[:-1] or ends[-1] != shard.shape[shard.dim]:
        raise ValueError(
            f"{who}: the pieces of parameter {index} are {spans} of [0, {shard.shape[shard.dim]}) along dimension "
            f"{shard.dim}; expected each element once. Correct its tensor_shard."
        )

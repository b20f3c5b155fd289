"""The tensor-parallel ranks of an optimizer: those that hold the other parts of its parameters.

An update is elementwise and needs nothing of them. Only what concerns all gradients does: their norm, whether one of
them is not finite, and GradScaler's inf. Where a step needs that, every rank sends one message of 56 bytes to its
group and hears those of the others, so that all take the same decision from the same bits:

    sum of squares = of whole parameters, as the group's first rank has it, + (of cut ones, summed up in rank order)

Launches on a device give the same bits without the host (Launch.over_ranks), where whole gradients are the same. The
sum does not depend on how many data-parallel ranks there are. The same message says if a rank has failed, so that no
other waits for it. Parameters say of what they are a part by their `tensor_shard` (placement.py).
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm import PeerError
from ..kernels.launch import is_dtensor
from ..placement import TensorShard, tensor_shard
from . import agreement
from .flat_shard import caller
from .rectangles import cut_of

if TYPE_CHECKING:
    from .adam import Adam

_HEAD = struct.Struct("<qqqqddd")  # failed, settings not compared yet, found_inf, digest, scale, whole, cut
_TEXT_BYTES = 4096
_OPERATION = "agreement of the tensor-parallel ranks in step()"


class Disagreement(ValueError):
    """Tensor-parallel ranks differ in what must be the same; raised on all of them, before anything is changed."""


class Agreed(NamedTuple):
    """What all ranks know of the gradients."""

    found_inf: bool
    square_sum: float  # of all gradients; 0 if it was not asked for


class TensorRanks:
    """The ranks of one tensor-parallel group, of more than one rank.

    Attributes:
        said: this rank has told the others all that they wait for in this step.
        compared: the settings have been found to be the same on all ranks.
    """

    def __init__(self, who: str, group: dist.ProcessGroup, seconds: float | None = None):
        self.who = who
        self.group = group
        self.ranks = dist.get_process_group_ranks(group)
        self.rank = self.ranks.index(dist.get_rank())
        self.seconds = seconds  # None: the group's own timeout
        self.said = True
        self.compared = False

    # ---- messages ----

    def exchange(self, payload: bytes, operation: str) -> list[bytes]:
        """What every rank has passed, all of one length, in rank order."""
        devices = {device.type for device in self.group._device_types}
        device = torch.device("cpu" if "cpu" in devices else next(iter(devices)))
        mine = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(device)
        heard = [torch.empty_like(mine) for _ in self.ranks]
        try:
            work = dist.all_gather(heard, mine, group=self.group, async_op=True)
            if work is not None:
                work.wait() if self.seconds is None else work.wait(timedelta(seconds=self.seconds))
        except RuntimeError as error:
            others = [rank for rank in self.ranks if rank != dist.get_rank()]
            raise PeerError(
                f"{self.who}: a rank of the tensor-parallel group {self.ranks} is lost or does not answer: one of "
                f"{others}, during {operation} ({str(error).splitlines()[0]}). Nothing was changed by this step. Look "
                "at what it has said itself, then start all ranks again.",
                others[0] if len(others) == 1 else None,
                operation,
            ) from error
        return [one.cpu().numpy().tobytes() for one in heard]

    def due(self, optimizer: "Adam") -> bool:
        """True if the ranks have to hear each other in a step: the same on all of them."""
        if not self.compared:
            return True
        asked = optimizer.options.needs_norm() or hasattr(optimizer, "found_inf")
        return asked and not _stays_on_device(optimizer)

    def hear(
        self, optimizer: "Adam", present: Sequence[int], whole: float = 0.0, cut: float = 0.0, found_inf: bool = False
    ) -> Agreed:
        """Tells all ranks what this one has found, and hears it of them.

        Args:
            present: which parameters have a gradient.
            whole, cut: sums of squares of the gradients of parameters that are whole on each rank, and of cut ones.

        Raises:
            Disagreement: on all ranks, if they differ in settings or in `present`.
            PeerError: another rank has failed or is lost.
        """
        self.said = True
        digest = agreement.digest(optimizer._groups, list(present))
        scale, _ = optimizer._amp_scale()
        heads = self._heads(_HEAD.pack(False, not self.compared, found_inf, digest, scale, whole, cut))
        _, news, infs, digests, scales, wholes, cuts = zip(*heads, strict=True)
        if any(news) or len(set(digests)) > 1:
            try:
                self.compare(optimizer)
            except ValueError as error:
                raise Disagreement(str(error)) from error
        if len(set(digests)) > 1:
            raise Disagreement(
                f"{self.who}: other parameters have a gradient on this rank than on others of the tensor-parallel "
                f"group {self.ranks}; expected the same on all, which hold parts of one model. Run the same forward on "
                "all."
            )
        if len(set(scales)) > 1 and not any(infs):
            raise Disagreement(
                f"{self.who}: GradScaler's scale is {1 / scales[0]:g} on rank {self.ranks[0]} and differs on others of "
                f"the tensor-parallel group {self.ranks}; expected one scale. Make the GradScaler with the same "
                "settings on all ranks."
            )
        if any(infs) and not found_inf:
            _tell_scaler()
        together = cuts[0]
        for part in cuts[1:]:
            together += part
        return Agreed(any(infs), wholes[0] + together)

    def fail(self, error: BaseException) -> None:
        """Tells the ranks that wait that this one does not take the step."""
        if not self.said:
            self.said = True
            with suppress(PeerError):
                self._heads(_HEAD.pack(True, False, False, 0, 1.0, 0.0, 0.0), error)

    def _heads(self, head: bytes, error: BaseException | None = None) -> list[tuple[Any, ...]]:
        heads = [_HEAD.unpack(one) for one in self.exchange(head, _OPERATION)]
        failed = [rank for rank, one in zip(self.ranks, heads, strict=True) if one[0]]
        if not failed:
            return heads
        mine = "" if error is None else f"{type(error).__name__}: {error}"
        texts = self.exchange(mine.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0"), _OPERATION)
        text = texts[self.ranks.index(failed[0])].rstrip(b"\0").decode(errors="replace")
        raise PeerError(
            f"{self.who}: rank {failed[0]} could not take the step, so no rank of its tensor-parallel group did: "
            f"{text}",
            failed[0],
            _OPERATION,
        )

    def compare(self, optimizer: "Adam", problem: Exception | None = None) -> None:
        """Raises ValueError on all ranks if they differ in settings or in the whole parameters. See agreement.check."""
        items: agreement.Items = []
        if problem is None:
            settings = {"options": optimizer.options, "stage": getattr(optimizer, "stage", None)}
            items = agreement.describe(self.who, settings, optimizer.param_groups, whole=True)
        agreement.check(self.who, self.group, self.ranks, items, problem)
        self.compared = True

    def explain(self, optimizer: "Adam") -> Iterator[str]:
        """Lines of explain()."""
        params = [param for group in optimizer.param_groups for param in group["params"]]
        parts = [param for param in params if cut_of(param) is not None]
        yield (
            f"  tensor parallel over ranks {self.ranks}: {len(parts)} parameters are cut, {len(params) - len(parts)} "
            "whole on each rank"
        )
        if optimizer.options.needs_norm():
            where = "on the device" if _stays_on_device(optimizer) else f"in one message of {_HEAD.size} bytes a step"
            yield (
                "    squares of the gradients: of whole parameters once, as the first rank has them, then of cut ones "
                f"summed in rank order; {where}"
            )
        else:
            yield "    no message in a step, unless a GradScaler is in use: no norm is asked for"


def find(who: str, params: Iterable[Any], seconds: float | None = None) -> TensorRanks | None:
    """The tensor-parallel ranks of parameters; None if they are cut over no more than one rank.

    Raises:
        ValueError: they are parts of different groups, or do not fit what is said of them. TypeError: one of them is a
        DTensor.
    """
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for index, param in enumerate(params):
        shard = tensor_shard(param) if isinstance(param, Tensor) else None
        if shard is not None:
            _check(who, index, param, shard)
            if shard.group.size() > 1:
                groups.setdefault(tuple(dist.get_process_group_ranks(shard.group)), shard.group)
    if len(groups) > 1:
        raise ValueError(
            f"{who}: parameters are parts over different groups of ranks: {[list(ranks) for ranks in groups]}; "
            "expected one tensor-parallel group. Give each group's parameters an optimizer of their own."
        )
    return TensorRanks(who, next(iter(groups.values())), seconds) if groups else None


def _check(who: str, index: int, param: Tensor, shard: TensorShard) -> None:
    if is_dtensor(param):
        raise TypeError(
            f"{who}: parameter {index} is a DTensor and has a tensor_shard; expected one of the two. Cut it by DTensor "
            "alone, or by pyshard.tp alone."
        )
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


def check_group(who: str, tensor_ranks: TensorRanks | None, ranks: list[int]) -> None:
    """Raises ValueError if ranks over which a sharded optimizer cuts its state hold different parts of the weights."""
    both = [] if tensor_ranks is None else sorted(set(ranks) & set(tensor_ranks.ranks))
    if tensor_ranks is not None and len(both) > 1:
        raise ValueError(
            f"{who}: ranks {both} of process_group hold different parts of the parameters (their tensor-parallel group "
            f"is {tensor_ranks.ranks}); expected ranks that hold the same ones. Pass the data-parallel group: "
            'process_group=mesh["dp"].get_group().'
        )


def _stays_on_device(optimizer: "Adam") -> bool:
    """True if nothing of a step is read on the host: the norm is summed over ranks where it is (Launch.over_ranks)."""
    groups = [group for group in optimizer.param_groups if group["params"]]
    return all(group["capturable"] and all(p.device.type != "cpu" for p in group["params"]) for group in groups)


def agree_on_device(optimizer: "Adam", ranks: TensorRanks) -> None:
    """GradScaler's inf of all ranks, for a step that reads nothing on the host."""
    found_inf = getattr(optimizer, "found_inf", None)
    if isinstance(found_inf, Tensor) and _stays_on_device(optimizer):
        every = [torch.empty_like(found_inf) for _ in ranks.ranks]
        dist.all_gather(every, found_inf.contiguous(), group=ranks.group)
        together = torch.stack(every).amax(0)
        optimizer.found_inf = together  # type: ignore[attr-defined]  # GradScaler removes it after step()
        _tell_scaler(together)


def _tell_scaler(found_inf: Tensor | float = 1.0) -> None:
    """Has the GradScaler whose step() called the optimizer's know of another rank's inf, so that it lowers the scale.

    It keeps what it has found for itself, and reads it again in update().
    """
    variables = caller("torch.amp.grad_scaler", "step")
    if variables is not None:
        for known in variables["optimizer_state"]["found_inf_per_device"].values():
            known.copy_(found_inf.reshape(known.shape)) if isinstance(found_inf, Tensor) else known.fill_(found_inf)

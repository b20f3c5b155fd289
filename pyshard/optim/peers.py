"""The peers of an optimizer: the ranks that hold other parts of the model that it trains.

An update is elementwise and needs nothing of them. Only what concerns all gradients does: their norm, whether one of
them is not finite, and GradScaler's inf. Where a step needs that, every rank passes all levels (levels.py), the same
way as all others. At each it sends one message of 168 bytes to the level's group and hears those of the others, so
that all take the same decision from the same bits. The message says, too, if a rank has failed: those that hear it tell
the next level, so that no rank waits for another.

Launches on a device give the same bits without the host (sum_on_device). Sums do not depend on how many data-parallel
ranks there are.
"""

import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm import PeerError, agree
from ..comm.notes import Notes
from ..kernels.launch import local_tensor
from ..placement import pipeline_share
from . import agreement
from .flat_shard import caller
from .levels import PIPELINE, SHARD, TENSOR, Level, counts, find, mask_of, over_levels, passed

if TYPE_CHECKING:
    from .adam import Adam

_HEAD = struct.Struct("<qqqqd")  # failed, settings not compared yet, found_inf, digest, scale; sums follow
_SUMS = 16  # enough for four levels: more are rare, and make longer messages
_TEXT_BYTES = 4096
_FAILED, _DISAGREED = 1, 2


class Disagreement(ValueError):
    """Ranks differ in what must be the same; raised on all of them, before anything is changed."""


class Agreed(NamedTuple):
    """What all ranks know of the gradients."""

    found_inf: bool
    square_sum: float  # of all gradients; 0 if it was not asked for


class Peers:
    """The levels of an optimizer, of which there is at least one.

    Attributes:
        told: how many levels have heard all that they wait for from this rank in this step.
        compared: the settings have been found to be the same on all ranks.
    """

    def __init__(self, who: str, levels: list[Level], seconds: float | None = None):
        self.who = who
        self.levels = levels
        self.seconds = seconds  # None: the groups' own timeouts
        self.told = len(levels)
        self.compared = False
        self._heard: tuple[int, str] | None = None  # of another rank's failure, to be passed on as it is

    def level(self, kind: str) -> Level | None:
        return next((level for level in self.levels if level.kind == kind), None)

    @property
    def tensor_rank(self) -> int:
        """This process's place among its tensor-parallel ranks."""
        tensor = self.level(TENSOR)
        return 0 if tensor is None else tensor.rank

    @property
    def said(self) -> bool:
        """This rank has told all others what they wait for in this step."""
        return self.told == len(self.levels)

    def mask(self, param: Tensor) -> int:
        return mask_of(param, self.levels)

    def begin(self, optimizer: "Adam") -> None:
        """Of a step: from here on other ranks may wait, until this one has passed all levels."""
        self._heard = None
        self.told = 0 if self.due(optimizer) else len(self.levels)

    def due(self, optimizer: "Adam") -> bool:
        """True if the ranks have to hear each other in a step: the same on all of them."""
        if not self.compared:
            return True
        asked = optimizer.options.needs_norm() or hasattr(optimizer, "found_inf")
        return asked and not stays_on_device(optimizer)

    # ---- messages ----

    def hear(
        self, optimizer: "Adam", present: Sequence[int], sums: Sequence[float] = (), found_inf: bool = False
    ) -> Agreed:
        """Tells all ranks what this one has found, and hears it of them.

        Args:
            present: which parameters have a gradient.
            sums: of squares of gradients, by the levels over which their parameters are cut (levels.py).

        Raises:
            Disagreement: on all ranks, if they differ in settings or in `present`.
            PeerError: another rank has failed or is lost.
        """
        scale, _ = optimizer._amp_scale()
        sums = list(sums) or [0.0] * (1 << len(self.levels))
        while not self.said:
            level = self.levels[self.told]
            digest = agreement.digest(optimizer._groups, list(present) if level.alike else [])
            head = _HEAD.pack(0, not self.compared, found_inf, digest, scale)
            heads, every = self._pass(level, head, sums)
            self._check(optimizer, level, heads)
            found_inf = any(infs for _, _, infs, _, _ in heads)
            sums = passed([one[: len(sums)] for one in every])
        self.compared = True
        if found_inf:
            tell_scaler()
        return Agreed(found_inf, sums[0])

    def told_of(self, error: BaseException) -> bool:
        """True for the error of another rank, or of a lost one, that these levels have brought."""
        return isinstance(error, PeerError) and error.operation in {level.operation for level in self.levels}

    def fail(self, error: BaseException) -> None:
        """Tells the ranks that wait that this one does not take the step."""
        while not self.said:
            with suppress(PeerError):
                kind = _DISAGREED if isinstance(error, Disagreement) else _FAILED
                self._pass(self.levels[self.told], _HEAD.pack(kind, False, False, 0, 1.0), [], error)

    def _pass(
        self, level: Level, head: bytes, sums: Sequence[float], error: BaseException | None = None
    ) -> tuple[list[tuple[Any, ...]], list[tuple[float, ...]]]:
        width = max(_SUMS, 1 << len(self.levels) - self.told)  # the same on all ranks of a level
        self.told += 1
        values = struct.pack(f"<{width}d", *sums, *[0.0] * (width - len(sums)))
        detail = "" if self.compared else "comparing settings, as at the first step and after add_param_group()"
        heard = level.exchange(self.who, head + values, self.seconds, detail)
        if len({len(one) for one in heard}) > 1:
            raise Disagreement(
                f"{self.who}: ranks of the {level} hold parts over other groups than each other; expected the same "
                "groups on all of them. Cut all parts of the model in the same ways."
            )
        heads = [_HEAD.unpack_from(one) for one in heard]
        every = [struct.unpack_from(f"<{width}d", one, _HEAD.size) for one in heard]
        failed = [place for place, one in enumerate(heads) if one[0]]
        if failed:
            texts = level.exchange(self.who, self._text(error), self.seconds)
            if error is None:
                raise self._failure(level, failed[0], heads[failed[0]][0], texts[failed[0]])
        return heads, every

    def _failure(self, level: Level, place: int, kind: int, text: bytes) -> Exception:
        """The error of a rank of the level, as this one has it; it says whose error it was in the first place."""
        origin, _, message = text.decode(errors="replace").partition("\n")
        rank = int(origin)
        self._heard = rank, message
        if kind == _DISAGREED:
            return Disagreement(message if message.startswith(self.who) else f"{self.who}: rank {rank}: {message}")
        return PeerError(
            f"{self.who}: rank {rank} could not take the step, so no rank did, as the {level} tells: {message}",
            rank,
            level.operation,
        )

    def _text(self, error: BaseException | None) -> bytes:
        """Whose error it is, and what it says."""
        if error is None:
            return b""
        text = str(error) if isinstance(error, Disagreement) else f"{type(error).__name__}: {error}"
        rank = error.rank if isinstance(error, PeerError) and error.rank is not None else dist.get_rank()
        rank, text = self._heard or (rank, text)
        return f"{rank}\n{text}".encode()[:_TEXT_BYTES]

    def _check(self, optimizer: "Adam", level: Level, heads: list[tuple[Any, ...]]) -> None:
        _, news, infs, digests, scales = zip(*heads, strict=True)
        differ = len(set(digests)) > 1
        if any(news) or differ:
            try:
                self._compare(optimizer, level)
            except ValueError as error:
                raise Disagreement(str(error)) from error
        if differ:
            raise Disagreement(
                f"{self.who}: other parameters have a gradient on this rank than on others of the {level}; expected "
                "the same on all, which hold parts of one model. Run the same forward on all."
            )
        if len(set(scales)) > 1 and not any(infs):
            raise Disagreement(
                f"{self.who}: GradScaler's scale is {1 / scales[0]:g} on rank {level.ranks[0]} and differs on others "
                f"of the {level}; expected one scale. Make the GradScaler with the same settings on all ranks."
            )

    # ---- settings ----

    def compare(self, optimizer: "Adam", problem: Exception | None = None) -> None:
        """Raises on all ranks if they differ in settings or in whole parameters, or if this one has a problem."""
        found = problem
        for level in self.levels:
            try:
                self._compare(optimizer, level, found)
            except (TypeError, ValueError, PeerError) as error:
                found = found or error
        if found is not None:
            raise found
        self.compared = True

    def _compare(self, optimizer: "Adam", level: Level, problem: Exception | None = None) -> None:
        items: agreement.Items = []
        if problem is None:
            settings = {"options": optimizer.options, "stage": getattr(optimizer, "stage", None)}
            whole = level.kind != SHARD
            items = agreement.describe(self.who, settings, optimizer.param_groups, whole, params=level.alike)
            items.append(("deciding on the device (capturable on an accelerator)", stays_on_device(optimizer)))
        agreement.check(self.who, level.group, list(level.ranks), items, problem)

    # ---- a step on a device ----

    def sum_on_device(self, sums: Tensor) -> Tensor:
        """The sum of squares of all gradients, 0-d, from `sums` as in hear(), where they are."""
        return over_levels(self.who, "norm of all gradients in step()", self.levels, sums)

    def inf_on_device(self, optimizer: "Adam") -> None:
        """GradScaler's inf of all ranks, for a step that reads nothing on the host."""
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not stays_on_device(optimizer):
            return
        together = torch.as_tensor(found_inf, dtype=torch.float32, device=device_of(optimizer))
        for level in self.levels:
            every = [torch.empty_like(together) for _ in level.ranks]
            try:
                dist.all_gather(every, together.contiguous(), group=level.group)
            except RuntimeError as error:
                raise Notes(self.who, level.group).error(level.operation, error) from error
            together = torch.stack(every).amax(0)
        optimizer.found_inf = together  # type: ignore[attr-defined]  # GradScaler removes it after step()
        tell_scaler(together)

    # ---- explain() ----

    def explain(self, optimizer: "Adam") -> Iterator[str]:
        """Lines of explain()."""
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for bit, level in enumerate(self.levels):
            cut = sum(self.mask(param) >> bit & 1 for param in params)
            ranks = list(level.ranks)
            if level.kind == PIPELINE:
                copies = sum(not counts(param) for param in params)
                text = f"pipeline over ranks {ranks}: {cut} parameters on this stage"
                yield f"  {text}" + (f", {copies} of them copies that count on an earlier one" if copies else "")
            elif level.kind == TENSOR:
                whole = len(params) - cut
                yield f"  tensor parallel over ranks {ranks}: {cut} parameters are cut, {whole} whole on each rank"
            else:
                yield f"  DTensors over ranks {ranks}: {cut} parameters are sharded"
        if optimizer.options.needs_norm():
            size = f"one message of {agree.FRAME} bytes a step"
            where = "on the device" if stays_on_device(optimizer) else f"in {size}"
            yield (
                "    squares of the gradients: over these groups in this order; of parameters that are whole once, as "
                f"the group's first rank has them, and of cut ones summed in rank order; {where} and group"
            )
        else:
            yield "    no message in a step, unless a GradScaler is in use: no norm is asked for"


def find_peers(who: str, params: Sequence[Any], seconds: float | None = None) -> Peers | None:
    """The peers of an optimizer of these parameters; None if no other rank holds a part of the model.

    Raises: ValueError, as find(), and for parts of several tensor-parallel groups or pipelines.
    """
    levels = find(who, params)
    for kind in (TENSOR, PIPELINE):
        groups = [list(level.ranks) for level in levels if level.kind == kind]
        if len(groups) > 1:
            raise ValueError(
                f"{who}: parameters are parts over different groups of ranks: {groups}; expected one {kind}. Give each "
                "group's parameters an optimizer of their own."
            )
    return Peers(who, levels, seconds) if levels else None


def check_group(who: str, peers: Peers | None, ranks: list[int]) -> None:
    """Raises ValueError if ranks over which a sharded optimizer cuts its state hold different parts of the model."""
    for level in [] if peers is None else peers.levels:
        both = sorted(set(ranks) & set(level.ranks))
        if len(both) > 1:
            raise ValueError(
                f"{who}: ranks {both} of process_group hold different parts of the parameters (their {level.kind} is "
                f"{list(level.ranks)}); expected ranks that hold the same ones. Pass the data-parallel group: "
                'process_group=mesh["dp"].get_group().'
            )


def accumulating(param: Tensor) -> bool:
    """True while a pipeline has more microbatches to add to the parameter's gradient."""
    share = pipeline_share(param)
    return share is not None and share.accumulating


def device_of(optimizer: "Adam") -> torch.device:
    return next(local_tensor(param).device for group in optimizer.param_groups for param in group["params"])


def stays_on_device(optimizer: "Adam") -> bool:
    """True if nothing of a step is read on the host: the norm is summed over ranks where it is."""
    groups = [group for group in optimizer.param_groups if group["params"]]
    return all(group["capturable"] and all(p.device.type != "cpu" for p in group["params"]) for group in groups)


def tell_scaler(found_inf: Tensor | float = 1.0) -> None:
    """Has the GradScaler whose step() called the optimizer's know of another rank's inf, so that it lowers the scale.

    It keeps what it has found for itself, and reads it again in update().
    """
    variables = caller("torch.amp.grad_scaler", "step")
    if variables is not None:
        for known in variables["optimizer_state"]["found_inf_per_device"].values():
            known.copy_(found_inf.reshape(known.shape)) if isinstance(found_inf, Tensor) else known.fill_(found_inf)

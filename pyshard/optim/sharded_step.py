"""One step of a sharded optimizer, in the same order on all ranks.

1. The ranks tell each other how far they are (hear_all) and agree on errors, on GradScaler's inf and on which
   parameters have a gradient anywhere.
2. What hooks have not sent is sent; each rank sums up the gradients that it owns.
3. With clipping or nonfinite=...: sums of squares of blocks, exchanged, and added up by every rank in one order.
4. Each rank updates what it owns, and brings the new parameters to all.
"""

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _C
from ..comm import PeerError
from ..kernels.launch import HostLaunch
from ..kernels.norm import grad_norm
from ..kernels.reference import NORM_BLOCK, clip_coefficient
from . import agreement, state
from .levels import counts
from .peers import Disagreement, tell_scaler
from .reducer import InPlace
from .sharded_plan import launch_of
from .shards import Shard

if TYPE_CHECKING:
    from .sharded import ShardedAdam

_HEADER = struct.Struct("<qqqqdq")  # kind, failed, rounds, found_inf, scale, digest
_TEXT_BYTES = 4096
_ALL_GATHER = "all-gather of parameters"
_NO_BLOCKS = torch.empty(0, dtype=torch.int64)


class Kind(IntEnum):
    """What a rank is doing when it asks the others how far they are."""

    STEP = 0
    BACKWARD = 1  # at its end, while a GradScaler is in use
    ZERO_GRAD = 2


@dataclass(frozen=True)
class News:
    """What the ranks know of each other."""

    backward: bool  # a rank is at the end of a backward
    rounds: int  # that all have to bring to an end
    present: list[bytes]  # for each generation, a byte per parameter: 1 if any rank has a gradient
    found_inf: bool
    scale: float  # GradScaler's factor


def hear_all(optimizer: "ShardedAdam", kind: Kind, error: Exception | None = None) -> News:
    """Tells all ranks how far this one is, and hears it of them.

    Raises:
        the error itself, if this rank has one; PeerError if another has; ValueError, RuntimeError: on all ranks, if
        they differ in hyperparameters, in what is trained or in what they are doing.
    """
    transport, who = optimizer.transport(), f"pyshard.{type(optimizer).__name__}"
    progress = [reducer.progress() for reducer in optimizer._reducers]  # of generations that have memory
    rounds = max((p.rounds for p in progress), default=0)
    scale, found_inf = optimizer._amp_scale()
    digest = agreement.digest(optimizer._groups, [optimizer._index[p] for p in optimizer._member])
    head = _HEADER.pack(kind, error is not None, rounds, found_inf, scale, digest)
    mine = b"".join(p.present for p in progress)
    operation = {Kind.STEP: "beginning of step()", Kind.BACKWARD: "end of backward", Kind.ZERO_GRAD: "zero_grad()"}
    heard = transport.exchange(head + mine.ljust(len(optimizer._index), b"\0"), operation[kind])
    heads = [_HEADER.unpack_from(one) for one in heard]
    kinds, failed, all_rounds, infs, scales, digests = zip(*heads, strict=True)
    if any(failed):
        texts = transport.exchange(_text(error), operation[kind])
        if error is not None:
            raise error
        rank = failed.index(1)
        text = texts[rank].rstrip(b"\0").decode(errors="replace")
        raise PeerError(
            f"{who}: rank {transport.ranks[rank]} could not take the step, so no rank did: {text}",
            transport.ranks[rank],
            operation[kind],
        )
    if Kind.ZERO_GRAD in kinds and set(kinds) != {Kind.ZERO_GRAD}:
        names = ", ".join(f"rank {r}: {operation[Kind(k)]}" for r, k in zip(transport.ranks, kinds, strict=True))
        raise RuntimeError(f"{who}: ranks are at different places ({names}); expected the same calls on all ranks.")
    if len(set(digests)) > 1 and len(set(kinds)) == 1:  # else those in step() have laid out what is new, and come again
        items = agreement.describe(who, {}, optimizer.param_groups)
        agreement.check(who, optimizer.process_group, optimizer.ranks, items)
        raise ValueError(f"{who}: ranks have laid out different parameters; expected the same requires_grad on all.")
    if len(set(scales)) > 1 and set(kinds) == {Kind.STEP} and not any(infs):
        raise ValueError(
            f"{who}: GradScaler's scale is {1 / scales[0]:g} on rank {transport.ranks[0]} and differs on others; "
            "expected one scale. Make the GradScaler before the first backward, with the same settings on all ranks."
        )
    union = bytes(map(max, *(one[_HEADER.size :] for one in heard))) if len(heard) > 1 else mine
    present, begin = [], 0
    for p in progress:
        present.append(union[begin : begin + len(p.present)])
        begin += len(p.present)
    return News(Kind.BACKWARD in kinds, max(all_rounds), present, any(infs), scale)


def _text(error: Exception | None) -> bytes:
    return (
        ("" if error is None else f"{type(error).__name__}: {error}").encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")
    )


def finish_rounds(optimizer: "ShardedAdam", news: News) -> Iterator[tuple[Shard, bytes]]:
    """Brings the gradients of all ranks to their owners. Yields each bucket in which any parameter has a gradient as
    soon as it is summed up, and a byte for each of its parameters: 1 if that one has."""
    for reducer, present in zip(optimizer._reducers, news.present, strict=True):
        if any(present):
            for shard in reducer.finish(news.rounds, present):
                flags = shard.flags(present)
                if any(flags):
                    yield shard, flags


def end_of_backward(optimizer: "ShardedAdam", news: News) -> None:
    """All ranks learn whether the gradients are finite; the witness tells it to a GradScaler."""
    if optimizer.stage == 2:
        values = [shard.reduced for shard, _ in finish_rounds(optimizer, news)]
        for reducer in optimizer._reducers:
            reducer.remember()
    else:
        values = [p.grad for p in optimizer._member]
    values += [p.grad for p in optimizer._index if p not in optimizer._member]  # without a place until step()
    _, nonfinite = grad_norm([value for value in values if value is not None])
    heard = optimizer.transport().exchange(struct.pack("<q", bool(nonfinite)), "end of backward")
    optimizer._witness.tell(optimizer, finite=not any(struct.unpack("<q", one)[0] for one in heard))


def begin(optimizer: "ShardedAdam", error: Exception | None) -> News:
    """What all ranks know at the beginning of a step. Raises as hear_all(), and nothing has changed then."""
    news = hear_all(optimizer, Kind.STEP, error)
    while news.backward:  # others have had a backward, and this rank none
        end_of_backward(optimizer, news)
        optimizer._witness.take_back("")
        news = hear_all(optimizer, Kind.STEP)
    return news


def step_on_ranks(optimizer: "ShardedAdam", groups: list[list[float]], news: News) -> None:
    """The step. Parameters and state change in place; or not at all, if a gradient is not finite."""
    scaled = getattr(optimizer, "grad_scale", None) is not None
    # A scaler whose unscale_() came before step() leaves only this.
    optimizer._witness.watching = getattr(optimizer, "found_inf", None) is not None
    try:
        summed = finish_rounds(optimizer, news)
        others = optimizer._peers is not None and not optimizer._peers.said
        if news.found_inf or optimizer.options.needs_norm() or scaled or others:
            _update_together(optimizer, groups, news, list(summed))
        else:
            _update_in_turn(optimizer, groups, news, summed)
    except (FloatingPointError, Disagreement):  # on all ranks, which go on; after any other error no step follows
        _reset(optimizer, news)
        raise
    _reset(optimizer, news)


def _reset(optimizer: "ShardedAdam", news: News) -> None:
    for reducer, present in zip(optimizer._reducers, news.present, strict=True):
        if any(present):
            reducer.reset(present)


def _update_in_turn(
    optimizer: "ShardedAdam", groups: list[list[float]], news: News, summed: Iterator[tuple[Shard, bytes]]
) -> None:
    """Updates each bucket as soon as its gradients are summed up."""
    publication = _Publication(optimizer)
    for shard, flags in summed:
        _Launched(optimizer, shard, flags).adam(groups, news.scale / optimizer.world)
        publication.add(shard, flags)
    publication.finish()


def _update_together(
    optimizer: "ShardedAdam", groups: list[list[float]], news: News, summed: list[tuple[Shard, bytes]]
) -> None:
    """Looks at all gradients first, and then updates all buckets or none."""
    options, peers, found_inf = optimizer.options, optimizer._peers, news.found_inf
    if found_inf:
        summed = []
    # In one order, whatever came first: the norm's bits depend on it.
    summed.sort(key=lambda each: optimizer._member[each[0].params[0]] << 32 | each[0].index)
    before = state.snapshot(optimizer.state)
    try:
        launches = [_Launched(optimizer, shard, flags) for shard, flags in summed]
        scale = news.scale / optimizer.world
        sums = [0.0] * (1 if peers is None else 1 << len(peers.levels))
        if not found_inf:
            _square_sums(optimizer, launches, news, sums)
        total = sums[0]
        if peers is not None and not peers.said:
            members = [p for generation in optimizer._generations for p in generation.params]
            there = [optimizer._index[p] for p, flag in zip(members, b"".join(news.present), strict=True) if flag]
            found_inf, total = peers.hear(optimizer, sorted(there), sums, found_inf)
        norm = math.sqrt(total) * scale if total >= 0.0 else math.nan
        if options.nonfinite == "raise" and not found_inf and not math.isfinite(total):
            raise FloatingPointError(optimizer._nonfinite_message([each.launch for each in launches]))
    except BaseException:
        _undo(optimizer, before)
        raise
    if found_inf:
        optimizer._skipped += 1
        _undo(optimizer, before)
        return
    if options.needs_norm():
        optimizer._grad_norm = norm
    if not math.isfinite(total) and (options.nonfinite == "skip" or optimizer._witness.watching):
        tell_scaler()
        optimizer._skipped += 1
        _undo(optimizer, before)
        return
    if options.max_grad_norm is not None and options.max_grad_norm != math.inf:
        scale = scale * clip_coefficient(norm, options.max_grad_norm)
    publication = _Publication(optimizer)
    for each, (shard, flags) in zip(launches, summed, strict=True):
        each.adam(groups, scale)
        publication.add(shard, flags)
    publication.finish()


def _undo(optimizer: "ShardedAdam", before: dict[Tensor, tuple[object, dict[str, object]]]) -> None:
    """Takes back state that was made for a step that did not happen."""
    made = len(before) != len(optimizer.state)
    state.restore(optimizer.state, before)
    if made:
        for generation in optimizer._generations:
            for shard in generation.shards:
                shard.launch = None


class _Launched:
    """The kernels of one bucket, and where they find gradients and put parameters."""

    def __init__(self, optimizer: "ShardedAdam", shard: Shard, flags: bytes):
        arena, layout = shard.arena, shard.layout
        self.shard, self.sources = shard, [0]
        if shard.backend is None:
            shard.backend = optimizer._backend_of(shard)
        able = shard.backend.name in ("cpu", "triton")  # to reach several places
        whole: list[Tensor] = []
        if isinstance(optimizer._reducers[optimizer._member[shard.params[0]]], InPlace):
            begin, end = shard.grad_begin, shard.grad_begin + layout.slot_bytes
            whole = [source[begin:end].view(layout.wire) for source in arena.sources(0)]
        if whole and able and layout.wire in (torch.float32, layout.dtype):
            # One pass: the kernels themselves take the gradients of all ranks.
            own = whole[optimizer.rank]
            self.sources = [source.data_ptr() - own.data_ptr() for source in whole]
            flat, first = own, 0
        else:
            if whole:
                shard.rounds = 0
                shard.reduce(0, [source[shard.own[0] : shard.own[1]].view(torch.uint8) for source in whole])
            if shard.reduced is None:
                raise RuntimeError("pyshard: a bucket's gradients were not summed up before its update")
            flat, first = shard.reduced, shard.own[0]
        self.launch: Any = launch_of(optimizer, shard, flags, flat, first)
        self.targets, self.copies = (shard.targets, []) if able else ([], arena.targets)

    def block_sums(self, groups: list[list[float]]) -> Tensor:
        sums: Tensor = self.launch.block_sums(groups, self.sources)
        return sums

    def adam(self, groups: list[list[float]], scale: float) -> None:
        if isinstance(self.launch, HostLaunch):
            self.launch.adam(groups, scale, self.sources, self.targets)
        else:
            self.launch.upload(groups)
            self.launch.set_inputs(scale, math.inf, None, None, False)
            self.launch.adam({}, self.sources, self.targets)
            self.launch.scatter()
        begin, end = self.shard.span
        for target in self.copies:
            target[begin:end].copy_(self.shard.arena.params[begin:end])


def _square_sums(optimizer: "ShardedAdam", launches: list[_Launched], news: News, sums: list[float]) -> None:
    """Sums of squares of all gradients in the order of pyshard.AdamW in one process: the same bits for any cut.

    `sums` gets them by the levels over which parameters are cut.
    """
    order = optimizer._block_order(tuple(news.present))
    mine = [each.block_sums(optimizer._groups) for each in launches]
    own = torch.cat([m.cpu() for m in mine]) if mine else torch.empty(0, dtype=torch.float64)
    longest = max(len(places) for places in order)
    payload = own.numpy().tobytes().ljust(8 * longest, b"\0")
    heard = optimizer.transport().exchange(payload, "exchange of the gradients' norm")
    values = torch.empty(sum(len(places) for places in order), dtype=torch.float64)
    for places, one in zip(order, heard, strict=True):
        if len(places):
            values[places] = torch.frombuffer(bytearray(one), dtype=torch.float64)[: len(places)]
    for mask, places in optimizer._block_kinds.items():
        sums[mask] = float(_C.sum_blocks(values[places].numpy().tobytes()))


def block_order(optimizer: "ShardedAdam", present: Sequence[bytes]) -> tuple[list[Tensor], dict[int, Tensor]]:
    """For each rank, where the blocks that it sums up stand among the blocks of all parameters with a gradient.

    And where those stand that count on this rank, by the levels over which their parameters are cut.
    """
    first, total, peers = {}, 0, optimizer._peers
    kinds: dict[int, list[Tensor]] = {}
    members = zip(optimizer._generations, present, strict=True)
    active = {p for generation, flags in members for p, there in zip(generation.params, flags, strict=True) if there}
    for param in optimizer._index:
        if param in active:
            first[param] = total
            total += -(-param.numel() // NORM_BLOCK)
            if counts(param):
                mask = 0 if peers is None else peers.mask(param)
                kinds.setdefault(mask, []).append(torch.arange(first[param], total))
    order = []
    for rank in range(optimizer.world):
        parts = []
        for generation in optimizer._generations:
            for bucket in generation.layout:
                for place in bucket.places:
                    param = generation.params[place.index]
                    if param in active:
                        a, b = bucket.run(place, rank)
                        if a < b:
                            start = first[param] + a // NORM_BLOCK
                            parts.append(torch.arange(start, start + -(-(b - a) // NORM_BLOCK)))
        order.append(torch.cat(parts) if parts else _NO_BLOCKS)
    return order, {mask: torch.cat(kind) for mask, kind in kinds.items()}


class _Publication:
    """Brings new parameters to all ranks: what the next forward needs first comes first, if it is to wait for them."""

    def __init__(self, optimizer: "ShardedAdam"):
        self.gathering = optimizer._gathering
        self.arrivals: list[_Arrival] = []
        self.later: list[Shard] = []
        self.changed: list[Tensor] = []

    def add(self, shard: Shard, flags: bytes) -> None:
        """The kernels have updated what this rank owns of a bucket."""
        self.changed += [param for param, there in zip(shard.params, flags, strict=True) if there]
        if self.gathering is None or shard.arena.targets:
            self.arrivals.append(_Arrival(shard))
        else:
            self.later.append(shard)

    def finish(self) -> None:
        if self.gathering is not None:
            for shard in reversed(self.later):  # backward made the last layers' gradients first
                self.gathering.add(shard.params, _Arrival(shard))
        for arrival in self.arrivals:
            arrival()
        # Or a backward of what was computed before would use the new weights in silence.
        torch.autograd.graph.increment_version(self.changed)


class _Arrival:
    """The new parameters of a bucket on their way; called, it waits for them."""

    def __init__(self, shard: Shard):
        begin, end = shard.param_spans[0][0], shard.param_spans[-1][1]
        self.arena = shard.arena
        self.ticket: int | None = shard.arena.publish(begin, end, shard.param_spans, _ALL_GATHER)

    def __call__(self) -> None:
        if self.ticket is not None:
            ticket, self.ticket = self.ticket, None
            self.arena.published(ticket, _ALL_GATHER)

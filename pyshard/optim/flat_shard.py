"""FlatShard: the elements [begin, end) of a tensor, as a checkpoint sees them.

A sharded optimizer keeps a flat run of each parameter's state, in the order of the parameter's memory. What it hands
out looks like the whole tensor (shape, dtype) and holds the run. torch.distributed.checkpoint asks such a tensor for
its pieces: the run is covered by a few rectangles of the whole, which are views of the run, so that nothing is copied
and the checkpoint is the one that whole tensors would make. Any other use as a whole tensor raises.

A parameter that is itself a part of a whole one (placement.TensorShard) has runs of that part: they are covered by
rectangles of the part, and these, piece by piece, by rectangles of the whole.
"""

import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.launch import is_dtensor
from ..placement import TensorShard
from .rectangles import Cut, Rectangle, cover, cut_of, dense_stride, in_whole, memory_order, stride_in_order

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

_aten = torch.ops.aten
_REMEDY = (
    "Save and load it with pyshard.save_checkpoint or torch.distributed.checkpoint on all ranks, or get whole tensors "
    "from the optimizer's full_state_dict(); .local is this rank's part."
)


class FlatShard(Tensor):
    """Elements [begin, end) of a tensor of the shape of `like`, counted in the order of like's memory.

    If `like` is a part of a whole tensor, this looks like the whole, and holds elements of the part.

    Args:
        local: plain 1-d tensor, contiguous; the elements. Not copied.
        like: the parameter; gives shape and order of elements. If its elements are not dense in memory, the order is
            that of torch.empty_like(like).
        begin: position of the first element of `local`.
        cut: how `like` lies in a whole tensor; by default as its tensor_shard says.
        saved: False if another rank saves these elements. They can be loaded all the same.

    Raises:
        TypeError, ValueError: `local` is no such tensor, or the run does not lie in `like`.

    It can be copied, moved, cast, pickled, staged, saved and loaded through torch.distributed.checkpoint; all else
    raises a RuntimeError, since this rank does not have the other elements.
    """

    local: Tensor
    begin: int
    cut: Cut | None
    saved: bool
    # Of the tensor of which this is a run. Plain values, since torch's stagers copy every tensor that they find here.
    part_shape: tuple[int, ...]
    part_stride: tuple[int, ...]

    @staticmethod
    def __new__(
        cls, local: Tensor, like: Tensor, begin: int, cut: Cut | None = None, saved: bool = True
    ) -> "FlatShard":
        if isinstance(like, FlatShard):
            cut, like = like.cut, like.part
        cut = cut or cut_of(like)
        if type(local) is not Tensor or local.dim() != 1 or not local.is_contiguous():
            got = f"{type(local).__name__} {tuple(local.shape)}" if isinstance(local, Tensor) else type(local).__name__
            raise TypeError(f"FlatShard: local is a {got}; expected a plain, contiguous 1-d tensor.")
        if not 0 <= begin <= begin + local.numel() <= like.numel():
            raise ValueError(
                f"FlatShard: elements [{begin}, {begin + local.numel()}) of a tensor of shape {tuple(like.shape)}; "
                f"expected a run inside [0, {like.numel()})."
            )
        part_shape, part_stride = tuple(like.shape), dense_stride(like)
        shape = part_shape if cut is None else cut.whole
        stride = part_stride if cut is None else stride_in_order(shape, part_stride)
        self = Tensor._make_wrapper_subclass(cls, shape, strides=stride, dtype=local.dtype, device=local.device)
        self.local, self.begin, self.cut, self.saved = local, begin, cut, saved
        self.part_shape, self.part_stride = part_shape, part_stride
        return self

    @property
    def part(self) -> Tensor:
        """On the meta device: shape and order of the tensor of which this is a run."""
        return torch.empty_strided(self.part_shape, self.part_stride, device="meta")

    @property
    def end(self) -> int:
        """One past the position of the last element."""
        return self.begin + self.local.numel()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        of = f"{self.part_shape}"
        if self.cut is not None:
            of += f", itself {list(self.cut.pieces)} along {self.cut.dim} of {self.cut.whole}"
        return f"FlatShard([{self.begin}, {self.end}) of {of}, {self.dtype}, {self.device})"

    # ---- the run as rectangles of the whole ----

    def rectangles(self) -> list[Rectangle]:
        """The rectangles that cover the run: at most 2*dim - 1 for each piece if it is not empty."""
        order = memory_order(self.part_shape, self.part_stride)
        found = []
        for offsets, sizes, start in cover([self.part_shape[d] for d in order], self.begin, self.end):
            back = [order.index(d) for d in range(len(order))]
            found.append(Rectangle(tuple(offsets[i] for i in back), tuple(sizes[i] for i in back), start - self.begin))
        if self.cut is None:
            return found
        return [inside for one in found for inside in in_whole(one, self.cut, self.part_stride)]

    def piece(self, rectangle: Rectangle) -> Tensor:
        """A view of the run: the elements of one of its rectangles, in its shape."""
        first = self.local.storage_offset() + rectangle.start
        return self.local.as_strided(rectangle.sizes, self.part_stride, first)

    def as_part(self) -> Tensor:
        """A view of the run, which is all elements, in the shape of the part."""
        return self.local.as_strided(self.part_shape, self.part_stride)

    def same_run(self, other: Tensor) -> bool:
        """True if `other` is a FlatShard of the same elements, in the same order."""
        return (
            isinstance(other, FlatShard)
            and (self.shape, self.begin, self.end) == (other.shape, other.begin, other.end)
            and self.cut == other.cut
            and (
                self.local.numel() == 0
                or memory_order(self.part_shape, self.part_stride) == memory_order(other.part_shape, other.part_stride)
            )
        )

    # ---- what torch.distributed.checkpoint asks ----

    def __create_chunk_list__(self) -> "list[ChunkStorageMetadata]":
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(torch.Size(r.offsets), torch.Size(r.sizes)) for r in self._pieces()]

    def __create_write_items__(self, fqn: str, _: Any) -> "list[WriteItem]":
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in (self.__create_chunk_list__() if self.saved else ())
        ]

    def __get_tensor_shard__(self, index: "MetadataIndex") -> Tensor:
        for rectangle in self._pieces():
            if index.offset is not None and tuple(index.offset) == rectangle.offsets:
                return self.piece(rectangle)
        raise ValueError(f"{self!r} has no piece at {index.offset}; its pieces are {self._pieces()}.")

    def _pieces(self) -> list[Rectangle]:
        """The rectangles; of a tensor without elements the one empty piece, or it would not be saved by any rank."""
        if self.numel() == 0:
            return [Rectangle((0,) * self.dim(), tuple(self.shape), 0)]
        return self.rectangles()

    # ---- copies ----

    def _with(self, local: Tensor) -> "FlatShard":
        return FlatShard(local, self, self.begin, saved=self.saved)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FlatShard":
        if id(self) not in memo:
            memo[id(self)] = self._with(self.local.__deepcopy__(memo))
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if caller("torch.serialization") is not None:
            raise RuntimeError(f"torch.save of {self!r} would save this rank's elements only. {_REMEDY}")
        return _rebuild, (self.local, self.part_shape, self.part_stride, self.begin, self.cut, self.saved)

    def share_memory_(self) -> "FlatShard":
        """Moves the run to shared memory, as Tensor.share_memory_."""
        self.local.share_memory_()
        return self

    def is_shared(self) -> bool:
        return self.local.is_shared()

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise _error("memory", self)

    # They would show memory that is not there.
    untyped_storage = storage = _typed_storage = numpy = tolist = __array__ = __dlpack__ = _refuse

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self = args[0] if args else None
        if isinstance(self, FlatShard):
            if func in _SAME_RUN and kwargs.get("memory_format") in (None, torch.preserve_format):
                return self._with(func(self.local, **kwargs))
            if func is _aten.new_empty.default and tuple(args[1]) == tuple(self.shape):
                return self._with(func(self.local, self.local.shape, **kwargs))
            if func is _aten.is_pinned.default:
                return self.local.is_pinned()
            if func is _aten.copy_.default and self.same_run(args[1]):
                self.local.copy_(args[1].local, *args[2:], **kwargs)
                return self
        shard = next(a for a in _flat(args, kwargs) if isinstance(a, FlatShard))
        raise _error(str(func), shard)


# Elementwise, or without values: the result is a run again.
_SAME_RUN = {
    _aten.detach.default,
    _aten.alias.default,
    _aten.clone.default,
    _aten._to_copy.default,
    _aten.empty_like.default,
    _aten.zeros_like.default,
    _aten._pin_memory.default,
}


def _error(what: str, shard: FlatShard) -> RuntimeError:
    hint = ""
    if shard.dim() == 0:
        hint = " For dcp.async_save with a storage writer of your own, pass async_stager=DefaultStager(...) too."
    return RuntimeError(f"{what} of {shard!r}: this rank does not have the other elements. {_REMEDY}{hint}")


def _flat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    return torch.utils._pytree.tree_leaves((args, kwargs))


def _rebuild(
    local: Tensor, shape: tuple[int, ...], stride: tuple[int, ...], begin: int, cut: Cut | None, saved: bool
) -> FlatShard:
    return FlatShard(local, torch.empty_strided(shape, stride, device="meta"), begin, cut, saved)


def caller(module: str, function: str | None = None) -> dict[str, Any] | None:
    """The local variables of the nearest caller in a module (and function); None if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == module and function in (None, frame.f_code.co_name):
            return frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
    return None


def wants_full_tensors() -> bool:
    """True inside torch's get_optimizer_state_dict with full_state_dict=True, which gathers DTensors only.

    It does not tell the optimizer, whose state_dict() has to hand out whole tensors then.
    """
    variables = caller("torch.distributed.checkpoint.state_dict", "_get_optim_state_dict")
    return variables is not None and bool(variables["info"].full_state_dict)


# ---- what an optimizer does with state that it is given, and gives away ----


def check_takes(value: Tensor, param: Tensor, begin: int, end: int) -> None:
    """Raises what take() would raise, and copies nothing."""
    wanted = FlatShard(torch.empty(end - begin, device="meta"), param, begin)
    shape = tuple(wanted.shape)
    if not isinstance(value, Tensor):
        raise TypeError(f"a value of state is {type(value).__name__}; expected a tensor of shape {shape}.")
    if value.shape != wanted.shape and (isinstance(value, FlatShard) or value.shape != param.shape):
        raise ValueError(
            f"a value of state has shape {tuple(value.shape)}; expected {shape}. Load the state of a model of the same "
            "shapes."
        )
    if isinstance(value, FlatShard) and not wanted.same_run(value):
        raise ValueError(
            f"a value of state is {value!r}; expected elements [{begin}, {end}){_of(wanted)}, which this rank owns, or "
            "the whole tensor. Use torch.distributed.checkpoint.load or pyshard.load_checkpoint, which bring each rank "
            "its elements, or load the full_state_dict() of the optimizer that was saved."
        )


def _of(shard: FlatShard) -> str:
    return "" if shard.cut is None else f" of the part {list(shard.cut.pieces)} along {shard.cut.dim}"


@torch.no_grad()
def take(value: Tensor, param: Tensor, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Elements [begin, end) of a value of the shape of `param`, counted in the order of param's memory.

    Args:
        value: a FlatShard of this run, a whole tensor of any layout, or a DTensor (of which all ranks must take their
            runs together). If `param` is a part of a whole tensor: the whole, or a plain tensor of the part's shape.
        param: gives shape, order and device.

    Returns:
        a new plain tensor [end - begin] of `dtype` on param's device.

    Raises:
        TypeError, ValueError: `value` is something else, of another shape, or a FlatShard of another run.
    """
    check_takes(value, param, begin, end)
    out = FlatShard(torch.empty(end - begin, dtype=dtype, device=param.device), param, begin)
    if isinstance(value, FlatShard):
        out.local.copy_(value.local)
        return out.local
    if is_dtensor(value):
        value = value.full_tensor()  # type: ignore[attr-defined]
    shown = out if value.shape == out.shape else FlatShard(out.local, out.part, begin)
    for rectangle in shown.rectangles():
        inside = tuple(slice(o, o + n) for o, n in zip(rectangle.offsets, rectangle.sizes, strict=True))
        shown.piece(rectangle).copy_(value[inside])
    return out.local


@torch.no_grad()
def full(
    value: Tensor,
    group: "dist.ProcessGroup | None" = None,
    shard: TensorShard | None = None,
    alone: bool = False,
) -> Tensor:
    """The whole tensor of which each rank of the group has a run; all ranks call this.

    Args:
        shard: if the runs are of a part of a whole tensor, its cut; the ranks of shard.group call this, too.
        alone: each rank has the whole run, or part; there is no group.

    Returns:
        a new plain tensor with the strides of the parameter, the same on all ranks. A value that is no FlatShard, as it
        is.

    Raises:
        RuntimeError: on all ranks, if their runs are not all elements, each once.
    """
    if not isinstance(value, FlatShard):
        return value
    numel = math.prod(value.part_shape)
    run = torch.tensor([value.begin, value.end], device=value.device)
    together = not alone and dist.is_available() and dist.is_initialized()
    runs = [run]
    if together:
        runs = [torch.empty_like(run) for _ in range(dist.get_world_size(group))]
        dist.all_gather(runs, run, group=group)
    spans = sorted((a, b, rank) for rank, (a, b) in enumerate(run.tolist() for run in runs) if a < b)
    ends = [0, *(b for _, b, _ in spans)]
    if [a for a, _, _ in spans] != ends[:-1] or ends[-1] != numel:
        raise RuntimeError(
            f"the ranks have elements {[(a, b) for a, b, _ in spans]} of a tensor of {numel}; expected "
            "each element once. Call this on all ranks that share the optimizer's state."
        )
    flat = torch.empty(numel, dtype=value.dtype, device=value.device)
    flat[value.begin : value.end] = value.local
    if together:
        for a, b, rank in spans:
            dist.broadcast(flat[a:b], src=rank if group is None else dist.get_global_rank(group, rank), group=group)
    part = flat.as_strided(value.part_shape, value.part_stride)
    return part if value.cut is None or shard is None else whole_of_parts(part, value, shard)


def whole_of_parts(part: Tensor, like: FlatShard, shard: TensorShard) -> Tensor:
    """The whole tensor, from the parts of all ranks of its group."""
    whole = torch.empty_strided(like.shape, like.stride(), dtype=part.dtype, device=part.device)
    for rank in range(len(shard.pieces)):
        theirs = torch.empty(shard.local_shape(rank), dtype=part.dtype, device=part.device)
        if rank == shard.rank:
            theirs.copy_(part)
        if len(shard.pieces) > 1 and theirs.numel():
            dist.broadcast(theirs, src=dist.get_global_rank(shard.group, rank), group=shard.group)
        shard.place(theirs, whole, rank)
    return whole

"""Parameters and their gradients as one rank of a sharded optimizer holds them.

A Generation is the set of parameters that were laid out together, and its memory. Parameters that come later
(add_param_group, unfrozen) form a generation of their own, so the cuts of older ones never
move. A Shard is one bucket: how its gradients get into a slot, and the kernels' launch over the runs that this rank
owns.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..comm import Arena
from ..kernels.formats import DTYPE_CODES
from .layout import Bucket, Spec, make_layout


def carve(memory: Tensor, begin: int, numel: int, dtype: torch.dtype) -> Tensor:
    """A 1-d tensor over bytes of a flat uint8 tensor.

    On the CPU with a storage of its own, so that torch.save of one parameter does not write all of them.
    """
    if numel == 0:
        return torch.empty(0, dtype=dtype, device=memory.device)
    if memory.device.type != "cpu":
        return memory[begin : begin + numel * dtype.itemsize].view(dtype)
    span = (ctypes.c_char * (numel * dtype.itemsize)).from_address(memory.data_ptr() + begin)
    span._owner = memory  # type: ignore[attr-defined]  # which torch keeps with the storage
    return torch.frombuffer(span, dtype=dtype)


def like(flat: Tensor, tensor: Tensor) -> Tensor:
    """A flat array of numel elements seen with the shape of a tensor, in the order of its memory."""
    dense = torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format)
    return flat.as_strided(tensor.size(), dense.stride())


class Shard:
    """One bucket on this rank."""

    def __init__(self, index: int, layout: Bucket, params: Sequence[Tensor], arena: Arena, rank: int, grad_begin: int):
        self.index = index  # in its generation
        self.layout = layout
        self.params = [params[place.index] for place in layout.places]
        self.arena = arena
        self.grad_begin = grad_begin  # byte in a slot at which its gradients begin
        self.runs = [layout.run(place, rank) for place in layout.places]
        self.own = layout.cuts[rank], layout.cuts[rank + 1]
        self.param_spans, self.grad_spans = layout.param_spans(), layout.grad_spans()
        self.span = self.param_spans[rank]  # bytes of the array of all parameters
        # Bytes from this rank's parameters to those of the other ranks that kernels can write.
        self.targets = [target.data_ptr() - arena.params.data_ptr() for target in arena.targets if target.numel()]
        self.present = [False] * len(self.params)  # parameters whose gradient is ready for the round
        self.missing = len(self.params)
        self.expected = True  # false if no rank had a gradient for it at the last step
        self.rounds = 0  # sums that `reduced` holds since the last step
        self.reduced: Tensor | None = None  # fp32 [own elements]
        self.pieces: list[Tensor] = []  # owned runs of the parameters, 1-d, empty ones too
        self.placed = [False] * len(self.params)  # parameters whose gradient is in the slot that is filled now
        self._views: dict[int, list[Tensor]] = {}  # gradients in each slot, shaped as the parameters
        self._whole: dict[
            int, list[Tensor | None]
        ] = {}  # for each slot, gradients of which only others' runs are there
        self._strides = [like(param, param).stride() for param in self.params]
        self._rank = rank
        # The kernels' launch over the pieces, and what it was made from (sharded_plan.py).
        self.launch: Any = None
        self.made_from: Any = None
        self.backend: Any = None
        self.granted: Any = None  # which gradients the pieces have
        self.groups: list[dict[str, Any]] = []
        self.states: dict[Tensor, dict[str, Any]] = {}

    def flags(self, present: bytes) -> bytes:
        """Of flags for the parameters of the generation, those of this bucket."""
        return bytes(present[place.index] for place in self.layout.places)

    # ---- gradients on their way ----

    def views(self, slot: int) -> list[Tensor]:
        """The gradients of this rank in a slot."""
        if slot not in self._views:
            memory, wire = self.arena.slot(slot), self.layout.wire
            begins = [self.grad_begin + place.offset * wire.itemsize for place in self.layout.places]
            flats = [carve(memory, b, p.numel, wire) for b, p in zip(begins, self.layout.places, strict=True)]
            self._views[slot] = [like(flat, param) for flat, param in zip(flats, self.params, strict=True)]
        return self._views[slot]

    def slot_views(self) -> list[Tensor]:
        """All views of slots that have been made."""
        return [view for views in self._views.values() for view in views]

    @torch.no_grad()
    def put(self, position: int, slot: int, keep: bool) -> None:
        """Puts the gradient of a parameter into a slot. Takes it away from .grad unless `keep`.

        Of a dense one only what other ranks own is copied: reduce() takes the rest from where it is.
        """
        param, whole = self.params[position], self._whole.setdefault(slot, [None] * len(self.params))
        grad = param.grad
        if grad is None:
            return
        if self.placed[position]:  # a second backward before the bucket was sent
            before = whole[position]
            grad = grad + (self.views(slot)[position] if before is None else before)
        (a, b), n, size = self.runs[position], param.numel(), grad.element_size()
        dense = grad.device.type == "cpu" and grad.dtype == self.layout.wire and grad.layout == torch.strided
        if dense and grad.stride() == self._strides[position]:
            source, target, threads = grad.data_ptr(), self.views(slot)[position].data_ptr(), torch.get_num_threads()
            if a == b:
                a = b = n
            if a > 0:
                _C.cpu_copy(source, target, a * size, threads)
            if b < n:
                _C.cpu_copy(source + b * size, target + b * size, (n - b) * size, threads)
            whole[position] = grad.detach() if a < b else None
        else:
            self.views(slot)[position].copy_(grad)
            whole[position] = None
        self.placed[position] = True
        if not keep:
            param.grad = None

    def fill(self, slot: int, keep: bool) -> None:
        """Puts all gradients that are not there yet into a slot, and zeros for parameters that have none."""
        for position, param in enumerate(self.params):
            if param.grad is not None:
                self.put(position, slot, keep)
            elif not self.placed[position]:
                self.views(slot)[position].zero_()
        self.placed = [False] * len(self.params)

    def reduce(self, slot: int, sources: Sequence[Tensor]) -> None:
        """Adds the sum over ranks, in rank order, to what earlier rounds have left."""
        begin, end = self.own
        if self.reduced is None:  # zeros: nothing is ever added between the parameters
            self.reduced = torch.zeros(end - begin, dtype=torch.float32, device=self.arena.params.device)
        whole = self._whole.pop(slot, ())
        if all(grad is None for grad in whole):
            typed = [source.view(self.layout.wire) for source in sources]
            reduce(typed, self.reduced, accumulate=self.rounds > 0)
        else:
            self._reduce_runs(whole, sources, self.reduced.data_ptr())
        self.rounds += 1

    def _reduce_runs(self, whole: Sequence[Tensor | None], sources: Sequence[Tensor], out: int) -> None:
        """The same run by run, with this rank's gradients where backward has left them."""
        wire, threads = self.layout.wire, torch.get_num_threads()
        code, size, addresses = DTYPE_CODES[wire], wire.itemsize, [source.data_ptr() for source in sources]
        for grad, (a, b), place in zip(whole, self.runs, self.layout.places, strict=True):
            if a < b:
                first = place.offset + a - self.own[0]
                places = [address + first * size for address in addresses]
                if grad is not None:
                    places[self._rank] = grad.data_ptr() + a * size
                _C.cpu_reduce(places, code, out + 4 * first, b - a, self.rounds > 0, threads)

    # ---- parameters ----

    @torch.no_grad()
    def bind(self) -> None:
        """Moves parameters that do not lie in the arena into it."""
        size = self.layout.dtype.itemsize
        for param, place in zip(self.params, self.layout.places, strict=True):
            begin = self.layout.begin + place.offset * size
            if param.numel() and param.data_ptr() != self.arena.params.data_ptr() + begin:
                view = like(carve(self.arena.params, begin, place.numel, self.layout.dtype), param)
                view.copy_(param.data)
                param.data = view
        if not self.pieces:
            for (a, b), place in zip(self.runs, self.layout.places, strict=True):
                begin = self.layout.begin + (place.offset + a) * size
                self.pieces.append(carve(self.arena.params, begin, b - a, self.layout.dtype))

    def owned_grads(self, flat: Tensor, begin: int) -> list[Tensor]:
        """The gradient of each owned run, out of a flat array whose first element is element `begin` of the bucket."""
        firsts = [place.offset + a - begin for (a, _), place in zip(self.runs, self.layout.places, strict=True)]
        return [flat[f : f + b - a] if a < b else flat[:0] for f, (a, b) in zip(firsts, self.runs, strict=True)]


def reduce(sources: Sequence[Tensor], out: Tensor, accumulate: bool) -> None:
    """out = sources[0] + sources[1] + ... in fp32 and in this order; with accumulate, out = out + that sum."""
    if out.device.type == "cpu":
        addresses = [source.data_ptr() for source in sources]
        code = DTYPE_CODES[sources[0].dtype]
        _C.cpu_reduce(addresses, code, out.data_ptr(), out.numel(), accumulate, torch.get_num_threads())
        return
    if out.device.type == "cuda":
        from ..kernels import triton_sharded

        triton_sharded.reduce(sources, out, accumulate)
        return
    total = sources[0].to(torch.float32, copy=True) if accumulate else out.copy_(sources[0])
    for source in sources[1:]:
        total.add_(source)
    if accumulate:
        out.add_(total)


class Generation:
    """Parameters that were laid out together, and the memory that they and their gradients travel through."""

    def __init__(
        self, params: Sequence[Tensor], wires: Sequence[torch.dtype], world: int, rank: int, bucket_bytes: int
    ):
        self.params = list(params)
        specs = [Spec(p.numel(), p.dtype, wire) for p, wire in zip(params, wires, strict=True)]
        self.layout = make_layout(specs, world, bucket_bytes)
        self.shards: list[Shard] = []  # made with its memory
        self.runs: dict[Tensor, tuple[int, int]] = {}  # elements of each parameter that this rank owns
        for bucket in self.layout:
            for place in bucket.places:
                self.runs[self.params[place.index]] = bucket.run(place, rank)

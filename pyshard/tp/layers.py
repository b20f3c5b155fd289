"""Linear layers whose weights are cut over the ranks of a group, by output features or by input features."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..placement import Keeping, Piece, TensorShard, set_tensor_shard, tensor_shard
from . import mappings
from .functional import all_gather_matmul, copied_matmul, matmul_all_reduce, matmul_reduce_scatter
from .splits import bounds, split_sizes

Pieces = Sequence[Sequence[Piece]]


class SequenceContext:
    """How the sequence of the forward that runs now is cut: the rows of each rank, for layers that get no `sizes`."""

    sizes: list[int] | None = None


class _ParallelLinear(Keeping):
    """What both layers have in common: a weight of which this rank holds some features, and how it came to be."""

    cut_dim: int  # of a weight stored as [out_features, in_features]
    transposed = False  # the weight is stored as [in_features, out_features], as transformers' Conv1D does
    context: SequenceContext | None = None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        group: dist.ProcessGroup,
        sequence_parallel: bool,
        main_grad: bool,
        pieces: Pieces | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group = in_features, out_features, group
        self.sequence_parallel, self.main_grad = sequence_parallel, main_grad
        name = type(self).__name__
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(
                f"{name}: this process is not in `group`; expected one of its {self.world} ranks. "
                "Build the layer only on the ranks of the group."
            )
        features = (out_features, in_features)[self.cut_dim]
        self.pieces = _pieces(name, pieces, features, self.world)
        self.sizes = [sum(end - begin for begin, end in part) for part in self.pieces]
        shape = [out_features, in_features]
        shape[self.cut_dim] = self.sizes[self.rank]
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self._mark()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The values of an unsharded nn.Linear for the same seed: made whole, of which this rank's part is kept."""
        weight = self.weight
        whole = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device=weight.device, dtype=weight.dtype
        )
        with torch.no_grad():
            self.weight.copy_(self._shard(self.weight).cut(whole.weight.t() if self.transposed else whole.weight))
            if self.bias is not None:
                self.bias.copy_(self._shard(self.bias).cut(whole.bias))

    @classmethod
    def _from(cls, module: nn.Module, **options: Any) -> Self:
        """A layer with the parts of an existing layer's weights."""
        transposed = is_conv1d(module)
        if type(module) is not nn.Linear and not transposed:
            raise TypeError(
                f"{cls.__name__}.from_linear: got a {type(module).__name__}; expected an nn.Linear or transformers' "
                "Conv1D itself. Other layers may do more than multiply; build the parallel layer by hand."
            )
        weight: Tensor = module.weight  # type: ignore[assignment]
        bias = module.bias
        shape = tuple(weight.shape)
        out_features, in_features = shape[::-1] if transposed else shape
        # On the meta device, where making the whole costs nothing; the parts come from the module.
        if transposed and options["main_grad"]:
            raise ValueError(
                f"{cls.__name__}.from_linear: main_grad=True for a Conv1D, whose weight is stored as [in, out]; "
                "expected an nn.Linear. Leave main_grad out."
            )
        layer = cls(in_features, out_features, bias is not None, **options, device="meta", dtype=weight.dtype)
        layer.transposed = transposed
        for key, old in (("weight", weight), ("bias", bias)):
            if isinstance(old, Tensor):
                part = (
                    layer._shard(getattr(layer, key), key)
                    .cut(old.detach())
                    .clone(memory_format=torch.contiguous_format)
                )
                setattr(layer, key, nn.Parameter(part, requires_grad=old.requires_grad))
        layer._mark()
        layer.train(module.training)
        return layer

    def _shard(self, param: Tensor, name: str | None = None) -> TensorShard:
        if param is self.bias or name == "bias":
            shape: tuple[int, ...] = (self.out_features,)
            dim = 0 if self.cut_dim == 0 else None
        else:
            shape = (self.out_features, self.in_features)
            dim = self.cut_dim
            if self.transposed:
                shape, dim = shape[::-1], 1 - dim
        return TensorShard(self.group, shape, dim, self.pieces if dim is not None else ())

    def _mark(self) -> None:
        """Says of each parameter what it is a part of."""
        set_tensor_shard(self.weight, self._shard(self.weight))
        if self.bias is not None:
            set_tensor_shard(self.bias, self._shard(self.bias))
        if self.main_grad:
            self.weight.main_grad = True  # type: ignore[attr-defined]
            self.weight.grad_dtype = torch.float32  # or autograd would cast its gradient back

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """A move from the meta device makes new parameters, which must be marked again."""
        super()._apply(fn, recurse)
        self._mark()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """As any module's: own parameters, which know their cut. The group, which cannot be copied, is shared."""
        new = type(self).__new__(type(self))
        memo |= {id(self): new, id(self.group): self.group}
        for param in self.parameters():
            memo[id(tensor_shard(param))] = tensor_shard(param)
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        new._mark()
        return new

    @property
    def matrix(self) -> Tensor:
        """The weight as [out_features, in_features], however it is stored."""
        return self.weight.t() if self.transposed else self.weight

    def _rows(self, x: Tensor, sizes: Sequence[int] | None, expected: int, whole_rows: bool) -> Sequence[int] | None:
        """Checks an input; the rows of each rank under sequence parallelism, None if nobody gave them."""
        name = type(self).__name__
        if x.dim() < 1 + self.sequence_parallel or x.shape[-1] != expected:
            raise ValueError(
                f"{name}: got an input of shape {tuple(x.shape)}; expected [..., {'S, ' * self.sequence_parallel}"
                f"{expected}]. The layer has {self.in_features} input features in all."
            )
        if not self.sequence_parallel:
            if sizes is not None:
                raise ValueError(f"{name}: got sizes={list(sizes)} without sequence_parallel; leave sizes out")
            return None
        if sizes is None and self.context is not None:
            sizes = self.context.sizes
        if sizes is not None:
            rows = sum(sizes) if whole_rows else sizes[self.rank] if len(sizes) == self.world else -1
            if len(sizes) != self.world or x.shape[-2] != rows:
                raise ValueError(
                    f"{name}: got sizes={list(sizes)} for {self.world} ranks and an input of shape {tuple(x.shape)} on "
                    f"rank {self.rank}; expected one size a rank, and {'their sum' if whole_rows else 'its own size'} "
                    "along dimension -2"
                )
        return sizes

    def extra_repr(self) -> str:
        held = " + ".join(f"[{begin}, {end})" for begin, end in self.pieces[self.rank])
        which = ("output", "input")[self.cut_dim]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"rank {self.rank} of {self.world}: {which} features {held}, sequence_parallel={self.sequence_parallel}"
        )


class ColumnParallelLinear(_ParallelLinear):
    """y = x W^T + b of which each rank computes some output features.

    Takes x [..., in_features], the same on all ranks; or, with `sequence_parallel`, this rank's rows [..., S_r,
    in_features], which are gathered along dimension -2 on the way. Gives [..., (S,) out_features of this rank], or all
    of them with `gather_output`. Backward sums the gradient of x over ranks (and hands each its rows).

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear's, of the whole.
        group: the ranks over which the weight is cut.
        sequence_parallel: x is cut along the sequence.
        gather_output: every rank gets all output features; they are for work that is the same on all ranks.
        main_grad: the gradient of the weight is kept and accumulated in fp32, by backward() straight into weight.grad.
        pieces: for each rank, the [begin, end) of the output features that it holds; None: cut evenly, the first ranks
            one more.

    The parameters are `weight` and `bias`, this rank's part of nn.Linear's; `tensor_shard` says which. Without `pieces`
    a rank may hold no features at all. Cut as in Megatron-LM (Shoeybi et al., 2019; Korthikanti et al., 2022).
    """

    cut_dim = 0
    shared: SharedInput | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group: dist.ProcessGroup,
        sequence_parallel: bool = False,
        gather_output: bool = False,
        main_grad: bool = False,
        pieces: Pieces | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, group, sequence_parallel, main_grad, pieces, device, dtype)
        self.gather_output = gather_output
        if gather_output and not _in_order(self.pieces):
            raise ValueError(
                f"ColumnParallelLinear: gather_output with pieces {self.pieces}; expected one piece a rank, in rank "
                "order. Leave gather_output out for fused weights."
            )

    @classmethod
    def from_linear(
        cls,
        module: nn.Module,
        *,
        group: dist.ProcessGroup,
        sequence_parallel: bool = False,
        gather_output: bool = False,
        main_grad: bool = False,
        pieces: Pieces | None = None,
    ) -> Self:
        """A layer with this rank's part of the weights of an nn.Linear or a transformers Conv1D.

        The module is left as it is. A Conv1D's weight stays [in_features, out_features]. A TypeError for anything else.
        """
        return cls._from(
            module,
            group=group,
            sequence_parallel=sequence_parallel,
            gather_output=gather_output,
            main_grad=main_grad,
            pieces=pieces,
        )

    def forward(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """This rank's output features of x.

        Args:
            sizes: with sequence_parallel, the rows of each rank along dimension -2; None: the same on all ranks.
        """
        y = column_outputs([self], x, sizes)[0] if self.shared is None else self.shared.output(self, x, sizes)
        return mappings.gather(y, -1, self.sizes, self.group) if self.gather_output else y


class RowParallelLinear(_ParallelLinear):
    """y = x W^T + b to which each rank adds the part of some input features.

    Takes x [..., in_features of this rank], and sums over ranks in fp32 in rank order. Gives the whole [...,
    out_features] on every rank; or, with `sequence_parallel`, this rank's rows of it along dimension -2. The bias is
    added once, and its gradient is whole on every rank.

    Args:
        input_is_parallel: False: x has all input features on every rank, and this rank's are cut out of it.
        pieces: for each rank, the [begin, end) of the input features that it holds; None: cut evenly.
        The others are those of ColumnParallelLinear.
    """

    cut_dim = 1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group: dist.ProcessGroup,
        sequence_parallel: bool = False,
        input_is_parallel: bool = True,
        main_grad: bool = False,
        pieces: Pieces | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, group, sequence_parallel, main_grad, pieces, device, dtype)
        self.input_is_parallel = input_is_parallel
        if not input_is_parallel and not _in_order(self.pieces):
            raise ValueError(
                f"RowParallelLinear: input_is_parallel=False with pieces {self.pieces}; expected one piece a rank, in "
                "rank order. Give it the parts of the input instead."
            )

    @classmethod
    def from_linear(
        cls,
        module: nn.Module,
        *,
        group: dist.ProcessGroup,
        sequence_parallel: bool = False,
        input_is_parallel: bool = True,
        main_grad: bool = False,
        pieces: Pieces | None = None,
    ) -> Self:
        """A layer with this rank's part of the weights of an nn.Linear or a transformers Conv1D.

        The module is left as it is. A Conv1D's weight stays [in_features, out_features]. A TypeError for anything else.
        """
        return cls._from(
            module,
            group=group,
            sequence_parallel=sequence_parallel,
            input_is_parallel=input_is_parallel,
            main_grad=main_grad,
            pieces=pieces,
        )

    def forward(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """The sum over ranks, and the bias.

        Args:
            sizes: with sequence_parallel, the rows that each rank gets along dimension -2; None: cut evenly.
        """
        expected = self.sizes[self.rank] if self.input_is_parallel else self.in_features
        sizes = self._rows(x, sizes, expected, whole_rows=True)
        if not self.input_is_parallel:
            x = mappings.split(x, -1, self.sizes, self.group)
        if self.sequence_parallel:
            return matmul_reduce_scatter(
                x, self.matrix, self.bias, group=self.group, sizes=sizes, features=self.in_features
            )
        return matmul_all_reduce(x, self.matrix, self.bias, group=self.group, features=self.in_features)


def column_outputs(
    layers: Sequence[ColumnParallelLinear], x: Tensor, sizes: Sequence[int] | None = None
) -> list[Tensor]:
    """The outputs of column layers that read the same x: one gather and one backward sum for all."""
    first = layers[0]
    sizes = first._rows(x, sizes, first.in_features, whole_rows=False)
    weights, biases = [layer.matrix for layer in layers], [layer.bias for layer in layers]
    features = [layer.out_features for layer in layers]
    if first.sequence_parallel:
        return all_gather_matmul(x, weights, biases, group=first.group, sizes=sizes, features=features)
    return copied_matmul(x, weights, biases, group=first.group, features=features)


class SharedInput:
    """Column layers that a model calls one after another with the same x, as query, key and value are.

    The first call computes all outputs; the calls that follow with the same tensor object take theirs. Any other x, a
    changed one, changed weights or another grad mode compute anew. What nobody fetches stays until the next input or
    `clear`, which whoever builds this calls after the forward that contains the layers; without
    gradients it goes with x.
    """

    def __init__(self, layers: Sequence[ColumnParallelLinear]) -> None:
        self.layers = list(layers)
        first = self.layers[0]
        for layer in self.layers:
            if (layer.in_features, layer.sequence_parallel, layer.group) != (
                first.in_features,
                first.sequence_parallel,
                first.group,
            ):
                raise ValueError(f"SharedInput: got {layer} beside {first}; expected layers that read the same input")
            layer.shared = self
        self.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedInput:
        """For a copy of the layers, which is part of the same copy of a model."""
        new = SharedInput.__new__(SharedInput)
        memo[id(self)] = new
        new.layers = copy.deepcopy(self.layers, memo)
        new.clear()
        return new

    def clear(self) -> None:
        """Drops outputs that nobody has fetched."""
        self._key: weakref.ref[Tensor] | None = None
        self._stamp: tuple[Any, ...] = ()
        self._outputs: dict[int, Tensor] = {}

    def compute(self, x: Tensor, sizes: Sequence[int] | None = None, key: Tensor | None = None) -> None:
        """All outputs for x, kept until the layers are called with `key` (x itself if it is None)."""
        key = x if key is None else key
        self.clear()
        outputs = column_outputs(self.layers, x, sizes)
        self._outputs = {id(layer): output for layer, output in zip(self.layers, outputs)}
        self._key, self._stamp = weakref.ref(key, self._gone), self._stamp_of(key)

    def output(self, layer: ColumnParallelLinear, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """One layer's output for x."""
        known = self._key is not None and self._key() is x and self._stamp == self._stamp_of(x)
        if not known or id(layer) not in self._outputs:
            self.compute(x, sizes)
        output = self._outputs.pop(id(layer))
        if not self._outputs:
            self.clear()
        return output

    def _stamp_of(self, x: Tensor) -> tuple[Any, ...]:
        return (torch.is_grad_enabled(), _version(x), *(_version(layer.weight) for layer in self.layers))

    def _gone(self, key: weakref.ref[Tensor]) -> None:
        if key is self._key:
            self.clear()


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, told without importing transformers."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def _in_order(pieces: Pieces) -> bool:
    """Whether the parts of the ranks, put one after another, are the whole."""
    flat = [piece for part in pieces for piece in part]
    return all(len(part) == 1 for part in pieces) and all(a[1] == b[0] for a, b in pairwise(flat))


def _pieces(name: str, pieces: Pieces | None, features: int, world: int) -> tuple[tuple[Piece, ...], ...]:
    if pieces is None:
        sizes = split_sizes(features, world)
        return tuple((bounds(sizes, rank),) for rank in range(world))
    given = tuple(tuple((int(begin), int(end)) for begin, end in part) for part in pieces)
    ends = 0
    for begin, end in sorted(piece for part in given for piece in part if piece[0] != piece[1]):
        ends = end if begin == ends and end > begin else -1
        if ends < 0:
            break
    if len(given) != world or ends != features:
        raise ValueError(
            f"{name}: got pieces {given}; expected for each of {world} ranks the [begin, end) of its features, "
            f"which together cover 0 to {features} once"
        )
    return given

"""The four computations of tensor-parallel linear layers, each overlapped with its communication; no autograd.

Tensors are [outer, rows, columns]: rows are what is gathered or scattered. Which transport and how many chunks serve a
call is decided here, once for each shape, and kept for explain().
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import blocking
from .choose import SMALL, Choice, Ends, Shape, Times, choose, even
from .matmul import bias_gradient, input_gradient, matmul_into, weight_gradient
from .workspace import TRANSPORTS, WHOLE, Compute, Gather, Scatter, Total, Workspace

_TIMEOUT = 300.0  # seconds
_MEASUREMENTS = 3  # of each candidate, of which the fastest counts: the first may prepare kernels and memory

Result = TypeVar("Result")
P = ParamSpec("P")

_settings: dict[str, Settings] = {}  # by name of the group
_workspaces: dict[tuple[str, torch.device], Workspace] = {}
_lock = threading.RLock()  # of these
_making: dict[str, threading.Lock] = {}  # of each group: making a workspace waits for the other ranks


@dataclass(frozen=True)
class Settings:
    """Of one group; see configure()."""

    transport: str = "auto"
    timeout: float = _TIMEOUT
    chunks: int | None = None


def configure(
    group: dist.ProcessGroup, *, transport: str = "auto", timeout: float = _TIMEOUT, chunks: int | None = None
) -> None:
    """Sets how the tensor-parallel matmuls of a group communicate; all ranks of the group call it alike.

    What the group used before is closed; the next call takes the new transport.

    Args:
        transport: "shm" (CPU ranks on one host read each other's memory), "ring" (messages in chunks over gloo or
            NCCL), "symm_mem" (GPUs with access to each other's memory), "blocking" (plain collectives, nothing
            overlapped, and the timeout is the group's own), or "auto": the first of shm or symm_mem, and ring, that
            serves the group; explain() says which, and why.
        timeout: seconds after which a rank that does not answer is a pyshard.comm.PeerError.
        chunks: into how many parts every transfer is cut, 8 at most (2 over shm and symm_mem); 0: no overlap; None:
            chosen from a measurement in the first call of each shape. Then the bits of products may differ from run to
            run, where a library multiplies few rows in another order than many; with a number they do not.

    Raises:
        ValueError, TypeError: an argument is none of these.
    """
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"pyshard.tp.configure: group is a {type(group).__name__}; expected a process group")
    if transport not in TRANSPORTS:
        raise ValueError(f"pyshard.tp.configure: transport is {transport!r}; expected one of {', '.join(TRANSPORTS)}")
    if not timeout > 0:
        raise ValueError(f"pyshard.tp.configure: timeout is {timeout!r}; expected seconds above 0, such as 300")
    if chunks is not None and (not isinstance(chunks, int) or chunks < 0):
        raise ValueError(f"pyshard.tp.configure: chunks is {chunks!r}; expected a number from 0 on, or None")
    close(group)
    _settings[group.group_name] = Settings(transport, float(timeout), chunks)


def close(group: dist.ProcessGroup) -> None:
    """Gives back memory and connections of a group, and forgets configure(); harmless when repeated. The next call
    makes them again. Call it before destroy_process_group of a group that is not the last."""
    with _lock:
        _settings.pop(group.group_name, None)
        closing = [key for key, space in _workspaces.items() if key[0] == group.group_name or _is_gone(space.group)]
        spaces = [_workspaces.pop(key) for key in closing]
    for space in spaces:
        space.close()


def workspace(group: dist.ProcessGroup, device: torch.device) -> Workspace:
    """Of a group and a device, made at the first call, which all ranks come to together."""
    key = group.group_name, device
    with _lock:
        space = _workspaces.get(key)
        making = _making.setdefault(group.group_name, threading.Lock())
    if space is not None and space.group is group:
        return space
    with making:
        space = _workspaces.get(key)
        if space is None or space.group is not group:  # a group that was destroyed had this name
            with _lock:
                gone = [_workspaces.pop(key) for key, space in list(_workspaces.items()) if _is_gone(space.group)]
            for one in gone:
                one.close()
            settings = _settings.get(group.group_name, Settings())
            space = Workspace(group, settings.transport, device, settings.timeout)
            with _lock:
                _workspaces[key] = space
        return space


def _is_gone(group: dist.ProcessGroup) -> bool:
    """Whether the group was destroyed."""
    c10d: Any = dist.distributed_c10d  # whose types do not tell of this
    return group not in c10d._world.pg_map


def workspaces(group: dist.ProcessGroup) -> list[Workspace]:
    """What the group uses so far, for explain()."""
    with _lock:
        return [space for (name, _), space in _workspaces.items() if name == group.group_name]


def _told(call: Callable[P, Result]) -> Callable[P, Result]:
    """The call, telling() of its errors."""

    @wraps(call)
    def wrapped(*arguments: P.args, **named: P.kwargs) -> Result:
        space: Any = arguments[0]
        with telling(space, call.__name__.replace("_", " ")):
            return call(*arguments, **named)

    return wrapped


@_told
def column_forward(
    space: Workspace,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    sizes: Sequence[int],
    features: Sequence[int],
) -> list[Tensor]:
    """Rows of all ranks times each weight.

    Args:
        features: sum of F_i over ranks, or 0 where it is not known.
        x: [outer, sizes[rank], D].
        weights: [F_i, D] each; biases: [F_i] or None.

    Returns:
        [outer, sum(sizes), F_i] each.
    """
    if space.transport is None:
        return _linears(blocking.all_gather(x, 1, sizes, space.group), weights, biases)
    name = "all-gather and matmul"
    whole = sum(sizes)

    def call(ends: Ends) -> list[Tensor]:
        if not ends:
            return _linears(Gather(space, x, sizes, WHOLE, name).whole(), weights, biases)
        if _fused(space, x):
            assert space.fused is not None
            return [out[None] for out in space.fused.all_gather_matmul(x[0], weights, biases, sizes)]
        outs = [x.new_empty(x.shape[0], whole, weight.shape[0]) for weight in weights]
        for begin, rows in Gather(space, x, sizes, ends, name):
            for weight, bias, out in zip(weights, biases, outs, strict=True):
                matmul_into(rows, weight, out[:, begin : begin + rows.shape[1]], bias)
        return outs

    def matmul(rows: int) -> object:
        return _linears(x.new_zeros(x.shape[0], rows, x.shape[2]), weights, biases)

    way = "column forward"
    shape = _shape("gather", way, x, sizes, x.shape[2], features)
    return _chosen(space, shape, name, whole, call, matmul)


@_told
def column_backward(
    space: Workspace,
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    sizes: Sequence[int],
    features: Sequence[int],
    gathered: bool,
    need_x: bool,
    need_weights: Sequence[bool],
    buffers: Sequence[Tensor | None],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of x, summed over ranks, and of the weights.

    x is gathered while the gradient of the whole x is computed, and the sums travel while those of the weights are.

    Args:
        grads: [outer, all rows, F_i] each.
        x: this rank's rows if gathered, else all rows on every rank.
        buffers: where a weight's gradient is added to, or None.
    """
    gather = None
    if gathered and any(need_weights):
        if space.transport is None:
            whole = blocking.all_gather(x, 1, sizes, space.group)
        else:
            gather = Gather(space, x, sizes, WHOLE, "gathering the input again")
    elif not gathered:
        whole = x
    found: list[Tensor | None] = [None] * len(weights)

    def gradients_of_weights() -> None:
        rows = whole if gather is None else gather.whole()
        for i, (grad, needed) in enumerate(zip(grads, need_weights, strict=True)):
            if needed:
                found[i] = weight_gradient(grad, rows, buffers[i])

    def compute(begin: int, end: int, out: Tensor) -> None:
        input_gradient([grad[:, begin:end] for grad in grads], weights, out)

    between = gradients_of_weights if any(need_weights) else None
    if not need_x:
        if between is not None:
            between()
        return None, found
    kind = "scatter" if gathered else "total"
    shape = _shape(kind, "column backward", x, sizes, x.shape[2], features)
    product = (grads[0], weights[0].t()) if len(weights) == 1 else None
    return _reduced(space, shape, x, sizes, compute, product, None, between), found


@_told
def row_forward(
    space: Workspace,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    features: int,
    scattered: bool,
) -> Tensor:
    """The sum over ranks of x @ weight.T, and the bias: this rank's rows if scattered, else all.

    Args:
        x: [outer, sum(sizes), D_rank]. weight: [F, D_rank]. bias: [F], the same on all ranks.
    """
    kind = "scatter" if scattered else "total"
    shape = _shape(kind, "row forward", x, sizes, weight.shape[0], [features])

    def compute(begin: int, end: int, out: Tensor) -> None:
        matmul_into(x[:, begin:end], weight, out)

    return _reduced(space, shape, x, sizes, compute, (x, weight), bias, None)


@_told
def row_backward(
    space: Workspace,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    sizes: Sequence[int],
    features: int,
    scattered: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    buffer: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, the weight and the bias.

    Args:
        grad: this rank's rows if scattered: they are gathered, and every chunk goes into the gradient of x as it
            arrives, while the others are on their way.
    """
    whole = grad
    dx = None
    if scattered and space.transport is None:
        whole = blocking.all_gather(grad, 1, sizes, space.group)
    elif scattered and not need_x:
        whole = Gather(space, grad, sizes, WHOLE, "all-gather of the gradient").whole()
    elif scattered:
        name = "all-gather of the gradient and matmul"
        keep = need_weight or need_bias

        def call(ends: Ends) -> tuple[Tensor, Tensor]:
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
            if not ends:
                gathered = Gather(space, grad, sizes, WHOLE, name).whole()
                input_gradient([gathered], [weight], out)
                return out, gathered
            gathered = grad.new_empty(x.shape[0], x.shape[1], grad.shape[2]) if keep else grad
            for begin, rows in Gather(space, grad, sizes, ends, name):
                end = begin + rows.shape[1]
                input_gradient([rows], [weight], out[:, begin:end])
                if keep:
                    gathered[:, begin:end] = rows
            return out, gathered

        def matmul(rows: int) -> object:
            return grad.new_zeros(x.shape[0], rows, grad.shape[2]) @ weight

        way = "row backward"
        shape = _shape("gather", way, x, sizes, weight.shape[0], [features])
        dx, whole = _chosen(space, shape, name, x.shape[1], call, matmul)
    if need_x and dx is None:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        input_gradient([whole], [weight], dx)
    dw = weight_gradient(whole, x, buffer) if need_weight else None
    return dx if need_x else None, dw, bias_gradient(whole) if need_bias else None


def _reduced(
    space: Workspace,
    shape: Shape,
    x: Tensor,
    sizes: Sequence[int],
    compute: Compute,
    product: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    between: Callable[[], None] | None,
) -> Tensor:
    """The sum over ranks of what compute() writes; between() runs while the last parts are on their way.

    x: of the call; of its dtype and outer size.
    product: the x and weight whose x @ weight.T compute() writes, if it is just one.
    """
    whole, columns = sum(sizes), shape.columns
    scattered = shape.kind == "scatter"

    def matmul(rows: int) -> Tensor:
        out = x.new_empty(x.shape[0], rows, columns)
        compute(0, rows, out)
        return out

    if space.transport is None:
        partial = matmul(whole)
        if scattered:
            result = blocking.reduce_scatter(partial, 1, sizes, space.group, bias)
        else:
            result = blocking.all_reduce(partial, space.group, bias)
        if between is not None:
            between()
        return result
    name = "matmul and reduce-scatter" if scattered else "matmul and all-reduce"
    make = Scatter if scattered else Total

    def call(ends: Ends) -> Tensor:
        if ends and scattered and product is not None and _fused(space, product[0]):
            assert space.fused is not None
            out = space.fused.matmul_reduce_scatter(product[0][0], product[1], bias, sizes)[None]
            if between is not None and measured:
                between()
            return out
        sums = make(space, x.shape[0], sizes, columns, x.dtype, ends, name)
        sums.run(compute)
        if between is not None and measured:
            between()
        return sums.result(bias)

    measured = _known(space, shape) is not None
    result = _chosen(space, shape, name, whole, call, matmul)
    if between is not None and not measured:
        between()
    return result


def _linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    return [torch.nn.functional.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def _fused(space: Workspace, x: Tensor) -> bool:
    """True if a kernel does matmul and communication at once: for x [1, rows, columns] of its dtypes."""
    return space.fused is not None and x.shape[0] == 1 and x.dtype != torch.float64


def _shape(kind: str, way: str, x: Tensor, sizes: Sequence[int], columns: int, features: Sequence[int]) -> Shape:
    rows = x.shape[0] * sum(sizes)
    bucket = 1 << max(rows - 1, 0).bit_length()
    return Shape(kind, way, bucket, x.shape[0] > 1, len(sizes), columns, tuple(features), x.dtype)


def _known(space: Workspace, shape: Shape) -> Choice | None:
    """What was chosen for the shape; None: it is to be measured now."""
    forced = _settings.get(space.group.group_name, Settings()).chunks
    if shape not in space.choices and forced is not None:
        space.choices[shape] = Choice(even(min(forced, space.slots)) if forced else (), limited=forced > space.slots)
    return space.choices.get(shape)


def _chosen(
    space: Workspace,
    shape: Shape,
    name: str,
    rows: int,
    call: Callable[[Ends], Result],
    matmul: Callable[[int], object],
) -> Result:
    """call(ends) with what is best for the shape, which its first call finds out. matmul(rows): its matmul alone."""
    choice = _known(space, shape)
    if choice is not None:
        return call(choice.ends)
    part = math.ceil(rows / space.world * SMALL)
    alone, small, apart, overlapped = [], [], [], []
    for _ in range(_MEASUREMENTS):
        alone.append(_seconds(space, name, lambda: matmul(rows))[0])
        small.append(_seconds(space, name, lambda: matmul(part))[0])
        apart.append(_seconds(space, name, lambda: call(()))[0])
        seconds, result = _seconds(space, name, lambda: call(WHOLE))
        overlapped.append(seconds)
    times = Times(min(alone), min(small), min(apart), min(overlapped))
    told = space.exchange(times.pack(), f"choosing how to overlap {name}")
    most = 1 if space.in_place else space.slots  # where nothing travels, more chunks hide nothing more
    choice = space.choices[shape] = choose(shape.kind, space.world, most, told)
    # The first call too gives what the later ones will, to the bit.
    return result if choice.ends == WHOLE else call(choice.ends)


def _seconds(space: Workspace, name: str, call: Callable[[], Result]) -> tuple[float, Result]:
    """Of a call that all ranks begin together: a rank that comes late is not what a link costs."""
    space.exchange(b"", f"measuring {name}")
    start = time.perf_counter()
    result = call()
    _settle(space.device)
    return time.perf_counter() - start, result


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def telling(space: Workspace, name: str) -> Iterator[None]:
    """An error in the middle of a call ends what the other ranks wait for."""
    try:
        yield
    except BaseException as error:  # also Ctrl-C
        space.abort(f"in {name}: {type(error).__name__}: {error}")
        raise

"""Gradients of the operators of ops.py.

A gradient that is itself to be differentiated (create_graph=True) is that of the unfused form.

Weights with the attribute `main_grad = True` have fp32 gradients whatever their dtype: the first one of a step goes the
usual way, and later ones are added to weight.grad inside the matmul, without a tensor of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, unfused


def _save(ctx: Any, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], inputs: Any) -> None:
    ctx.save_for_backward(x, *weights, *biases)
    ctx.count, ctx.inputs = len(weights), inputs


def _column_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weights, biases, sizes, features, dim, gathered, group = inputs
    _save(ctx, x, weights, biases, (list(sizes), list(features), dim, gathered, group))


def _column_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    weights, biases = rest[: ctx.count], ops.present(rest[ctx.count :])
    sizes, features, dim, gathered, group = ctx.inputs
    need_x, need_weights, need_biases = ctx.needs_input_grad[:3]
    need_weights, need_biases = list(need_weights), list(need_biases)
    if torch.is_grad_enabled():

        def outputs() -> list[Tensor]:
            if gathered:
                return unfused.all_gather_matmul(x, weights, biases, sizes, dim, ops.group_of(group))
            return unfused.copied_matmul(x, weights, biases, ops.group_of(group))

        found = _again(outputs, [x, *weights, *biases], [need_x, *need_weights, *need_biases], grads)
    else:
        buffers = [_buffer(weight, needed) for weight, needed in zip(weights, need_weights, strict=True)]
        asked = grads, x, weights, sizes, features, dim, gathered, group, need_x, need_weights, need_biases
        if any(buffer is not None for buffer in buffers):
            answers = ops.column_backward(*asked, buffers)
        else:
            answers = ops.tp_column_backward(*asked)
        found = _finished(answers, weights, buffers, [need_x, *need_weights, *need_biases])
    n = ctx.count
    return found[0], found[1 : n + 1], found[n + 1 :], None, None, None, None, None


def _row_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, sizes, features, dim, scattered, group = inputs
    _save(ctx, x, [weight], [bias], (list(sizes), features, dim, scattered, group))


def _row_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bias = ctx.saved_tensors
    sizes, features, dim, scattered, group = ctx.inputs
    needs = list(ctx.needs_input_grad[:3])
    if torch.is_grad_enabled():

        def outputs() -> list[Tensor]:
            own = ops.group_of(group)
            if scattered:
                return [unfused.matmul_reduce_scatter(x, weight, bias, sizes, dim, own)]
            return [unfused.matmul_all_reduce(x, weight, bias, own)]

        found = _again(outputs, [x, weight, bias], needs, [grad])
    else:
        buffer = _buffer(weight, needs[1])
        asked = grad, x, weight, sizes, features, dim, scattered, group, needs[0], needs[1], needs[2]
        answers = ops.tp_row_backward(*asked) if buffer is None else ops.row_backward(*asked, buffer)
        found = _finished(answers, [weight], [buffer], needs)
    return *found, None, None, None, None, None


def _again(
    outputs: Callable[[], list[Tensor]],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of the unfused form, which can be differentiated again."""
    wanted = [tensor for tensor, needed in zip(inputs, needs, strict=True) if needed and tensor is not None]
    answers = iter(torch.autograd.grad(outputs(), wanted, list(grads), create_graph=True, allow_unused=True))
    return [next(answers) if needed else None for needed in needs]


def _buffer(weight: Tensor, needed: bool) -> Tensor | None:
    """The fp32 gradient that is added to in place, if there is one; none in a graph, which has no such effects."""
    if torch.compiler.is_compiling():
        return None
    wanted = needed and getattr(weight, "main_grad", False) and weight.grad is not None
    return weight.grad if wanted and _accumulates(weight) else None


def _accumulates(weight: Tensor) -> bool:
    """Whether the backward that runs now ends in weight.grad: torch.autograd.grad for other tensors does not."""
    try:
        return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(weight).node)
    except RuntimeError:  # its gradient is what torch.autograd.grad was asked for
        return False


def _finished(
    found: list[Tensor], weights: Sequence[Tensor], buffers: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """What autograd gets: nothing where nothing is needed, or where the buffer of a weight has it already."""
    answers: list[Tensor | None] = [gradient if needed else None for gradient, needed in zip(found, needs, strict=True)]
    for i, (weight, buffer) in enumerate(zip(weights, buffers, strict=True), start=1):
        if buffer is not None:
            answers[i] = None  # autograd accumulates nothing then, and calls the hooks all the same
        elif answers[i] is not None and getattr(weight, "main_grad", False):
            answers[i] = found[i].float()
    return answers


ops.tp_column.register_autograd(_column_backward, setup_context=_column_context)
ops.tp_row.register_autograd(_row_backward, setup_context=_row_context)

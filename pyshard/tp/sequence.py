"""Cuts the hidden states of a transformer model along the sequence between its layers, by hooks on its modules.

They are cut before the first block and whole again after the last norm. Position embeddings, masks and position ids
stay whole: attention sees the whole sequence, of some heads.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..placement import TensorShard, set_tensor_shard, tensor_shard
from . import collectives, mappings
from .layers import SequenceContext, SharedInput
from .plans import Route
from .splits import split_sizes

_SUMMED = "_gradient_is_summed"  # of a parameter: a weak reference to itself, which its copies do not pass for
_CONTEXT = "_sequence_context"


def cut_sequence(
    model: nn.Module,
    route: Route,
    context: SequenceContext,
    group: dist.ProcessGroup,
) -> None:
    """Registers the hooks.

    Args:
        context: told the rows of each rank before the layers of each block run. Told anew in every block, since
            activation checkpointing runs a block again when other forwards may have come between. Hooks find it on
            their module, so that those of a copied model find the copy's.
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)

    def refuse_hidden_states(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        config = getattr(module, "config", None)
        if kwargs.get("output_hidden_states", getattr(config, "output_hidden_states", False)):
            raise ValueError(
                f"{type(module).__name__}: output_hidden_states with sequence parallelism, where each rank has its "
                "rows of them; expected False. Call parallelize with sequence_parallel=False to have them whole."
            )

    def cut(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden, put = _hidden(args, kwargs)
        sizes = split_sizes(hidden.shape[-2], world)
        return put(mappings.split(hidden, hidden.dim() - 2, sizes, group))

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
            context = _context(module)
            hidden, put = _hidden(args, kwargs)
            positions = kwargs.get("position_ids")
            if positions is None:
                raise RuntimeError(
                    f"{name} was called without position_ids, which tell the length of the sequence; expected a "
                    "version of transformers whose models pass them on. Use sequence_parallel=False."
                )
            context.sizes = split_sizes(positions.shape[-1], world)
            if hidden.shape[-2] != context.sizes[rank]:
                raise ValueError(
                    f"{name} got {hidden.shape[-2]} rows on rank {rank} and position_ids of shape "
                    f"{tuple(positions.shape)}; expected {context.sizes[rank]} rows. position_ids must have one entry "
                    "for each position of the sequence."
                )
            if not route.stand_in:
                return None
            # This attention takes the length of the sequence from its input, and does nothing else with it than to call
            # the three layers: it gets a tensor of the whole's shape that holds one element, and they know it.
            shape = (*hidden.shape[:-2], sum(context.sizes), hidden.shape[-1])
            stand_in = hidden.new_full((), math.nan).expand(shape)
            shared: SharedInput = module.q_proj.shared  # type: ignore[union-attr,assignment]
            shared.compute(hidden, context.sizes, key=stand_in)
            return put(stand_in)

        return hook

    def gather(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        sizes = _context(module).sizes
        if sizes is None:
            raise RuntimeError(
                "pyshard.tp: the last norm was called before the first block of the model had cut a sequence; expected "
                "a forward of the whole model. Call the model, or parallelize(..., sequence_parallel=False)."
            )
        return mappings.gather(output, output.dim() - 2, sizes, group)

    model.get_submodule(route.base).register_forward_pre_hook(refuse_hidden_states, with_kwargs=True)
    model.get_submodule(route.first).register_forward_pre_hook(cut, with_kwargs=True)
    for name in route.attentions:
        attention = model.get_submodule(name)
        setattr(attention, _CONTEXT, context)
        attention.register_forward_pre_hook(enter(name), with_kwargs=True)
    last = model.get_submodule(route.last)
    setattr(last, _CONTEXT, context)
    last.register_forward_hook(gather)


def _context(module: nn.Module) -> SequenceContext:
    context: SequenceContext = getattr(module, _CONTEXT)
    return context


def sum_gradients(module: nn.Module, group: dist.ProcessGroup) -> None:
    """The gradients of the module's own parameters are summed over ranks, each of which sees a part of the data.

    Looked after before each forward, since a move from the meta device makes new parameters without hooks.
    """

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        for param in module.parameters(recurse=False):
            if tensor_shard(param) is None:
                set_tensor_shard(param, TensorShard(group, tuple(param.shape)))
            summed = getattr(param, _SUMMED, None)
            if param.requires_grad and (summed is None or summed() is not param):
                param.register_hook(lambda grad: collectives.all_reduce(grad, group))
                setattr(param, _SUMMED, weakref.ref(param))

    hook(module, ())
    module.register_forward_pre_hook(hook)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
    """The hidden states among the arguments, and how to put others in their place."""
    if args:
        return args[0], lambda hidden: ((hidden, *args[1:]), kwargs)
    return kwargs["hidden_states"], lambda hidden: (args, {**kwargs, "hidden_states": hidden})

"""Cuts the weights of an existing model over a tensor-parallel group, in place, by the names of its modules."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..placement import TensorShard, set_tensor_shard, tensor_shard
from .embedding import VocabParallelEmbedding
from .layers import ColumnParallelLinear, RowParallelLinear, SequenceContext, SharedInput, is_conv1d
from .plans import Cut, Plan, Rule, make_plan
from .sequence import cut_sequence, sum_gradients


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh | dist.ProcessGroup,
    plan: str | Mapping[str, str | Rule] = "auto",
    *,
    sequence_parallel: bool | None = None,
    gather_logits: bool = True,
    main_grad: bool = False,
) -> nn.Module:
    """Cuts a model over tensor-parallel ranks, in place, and returns it. Called on every rank with the same model.

    Names of modules and parameters stay; each rank keeps its part of the cut weights (`tensor_shard` of a parameter
    says which). Forward takes the same input on every rank and gives the unsharded model's output; backward leaves on
    every rank its part of the unsharded model's gradients. Tied weights stay tied. Save and load whole weights with
    `full_state_dict` and `load_state_dict`; a model's own save_pretrained(..., state_dict=full_state_dict(model))
    writes what an unsharded one does.

    Args:
        model: the same weights on every rank, which is checked; may be on the meta device.
        mesh: a DeviceMesh with a dimension "tp" (init_mesh), one with a single dimension, or a process group.
        plan: "auto" goes by model.config.model_type: GPT-2, Llama, Mistral, Qwen2 and Qwen3 of transformers. Attention
            is cut along heads, grouped-query attention along key-value heads, at least one a rank; heads, features
            and vocabulary need not be multiples of the ranks. "llama" or "gpt2" for other models with the same
            modules. For others a dict of name patterns (as in fnmatch, the first that matches counts) and roles:
            "column", "row", "vocab", "column_gather", "row_split", "summed", or a plans.Rule, which says what they
            are and also knows fused weights.
        sequence_parallel: hidden states between the layers are cut along the sequence: less memory for activations, and
            the norms are computed once. Any length works. None: True for the built-in plans, False for a dict. With a
            dict the caller cuts the sequence, evenly, and marks norms as "summed".
        gather_logits: False: the output layer's logits stay cut along the vocabulary, for vocab_parallel_cross_entropy;
            the model's own loss of `labels` is computed from the cut logits; generate() is an error.
        main_grad: gradients of cut nn.Linear weights accumulate in fp32, except those of tied weights.

    Random numbers: dropout of hidden states that are whole must be the same on all ranks, so seed all ranks alike.
    Dropout of attention, and of hidden states that are cut along the sequence, then has the same mask on each rank's
    part. Sampling in generate() also needs one seed.

    Raises ValueError or TypeError if the plan does not fit, or if ranks disagree about model or plan; on all ranks,
    before anything is changed.
    """
    group = tensor_group(mesh)
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    error: Exception | None = None
    made = Plan()
    try:
        made = make_plan(model, plan, world)
        if sequence_parallel is None:
            sequence_parallel = made.route is not None
        _check_head(model, made, gather_logits)
        if main_grad:
            _check_main_grad(model, made)
    except (ValueError, TypeError) as failure:
        error = failure
    options = repr((plan, sequence_parallel, gather_logits, main_grad))
    _agree(model, options, error, group)

    context = SequenceContext()
    cut_in_route = sequence_parallel and made.route is not None
    memo: dict[int, nn.Parameter] = {}
    uses = Counter(id(param) for module in model.modules() for param in module.parameters(recurse=False))
    tied = {key for key, count in uses.items() if count > 1}
    for cut in made.cuts:
        # The output layer sees whole hidden states: they are gathered after the last norm.
        cut_sequence_here = bool(sequence_parallel) and not (cut.name == made.head and made.route is not None)
        gather = cut.role == "column_gather" and (gather_logits or cut.name != made.head)
        old = model.get_submodule(cut.name)
        own_grad = main_grad and not any(id(param) in tied for param in old.parameters())
        layer = _layer(old, cut, group, cut_sequence_here, gather, own_grad)
        if cut_in_route and not isinstance(layer, VocabParallelEmbedding):
            layer.context = context
        _tie(old, layer, memo)
        parent, _, key = cut.name.rpartition(".")
        setattr(model.get_submodule(parent), key, layer)
    for names in made.siblings:
        SharedInput([model.get_submodule(name) for name in names])  # type: ignore[misc]
        # An error in the middle of the parent's forward must not keep outputs that nobody will fetch.
        parent, _, key = names[0].rpartition(".")
        model.get_submodule(parent).register_forward_hook(_clearing(key), always_call=True)
    for (name, attribute), values in made.attributes.items():
        module = model.get_submodule(name)
        if hasattr(module, attribute):
            setattr(module, attribute, values[rank])
    for param in model.parameters():
        if tensor_shard(param) is None:
            set_tensor_shard(param, TensorShard(group, tuple(param.shape)))
    for name in made.summed + (made.summed_if_cut if cut_in_route else []):
        sum_gradients(model.get_submodule(name), group)
    if cut_in_route and made.route is not None:
        cut_sequence(model, made.route, context, group)
    if not gather_logits:
        _keep_logits_cut(model, group)
    return model


def tensor_group(mesh: DeviceMesh | dist.ProcessGroup) -> dist.ProcessGroup:
    """The tensor-parallel group of this process."""
    if isinstance(mesh, DeviceMesh):
        names = mesh.mesh_dim_names or ()
        if "tp" in names:
            return mesh.get_group("tp")
        if mesh.ndim == 1:
            return mesh.get_group()
        raise ValueError(
            f"pyshard.tp.parallelize: got a mesh with dimensions {names or mesh.ndim}; expected one named 'tp', or a "
            "single one. Build it with pyshard.init_mesh(dp=..., tp=...)."
        )
    if isinstance(mesh, dist.ProcessGroup):
        return mesh
    raise TypeError(
        f"pyshard.tp.parallelize: got mesh of type {type(mesh).__name__}; expected a DeviceMesh with a dimension 'tp', "
        "or a process group of this process"
    )


def _layer(
    module: nn.Module, cut: Cut, group: dist.ProcessGroup, sequence_parallel: bool, gather: bool, main_grad: bool
) -> ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding:
    if cut.role == "vocab":
        assert isinstance(module, nn.Embedding)  # by the plan
        return _embedding(module, group)
    if cut.role.startswith("row"):
        return RowParallelLinear.from_linear(
            module,
            group=group,
            sequence_parallel=sequence_parallel,
            input_is_parallel=cut.role == "row",
            main_grad=main_grad,
            pieces=cut.pieces,
        )
    return ColumnParallelLinear.from_linear(
        module,
        group=group,
        sequence_parallel=sequence_parallel,
        gather_output=gather,
        main_grad=main_grad,
        pieces=cut.pieces,
    )


def _clearing(child: str) -> Callable[..., None]:
    """A hook on the parent of layers that share their input; `child` is one of them."""

    def hook(module: nn.Module, *_: Any) -> None:
        shared: SharedInput = module.get_submodule(child).shared  # type: ignore[assignment]
        shared.clear()

    return hook


def _tie(old: nn.Module, new: nn.Module, memo: dict[int, nn.Parameter]) -> None:
    """Parameters that were one stay one."""
    for key, param in old.named_parameters(recurse=False):
        setattr(new, key, memo.setdefault(id(param), getattr(new, key)))


def _check_head(model: nn.Module, plan: Plan, gather_logits: bool) -> None:
    name = type(model).__name__
    if not gather_logits and (plan.head is None or not name.endswith(("ForCausalLM", "LMHeadModel"))):
        raise ValueError(
            f"pyshard.tp.parallelize: gather_logits=False for a {name}; expected a causal language model of a built-in "
            "plan, whose loss can be computed from cut logits. Leave it out."
        )


def _check_main_grad(model: nn.Module, plan: Plan) -> None:
    for cut in plan.cuts:
        if is_conv1d(model.get_submodule(cut.name)):
            raise ValueError(
                f"pyshard.tp.parallelize: main_grad=True, and {cut.name} is a Conv1D, whose weight is stored as [in, "
                "out]; expected nn.Linear only. Leave main_grad out."
            )


def _agree(model: nn.Module, options: str, error: Exception | None, group: dist.ProcessGroup) -> None:
    """Raises on all ranks if one of them has an error, or another model or plan."""
    mine = (None if error is None else f"{type(error).__name__}: {error}", options, _fingerprint(model))
    world = dist.get_world_size(group)
    all_ranks: list[Any] = [None] * world
    dist.all_gather_object(all_ranks, mine, group=group)
    if error is not None:
        raise error
    for rank, (message, its_options, prints) in enumerate(all_ranks):
        if message is not None:
            raise RuntimeError(f"pyshard.tp.parallelize: rank {rank} of the group stopped with {message}")
        if its_options != all_ranks[0][1]:
            raise ValueError(
                f"pyshard.tp.parallelize: rank {rank} was called with (plan, sequence_parallel, gather_logits, "
                f"main_grad) = {its_options}, rank 0 with {all_ranks[0][1]}; expected the same on all ranks"
            )
        first = all_ranks[0][2]
        differing = [key for key in {**first, **prints} if first.get(key) != prints.get(key)]
        if differing:
            raise ValueError(
                f"pyshard.tp.parallelize: {len(differing)} parameters of rank {rank} differ from rank 0's, the first "
                f"{differing[0]}; expected the same model on all ranks. Load the same weights, or seed all ranks alike "
                "before building it."
            )


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _fingerprint(model: nn.Module) -> dict[str, str]:
    """A few digits for each parameter, made of its shape, dtype and the sum of its bits."""
    prints = {}
    for name, param in model.named_parameters():
        text = f"{tuple(param.shape)} {param.dtype}"
        if not param.is_meta and param.numel():
            bits = param.detach().contiguous().view(-1)
            bits = torch.view_as_real(bits).view(-1) if bits.is_complex() else bits
            text += f" {bits.view(_INTEGERS[bits.element_size()]).sum(dtype=torch.int64).item()}"
        prints[name] = hashlib.sha1(text.encode()).hexdigest()[:16]
    return prints


def _embedding(module: nn.Embedding, group: dist.ProcessGroup) -> VocabParallelEmbedding:
    weight = module.weight
    layer = VocabParallelEmbedding(
        module.num_embeddings,
        module.embedding_dim,
        module.padding_idx,
        group=group,
        device="meta",  # making a whole table there costs nothing
        dtype=weight.dtype,
    )
    part = layer.shard.cut(weight.detach()).clone(memory_format=torch.contiguous_format)
    layer.weight = nn.Parameter(part, requires_grad=weight.requires_grad)
    set_tensor_shard(layer.weight, layer.shard)
    return layer.train(module.training)


def _keep_logits_cut(model: nn.Module, group: dist.ProcessGroup) -> None:
    """The loss of a transformers model from cut logits, and no generation from them."""
    from .cross_entropy import vocab_parallel_cross_entropy

    def loss_function(
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """What transformers' loss for causal language models is: position i predicts label i + 1."""
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        loss = vocab_parallel_cross_entropy(
            logits.flatten(0, -2),
            shift_labels.reshape(-1).to(logits.device),
            group=group,
            vocab_size=vocab_size,
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
        )
        return loss if num_items_in_batch is None else loss / num_items_in_batch

    def generate(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(
            f"{type(model).__name__}.generate: the logits are cut along the vocabulary (parallelize was called with "
            "gather_logits=False); expected whole ones. Call parallelize without it to generate."
        )

    model.loss_function = loss_function  # type: ignore[assignment]
    model.generate = generate  # type: ignore[assignment]

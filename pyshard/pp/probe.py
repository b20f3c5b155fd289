"""A trial of a model's stages before the first step: what goes between them, and whether that is all that counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .stage import Before, Extra, Stage


class Found(NamedTuple):
    """What one microbatch is on the first stage.

    Attributes:
        shape, dtype: of hidden states after the first block.
        extra: StageBlocks.extra.
        before: shape, as Before.pattern, and dtype of what each module before the blocks returns.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    extra: Extra
    before: dict[str, tuple[tuple[int, ...], torch.dtype]]


def first_block(stages: Sequence[Stage], inputs: dict[str, Any]) -> Found | None:
    """On the rank of the first stage: runs it up to its first block. Elsewhere None."""
    stage = next((stage for stage in stages if stage.index == 0), None)
    if stage is None:
        return None
    before: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    lead = next(tuple(value.shape) for value in inputs.values() if isinstance(value, Tensor))
    handles = [module.register_forward_hook(_listener(name, lead, before)) for name, module in stage.before.items()]
    blocks = stage.blocks
    blocks.stop = blocks.begin
    try:
        hidden = stage(**inputs)
    finally:
        blocks.stop = None
        for handle in handles:
            handle.remove()
    return Found(tuple(hidden.shape), hidden.dtype, blocks.seen, before)


def _listener(name: str, lead: tuple[int, ...], before: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and output.dim():
            # The last dimension is the width of hidden states; those before it come from the input, or are 1.
            places = [-1 - i if i < len(lead) and size == lead[i] else size for i, size in enumerate(output.shape[:-1])]
            before[name] = (*places, output.shape[-1]), output.dtype

    return hook


def try_stages(stages: Sequence[Stage], inputs: dict[str, Any], known: Found, device: torch.device) -> None:
    """Tells the stages what the first one has found, and runs those after it once.

    Raises:
        ValueError: the output of a stage depends on what the model computes before its blocks, beside the hidden
            states that the previous stage sends.
    """
    for stage in stages:
        stage.blocks.extra = known.extra
        for name, module in stage.before.items():
            if isinstance(module, Before) and name in known.before:
                pattern, dtype = known.before[name]
                module.pattern, module.like = pattern, module.like.to(device, dtype)
        if stage.index == 0:
            continue
        hidden = torch.zeros(known.shape, dtype=known.dtype, device=device)
        if stage(hidden, **inputs).isnan().any():
            with _zeros(stage):
                if stage(hidden, **inputs).isnan().any():
                    continue  # the model's own
            names = [name for name, module in stage.before.items() if isinstance(module, Before)]
            names += ["what blocks return beside hidden states"] * any(shape is not None for shape in known.extra or ())
            raise ValueError(
                f"pyshard.pp: what stage {stage.index} computes depends on the output of {' or '.join(names)}, on the "
                "first stage, beside the hidden states; expected blocks and a head that read nothing else of what is "
                "computed before the blocks. If one of these modules is used after the blocks, say so: "
                "plan=pyshard.pp.Plan(blocks, first, last). Otherwise the model cannot be cut into stages."
            )


@contextmanager
def _zeros(stage: Stage) -> Iterator[None]:
    modules: list[Any] = [stage.blocks, *(module for module in stage.before.values() if isinstance(module, Before))]
    kept = [module.fill for module in modules]
    for module in modules:
        module.fill = 0.0
    try:
        yield
    finally:
        for module, fill in zip(modules, kept, strict=True):
            module.fill = fill

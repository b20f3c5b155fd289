"""One stage of a pipeline: the model's own forward, run with the blocks of the stage alone.

Every stage runs the whole model's forward on the same inputs, so masks, positions and whatever else a model computes
before its blocks are its own affair. What belongs to other stages is replaced:

    modules before the blocks      stand-ins, whose output has the right shape, holds NaN and takes no memory
    blocks before the stage's      skipped
    the stage's first block        is given the hidden states that the previous stage has sent
    the stage's last block         ends the forward: its output goes to the next stage
    modules after the blocks       never reached; there on the last stage only

The replacement happens where the model iterates over its blocks, outside of their hooks, so a block may be wrapped,
sharded or checkpointed like any module.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..placement import Keeping
from .parts import Parts

# What a block returns beside its hidden states: see StageBlocks.
Extra = tuple[tuple[int, ...] | None, ...] | None


class StageEnd(Exception):  # no error: ends a forward
    """Carries the output of the last block of a stage out of the model's forward."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output


class StageBlocks(nn.ModuleList):
    """The model's list of blocks, in which those of one stage are there, under their names in the whole list.

    Iteration and indexing give one callable for each block of the whole model. Children are the stage's blocks alone.

    Attributes:
        begin, end: the stage's blocks are [begin, end) of `total`.
        received: hidden states for the first block of the stage; None on the first stage.
        extra: what a block returns beside the hidden states: the shape of each tensor, and None for other items; None:
            it returns these alone, in no tuple. Skipped blocks return NaN in its place: see Before.
        seen: that, as the last block of the last forward has done it.
        last: True on the last stage, whose blocks are followed by the rest of the model.
        stop: after which block the forward ends, if not after the last one of the stage.
    """

    def __init__(self, blocks: list[nn.Module], begin: int, end: int, last: bool):
        super().__init__()
        for index in range(begin, end):
            self.add_module(str(index), blocks[index])
        self.begin, self.end, self.total, self.last = begin, end, len(blocks), last
        self.received: Tensor | None = None
        self.extra: Extra = None
        self.seen: Extra = None
        self.fill = math.nan
        self.stop: int | None = None

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[Any]:
        return (_Call(self, index) for index in range(self.total))

    def __getitem__(self, index: Any) -> Any:
        places = range(self.total)[index]
        return [_Call(self, i) for i in places] if isinstance(places, range) else _Call(self, places)


class _Call:
    """What stands in the list for a block: calls it, or does what its place in the stage asks for."""

    def __init__(self, blocks: StageBlocks, index: int):
        self._blocks, self._index = blocks, index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        blocks, index = self._blocks, self._index
        if not blocks.begin <= index < blocks.end:  # skipped
            hidden = args[0] if args else kwargs["hidden_states"]
            if blocks.extra is None:
                return hidden
            return hidden, *(
                None if shape is None else hidden.new_full((), blocks.fill).expand(shape) for shape in blocks.extra
            )
        if index == blocks.begin and blocks.received is not None:
            if args:
                args = (blocks.received, *args[1:])
            else:
                kwargs = {**kwargs, "hidden_states": blocks.received}
        output = self._module()(*args, **kwargs)
        if index == blocks.stop or (index == blocks.end - 1 and not blocks.last):
            raise StageEnd(output)
        return output

    def _module(self) -> nn.Module:
        return self._blocks._modules[str(self._index)]

    def __getattr__(self, name: str) -> Any:
        """Of the block, such as the kind of its attention."""
        if name.startswith("__") or not self._blocks.begin <= self._index < self._blocks.end:
            raise AttributeError(f"block {self._index} of the model is on another stage of the pipeline")
        return getattr(self._module(), name)


class Elsewhere(nn.Module):
    """Stands in for a module of another stage."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"{self.name}.{name}: {self.name} is on another stage of the pipeline; expected the model to use it "
                "only before or only after its blocks. Name it in both places: plan=pyshard.pp.Plan(blocks, "
                f"first=[..., {self.name!r}], last=[..., {self.name!r}])."
            ) from None


class Before(Elsewhere):
    """Stands in for a module before the blocks: returns a tensor of the right shape that takes no memory.

    It holds NaN. Nothing but shape and dtype of it should count on this stage; what does shows in the loss.

    Attributes:
        width: last dimension of the module's output, as far as the module tells it; None: that of its input.
        pattern: each dimension of the output: a number, or where it stands in the shape of the model's first input,
            counted from -1 backwards. Known after a trial (probe.py); until then the arguments tell the shape.
        like: an empty tensor of the output's dtype.
        lead: shape of the model's first input in this forward.
    """

    def __init__(self, name: str, width: int | None, dtype: torch.dtype):
        super().__init__(name)
        self.width, self.like, self.fill = width, torch.empty(0, dtype=dtype), math.nan
        self.pattern: tuple[int, ...] | None = None
        self.lead: tuple[int, ...] = ()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.like = fn(self.like)  # a model that is cast is cast here, too
        return super()._apply(fn, recurse)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.pattern is not None:
            shape = tuple(self.lead[-1 - each] if each < 0 else each for each in self.pattern)
            return self._empty(shape, self.like.device)
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if given is None:
            raise TypeError(
                f"pyshard.pp: {self.name} was called without a tensor; expected one, whose shape says how long the "
                "sequence is. Give a pyshard.pp.Plan with modules that take the model's inputs."
            )
        shape = tuple(given.shape)
        if self.width is not None:  # of ids, or of hidden states
            shape = (*(shape[:-1] if given.is_floating_point() else shape), self.width)
        return self._empty(shape, given.device)

    def _empty(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.full((), self.fill, dtype=self.like.dtype, device=device).expand(shape)


class Absent(Elsewhere):
    """Stands in for a module after the blocks, on stages that end before it."""

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(f"{self.name} is on the last stage of the pipeline, and was called on another one")


class Stage(Keeping):
    """Blocks [begin, end) of a model with what belongs to them; the first stage has the embeddings, the last the head.

    Its `model` has the structure and names of the whole one.

    forward(hidden | nothing, **inputs): hidden states of the previous stage (on the first stage: nothing) and the
    inputs of the whole model, by name. Returns hidden states, or on the last stage what the model returns: a tensor,
    or its `logits`.
    """

    def __init__(self, model: nn.Module, parts: Parts, index: int, stages: int, begin: int, end: int):
        super().__init__()
        self.index, self.stages = index, stages
        self.begin, self.end = begin, end
        first, last = index == 0, index == stages - 1
        self.parts = parts
        replaced: dict[str, nn.Module] = {}
        for name in {**dict.fromkeys(parts.first), **dict.fromkeys(parts.last)}:
            if not (first and name in parts.first) and not (last and name in parts.last):
                before = name in parts.first
                replaced[name] = stand_in(name, model.get_submodule(name)) if before else Absent(name)
        whole = model.get_submodule(parts.blocks)
        replaced[parts.blocks] = StageBlocks(list(whole.children()), begin, end, last)
        self.model = _with(model, "", replaced)

    @property
    def blocks(self) -> StageBlocks:
        """The stage's blocks."""
        found = self.model.get_submodule(self.parts.blocks)
        if not isinstance(found, StageBlocks):
            raise TypeError(f"{self.parts.blocks} of a pipeline stage is a {type(found).__name__}; expected its blocks")
        return found

    @property
    def before(self) -> dict[str, nn.Module]:
        """The modules before the blocks, or their stand-ins, by name."""
        return {name: self.model.get_submodule(name) for name in self.parts.first}

    def forward(self, *hidden: Tensor, **inputs: Any) -> Tensor:
        blocks = self.blocks
        blocks.received = hidden[0] if hidden else None
        lead = next((tuple(value.shape) for value in inputs.values() if isinstance(value, Tensor)), ())
        for module in self.before.values():
            if isinstance(module, Before):
                module.lead = lead
        try:
            output = self.model(**inputs)
        except StageEnd as end:
            hidden_states, blocks.seen = hidden_of(end.output)
            return hidden_states.contiguous()  # messages are
        finally:
            blocks.received = None
        return logits_of(output)


def hidden_of(output: Any) -> tuple[Tensor, Extra]:
    """The hidden states in what a block returns, and what else is there (StageBlocks.extra)."""
    if isinstance(output, Tensor):
        return output, None
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return output[0], tuple(tuple(x.shape) if isinstance(x, Tensor) else None for x in output[1:])
    raise TypeError(
        f"pyshard.pp: a block returned a {type(output).__name__}; expected a tensor of hidden states, or a tuple that "
        "begins with one."
    )


def logits_of(output: Any) -> Tensor:
    """The tensor among what a model returns."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise TypeError(
        f"pyshard.pp: the model returned a {type(output).__name__}; expected a tensor, or an object with logits. Wrap "
        "the model so that it returns one tensor, and let loss_fn do the rest."
    )


def stand_in(name: str, module: nn.Module) -> nn.Module:
    """What takes the place of a module before the blocks on stages that do not have it."""
    width = getattr(module, "embedding_dim", None)
    weight = next(module.parameters())
    return Before(name, width if isinstance(width, int) else None, weight.dtype)


def _with(module: nn.Module, name: str, replaced: dict[str, nn.Module]) -> nn.Module:
    """The module with other modules in some places: copies of it and of what lies between, the rest is shared."""
    made = copy.copy(module)
    for key in ("_modules", "_parameters", "_buffers"):
        made.__dict__[key] = dict(module.__dict__[key])
    for key, child in module.named_children():
        full = f"{name}.{key}" if name else key
        if full in replaced:
            made._modules[key] = replaced[full]
        elif child is not None and any(other.startswith(full + ".") for other in replaced):
            made._modules[key] = _with(child, full, replaced)
    return made

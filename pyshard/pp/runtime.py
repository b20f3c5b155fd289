"""torch's pipeline stages and schedules, made for one shape of inputs, and what they were doing when one fails."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.microbatch import TensorChunkSpec, _Replicate

from ..placement import PipelineShare, pipeline_share
from .schedules import Kind
from .stage import Stage


@dataclass(frozen=True)
class Settings:
    """How a pipeline runs."""

    kind: Kind
    microbatches: int
    loss_fn: Any  # (output, target) -> loss, or None
    mean: bool  # the loss of the batch is the mean of those of the microbatches, else their sum
    ranks: tuple[int, ...]  # of each stage, within the pipeline
    bounds: tuple[tuple[int, int], ...]  # blocks of each stage
    names: tuple[str, ...]  # of the inputs of the model, in the order of its forward


class Doing:
    """What this rank is at, for error messages.

    Attributes:
        operation: the communication that it waits for or was in last.
        computing: True while it computes: an error then is its own, not that of a connection.
    """

    def __init__(self) -> None:
        self.operation = "pipeline step"
        self.computing = False

    @contextmanager
    def compute(self, what: str) -> Iterator[None]:
        self.operation, self.computing = what, True
        yield  # after an error it stays so
        self.operation, self.computing = f"messages after {what}", False


class TorchStage(PipelineStage):
    """A stage of torch's, which tells gradient hooks when the last microbatch of a step is here."""

    def __init__(self, stage: Stage, doing: Doing, device: torch.device, group: dist.ProcessGroup, meta: Tensor):
        # Hidden states keep their shape from block to block. Known shapes spare torch a forward and backward through
        # all stages to find them, which would also run collectives of sharded modules once more.
        inputs = () if stage.index == 0 else (meta,)
        super().__init__(stage, stage.index, stage.stages, device, input_args=inputs, output_args=(meta,), group=group)
        self.doing = doing

    def shares(self) -> Iterable[PipelineShare]:
        return (share for p in self.submod.parameters() if (share := pipeline_share(p)) is not None)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self.doing.compute(f"forward of microbatch {fwd_chunk_id} in stage {self.stage_index}"):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self.doing.compute(f"backward of microbatch {bwd_chunk_id} in stage {self.stage_index}"):
            return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self.doing.compute(f"weight gradients of microbatch {bwd_chunk_id} in stage {self.stage_index}"):
            return super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)

    def backward_maybe_with_nosync(self, backward_type: Any, bwd_kwargs: Any, last_backward: bool = False) -> Any:
        if last_backward:
            for share in self.shares():
                share.accumulating = share.tied
        return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        if not self.is_first:
            self.doing.operation = f"receiving microbatch {fwd_chunk_id} of stage {self.stage_index - 1}"
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        if not self.is_last:
            self.doing.operation = (
                f"receiving the gradient of microbatch {bwd_chunk_id} from stage {self.stage_index + 1}"
            )
        return super().get_bwd_recv_ops(bwd_chunk_id)

    # Stages of one rank hand gradients to each other, which torch's V schedules forget not to do in an evaluation.

    def get_local_bwd_output(self, mb_index: int) -> Any:
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        with self.doing.compute(f"reduction of the gradients of stage {self.stage_index}"):
            super().perform_reduce_grad(grad_scale_factor)

    def _post_metadata_inference_cleanup(self) -> None:
        """torch drops the gradients of sharded modules here; no inference has run, and they may be wanted."""


class Run:
    """One shape of inputs: torch's stages and schedule for it.

    Attributes:
        scaler: a GradScaler, or None; for the next call.
        raw: losses of the microbatches of the last call, in their order, as loss_fn gave them.
    """

    def __init__(
        self,
        settings: Settings,
        stages: list[Stage],
        group: dist.ProcessGroup,
        device: torch.device,
        meta: Tensor,
        cuts: dict[str, bool],
        with_loss: bool,
    ):
        """
        Args:
            meta: shape and dtype of a microbatch's hidden states between stages.
            cuts: for each input by its name: True if it is cut along the batch; else every microbatch gets it whole.
        """
        self.settings, self.doing = settings, Doing()
        self.scaler: Any = None
        self.raw: list[Tensor] = []
        self.stages = [TorchStage(stage, self.doing, device, group, meta) for stage in stages]
        kind = settings.kind
        # Gradients are not divided by torch: that would also divide what earlier steps have accumulated.
        self.schedule = kind.cls(
            self.stages if kind.several else self.stages[0],
            settings.microbatches,
            self._loss if with_loss else None,
            scale_grads=False,
        )
        # Set here, since not every schedule takes it as an argument.
        self.schedule._kwargs_chunk_spec = {
            name: TensorChunkSpec(0) if cut else _Replicate() for name, cut in cuts.items()
        }

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        """What is differentiated of a microbatch."""
        with self.doing.compute("loss_fn"):
            loss: Tensor = self.settings.loss_fn(output, target)
            self.raw.append(loss.detach())
            if self.settings.mean:
                loss = loss / self.settings.microbatches
            return loss if self.scaler is None else self.scaler.scale(loss)

    def __call__(self, inputs: dict[str, Any], target: Tensor | None, backward: bool, keep_outputs: bool) -> Any:
        """Runs all microbatches. Returns the outputs of the last stage on the rank that has it, if they are kept."""
        self.doing.operation, self.doing.computing = "connecting the stages", False
        for stage in self.stages:
            for share in stage.shares():
                share.accumulating = backward
        self.schedule._has_backward = backward
        with torch.set_grad_enabled(backward):
            return self.schedule.step(target=target, return_outputs=keep_outputs, **inputs)

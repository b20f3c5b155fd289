"""The pipeline of a training run: this rank's stages, and steps of all ranks through torch's schedules."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..comm import PeerError
from ..comm.notes import Notes, abort
from ..placement import pipeline_share, tensor_shard
from ..tp.splits import split_sizes
from .runtime import Run, Settings
from .stage import Stage
from .ties import Exchange, Tie

# Shapes of inputs for which stages and receive buffers are kept. Training and evaluation are different ones.
_KEPT = 8
_WHO = "pyshard.pp.Pipeline"


class Output(NamedTuple):
    """What a step gives, on every rank of the pipeline.

    Attributes:
        loss: 0-d fp32: the mean of `losses` (with loss_reduction="sum" their sum); None without a target.
        losses: fp32 [n_microbatches], in the order of the batch; None without a target.
        logits: what the model returns for the whole batch, in its order; on the rank of the last stage, if asked for.
    """

    loss: Tensor | None
    losses: Tensor | None
    logits: Tensor | None


class Pipeline(nn.Module):
    """This rank's stages of a model, and training steps of all ranks. Made by pyshard.pp.pipeline().

    Names of parameters, buffers and of the state_dict() are those of the whole model; what is on other stages is not
    there. Optimizers take `pipe.parameters()`; pyshard's agree over all stages about norm and non-finite gradients.

    Attributes:
        stages: this rank's, in the order of the model; each is an nn.Module.
        group: the ranks of the pipeline.
    """

    def __init__(
        self,
        stages: list[Stage],
        settings: Settings,
        ties: list[Tie],
        group: dist.ProcessGroup,
        device: torch.device,
    ):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.settings, self.ties, self.group, self.device = settings, ties, group, device
        self._runs: dict[Any, Run] = {}
        self._hidden: tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None = None  # of inputs and hidden states
        self._notes = Notes(_WHO, group)
        self._failed: str | None = None

    # ---- names of the whole model ----

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As of the whole model: those of this rank's stages."""
        return self._named("named_parameters", prefix, recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """As of the whole model; buffers outside of its blocks are on every stage."""
        return self._named("named_buffers", prefix, recurse, remove_duplicate)

    def _named(self, method: str, prefix: str, recurse: bool, remove_duplicate: bool) -> Iterator[tuple[str, Any]]:
        seen: set[Any] = set()
        for stage in self.stages:
            for name, value in getattr(stage.model, method)(prefix, recurse, remove_duplicate=False):
                key = value if remove_duplicate else name
                if key not in seen:
                    seen.add(key)
                    yield name, value

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The part of the whole model's state_dict that this rank's stages hold."""
        found: dict[str, Any] = {}
        for stage in self.stages:
            found.update(stage.model.state_dict(*args, **kwargs))  # type: ignore[union-attr]
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads what this rank's stages hold; names of other stages may be there as well.

        Raises:
            RuntimeError: with strict, a name of this rank's stages is missing, or a shape differs.
        """
        missing = [name for name in self.state_dict() if name not in state_dict]
        if missing and strict:
            raise RuntimeError(
                f"{_WHO}.load_state_dict: missing {', '.join(missing[:3])}; expected all names of this rank's stages"
            )
        for stage in self.stages:
            model: nn.Module = stage.model  # type: ignore[assignment]
            held = model.state_dict()
            model.load_state_dict({k: v for k, v in state_dict.items() if k in held}, strict=strict, assign=assign)
        return nn.modules.module._IncompatibleKeys(missing, [])

    # ---- steps ----

    def forward(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError(
            f"{_WHO}: called like a module; a pipeline runs forward and backward of all microbatches together. "
            "Call step(inputs, target=...) to train, evaluate(inputs) for logits."
        )

    def step(
        self, *args: Any, target: Tensor | None = None, scaler: Any = None, return_logits: bool = False, **kwargs: Any
    ) -> Output:
        """Forward and backward of a batch, cut into microbatches; gradients are added to .grad, as by loss.backward().

        All ranks of the pipeline call it with the same batch. Call the optimizer's step() after it.

        Args:
            args, kwargs: inputs of the model. Tensors whose first dimension is that of the first one are cut along it,
                evenly; others go to each microbatch whole.
            target: [batch, ...], for loss_fn.
            scaler: a torch.amp.GradScaler, by whose scale the losses are multiplied before backward.
            return_logits: keeps the outputs of all microbatches, for Output.logits.
        Returns:
            the losses, on all ranks, unscaled.
        Raises:
            ValueError, TypeError: inputs that do not fit, or other ones on other ranks; nothing has run.
            pyshard.comm.PeerError: another rank is lost, is elsewhere or has failed; the pipeline cannot go on.
        """
        if self.settings.loss_fn is not None and target is None:
            raise ValueError(f"{_WHO}.step: target is None; expected the tensor that loss_fn compares outputs with.")
        if self.settings.loss_fn is None:
            raise ValueError(
                f"{_WHO}.step: this pipeline has no loss_fn; expected one, which gives the loss to differentiate. Pass "
                "loss_fn to pyshard.pp.pipeline, or call evaluate()."
            )
        if not torch.is_grad_enabled():
            raise RuntimeError(f"{_WHO}.step: gradients are disabled here; expected them to be on. Use evaluate().")
        return self._run("step", args, kwargs, target, scaler, return_logits)

    def evaluate(self, *args: Any, target: Tensor | None = None, return_logits: bool = True, **kwargs: Any) -> Output:
        """Forward of a batch without gradients; arguments as those of step(). Call .eval() before it."""
        if target is not None and self.settings.loss_fn is None:
            raise ValueError(f"{_WHO}.evaluate: target, and no loss_fn; expected one to pipeline(), or no target.")
        return self._run("evaluate", args, kwargs, target, None, return_logits)

    def _run(
        self, call: str, args: Any, kwargs: Any, target: Tensor | None, scaler: Any, return_logits: bool
    ) -> Output:
        who = f"{_WHO}.{call}"
        if self._failed is not None:
            raise RuntimeError(f"{who}: an earlier step failed ({self._failed}); start all ranks again.")
        backward, problem, inputs, cuts = call == "step", None, {}, {}
        try:
            inputs = self._bind(args, kwargs)
            cuts = self._cuts(who, inputs, target)
        except (TypeError, ValueError) as error:
            problem = error
        key = (call, target is not None, _signature({**inputs, "target": target}))
        self._agree(who, key, problem)
        run = self._runs.get(key)
        if run is None:
            run = self._make_run(inputs, cuts, target is not None)
            if len(self._runs) >= _KEPT:
                self._runs.pop(next(iter(self._runs)))  # the same one on all ranks
            self._runs[key] = run
        run.scaler, run.raw = scaler, []
        try:
            if backward:
                with Exchange(self.ties, dict(self.named_parameters()), self.group) as exchange:
                    logits = run(inputs, target, True, return_logits)
                    run.doing.operation, run.doing.computing = "sum of the gradients of tied weights", False
                    exchange()
                self._done()
            else:
                logits = run(inputs, target, False, return_logits)
                self._reshard()
            run.doing.operation = "broadcast of the losses"
            losses = None if target is None else self._losses(run.raw)
        except Exception as error:
            self._fail(run, error)
        if scaler is not None and backward:
            scaler.scale(torch.zeros((), device=self.device))  # stages without a loss have not made its state
        loss = None
        if losses is not None:
            loss = losses.mean() if self.settings.mean else losses.sum()
        return Output(loss, losses, logits)

    def _done(self) -> None:
        for param in self.parameters():
            share = pipeline_share(param)
            if share is not None:
                share.accumulating = False

    def _reshard(self) -> None:
        """Fully sharded weights are shards again, as optimizers know them: backward does that, a forward need not."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _losses(self, raw: list[Tensor]) -> Tensor:
        last = self.settings.ranks[-1]
        losses = torch.empty(self.settings.microbatches, dtype=torch.float32, device=self.device)
        if dist.get_rank(self.group) == last:
            losses = torch.stack(raw).to(losses)
        dist.broadcast(losses, group=self.group, group_src=last)
        return losses

    def _fail(self, run: Run, error: Exception) -> None:
        """Raises what went wrong on this rank, or what has become of the others; they are told."""
        operation = run.doing.operation
        cause = error.__cause__
        if isinstance(cause, Exception) and "ailed to run" in str(error):  # torch's own wrapping
            error, cause = cause, cause.__cause__
        self._failed = f"{type(error).__name__}: {error}".splitlines()[0]
        if run.doing.computing or not isinstance(error, RuntimeError):
            self._notes.leave(operation, error)
            abort(self.group)
            raise error
        raise self._notes.error(operation, error) from error

    # ---- inputs ----

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The inputs by name."""
        if len(args) > len(self.settings.names):
            raise TypeError(
                f"{_WHO}: {len(args)} inputs; expected at most {len(self.settings.names)}: "
                f"{', '.join(self.settings.names)}."
            )
        inputs = dict(zip(self.settings.names, args, strict=False))
        twice = [name for name in kwargs if name in inputs]
        if twice:
            raise TypeError(f"{_WHO}: {', '.join(twice)} was given twice, by place and by name; expected once.")
        return inputs | kwargs

    def _cuts(self, who: str, inputs: dict[str, Any], target: Tensor | None) -> dict[str, bool]:
        """Which inputs are cut along the batch."""
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        if not tensors or not next(iter(tensors.values())).dim():
            raise ValueError(f"{who}: no tensor [batch, ...] among the inputs {list(inputs)}; expected one.")
        first, batch = next((name, value.shape[0]) for name, value in tensors.items())
        n = self.settings.microbatches
        if batch % n or batch == 0:
            raise ValueError(
                f"{who}: {first} has a batch of {batch}; expected a multiple of n_microbatches={n}. Change one of them."
            )
        if target is not None and (not isinstance(target, Tensor) or target.shape[:1] != (batch,)):
            got = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
            raise ValueError(f"{who}: target is {got}; expected a tensor with the batch of {batch} first, as {first}.")
        return {n: isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] == batch for n, v in inputs.items()}

    def _agree(self, who: str, key: Any, problem: Exception | None) -> None:
        """Raises on all ranks if one has a problem or another call; nothing has been sent to a stage then."""
        mine = torch.tensor([zlib.crc32(repr(key).encode()), problem is not None], device=self.device)
        every = [torch.empty_like(mine) for _ in range(self.group.size())]
        try:
            dist.all_gather(every, mine, group=self.group)
        except RuntimeError as error:
            self._failed = "agreement of the ranks"
            raise self._notes.error(f"agreement of the ranks in {who}", error) from error
        values = [tuple(int(v) for v in each) for each in every]
        if not any(bad for _, bad in values) and len({digest for digest, _ in values}) == 1:
            return
        said: list[Any] = [None] * len(values)
        dist.all_gather_object(said, (repr(key), None if problem is None else f"{problem}"), group=self.group)
        if problem is not None:
            raise problem
        ranks = dist.get_process_group_ranks(self.group)
        for rank, (_, text) in zip(ranks, said, strict=True):
            if text is not None:
                raise ValueError(f"{who}: on rank {rank}: {text}")
        for rank, (other, _) in zip(ranks, said, strict=True):
            if other != said[0][0]:
                raise ValueError(
                    f"{who}: rank {rank} was called with {other} and rank {ranks[0]} with {said[0][0]}; expected the "
                    "same call with the same batch on all ranks of the pipeline."
                )

    # ---- shapes ----

    def _make_run(self, inputs: dict[str, Any], cuts: dict[str, bool], with_loss: bool) -> Run:
        n = self.settings.microbatches
        first = next(value for value in inputs.values() if isinstance(value, Tensor))
        shape = (first.shape[0] // n, *first.shape[1:])
        known = self._known(shape)
        if known is None:
            micro = {k: v[: v.shape[0] // n] if cuts[k] else v for k, v in inputs.items()}
            known = self._probe(micro)
            self._hidden = (shape, *known)
        meta = torch.empty(known[0], dtype=known[1], device="meta", requires_grad=True)
        stages: list[Stage] = list(self.stages)  # type: ignore[arg-type]
        settings = self.settings
        return Run(settings, stages, self.group, self.device, meta, cuts, with_loss)

    def _known(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], torch.dtype] | None:
        """Shape and dtype of hidden states for inputs of a shape, from those that are known for another one.

        Not every rank of a sharded model may come here at the same time, so the model is not run again for it.
        """
        if self._hidden is None:
            return None
        old, hidden, dtype = self._hidden
        if len(shape) != len(old) or len(shape) < 2 or len(hidden) < 2 or hidden[0] != old[0]:
            return None
        group = next((s.group for p in self.parameters() if (s := tensor_shard(p)) is not None), None)
        if hidden[1] == old[1]:
            return (shape[0], shape[1], *hidden[2:]), dtype
        if group is None:
            return None
        # Cut along the sequence over tensor-parallel ranks.
        was, now = (split_sizes(length, group.size())[dist.get_rank(group)] for length in (old[1], shape[1]))
        return ((shape[0], now, *hidden[2:]), dtype) if hidden[1] == was else None

    def _probe(self, micro: dict[str, Any]) -> tuple[tuple[int, ...], torch.dtype]:
        """What comes out of the first block for one microbatch, told to all ranks by the one that has it."""
        source = self.settings.ranks[0]
        found: list[Any] = [None]
        if dist.get_rank(self.group) == source:
            stage: Stage = self.stages[0]  # type: ignore[assignment]
            devices = [] if self.device.type == "cpu" else [self.device]
            blocks = stage.blocks
            blocks.stop = blocks.begin
            try:
                with torch.no_grad(), torch.random.fork_rng(devices, device_type=self.device.type):
                    hidden = stage(**micro)
                found = [(tuple(hidden.shape), hidden.dtype)]
            except Exception as error:
                found = [f"{type(error).__name__}: {error}"]
                raise
            finally:
                blocks.stop = None
                self._reshard()
                dist.broadcast_object_list(found, group=self.group, group_src=source)
        else:
            dist.broadcast_object_list(found, group=self.group, group_src=source)
        if isinstance(found[0], str):
            rank = dist.get_process_group_ranks(self.group)[source]
            raise PeerError(f"{_WHO}: rank {rank} failed in the first block: {found[0]}", rank, "forward of stage 0")
        return found[0]

    def explain(self) -> str:
        """Which rank has which blocks, and the schedule."""
        lines = [
            f"{self.settings.kind.name} over {self.group.size()} ranks, {len(self.settings.bounds)} stages, "
            f"{self.settings.microbatches} microbatches"
        ]
        ranks = dist.get_process_group_ranks(self.group)
        for index, ((begin, end), rank) in enumerate(zip(self.settings.bounds, self.settings.ranks, strict=True)):
            lines.append(f"  stage {index} on rank {ranks[rank]}: blocks {begin} to {end - 1}")
        for tie in self.ties:
            lines.append(f"  {tie.name} is on ranks {[ranks[r] for r in tie.ranks]}; its gradients are added up")
        return "\n".join(lines)


def _signature(inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What must be the same on all ranks, and for one Run: shapes and dtypes of tensors, other values as they are."""
    return tuple(
        (name, tuple(v.shape), str(v.dtype)) if isinstance(v, Tensor) else (name, repr(v)) for name, v in inputs.items()
    )


def input_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the inputs of a model that can be given by place."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    return tuple(p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds)

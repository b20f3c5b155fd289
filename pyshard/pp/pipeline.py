"""The pipeline of a training run: this rank's stages, and steps of all ranks through torch's schedules."""

from __future__ import annotations

import functools
import operator
import pickle
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..comm import PeerError
from ..comm.agree import exchange
from ..comm.notes import Notes, abort
from ..placement import Keeping, pipeline_share, said_again, tensor_shard
from ..tp.splits import split_sizes
from . import probe
from .inputs import bind, contents, cut_along_batch, signature
from .runtime import Run, Settings
from .stage import Stage
from .ties import Sums, Tie

# Shapes of inputs for which stages and receive buffers are kept. Training and evaluation are different ones.
_KEPT = 8
_WHO = "pyshard.pp.Pipeline"
# torch raises errors of a stage's module from errors of its own, which begin so.
_TORCHS = re.compile(r"\s*(\[Stage \d+\] failed to run forward|Failed to run stage backward)")

_CALL = struct.Struct("<IqIqq")  # CRC of the call, a problem, CRC of inputs, ties that are trained, and frozen ones

T = TypeVar("T")


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


class Pipeline(Keeping):
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
        # For each mode: a shape of inputs, and shape and dtype of its hidden states.
        self._hidden: dict[Any, tuple[tuple[int, ...], tuple[int, ...], torch.dtype]] = {}
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
        with said_again(self):
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
            inputs = bind(who, self.settings.names, args, kwargs)
            cuts = cut_along_batch(who, inputs, target, self.settings.microbatches)
        except (TypeError, ValueError) as error:
            problem = error
        autocast, dtype = self._mode()
        given = {**inputs, "target": target}
        key = (call, autocast, signature(given))
        self._agree(who, key, contents(given), problem)
        run = self._runs.get((key, dtype))
        if run is None:
            run = self._make_run(inputs, cuts, target is not None)
            if len(self._runs) >= _KEPT:
                self._runs.pop(next(iter(self._runs)))  # the same one on all ranks
            self._runs[key, dtype] = run
        run.scaler, run.raw = scaler, []
        try:
            if backward:
                with Sums(self.ties, dict(self.named_parameters(remove_duplicate=False)), self.group) as sums:
                    logits = run(inputs, target, True, return_logits)
                    run.doing.operation, run.doing.computing = "sum of the gradients of tied weights", False
                    sums()
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
        if isinstance(cause, Exception) and _TORCHS.match(str(error)):
            error = cause
        self._failed = f"{type(error).__name__}: {error}".splitlines()[0]
        if run.doing.computing or not isinstance(error, RuntimeError):
            self._notes.leave(operation, error)
            abort(self.group)
            raise error
        raise self._notes.error(operation, error) from error

    # ---- agreement ----

    def _param(self, name: str) -> nn.Parameter:
        return next(param for known, param in self.named_parameters(remove_duplicate=False) if known == name)

    def _agree(self, who: str, key: Any, inputs: int, problem: Exception | None) -> None:
        """Raises on all ranks if one has a problem or another call; nothing has been sent to a stage then."""
        trained = [None if tie.here is None else self._param(tie.here).requires_grad for tie in self.ties]
        masks = [sum(1 << i for i, found in enumerate(trained) if found is want) for want in (True, False)]
        mine = _CALL.pack(zlib.crc32(repr(key).encode()), problem is not None, inputs, *masks)
        heard = [_CALL.unpack(one) for one in self._exchange("call of a pipeline", mine, who)]
        digests, bad, all_contents, yes, no = zip(*heard, strict=True)
        both = functools.reduce(operator.or_, yes) & functools.reduce(operator.or_, no)
        if not any(bad) and not both and len(set(digests)) == 1 and len(set(all_contents)) == 1:
            return
        text = pickle.dumps((repr(key), None if problem is None else f"{problem}"))
        said = [pickle.loads(one) for one in self._exchange("differences of a pipeline's calls", text, who)]
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
        if both:
            name = next(tie.name for i, tie in enumerate(self.ties) if both >> i & 1)
            raise ValueError(
                f"{who}: {name} is trained on some of the stages that hold it and frozen on others; expected the same "
                "requires_grad for all copies."
            )
        raise ValueError(
            f"{who}: ranks {ranks} have inputs of one shape and different integers in them; expected the same batch on "
            "all ranks of the pipeline. Give them one sampler seed: only data-parallel ranks see different batches."
        )

    # ---- shapes ----

    def _make_run(self, inputs: dict[str, Any], cuts: dict[str, bool], with_loss: bool) -> Run:
        n = self.settings.microbatches
        first = next(value for value in inputs.values() if isinstance(value, Tensor))
        shape, mode = (first.shape[0] // n, *first.shape[1:]), self._mode()
        known = self._known(shape, mode)
        if known is None:
            micro = {k: v[: v.shape[0] // n] if cuts[k] else v for k, v in inputs.items()}
            known = self._probe(micro)
            self._hidden[mode] = (shape, *known)
        meta = torch.empty(known[0], dtype=known[1], device="meta", requires_grad=True)
        stages: list[Stage] = list(self.stages)  # type: ignore[arg-type]
        return Run(self.settings, stages, self.group, self.device, meta, cuts, with_loss)

    def _mode(self) -> tuple[Any, ...]:
        """What decides about the dtype of hidden states besides the inputs."""
        kind = self.device.type
        autocast = torch.is_autocast_enabled(kind) and str(torch.get_autocast_dtype(kind))
        return autocast, tuple(sorted({str(param.dtype) for param in self.parameters()}))

    def _known(self, shape: tuple[int, ...], mode: Any) -> tuple[tuple[int, ...], torch.dtype] | None:
        """Shape and dtype of hidden states for inputs of a shape, from those that are known for another one.

        Not every rank of a sharded model may come here at the same time, so the model is not run again for it.
        """
        if mode not in self._hidden:
            return None
        old, hidden, dtype = self._hidden[mode]
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
        """What comes out of the first block for one microbatch, and whether the other stages can go on from it.

        All ranks come here together, and raise together what one of them finds.
        """
        stages: list[Stage] = list(self.stages)  # type: ignore[arg-type]
        devices = [] if self.device.type == "cpu" else [self.device]
        with torch.no_grad(), torch.random.fork_rng(devices, device_type=self.device.type):
            found = self._together("forward of the first block", lambda: probe.first_block(stages, micro))
            known: probe.Found = next(each for each in found if each is not None)
            self._together("trial of the stages", lambda: probe.try_stages(stages, micro, known, self.device))
        self._reshard()
        return known.shape, known.dtype

    def _together(self, operation: str, mine: Callable[[], T]) -> list[T]:
        """What mine() gives on every rank of the pipeline. An error of one of them is one on all."""
        result, problem = None, None
        try:
            result = mine()
        except Exception as error:
            problem = error
        payload = pickle.dumps((result, None if problem is None else f"{type(problem).__name__}: {problem}"))
        every = [pickle.loads(one) for one in self._exchange(operation, payload)]
        if problem is not None:
            raise problem
        for rank, (_, text) in zip(dist.get_process_group_ranks(self.group), every, strict=True):
            if text is not None:
                raise PeerError(f"{_WHO}: rank {rank} failed in {operation}: {text}", rank, operation)
        return [value for value, _ in every]

    def _exchange(self, operation: str, payload: bytes, detail: str = "") -> list[bytes]:
        try:
            return exchange(_WHO, self.group, operation, payload, detail=detail)
        except PeerError as error:
            self._failed = f"{error}"
            raise

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

"""pyshard.ShardedAdamW and ShardedAdam: optimizer state, and at stage 2 gradients, cut over the ranks of a group.

No wrapper around the model: backward, then step(). What a step does, in the same order on all ranks: see
ShardedAdam._step_on_ranks. Which rank owns what: layout.py; gradients on their way: reducer.py; who carries them:
pyshard.comm.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from ..comm import PeerError, Transport
from ..comm.choose import choose, fall_back
from ..kernels import checks, registry
from . import agreement, sharded_explain, sharded_state
from .adam import Adam
from .flat_shard import wants_full_tensors
from .forward import Gathering
from .peers import Disagreement, accumulating, check_group
from .plan import named_params
from .reducer import SLOTS, InPlace, Reducer
from .sharded_arguments import TIMEOUT, check_arguments, check_shardable, ranks_of, tell_failure
from .sharded_step import Kind, begin, block_order, end_of_backward, finish_rounds, hear_all, step_on_ranks
from .shards import Generation, Shard
from .witness import Witness


class ShardedAdam(Adam):
    """Adam whose state, and at stage 2 gradients, are cut over the ranks of a process group.

    The formula, the options and their meaning are pyshard.Adam's; the gradient is the mean over ranks, summed in rank
    order in fp32 (a rank without a gradient for a parameter counts as zero). The bits do not depend on the transport,
    the stage, bucket_mb, or how the state is cut. Without torch.distributed, or with one rank, this is pyshard.Adam.

    Construction gives all ranks the parameters of the group's first rank (not the model's buffers), checks that they
    agree on model and settings, and takes the memory for what travels. At the first step the parameters move into one
    array (param.data is replaced). All ranks construct, step and clear gradients together.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad and all that is not named here: as pyshard.Adam.
        stage: 1 cuts the optimizer's state: .grad stays whole and may be changed until step(). 2 cuts gradients too:
            they are sent to their owners while backward runs, .grad is None afterwards, and step() uses them up. (While
            a GradScaler is in use, and before the first step, .grad of one small parameter says for it whether all are
            finite.)
        process_group: the ranks; None is the default group. With tensor-parallel parameters (pyshard.tp): those that
            hold the same parts, mesh["dp"].get_group(); norm and skipped steps are agreed with the other ones. The
            same holds for the stages of a pipeline: backwards of microbatches that others follow are as in no_sync().
        transport: "shm" (CPU tensors, one host), "symm_mem" (GPUs with peer access), "collective" (gloo or NCCL, any
            hosts), or "auto"; explain() says what was chosen and why.
        bucket_mb: at most so many MB of gradients travel in one message, no more than 4 over shm and symm_mem, and
            2 over a slow link.
        timeout: seconds (or timedelta) after which a silent rank is an error; 300 by default.
        reduce_dtype: dtype in which gradients travel, such as torch.bfloat16; by default their own. Sums are in fp32.
        model: with the collective transport, step() returns while the new parameters are still on their way, and each
            module's forward waits for its own. Parameters read in any other way need synchronize() first.

    Raises:
        ValueError, TypeError, RuntimeError: on all ranks, before anything is changed.
        pyshard.comm.PeerError: another rank is lost or has failed; names it and the operation.

    Source: Rajbhandari et al. 2020 (ZeRO, stages 1 and 2).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        stage: int = 2,
        process_group: dist.ProcessGroup | None = None,
        transport: str = "auto",
        bucket_mb: float = 25,
        timeout: float | timedelta | None = None,
        reduce_dtype: torch.dtype | None = None,
        model: nn.Module | None = None,
        **adam: Any,
    ):
        who = f"pyshard.{type(self).__name__}"
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        check_arguments(who, stage, transport, bucket_mb, seconds, reduce_dtype)
        self.stage = stage
        self.process_group = process_group
        self.world, self.rank, self.ranks = ranks_of(who, process_group)
        self._asked_for = transport
        self._bucket_bytes = max(int(bucket_mb * (1 << 20)), 1)
        self._seconds = TIMEOUT if seconds is None else float(seconds)
        self._reduce_dtype = reduce_dtype
        self._transport: Transport | None = None
        self._generations: list[Generation] = []
        self._reducers: list[Reducer | InPlace] = []  # of each generation that has memory
        self._member: dict[Tensor, int] = {}  # generation of each parameter that is laid out
        self._index: dict[Tensor, int] = {}  # all parameters, in order
        self._hooks: dict[Tensor, Any] = {}
        self._block_orders: dict[tuple[bytes, ...], list[Tensor]] = {}
        self._witness = Witness()
        self._gathering: Gathering | None = None
        self._quiet = False  # inside no_sync()
        self._built = False
        self._block_kinds: dict[int, Tensor] = {}  # places of the blocks of the parameters of each mask (levels.py)
        params = params if isinstance(params, Tensor) else list(params)  # type: ignore[assignment]  # one of its kinds
        try:
            super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **adam)
        except Exception as error:
            if self.world > 1:  # the others wait to hear of this rank
                tell_failure(who, self, params, error)
            raise
        self._built = True
        if self.world > 1:
            self._step_supports_amp_scaling = True  # or GradScaler would leave out step() on some ranks only
            self._join(0)
            if model is not None:
                self._gathering = Gathering(model)

    # ---- parameters ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, on all ranks alike; its parameters get the values of the group's first rank."""
        before = len(self.param_groups)
        super().add_param_group(param_group)
        if self._built and self.world > 1:
            try:
                self._join(before)
            except BaseException:
                del self.param_groups[before:]
                raise

    def _join(self, first: int) -> None:
        """Takes in the groups from `first` on: checks them, makes their parameters equal, listens to gradients."""
        who = f"pyshard.{type(self).__name__}"
        problem = None
        try:
            for _, name, param in named_params(self.param_groups):
                check_shardable(who, name, param)
            if any(group["capturable"] for group in self.param_groups):
                raise ValueError(
                    f"{who}: capturable=True; expected False, since a step waits for other ranks on the host. "
                    "Leave the argument out."
                )
            self._find_peers()
            check_group(who, self._peers, self.ranks)
        except (TypeError, ValueError) as error:
            problem = error
        settings = {
            "options": self.options,
            "stage": self.stage,
            "transport": self._asked_for,
            "bucket_mb": self._bucket_bytes / (1 << 20),
            "reduce_dtype": str(self._reduce_dtype),
            "timeout": self._seconds,
            "the number of ranks": self.world,
        }
        items = agreement.describe(who, settings, self.param_groups)
        try:
            agreement.check(who, self.process_group, self.ranks, items, problem)
        except (TypeError, ValueError) as error:
            if self._peers is not None:
                self._peers.compare(self, error)
            raise
        if self._peers is not None:
            self._peers.compare(self)
        params = [param for group in self.param_groups[first:] for param in group["params"]]
        agreement.broadcast(params, self.process_group, self.ranks[0])
        self._index = {param: i for i, (_, _, param) in enumerate(named_params(self.param_groups))}
        self._set_up()

    def _listen(self, param: Tensor) -> None:
        if param in self._hooks or not param.is_leaf:
            return
        me = weakref.ref(self)

        def hook(param: Tensor) -> None:
            optimizer = me()
            if optimizer is not None and not optimizer._quiet and not accumulating(param):
                optimizer._on_grad(param)

        self._hooks[param] = param.register_post_accumulate_grad_hook(hook)

    def _lay_out(self, also: Tensor | None = None) -> None:
        """Gives parameters that are trained, and `also`, a place if they have none; needs no other rank."""
        new = [
            param
            for _, _, param in named_params(self.param_groups)
            if param not in self._member
            and (param is also or param.requires_grad or param.grad is not None or self.state.get(param))
        ]
        for param in self._index:
            if param.requires_grad:
                self._listen(param)
        if not new:
            return
        wires = [self._reduce_dtype or getattr(param, "grad_dtype", None) or param.dtype for param in new]
        limit = self._bucket_bytes
        if (useful := self.transport().bucket_bytes) is not None:
            limit = min(limit, useful)
        generation = Generation(new, wires, self.world, self.rank, limit)
        self._member |= dict.fromkeys(new, len(self._generations))
        self._generations.append(generation)
        self._index = {param: i for i, (_, _, param) in enumerate(named_params(self.param_groups))}

    def run_of(self, param: Tensor) -> tuple[int, int]:
        """Elements [begin, end) of a parameter, in the order of its memory, whose state this rank holds."""
        if param not in self._member:
            self._lay_out(param)
        return self._generations[self._member[param]].runs[param]

    def transport(self) -> Transport:
        """The transport in use. Chosen at construction, by all ranks together."""
        if self._transport is None:
            who, device = f"pyshard.{type(self).__name__}", next(iter(self._index)).device
            self._transport = choose(who, self._asked_for, self.process_group, device, self._seconds)
        return self._transport

    def _set_up(self) -> None:
        """Memory for generations that have none; all ranks come here together."""
        self._lay_out()
        for generation in self._generations[len(self._reducers) :]:
            transport = self.transport()
            whole = self.stage == 1 and transport.in_place
            sizes = [bucket.slot_bytes for bucket in generation.layout]
            # One slot for the gradients of all buckets, or a few that each hold one bucket at a time.
            begins = [sum(sizes[:i]) if whole else 0 for i in range(len(sizes))]
            slot_bytes, slots = (sum(sizes), 1) if whole else (max(sizes), SLOTS)
            try:
                arena = transport.arena(generation.layout[-1].end, slot_bytes, slots)
            except MemoryError as error:
                if self._asked_for != "auto" or self._reducers or not transport.in_place:
                    raise
                transport.close()
                who, device = f"pyshard.{type(self).__name__}", next(iter(self._index)).device
                self._transport = fall_back(who, error, self.process_group, device, self._seconds)
                return self._set_up()
            generation.shards = [
                Shard(i, bucket, generation.params, arena, self.rank, begin)
                for i, (bucket, begin) in enumerate(zip(generation.layout, begins, strict=True))
            ]
            # Over NCCL messages and collectives share one stream, and must be enqueued in one order on all ranks.
            eager = self.stage == 2 and (transport.in_place or arena.params.device.type == "cpu")
            if whole:
                self._reducers.append(InPlace(generation))
            else:
                self._reducers.append(Reducer(generation, SLOTS, eager, keep=self.stage == 1))

    # ---- gradients ----

    def _on_grad(self, param: Tensor) -> None:
        """A backward has added to .grad of a parameter."""
        generation = self._member.get(param)
        if generation is None or generation >= len(self._reducers):
            return  # new: it gets its place in step(), where all ranks are
        if self._witness.watching and not self._witness.queued:
            self._witness.queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)
        self._reducers[generation].ready(param)

    @torch.no_grad()
    def _end_of_backward(self) -> None:
        self._witness.queued = False
        if any(accumulating(param) for param in self._index):
            return  # microbatches follow, at whose end the ranks hear each other
        self._witness.take_back("")  # of a backward before, which this one has not added to
        self._hyperparameters()
        end_of_backward(self, hear_all(self, Kind.BACKWARD))

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside only add to .grad on this rank; the first one after it sends the sum."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients. At stage 2, after a backward without a step, all ranks have to call it."""
        if not all(reducer.idle for reducer in self._reducers):
            self._witness.take_back("")
            news = hear_all(self, Kind.ZERO_GRAD)
            list(finish_rounds(self, news))
            for reducer, present in zip(self._reducers, news.present, strict=True):
                reducer.reset(present)
        super().zero_grad(set_to_none)

    # ---- the step ----

    def _update(self) -> None:
        if self.world == 1:
            return super()._update()
        self._with_peers(self._update_sharded, look=False)

    def _update_sharded(self) -> None:
        self._lay_out()
        self.synchronize()
        problem: Exception | None = None
        try:
            who = f"pyshard.{type(self).__name__}"
            self._hyperparameters()
            self._witness.take_back(who)
            for _, name, param in named_params(self.param_groups):
                if param.grad is not None:
                    checks.check_grad(who, name, param, param.grad)
            self._bind()
        except (TypeError, ValueError, RuntimeError) as error:
            problem = error
        everywhere: tuple[type[BaseException], ...] = (Exception,)  # errors that all ranks have
        try:
            news = begin(self, problem)
            if len(self._reducers) < len(self._generations):  # on all ranks alike, or begin() had raised
                self._set_up()
                self._bind()
                news = begin(self, None)
            everywhere = (PeerError, FloatingPointError, Disagreement)
            step_on_ranks(self, self._groups, news)
        except BaseException as error:
            if not isinstance(error, everywhere) or (self._peers is not None and self._peers.told_of(error)):
                self.transport().abort(f"{type(error).__name__}: {error}")  # the others wait
            raise

    def _bind(self) -> None:
        """Moves parameters into the arrays that travel."""
        for generation in self._generations:
            for shard in generation.shards:
                shard.bind()

    def synchronize(self) -> None:
        """With model=...: waits until the parameters of the last step are here. Needed before they are read otherwise
        than by the forward of their own modules, or written."""
        if self._gathering is not None:
            self._gathering.wait_all()

    def _block_order(self, present: tuple[bytes, ...]) -> list[Tensor]:
        if present not in self._block_orders:
            self._block_orders = {}  # the last one alone is kept: it seldom changes
            self._block_orders[present], self._block_kinds = block_order(self, present)
        return self._block_orders[present]

    def _backend_of(self, shard: Shard) -> registry.Backend:
        """The kernels of a bucket. On GPUs that reach each other's memory, Triton's: the CUDA ones do not."""
        device, name = shard.arena.params.device, registry.requested(self.options.backend)
        if name == "auto" and device.type != "cpu" and shard.arena.targets:
            name = "triton"
        return registry.choose(name, device, shard.layout.dtype)

    def explain(self) -> str:
        """Which path each bucket takes, bytes per rank, and why."""
        return super().explain() if self.world == 1 else sharded_explain.explain(self)

    def close(self) -> None:
        """Gives back hooks, shared memory and connections. The parameters stay where they are, with their values."""
        self.synchronize()
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        if self._gathering is not None:
            self._gathering.close()
        if self._transport is not None:
            self._transport.close()

    # ---- torch's protocol ----

    def state_dict(self) -> dict[str, Any]:
        """torch's state_dict with the part of the state that this rank holds, as FlatShards of the whole tensors.

        torch.distributed.checkpoint saves and loads it at any number of ranks. full_state_dict() has whole tensors.
        """
        found = super().state_dict()
        return sharded_state.gathered(self, found) if self.world > 1 and wants_full_tensors() else found

    def full_state_dict(self) -> dict[str, Any]:
        """torch's state_dict with whole tensors, the same on all ranks, tensor-parallel ones too; all call this."""
        return sharded_state.gathered(self, self.state_dict())

    def _kept_state(self, param: Tensor, loaded: dict[str, Any], capturable: bool) -> dict[str, Any]:
        if self.world == 1:
            return super()._kept_state(param, loaded, capturable)
        return sharded_state.kept(param, loaded, self.run_of(param))

    def _saved_state(self, param: Tensor, kept: dict[str, Any]) -> dict[str, Any]:
        if self.world == 1:
            return super()._saved_state(param, kept)
        ours = self._peers is None or self._peers.tensor_rank == 0
        return sharded_state.saved(param, kept, self.run_of(param), ours)

    def _check_loaded(self, who: str, name: str, param: Tensor, loaded: dict[str, Any]) -> None:
        if self.world == 1:
            return super()._check_loaded(who, name, param, loaded)
        sharded_state.check_loaded(who, name, param, loaded, self.run_of(param))

    def __getstate__(self) -> dict[str, Any]:
        if self.world > 1:
            raise TypeError(
                f"pyshard.{type(self).__name__} cannot be copied or pickled: it holds a process group and memory that "
                "ranks share. Save state_dict() with torch.distributed.checkpoint, or full_state_dict()."
            )
        return super().__getstate__()


class ShardedAdamW(ShardedAdam):
    __doc__ = (
        (ShardedAdam.__doc__ or "").replace("pyshard.Adam's", "pyshard.AdamW's").replace("Adam whose", "AdamW whose")
    )

    _decoupled = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Any,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)

"""pyshard.AdamW and pyshard.Adam: torch's optimizers with one fused pass over memory.

The classes keep torch's signature, param_groups and state_dict. What a step does: see Adam.step.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, ParamsT

from ..comm import PeerError
from ..kernels.launch import HostLaunch, Launch
from ..kernels.reference import clip_coefficient
from . import explain, sharded_state, state
from .arguments import Options, check_group, check_lasting, rate, values
from .flat_shard import wants_full_tensors
from .levels import SHARD, TENSOR
from .peers import Peers, find_peers, stays_on_device
from .plan import Plan, make_plan, named_params, some


class Adam(Optimizer):
    """Adam with coupled (L2) weight decay, as torch.optim.Adam, fused into one pass over memory.

    Per element, in fp32, each operation rounded on its own::

        g = grad * grad_scale                       # unscale, clip coefficient, maximize
        g = g + weight_decay * p                    # Adam;   AdamW: p = p * (1 - lr*weight_decay)
        m = m + (1-beta1) * (g - m)
        v = beta2 * v + (1-beta2) * g*g
        p = p - lr/bias1 * m / (sqrt(v) / sqrt(bias2) + eps)

    The bits of the result do not depend on backend, instruction set, number of threads or grouping of parameters.

    Args:
        params: parameters, dicts of groups, or (name, parameter) pairs, as torch.optim takes them. fp32, bf16, fp16
            (C++ or Triton or CUDA kernels) or fp64 (the reference path); any layout without shared elements.
            DTensors are updated through their local shards, parameters that are cut over a tensor-parallel group
            (pyshard.tp) through this rank's part, those of a pipeline on the ranks of their stage. The norm, skipped
            steps and GradScaler's inf are those of the whole model: all ranks that hold parts of it step together.
        lr, betas, eps, weight_decay, amsgrad, maximize, capturable: as in torch.optim. lr may be a tensor.
            capturable keeps step counts, lr and the non-finite flag on the GPU: a step never waits for the device
            and can be captured in a CUDA graph.
        foreach, fused: accepted for compatibility; every step is fused. fused=True also makes GradScaler leave
            unscaling and skipping to step(), as in torch.
        differentiable: must be False.
        master_weights: how the fp32 master of a 16-bit parameter is kept. "split": bf16 parameter = upper half,
            int16 remainder = lower half, exact, 2 more bytes per element; "fp32": a full copy, 4 bytes; "none";
            "auto": split for bf16, fp32 for fp16. A weight that is written between steps becomes the master
            (under split it keeps its old lower half, which is less than half a step of bf16).
        moments: "fp32".
        nonfinite: when a gradient holds inf or NaN: "propagate" (as torch), "skip" the whole step, or "raise"
            FloatingPointError; the last two change nothing.
        max_grad_norm: clip the global norm of all gradients to this, inside the step; gradients are not written.
        backend: "auto", "cpu", "cuda", "triton" or "reference". A named backend never falls back.

    Raises:
        ValueError, TypeError, RuntimeError: before anything is changed; see the message.

    Source: Kingma & Ba 2015; Reddi et al. 2018 (amsgrad).
    """

    _decoupled = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        master_weights: str = "auto",
        moments: str = "fp32",
        nonfinite: str = "propagate",
        max_grad_norm: float | None = None,
        backend: str = "auto",
    ):
        who = f"pyshard.{type(self).__name__}"
        self.options = Options(master_weights, moments, nonfinite, max_grad_norm, backend)
        self.options.check(who)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay or self._decoupled,
        }
        check_group(who, defaults)
        self._reset()
        super().__init__(some(who, params), defaults)
        if fused:
            self._step_supports_amp_scaling = True
        self._find_peers()

    def _reset(self) -> None:
        """Forgets all that is derived from parameters and state; the next step looks at them again."""
        self._plan: Plan | None = None
        self._checked: list[tuple[Any, ...]] = []  # hyperparameters
        self._groups: list[list[float]] = []
        self._peers: Peers | None = getattr(self, "_peers", None)
        self._grad_norm: float | Tensor | None = None
        self._skipped = 0  # by the host; the controls count those that a device has skipped
        self._controls: dict[tuple[Any, ...], Tensor] = {}
        self._captured: list[Tensor] = getattr(self, "_captured", [])  # what CUDA graphs have addresses of

    # ---- the step ----

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have a gradient; parameters and state change in place.

        With max_grad_norm, nonfinite="skip" or "raise": one pass over the gradients, then one over everything;
        else one pass. Each is one parallel region or launch for all tensors of a backend.

        Args:
            closure: computes the loss again, with gradients; called first.
        Returns:
            the closure's result, or None.
        Raises:
            FloatingPointError: nonfinite="raise" and a gradient holds inf or NaN.
            ValueError, TypeError, RuntimeError: parameters, gradients or state that cannot be used.
            pyshard.comm.PeerError: of a model that is cut over ranks: another rank is lost or has failed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            self._update_untraced()
        else:
            with torch.no_grad():
                self._update()
        return loss

    @_disable_dynamo
    @torch.no_grad()
    def _update_untraced(self) -> None:
        self._update()

    def _update(self) -> None:
        if self._plan is not None and not self._plan.refresh(self):
            self._plan = None
        self._with_peers(self._update_here, look=self._plan is None)

    def _with_peers(self, update: Callable[[], None], look: bool) -> None:
        """Takes a step; where it fails, those that wait for this rank hear of it. `look`: for peers, first."""
        try:
            if self._peers is not None:
                self._peers.begin(self)
            if look:
                self._find_peers()
                if self._peers is not None:
                    self._peers.begin(self)
            update()
        except BaseException as error:
            if self._peers is not None:
                self._peers.fail(error)
            raise

    def _find_peers(self) -> None:
        """Looks which ranks hold other parts of the model, and stays with those that it has found before."""
        params = [param for group in self.param_groups for param in group["params"]]
        found = find_peers(f"pyshard.{type(self).__name__}", params, getattr(self, "_seconds", None))
        if found is None or self._peers is None or found.levels != self._peers.levels:
            self._peers = found
        if found is not None and any(level.kind != SHARD for level in found.levels):
            self._step_supports_amp_scaling = True  # or GradScaler would leave out step() on some ranks only

    def _update_here(self) -> None:
        groups = self._hyperparameters()
        plan, peers, before = self._plan, self._peers, None
        if plan is None:
            before = state.snapshot(self.state)
            try:
                plan = self._plan = make_plan(self)
            except BaseException:  # of memory that ran out half-way, too
                state.restore(self.state, before)
                raise
        try:
            on_host = all(type(launch) is HostLaunch for launch in plan.launches)
            if on_host and (peers is None or not stays_on_device(self)):
                self._step_on_host(plan, groups)
            else:
                from ..kernels.device import step_on_device

                if peers is not None:
                    peers.inf_on_device(self)
                step_on_device(self, plan.launches, groups)
        except (FloatingPointError, ValueError, PeerError):  # none of which comes once anything is updated
            if before is not None:
                state.restore(self.state, before)
                self._plan = None
            raise

    def _present(self) -> list[int]:
        """Which parameters have a gradient."""
        params = (param for group in self.param_groups for param in group["params"])
        return [index for index, param in enumerate(params) if param.grad is not None]

    def _step_on_host(self, plan: Plan, groups: list[list[float]]) -> None:
        launches: list[HostLaunch] = plan.launches  # type: ignore[assignment]  # all of them are
        scale, found_inf = self._amp_scale()
        options, peers = self.options, self._peers
        sums = [0.0] * (1 if peers is None else 1 << len(peers.levels))
        if not found_inf:
            for launch in launches:
                launch.gather()
                if options.needs_norm() and launch.mask is not None:
                    sums[launch.mask] += launch.square_sum()
        total = sums[0]
        if peers is not None and not peers.said:
            found_inf, total = peers.hear(self, self._present(), sums, found_inf)
        if found_inf:
            self._skipped += 1
            return
        if options.needs_norm():
            norm = math.sqrt(total) * scale if total >= 0.0 else math.nan
            if options.nonfinite == "raise" and not math.isfinite(total):
                raise FloatingPointError(self._nonfinite_message(launches))
            self._grad_norm = norm
            if options.nonfinite == "skip" and not math.isfinite(total):
                self._skipped += 1
                return
            if options.max_grad_norm is not None and options.max_grad_norm != math.inf:
                scale = scale * clip_coefficient(norm, options.max_grad_norm)
        for launch in launches:
            launch.adam(groups, scale)
            launch.scatter()

    def _nonfinite_message(self, launches: Sequence[Launch]) -> str:
        names = (launch.first_nonfinite() for launch in launches)
        name = next((name for name in names if name is not None), "a parameter on another rank")
        return (
            f"pyshard.{type(self).__name__}: the gradient of {name} holds inf or NaN; expected finite gradients "
            "(nonfinite='raise'). Nothing was changed. Lower the learning rate or the loss scale, or use "
            "nonfinite='skip'."
        )

    def _amp_scale(self) -> tuple[float, bool]:
        """Factor that undoes GradScaler's scale, and whether it found inf; (1, False) without a GradScaler."""
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        scale = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
        return scale, found_inf is not None and float(found_inf) != 0.0

    def _hyperparameters(self) -> list[list[float]]:
        """(lr, beta1, beta2, eps, weight_decay, sign, decoupled) of each group, checked when they change."""
        groups = self.param_groups
        now = [values(group) for group in groups]
        tensors = any(isinstance(value, Tensor) for known in now for value in known)  # may change in place
        if now and not tensors and now == self._checked:
            return self._groups
        who = f"pyshard.{type(self).__name__}"
        for group in groups:
            check_group(who, group)
        self._checked = now
        self._groups = [
            [rate(g), *(float(v) for v in known[1:5]), -1.0 if g["maximize"] else 1.0, float(bool(known[5]))]
            for g, known in zip(groups, now, strict=True)
        ]
        return self._groups

    # ---- what a step leaves behind ----

    @property
    def grad_norm(self) -> Tensor:
        """Global norm of the (unscaled) gradients of the last step, before clipping; a 0-d fp32 tensor.

        Raises:
            RuntimeError: no step has computed it: it needs max_grad_norm or nonfinite="skip" or "raise".
        """
        if self._grad_norm is None:
            raise RuntimeError(
                f"pyshard.{type(self).__name__}: no gradient norm yet; it is computed by step() with max_grad_norm "
                "(float('inf') for the norm alone) or nonfinite='skip' or 'raise'."
            )
        if isinstance(self._grad_norm, Tensor):
            return self._grad_norm.to(torch.float32)
        return torch.tensor(self._grad_norm, dtype=torch.float32)

    @property
    def skipped_steps(self) -> int:
        """Number of steps left out because of inf or NaN. With capturable=True, reading it waits for the GPU."""
        return self._skipped + max((int(control[-1]) for control in self._controls.values()), default=0)

    def explain(self) -> str:
        """Which parameters take which path, how many bytes their state holds, and why."""
        return explain.explain(self)

    # ---- torch's protocol ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch.optim does; its hyperparameters are checked first."""
        if isinstance(param_group, dict):
            check_group(f"pyshard.{type(self).__name__}", {**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            check_lasting(f"pyshard.{type(self).__name__}", self.param_groups[-1])
        except ValueError:
            del self.param_groups[-1]
            raise
        self._plan = None
        if self._peers is not None:
            self._peers.compared = False

    def state_dict(self) -> dict[str, Any]:
        """torch's state_dict; split weights appear as a plain fp32 `master` per parameter.

        State of parameters that are cut over tensor-parallel ranks appears as FlatShards: tensors that look like the
        whole and hold this rank's part, which torch.distributed.checkpoint saves and loads at any number of ranks.
        """
        hook = self.register_state_dict_post_hook(_save_masters, prepend=True)
        try:
            found = super().state_dict()
        finally:
            hook.remove()
        cut = self._peers is not None and self._peers.level(TENSOR)
        return sharded_state.gathered(self, found) if cut and wants_full_tensors() else found

    def full_state_dict(self) -> dict[str, Any]:
        """torch's state_dict with whole tensors, the same on all tensor-parallel ranks, which all call this."""
        return sharded_state.gathered(self, self.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of this class or of torch.optim's; moments and masters are kept in fp32.

        The tensors are copied. Parameters are not changed: a loaded master is used where the parameter is its
        rounding, so model and optimizer may be loaded in any order.
        """
        hook = self.register_load_state_dict_pre_hook(_check_and_box)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        kept = super().__getstate__()
        kept["options"] = self.options
        kept["_skipped"] = self.skipped_steps
        if getattr(self, "_step_supports_amp_scaling", False):
            kept["_step_supports_amp_scaling"] = True
        return kept

    def __setstate__(self, kept: dict[str, Any]) -> None:
        skipped = kept["_skipped"] if "_skipped" in kept else self.skipped_steps
        self._reset()
        super().__setstate__(kept)
        self._skipped = skipped
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            if self._decoupled:
                group["decoupled_weight_decay"] = True
            for param in group["params"]:
                loaded = self.state.get(param)
                if loaded:
                    self.state[param] = self._kept_state(param, loaded, group["capturable"])

    # How state is kept in memory and saved; sharded optimizers keep a part of it.

    def _kept_state(self, param: Tensor, loaded: dict[str, Any], capturable: bool) -> dict[str, Any]:
        return state.unbox(param, loaded, capturable)

    def _saved_state(self, param: Tensor, kept: dict[str, Any]) -> dict[str, Any]:
        return state.saved(param, kept)

    def _check_loaded(self, who: str, name: str, param: Tensor, loaded: dict[str, Any]) -> None:
        state.check_loaded(who, name, param, loaded)


class AdamW(Adam):
    __doc__ = (
        "AdamW: Adam with decoupled weight decay, as torch.optim.AdamW, fused into one pass over memory.\n\n"
        "    Formula, arguments and errors are those of pyshard.Adam; weight_decay is 1e-2 by default and shrinks the\n"
        "    weight directly (p = p * (1 - lr*weight_decay)) before the update.\n\n"
        "    Source: Loshchilov & Hutter 2019.\n    "
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
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        master_weights: str = "auto",
        moments: str = "fp32",
        nonfinite: str = "propagate",
        max_grad_norm: float | None = None,
        backend: str = "auto",
    ):
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            master_weights=master_weights,
            moments=moments,
            nonfinite=nonfinite,
            max_grad_norm=max_grad_norm,
            backend=backend,
        )


def _save_masters(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    assert isinstance(optimizer, Adam)  # whose hook this is
    params = [p for group in optimizer.param_groups for p in group["params"]]
    saved = {
        key: optimizer._saved_state(params[key], value) if isinstance(key, int) else value
        for key, value in state_dict["state"].items()
    }
    return {**state_dict, "state": saved}


def _check_and_box(optimizer: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
    assert isinstance(optimizer, Adam)  # whose hook this is
    who = f"pyshard.{type(optimizer).__name__}.load_state_dict"
    keys = [key for group in loaded["param_groups"] for key in group["params"]]
    params = list(named_params(optimizer.param_groups))
    if len(keys) == len(params):  # torch says what is wrong otherwise
        for key, (_, name, param) in zip(keys, params, strict=True):
            optimizer._check_loaded(who, name, param, loaded["state"].get(key) or {})
    return state.box(loaded)

"""Random arguments for pyshard.Adam and AdamW: construction, two steps, and what may happen between them.

Each call either gives the values of a simulation in numpy or raises an error of pyshard's own, and then parameters
and state are what they were. Parameters and gradients lie between sentinels. `make sanitize` runs this file too.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import reference
import torch
from fuzz import Placed, examples, outcome, place, seeds, shapes
from hypothesis import given
from hypothesis import strategies as st
from reference import FLOATS, assert_same_bits

import pyshard
from pyshard import _C
from pyshard.kernels import reference as plain


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For torch's own operations; the compiled module is called with numbers of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Maybe(NamedTuple):
    """A drawn argument, and whether pyshard must refuse it."""

    value: Any
    bad: bool


def mostly(*good: Any, bad: tuple[Any, ...] = ()) -> st.SearchStrategy[Maybe]:
    """One of the good values, one time in 30 a bad one."""
    rare = [Maybe(value, True) for value in bad]
    often = [Maybe(value, False) for value in good]
    return st.integers(0, 29).flatmap(lambda i: st.sampled_from(rare if i == 29 and rare else often))


NAN, INF = math.nan, math.inf
KEYWORDS = {
    "lr": mostly(1e-3, 0.0, 0.5, 1e30, torch.tensor(1e-2), bad=(-1e-3, NAN, INF, "fast", None, torch.ones(2))),
    "betas": mostly((0.9, 0.999), (0.0, 0.0), (0.5, 0.9), bad=((1.0, 0.9), (0.9, -0.1), (NAN, 0.9), (0.9,), 0.9)),
    "eps": mostly(1e-8, 0.0, 1.0, bad=(-1e-8, NAN, INF, "small")),
    "weight_decay": mostly(0.0, 0.1, 1e10, bad=(-1.0, NAN, INF, None)),
    "amsgrad": mostly(False, True),
    "maximize": mostly(False, True),
    "capturable": mostly(False, True),
    "differentiable": mostly(False, bad=(True,)),
    "fused": mostly(None, True, False),
    "master_weights": mostly("auto", "auto", "fp32", "none", "split", bad=("half", None)),
    "moments": mostly("fp32", bad=("int8", "fp8")),
    "nonfinite": mostly("propagate", "skip", "raise", bad=("ignore",)),
    "max_grad_norm": mostly(None, 1.0, 1e-3, INF, bad=(0.0, -1.0, NAN, "1")),
    "backend": mostly(*["auto", "cpu", "reference"] * 5, "cuda", bad=("gpu",)),
}
# A parameter: dtype, shape, layout, gradient. What is bad here shows at the step.
PARAMS = st.lists(
    st.tuples(
        mostly(*FLOATS, *FLOATS, torch.float64, bad=(torch.complex64,)),
        shapes,
        mostly("plain", "shifted", "reversed", "gaps", bad=("expanded",)),
        mostly(*["same"] * 3, "fp32", "reversed", "expanded", "none", bad=("fp64", "sparse", "alias", "complex")),
    ),
    min_size=1,
    max_size=3,
)
# What happens before the second step; all but the first three must be refused.
BETWEEN = [
    *[""] * 5,
    "new lr",
    "zeroed",
    "lr",
    "betas",
    "eps",
    "state shape",
    "state dtype",
    "grad alias",
    "grad dtype",
]


class Simulated:
    """A parameter in numpy, from zero moments on: what each step must make of it."""

    def __init__(self, value: torch.Tensor, choice: str, amsgrad: bool):
        self.dtype, self.choice = value.dtype, choice
        work = np.float64 if value.dtype == torch.float64 else np.float32
        self.p = value.detach().to(torch.float64).contiguous().numpy().astype(work)
        self.m, self.v = np.zeros_like(self.p), np.zeros_like(self.p)
        self.vmax = np.zeros_like(self.p) if amsgrad else None
        self.count = 0

    @property
    def is_split(self) -> bool:
        return self.dtype == torch.bfloat16 and self.choice in ("auto", "split")

    def step(self, grad: torch.Tensor, hyper: list[float], scale: float) -> None:
        self.count += 1
        hyper = [*hyper[:5], self.count, *hyper[5:]]
        scalars = (plain if self.dtype == torch.float64 else _C).adam_scalars(hyper, scale)
        coupled = not hyper[7] and hyper[4] != 0
        g = grad.double().contiguous().numpy().astype(self.p.dtype)
        after = reference.adam(self.p, self.m, self.v, self.vmax, g, scalars, coupled)
        self.p, self.m, self.v, self.vmax = (x if x is None else np.asarray(x) for x in after)  # 0-d stays an array
        if self.choice == "none":
            self.p = self.stored().to(torch.float64).numpy().astype(self.p.dtype)

    def zero(self) -> None:
        """The user sets the weights to 0: 16-bit ones keep their old remainder, if they have one."""
        low = reference.split(self.p)[1] if self.is_split else None
        self.p = np.zeros_like(self.p)
        if low is not None:
            self.p = reference.join(np.zeros(low.shape, np.uint16), low)

    def stored(self) -> torch.Tensor:
        if self.is_split:
            return torch.from_numpy(reference.split(self.p)[0]).view(torch.bfloat16)
        if self.dtype == torch.bfloat16:
            return torch.from_numpy(reference.bf16_round(self.p)).view(torch.bfloat16)
        if self.dtype == torch.float16:
            return torch.from_numpy(reference.fp16_round(self.p)).view(torch.float16)
        return torch.from_numpy(self.p)


def assert_fits(actual: torch.Tensor, expected: np.ndarray, what: str) -> None:
    """The bits; in fp64 to 1e-12, since torch's own operations serve it, whose division and root may be an ulp off."""
    wanted = torch.from_numpy(expected)
    if wanted.dtype == torch.float64:
        finite = wanted[wanted.isfinite()].abs()
        largest = float(finite.max()) if finite.numel() else 0.0
        assert torch.allclose(actual, wanted, rtol=1e-12, atol=1e-12 * largest, equal_nan=True), what
    else:
        assert_same_bits(actual.detach().contiguous(), wanted, what)


def gradient(param: torch.Tensor, kind: str, rng: np.random.Generator, special: bool) -> Placed | torch.Tensor | None:
    if kind == "none":
        return None
    if kind == "alias":
        return param.detach()
    if kind == "sparse":
        return torch.ones_like(param).detach().to_sparse()
    other = {"fp32": torch.float32, "fp64": torch.float64, "complex": torch.complex64}
    layout = kind if kind in ("reversed", "expanded") else "plain"
    return place(other.get(kind, param.dtype), tuple(param.shape), layout, rng, special)


def snapshot(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The state, copied; parameters without any count as absent."""
    return [{k: v.clone() for k, v in state.items()} for state in optimizer.state.values() if state]


def assert_unchanged(optimizer: torch.optim.Optimizer, before: list[dict[str, Any]], params: list[Placed]) -> None:
    for param in params:
        param.check()
    after = snapshot(optimizer)
    assert [state.keys() for state in after] == [state.keys() for state in before]
    for now, then in zip(after, before):
        for key in then:
            assert_same_bits(now[key], then[key], f"state {key}")


def settle(param: Placed) -> Placed:
    """The same place, with what lies there now as what was there before."""
    return param._replace(before=param.memory.tensor.clone())


@examples(2500)
@given(
    *(st.sampled_from(["Adam", "AdamW"]), st.fixed_dictionaries({}, optional=KEYWORDS), PARAMS),
    *(mostly(False, bad=(True,)), st.booleans(), st.sampled_from(BETWEEN), seeds),
)
def test_optimizers(
    name: str, drawn: dict[str, Maybe], parts: list[Any], tied: Maybe, special: bool, between: str, number: int
) -> None:
    rng = np.random.default_rng(number)
    keywords = {key: choice.value for key, choice in drawn.items()}
    placed = [place(dtype.value, shape, layout.value, rng, special) for dtype, shape, layout, _ in parts]
    params = [torch.nn.Parameter(x.tensor) for x in placed]
    if tied.bad and len(params) > 1:
        params[1], placed[1], parts[1] = torch.nn.Parameter(placed[0].tensor), placed[0], parts[0]
    optimizer, error = outcome(lambda: getattr(pyshard, name)(params, **keywords))
    assert (error is not None) == any(choice.bad for choice in drawn.values()), error
    for x in placed:
        x.check()
    if error is not None:
        return

    group = optimizer.param_groups[0]
    master_weights, nonfinite = optimizer.options.master_weights, optimizer.options.nonfinite
    limit, backend = optimizer.options.max_grad_norm, optimizer.options.backend
    simulated = [
        None if x.tensor.is_complex() else Simulated(x.tensor, master_weights, group["amsgrad"]) for x in placed
    ]
    for turn in range(2):
        grads = [gradient(p, part[3].value, rng, special) for p, part in zip(params, parts)]
        bad = [grad is not None and refused(part, master_weights, backend) for grad, part in zip(grads, parts)]
        active = [i for i, grad in enumerate(grads) if grad is not None]
        bad.append(tied.bad and {0, 1} <= set(active) and params[0].numel() > 0 and len(params) > 1)
        for param, grad in zip(params, grads):
            param.grad_dtype = None
            param.grad = grad.tensor if isinstance(grad, Placed) else grad
        before = snapshot(optimizer)
        if turn == 1 and active:
            bad.append(disturb(between, optimizer, params[active[0]], simulated[active[0]]))
            placed = [settle(x) for x in placed]
            before = snapshot(optimizer)
        skipped = optimizer.skipped_steps
        _, error = outcome(optimizer.step)
        if any(bad):
            assert error is not None and not isinstance(error, FloatingPointError)
            assert_unchanged(optimizer, before, placed)
            return

        values = [g.tensor.detach() for g in grads if isinstance(g, Placed)]
        total = math.fsum(v * v for g in values for v in g.double().flatten().tolist())
        if nonfinite != "propagate" and not math.isfinite(total):
            assert isinstance(error, FloatingPointError) == (nonfinite == "raise"), error
            assert optimizer.skipped_steps == skipped + (nonfinite == "skip")
            for x in placed:
                x.check()
            continue
        assert error is None, error
        scale = 1.0
        if limit is not None:
            norm = math.sqrt(total)
            shown = torch.tensor(norm, dtype=torch.float64).float()  # what lies beyond fp32 is inf there
            torch.testing.assert_close(optimizer.grad_norm, shown, rtol=1e-6, atol=0, equal_nan=True)
            scale = reference.clip_coefficient(norm, limit)
        hyper = [float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"]]
        hyper += [-1.0 if group["maximize"] else 1.0, float(name == "AdamW")]
        for param, x, sim, grad in zip(params, placed, simulated, grads):
            if not isinstance(grad, Placed) or sim is None:
                x.check()
                continue
            grad.check()
            sim.step(grad.tensor, hyper, scale)
            state = optimizer.state[param]
            assert float(state["step"]) == sim.count
            assert_fits(state["exp_avg"], sim.m, "exp_avg")
            assert_fits(state["exp_avg_sq"], sim.v, "exp_avg_sq")
            if param.dtype == torch.float64:
                assert_fits(param, sim.p, "parameter")
                sim.p = param.detach().contiguous().numpy().copy()
                x.check(param.detach().clone())
            else:
                x.check(sim.stored())
        placed = [settle(x) for x in placed]


def refused(part: Any, master_weights: str, backend: str) -> bool:
    """Whether a parameter with a gradient must be refused."""
    dtype, shape, layout, grad = part
    shares = layout.bad and math.prod(shape) > 1 and shape[0] > 1
    wrong_grad = grad.bad and not (grad.value == "alias" and math.prod(shape) == 0)
    wrong_grad = wrong_grad and not (grad.value == "fp64" and dtype.value == torch.float64)
    wrong_split = dtype.value == torch.float16 and master_weights == "split"
    unserved = backend == "cuda" or (backend == "cpu" and dtype.value == torch.float64)
    return dtype.bad or shares or wrong_grad or wrong_split or unserved


def disturb(how: str, optimizer: torch.optim.Optimizer, param: torch.Tensor, sim: Simulated | None) -> bool:
    """Changes something between steps; whether the next step must be refused."""
    group, state = optimizer.param_groups[0], optimizer.state.get(param) or {}
    if how == "new lr":
        group["lr"] = 0.25
    elif how == "zeroed" and sim is not None:
        param.detach().zero_()
        sim.zero()
    elif how in ("lr", "betas", "eps"):
        group[how] = {"lr": NAN, "betas": (0.9, 2.0), "eps": -1.0}[how]
        return True
    elif how.startswith("state") and "exp_avg" in state:
        shape, dtype = ((*param.shape, 2), torch.float32) if how == "state shape" else (param.shape, torch.int64)
        state["exp_avg"] = torch.zeros(shape, dtype=dtype)
        return True
    elif how == "grad alias" and param.numel() > 0:
        param.grad = param.detach()
        return True
    elif how == "grad dtype":
        param.grad = torch.zeros_like(param, dtype=torch.int32).detach()
        return True
    return False

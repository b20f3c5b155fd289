"""Bad input to the optimizers: each gets an error that says what, what was got, what was expected and the remedy,
and nothing has changed.
"""

import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from reference import assert_same_bits
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import pyshard

NAN, INF = float("nan"), float("inf")


def model(*dtypes: torch.dtype) -> list[nn.Parameter]:
    """Parameters of 6 elements with gradients."""
    params = [nn.Parameter(torch.linspace(-1, 1, 6).to(dtype)) for dtype in dtypes or (torch.float32,) * 2]
    for param in params:
        param.grad = torch.linspace(0.5, -0.5, 6).to(param.dtype)
    return params


def contents(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A copy of all parameters, state and hyperparameters."""
    found: dict[str, Any] = {"groups": [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]}
    index = 0
    for group in optimizer.param_groups:
        for param in group["params"]:
            for key, value in {"param": param, **(optimizer.state.get(param) or {})}.items():
                if not isinstance(value, Tensor):
                    found[f"{index} {key}"] = value
                elif value.device.type != "meta" and value.dtype != torch.float8_e4m3fn:
                    found[f"{index} {key}"] = value.detach().clone()
            index += 1
    return found


def assert_unchanged(optimizer: torch.optim.Optimizer, before: dict[str, Any]) -> None:
    now = contents(optimizer)
    assert now.keys() == before.keys()
    for key, value in now.items():
        if isinstance(value, Tensor) and isinstance(before[key], Tensor):
            assert_same_bits(value, before[key], key)
        else:
            assert repr(value) == repr(before[key]), key


REMEDY = r"\b(Clear|Convert|Hold|Leave|Let|Load|Materialize|Move|Pass|Restore|Use|delete|use)\b"


def assert_says(error: BaseException, *parts: str, remedy: str = REMEDY) -> None:
    """The four parts of a message: who, what was got, what was expected, and the remedy."""
    text = str(error)
    assert text.startswith("pyshard"), text
    _, expected, after = text.partition("expected" if "expected" in text else "it serves")
    assert expected, text
    assert re.search(remedy, after), f"no remedy: {text}"
    for part in parts:
        assert part in text, f"{part!r} is not in: {text}"


# ---- hyperparameters: at construction, in a group, and changed later ----

BAD_HYPERPARAMETERS: list[tuple[str, Any, str]] = [
    *(("lr", value, "lr=") for value in (-1e-3, NAN, INF, "1e-3", None, [1e-3], 1j)),
    *(("lr", torch.tensor(value), "lr=") for value in (-1.0, NAN, INF, [1.0, 2.0], 1j)),
    *(("eps", value, "eps=") for value in (-1e-8, NAN, INF, "1e-8", None)),
    *(("weight_decay", value, "weight_decay=") for value in (-0.1, NAN, INF, "0.1", None)),
    *(("betas", value, "betas=") for value in (None, 0.9, "ab", (), (0.9,), (0.9, 0.99, 0.999))),
    *(("betas", (value, 0.999), "betas[0]=") for value in (-0.1, 1.0, 1.5, NAN, "0.9", None)),
    *(("betas", (0.9, value), "betas[1]=") for value in (-0.1, 1.0, INF, NAN, "0.9", torch.tensor(1.0))),
    ("differentiable", True, "differentiable=True"),
]
HYPERPARAMETER_IDS = [f"{name}={value!r}".replace("tensor", "T") for name, value, _ in BAD_HYPERPARAMETERS]


@pytest.mark.parametrize("cls", [pyshard.AdamW, pyshard.Adam])
@pytest.mark.parametrize("name, value, part", BAD_HYPERPARAMETERS, ids=HYPERPARAMETER_IDS)
def test_bad_hyperparameters(cls: type[pyshard.Adam], name: str, value: Any, part: str) -> None:
    with pytest.raises(ValueError) as error:
        cls(model(), **{name: value})
    assert_says(error.value, f"pyshard.{cls.__name__}: ", part, remedy="")

    with pytest.raises(ValueError) as error:
        cls([{"params": model(), name: value}])
    assert_says(error.value, part, remedy="")

    optimizer = cls(model())
    optimizer.step()
    before = contents(optimizer)
    with pytest.raises(ValueError) as error:
        optimizer.add_param_group({"params": model(), name: value})
    assert_says(error.value, part, remedy="")
    assert_unchanged(optimizer, before)

    optimizer.param_groups[0][name] = value
    before = contents(optimizer)
    with pytest.raises(ValueError) as error:
        optimizer.step()
    assert_says(error.value, part, remedy="")
    assert_unchanged(optimizer, before)

    fresh = cls(model())
    fresh.param_groups[0][name] = value
    with pytest.raises(ValueError):
        fresh.step()
    assert not fresh.state, "an error before the first step leaves no state"


def test_lr_tensor_changed_in_place_to_nan() -> None:
    lr = torch.tensor(1e-3)
    optimizer = pyshard.AdamW(model(), lr=lr)
    optimizer.step()
    before = contents(optimizer)
    lr.fill_(NAN)
    before["groups"][0]["lr"] = lr
    with pytest.raises(ValueError) as error:
        optimizer.step()
    assert_says(error.value, "lr=tensor(nan)", remedy="")
    assert_unchanged(optimizer, before)


BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"master_weights": "half"}, ValueError, "master_weights='half'"),
    ({"master_weights": None}, ValueError, "master_weights=None"),
    ({"moments": "int8"}, ValueError, "not built yet"),
    ({"moments": "bf16"}, ValueError, "moments='bf16'"),
    ({"nonfinite": "ignore"}, ValueError, "nonfinite='ignore'"),
    ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm=0.0"),
    ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm=-1.0"),
    ({"max_grad_norm": NAN}, ValueError, "max_grad_norm=nan"),
    ({"max_grad_norm": "1"}, ValueError, "max_grad_norm='1'"),
    ({"backend": "cudnn"}, ValueError, "'cudnn'"),
    ({"fused": True, "foreach": True}, RuntimeError, "fused=True and foreach=True"),
]


@pytest.mark.parametrize("options, kind, part", BAD_OPTIONS, ids=[str(o[0]) for o in BAD_OPTIONS])
def test_bad_options(options: dict[str, Any], kind: type[Exception], part: str) -> None:
    with pytest.raises(kind) as error:
        pyshard.AdamW(model(), **options)
    assert_says(error.value, part, remedy="")


def test_unknown_argument() -> None:
    with pytest.raises(TypeError, match="learning_rate"):
        pyshard.AdamW(model(), learning_rate=1e-3)  # type: ignore[call-arg]


@pytest.mark.parametrize("option", ["master_weights", "moments", "nonfinite", "max_grad_norm", "backend"])
def test_options_of_the_optimizer_in_a_group(option: str) -> None:
    with pytest.raises(ValueError) as error:
        pyshard.AdamW([{"params": model(), option: "auto"}])
    assert_says(error.value, option)


def test_missing_backend() -> None:
    optimizer = pyshard.AdamW(model(), backend="cuda")
    before = contents(optimizer)
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    assert_says(error.value, "'cuda'", "cpu", "Use backend='auto' or one of: cpu")
    assert_unchanged(optimizer, before)


def test_backend_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSHARD_BACKEND", "gpu")
    with pytest.raises(ValueError, match="PYSHARD_BACKEND 'gpu'"):
        pyshard.AdamW(model())


# ---- parameters, gradients and state: at the first step, and when swapped under a running optimizer ----


class Case(NamedTuple):
    """Spoils the second parameter of an optimizer, before its first step or after it."""

    spoil: Callable[[pyshard.AdamW, list[nn.Parameter]], None]
    kind: type[Exception]
    parts: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float32)
    options: dict[str, Any] = {}  # noqa: RUF012
    moments: tuple[bool, ...] = (False, True)  # spoiled before the first step, or after one


def set_grad(make: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def spoil(_: Any, params: list[nn.Parameter]) -> None:
        params[1].grad = make(params[1].detach())

    return spoil


def set_grad_data(make: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def spoil(_: Any, params: list[nn.Parameter]) -> None:
        assert params[1].grad is not None
        params[1].grad.data = make(params[1].grad.data)

    return spoil


def set_data(make: Callable[[Tensor], Tensor], grad: bool = True) -> Callable[..., None]:
    """Changes the parameter, and its gradient alike."""

    def spoil(_: Any, params: list[nn.Parameter]) -> None:
        params[1].grad = None
        params[1].data = make(params[1].detach())
        params[1].grad = torch.zeros_like(params[1]) if grad else None

    return spoil


def to_meta(optimizer: pyshard.AdamW, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["params"][1] = param = nn.Parameter(torch.empty(6, device="meta"))
    param.grad = torch.empty(6, device="meta")


def set_state(key: str, make: Callable[[Tensor], Any]) -> Callable[..., None]:
    def spoil(optimizer: pyshard.AdamW, params: list[nn.Parameter]) -> None:
        state = optimizer.state[params[1]]
        state[key] = make(state[key])

    return spoil


def drop_state(key: str) -> Callable[..., None]:
    def spoil(optimizer: pyshard.AdamW, params: list[nn.Parameter]) -> None:
        del optimizer.state[params[1]][key]

    return spoil


def share(name: str) -> Callable[..., None]:
    """Makes two things one memory."""

    def spoil(optimizer: pyshard.AdamW, params: list[nn.Parameter]) -> None:
        a, b = params
        if name == "params":
            b.data = a.data
        elif name == "views of one storage":
            memory = torch.zeros(9)
            a.data, b.data = memory[:6], memory[3:]
        elif name == "param and its gradient":
            b.grad = b.data
        elif name == "param and another's gradient":
            b.grad = a.data
        elif name == "gradient and moment":
            b.grad = optimizer.state[b]["exp_avg"]
        elif name == "moments":
            optimizer.state[b]["exp_avg"] = optimizer.state[a]["exp_avg"]
        elif name == "two moments of one":
            optimizer.state[b]["exp_avg"] = optimizer.state[b]["exp_avg_sq"]
        elif name == "step counts":
            optimizer.state[b]["step"] = optimizer.state[a]["step"]
        else:
            raise AssertionError(name)

    return spoil


BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LATER = (True,)  # there is no state before the first step

CASES: dict[str, Case] = {
    "complex param": Case(set_data(lambda p: p.to(torch.complex64)), TypeError, ("complex", "view_as_real")),
    "float8 param": Case(
        set_data(lambda p: p.to(torch.float8_e4m3fn), grad=False), TypeError, ("float8_e4m3fn",), moments=LATER
    ),
    "meta param": Case(to_meta, ValueError, ("meta", "to_empty")),
    "expanded param": Case(set_data(lambda p: p[:1].expand(6)), ValueError, ("share memory", "contiguous()")),
    "overlapping strides": Case(
        set_data(lambda p: torch.as_strided(p.clone(), (2, 3), (1, 1))), ValueError, ("share", "(2, 3)", "(1, 1)")
    ),
    "sparse gradient": Case(set_grad(lambda p: torch.ones(6).to_sparse()), RuntimeError, ("sparse", "SparseAdam")),
    "fp64 gradient of fp32": Case(set_grad_data(lambda g: g.double()), ValueError, ("float64", "float32")),
    "bf16 gradient of fp32": Case(set_grad_data(lambda g: g.to(BF16)), ValueError, ("bfloat16", "float32")),
    "fp16 gradient of bf16": Case(
        set_grad_data(lambda g: g.to(F16)), ValueError, ("float16 gradient", "bfloat16 or float32"), (BF16, BF16)
    ),
    "fp64 gradient of bf16": Case(set_grad_data(lambda g: g.to(F64)), ValueError, ("float64 gradient",), (BF16, BF16)),
    "bf16 gradient of fp64": Case(set_grad_data(lambda g: g.to(BF16)), ValueError, ("bfloat16 grad",), (F64, F64)),
    "complex gradient": Case(set_grad_data(lambda g: g.to(torch.complex64)), ValueError, ("complex64 gradient",)),
    "int gradient": Case(set_grad_data(lambda g: g.to(torch.int32)), ValueError, ("int32 gradient",)),
    "gradient without memory": Case(set_grad(lambda p: torch._efficientzerotensor(6)), ValueError, ("without memory",)),
    "wrapper as gradient": Case(
        set_grad(lambda p: TwoTensor(torch.ones(6), torch.ones(6))), ValueError, ("TwoTensor", "without memory")
    ),
    "gradient that negates": Case(
        set_grad(lambda p: torch._neg_view(torch.ones(6))), ValueError, ("negates", "resolve_neg()"), moments=(False,)
    ),
    "param that negates": Case(set_data(torch._neg_view), ValueError, ("negates", "resolve_neg()"), moments=(False,)),
    "short gradient": Case(set_grad_data(lambda g: g[:5]), ValueError, ("(6,)", "(5,)", "zero_grad")),
    "long gradient": Case(set_grad_data(lambda g: torch.zeros(7)), ValueError, ("(6,)", "(7,)")),
    "reshaped gradient": Case(set_grad_data(lambda g: g.view(2, 3)), ValueError, ("(6,)", "(2, 3)")),
    "split for fp16": Case(
        lambda *_: None,
        ValueError,
        ("float16", "master_weights='split'"),
        (F32, F16),
        {"master_weights": "split"},
        moments=(False,),
    ),
    "fp64 on the C++ kernels": Case(
        lambda *_: None,
        RuntimeError,
        ("'cpu'", "float64", "reference"),
        (F32, F64),
        {"backend": "cpu"},
        moments=(False,),
    ),
    "param as long as before, moments not": Case(
        set_data(lambda p: torch.zeros(7)), ValueError, ("exp_avg", "(6,)", "(7,)", "start afresh"), moments=LATER
    ),
    "param of another dtype": Case(
        set_data(lambda p: p.double()), ValueError, ("exp_avg", "float32", "float64"), moments=LATER
    ),
    "short moment": Case(set_state("exp_avg", lambda m: m[:5]), ValueError, ("exp_avg", "(5,)"), moments=LATER),
    "bf16 moment": Case(set_state("exp_avg_sq", lambda m: m.to(BF16)), ValueError, ("exp_avg_sq",), moments=LATER),
    "moment on another device": Case(
        set_state("exp_avg", lambda m: m.to("meta")), ValueError, ("exp_avg", "meta", "Move"), moments=LATER
    ),
    "moment that is no tensor": Case(set_state("exp_avg", lambda m: 0.0), ValueError, ("is float",), moments=LATER),
    "no first moment": Case(drop_state("exp_avg"), ValueError, ("step and exp_avg_sq only",), moments=LATER),
    "no step count": Case(drop_state("step"), ValueError, ("exp_avg and exp_avg_sq only",), moments=LATER),
    "step count -1": Case(set_state("step", lambda s: torch.tensor(-1.0)), ValueError, ("step count",), moments=LATER),
    "step count 1.5": Case(set_state("step", lambda s: torch.tensor(1.5)), ValueError, ("1.5",), moments=LATER),
    "step count NaN": Case(set_state("step", lambda s: torch.tensor(NAN)), ValueError, ("nan",), moments=LATER),
    "two step counts": Case(set_state("step", lambda s: torch.ones(2)), ValueError, ("step count",), moments=LATER),
    "remainder of fp32": Case(
        set_state("remainder", lambda r: r.float()), ValueError, ("remainder", "int16"), (BF16, BF16), moments=LATER
    ),
    "short master": Case(
        set_state("master", lambda m: m[:3]), ValueError, ("master", "(3,)"), (F16, F16), moments=LATER
    ),
    **{
        f"shared: {name}": Case(share(name), ValueError, ("share memory", "clone()"), moments=when)
        for name, when in {
            "params": (False, True),
            "views of one storage": (False, True),
            "param and its gradient": (False, True),
            "param and another's gradient": (False, True),
            "gradient and moment": LATER,
            "moments": LATER,
            "two moments of one": LATER,
            "step counts": LATER,
        }.items()
    },
}


@pytest.mark.parametrize("name, after_a_step", [(name, when) for name, case in CASES.items() for when in case.moments])
def test_bad_tensors(name: str, after_a_step: bool) -> None:
    case = CASES[name]
    params = model(*case.dtypes)
    optimizer = pyshard.AdamW(params, **case.options)
    if after_a_step:
        optimizer.step()
    case.spoil(optimizer, params)
    before = contents(optimizer)
    for _ in range(2):  # the second time as the first
        with pytest.raises(case.kind) as error:
            optimizer.step()
        assert_says(error.value, *case.parts) if "cannot serve" not in case.parts[0] else None
        for part in case.parts:
            assert part in str(error.value)
        assert_unchanged(optimizer, before)


def test_errors_name_the_parameter() -> None:
    layer = nn.Linear(2, 2, dtype=torch.bfloat16)
    optimizer = pyshard.AdamW(layer.named_parameters())
    layer.weight.grad = torch.zeros(2, 2, dtype=torch.bfloat16)
    layer.bias.grad = torch.zeros(2, dtype=torch.bfloat16)
    layer.bias.grad.data = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^pyshard.AdamW: parameter 1 \(bias\) has a float64 gradient for a bfloat16"):
        optimizer.step()


def test_interleaved_parameters_are_fine() -> None:
    """Two parameters whose address ranges meet but whose elements do not."""
    memory = torch.linspace(-1, 1, 12)
    params = [nn.Parameter(memory[0::2]), nn.Parameter(memory[1::2])]
    params = [nn.Parameter(p.detach()) for p in params]
    for param, view in zip(params, (memory[0::2], memory[1::2])):
        param.data = view
        param.grad = torch.linspace(0.5, -0.5, 6)
    alone = model()
    for param, view in zip(alone, (memory[0::2], memory[1::2])):
        param.data = view.clone()
    for group in (params, alone):
        optimizer = pyshard.AdamW(group)
        for _ in range(3):
            optimizer.step()
    assert_same_bits(torch.stack([p.detach() for p in params]), torch.stack([p.detach() for p in alone]))


def test_interleaved_tensors_of_two_widths() -> None:
    """A bf16 parameter in the gaps of an fp32 one, and one that meets it by two bytes."""
    memory = torch.zeros(12)
    halves = memory.view(BF16)
    for offset, fine in ((2, True), (3, True), (1, False)):
        wide, low = nn.Parameter(memory[0::2]), nn.Parameter(halves[offset::4])
        for param in (wide, low):
            param.data, param.grad = param.detach(), torch.zeros_like(param)
        optimizer = pyshard.AdamW([wide, low])
        if fine:
            optimizer.step()
        else:
            with pytest.raises(ValueError, match="share memory"):
                optimizer.step()


def test_parameter_twice() -> None:
    """torch warns and updates it twice; here it is an error, as torch announces."""
    (param,) = model(F32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = pyshard.AdamW([param, param])
    with pytest.raises(ValueError) as error:
        optimizer.step()
    assert_says(error.value, "parameter 0 and parameter 1 share memory", "tied")


def test_bad_gradient_of_a_working_optimizer_then_a_good_one() -> None:
    """After the error is mended, training goes on as if it had not been."""
    params, twins = model(), model()
    optimizer, twin = pyshard.AdamW(params), pyshard.AdamW(twins)
    optimizer.step(), twin.step()
    good = params[1].grad
    params[1].grad = torch.ones(6).to_sparse()
    with pytest.raises(RuntimeError):
        optimizer.step()
    params[1].grad = good
    optimizer.step(), twin.step()
    assert_unchanged(optimizer, contents(twin))


# ---- loading ----


def saved(*dtypes: torch.dtype, **options: Any) -> dict[str, Any]:
    optimizer = pyshard.AdamW(model(*dtypes), **options)
    optimizer.step()
    return optimizer.state_dict()


BAD_STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], tuple[str, ...]]] = {
    "short moment": (lambda s: s.update(exp_avg=torch.zeros(5)), ("exp_avg", "(5,)", "(6,)")),
    "long master": (lambda s: s.update(master=torch.zeros(7)), ("master", "(7,)", "(6,)")),
    "integer moment": (lambda s: s.update(exp_avg_sq=torch.zeros(6, dtype=torch.uint8)), ("uint8",)),
    "complex moment": (lambda s: s.update(exp_avg=torch.zeros(6, dtype=torch.complex64)), ("complex64",)),
    "moment that is a list": (lambda s: s.update(exp_avg=[0.0] * 6), ("list",)),
    "no second moment": (lambda s: s.pop("exp_avg_sq"), ("step and exp_avg only",)),
    "state of SGD": (lambda s: (s.clear(), s.update(momentum_buffer=torch.zeros(6))), ("momentum_buffer", "AdamW")),
    "step count -3": (lambda s: s.update(step=-3), ("-3",)),
    "step count of text": (lambda s: s.update(step="4"), ("'4'",)),
    "step count 0.5": (lambda s: s.update(step=torch.tensor(0.5)), ("0.5",)),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_bad_state_dict(name: str) -> None:
    spoil, parts = BAD_STATES[name]
    loaded = saved(BF16, BF16)
    loaded["state"][1] = dict(loaded["state"][1])
    spoil(loaded["state"][1])
    optimizer = pyshard.AdamW(model(BF16, BF16), lr=0.5)
    optimizer.step()
    before = contents(optimizer)
    with pytest.raises(ValueError) as error:
        optimizer.load_state_dict(loaded)
    assert_says(error.value, "load_state_dict: ", "parameter 1", *parts)
    assert_unchanged(optimizer, before)
    optimizer.step()


def test_state_dict_of_another_number_of_parameters() -> None:
    optimizer = pyshard.AdamW(model())
    before = contents(optimizer)
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(saved(F32, F32, F32))
    assert_unchanged(optimizer, before)


# ---- torch and the compiled module ----


def in_a_new_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("version", ["2.10.2", "2.4.0+cu121", "1.13.1"])
def test_too_old_torch(version: str) -> None:
    done = in_a_new_process(f"import torch; torch.__version__ = {version!r}; import pyshard")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: pyshard"), done.stderr
    assert version in last and "expected 2.11 or newer" in last and "pip install" in last


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "3.0.0a0+git1234567"])
def test_new_enough_torch(version: str) -> None:
    done = in_a_new_process(f"import torch; torch.__version__ = {version!r}; import pyshard; print(pyshard.AdamW)")
    assert done.returncode == 0, done.stderr


def test_memory_that_runs_out_while_state_is_made_loses_no_master(monkeypatch: pytest.MonkeyPatch) -> None:
    params = model(torch.bfloat16, torch.bfloat16)
    source = pyshard.AdamW(params)
    source.step()
    optimizer = pyshard.AdamW(params)
    optimizer.load_state_dict(source.state_dict())  # holds fp32 masters until the first step
    before = contents(optimizer)
    made = torch.zeros_like
    calls = 0

    def scarce(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("out of memory")
        return made(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros_like", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert_unchanged(optimizer, before)
    monkeypatch.setattr(torch, "zeros_like", made)
    optimizer.step()
    source.step()


def test_parameters_of_inference_mode() -> None:
    """Outside of inference mode torch refuses to change them; inside, a step is as any other."""
    with torch.inference_mode():
        param, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        param.grad, other.grad = torch.ones(3), torch.ones(3)
        pyshard.AdamW([other], lr=0.1, weight_decay=0.0).step()
        # The first step of Adam is lr against the gradient's sign, but for eps and a rounding.
        assert (other - 0.9).abs().max() < 1e-6
    optimizer = pyshard.AdamW([param], lr=0.1)
    with pytest.raises(RuntimeError) as raised:
        optimizer.step()
    assert_says(raised.value, "parameter 0", "inference_mode()")
    assert param.tolist() == [1.0, 1.0, 1.0] and not optimizer.state


def test_a_wrapper_as_a_parameter() -> None:
    inner = torch.ones(3), torch.ones(3)
    param = nn.Parameter(TwoTensor(*inner))
    param.grad = TwoTensor(torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError) as raised:
        pyshard.AdamW([param]).step()
    assert_says(raised.value, "parameter 0", "without memory")
    assert all(x.tolist() == [1.0, 1.0, 1.0] for x in inner)

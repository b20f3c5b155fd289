"""torch.ops.pyshard.*: opcheck, torch.compile and gradients give what the plain functions give."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import pyshard.kernels as kernels


@pytest.fixture
def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _adam_inputs(dtype: torch.dtype, low: torch.dtype | None, gen: torch.Generator) -> dict[str, list[torch.Tensor]]:
    shapes = [(5,), (3, 7), (0,)]
    params = [torch.randn(s, generator=gen).to(dtype) for s in shapes]
    moment = torch.float64 if dtype == torch.float64 else torch.float32
    lows = (
        [] if low is None else [(p.float() if low == torch.float32 else torch.zeros_like(p, dtype=low)) for p in params]
    )
    return {
        "params": params,
        "grads": [torch.randn(s, generator=gen).to(dtype) for s in shapes],
        "exp_avgs": [torch.randn(s, generator=gen).to(moment) for s in shapes],
        "exp_avg_sqs": [torch.rand(s, generator=gen).to(moment) for s in shapes],
        "max_exp_avg_sqs": [torch.rand(s, generator=gen).to(moment) for s in shapes],
        "lows": lows,
    }


FORMATS = [
    (torch.float32, None),
    (torch.bfloat16, torch.int16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, None),
    (torch.float64, None),
]


def _call(op: object, inputs: dict[str, list[torch.Tensor]], backend: str) -> None:
    op(  # type: ignore[operator]
        *inputs.values(), torch.tensor(3.0), torch.tensor(1e-2), weight_decay=0.1, maximize=True, grad_scale=0.5,
        backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize(("dtype", "low"), FORMATS)
def test_adam_op_passes_opcheck(dtype: torch.dtype, low: torch.dtype | None, gen: torch.Generator) -> None:
    inputs = _adam_inputs(dtype, low, gen)
    args = (*inputs.values(), torch.tensor(3.0), torch.tensor(1e-2))
    torch.library.opcheck(torch.ops.pyshard.adam_.default, args)


@pytest.mark.parametrize(("dtype", "low"), FORMATS)
def test_adam_op_equals_the_reference_bit_for_bit(
    dtype: torch.dtype, low: torch.dtype | None, gen: torch.Generator
) -> None:
    inputs = _adam_inputs(dtype, low, gen)
    copy = {name: [t.clone() for t in tensors] for name, tensors in inputs.items()}
    _call(torch.ops.pyshard.adam_, inputs, "auto")
    _call(kernels.adam_, copy, "reference")
    for name in inputs:
        for a, b in zip(inputs[name], copy[name], strict=True):
            assert torch.equal(a, b), name


def test_functions_pass_opcheck(gen: torch.Generator) -> None:
    x = torch.randn(6, 5, generator=gen)
    high, low = kernels.split(x)
    torch.library.opcheck(torch.ops.pyshard.cast.default, (x.clone().requires_grad_(), torch.bfloat16))
    torch.library.opcheck(torch.ops.pyshard.split.default, (x.t(),))
    torch.library.opcheck(torch.ops.pyshard.join.default, (high, low))
    torch.library.opcheck(torch.ops.pyshard.grad_norm.default, ([x, high],))


def test_cast_is_differentiable_as_to_is(gen: torch.Generator) -> None:
    x = torch.randn(9, generator=gen, requires_grad=True)
    y = torch.ops.pyshard.cast(x, torch.bfloat16)
    (y.float() * torch.arange(9.0)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.arange(9.0))
    assert torch.equal(y, x.detach().to(torch.bfloat16))


def test_a_compiled_function_with_the_ops_gives_the_same_bits(gen: torch.Generator) -> None:
    def step(params, grads, m, v, step, lr):  # type: ignore[no-untyped-def]
        norm, nonfinite = torch.ops.pyshard.grad_norm(grads)
        torch.ops.pyshard.adam_(params, [g * 2 for g in grads], m, v, [], [], step, lr)
        return norm, nonfinite, torch.ops.pyshard.cast(params[0], torch.bfloat16)

    def tensors() -> tuple[list[torch.Tensor], ...]:
        g = torch.Generator().manual_seed(1)
        return tuple([torch.rand(s, generator=g) for s in ((7,), (4, 4))] for _ in range(4))

    eager, compiled = tensors(), tensors()
    expected = step(*eager, torch.tensor(1.0), torch.tensor(0.1))
    # One backend that only captures the graph, so that no compiler's arithmetic enters.
    result = torch.compile(step, backend="aot_eager", fullgraph=True)(*compiled, torch.tensor(1.0), torch.tensor(0.1))
    for a, b in zip(expected, result, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(eager, compiled, strict=True):
        assert all(map(torch.equal, a, b))


def test_fake_tensors_know_shapes_and_dtypes() -> None:
    with FakeTensorMode():
        x = torch.empty(4, 6)
        high, low = torch.ops.pyshard.split(x)
        assert (high.dtype, low.dtype, high.shape) == (torch.bfloat16, torch.int16, x.shape)
        assert torch.ops.pyshard.join(high, low).dtype == torch.float32
        norm, nonfinite = torch.ops.pyshard.grad_norm([x])
        assert (norm.dtype, nonfinite.dtype, norm.shape) == (torch.float64, torch.bool, ())


FAKE = FakeTensorMode()

BAD = [
    ("as many of each", lambda i: i["grads"].pop()),
    ("gradient of shape", lambda i: i["grads"].__setitem__(0, torch.zeros(6))),
    ("share memory", lambda i: i["exp_avgs"].__setitem__(0, i["exp_avg_sqs"][0])),
    ("expected torch.float32", lambda i: i["exp_avgs"].__setitem__(1, i["exp_avgs"][1].double())),
    ("expected a contiguous tensor", lambda i: i["params"].__setitem__(1, torch.zeros(7, 3).t())),
    (
        "expected int16 or",
        lambda i: i["lows"].extend(torch.zeros_like(p, dtype=torch.int16) for p in i["params"]),
    ),
]

for _name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"):
    BAD += [
        ("without memory", lambda i, name=_name: i[name].__setitem__(1, TwoTensor(i[name][1], i[name][1]))),
        ("came under a FakeTensorMode", lambda i, name=_name: i[name].__setitem__(1, FAKE.from_tensor(i[name][1]))),
        ("negates what is in memory", lambda i, name=_name: i[name].__setitem__(1, torch._neg_view(i[name][1]))),
        (f"item 1 of {_name} is int; expected a tensor", lambda i, name=_name: i[name].__setitem__(1, 1)),
        (f"{_name} is Tensor; expected a list", lambda i, name=_name: i.__setitem__(name, torch.ones(3, 7))),
        (f"{_name} is NoneType; expected a list", lambda i, name=_name: i.__setitem__(name, None)),
    ]


@pytest.mark.parametrize(("message", "spoil"), BAD)
def test_bad_lists_are_refused_and_nothing_changes(message, spoil, gen: torch.Generator) -> None:  # type: ignore[no-untyped-def]
    inputs = _adam_inputs(torch.float32, None, gen)
    spoil(inputs)
    plain = [t for x in inputs.values() if isinstance(x, list) for t in x if type(t) is torch.Tensor]
    before = [t.clone() for t in plain]
    with pytest.raises((ValueError, TypeError), match=f"^pyshard.adam_: .*{re.escape(message)}"):
        _call(kernels.adam_, inputs, "auto")
    assert all(map(torch.equal, before, plain))


@pytest.mark.parametrize(("name", "value"), [("lr", -1.0), ("lr", float("nan")), ("step", 0.0), ("step", 1e300)])
def test_bad_scalars_are_refused(name: str, value: float, gen: torch.Generator) -> None:
    inputs = _adam_inputs(torch.float32, None, gen)
    scalars = {
        "step": torch.tensor(1.0),
        "lr": torch.tensor(0.1),
        name: torch.tensor(value, dtype=torch.float64),
    }
    with pytest.raises(ValueError, match=rf"pyshard.adam_: {name}="):
        kernels.adam_(*inputs.values(), scalars["step"], scalars["lr"])


@pytest.mark.parametrize(
    ("name", "value", "got"),
    [
        *((name, "x", "'x'") for name in ("beta1", "beta2", "eps", "weight_decay", "grad_scale", "lr", "step")),
        *((name, None, "None") for name in ("beta1", "grad_scale", "lr", "step")),
        ("beta1", True, "True"),
        ("beta1", torch.tensor(0.9), "torch.float32 ()"),
        ("lr", torch.ones(2), "torch.float32 (2,)"),
        ("step", torch.tensor(1j), "torch.complex64 ()"),
        ("step", 1.5, "1.5; expected a whole number"),
        ("step", torch.tensor(2.5), "2.5; expected a whole number"),
        ("beta2", 1.0, "1.0; expected a number in [0, 1)"),
        ("eps", float("inf"), "inf; expected a number in [0, inf)"),
    ],
)
def test_what_is_no_number(name: str, value: object, got: str, gen: torch.Generator) -> None:
    inputs = _adam_inputs(torch.float32, None, gen)
    before = [t.clone() for t in inputs["params"]]
    scalars = {"step": 1, "lr": 0.1, name: value}
    with pytest.raises(
        (TypeError, ValueError), match=rf"^pyshard\.adam_: {name}={re.escape(got)}.*\. (Convert|Pass)"
    ) as error:
        kernels.adam_(*inputs.values(), **scalars)  # type: ignore[arg-type]
    assert "; expected" in str(error.value)
    assert all(map(torch.equal, before, inputs["params"]))


def test_numbers_do_as_well_as_tensors(gen: torch.Generator) -> None:
    inputs = _adam_inputs(torch.float32, None, gen)
    copy = {name: [t.clone() for t in tensors] for name, tensors in inputs.items()}
    kernels.adam_(*inputs.values(), 3, 0.125)
    kernels.adam_(*copy.values(), torch.tensor([3]), torch.tensor(0.125))
    for name in inputs:
        assert all(map(torch.equal, inputs[name], copy[name])), name


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("written", ["params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "lows"])
def test_backward_through_what_was_there_before_is_refused(written: str, backend: str, gen: torch.Generator) -> None:
    inputs = _adam_inputs(torch.bfloat16, torch.float32, gen)
    x = torch.ones(5, dtype=inputs[written][0].dtype, requires_grad=True)
    y = (x * inputs[written][0]).sum()
    _call(kernels.adam_, inputs, backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("call", [kernels.adam_, torch.ops.pyshard.adam_], ids=["function", "operator"])
def test_backward_through_a_parameter_after_the_step_is_refused(call: object, gen: torch.Generator) -> None:
    inputs = _adam_inputs(torch.float32, None, gen)
    param = inputs["params"][0].requires_grad_()
    y = (param * param).sum()
    with torch.no_grad():
        _call(call, inputs, "auto")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()

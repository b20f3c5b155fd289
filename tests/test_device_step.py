"""A whole optimizer step through kernels/device.py: the Triton kernels in the interpreter and the CUDA bodies on the
host, held to the CPU backend bit for bit."""

import itertools

import host_run
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyshard
from pyshard.kernels import grad_norm
from pyshard.kernels.registry import BACKENDS, Backend

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["triton", "cuda-on-host"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device backend that takes CPU tensors."""
    if request.param == "cuda-on-host":
        entry = Backend("cuda-on-host", ("cpu",), FLOATS, host_run.__name__, on_device=True)
        monkeypatch.setitem(BACKENDS, entry.name, entry)
        monkeypatch.setattr("pyshard.kernels.registry.CHOICES", ("auto", *BACKENDS))
    reason = BACKENDS[request.param].why_not("cpu", torch.float32)
    assert reason is None, reason
    return str(request.param)


def _params(gen: torch.Generator) -> list[torch.nn.Parameter]:
    shapes = [(3, 5), (1025,), (0,), (4100,), ()]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16, torch.float16]
    params = [torch.nn.Parameter(torch.randn(s, generator=gen).to(d)) for s, d in zip(shapes, dtypes, strict=True)]
    return [*params, torch.nn.Parameter(torch.randn(4, 6, generator=gen).t())]


def _twins(backend: str, gen: torch.Generator, **options: object) -> tuple[pyshard.Adam, pyshard.Adam]:
    made = []
    first = _params(gen)
    for name, params in ((backend, first), ("cpu", [torch.nn.Parameter(p.detach().clone()) for p in first])):
        groups = [{"params": params[:2], "lr": 0.02}, {"params": params[2:], "betas": (0.8, 0.95), "amsgrad": True}]
        made.append(pyshard.Adam(groups, weight_decay=0.1, backend=name, **options))  # type: ignore[arg-type]
    return made[0], made[1]


def _all(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for g in optimizer.param_groups for p in g["params"]]


def _give_grads(a: torch.optim.Optimizer, b: torch.optim.Optimizer, gen: torch.Generator, scale: float = 1.0) -> None:
    for p, q in zip(_all(a), _all(b), strict=True):
        grad = torch.randn(p.shape, generator=gen) * scale
        p.grad = grad.to(p.dtype)
        q.grad = p.grad.clone()


def _assert_equal(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    for i, (p, q) in enumerate(zip(_all(a), _all(b), strict=True)):
        assert torch.equal(p, q), f"parameter {i}"
        assert a.state[p].keys() == b.state[q].keys()
        for key in a.state[p]:
            assert torch.equal(a.state[p][key], b.state[q][key]), f"{key} of parameter {i}"


@pytest.fixture
def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("capturable", "max_norm"), list(itertools.product([False, True], [None, 0.5])))
def test_steps_give_the_bits_of_the_cpu_backend(
    backend: str, capturable: bool, max_norm: float | None, gen: torch.Generator
) -> None:
    a, b = _twins(backend, gen, capturable=capturable, max_grad_norm=max_norm)
    for i in range(3):
        _give_grads(a, b, gen)
        if i == 1:
            _all(a)[0].grad = _all(b)[0].grad = None
        a.step()
        b.step()
        _assert_equal(a, b)
        if max_norm is not None:
            assert torch.equal(a.grad_norm, b.grad_norm)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_nonfinite_gradient_skips_the_step(backend: str, capturable: bool, gen: torch.Generator) -> None:
    a, b = _twins(backend, gen, capturable=capturable, nonfinite="skip")
    for bad in (False, True, False):
        _give_grads(a, b, gen)
        if bad:
            grad = _all(a)[1].grad
            assert grad is not None
            grad[7] = float("inf")
            a.step()
            continue
        a.step()
        b.step()
        _assert_equal(a, b)
    assert a.skipped_steps == 1


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_skipped_step_leaves_its_norm(backend: str, capturable: bool, bad: float, gen: torch.Generator) -> None:
    a, b = _twins(backend, gen, capturable=capturable, nonfinite="skip")
    for value in (1.0, bad):
        _give_grads(a, b, gen)
        for optimizer in (a, b):
            grad = _all(optimizer)[1].grad
            assert grad is not None
            grad[7] = value
            optimizer.step()
    assert torch.equal(a.grad_norm.isnan(), b.grad_norm.isnan())
    assert a.grad_norm.isnan() == (bad != bad)
    assert a.grad_norm.isinf() == (bad == bad)


@pytest.mark.parametrize("capturable", [False, True])
def test_the_norm_of_no_gradients_is_zero(backend: str, capturable: bool, gen: torch.Generator) -> None:
    a, b = _twins(backend, gen, capturable=capturable, max_grad_norm=1.0)
    _give_grads(a, b, gen)
    a.step()
    assert a.grad_norm > 0.0
    before = [p.detach().clone() for p in _all(a)]
    a.zero_grad()
    a.step()
    assert a.grad_norm == 0.0
    assert all(torch.equal(p, q) for p, q in zip(_all(a), before, strict=True))


def test_capturable_cannot_raise(backend: str, gen: torch.Generator) -> None:
    a, b = _twins(backend, gen, capturable=True, nonfinite="raise")
    _give_grads(a, b, gen)
    with pytest.raises(ValueError, match=r"nonfinite='raise' with capturable=True for parameter 0 .* nonfinite='skip'"):
        a.step()
    assert not a.state
    assert all(torch.equal(p, q) for p, q in zip(_all(a), _all(b), strict=True))


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Whether steps believe that a CUDA graph captures them. On the CPU they run all the same; that graphs replay
    what was captured is in test_gpu_step.py."""
    now = {"on": False}
    monkeypatch.setattr("pyshard.kernels.device._capturing", lambda device: now["on"])
    return now


@pytest.mark.parametrize("clip", [False, True])
def test_capture_of_a_step_that_counts_on_the_host_is_refused(
    backend: str, capture: dict[str, bool], clip: bool, gen: torch.Generator
) -> None:
    a, b = _twins(backend, gen, max_grad_norm=1.0 if clip else None)
    for on in (False, True, False):
        capture["on"] = on
        _give_grads(a, b, gen)
        if on:
            with pytest.raises(RuntimeError, match=r"pyshard\.Adam: a CUDA graph is capturing .* capturable=True"):
                a.step()
            continue
        a.step()
        b.step()
        _assert_equal(a, b)


def test_eager_steps_and_captures_do_not_share_their_inputs(
    backend: str, capture: dict[str, bool], gen: torch.Generator
) -> None:
    a, b = _twins(backend, gen, capturable=True, max_grad_norm=0.5)
    held = []
    for i, on in enumerate((False, True, False, True, False)):
        capture["on"] = on
        _give_grads(a, b, gen)
        if i >= 2:
            for control in a._controls.values():
                control[:5] = torch.tensor([3.0, 1e-3, 0.0, 1.0, 1.0])  # as a replay might, unseen
        if i == 2:
            a._plan = None  # as after a change of layout: a graph outlives the launches
        a.step()
        b.step()
        _assert_equal(a, b)
        assert torch.equal(a.grad_norm, b.grad_norm)
        if on:
            held = [(t, t.clone()) for t in a._captured if t.dtype == torch.int64]
        else:
            assert all(torch.equal(t, before) for t, before in held), "an eager step wrote into a captured table"
    assert len(held) == 2 * 2
    assert len({t.data_ptr() for t, _ in held}) == len(held)


def test_grad_scaler_s_attributes_stay_on_the_device(backend: str, gen: torch.Generator) -> None:
    a, b = _twins(backend, gen, capturable=True, max_grad_norm=1.0)
    for found in (0.0, 1.0, 0.0):
        _give_grads(a, b, gen, scale=1024.0)
        a.grad_scale = b.grad_scale = torch.tensor(1024.0)  # type: ignore[attr-defined]
        a.found_inf = b.found_inf = torch.tensor(found)  # type: ignore[attr-defined]
        a.step()
        b.step()
        _assert_equal(a, b)
    assert a.skipped_steps == b.skipped_steps == 1
    del a.grad_scale, a.found_inf, b.grad_scale, b.found_inf  # type: ignore[attr-defined]
    _give_grads(a, b, gen)
    a.step()
    b.step()
    _assert_equal(a, b)


class _NoHostReads(TorchDispatchMode):
    """Fails when a tensor's value is read on the host, which on a GPU would wait for it.

    Copies from ordinary host memory to the device, which would wait too, look on the CPU like any other copy:
    test_gpu_step.py lets torch look for both on a GPU.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a value was read on the host")
        return func(*args, **(kwargs or {}))


def test_a_capturable_step_reads_nothing_on_the_host(gen: torch.Generator) -> None:
    """By the CUDA bodies on the host; Triton's interpreter reads tensors by itself."""
    kernels = Backend("cuda-on-host", ("cpu",), FLOATS, host_run.__name__, on_device=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, kernels.name, kernels)
        patch.setattr("pyshard.kernels.registry.CHOICES", ("auto", *BACKENDS))
        a, b = _twins(kernels.name, gen, capturable=True, max_grad_norm=1.0, nonfinite="skip")
        _give_grads(a, b, gen)
        a.step()  # makes the state
        a.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]
        a.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
        with _NoHostReads():
            a.step()


def test_nonfinite_raise_names_the_parameter_and_changes_nothing(backend: str, gen: torch.Generator) -> None:
    a, b = _twins(backend, gen, nonfinite="raise")
    _give_grads(a, b, gen)
    a.step()
    b.step()
    grad = _all(a)[3].grad
    assert grad is not None
    grad[4099] = float("nan")
    with pytest.raises(FloatingPointError, match="gradient of parameter 3 holds inf or NaN"):
        a.step()
    _assert_equal(a, b)


def test_functions_take_the_device_backends(backend: str, gen: torch.Generator) -> None:
    tensors = [torch.randn(5000, generator=gen), torch.randn(33, generator=gen).bfloat16(), torch.empty(0)]
    for a, b in zip(grad_norm(tensors, backend=backend), grad_norm(tensors, backend="cpu"), strict=True):
        assert torch.equal(a, b)
    results = []
    for name in (backend, "cpu"):
        lists = [[t.clone() for t in tensors[:1]] for _ in range(4)]
        lists[3] = [t.square() for t in lists[3]]
        kernels = pyshard.kernels
        kernels.adam_(*lists, [], [], torch.tensor(3.0), torch.tensor(0.1), grad_scale=0.5, backend=name)  # type: ignore[arg-type]
        results.append(lists)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a[0], b[0])

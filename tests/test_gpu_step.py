"""Steps on a GPU, held to the CPU backend bit for bit: eager, captured in CUDA graphs, and without waiting."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import pyshard
from pyshard.kernels.registry import BACKENDS

pytestmark = pytest.mark.gpu

# Around the block sizes of the kernels (1,024 and 4,096), with tails; (3, 5) and () leave addresses aligned.
SHAPES = [(3, 5), (1025,), (0,), (4097,), (), (64, 129)]


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    reason = BACKENDS[request.param].why_not("cuda", torch.float32)
    if reason is not None:
        pytest.skip(f"backend {request.param!r}: {reason}")
    return str(request.param)


@pytest.fixture
def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _twins(
    backend: str, dtype: torch.dtype, gen: torch.Generator, lr: Tensor | None = None, **options: object
) -> tuple[pyshard.AdamW, pyshard.AdamW]:
    """An optimizer on the GPU, with `lr` for its first group, and the same one of the CPU backend."""
    start = [torch.randn(shape, generator=gen).to(dtype) for shape in SHAPES]
    made = []
    for name, device in ((backend, "cuda"), ("cpu", "cpu")):
        params = [torch.nn.Parameter(t.to(device, copy=True)) for t in start]
        rate = 0.02 if lr is None or name == "cpu" else lr
        groups = [{"params": params[:3], "lr": rate}, {"params": params[3:], "betas": (0.8, 0.95), "amsgrad": True}]
        made.append(pyshard.AdamW(groups, weight_decay=0.1, backend=name, **options))  # type: ignore[arg-type]
    return made[0], made[1]


def _all(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for g in optimizer.param_groups for p in g["params"]]


def _give_grads(a: torch.optim.Optimizer, b: torch.optim.Optimizer, gen: torch.Generator, scale: float = 1.0) -> None:
    """New values for all gradients, in the memory that those on the GPU have."""
    for p, q in zip(_all(a), _all(b), strict=True):
        q.grad = (torch.randn(q.shape, generator=gen) * scale).to(q.dtype)
        if p.grad is None:
            p.grad = torch.empty_like(p)
        p.grad.copy_(q.grad)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _assert_equal(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    for i, (p, q) in enumerate(zip(_all(a), _all(b), strict=True)):
        assert torch.equal(_bits(p), _bits(q)), f"parameter {i}"
        assert a.state[p].keys() == b.state[q].keys()
        for key in a.state[p]:
            assert torch.equal(_bits(a.state[p][key]), _bits(b.state[q][key])), f"{key} of parameter {i}"


def _capture(optimizer: torch.optim.Optimizer) -> torch.cuda.CUDAGraph:
    """A graph of one step, which is not taken."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    """torch raises where the host would wait for the GPU, while `set_sync_debug_mode("error")` is on."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_steps_give_the_bits_of_the_cpu_backend(
    backend: str, dtype: torch.dtype, capturable: bool, max_norm: float | None, gen: torch.Generator
) -> None:
    a, b = _twins(backend, dtype, gen, capturable=capturable, max_grad_norm=max_norm)
    for i in range(5):
        _give_grads(a, b, gen)
        if i == 2:
            _all(a)[1].grad = _all(b)[1].grad = None
        a.step()
        b.step()
        _assert_equal(a, b)
        if max_norm is not None:
            assert torch.equal(a.grad_norm.cpu(), b.grad_norm)


@pytest.mark.parametrize("capturable", [False, True])
def test_grad_scaler_s_attributes(backend: str, capturable: bool, gen: torch.Generator) -> None:
    a, b = _twins(backend, torch.float16, gen, capturable=capturable, max_grad_norm=1.0)
    for found in (0.0, 1.0, 0.0):
        _give_grads(a, b, gen, scale=64.0)
        for optimizer, device in ((a, "cuda"), (b, "cpu")):
            optimizer.grad_scale = torch.tensor(64.0, device=device)  # type: ignore[attr-defined]
            optimizer.found_inf = torch.tensor(found, device=device)  # type: ignore[attr-defined]
            optimizer.step()
        _assert_equal(a, b)
    assert a.skipped_steps == b.skipped_steps == 1


@pytest.mark.parametrize("capturable", [False, True])
def test_a_nonfinite_gradient_skips_the_step(backend: str, capturable: bool, gen: torch.Generator) -> None:
    a, b = _twins(backend, torch.bfloat16, gen, capturable=capturable, nonfinite="skip")
    for value in (1.0, float("inf"), 1.0):
        _give_grads(a, b, gen)
        for optimizer in (a, b):
            grad = _all(optimizer)[3].grad
            assert grad is not None
            grad[4096] = value
            optimizer.step()
        _assert_equal(a, b)
        assert torch.equal(a.grad_norm.cpu(), b.grad_norm)
    assert a.skipped_steps == b.skipped_steps == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_replays_and_eager_steps_in_any_order(backend: str, dtype: torch.dtype, gen: torch.Generator) -> None:
    """Also with an eager step of fewer gradients, a plan made anew, and a second graph, between replays."""
    lr = torch.tensor(0.02, dtype=torch.float64, device="cuda")
    a, b = _twins(backend, dtype, gen, lr, capturable=True, max_grad_norm=0.5)
    _give_grads(a, b, gen)
    a.step()  # makes the state, and Triton's kernels
    b.step()
    graphs = [_capture(a)]
    _assert_equal(a, b)  # a capture takes no step
    for i, kind in enumerate(["replay", "replay", "eager", "replay", "fewer", "replay", "eager", "anew", "replay"] * 2):
        if i == 9:
            graphs.append(_capture(a))
        b.param_groups[0]["lr"] = 0.02 / (i + 1)
        lr.fill_(0.02 / (i + 1))
        _give_grads(a, b, gen)
        static = _all(a)[3].grad
        if kind == "replay":
            graphs[i % len(graphs)].replay()
        else:
            if kind == "fewer":
                _all(a)[3].grad = _all(b)[3].grad = None
            if kind == "anew":
                a._plan = None
            a.step()
        b.step()
        _all(a)[3].grad = static
        _assert_equal(a, b)
        assert torch.equal(a.grad_norm.cpu(), b.grad_norm), f"step {i}, {kind}"


def test_a_replay_skips_a_nonfinite_gradient_and_counts_it(backend: str, gen: torch.Generator) -> None:
    a, b = _twins(backend, torch.bfloat16, gen, capturable=True, nonfinite="skip")
    _give_grads(a, b, gen)
    a.step()
    b.step()
    graph = _capture(a)
    for value in (1.0, float("nan"), 1.0):
        _give_grads(a, b, gen)
        for optimizer in (a, b):
            grad = _all(optimizer)[1].grad
            assert grad is not None
            grad[1024] = value
        graph.replay()
        b.step()
        _assert_equal(a, b)
    assert a.skipped_steps == b.skipped_steps == 1


def test_a_graph_outlives_the_buffers_of_a_layout(backend: str, gen: torch.Generator) -> None:
    """A gradient that lies in memory another way goes through buffers, which a new plan makes anew."""
    start, values = torch.randn(40, 70, generator=gen), torch.randn(3, 40, 70, generator=gen)
    params = [torch.nn.Parameter(start.to(device, copy=True)) for device in ("cuda", "cpu")]
    a = pyshard.AdamW([params[0]], backend=backend, capturable=True)
    b = pyshard.AdamW([params[1]], backend="cpu")
    params[0].grad = torch.empty(70, 40, device="cuda").t()
    graph = None
    for value in values:
        params[0].grad.copy_(value)
        params[1].grad = value
        if graph is None:
            a.step()
            graph = _capture(a)
            a._plan = None
            _junk = [torch.full((40, 70), float("nan"), device="cuda") for _ in range(8)]  # into memory that was freed
        else:
            graph.replay()
        b.step()
        _assert_equal(a, b)


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_capture_of_a_step_that_counts_on_the_host_is_refused(
    backend: str, max_norm: float | None, gen: torch.Generator
) -> None:
    a, b = _twins(backend, torch.bfloat16, gen, max_grad_norm=max_norm)
    _give_grads(a, b, gen)
    a.step()
    b.step()
    held = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match=r"a CUDA graph is capturing .* capturable=True"):
            a.step()
        held.add_(1.0)  # a graph of nothing would warn
    _assert_equal(a, b)
    _give_grads(a, b, gen)
    a.step()
    b.step()
    _assert_equal(a, b)


def test_a_capturable_step_never_waits(backend: str, waiting_is_an_error: None, gen: torch.Generator) -> None:
    lr = torch.tensor(0.02, dtype=torch.float64, device="cuda")
    a, b = _twins(backend, torch.bfloat16, gen, lr, capturable=True, max_grad_norm=1.0, nonfinite="skip")
    _give_grads(a, b, gen)
    a.step()  # makes the state
    b.step()
    for i in range(3):
        _give_grads(a, b, gen)
        if i:
            a.grad_scale = torch.tensor(2.0, device="cuda")  # type: ignore[attr-defined]
            a.found_inf = torch.tensor(0.0, device="cuda")  # type: ignore[attr-defined]
            b.grad_scale, b.found_inf = torch.tensor(2.0), torch.tensor(0.0)  # type: ignore[attr-defined]
        torch.cuda.set_sync_debug_mode("error")
        a.step()
        torch.cuda.set_sync_debug_mode("default")
        b.step()
        _assert_equal(a, b)

"""cast, split and join as users call them: any layout in, the same layout out, values of torch, errors that say why."""

import numpy as np
import pytest
import reference
import torch
import torch.distributed as dist
from reference import Guarded, assert_same_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.two_tensor import TwoTensor

from pyshard.kernels import adam_, cast, grad_norm, join, split

pytestmark = pytest.mark.usefixtures("one_torch_thread")

BACKENDS = ("auto", "cpu", "reference")
PAIRS = [(a, b) for half in (torch.bfloat16, torch.float16) for a, b in ((torch.float32, half), (half, torch.float32))]

# Views of a tensor of 720 elements: (view, whether its elements fill its memory without gaps).
LAYOUTS = {
    "contiguous": (lambda x: x.view(2, 3, 4, 30), True),
    "channels last": (lambda x: x.view(2, 4, 30, 3).permute(0, 3, 1, 2), True),
    "transposed": (lambda x: x.view(24, 30).t(), True),
    "permuted": (lambda x: x.view(6, 10, 12).permute(2, 0, 1), True),
    "every second": (lambda x: x[::2], False),
    "columns": (lambda x: x.view(24, 30)[:, 3:20], False),
    "shifted": (lambda x: x[3:], True),
    "expanded": (lambda x: x[:7].view(7, 1).expand(7, 5), False),
    "one element, expanded": (lambda x: x[:1].expand(9), False),
    "scalar": (lambda x: x[5], True),
    "empty": (lambda x: x[:0].view(0, 4), True),
    "ones among the sizes": (lambda x: x.view(1, 24, 1, 30), True),
}


def some(rng: np.random.Generator, n: int = 720, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers over the whole range of fp32, subnormals and special ones among them."""
    x = rng.standard_normal(n) * 10.0 ** rng.integers(-45, 38, n)
    x[: len(reference.SPECIAL)] = reference.SPECIAL
    return torch.from_numpy(rng.permutation(x).astype(np.float32)).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}".replace("torch.", ""))
@pytest.mark.parametrize("backend", BACKENDS)
def test_cast(
    backend: str, pair: tuple[torch.dtype, torch.dtype], layout: str, isa: str, rng: np.random.Generator
) -> None:
    """torch's bits, x's shape, and x's layout where it is dense, as torch's own .to() gives it."""
    view, dense = LAYOUTS[layout]
    memory = Guarded(some(rng, dtype=pair[0]))
    before = memory.tensor.clone()
    x = view(memory.tensor)
    y = cast(x, pair[1], backend=backend)
    expected = x.to(pair[1])
    assert_same_bits(y, expected)
    assert y.stride() == (x if dense else expected).stride()
    assert_same_bits(memory.tensor, before, "the argument")
    memory.check()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_split_and_join(backend: str, layout: str, isa: str, rng: np.random.Generator) -> None:
    view, dense = LAYOUTS[layout]
    memory = Guarded(some(rng))
    x = view(memory.tensor)
    high, low = split(x, backend=backend)
    expected_high, expected_low = reference.split(x.contiguous().numpy())
    assert_same_bits(high, torch.from_numpy(expected_high).view(torch.bfloat16), "high half")
    assert_same_bits(low, torch.from_numpy(expected_low), "low half")
    assert high.stride() == low.stride()
    assert not dense or high.stride() == x.stride()
    y = join(high, low, backend=backend)
    assert_same_bits(y, x.clone(), "joined")
    assert y.stride() == high.stride()
    memory.check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_join_of_halves_in_different_layouts(backend: str, rng: np.random.Generator) -> None:
    x = some(rng).view(24, 30)
    high, low = split(x)
    expanded = low[:1].expand(24, 30)
    for other, remainder in ((low.t().contiguous().t(), low), (expanded, expanded.contiguous())):
        expected = reference.join(high.view(torch.uint16).numpy(), remainder.numpy())
        assert_same_bits(join(high, other, backend=backend), torch.from_numpy(expected))
    assert_same_bits(join(high.t().contiguous().t(), low, backend=backend), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_set_to_zero_beside_an_old_remainder(backend: str) -> None:
    high = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1.0]).bfloat16()
    low = torch.tensor([-5, -5, 5, 5, -5], dtype=torch.int16)
    assert join(high, low, backend=backend).tolist() == [0.0, -0.0, float("inf"), -float("inf"), 1.0 - 5 * 2.0**-24]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_view_with_its_sign_in_a_bit(backend: str) -> None:
    """The imaginary part of a lazily conjugated number: torch stores 2 and means -2."""
    x = torch.tensor(1 + 2j).conj().imag
    assert x.is_neg() and float(x) == -2.0
    assert float(cast(x, torch.bfloat16, backend=backend)) == -2.0
    assert [float(half) for half in split(x, backend=backend)] == [-2.0, 0.0]


def test_parameters_give_plain_tensors() -> None:
    param = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    y = cast(param, torch.bfloat16)
    assert y.tolist() == [1.0, 2.0] and not y.requires_grad and type(y) is torch.Tensor


def test_more_threads_than_one(rng: np.random.Generator) -> None:
    """Above the serial limit of 16,384 elements, with torch's number of threads."""
    torch.set_num_threads(3)  # the fixture sets it back
    x = some(rng, 50_021)
    assert_same_bits(cast(x, torch.bfloat16), x.bfloat16())
    assert_same_bits(join(*split(x)), x)


# ---- errors ----


@pytest.mark.parametrize(
    ("x", "dtype", "says"),
    [
        (torch.ones(2), torch.float32, r"got torch.float32 to torch.float32; expected float32 to bfloat16 or float16"),
        (torch.ones(2).double(), torch.bfloat16, r"got torch.float64 to torch.bfloat16"),
        (torch.ones(2).bfloat16(), torch.float16, r"got torch.bfloat16 to torch.float16"),
        (torch.ones(2, dtype=torch.int32), torch.bfloat16, r"got torch.int32 to torch.bfloat16"),
        (torch.ones(2), "bfloat16", r"got torch.float32 to bfloat16"),
        (torch.eye(2).to_sparse(), torch.bfloat16, r"x has layout torch.sparse_coo; expected a dense"),
        ([1.0, 2.0], torch.bfloat16, r"x is list; expected a tensor"),
    ],
)
def test_cast_refuses(x: object, dtype: object, says: str) -> None:
    with pytest.raises(TypeError, match=rf"pyshard\.cast: {says}"):
        cast(x, dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("master", "says"),
    [
        (torch.ones(2).bfloat16(), r"got torch.bfloat16; expected float32"),
        (torch.eye(2).to_sparse(), r"master has layout torch.sparse_coo"),
        (None, r"master is NoneType; expected a tensor"),
    ],
)
def test_split_refuses(master: object, says: str) -> None:
    with pytest.raises(TypeError, match=rf"pyshard\.split: {says}"):
        split(master)  # type: ignore[arg-type]


HIGH, LOW = torch.ones(3).bfloat16(), torch.zeros(3, dtype=torch.int16)


@pytest.mark.parametrize(
    ("high", "low", "error", "says"),
    [
        (LOW, HIGH, TypeError, r"got torch.int16 and torch.bfloat16; expected bfloat16 and int16"),
        (HIGH.half(), LOW, TypeError, r"got torch.float16 and torch.int16"),
        (HIGH, LOW[:2], ValueError, r"got \(3,\) on cpu and \(2,\) on cpu; expected one shape and one device"),
        (HIGH, LOW.to("meta"), ValueError, r"got \(3,\) on cpu and \(3,\) on meta"),
        (HIGH, LOW.view(3, 1).to_sparse(), TypeError, r"low has layout torch.sparse_coo"),
        (HIGH, 0, TypeError, r"low is int; expected a tensor"),
    ],
)
def test_join_refuses(high: object, low: object, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=rf"pyshard\.join: {says}"):
        join(high, low)  # type: ignore[arg-type]


def test_unknown_backend() -> None:
    for call in (
        lambda: cast(torch.ones(2), torch.bfloat16, backend="gpu"),
        lambda: split(torch.ones(2), backend="gpu"),
        lambda: join(HIGH, LOW, backend="gpu"),
    ):
        with pytest.raises(ValueError, match=r"pyshard: unknown backend 'gpu'; expected one of auto, cpu, cuda"):
            call()


def freed(x: torch.Tensor) -> torch.Tensor:
    """A view whose storage is gone; its address is not zero, but 4 bytes after it."""
    view = torch.cat([x, x])[1 : 1 + len(x)]
    view.untyped_storage().resize_(0)
    return view


WITHOUT_MEMORY = {
    "wrapper": (lambda x: TwoTensor(x, x), r"is a TwoTensor on cpu without memory"),
    "made up": (lambda x: torch._efficientzerotensor(len(x), dtype=x.dtype), r"is a Tensor on cpu without memory"),
    "freed": (freed, r"is a Tensor on cpu without memory"),
    "fake": (lambda x: FakeTensorMode().from_tensor(x), r"came under a FakeTensorMode"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", WITHOUT_MEMORY)
def test_tensors_without_memory(kind: str, backend: str) -> None:
    """Their address is 0, or of nothing: a kernel would crash on it."""
    make, says = WITHOUT_MEMORY[kind]
    x, high, low = torch.ones(3), HIGH.clone(), LOW.clone()
    for call, name in (
        (lambda: cast(make(x), torch.bfloat16, backend=backend), r"cast: x"),
        (lambda: cast(make(high), torch.float32, backend=backend), r"cast: x"),
        (lambda: split(make(x), backend=backend), r"split: master"),
        (lambda: join(make(high), low, backend=backend), r"join: high"),
        (lambda: join(high, make(low), backend=backend), r"join: low"),
        (lambda: grad_norm([x, make(x)], backend=backend), r"grad_norm: tensor 1"),
    ):
        with pytest.raises(ValueError, match=rf"pyshard\.{name} {says}.*; expected a tensor of values\. Use"):
            call()
    assert x.tolist() == [1.0, 1.0, 1.0] and torch.equal(high, HIGH) and torch.equal(low, LOW)


@pytest.mark.parametrize("real", [False, True])
def test_under_fake_tensor_mode(real: bool) -> None:
    """Real tensors too: what is allocated for the result would be fake. The operators in torch.ops.pyshard serve."""
    x, high, low = torch.ones(3), HIGH, LOW
    with FakeTensorMode(allow_non_fake_inputs=True):
        if not real:
            x, high, low = torch.ones(3), torch.ones(3).bfloat16(), torch.ones(3, dtype=torch.int16)
        for call in (
            lambda: cast(x, torch.bfloat16),
            lambda: split(x),
            lambda: join(high, low),
            lambda: grad_norm([x]),
        ):
            with pytest.raises(ValueError, match=r"came under a FakeTensorMode.*Use torch\.ops\.pyshard"):
                call()
        assert torch.ops.pyshard.cast(x, torch.bfloat16).dtype == torch.bfloat16


def test_inside_vmap() -> None:
    with pytest.raises(ValueError, match=r"pyshard\.cast: x is a Tensor on cpu without memory"):
        torch.func.vmap(lambda x: cast(x, torch.bfloat16))(torch.ones(2, 3))


def test_distributed_tensors() -> None:
    """A DTensor's values lie in its local tensor; which of the two is meant, the caller says."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        x, high, low = (DTensor.from_local(t, mesh, [Shard(0)]) for t in (torch.ones(3), HIGH, LOW))
        adam = [[torch.ones(3)] for _ in range(4)]
        for call in (
            lambda: cast(x, torch.bfloat16),
            lambda: split(x),
            lambda: join(high, low),
            lambda: join(HIGH, low),
            lambda: grad_norm([x]),
            lambda: adam_([x], *adam[1:], [], [], 1, 0.1),
            lambda: adam_(adam[0], [x], *adam[2:], [], [], 1, 0.1),
        ):
            with pytest.raises(TypeError, match=r"is a DTensor; expected a plain tensor\. Use \.to_local\(\)"):
                call()
        assert torch.equal(x.to_local(), torch.ones(3)) and all(torch.equal(t, torch.ones(3)) for (t,) in adam)
        assert cast(x.to_local(), torch.bfloat16).tolist() == [1.0, 1.0, 1.0]
    finally:
        dist.destroy_process_group()

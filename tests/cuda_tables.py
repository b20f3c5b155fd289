"""Tables of rows for the tests of the CUDA kernels: random tensors of every kind between sentinels.

Values reach every branch of the formats: ordinary numbers over many magnitudes, raw bit patterns (NaN, inf and
subnormal numbers among them), masters that agree with their 16-bit copy and masters that do not.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from reference import Guarded, assert_same_bits
from torch import Tensor

from pyshard import _C
from pyshard.kernels.formats import Format, kind_of, param_dtype, unpack_kind

ADAM_BLOCK = 1024
NORM_BLOCK = 4096
CONVERT_BLOCK = 2048
# Elements of tensors whose indices pass 31 bits, and pass 32.
HUGE = (2**31 - 1, 2**31, 2**31 + 1025, 2**32 + 4097, 3 * 2**33 + 7)
PRIMES = (2, 3, 5, 127, 1009, 2053, 5003)
SIZES = (0, 1, 7, 8, 9, 1023, 1024, 1025, 4095, 4096, 4097, *PRIMES)

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CASTS = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]

# (lr, beta1, beta2, eps, weight_decay, step, sign, decoupled)
HYPERS = (
    (1e-3, 0.9, 0.999, 1e-8, 1e-2, 1.0, 1.0, 1.0),
    (3e-4, 0.9, 0.95, 1e-8, 0.1, 7.0, 1.0, 0.0),
    (0.1, 0.0, 0.5, 1e-15, 0.0, 1000.0, -1.0, 1.0),
    (0.0, 0.9, 0.999, 1e-8, 1e-2, 3.0, 1.0, 1.0),
)


def floats(rng: np.random.Generator, n: int) -> Tensor:
    """fp32: five in eight ordinary, two raw bit patterns, one zero."""
    values = (rng.standard_normal(n) * 10.0 ** rng.uniform(-6, 2, n)).astype(np.float32)
    raw = rng.integers(0, 2**32, n, dtype=np.uint32).view(np.float32)
    which = rng.integers(0, 8, n)
    return torch.from_numpy(np.select([which < 5, which < 7], [values, raw], np.float32(0)))


def halves(rng: np.random.Generator, n: int, dtype: torch.dtype) -> Tensor:
    """bf16 or fp16, in the same proportions."""
    raw = torch.from_numpy(rng.integers(0, 2**16, n, dtype=np.uint16).view(np.int16)).view(dtype)
    which = torch.from_numpy(rng.integers(0, 8, n))
    return torch.where(which < 5, floats(rng, n).to(dtype), torch.where(which < 7, raw, torch.zeros_like(raw)))


def values_of(rng: np.random.Generator, n: int, dtype: torch.dtype) -> Tensor:
    return floats(rng, n) if dtype == torch.float32 else halves(rng, n, dtype)


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


@dataclass(frozen=True)
class Row:
    """What a row is: `offset` elements past an aligned address in every array."""

    kind: int
    n: int
    offset: int = 0
    hyper: int = 0


ARRAYS = ("param", "low", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def make_arrays(row: Row, rng: np.random.Generator) -> dict[str, Tensor]:
    """The tensors of a row by name; those that its kind does not have are missing."""
    fmt, grad_dtype, _, amsgrad = unpack_kind(row.kind)
    dtype, n = param_dtype(fmt), row.n
    arrays = {
        "param": values_of(rng, n, dtype),
        "grad": values_of(rng, n, grad_dtype),
        "exp_avg": floats(rng, n),
        "exp_avg_sq": floats(rng, n).abs(),
    }
    if fmt == Format.BF16_SPLIT:
        arrays["low"] = torch.from_numpy(rng.integers(-(2**15), 2**15, n, dtype=np.int16))
    elif fmt in (Format.BF16_MASTER, Format.FP16_MASTER):
        arrays["low"] = floats(rng, n)
        rewritten = torch.from_numpy(rng.integers(0, 4, n)) == 0  # by the user, between steps
        arrays["param"] = torch.where(rewritten, arrays["param"], arrays["low"].to(dtype))
    if amsgrad:
        arrays["max_exp_avg_sq"] = floats(rng, n).abs()
    return arrays


@dataclass
class Table:
    """Rows and their guarded tensors."""

    rows: list[Row]
    arrays: list[dict[str, Guarded]] = field(default_factory=list)

    @classmethod
    def random(cls, rows: Sequence[Row], rng: np.random.Generator) -> "Table":
        table = cls(list(rows))
        for row in rows:
            made = make_arrays(row, rng)
            table.arrays.append({name: Guarded(tensor, row.offset) for name, tensor in made.items()})
        return table

    def copy(self) -> "Table":
        """The same contents in memory of their own."""
        arrays = [
            {name: Guarded(array.tensor, row.offset) for name, array in arrays.items()}
            for row, arrays in zip(self.rows, self.arrays)
        ]
        return Table(list(self.rows), arrays)

    def addresses(self, i: int) -> list[int]:
        return [self.arrays[i][name].address if name in self.arrays[i] else 0 for name in ARRAYS]

    def packed(self) -> Tensor:
        """int64 [rows, 8], as kernels read it."""
        numbers = [[*self.addresses(i), row.n, row.kind | row.hyper << 32] for i, row in enumerate(self.rows)]
        return torch.tensor(numbers, dtype=torch.int64).view(-1, 8)

    def first_block(self, block: int) -> Tensor:
        return first_block([row.n for row in self.rows], block)

    def cpu_adam(self, hypers: Sequence[Sequence[float]], grad_scale: float) -> None:
        """The step that the others are compared with."""
        rows = [(*self.addresses(i), row.n, row.kind, row.hyper) for i, row in enumerate(self.rows)]
        _C.cpu_adam(rows, hypers, grad_scale, 1)

    def grads(self) -> list[tuple[int, int, int]]:
        """The gradients as cpu_square_sum takes them."""
        tensors = [arrays["grad"].tensor for arrays in self.arrays]
        return [(t.data_ptr(), t.numel(), CODES[t.dtype]) for t in tensors]

    def items(self) -> Iterator[tuple[str, Guarded]]:
        for i, (row, arrays) in enumerate(zip(self.rows, self.arrays)):
            for name, array in arrays.items():
                yield f"row {i} {row} {name}", array

    def assert_equals(self, expected: "Table") -> None:
        """The same bits in every tensor, and sentinels intact."""
        for (name, array), (_, other) in zip(self.items(), expected.items()):
            assert_same_bits(array.tensor, other.tensor, name)
            array.check(name)


def first_block(sizes: Sequence[int], block: int) -> Tensor:
    """Prefix sums of the numbers of blocks."""
    counts = [0, *(-(-n // block) for n in sizes)]
    return torch.tensor(counts, dtype=torch.int64).cumsum(0)


def scalars_of(hypers: Sequence[Sequence[float]], grad_scale: float) -> Tensor:
    """float32 [k, 9]."""
    return torch.tensor([_C.adam_scalars(list(h), grad_scale) for h in hypers], dtype=torch.float32)


def control_of(**values: float) -> Tensor:
    """float64 [8]; by default scale 1, no clipping, nothing skipped."""
    names = "grad_scale max_norm square_sum found_inf skip_nonfinite skip norm skipped".split()
    unknown = set(values) - set(names)
    assert not unknown, unknown
    defaults = {"grad_scale": 1.0, "max_norm": float("inf")}
    return torch.tensor([(defaults | values).get(name, 0.0) for name in names], dtype=torch.float64)


def mixed_rows(rng: np.random.Generator, kinds: Sequence[int], count: int, largest: int) -> list[Row]:
    """Random rows, some empty, the first and the last among them."""
    picked = rng.choice(kinds, count)
    sizes = [0, *(int(n) for n in rng.integers(0, largest, count - 2)), 0]
    return [
        Row(
            int(kind),
            n if rng.integers(0, 5) else 0,
            int(rng.integers(0, 3)),
            int(rng.integers(0, len(HYPERS))),
        )
        for kind, n in zip(picked, sizes)
    ]


def kind_name(kind: int) -> str:
    fmt, grad_dtype, coupled, amsgrad = unpack_kind(kind)
    assert kind_of(fmt, grad_dtype, coupled, amsgrad) == kind
    grad = str(grad_dtype).removeprefix("torch.")
    return f"{fmt.name}-{grad}{'-coupled' * coupled}{'-amsgrad' * amsgrad}"

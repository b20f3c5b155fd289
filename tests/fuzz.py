"""Random arguments: how many, from which seed, tensors of any layout between sentinels, and what an error must be."""

import math
from typing import Any, NamedTuple

import numpy as np
import reference
import torch
from hypothesis import seed, settings
from hypothesis import strategies as st
from reference import FLOATS, Guarded, assert_same_bits, session_seed

ERRORS = (TypeError, ValueError, RuntimeError, FloatingPointError)

seeds = st.integers(0, 2**32 - 1)
shapes = st.sampled_from([(), (0,), (1,), (5,), (33,), (3, 4), (2, 0, 3), (7, 1, 2), (1030,), (40, 430)])


def examples(count: int) -> Any:
    def decorate(test: Any) -> Any:
        return seed(session_seed())(settings(max_examples=count)(test))

    return decorate


def outcome(call: Any) -> tuple[Any, Exception | None]:
    """(result, None), or (None, the error), which must be one of pyshard's."""
    try:
        return call(), None
    except ERRORS as error:
        assert "pyshard" in str(error), f"an error that pyshard did not word: {error!r}"
        return None, error


class Placed(NamedTuple):
    """A tensor, the memory it lies in, and a copy of that memory."""

    tensor: torch.Tensor
    memory: Guarded
    before: torch.Tensor
    layout: str

    @property
    def dense(self) -> bool:
        return self.layout != "sparse"

    def check(self, expected: torch.Tensor | None = None) -> None:
        """The memory is as it was, but for `expected` in the tensor's place; nothing is written around it."""
        memory = self.before.clone()
        if expected is not None:
            view = memory.as_strided(
                self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset() - self._start()
            )
            view.copy_(expected)
        assert_same_bits(self.memory.tensor, memory, self.layout)
        self.memory.check(self.layout)

    def _start(self) -> int:
        return self.memory.tensor.storage_offset()


def random_values(n: int, dtype: torch.dtype, rng: np.random.Generator, special: bool = True) -> torch.Tensor:
    """Normal numbers, with `special` a fifth of them at the limits of the formats."""
    x = rng.standard_normal(n).astype(np.float32)
    if special and dtype in FLOATS:
        chosen = rng.random(n) < 0.2
        x[chosen] = rng.choice(reference.SPECIAL, int(chosen.sum()))
    return torch.from_numpy(x).to(dtype)


def place(
    dtype: torch.dtype, shape: tuple[int, ...], layout: str, rng: np.random.Generator, special: bool = True
) -> Placed:
    numel = math.prod(shape)
    gap, shift = (2, 0) if layout == "gaps" else (1, 3 if layout == "shifted" else 0)
    strides, reach = [], gap
    for size in shape if layout == "reversed" else reversed(shape):
        strides.append(reach)
        reach *= max(size, 1)
    if layout != "reversed":
        strides.reverse()
    if layout == "expanded" and strides:
        strides[0] = 0
    memory = Guarded(random_values(gap * numel + shift + 1, dtype, rng, special), offset=int(rng.integers(0, 9)))
    tensor = memory.tensor.as_strided(shape, strides, memory.tensor.storage_offset() + shift)
    if layout == "sparse":
        tensor = tensor.clone().to_sparse()
    return Placed(tensor, memory, memory.tensor.clone(), layout)

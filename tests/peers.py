"""Rows of a step in the memory of several ranks, all in this process, and the step over them in numpy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fuzz import random_values
from reference import SENTINEL, Guarded, Row, raw_bits
from torch import Tensor

from pyshard import _C

# (lr, beta1, beta2, eps, weight_decay, step, sign, decoupled), and the factor on the gradients
HYPER = [1e-3, 0.9, 0.999, 1e-8, 0.1, 7, 1, 1]
OTHER = [3e-2, 0.8, 0.95, 1e-6, 0.01, 1, -1, 0]
SCALE = 0.37


def summed(sources: Sequence[Tensor]) -> Tensor:
    """The sum that is promised, by numpy: in fp32, from the left."""
    total = sources[0].float().numpy()
    with np.errstate(all="ignore"):
        for source in sources[1:]:
            total = total + source.float().numpy()
    return torch.from_numpy(total)


class View:
    """A tensor in a rank's memory, as a Row holds its arrays."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()

    def check(self, what: str) -> None:
        """Peers.check() looks at all of the memory."""


class Peers:
    """Rows whose gradients and parameters lie in flat arrays of one layout on several ranks; rank 0 has the table."""

    def __init__(self, rows: list[Row], ranks: int, rng: np.random.Generator, special: bool = False):
        self.rows = rows
        self.ranks = ranks
        self.start = [row.clone() for row in rows]  # what the step starts from
        self.spans, size = [], 0
        for row in rows:  # unaligned, but for the elements
            width = max(row.tensors()[name].element_size() for name in ("grad", "param"))
            size += -size % width + width * int(rng.integers(0, 40))
            self.spans.append(slice(size, size + width * row.n))
            size += width * row.n
        self.grads, self.params = (
            [Guarded(torch.full((size,), SENTINEL, dtype=torch.uint8)) for _ in range(ranks)] for _ in range(2)
        )
        for i, row in enumerate(rows):
            for name, arrays in (("grad", self.grads), ("param", self.params)):
                values = row.tensors()[name]
                for rank in range(ranks):
                    self.view(arrays[rank], i, values).copy_(
                        values if rank == 0 or name == "param" else random_values(row.n, values.dtype, rng, special)
                    )
                row.arrays[name] = View(self.view(arrays[0], i, values))  # type: ignore[assignment]
        self.before = [array.tensor.clone() for array in self.grads]

    def view(self, array: Guarded, row: int, like: Tensor) -> Tensor:
        span = self.spans[row]
        return array.tensor[span.start : span.start + like.nbytes].view(like.dtype)

    def table(self, hypers: list[list[float]], rows: Sequence[int] | None = None) -> tuple[Any, list[Tensor]]:
        """The table of some of the rows, ready for adam(), and their step counts; row i takes hyper i modulo theirs."""
        table, state = _C.AdamTable(), {}
        for i in range(len(self.rows)) if rows is None else rows:
            t, kind = self.rows[i].tensors(), self.rows[i].kind
            param = t["param"]
            param.grad_dtype = t["grad"].dtype
            param.grad = t["grad"]
            state[param] = {k: x for k, x in t.items() if k not in ("param", "grad")}
            state[param]["step"] = torch.tensor(hypers[i % len(hypers)][5] - 1.0)
            keys = (
                "step",
                "low" if "low" in t else None,
                "exp_avg",
                "exp_avg_sq",
                "max_exp_avg_sq" if kind & 1 else None,
            )
            wide = t["grad"].dtype == torch.float32
            table.add(param, state[param], keys, kind, wide, i % len(hypers), False, None, None)
        groups = [{"params": list(state)}]
        table.seal(groups, state)
        assert table.refresh(groups, state)
        table.prepare([[*hyper[:5], *hyper[6:]] for hyper in hypers], False)
        self.keep = groups, state  # the table holds on to nothing
        return table, [items["step"] for items in state.values()]

    def deltas(self, order: Sequence[int]) -> list[int]:
        return [self.grads[rank].address - self.grads[0].address for rank in order]

    def targets(self, count: int) -> list[int]:
        return [self.params[rank].address - self.params[0].address for rank in range(1, count + 1)]

    def sources(self, row: int, order: Sequence[int]) -> list[Tensor]:
        return [self.view(self.grads[rank], row, self.rows[row].tensors()["grad"]) for rank in order]

    def expected(self, order: Sequence[int], hypers: list[list[float]]) -> list[dict[str, Tensor]]:
        """All arrays of each row after a step, by numpy; the gradients as they are."""
        after = []
        for i, row in enumerate(self.rows):
            shadow = self.start[i].clone()
            shadow.arrays["grad"] = Guarded(summed(self.sources(i, order)))
            step = shadow.expected(_C.adam_scalars(hypers[i % len(hypers)], SCALE))
            after.append(step | {"grad": row.tensors()["grad"].clone()})
        return after

    def check(self, expected: list[dict[str, Tensor]], targets: int, what: str) -> None:
        """Every byte of every rank: rows as expected, targets as rank 0, gradients and everything else as before."""
        for row, after in zip(self.rows, expected):
            row.check(after, what)
        for rank, (grads, before, params) in enumerate(zip(self.grads, self.before, self.params)):
            assert torch.equal(grads.tensor, before), f"gradients of rank {rank} {what}"
            gaps = params.tensor.clone()
            for i, row in enumerate(self.rows):
                param = self.view(params, i, row.tensors()["param"])
                written = row if rank <= targets else self.start[i]
                assert torch.equal(raw_bits(param), raw_bits(written.tensors()["param"])), f"params of {rank} {what}"
                gaps[self.spans[i].start : self.spans[i].start + param.nbytes] = SENTINEL
            assert (gaps == SENTINEL).all(), f"between the parameters of rank {rank} {what}"
            grads.check(what)
            params.check(what)

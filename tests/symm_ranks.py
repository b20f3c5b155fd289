"""What each rank does in the tests of the symm_mem transport, in Triton's interpreter over memory that ranks share.

The functions run in processes of their own (ranks.py) and raise AssertionError where something is wrong.
"""

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from cuda_tables import (
    ADAM_BLOCK,
    HYPERS,
    NORM_BLOCK,
    Row,
    control_of,
    first_block,
    make_arrays,
    scalars_of,
    values_of,
)
from reference import assert_same_bits
from torch import Tensor

from pyshard.comm import PeerError
from pyshard.comm.symm_mem import SymmMemArena, SymmMemTransport, available
from pyshard.kernels import reference, triton_sharded
from pyshard.kernels.formats import unpack_kind

CPU = torch.device("cpu")
SCALE = 0.37
SENTINEL = 0xA5
TIMEOUT = 60.0  # seconds; of tests in which nobody is missing


def connect(timeout: float = TIMEOUT, group: dist.ProcessGroup | None = None) -> SymmMemTransport:
    made = SymmMemTransport.create(group, CPU, timeout)
    assert isinstance(made, SymmMemTransport), made
    return made


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a 1-d tensor."""
    return tensor.contiguous().view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)


def doze(rank: int, step: int, seconds: float = 0.02) -> None:
    """A delay that differs between ranks and steps."""
    time.sleep(random.Random(1000 * rank + step).random() * seconds)


# ---- a small sharded optimizer ----


@dataclass
class Part:
    """A parameter, the same on all ranks, and what this rank owns of it."""

    row: Row
    arrays: dict[str, Tensor]  # whole, as the plain reference updates them
    param_at: int  # byte in the arena's params
    grad_at: int  # byte in a slot
    run: tuple[int, int]  # elements that this rank owns
    own: dict[str, Tensor]  # this rank's state


class Sharded:
    """Rows of several kinds, each cut over the ranks at random places, over one arena."""

    def __init__(self, transport: SymmMemTransport, rows: Sequence[Row], seed: int, slots: int = 2):
        self.transport, self.rng = transport, np.random.default_rng(seed)  # all ranks draw the same numbers
        world, rank = transport.world, transport.rank
        self.parts: list[Part] = []
        param_at = grad_at = 64
        for row in rows:
            arrays = make_arrays(row, self.rng)
            cuts = [0, *sorted(int(c) for c in self.rng.integers(0, row.n // 4 + 1, world - 1) * 4), row.n]
            if row.offset:  # and cuts anywhere
                cuts[1:-1] = sorted(int(c) for c in self.rng.integers(0, row.n + 1, world - 1))
            param_at += row.offset * arrays["param"].element_size()
            grad_at += row.offset * arrays["grad"].element_size()
            run = cuts[rank], cuts[rank + 1]
            state = {name: t[run[0] : run[1]].clone() for name, t in arrays.items() if name not in ("param", "grad")}
            self.parts.append(Part(row, arrays, param_at, grad_at, run, state))
            param_at += -(-arrays["param"].nbytes // 64) * 64 + 64
            grad_at += -(-arrays["grad"].nbytes // 64) * 64 + 64
        self.arena = transport.arena(param_at, grad_at, slots)
        assert not self.arena.params.any() and not self.arena.slot(slots - 1).any()
        self.arena.params.fill_(SENTINEL)
        self.expected = self.arena.params.clone()
        self.store_expected()
        self.arena.params.copy_(self.expected)
        self.kinds = tuple(sorted({row.kind for row in rows}))
        self.aligned = not any(row.offset for row in rows)
        self.steps = 0
        transport.exchange(b"", "start")  # nobody writes before all have filled their parameters

    def store_expected(self) -> None:
        for part in self.parts:
            data = raw(part.arrays["param"])
            self.expected[part.param_at : part.param_at + data.numel()] = data

    def draw(self, slot: int) -> None:
        """New gradients: this rank's into its slot, all ranks' sum into the reference."""
        memory = self.arena.slot(slot)
        for part in self.parts:
            grads = [
                values_of(self.rng, part.row.n, part.arrays["grad"].dtype) for _ in range(self.transport.world)
            ]
            data = raw(grads[self.transport.rank])
            memory[part.grad_at : part.grad_at + data.numel()] = data
            total = grads[0].float()
            for grad in grads[1:]:
                total = total + grad.float()
            part.arrays["sum"] = total

    def table(self, grads: int) -> tuple[Tensor, list[int]]:
        """int64 [rows, 8] of what this rank owns, with gradients in memory that begins at `grads`."""
        rows = []
        for part in self.parts:
            (a, b), size = part.run, part.arrays["param"].element_size()
            addresses = [part.own[n].data_ptr() if n in part.own else 0 for n in ("low", "exp_avg", "exp_avg_sq")]
            vmax = part.own["max_exp_avg_sq"].data_ptr() if "max_exp_avg_sq" in part.own else 0
            param = self.arena.params.data_ptr() + part.param_at + a * size
            grad = grads + part.grad_at + a * part.arrays["grad"].element_size()
            kind = part.row.kind | part.row.hyper << 32
            rows.append([param, addresses[0], grad, *addresses[1:], vmax, b - a, kind])
        return torch.tensor(rows, dtype=torch.int64).view(-1, 8), [row[6] for row in rows]

    def launch(self, slot: int, fused: bool, skip: bool = False) -> int | None:
        """The step on the device, from arrive() to publish(); returns the ticket."""
        arena, operation = self.arena, f"step {self.steps}"
        rows, sizes = self.table(arena.slot(slot).data_ptr())
        blocks = first_block(sizes, ADAM_BLOCK)
        signals = ticket = None
        if fused:
            signals, ticket = arena.fused(slot, operation)
        else:
            arena.arrive(slot, operation)
        triton_sharded.adam(
            *(rows, blocks, int(blocks[-1]), scalars_of(HYPERS, SCALE), control_of(skip=float(skip))),
            *(self.kinds, self.aligned, arena.source_deltas, arena.target_deltas, self.transport.state, signals),
        )
        if not fused:
            arena.release(slot)
            ticket = arena.publish(0, 0, [], operation)
        return ticket

    def step(self, fused: bool, skip: bool = False) -> None:
        slot = self.steps % 2
        self.arena.acquire(slot, f"step {self.steps}, slot")
        self.draw(slot)
        doze(self.transport.rank, self.steps)
        self.arena.send(slot, [], f"step {self.steps}, send")
        ticket = self.launch(slot, fused, skip)
        assert ticket is not None
        self.arena.published(ticket, f"step {self.steps}, parameters")
        if not skip:
            self.reference_step()
        self.steps += 1
        self.check()

    def reference_step(self) -> None:
        for part in self.parts:
            fmt, _, coupled, _ = unpack_kind(part.row.kind)
            arrays, scalars = part.arrays, reference.adam_scalars(list(HYPERS[part.row.hyper]), SCALE)
            moments = arrays["exp_avg"], arrays["exp_avg_sq"], arrays.get("max_exp_avg_sq")
            reference.adam_(fmt, arrays["param"], arrays.get("low"), arrays["sum"], *moments, scalars, coupled)
        self.store_expected()

    def check(self) -> None:
        """All parameters on this rank, the bytes between them, and the state that it owns."""
        who = f"rank {self.transport.rank}, step {self.steps}"
        for part in self.parts:
            want = part.arrays["param"]
            got = self.arena.params[part.param_at : part.param_at + want.nbytes].clone().view(want.dtype)
            assert_same_bits(got, want, f"{who}: param of {part.row}")
            for name, tensor in part.own.items():
                assert_same_bits(tensor, part.arrays[name][part.run[0] : part.run[1]], f"{who}: {name} of {part.row}")
            self.expected[part.param_at : part.param_at + want.nbytes] = raw(got)  # any NaN is a NaN
        assert torch.equal(self.arena.params, self.expected), f"{who}: bytes between parameters have changed"


def steps(rank: int, world: int, rows: list[Row], seed: int, count: int, fused: bool) -> None:
    """Some steps on random rows; the third one is skipped."""
    transport = connect()
    sharded = Sharded(transport, rows, seed)
    for i in range(count):
        sharded.step(fused, skip=i == 2)
    transport.exchange(b"", "end")
    transport.close()

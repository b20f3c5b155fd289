"""What each rank does in the tests of the symm_mem transport.

On CPU tensors in Triton's interpreter, over memory that ranks share; some of it on GPUs too. The functions run in
processes of their own (ranks.py) and raise AssertionError where something is wrong.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

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

from pyshard.comm.symm_mem import SymmMemTransport
from pyshard.kernels import reference, triton_sharded
from pyshard.kernels.formats import unpack_kind

CPU = torch.device("cpu")
SCALE = 0.37
SENTINEL = 0xA5
TIMEOUT = 60.0  # seconds; of tests in which nobody is missing


def connect(device: str = "cpu", group: dist.ProcessGroup | None = None) -> SymmMemTransport:
    """A transport; `device` may be "cuda", of which rank r takes the r-th."""
    place = torch.device(device, dist.get_rank()) if device == "cuda" else CPU
    if device == "cuda":
        torch.cuda.set_device(place)
    made = SymmMemTransport.create(group, place, TIMEOUT)
    assert isinstance(made, SymmMemTransport), made
    return made


def settle(transport: SymmMemTransport) -> None:
    """Waits for what has been enqueued."""
    if transport.device.type == "cuda":
        torch.cuda.synchronize(transport.device)


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
            state = {
                n: t[slice(*run)].clone().to(transport.device) for n, t in arrays.items() if n not in ("param", "grad")
            }
            self.parts.append(Part(row, arrays, param_at, grad_at, run, state))
            param_at += -(-arrays["param"].nbytes // 64) * 64 + 64
            grad_at += -(-arrays["grad"].nbytes // 64) * 64 + 64
        self.arena = transport.arena(param_at, grad_at, slots)
        assert not self.arena.params.any() and not self.arena.slot(slots - 1).any()
        self.arena.params.fill_(SENTINEL)
        self.expected = self.arena.params.cpu().clone()
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
            grads = [values_of(self.rng, part.row.n, part.arrays["grad"].dtype) for _ in range(self.transport.world)]
            data = raw(grads[self.transport.rank])
            memory[part.grad_at : part.grad_at + data.numel()] = data
            part.arrays["sum"] = reference.reduce(grads)

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

    def inputs(
        self, slot: int, skip: bool = False
    ) -> tuple[Tensor, Tensor, int, Tensor, Tensor, tuple[int, ...], bool]:
        """What triton_sharded.adam takes first."""
        rows, sizes = self.table(self.arena.slot(slot).data_ptr())
        blocks = first_block(sizes, ADAM_BLOCK)
        tensors = rows, blocks, scalars_of(HYPERS, SCALE), control_of(skip=float(skip))
        rows, device_blocks, scalars, control = (t.to(self.transport.device) for t in tensors)
        return rows, device_blocks, int(blocks[-1]), scalars, control, self.kinds, self.aligned

    def launch(self, slot: int, fused: bool, skip: bool = False) -> int | None:
        """The step on the device, from arrive() to publish(); returns the ticket."""
        arena, operation = self.arena, f"step {self.steps}"
        inputs = self.inputs(slot, skip)
        signals = ticket = None
        if fused:
            signals, ticket = arena.fused(slot, operation)
        else:
            arena.arrive(slot, operation)
        triton_sharded.adam(*inputs, arena.source_deltas, arena.target_deltas, self.transport.state, signals)
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
        params = self.arena.params.cpu()
        for part in self.parts:
            want = part.arrays["param"]
            got = params[part.param_at : part.param_at + want.nbytes].clone().view(want.dtype)
            assert_same_bits(got, want, f"{who}: param of {part.row}")
            for name, tensor in part.own.items():
                assert_same_bits(
                    tensor.cpu(), part.arrays[name][part.run[0] : part.run[1]], f"{who}: {name} of {part.row}"
                )
            self.expected[part.param_at : part.param_at + want.nbytes] = raw(got)  # any NaN is a NaN
        assert torch.equal(params, self.expected), f"{who}: bytes between parameters have changed"

    def step_of_sums(self) -> None:
        """A step whose gradients were summed up before; the launch only tells the peers. For rows of fp32 gradients."""
        arena, world, operation = self.arena, self.transport.world, f"step {self.steps}"
        arena.acquire(0, operation)
        self.draw(0)
        arena.send(0, [(0, arena.slot_bytes)] * world, operation)
        arena.arrive(0, operation)
        reduced = torch.zeros_like(arena.slot(0))
        for part in self.parts:
            span = slice(*(part.grad_at + 4 * i for i in part.run))
            views = [source[span].view(torch.float32) for source in arena.sources(0)]
            triton_sharded.reduce(views, reduced[span].view(torch.float32), accumulate=False)
        arena.release(0)
        rows, *others = self.inputs(0)
        rows[:, 2] += reduced.data_ptr() - arena.slot(0).data_ptr()
        signals, ticket = arena.fused(None, operation)
        own = torch.zeros(1, dtype=torch.int64, device=self.transport.device)
        triton_sharded.adam(rows, *others, own, arena.target_deltas, signals=signals)
        arena.published(ticket, operation)
        self.reference_step()
        self.steps += 1
        self.check()


def steps(rank: int, world: int, rows: list[Row], seed: int, count: int, fused: bool, device: str = "cpu") -> None:
    """Some steps on random rows; the third one is skipped."""
    transport = connect(device)
    sharded = Sharded(transport, rows, seed)
    for i in range(count):
        sharded.step(fused, skip=i == 2)
    transport.exchange(b"", "end")
    transport.close()


def steps_of_sums(rank: int, world: int, rows: list[Row], seed: int, count: int) -> None:
    """Steps as stage 2 takes them."""
    sharded = Sharded(connect(), rows, seed)
    for _ in range(count):
        sharded.step_of_sums()
    sharded.transport.exchange(b"", "end")


# ---- slots, sums, messages ----


def spans_of(numel: int, size: int, world: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Uneven runs of whole elements, one of them empty where there are more than two."""
    cuts = [0, *sorted(int(c) for c in rng.integers(0, numel + 1, world - 1)), numel]
    if world > 2:
        cuts[1] = cuts[2]
    return [(a * size, b * size) for a, b in pairwise(cuts)]


def ring(rank: int, world: int, seed: int, dtype: torch.dtype, rounds: int) -> None:
    """Messages through three slots, summed up late: every second one is added to the one before."""
    transport, rng = connect(), np.random.default_rng(seed)
    numel, slots = 2500, 3
    arena = transport.arena(16, numel * dtype.itemsize, slots)
    waiting: list[tuple[int, Tensor, tuple[int, int]]] = []
    out = torch.full((0,), 0.0)

    def collect(number: int) -> None:
        nonlocal out
        slot, want, (begin, end) = waiting.pop(0)
        assert arena.arrive(slot, f"message {number}")
        views = [source.view(dtype) if source.numel() else source.to(dtype) for source in arena.sources(slot)]
        assert [view.numel() for view in views] == [(end - begin) // dtype.itemsize] * world
        again = number % 2 == 1 and out.numel() == views[0].numel()
        before = out.clone()
        out = out if again else torch.full((views[0].numel(),), float("nan"))
        triton_sharded.reduce(views, out, accumulate=again)
        arena.release(slot)
        assert_same_bits(out, before + want if again else want, f"rank {rank}, message {number}")

    spans = spans_of(numel, dtype.itemsize, world, rng)
    for number in range(rounds):
        if number % 4 == 0:
            spans = spans_of(numel, dtype.itemsize, world, rng)
        slot = number % slots
        if len(waiting) == slots:
            collect(number - slots)
        assert arena.acquire(slot, f"message {number}, slot")
        values = [values_of(rng, numel, dtype) for _ in range(world)]
        arena.slot(slot).copy_(raw(values[rank]))
        doze(rank, number)
        arena.send(slot, spans, f"message {number}, send")
        begin, end = spans[rank]
        want = reference.reduce([value[begin // dtype.itemsize : end // dtype.itemsize] for value in values]).clone()
        waiting.append((slot, want, (begin, end)))
    for number in range(rounds - slots, rounds):
        collect(number)
    transport.exchange(b"", "end")


def epochs(rank: int, world: int, rounds: int) -> None:
    """One slot, many rounds: what is read is always what was sent in this round."""
    transport = connect()
    arena = transport.arena(8 * world, 8, 1)
    own, params = arena.slot(0).view(torch.int64), arena.params.view(torch.int64)
    for number in range(1, rounds + 1):
        arena.acquire(0, "slot")
        own.fill_(1000 * number + rank)
        doze(rank, number, 0.003)
        arena.send(0, [(0, 8)] * world, "send")
        arena.arrive(0, "arrive")
        got = [int(source.view(torch.int64)) for source in arena.sources(0)]
        assert got == [1000 * number + r for r in range(world)]
        arena.release(0)
        for target in [arena.params, *arena.targets]:
            target.view(torch.int64)[rank] = number
        arena.published(arena.publish(0, 8 * world, [], "publish"), "publish")
        assert params.tolist() == [number] * world
        if number % 5 == 0:  # also keeps the next round's parameters from those who have not looked yet
            parts = transport.exchange(bytes([rank, number % 256]), "exchange")
            assert parts == [bytes([r, number % 256]) for r in range(world)]
            assert transport.exchange(b"", "nothing") == [b""] * world


def square_sums(rank: int, world: int, seed: int, offset: int) -> None:
    """Block sums over summed gradients of every dtype, against the plain reference."""
    transport, rng = connect(), np.random.default_rng(seed)
    arena = transport.arena(16, 80_000, 1)
    rows, sums, at = [], [], 64
    for kind, n in ((4, 4096), (8, 4097), (12, 129), (24, 700), (28, 1)):
        dtype = unpack_kind(kind)[1]
        at += offset * dtype.itemsize
        values = [torch.from_numpy(rng.standard_normal(n).astype(np.float32)).to(dtype) for _ in range(world)]
        arena.slot(0)[at : at + n * dtype.itemsize] = raw(values[rank])
        rows.append([0, 0, arena.slot(0).data_ptr() + at, 0, 0, 0, n, kind])
        sums.append(reference.reduce(values))
        at += -(-n * dtype.itemsize // 64) * 64
    arena.send(0, [], "send")
    arena.arrive(0, "arrive")
    blocks = first_block([row[6] for row in rows], NORM_BLOCK)
    got = torch.full((int(blocks[-1]),), float("nan"), dtype=torch.float64)
    triton_sharded.square_sum(torch.tensor(rows), blocks, got, offset == 0, arena.source_deltas)
    want = [float(reference.square_sum([block])) for total in sums for block in total.split(NORM_BLOCK)]
    assert got.tolist() == want
    transport.exchange(b"", "end")


def looking(rank: int, world: int) -> None:
    """block=False tells what is so, and neither waits nor changes anything."""
    transport = connect()
    arena = transport.arena(16, 16, 1)
    assert arena.acquire(0, "slot", block=False)  # never used
    if rank == 0:
        arena.send(0, [(0, 16)] * world, "send")
        assert not arena.arrive(0, "arrive", block=False)  # rank 1 sends after the exchange
        assert not arena.acquire(0, "slot", block=False)  # this rank itself has not released it
        try:
            arena.acquire(0, "slot")
        except RuntimeError as error:
            assert "call release() first" in str(error)
        else:
            raise AssertionError("a slot was given that is still in use")
    transport.exchange(b"", "1")
    if rank != 0:
        arena.send(0, [(0, 16)] * world, "send")
    transport.exchange(b"", "2")
    assert arena.arrive(0, "arrive", block=False)
    if rank == 0:
        arena.release(0)
        assert not arena.acquire(0, "slot", block=False)  # rank 1 still reads
    transport.exchange(b"", "3")
    if rank != 0:
        arena.release(0)
    transport.exchange(b"", "4")
    assert arena.acquire(0, "slot", block=False)


def subgroup(rank: int, world: int, members: list[int]) -> list[int]:
    """Only some ranks, in a group of their own; returns the global ranks that the transport knows."""
    group = dist.new_group(members)
    if rank not in members:
        return []
    transport = connect(group=group)
    assert transport.rank == members.index(rank) and transport.world == len(members)
    assert transport.exchange(bytes([rank]), "exchange") == [bytes([r]) for r in members]
    arena = transport.arena(16, 16, 1)
    arena.slot(0).fill_(rank)
    arena.send(0, [(0, 16)] * len(members), "send")
    arena.arrive(0, "arrive")
    assert [int(source[15]) for source in arena.sources(0)] == members
    transport.exchange(b"", "end")
    return transport.ranks


# ---- the optimizer on top ----


def train(rank: int, world: int, transport: str, stage: int, backend: str, clip: float | None) -> list[bytes]:
    """A few steps of a small model; returns its weights."""
    from pyshard import ShardedAdamW

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 51), torch.nn.Tanh(), torch.nn.Linear(51, 90)).bfloat16()
    optimizer = ShardedAdamW(
        model.parameters(), 1e-2, stage=stage, transport=transport, max_grad_norm=clip, backend=backend, timeout=TIMEOUT
    )
    for i in range(4):
        batch = torch.randn(8, 40, generator=torch.Generator().manual_seed(10 * i + rank))
        model(batch.bfloat16()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [raw(p.detach().flatten()).numpy().tobytes() for p in model.parameters()]

"""The kernels over peers' memory as compiled for sm_80, executed by the PTX interpreter (tests/ptx).

One process holds the buffers of all ranks; the kernels run as one of them, and the flags of the others are set
beforehand. Every access is checked: peers' gradients are read only, and of a peer's buffer only the parameters and
this rank's flags are written. %globaltimer stands still here, so a wait ends only by its flag or by a limit below 0.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from cuda_tables import ADAM_BLOCK, HYPERS, NORM_BLOCK, Row, control_of, first_block, make_arrays, scalars_of, values_of
from ptx import Memory, Module
from reference import Guarded, assert_same_bits
from symm_compile import adam_request, compile_all, norm_request, reduce_request, signal_requests
from torch import Tensor
from triton_compile import Compiled

from pyshard.kernels import reference
from pyshard.kernels.formats import unpack_kind

pytest.importorskip("triton", reason="needs Triton, which compiles without a GPU")

SCALE = 0.37
KINDS = (4, 9, 18, 28, 42)  # every format but one, every switch
# Words of the state array (triton_kernels/signals.py).
FAILED, TICKETS, VERDICT, DONE, ABORT, REPORT = 0, 2, 3, 4, 5, 6
LIMIT, AT_ONCE = 10**9, -1  # nanoseconds
OPERATION = 11
READY, READ, WRITTEN = 0, 4, 8  # words at which the sets of flags begin
FLAG_WORDS = 12


@pytest.fixture(scope="module")
def code() -> dict[str, Compiled]:
    requests = {f"step of {world}": adam_request(KINDS, 80, world) for world in (1, 2)}
    requests["step of 2, unaligned"] = adam_request(KINDS, 80, 2, aligned=False)
    requests["step of 2, apart"] = adam_request(KINDS, 80, 2, fused=False)
    for dtype, world, added in (("fp32", 2, True), ("bf16", 3, False), ("fp16", 1, True)):
        requests[f"reduce {dtype}"] = reduce_request(dtype, 80, world, added)
    return compile_all(requests | {"norm": norm_request(80, 2)} | signal_requests(80))


def launch(made: Compiled, grid: int, arguments: list[object], memory: Memory) -> None:
    kernel = Module.parse(made.ptx.replace("%globaltimer", "0")).kernel(made.name)
    scratch = len(kernel.program().parameters) - len(arguments)  # pointers of Triton's runtime
    kernel.launch(grid, made.threads, [*arguments, *[0] * scratch], memory, shared_bytes=made.shared_bytes)


class Ranks:
    """Flags and words for failures of all ranks, and the state of the one that runs."""

    def __init__(self, world: int, me: int):
        self.world, self.me = world, me
        self.flags = [torch.zeros(FLAG_WORDS, dtype=torch.int64) for _ in range(world)]
        self.words = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
        self.report = torch.zeros(1, dtype=torch.int64)
        self.state = torch.zeros(7, dtype=torch.int64)
        self.state[ABORT], self.state[REPORT] = self.words[me].data_ptr(), self.report.data_ptr()
        self.buffers = torch.tensor([flags.data_ptr() for flags in self.flags])

    def add_to(self, memory: Memory) -> Memory:
        memory.add(self.buffers, name="buffers")
        for rank in range(self.world):
            memory.add(self.flags[rank], writable=True, name=f"flags {rank}")
            memory.add(self.words[rank], writable=True, name=f"word {rank}")
        memory.add(self.state, writable=True, name="state")
        memory.add(self.report, writable=True, name="report")
        return memory

    def check(self, raised: dict[int, int], failed: int = 0) -> None:
        """Which words of each peer's flags this rank has raised, and to what; nothing else has changed."""
        for rank, flags in enumerate(self.flags):
            if rank != self.me:
                want = torch.zeros(FLAG_WORDS, dtype=torch.int64)
                for word, value in raised.items():
                    want[word + self.me] = value
                assert flags.tolist() == want.tolist(), f"rank {rank}"
        assert self.state[FAILED] == failed and self.report[0] == failed
        assert self.state[[TICKETS, VERDICT, DONE]].tolist() == [0, 0, 0]


class Step:
    """Rows of rank `me` with the gradients and parameters of all ranks, in guarded arrays of their own."""

    def __init__(self, world: int, me: int, sizes: tuple[int, ...], rng: np.random.Generator, offset: int = 0):
        self.ranks = Ranks(world, me)
        self.rows = [Row(kind, n, offset, i % len(HYPERS)) for i, (kind, n) in enumerate(zip(KINDS, sizes))]
        # A rank's gradients, and its parameters, lie in one array: one distance leads from rank to rank.
        self.whole = [make_arrays(row, rng) for row in self.rows]
        self.grads = [
            [values_of(rng, row.n, a["grad"].dtype) for a, row in zip(self.whole, self.rows)] for _ in range(world)
        ]
        self.grad_memory = [self._lay_out(grads, offset) for grads in self.grads]
        self.param_memory = [self._lay_out([a["param"] for a in self.whole], offset) for _ in range(world)]
        self.own = [{n: Guarded(t, offset) for n, t in a.items() if n not in ("param", "grad")} for a in self.whole]
        self.before = [memory.clone() for memory, _ in self.param_memory]

    @staticmethod
    def _lay_out(tensors: list[Tensor], offset: int) -> tuple[Tensor, list[int]]:
        """Bytes between sentinels, and where in them each tensor begins."""
        begins, at = [], 64
        for tensor in tensors:
            begins.append(at + offset * tensor.element_size())
            at += -(-tensor.nbytes // 64) * 64 + 128
        room = torch.full((at + 64,), 0xA5, dtype=torch.uint8)
        memory = room[-room.data_ptr() % 64 :]
        for begin, tensor in zip(begins, tensors):
            if tensor.numel():
                memory[begin : begin + tensor.nbytes] = tensor.contiguous().view(torch.uint8)
        return memory, begins

    def run(self, made: Compiled, signals: bool = True, limit: int = LIMIT, skip: bool = False) -> None:
        ranks, me = self.ranks, self.ranks.me
        table = []
        for i, row in enumerate(self.rows):
            address = {name: array.address for name, array in self.own[i].items()}
            param = self.param_memory[me][0].data_ptr() + self.param_memory[me][1][i]
            grad = self.grad_memory[me][0].data_ptr() + self.grad_memory[me][1][i]
            moments = [address.get(name, 0) for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")]
            table.append([param, address.get("low", 0), grad, *moments, row.n, row.kind | row.hyper << 32])
        rows, blocks = torch.tensor(table), first_block([row.n for row in self.rows], ADAM_BLOCK)
        scalars, control = scalars_of(HYPERS, SCALE), control_of(skip=float(skip))
        base = self.grad_memory[me][0].data_ptr(), self.param_memory[me][0].data_ptr()
        sources = torch.tensor([m.data_ptr() - base[0] for m, _ in self.grad_memory])
        targets = torch.tensor([m.data_ptr() - base[1] for r, (m, _) in enumerate(self.param_memory) if r != me])
        memory = ranks.add_to(Memory())
        for tensor, name in ((rows, "rows"), (blocks, "blocks"), (scalars, "scalars"), (control, "control")):
            memory.add(tensor, name=name)
        memory.add(sources, name="sources")
        memory.add(targets, name="targets")
        for rank in range(ranks.world):
            memory.add(self.grad_memory[rank][0], name=f"grads {rank}")
            memory.add(self.param_memory[rank][0], writable=True, name=f"params {rank}")
        for i, own in enumerate(self.own):
            for name, array in own.items():
                memory.add(array.tensor, writable=True, name=f"{i} {name}")
        flags = [8 * READY, 5, 8 * READ, 5, 8 * WRITTEN, 7]
        ids = [ranks.me, ranks.world, *flags, limit, OPERATION]
        arguments = [rows, blocks, len(table), int(blocks[-1]), scalars, control, sources, targets, ranks.state]
        arguments += [ranks.buffers, *ids] if signals else ids
        launch(made, min(int(blocks[-1]), 3), arguments, memory)

    def check_updated(self) -> None:
        """The plain reference's bits in this rank's state and on all ranks' parameters; sentinels intact."""
        for i, (row, arrays) in enumerate(zip(self.rows, self.whole)):
            fmt, _, coupled, _ = unpack_kind(row.kind)
            total = reference.reduce([grads[i] for grads in self.grads])
            scalars = reference.adam_scalars(list(HYPERS[row.hyper]), SCALE)
            moments = arrays["exp_avg"], arrays["exp_avg_sq"], arrays.get("max_exp_avg_sq")
            reference.adam_(fmt, arrays["param"], arrays.get("low"), total, *moments, scalars, coupled)
            for name, array in self.own[i].items():
                assert_same_bits(array.tensor, arrays[name], f"{name} of {row}")
                array.check(f"{name} of {row}")
            for before, (memory, begins) in zip(self.before, self.param_memory):
                span = slice(begins[i], begins[i] + arrays["param"].nbytes)
                assert_same_bits(memory[span].clone().view(arrays["param"].dtype), arrays["param"], f"param of {row}")
                before[span] = memory[span]
        self.check_untouched()

    def check_untouched(self) -> None:
        for before, (memory, _) in zip(self.before, self.param_memory):
            assert torch.equal(memory, before)

    def check_nothing(self) -> None:
        self.check_untouched()
        for i, own in enumerate(self.own):
            for name, array in own.items():
                assert_same_bits(array.tensor, self.whole[i][name], name)


SIZES = (1023, 2052, 1, 1024, 3000)


@pytest.mark.parametrize(("world", "me"), [(1, 0), (2, 0), (2, 1)])
def test_step(code: dict[str, Compiled], world: int, me: int, rng: np.random.Generator) -> None:
    step = Step(world, me, SIZES, rng)
    step.ranks.flags[me][READY + 1 - me] = 5  # the peer's gradients are there
    step.run(code[f"step of {world}"])
    step.check_updated()
    step.ranks.check({READ: 5, WRITTEN: 7})


def test_step_of_unaligned_rows(code: dict[str, Compiled], rng: np.random.Generator) -> None:
    step = Step(2, 1, SIZES, rng, offset=1)
    step.ranks.flags[1][READY] = 6  # already further
    step.run(code["step of 2, unaligned"])
    step.check_updated()
    step.ranks.check({READ: 5, WRITTEN: 7})


def test_step_without_signals(code: dict[str, Compiled], rng: np.random.Generator) -> None:
    step = Step(2, 0, SIZES, rng)
    step.run(code["step of 2, apart"], signals=False)
    step.check_updated()
    step.ranks.check({})


def test_a_skipped_step_tells_the_peers_and_changes_nothing(
    code: dict[str, Compiled], rng: np.random.Generator
) -> None:
    step = Step(2, 0, SIZES, rng)
    step.ranks.flags[0][READY + 1] = 5
    step.run(code["step of 2"], skip=True)
    step.check_nothing()
    step.ranks.check({READ: 5, WRITTEN: 7})


def failed(rank: int, told: bool) -> int:
    return rank + 1 | told << 16 | OPERATION << 20


def test_a_step_whose_peer_does_not_come_changes_nothing(code: dict[str, Compiled], rng: np.random.Generator) -> None:
    step = Step(2, 0, SIZES, rng)
    step.ranks.flags[0][READY + 1] = 4  # of the step before
    step.run(code["step of 2"], limit=AT_ONCE)
    step.check_nothing()
    step.ranks.check({}, failed(1, False))
    step.run(code["step of 2"])  # nor does any later one, and it does not wait
    step.check_nothing()
    step.ranks.check({}, failed(1, False))
    step.run(code["step of 2, apart"], signals=False)
    step.check_nothing()


def test_a_step_whose_peer_has_failed_changes_nothing(code: dict[str, Compiled], rng: np.random.Generator) -> None:
    step = Step(2, 1, SIZES, rng)
    step.ranks.words[1][0] = 1  # rank 0
    step.run(code["step of 2"])
    step.check_nothing()
    step.ranks.check({}, failed(0, True))


def peers(world: int, me: int, ready: Callable[[int], int]) -> Ranks:
    made = Ranks(world, me)
    for rank in range(world):
        made.flags[me][READY + rank] = 0 if rank == me else ready(rank)
    return made


def test_signals(code: dict[str, Compiled]) -> None:
    one = peers(3, 1, lambda rank: 0)
    launch(code["signal"], 1, [one.buffers, 8 * WRITTEN, 2**40, 1, 3, one.state], one.add_to(Memory()))
    one.check({WRITTEN: 2**40})
    one.state[FAILED] = one.report[0] = 3
    launch(code["signal"], 1, [one.buffers, 8 * READ, 9, 1, 3, one.state], one.add_to(Memory()))
    one.check({WRITTEN: 2**40}, 3)


@pytest.mark.parametrize("name", ["wait", "barrier"])
def test_waits(code: dict[str, Compiled], name: str) -> None:
    raised = {READY: 2**40} if name == "barrier" else {}

    def run(one: Ranks, limit: int) -> None:
        arguments = [one.buffers, 8 * READY, 2**40, one.me, one.world, one.state, limit, OPERATION]
        launch(code[name], 1, arguments, one.add_to(Memory()))

    there = peers(3, 1, lambda rank: 2**40 + rank)
    run(there, LIMIT)
    there.check(raised)
    late = peers(3, 1, lambda rank: 2**40 - (rank == 2))
    run(late, AT_ONCE)
    late.check(raised, failed(2, False))
    run(late, LIMIT)  # leaves at once
    late.check(raised, failed(2, False))
    told = peers(3, 0, lambda rank: 0)
    told.words[0][0] = 3
    run(told, LIMIT)
    told.check(raised, failed(2, True))


def test_abort_tells_once(code: dict[str, Compiled]) -> None:
    one = Ranks(3, 0)
    one.words[1][0] = 3
    table = torch.tensor([word.data_ptr() for word in one.words])
    memory = one.add_to(Memory())
    memory.add(table, name="words")
    launch(code["abort"], 1, [table, 0, 2, 0, 3], memory)
    assert [int(word) for word in one.words] == [0, 3, 2]


@pytest.mark.parametrize(("dtype", "world", "added"), [("fp32", 2, True), ("bf16", 3, False), ("fp16", 1, True)])
def test_reduce(code: dict[str, Compiled], dtype: str, world: int, added: bool, rng: np.random.Generator) -> None:
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    for n in (1, 1023, 1024, 2053):
        sources = [Guarded(values_of(rng, n, kind)) for _ in range(world)]
        before = values_of(rng, n, torch.float32)
        out = Guarded(before)
        table, memory = torch.tensor([source.address for source in sources]), Memory()
        memory.add(table)
        for source in sources:
            memory.add(source.tensor)
        memory.add(out.tensor, writable=True)
        launch(code[f"reduce {dtype}"], -(-n // 1024), [table, out.tensor, n], memory)
        want = reference.reduce([source.tensor for source in sources])
        assert_same_bits(out.tensor, before + want if added else want, f"n {n}")
        out.check()


def test_square_sums(code: dict[str, Compiled], rng: np.random.Generator) -> None:
    rows, sums, memory = [], [], Memory()
    gap = 1 << 30  # from each gradient to the peer's: buffers may stand at any address here
    for kind, n in ((4, 4097), (8, 5000), (28, 129), (24, 8192)):
        dtype = unpack_kind(kind)[1]
        own, peer = (Guarded(torch.from_numpy(rng.standard_normal(n).astype(np.float32)).to(dtype)) for _ in range(2))
        memory.add(own.tensor)
        memory.add(peer.tensor, at=own.address + gap)
        rows.append([0, 0, own.address, 0, 0, 0, n, kind])
        sums.append(reference.reduce([own.tensor, peer.tensor]))
    table, blocks = torch.tensor(rows), first_block([row[6] for row in rows], NORM_BLOCK)
    deltas, got = torch.tensor([0, gap]), torch.zeros(int(blocks[-1]), dtype=torch.float64)
    for tensor in (table, blocks, deltas):
        memory.add(tensor)
    memory.add(got, writable=True)
    launch(code["norm"], got.numel(), [table, blocks, len(rows), deltas, got], memory)
    want = [float(reference.square_sum([block])) for total in sums for block in total.split(NORM_BLOCK)]
    assert got.tolist() == want

"""Reduce-scatter, Adam and all-gather over peers' memory in one launch.

Ranks map each other's memory: a gradient is the sum over ranks in fp32, in rank order, each addition rounded on its
own; the update is adam.py's; the new parameter is stored on every rank. Whatever is exchanged lies on all ranks at the
same place of one buffer, so that one distance in bytes per rank leads from this rank's arrays to the others'.
Which rank may read or write when: signals.py.
"""

import triton
import triton.language as tl

from .adam import BLOCK as ADAM_BLOCK
from .adam import NUM_WARPS as ADAM_WARPS
from .adam import SKIP, adam_of_block
from .signals import DONE, FAILED, TICKETS, VERDICT, await_flags, raise_flags

BLOCK = ADAM_BLOCK
NUM_WARPS = ADAM_WARPS


@triton.jit
def may_go_on(buffers, offset, value, me, world, state, limit, operation):
    """await_flags, with one answer for all programs of a launch: the first one here waits and tells the others."""
    failure = tl.zeros((), tl.int64)
    if tl.atomic_add(state + TICKETS, 1, sem="relaxed", scope="gpu") == 0:
        failure = await_flags(buffers, offset, value, me, world, state, limit, operation)
        tl.atomic_xchg(state + VERDICT, tl.where(failure == 0, 1, 2), sem="release", scope="gpu")
    else:
        verdict = tl.atomic_add(state + VERDICT, 0, sem="acquire", scope="gpu")
        while verdict == 0:
            verdict = tl.atomic_add(state + VERDICT, 0, sem="acquire", scope="gpu")
        failure = verdict - 1
    tl.debug_barrier()
    return failure == 0


UNSPECIALIZED = [
    *("n_rows", "n_blocks", "me", "world", "limit", "operation"),
    *("ready", "ready_value", "read", "read_value", "written", "written_value"),
]


@triton.jit(
    do_not_specialize=UNSPECIALIZED,
    do_not_specialize_on_alignment=[
        *("rows", "first_block", "scalars", "control", "source_deltas", "target_deltas", "state", "buffers"),
    ],
)
def sharded_adam_kernel(
    rows,  # [n_rows, 8] int64, read-only: the table, of this rank's parts
    first_block,  # [n_rows + 1] int64, read-only: prefix sums of the rows' block counts
    n_rows,  # int
    n_blocks,  # int: first_block[n_rows]
    scalars,  # [k, 9] fp32, read-only: AdamScalars, by the row's hyper
    control,  # [8] fp64, read-only: parameters and state stay as they are if control[SKIP] != 0
    source_deltas,  # [SOURCES] int64, read-only: bytes from a row's gradient to each rank's, in rank order
    target_deltas,  # [TARGETS] int64, read-only: bytes from a row's parameter to each other rank's
    state,  # [STATE_WORDS] int64: signals.py; None: not asked
    buffers,  # [world] int64, read-only: address of each rank's buffer; only with WRITTEN
    me,  # int
    world,  # int
    ready,  # int: flags of "my gradients are there", and what they must have reached; only with READY
    ready_value,
    read,  # int: flags of "I have read your gradients", and to what they are raised; only with READY
    read_value,
    written,  # int: flags of "your parameters are written", and to what they are raised; only with WRITTEN
    written_value,
    limit,  # int: nanoseconds to wait
    operation,  # int: number of what this rank is doing, for FAILED
    KINDS: tl.constexpr,  # int: bit k is set if a row has kind k; only those branches are compiled
    ALIGNED: tl.constexpr,  # bool: every address, on every rank, is a multiple of 16
    SOURCES: tl.constexpr,
    TARGETS: tl.constexpr,
    READY: tl.constexpr,  # bool: wait for the peers' gradients, and tell them when they are read
    WRITTEN: tl.constexpr,  # bool: tell the peers when their parameters are written
    BLOCK: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    go_on = True
    if READY:
        go_on = may_go_on(buffers, ready, ready_value, me, world, state, limit, operation)
    elif state is not None:
        go_on = tl.load(state + FAILED) == 0
    if go_on:
        if tl.load(control + SKIP) == 0.0:
            # Programs that stay for several blocks ask and report once.
            block = program.to(tl.int64)
            while block < n_blocks:
                adam_of_block(
                    rows,
                    first_block,
                    n_rows,
                    block,
                    scalars,
                    source_deltas,
                    target_deltas,
                    KINDS,
                    ALIGNED,
                    BLOCK,
                    SOURCES,
                    TARGETS,
                )
                block += programs
    if WRITTEN:
        tl.debug_barrier()  # of all threads' stores, before one thread counts them as done
        if tl.atomic_add(state + DONE, 1, sem="acq_rel", scope="sys") == programs - 1:
            tl.store(state + DONE, 0)
            tl.store(state + TICKETS, 0)
            tl.store(state + VERDICT, 0)
            if tl.load(state + FAILED) == 0:
                if READY:
                    raise_flags(buffers, read, read_value, me, world)
                raise_flags(buffers, written, written_value, me, world)

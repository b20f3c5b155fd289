"""Flags between ranks that map each other's memory: raising them, waiting for them, and giving up in time.

A flag is an int64 that only grows. Each rank has one for each peer in a buffer that all peers map, and polls only its
own memory: a peer raises its flag there. Flag p of a set lies at byte `offset` + 8 * p of every rank's buffer.

What a rank wrote before it raised a flag is seen by whoever has seen the flag: all threads' stores come before a
barrier of the program, which comes before one thread's release in the scope of the system; waiting is an acquire in
that scope. Device pointers to peers' memory must allow atomic operations, as torch's own signals do.

A wait that lasts too long, or during which a peer reports that it has failed, writes what happened into FAILED and
into memory that the host reads, and from then on all kernels of the transport leave without doing anything.
"""

import time

import triton
import triton.language as tl

# Words of the state array, which belongs to one rank.
FAILED = tl.constexpr(0)  # 0, or what went wrong: (rank + 1) | kind << 16 | operation << 20
CLOCK = tl.constexpr(1)
TICKETS = tl.constexpr(2)  # programs of a launch that have asked whether to go on
VERDICT = tl.constexpr(3)  # 0: not known yet, 1: go on, 2: leave
DONE = tl.constexpr(4)  # programs of a launch that are through
ABORT = tl.constexpr(5)  # address of a word to which peers write the rank + 1 of one that has failed
REPORT = tl.constexpr(6)  # address of a copy of FAILED for the host
STATE_WORDS = 7

ABORTED = tl.constexpr(1 << 16)  # kind of failure: a peer said so; else it did not answer in time
OPERATION = tl.constexpr(20)  # how far the operation's number is shifted

NUM_WARPS = 1


if triton.knobs.runtime.interpret:

    def now():
        """Nanoseconds. The interpreter has no %globaltimer; and the processes of other ranks need a turn."""
        time.sleep(1e-4)
        return time.monotonic_ns()
else:
    now = tl.extra.cuda.globaltimer


@triton.jit
def clock(state):
    """Nanoseconds, as one thread reads them: threads that saw different times would part before a barrier."""
    tl.atomic_xchg(state + CLOCK, now(), sem="relaxed", scope="gpu")
    return tl.atomic_add(state + CLOCK, 0, sem="relaxed", scope="gpu")


@triton.jit
def at(address):
    return address.to(tl.pointer_type(tl.int64))


@triton.jit
def read(word):
    return tl.atomic_add(word, 0, sem="acquire", scope="sys")


@triton.jit
def raise_flags(buffers, offset, value, me, world):
    """Raises this rank's flag at each peer to `value`."""
    tl.debug_barrier()
    for peer in range(world):
        if peer != me:
            tl.atomic_xchg(at(tl.load(buffers + peer) + offset + 8 * me), value, sem="release", scope="sys")


@triton.jit
def await_flag(flag, value, peer, begin, state, abort, limit):
    """Waits until a flag, which `peer` raises, is at least `value`. Returns 0, or who has failed and how."""
    failure = tl.zeros((), tl.int64)
    seen = read(flag)
    while (seen < value) & (failure == 0):
        gone = read(abort)
        late = clock(state) - begin > limit
        seen = read(flag)
        if gone != 0:
            failure = gone + ABORTED
        elif late & (seen < value):
            failure = failure + (peer + 1)
    return failure


@triton.jit
def report(failure, operation, state):
    """Lets the kernels after this one and the host know of a failure; returns the word FAILED."""
    failure = failure + (operation.to(tl.int64) << OPERATION)
    tl.store(state + FAILED, failure)
    tl.store(at(tl.load(state + REPORT)), failure)
    return failure


@triton.jit
def await_flags(buffers, offset, value, me, world, state, limit, operation):
    """Waits until each peer's flag here is at least `value`. Returns 0, or what went wrong now or before."""
    failure = tl.load(state + FAILED)
    if failure == 0:
        abort = at(tl.load(state + ABORT))
        flags = at(tl.load(buffers + me) + offset)
        begin = clock(state)
        for peer in range(world):
            if (peer != me) & (failure == 0):
                failure = await_flag(flags + peer, value, peer, begin, state, abort, limit)
        if failure != 0:
            failure = report(failure, operation, state)
        tl.debug_barrier()
    return failure


UNSPECIALIZED = ["offset", "value", "me", "world", "limit", "operation"]
WORDS = ["buffers", "state"]  # read and written one by one


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=WORDS)
def signal_kernel(
    buffers,  # [world] int64, read-only: address of each rank's buffer, as mapped here
    offset,  # int: byte of the set of flags in each buffer
    value,  # int: to which this rank's flags are raised
    me,  # int
    world,  # int
    state,  # [STATE_WORDS] int64
):
    if tl.load(state + FAILED) == 0:
        raise_flags(buffers, offset, value, me, world)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=WORDS)
def wait_kernel(
    buffers,  # as signal_kernel
    offset,
    value,  # int: what the peers' flags must have reached
    me,
    world,
    state,
    limit,  # int: nanoseconds
    operation,  # int: number of what this rank is doing, for FAILED
):
    await_flags(buffers, offset, value, me, world, state, limit, operation)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=WORDS)
def barrier_kernel(
    buffers,  # all as wait_kernel
    offset,
    value,
    me,
    world,
    state,
    limit,
    operation,
):
    if tl.load(state + FAILED) == 0:
        raise_flags(buffers, offset, value, me, world)
        await_flags(buffers, offset, value, me, world, state, limit, operation)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=WORDS)
def abort_kernel(
    buffers,  # as signal_kernel
    offset,  # int: byte of the word for failures in each buffer
    value,  # int: of the rank that has failed, + 1
    me,
    world,
):
    """Tells each peer that a rank has failed, unless it has heard of one before."""
    tl.debug_barrier()
    code = value.to(tl.int64)
    for peer in range(world):
        if peer != me:
            word = at(tl.load(buffers + peer) + offset)
            tl.atomic_cas(word, tl.zeros_like(code), code, sem="release", scope="sys")

"""The Triton kernels over peers' memory: launches, and the tables that they take.

As kernels/triton.py: everything is enqueued on the current stream of the device, and with TRITON_INTERPRET=1 runs in
the interpreter, at once, on CPU tensors. Addresses of other ranks' memory are those at which this process maps it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .formats import DTYPE_CODES
from .triton import _file, _launch

# Programs of the fused step per multiprocessor: one waits and reports once, however many blocks it updates. Three of
# them (8 warps, at most 80 registers) fit at a time; more even out the ends. Not measured on a GPU.
PROGRAMS_PER_PROCESSOR = 12
_PROGRAMS_INTERPRETED = 3  # so that tests have several with several blocks each


@dataclass(frozen=True)
class Peers:
    """The buffers of all ranks as this rank's kernels see them, and this rank's memory for waiting."""

    buffers: Tensor  # int64 [world]: address of each rank's buffer
    state: Tensor  # int64 [STATE_WORDS] of triton_kernels/signals.py
    me: int
    world: int
    limit: int  # nanoseconds that a wait may take


@dataclass(frozen=True)
class Flags:
    """A set of flags, one for each peer, and the value that it is to reach."""

    offset: int  # bytes from the begin of the buffer
    value: int


@dataclass(frozen=True)
class Signals:
    """What the fused step waits for, and what it tells the peers."""

    peers: Peers
    ready: Flags | None  # wait until each peer's gradients are there
    read: Flags | None  # then: they have been read. Both or neither
    written: Flags  # then: the peers' parameters are written
    operation: int


def new_state(device: torch.device, abort: int, report: Tensor) -> Tensor:
    """State of a rank that has waited for nothing yet.

    Args:
        abort: address of the word to which peers write that they have failed.
        report: int64 [1] that the host reads: on a CUDA device, pinned host memory.
    """
    file = _file("signals")
    state = torch.zeros(file.STATE_WORDS, dtype=torch.int64)
    state[file.ABORT.value], state[file.REPORT.value] = abort, report.data_ptr()
    return state.to(device)


def signal(peers: Peers, flags: Flags) -> None:
    """Raises this rank's flag at each peer, which will then see all that was enqueued before."""
    _signals("signal_kernel", peers, flags, peers.state)


def wait(peers: Peers, flags: Flags, operation: int) -> None:
    """Holds the stream until each peer has raised its flag here, or has failed to."""
    _signals("wait_kernel", peers, flags, peers.state, peers.limit, operation)


def barrier(peers: Peers, flags: Flags, operation: int) -> None:
    """Holds the stream until the streams of all peers have come here, or one has failed to."""
    _signals("barrier_kernel", peers, flags, peers.state, peers.limit, operation)


def abort(peers: Peers, offset: int, culprit: int) -> None:
    """Writes to a word of each peer, at byte `offset` of its buffer, that rank `culprit` has failed."""
    file = _file("signals")
    arguments = (peers.buffers, offset, culprit + 1, peers.me, peers.world)
    _launch(file.abort_kernel, 1, peers.buffers.device, *arguments, num_warps=file.NUM_WARPS)


def _signals(kernel: str, peers: Peers, flags: Flags, *rest: Tensor | int) -> None:
    file = _file("signals")
    arguments = (peers.buffers, flags.offset, flags.value, peers.me, peers.world, *rest)
    _launch(getattr(file, kernel), 1, peers.buffers.device, *arguments, num_warps=file.NUM_WARPS)


def failure(code: int) -> tuple[int, bool, int]:
    """Rank, whether it said so itself, and operation, of a FAILED word that is not 0."""
    file = _file("signals")
    return code % file.ABORTED.value - 1, bool(code & file.ABORTED.value), code >> file.OPERATION.value


def adam(
    rows: Tensor,
    first_block: Tensor,
    n_blocks: int,
    scalars: Tensor,
    control: Tensor,
    kinds: tuple[int, ...],
    aligned: bool,
    source_deltas: Tensor,
    target_deltas: Tensor,
    state: Tensor | None = None,
    signals: Signals | None = None,
) -> None:
    """One Adam step of all rows on the sum over ranks of their gradients, whose weights go to all ranks.

    Args:
        rows, first_block, n_blocks, scalars, control, kinds: as kernels/triton.py's adam().
        aligned: every address in `rows` and every distance is a multiple of 16.
        source_deltas: int64 [k], bytes from a row's gradient to each rank's, in rank order. The gradient is the sum in
            fp32, in this order, of the k arrays; all are of the row's gradient dtype.
        target_deltas: int64 [j], bytes from a row's parameter to where it is written besides; j may be 0.
        state: of a Peers; nothing happens if a wait has failed before.
        signals: wait and tell the peers inside this launch. Without, flags are the caller's.
    """
    file, mask = _file("sharded"), 0
    for kind in kinds:
        mask |= 1 << kind
    ready = read = written = Flags(0, 0)
    me, world, limit, operation, buffers = 0, 0, 0, 0, None
    programs = min(n_blocks, _programs(rows.device))
    if signals is not None:
        peers, operation, written = signals.peers, signals.operation, signals.written
        ready, read = signals.ready or ready, signals.read or read
        me, world, limit, buffers, state = peers.me, peers.world, peers.limit, peers.buffers, peers.state
        programs = max(programs, 1)  # the peers wait, also for a rank that owns nothing here
    flags = (ready.offset, ready.value, read.offset, read.value, written.offset, written.value)
    arguments = (rows, first_block, rows.shape[0], n_blocks, scalars, control, source_deltas, target_deltas, state)
    constants = {
        "KINDS": mask,
        "ALIGNED": aligned,
        "SOURCES": source_deltas.numel(),
        "TARGETS": target_deltas.numel(),
        "READY": signals is not None and signals.ready is not None,
        "WRITTEN": signals is not None,
        "BLOCK": file.BLOCK,
    }
    more = (buffers, me, world, *flags, limit, operation)
    _launch(file.sharded_adam_kernel, programs, rows.device, *arguments, *more, num_warps=file.NUM_WARPS, **constants)


def square_sum(rows: Tensor, first_block: Tensor, partials: Tensor, aligned: bool, source_deltas: Tensor) -> None:
    """partials[b] = sum of squares of block b of 4,096 elements of the gradients summed over ranks, in lane order.

    Args:
        rows, first_block, partials: as kernels/triton.py's square_sum().
        aligned: every gradient's address and every distance is a multiple of 16.
        source_deltas: as adam().
    """
    file = _file("sharded_norm")
    arguments = (rows, first_block, rows.shape[0], source_deltas, partials)
    constants = {"ALIGNED": aligned, "SOURCES": source_deltas.numel()}
    kernel, warps = file.sharded_square_sum_kernel, file.NUM_WARPS
    _launch(kernel, partials.numel(), rows.device, *arguments, num_warps=warps, **constants)


def reduce(sources: Sequence[Tensor], out: Tensor, accumulate: bool) -> None:
    """out = sources[0] + sources[1] + ... in fp32 and in this order; with accumulate, out = out + that sum.

    Args:
        sources: one per rank, 1-d, contiguous, fp32, bf16 or fp16, as long as `out`.
        out: fp32, 1-d, contiguous, on this rank's device.
    """
    file, n = _file("reduce"), out.numel()
    addresses = tuple(source.data_ptr() for source in sources)
    constants = {
        "DTYPE": DTYPE_CODES[sources[0].dtype],
        "ALIGNED": all(address % 16 == 0 for address in addresses),
        "SOURCES": len(sources),
        "ACCUMULATE": accumulate,
        "BLOCK": file.BLOCK,
    }
    arguments = (_table(addresses, out.device), out, n)
    _launch(file.reduce_kernel, -(-n // file.BLOCK), out.device, *arguments, num_warps=file.NUM_WARPS, **constants)


@lru_cache(maxsize=256)
def _table(words: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 on the device; kept, since the same slots come round again and a copy from the host would wait."""
    return torch.tensor(words, dtype=torch.int64, device=device)


@lru_cache
def _programs(device: torch.device) -> int:
    """Programs of a launch of the step."""
    if device.type == "cpu":
        return _PROGRAMS_INTERPRETED
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count

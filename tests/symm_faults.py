"""What each rank does in the tests of the symm_mem transport where it cannot be used, or where ranks fail."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from cuda_tables import Row
from symm_ranks import CPU, TIMEOUT, Sharded, connect, doze, settle

from pyshard.comm import PeerError
from pyshard.comm.symm_mem import SymmMemTransport, available
from pyshard.kernels import triton_sharded


def reasons(rank: int, world: int) -> list[str | None]:
    """What available() says: here, where one rank is elsewhere, where one has tensors that nobody serves."""
    from pyshard.comm import symm_mem

    found = [available(None, CPU), available(None, torch.device("meta") if rank == 1 else CPU)]
    if rank == 1:
        symm_mem._host = lambda: "another"
    made = SymmMemTransport.create(None, CPU, TIMEOUT)
    assert isinstance(made, str)
    return [*found, made]


def too_large(rank: int, world: int) -> None:
    """One rank cannot have the memory: an error on all, and the transport goes on."""
    import resource

    transport = connect()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        transport.arena(1 << 19, 1 << 19, 2)
    except MemoryError as error:
        assert "rank 1" in str(error) and "collective" in str(error), error
    else:
        raise AssertionError("rank 1 had no room")
    arena = transport.arena(1 << 10, 1 << 10, 2)
    arena.send(0, [(0, 1)] * world, "send")
    arena.arrive(0, "arrive")
    transport.exchange(b"", "end")


def expect_error(act: Callable[[], object], culprit: int, operation: str) -> str:
    """Runs what must raise PeerError; returns its message."""
    try:
        act()
    except PeerError as error:
        assert error.rank == culprit, (error.rank, str(error))
        assert error.operation == operation, error.operation
        assert f"rank {culprit}" in str(error) and operation in str(error), str(error)
        return str(error)
    raise AssertionError(f"{operation}: no PeerError")


def silent(rank: int, world: int, seed: int, fused: bool, device: str = "cpu") -> None:
    """The last rank never sends the second time: the others learn it, and their parameters stay as they were."""
    transport = connect(device)
    sharded = Sharded(transport, [Row(4, 2500), Row(8, 1300)], seed)
    sharded.step(fused)
    transport.exchange(b"", "one step")
    if rank != world - 1:
        transport.timeout = 2.0
        sharded.arena._peers = replace(sharded.arena._peers, limit=2 * 10**9)
        sharded.arena.acquire(1, "slot")
        sharded.draw(1)
        sharded.arena.send(1, [], "send")
        text = "step 1"
        if fused:
            sharded.launch(1, True)  # leaves by itself; the next look of the host raises
            settle(transport)
            message = expect_error(lambda: sharded.arena.acquire(0, "slot"), world - 1, text)
        else:

            def apart() -> None:
                sharded.launch(1, False)
                settle(transport)
                transport.check()

            message = expect_error(apart, world - 1, text)
        assert "has not answered for 2 s" in message
        sharded.check()
        # Whatever is launched now leaves at once as well.
        arena = sharded.arena
        triton_sharded.adam(*sharded.inputs(1), arena.source_deltas, arena.target_deltas, transport.state)
        triton_sharded.signal(arena._peers, triton_sharded.Flags(arena._written, 1000))
        sharded.check()
        for act in (lambda: transport.exchange(b"", "x"), lambda: transport.arena(8, 8, 1), lambda: arena.release(1)):
            expect_error(act, world - 1, text)
    else:
        time.sleep(6.0)
        sharded.check()  # nobody has written to this rank either
        assert not (sharded.arena._own[sharded.arena._written :][: 8 * world].view(torch.int64) >= 1000).any()


def killed(rank: int, world: int, victim: int) -> None:
    """A rank dies; who waits for it on the device is told by who waits for it on the host, long before the timeout."""
    transport = connect()
    arena = transport.arena(16, 16, 1)
    transport.exchange(b"", "start")
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 0:
        expect_error(lambda: transport.exchange(b"", "beginning of step"), victim, "beginning of step")
    else:
        arena.send(0, [(0, 16)] * world, "send")
        message = expect_error(lambda: arena.arrive(0, "reduction"), victim, "reduction")
        assert "another rank has found" in message  # and no timeout


def aborted(rank: int, world: int) -> None:
    """A rank says that it has failed: kernels stop waiting, and the text arrives."""
    transport = connect()
    arena = transport.arena(16, 16, 1)
    transport.exchange(b"", "start")
    if rank == 1:
        doze(rank, 0, 0.3)
        transport.abort("ValueError: a gradient of the wrong shape")
        transport.abort("and once more")
        time.sleep(5)
    else:
        arena.send(0, [(0, 16)] * world, "send")
        message = expect_error(lambda: arena.arrive(0, "reduction"), 1, "reduction")
        assert "has failed: ValueError: a gradient of the wrong shape" in message, message


def closed(rank: int, world: int) -> None:
    transport = connect()
    arena = transport.arena(16, 16, 1)
    transport.exchange(b"", "end")
    transport.close()
    transport.close()
    for act in (lambda: transport.exchange(b"", "x"), lambda: arena.send(0, [], "x")):
        try:
            act()
        except RuntimeError as error:
            assert "close()" in str(error)
        else:
            raise AssertionError("used after close()")

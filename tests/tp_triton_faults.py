"""What each rank does in the tests of the symm_mem tensor-parallel matmuls where ranks fall silent or are wrong."""

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
from symm_faults import expect_error
from tp_triton_ranks import place

from pyshard.tp.symm_mem import SymmMemMatmul

GATHER, SCATTER = "all_gather_matmul", "matmul_reduce_scatter"


def made(rank: int, timeout: float, in_place: bool = False, device: str = "cpu") -> SymmMemMatmul:
    return SymmMemMatmul(None, timeout, device=place(device, rank), in_place=in_place)


def gather(matmul: SymmMemMatmul, rows: int, chunks: int) -> None:
    """ROWS rows of four columns from each rank, in chunks."""
    matmul.chunk_bytes = -(-rows // chunks) * 16
    x, weight = (torch.ones(n, 4, device=matmul.device) for n in (rows, 3))
    (out,) = matmul.all_gather_matmul(x, [weight], [None], [rows] * matmul.world)
    settle(matmul)
    assert (out == 4).all() and out.shape == (rows * matmul.world, 3)


def scatter(matmul: SymmMemMatmul, rows: int) -> None:
    x, weight = (torch.ones(n, 4, device=matmul.device) for n in (rows * matmul.world, 3))
    out = matmul.matmul_reduce_scatter(x, weight, None, [rows] * matmul.world)
    settle(matmul)
    assert (out == 4 * matmul.world).all() and out.shape == (rows, 3)


def settle(matmul: SymmMemMatmul) -> None:
    """Waits for what has been enqueued, and looks for errors."""
    if matmul.device.type == "cuda":
        torch.cuda.synchronize(matmul.device)
    matmul.transport.check()


class Silence(Exception):
    """A rank stops in the middle of a call."""


def after(count: int) -> Callable[[str], None]:
    """A pause that is for good the second time round: `count` things are given first."""
    left = [count]

    def pause(what: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Silence(what)

    return pause


def silent(rank: int, world: int, chunk: int, in_place: bool, device: str = "cpu") -> None:
    """The last rank stops before it gives a chunk of its rows: the others learn which, and do nothing any more."""
    matmul = made(rank, 20.0, in_place, device)
    gather(matmul, 40, 3)
    scatter(matmul, 5)
    matmul.transport.exchange(b"", "both went well")
    culprit = world - 1
    victim = in_place or rank == 0  # the last one that is served
    lower(matmul, 2.0 if victim else 20.0)
    if rank == culprit:
        # Peers are served one after the other, each with all chunks, unless they fetch the chunks.
        matmul.pause = after(chunk if in_place else chunk + 3 * (world - 2))
        with pytest.raises(Silence, match=f"chunk {chunk}"):
            gather(matmul, 40, 3)
        time.sleep(6.0)
        return
    operation = f"{GATHER}, chunk {chunk}"
    if victim:
        message = expect_error(lambda: gather(matmul, 40, 3), culprit, operation)
        assert "has not answered for 2 s" in message
        for act in (lambda: gather(matmul, 40, 3), lambda: scatter(matmul, 5)):
            expect_error(act, culprit, operation)
    else:
        gather(matmul, 40, 3)  # this rank was served; it hears of the failure from the one that was not
        message = expect_error(lambda: scatter(matmul, 5), culprit, f"{SCATTER}, the chunk of rank {rank}")
        assert "is lost, as another rank has found" in message


def silent_sum(rank: int, world: int, in_place: bool, device: str = "cpu") -> None:
    """The first rank never stores its product."""
    matmul = made(rank, 20.0, in_place, device)
    scatter(matmul, 5)
    matmul.transport.exchange(b"", "it went well")
    lower(matmul, 2.0)
    if rank == 0:
        matmul.pause = after(0)
        with pytest.raises(Silence):
            scatter(matmul, 5)
        time.sleep(6.0)
    else:
        expect_error(lambda: scatter(matmul, 5), 0, f"{SCATTER}, the chunk of rank {rank}")


def late(rank: int, world: int) -> None:
    """A rank has stopped reading: its peers do not overwrite what it has not read, and say so."""
    matmul = made(rank, 20.0)
    lower(matmul, 2.0)
    if rank == 0:
        gather(matmul, 5, 1)
        # As if the others had given for two more calls, but their kernels had never come to the end.
        for slot in matmul._gather._slots:
            slot.epoch += 1
        expect_error(lambda: gather(matmul, 5, 1), 1, f"{GATHER}, reading of the call before the last")
    else:
        gather(matmul, 5, 1)
        time.sleep(5.0)


def lower(matmul: SymmMemMatmul, seconds: float) -> None:
    """The rank waits less from now on."""
    matmul.transport.timeout = seconds
    for memory in (matmul._gather, matmul._scatter):
        memory.peers = matmul.transport.peers(memory._flags)


def killed(rank: int, world: int) -> None:
    """A rank dies before it gives anything."""
    matmul = made(rank, 3.0)
    gather(matmul, 5, 1)
    matmul.transport.exchange(b"", "start")
    if rank == world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    expect_error(lambda: gather(matmul, 5, 1), world - 1, f"{GATHER}, chunk 0")


def told(rank: int, world: int) -> None:
    """A rank says that it has failed: the others' kernels stop waiting, long before the timeout."""
    matmul = made(rank, 50.0)
    gather(matmul, 5, 1)
    matmul.transport.exchange(b"", "start")
    if rank == 1:
        time.sleep(0.3)
        matmul.transport.abort("ValueError: a weight of the wrong shape")
        time.sleep(3)
    else:
        message = expect_error(lambda: gather(matmul, 5, 1), 1, f"{GATHER}, chunk 0")
        assert "has failed: ValueError: a weight of the wrong shape" in message


def wrong(rank: int, world: int) -> None:
    """What does not fit is an error on the rank itself, and changes nothing."""
    matmul = made(rank, 20.0)
    x, weight, bias = torch.ones(3, 4), torch.ones(2, 4), torch.ones(2)
    ags = [
        (ValueError, "sizes", x, [weight], [bias], [3]),
        (ValueError, "sizes", x, [weight], [bias], [3, -3]),
        (ValueError, "5 rows", x, [weight], [bias], [5, 5]),
        (ValueError, "2 dimensions", x[0], [weight], [bias], [3, 3]),
        (ValueError, r"expected \[out, 4\]", x, [weight[:, :3]], [bias], [3, 3]),
        (ValueError, r"expected \[2\]", x, [weight], [bias[:1]], [3, 3]),
        (ValueError, "2 biases", x, [weight], [bias, bias], [3, 3]),
        (TypeError, "bfloat16", x, [weight.bfloat16()], [bias], [3, 3]),
        (TypeError, "float64", x.double(), [weight], [bias], [3, 3]),
    ]
    for kind, text, *arguments in ags:
        with pytest.raises(kind, match=text):
            matmul.all_gather_matmul(*arguments)
    with pytest.raises(ValueError, match="6 rows"):
        matmul.matmul_reduce_scatter(x, weight, bias, [3, 3])
    assert matmul._gather._calls == matmul._scatter._calls == 0
    gather(matmul, 5, 1)
    matmul.transport.exchange(b"", "end")
    matmul.close()
    with pytest.raises(RuntimeError, match="close"):
        gather(matmul, 5, 1)
    with pytest.raises(RuntimeError, match=r"symm_mem cannot be used here.*meta"):
        SymmMemMatmul(None, device=torch.device("meta"))

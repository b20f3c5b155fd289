"""Transport shm when ranks die, stop, fail, leave or fork: every other rank gets an error that says who and where.

Two seconds from a kill to the error is a promise of the transport, so these tests assert it.
"""

import ctypes
import gc
import os
import platform
import signal
import threading
import time

import pytest
import torch
from shm_ranks import KILLED, Rank, later, run_ranks
from torch.utils.data import DataLoader, Dataset

PROMISED = 2.0  # seconds from the death of a rank to the error on all others
VICTIM = 1


def check_lost(results: list, operations: set[str], said: str) -> None:
    """Every rank but the victim has raised a PeerError in time that names it."""
    assert [result.exit for result in results] == [KILLED if r == VICTIM else 0 for r in range(len(results))]
    for rank, result in enumerate(results):
        if rank == VICTIM:
            continue
        lost = result.value
        assert lost["rank"] == VICTIM and lost["operation"] in operations, lost
        assert f"rank {VICTIM} (process" in lost["text"] and said in lost["text"], lost
        assert f"rank {rank} in '{lost['operation']}'" in lost["text"], lost
        assert "Start all ranks again from the last checkpoint" in lost["text"], lost
        assert lost["at"] - lost["died"] < PROMISED, lost


def lost_after_death(rank: Rank, call) -> dict:
    lost = rank.lost(call)
    return lost | {"died": rank.died()}


def killed_before_a_barrier(rank: Rank) -> dict:
    transport = rank.transport()
    transport.exchange(b"", "first barrier")
    if rank.rank == VICTIM:
        time.sleep(0.2)
        rank.die()
    return lost_after_death(rank, lambda: transport.exchange(b"", "second barrier"))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_rank_killed_before_a_barrier(world: int) -> None:
    check_lost(run_ranks(killed_before_a_barrier, world), {"second barrier"}, "Its last call was 'first barrier'")


def killed_in_a_barrier(rank: Rank) -> dict | list[bytes]:
    transport = rank.transport()
    if rank.rank == VICTIM:
        rank.die_in(0.2)
    if rank.rank == 2:
        # By now the victim has arrived and died in the barrier: nothing is missing in it any more.
        rank.wait_for("died")
        time.sleep(0.1)
        assert len(transport.exchange(b"payload", "barrier")) == rank.world
        return lost_after_death(rank, lambda: transport.exchange(b"", "next barrier"))
    return lost_after_death(rank, lambda: transport.exchange(b"payload", "barrier"))


@pytest.mark.parametrize("world", [3, 4])
def test_a_rank_killed_in_a_barrier_fails_those_that_still_wait_in_it(world: int) -> None:
    results = run_ranks(killed_in_a_barrier, world)
    check_lost(results, {"barrier", "next barrier"}, "It waited in 'barrier'")
    assert results[2].value["operation"] == "next barrier"


def killed_in_the_traffic(rank: Rank, place: str) -> dict:
    transport = rank.transport()
    arena = transport.arena(64, 64, 2)
    spans = [(0, 64)] * rank.world
    victim = rank.rank == VICTIM

    def round_of(place: str) -> None:
        arena.acquire(0, "acquire")
        if victim and place == "send":
            rank.die()
        arena.send(0, spans, "send")
        if victim and place == "sent":
            rank.die()
        arena.arrive(0, "arrive")
        if victim and place == "release":
            rank.die()
        arena.release(0)
        if victim and place == "publish":
            rank.die()
        arena.published(arena.publish(0, 64, spans, "publish"), "published")

    for _ in range(3):
        round_of("")
    return lost_after_death(rank, lambda: [round_of(place) for _ in range(2)])


@pytest.mark.parametrize(
    ("place", "operation", "said"),
    [
        ("send", "arrive", "Its last call was"),  # acquire did not have to wait, so it left no note
        ("sent", "published", "Its last call was 'send'"),
        ("release", "published", ""),
        ("publish", "published", "Its last call was 'release of slot 0'"),
    ],
)
def test_a_rank_killed_in_the_traffic_of_an_arena(place: str, operation: str, said: str) -> None:
    check_lost(run_ranks(killed_in_the_traffic, 3, place), {operation}, said)


def killed_while_reading(rank: Rank) -> dict:
    transport = rank.transport()
    arena = transport.arena(0, 64, 1)
    arena.acquire(0, "acquire")
    arena.send(0, [(0, 64)] * rank.world, "send")
    arena.arrive(0, "arrive")
    if rank.rank == VICTIM:
        rank.die()
    arena.release(0)
    return lost_after_death(rank, lambda: arena.acquire(0, "acquire again"))


def test_a_rank_killed_while_it_reads_a_slot() -> None:
    check_lost(run_ranks(killed_while_reading, 3), {"acquire again"}, "has died")


def killed_while_a_peer_computes(rank: Rank) -> dict:
    transport = rank.transport()
    transport.exchange(b"", "before")
    if rank.rank == VICTIM:
        rank.die()
    if rank.rank == 2:
        # Rank 0 has long raised its error and ended when this one comes; the cause is still the victim.
        rank.wait_for("rank 0 is over")
        time.sleep(0.3)
        lost = rank.lost(lambda: transport.exchange(b"", "after"))
        return lost | {"died": lost["at"]}
    lost = lost_after_death(rank, lambda: transport.exchange(b"", "after"))
    transport.close()
    rank.tell("rank 0 is over")
    return lost


def test_the_rank_that_died_first_is_blamed_not_those_that_ended_because_of_it() -> None:
    check_lost(run_ranks(killed_while_a_peer_computes, 3), {"after"}, "has died")


def killed_while_making_an_arena(rank: Rank) -> dict:
    transport = rank.transport()
    if rank.rank == VICTIM:
        rank.die()
    return lost_after_death(rank, lambda: transport.arena(100, 100, 1))


def test_a_rank_killed_while_arenas_are_made() -> None:
    check_lost(run_ranks(killed_while_making_an_arena, 3), {"looking at free memory"}, "It had called nothing yet")


def slow_to_end(rank: Rank) -> dict:
    transport = rank.transport()
    if rank.rank == VICTIM:

        def stay() -> None:
            rank.wait_for("seen")
            os.kill(os.getpid(), signal.SIGKILL)

        # Its main thread has ended, another one has not: so far is a process whose memory takes long to give back.
        threading.Thread(target=stay).start()
        rank.tell("died", time.monotonic())
        ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)
    lost = lost_after_death(rank, lambda: transport.exchange(b"", "barrier"))
    rank.tell("seen")
    return lost


def test_a_rank_that_takes_long_to_end_counts_as_dead_at_once() -> None:
    check_lost(run_ranks(slow_to_end, 2), {"barrier"}, "has died")


def killed_while_stopped(rank: Rank) -> dict:
    transport = rank.transport()
    pids = [int(pid) for pid in transport.exchange(str(os.getpid()).encode().rjust(9), "pids")]
    if rank.rank == VICTIM:
        os.kill(os.getpid(), signal.SIGSTOP)
    if rank.rank == 0:
        time.sleep(0.3)
        rank.tell("died", time.monotonic())
        os.kill(pids[VICTIM], signal.SIGKILL)
    lost = rank.lost(lambda: transport.exchange(b"", "barrier"))
    rank.wait_for("died")
    return lost | {"died": rank.died()}


def test_a_rank_killed_while_it_is_stopped() -> None:
    check_lost(run_ranks(killed_while_stopped, 3), {"barrier"}, "has died")


def stopped(rank: Rank) -> dict:
    transport = rank.transport(timeout=0.7)
    pids = [int(pid) for pid in transport.exchange(str(os.getpid()).encode().rjust(9), "pids")]
    if rank.rank == VICTIM:
        os.kill(os.getpid(), signal.SIGSTOP)
        # The others had arrived before they gave up, so that nothing is missing in this one.
        transport.exchange(b"", "barrier")
        return rank.lost(lambda: transport.exchange(b"", "next barrier"))
    if rank.rank == 2:
        rank.wait_for("0 has given up")
    lost = rank.lost(lambda: transport.exchange(b"", "barrier"))
    transport.close()
    rank.tell(f"{rank.rank} has given up")
    if rank.rank == 0:
        rank.wait_for("2 has given up")
        os.kill(pids[VICTIM], signal.SIGCONT)
    return lost


def test_a_stopped_rank_ends_in_a_timeout_and_learns_that_it_was_given_up() -> None:
    results = [result.value for result in run_ranks(stopped, 3)]
    for rank, said in ((0, "waited 0.7 s in vain for"), (2, "rank 0 has ended because of")):
        lost = results[rank]
        assert (lost["rank"], lost["operation"]) == (VICTIM, "barrier")
        assert said in lost["text"] and "rank 1 (process" in lost["text"] and ", stopped" in lost["text"], lost
        assert "Its last call was 'pids'." in lost["text"]
    assert "larger timeout" in results[0]["text"]
    assert results[VICTIM]["rank"] == 0
    assert "has ended because it waited for this rank in vain" in results[VICTIM]["text"]


def two_are_late(rank: Rank) -> dict | None:
    transport = rank.transport(timeout=0.5)
    if rank.rank:
        rank.wait_for("seen")
        return None
    lost = rank.lost(lambda: transport.exchange(b"", "barrier"))
    rank.tell("seen")
    return lost


def test_a_timeout_names_all_ranks_that_have_not_arrived() -> None:
    lost = run_ranks(two_are_late, 3)[0].value
    assert lost["rank"] == 1
    assert "rank 1 (process" in lost["text"] and "rank 2 (process" in lost["text"] and ", alive)" in lost["text"]


def aborted(rank: Rank) -> dict:
    transport = rank.transport()
    arena = transport.arena(0, 8, 1)
    arena.acquire(0, "acquire")
    if rank.rank == VICTIM:
        time.sleep(0.2)
        rank.tell("died", time.monotonic())
        transport.abort("the disk is full: " + "ä" * 600)  # longer than a note, and cut inside a character
        transport.abort("a second message does not count")
        with pytest.raises(RuntimeError, match="the transport was aborted here: the disk is full"):
            transport.exchange(b"", "after")
        rank.wait_for("over 0")
        rank.wait_for("over 2")
        return {}
    arena.send(0, [(0, 8)] * rank.world, "send")
    lost = lost_after_death(rank, lambda: arena.arrive(0, "arrive"))
    # The first trouble stays, with what is called next.
    for call in (
        lambda: transport.exchange(b"", "again"),
        lambda: arena.arrive(0, "again"),
        lambda: arena.publish(0, 0, [(0, 0)] * rank.world, "again"),
    ):
        again = rank.lost(call)
        assert (again["rank"], again["operation"]) == (VICTIM, "again") and "the disk is full" in again["text"]
    rank.tell(f"over {rank.rank}")
    return lost


def test_abort_ends_the_waits_of_all_others_with_its_message() -> None:
    results = run_ranks(aborted, 3)
    for rank in (0, 2):
        lost = results[rank].value
        assert (lost["rank"], lost["operation"]) == (VICTIM, "arrive")
        assert "has failed: the disk is full: ää" in lost["text"]
        assert lost["at"] - lost["died"] < PROMISED


def closed(rank: Rank) -> dict | None:
    transport = rank.transport()
    transport.exchange(b"", "together")
    if rank.rank == VICTIM:
        transport.close()
        transport.close()
        transport.abort("nobody hears this")
        with pytest.raises(RuntimeError, match="the transport is closed"):
            transport.exchange(b"", "after")
        return None
    return rank.lost(lambda: transport.exchange(b"", "one more"))


def test_a_rank_that_has_closed_is_named() -> None:
    lost = run_ranks(closed, 2)[0].value
    assert (lost["rank"], lost["operation"]) == (VICTIM, "one more")
    assert "has closed its transport. Its last call was 'together'." in lost["text"]


def interrupted(rank: Rank) -> list[float] | dict:
    transport = rank.transport()
    arena = transport.arena(0, 8, 1)
    arena.acquire(0, "acquire")
    if rank.rank != VICTIM:
        rank.wait_for("interrupted in arrive")
        arena.send(0, [(0, 8)] * rank.world, "send")
        arena.arrive(0, "arrive")
        rank.wait_for("interrupted in exchange")
        # It had arrived in the barrier, which fails only if the two do not meet in it before they see the interrupt.
        return rank.lost(lambda: [transport.exchange(b"", "barrier") for _ in range(2)])

    def interrupt(call) -> float:
        later(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            call()
        return time.monotonic() - start

    arena.send(0, [(0, 8)] * rank.world, "send")
    took = [interrupt(lambda: arena.arrive(0, "arrive"))]
    rank.tell("interrupted in arrive")
    arena.arrive(0, "arrive")  # this wait can be taken up again
    took.append(interrupt(lambda: transport.exchange(b"", "barrier")))
    rank.tell("interrupted in exchange")
    with pytest.raises(RuntimeError, match="was aborted here: interrupted by a signal in 'barrier'"):
        transport.exchange(b"", "barrier")
    return took


def test_control_c_ends_a_wait_and_is_told_to_the_others() -> None:
    results = run_ranks(interrupted, 3)
    assert all(0.15 < took < PROMISED for took in results[VICTIM].value)
    for rank in (0, 2):
        assert results[rank].value["rank"] == VICTIM
        assert "has failed: interrupted by a signal in 'barrier'" in results[rank].value["text"]


def other_threads_run(rank: Rank) -> int:
    transport = rank.transport()
    if rank.rank == 1:
        rank.wait_for("counted")
        transport.exchange(b"", "barrier")
        return 0
    counted = 0

    def count() -> None:
        nonlocal counted
        while counted < 100:
            counted += 1
            time.sleep(0.001)
        rank.tell("counted")

    thread = threading.Thread(target=count)
    thread.start()
    transport.exchange(b"", "barrier")
    thread.join()
    return counted


def test_other_threads_run_during_a_wait() -> None:
    assert run_ranks(other_threads_run, 2)[0].value == 100


class Squares(Dataset):
    def __init__(self, seen: torch.Tensor):
        self.seen = seen

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        return int(self.seen[index]) ** 2


def forks(rank: Rank) -> None:
    transport = rank.transport()
    arena = transport.arena(20, 20, 1)
    arena.params.copy_(torch.arange(20, dtype=torch.uint8))
    pid = os.fork()
    if pid == 0:
        # What the child does and how it ends must not reach the peers.
        code = 1
        try:
            with pytest.raises(RuntimeError, match=r"belongs to process \d+, and this is its child"):
                transport.exchange(b"", "in a child")
            with pytest.raises(RuntimeError, match="belongs to process"):
                arena.publish(0, 20, [(0, 20)] * rank.world, "in a child")
            transport.abort("a child's")
            assert arena.params.tolist() == list(range(20))
            transport.close()
            del transport, arena
            gc.collect()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    transport.exchange(b"", "after a fork")
    loader = DataLoader(Squares(arena.params), batch_size=5, num_workers=2, multiprocessing_context="fork")
    assert torch.cat(list(loader)).tolist() == [index**2 for index in range(20)]
    assert transport.exchange(b"x", "after workers") == [b"x"] * rank.world
    arena.acquire(0, "acquire")


def test_forked_children_do_no_harm() -> None:
    run_ranks(forks, 2)

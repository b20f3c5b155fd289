"""Notes: after a failed collective every rank's error names the rank to blame, what it was in, and what the others did.

Real gloo ranks, each case in a group of its own, over torch's own collectives.
"""

import json
import os
import pickle
import re
import signal
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pyshard.comm import PeerError, notes
from pyshard.comm.notes import Notes, abort, plain
from tests import ranks

LIMIT = 40.0  # seconds of a run
SHORT, LONG = 1.0, 30.0  # timeouts of groups: where one is to end, and where none is
LATE = 0.3  # seconds by which the failing rank is behind the others, which wait for it


def _group(seconds: float) -> Any:
    if seconds == LONG:
        notes.SECONDS = 2.5  # the machine may be busy
    group = dist.new_group(timeout=timedelta(seconds=seconds))
    dist.all_reduce(torch.ones(8), group=group)
    return group


def _in(our_notes: Notes, operation: str, call: Any) -> dict[str, Any]:
    """What a rank has raised in a collective, told with notes."""
    begin = time.monotonic()
    with pytest.raises(RuntimeError) as raised:
        call()
    error = our_notes.error(operation, raised.value)
    assert type(error) is PeerError
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.rank, again.operation) == (str(error), error.rank, error.operation)
    assert our_notes.error("another operation", error) is error
    return {"text": str(error), "rank": error.rank, "operation": error.operation, "after": time.monotonic() - begin}


def _sum(group: Any, size: int = 1000) -> None:
    dist.all_reduce(torch.ones(size), group=group)


def _killed(rank: int, world: int) -> Any:
    group = _group(LONG)
    if rank == 1:
        time.sleep(LATE)
        os.kill(os.getpid(), signal.SIGKILL)
    return _in(Notes("test", group, "No weight was changed."), f"sum {rank % 2}", lambda: _sum(group))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_killed(world: int) -> None:
    outcomes = ranks.run(_killed, world, seconds=LIMIT, quiet=True)
    assert outcomes[1].exitcode == -signal.SIGKILL
    for rank, outcome in enumerate(outcomes):
        if rank != 1:
            assert outcome.error is None, outcome.trace
            got = outcome.value
            assert got["rank"] == 1, got
            assert got["operation"] == f"sum {rank % 2}"
            assert got["text"].startswith(f"test: sum {rank % 2} failed on rank {rank}: rank 1 is lost (")
            assert "No weight was changed. Look at the first error of that rank" in got["text"]
            for other in {0, 2, 3} & set(range(world)) - {rank}:
                assert f"ank {other} was in: sum {other % 2}" in got["text"], got


def _late(rank: int, world: int) -> Any:
    group = _group(SHORT)
    if rank == 1:
        time.sleep(2 * SHORT + 1.5)  # beyond the second in which the others look for its note
    return _in(Notes("test", group), "the sum", lambda: _sum(group))


@pytest.mark.parametrize("world", [2, 3])
def test_late(world: int) -> None:
    for rank, outcome in enumerate(ranks.run(_late, world, seconds=LIMIT)):
        got = outcome.value
        assert got["rank"] == 1, got
        if rank == 1:
            assert "this rank came too late" in got["text"], got
            assert "had given up waiting" in got["text"], got
        else:
            assert "rank 1 does not answer" in got["text"], got
            assert "Timed out waiting 1000ms" in got["text"], got


def _other_operation(rank: int, world: int) -> Any:
    group = _group(SHORT)
    our_notes = Notes("test", group)
    if rank == 1:
        parts = [torch.ones(8) for _ in range(world)]
        return _in(our_notes, "the all-gather", lambda: dist.all_gather(parts, torch.ones(8), group=group))
    return _in(our_notes, "the sum", lambda: _sum(group))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_other_operation(world: int) -> None:
    for rank, outcome in enumerate(ranks.run(_other_operation, world, seconds=LIMIT)):
        got = outcome.value
        assert "ranks are in different operations" in got["text"], got
        assert "rank 1 in the all-gather" in got["text"], got
        assert f"rank{'s' * (world > 2)} {', '.join(str(r) for r in range(world) if r != 1)} in the sum" in got["text"]
        assert got["rank"] == (1 if world > 2 else 1 - rank), got


def _fails(rank: int, world: int) -> Any:
    group = _group(LONG)
    our_notes = Notes("test", group)
    if rank == 1:
        time.sleep(LATE)
        our_notes.leave("forward of block 3", ArithmeticError("the loss is NaN"))
        abort(group)
        time.sleep(LATE)
        abort(group)  # harmless
        return None
    return _in(our_notes, "the sum", lambda: _sum(group))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_rank_that_fails_says_why_and_others_notice_at_once(world: int) -> None:
    for rank, outcome in enumerate(ranks.run(_fails, world, seconds=LIMIT)):
        if rank != 1:
            got = outcome.value
            assert got["rank"] == 1, got
            text = "rank 1 has failed by itself in forward of block 3: ArithmeticError: the loss is NaN"
            assert text in got["text"], got
            assert "no word" not in got["text"], got
            assert got["after"] < LONG / 2, "it waited for the timeout"


def _connection_breaks(rank: int, world: int) -> Any:
    """One that was closed by nobody who says so, as by the network."""
    group = _group(LONG)
    if rank == 1:
        abort(group)
    return _in(Notes("test", group), f"Sum of {rank}", lambda: _sum(group))


def test_a_broken_connection_is_no_mismatch() -> None:
    told = [outcome.value["text"] for outcome in ranks.run(_connection_breaks, 2, seconds=LIMIT)]
    assert all("different operations" not in text for text in told), told
    assert any("all ranks have left word, so a connection broke" in text for text in told), told
    assert all("Rank" not in text or re.search(r"\. Rank [01] was in: Sum of [01]\.", text) for text in told), told


def _because_of_another(rank: int, world: int) -> Any:
    """Rank 0 waits for rank 1, which waits in another group for rank 2, which dies."""
    first, second = (dist.new_group(pair, timeout=timedelta(seconds=LONG)) for pair in ([0, 1], [1, 2]))
    if rank < 2:
        dist.all_reduce(torch.ones(8), group=first)
    if rank > 0:
        dist.all_reduce(torch.ones(8), group=second)
    if rank == 2:
        time.sleep(LATE)
        os.kill(os.getpid(), signal.SIGKILL)
    outer = Notes("outer", first)
    if rank == 1:
        with pytest.raises(RuntimeError) as raised:
            _sum(second)
        error = Notes("inner", second).error("inner sum", raised.value)
        outer.leave("step", error)
        abort(first)
        return {"rank": error.rank, "text": str(error)}
    return _in(outer, "outer sum", lambda: _sum(first))


def test_the_first_cause_is_named_across_groups() -> None:
    first, second, _ = ranks.run(_because_of_another, 3, seconds=LIMIT, quiet=True)
    assert first.error is None and second.error is None, first.trace + second.trace
    assert second.value["rank"] == 2
    assert first.value["rank"] == 2
    assert "rank 1 left in inner sum, because of rank 2" in first.value["text"]


def _store_is_gone(rank: int, world: int, folder: str) -> Any:
    """The first rank keeps the store, as without torchrun."""
    store = dist.TCPStore("127.0.0.1", _port(rank, folder), world, rank == 0, timedelta(seconds=LONG))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=LONG))
    dist.barrier()
    if rank == 0:
        time.sleep(LATE)
        os.kill(os.getpid(), signal.SIGKILL)
    return _in(Notes("test", dist.group.WORLD), "the sum", lambda: _sum(None))


def _port(rank: int, folder: str) -> int:
    """A free one, which the first rank tells the others."""
    import socket
    from pathlib import Path

    path = Path(folder) / "port"
    if rank == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        path.with_suffix(".new").write_text(str(port))
        path.with_suffix(".new").rename(path)
    while not path.exists():
        time.sleep(0.01)
    return int(path.read_text())


def test_a_store_that_died_with_its_rank_is_no_second_error(tmp_path: Any) -> None:
    for outcome in ranks.run(_store_is_gone, 2, str(tmp_path), group=False, seconds=LIMIT, quiet=True)[1:]:
        assert outcome.error is None, outcome.trace
        assert outcome.value["rank"] == 0, outcome.value
        assert "rank 0 is lost" in outcome.value["text"], outcome.value
        assert outcome.value["after"] < LONG / 2, outcome.value


def _old_notes(rank: int, world: int) -> Any:
    """Two failures of one group: the second one has notes of its own. And one error told twice is one failure."""
    group = _group(LONG)
    our_notes = Notes("test", group)
    if rank == 1:
        error = ArithmeticError("old")
        our_notes.leave("old", error)
        our_notes.leave("old, further out", error)
        dist.barrier()
        our_notes.leave("new", ArithmeticError("new"))
        abort(group)
        return None
    dist.barrier()
    old = our_notes.error("old sum", RuntimeError("it timed out"))
    return str(old), _in(our_notes, "new sum", lambda: _sum(group))


def test_old_notes_are_not_read_again() -> None:
    old, got = ranks.run(_old_notes, 2, seconds=LIMIT)[0].value
    assert "rank 1 has failed by itself in old: ArithmeticError: old" in old
    assert "rank 1 has failed by itself in new: ArithmeticError: new" in got["text"]


def _of_a_process_before(rank: int, world: int) -> Any:
    """torchrun has restarted the workers, and their store still has what the ones before have left."""
    group = _group(LONG)
    our_notes = Notes("test", group)
    if rank == 1:
        store = our_notes._store(1)
        old = {"rank": 1, "kind": "failed", "operation": "old", "text": "old", "order": 1, "time": time.time() - 3600}
        store.set("1", json.dumps(old))
        dist.barrier()
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    return _in(our_notes, "the sum", lambda: _sum(group))


def test_notes_of_a_process_before_are_not_read() -> None:
    got = ranks.run(_of_a_process_before, 2, seconds=LIMIT, quiet=True)[0].value
    assert "rank 1 is lost" in got["text"], got


def test_plain() -> None:
    text = "[/a/b/pair.cc:553] Connection closed by peer [127.0.0.1]:20. This is typically caused by\nmore"
    assert plain(RuntimeError(text)) == "Connection closed by peer [127.0.0.1]:20"
    assert plain(RuntimeError("")) == "RuntimeError"

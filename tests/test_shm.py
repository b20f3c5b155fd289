"""Transport shm: small messages and the traffic over arenas, in real processes."""

import random
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from shm_ranks import Rank, run_ranks

from pyshard.comm.shm import ShmTransport

WORLDS = [2, 3, 4]
AREA = 1 << 20  # what an exchange moves in one round


def stamp(seed: int, *place: int, size: int) -> np.ndarray:
    """Random bytes that belong to one place and time."""
    return np.random.default_rng([seed, *place]).integers(0, 256, size, dtype=np.uint8)


def cut(size: int, world: int) -> list[tuple[int, int]]:
    """Spans of a flat array, one for each rank: uneven, and empty for rank 1."""
    cuts = [0, size // 3, size // 3, size // 2, size][: world + 1]
    return [(begin, end) for begin, end in zip(cuts, [*cuts[1:-1], size])]


def exchange(rank: Rank, seed: int) -> None:
    transport = rank.transport()
    assert (transport.name, transport.in_place) == ("shm", True)
    assert (transport.rank, transport.world, transport.ranks) == (rank.rank, rank.world, list(range(rank.world)))
    for round, size in enumerate([0, 1, 7, 8, 100, AREA - 1, AREA, AREA + 1, 3 * AREA + 5, 0, 2]):
        payloads = transport.exchange(stamp(seed, rank.rank, round, size=size).tobytes(), f"round {round}")
        assert payloads == [stamp(seed, peer, round, size=size).tobytes() for peer in range(rank.world)]


@pytest.mark.parametrize("world", [1, *WORLDS])
def test_exchange_brings_all_payloads_in_rank_order(world: int, seed: int) -> None:
    run_ranks(exchange, world, seed)


def exchange_at_random_speeds(rank: Rank, seed: int) -> None:
    transport = rank.transport()
    pause = random.Random(f"{seed} {rank.rank}")
    for round in range(300):
        if pause.random() < 0.2:
            time.sleep(pause.random() * 0.004)
        payloads = transport.exchange(stamp(seed, rank.rank, round, size=64).tobytes(), "exchange")
        assert payloads == [stamp(seed, peer, round, size=64).tobytes() for peer in range(rank.world)]


@pytest.mark.parametrize("world", WORLDS)
def test_a_fast_rank_never_overwrites_what_a_slow_one_has_not_read(world: int, seed: int) -> None:
    run_ranks(exchange_at_random_speeds, world, seed)


def slots_go_round(rank: Rank, seed: int) -> None:
    transport = rank.transport()
    size, slots, rounds = 70_001, 3, 40
    # Two arenas at once, whose slots have numbers in common.
    arenas = [transport.arena(100, size, slots), transport.arena(0, size, slots)]
    assert arenas[0].slot(2).dtype == torch.uint8 and arenas[0].slot(2).shape == (size,)
    assert not any(arena.slot(index).any() for arena in arenas for index in range(slots))
    spans = cut(size, rank.world)
    begin, end = spans[rank.rank]
    pause = random.Random(f"{seed} {rank.rank}")

    def fill(arena: int, round: int) -> None:
        index = round % slots
        arenas[arena].acquire(index, f"acquire {round}")
        time.sleep(pause.random() * 0.003)
        arenas[arena].slot(index).numpy()[:] = stamp(seed, arena, rank.rank, round, size=size)
        arenas[arena].send(index, spans, f"send {round}")

    def read(arena: int, round: int) -> None:
        index = round % slots
        if pause.random() < 0.5:
            while not arenas[arena].arrive(index, f"poll {round}", block=False):
                time.sleep(0.0001)
        else:
            assert arenas[arena].arrive(index, f"arrive {round}")
        time.sleep(pause.random() * 0.003)
        sources = arenas[arena].sources(index)
        assert len(sources) == rank.world
        for peer, source in enumerate(sources):
            assert np.array_equal(source.numpy(), stamp(seed, arena, peer, round, size=size)[begin:end])
        arenas[arena].release(index)

    ahead = slots - 1
    for round in range(rounds + ahead):
        for arena in range(2):
            if round < rounds:
                fill(arena, round)
            if round >= ahead:
                read(arena, round - ahead)


@pytest.mark.parametrize("world", WORLDS)
def test_slots_lose_and_mix_no_bytes_at_random_speeds(world: int, seed: int) -> None:
    run_ranks(slots_go_round, world, seed)


def acquire_waits_for_readers(rank: Rank) -> None:
    transport = rank.transport()
    arena = transport.arena(0, 8, 1)
    assert arena.acquire(0, "first", block=False)
    arena.slot(0).fill_(rank.rank + 1)
    arena.send(0, [(0, 8)] * rank.world, "send")
    arena.arrive(0, "arrive")
    if rank.rank == 1:
        rank.wait_for("tried")
        assert [source.tolist() for source in arena.sources(0)] == [[peer + 1] * 8 for peer in range(rank.world)]
        arena.release(0)
    else:
        arena.release(0)
    if rank.rank == 0:
        assert not arena.acquire(0, "second", block=False)
        rank.tell("tried")
    assert arena.acquire(0, "second")


@pytest.mark.parametrize("world", [2, 3])
def test_acquire_waits_for_the_slowest_reader(world: int) -> None:
    run_ranks(acquire_waits_for_readers, world)


def publish(rank: Rank, seed: int) -> None:
    transport = rank.transport()
    size = 50_021
    arena = transport.arena(size, 0, 0)
    assert arena.params.shape == (size,) and not arena.params.any()
    assert [target.shape for target in arena.targets] == [(size,)] * (rank.world - 1)
    pause = random.Random(f"{seed} {rank.rank}")
    # Two buckets; each rank owns a part of both.
    buckets = [(0, 20_000), (20_000, size)]
    for round in range(30):
        tickets = []
        for begin, end in buckets:
            spans = [(begin + a, begin + b) for a, b in cut(end - begin, rank.world)]
            own = slice(*spans[rank.rank])
            time.sleep(pause.random() * 0.003)
            for params in [arena.params, *arena.targets]:
                params.numpy()[own] = stamp(seed, round, size=size)[own]
            tickets.append(arena.publish(begin, end, spans, "publish"))
        for ticket, (begin, end) in zip(tickets, buckets):
            arena.published(ticket, "published")
            assert np.array_equal(arena.params.numpy()[begin:end], stamp(seed, round, size=size)[begin:end])
        arena.published(tickets[0], "published again")
        transport.exchange(b"", "all have compared")


@pytest.mark.parametrize("world", WORLDS)
def test_published_parameters_are_those_of_all_ranks(world: int, seed: int) -> None:
    run_ranks(publish, world, seed)


def misuse(rank: Rank) -> None:
    transport = rank.transport()
    arena = transport.arena(4, 16, 2)
    spans = [(0, 8), (8, 16)]
    with pytest.raises(RuntimeError, match=r"send of slot 1, which is free; expected acquired\. A slot goes round"):
        arena.send(1, spans, "send")
    arena.acquire(1, "acquire")
    for wrong in (spans[:1] * 3, [(0, 17), (0, 17)], [(9, 8), (9, 8)], [(-1, 8), (-1, 8)]):
        with pytest.raises(ValueError, match="expected one for each of 2 ranks, inside 16 bytes"):
            arena.send(1, wrong, "send")
    with pytest.raises(RuntimeError, match="arrive of slot 1, which is acquired; expected sent or arrived"):
        arena.arrive(1, "arrive")
    arena.send(1, spans, "send")
    with pytest.raises(RuntimeError, match="sources of slot 1, which is sent; expected arrived"):
        arena.sources(1)
    with pytest.raises(ValueError, match="ticket 1 in 'x'; expected one that publish"):
        arena.published(1, "x")
    with pytest.raises(ValueError, match="negative size"):
        transport.arena(-1, 0, 0)
    with pytest.raises(ValueError, match="timeout is 0; expected seconds above 0"):
        type(transport).create(None, 0)
    # Nothing of this has changed anything.
    arena.arrive(1, "arrive")
    arena.release(1)
    assert transport.exchange(b"x", "last") == [b"x", b"x"]
    if rank.rank == 0:
        lost = rank.lost(lambda: transport.exchange(b"12", "sizes"))
    else:
        lost = rank.lost(lambda: transport.exchange(b"123", "sizes"))
    assert (lost["rank"], lost["operation"]) == (1 - rank.rank, "sizes")
    assert "has passed another number of bytes" in lost["text"]


def test_wrong_calls_are_errors_that_change_nothing() -> None:
    run_ranks(misuse, 2)


def subgroups(rank: Rank) -> tuple[int, list[int]]:
    groups = [dist.new_group([3, 1]), dist.new_group([0, 2])]
    group = groups[0] if rank.rank in (1, 3) else groups[1]
    transport = ShmTransport.create(group, 30)
    assert isinstance(transport, ShmTransport)
    seen = transport.exchange(bytes([rank.rank]), "who")
    assert [payload[0] for payload in seen] == transport.ranks
    if rank.rank == 3:
        rank.die()
    if rank.rank == 1:
        lost = rank.lost(lambda: transport.exchange(b"", "again"))
        assert lost["rank"] == 3 and "rank 3" in lost["text"]
    return transport.rank, transport.ranks


def test_ranks_of_a_subgroup_are_named_by_their_global_rank() -> None:
    results = run_ranks(subgroups, 4)
    assert results[0].value == (0, [0, 2]) and results[2].value == (1, [0, 2])
    rank, ranks = results[1].value
    assert sorted(ranks) == [1, 3] and ranks[rank] == 1

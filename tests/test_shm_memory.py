"""Transport shm: whose memory is mapped, how much there is, and that all of it goes again."""

import contextlib
import gc
import os
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from shm_ranks import Rank, run_ranks

from pyshard.comm import shm
from pyshard.comm.memory import available_memory
from pyshard.comm.shm import ShmTransport

GIB = 1 << 30


def cannot_be_reached(rank: Rank, how: str) -> object:
    """create() where rank 1 offers what its peers cannot map, as if it ran on another host."""
    honest = shm._offer
    if rank.rank == 1:

        def offer(memory: object) -> shm.Offer:
            found = honest(memory)
            if how == "no such process":
                return found._replace(pid=2**22 + 1)
            if how == "another process":
                return found._replace(pid=os.getppid())
            if how == "another file":
                return found._replace(fd=os.pipe()[0])
            if how == "another size":
                return found._replace(size=found.size + 4096)
            if how == "another token":
                return found._replace(token=b"x" * 32)
            raise RuntimeError("no more memory on this host")

        shm._offer = offer
    answer = ShmTransport.create(None, 30)
    gc.collect()
    assert our_files() == []
    return answer


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("no such process", "rank 1 (process 4194305 on "),
        ("another process", "/fd/"),
        ("another file", ", not /memfd:pyshard (deleted)"),
        ("another size", "has another version of pyshard"),
        ("another token", "the process with that number here does not have its token"),
        ("no memory", "cannot make shared memory: no more memory on this host"),
    ],
)
def test_all_ranks_learn_why_they_do_not_share_memory(how: str, reason: str) -> None:
    answers = [result.value for result in run_ranks(cannot_be_reached, 3, how)]
    assert isinstance(answers[0], str) and reason in answers[0], answers
    assert answers == [answers[0]] * 3
    teller = "rank 1 on " if how == "no memory" else "rank 0 on "  # the first that cannot map rank 1
    assert answers[0].startswith(teller)


def too_large(rank: Rank) -> list[str]:
    transport = rank.transport()
    before = our_files()
    texts = []
    for sizes in ((100_000 * GIB, 10, 1), (10, 33_000 * GIB, 3)):
        with pytest.raises(MemoryError) as caught:
            transport.arena(*sizes)
        texts.append(str(caught.value))
    arena = transport.arena(100, 10, 1)  # the ranks are still in step
    assert arena.acquire(0, "acquire")
    assert our_files() == before
    return texts


def test_an_arena_larger_than_memory_is_refused_on_all_ranks_with_the_numbers() -> None:
    texts = [result.value for result in run_ranks(too_large, 3)]
    assert texts == [texts[0]] * 3
    large, many = texts[0]
    assert "102,400,000.0 MiB of parameters and 1 slots of 0.0 MiB" in large and "MemAvailable leaves" in large
    assert "0.0 MiB of parameters and 3 slots of 33,792,000.0 MiB" in many
    for text in texts[0]:
        assert "ranks 0, 1, 2 need" in text and "Use a smaller bucket_mb" in text and "'collective'" in text


def refused_by_the_system(rank: Rank, what: str, spare: int) -> str:
    transport = rank.transport()
    before = our_files(), mapped_bytes()
    limited = getattr(resource, what)
    old = resource.getrlimit(limited)
    if rank.rank == 1:
        free = os.dup(0)  # the lowest one
        os.close(free)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        used = {"RLIMIT_FSIZE": 0, "RLIMIT_NOFILE": free, "RLIMIT_AS": size}[what]
        resource.setrlimit(limited, (used + spare, old[1]))
    try:
        with pytest.raises(MemoryError) as caught:
            transport.arena(2 << 20, 1 << 20, 2)
    finally:
        resource.setrlimit(limited, old)
    text = str(caught.value)
    # Also while the error is there: whoever takes another transport then needs the memory.
    assert (our_files(), mapped_bytes()) == before
    transport.arena(2 << 20, 1 << 20, 2)
    return text


@pytest.mark.parametrize(
    ("what", "spare", "reason"),
    [
        ("RLIMIT_FSIZE", 1 << 20, "File too large"),
        ("RLIMIT_NOFILE", 0, "Too many open files"),  # none to look at free memory
        ("RLIMIT_NOFILE", 1, "Too many open files"),  # none to map a peer's
        ("RLIMIT_AS", 1 << 20, "Cannot allocate memory"),
        ("RLIMIT_AS", 6 << 20, "Cannot allocate memory"),  # enough for its own
    ],
)
def test_what_the_system_refuses_one_rank_is_an_error_on_all(what: str, spare: int, reason: str) -> None:
    if what == "RLIMIT_NOFILE" and "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("the sanitizer needs a descriptor to look at an exception")
    texts = [result.value for result in run_ranks(refused_by_the_system, 3, what, spare)]
    assert texts == [texts[0]] * 3
    assert "rank 1: " in texts[0] and reason in texts[0] and "4.0 MiB for each rank" in texts[0]


def our_files() -> list[str]:
    """Descriptors of memory and of processes that this process has; those of gloo come and go."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that listed them
            name = os.readlink(f"/proc/self/fd/{fd}")
            found += [name] if "memfd" in name or "pidfd" in name else []
    return sorted(found)


def mapped_bytes() -> int:
    """Bytes of our shared memory in this process's address space."""
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "/memfd:pyshard" in line]
    return sum(int(end, 16) - int(begin, 16) for begin, end in (line[0].split("-") for line in maps))


def come_and_go(rank: Rank) -> None:
    named = set(os.listdir("/dev/shm"))
    rank.transport().close()
    gc.collect()
    assert (our_files(), mapped_bytes()) == ([], 0)
    before = len(os.listdir("/proc/self/fd"))
    for cycle in range(200):
        transport = rank.transport()
        arena = transport.arena(5000, 1000, 2)
        assert len(our_files()) == rank.world  # the processes
        transport.exchange(b"", "barrier")
        if cycle % 2:
            transport.close()
        del transport, arena
    assert (our_files(), mapped_bytes()) == ([], 0)
    assert len(os.listdir("/proc/self/fd")) == before
    dist.barrier()  # until here gloo's connections are there too
    assert set(os.listdir("/dev/shm")) == named


def test_nothing_stays_of_200_transports() -> None:
    run_ranks(come_and_go, 2, limit=120)


def tensors_stay(rank: Rank) -> None:
    transport = rank.transport()
    arena = transport.arena(3 << 20, 100, 1)
    params, target = arena.params.view(torch.float32), arena.targets[0]
    params.fill_(rank.rank + 1)
    transport.exchange(b"", "filled")
    transport.close()
    del transport, arena
    gc.collect()
    assert params.sum() == (rank.rank + 1) * params.numel()
    assert target.view(torch.float32).sum() == (2 - rank.rank) * params.numel()
    assert mapped_bytes() > 6 << 20
    del target
    assert 3 << 20 < mapped_bytes() < 4 << 20
    del params
    assert mapped_bytes() == 0


def test_tensors_keep_their_memory_when_the_transport_has_closed() -> None:
    run_ranks(tensors_stay, 2)


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:       1000 kB\nMemAvailable:    600 kB\n"}


def left(root: Path) -> dict[str, int]:
    """available_memory() with the names of control groups shortened."""
    return {
        name.replace(f"control group {root}/sys/fs/cgroup", "").split(" (inode")[0]: bytes
        for name, bytes in available_memory(root).items()
    }


def test_memory_left_under_control_groups_of_version_2(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/jobs/mine"
    root = write_tree(
        tmp_path,
        {
            **MEMINFO,
            "proc/self/cgroup": "0::/jobs/mine\n",
            f"{group}/memory.max": "max\n",
            f"{group}/memory.current": "5000\n",
            f"{group}/memory.stat": "anon 1000\n",
            "sys/fs/cgroup/jobs/memory.max": "10000\n",
            "sys/fs/cgroup/jobs/memory.current": "7000\n",
            "sys/fs/cgroup/jobs/memory.stat": "anon 100\ninactive_file 300\nactive_file 20\nshmem 5\n",
            "sys/fs/cgroup/cgroup.procs": "1\n",
        },
    )
    assert left(root) == {"the host's MemAvailable": 600 * 1024, "/jobs": 10000 - 7000 + 320}


def test_memory_left_under_control_groups_of_version_1(tmp_path: Path) -> None:
    files = {"memory.limit_in_bytes": "10000", "memory.usage_in_bytes": "10900", "memory.stat": "total_active_file 7"}
    root = write_tree(
        tmp_path,
        {
            **MEMINFO,
            # The container's own group is the root of its mount, whose path is the host's.
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n",
            **{f"sys/fs/cgroup/memory/{name}": text for name, text in files.items()},
        },
    )
    assert left(root) == {"the host's MemAvailable": 600 * 1024, "/memory": 0}


def test_memory_left_without_control_groups(tmp_path: Path) -> None:
    assert left(write_tree(tmp_path, MEMINFO)) == {"the host's MemAvailable": 600 * 1024}


def test_memory_left_here() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_memory()["the host's MemAvailable"] < total

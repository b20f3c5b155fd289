"""The `symm_mem` transport: GPUs of one host that map each other's memory, over torch's symmetric memory.

Kernels read the gradients of all ranks and write the parameters of all ranks in place. Nothing of it waits on the
host: acquire, arrive, send, release, publish and published enqueue one small kernel each on the current stream
(triton_kernels/signals.py) and return; block=False looks at a copy of the flags and enqueues nothing that would wait.
A rank that does not answer makes the kernels leave, and the next call here raises PeerError. exchange() also holds
the stream until the streams of all ranks have come there: what a step does after it may overwrite parameters that a
backward elsewhere was still reading.

With TRITON_INTERPRET=1 the same kernels run on CPU tensors, over memory that the processes of one host share; for
tests, and only if asked for by name.
"""

import json
import math
import mmap
import os
import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import triton, triton_sharded
from ..kernels.triton_sharded import Flags, Peers, Signals
from .gloo import GlooWire
from .transport import IN_PLACE_BUCKET_BYTES, Arena, PeerError, Spans, Transport

_WORD = 8  # bytes of a flag
_ALIGNMENT = 256  # bytes: no two parts of a buffer share a cache line
_TEXT_BYTES = 512  # what a rank can say about its own failure
_FACTS_BYTES = 1024  # what ranks tell each other about themselves
_CHOOSING = "choosing a transport"


def available(group: dist.ProcessGroup | None, device: torch.device, timeout: float = 60.0) -> str | None:
    """Why the ranks of a group cannot use symm_mem for tensors on their devices; None if they can.

    All ranks call this and get the same answer. It moves a few small messages; that a GPU has no access to the memory
    of one that its process does not see is found only when memory is mapped.
    """
    wire = GlooWire(group, dist.get_rank(group), dist.get_process_group_ranks(group), timeout)
    try:
        return _why_not(wire, device)
    finally:
        wire.close()


def _why_not(wire: GlooWire, device: torch.device) -> str | None:
    facts = _tell(wire, {"why": _unavailable(device), "host": _host(), "gpu": _gpu(device)}, _CHOOSING)
    for rank, fact in zip(wire.ranks, facts, strict=True):
        if fact["why"]:
            return f"on rank {rank}: {fact['why']}"
    hosts = {fact["host"] for fact in facts}
    if len(hosts) > 1:
        return f"its ranks are on {len(hosts)} hosts"
    gpus = [fact["gpu"] for fact in facts]
    for gpu in gpus:
        if gpu and gpus.count(gpu) > 1:
            return f"several ranks use the same GPU ({gpu})"
    unreachable = _tell(wire, _without_access(device, gpus), _CHOOSING)
    for rank, others in zip(wire.ranks, unreachable, strict=True):
        if others:
            return f"the GPU of rank {rank} has no access to the memory of that of rank {wire.ranks[others[0]]}"
    return None


def _unavailable(device: torch.device) -> str | None:
    """What this process alone can say."""
    if device.type not in ("cuda", "cpu"):
        return f"it serves CUDA tensors, and the parameters are on {device}"
    why = triton.unavailable(device.type)
    if why or device.type == "cpu":
        return why
    try:
        from torch.distributed import _symmetric_memory as symm_mem
    except ImportError as error:
        return f"torch {torch.__version__} has no symmetric memory ({error})"
    if symm_mem.get_backend(device) is None:
        return f"torch {torch.__version__} has no symmetric memory for {device.type} tensors"
    return None


def _host() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def _gpu(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _without_access(device: torch.device, gpus: list[str]) -> list[int]:
    """Ranks whose GPU this process sees and cannot reach from its own."""
    if device.type != "cuda":
        return []
    here = {_gpu(torch.device("cuda", i)): i for i in range(torch.cuda.device_count())}
    own = here[_gpu(device)]
    others = [(rank, here[gpu]) for rank, gpu in enumerate(gpus) if here.get(gpu, own) != own]
    return [rank for rank, index in others if not torch.cuda.can_device_access_peer(own, index)]


def _tell(wire: GlooWire, fact: Any, operation: str) -> list[Any]:
    """What each rank tells about itself, in rank order."""
    payload = bytearray(json.dumps(fact).encode().ljust(_FACTS_BYTES))
    parts = wire.all_gather(torch.frombuffer(payload, dtype=torch.uint8), operation)
    return [json.loads(bytes(part.tolist())) for part in parts]


class SymmMemTransport(Transport):
    """See the top of this file. Made by create()."""

    name = "symm_mem"
    in_place = True
    bucket_bytes = IN_PLACE_BUCKET_BYTES

    @classmethod
    def create(cls, group: dist.ProcessGroup | None, device: torch.device, timeout: float) -> "SymmMemTransport | str":
        """The transport, or why the group cannot have it; the same on all ranks, which all call this.

        Args:
            group: None is the default group.
            device: of this rank's tensors.
            timeout: seconds until a rank that does not answer is an error.

        Raises:
            PeerError: a rank does not come.
        """
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        wire = GlooWire(group, dist.get_rank(group), dist.get_process_group_ranks(group), timeout)
        why = _why_not(wire, device)
        if why is None:
            try:
                return cls(group, device, timeout, wire)
            except MemoryError as error:
                why = str(error)
        wire.close()
        return why

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device, timeout: float, wire: GlooWire):
        self.device = device
        self.timeout = timeout
        self.rank, self.ranks, self.world = wire.rank, wire.ranks, len(wire.ranks)
        gpus = device.type == "cuda"
        self.why = "GPUs of one host map each other's memory" if gpus else "asked for, in Triton's interpreter"
        self._group_name = dist.distributed_c10d._get_default_group().group_name if group is None else group.group_name
        self._wire = wire
        self._operations: dict[str, int] = {}
        self._barriers = 0
        self._closed = False
        self._mapped: list[Any] = []  # what torch's mappings live as long as
        self._report = torch.zeros(1, dtype=torch.int64, pin_memory=gpus)
        # The pad of a rank: a word for failures, flags of the barrier, a text.
        self._barrier, self._text = _WORD, _round(_WORD * (1 + self.world))
        self._pad = self.map(self._text + _TEXT_BYTES)
        self.state = triton_sharded.new_state(device, self._pad[self.rank].data_ptr(), self._report)
        self._peers = self.peers(self._pad)

    # ---- memory ----

    def map(self, nbytes: int) -> list[Tensor]:
        """A zeroed buffer on each rank, mapped by all: uint8 [nbytes] each, in rank order.

        Raises:
            MemoryError: on all ranks, if one of them cannot have it.
        """
        if self.device.type == "cuda":
            return self._map_device(nbytes)
        return self._map_host(nbytes)

    def _map_device(self, nbytes: int) -> list[Tensor]:
        """Over torch's symmetric memory."""
        from torch._C._distributed_c10d import _SymmetricMemory

        problem = ""
        try:
            # An allocation of its own: symm_mem.empty takes its memory from a pool, at an offset in a larger buffer.
            own = _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, self.device)
            own.zero_()
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            problem = f"{torch.cuda.mem_get_info(self.device)[0]:,} bytes are free ({error})"
        self._agree(problem, f"{nbytes:,} bytes on {self.device.type}")
        try:
            handle = _SymmetricMemory.rendezvous(own, self._group_name)
            buffers = [handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(self.world)]
            if buffers[self.rank].data_ptr() != own.data_ptr():
                problem = "torch maps a rank's own memory at another address than it gave"
        except RuntimeError as error:
            problem = str(error)
        self._agree(problem, "mapping the memory of all GPUs")
        self._mapped += [own, handle]
        return buffers

    def _map_host(self, nbytes: int) -> list[Tensor]:
        """Over memory files without a name, which the peers open through /proc: no file can be left behind."""
        problem, buffers = "", []
        file = os.memfd_create("pyshard")
        try:
            try:
                os.ftruncate(file, nbytes)
            except OSError as error:
                problem = str(error)
            self._agree(problem, f"{nbytes:,} bytes of host memory")
            for place in _tell(self._wire, f"/proc/{os.getpid()}/fd/{file}", "mapping memory"):
                try:
                    with open(place, "r+b") as other:
                        buffers.append(torch.frombuffer(mmap.mmap(other.fileno(), nbytes), dtype=torch.uint8))
                except OSError as error:
                    problem = str(error)
            self._agree(problem, "mapping the memory of all ranks")
        finally:
            os.close(file)
        return buffers

    def _agree(self, problem: str, what: str) -> None:
        """Raises on all ranks if there is a problem on one."""
        for rank, text in zip(self.ranks, _tell(self._wire, problem[: _FACTS_BYTES // 4], what), strict=True):
            if text:
                raise MemoryError(f"symm_mem transport: {what}, rank {rank}: {text}. Use transport='collective'.")

    def peers(self, buffers: Sequence[Tensor]) -> Peers:
        """Buffers of all ranks, as kernels take them."""
        addresses = torch.tensor([buffer.data_ptr() for buffer in buffers], dtype=torch.int64)
        limit = math.ceil(min(self.timeout, 1e9) * 1e9)
        return Peers(addresses.to(self.device), self.state, self.rank, self.world, limit)

    # ---- the interface ----

    def exchange(self, payload: bytes, operation: str) -> list[bytes]:
        self.check()
        try:
            mine = torch.frombuffer(bytearray(payload or b"\0"), dtype=torch.uint8)
            parts = self._wire.all_gather(mine, operation)
        except PeerError as error:
            if error.rank in self.ranks:
                self._blame(self.ranks.index(error.rank))
            raise
        if self.world > 1:
            self._barriers += 1
            flags = Flags(self._barrier, self._barriers)
            triton_sharded.barrier(self._peers, flags, self.number(operation))
            self.check()
        return [part.numpy().tobytes() if payload else b"" for part in parts]

    def arena(self, param_bytes: int, slot_bytes: int, slots: int) -> "SymmMemArena":
        self.check()
        return SymmMemArena(self, param_bytes, slot_bytes, slots)

    def abort(self, message: str) -> None:
        if self._closed or self.world == 1:
            return
        text = torch.frombuffer(bytearray(message.encode()[: _TEXT_BYTES - 1] + b"\0"), dtype=torch.uint8)
        with self._aside():
            self._pad[self.rank][self._text :][: text.numel()].copy_(text)
        self._blame(self.rank)
        self._wire.abort(message)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._wire.close()
            self._pad, self._mapped = [], []

    # ---- errors ----

    def number(self, operation: str) -> int:
        """What stands for an operation in a kernel's report."""
        return self._operations.setdefault(operation, len(self._operations))

    def check(self) -> None:
        """Raises PeerError if a kernel has found that a peer has failed or does not answer."""
        if self._closed:
            raise RuntimeError("symm_mem transport: it was used after close(). Make another optimizer.")
        code = int(self._report[0])
        if code == 0:
            return
        index, told, number = triton_sharded.failure(code)
        operation = next(text for text, known in self._operations.items() if known == number)
        text = f"has not answered for {self.timeout:g} s"
        if told:
            text = bytes(self._pad[index][self._text :].tolist()).split(b"\0")[0].decode(errors="replace")
            text = f"has failed: {text}" if text else "is lost, as another rank has found"
        else:
            self._blame(index)
        raise PeerError(
            f"symm_mem transport, {operation}: rank {self.ranks[index]} {text}. Look at the first error of rank "
            f"{self.ranks[index]}, then start all ranks again from the last checkpoint; if a rank is only slow, with "
            "a larger timeout.",
            self.ranks[index],
            operation,
        )

    def _blame(self, index: int) -> None:
        """Lets the kernels of the other ranks stop waiting."""
        with self._aside():
            triton_sharded.abort(self._peers, 0, index)

    def _aside(self) -> AbstractContextManager[Any]:
        """A stream of its own: the current one may be held by a kernel that waits."""
        return torch.cuda.stream(torch.cuda.Stream(self.device)) if self.device.type == "cuda" else nullcontext()


class SymmMemArena(Arena):
    """Flags, parameters and slots of all ranks, one buffer each, laid out alike.

    Rows for triton_sharded.adam take addresses in this rank's params and slots; source_deltas and target_deltas lead
    from there to the other ranks'.
    """

    source_deltas: Tensor  # int64 [world]: bytes from this rank's buffer to each rank's
    target_deltas: Tensor  # int64 [world - 1]: the same without this rank

    def __init__(self, transport: SymmMemTransport, param_bytes: int, slot_bytes: int, slots: int):
        self._transport = transport
        world, me = transport.world, transport.rank
        self.slot_bytes, self.slots = slot_bytes, slots
        flags = [(_WORD * world * i) for i in range(2 * slots + 1)]
        self._ready, self._read, self._written = flags[:slots], flags[slots:-1], flags[-1]
        self._flag_bytes = _WORD * world * (2 * slots + 1)
        params = _round(self._flag_bytes)
        first, stride = params + _round(param_bytes), _round(slot_bytes)
        self._slots = [first + stride * i for i in range(slots)]
        self._buffers = transport.map(max(first + stride * slots, 1))
        self._own = self._buffers[me]
        self._peers = transport.peers(self._buffers)
        self.params = self._own[params : params + param_bytes]
        others = [buffer for rank, buffer in enumerate(self._buffers) if rank != me]
        self.targets = [buffer[params : params + param_bytes] for buffer in others]
        deltas = [buffer.data_ptr() - self._own.data_ptr() for buffer in self._buffers]
        self.source_deltas = torch.tensor(deltas, dtype=torch.int64).to(transport.device)
        self.target_deltas = torch.tensor(deltas[:me] + deltas[me + 1 :], dtype=torch.int64).to(transport.device)
        self._spans: list[Spans] = [[] for _ in range(slots)]
        self._sent, self._released, self._published = [0] * slots, [0] * slots, 0
        self._view = _View(self._own[: self._flag_bytes])

    def slot(self, index: int) -> Tensor:
        begin = self._slots[index]
        return self._own[begin : begin + self.slot_bytes]

    def acquire(self, index: int, operation: str, block: bool = True) -> bool:
        self._transport.check()
        value = self._sent[index]
        if self._released[index] < value:
            if not block:
                return False
            raise RuntimeError(
                f"pyshard: symm_mem: slot {index} was acquired before this rank has released what it held; "
                "call release() first"
            )
        return self._wait(Flags(self._read[index], value), operation, block)

    def send(self, index: int, spans: Spans, operation: str) -> None:
        self._transport.check()
        self._spans[index] = spans
        self._sent[index] += 1
        self._signal(Flags(self._ready[index], self._sent[index]))

    def arrive(self, index: int, operation: str, block: bool = True) -> bool:
        self._transport.check()
        return self._wait(Flags(self._ready[index], self._sent[index]), operation, block)

    def sources(self, index: int) -> list[Tensor]:
        begin, end = (self._slots[index] + byte for byte in self._spans[index][self._transport.rank])
        return [buffer[begin:end] for buffer in self._buffers]

    def release(self, index: int) -> None:
        self._transport.check()
        self._released[index] = self._sent[index]
        self._signal(Flags(self._read[index], self._released[index]))

    def publish(self, begin: int, end: int, spans: Spans, operation: str) -> int:
        self._transport.check()
        self._published += 1
        self._signal(Flags(self._written, self._published))
        return self._published

    def published(self, ticket: int, operation: str) -> None:
        self._transport.check()
        self._wait(Flags(self._written, ticket), operation, True)

    def fused(self, index: int | None, operation: str) -> tuple[Signals, int]:
        """What triton_sharded.adam needs to do arrive(index), release(index) and publish() itself; and the ticket.

        Counts as these calls; the launch must follow. With index None it only publishes. While it waits its programs
        hold the GPU: call arrive() before, and this with None, if a peer may be waiting for another stream of this GPU.
        """
        self._transport.check()
        ready = read = None
        if index is not None:
            self._released[index] = self._sent[index]
            ready, read = Flags(self._ready[index], self._sent[index]), Flags(self._read[index], self._sent[index])
        self._published += 1
        written = Flags(self._written, self._published)
        return Signals(self._peers, ready, read, written, self._transport.number(operation)), self._published

    def _signal(self, flags: Flags) -> None:
        if self._transport.world > 1:
            triton_sharded.signal(self._peers, flags)

    def _wait(self, flags: Flags, operation: str, block: bool) -> bool:
        """Enqueues a wait, unless it is not to be waited and a peer is not there yet."""
        world, me = self._transport.world, self._transport.rank
        if world == 1 or flags.value == 0:
            return True
        if not block:
            begin = flags.offset // _WORD
            seen = self._view.look()[begin : begin + world].tolist()
            if any(value < flags.value for rank, value in enumerate(seen) if rank != me):
                return False
        # Also where the host has seen the flags: the kernel orders what follows it after what the peers wrote.
        triton_sharded.wait(self._peers, flags, self._transport.number(operation))
        self._transport.check()
        return True


class _View:
    """What the host knows of flags on a device, without waiting for the device: some time ago they were so."""

    def __init__(self, flags: Tensor):
        self._flags = flags.view(torch.int64)
        self._copy = self._flags
        if flags.device.type == "cuda":
            self._copy = torch.zeros(self._flags.numel(), dtype=torch.int64, pin_memory=True)
            self._known = self._copy.clone()
            self._stream = torch.cuda.Stream(flags.device)
            self._done = torch.cuda.Event()

    def look(self) -> Tensor:
        """int64 [flags]; on a device, asks for newer ones at the same time."""
        if self._copy is self._flags:
            return self._flags
        if self._done.query():
            self._known.copy_(self._copy)
            with torch.cuda.stream(self._stream):
                self._copy.copy_(self._flags, non_blocking=True)
                self._done.record()
        return self._known


def _round(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT

"""The collective transport: torch.distributed's own messages, for any number of hosts.

A reduce-scatter is one message from every rank to every other, with that rank's span of the slot; the sum over ranks
is the kernels' work. It moves (N-1)/N of the bytes once, half of what gloo's reduce_scatter moves, which is an
all-reduce of which each rank keeps a part. An all-gather is the same with the spans of the parameters, straight into
their place. CPU tensors go over gloo (GlooWire), whatever the backend of the group; CUDA tensors over its NCCL.

Measured with 13.9 M fp32 gradients between two ranks of one thread over loopback, medians of 20 interleaved rounds:
one message each way per bucket of 25 MB, all buckets at once, 18 ms; buckets of 4 MB 21 ms, and 52 ms one after the
other; all_to_all_single 22 ms; all_reduce 42 ms. Messages in pieces of 0.25, 1 and 4 MB took 24, 20 and 18 ms, two
connections per pair 24 ms. Hence whole spans over one connection, as soon as a bucket is full.
"""

import os
import struct
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .gloo import FREE, GlooWire
from .nccl import NcclWire
from .transport import Arena, Spans, Transport

# Parts of the staging memory start at multiples of this many bytes, as the spans of a bucket do, so that kernels see
# one alignment for all ranks.
ALIGNMENT = 128

# Over a link of 1 Gbit/s a step took 571 ms with buckets of up to 25 MB, 536 with 8, 530 with 4, 525 with 2; at
# 4 Gbit/s 252, 246, 265, 267; over loopback 200 (25), 222 (4), 226 (2). (GPT-2 of 13.9 M fp32 parameters, two ranks of
# one thread, medians of 4 to 10 interleaved samples.)
_SLOW_LINK = 0.25e9  # bytes per second
_SLOW_LINK_BUCKET = 2 << 20
_PROBE_BYTES, _PROBES = 1 << 20, 2


class CollectiveTransport(Transport):
    """Transport over gloo or NCCL; see Transport.

    All ranks of the group make it together. Over NCCL, waiting orders the kernels of the current stream after the
    messages and does not stop the host, and a lost peer is found by NCCL's watchdog after the timeout of the group,
    not after `timeout`.

    Args:
        group: the process group; None: the default group.
        device: of the slots and parameters.
        timeout: seconds after which a rank that does not answer is given up.

    Raises:
        PeerError: a rank does not come.
        ValueError: nothing can carry tensors of this device in this group.
    """

    name = "collective"
    in_place = False

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device, timeout: float = 300.0):
        self._device = device
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.ranks = dist.get_process_group_ranks(group)
        self._streams = FREE
        self._wire: GlooWire | NcclWire
        if device.type == "cpu":
            self._wire = GlooWire(group, self.rank, self.ranks, timeout)
            speed = self._link_speed()
            self.why = f"it reaches ranks on any host, over gloo ({8e-9 * speed:.3g} Gbit/s)"
            if speed < _SLOW_LINK:
                self.bucket_bytes = _SLOW_LINK_BUCKET
        else:
            backends = dist.get_backend_config(group)
            if f"{device.type}:nccl" not in backends.split(","):
                raise ValueError(
                    f"collective transport: the process group has the backends {backends!r}; expected nccl for "
                    f"parameters on {device}. Call init_process_group('cpu:gloo,cuda:nccl')."
                )
            self._wire = NcclWire(group, self.rank, self.ranks, device)
            self.why = "it reaches ranks on any host, over NCCL"

    def _link_speed(self) -> float:
        """Bytes per second that a rank gets from the others together, as the slowest rank finds; alike on all."""
        probe = torch.zeros(_PROBE_BYTES, dtype=torch.uint8)
        best = float("inf")
        for _ in range(_PROBES):
            self.exchange(b"", "measuring the link")
            start = time.perf_counter()
            self._wire.all_gather(probe, "measuring the link")
            best = min(best, time.perf_counter() - start)
        times = self.exchange(struct.pack("<d", best), "measuring the link")
        return _PROBE_BYTES * max(self.world - 1, 1) / max(struct.unpack("<d", told)[0] for told in times)

    def exchange(self, payload: bytes, operation: str) -> list[bytes]:
        """What every rank has passed, in rank order; also a barrier. All payloads have one length, which may be 0."""
        mine = torch.frombuffer(bytearray(payload or b"\0"), dtype=torch.uint8).to(self._device)
        parts = self._wire.all_gather(mine, operation)
        return [part.numpy().tobytes() if payload else b"" for part in parts]

    def arena(self, param_bytes: int, slot_bytes: int, slots: int) -> "CollectiveArena":
        """Memory for one set of buckets, zeroed. All ranks pass the same sizes.

        Staging memory for the other ranks' bytes, about slot_bytes * (world - 1) / world per slot, is added when a
        slot is first sent, as its size depends on the spans.
        """
        arena, problem = None, ""
        try:
            arena = CollectiveArena(self._wire, self._device, self._streams, param_bytes, slot_bytes, slots)
        except (RuntimeError, MemoryError):
            problem = f"{_free_bytes(self._device):,} bytes are free"
        self._streams += 1 + slots
        sizes = struct.pack("<qqq", param_bytes, slot_bytes, slots)
        told = self.exchange(sizes + problem.encode().ljust(64), "allocating memory for buckets")
        for rank, answer in zip(self.ranks, told):
            if answer[: len(sizes)] != sizes:
                theirs = struct.unpack("<qqq", answer[: len(sizes)])
                raise ValueError(
                    f"collective transport: bytes of parameters, bytes per slot and slots are {theirs} on rank {rank} "
                    f"and {(param_bytes, slot_bytes, slots)} on rank {self.ranks[self.rank]}; expected the same. "
                    "Give all ranks the same model and options."
                )
        for rank, answer in zip(self.ranks, told):
            if reason := answer[len(sizes) :].decode().strip():
                raise MemoryError(
                    f"collective transport: parameters and buckets need {param_bytes + slots * slot_bytes:,} bytes on "
                    f"{self._device}, and on rank {rank} only {reason}. Use smaller buckets or more ranks."
                )
        assert arena is not None  # or this rank has told of its problem
        return arena

    def abort(self, message: str) -> None:
        """Tells the other ranks that this one has failed; they raise at once. Over NCCL nothing can be told."""
        self._wire.abort(message)

    def close(self) -> None:
        """Finishes what is under way, since other ranks may need it, and closes the connections."""
        self._wire.close()


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class CollectiveArena(Arena):
    """Plain tensors, and for each slot staging memory in which the other ranks' bytes arrive; see Arena."""

    def __init__(
        self,
        wire: "GlooWire | NcclWire",
        device: torch.device,
        stream: int,
        param_bytes: int,
        slot_bytes: int,
        slots: int,
    ):
        self._wire, self._rank, self._world = wire, wire.rank, len(wire.ranks)
        self.slot_bytes, self.slots = slot_bytes, slots
        self._stream = stream  # of the publications; the slots have the next ones
        self.params = torch.zeros(param_bytes, dtype=torch.uint8, device=device)
        self.targets = []
        self._nothing = self.params[:0]
        self._slots = [torch.zeros(slot_bytes, dtype=torch.uint8, device=device) for _ in range(slots)]
        self._staging = [self._nothing] * slots
        self._sources: list[list[Tensor]] = [[] for _ in range(slots)]
        self._sent: list[Any] = [None] * slots
        self._reading = [False] * slots  # between send() and release()
        self._publications: dict[int, Any] = {}
        self._tickets = 0

    @property
    def traffic_bytes(self) -> int:
        return super().traffic_bytes + sum(staging.numel() for staging in self._staging)

    def slot(self, index: int) -> Tensor:
        return self._slots[index]

    def acquire(self, index: int, operation: str, block: bool = True) -> bool:
        if self._reading[index]:
            if block:
                raise RuntimeError(
                    f"collective transport: slot {index} was not released; call release() before {operation}"
                )
            return False
        batch = self._sent[index]
        if batch is None:
            self._wire.check(operation)
            return True
        if block:
            self._wire.wait(batch.sends, operation)
        elif not self._wire.ready(batch.sends, operation):
            return False
        self._sent[index] = None
        return True

    def send(self, index: int, spans: Spans, operation: str) -> None:
        if self._sent[index] is not None:
            raise RuntimeError(
                f"collective transport: slot {index} is still on its way; call acquire() before {operation}"
            )
        slot, (begin, end) = self._slots[index], spans[self._rank]
        stride = -(-(end - begin) // ALIGNMENT) * ALIGNMENT
        if self._staging[index].numel() < stride * (self._world - 1):
            self._staging[index] = torch.empty(stride * (self._world - 1), dtype=torch.uint8, device=slot.device)
        parts = [self._staging[index][i * stride :][: end - begin] for i in range(self._world - 1)]
        parts.insert(self._rank, slot[begin:end])
        pieces = [slot[b:e] for b, e in spans]
        self._sent[index] = self._wire.post(self._stream + 1 + index, parts, pieces, operation)
        self._sources[index] = parts
        self._reading[index] = True

    def arrive(self, index: int, operation: str, block: bool = True) -> bool:
        batch = self._sent[index]
        if batch is None:
            raise RuntimeError(
                f"collective transport: nothing was sent from slot {index}; call send() before {operation}"
            )
        if block:
            self._wire.wait(batch.receives, operation)
            return True
        return self._wire.ready(batch.receives, operation)

    def sources(self, index: int) -> list[Tensor]:
        return list(self._sources[index])

    def release(self, index: int) -> None:
        self._reading[index] = False
        self._sources[index] = []

    def publish(self, begin: int, end: int, spans: Spans, operation: str) -> int:
        pieces = [self.params[b:e] for b, e in spans]
        batch = self._wire.post(self._stream, pieces, [pieces[self._rank]] * self._world, operation)
        self._tickets += 1
        self._publications[self._tickets] = batch
        return self._tickets

    def published(self, ticket: int, operation: str) -> None:
        batch = self._publications.pop(ticket, None)
        if batch is None:
            raise RuntimeError(f"collective transport: {operation}: ticket {ticket} is not that of an open publication")
        self._wire.wait([*batch.receives, *batch.sends], operation)

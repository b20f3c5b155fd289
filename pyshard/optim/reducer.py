"""Gradients to the ranks that own them, while backward runs.

In each *round* every bucket is sent once, in the order of the buckets. A bucket is sent from a gradient hook as soon as
it and all before it are full; what a backward leaves over (parameters without a gradient on this rank) is sent, with
zeros, by finish(). A gradient whose bucket has left already in this round waits in .grad for the next round: several
backwards before a step make several rounds. Hooks never wait for another rank; finish() does, and is called in the
same order on all ranks.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from .shards import Generation, Shard

# Slots of a generation. With three a rank can fill one while another is on its way and a third is summed up.
SLOTS = 3


@dataclass(frozen=True)
class Progress:
    """How far a rank is, for the others to see."""

    rounds: int  # that this rank needs, with the gradients that it holds now
    present: bytes  # a byte per parameter of the generation: 1 if it has had a gradient since the last step


class Reducer:
    """Sends the buckets of one generation."""

    def __init__(self, generation: Generation, slots: int, eager: bool, keep: bool):
        self.shards = generation.shards
        self.params = generation.params
        self.eager = eager  # sends from hooks; else all is left to finish()
        self.keep = keep  # leaves .grad as it is (stage 1)
        self.slots = slots
        self.sent = 0  # since ever: gives each message its slot
        self.slot: int | None = None  # that this rank fills with the bucket that is sent next
        self.idle = True  # no backward has sent, or would have, since the last step
        self.waiting: deque[tuple[int, int, int]] = deque()  # (slot, bucket, round) on their way
        self.summed: deque[tuple[int, int]] = deque()  # (bucket, round) since the last step, in order
        self.place = {p: (b, i) for b, shard in enumerate(self.shards) for i, p in enumerate(shard.params)}
        self.seen: set[Tensor] = set()  # parameters that have had a gradient since the last step
        self._start()
        self.rounds = 0  # complete since the last step

    def _start(self) -> None:
        """A new round."""
        self.order = [i for i, shard in enumerate(self.shards) if shard.expected]
        self.next = 0  # position in `order`
        for shard in self.shards:
            shard.present = [False] * len(shard.params)
            shard.missing = len(shard.params)

    # ---- called from hooks ----

    def ready(self, param: Tensor) -> None:
        """The gradient of a parameter is in its .grad."""
        index, position = self.place[param]
        shard = self.shards[index]
        if shard.missing and not shard.present[position]:
            shard.present[position] = True
            shard.missing -= 1
        if not self.eager:
            return
        self.idle = False
        # Into the slot at once, while the caches have it.
        if self.next < len(self.order) and index == self.order[self.next] and self._open(shard):
            self.seen.add(param)
            shard.put(position, self.slot, self.keep)  # type: ignore[arg-type]
        self._send_full()

    def _open(self, shard: Shard) -> bool:
        """True if there is a slot to fill."""
        if self.slot is None:
            self._collect(len(self.waiting), block=False)
            slot = self.sent % self.slots
            if len(self.waiting) < self.slots and shard.arena.acquire(slot, "", block=False):
                self.slot = slot
        return self.slot is not None

    def _send_full(self) -> None:
        while self.next < len(self.order):
            shard = self.shards[self.order[self.next]]
            if shard.missing or not self._open(shard):
                return
            self._send(self.order[self.next])
            self.next += 1
            self._collect(len(self.waiting), block=False)
        if all(shard.expected for shard in self.shards):
            self._close()

    # ---- called from step ----

    def progress(self) -> Progress:
        """What this rank has, and how many rounds bring it to the others."""
        pending = [param for param in self.params if param.grad is not None]
        gone = set(self.order[: self.next])
        late = any(self.place[param][0] in gone for param in pending)
        started = self.next > 0 or bool(pending) or self.slot is not None
        rounds = self.rounds + started + (late and not self.keep)
        seen = self.seen.union(pending)
        return Progress(rounds, bytes(param in seen for param in self.params))

    def finish(self, rounds: int, present: bytes) -> Iterator[Shard]:
        """Brings all ranks to the same number of rounds, and yields each bucket as soon as its sum is complete.

        `present`: as Progress's, of all ranks together. The order is the same on all ranks.
        """
        while self.rounds < rounds:
            rest = [i for i, shard in enumerate(self.shards) if not shard.expected and any(shard.flags(present))]
            for index in [*self.order[self.next :], *rest]:
                self._send_waiting(index)
                yield from self._complete(rounds)
            self._close()
        while self.waiting:
            self._collect(1, block=True)
            yield from self._complete(rounds)
        yield from self._complete(rounds)

    def _complete(self, rounds: int) -> Iterator[Shard]:
        while self.summed:
            index, number = self.summed.popleft()
            if number == rounds - 1:  # in which all buckets are sent that have a gradient
                yield self.shards[index]

    def remember(self) -> None:
        """After a finish() without a step: the next one yields all buckets again."""
        self.summed = deque((i, self.rounds - 1) for i, shard in enumerate(self.shards) if shard.rounds)

    def reset(self, present: bytes) -> None:
        """Forgets what the ranks have sent, after a step."""
        for shard in self.shards:
            shard.expected = any(shard.flags(present))
            shard.rounds = 0
        self.summed.clear()
        self.seen.clear()
        self.idle = True
        self.rounds = 0
        self._start()

    # ---- traffic ----

    def _close(self) -> None:
        self.rounds += 1
        self._start()
        for shard in self.shards:  # gradients that were late are the first of the new round
            for position, param in enumerate(shard.params):
                if param.grad is not None and not self.keep:
                    shard.present[position] = True
                    shard.missing -= 1

    def _send_waiting(self, index: int) -> None:
        # A slot comes free when all ranks have read it, this one too; so what lies in it is summed up first.
        if self.slot is None:
            self._collect(len(self.waiting) - self.slots + 1, block=True)
            self.slot = self.sent % self.slots
            self.shards[index].arena.acquire(self.slot, f"waiting to send the gradients of bucket {index}")
        self._send(index)

    def _send(self, index: int) -> None:
        shard, slot, self.slot = self.shards[index], self.sent % self.slots, None
        self.seen.update(param for param in shard.params if param.grad is not None)
        shard.fill(slot, self.keep)
        shard.arena.send(slot, shard.grad_spans, f"reduce-scatter of bucket {index}")
        self.sent += 1
        self.waiting.append((slot, index, self.rounds))

    def _collect(self, count: int, block: bool) -> None:
        """Sums up the oldest messages: `count` of them, or without `block` those that are here."""
        for _ in range(count):
            slot, index, number = self.waiting[0]
            shard = self.shards[index]
            if not shard.arena.arrive(slot, f"reduce-scatter of bucket {index}", block):
                return
            shard.reduce(slot, shard.arena.sources(slot))
            shard.arena.release(slot)
            self.waiting.popleft()
            self.summed.append((index, number))


class InPlace:
    """Stage 1 where all ranks read each other's memory: nothing is sent, gradients stay where the kernels read them.

    One slot holds the gradients of all buckets, and each .grad is a view of it, put there by a hook.
    """

    def __init__(self, generation: Generation):
        self.shards = generation.shards
        self.params = generation.params
        self.place = {p: (shard, i) for shard in self.shards for i, p in enumerate(shard.params)}
        self.blank: set[Tensor] = set(self.params)  # whose gradients in the slot are zero
        self.held = False  # the slot is this rank's to write

    def _hold(self) -> None:
        if not self.held:  # all ranks have left the last step, or are about to
            self.shards[0].arena.acquire(0, "end of the last step()")
            self.held = True

    def ready(self, param: Tensor) -> None:
        self._hold()
        shard, position = self.place[param]
        view, grad = shard.views(0)[position], param.grad
        if grad is None:
            return
        self.blank.discard(param)
        if grad.data_ptr() != view.data_ptr():
            view.copy_(grad.detach())
            if grad.dtype == view.dtype:
                param.grad = view

    def progress(self) -> Progress:
        self._hold()
        for param in self.params:
            if param.grad is not None:
                self.ready(param)
            elif param not in self.blank:
                shard, position = self.place[param]
                shard.views(0)[position].zero_()
                self.blank.add(param)
        present = bytes(param.grad is not None for param in self.params)
        return Progress(int(any(present)), present)

    def finish(self, rounds: int, present: bytes) -> Iterator[Shard]:
        arena, whole = self.shards[0].arena, self.shards[0].arena.slot(0).numel()
        world = len(self.shards[0].layout.cuts) - 1
        arena.send(0, [(0, whole)] * world, "reduction of gradients in place")
        arena.arrive(0, "reduction of gradients in place")
        yield from (shard for shard in self.shards if any(shard.flags(present)))

    def reset(self, present: bytes) -> None:
        self.shards[0].arena.release(0)
        self.held = False

    def remember(self) -> None:
        """Nothing was summed up before a step."""

    idle = True

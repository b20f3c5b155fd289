"""Messages between the CPU processes of a group over gloo, which tell whose message failed, and why.

The connections are the wire's own, one per pair of ranks beside those of torch's process group: no other traffic
stands in their way, their tags are free, and a rank that fails can close them, so that peers which wait for something
else fail as well instead of waiting for their timeout. Before it closes them it sends a *note*, so that they name the
rank that was lost first, and not the one that left because of it.

What gloo leaves to do, as seen with torch 2.13:
- is_completed() of a send or a receive turns true only after wait(), and a wait() that ends by its timeout closes all
  connections. So threads wait, with a timeout that never comes, and mark what is complete; wait() releases the
  interpreter's lock. One for each peer and stream: what has come on one must not wait for what is late on another.
- When a connection closes, what waits for its turn fails, but the message that is just being transferred does not. So
  a second thread per peer waits for its note, which is never being transferred.
- A message longer than its receive ends the receiving process, and a shorter one is taken without a word. So the tag
  holds a checksum of the length: what does not match is never delivered, and waiting for it ends in an error.
"""

import json
import math
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .transport import PeerError

NEVER, INSTANT = timedelta(days=365), timedelta(milliseconds=1)
NOTE_BYTES = 1024
NOTE, NOTHING, GATHER, FREE = 0, 1, 2, 3  # streams of the wire itself, and the first one for its users
# Seconds that notes may take to leave, and that peers have to read them before the connections are closed (closing one
# that holds unread bytes may take away what the peer has not read), and to tell what they know of a failure.
NOTE_SECONDS, LINGER_SECONDS = 1.0, 0.2

# Wires made so far for each group, by its name: all ranks make them in one order, which tells them apart in its store.
_made: dict[str, int] = {}


@dataclass(eq=False)
class Message:
    """One send to a peer, or one receive from it."""

    peer: int  # its rank in the group
    sending: bool
    nbytes: int
    work: Any = None  # gloo's; it keeps the tensor
    done: bool = False


@dataclass
class Batch:
    """What one call has started."""

    receives: list[Message] = field(default_factory=list)
    sends: list[Message] = field(default_factory=list)


def _tag(stream: int, nbytes: int) -> int:
    """The tag of a stream's messages of one length; gloo takes 31 bits."""
    return (stream % 2**15) << 16 | zlib.crc32(nbytes.to_bytes(8, "little")) & 0xFFFF


class _Peer:
    """Another rank: threads that wait for its messages and its end, and what is known of that."""

    def __init__(self, index: int, changed: threading.Condition, note: Tensor, note_work: Any):
        self.index = index
        self.queues: dict[int, SimpleQueue[Message | None]] = {}  # of each stream
        self.unfinished: set[Message] = set()
        self.lost_at = math.inf  # when its connection closed, or its note came
        self._changed, self._note, self._note_work = changed, note, note_work
        self.threads: list[threading.Thread] = []
        self._start(self._listen)

    def _start(self, call: Callable[..., None], *args: Any) -> None:
        self.threads.append(threading.Thread(target=call, args=args, daemon=True))
        self.threads[-1].start()

    def _wait(self, queue: "SimpleQueue[Message | None]") -> None:
        while (message := queue.get()) is not None:
            try:
                message.work.wait(NEVER)
            except RuntimeError:
                self.lose()
                return
            with self._changed:
                message.done, message.work = True, None
                self.unfinished.discard(message)
                self._changed.notify_all()

    def _listen(self) -> None:
        with suppress(RuntimeError):
            self._note_work.wait(NEVER)
            if (note := self.read_note()) is not None and note[0] is None:
                return  # its last messages came before, but may still have to be marked
        self.lose()

    def add(self, message: Message, stream: int) -> None:
        with self._changed:
            self.unfinished.add(message)
        if stream not in self.queues:
            self.queues[stream] = SimpleQueue()
            self._start(self._wait, self.queues[stream])
        self.queues[stream].put(message)

    @property
    def lost(self) -> bool:
        return self.lost_at != math.inf

    def lose(self) -> None:
        with self._changed:
            self.lost_at = min(self.lost_at, time.monotonic())
            self._changed.notify_all()

    def read_note(self) -> tuple[int | None, str] | None:
        """What it has said before it closed the connection: the rank to blame, None if it has just finished."""
        data = self._note.numpy().tobytes()
        length, checksum = (int.from_bytes(data[i : i + 4], "little") for i in (0, 4))
        body = data[8 : 8 + length]
        return tuple(json.loads(body)) if length and zlib.crc32(body) == checksum else None


def _note(rank: int | None, text: str) -> Tensor:
    while len(body := json.dumps([rank, text]).encode()) > NOTE_BYTES - 8:
        text = text[: len(text) // 2] + "..."
    head = len(body).to_bytes(4, "little") + zlib.crc32(body).to_bytes(4, "little")
    return torch.frombuffer(bytearray((head + body).ljust(NOTE_BYTES, b"\0")), dtype=torch.uint8)


class GlooWire:
    """Connections between the ranks of `group`, made through its store.

    Args:
        rank: of this process in the group.
        ranks: global rank of each rank of the group.
        timeout: seconds after which a rank that does not answer is given up.
    """

    def __init__(self, group: dist.ProcessGroup | None, rank: int, ranks: list[int], timeout: float):
        self.rank, self.ranks, self.timeout = rank, ranks, timeout
        self.error: PeerError | None = None
        world = len(ranks)
        try:
            self._gloo = _connect(group or dist.group.WORLD, rank, world, timeout)
        except RuntimeError as error:
            raise _unconnected(rank, ranks, timeout, error) from error
        self._changed = threading.Condition()
        self._peers: dict[int, _Peer] = {}
        self._close = weakref.finalize(self, _close, self._gloo, self._peers, self._changed, timeout)
        for index in ((rank + i) % world for i in range(1, world)):  # from the next one: nobody is everybody's first
            note = torch.zeros(NOTE_BYTES, dtype=torch.uint8)
            try:
                work = self._gloo.recv([note], index, _tag(NOTE, NOTE_BYTES))
            except RuntimeError as error:
                raise _unconnected(rank, ranks, timeout, error) from error
            self._peers[index] = _Peer(index, self._changed, note, work)

    def post(self, stream: int, receives: Sequence[Tensor], sends: Sequence[Tensor], operation: str) -> Batch:
        """Starts a receive from, and a send to, each other rank with these uint8 tensors, one per rank of the group.

        Nothing for an empty tensor. Messages of one stream are received in the order in which they were posted.
        """
        self.check(operation)
        batch = Batch()
        for peer in self._peers.values():  # receives first: gloo sends what the other side has asked for
            self._post(peer, False, stream, receives[peer.index], batch.receives, operation)
        for peer in self._peers.values():
            self._post(peer, True, stream, sends[peer.index], batch.sends, operation)
        return batch

    def _post(
        self, peer: _Peer, sending: bool, stream: int, tensor: Tensor, messages: list[Message], operation: str
    ) -> None:
        if not tensor.numel():
            return
        message = Message(peer.index, sending, tensor.numel())
        start = self._gloo.send if sending else self._gloo.recv
        try:
            message.work = start([tensor], peer.index, _tag(stream, message.nbytes))
        except RuntimeError:
            peer.lose()
            raise self._failure([message], operation, None) from None
        messages.append(message)
        peer.add(message, stream)

    def all_gather(self, mine: Tensor, operation: str) -> list[Tensor]:
        """The tensors of all ranks, of one size. In one turn, where gloo's own takes a turn per rank."""
        parts = [mine if rank == self.rank else torch.empty_like(mine) for rank in range(len(self.ranks))]
        self.wait(self.post(GATHER, parts, [mine] * len(parts), operation).receives, operation)
        return parts

    def ready(self, messages: Sequence[Message], operation: str) -> bool:
        """True if all are complete; raises if one never will be."""
        self.check(operation)
        pending = self._pending(messages)
        if self._hopeless(pending):
            raise self._failure(pending, operation, None)
        return not pending

    def wait(self, messages: Sequence[Message], operation: str) -> None:
        """Waits until all are complete."""
        self.check(operation)
        end = time.monotonic() + self.timeout
        with self._changed:
            while (pending := self._pending(messages)) and not self._hopeless(pending):
                if not self._changed.wait(end - time.monotonic()):
                    break
        if pending:
            raise self._failure(pending, operation, None if self._hopeless(pending) else self.timeout)

    def _pending(self, messages: Iterable[Message]) -> list[Message]:
        return [message for message in messages if not message.done]

    def _hopeless(self, pending: Iterable[Message]) -> bool:
        """True if one will never complete. That a rank which owes nothing has gone is no matter."""
        return any(self._peers[message.peer].lost for message in pending)

    def check(self, operation: str) -> None:
        """Raises if the wire has failed before, or is closed."""
        if self.error is not None:
            raise PeerError(f"{self.error} (That was in {self.error.operation}.)", self.error.rank, operation)
        if not self._close.alive:
            raise RuntimeError(f"collective transport: {operation} after close(). Make another optimizer.")

    def abort(self, text: str) -> None:
        """Tells the other ranks that this one has failed, and closes the connections."""
        if self.error is None and self._close.alive:
            rank = self.ranks[self.rank]
            self.error = PeerError(f"collective transport: this rank, {rank}, has failed: {text}", rank, "abort")
            self._leave(rank, f"has failed: {text}")

    def close(self) -> None:
        """Finishes what is under way, since other ranks may need it, tells them, and closes the connections."""
        self._close()

    def _leave(self, rank: int, text: str) -> None:
        self._close.detach()
        _tell(self._gloo, self._peers.values(), _note(rank, text))
        time.sleep(LINGER_SECONDS)
        _hang_up(self._gloo, self._peers.values(), LINGER_SECONDS)

    def _failure(self, pending: Sequence[Message], operation: str, waited: float | None) -> PeerError:
        """The error of messages that will not complete; the other ranks are told, and the connections closed."""
        time.sleep(LINGER_SECONDS)
        (rank, text), *others = self._accused({message.peer for message in pending}, waited).items()
        own = next((message for message in pending if self.ranks[message.peer] == rank), None)
        if own is not None:
            doing = "sending {} to it" if own.sending else "waiting for {} from it"
            size = f"{own.nbytes / 1e6:.3g} MB" if own.nbytes >= 10_000 else f"{own.nbytes} bytes"
            text += f" while rank {self.ranks[self.rank]} was {doing.format(size)} in {operation}"
        text += "".join(f"; rank {other} {reason}" for other, reason in others)
        message = (
            f"collective transport, {operation}: rank {rank} {text}. Look at the first error of rank {rank}, then "
            "start all ranks again from the last checkpoint; if a rank is only slow, with a larger timeout."
        )
        self.error = PeerError(message, rank, operation)
        self._leave(rank, text)
        return self.error

    def _accused(self, pending: set[int], waited: float | None) -> dict[int, str]:
        """Global ranks to blame, the first one first, and why. Those that left because of another one are not."""
        found: dict[int, str] = {}
        for peer in sorted(self._peers.values(), key=lambda peer: peer.lost_at):
            rank, note = self.ranks[peer.index], peer.read_note()
            if note is None:
                if peer.lost:
                    found.setdefault(rank, "closed its connection without a word (it has crashed or was killed)")
            elif note[0] is None:
                if peer.index in pending:
                    found.setdefault(rank, "has left (it runs fewer steps than the others, or has failed)")
            elif note[0] == rank:
                found.setdefault(rank, note[1])
            elif note[0] == self.ranks[self.rank]:
                found.setdefault(rank, f"gave up this rank, which {note[1]}")
            else:  # what made it leave came before whatever this rank has seen
                found = {note[0]: note[1]} | found
                found.pop(rank, None)
        return found or {
            self.ranks[index]: f"has not answered for {waited or 0:g} s (it hangs, is far slower than the others, or "
            "runs other steps or another model)"
            for index in sorted(pending)
        }


def _connect(group: Any, rank: int, world: int, timeout: float) -> Any:
    """Connections of their own between the ranks of a group."""
    count = _made[group.group_name] = _made.get(group.group_name, 0) + 1
    c10d: Any = dist  # whose types do not tell of these
    store = c10d.PrefixStore(f"pyshard/{count}", group.get_group_store())
    return c10d.ProcessGroupGloo(store, rank, world, timedelta(seconds=timeout))


def _unconnected(rank: int, ranks: list[int], timeout: float, error: RuntimeError) -> PeerError:
    reason = str(error).strip().partition("\n")[0]
    return PeerError(
        f"collective transport: rank {ranks[rank]} could not connect to all of ranks {ranks} within {timeout:g} s "
        f"({reason}). All of them must get here: look for the one that failed first. If none did, name the network "
        "interface in GLOO_SOCKET_IFNAME.",
        None,
        "making connections",
    )


def _tell(gloo: Any, peers: Iterable[_Peer], note: Tensor) -> None:
    """Sends the note to all peers that can be reached."""
    works = []
    for peer in peers:
        with suppress(RuntimeError):
            works.append(gloo.send([note], peer.index, _tag(NOTE, NOTE_BYTES)))
    end = time.monotonic() + NOTE_SECONDS
    for work in works:
        with suppress(RuntimeError):
            work.wait(max(INSTANT, timedelta(seconds=end - time.monotonic())))


def _hang_up(gloo: Any, peers: Iterable[_Peer], seconds: float) -> None:
    """Closes all connections, as gloo does when a wait ends by its timeout; that ends the threads.

    One that waits for a message of which a part has come does not end. It stays, asleep, until the process exits.
    """
    for peer in peers:
        with suppress(RuntimeError):
            gloo.recv([torch.zeros(1, dtype=torch.uint8)], peer.index, _tag(NOTHING, 1)).wait(INSTANT)
    for peer in peers:
        for queue in peer.queues.values():
            queue.put(None)
    end = time.monotonic() + seconds
    for thread in (thread for peer in peers for thread in peer.threads):
        if thread is not threading.current_thread():
            thread.join(max(0.0, end - time.monotonic()))


def _close(gloo: Any, peers: dict[int, _Peer], changed: threading.Condition, timeout: float) -> None:
    """The end of a wire; also when the process exits, since no thread may wait in C++ after the interpreter's end."""
    with changed:
        changed.wait_for(lambda: not any(peer.unfinished and not peer.lost for peer in peers.values()), timeout)
    _tell(gloo, peers.values(), _note(None, ""))
    _hang_up(gloo, peers.values(), NOTE_SECONDS)

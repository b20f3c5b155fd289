"""What the sharded optimizers ask of a transport: memory that ranks exchange, and small messages.

A transport belongs to one process group. Optimizers give it *slots* (local gradients on their way to the ranks that
own them) and *parameters* (whose owned parts it brings to all ranks), both as flat arrays of bytes of one layout on
all ranks. It never computes: sums, norms and updates are the kernels' work, so that every transport gives the same
bits.

Everything here is called in the same order on all ranks of the group, except acquire and arrive with block=False,
which only look. Whatever waits ends after `timeout` seconds, or as soon as a peer is known to be lost, with a
PeerError.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

# Where ranks read each other's memory, buckets of 1, 2, 4, 8 and 25 MB took the same time (151 to 152 ms a step of a
# GPT-2 of 13.9 M parameters on two ranks); small ones hold less memory.
IN_PLACE_BUCKET_BYTES = 4 << 20

# Bytes [begin, end) of a flat array, one for each rank.
Spans = Sequence[tuple[int, int]]


class PeerError(RuntimeError):
    """Another rank of the group is lost, has failed, or does not answer.

    Attributes:
        rank: its global rank; None if it is not known which one.
        operation: what this rank was doing with it.
    """

    def __init__(self, message: str, rank: int | None, operation: str):
        super().__init__(message)
        self.rank = rank
        self.operation = operation

    def __reduce__(self) -> tuple[type, tuple[str, int | None, str]]:
        return type(self), (str(self), self.rank, self.operation)


class Transport(ABC):
    """The ranks of one process group, and a way to reach them."""

    name: str  # as in transport=...
    why: str  # why this one was chosen, for explain()
    rank: int  # of this process in the group
    world: int
    ranks: list[int]  # global rank of each rank of the group
    # True if kernels may read the slots and write the parameters of all ranks in place (Arena.sources, .targets).
    in_place: bool
    bucket_bytes: int | None = None  # buckets beyond this only make the first one late; None: the larger the better

    @abstractmethod
    def exchange(self, payload: bytes, operation: str) -> list[bytes]:
        """What every rank has passed, in rank order; also a barrier. All payloads have one length, which may be 0."""

    @abstractmethod
    def arena(self, param_bytes: int, slot_bytes: int, slots: int) -> "Arena":
        """Memory for one set of buckets, zeroed. All ranks pass the same sizes.

        Raises:
            MemoryError: on all ranks, if it is too large for one of them; says where and by how much.
        """

    @abstractmethod
    def abort(self, message: str) -> None:
        """Tells the other ranks, where that is possible, that this one has failed and will not answer."""

    @abstractmethod
    def close(self) -> None:
        """Gives back memory, file descriptors and connections; harmless when repeated."""


class Arena(ABC):
    """The memory of one set of buckets, and the traffic over it.

    A slot goes round: acquire, (the optimizer fills it), send, arrive, (the optimizer reads sources), release.
    """

    slot_bytes: int
    slots: int
    params: Tensor  # uint8 [param_bytes], the parameters of this rank
    targets: list[Tensor]  # uint8 [param_bytes], the parameters of the other ranks in rank order; [] unless in_place

    @property
    def traffic_bytes(self) -> int:
        """What gradients on their way take on this rank."""
        return self.slot_bytes * self.slots

    @abstractmethod
    def slot(self, index: int) -> Tensor:
        """uint8 [slot_bytes]: this rank's memory of a slot."""

    @abstractmethod
    def acquire(self, index: int, operation: str, block: bool = True) -> bool:
        """True if the slot may be written: no rank reads any more what it held. With block, waits until it may."""

    @abstractmethod
    def send(self, index: int, spans: Spans, operation: str) -> None:
        """Starts bringing bytes spans[r] of this rank's slot to rank r. Never waits for a peer."""

    @abstractmethod
    def arrive(self, index: int, operation: str, block: bool = True) -> bool:
        """True if the bytes of all ranks for this rank are here. With block, waits until they are."""

    @abstractmethod
    def sources(self, index: int) -> list[Tensor]:
        """uint8 views in rank order: for each rank, its bytes of this rank's span, after arrive()."""

    @abstractmethod
    def release(self, index: int) -> None:
        """This rank has read the sources of the slot."""

    @abstractmethod
    def publish(self, begin: int, end: int, spans: Spans, operation: str) -> int:
        """Starts bringing bytes spans[self.rank] of this rank's params to all ranks, and theirs into its params.

        spans lie in [begin, end). Returns a ticket for published(). With in_place the kernels have written the
        targets already, and only a barrier is left to published().
        """

    @abstractmethod
    def published(self, ticket: int, operation: str) -> None:
        """Waits until the publication is complete: this rank's params hold what all ranks have published."""

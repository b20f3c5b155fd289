"""Small agreements of the ranks of a group of torch.distributed, each by a name that all ranks compare first.

A rank that is in another operation than the others would take their message for one of its own: gloo ends the process
over another size, and reads another meaning of the same size in silence. So every agreement sends one frame of 512
bytes that says what it is, and only then is the content looked at. A longer content follows in a second message, whose
size the frames tell. Ranks in different operations all raise a PeerError that names each rank's; one that is in a
collective of another kind meets nobody, and notes (notes.py) tell after the timeout.

Over gloo frames go straight to every other rank, with a tag that nothing else has, so that no other collective takes
them for its own. Two ranks of one thread over loopback, 168 bytes, medians of 1,000 on a machine with other load: 140
us (gloo's all_gather of them 190 us).

A group whose ranks agree is one of those to which a failure elsewhere is told (notes.know).
"""

import pickle
import struct
import zlib
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import notes
from .transport import PeerError

FRAME = 512  # bytes
_MAGIC = b"pyshard1"
_HEAD = struct.Struct("<8sIIQ")  # magic, CRCs of the operation and of the content, length of the content
_TEXT = 136  # bytes of the operation, and of details, that errors show
_ROOM = FRAME - _HEAD.size - _TEXT
_TAG = (
    2048  # tags of messages start here; those of full sharding at 4096, of ties at 8192, of pipelines' schedules at 0
)


def exchange(
    who: str,
    group: dist.ProcessGroup | None,
    operation: str,
    payload: bytes = b"",
    seconds: float | None = None,
    *,
    detail: str = "",
    hint: str = "",
) -> list[bytes]:
    """What every rank of the group has passed, in rank order, of any length each; all of them are in `operation`.

    Blocks until all ranks have come, in one round of messages if no payload is longer than 352 bytes, else in two.

    Args:
        who: opens error messages.
        group: None: all ranks.
        operation: what this is; compared between ranks. Use one text for calls that other ranks may see differ in
            content alone, and compare the content then.
        seconds: to wait at most; None: the group's own timeout.
        detail: shown beside the operation in errors, and not compared.
        hint: closes error messages: in which state things are left.
    Raises:
        PeerError: on all ranks, if they are in different operations; where a rank is lost, late or elsewhere.
    """
    group = _known(group)
    size = group.size()
    if size == 1:
        return [payload]
    head = _HEAD.pack(_MAGIC, zlib.crc32(operation.encode()), zlib.crc32(payload), len(payload))
    text = f"{operation} ({detail})" if detail else operation
    frame = head + text.encode()[:_TEXT].ljust(_TEXT, b"\0") + payload[:_ROOM].ljust(_ROOM, b"\0")
    ours = notes.Notes(who, group, hint)
    if (ended := ours.ended(operation)) is not None:
        raise ended
    try:
        frames = _gather(group, frame, 0, seconds)
        heads = [_HEAD.unpack_from(one) for one in frames]
        if len({(magic, crc) for magic, crc, *_ in heads}) > 1:
            raise _differ(ours, operation, frames, heads)
        lengths = [length for *_, length in heads]
        heard = [one[_HEAD.size + _TEXT :] for one in frames]
        if max(lengths) > _ROOM:
            rest = _gather(group, payload[_ROOM:].ljust(max(lengths) - _ROOM, b"\0"), 1, seconds)
            heard = [one + more for one, more in zip(heard, rest, strict=True)]
    except PeerError:
        raise
    except RuntimeError as error:
        raise ours.error(operation, error) from error
    heard = [one[:length] for one, length in zip(heard, lengths, strict=True)]
    for rank, one, (_, _, crc, _) in zip(ours.ranks, heard, heads, strict=True):
        if zlib.crc32(one) != crc:
            raise PeerError(
                f"{who}: {operation}: the message of rank {rank} has come damaged. {hint}".strip(), rank, operation
            )
    return heard


def objects(
    who: str,
    group: dist.ProcessGroup | None,
    operation: str,
    obj: Any,
    seconds: float | None = None,
    *,
    detail: str = "",
    hint: str = "",
) -> list[Any]:
    """What every rank of the group has passed, in rank order, pickled on the way; else as exchange()."""
    heard = exchange(who, group, operation, pickle.dumps(obj), seconds, detail=detail, hint=hint)
    return [pickle.loads(one) for one in heard]


def _known(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    found: dist.ProcessGroup = dist.group.WORLD if group is None else group  # type: ignore[assignment]
    notes.know(found)
    return found


def _differ(ours: notes.Notes, operation: str, frames: list[bytes], heads: list[tuple[Any, ...]]) -> PeerError:
    """The same error on all ranks, but for the rank to blame: the one that is alone in its operation."""
    where: dict[Any, list[int]] = {}
    texts: dict[Any, str] = {}
    for rank, frame, (magic, crc, *_) in zip(ours.ranks, frames, heads, strict=True):
        key = magic, crc
        where.setdefault(key, []).append(rank)
        text = frame[_HEAD.size : _HEAD.size + _TEXT].rstrip(b"\0").decode(errors="replace")
        texts.setdefault(key, text if magic == _MAGIC else "another version of pyshard")
    return ours.mismatch(operation, {texts[key]: ranks for key, ranks in where.items()})


def _gather(group: dist.ProcessGroup, message: bytes, tag: int, seconds: float | None) -> list[bytes]:
    """The messages of all ranks, of one size."""
    device = _device(group)
    mine = torch.frombuffer(bytearray(message), dtype=torch.uint8).to(device)
    heard = [torch.empty_like(mine) for _ in range(group.size())]
    if device.type == "cpu" and "cpu:gloo" in dist.get_backend_config(group).split(","):
        heard[group.rank()] = mine
        others = [(group.rank() + i) % group.size() for i in range(1, group.size())]  # each begins with another one
        works = [group.recv([heard[i]], i, _TAG + tag) for i in others]
        works += [group.send([mine], i, _TAG + tag) for i in others]
    else:
        works = [dist.all_gather(heard, mine, group=group, async_op=True)]
    for work in works:
        if work is not None:
            work.wait() if seconds is None else work.wait(timedelta(seconds=seconds))
    return [_bytes(one) for one in heard]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


def _device(group: dist.ProcessGroup) -> torch.device:
    devices = {device.type for device in group._device_types}
    return torch.device("cpu" if "cpu" in devices else next(iter(devices)))

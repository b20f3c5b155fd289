"""Pieces of tensors out of the files of torch.distributed.checkpoint, straight into memory.

A piece is what torch.save writes of one tensor: a zip archive, in which the elements lie as they are in memory. So the
part of a piece that is wanted is read from where it lies to where it belongs; torch.load would make the whole piece
first, and cost ten times as much for a small one. Archives that look otherwise go through torch.load.
"""

import functools
import io
import math
import os
import pickle
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.utils import _create_file_view

from ..optim.rectangles import memory_order

T = TypeVar("T")

# Of rows of which parts are wanted, so many bytes are read at once: they stay in the cache until they are copied.
BAND = 512 << 10
# A call to read costs as much time as so many bytes more do.
_GAP = 32 << 10
# Below that, to start threads takes longer than to read.
WORTH_THREADS = 8 << 20

# The bytes at the end of an archive that hold its directory, of some 500 bytes.
_ENDS = 2 << 10
# Of the zip format: the end of the directory (entries, size, begin), an entry of it (method, size, sizes of name, extra
# field and comment, header), and the header of a record (sizes of name and extra field). From 4 GiB on, numbers are all
# ones there, and in 64 bits elsewhere: in another end, to which a locator before the end points, and in extra fields.
_END = struct.Struct("<4x4xHHIIH")
_LOCATOR = struct.Struct("<4x4xQ4x")
_END64 = struct.Struct("<4x8x2x2x4x4xQQQQ")
_LARGE = 0xFFFFFFFF
_ENTRY = struct.Struct("<4x4x2xH8x4xIHHH2x2x4xI")
_HEADER = struct.Struct("<26xHH")

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Layout(NamedTuple):
    """How the elements of a saved tensor lie in its record of the archive."""

    record: str
    dtype: torch.dtype
    first: int  # position of the first element
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Reads what a pickled tensor says of itself, and makes no tensor. Anything else is an error."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilt
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype]:
        _, dtype, key, *_ = pid
        return f"data/{key}", dtype


def _rebuilt(storage: tuple[str, torch.dtype], first: int, shape: Any, stride: Any, *_: Any) -> Layout:
    return Layout(*storage, first, tuple(shape), tuple(stride))


@functools.lru_cache(maxsize=256)
def _layout(pickled: bytes) -> Layout | None:
    """None: it is no plain tensor. Equal for tensors of one shape, mostly."""
    try:
        found = _Unpickler(io.BytesIO(pickled)).load()
    except (pickle.UnpicklingError, ValueError, TypeError, KeyError):
        return None
    return found if isinstance(found, Layout) else None


def _records(tail: bytes, length: int) -> dict[str, tuple[int, int]] | None:
    """Where the headers of an archive's records lie, and the sizes of their data, by names without the folder.

    Args:
        tail: its last bytes.

    None: they do not have it all, or records are compressed.
    """
    end = tail.rfind(b"PK\5\6")
    if end < 0 or len(tail) - end < _END.size:
        return None
    _, count, size, begin, _ = _END.unpack_from(tail, end)
    first = length - len(tail)  # of the tail, in the archive
    locator = end - _LOCATOR.size
    if locator >= 0 and tail[locator : locator + 4] == b"PK\6\7":
        at = _LOCATOR.unpack_from(tail, locator)[0] - first
        if at < 0 or tail[at : at + 4] != b"PK\6\6":
            return None
        _, count, size, begin = _END64.unpack_from(tail, at)
    at, found = begin - first, {}
    if at < 0 or at + size > end:
        return None
    for _ in range(count):
        method, nbytes, name_size, extra, comment, header = _ENTRY.unpack_from(tail, at)
        if method:
            return None
        at += _ENTRY.size
        name = tail[at : at + name_size].decode()
        large = _large(tail[at + name_size : at + name_size + extra])
        if nbytes == _LARGE:  # the sizes of the data as they are and as they lie here, which are all ones together
            nbytes, large = next(iter(large), _LARGE), large[2:]
        if header == _LARGE:
            header = next(iter(large), _LARGE)
        if _LARGE in (nbytes, header):
            return None
        found[name.partition("/")[2]] = header, nbytes
        at += name_size + extra + comment
    return found


def _large(fields: bytes) -> tuple[int, ...]:
    """The numbers of 64 bits in the extra fields of an entry."""
    while len(fields) >= 4:
        kind, size = struct.unpack_from("<HH", fields)
        if kind == 1:
            return tuple(each for (each,) in struct.iter_unpack("<Q", fields[4 : 4 + size // 8 * 8]))
        fields = fields[4 + size :]
    return ()


class Piece:
    """A saved tensor.

    Args:
        file: open, unbuffered.
        offset, length: of the archive, in bytes.
    """

    def __init__(self, file: io.FileIO, offset: int, length: int):
        self._file = file
        self._values: Tensor | None = None
        self._order: list[int] = []
        found = self._find(offset, length)
        if found is not None:
            layout, begin, size = found
            order = memory_order(layout.shape, layout.stride)
            dense, step = True, 1
            for d in reversed(order):
                dense, step = dense and (layout.shape[d] == 1 or layout.stride[d] == step), step * layout.shape[d]
            if dense and (layout.first + step) * layout.dtype.itemsize <= size:
                self._begin = begin + layout.first * layout.dtype.itemsize
                self._dtype, self._shape, self._order = layout.dtype, layout.shape, order
                return
        view: Any = _create_file_view(file, offset, length)
        self._values = torch.load(view, map_location="cpu", weights_only=True)

    def _find(self, offset: int, length: int) -> tuple[Layout, int, int] | None:
        """The tensor's layout, and where in the file its record lies, of how many bytes."""
        tail = self._bytes(offset + max(length - _ENDS, 0), min(length, _ENDS))
        records = _records(tail, length)
        if records is None or not {"data.pkl", "byteorder"} <= records.keys():
            return None
        if self._record(offset, *records["byteorder"]) != sys.byteorder.encode():
            return None
        layout = _layout(self._record(offset, *records["data.pkl"]))
        if layout is None or layout.record not in records:
            return None
        header, size = records[layout.record]
        return layout, self._data(offset + header, self._bytes(offset + header, _HEADER.size)), size

    def _bytes(self, begin: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, begin)

    def _record(self, offset: int, header: int, size: int) -> bytes:
        # Names are short, and what aligns a record takes less than 64 bytes.
        data = self._bytes(offset + header, _HEADER.size + 256 + size)
        begin = self._data(0, data)
        return data[begin : begin + size]

    @staticmethod
    def _data(at: int, header: bytes) -> int:
        """Where the data of a record begin whose header is at `at`."""
        name, extra = _HEADER.unpack_from(header)
        return at + _HEADER.size + int(name) + int(extra)

    def read(self, offsets: Sequence[int], target: Tensor) -> None:
        """Fills a tensor with the rectangle of its shape at these offsets, cast to its dtype.

        Raises:
            RuntimeError: the file has become shorter.
        """
        if target.numel():  # what is read into memory is a change of the tensor all the same
            torch.autograd.graph.increment_version(target)
        if self._values is not None:
            part = tuple(slice(o, o + n) for o, n in zip(offsets, target.shape, strict=True))
            target.copy_(self._values[part])
        elif target.numel():
            order = self._order
            shape, offsets = [self._shape[d] for d in order], [offsets[d] for d in order]
            self._rows(self._begin, shape or [1], offsets or [0], target.permute(order) if order else target.reshape(1))

    def _rows(self, begin: int, shape: list[int], offsets: list[int], target: Tensor) -> None:
        """The rows from offsets[0] on of an array in the order of memory that lies at `begin` of the file."""
        size = self._dtype.itemsize
        row = math.prod(shape[1:]) * size
        begin += offsets[0] * row
        wanted = target[0].numel() * size
        if wanted == row and target.dtype == self._dtype and target.device.type == "cpu" and target.is_contiguous():
            fill(self._file, bytes_of(target), begin)
        elif len(shape) == 1 or (row <= BAND and row - wanted <= _GAP):
            rows = max(BAND // row, 1)
            buffer = torch.empty(min(rows, target.shape[0]) * row, dtype=torch.uint8)
            inner = tuple(slice(o, o + n) for o, n in zip(offsets[1:], target.shape[1:], strict=True))
            for first in range(0, target.shape[0], rows):
                part = target[first : first + rows]
                band = buffer[: part.shape[0] * row]
                fill(self._file, bytes_of(band), begin + first * row)
                part.copy_(band.view(self._dtype).view(part.shape[0], *shape[1:])[(slice(None), *inner)])
        else:
            for index in range(target.shape[0]):
                self._rows(begin + index * row, shape[1:], offsets[1:], target[index])


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def fill(file: io.FileIO, memory: memoryview, begin: int) -> None:
    """Reads bytes of a file, from `begin` on, until the memory is full.

    Raises:
        RuntimeError: the file ends before.
    """
    while memory:
        count = os.preadv(file.fileno(), [memory], begin)
        if not count:
            raise RuntimeError(f"{file.name!r} became shorter while it was read")
        memory, begin = memory[count:], begin + count


def spread(work: Callable[[T], None], items: Iterable[T], threads: int) -> None:
    """Does all items, on so many threads; an error of one is raised when the others are done."""
    if threads <= 1:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, items))

"""Reading a directory of torch.distributed.checkpoint: what is in it, and its pieces into tensors that are there."""

import io
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future

from .pieces import WORTH_THREADS, Piece, spread


class _Part(NamedTuple):
    """What is wanted of a piece: the rectangle of the target's shape at these offsets."""

    piece: MetadataIndex
    offsets: Sequence[int]
    target: Tensor


class _Reader(FileSystemReader):
    """Reads of each piece of a tensor what is wanted, where torch's reads all of it for each part that is wanted."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        parts: list[_Part] = []
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(self.read_bytes(item.storage_index)))
            else:
                target = planner.resolve_tensor(item).detach()
                parts.append(_Part(item.storage_index, item.storage_offsets, target))
        self.read_parts(parts)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def read_bytes(self, index: MetadataIndex) -> bytes:
        place = self.storage_data[index]
        with open(Path(self.path) / place.relative_path, "rb") as file:
            return self._slice_file(file, place).read()

    def read_parts(self, parts: list[_Part]) -> None:
        """Fills the targets; on as many threads as torch's operations take, if there is enough to read."""
        with ExitStack() as stack:
            opened = {
                name: stack.enter_context(open(Path(self.path) / name, "rb", buffering=0))
                for name in sorted({self.storage_data[part.piece].relative_path for part in parts})
            }

            def read(part: _Part) -> None:
                place = self.storage_data[part.piece]
                Piece(opened[place.relative_path], place.offset, place.length).read(part.offsets, part.target)

            def place(part: _Part) -> tuple[str, int]:
                return self.storage_data[part.piece].relative_path, self.storage_data[part.piece].offset

            enough = sum(part.target.nbytes for part in parts) >= WORTH_THREADS
            spread(read, sorted(parts, key=place), torch.get_num_threads() if enough else 1)


class Item(NamedTuple):
    """A value of a checkpoint: its key, and the dtype and shape if it is a tensor."""

    key: str
    tensor: TensorStorageMetadata | None


class Contents:
    """A directory that torch.distributed.checkpoint has written."""

    def __init__(self, directory: Path):
        self.reader = _Reader(directory)
        self.metadata: Metadata = self.reader.read_metadata()
        self.reader.set_up_storage_reader(self.metadata, True, rank=0, use_collectives=True)
        self.items: dict[tuple[Any, ...], Item] = {}
        for key, path in self.metadata.planner_data.items():
            stored = self.metadata.state_dict_metadata[key]
            if isinstance(stored, TensorStorageMetadata):
                covered = sum(chunk.sizes.numel() for chunk in stored.chunks)
                if covered != stored.size.numel():
                    raise ValueError(
                        f"the checkpoint has {covered} of the {stored.size.numel()} elements of {key}. It was made on "
                        "some of the ranks only: save it anew, on all of them."
                    )
            self.items[path] = Item(key, None if isinstance(stored, BytesStorageMetadata) else stored)

    def read(self, values: dict[str, Any]) -> None:
        """Fills the tensors of `values` in place with the elements that they hold, and replaces all else."""
        parts: list[_Part] = []
        for key, value in values.items():
            if isinstance(value, Tensor):
                stored = self.metadata.state_dict_metadata[key]
                if not isinstance(stored, TensorStorageMetadata):
                    raise ValueError(f"{key} is no tensor in the checkpoint; expected one, as it is here.")
                for offsets, memory in memory_of(key, value):
                    parts += _overlaps(key, stored.chunks, offsets, memory)
            else:
                data = io.BytesIO(self.reader.read_bytes(MetadataIndex(key)))
                values[key] = torch.load(data, weights_only=False)
        self.reader.read_parts(parts)

    def below(self, *path: Any) -> dict[tuple[Any, ...], Item]:
        """All values whose path begins so, by the rest of it."""
        return {rest[len(path) :]: item for rest, item in self.items.items() if rest[: len(path)] == path}


def memory_of(key: str, value: Tensor) -> list[tuple[Sequence[int], Tensor]]:
    """The rectangles of a whole tensor that this rank holds: their offsets, and where they lie."""
    chunks = getattr(value, "__create_chunk_list__", None)
    if chunks is None:
        return [((0,) * value.dim(), value.detach())]
    shown: Any = value
    return [(c.offsets, shown.__get_tensor_shard__(MetadataIndex(key, c.offsets)).detach()) for c in chunks()]


def _overlaps(
    key: str, chunks: Sequence[ChunkStorageMetadata], offsets: Sequence[int], memory: Tensor
) -> Iterator[_Part]:
    """The parts of stored pieces that belong into a rectangle at these offsets."""
    for number, chunk in enumerate(chunks):
        inside, target = [], memory
        for d, size in enumerate(memory.shape):
            begin = max(offsets[d], chunk.offsets[d])
            end = min(offsets[d] + size, chunk.offsets[d] + chunk.sizes[d])
            if begin >= end:
                break
            inside.append(begin - chunk.offsets[d])
            if end - begin != size:
                target = target.narrow(d, begin - offsets[d], end - begin)
        else:
            yield _Part(MetadataIndex(key, chunk.offsets, number), inside, target)

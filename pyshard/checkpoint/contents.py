"""Reading a directory of torch.distributed.checkpoint: what is in it, and its pieces into tensors that are there."""

import io
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future


class _Reader(FileSystemReader):
    """Reads each piece of a tensor once, where torch's reads it for each part that is wanted of it."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted: dict[MetadataIndex, list[ReadItem]] = {}
        for item in plan.items:
            wanted.setdefault(item.storage_index, []).append(item)
        places = {index: self.storage_data[index] for index in wanted}
        for index in sorted(wanted, key=lambda i: (places[i].relative_path, places[i].offset)):
            with open(Path(self.path) / places[index].relative_path, "rb") as file:
                piece = self._slice_file(file, places[index])
                if wanted[index][0].type == LoadItemType.BYTE_IO:
                    for item in wanted[index]:
                        planner.load_bytes(item, io.BytesIO(piece.read()))
                else:
                    self._place(piece, wanted[index], planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _place(self, piece: Any, items: list[ReadItem], planner: LoadPlanner) -> None:
        values = torch.load(piece, map_location="cpu", weights_only=True)
        for item in items:
            part = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
            target = planner.resolve_tensor(item)
            target.detach().copy_(values[part])
            planner.commit_tensor(item, target)


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
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(values, self.metadata, False)
        self.reader.read_data(planner.create_local_plan(), planner).wait()

    def below(self, *path: Any) -> dict[tuple[Any, ...], Item]:
        """All values whose path begins so, by the rest of it."""
        return {rest[len(path) :]: item for rest, item in self.items.items() if rest[: len(path)] == path}

"""Files of a checkpoint: checksums, syncing, and the pointer that says which directory is the newest complete one.

    path/latest                          names the newest complete checkpoint; replaced as the last thing of a save.
                                         Before there is one it names none: so where the file is missing and complete
                                         checkpoints are there, it was lost, and nobody takes that for a first start.
    path/000007-1f2e3d4c/manifest.json   size and checksums of all other files of the checkpoint
    path/000007-1f2e3d4c/.metadata, *.distcp, extra.pt

Checksums are CRC-32 of blocks: it finds every changed byte (any burst of up to 32 bits; other damage but for one case
in 2^32 per block) at 60 GB/s of one core here, 16 without AVX-512 and 7 by zlib, where blake2b takes in 1.0 and sha256
1.6. Nothing here is secret or signed.
"""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from .. import _C
from .pieces import fill, spread

FORMAT = 1
POINTER = "latest"
MANIFEST = "manifest.json"
EXTRA = "extra.pt"
# Checksums are per block, so that ranks share the work on a large file and need little memory; 4 to 64 MiB are equally
# fast.
BLOCK = 16 << 20

# zlib's own is faster than ours without carry-less multiplication.
crc32: Callable[[Any, int], int] = zlib.crc32 if _C.crc32_kind == "table" else _C.crc32

Entry = dict[str, Any]  # of a file: "bytes": its size, "crc32": of each of its blocks


# ---- small files that vouch for themselves ----


def seal(value: Any) -> bytes:
    """JSON in one line, and its checksum in the next."""
    body = json.dumps(value, sort_keys=True).encode()
    return body + f"\ncrc32 {zlib.crc32(body):08x}\n".encode()


def unseal(path: Path) -> Any:
    """What write_sealed has written.

    Raises:
        RuntimeError: the file is damaged.
        ValueError: a newer pyshard has written it.
    """
    body, _, rest = path.read_bytes().partition(b"\n")
    if rest != f"crc32 {zlib.crc32(body):08x}\n".encode():
        raise RuntimeError(f"{path} is damaged: its checksum does not fit its contents")
    value = json.loads(body)
    if value["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {value['format']}; this version of pyshard reads formats up to {FORMAT}. Use the "
            f"version that has made it{', ' + value['pyshard'] if 'pyshard' in value else ''}, or a newer one."
        )
    return value


def write_sealed(path: Path, value: Any) -> None:
    """Puts a file in place at once, or not at all; on disk when this returns."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(seal(value))
        sync_file(file)
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_file(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Makes new, renamed and removed entries of a directory survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems have no such thing
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Makes a directory, and those above it, that survive a loss of power."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


# ---- data, summed up while it is written ----


def _raise(error: OSError, path: str | os.PathLike[str]) -> NoReturn:
    """Raises the error, with the name of the file; Python names it only if it cannot be opened."""
    if error.filename is not None:
        raise error
    raise OSError(error.errno, error.strerror, os.fspath(path)) from error


class _Summed(io.RawIOBase):
    """A file that takes checksums of what is written to it."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._size = 0
        self._sums: list[int] = []

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def fileno(self) -> int:
        return self._file.fileno()

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            _raise(error, self._file.name)

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        try:
            self._file.write(rest)
        except OSError as error:
            _raise(error, self._file.name)
        written = len(rest)
        while rest:
            used = self._size % BLOCK
            if used == 0:
                self._sums.append(0)
            now, rest = rest[: BLOCK - used], rest[BLOCK - used :]
            self._sums[-1] = crc32(now, self._sums[-1])
            self._size += len(now)
        return written

    def entry(self) -> Entry:
        return {"bytes": self._size, "crc32": [f"{value:08x}" for value in self._sums]}


class Folder(FileSystem):
    """What torch's FileSystemWriter writes through: every file is summed up and on disk when it is closed."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        try:
            with open(path, "wb") as file:
                summed = _Summed(file)
                yield summed
                sync_file(file)
        except OSError as error:
            _raise(error, path)
        self.entries[Path(path).name] = summed.entry()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.entries[Path(new_path).name] = self.entries.pop(Path(path).name)


def verify(directory: Path, files: Mapping[str, Entry], block: int, rank: int, world: int) -> None:
    """Checks this rank's share of the blocks, of so many bytes, of all files.

    Raises:
        RuntimeError: a file is missing, too short or long, or damaged.
    """
    blocks = [(name, index) for name in sorted(files) for index in range(max(len(files[name]["crc32"]), 1))]
    mine = blocks[len(blocks) * rank // world : len(blocks) * (rank + 1) // world]
    with contextlib.ExitStack() as stack:
        opened: dict[str, io.FileIO] = {}
        for name in dict.fromkeys(name for name, _ in mine):
            path, expected = directory / name, files[name]["bytes"]
            try:
                opened[name] = stack.enter_context(open(path, "rb", buffering=0))
            except FileNotFoundError:
                raise RuntimeError(f"{path} is missing") from None
            size = os.fstat(opened[name].fileno()).st_size
            if size != expected:
                raise RuntimeError(f"{path} is damaged: it has {size} bytes; expected {expected}")

        def check(part: tuple[str, int]) -> None:
            name, index = part
            begin, end = index * block, min((index + 1) * block, files[name]["bytes"])
            if begin < end and f"{crc32_of(opened[name], begin, end):08x}" != files[name]["crc32"][index]:
                raise RuntimeError(
                    f"{directory / name} is damaged: the checksum of its bytes [{begin}, {end}) does not fit them"
                )

        spread(check, mine, min(torch.get_num_threads(), len(mine)))


def crc32_of(file: io.FileIO, begin: int, end: int) -> int:
    """The checksum of the bytes [begin, end) of a file.

    Raises:
        RuntimeError: the file ends before.
    """
    try:
        if crc32 is not zlib.crc32:
            return _C.crc32_of_file(file.fileno(), begin, end)
        value, buffer = 0, memoryview(bytearray(min(1 << 20, end - begin)))
        for first in range(begin, end, len(buffer)):
            part = buffer[: min(len(buffer), end - first)]
            fill(file, part, first)
            value = crc32(part, value)
        return value
    except OSError as error:
        _raise(error, file.name)


# ---- directories ----

_NAME = re.compile(r"(\d{6,})-[0-9a-f]{8}")


def number(directory: Path) -> int:
    """Which save made a directory; 0 if none did."""
    found = _NAME.fullmatch(directory.name)
    return int(found[1]) if found else 0


def newest(root: Path) -> Path | None:
    """The directory that the pointer names; None if there is no pointer, or no complete checkpoint yet.

    Raises:
        RuntimeError: the pointer is damaged.
    """
    try:
        pointer = unseal(root / POINTER)
    except FileNotFoundError:
        return None
    except RuntimeError as error:
        raise RuntimeError(
            f"{error}. Remove that file: the next save makes it anew. {in_words(complete(root))}"
        ) from None
    return None if pointer["directory"] is None else root / str(pointer["directory"])


def checkpoints(root: Path) -> list[Path]:
    """All directories that saves have made, complete or not, the oldest first."""
    return sorted((path for path in root.iterdir() if number(path)), key=lambda path: (number(path), path.name))


def complete(root: Path) -> list[Path]:
    """The directories of which all is there, the newest first."""
    return [path for path in checkpoints(root) if (path / MANIFEST).exists()][::-1] if root.is_dir() else []


def in_words(found: Sequence[Path]) -> str:
    """What to do with other complete checkpoints; ends without a period."""
    if not found:
        return "There is no other complete checkpoint"
    return f"Complete checkpoints, which can be loaded by their path: {', '.join(map(str, found))}"


def begin(root: Path) -> tuple[Path, Path | None]:
    """Makes the directory of a new save, and removes those of saves that did not come to their end.

    Returns it and the newest complete one.
    """
    make_directory(root)
    lost = not (root / POINTER).exists() and bool(complete(root))  # it was deleted, or not copied along
    previous = newest(root)
    last = number(previous) if previous else 0
    for path in checkpoints(root):
        # Without a pointer what is complete may be all that there is.
        if path != previous and not (lost and (path / MANIFEST).exists()) and number(path) >= last:
            remove(path)
    if previous is None and not lost:
        _point(root, None)
    last = max(map(number, checkpoints(root)), default=0)
    # The rest of the name keeps processes of a save that was thought dead out of this one's directory.
    directory = root / f"{last + 1:06d}-{uuid.uuid4().hex[:8]}"
    directory.mkdir()
    return directory, previous


def make_ready(directory: Path, previous: Path | None) -> None:
    """The last thing before switch().

    Raises:
        RuntimeError: `previous` is not the newest checkpoint any more.
    """
    if newest(directory.parent) != previous:
        raise RuntimeError(f"another save has put its checkpoint into {directory.parent} meanwhile")
    sync_directory(directory.parent)


def switch(directory: Path) -> None:
    """Makes a complete directory the newest checkpoint."""
    _point(directory.parent, directory.name)


def _point(root: Path, name: str | None) -> None:
    write_sealed(root / POINTER, {"format": FORMAT, "directory": name})


def prune(newest: Path, keep: int) -> None:
    """Removes older checkpoints; `keep` stay, the newest included."""
    older = [path for path in checkpoints(newest.parent) if number(path) < number(newest)]
    complete = [path for path in older if (path / MANIFEST).exists()]
    for path in older:
        if path not in complete[max(0, len(complete) - (keep - 1)) :]:
            remove(path)


def remove(directory: Path) -> None:
    """Removes a directory; if that is interrupted, what is left of it is not taken for a checkpoint."""
    (directory / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(directory)


def others(directory: Path) -> list[Path]:
    """Complete checkpoints beside a directory, the newest first."""
    return [path for path in complete(directory.parent) if path != directory]

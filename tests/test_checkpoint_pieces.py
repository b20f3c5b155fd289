"""Parts of tensors out of files that torch.save has written, against torch.load."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import assert_same_bits
from torch import Tensor

from pyshard.checkpoint import pieces
from pyshard.checkpoint.pieces import BAND, Piece, spread


def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(rng.integers(-100, 100, shape)).to(dtype)


class Archives:
    """Tensors as torch.save writes them, one after another in a file, with bytes of no meaning between them."""

    def __init__(self, path: Path, values: list[Any]):
        self.places = []
        with open(path, "wb") as file:
            for value in values:
                file.write(b"PK\5\6" * 5)
                data = io.BytesIO()
                torch.save(value, data)
                self.places.append((file.tell(), data.tell()))
                file.write(data.getvalue())
            file.write(b"end")
        self.file = open(path, "rb", buffering=0)

    def piece(self, index: int) -> Piece:
        return Piece(self.file, *self.places[index])


def is_direct(piece: Piece) -> bool:
    return piece._values is None


def check(piece: Piece, value: Tensor, offsets: tuple[int, ...], target: Tensor) -> None:
    before = target._version
    piece.read(offsets, target)
    part = value[tuple(slice(o, o + n) for o, n in zip(offsets, target.shape, strict=True))]
    assert_same_bits(target.contiguous(), part.to(target.dtype).contiguous(), f"{offsets} {tuple(target.shape)}")
    assert target._version > before or not target.numel()


def test_rectangles_of_every_kind(tmp_path: Path, rng: np.random.Generator) -> None:
    wide = BAND // 4 + 10_000  # a row of which is more than is read at once
    values = [
        random(rng, (37, 11)),
        random(rng, (37, 11)).t(),
        random(rng, (5, 6, 7)).permute(2, 0, 1),
        random(rng, (3, wide)),
        random(rng, (2000, 300)),
        random(rng, (6, 7))[2:5, 1:4].clone(),
        random(rng, (1, 9, 1)),
    ]
    archives = Archives(tmp_path / "file", values)
    for index, value in enumerate(values):
        piece = archives.piece(index)
        assert is_direct(piece)
        for case in range(30):
            sizes = tuple(int(rng.integers(0 if case > 25 else 1, n + 1)) for n in value.shape)
            if case < 3:
                sizes = tuple(n if d >= case else min(n, 2) for d, n in enumerate(value.shape))
            offsets = tuple(int(rng.integers(0, n - size + 1)) for n, size in zip(value.shape, sizes, strict=True))
            dtype = torch.float32 if case % 3 else torch.float64
            check(piece, value, offsets, torch.full(sizes, -1, dtype=dtype))
            check(piece, value, offsets, torch.full(sizes[::-1], -1, dtype=dtype).permute(*range(len(sizes))[::-1]))


@pytest.mark.parametrize("dtype", [*pieces._STORAGES.values(), torch.complex64, torch.uint16, torch.float8_e4m3fn])
def test_every_dtype(dtype: torch.dtype, tmp_path: Path, rng: np.random.Generator) -> None:
    """Those that torch saves otherwise go through torch.load."""
    values = [random(rng, (9, 5)).abs().to(dtype), random(rng, ()).abs().to(dtype), torch.empty(0, 3, dtype=dtype)]
    archives = Archives(tmp_path / "file", values)
    for index, value in enumerate(values):
        piece = archives.piece(index)
        assert is_direct(piece) == (dtype in pieces._STORAGES.values())
        target = torch.zeros(value.shape, dtype=dtype)
        piece.read((0,) * value.dim(), target)
        assert torch.equal(
            target.view(torch.uint8) if value.dim() else target, value.view(torch.uint8) if value.dim() else value
        )


def test_archives_of_more_than_4_gib(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their directory has sizes and places in other fields; here from a few bytes on, as zipfile can be told."""
    value = random(rng, (50, 60))
    data = io.BytesIO()
    torch.save(value, data)
    for limit in (100, 1000, 12_500):  # all records, all places, the end of the directory alone
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
        with zipfile.ZipFile(data) as old, zipfile.ZipFile(tmp_path / "large", "w") as new:
            for item in old.infolist():
                new.writestr(item.filename, old.read(item))
        size = (tmp_path / "large").stat().st_size
        assert b"PK\6\6" in (tmp_path / "large").read_bytes()
        with open(tmp_path / "large", "rb", buffering=0) as file:
            piece = Piece(file, 0, size)
            assert is_direct(piece)
            check(piece, value, (3, 5), torch.empty(40, 50))


def test_what_is_no_plain_tensor_is_loaded_by_torch(tmp_path: Path, rng: np.random.Generator) -> None:
    whole = random(rng, (10, 10))
    values = [whole[::2, 1:3], torch.nn.Parameter(whole), whole[3:5]]
    archives = Archives(tmp_path / "file", values)
    assert [is_direct(archives.piece(i)) for i in range(3)] == [False, False, True]  # the last is dense, further on
    for index, value in enumerate(values):
        check(archives.piece(index), value.detach(), (1, 0), torch.zeros(1, 2))


def test_a_file_that_ends_is_an_error(tmp_path: Path, rng: np.random.Generator) -> None:
    archives = Archives(tmp_path / "file", [random(rng, (1000, 100))])
    piece = archives.piece(0)
    with open(tmp_path / "file", "r+b") as file:
        file.truncate(200_000)
    with pytest.raises(RuntimeError, match="became shorter while it was read"):
        piece.read((0, 0), torch.zeros(1000, 100))


def test_work_is_spread_over_threads() -> None:
    for threads in (0, 1, 3):
        done: list[int] = []
        spread(done.append, range(20), threads)
        assert sorted(done) == [*range(20)]
        with pytest.raises(ZeroDivisionError):
            spread(lambda i: 1 / (i - 7), range(20), threads)  # type: ignore[arg-type, return-value]

"""The checksum of checkpoints by carry-less multiplication, against zlib's."""

import zlib
from pathlib import Path

import numpy as np
import pytest

from pyshard import _C

KINDS = ("vpclmul", "pclmul", "table", None)
# Around a table's, a register's and a loop's worth of bytes: 16, 128 and 512.
SIZES = [*range(0, 40), *(m * n + d for m in (64, 128, 512) for n in (1, 2, 3) for d in (-1, 0, 1)), 4099, 70001]


@pytest.mark.parametrize("kind", KINDS)
def test_every_size_and_alignment(kind: str | None, rng: np.random.Generator) -> None:
    data = rng.integers(0, 256, max(SIZES) + 16, dtype=np.uint8)
    for size in SIZES:
        for begin in (0, 1, 8):
            part, before = data[begin : begin + size], int(rng.integers(2**32))
            assert _C.crc32(part, before, kind) == zlib.crc32(part, before), (size, begin)


def test_a_message_in_parts(rng: np.random.Generator) -> None:
    data, value = rng.bytes(10_000), 0
    for begin, end in ((0, 0), (0, 700), (700, 701), (701, 9_000), (9_000, 10_000)):
        value = _C.crc32(data[begin:end], value)
    assert value == zlib.crc32(data)


def test_what_buffers_it_takes() -> None:
    values = np.arange(24, dtype=np.int32).reshape(4, 6)
    assert _C.crc32(values) == zlib.crc32(values.tobytes())
    assert _C.crc32(values[:, :0]) == _C.crc32(b"") == 0
    for part in (values[:, 1:], values.T, values[::2]):
        with pytest.raises(ValueError, match="not contiguous"):
            _C.crc32(part)
    assert _C.crc32_kind in ("vpclmul", "pclmul", "table")


def test_parts_of_a_file(tmp_path: Path, rng: np.random.Generator) -> None:
    data = rng.bytes(700_000)
    (tmp_path / "file").write_bytes(data)
    with open(tmp_path / "file", "rb") as file:
        for begin, end in ((0, 0), (0, 1), (5, 262_149), (5, 262_150), (1, 700_000)):
            assert _C.crc32_of_file(file.fileno(), begin, end) == zlib.crc32(data[begin:end])
        with pytest.raises(RuntimeError, match="became shorter"):
            _C.crc32_of_file(file.fileno(), 0, 700_001)
    with pytest.raises(OSError, match="Bad file descriptor"):
        _C.crc32_of_file(-1, 0, 1)

"""The text to train on, as bytes, and the batches cut from it."""

import hashlib
import random
from pathlib import Path

import torch
from torch import Tensor


def language_reference() -> bytes:
    """The language reference that CPython carries for its help() function, about 460 kB."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


class Text:
    """A text cut once: the first nine tenths to train on, the rest (at least one window) to validate with.

    `path` None means the language reference. Raises OSError where the file cannot be read and
    ValueError where it is too short for one window of `context` + 1 bytes on either side of the cut.
    """

    def __init__(self, path: Path | None, context: int) -> None:
        data = language_reference() if path is None else path.read_bytes()
        window = context + 1
        if len(data) < 2 * window:
            raise ValueError(
                f"--text {path}: it holds {len(data)} bytes, expected at least {2 * window}, one context of "
                f"{context} bytes and the byte after it to train on and to validate with; give a longer text"
            )
        held_out = max(len(data) // 10, window)
        self.name = "the Python language reference" if path is None else path.name
        self.digest = hashlib.sha256(data).hexdigest()[:16]
        self.context = context
        self.training = torch.frombuffer(bytearray(data[:-held_out]), dtype=torch.uint8).long()
        self.validation = torch.frombuffer(bytearray(data[-held_out:]), dtype=torch.uint8).long()

    def batch(self, seed: int, step: int, size: int, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
        """Inputs and targets (size / parts, context): one of the equal parts of a batch of `size` windows, which
        follow from the seed and the step alone. So a resumed run sees what an uninterrupted one sees, and several
        ranks see together what one process sees."""
        draw = random.Random(f"{seed}/{step}")
        starts = [draw.randrange(len(self.training) - self.context) for _ in range(size)]
        share = size // parts
        return self._windows(self.training, starts[part * share : (part + 1) * share])

    def validation_batch(self, size: int) -> tuple[Tensor, Tensor]:
        """`size` windows, or as many as do not overlap, spread evenly over the held-out text, the same for all runs."""
        last = len(self.validation) - self.context - 1
        size = min(size, 1 + last // self.context)
        return self._windows(self.validation, [last * i // max(size - 1, 1) for i in range(size)])

    def _windows(self, data: Tensor, starts: list[int]) -> tuple[Tensor, Tensor]:
        windows = torch.stack([data[start : start + self.context + 1] for start in starts])
        return windows[:, :-1], windows[:, 1:]

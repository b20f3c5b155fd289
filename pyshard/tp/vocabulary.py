"""A vocabulary cut over ranks: checks of token ids, and the cut's default sizes."""

from __future__ import annotations

import torch
from torch import Tensor

INDEX_DTYPES = (torch.int64, torch.int32)


def check_ids(who: str, ids: Tensor, length: int, ignored: Tensor | None = None) -> None:
    """Refuses ids outside [0, length), on every rank alike, since all have the same ids.

    On CPU an IndexError. On an accelerator the check runs there, as torch's own look-up does, and nothing waits for it.

    Args:
        ids: int64 or int32, any shape.
        ignored: bool of the same shape; ids that may be anything.
    """
    if ids.device.type == "meta" or not ids.numel():
        return
    bad = (ids < 0) | (ids >= length)
    if ignored is not None:
        bad &= ~ignored
    if ids.device.type != "cpu":
        torch._assert_async(~bad.any(), f"{who}: an index is outside [0, {length})")
        return
    if bad.any():
        where = bad.nonzero()[0].tolist()
        raise IndexError(
            f"{who}: index {int(ids[tuple(where)])} at position {where} of {list(ids.shape)}; expected 0 to "
            f"{length - 1}, the whole vocabulary's. Check the tokenizer's vocabulary against the model's."
        )


def check_id_dtype(who: str, name: str, ids: Tensor) -> None:
    """Refuses what is not a tensor of ids."""
    if not isinstance(ids, Tensor) or ids.dtype not in INDEX_DTYPES:
        got = str(ids.dtype) if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{who}: {name} is {got}; expected a tensor of int64 or int32. Convert it with .long().")

"""The schedules of torch.distributed.pipelining: their names, how many stages a rank has, and which ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.distributed.pipelining import schedules as torch_schedules


@dataclass(frozen=True)
class Kind:
    """One schedule.

    Attributes:
        name: as the caller writes it, and torch's get_schedule_class without underscores.
        several: True if a rank has several stages.
        style: "loop": stage i is on rank i mod ranks; "v": a rank has stage i and the one as far from the end.
        splits: True if weight gradients are computed apart from those of the inputs.
    """

    name: str
    several: bool = False
    style: str = "loop"
    splits: bool = False

    @property
    def cls(self) -> Any:
        """torch's class."""
        return torch_schedules.get_schedule_class(self.name.replace("_", ""))


KINDS = {
    kind.name: kind
    for kind in (
        Kind("gpipe"),
        Kind("1f1b"),
        Kind("looped_bfs", several=True),
        Kind("interleaved_1f1b", several=True),
        Kind("interleaved_zero_bubble", several=True, splits=True),
        Kind("zbv_zero_bubble", several=True, style="v", splits=True),
        Kind("dual_pipe_v", several=True, style="v", splits=True),
    )
}


def kind_of(schedule: str) -> Kind:
    """The schedule of a name; torch's own spelling will do as well. Raises ValueError for an unknown one."""
    known = {name.replace("_", ""): kind for name, kind in KINDS.items()}
    found = known.get(schedule.lower().replace("_", "")) if isinstance(schedule, str) else None
    if found is None:
        raise ValueError(f"pyshard.pp.pipeline: schedule={schedule!r}; expected one of {', '.join(KINDS)}.")
    return found


def check(kind: Kind, ranks: int, stages_per_rank: int, microbatches: int, blocks: int) -> None:
    """Raises ValueError if torch's schedule would not run with these numbers, or blocks do not suffice."""
    who, stages = "pyshard.pp.pipeline", ranks * stages_per_rank
    if isinstance(stages_per_rank, bool) or not isinstance(stages_per_rank, int) or stages_per_rank < 1:
        raise ValueError(f"{who}: stages_per_rank={stages_per_rank!r}; expected a whole number, at least 1.")
    if isinstance(microbatches, bool) or not isinstance(microbatches, int) or microbatches < 1:
        raise ValueError(f"{who}: n_microbatches={microbatches!r}; expected a whole number, at least 1.")
    if not kind.several and stages_per_rank != 1:
        raise ValueError(
            f"{who}: stages_per_rank={stages_per_rank} with schedule={kind.name!r}; expected 1. Use "
            "'interleaved_1f1b' for several stages a rank."
        )
    if kind.style == "v" and stages_per_rank != 2:
        raise ValueError(f"{who}: stages_per_rank={stages_per_rank} with {kind.name!r}; expected 2, there and back.")
    if stages > blocks:
        raise ValueError(
            f"{who}: the model has {blocks} blocks for {stages} stages ({ranks} ranks of {stages_per_rank}); expected "
            "at least one a stage. Use fewer ranks or stages_per_rank."
        )
    least = {"1f1b": ranks, "dual_pipe_v": stages}.get(kind.name, 1)  # torch's own conditions
    if microbatches < least:
        raise ValueError(
            f"{who}: n_microbatches={microbatches} with {kind.name!r} over {ranks} ranks; expected at least {least}."
        )
    if kind.name.startswith("interleaved"):
        rounds = max(1, microbatches // ranks)
        if microbatches % rounds:
            raise ValueError(
                f"{who}: n_microbatches={microbatches} with {kind.name!r} over {ranks} ranks; expected a multiple of "
                f"{ranks}, or of {rounds}, the number of rounds that it makes."
            )


def ranks_of_stages(kind: Kind, ranks: int, stages: int) -> list[int]:
    """The rank, within the pipeline, that has each stage."""
    return [
        stage % ranks if kind.style == "loop" or stage // ranks % 2 == 0 else ranks - 1 - stage % ranks
        for stage in range(stages)
    ]

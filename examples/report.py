"""What a run leaves behind: its losses, its times, the bytes that it holds on a rank, and the table made of them."""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import fmean, median

import torch
import torch.distributed as dist
from gpt import GPT
from group import FIRST, RANK, WORLD, gather
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

from pyshard import ShardedAdamW
from pyshard.optim.sharded_explain import held_bytes
from pyshard.placement import tensor_shard

MEAN_OVER = 50  # steps in the training loss of the table: the loss of one batch alone is too noisy to compare
KINDS = ("weights", "gradients", "slots", "moments", "master weights")


@dataclass
class Record:
    """What one rank has seen of a run, or all together."""

    losses: list[float] = field(default_factory=list)
    compute: list[float] = field(default_factory=list)  # milliseconds of each step in forward and backward
    update: list[float] = field(default_factory=list)  # and in the optimizer: clipping, update and casts
    memory: dict[str, int] = field(default_factory=dict)  # bytes by kind
    weights: list[str] = field(default_factory=list)  # a digest of their bits, for each rank

    def step_ms(self) -> float:
        """Median milliseconds of a whole step."""
        return median(a + b for a, b in zip(self.compute, self.update, strict=True))


class Run:
    """One training run by one way to train: `build` gives the network to call and the optimizer, for a model.

    With `alone` the first rank trains on whole batches, with the threads of all ranks; else each on its part. `part`:
    index and number of them, where ranks hold the model together.
    """

    model: nn.Module  # what holds the weights on this rank: a GPT, or the stages of a pipeline
    network: nn.Module  # the model, or a wrapper of torch around it
    whole: GPT  # has the final weights of all ranks, after gather()
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR

    def __init__(
        self,
        name: str,
        title: tuple[str, str],
        build: Callable[[GPT], tuple[nn.Module, torch.optim.Optimizer]],
        alone: bool = False,
        part: tuple[int, int] | None = None,
    ) -> None:
        self.name = name
        self.title = title
        self.build = build
        self.alone = alone
        self.here = FIRST or not alone
        self.shared = part is not None
        self.part = (0, 1) if alone else part or (RANK, WORLD)
        self.threads = torch.get_num_threads() * (WORLD if alone else 1)
        self.record = Record()
        self.validation_loss = math.nan

    @property
    def label(self) -> str:
        return ", ".join(filter(None, self.title))

    def add(self, loss: float, begin: float, middle: float, end: float) -> None:
        """One step: its loss, and the seconds at which it began, entered the optimizer and ended."""
        self.record.losses.append(loss)
        self.record.compute.append((middle - begin) * 1e3)
        self.record.update.append((end - middle) * 1e3)

    def progress(self) -> str:
        """The last ten steps of this rank, in a few words for the progress bar."""
        took = [a + b for a, b in zip(self.record.compute[-10:], self.record.update[-10:], strict=True)]
        return f"{self.name} {fmean(self.record.losses[-10:]):.3f}, {median(took):.0f} ms"

    def gather(self) -> None:
        """Makes one record of those of all ranks: the mean of their losses, the times of the one that was slowest at a
        step, and the bytes of the one that holds most. All ranks call it, after a step and before zero_grad.

        Raises:
            RuntimeError: the weights of two ranks differ.
        """
        if self.here:
            self.record.memory = self.memory()
            weights = self.model.state_dict() if not self.shared else whole_weights(self.model)
            self.whole.load_state_dict(weights)
            self.record.weights = [digest(weights.values())]
        records = [record for record in gather(self.record if self.here else None) if record]
        digests = [digest for record in records for digest in record.weights]
        if len(set(digests)) > 1:
            raise RuntimeError(f"{self.label}: ranks ended with different weights {digests}; expected the same bits")
        steps = list(zip(*(zip(r.compute, r.update, strict=True) for r in records), strict=True))
        slowest = [max(times, key=sum) for times in steps]
        self.record = Record(
            [fmean(losses) for losses in zip(*(r.losses for r in records), strict=True)],
            [compute for compute, _ in slowest],
            [update for _, update in slowest],
            max((r.memory for r in records), key=lambda memory: sum(memory.values())),
            digests,
        )

    @torch.no_grad()
    def validate(self, tokens: Tensor, targets: Tensor) -> None:
        self.validation_loss = self.whole.loss(tokens, targets).item()

    def memory(self) -> dict[str, int]:
        """Bytes by kind of the tensors that model and optimizer hold on this rank.

        A master is any tensor that carries a weight, or the rest of one, beside the model's own. Slots are memory
        in which gradients travel to the ranks that own them; what a rank maps of another's is counted there.
        """
        optimizer = self.optimizer
        weights = list(self.model.parameters())  # of a pipeline: of this rank's stages
        optimized = [p for group in optimizer.param_groups for p in group["params"]]
        masters: list[Tensor] = [p for p in optimized if all(p is not w for w in weights)]
        gradients = [p.grad for p in weights + masters if p.grad is not None]
        moments = []
        inner = optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
        for state in inner.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    (masters if name in ("master", "remainder") else moments).append(value)
        held = dict(zip(KINDS, map(nbytes, (weights, gradients, [], moments, masters)), strict=True))
        if isinstance(optimizer, ShardedAdamW) and optimizer.world > 1:
            counted = held_bytes(optimizer)
            held["gradients"], held["slots"] = counted["gradients"], counted["gradients on their way"]
        return held


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Of a DTensor, what this rank has of it."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


@torch.no_grad()
def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the whole model out of the parts that all ranks hold; all of them call it.

    Raises:
        RuntimeError: two ranks have other bits of the same weight.
    """
    mine: dict[str, Tensor] = {}
    for name, param in model.state_dict(keep_vars=True).items():
        weight = param.full_tensor() if isinstance(param, DTensor) else param.detach()
        cut = tensor_shard(param)
        if cut is not None and cut.dim is not None:
            parts: list[Tensor] = [weight] * len(cut.pieces)
            dist.all_gather_object(parts, weight, group=cut.group)
            weight = weight.new_empty(cut.shape)
            for rank, part in enumerate(parts):
                cut.place(part, weight, rank)
        mine[name] = weight
    whole: dict[str, Tensor] = {}
    for theirs in gather(mine):  # stages have others; ranks of the same stage, and of a tied weight, the same
        for name, weight in theirs.items():
            if not torch.equal(whole.setdefault(name, weight), weight):
                raise RuntimeError(f"ranks ended with different weights {name}; expected the same bits")
    return dict(sorted(whole.items()))


def digest(tensors: Iterable[Tensor]) -> str:
    """16 hexadecimal digits that follow from all bits of the tensors."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def furthest(run: Run, first: Run) -> float:
    """The largest difference of two runs in the loss of one step."""
    return max(abs(a - b) for a, b in zip(run.record.losses, first.record.losses, strict=True))


def table(runs: list[Run]) -> str:
    """The runs side by side: losses, median milliseconds per step, bytes held."""
    records = [run.record for run in runs]
    last = min(MEAN_OVER, len(records[0].losses))
    steps = [record.step_ms() for record in records]
    held = [sum(r.memory.values()) for r in records]
    rows = [
        (f"training loss, last {last} steps", ".4f", [fmean(r.losses[-last:]) for r in records]),
        ("validation loss", ".4f", [run.validation_loss for run in runs]),
        ("    at most from the first, a step", ".1e", [furthest(run, runs[0]) for run in runs]),
        ("ms per step, median", ".2f", steps),
        ("    forward and backward", ".2f", [median(r.compute) for r in records]),
        ("    optimizer: clip, update, casts", ".2f", [median(r.update) for r in records]),
        ("    relative to the first", ".2f", [step / steps[0] for step in steps]),
        (f"bytes held{' per rank' if WORLD > 1 else ''}", ",.0f", held),
        *((f"    {kind}", ",.0f", [r.memory[kind] for r in records]) for kind in KINDS),
        ("    relative to the first", ".2f", [size / held[0] for size in held]),
    ]
    if len(runs) == 1:
        rows = [row for row in rows if "first" not in row[0]]
    heads = [[run.title[line] for run in runs] for line in (0, 1)]
    lines = ["", *(f"{'':36}" + "".join(f"{part:>19}" for part in head) for head in heads if any(head))]
    for label, form, values in rows:
        if any(values):
            lines.append(f"{label:36}" + "".join(f"{value:>19{form}}" for value in values))
    return "\n".join(lines)

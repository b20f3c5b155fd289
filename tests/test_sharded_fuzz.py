"""Random training programs: on several ranks with a sharded optimizer, and by a model of them in one process.
After every step all ranks must hold the bits of the model, and at the end its state.

A program is a list of actions, the same on all ranks but for which parameters a rank uses when. Gradients are either
small integers, whose sums are exact in any order, so that they may be sent in any number of rounds; or random numbers
that depend on the weights, sent once per step, so that the order of all sums is part of the result.

PYSHARD_FUZZ=1000 runs that many programs instead of a few.
"""

import faulthandler
import math
import os
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from sharded_cases import BF16, F16, F32
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyshard

PROGRAMS = int(os.environ.get("PYSHARD_FUZZ", "160"))
BATCH = 16  # programs that the same processes run
LIMIT = 120  # seconds of a batch
TIMEOUT = 30.0  # of the optimizers
# Ends of parameters at, before and behind blocks of the norm and aligned places; none, one, and many elements.
SHAPES = [(), (0,), (1,), (13,), (32,), (33, 5), (4095,), (4096,), (4097,), (70, 130), (2, 3, 0), (5, 7, 11, 13)]
SHAPES.append((12300,))
INTEGERS = 2  # gradients of one use are integers up to this: 64 of them add up exactly in bf16


@dataclass(frozen=True)
class Spec:
    """A parameter."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    turned: bool  # not in C order
    frozen: bool
    twice: bool  # used in two places of the loss
    wide: bool  # grad_dtype is fp32

    @property
    def grad_dtype(self) -> torch.dtype:
        return F32 if self.wide else self.dtype


@dataclass(frozen=True)
class Settings:
    """What a run may change without changing the result."""

    stage: int
    transport: str
    bucket_mb: float
    behind: bool  # model=...: the all-gather behind the next forward


@dataclass(frozen=True)
class Program:
    seed: int
    world: int
    members: tuple[int, ...] | None  # of the process group, if it is not all ranks
    exact: bool  # integers as gradients
    specs: tuple[Spec, ...]
    groups: tuple[tuple[int, ...], ...]  # at first
    settings: Settings
    reduce_dtype: torch.dtype | None
    coupled: bool
    scaler: bool
    options: dict[str, Any]
    actions: tuple[tuple[Any, ...], ...] = field(default=())

    @property
    def size(self) -> int:
        return self.world if self.members is None else len(self.members)


@dataclass(frozen=True)
class Use:
    """One backward of one rank."""

    params: tuple[int, ...]  # in the order of their use
    quiet: bool = False  # in no_sync
    inside: bool = False  # in a checkpoint that runs a backward of its own inside the backward
    inf: bool = False  # one gradient is inf


# ---- what ranks and model share ----


class Part(nn.Module):
    """One parameter, and its part of the loss."""

    def __init__(self, param: nn.Parameter, spec: Spec, program: Program, index: int):
        super().__init__()
        self.param, self.spec, self.program, self.index = param, spec, program, index

    def forward(self, one: Tensor, rank: int, count: int, inf: bool) -> Tensor:
        total = torch.zeros(())
        for use in range(2 if self.spec.twice else 1):
            seed = hash((self.program.seed, self.index, rank, count, use)) % 2**62
            generator = torch.Generator().manual_seed(seed)
            if self.program.exact:
                target = torch.randint(-INTEGERS, INTEGERS + 1, self.spec.shape, generator=generator).float()
                if inf and use == 0 and target.numel():
                    target.view(-1)[-1] = torch.inf
                total = total + (self.param.float() * target * one).sum()
            else:
                target = torch.randn(self.spec.shape, generator=generator)
                total = total + ((self.param.float() - target) ** 2).sum() * (1 + rank)
        return total


def make_param(program: Program, index: int, salt: int) -> nn.Parameter:
    spec = program.specs[index]
    generator = torch.Generator().manual_seed((program.seed * 100 + index) * 10 + salt)
    value = torch.randn(spec.shape, generator=generator).to(spec.dtype)
    if spec.turned and len(spec.shape) == 4:
        value = value.contiguous(memory_format=torch.channels_last)
    if spec.turned and len(spec.shape) == 2:
        value = value.t().contiguous().t()
    return turn_into_param(value, spec)


def turn_into_param(value: Tensor, spec: Spec) -> nn.Parameter:
    param = nn.Parameter(value, requires_grad=not spec.frozen)
    if spec.wide:
        param.grad_dtype = F32
    return param


def backward(parts: list[Part], use: Use, rank: int, count: int, scaled: Callable[[Tensor], Tensor]) -> None:
    """Adds to .grad of the parameters that are used and trained."""
    one = torch.ones((), requires_grad=use.inside)
    total = torch.zeros(())
    for index in use.params:
        inputs = (one, rank, count, use.inf and index == use.params[0])
        if use.inside:
            total = total + checkpoint(parts[index], *inputs, use_reentrant=True)
        else:
            total = total + parts[index](*inputs)
    if total.requires_grad:
        scaled(total).backward()


def write(param: nn.Parameter, how: str) -> None:
    with torch.no_grad():
        if how == "in place":
            param.mul_(0.5)
        elif how == "data":
            param.data.copy_(param.data * 0.5 + 1)
        else:
            param.data = param.data * 0.75


def hyperparameters(index: int) -> dict[str, Any]:
    return [{}, {"lr": 3e-2, "weight_decay": 0.3, "betas": (0.8, 0.99)}, {"lr": 2e-3, "eps": 1e-6}][index % 3]


def used(state: dict[int, dict[str, Tensor]]) -> dict[tuple[int, str], int]:
    """Digests of the state. What only skipped steps have made is as good as none."""
    return {(i, key): digest(v) for i, kept in state.items() if kept["step"] > 0 for key, v in kept.items()}


def digest(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


class Actor:
    """Carries out a program; what differs between a rank and the model is in the subclasses."""

    opt: Any

    def __init__(self, program: Program, salt: int):
        self.program, self.settings = program, program.settings
        self.params = [make_param(program, i, salt) for i in range(len(program.specs))]
        self.indices = [list(group) for group in program.groups]  # of the parameters of each group
        self.count = 0  # backwards so far
        self.scale = 8.0 if program.scaler else 1.0
        self.seen: list[Any] = []
        self.restart(self.settings)

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.params[i] for i in g], **hyperparameters(n)} for n, g in enumerate(self.indices)]

    def run(self) -> list[Any]:
        for number, (name, *arguments) in enumerate(self.program.actions):
            try:
                getattr(self, name)(*arguments)
            except Exception as error:
                error.add_note(f"in action {number}: {name} {arguments}")
                raise
        self.look()
        return self.seen

    def see(self, raised: bool) -> None:
        norm = float(self.opt.grad_norm) if self.opt.options.needs_norm() and self.opt._grad_norm is not None else 0.0
        if not math.isfinite(norm):
            norm = math.inf  # before the first step a rank may hold NaN for what is inf on another
        values = [digest(p) for p in self.trained()]
        self.seen.append((values, norm, self.opt.skipped_steps, raised, self.scale))

    def trained(self) -> list[nn.Parameter]:
        return [self.params[i] for group in self.indices for i in group]

    def lr(self, group: int, value: float) -> None:
        self.opt.param_groups[group % len(self.indices)]["lr"] = value

    def write(self, index: int, how: str) -> None:
        write(self.params[index], how)

    def train(self, index: int, on: bool) -> None:
        self.params[index].requires_grad_(on)

    def group(self, indices: tuple[int, ...]) -> None:
        self.opt.add_param_group({"params": [self.params[i] for i in indices], **hyperparameters(len(self.indices))})
        self.indices.append(list(indices))

    def restart(self, settings: Settings) -> None:
        raise NotImplementedError

    def look(self) -> None:
        raise NotImplementedError


class OnRank(Actor):
    """A rank of the group."""

    def __init__(self, program: Program, rank: int, group: Any):
        self.rank, self.process_group = rank, group
        self.opt = None
        super().__init__(program, salt=rank)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale, growth_interval=2, enabled=program.scaler)

    def restart(self, settings: Settings) -> None:
        """Another optimizer takes over the state."""
        program, self.settings = self.program, settings
        state = None
        if self.opt is not None:
            state = self.opt.full_state_dict()
            self.opt.close()
        self.parts = [Part(p, s, program, i) for i, (p, s) in enumerate(zip(self.params, program.specs))]
        self.opt = (pyshard.ShardedAdam if program.coupled else pyshard.ShardedAdamW)(
            self.groups(),
            stage=settings.stage,
            transport=settings.transport,
            bucket_mb=settings.bucket_mb,
            model=nn.ModuleList(self.parts) if settings.behind else None,
            process_group=self.process_group,
            reduce_dtype=program.reduce_dtype,
            timeout=TIMEOUT,
            **program.options,
        )
        if state is not None:
            self.opt.load_state_dict(state)

    def backward(self, uses: tuple[Use, ...]) -> None:
        use = uses[self.rank]
        with self.opt.no_sync() if use.quiet else nullcontext():
            backward(self.parts, use, self.rank, self.count, self.scaler.scale)
        self.count += 1

    def hand(self, uses: tuple[Use, ...]) -> None:
        for param in (self.params[i] for i in uses[self.rank].params if self.params[i].requires_grad):
            param.grad = torch.full_like(param, self.rank + 1.0, dtype=param.grad_dtype)

    def double(self, in_place: bool) -> None:
        for param in self.params:
            if param.grad is not None:
                if in_place:
                    param.grad.mul_(2)
                else:
                    param.grad = param.grad * 2

    def zero_grad(self, to_none: bool = True) -> None:
        self.opt.zero_grad(set_to_none=to_none)

    def trip(self, rank: int) -> None:
        """A step that cannot be taken, because of one rank."""
        group = self.opt.param_groups[0]
        before, group["lr"] = group["lr"], -1.0 if rank == self.rank else group["lr"]
        with pytest.raises(ValueError if rank == self.rank else pyshard.comm.PeerError, match=r"lr=-1\.0"):
            self.opt.step()
        group["lr"] = before

    def step(self, uses: tuple[Use, ...] | None = None, unscale: bool = False) -> None:
        closure: Callable[[], None] | None = None if uses is None else lambda: self.backward(uses)
        raised = False
        try:
            if self.program.scaler:
                if unscale:
                    self.scaler.unscale_(self.opt)
                self.scaler.step(self.opt)
                self.scaler.update()
                self.scale = self.scaler.get_scale()
            else:
                self.opt.step(closure)
        except FloatingPointError:
            raised = True
        self.opt.synchronize()
        self.see(raised)

    def write(self, index: int, how: str) -> None:
        self.opt.synchronize()
        super().write(index, how)

    def reload(self, whole: bool) -> None:
        self.opt.load_state_dict(self.opt.full_state_dict() if whole else self.opt.state_dict())

    def look(self) -> None:
        self.seen.append(used(self.opt.full_state_dict()["state"]))
        self.opt.explain()
        self.opt.close()


class InOneProcess(Actor):
    """The model: every rank's gradients, their sums in rank order in fp32, and pyshard.AdamW for their mean."""

    def __init__(self, program: Program):
        self.opt = None
        self.grads: list[dict[int, Tensor]] = [{} for _ in range(program.size)]
        self.growth = 0
        super().__init__(program, salt=0)
        for param in self.params:
            param.grad_dtype = F32

    def restart(self, settings: Settings) -> None:
        program, self.settings = self.program, settings
        state = None if self.opt is None else self.opt.state_dict()
        self.opt = (pyshard.Adam if program.coupled else pyshard.AdamW)(self.groups(), **program.options)
        if state is not None:
            self.opt.load_state_dict(state)

    def backward(self, uses: tuple[Use, ...]) -> None:
        for rank, use in enumerate(uses):
            copies = []
            for i, (param, spec) in enumerate(zip(self.params, self.program.specs)):
                copy = turn_into_param(param.detach().clone(), spec).requires_grad_(param.requires_grad)
                copy.grad = self.grads[rank].get(i)
                copies.append(copy)
            parts = [Part(c, s, self.program, i) for i, (c, s) in enumerate(zip(copies, self.program.specs))]
            backward(parts, use, rank, self.count, lambda loss: loss * self.scale)
            self.grads[rank] = {i: c.grad for i, c in enumerate(copies) if c.grad is not None}
        self.count += 1

    def hand(self, uses: tuple[Use, ...]) -> None:
        for rank, use in enumerate(uses):
            for i in (i for i in use.params if self.params[i].requires_grad):
                dtype = self.program.specs[i].grad_dtype
                self.grads[rank][i] = torch.full_like(self.params[i], rank + 1.0, dtype=dtype)

    def double(self, in_place: bool) -> None:
        self.grads = [{i: grad * 2 for i, grad in grads.items()} for grads in self.grads]

    def zero_grad(self, to_none: bool = True) -> None:
        self.grads = [{} if to_none else {i: grad * 0 for i, grad in grads.items()} for grads in self.grads]

    def trip(self, rank: int) -> None:
        """Changes nothing."""

    def step(self, uses: tuple[Use, ...] | None = None, unscale: bool = False) -> None:
        if uses is not None:
            self.backward(uses)
        wire = self.program.reduce_dtype if self.program.size > 1 else None
        for i, param in enumerate(self.params):
            param.grad = None
            if any(i in grads for grads in self.grads):
                parts = [grads.get(i, torch.zeros_like(param, dtype=F32)) for grads in self.grads]
                parts = [part if wire is None else part.to(wire) for part in parts]
                param.grad = parts[0].float()
                for part in parts[1:]:
                    param.grad = param.grad + part.float()
        infinite = any(not p.grad.isfinite().all() for p in self.params if p.grad is not None)
        self.opt.grad_scale = torch.tensor(self.program.size * self.scale)
        self.opt.found_inf = torch.tensor(float(infinite and self.program.scaler))
        raised = False
        try:
            if not (infinite and self.program.scaler and self.program.size == 1):  # then torch leaves it out
                self.opt.step()
        except FloatingPointError:
            raised = True
        if self.program.scaler:  # as torch's update()
            self.growth = 0 if infinite else self.growth + 1
            self.scale *= 0.5 if infinite else 2.0 if self.growth == 2 else 1.0
            self.growth %= 2
        if self.settings.stage == 2 and self.program.size > 1:
            self.zero_grad()
        self.see(raised)

    def reload(self, whole: bool) -> None:
        self.opt.load_state_dict(self.opt.state_dict())

    def look(self) -> None:
        self.seen.append(used(self.opt.state_dict()["state"]))


# ---- programs ----


def make_program(seed: int, world: int) -> Program:
    rng = np.random.default_rng(seed)

    def chance(p: float) -> bool:
        return bool(rng.random() < p)

    def pick(*choices: Any) -> Any:
        return choices[int(rng.integers(len(choices)))]

    members = None
    if world > 1 and chance(0.15):
        members = tuple(sorted(int(r) for r in rng.choice(world, int(rng.integers(1, world + 1)), replace=False)))
    size = world if members is None else len(members)
    exact, scaler = chance(0.6), chance(0.25)
    dtypes = pick((F32,), (BF16,), (F32, BF16), (F32, BF16, F16))
    specs = []
    for _ in range(int(rng.integers(2, 9))):
        shape, dtype = pick(*SHAPES), pick(*dtypes)
        wide = (dtype != F32 and chance(0.2)) or (dtype == F16 and scaler)  # torch's GradScaler refuses fp16 gradients
        specs.append(Spec(shape, dtype, chance(0.5), chance(0.15), chance(0.2), wide))
    order = [int(i) for i in rng.permutation(len(specs))]
    first = order[: int(rng.integers(1, len(order) + 1))]
    late = [i for i in order if i not in first]
    cut = int(rng.integers(len(first)))
    groups = (tuple(first),) if cut == 0 else (tuple(first[:cut]), tuple(first[cut:]))

    def settings() -> Settings:
        transport = pick("shm", "collective", "auto")
        return Settings(pick(1, 2), transport, pick(1e-6, 0.01, 0.05, 25), chance(0.3))

    options: dict[str, Any] = {
        "max_grad_norm": pick(None, None, 0.5, float("inf")),
        "nonfinite": "propagate" if scaler else pick("propagate", "skip", "raise"),
        "master_weights": pick("auto", "auto", "fp32", "none"),
        "backend": pick("auto", "auto", "auto", "reference"),
        "amsgrad": chance(0.2),
        "maximize": chance(0.2),
        "lr": 1e-2,
    }
    program = Program(
        seed, world, members, exact, tuple(specs), groups, settings(), pick(None, None, F32, BF16, F16), chance(0.2),
        scaler, options,
    )  # fmt: skip
    fresh = True  # until the first step the ranks speak at the end of each backward
    known, actions, now = list(first), [], program.settings
    # A change of a weight and a load of its master do not know which of them came first.
    writes = chance(0.5)
    frozen = {i for i, spec in enumerate(specs) if spec.frozen}

    def heard(i: int) -> bool:
        return bool(np.prod(specs[i].shape)) and not specs[i].frozen

    def use(always: bool, quiet: bool, inf: bool) -> Use:
        live = [i for i in known if chance(0.7)]
        if always and not any(heard(i) and i not in frozen for i in live):
            live = list(known)
        return Use(tuple(int(i) for i in rng.permutation(live)), quiet, inf=inf)

    def freeze(index: int, on: bool) -> tuple[str, int, bool]:
        (frozen.discard if on else frozen.add)(index)
        return "train", index, on

    def uses(always: bool = False, quiet: bool = False, inf: bool = False) -> tuple[Use, ...]:
        bad = int(rng.integers(size)) if inf else -1
        made = [use(always, quiet, rank == bad) for rank in range(size)]
        if exact and chance(0.1):  # each checkpoint ends a backward of its own, so all ranks have the same ones
            made = [replace(made[0], inside=True, inf=rank == bad) for rank in range(size)]
        return tuple(made)

    if scaler and not any(heard(i) for i in first):
        program = replace(program, scaler=(scaler := False))
    for _ in range(int(rng.integers(2, 6))):
        if chance(0.2):
            actions.append(("lr", int(rng.integers(3)), float(pick(0.0, 1e-3, 0.1))))
        if writes and chance(0.3):
            actions.append(("write", pick(*known), pick("in place", "data", "new")))
        if not writes and chance(0.3):
            actions.append(("reload", chance(0.5)))
        if late and chance(0.3):
            count = int(rng.integers(1, len(late) + 1))
            actions.append(("group", tuple(late[:count])))
            known, late = known + late[:count], late[count:]
        if chance(0.15) and not scaler:
            actions.append(freeze(pick(*known), chance(0.7)))
        if not writes and chance(0.2):
            now = settings()
            # A frozen parameter with a gradient on some ranks only would be an error.
            actions += [("zero_grad", True), ("restart", now)]
            fresh = True
        if chance(0.2):  # gradients that are thrown away
            actions.append(("backward", uses(always=True)))
            actions.append(("zero_grad",))
        inf = exact and (scaler or options["nonfinite"] != "propagate") and chance(0.2)
        whole = now.stage == 1 or size == 1
        if scaler:
            actions += [("backward", uses(quiet=True))] * chance(0.3) + [("backward", uses(True, False, inf))]
            actions.append(("step", None, whole and chance(0.5)))
        elif chance(0.1):
            actions += [("hand", uses()), ("step",)]
        elif exact:
            for number in range(int(rng.integers(0, 4))):
                actions.append(("backward", uses(quiet=chance(0.3), inf=inf and number == 0)))
            if whole and chance(0.3):
                actions.append(("double", chance(0.5)))
            if chance(0.1) and size > 1 and not fresh:
                actions.append(("trip", int(rng.integers(size))))
            actions.append(("step", uses()) if chance(0.2) else ("step",))
        else:
            actions += [("backward", uses(quiet=True)) for _ in range(int(rng.integers(0, 3)))]
            actions += [("backward", uses()), ("step",)]
        fresh = False
        if chance(0.15) and not inf and not scaler:
            actions.append(("step",))
        if not exact or inf or scaler or chance(0.8):
            actions.append(("zero_grad", inf or chance(0.7)))
    return replace(program, actions=tuple(actions))


# ---- the test ----


def _rank(rank: int, world: int, programs: list[Program]) -> list[Any]:
    faulthandler.dump_traceback_later(LIMIT - 5)
    torch.use_deterministic_algorithms(False)
    results = []
    for program in programs:
        group = None if program.members is None else dist.new_group(list(program.members))
        if program.members is None or rank in program.members:
            place = rank if program.members is None else program.members.index(rank)
            try:
                results.append(OnRank(program, place, group).run())
            except Exception as error:
                error.add_note(f"in the program of seed {program.seed}, world {world}")
                raise
        else:
            results.append(None)
    dist.barrier()  # no rank ends while others still make their groups
    return results


def describe(program: Program) -> str:
    lines = [f"{replace(program, actions=())}", *(f"  {i}: {action}" for i, action in enumerate(program.actions))]
    return "\n".join(lines)


def check(programs: list[Program]) -> None:
    wanted = [InOneProcess(program).run() for program in programs]
    outcomes = ranks.run(_rank, programs[0].world, programs, seconds=LIMIT, quiet=True)
    errors = [f"rank {rank}: {o.error}\n{o.trace}" for rank, o in enumerate(outcomes) if o.error]
    assert not errors, "\n".join(errors)
    for number, program in enumerate(programs):
        for rank, outcome in enumerate(outcomes):
            found = outcome.value[number]
            assert found is None or found == wanted[number], (
                f"rank {rank}, seed {program.seed}: {found}\nexpected {wanted[number]}\n{describe(program)}"
            )


@pytest.mark.parametrize("batch", range(-(-PROGRAMS // BATCH)))
def test_random_programs(rng: np.random.Generator, one_torch_thread: None, batch: int) -> None:
    world = (2, 3, 4, 3, 2, 4, 1)[batch % 7]
    check([make_program(int(rng.integers(2**31)), world) for _ in range(BATCH)])

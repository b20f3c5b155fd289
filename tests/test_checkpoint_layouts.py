"""Checkpoints across layouts: data-parallel, tensor-parallel, pipeline and all together, bit for bit.

A twin in one process makes a checkpoint. Every layout loads it, makes one more step, in which each rank gets its part
of the twin's gradients, and saves; the twin makes the same step. Every such checkpoint is the twin's, in one process
and in every other layout.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pp_cases import build
from ranks import run
from reference import assert_same_bits
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

import pyshard
from pyshard.checkpoint import load_checkpoint, save_checkpoint
from pyshard.kernels.launch import local_tensor
from pyshard.placement import PipelineShare, carry_over, pipeline_share, set_pipeline_share, tensor_shard

F32, BF16 = torch.float32, torch.bfloat16
KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (F32, {"amsgrad": True}),
    "bf16 split": (BF16, {}),
    "bf16 master": (BF16, {"master_weights": "fp32"}),
}
FROZEN = "transformer.wpe.weight"
LATE = "transformer.h.1.ln_1.bias"  # gets its first gradient a step later than the others
LR = 0.01


def network(seed: int, dtype: torch.dtype) -> nn.Module:
    """A GPT-2 with tied embeddings, sizes that nothing divides and a frozen parameter."""
    model = build("gpt2", seed, n_layer=3, n_embd=14, n_inner=22, vocab_size=53, n_positions=9).to(dtype)
    model.get_parameter(FROZEN).requires_grad_(False)
    return model


def names_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by the name that the whole model has first for them."""
    found = {}
    for name, param in model.named_parameters():
        share = pipeline_share(param)
        found[name if share is None else share.name] = param
    return found


def gradients(seed: int, dtype: torch.dtype, leave_out: Sequence[str] = (FROZEN,)) -> dict[str, Tensor]:
    """Of the whole model."""
    generator = torch.Generator().manual_seed(seed)
    params = {name: p.shape for name, p in network(0, F32).named_parameters()}
    values = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in params.items()}
    return {name: value for name, value in values.items() if name not in leave_out}


def local_of(param: Tensor, whole: Tensor) -> Tensor:
    """What a rank holds of a value that is whole; a DTensor for one."""
    shard = tensor_shard(param)
    part = (whole if shard is None else shard.cut(whole)).contiguous()
    if not isinstance(param, DTensor):
        return part
    return distribute_tensor(part, param.device_mesh, param.placements, src_data_rank=None)


def step(model: nn.Module, opt: Any, grads: dict[str, Tensor]) -> None:
    for name, param in names_of(model).items():
        param.grad = local_of(param, grads[name]) if name in grads else None
    opt.step()
    opt.zero_grad()


def wholes(model: nn.Module, opt: Any) -> dict[str, Tensor]:
    """All that the twin has, by name."""
    names = [name for name, _ in model.named_parameters()]
    found = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    for i, items in opt.state_dict()["state"].items():
        found |= {f"{names[i]}.{key}": value.clone() for key, value in items.items()}
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    assert found.keys() == wanted.keys(), f"{what}: {found.keys() ^ wanted.keys()}"
    for key, value in wanted.items():
        assert_same_bits(found[key], value, f"{what}: {key}")


# ---- layouts ----


@dataclass(frozen=True)
class Layout:
    """dp: how data-parallel ranks share the work."""

    dp: str
    sizes: tuple[int, int, int]  # dp, tp, pp
    by_hand: bool = False  # stages cut by this file
    optimizer: str = "AdamW"

    def build(self, seed: int, kind: str) -> tuple[nn.Module, Any]:
        """With other weights than those to load."""
        dtype, options = KINDS[kind]
        dp, tp, pp = self.sizes
        mesh = pyshard.init_mesh(dp=dp, tp=tp, pp=pp)
        model = network(seed, dtype)
        if tp > 1:
            pyshard.tp.parallelize(model, mesh)
        if pp > 1:
            model = stage_of(model, mesh) if self.by_hand else pyshard.pp.pipeline(model, mesh, n_microbatches=4)
        options = {"lr": 0.7, "weight_decay": 0.2, **options}
        if self.dp == "fsdp":
            pyshard.fully_shard(model, mesh["dp"])
        elif self.dp == "torch's fsdp":
            olds = dict(model.named_parameters())
            torch.distributed.fsdp.fully_shard(model, mesh=mesh["dp"])
            for name, param in model.named_parameters():
                carry_over(olds[name], param)
        elif self.dp == "hsdp":
            shape = dist.init_device_mesh("cpu", (2, dp // 2), mesh_dim_names=("replicas", "shards"))
            pyshard.fully_shard(model, shape)
        params = model.parameters()
        if self.dp == "ShardedAdamW":
            group = mesh["dp"].get_group()
            return model, pyshard.ShardedAdamW(params, process_group=group, timeout=60, bucket_mb=0.01, **options)
        return model, {"AdamW": pyshard.AdamW, "torch": torch.optim.AdamW}[self.optimizer](params, **options)


def stage_of(model: nn.Module, mesh: Any) -> nn.Module:
    """The half of the model of this rank of two stages; the last one has the tied weight as its lm_head."""
    group = mesh.get_group("pp")
    whole = model.transformer
    gone = [(whole, "ln_f"), (model, "lm_head")] if group.rank() == 0 else [(whole, "wte"), (whole, "wpe")]
    keys = ["1", "2"] if group.rank() == 0 else ["0"]
    for name, param in model.named_parameters():
        set_pipeline_share(
            param, PipelineShare(group, name, counted=group.rank() == 0 or name != "transformer.wte.weight")
        )
    for parent, name in (*gone, *((whole.h, key) for key in keys)):
        del parent._modules[name]
    return model


LAYOUTS = {
    "dp4 ShardedAdamW": Layout("ShardedAdamW", (4, 1, 1)),
    "dp4 fsdp": Layout("fsdp", (4, 1, 1)),
    "hsdp 2x2": Layout("hsdp", (4, 1, 1)),
    "tp2 pp2": Layout("", (1, 2, 2)),
    "fsdp2 tp2": Layout("fsdp", (2, 2, 1)),
    "fsdp2 pp2 by hand": Layout("torch's fsdp", (2, 1, 2), by_hand=True),
    "fsdp2 pp2": Layout("fsdp", (2, 1, 2)),
    "ShardedAdamW2 tp2": Layout("ShardedAdamW", (2, 2, 1)),
    "ShardedAdamW2 pp2": Layout("ShardedAdamW", (2, 1, 2)),
}
IN_BF16 = ("dp4 ShardedAdamW", "tp2 pp2", "fsdp2 tp2", "fsdp2 pp2", "ShardedAdamW2 tp2")


def check(model: nn.Module, opt: Any, wanted: dict[str, Tensor], what: str) -> None:
    """What this rank holds is its part of the twin's."""
    for name, value in model.state_dict(keep_vars=True).items():
        mine = local_of(value, wanted[f"model.{name}"])
        assert_same_bits(local_tensor(value).detach(), local_tensor(mine), f"{what}: {name}")
    if isinstance(opt, pyshard.ShardedAdamW):
        params = [p for group in opt.param_groups for p in group["params"]]
        by_param = {param: name for name, param in names_of(model).items()}
        held = {by_param[params[i]]: items for i, items in opt.full_state_dict()["state"].items()}
        for name, items in held.items():
            for key, value in items.items():
                assert_same_bits(value, wanted[f"{name}.{key}"], f"{what}: {key} of {name}")
    else:
        held = {name: opt.state[p] for name, p in names_of(model).items() if opt.state.get(p)}
        for name, items in held.items():
            for key, value in items.items():
                if key == "remainder":
                    master = local_tensor(local_of(names_of(model)[name], wanted[f"{name}.master"]))
                    bits = (local_tensor(names_of(model)[name]).detach().view(torch.int16).int() << 16) + local_tensor(
                        value
                    )
                    assert_same_bits(bits.view(F32), master.contiguous(), f"{what}: master of {name}")
                else:
                    mine = wanted[f"{name}.{key}"]
                    mine = mine if key == "step" else local_tensor(local_of(names_of(model)[name], mine))
                    assert_same_bits(local_tensor(value), mine, f"{what}: {key} of {name}")
    trained = {key.removesuffix(".step") for key in wanted if key.endswith(".step")}
    assert held.keys() == trained & names_of(model).keys(), what


def _everywhere(rank: int, world: int, seed: int, root: str) -> None:
    for kind in KINDS:
        _every_layout(seed, Path(root) / kind, kind)


def _every_layout(seed: int, root: Path, kind: str) -> None:
    dtype, _ = KINDS[kind]
    before, after = torch.load(root / "before"), torch.load(root / "after")
    cases = {name: layout for name, layout in LAYOUTS.items() if kind == "fp32" or name in IN_BF16}
    if kind == "fp32":
        cases["torch's AdamW, fsdp2 tp2"] = Layout("fsdp", (2, 2, 1), optimizer="torch")
        cases["torch's AdamW, tp2 pp2"] = Layout("", (1, 2, 2), optimizer="torch")
    grads = gradients(seed + 3, dtype)
    for name, layout in cases.items():
        model, opt = layout.build(seed + 50, kind)
        assert load_checkpoint(root / "twin", model, opt) == {"i": 2}
        assert all(group["lr"] == LR for group in opt.param_groups)
        check(model, opt, before, f"twin to {name}")
        if layout.optimizer != "torch":  # which rounds otherwise
            step(model, opt, grads)
            check(model, opt, after, f"{name}, a step later")
            if layout.sizes[1] > 1 and layout.dp == "fsdp":
                through_state_dicts(model, opt, after, name)
        save_checkpoint(root / name, model, opt, i=3)
        if hasattr(opt, "close"):
            opt.close()
    saved = [name for name in cases if cases[name].optimizer != "torch"]
    for i, (name, layout) in enumerate(cases.items()):
        model, opt = layout.build(seed + 60, kind)
        for other in {saved[(i + 1) % len(saved)], saved[(i + 3) % len(saved)]}:
            load_checkpoint(root / other, model, opt)
            check(model, opt, after, f"{other} to {name}")
        if hasattr(opt, "close"):
            opt.close()


def through_state_dicts(model: nn.Module, opt: Any, wanted: dict[str, Tensor], what: str) -> None:
    """The optimizer takes rows of tensor-parallel parts as it gives them, and gives whole tensors."""
    names = [name for name, _ in model.named_parameters()]
    full = opt.full_state_dict()
    for i, items in full["state"].items():
        for key, value in items.items():
            assert_same_bits(value, wanted[f"{names[i]}.{key}"], f"{what}: whole {key} of {names[i]}")
    with pytest.raises(ValueError, match=r"has placements None and the parameter \(Shard\(dim=0\),\)"):
        opt.load_state_dict(full)  # as of other DTensors: torch's own function distributes it
    given = copy.deepcopy(opt.state_dict())
    for items in opt.state.values():
        for key, value in items.items():
            if key != "step":
                local_tensor(value).zero_()
    opt.load_state_dict(given)
    for param in names_of(model).values():
        if opt.state.get(param):
            assert opt.state[param]["exp_avg"].placements == param.placements  # type: ignore[attr-defined]
    check(model, opt, wanted, f"{what}: load_state_dict")


@pytest.mark.timeout(300)
def test_every_layout_to_every_other(seed: int, tmp_path: Path) -> None:
    seed %= 2**20
    for kind, (dtype, options) in KINDS.items():
        root = tmp_path / kind
        twin = network(seed, dtype)
        opt = pyshard.AdamW(twin.parameters(), lr=LR, weight_decay=0.1, **options)
        step(twin, opt, gradients(seed + 1, dtype, (FROZEN, LATE)))
        step(twin, opt, gradients(seed + 2, dtype))
        save_checkpoint(root / "twin", twin, opt, i=2)
        torch.save(before := wholes(twin, opt), root / "before")
        assert before[f"{LATE}.step"] == 1 and before["transformer.wte.weight.step"] == 2
        assert not any(key.startswith(FROZEN) for key in before)
        step(twin, opt, gradients(seed + 3, dtype))
        save_checkpoint(root / "twin after", twin, opt, i=3)
        torch.save(wholes(twin, opt), root / "after")
    run(_everywhere, 4, seed, str(tmp_path), seconds=280)
    for kind, (dtype, options) in KINDS.items():
        root = tmp_path / kind
        own = stored(root / "twin after")
        for path in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("twin")):
            torchs = path.name.startswith("torch's")
            found = network(seed + 70, dtype)
            again = pyshard.AdamW(found.parameters(), lr=0.3, **options)
            assert load_checkpoint(path, found, again) == {"i": 3}
            wanted = torch.load(root / ("before" if torchs else "after"))
            assert_same(wholes(found, again), wanted, f"{path.name} to one process")
            assert again.param_groups[0]["lr"] == LR
            # The very checkpoint of the model that is not cut: the same names, shapes and order of parameters.
            assert torchs or stored(path) == own, path.name


def stored(root: Path, what: str = "params") -> tuple[dict[str, Any], list[str]]:
    """Keys with shapes and dtypes, and the names in the first parameter group."""
    (directory,) = (path for path in root.iterdir() if path.is_dir())
    metadata = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    found = {}
    for key, value in metadata.items():
        if hasattr(value, "chunks"):
            assert sum(chunk.sizes.numel() for chunk in value.chunks) == value.size.numel(), key
            found[key] = (tuple(value.size), value.properties.dtype)
        else:
            found[key] = None
    values: dict[str, Any] = {"optimizer": {"param_groups": [{what: []}]}}
    dcp.load(values, checkpoint_id=directory, no_dist=True)
    return found, values["optimizer"]["param_groups"][0][what]


# ---- what does not fit together ----


class Half(nn.Module):
    """A stage: its parameters by the names of a whole model, said to be shared or not."""

    def __init__(self, group: Any, names: Sequence[str], copies: dict[str, str], seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name in names:
            setattr(self, name, nn.Parameter(torch.randn(3, 5, generator=generator)))
            if group is not None:
                share = PipelineShare(group, copies.get(name, name), counted=name not in copies)
                set_pipeline_share(getattr(self, name), share)


def values_of(model: nn.Module, opt: Any) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()] + [
        value.clone() for items in opt.state.values() for value in items.values()
    ]


def _what_does_not_fit(rank: int, world: int, root: str) -> dict[str, str]:
    """On 2 data-parallel ranks by 2 stages: what each error says on this rank."""
    mesh = pyshard.init_mesh(dp=2, pp=2)
    group, stage, dp = mesh.get_group("pp"), mesh.get_group("pp").rank(), mesh.get_group("dp").rank()
    names, copies = (["a", "b"], {}) if stage == 0 else (["c", "d"], {"d": "a"})
    said: dict[str, str] = {}

    def build(names: Sequence[str] = names, copies: dict[str, str] = copies, pipe: Any = group, **options: Any) -> Any:
        model = Half(pipe, names, copies)
        opt = pyshard.AdamW(model.parameters(), **options)
        for param in model.parameters():  # a step would find some of these mistakes itself
            moments = {"exp_avg": torch.ones_like(param), "exp_avg_sq": torch.ones_like(param)}
            opt.state[param] = {"step": torch.tensor(1.0), **moments}
        return model, opt

    def fails(what: str, model: nn.Module, opt: Any, load: bool = False, path: str = "good") -> None:
        before, files = values_of(model, opt), sorted(Path(root).rglob("*"))
        dist.barrier()
        with pytest.raises(ValueError) as found:
            (load_checkpoint if load else save_checkpoint)(f"{root}/{path}", model, opt)
        for value, wanted in zip(values_of(model, opt), before, strict=True):
            assert torch.equal(value, wanted), what
        dist.barrier()
        assert sorted(Path(root).rglob("*")) == files, what
        said[what] = str(found.value)

    model, opt = build()
    save_checkpoint(f"{root}/good", model, opt)
    load_checkpoint(f"{root}/good", model, opt)
    named = pyshard.AdamW([(f"my {name}", param) for name, param in model.named_parameters()])
    save_checkpoint(f"{root}/named", model, named)
    load_checkpoint(f"{root}/named", model, named)
    one_more = [*names, "x"] if rank == 3 else names
    fails("a name on one rank of a stage", *build(one_more))
    fails("the same, loading", *build(one_more), load=True)
    fails("no pipeline on one rank", *build(pipe=None if rank == 2 else group))
    fails("trained twice", *build(copies={}, names=names if stage == 0 else ["c", "a"]))
    fails("a copy of nothing", *build(copies={"d": "nowhere"} if stage else {}))
    fails("another rate", *build(lr=0.5 if rank == 1 else 0.1))
    fails("groups", model, pyshard.AdamW([{"params": [p]} for p in model.parameters()][: 2 if stage else 1]))
    fails("another model on all ranks", *build([*names, f"x{stage}"]), load=True)
    fails("a stage less", *build(names[:1], {}), load=True)
    fails("a name too many", *build([*names, "x"] if stage else names), load=True)
    model, opt = build()
    opt.param_groups[0]["params"].pop()  # of one stage: the optimizer does not train it
    fails("a parameter less in the optimizer", model, opt, load=True)
    alone = nn.ParameterDict({"a": torch.zeros(3, 5), "b": torch.zeros(3, 5), "c": torch.zeros(3, 5)})
    fails("no pipeline", alone, pyshard.AdamW(alone.parameters()), load=True)
    assert dp in (0, 1)
    return said


def test_what_does_not_fit_together(tmp_path: Path) -> None:
    """The same error on all ranks; nothing is written or changed."""
    outcomes = run(_what_does_not_fit, 4, str(tmp_path))
    said = outcomes[0].value
    assert all(outcome.value == said for outcome in outcomes)
    found = "x is in the model on rank 3 and not on rank 2; expected the same names"
    assert found in said["a name on one rank of a stage"] and found in said["the same, loading"]
    assert "into 2 pipeline stages on rank 0 and 1 on rank 2" in said["no pipeline on one rank"]
    assert "a is trained on stages 0 and 1 of the pipeline" in said["trained twice"]
    assert "stage 1 of the pipeline trains a copy of nowhere, and no stage has" in said["a copy of nothing"]
    assert re.search(r"lr of group 0 of the optimizer is 0\.1 on rank 0 and 0\.5 on rank 1", said["another rate"])
    assert "has 1 parameter groups on rank 0 and 2 on rank 2" in said["groups"]
    assert re.search(r"the checkpoint has no model\.x0; expected", said["another model on all ranks"])
    assert re.search(r"has model\.(b, model\.d|d, model\.b), which the model does not have", said["a stage less"])
    assert "the checkpoint has no x; expected the same names" in said["a name too many"]
    assert re.search(r"has b, which group 0 of the optimizer does not have", said["a parameter less in the optimizer"])
    assert "model.d, which the model does not have" in said["no pipeline"]
    assert stored(tmp_path / "named")[1] == ["a", "b", "c"]
    assert stored(tmp_path / "named", "param_names")[1] == ["my a", "my b", "my c"]
    model = nn.ParameterDict({name: torch.zeros(3, 5) for name in ("a", "b", "c", "d")})
    model["d"] = model["a"]
    load_checkpoint(tmp_path / "good", model, pyshard.AdamW({id(p): p for p in model.parameters()}.values()))


def _some_ranks(rank: int, world: int, root: str) -> None:
    """Models on two of three ranks: a pipeline, and DTensors."""
    group, alone = dist.new_group([0, 2]), [dist.new_group([r]) for r in range(world)][rank]
    mesh = dist.DeviceMesh("cpu", [0, 2])
    if rank == 1:
        return
    model: nn.Module = Half(group, ["a"] if rank == 0 else ["b"], {}, seed=rank)
    opt = pyshard.AdamW(model.parameters())
    opt.process_group = alone  # type: ignore[attr-defined]  # data-parallel ranks: this one
    save_checkpoint(f"{root}/pipeline", model, opt)
    both = nn.ParameterDict({"a": torch.zeros(3, 5), "b": torch.zeros(3, 5)})
    pyshard.fully_shard(both, mesh)
    its = pyshard.AdamW(both.parameters())
    load_checkpoint(f"{root}/pipeline", both, its)
    for stage, name in ((0, "a"), (2, "b")):
        wanted = Half(None, [name], {}, seed=stage).get_parameter(name)
        assert_same_bits(both[name].full_tensor().detach(), wanted.detach(), name)
    save_checkpoint(f"{root}/shards", both, its, async_save=True).wait()
    again = Half(group, ["a"] if rank == 0 else ["b"], {}, seed=7)
    opt = pyshard.AdamW(again.parameters())
    opt.process_group = alone  # type: ignore[attr-defined]
    load_checkpoint(f"{root}/shards", again, opt)
    for mine, wanted in zip(again.parameters(), model.parameters(), strict=True):
        assert_same_bits(mine.detach(), wanted.detach(), "from shards")


def test_models_on_some_of_the_ranks(tmp_path: Path) -> None:
    run(_some_ranks, 3, str(tmp_path), seconds=60)


# ---- all at once ----


def _all_at_once(rank: int, world: int, seed: int, root: str) -> None:
    layout = Layout("fsdp", (2, 2, 2))
    model, opt = layout.build(seed + 50, "bf16 split")
    load_checkpoint(Path(root) / "twin", model, opt)
    check(model, opt, torch.load(Path(root) / "before"), "twin to 2x2x2")
    save_checkpoint(Path(root) / "2x2x2", model, opt, async_save=True).wait()


@pytest.mark.timeout(200)
def test_full_sharding_over_tensor_parallel_stages(seed: int, tmp_path: Path) -> None:
    """Eight ranks: two of each kind."""
    seed %= 2**20
    twin = network(seed, BF16)
    opt = pyshard.AdamW(twin.parameters(), lr=LR)
    step(twin, opt, gradients(seed + 1, BF16))
    save_checkpoint(tmp_path / "twin", twin, opt)
    torch.save(before := wholes(twin, opt), tmp_path / "before")
    run(_all_at_once, 8, seed, str(tmp_path), seconds=180)
    assert stored(tmp_path / "2x2x2") == stored(tmp_path / "twin")
    found = network(seed + 70, BF16)
    again = pyshard.AdamW(found.parameters(), lr=0.3)
    load_checkpoint(tmp_path / "2x2x2", found, again)
    assert_same(wholes(found, again), before, "2x2x2 to one process")

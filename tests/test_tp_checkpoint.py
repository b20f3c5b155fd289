"""Checkpoints of tensor-parallel models: saved at one number of tensor- and data-parallel ranks, loaded at another."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run
from reference import assert_same_bits
from test_tp_optim import check_params, check_state, expected
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from tp_parts import BF16, F16, F32, Mesh, make_mesh, model_of, part_of, set_gradients, summed

import pyshard
from pyshard.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from pyshard.optim.flat_shard import FlatShard
from pyshard.optim.rectangles import Cut
from pyshard.placement import TensorShard, set_tensor_shard

KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"dtypes": (F32,), "options": {"amsgrad": True}},
    "mixed": {"dtypes": (BF16, F32, F16), "options": {}},
    "bf16 master": {"dtypes": (BF16,), "options": {"master_weights": "fp32"}},
}
# Tensor-parallel ranks, data-parallel ranks, optimizer. A plain one has no process group: it means all four ranks.
MESHES = [
    (1, 4, "AdamW"),
    (2, 2, "AdamW"),
    (4, 1, "AdamW"),
    (1, 1, "ShardedAdamW"),
    (1, 3, "ShardedAdamW"),
    (2, 1, "ShardedAdamW"),
    (2, 2, "ShardedAdamW"),
    (4, 1, "ShardedAdamW"),
]


def optimizer_of(model: nn.Module, mesh: Mesh, name: str, **options: Any) -> Any:
    options = {"lr": 0.01, "weight_decay": 0.1, **options}
    if name == "ShardedAdamW":
        return pyshard.ShardedAdamW(model.parameters(), process_group=mesh.dp, timeout=30, bucket_mb=0.05, **options)
    return (torch.optim.AdamW if name == "torch" else pyshard.AdamW)(model.parameters(), **options)


def step(model: nn.Module, opt: Any, seed: int, dtypes: Any) -> None:
    """Every data-parallel rank has the same gradients: their mean is those of one process, bit for bit."""
    set_gradients(
        model, [grad.to(p.dtype) for grad, p in zip(summed(seed, 1, dtypes), model.parameters(), strict=True)]
    )
    opt.step()
    opt.zero_grad()


def addresses(opt: Any) -> list[int]:
    return [t.data_ptr() for items in opt.state.values() for _, t in sorted(items.items()) if t.numel() > 1]


def close(opt: Any) -> None:
    if hasattr(opt, "close"):
        opt.close()


def check_held(opt: Any, model: nn.Module, state: dict[int, Any], what: str) -> None:
    """State that an optimizer that knows nothing of tensor parallelism holds."""
    for index, param in enumerate(model.parameters()):
        for key, value in state[index].items():
            mine = opt.state[param][key]
            wanted = value if value.dim() == 0 else part_of(param, value)
            assert_same_bits(mine.contiguous(), wanted.contiguous(), f"{what}: {key} of {index}")


def _matrix(rank: int, world: int, seed: int, root: str, kind: str) -> None:
    dtypes, options = KINDS[kind]["dtypes"], KINDS[kind]["options"]
    whole, state, _ = expected(seed, 1, dtypes, 2, **options)
    later, later_state, _ = expected(seed, 1, dtypes, 3, **options)
    meshes = {(tp, dp): make_mesh(rank, world, tp, dp) for tp, dp in dict.fromkeys((t, d) for t, d, _ in MESHES)}
    cases = list(MESHES)
    if kind == "fp32":
        cases += [(2, 2, "torch"), (1, 4, "torch")]
    for tp, dp, name in cases:
        mesh = meshes[tp, dp]
        if mesh is not None and dp != 3:  # thirds of gradients do not add up to them
            model = model_of(seed, mesh.tp, dtypes)
            opt = optimizer_of(model, mesh, "AdamW" if name == "torch" else name, **options)
            for i in range(2):
                step(model, opt, seed + i, dtypes)
            if name == "torch":  # with state of the same bits, and of these strides
                other = optimizer_of(model, mesh, "torch", **options)
                held = {i: {k: v.clone() for k, v in opt.state[p].items()} for i, p in enumerate(model.parameters())}
                other.state.update({p: held[i] for i, p in enumerate(model.parameters())})
                opt = other
            save_checkpoint(Path(root) / f"{tp} {dp} {name}", model, opt, tp=tp)
            close(opt)
        dist.barrier()
    for saved in (case for case in cases if case[1] != 3):
        others = cases if kind == "fp32" else [case for case in cases if case[0] != saved[0]]
        for tp, dp, name in others:
            mesh, what = meshes[tp, dp], f"{saved} to {(tp, dp, name)}"
            if mesh is not None:
                model = model_of(seed + 7, mesh.tp if rank % 2 or tp > 1 else None, dtypes)
                opt = optimizer_of(model, mesh, name, **{**options, "lr": 0.7})
                path = Path(root) / "{} {} {}".format(*saved)
                assert load_checkpoint(path, model, opt) == {"tp": saved[0]}
                check_params(model, whole, what)
                if name == "torch":
                    check_held(opt, model, state, what)
                else:
                    check_state(opt, state, what)
                    step(model, opt, seed + 2, dtypes)
                    if dp != 3:
                        check_params(model, later, f"{what}, a step later")
                        check_state(opt, later_state, f"{what}, a step later")
                    where = addresses(opt), [p.data_ptr() for p in model.parameters()]
                    load_checkpoint(path, model, opt)  # in place, over other values
                    assert where == (addresses(opt), [p.data_ptr() for p in model.parameters()]), what
                    check_params(model, whole, what)
                    check_state(opt, state, what)
                close(opt)
            dist.barrier()


@pytest.mark.parametrize("kind", KINDS)
def test_any_ranks_to_any_others(kind: str, seed: int, tmp_path: Path) -> None:
    run(_matrix, 4, seed, str(tmp_path), kind, seconds=240)


def _on_disk(rank: int, world: int, seed: int, root: str) -> None:
    """Whole tensors, each element once; damage is found by all ranks."""
    mesh = make_mesh(rank, world, 2, 2)
    assert mesh is not None
    model = model_of(seed, mesh.tp)
    opt = optimizer_of(model, mesh, "ShardedAdamW")
    step(model, opt, seed, (F32,))
    save_checkpoint(root, model, opt)
    (directory,) = [path for path in Path(root).iterdir() if path.is_dir()]
    stored = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    for name, param in model_of(seed).items():
        for key in (f"model.{name}", f"optimizer.state.{name}.exp_avg", f"optimizer.state.{name}.exp_avg_sq"):
            assert stored[key].size == param.shape
            assert sum(chunk.sizes.numel() for chunk in stored[key].chunks) == param.numel()
    elements = sum(p.numel() for p in model_of(seed).parameters())
    written = sum(file.stat().st_size for file in directory.glob("*.distcp"))
    # Besides three values an element only what torch.save adds to each piece.
    pieces = sum(len(entry.chunks) for entry in stored.values() if hasattr(entry, "chunks"))
    assert written < 12 * elements + 4096 * pieces

    before = {name: value.clone() for name, value in model.state_dict().items()}
    dist.barrier()
    if rank == 0:
        file = max(directory.glob("*.distcp"), key=lambda path: path.stat().st_size)
        with open(file, "r+b") as handle:
            handle.seek(file.stat().st_size // 2)
            byte = handle.read(1)[0]
            handle.seek(-1, os.SEEK_CUR)
            handle.write(bytes([byte ^ 16]))
    dist.barrier()
    other = model_of(seed + 1, mesh.tp)
    first = {name: value.clone() for name, value in other.state_dict().items()}
    for each, values in ((model, before), (other, first)):
        fresh = pyshard.AdamW(each.parameters())
        with pytest.raises(CheckpointError, match="is damaged: the checksum"):
            load_checkpoint(root, each, fresh)
        assert not fresh.state
        for name, value in values.items():
            assert torch.equal(each.state_dict()[name], value)


def test_each_element_is_written_once_and_damage_is_found(seed: int, tmp_path: Path) -> None:
    run(_on_disk, 4, seed, str(tmp_path))


def _through_dcp(rank: int, world: int, seed: int, root: str) -> None:
    dtypes = KINDS["mixed"]["dtypes"]
    _, state, _ = expected(seed, 1, dtypes, 2)
    meshes = {(tp, dp): make_mesh(rank, world, tp, dp) for tp, dp in ((1, 4), (2, 2), (4, 1))}
    paths = {}
    for (tp, dp), mesh in meshes.items():
        assert mesh is not None
        for name in ("AdamW", "ShardedAdamW"):
            model = model_of(seed, mesh.tp, dtypes)
            opt = optimizer_of(model, mesh, name)
            for i in range(2):
                step(model, opt, seed + i, dtypes)
            held = get_optimizer_state_dict(model, opt)
            paths[tp, dp, name] = str(Path(root) / f"{tp} {dp} {name}")
            if tp > 1:
                assert type(held["state"]["row"]["exp_avg"]) is FlatShard
                assert held["state"]["row"]["exp_avg"].shape == (33, 67)
            if name == "AdamW":
                dcp.save(held, checkpoint_id=paths[tp, dp, name])
            else:
                dcp.async_save(copy.deepcopy(held), checkpoint_id=paths[tp, dp, name]).result()
            close(opt)
    for path in paths.values():
        for (tp, dp), mesh in meshes.items():
            for name in ("AdamW", "ShardedAdamW"):
                assert mesh is not None
                model = model_of(seed, mesh.tp, dtypes)
                opt = optimizer_of(model, mesh, name)
                held = get_optimizer_state_dict(model, opt)
                dcp.load(held, checkpoint_id=path)
                set_optimizer_state_dict(model, opt, held)
                found = opt.full_state_dict()["state"]
                for index, items in state.items():
                    for key in set(items) - {"step", "master"}:  # a master follows weights, which are not loaded here
                        assert_same_bits(
                            found[index][key], items[key], f"{path} to {tp}, {dp}, {name}: {key} of {index}"
                        )
                # As a whole or as it is, it goes from one optimizer to the next; alone it goes nowhere.
                other = optimizer_of(model, mesh, name)
                other.load_state_dict(opt.full_state_dict())
                other.load_state_dict(opt.state_dict())
                check_state(other, found, f"{tp}, {dp}, {name}")
                if tp > 1:
                    with pytest.raises(RuntimeError, match=r"would save this rank's elements only.*full_state_dict"):
                        torch.save(opt.state_dict(), Path(root) / "alone.pt")
                close(opt)
                close(other)


def test_optimizer_state_through_torch(seed: int, tmp_path: Path) -> None:
    run(_through_dcp, 4, seed, str(tmp_path))


class _Renamed(nn.Module):
    def __init__(self, param: nn.Parameter):
        super().__init__()
        self.weight = param
        self.register_state_dict_post_hook(
            lambda module, held, prefix, _: held.update({prefix + "weight": torch.ones(2)})
        )


def _errors(rank: int, world: int, seed: int, root: str) -> None:
    mesh = make_mesh(rank, world, 2, 1)
    assert mesh is not None
    model = model_of(seed, mesh.tp)
    opt = optimizer_of(model, mesh, "AdamW")
    step(model, opt, seed, (F32,))
    save_checkpoint(root, model, opt)
    other = model_of(seed, mesh.tp)
    other["row"] = nn.Parameter(torch.zeros(33, 34))
    set_tensor_shard(other["row"], TensorShard.even(mesh.tp, (33, 68), 1, [34, 34]))
    with pytest.raises(ValueError, match=r"row\S* has shape \(33, 67\) in the checkpoint; expected \(33, 68\)"):
        load_checkpoint(root, other, optimizer_of(other, mesh, "AdamW"))
    with pytest.raises(ValueError, match=r"weight is a part of a parameter of shape \(33, 67\), and"):
        save_checkpoint(root, _Renamed(model["row"]), None)
    adafactor = torch.optim.Adafactor([model["row"]])
    set_gradients(model, summed(seed, 1, (F32,)))
    adafactor.step()
    with pytest.raises(ValueError, match=r"of row has shape .* expected a value per element"):
        save_checkpoint(root, model, adafactor)
    if rank == 0:
        plain = model_of(seed)
    else:
        plain = model
    with pytest.raises(ValueError, match="is a part of a tensor on one of the ranks 0 and 1"):
        save_checkpoint(root, plain, None)
    # State of another part is refused, not scrambled.
    held: list[Any] = [None, None]
    mine = opt.state_dict()["state"][1]["exp_avg"]
    dist.all_gather_object(held, mine)
    state = opt.state_dict()
    state["state"][1]["exp_avg"] = held[1 - rank]
    assert isinstance(held[rank], FlatShard) and held[rank].same_run(mine)
    with pytest.raises(ValueError, match=r"parameter 1.*this rank owns, or the whole tensor"):
        opt.load_state_dict(state)
    state["state"][1]["exp_avg"] = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"has shape \(3, 4\); expected \(33, 67\)"):
        opt.load_state_dict(state)


def test_errors(seed: int, tmp_path: Path) -> None:
    run(_errors, 2, seed, str(tmp_path))


def _permuted(rank: int, world: int, seed: int, root: str) -> None:
    """One rank whose tensor holds the pieces of the whole in another order."""
    whole = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed))
    shard = TensorShard(dist.new_group([0]), (7, 5), 0, (((4, 7), (0, 4)),))
    param = nn.Parameter(shard.cut(whole).clone())
    set_tensor_shard(param, shard)
    model = nn.ParameterDict({"a": param})
    opt = pyshard.AdamW(model.parameters())
    param.grad = torch.ones_like(param)
    opt.step()
    save_checkpoint(root, model, opt)
    stepped = param.detach().clone()
    plain = nn.ParameterDict({"a": nn.Parameter(torch.zeros(7, 5))})
    load_checkpoint(root, plain, pyshard.AdamW(plain.parameters()))
    assert_same_bits(plain["a"].detach(), torch.cat([stepped[3:], stepped[:3]]), "put in order")
    with torch.no_grad():
        param.zero_()
    load_checkpoint(root, model, opt)
    assert_same_bits(param.detach(), stepped, "and back")


def test_pieces_in_another_order(seed: int, tmp_path: Path) -> None:
    run(_permuted, 1, seed, str(tmp_path))


def test_rectangles_of_a_part(seed: int) -> None:
    """Each element of a run of a part is in one rectangle of the whole, at its place."""
    generator = torch.Generator().manual_seed(seed)

    for dim, pieces, shape in (
        (0, ((1, 3), (6, 8)), (9, 5, 4)),
        (1, ((0, 2), (3, 4), (5, 7)), (3, 8, 2)),
        (2, ((4, 6),), (2, 3, 6)),
    ):
        whole = torch.arange(torch.Size(shape).numel()).view(shape).float()
        part: Tensor = torch.cat([whole.narrow(dim, a, b - a) for a, b in pieces], dim)
        for order in ((0, 1, 2), (2, 0, 1)):
            like = part.permute(order).contiguous().permute([order.index(d) for d in range(3)])
            flat = like.permute(order).reshape(-1)
            for _ in range(20):
                begin, end = sorted(torch.randint(0, part.numel() + 1, (2,), generator=generator).tolist())
                run_ = FlatShard(flat[begin:end], like, begin, Cut(dim, pieces, shape))
                found = torch.full(shape, -1.0)
                for rectangle in run_.rectangles():
                    inside = tuple(slice(o, o + n) for o, n in zip(rectangle.offsets, rectangle.sizes, strict=True))
                    assert (found[inside] == -1).all()
                    found[inside] = run_.piece(rectangle)
                assert torch.equal(found[found >= 0].sort().values, flat[begin:end].sort().values)
                assert torch.equal(found[found >= 0], whole[found >= 0])
                assert run_.shape == whole.shape


def _of_transformers(rank: int, world: int, seed: int, root: str) -> None:
    """Models cut by pyshard.tp, trained with a sharded optimizer: saved, and loaded by the unsharded model."""
    from test_tp_parallelize import CLOSE, batch, build

    from pyshard.tp.models import parallelize
    from pyshard.tp.state_dict import full_state_dict

    for kind in ("llama", "gpt2"):
        mesh = pyshard.init_mesh(tp=2, dp=2)
        model, whole = build(kind, seed), build(kind, seed)
        parallelize(model, mesh)
        options: dict[str, Any] = {"lr": 1e-3, "max_grad_norm": 0.5}
        opt = pyshard.ShardedAdamW(model.parameters(), process_group=mesh["dp"].get_group(), timeout=30, **options)
        alone = pyshard.AdamW(whole.parameters(), **options)

        def train(each: nn.Module, optimizer: Any, at: int) -> None:
            ids, labels = batch(seed + at, 2, 9)  # the same on all data-parallel ranks
            each(ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        for at in range(2):
            train(model, opt, at)
            train(whole, alone, at)
            torch.testing.assert_close(opt.grad_norm, alone.grad_norm, rtol=1e-4, atol=0)
        norms: list[Any] = [None] * world
        dist.all_gather_object(norms, opt.grad_norm.item())
        assert len(set(norms)) == 1
        save_checkpoint(Path(root) / kind, model, opt)
        weights = full_state_dict(model)
        for name, value in whole.state_dict().items():
            # An update is at most lr, whatever the error of a gradient near zero.
            torch.testing.assert_close(weights[name], value, rtol=CLOSE["rtol"], atol=4e-3)
        state = opt.full_state_dict()["state"]

        plain = build(kind, seed + 1)
        fresh = pyshard.AdamW(plain.parameters(), lr=1.0)
        load_checkpoint(Path(root) / kind, plain, fresh)
        assert plain.state_dict().keys() == weights.keys()
        for name, value in plain.state_dict().items():
            assert_same_bits(value.contiguous(), weights[name].contiguous(), name)
        check_state(fresh, state, f"{kind}, unsharded")
        # And back, over other ranks: the next step is the same, but for the order of sums.
        other = parallelize(build(kind, seed + 2), pyshard.init_mesh(tp=4))
        again = pyshard.AdamW(other.parameters(), lr=1.0)
        load_checkpoint(Path(root) / kind, other, again)
        check_state(again, state, f"{kind}, 4 ranks")
        train(other, again, 2)
        train(plain, fresh, 2)
        found = full_state_dict(other)
        for name, value in plain.state_dict().items():
            # One update, of lr at most either way where the gradient is near zero.
            torch.testing.assert_close(found[name], value, rtol=CLOSE["rtol"], atol=2e-3)
        opt.close()


def test_models_of_transformers(seed: int, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the models are transformers'")
    run(_of_transformers, 4, seed, str(tmp_path), seconds=240)

"""FlatShard: a run as rectangles, what it may be used for, and torch.distributed.checkpoint on real ranks."""

import copy
import io
import math
import multiprocessing as mp
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run
from reference import assert_same_bits, session_seed
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import pyshard
from pyshard.optim.flat_shard import FlatShard, full, take

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def laid_out(shape: tuple[int, ...], order: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random values whose dimensions lie in memory in the given order, the slowest first."""
    memory = torch.randn([shape[d] for d in order], generator=torch.Generator().manual_seed(seed))
    return memory.permute([order.index(d) for d in range(len(order))])


def in_memory(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor as they lie in memory: read through its strides, independently of FlatShard."""
    return torch.as_strided(tensor, (tensor.numel(),), (1,))


def slices(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offsets, sizes))


# ---- rectangles ----


@st.composite
def layouts(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=5)))
    order = tuple(draw(st.permutations(range(len(shape)))))
    begin = draw(st.integers(0, math.prod(shape)))
    return shape, order, begin, draw(st.integers(begin, math.prod(shape)))


@hypothesis.seed(session_seed())
@hypothesis.settings(max_examples=500)
@hypothesis.given(layouts())
def test_rectangles_are_the_run(case: tuple[tuple[int, ...], tuple[int, ...], int, int]) -> None:
    """Each element of the run once, in the run's order, as views of its memory; few rectangles."""
    shape, order, begin, end = case
    whole = laid_out(shape, order)
    local = in_memory(whole)[begin:end].clone()
    shard = FlatShard(local, whole, begin)
    assert shard.shape == whole.shape and shard.size() == whole.shape and (shard.begin, shard.end) == (begin, end)
    seen = torch.zeros(shape, dtype=torch.int64)
    position = 0
    for rectangle in shard.rectangles():
        inside = slices(rectangle.offsets, rectangle.sizes)
        seen[inside] += 1
        assert rectangle.start == position
        position += math.prod(rectangle.sizes)
        piece = shard.piece(rectangle)
        assert torch.equal(piece, whole[inside])
        assert piece.untyped_storage().data_ptr() == local.untyped_storage().data_ptr()
    assert position == end - begin
    expected = torch.zeros(math.prod(shape), dtype=torch.int64)
    expected[begin:end] = 1
    assert torch.equal(in_memory(seen.permute(order).contiguous()), expected)
    wide = sum(size > 1 for size in shape)
    assert len(shard.rectangles()) <= max(2 * wide - 1, 1)


def test_a_run_that_needs_the_most_rectangles() -> None:
    """Three dimensions: parts of rows at both ends, rows, and planes between."""
    whole = torch.arange(4 * 3 * 5.0).view(4, 3, 5)
    shard = FlatShard(whole.flatten()[4:58].clone(), whole, 4)
    found = [(r.offsets, r.sizes) for r in shard.rectangles()]
    assert found == [
        ((0, 0, 4), (1, 1, 1)),
        ((0, 1, 0), (1, 2, 5)),
        ((1, 0, 0), (2, 3, 5)),
        ((3, 0, 0), (1, 2, 5)),
        ((3, 2, 0), (1, 1, 3)),
    ]


def test_order_of_a_parameter_with_gaps() -> None:
    """Counted as torch.empty_like lays it out: what the optimizer's state of it does."""
    param = torch.randn(4, 6)[:, ::2]
    assert FlatShard(torch.zeros(12), param, 0).stride() == torch.empty_like(param).stride()


@pytest.mark.parametrize(
    "local, begin, error, message",
    [
        (torch.zeros(2, 2), 0, TypeError, r"local is a Tensor \(2, 2\); expected a plain, contiguous 1-d"),
        (torch.zeros(8)[::2], 0, TypeError, "contiguous"),
        (nn.Parameter(torch.zeros(4)), 0, TypeError, "local is a Parameter"),
        ([1.0], 0, TypeError, "local is a list"),
        (torch.zeros(4), -1, ValueError, r"elements \[-1, 3\).*inside \[0, 6\)"),
        (torch.zeros(4), 3, ValueError, r"elements \[3, 7\).*inside \[0, 6\)"),
    ],
)
def test_what_is_no_run(local: Any, begin: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FlatShard(local, torch.zeros(2, 3), begin)


# ---- take ----


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("span", [(0, 120), (7, 95), (40, 40), (119, 120)])
def test_take(seed: int, span: tuple[int, int], dtype: torch.dtype) -> None:
    """From any layout the elements in the parameter's order, as a new tensor."""
    param = laid_out((2, 3, 4, 5), (0, 2, 3, 1))
    values = laid_out((2, 3, 4, 5), (0, 2, 3, 1), seed)
    expected = in_memory(values)[slice(*span)].to(dtype)
    for value in (values, values.contiguous(), laid_out((2, 3, 4, 5), (3, 1, 0, 2)).copy_(values)):
        found = take(value, param, *span, dtype)
        assert_same_bits(found, expected)
        assert type(found) is Tensor and found.data_ptr() != value.data_ptr() and not found.requires_grad
    shard = FlatShard(in_memory(values)[slice(*span)].clone(), param, span[0])
    found = take(shard, param, *span, dtype)
    assert_same_bits(found, expected)
    shard.local.zero_()
    assert_same_bits(found, expected, "after the source changed")


def test_take_keeps_bits() -> None:
    """NaN payloads and signs of zero go through, as a copy does."""
    bits = torch.tensor([0x7FC01234, -0x80000000, 0x00000001, 0x7F800000], dtype=torch.int64).to(torch.int32)
    value = bits.view(F32).view(2, 2)
    assert torch.equal(take(value, value, 1, 4, F32).view(torch.int32), bits[1:])


def test_take_refuses() -> None:
    param = torch.zeros(3, 4)
    with pytest.raises(TypeError, match="is float; expected a tensor"):
        take(1.0, param, 0, 5, F32)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has shape \(4, 3\); expected \(3, 4\)"):
        take(torch.zeros(4, 3), param, 0, 5, F32)
    other = FlatShard(torch.zeros(5), param, 1)
    with pytest.raises(ValueError, match=r"FlatShard\(\[1, 6\).*expected elements \[0, 5\).*dcp|checkpoint\.load"):
        take(other, param, 0, 5, F32)
    transposed = FlatShard(torch.zeros(5), torch.zeros(4, 3).t(), 0)
    with pytest.raises(ValueError, match="load_checkpoint"):
        take(transposed, param, 0, 5, F32)
    assert take(FlatShard(torch.zeros(0), torch.zeros(4, 3).t(), 2), param, 2, 2, F32).numel() == 0


# ---- as a tensor ----


def shard_of(begin: int = 7, end: int = 95) -> FlatShard:
    whole = laid_out((2, 3, 4, 5), (0, 2, 3, 1))
    return FlatShard(in_memory(whole)[begin:end].clone(), whole, begin)


def assert_same_run(a: Any, b: FlatShard) -> None:
    assert isinstance(a, FlatShard) and a.same_run(b) and a.stride() == b.stride()


COPIES: dict[str, Callable[[FlatShard], Any]] = {
    "clone": lambda s: s.clone(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda s: pickle.loads(pickle.dumps(s)),
    "detach and clone": lambda s: s.detach().clone(),
    "to with copy": lambda s: s.to("cpu", copy=True),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_keep_the_run_and_share_nothing(name: str) -> None:
    shard = shard_of()
    found, before = COPIES[name](shard), shard.local.clone()
    assert_same_run(found, shard)
    shard.local.zero_()
    assert_same_bits(found.local, before)


def test_a_copy_of_a_dictionary_keeps_what_is_shared() -> None:
    shard = shard_of()
    one, other, local = copy.deepcopy([shard, shard, shard.local])
    assert one is other and one.local is local


def test_conversions_keep_the_run() -> None:
    shard = shard_of()
    for found, dtype in ((shard.double(), F64), (shard.to(BF16), BF16), (shard.cpu(), F32)):
        assert_same_run(found, shard)
        assert found.dtype == found.local.dtype == dtype
        assert_same_bits(found.local, shard.local.to(dtype))
    for found in (torch.zeros_like(shard), torch.empty_like(shard), shard.new_empty(shard.shape)):
        assert_same_run(found, shard)
    assert shard.detach().local.data_ptr() == shard.data.local.data_ptr() == shard.local.data_ptr()
    other = torch.zeros_like(shard)
    other.copy_(shard)
    assert_same_bits(other.local, shard.local)
    assert not shard.is_shared() and shard.share_memory_().is_shared() and shard.local.is_shared()
    assert repr(shard) == "FlatShard([7, 95) of (2, 3, 4, 5), torch.float32, cpu)"


WHOLE = torch.zeros(2, 3, 4, 5)
REFUSED: dict[str, Callable[[FlatShard], Any]] = {
    "+": lambda s: s + 1,
    "+ whole": lambda s: WHOLE + s,
    "in place": lambda s: s.mul_(2),
    "fill": lambda s: s.zero_(),
    "==": lambda s: s == s,
    "torch.equal": lambda s: torch.equal(s, s),
    "index": lambda s: s[0],
    "iterate": list,
    "sum": lambda s: s.sum(),
    "view": lambda s: s.view(-1),
    "contiguous": lambda s: s.contiguous(),
    "flatten": lambda s: s.flatten(),
    "foreach": lambda s: torch._foreach_add_([s], [s]),
    "copy into a whole tensor": lambda s: WHOLE.copy_(s),
    "copy from a whole tensor": lambda s: s.copy_(WHOLE),
    "copy from another run": lambda s: s.copy_(shard_of(0, 88)),
    "out=": lambda s: torch.add(WHOLE, 1, out=s),
    "cat": lambda s: torch.cat([s, s]),
    "new_empty of another shape": lambda s: s.new_empty(3),
    "numpy": lambda s: s.numpy(),
    "tolist": lambda s: s.tolist(),
    "array": lambda s: __import__("numpy").asarray(s),
    "dlpack": torch.from_dlpack,
    "storage": lambda s: s.untyped_storage(),
    "typed storage": lambda s: s.storage(),
    "load into a module": lambda s: nn.ParameterDict({"a": nn.Parameter(WHOLE.clone())}).load_state_dict({"a": s}),
    "torch.save": lambda s: torch.save(s, io.BytesIO()),
    "torch.save of a state_dict": lambda s: torch.save({"state": {0: {"exp_avg": s}}}, io.BytesIO()),
    "torch.save, old format": lambda s: torch.save([s], io.BytesIO(), _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("span", [(7, 95), (0, 0), (0, 120)], ids=["part", "nothing", "everything"])
def test_use_as_a_whole_tensor_is_an_error(name: str, span: tuple[int, int]) -> None:
    shard = shard_of(*span)
    before = shard.local.clone()
    with pytest.raises((RuntimeError, ValueError), match=r"(?s)pyshard\.save_checkpoint.*full_state_dict"):
        REFUSED[name](shard)
    assert_same_bits(shard.local, before)
    assert not WHOLE.any()


def test_safetensors_refuses() -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    with pytest.raises(RuntimeError, match="full_state_dict"):
        safetensors.save({"a": shard_of()})


@pytest.mark.parametrize("name", ["torch", "pyshard"])
def test_in_the_state_of_an_optimizer_of_whole_tensors(name: str) -> None:
    """A step with another optimizer's part of the state is an error, not an update with wrong memory."""
    param = nn.Parameter(WHOLE.clone())
    param.grad = torch.ones_like(param)
    optimizer = (torch.optim if name == "torch" else pyshard).AdamW([param])  # type: ignore[attr-defined]
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg"] = shard_of()
    before = param.detach().clone()
    with pytest.raises((RuntimeError, ValueError), match=r"FlatShard"):
        optimizer.load_state_dict(saved)
        optimizer.step()
    if name == "pyshard":  # torch's has decayed the weights by then
        assert_same_bits(param.detach(), before)


def _in_another_process(pipe: Any) -> None:
    shard = pipe.recv()
    pipe.send(
        (type(shard).__name__, shard.begin, shard.end, tuple(shard.shape), shard.stride(), float(shard.local.sum()))
    )
    pipe.recv()


def test_to_another_process() -> None:
    shard = shard_of()
    ours, theirs = mp.get_context("forkserver").Pipe()
    process = mp.get_context("forkserver").Process(target=_in_another_process, args=(theirs,))
    process.start()
    ours.send(shard)
    assert ours.poll(60)
    assert ours.recv() == ("FlatShard", 7, 95, (2, 3, 4, 5), shard.stride(), float(shard.local.sum()))
    ours.send(None)
    process.join(10)


# ---- torch.distributed.checkpoint: any cut to any cut ----

SHAPES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((13, 7), (0, 1)),
    ((13, 7), (1, 0)),
    ((2, 3, 4, 5), (0, 2, 3, 1)),
    ((3, 1, 4), (2, 0, 1)),
    ((11,), (0,)),
    ((1,), (0,)),
    ((), ()),
    ((0, 3), (0, 1)),
]


def values(seed: int, dtype: torch.dtype = F32) -> list[Tensor]:
    return [laid_out(shape, order, seed + i).to(dtype) for i, (shape, order) in enumerate(SHAPES)]


def cut(whole: Tensor, rank: int, world: int, salt: int) -> FlatShard:
    """A rank's run of an uneven cut that depends on `salt`; many are empty."""
    generator = torch.Generator().manual_seed(world * 100 + salt)
    ends = torch.randint(0, whole.numel() + 1, (world - 1,), generator=generator).sort().values.tolist()
    begin, end = [0, *ends, whole.numel()][rank : rank + 2]
    return FlatShard(in_memory(whole)[begin:end].clone(), whole, begin)


def cuts(wholes: list[Tensor], rank: int, world: int, salt: int) -> dict[str, Any]:
    return {"state": {f"p{i}": {"exp_avg": cut(w, rank, world, salt + i)} for i, w in enumerate(wholes)}}


def empty(state: dict[str, Any]) -> dict[str, Any]:
    """The same with runs of zeros."""
    return {"state": {k: {"exp_avg": torch.zeros_like(v["exp_avg"])} for k, v in state["state"].items()}}


def assert_runs(state: dict[str, Any], wholes: list[Tensor]) -> None:
    for i, whole in enumerate(wholes):
        shard = state["state"][f"p{i}"]["exp_avg"]
        assert_same_bits(shard.local, in_memory(whole)[shard.begin : shard.end], f"p{i} {shard!r}")


def _any_to_any(rank: int, world: int, seed: int, folder: str) -> None:
    warnings.simplefilter("ignore", UserWarning)
    groups = {n: dist.new_group(list(range(n))) for n in range(1, world + 1)}
    mesh = init_device_mesh("cpu", (world,))
    wholes = values(seed)
    for old in range(1, world + 1):
        path = Path(folder) / f"cut{old}"
        if rank < old:
            dcp.save(cuts(wholes, rank, old, 0), checkpoint_id=path, process_group=groups[old])
        dist.barrier()
        for new in range(1, world + 1):
            if rank < new:
                target = empty(cuts(wholes, rank, new, 50))
                runs = [v["exp_avg"].local.data_ptr() for v in target["state"].values()]
                dcp.load(target, checkpoint_id=path, process_group=groups[new])
                assert_runs(target, wholes)
                assert runs == [v["exp_avg"].local.data_ptr() for v in target["state"].values()], "not in place"
        # Whole tensors of other layouts, and DTensors, from a cut; each rank reads the same.
        whole = {"state": {f"p{i}": {"exp_avg": torch.zeros(w.shape)} for i, w in enumerate(wholes)}}
        dcp.load(whole, checkpoint_id=path)
        for i, w in enumerate(wholes):
            assert_same_bits(whole["state"][f"p{i}"]["exp_avg"], w)
        spread = distributed([torch.zeros_like(w) for w in wholes], mesh)
        dcp.load(spread, checkpoint_id=path)
        for i, w in enumerate(wholes):
            assert_same_bits(spread["state"][f"p{i}"]["exp_avg"].full_tensor(), w)
    # And a cut from whole tensors and DTensors.
    for name, saved in (
        ("whole", {"state": {f"p{i}": {"exp_avg": w} for i, w in enumerate(wholes)}}),
        ("dtensors", distributed(wholes, mesh)),
    ):
        path = Path(folder) / name
        dcp.save(saved, checkpoint_id=path)
        target = empty(cuts(wholes, rank, world, 90))
        dcp.load(target, checkpoint_id=path)
        assert_runs(target, wholes)


def distributed(wholes: list[Tensor], mesh: Any) -> dict[str, Any]:
    placed = [distribute_tensor(w.contiguous(), mesh, [Shard(0) if w.dim() else Replicate()]) for w in wholes]
    return {"state": {f"p{i}": {"exp_avg": t} for i, t in enumerate(placed)}}


def test_any_cut_loads_into_any_other(seed: int, tmp_path: Path) -> None:
    """1, 2, 3 and 4 ranks with uneven and empty runs, whole tensors, DTensors: saved from each, loaded into each."""
    run(_any_to_any, 4, seed % 2**31, str(tmp_path))


def test_a_checkpoint_of_runs_is_one_of_whole_tensors(seed: int, tmp_path: Path) -> None:
    """The same keys, shapes, dtypes and structure in the metadata."""
    wholes = values(seed)

    def stored(name: str, state: dict[str, Any]) -> Any:
        dcp.save(state, checkpoint_id=tmp_path / name)
        metadata = dcp.FileSystemReader(tmp_path / name).read_metadata()
        tensors = {k: (v.size, v.properties) for k, v in metadata.state_dict_metadata.items()}
        return tensors, metadata.planner_data

    whole = {"state": {f"p{i}": {"exp_avg": w} for i, w in enumerate(wholes)}}
    assert stored("runs", cuts(wholes, 0, 1, 0)) == stored("whole", whole)


def _full(rank: int, world: int, seed: int) -> None:
    group = dist.new_group([2, 0, 1])  # not in the order of global ranks, as torch sorts them
    mesh = init_device_mesh("cpu", (world,))
    for i, whole in enumerate(values(seed)):
        shard = cut(whole, rank, world, i)
        for g in (None, group):
            found = full(shard, g)
            assert type(found) is Tensor and found.stride() == whole.stride()
            assert_same_bits(found, whole)
        assert full(whole) is whole
        # A DTensor, of which each rank takes its run.
        spread = distribute_tensor(whole.contiguous(), mesh, [Shard(0) if whole.dim() else Replicate()])
        assert_same_bits(take(spread, whole, shard.begin, shard.end, F32), shard.local)
    overlapping = FlatShard(torch.zeros(4), torch.zeros(12), 2 * rank)
    with pytest.raises(RuntimeError, match=r"\(0, 4\), \(2, 6\), \(4, 8\).*expected each element once"):
        full(overlapping)
    dist.barrier()


def test_full(seed: int) -> None:
    run(_full, 3, seed % 2**31)


def test_full_in_one_process() -> None:
    whole = laid_out((3, 4), (1, 0))
    assert_same_bits(full(FlatShard(in_memory(whole).clone(), whole, 0)), whole)
    with pytest.raises(RuntimeError, match=r"have elements \[\(0, 5\)\] of a tensor of 12"):
        full(FlatShard(in_memory(whole)[:5].clone(), whole, 0))


# ---- staging: later changes must not get into an async save ----


def _stagers() -> dict[str, Callable[[Path], dict[str, Any]]]:
    """Arguments of dcp.async_save."""
    plain = StagingOptions(False, False, False, False)
    return {
        "default": lambda path: {"checkpoint_id": path},
        "writer": lambda path: {"storage_writer": dcp.FileSystemWriter(path)},
        "shared memory": lambda path: {
            "checkpoint_id": path,
            "async_stager": DefaultStager(StagingOptions(False, True, False, False)),
        },
        "writer and stager": lambda path: {
            "storage_writer": dcp.FileSystemWriter(path),
            "async_stager": DefaultStager(plain),
        },
        "staged in a thread": lambda path: {
            "checkpoint_id": path,
            "async_stager": DefaultStager(StagingOptions(False, False, True, False)),
        },
        "process": lambda path: {"checkpoint_id": path, "async_checkpointer_type": AsyncCheckpointerType.PROCESS},
        "process and shared memory": lambda path: {
            "checkpoint_id": path,
            "async_checkpointer_type": AsyncCheckpointerType.PROCESS,
            "async_stager": DefaultStager(StagingOptions(False, True, False, False)),
        },
    }


def _async(rank: int, world: int, seed: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    wholes = [w for w in values(seed) if w.dim()]
    for name, arguments in _stagers().items():
        path = Path(folder) / name
        state = cuts(wholes, rank, world, 7)
        state["step"] = torch.tensor(5.0)
        response = dcp.async_save(state, **arguments(path))
        if hasattr(response, "staging_completion"):
            response.staging_completion.result(60)
            response = response.upload_completion
        for item in state["state"].values():
            item["exp_avg"].local.fill_(-1.0)
        state["step"].fill_(-1.0)
        response.result(120)
        dist.barrier()
        target = empty(cuts(wholes, rank, world, 20)) | {"step": torch.tensor(0.0)}
        dcp.load(target, checkpoint_id=path)
        assert_runs(target, wholes)
        assert target["step"] == 5, name
    # A cached stager that is used again.
    writer = dcp.FileSystemWriter(Path(folder) / "first")
    stager = DefaultStager(StagingOptions(False, False, False, False))
    state = cuts(wholes, rank, world, 7)
    for save in ("first", "second"):
        dcp.async_save(state, checkpoint_id=Path(folder) / save, async_stager=stager).result(60)
        dist.barrier()
        target = empty(cuts(wholes, rank, world, 20))
        dcp.load(target, checkpoint_id=Path(folder) / save)
        assert_runs(target, [w if save == "first" else w * 2 for w in wholes])
        for item in state["state"].values():
            item["exp_avg"].local.mul_(2)
    del writer


@pytest.mark.timeout(240)
def test_async_saves_hold_what_was_there(seed: int, tmp_path: Path) -> None:
    run(_async, 2, seed % 2**31, str(tmp_path), seconds=220)


def _scalars(rank: int, world: int, folder: str) -> None:
    """torch's older stager makes a plain tensor of a 0-d one: an error on all ranks, and right with the newer one."""
    warnings.simplefilter("ignore")
    whole = torch.tensor(3.5)
    state = {"a": FlatShard(torch.full((rank,), 3.5), whole, 0)}  # the second rank has it
    with pytest.raises(RuntimeError, match="async_stager=DefaultStager"):
        dcp.async_save(state, storage_writer=dcp.FileSystemWriter(Path(folder) / "a"))
    stager = DefaultStager(StagingOptions(False, False, False, False))
    dcp.async_save(state, storage_writer=dcp.FileSystemWriter(Path(folder) / "b"), async_stager=stager).result(60)
    dist.barrier()
    target = {"a": torch.tensor(0.0)}
    dcp.load(target, checkpoint_id=Path(folder) / "b")
    assert target["a"] == 3.5


def test_a_0d_run_and_the_older_stager(tmp_path: Path) -> None:
    run(_scalars, 2, str(tmp_path))

"""Weights of models of every layout as files of safetensors, against what transformers writes and reads."""

import copy
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from reference import assert_same_bits
from torch import nn

import pyshard

transformers = pytest.importorskip("transformers")

KINDS = ("gpt2", "llama", "tied llama")


def make(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model of transformers. Sizes are such that no cut of a weight is the weight."""
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=4, n_head=4)
    else:
        config = transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=kind == "tied llama",
        )
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype)


def assert_same_files(folder: Path, expected: Path) -> None:
    """The weights' files, byte by byte, and the index."""
    names = sorted(path.name for path in expected.iterdir() if "safetensors" in path.name)
    assert sorted(path.name for path in folder.iterdir() if "safetensors" in path.name) == names
    for name in names:
        if name.endswith(".json"):
            assert json.loads((folder / name).read_text()) == json.loads((expected / name).read_text()), name
        else:
            assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


def assert_loads(folder: Path, model: nn.Module) -> None:
    loaded, said = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"], said
    assert type(loaded) is type(model)
    state = loaded.state_dict()
    assert list(state) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert state[name].dtype == value.dtype
        assert_same_bits(state[name], value, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", ["5GB", "20KB", 1])
def test_one_process_writes_what_transformers_does(kind: str, size: Any, tmp_path: Path, seed: int) -> None:
    model = make(kind, seed)
    model.save_pretrained(tmp_path / "expected", max_shard_size=size)
    pyshard.export_safetensors(tmp_path / "made", model, max_shard_size=size)
    assert_same_files(tmp_path / "made", tmp_path / "expected")
    assert_loads(tmp_path / "made", model)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    for name in ("config.json", "generation_config.json"):
        made, expected = (json.loads((tmp_path / folder / name).read_text()) for folder in ("made", "expected"))
        assert made == expected
    other = make(kind, seed + 1)
    where = [p.data_ptr() for p in other.parameters()]
    pyshard.load_safetensors(tmp_path / "expected", other)
    assert where == [p.data_ptr() for p in other.parameters()]
    for name, value in model.state_dict().items():
        assert_same_bits(other.state_dict()[name], value, name)


def test_dtypes_are_changed_where_asked(tmp_path: Path, seed: int) -> None:
    model = make("llama", seed, torch.bfloat16)
    pyshard.export_safetensors(tmp_path / "bf16", model)
    assert_loads(tmp_path / "bf16", model)
    wide = make("llama", seed + 1)
    pyshard.load_safetensors(tmp_path / "bf16", wide)
    for name, value in model.state_dict().items():
        assert_same_bits(wide.state_dict()[name], value.float(), name)
    pyshard.export_safetensors(tmp_path / "half", wide, dtype=torch.bfloat16)
    assert_same_files(tmp_path / "half", tmp_path / "bf16")
    assert_loads(tmp_path / "half", model)


def test_a_checkpoint_is_converted_without_its_model(tmp_path: Path, seed: int) -> None:
    model = make("gpt2", seed)
    pyshard.save_checkpoint(tmp_path / "run", model, None)
    with torch.device("meta"):
        like = make("gpt2")
    model.save_pretrained(tmp_path / "expected")
    pyshard.export_safetensors(tmp_path / "like", like, checkpoint=tmp_path / "run")
    assert_same_files(tmp_path / "like", tmp_path / "expected")
    assert_loads(tmp_path / "like", model)
    pyshard.export_safetensors(tmp_path / "alone", checkpoint=tmp_path / "run", config=model.config)
    assert_loads(tmp_path / "alone", model)  # with the tied weight under both names
    damaged = next((tmp_path / "run").glob("0*/*.distcp"))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(pyshard.checkpoint.CheckpointError, match=r"is damaged.*no was not written"):
        pyshard.export_safetensors(tmp_path / "no", checkpoint=tmp_path / "run")
    assert not (tmp_path / "no").exists()


def test_other_names_of_the_same_weights(tmp_path: Path, seed: int) -> None:
    """Tied weights under any of their names, the base model's prefix left out, names that the class ignores."""
    from safetensors.torch import save_file

    model = make("gpt2", seed)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    bare = {name.removeprefix("transformer."): value for name, value in state.items() if name != "lm_head.weight"}
    only_head = {name: value for name, value in state.items() if name != "transformer.wte.weight"}
    cases = {"both": state, "bare": bare, "only head": only_head}
    for case, held in cases.items():
        save_file(held, tmp_path / f"{case}.safetensors")
        other = make("gpt2", seed + 1)
        pyshard.load_safetensors(tmp_path / f"{case}.safetensors", other)
        for name, value in state.items():
            assert_same_bits(other.state_dict()[name], value, f"{case}: {name}")
    state["lm_head.weight"][0] += 1
    save_file(state, tmp_path / "torn.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight and transformer.wte.weight are one tensor.*Nothing was"):
        pyshard.load_safetensors(tmp_path / "torn.safetensors", model)


def test_errors_change_nothing(tmp_path: Path, seed: int) -> None:
    from safetensors.torch import save_file

    model = make("llama", seed)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    good = {name: value + 1 for name, value in before.items()}

    def file(name: str, **changes: Any) -> Path:
        path = tmp_path / name
        save_file({k: v for k, v in (good | changes).items() if v is not None}, path)
        return path

    damaged = tmp_path / "damaged"
    damaged.write_bytes(file("whole").read_bytes()[:-5])
    torn = tmp_path / "torn"
    model.save_pretrained(torn, max_shard_size="20KB")
    sorted(torn.glob("*.safetensors"))[1].unlink()
    unlisted = tmp_path / "unlisted"
    model.save_pretrained(unlisted, max_shard_size="20KB")
    index = json.loads((unlisted / "model.safetensors.index.json").read_text())
    index["weight_map"]["elsewhere"] = "model-00001-of-" + next(iter(index["weight_map"].values()))[-17:]
    (unlisted / "model.safetensors.index.json").write_text(json.dumps(index))
    for path, kind, text in [
        (file("a", **{"lm_head.weight": None}), ValueError, "no lm_head.weight"),
        (file("b", more=torch.ones(1)), ValueError, "more, which the model does not have"),
        (file("c", **{"model.norm.weight": torch.ones(25)}), ValueError, r"model.norm.weight has shape \(25,\)"),
        (damaged, ValueError, "is damaged or no file of safetensors"),
        (tmp_path / "nowhere", FileNotFoundError, "has neither"),
        (torn, FileNotFoundError, "is missing, which"),
        (unlisted, ValueError, "has no elsewhere"),
    ]:
        with pytest.raises(kind, match=f"{text}.*Nothing was changed"):
            pyshard.load_safetensors(path, model)
        for name, value in before.items():
            assert_same_bits(model.state_dict()[name], value, f"{path}: {name}")
    with torch.device("meta"):
        empty = make("llama")
    with pytest.raises(ValueError, match="on the meta device"):
        pyshard.load_safetensors(file("whole"), empty)

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    for path, options, kind, text in [
        ("full", {}, ValueError, "exists and is not empty"),
        ("new", {"max_shard_size": "5"}, ValueError, "max_shard_size='5'"),
        ("new", {"max_shard_size": 0}, ValueError, "max_shard_size=0"),
        ("new", {"dtype": torch.int8}, ValueError, "dtype=torch.int8"),
        ("new", {"checkpoint": tmp_path / "nowhere"}, FileNotFoundError, "has no complete checkpoint"),
    ]:
        with pytest.raises(kind, match=text):
            pyshard.export_safetensors(tmp_path / path, model, **options)
        assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="neither a model nor a checkpoint"):
        pyshard.export_safetensors(tmp_path / "new")
    assert list(tmp_path.glob(".*")) == []


def _killed(rank: int, world: int, path: str, seed: int) -> None:
    os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # the last thing of an export
    pyshard.export_safetensors(path, make("llama", seed))


def test_a_killed_export_leaves_nothing_under_its_name(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "out"
    assert run(_killed, 1, str(path), seed, group=False, quiet=True)[0].exitcode == -signal.SIGKILL
    assert not path.exists() and len(list(tmp_path.glob(".out.*.tmp"))) == 1
    model = make("llama", seed)
    other = tmp_path / ".outer.01234567.tmp"
    other.mkdir()
    pyshard.export_safetensors(path, model)
    assert_loads(path, model)
    assert sorted(tmp_path.iterdir()) == [other, path]  # what the dead one has left is gone


# ---- several ranks ----


def layouts(kind: str, world: int) -> dict[str, Any]:
    """Functions from a whole model to one that is cut over the ranks."""

    def cut(dp: int = 1, tp: int = 1, pp: int = 1, shard: bool = False) -> Any:
        mesh = pyshard.init_mesh(dp=dp, tp=tp, pp=pp)

        def make(model: Any) -> nn.Module:
            if tp > 1:
                model = pyshard.tp.parallelize(model, mesh)
            if pp > 1:
                model = pyshard.pp.pipeline(model, mesh)
            return pyshard.fully_shard(model, mesh) if shard else model

        return make

    if world == 2:
        return {"dp": cut(dp=2), "FSDP2": cut(dp=2, shard=True), "tp": cut(tp=2), "pp": cut(pp=2)}
    found = {"FSDP2 x tp": cut(dp=2, tp=2, shard=True), "tp x pp": cut(tp=2, pp=2)}
    return found | ({"tp": cut(tp=4)} if kind == "gpt2" else {"FSDP2 x pp": cut(dp=2, pp=2, shard=True)})


def _every_layout(rank: int, world: int, root: str, seed: int) -> None:
    for kind, dtype in (("gpt2", torch.float32), ("llama", torch.bfloat16), ("tied llama", torch.float32)):
        if world == 2 or kind != "llama":
            _layouts_of(rank, world, Path(root) / kind, kind, dtype, seed)


def _layouts_of(rank: int, world: int, folder: Path, kind: str, dtype: torch.dtype, seed: int) -> None:
    model = make(kind, seed, dtype)
    if rank == 0:
        model.save_pretrained(folder / "one")
        model.save_pretrained(folder / "parts", max_shard_size="20KB")
    dist.barrier()
    for name, cut in layouts(kind, world).items():
        mine = cut(copy.deepcopy(model))
        pyshard.export_safetensors(folder / name, mine)
        dist.barrier()
        if rank == 0:
            assert_same_files(folder / name, folder / "one")
            assert_loads(folder / name, model)
        other = cut(make(kind, seed + 1, dtype))
        pyshard.load_safetensors(folder / "parts", other)
        local = [p.to_local() if hasattr(p, "to_local") else p for p in other.parameters()]
        for value, part in zip(local, mine.parameters(), strict=True):
            part = part.to_local() if hasattr(part, "to_local") else part
            assert_same_bits(value, part, f"{name}: a part on rank {rank}")
        pyshard.export_safetensors(folder / f"{name} again", other, max_shard_size="20KB")
        dist.barrier()
        if rank == 0:
            index = json.loads((folder / f"{name} again" / "model.safetensors.index.json").read_text())
            assert set(index["weight_map"]) == set(model.state_dict()) - (
                {"lm_head.weight"} if kind != "llama" else set()
            )
            assert_loads(folder / f"{name} again", model)
        dist.barrier()


@pytest.mark.parametrize("world", [2, 4])
def test_every_layout(world: int, tmp_path: Path, seed: int) -> None:
    run(_every_layout, world, str(tmp_path), seed)


def _errors(rank: int, world: int, root: str, seed: int) -> list[str]:
    folder = Path(root)
    model = make("gpt2", seed)
    if rank == 0:
        from safetensors.torch import save_file

        state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
        save_file({k: v for k, v in state.items() if "h.3.ln_1" not in k}, folder / "few")
        save_file({**state, "transformer.h.3.ln_1.weight": torch.ones(3)}, folder / "shape")
        (folder / "full").mkdir()
        (folder / "full" / "mine").write_text("")
    mine = pyshard.pp.pipeline(model, pyshard.init_mesh(pp=2))
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    said = []
    for call in (
        lambda: pyshard.load_safetensors(folder / "few", mine),
        lambda: pyshard.load_safetensors(folder / "shape", mine),  # the last stage alone has it
        lambda: pyshard.load_safetensors(folder / f"path {rank}", mine),
        lambda: pyshard.export_safetensors(folder / "full", mine),
        lambda: pyshard.export_safetensors(folder / "new", mine, dtype=torch.int8 if rank == 1 else None),
    ):
        with pytest.raises(ValueError) as error:
            call()
        said.append(str(error.value))
        for name, value in mine.state_dict().items():
            assert_same_bits(value, before[name], name)
    assert not (folder / "new").exists()
    return said


def test_an_error_of_one_rank_is_one_of_all(tmp_path: Path, seed: int) -> None:
    first, other = (outcome.value for outcome in run(_errors, 2, str(tmp_path), seed))
    assert first == other
    for said, text in zip(
        first,
        ["no transformer.h.3.ln_1", "ln_1.weight has shape (3,)", "path is", "is not empty", "dtype="],
        strict=True,
    ):
        assert text in said, said

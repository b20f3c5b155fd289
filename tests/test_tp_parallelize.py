"""Models of transformers cut by parallelize on 1 to 4 ranks against the same models whole."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from pyshard.placement import tensor_shard
from pyshard.tp.layers import ColumnParallelLinear, RowParallelLinear
from pyshard.tp.models import parallelize
from pyshard.tp.plans import Rule
from pyshard.tp.splits import bounds, split_sizes
from pyshard.tp.state_dict import full_state_dict, load_state_dict

# fp32 through two blocks whose sums over heads, features and rows are added in another order: errors of some units in
# the last place of the largest terms, which are near 1; gradients here are between 1e-4 and 1.
CLOSE = {"rtol": 1e-4, "atol": 2e-6}
VOCABULARY = 53


def build(kind: str, seed: int, **changes: Any) -> nn.Module:
    """A tiny model with random weights and biases, so that no part of a gradient vanishes."""
    import transformers

    transformers.logging.set_verbosity_error()
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "use_cache": True, "bos_token_id": 0, "eos_token_id": None}
    if kind == "gpt2":
        common |= {"n_embd": 24, "n_head": 6, "n_layer": 2, "n_positions": 32, "n_inner": 22}
        common |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config: Any = transformers.GPT2Config(**common | changes)
        maker: Any = transformers.GPT2LMHeadModel
    else:
        common |= {"hidden_size": 32, "intermediate_size": 22, "num_hidden_layers": 2, "num_attention_heads": 8}
        common |= {"num_key_value_heads": 4, "head_dim": 4, "max_position_embeddings": 32, "pad_token_id": None}
        name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
        config = getattr(transformers, f"{name}Config")(**common | changes)
        maker = getattr(transformers, f"{name}ForCausalLM")
    torch.manual_seed(seed % 100_000)
    model = maker._from_config(config) if hasattr(maker, "_from_config") else maker(config)
    for name, param in model.named_parameters():
        if param.dim() == 1:
            nn.init.normal_(param, mean=float("norm.weight" in name or "ln" in name), std=0.2)
        else:
            nn.init.normal_(param, std=0.15)
    return model.train()


def batch(seed: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, : length // 3] = -100
    return ids, labels


def same(name: str, got: Tensor | None, expected: Tensor | None) -> None:
    assert got is not None and expected is not None, name
    torch.testing.assert_close(got, expected, msg=lambda text: f"{name}: {text}", **CLOSE)


def same_gradients(model: nn.Module, whole: nn.Module, case: str = "") -> None:
    expected = dict(whole.named_parameters())
    found = dict(model.named_parameters())
    assert list(found) == list(expected)
    for name, param in found.items():
        shard = tensor_shard(param)
        assert shard is not None, name
        grad = expected[name].grad
        same(f"{case} {name}", param.grad, None if grad is None else shard.cut(grad))


def compare(case: str, whole: Any, model: Any, rank: int, seed: int, lengths: tuple[int, ...]) -> None:
    """Logits, loss and every gradient, for each length twice over accumulated gradients."""
    cut_logits = not model.lm_head.gather_output
    for length in lengths:
        ids, labels = batch(seed, 2, length)
        mask = torch.ones_like(ids)
        mask[0, :2] = int(length < 3)
        expected = whole(ids, attention_mask=mask, labels=labels)
        found = model(ids, attention_mask=mask, labels=labels)
        logits = expected.logits
        if cut_logits:
            sizes = split_sizes(VOCABULARY, dist.get_world_size())
            begin, end = bounds(sizes, rank)
            logits = logits[..., begin:end]
        seen = mask.bool()  # what masked positions give depends on how masks are made
        same(f"{case} length {length} logits", found.logits[seen], logits[seen])
        if length > 1:
            same(f"{case} length {length} loss", found.loss, expected.loss)
            expected.loss.backward()
            found.loss.backward()
        else:  # no token to predict: another loss
            expected.logits.square().mean().backward()
            (found.logits.square().sum() / expected.logits.numel()).backward()
    same_gradients(model, whole, case)


LLAMA: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True, "mlp_bias": True, "attention_bias": True}),
    ("llama", {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 6, "attn_implementation": "eager"}),
    ("qwen3", {"hidden_size": 36, "num_attention_heads": 12, "num_key_value_heads": 6}),
    ("qwen2", {"attn_implementation": "eager"}),
    ("mistral", {"sliding_window": 3}),
]
GPT2: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {}),
    ("gpt2", {"attn_implementation": "eager", "tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"attn_implementation": "eager", "reorder_and_upcast_attn": True}),
]


def _models(rank: int, world: int, seed: int) -> None:
    for (kind, changes), parallel in itertools.product(LLAMA + GPT2, [True, False]):
        kv_heads = changes.get("num_key_value_heads", 4)
        if kind != "gpt2" and kv_heads < world:
            continue
        case = f"{kind} {changes} sequence_parallel={parallel}"
        whole, model = build(kind, seed, **changes), build(kind, seed, **changes)
        names = list(model.state_dict())
        parallelize(model, dist.group.WORLD, sequence_parallel=parallel)
        assert list(model.state_dict()) == names
        compare(case, whole, model, rank, seed, (7, 8, 1))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_models_against_whole_ones(world: int, seed: int) -> None:
    run(_models, world, seed, seconds=200)


def _checkpointing(rank: int, world: int, seed: int) -> None:
    for kind, reentrant, parallel in itertools.product(["llama", "gpt2"], [True, False], [True, False]):
        whole, model = build(kind, seed), build(kind, seed)
        parallelize(model, dist.group.WORLD, sequence_parallel=parallel)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        compare(f"{kind} reentrant={reentrant}", whole, model, rank, seed, (7, 6))
        # Two forwards of other lengths before both backwards: the second run of a block knows its own length.
        for net in (whole, model):
            net.zero_grad()
            losses = [net(*batch(seed, 2, length)[:1], labels=batch(seed, 2, length)[1]).loss for length in (7, 6, 3)]
            sum(losses).backward()
        same_gradients(model, whole, f"{kind} several forwards")


@pytest.mark.parametrize("world", [2, 4])
def test_activation_checkpointing(world: int, seed: int) -> None:
    run(_checkpointing, world, seed)


def _cut_logits(rank: int, world: int, seed: int) -> None:
    for kind, parallel in itertools.product(["llama", "gpt2"], [True, False]):
        whole, model = build(kind, seed), build(kind, seed)
        parallelize(model, dist.group.WORLD, sequence_parallel=parallel, gather_logits=False)
        compare(kind, whole, model, rank, seed, (7,))
        ids, labels = batch(seed + 1, 2, 5)
        same(
            "loss",
            model(ids, labels=labels, num_items_in_batch=3).loss,
            whole(ids, labels=labels, num_items_in_batch=3).loss,
        )
        with pytest.raises(RuntimeError, match="cut along the vocabulary"):
            model.generate(ids)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_loss_of_cut_logits(world: int, seed: int) -> None:
    run(_cut_logits, world, seed)


def _generate(rank: int, world: int, seed: int) -> None:
    for kind, parallel in itertools.product(["llama", "qwen3", "gpt2"], [True, False]):
        whole, model = build(kind, seed).eval(), build(kind, seed).eval()
        parallelize(model, dist.group.WORLD, sequence_parallel=parallel)
        ids, _ = batch(seed, 2, 5)
        arguments: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        caches: list[dict[str, Any]] = [{}, {"use_cache": False}] + [{"cache_implementation": "static"}] * (
            kind == "llama"
        )
        for cache in caches:
            expected = whole.generate(ids, attention_mask=torch.ones_like(ids), **arguments, **cache)
            found = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments, **cache)
            assert torch.equal(found, expected), (kind, parallel, cache)


@pytest.mark.parametrize("world", [2, 3])
def test_greedy_generation(world: int, seed: int) -> None:
    """One token at a time, cut along the sequence: then most ranks have no row at all."""
    run(_generate, world, seed)


def _state(rank: int, world: int, seed: int) -> None:
    for kind, tied in itertools.product(["llama", "gpt2", "qwen2"], [True, False]):
        whole = build(kind, seed, tie_word_embeddings=tied)
        other = build(kind, seed + 1, tie_word_embeddings=tied)
        model = parallelize(build(kind, seed, tie_word_embeddings=tied), dist.group.WORLD)
        state = full_state_dict(model)
        expected = whole.state_dict()
        assert list(state) == list(expected)
        for name, value in expected.items():
            assert torch.equal(state[name], value), name
        first = full_state_dict(model, rank0_only=True)
        assert list(first) == (list(expected) if rank == 0 else [])
        given = dict(other.state_dict())
        if tied:
            given.pop("lm_head.weight")  # as in files that keep a tied weight once
            head, table = model.lm_head.weight, model.get_input_embeddings().weight
            assert head is table
        load_state_dict(model, given)
        for name, value in full_state_dict(model).items():
            assert torch.equal(value, other.state_dict()[name]), name
        before = {name: value.clone() for name, value in model.state_dict().items()}
        bad = dict(whole.state_dict()) | {"extra": torch.ones(1)}
        gone = next(
            name
            for name in bad
            if "weight" in name and "lm_head" not in name and "embed" not in name and "wte" not in name
        )
        bad.pop(gone)
        short = list(bad)[-3]
        bad[short] = bad[short][:1]
        with pytest.raises(RuntimeError) as error:
            load_state_dict(model, bad)
        for text in (f"{gone} is missing", "extra is unexpected", f"{short} has shape", "nothing was loaded"):
            assert text in str(error.value)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_whole_state_dicts(world: int, seed: int) -> None:
    run(_state, world, seed)


class Mlp(nn.Module):
    """A model that no built-in plan knows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 10)
        self.norm = nn.LayerNorm(10)
        self.qkv = nn.Linear(10, 3 * 10)
        self.down = nn.Linear(10, 10)
        self.head = nn.Linear(10, 7, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(self.table(ids))).chunk(3, -1)
        result: Tensor = self.head(self.down(q * k.sigmoid() + v))
        return result


PLAN: dict[str, str | Rule] = {
    "table": "vocab",
    "qkv": Rule("column", parts=3, unit=2),
    "down": Rule("row", unit=2),
    "he*": "column_gather",
}


def _by_name(rank: int, world: int, seed: int) -> None:
    torch.manual_seed(seed % 1000)
    whole = Mlp()
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("dp", "tp"))
    model = parallelize(copy.deepcopy(whole), mesh, PLAN)
    assert isinstance(model.qkv, ColumnParallelLinear) and isinstance(model.down, RowParallelLinear)
    ids = torch.randint(13, (3, 4))
    weights = torch.randn(3, 4, 7)
    for net in (whole, model):
        (net(ids) * weights).sum().backward()
    same("output", model(ids), whole(ids))
    same_gradients(model, whole)
    # Given whole inputs.
    flat = init_device_mesh("cpu", (world,))
    other = parallelize(copy.deepcopy(whole), flat, {"down": "row_split", "head": "column_gather"})
    same("split output", other(ids), whole(ids))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_plans_by_name(world: int, seed: int) -> None:
    run(_by_name, world, seed)


def _frozen(rank: int, world: int, seed: int) -> None:
    """Norms that are trained only later still have their gradients summed; base models need no output layer."""
    whole, model = build("llama", seed), build("llama", seed)
    for net in (whole, model):
        net.requires_grad_(False)
    parallelize(model, dist.group.WORLD, sequence_parallel=True)
    for net in (whole, model):
        net.requires_grad_(True)
    compare("thawed", whole, model, rank, seed, (5,))
    whole, model = build("gpt2", seed).transformer, build("gpt2", seed).transformer
    parallelize(model, dist.group.WORLD)
    ids, _ = batch(seed, 2, 5)
    weights = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(seed))
    for net in (whole, model):
        (net(ids).last_hidden_state * weights).mean().backward()
    same_gradients(model, whole, "base")
    # A copy of a cut model works by itself.
    whole, model = build("qwen3", seed), build("qwen3", seed)
    twin = copy.deepcopy(parallelize(model, dist.group.WORLD))
    for param in model.parameters():
        param.data.zero_()
    compare("copy", whole, twin, rank, seed, (5, 4))
    assert all(param.grad is None for param in model.parameters())
    # Weight gradients in fp32, of a model that is fp32 itself; tied weights go the ordinary way.
    for tied in (True, False):
        whole, model = build("llama", seed, tie_word_embeddings=tied), build("llama", seed, tie_word_embeddings=tied)
        parallelize(model, dist.group.WORLD, main_grad=True)
        compare("main_grad", whole, model, rank, seed, (7, 4))
    # From the meta device: the model is cut before it has weights.
    whole = build("qwen3", seed)
    with torch.device("meta"):
        model = type(whole)(whole.config).train()
    parallelize(model, dist.group.WORLD)
    model.to_empty(device="cpu")
    model.model.rotary_emb = copy.deepcopy(whole.model.rotary_emb)  # its buffers are not in a state_dict
    load_state_dict(model, whole.state_dict())
    compare("meta", whole, model, rank, seed, (5, 6))


@pytest.mark.parametrize("world", [2, 3])
def test_frozen_base_and_meta_models(world: int, seed: int) -> None:
    run(_frozen, world, seed)


def _errors(rank: int, world: int, seed: int) -> None:
    group = dist.group.WORLD

    def head_norm(model: Any) -> Any:
        model.model.layers[1].self_attn.q_norm = nn.LayerNorm(32)
        model.model.layers[1].self_attn.k_norm = nn.LayerNorm(32)
        return model

    def resized(model: Any) -> Any:
        model.model.layers[1].mlp.down_proj = nn.Linear(21, 32)
        return model

    def extended(model: Any) -> Any:
        model.model.layers[0].adapter = nn.Linear(2, 2)
        return model

    def twice(model: Any) -> Any:
        model.qkv2 = model.qkv
        return model

    def tied(model: Any) -> Any:
        model.head = nn.Linear(10, 13, bias=False)
        model.head.weight = model.table.weight
        return model

    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("a", "b"))
    llama: Callable[..., nn.Module] = lambda **changes: build("llama", seed, **changes)  # noqa: E731
    cases: list[tuple[nn.Module, Any, Any, type, str]] = [
        (
            llama(num_key_value_heads=2),
            group,
            "auto",
            ValueError,
            "layers.0.self_attn.k_proj has 2 key-value heads for 3",
        ),
        (build("gpt2", seed, n_head=2), group, "auto", ValueError, "h.0.attn.c_attn has 2 heads for 3 ranks"),
        (
            head_norm(llama()),
            group,
            "auto",
            ValueError,
            r"layers.1.self_attn.q_norm.weight has shape \(32,\); expected",
        ),
        (resized(llama()), group, "auto", ValueError, "layers.1.mlp.down_proj has 21 input features; expected 22"),
        (extended(llama()), group, "auto", ValueError, r"layers.0, .* has \['adapter'\] besides"),
        (Mlp(), group, "auto", ValueError, "model type None; expected one of gpt2, llama"),
        (Mlp(), group, "llama", ValueError, "looks for one module with embed_tokens"),
        (Mlp(), group, "olmo", ValueError, "got plan='olmo'"),
        (Mlp(), group, 3, TypeError, "got plan of type int"),
        (Mlp(), group, {"qvk": "column"}, ValueError, "no module has a name like 'qvk'.*There are: table"),
        (Mlp(), group, {"qkv": "columns"}, ValueError, "is 'columns'; expected one of column"),
        (Mlp(), group, {"norm": "column"}, TypeError, "norm is a LayerNorm; expected an nn.Linear"),
        (Mlp(), group, {"head": "vocab"}, TypeError, "head is a Linear; expected an nn.Embedding"),
        (
            Mlp(),
            group,
            {"qkv": Rule("column", 3, 4)},
            ValueError,
            "qkv has 30 features.*multiple of parts=3 times unit=4",
        ),
        (twice(Mlp()), group, {"qkv": "column"}, ValueError, "found it as .*qkv2"),
        (tied(Mlp()), group, {"table": "vocab"}, ValueError, "table.weight, head.weight are one parameter"),
        (Mlp(), mesh, PLAN, ValueError, r"mesh with dimensions \('a', 'b'\); expected one named 'tp'"),
        (Mlp(), 2, PLAN, TypeError, "got mesh of type int"),
    ]
    for model, where, plan, kind, text in cases:
        before = repr(model), {name: id(param) for name, param in model.named_parameters()}
        with pytest.raises(kind, match=text):
            parallelize(model, where, plan)
        assert before == (repr(model), {name: id(param) for name, param in model.named_parameters()})
        assert not any(tensor_shard(param) for param in model.parameters())
    with pytest.raises(ValueError, match="gather_logits=False for a Mlp"):
        parallelize(Mlp(), group, PLAN, gather_logits=False)
    with pytest.raises(ValueError, match=r"attn.c_attn is a Conv1D"):
        parallelize(build("gpt2", seed), group, main_grad=True)
    # Ranks that do not agree: an error on all of them.
    torch.manual_seed(rank)
    with pytest.raises(
        ValueError, match=r"\d parameters of rank 1 differ from rank 0's, the first table.weight"
    ) as error:
        parallelize(Mlp(), group, PLAN)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="rank 1 was called with"):
        parallelize(Mlp(), group, PLAN, main_grad=rank == 1)
    with pytest.raises((ValueError, RuntimeError), match=r"got plan='x'") as error:
        parallelize(Mlp(), group, "x" if rank == 2 else PLAN)
    assert rank == 2 or str(error.value).startswith(
        "pyshard.tp.parallelize: rank 2 of the group stopped with ValueError"
    )
    model: Any = parallelize(llama(), group)
    with pytest.raises(TypeError, match="not parallel already"):
        parallelize(model, group)
    with pytest.raises(ValueError, match="output_hidden_states with sequence parallelism"):
        model(batch(seed, 1, 4)[0], output_hidden_states=True)
    with pytest.raises(ValueError, match="position_ids must have one entry"):
        model(batch(seed, 1, 4)[0], position_ids=torch.zeros(1, 1, dtype=torch.long))


def test_errors(seed: int) -> None:
    """Each names the module and the sizes, comes on every rank, and leaves the model as it was."""
    run(_errors, 3, seed)

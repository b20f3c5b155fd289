"""Which modules of a model are cut, and how: plans for GPT-2 and Llama-style models of transformers, and plans by name.

A plan is worked out for the whole model before anything in it is changed, so that one that does not fit is an error
that leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor, nn

from ..placement import Piece
from .layers import is_conv1d
from .splits import bounds, split_sizes

ROLES = ("column", "column_gather", "row", "row_split", "vocab", "summed")

# config.model_type -> plan
AUTO = {"gpt2": "gpt2", "llama": "llama", "mistral": "llama", "qwen2": "llama", "qwen3": "llama"}


@dataclass(frozen=True)
class Rule:
    """How modules of a name are cut.

    Attributes:
        role: "column": output features, each rank's output is its part; "column_gather": all ranks get all outputs;
            "row": input features, of which each rank is given its part; "row_split": each rank is given all;
            "vocab": an embedding along its vocabulary; "summed": a module that is whole on every rank and sees only a
            part of the data there, whose gradients are therefore summed over ranks.
        parts: how many matrices of the same size stand one after another along the cut features (3: a fused query, key
            and value); each is cut alike.
        unit: features that stay together, such as those of a head.
    """

    role: str
    parts: int = 1
    unit: int = 1


@dataclass(frozen=True)
class Cut:
    """One module that is replaced by a parallel layer."""

    name: str
    role: str
    pieces: tuple[tuple[Piece, ...], ...]  # of each rank, along the cut features

    @property
    def dim(self) -> int:
        """Cut dimension of a weight [out_features, in_features]."""
        return 1 if self.role.startswith("row") else 0


@dataclass
class Route:
    """Where the sequence is cut and put together again, in a model whose layers are known."""

    base: str  # the module that holds all of this
    first: str  # the block before which hidden states are cut
    last: str  # the norm after which they are whole again
    attentions: list[str]
    stand_in: bool  # attention takes the length of the sequence from its input: it is given one of the whole's shape


@dataclass
class Plan:
    """All that is done to a model."""

    cuts: list[Cut] = field(default_factory=list)
    siblings: list[list[str]] = field(default_factory=list)  # column layers that read the same input
    summed: list[str] = field(default_factory=list)  # modules of which each rank sees a part, always
    summed_if_cut: list[str] = field(default_factory=list)  # the same, if the sequence is cut
    attributes: dict[tuple[str, str], list[int]] = field(default_factory=dict)  # (module, attribute): on each rank
    route: Route | None = None
    head: str | None = None  # the layer that computes logits


def make_plan(model: nn.Module, plan: str | Mapping[str, str | Rule], world: int) -> Plan:
    """The plan for this model over `world` ranks. Raises ValueError or TypeError if it does not fit."""
    if isinstance(plan, str):
        made = _named(model, plan, world)
    elif isinstance(plan, Mapping):
        made = _by_pattern(model, plan, world)
    else:
        raise TypeError(
            f"pyshard.tp.parallelize: got plan of type {type(plan).__name__}; expected 'auto', 'gpt2', 'llama' or a "
            "dict of name patterns and roles"
        )
    _check_modules(model, made)
    _check_ties(model, made)
    return made


def _named(model: nn.Module, name: str, world: int) -> Plan:
    if name == "auto":
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in AUTO:
            raise ValueError(
                f"pyshard.tp.parallelize: plan='auto' got a {type(model).__name__} of model type {kind!r}; expected "
                f"one of {', '.join(AUTO)}. Give a dict such as {{'*.up': 'column', '*.down': 'row'}}, or plan='llama' "
                "or 'gpt2' for a model with the same modules."
            )
        name = AUTO[kind]
    if name not in ("gpt2", "llama"):
        raise ValueError(
            f"pyshard.tp.parallelize: got plan={name!r}; expected 'auto', 'gpt2', 'llama' or a dict of name patterns "
            "and roles"
        )
    return (_gpt2 if name == "gpt2" else _llama)(model, world)


def _llama(model: nn.Module, world: int) -> Plan:
    base = _base(model, ("embed_tokens", "layers", "norm"), "llama")
    at = f"{base}." if base else ""
    plan = Plan()
    layers = model.get_submodule(f"{at}layers")
    for name in (f"{at}layers.{key}" for key, _ in layers.named_children()):
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        _expect(model, name, ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"))
        optional = tuple(key for key in ("q_norm", "k_norm") if hasattr(model.get_submodule(attention), key))
        _expect(model, attention, ("q_proj", "k_proj", "v_proj", "o_proj", *optional))
        _expect(model, mlp, ("gate_proj", "up_proj", "down_proj"))
        heads, kv_heads = _heads(model, attention)
        head_dim = _attribute(model, attention, "head_dim")
        for key in optional:
            _expect_size(model, f"{attention}.{key}", head_dim)
        kv_sizes = _cut_heads(f"{attention}.k_proj", "key-value heads", kv_heads, world)
        group = heads // kv_heads
        kv, q = (_units(kv_sizes, unit) for unit in (head_dim, head_dim * group))
        plan.cuts += [
            Cut(f"{attention}.q_proj", "column", q),
            Cut(f"{attention}.k_proj", "column", kv),
            Cut(f"{attention}.v_proj", "column", kv),
            Cut(f"{attention}.o_proj", "row", q),
        ]
        width = _features(model, f"{mlp}.up_proj")[0]
        _expect_features(model, f"{mlp}.gate_proj", 0, width, "as many as up_proj has")
        _expect_features(model, f"{mlp}.down_proj", 1, width, "as many as up_proj has output features")
        inner = _units(split_sizes(width, world))
        plan.cuts += [Cut(f"{mlp}.{key}", "column", inner) for key in ("gate_proj", "up_proj")]
        plan.cuts.append(Cut(f"{mlp}.down_proj", "row", inner))
        plan.siblings += [[f"{attention}.{key}_proj" for key in "qkv"], [f"{mlp}.gate_proj", f"{mlp}.up_proj"]]
        plan.summed += [f"{attention}.{key}" for key in optional]
        plan.summed_if_cut += [f"{name}.input_layernorm", f"{name}.post_attention_layernorm"]
        for key, sizes in (("num_heads", [size * group for size in kv_sizes]), ("num_key_value_heads", kv_sizes)):
            plan.attributes[attention, key] = sizes
    return _with_ends(model, plan, at, "embed_tokens", "layers", "norm", "self_attn", True, world)


def _gpt2(model: nn.Module, world: int) -> Plan:
    base = _base(model, ("wte", "wpe", "h", "ln_f"), "gpt2")
    at = f"{base}." if base else ""
    plan = Plan()
    for name in (f"{at}h.{key}" for key, _ in model.get_submodule(f"{at}h").named_children()):
        _expect(model, name, ("ln_1", "attn", "ln_2", "mlp"))
        attention, mlp = f"{name}.attn", f"{name}.mlp"
        _expect(model, attention, ("c_attn", "c_proj"))
        _expect(model, mlp, ("c_fc", "c_proj"))
        heads = _attribute(model, attention, "num_heads")
        head_dim = _attribute(model, attention, "head_dim")
        width = heads * head_dim
        _expect_features(model, f"{attention}.c_attn", 0, 3 * width, f"{heads} heads of {head_dim}, three times")
        _expect_features(model, f"{attention}.c_proj", 1, width, f"{heads} heads of {head_dim}")
        sizes = _cut_heads(f"{attention}.c_attn", "heads", heads, world)
        plan.cuts += [
            Cut(f"{attention}.c_attn", "column", _units(sizes, head_dim, 3, width)),
            Cut(f"{attention}.c_proj", "row", _units(sizes, head_dim)),
        ]
        inner_width = _features(model, f"{mlp}.c_fc")[0]
        _expect_features(model, f"{mlp}.c_proj", 1, inner_width, "as many as c_fc has output features")
        inner = _units(split_sizes(inner_width, world))
        plan.cuts += [Cut(f"{mlp}.c_fc", "column", inner), Cut(f"{mlp}.c_proj", "row", inner)]
        plan.summed_if_cut += [f"{name}.ln_1", f"{name}.ln_2"]
        plan.attributes[attention, "num_heads"] = sizes
        plan.attributes[attention, "split_size"] = [size * head_dim for size in sizes]
    return _with_ends(model, plan, at, "wte", "h", "ln_f", "attn", False, world)


def _with_ends(
    model: nn.Module,
    plan: Plan,
    at: str,
    embedding: str,
    blocks: str,
    norm: str,
    attention: str,
    stand_in: bool,
    world: int,
) -> Plan:
    """Adds the embedding, the layer that computes logits, and where the sequence is cut."""
    names = [f"{at}{blocks}.{key}" for key, _ in model.get_submodule(f"{at}{blocks}").named_children()]
    if not names:
        raise ValueError(f"pyshard.tp.parallelize: {at}{blocks} is empty; expected at least one block to cut")
    table = model.get_submodule(f"{at}{embedding}")
    rows = int(getattr(table, "num_embeddings", 0))
    vocabulary = _units(split_sizes(rows, world))
    plan.cuts.append(Cut(f"{at}{embedding}", "vocab", vocabulary))
    if isinstance(getattr(model, "lm_head", None), nn.Module):
        plan.head = "lm_head"
        features = _features(model, "lm_head")[0]
        plan.cuts.append(Cut("lm_head", "column_gather", _units(split_sizes(features, world))))
    plan.summed_if_cut.append(f"{at}{norm}")
    plan.route = Route(at.rstrip("."), names[0], f"{at}{norm}", [f"{name}.{attention}" for name in names], stand_in)
    return plan


def _by_pattern(model: nn.Module, rules: Mapping[str, str | Rule], world: int) -> Plan:
    """Each module goes by the first pattern that its name matches."""
    plan = Plan()
    unmatched = dict.fromkeys(rules)
    for name, module in model.named_modules():
        pattern = next((pattern for pattern in rules if fnmatchcase(name, pattern)), None)
        if pattern is None:
            continue
        unmatched.pop(pattern, None)
        given = rules[pattern]
        rule = Rule(given) if isinstance(given, str) else given
        if not isinstance(rule, Rule) or rule.role not in ROLES or rule.parts < 1 or rule.unit < 1:
            raise ValueError(
                f"pyshard.tp.parallelize: plan[{pattern!r}] is {given!r}; expected one of {', '.join(ROLES)}, or a "
                "Rule with one of them"
            )
        if rule.role == "summed":
            plan.summed.append(name)
            continue
        if rule.role == "vocab":
            features = int(getattr(module, "num_embeddings", 0))
        else:
            features = _features(model, name)[rule.role.startswith("row")]
        if features % (rule.parts * rule.unit):
            raise ValueError(
                f"pyshard.tp.parallelize: {name} has {features} features to cut; expected a multiple of "
                f"parts={rule.parts} times unit={rule.unit}, as plan[{pattern!r}] says"
            )
        width = features // rule.parts
        sizes = split_sizes(width // rule.unit, world)
        plan.cuts.append(Cut(name, rule.role, _units(sizes, rule.unit, rule.parts, width)))
    if unmatched:
        raise ValueError(
            f"pyshard.tp.parallelize: no module has a name like {', '.join(map(repr, unmatched))}; expected every "
            f"pattern of the plan to fit one of {type(model).__name__}'s modules. There are: {_some(model)}"
        )
    return plan


def _units(sizes: Sequence[int], unit: int = 1, parts: int = 1, width: int = 0) -> tuple[tuple[Piece, ...], ...]:
    """What each rank holds of `parts` matrices of `width` features, if it holds sizes[rank] units of each."""
    spans = [bounds(list(sizes), rank) for rank in range(len(sizes))]
    return tuple(
        tuple((part * width + begin * unit, part * width + end * unit) for part in range(parts)) for begin, end in spans
    )


def _heads(model: nn.Module, attention: str) -> tuple[int, int]:
    """Query heads and key-value heads, by the sizes of the projections."""
    head_dim = _attribute(model, attention, "head_dim")
    q, k, v = (_features(model, f"{attention}.{key}_proj")[0] for key in "qkv")
    o = _features(model, f"{attention}.o_proj")[1]
    if q % head_dim or k % head_dim or k != v or q != o or q % k:
        raise ValueError(
            f"pyshard.tp.parallelize: {attention} has projections of {q}, {k} and {v} features out and {o} in; "
            f"expected whole heads of {head_dim}, as many keys as values, and a multiple of them of queries"
        )
    groups = _attribute(model, attention, "num_key_value_groups")
    if q // k != groups:
        raise ValueError(
            f"pyshard.tp.parallelize: {attention} has {q // head_dim} query heads and {k // head_dim} key-value heads, "
            f"and num_key_value_groups={groups}; expected their ratio"
        )
    return q // head_dim, k // head_dim


def _cut_heads(name: str, what: str, heads: int, world: int) -> list[int]:
    sizes = split_sizes(heads, world)
    if not all(sizes):
        raise ValueError(
            f"pyshard.tp.parallelize: {name} has {heads} {what} for {world} ranks; expected at least one a rank. "
            f"Use at most {heads} tensor-parallel ranks."
        )
    return sizes


def _features(model: nn.Module, name: str) -> tuple[int, int]:
    """(out, in) of a layer that can be cut."""
    module = model.get_submodule(name)
    weight = getattr(module, "weight", None)
    if (type(module) is not nn.Linear and not is_conv1d(module)) or not isinstance(weight, Tensor):
        raise TypeError(
            f"pyshard.tp.parallelize: {name or 'the model'} is a {type(module).__name__}; expected an nn.Linear or "
            "transformers' Conv1D itself, not a subclass and not parallel already"
        )
    rows, columns = weight.shape
    return (columns, rows) if is_conv1d(module) else (rows, columns)


def _expect_features(model: nn.Module, name: str, side: int, expected: int, why: str) -> None:
    found = _features(model, name)[side]
    if found != expected:
        raise ValueError(
            f"pyshard.tp.parallelize: {name} has {found} {('output', 'input')[side]} features; expected "
            f"{expected}: {why}"
        )


def _expect_size(model: nn.Module, name: str, size: int) -> None:
    for key, param in model.get_submodule(name).named_parameters():
        if tuple(param.shape) != (size,):
            raise ValueError(
                f"pyshard.tp.parallelize: {name}.{key} has shape {tuple(param.shape)}; expected ({size},), one head. A "
                "norm over all heads cannot be cut."
            )


def _attribute(model: nn.Module, name: str, key: str) -> int:
    module = model.get_submodule(name)
    if not hasattr(module, key):
        raise ValueError(
            f"pyshard.tp.parallelize: {name}, a {type(module).__name__}, has no {key}; this plan does not fit it"
        )
    return int(getattr(module, key))


def _expect(model: nn.Module, name: str, children: Sequence[str]) -> None:
    """Exactly these children with parameters, and no parameter of its own."""
    module = model.get_submodule(name)
    found = {key for key, child in module.named_children() if any(True for _ in child.parameters())}
    found |= {key for key, _ in module.named_parameters(recurse=False)}
    missing, unknown = set(children) - found, found - set(children)
    if missing or unknown:
        raise ValueError(
            f"pyshard.tp.parallelize: {name}, a {type(module).__name__}, lacks {sorted(missing) or 'nothing'} and has "
            f"{sorted(unknown) or 'nothing'} besides; expected {', '.join(children)}. Give a dict plan for this model."
        )


def _base(model: nn.Module, children: Sequence[str], plan: str) -> str:
    """The name of the module that holds the blocks."""
    found = [name for name, module in model.named_modules() if all(hasattr(module, key) for key in children)]
    if len(found) != 1:
        raise ValueError(
            f"pyshard.tp.parallelize: plan {plan!r} looks for one module with {', '.join(children)} in a "
            f"{type(model).__name__}; found {len(found)}. Give a dict plan for this model."
        )
    return found[0]


def _check_modules(model: nn.Module, plan: Plan) -> None:
    """What is replaced must be replaceable without losing anything."""
    names = [cut.name for cut in plan.cuts]
    paths: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(name)
    for cut in plan.cuts:
        module = model.get_submodule(cut.name)
        if cut.role == "vocab":
            if type(module) is not nn.Embedding:
                raise TypeError(
                    f"pyshard.tp.parallelize: {cut.name or 'the model'} is a {type(module).__name__}; expected an "
                    "nn.Embedding itself, not a subclass and not parallel already"
                )
            if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
                raise ValueError(
                    f"pyshard.tp.parallelize: {cut.name} has max_norm, scale_grad_by_freq or sparse set, which a cut "
                    "embedding does not have; expected neither. Leave it out of the plan."
                )
        else:
            _features(model, cut.name)
        same = paths[id(module)]
        if not cut.name or len(same) > 1 or names.count(cut.name) > 1:
            raise ValueError(
                f"pyshard.tp.parallelize: {cut.name or 'the model itself'} cannot be replaced; expected a module "
                f"inside the model under one name, and found it as {same}"
            )


def _check_ties(model: nn.Module, plan: Plan) -> None:
    """A weight that several modules share is cut in all of them alike, or in none."""
    cuts = {cut.name: cut for cut in plan.cuts}
    users: dict[int, list[tuple[str, str]]] = {}
    for owner, module in model.named_modules():
        for key, param in module.named_parameters(recurse=False):
            users.setdefault(id(param), []).append((owner, key))
    for shared in users.values():
        if len(shared) > 1 and any(owner in cuts for owner, _ in shared):
            ways = {(cuts[owner].dim, cuts[owner].pieces) if owner in cuts else None for owner, _ in shared}
            if len(ways) > 1:
                names = ", ".join(f"{owner}.{key}" for owner, key in shared)
                raise ValueError(
                    f"pyshard.tp.parallelize: {names} are one parameter, and the plan cuts them differently; expected "
                    "all cut alike, or none. Cut an embedding ('vocab') and a tied output layer ('column') together."
                )


def _some(model: nn.Module, count: int = 8) -> str:
    names: Iterator[str] = (name for name, module in model.named_modules() if name and not list(module.children()))
    shown = [name for _, name in zip(range(count + 1), names)]
    return ", ".join(shown[:count]) + (", ..." if len(shown) > count else "")

"""Loading a model and an optimizer in place."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from ..kernels.formats import LOW_KEY, format_of
from ..kernels.launch import is_dtensor, local_tensor
from ..optim import state as states
from ..optim.adam import Adam
from ..optim.flat_shard import FlatShard, take
from ..optim.rectangles import cut_of
from ..optim.sharded import ShardedAdam
from . import naming
from .contents import Contents, Item
from .naming import params_of
from .stages import Held

# ---- loading: the model ----


class ModelLoad:
    """Loads a model in place. All checks are made when this is constructed, and nothing is changed.

    `whole`: what all pipeline stages have together.
    """

    def __init__(self, model: nn.Module, contents: Contents, whole: Held):
        self.model, self.contents = model, contents
        for name, param in (*model.named_parameters(), *model.named_buffers()):
            if param.device.type == "meta":
                raise ValueError(
                    f"{name} of the model is on the meta device; expected one with memory. Materialize the model "
                    "first: model.to_empty(device=...)."
                )
        self.held = naming.state_of(model)
        self.parts = {name: states.as_whole(param, param) for name, param in naming.cut_params(model).items()}
        planner = DefaultLoadPlanner()
        planner.set_up_planner({"model": self.held | self.parts}, contents.metadata)
        self.wanted: dict[str, Any] = planner.state_dict
        elsewhere = {*whole.names}.difference(self.held)
        saved = {item.key: item for path, item in contents.below("model").items() if path[0] not in elsewhere}
        _check_names("the model", self.wanted, saved)
        for key, value in self.wanted.items():
            stored = saved[key].tensor
            if (stored is None) == isinstance(value, Tensor):
                raise ValueError(
                    f"{key} is {'no' if stored is None else 'a'} tensor in the checkpoint, unlike in the model."
                )
            if stored is not None:
                _check_shape(key, stored, value.shape)

    def run(self) -> None:
        # Loading replaces what is no tensor.
        values = {"model": self.held | self.parts}
        planner = DefaultLoadPlanner()
        planner.set_up_planner(values, self.contents.metadata)
        self.contents.reader.read_data(planner.create_local_plan(), planner).wait()
        for name, part in self.parts.items():
            states.put_back(part, self.held[name])
            values["model"][name] = self.held[name]
        # The tensors are the model's own already; this is for what else it saves, and for its hooks.
        naming.give(self.model, values["model"])


def _check_names(what: str, wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    missing, unknown = [k for k in wanted if k not in saved], [k for k in saved if k not in wanted]
    if missing or unknown:
        found = [f"no {_some(missing)}"] * bool(missing) + [f"{_some(unknown)}, which {what} does not have"] * bool(
            unknown
        )
        raise ValueError(
            f"the checkpoint has {' and '.join(found)}; expected the same names. Load it into {what} it is of."
        )


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" (and {len(keys) - 3} more)" if len(keys) > 3 else "")


def _check_shape(key: str, stored: TensorStorageMetadata, shape: torch.Size) -> None:
    if stored.size != shape:
        raise ValueError(
            f"{key} has shape {tuple(stored.size)} in the checkpoint; expected {tuple(shape)}. Load it into a model of "
            "the same shapes."
        )


# ---- loading: the optimizer ----

_PER_ELEMENT = (*states.MOMENTS, "master")


class OptimizerLoad:
    """Loads an optimizer in place, whatever its cut. Checks are made at construction, and nothing is changed.

    `whole`: what all pipeline stages have together.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, contents: Contents, whole: Held):
        self.optimizer, self.contents, self.whole = optimizer, contents, whole
        self.sharded = optimizer if isinstance(optimizer, ShardedAdam) and optimizer.world > 1 else None
        self.names = naming.names_of(model, optimizer)
        self.items: dict[str, dict[str, Item]] = {}
        for path, item in contents.below("optimizer", "state").items():
            if len(path) != 2:
                raise ValueError(
                    f"{item.key} lies deeper than an item of a parameter's state; expected the state of an optimizer "
                    "whose items are tensors and numbers. Use torch.distributed.checkpoint.load."
                )
            self.items.setdefault(path[0], {})[path[1]] = item
        self.weights = contents.below("model")
        self.groups = self._read_groups()
        self._check()

    def _read_groups(self) -> list[dict[str, Any]]:
        values: dict[str, Any] = {}
        found = self.contents.below("optimizer", "param_groups")
        for item in found.values():
            values[item.key] = item.tensor and torch.empty(item.tensor.size, dtype=item.tensor.properties.dtype)
        self.contents.read(values)
        groups: list[dict[str, Any]] = [{} for _ in {path[0] for path in found}]
        for path, item in found.items():
            _put(groups[path[0]], path[1:], values[item.key])
        return groups

    def _check(self) -> None:
        here, saved = self.optimizer.param_groups, self.groups
        if not saved:
            raise ValueError("the checkpoint has no state of an optimizer. Pass None in place of the optimizer.")
        if len(here) != len(saved):
            raise ValueError(
                f"the checkpoint has {len(saved)} parameter groups; expected {len(here)}. Give the optimizer the "
                "groups that it was saved with."
            )
        for index, old in enumerate(saved):
            wanted = dict.fromkeys(name for name, _ in (self.whole.groups or [])[index])
            _check_names(f"group {index} of the optimizer", wanted, dict.fromkeys(old["params"]))
        for param in params_of(self.optimizer):
            whole = naming.whole_shape(param)
            for key, item in self.items.get(self.names[param], {}).items():
                if item.tensor is None:
                    continue
                if key in _PER_ELEMENT:
                    _check_shape(item.key, item.tensor, whole)
                elif item.tensor.size not in (whole, torch.Size([])) and (is_dtensor(param) or cut_of(param)):
                    raise ValueError(
                        f"{item.key} has shape {tuple(item.tensor.size)} in the checkpoint, and the parameter, of "
                        f"which this rank holds a part, {tuple(whole)}; expected a value per element, which can be cut "
                        "as the parameter is. Load it into whole parameters, or use an optimizer such as pyshard.AdamW."
                    )

    def run(self) -> str:
        """One parameter after the other, so that little is in memory twice. The model has been loaded before.

        Returns what the user should be warned of.
        """
        optimizer = self.optimizer
        for group, saved in zip(optimizer.param_groups, self.groups, strict=True):
            group.update({k: v for k, v in saved.items() if k not in ("params", "param_names")})
        dropped: list[str] = []
        if self.sharded is not None:
            for param in params_of(optimizer):  # with state, a parameter that is not trained gets a place, too
                if self.items.get(self.names[param]) and not optimizer.state.get(param):
                    optimizer.state[param] = {"step": torch.zeros(())}
        for group in optimizer.param_groups:
            for param in group["params"]:
                items = self.items.get(self.names[param])
                if items:
                    optimizer.state[param] = self._load(param, group, items, dropped)
                else:
                    optimizer.state.pop(param, None)
        optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})
        if not dropped:
            return ""
        return (
            f"the checkpoint has fp32 master weights, which this {type(optimizer).__name__} does not keep for "
            f"{_some(dropped)}: they are dropped. Use pyshard.AdamW with master_weights='auto' and 16-bit parameters "
            "to keep them."
        )

    @torch.no_grad()
    def _load(self, param: Tensor, group: dict[str, Any], items: dict[str, Item], dropped: list[str]) -> dict[str, Any]:
        kept, loaded, values = self.optimizer.state.get(param, {}), {}, {}
        low, low_key = None, self._low_key(param)
        targets: list[_Target] = []
        run = None if self.sharded is None else self.sharded.run_of(param)
        if low_key is not None and "master" not in items and (weight := self._wider(param)) is not None:
            items = items | {"master": weight}
        for key, item in items.items():
            if key == "master" and low_key != "master":
                if low_key is None:
                    dropped.append(self.names[param])
                else:
                    low = _Target(param, run, None, torch.float32)
                    targets.append(low)
                    values[item.key] = low.shown
                continue
            if item.tensor is None:
                values[item.key] = None
            elif key in _PER_ELEMENT or item.tensor.size == naming.whole_shape(param) != torch.Size([]):
                target = _Target(param, run, kept.get(key), self._dtype(param, item.tensor))
                targets.append(target)
                loaded[key], values[item.key] = target.kept, target.shown
            else:
                loaded[key] = values[item.key] = self._scalar(param, group, key, kept.get(key), item.tensor)
        self.contents.read(values)
        for target in targets:
            target.settle()
        for key, item in items.items():
            if item.tensor is None:
                loaded[key] = values[item.key]
        if low is not None:
            loaded["remainder"] = _remainder(param, run, low.kept, kept.get("remainder"))
        return loaded

    def _wider(self, param: Tensor) -> Item | None:
        """The stored weight of a 16-bit parameter, if it is in full precision: the master that there is."""
        item = self.weights.get((self.names[param],))
        if item is None or item.tensor is None or item.tensor.size != naming.whole_shape(param):
            return None
        return item if item.tensor.properties.dtype in (torch.float32, torch.float64) else None

    def _low_key(self, param: Tensor) -> str | None:
        """Which item completes a 16-bit parameter in this optimizer: "remainder", "master" or none."""
        if not isinstance(self.optimizer, Adam):
            return None
        fmt = format_of(param.dtype, self.optimizer.options.master_weights)
        return None if fmt is None else LOW_KEY.get(fmt)

    def _dtype(self, param: Tensor, stored: TensorStorageMetadata) -> torch.dtype:
        """pyshard keeps state in fp32 or fp64; torch's optimizers in the parameter's dtype."""
        dtype: torch.dtype = stored.properties.dtype
        if not dtype.is_floating_point:
            return dtype
        if isinstance(self.optimizer, Adam):
            return torch.float64 if param.dtype == torch.float64 else torch.float32
        return param.dtype

    def _scalar(
        self, param: Tensor, group: dict[str, Any], key: str, kept: Any, stored: TensorStorageMetadata
    ) -> Tensor:
        """A tensor for what is not one value per element, such as the step count; placed as torch places it."""
        on_device = group.get("capturable") or (group.get("fused") and not isinstance(self.optimizer, Adam))
        place = torch.device("cpu") if key == "step" and not on_device else param.device
        if isinstance(kept, Tensor) and (kept.shape, kept.dtype) == (stored.size, stored.properties.dtype):
            if key != "step" or kept.device == place:
                return kept
        return torch.empty(stored.size, dtype=stored.properties.dtype, device=place)


def _put(group: dict[str, Any], path: Sequence[Any], value: Any) -> None:
    """Puts a value where it was in a hyperparameter of dicts and lists, whose items come in any order."""
    place: Any = group
    for key, after in zip(path, (*path[1:], None), strict=True):
        if isinstance(place, list):
            place += [None] * (key + 1 - len(place))
        if after is None:
            place[key] = value
            return
        if (place[key] if isinstance(place, list) else place.get(key)) is None:
            place[key] = [] if isinstance(after, int) else {}
        place = place[key]


class _Target:
    """Memory for a value per element: the tensor that is there if it fits, else a new one.

    Attributes:
        kept: as the optimizer keeps it: a run of elements if it is sharded.
        shown: the same as a checkpoint sees it.
    """

    def __init__(self, param: Tensor, run: tuple[int, int] | None, old: Any, dtype: torch.dtype):
        fits = isinstance(old, Tensor) and (old.dtype, old.device) == (dtype, param.device)
        self.kept: Tensor
        self.part: FlatShard | None = None
        if run is None:
            same = fits and type(old) is not FlatShard and old.shape == param.shape
            self.kept = old if same else torch.empty_like(param, dtype=dtype, requires_grad=False)
            self.shown = self.kept
            if cut_of(param) is not None:
                self.shown = self.part = states.as_whole(self.kept, param)
        else:
            size = run[1] - run[0]
            same = fits and old.shape == (size,)
            self.kept = old if same else torch.empty(size, dtype=dtype, device=param.device)
            self.shown = FlatShard(self.kept, param, run[0])

    def settle(self) -> None:
        """To be called when all has been read: memory that is not dense was read into a copy."""
        if self.part is not None:
            states.put_back(self.part, self.kept)


def _remainder(param: Tensor, run: tuple[int, int] | None, master: Tensor, old: Any) -> Tensor:
    """The split weights' lower halves of a loaded master."""
    if run is not None:
        param = param.detach()  # this rank's part of a whole one, if it is one, is all that counts here
        param = take(param, param, *run, param.dtype)
    target = old if isinstance(old, Tensor) and old.shape == param.shape else torch.empty_like(param, dtype=torch.int16)
    local_tensor(target).copy_(states._remainder(local_tensor(param), local_tensor(master)))
    return target

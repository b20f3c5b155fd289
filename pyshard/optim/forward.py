"""The all-gather behind the next forward: modules wait for their own parameters, not for all."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn


class Gathering:
    """Publications that are still on their way, and the hooks of a model's modules that wait for them.

    A module's forward waits for the parameters that the module holds itself. state_dict() and load_state_dict() wait
    for all.
    """

    def __init__(self, model: nn.Module):
        self._pending: dict[Tensor, Callable[[], None]] = {}  # parameter: waits for its bucket
        self._handles: list[Any] = []
        for module in model.modules():
            self._handles.append(module.register_state_dict_pre_hook(lambda *_: self.wait_all()))
            self._handles.append(module.register_load_state_dict_pre_hook(lambda *_: self.wait_all()))
            own = list(module.parameters(recurse=False))
            if own:
                self._handles.append(module.register_forward_pre_hook(self._waiter(own)))

    def _waiter(self, params: Sequence[Tensor]) -> Callable[[nn.Module, Any], None]:
        def wait(module: nn.Module, arguments: Any) -> None:
            if self._pending:
                for param in params:
                    arrived = self._pending.pop(param, None)
                    if arrived is not None:
                        arrived()

        return wait

    def add(self, params: Sequence[Tensor], arrived: Callable[[], None]) -> None:
        """`arrived` waits for the bucket of these parameters; it may be called several times."""
        self._pending |= dict.fromkeys(params, arrived)

    def wait_all(self) -> None:
        for arrived in set(self._pending.values()):
            arrived()
        self._pending.clear()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

"""pyshard: large-model training in PyTorch with less memory and time, through fused kernels."""

import torch as _torch

from ._version import __version__

_MINIMUM_TORCH = (2, 11)
_found = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in _torch.__version__.split("+")[0].split(".")[:2])
if _found < _MINIMUM_TORCH:
    raise ImportError(
        f"pyshard {__version__}: torch {_torch.__version__} is too old; expected 2.11 or newer. "
        "Upgrade it: pip install 'torch>=2.11'."
    )

try:
    from . import _C  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"pyshard {__version__}: the compiled module pyshard._C cannot be imported ({error}); expected a built "
        "package. In a source tree, build it with `make build`."
    ) from error

from . import kernels  # noqa: E402
from .optim import Adam, AdamW, ShardedAdam, ShardedAdamW  # noqa: E402

__all__ = ["Adam", "AdamW", "ShardedAdam", "ShardedAdamW", "__version__", "kernels"]
__all__ += ["clip_grad_norm_", "fully_shard", "init_mesh", "load_checkpoint", "pp", "save_checkpoint", "tp"]
__all__ += ["export_safetensors", "load_safetensors"]

# Imported when first asked for: torch.distributed.checkpoint alone takes longer than all else here.
_LATER = {
    "clip_grad_norm_": "mesh",
    "export_safetensors": "checkpoint",
    "fully_shard": "fsdp",
    "init_mesh": "mesh",
    "load_checkpoint": "checkpoint",
    "load_safetensors": "checkpoint",
    "pp": "pp",
    "save_checkpoint": "checkpoint",
    "tp": "tp",
}


def __getattr__(name: str) -> object:
    if name in _LATER:
        import importlib

        module = importlib.import_module(f".{_LATER[name]}", __name__)
        return module if name == _LATER[name] else getattr(module, name)
    raise AttributeError(f"module 'pyshard' has no attribute {name!r}")

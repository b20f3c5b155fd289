"""Tensor parallel: layers whose weights are cut over ranks, and whose communication hides behind their matmuls."""

from .engine import close, configure
from .functional import all_gather_matmul, copied_matmul, matmul_all_reduce, matmul_reduce_scatter
from .splits import split_sizes

__all__ = ["all_gather_matmul", "close", "configure", "copied_matmul", "matmul_all_reduce", "matmul_reduce_scatter"]
__all__ += ["split_sizes"]

# Each imported when first asked for, so that the functions alone cost no import of models' code.
_LATER = {
    "ColumnParallelLinear": "layers",
    "RowParallelLinear": "layers",
    "VocabParallelEmbedding": "embedding",
    "vocab_parallel_cross_entropy": "cross_entropy",
    "Rule": "plans",
    "explain": "report",
    "parallelize": "models",
    "load_state_dict": "state_dict",
    "full_state_dict": "state_dict",
}
__all__ += list(_LATER)


def __getattr__(name: str) -> object:
    if name in _LATER:
        import importlib

        return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module 'pyshard.tp' has no attribute {name!r}")

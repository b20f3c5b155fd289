"""The compiled module for mypy. Its functions take addresses; pyshard/kernels wraps and types them."""

from typing import Any

build_note: str

def __getattr__(name: str) -> Any: ...

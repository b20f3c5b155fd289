"""The examples of each way to split a model: short, complete, and right on two ranks."""

import ast
import io
import re
import tokenize
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests import scripts

LINES = 40  # of code: without the docstring, comments and empty lines
EXAMPLES = ["optimizer_state", "full_sharding", "tensor_parallel", "pipeline", "elastic"]
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(path: Path) -> int:
    """How many lines of a file hold code."""
    text = path.read_text()
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    docstring = ast.parse(text).body[0]
    return len(lines - set(range(docstring.lineno, (docstring.end_lineno or 0) + 1)))


@pytest.mark.parametrize("name", EXAMPLES)
def test_short(name: str) -> None:
    assert code_lines(scripts.EXAMPLES / f"{name}.py") < LINES


def _weights(variables: dict[str, Any]) -> dict[str, int]:
    """Checksums of the parameters that other ranks may hold as well, by name."""
    from pyshard.placement import pipeline_share, tensor_shard

    found = {}
    model = variables["pipe" if "pipe" in variables else "model"]
    for name, param in model.named_parameters():
        shard, share = tensor_shard(param), pipeline_share(param)
        if shard is None or shard.dim is None:
            whole = param.full_tensor() if hasattr(param, "full_tensor") else param
            data = whole.detach().contiguous().view(-1).numpy().tobytes()
            found[name if share is None else share.name] = zlib.crc32(data)
    return found


@pytest.mark.parametrize("name", EXAMPLES)
def test_trains_and_ends_with_the_same_weights(name: str, tmp_path: Path) -> None:
    arguments = [str(tmp_path / "run")] if name == "elastic" else []
    (first, one), (second, other) = scripts.run(scripts.EXAMPLES / f"{name}.py", 2, *arguments, look=_weights)
    print(first, second)
    losses = [float(loss) for loss in re.findall(r"loss:? (\d+\.\d+)", first + second)]
    assert len(losses) >= 3
    assert losses[-1] < 0.7 * losses[0]
    if name != "elastic":
        for rank, output in enumerate((first, second)):
            assert re.search(rf"rank {rank}: [\d,]+ bytes of", output)
    both = one.keys() & other.keys()
    assert both  # of a pipeline, the tied weight
    assert all(one[key] == other[key] for key in both)

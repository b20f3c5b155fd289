"""The command line: `pyshard doctor` (also `python -m pyshard doctor`)."""

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from .doctor import doctor

_PLANNED = ("plan", "bench", "train")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status (2 for a command that does not exist)."""
    parser = argparse.ArgumentParser(prog="pyshard", description="Large-model training in PyTorch, with less.")
    parser.add_argument("--version", action="version", version=f"pyshard {__version__}")
    parser.add_argument("command", choices=("doctor", *_PLANNED), metavar="doctor", help="what runs here, and why not")
    command = parser.parse_args(arguments).command
    if command in _PLANNED:
        print(f"pyshard: the command {command!r} is not built yet; there is: doctor", file=sys.stderr)
        return 2
    print(doctor())
    return 0

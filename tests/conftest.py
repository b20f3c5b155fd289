"""Set-up of all tests: one printed seed, Triton's interpreter and skipped GPU tests where there is no GPU.

PYSHARD_TEST_SEED=n repeats a session's random numbers; a test gets the same ones alone as in a full run.
"""

import os
import random
import zlib
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch

# Read by triton when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SEED = int(os.environ.get("PYSHARD_TEST_SEED") or random.SystemRandom().randrange(2**32))
os.environ["PYSHARD_TEST_SEED"] = str(SEED)  # for subprocesses, and for reference.session_seed()

# No deadline: the machine may be busy. No database: the seed alone decides what is drawn.
hypothesis.settings.register_profile("pyshard", deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("pyshard")


def pytest_report_header() -> str:
    return f"PYSHARD_TEST_SEED={SEED}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A failure names the seed, also where the header is not shown."""
    report = yield
    if report.failed:
        report.sections.append(("seed", f"PYSHARD_TEST_SEED={SEED}"))
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of this test's own, made of the session's and the test's name."""
    return zlib.crc32(f"{SEED} {request.path.name} {request.node.name}".encode())


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """Random numbers from the test's seed."""
    return np.random.default_rng(seed)


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """torch's own operations stay in the calling thread, for tests of many small ones: on a busy machine, threads
    that wait for each other took 30 times as long. Kernels that are called with a number of threads use that many.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `isa` runs once for each instruction set of the CPU kernels that this machine has."""
    if "isa" in metafunc.fixturenames:
        from pyshard import _C

        metafunc.parametrize("isa", _C.cpu_isas(), indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set that the CPU kernels use during the test."""
    from pyshard import _C

    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)

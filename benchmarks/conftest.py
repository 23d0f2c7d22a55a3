"""`pytest benchmarks/`: the cases that the scripts measure by default, under pytest-benchmark.

Every case passes the gate first; what this machine cannot run is skipped with the reason. Times are
those of the clock, a synchronization included; a script measures more.
"""

from functools import lru_cache

import pytest
import torch
from _operators import Prepared, device_here
from gate import Gate
from models import Unavailable

# As many as are used at a time: one holds the tensors of its size.
_gate = lru_cache(maxsize=1)(Gate)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", metafunc.module.BENCHMARK.cases(device_here()), ids=str)


@pytest.fixture
def ready(case):
    """A function that runs the case once."""
    try:
        call = Prepared(case.provider, _gate(*case.size)).checked(case.direction)
    except Unavailable as error:
        pytest.skip(str(error))
    run = call.ready(case.direction)
    if case.device != "cuda":
        return run

    def run_and_wait():
        run()
        torch.cuda.synchronize()

    return run_and_wait

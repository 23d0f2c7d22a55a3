"""Every planted fault turns the test named for it red."""

import pytest
from planted_faults import FAULTS, run


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_fault_is_caught(fault):
    caught, output = run(fault)
    assert caught, output

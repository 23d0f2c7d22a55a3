"""A positive A overflows float32: each backend must do so where the reference does, only there."""

from importlib import import_module

import pytest
import torch
from cases import OVERFLOWS, ids, scan_inputs, scan_oracle, scan_output_grads, scan_results


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("case", OVERFLOWS, ids=ids(OVERFLOWS))
@pytest.mark.parametrize("backend", ("kernels", "torch_backend"))
def test_overflows_where_the_reference_does(backend, case):
    if backend == "kernels":
        pytest.importorskip("triton", reason="needs Triton")
    op = import_module(f"mambavision.{backend}").selective_scan
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = scan_inputs(case, device=device)
    grads = scan_output_grads(case, tensors)
    wanted = scan_oracle(tensors, case.flags, *grads)
    assert 0 < torch.isfinite(wanted["y"]).sum() < wanted["y"].numel()
    found = scan_results(op, tensors, case.flags, *grads)
    for name, value in wanted.items():
        same = torch.equal(torch.isfinite(found[name]), torch.isfinite(value))
        assert same, f"{name} is not finite exactly where the reference is"

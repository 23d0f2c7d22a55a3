"""What every test runs under: interpreted kernels without a GPU, and poisoned allocations.

Triton chooses between compiling and interpreting when a kernel is decorated, so the choice stands
here, before any test module imports one.
"""

import os
import signal
from functools import wraps

import pytest
import torch
from torch.utils._device import _device_constructors

HAS_GPU = torch.cuda.is_available()

if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

# A shell ignores Ctrl-C for what it runs in the background, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Parallel workers share the cores, and so do the processes that their tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items):
    if HAS_GPU:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def _poisoned(allocate):
    @wraps(allocate)
    def allocate_nan(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        # Fake and meta tensors hold no values.
        real = type(tensor) is torch.Tensor and tensor.device.type != "meta"
        if real and (tensor.is_floating_point() or tensor.is_complex()):
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return allocate_nan


@pytest.fixture(scope="session", autouse=True)
def nan_poison():
    """Fresh memory holds NaN, so that whatever a kernel leaves unwritten is seen."""
    # `with torch.device(...)` knows constructors by identity: let it note the unpatched ones
    _device_constructors()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
        ):
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield

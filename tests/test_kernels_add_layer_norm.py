"""kernels/add_layer_norm.py and PyTorch's operations against the reference: sum and norm."""

from dataclasses import dataclass

import pytest
import torch
from cases import (
    BRAIN,
    HALF,
    INTERPRETED,
    SINGLE,
    TOLERANCES,
    assert_close,
    ids,
    in_double,
    nan_surrounded,
)

from mambavision import ops, reference, torch_backend

kernels = pytest.importorskip("mambavision.kernels", reason="needs Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5


@dataclass(frozen=True)
class NormCase:
    name: str
    shape: tuple = (2, 5)
    dim: int = 40
    y: bool = True
    gamma: bool = False
    offset: float = 0.0  # of x, next to which its variance is small
    layout: str = "contiguous"


CASES = [
    NormCase("sum-and-norm"),
    NormCase("norm-alone", y=False),
    NormCase("layer-scale", gamma=True),
    NormCase("published-T", (1, 49), 320),
    NormCase("published-L", (1, 3), 784, gamma=True),
    NormCase("widest", (1, 2), 1568),
    NormCase("rows-of-one-program-and-one", (33,), 32),
    NormCase("one-channel", (7,), 1),
    NormCase("power-of-two", (3, 3), 64),
    NormCase("wider-than-a-block", (2,), 2304, y=False),
    NormCase("far-from-0", (4,), 96, offset=100.0),
    NormCase("no-rows", (0, 49), 8, gamma=True),
    NormCase("sliced", layout="sliced"),
    NormCase("nan-surrounded", layout="nan-surrounded"),
]


def norm_inputs(case, dtype, device):
    g = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g).to(device, dtype)

    x = normal(*case.shape, case.dim) + case.offset
    tensors = {
        "x": x,
        "y": normal(*case.shape, case.dim) if case.y else None,
        "gamma": normal(case.dim, dtype=SINGLE) if case.gamma else None,
        "weight": normal(case.dim, dtype=SINGLE),
        "bias": normal(case.dim, dtype=SINGLE),
    }
    for name in ("x", "y"):
        if case.layout == "sliced" and tensors[name] is not None:
            nothing = torch.full_like(x, torch.nan)
            tensors[name] = torch.cat([nothing, tensors[name]], -1)[..., case.dim :]
        if case.layout == "nan-surrounded" and tensors[name] is not None:
            tensors[name] = nan_surrounded(tensors[name])
    return tensors


def named(results):
    return dict(zip(("s", "n"), results, strict=True))


def check(op, case, dtype, device, tolerances):
    tensors = norm_inputs(case, dtype, device)
    found = named(op(**tensors, eps=EPS))
    own = named(reference.add_layer_norm(**tensors, eps=EPS))
    exact = {k: in_double(x) for k, x in tensors.items()}
    exact = named(reference.add_layer_norm(**exact, eps=EPS))
    assert all(x.dtype == dtype for x in found.values())
    assert_close(found, own, exact, tolerances=tolerances)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
@pytest.mark.parametrize("dtype", (SINGLE, HALF, BRAIN), ids=("single", "half", "brain"))
def test_against_the_reference(case, dtype):
    tolerances = TOLERANCES if DEVICE == "cuda" else INTERPRETED
    check(kernels.add_layer_norm, case, dtype, DEVICE, tolerances)


# Far from 0 PyTorch's own layer norm loses twice the digits.
NEAR = [case for case in CASES if not case.offset]


@pytest.mark.parametrize("case", NEAR, ids=ids(NEAR))
@pytest.mark.parametrize("dtype", (SINGLE, torch.float64), ids=("single", "double"))
def test_torch_backend(case, dtype):
    def op(**arguments):
        parameters = ("gamma", "weight", "bias")
        cast = {k: x if x is None else x.to(dtype) for k, x in arguments.items() if k in parameters}
        return torch_backend.add_layer_norm(**{**arguments, **cast})

    check(op, case, dtype, "cpu", TOLERANCES)


def test_the_operator_takes_the_kernel_only_where_nothing_is_differentiated():
    """The sum is a copy of x for the kernel alone, whose results hold no graph."""
    tensors = norm_inputs(CASES[2], SINGLE, DEVICE)
    with_grad = {**tensors, "x": tensors["x"].requires_grad_()}
    _, n = ops.add_layer_norm(**with_grad, backend="triton")
    assert n.grad_fn is not None
    n.sum().backward()
    with torch.no_grad():
        own = ops.add_layer_norm(**with_grad, backend="triton")
        exact = kernels.add_layer_norm(**tensors, eps=EPS)
    for a, b in zip(own, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    "wrong,error",
    (
        ({"y": torch.zeros(2, 5, 41)}, "add_layer_norm: y must have shape"),
        ({"bias": torch.zeros(41)}, "add_layer_norm: bias must have shape"),
        ({"weight": None}, "add_layer_norm: weight must be a tensor"),
        ({"x": "x"}, "add_layer_norm: x must be a tensor"),
    ),
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments(wrong, error):
    tensors = norm_inputs(CASES[0], SINGLE, "cpu")
    with pytest.raises((TypeError, ValueError), match=error):
        ops.add_layer_norm(**{**tensors, **wrong})

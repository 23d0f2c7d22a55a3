"""kernels/stem_conv.py and PyTorch's operations against the reference."""

from dataclasses import dataclass

import pytest
import torch
from cases import BRAIN, HALF, SINGLE, TOLERANCES, assert_close, ids, in_double

from mambavision import ops, reference, torch_backend

kernels = pytest.importorskip("mambavision.kernels", reason="needs Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class StemCase:
    name: str
    size: tuple = (2, 3, 9, 12)
    dim: int = 16
    bias: bool = False
    norm: bool = True
    layout: str = "channels-last"


CASES = [
    StemCase("even-and-odd"),
    StemCase("more-pixels-than-a-program", (3, 3, 16, 17)),
    StemCase("folded", bias=True, norm=False),
    StemCase("bare", norm=False),
    StemCase("everything", bias=True),
    StemCase("channels-first", layout="channels-first"),
    StemCase("surrounded-by-nan", layout="surrounded"),
    StemCase("one-pixel", (2, 3, 1, 1)),
    StemCase("one-channel", (1, 1, 6, 5)),
    StemCase("seven-channels", (1, 7, 6, 5)),
    StemCase("dim-1", dim=1),
    StemCase("dim-20", dim=20),
    StemCase("dim-64", (1, 3, 7, 7), dim=64),
    StemCase("no-image", (0, 3, 8, 8)),
]


@pytest.fixture(autouse=True)
def all_digits(monkeypatch):
    """Convolutions without TF32, which rounds to three."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def inputs(case, dtype, device):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(device, dtype)

    batch, in_chans, height, width = case.size
    x = normal(*case.size)
    if case.layout == "channels-last":
        x = x.contiguous(memory_format=torch.channels_last)
    if case.layout == "surrounded":
        around = torch.full((batch, in_chans, height + 4, width + 4), torch.nan).to(x)
        around[:, :, 2:-2, 2:-2] = x
        x = around[:, :, 2:-2, 2:-2]
    norm = None
    if case.norm:
        var = normal(case.dim).abs() + 0.1
        norm = normal(case.dim), var, normal(case.dim), normal(case.dim), 1e-2
    W = normal(case.dim, in_chans, 3, 3)
    return {"x": x, "W": W, "bias": normal(case.dim) if case.bias else None, "norm": norm}


def check(op, case, dtype, device):
    arguments = inputs(case, dtype, device)
    found = op(**arguments)
    assert found.dtype == dtype
    own = reference.stem_conv(**arguments)
    exact = reference.stem_conv(**{name: in_double(x) for name, x in arguments.items()})
    assert_close({"y": found}, {"y": own}, {"y": exact}, tolerances=TOLERANCES)
    return found


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
@pytest.mark.parametrize("dtype", (HALF, BRAIN), ids=("half", "brain"))
def test_against_the_reference(case, dtype):
    if dtype == BRAIN and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices wrongly")
    y = check(kernels.stem_conv, case, dtype, DEVICE)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
@pytest.mark.parametrize("dtype", (SINGLE, torch.float64), ids=("single", "double"))
def test_torch_backend(case, dtype):
    check(torch_backend.stem_conv, case, dtype, "cpu")


@pytest.mark.parametrize(
    "dtype,in_chans,dim", ((SINGLE, 3, 8), (HALF, 8, 8), (HALF, 3, 129)), ids=str
)
def test_what_a_program_cannot_hold_is_the_librarys(dtype, in_chans, dim, monkeypatch):
    def refuse(*_):
        raise AssertionError("the kernel was called")

    monkeypatch.setattr(kernels, "stem_conv", refuse)
    x, W = (torch.randn(n, in_chans, 3, 3, device=DEVICE).to(dtype) for n in (1, dim))
    assert ops.stem_conv(x, W, backend="triton").shape == (1, dim, 2, 2)


def test_gradients_are_the_librarys():
    arguments = inputs(CASES[0], HALF, DEVICE)
    arguments["W"].requires_grad_()
    ops.stem_conv(**arguments, backend="triton").sum().backward()
    assert arguments["W"].grad.shape == (16, 3, 3, 3)


@pytest.mark.parametrize(
    "wrong,error",
    (
        ({"x": torch.zeros(2, 3, 4)}, "stem_conv: x must have shape"),
        ({"x": torch.zeros(2, 3, 0, 4)}, "stem_conv: height must be at least 1"),
        ({"W": torch.zeros(8, 4, 3, 3)}, "stem_conv: W must have shape"),
        ({"W": torch.zeros(8, 3, 5, 5)}, "stem_conv: W must have shape"),
        ({"bias": torch.zeros(9)}, "stem_conv: bias must have shape"),
        ({"norm": "batch"}, "stem_conv: norm must be None or"),
    ),
)
def test_wrong_arguments(wrong, error):
    arguments = {"x": torch.zeros(2, 3, 4, 4), "W": torch.zeros(8, 3, 3, 3)}
    with pytest.raises((TypeError, ValueError), match=error):
        ops.stem_conv(**{**arguments, **wrong})

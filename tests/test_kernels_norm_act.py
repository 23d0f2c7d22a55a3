"""kernels/norm_act.py and PyTorch's operations against the reference."""

from dataclasses import dataclass

import pytest
import torch
from cases import BRAIN, HALF, INTERPRETED, SINGLE, TOLERANCES, assert_close, ids, in_double

from mambavision import ops, reference, torch_backend

kernels = pytest.importorskip("mambavision.kernels", reason="needs Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class MapCase:
    name: str
    parts: str = "bias norm"  # of bias, norm, affine (its weight and shift), gamma, residual
    act: str = "none"
    dim: int = 12
    size: tuple = (2, 3, 5)  # batch, height, width
    scale: float = 1.0


CASES = [
    MapCase("stem", "norm affine", "relu"),
    MapCase("first-of-a-block", "bias norm affine", "gelu"),
    MapCase("second-of-a-block", "bias norm affine residual"),
    MapCase("with-layer-scale", "bias norm affine gamma residual"),
    MapCase("folded-first", "bias", "gelu"),
    MapCase("folded-second", "bias residual"),
    MapCase("everything", "bias norm affine gamma residual", "gelu"),
    *(MapCase(f"{part}-alone", part) for part in ("bias", "norm", "gamma", "residual")),
    MapCase("relu-alone", "", "relu"),
    MapCase("gelu-alone", "", "gelu"),
    *(
        MapCase(f"dim-{dim}", "bias norm affine residual", "gelu", dim=dim)
        for dim in (1, 3, 8, 32, 80, 160, 196)
    ),
    MapCase("rows-of-one-program-and-one", "bias norm", dim=128, size=(1, 17, 1)),
    MapCase("no-image", "bias norm residual", size=(0, 3, 5)),
    MapCase("far-from-0", "", "gelu", scale=1e4),
]


def inputs(case, dtype, device):
    g = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=SINGLE):
        return torch.randn(*shape, generator=g).to(device, dtype)

    def maps():
        # Rows between rows of NaN: reading behind the last one shows
        batch, height, width = case.size
        around = torch.full((batch + 2, height, width, case.dim), torch.nan, device=device)
        around = around.to(dtype)
        around[1:-1] = case.scale * normal(batch, height, width, case.dim)
        return around[1:-1].permute(0, 3, 1, 2)

    dim, parts = case.dim, case.parts.split()
    norm = None
    if "norm" in parts:
        affine = "affine" in parts
        norm = (
            normal(dim), normal(dim).abs() + 1e-3,
            normal(dim) if affine else None, normal(dim) if affine else None, 1e-2,
        )  # fmt: skip
    return {
        "x": maps(),
        "bias": normal(dim, dtype=dtype) if "bias" in parts else None,
        "norm": norm,
        "act": case.act,
        "gamma": normal(dim, dtype=dtype) if "gamma" in parts else None,
        "residual": maps() if "residual" in parts else None,
    }


def check(op, arguments, tolerances):
    found = op(**arguments)
    assert found.dtype == arguments["x"].dtype
    own = reference.norm_act(**arguments)
    exact = reference.norm_act(**{name: in_double(x) for name, x in arguments.items()})
    assert_close({"y": found}, {"y": own}, {"y": exact}, tolerances=tolerances)
    return found


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
@pytest.mark.parametrize("dtype", (SINGLE, HALF, BRAIN), ids=("single", "half", "brain"))
def test_against_the_reference(case, dtype):
    tolerances = TOLERANCES if DEVICE == "cuda" else INTERPRETED
    y = check(kernels.norm_act, inputs(case, dtype, DEVICE), tolerances)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
@pytest.mark.parametrize("dtype", (SINGLE, torch.float64), ids=("single", "double"))
def test_torch_backend(case, dtype):
    check(torch_backend.norm_act, inputs(case, dtype, "cpu"), TOLERANCES)


def test_nothing_is_written_outside(monkeypatch):
    """One row more than a program owns, in a buffer that goes on."""
    arguments = inputs(MapCase("", dim=128, size=(1, 17, 1)), SINGLE, DEVICE)
    buffer = torch.full((64 * 128,), 7.0, device=DEVICE)

    def inside(x, **_):
        return buffer[: x.numel()].view(1, 17, 1, 128).permute(0, 3, 1, 2)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", inside)
        y = kernels.norm_act(**arguments)
    torch.testing.assert_close(y, reference.norm_act(**arguments), rtol=1e-5, atol=1e-5)
    assert (buffer[17 * 128 :] == 7.0).all()


@pytest.mark.parametrize("dtype", (HALF, BRAIN), ids=("half", "brain"))
def test_statistics_of_another_dtype_leave_the_results_dtype(dtype):
    arguments = inputs(CASES[6], dtype, "cpu")
    wide = {**arguments, "residual": arguments["residual"].float()}
    for op in (torch_backend.norm_act, kernels.norm_act):
        if DEVICE == "cpu" or op is torch_backend.norm_act:
            assert op(**wide).dtype == dtype


def test_residual_of_another_layout():
    arguments = inputs(CASES[5], SINGLE, DEVICE)
    arguments["residual"] = arguments["residual"].contiguous()
    check(kernels.norm_act, arguments, TOLERANCES if DEVICE == "cuda" else INTERPRETED)


def test_not_a_number_stays_one():
    x = torch.full((1, 8, 1, 1), torch.nan, device=DEVICE)
    for act in ("none", "relu", "gelu"):
        assert kernels.norm_act(x, None, None, act, None, None).isnan().all()


def test_the_operator_takes_the_kernel_only_where_nothing_is_differentiated():
    arguments = inputs(CASES[1], SINGLE, DEVICE)
    arguments["bias"].requires_grad_()
    y = ops.norm_act(**arguments, backend="triton")
    y.sum().backward()
    assert arguments["bias"].grad.shape == (12,)
    with torch.no_grad():
        y = ops.norm_act(**arguments, backend="triton")
        torch.testing.assert_close(y, kernels.norm_act(**arguments), rtol=0, atol=0)


@pytest.mark.parametrize(
    "wrong,error",
    (
        ({"x": torch.zeros(2, 12, 3)}, "norm_act: x must have shape"),
        ({"bias": torch.zeros(11)}, "norm_act: bias must have shape"),
        ({"norm": (torch.zeros(12), torch.zeros(12))}, "norm must be None or"),
        ({"norm": (torch.zeros(12), None, None, None, 0.1)}, "norm_act: var must be a tensor"),
        ({"act": "silu"}, "norm_act: act must be"),
        ({"gamma": torch.zeros(2, 12)}, "norm_act: gamma must have shape"),
        ({"residual": torch.zeros(2, 12, 3, 6)}, "norm_act: residual must have shape"),
    ),
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments(wrong, error):
    arguments = {"x": torch.zeros(2, 12, 3, 5), "bias": torch.zeros(12)}
    with pytest.raises((TypeError, ValueError), match=error):
        ops.norm_act(**{**arguments, **wrong})

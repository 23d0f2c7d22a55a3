"""kernels/conv1d_silu.py against the reference: values and every gradient, by name."""

import sys

import pytest
import torch
from cases import (
    BRAIN,
    CONVS,
    HALF,
    INTERPRETED,
    TOLERANCES,
    ConvCase,
    assert_close,
    conv_inputs,
    ids,
    oracle,
    results,
)

kernels = pytest.importorskip("mambavision.kernels", reason="needs Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(case, dtype=torch.float32):
    tensors = conv_inputs(case, dtype, DEVICE)
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch, case.seqlen, case.dim)
    grad = torch.randn(shape, generator=generator).to(tensors["x"])
    flags = {"activation": case.activation}
    found = results(kernels.conv1d_silu, tensors, grad, **flags)
    own = oracle("conv1d_silu", tensors, grad, **flags)
    exact = oracle("conv1d_silu", tensors, grad, double=True, **flags)
    assert_close(found, own, exact, tolerances=TOLERANCES if DEVICE == "cuda" else INTERPRETED)


@pytest.mark.parametrize("case", CONVS, ids=ids(CONVS))
@pytest.mark.parametrize("dtype", (torch.float32, HALF, BRAIN), ids=("single", "half", "brain"))
def test_against_the_reference(case, dtype):
    check(case, dtype)


def test_programs_of_several_blocks(monkeypatch):
    """One program over all rows, and behind their end."""
    monkeypatch.setattr(sys.modules["mambavision.kernels.conv1d_silu"], "PROGRAMS", 1)
    check(ConvCase("", batch=5, seqlen=33, dim=9))


@pytest.mark.parametrize("batch,seqlen", ((1, 5), (3, 1)))
def test_any_stride_where_an_axis_has_length_1(batch, seqlen):
    """Such tensors count as contiguous, whatever that stride."""
    tensors = conv_inputs(ConvCase("", batch=batch, seqlen=seqlen), device=DEVICE)
    x, dim = tensors.pop("x"), 9
    strides = (77 if batch == 1 else dim, 77 if seqlen == 1 else dim, 1)
    odd = torch.full((400,), torch.nan, device=DEVICE).as_strided(x.shape, strides).copy_(x)
    assert odd.is_contiguous() and odd.stride() == strides
    for name, found in results(kernels.conv1d_silu, {"x": odd, **tensors}, x).items():
        wanted = results(kernels.conv1d_silu, {"x": x, **tensors}, x)[name]
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, msg=name)


def test_weight_may_be_that_of_a_conv1d():
    tensors = conv_inputs(ConvCase(""), device=DEVICE)
    y = kernels.conv1d_silu(tensors["x"], tensors["weight"], tensors["bias"])
    weight = tensors["weight"][:, None].requires_grad_()
    torch.testing.assert_close(kernels.conv1d_silu(tensors["x"], weight, tensors["bias"]), y)
    kernels.conv1d_silu(tensors["x"], weight, tensors["bias"]).sum().backward()
    assert weight.grad.shape == weight.shape


def test_float16_at_its_limits():
    x = torch.tensor([65504.0, -65504.0, 0.0, 65504.0], device=DEVICE, dtype=HALF)
    x = x[None, :, None].expand(1, 4, 3).contiguous()
    weight = torch.tensor([[0.0, 1.0, 0.0]], device=DEVICE).expand(3, 3).contiguous()
    y = kernels.conv1d_silu(x, weight)
    torch.testing.assert_close(y, torch.where(x > 0, x, 0.0).to(HALF), rtol=0, atol=0)


def test_double_backward_raises():
    tensors = conv_inputs(ConvCase(""), device=DEVICE)
    x = tensors["x"].requires_grad_()
    y = kernels.conv1d_silu(x, tensors["weight"])
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.gpu
def test_more_than_2_31_elements():
    x = torch.randn(1030, 1024, 2048, device=DEVICE, dtype=HALF)
    weight = torch.randn(2048, 3, device=DEVICE)
    y = kernels.conv1d_silu(x, weight)
    torch.testing.assert_close(y[-1:], kernels.conv1d_silu(x[-1:], weight), rtol=0, atol=0)

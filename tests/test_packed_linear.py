"""PackedLinear: nn.Linear's values, whatever happened to the weight in between."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mambavision.packed_linear import PackedLinear

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN"
)


def layer(gelu=False, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return PackedLinear(nn.Linear(24, 40, bias=bias, dtype=dtype), gelu).eval()


def agrees(packed, x):
    exact = F.linear(x.double(), *(p.double() for p in packed.parameters())).detach()
    exact = F.gelu(exact) if packed.gelu else exact
    with torch.no_grad():
        found = packed(x)
    assert found.dtype == x.dtype and found.shape == exact.shape
    eps = 8 * torch.finfo(x.dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=eps, atol=eps)


@needs_onednn
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("gelu", (False, True), ids=("linear", "gelu"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_values(dtype, gelu, bias):
    packed = layer(gelu, dtype, bias)
    for shape in ((5, 24), (2, 49, 24), (1, 1, 24)):
        agrees(packed, torch.randn(shape).to(dtype))
        assert packed._packed is not None
    # Strides of any kind
    agrees(packed, torch.randn(24, 7, 3).to(dtype).permute(2, 1, 0))


@pytest.mark.parametrize("dtype", (torch.float16, torch.float64), ids=str)
def test_other_dtypes_are_an_ordinary_layer(dtype):
    packed = layer(True, dtype)
    agrees(packed, torch.randn(3, 24).to(dtype))
    assert packed._packed is None
    with torch.no_grad():
        assert layer()(torch.empty(0, 24)).shape == (0, 40)


@needs_onednn
def test_changed_weights_are_noticed():
    packed, x = layer(), torch.randn(3, 24)
    agrees(packed, x)
    with torch.no_grad():
        packed.weight.mul_(2)
    agrees(packed, x)
    packed.load_state_dict({name: p + 1 for name, p in packed.state_dict().items()})
    agrees(packed, x)
    packed.weight = nn.Parameter(torch.randn(40, 24))
    agrees(packed, x)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), F.linear(x, packed.weight, packed.bias))
    agrees(packed, x)


@needs_onednn
def test_copies_and_state_dicts_hold_the_weight_once():
    packed, x = layer(), torch.randn(3, 24)
    agrees(packed, x)
    assert list(packed.state_dict()) == ["weight", "bias"]
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert other._packed is None
        agrees(other, x)


def test_with_gradients_it_is_an_ordinary_layer():
    packed, x = layer(True), torch.randn(3, 24)
    packed(x).sum().backward()
    assert packed._packed is None and packed.weight.grad.abs().max() > 0


def test_under_autocast_it_is_an_ordinary_layer():
    packed = layer()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert packed(torch.randn(3, 24)).dtype == torch.bfloat16

"""Packed layers: the values of nn.Linear and nn.Conv2d, whatever happened to the weight in between.

Under a dispatch mode each test sees which operator ran, so that none passes by the plain layer.
"""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mambavision import packed as module
from mambavision.packed import PackedConv2d, PackedLinear, fuses

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN"
)
ACTS = {"none": None, "relu": nn.ReLU(), "gelu": nn.GELU(), "tanh": nn.GELU("tanh")}


def linear(act="none", dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return PackedLinear(nn.Linear(24, 40, bias=bias, dtype=dtype), ACTS[act]).eval()


def convolution(act="none", dtype=torch.float32, bias=True, stride=1):
    torch.manual_seed(0)
    made = nn.Conv2d(6, 10, 3, stride=stride, padding=1, bias=bias, dtype=dtype)
    return PackedConv2d(made.to(memory_format=torch.channels_last), ACTS[act]).eval()


LAYERS = {"linear": (linear, (3, 24)), "convolution": (convolution, (2, 6, 7, 5))}


class Packings(TorchDispatchMode):
    """How many operators with reordered weights ran, and how many weights were reordered; all that
    ran."""

    ran = reordered = 0

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        if function.namespace == "mkldnn":
            self.ran += "pointwise" in str(function)
            self.reordered += "reorder" in str(function)
        return function(*args, **(kwargs or {}))


def exact(packed, x):
    weight, bias = packed.weight.double(), packed.bias
    bias = None if bias is None else bias.double()
    if isinstance(packed, PackedLinear):
        y = F.linear(x.double(), weight, bias)
    else:
        y = F.conv2d(x.double(), weight, bias, packed.stride, packed.padding)
    return (y if packed.act is None else packed.act(y)).detach()


def agrees(packed, x, ran=1):
    expected = exact(packed, x)
    with torch.no_grad(), Packings() as seen:
        found = packed(x)
    assert seen.ran == ran
    assert found.dtype == x.dtype and found.shape == expected.shape
    eps = 16 * torch.finfo(x.dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=eps, atol=eps)
    return seen.reordered


@needs_onednn
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_values(dtype, act, bias):
    # Processors without AVX-512 have no such bfloat16: the ordinary layer, the same values
    ran = int(dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    packed = linear(act, dtype, bias)
    for shape in ((5, 24), (2, 49, 24), (1, 1, 24)):
        agrees(packed, torch.randn(shape).to(dtype), ran)
    # Strides of any kind
    agrees(packed, torch.randn(24, 7, 3).to(dtype).permute(2, 1, 0), ran)

    for stride in (1, 2):
        packed = convolution(act, dtype, bias, stride)
        for shape in ((2, 6, 9, 7), (1, 6, 1, 1), (3, 6, 8, 8)):
            x = torch.randn(shape).to(dtype)
            agrees(packed, x, ran)
            agrees(packed, x.to(memory_format=torch.channels_last), ran)
        agrees(packed, torch.randn(5, 8, 6, 2).to(dtype).permute(3, 2, 1, 0), ran)


@needs_onednn
def test_maps_come_out_channels_last():
    with torch.no_grad():
        y = convolution("relu")(torch.randn(2, 6, 8, 8))
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()


@pytest.mark.parametrize("dtype", (torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_other_dtypes_are_an_ordinary_layer(kind, dtype):
    make, shape = LAYERS[kind]
    agrees(make("gelu", dtype), torch.randn(shape).to(dtype), ran=0)
    with torch.no_grad():
        assert make()(torch.empty(0, *shape[1:])).shape[0] == 0
    if kind == "convolution":
        # Without a batch
        agrees(make("relu"), torch.randn(shape[1:]), ran=0)


@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize("kind", LAYERS)
def test_without_the_library_it_is_an_ordinary_layer(kind, monkeypatch):
    make, shape = LAYERS[kind]
    monkeypatch.setattr(module, "_dtypes", lambda: ())
    agrees(make("gelu"), torch.randn(shape), ran=0)
    monkeypatch.undo()
    with torch.backends.mkldnn.flags(enabled=False):
        agrees(make("gelu"), torch.randn(shape), ran=0)


@needs_onednn
@pytest.mark.parametrize("kind", LAYERS)
def test_changed_weights_and_sizes_are_noticed(kind):
    make, shape = LAYERS[kind]
    packed, x = make(), torch.randn(shape)
    assert agrees(packed, x) == 1 and agrees(packed, x) == 0
    assert agrees(packed, torch.cat([x, x])) == 1
    with torch.no_grad():
        packed.weight.mul_(2)
    assert agrees(packed, x) == 1
    packed.load_state_dict({name: p + 1 for name, p in packed.state_dict().items()})
    assert agrees(packed, x) == 1
    packed.weight = nn.Parameter(torch.randn_like(packed.weight))
    assert agrees(packed, x) == 1
    with torch.inference_mode():
        expected = exact(packed, x)
        torch.testing.assert_close(packed(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert agrees(packed, x) == 0


@needs_onednn
@pytest.mark.parametrize("kind", LAYERS)
def test_copies_and_state_dicts_hold_the_weight_once(kind):
    make, shape = LAYERS[kind]
    packed, x = make("relu"), torch.randn(shape)
    agrees(packed, x)
    assert list(packed.state_dict()) == ["weight", "bias"]
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert other._packed is None
        assert agrees(other, x) == 1


@needs_onednn
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_take_the_ordinary_layer(kind):
    make, shape = LAYERS[kind]
    packed, x = make("gelu"), torch.randn(shape)
    with Packings() as seen:
        packed(x).sum().backward()
    assert seen.ran == 0 and packed.weight.grad.abs().max() > 0
    packed.requires_grad_(False)
    with Packings() as seen:
        packed(x)
    assert seen.ran == 1
    with Packings() as seen:
        packed(x.requires_grad_()).sum().backward()
    assert seen.ran == 0 and x.grad.abs().max() > 0
    packed.bias.requires_grad_()
    with Packings() as seen:
        packed(x.detach()).sum().backward()
    assert seen.ran == 0 and packed.bias.grad.abs().max() > 0


@pytest.mark.parametrize("kind", LAYERS)
def test_under_autocast_it_is_an_ordinary_layer(kind):
    make, shape = LAYERS[kind]
    packed = make()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Packings() as seen:
        assert packed(torch.randn(shape)).dtype == torch.bfloat16
    assert seen.ran == 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind,act,name",
    [("linear", "gelu", "_addmm_activation"), ("convolution", "relu", "cudnn_convolution_relu")],
)
def test_libraries_compute_the_activation_on_a_gpu(kind, act, name):
    make, shape = LAYERS[kind]
    x = torch.randn(8, *shape, device="cuda")[0].half()
    packed = make(act, torch.float16).cuda()
    expected = exact(packed, x)

    def ran(packed, x):
        with torch.no_grad(), Packings() as seen:
            y = packed(x)
        eps = 4 * torch.finfo(x.dtype).eps
        torch.testing.assert_close(y.double(), exact(packed, x), rtol=eps, atol=eps)
        return name in seen.names

    assert ran(packed, x)
    assert ran(packed, x.transpose(0, 1).contiguous().transpose(0, 1))
    compiled = torch.compile(packed, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x).double(), expected, rtol=4e-3, atol=4e-3)
    assert not ran(make("none", torch.float16).cuda(), x)
    assert not ran(make(act, torch.float16, bias=False).cuda(), x)
    assert not ran(make(act, torch.bfloat16).cuda(), x.bfloat16())
    assert not ran(make(act).cuda(), x.float())
    with torch.autocast("cuda", torch.float16), torch.no_grad(), Packings() as seen:
        packed(x)
    assert name not in seen.names
    with Packings() as seen:
        packed(x).float().sum().backward()
    assert name not in seen.names and packed.weight.grad.abs().max() > 0
    exported = torch.export.export(packed, (x,))
    assert name not in str(exported.graph)


def test_refuses_what_it_would_compute_wrongly():
    class Other(nn.ReLU):
        pass

    for act in (Other(), nn.SiLU()):
        assert not fuses(act)
        with pytest.raises(ValueError, match="act cannot be"):
            PackedLinear(nn.Linear(2, 2), act)
    for options in ({"padding": "same"}, {"padding": 1, "padding_mode": "circular"}):
        with pytest.raises(ValueError, match="padded with zeros"):
            PackedConv2d(nn.Conv2d(2, 2, 3, **options))

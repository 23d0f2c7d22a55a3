"""What training keeps for the backward pass: the fused mixer beside the mixer as published.

Counted by a hook that autograd calls with every tensor it keeps: bytes of distinct storages,
parameters and buffers left out. The tensors are fake, shapes without memory, so that sizes are
those of real training: batch 128 at 224 pixels.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from mambavision import MambaVisionMixer, create_model, selective_scan_fn
from mambavision.blocks import Mlp


class PublishedScan(torch.autograd.Function):
    """Shapes only: what mamba-ssm's selective_scan_fn keeps. Its states are those at the ends of
    chunks of 2,048 steps, each with the decay that leads there, in float32."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, delta_bias):
        u, delta = (x if x.stride(-1) == 1 else x.contiguous() for x in (u, delta))
        (batch, dim, seqlen), dstate = u.shape, A.shape[1]
        states = u.new_empty(batch, dim, -(-seqlen // 2048), 2 * dstate, dtype=torch.float32)
        ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, states)
        return torch.empty_like(u)

    @staticmethod
    def backward(ctx, dy):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:7])


class PublishedMixer(nn.Module):
    """The mixer as published, one operation after another, channels before time."""

    def __init__(self, mixer):
        super().__init__()
        self.dt_rank, self.d_state = mixer.dt_rank, mixer.d_state
        for name, module in mixer.named_children():
            setattr(self, name, module)
        self.A_log, self.D = mixer.A_log, mixer.D

    def forward(self, hidden):
        seqlen, dim = hidden.shape[1], self.D.shape[0]
        x, z = rearrange(self.in_proj(hidden), "b l d -> b d l").chunk(2, dim=1)
        A = -torch.exp(self.A_log.float())
        x = F.silu(F.conv1d(x, self.conv1d_x.weight, padding="same", groups=dim))
        z = F.silu(F.conv1d(z, self.conv1d_z.weight, padding="same", groups=dim))
        w = self.x_proj(rearrange(x, "b d l -> (b l) d"))
        dt, B, C = w.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = rearrange(self.dt_proj(dt), "(b l) d -> b d l", l=seqlen)
        B = rearrange(B, "(b l) n -> b n l", l=seqlen).contiguous()
        C = rearrange(C, "(b l) n -> b n l", l=seqlen).contiguous()
        y = PublishedScan.apply(x, delta, A, B, C, self.D.float(), self.dt_proj.bias.float())
        return self.out_proj(rearrange(torch.cat([y, z], dim=1), "b d l -> b l d"))


def kept_bytes(module, x):
    """Bytes of the distinct storages that a forward pass keeps, parameters and buffers left out."""
    own = {p.untyped_storage()._cdata for p in (*module.parameters(), *module.buffers())}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(x)
    assert out.requires_grad
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)


def published(model):
    """A model with its mixers as published and its perceptrons left to autograd; in place."""
    for module in list(model.modules()):
        if isinstance(getattr(module, "mixer", None), MambaVisionMixer):
            module.mixer = PublishedMixer(module.mixer)
        if isinstance(getattr(module, "mlp", None), Mlp):
            module.mlp = nn.Sequential(module.mlp.fc1, module.mlp.act, module.mlp.fc2)
    return model


@pytest.fixture
def fake():
    """Inside, tensors have no memory; initial values, one of which reads numbers, are left out."""
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        patch.setattr("mambavision.model._initialise_linear", lambda linear: None)
        yield
        torch.set_default_dtype(torch.float32)


MODES = {"float32": (torch.float32, False), "bfloat16": (torch.bfloat16, False),
         "autocast": (torch.float32, True)}  # fmt: skip
# Of what the published mixer keeps. Kept of ours are the input, xz, yz, dt_low and [B C]; the
# torch backend also keeps every 14th or 7th state, which the Triton kernels compute again.
MOST = {"torch": 0.75, "triton": 0.60}


@pytest.mark.parametrize("backend", ("torch", "triton"))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("d_model,seqlen", ((320, 196), (640, 49)), ids=("stage 3", "stage 4"))
def test_mixer(fake, backend, mode, d_model, seqlen):
    if backend == "triton":
        pytest.importorskip("triton")
    dtype, autocast = MODES[mode]
    torch.set_default_dtype(dtype)
    mixer = MambaVisionMixer(d_model, d_state=8, d_conv=3, expand=1, backend=backend)
    x = torch.empty(128, seqlen, d_model, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ratio = kept_bytes(mixer, x) / kept_bytes(PublishedMixer(mixer), x)
    assert 0.4 < ratio <= MOST[backend], f"{ratio:.3f}"


@pytest.mark.parametrize("backend", ("torch", "triton"))
@pytest.mark.parametrize("mode", MODES)
def test_whole_model(fake, backend, mode):
    if backend == "triton":
        pytest.importorskip("triton")
    dtype, autocast = MODES[mode]
    torch.set_default_dtype(dtype)
    model = create_model("mamba_vision_T", backend=backend)
    x = torch.empty(128, 3, 224, 224)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ratio = kept_bytes(model, x) / kept_bytes(published(model), x)
    assert 0.4 < ratio <= 0.9, f"{ratio:.3f}"


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_fake_tensors_keep_what_real_ones_keep(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    counted = []
    for mode in (FakeTensorMode(), torch.enable_grad()):
        with mode:
            mixer = MambaVisionMixer(
                16, d_state=8, d_conv=3, expand=1, backend=backend, device=device
            )
            x = torch.zeros(2, 21, 16, device=device, requires_grad=True)
            counted.append(kept_bytes(mixer, x))
    assert counted[0] == counted[1] > x.nbytes


def test_published_mixer_is_the_mixer():
    """With a real scan in place of the shapes it computes the same."""
    mixer = MambaVisionMixer(16, d_state=2, d_conv=3, expand=1)
    x = torch.randn(2, 9, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PublishedScan, "apply", staticmethod(real_scan))
        found = PublishedMixer(mixer)(x)
    torch.testing.assert_close(found, mixer(x), rtol=1e-4, atol=1e-5)


def real_scan(u, delta, A, B, C, D, delta_bias):
    return selective_scan_fn(u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=True)


# gelu computed again


def gradients(mlp, x, weights):
    x = x.clone().requires_grad_()
    y = mlp(x)
    (y * weights).sum().backward()
    found = {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in mlp.named_parameters()}
    mlp.zero_grad()
    return found


@pytest.mark.parametrize("autocast", (False, True), ids=("plain", "autocast"))
@pytest.mark.parametrize("frozen", ((), ("fc2.weight",), ("fc2.bias", "fc1.weight")), ids=str)
def test_mlp_has_the_same_gradients(autocast, frozen):
    mlp = Mlp(8, 32)
    for name in frozen:
        mlp.get_parameter(name).requires_grad_(False)
    plain = copy.deepcopy(mlp)
    plain.fc2.register_forward_hook(lambda *_: None)
    assert mlp._again() and not plain._again()
    x, weights = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = gradients(mlp, x, weights), gradients(plain, x, weights)
    for name, value in expected.items():
        assert (value is None) == (found[name] is None) == (name in frozen), name
        if value is not None:
            rtol = 2**-7 if autocast else 1e-5
            torch.testing.assert_close(found[name], value, rtol=rtol, atol=rtol, msg=name)


def test_mlp_in_float64_and_twice():
    mlp = Mlp(4, 8).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mlp, (x,))
    assert torch.autograd.gradgradcheck(mlp, (x,))


def test_mlp_steps_aside():
    x = torch.randn(2, 3, 4)
    seen = []
    mlp = Mlp(4, 8)
    mlp.act.register_forward_pre_hook(lambda *_: seen.append("act"))
    mlp(x)
    assert seen == ["act"] and not mlp._again()
    other = Mlp(4, 8)
    other.fc2 = nn.Sequential(other.fc2)
    assert not other._again()
    other = Mlp(4, 8)
    other.act = nn.GELU(approximate="tanh")
    assert not other._again()
    dropping = Mlp(4, 8, drop=0.5)
    assert not dropping.train()._again() and dropping.eval()._again()
    with torch.no_grad():
        assert not dropping._again()

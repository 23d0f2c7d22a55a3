"""The oracle itself: gradchecks in float64, recorded numbers, and what a scan must satisfy."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import (
    BRAIN,
    COMPLEX,
    CONVS,
    HALF,
    LAYOUTS,
    MIXERS,
    MODES,
    SHAPES,
    SINGLE,
    VALUES,
    ScanCase,
    conv_inputs,
    ids,
    mixer_inputs,
    oracle,
    results,
    scan_inputs,
    scan_oracle,
    scan_output_grads,
    scan_results,
)
from safetensors import safe_open

from mambavision import reference

DATA = Path(__file__).parent / "data"
RECORDED_SCANS = sorted(path.stem for path in DATA.glob("scan_*.safetensors"))
RECORDED_MIXERS = sorted(path.stem for path in DATA.glob("mixer_*.safetensors"))


def load(name):
    with safe_open(DATA / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def double(x):
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def assert_recorded(found, recorded, name):
    """Float32's due: rtol 1e-4, atol 1e-5 of the tensor's scale."""
    atol = 1e-5 * recorded.abs().max().item()
    torch.testing.assert_close(
        found.to(recorded.dtype), recorded, rtol=1e-4, atol=atol, msg=lambda text: f"{name}: {text}"
    )


def gradcheck(forward, backward, tensors):
    """gradcheck of an op made of a forward and a hand-written backward over named tensors."""
    names = list(tensors)

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *values):
            ctx.save_for_backward(*values)
            return forward(**dict(zip(names, values, strict=True)))

        @staticmethod
        def backward(ctx, *grads):
            found = backward(grads, **dict(zip(names, ctx.saved_tensors, strict=True)))
            return tuple(getattr(found, f"d{name}") for name in names)

    values = [double(x).requires_grad_() for x in tensors.values()]
    assert torch.autograd.gradcheck(Op.apply, values, fast_mode=True)


EVERY_MODE = MODES + SHAPES[2:] + COMPLEX
PLAIN = ScanCase("plain", batch=2, dim=6, dstate=3)
FULL = ScanCase("full", batch=2, dim=6, dstate=3, z=True, initial_state=True, groups=2)
PROPERTIES = [PLAIN, FULL, replace(FULL, name="complex", complex_A=True)]


@pytest.mark.parametrize("case", EVERY_MODE, ids=ids(EVERY_MODE))
def test_selective_scan_gradcheck(case):
    def forward(**tensors):
        return reference.selective_scan(**tensors, **case.flags, return_last_state=True)

    def backward(grads, **tensors):
        dy, dlast_state = grads
        return reference.selective_scan_backward(
            dy, **tensors, **case.flags, dlast_state=dlast_state
        )

    gradcheck(forward, backward, scan_inputs(case))


@pytest.mark.parametrize("case", CONVS, ids=ids(CONVS))
def test_conv1d_silu_gradcheck(case):
    def forward(**tensors):
        return reference.conv1d_silu(**tensors, activation=case.activation)

    def backward(grads, **tensors):
        return reference.conv1d_silu_backward(*grads, **tensors, activation=case.activation)

    gradcheck(forward, backward, conv_inputs(case))


@pytest.mark.parametrize("case", MIXERS, ids=ids(MIXERS))
def test_mixer_gradcheck(case):
    def backward(grads, **tensors):
        return reference.mixer_backward(*grads, **tensors)

    gradcheck(reference.mixer, backward, mixer_inputs(case))


def solved(
    u, delta, A, B, C, D=None, *, z=None, delta_bias=None, initial_state=None,
    delta_softplus=False, reverse=False, return_last_state=True,
):  # fmt: skip
    """The scan without its recurrence: h_t = sum_{s<=t} exp(A (dt_{s+1} + ... + dt_t)) dt_s B_s u_s
    and exp(A (dt_0 + ... + dt_t)) of the initial state."""
    batch, seqlen, dim = u.shape

    def over_time(x):
        return x.flip(1) if reverse else x

    def per_channel(x):  # (batch, seqlen, dim, dstate)
        if x.dim() == 2:
            return x.expand(batch, seqlen, *x.shape)
        if x.dim() == 3:
            return over_time(x)[:, :, None].expand(-1, -1, dim, -1)
        return over_time(x).repeat_interleave(dim // x.shape[2], dim=2)

    x = delta if delta_bias is None else delta + delta_bias
    dt = over_time(torch.nn.functional.softplus(x, threshold=100) if delta_softplus else x)
    elapsed = dt.cumsum(1)
    later = torch.ones(seqlen, seqlen, dtype=torch.bool).tril()[:, :, None]  # t, s
    between = torch.where(later, elapsed[:, :, None] - elapsed[:, None], 0)
    decay = torch.exp(between[..., None] * A) * later[..., None]
    driven = (dt * over_time(u))[..., None] * per_channel(B)
    h = torch.einsum("btsdn,bsdn->btdn", decay, driven.to(decay.dtype))
    if initial_state is not None:
        h = h + torch.exp(elapsed[..., None] * A) * initial_state[:, None]
    y = (per_channel(C) * h).sum(-1)
    y = over_time(2 * y.real if A.is_complex() else y)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * torch.nn.functional.silu(z)
    return y, h[:, -1]


@pytest.mark.parametrize("forward", (solved, reference.selective_scan), ids=("solved", "loop"))
@pytest.mark.parametrize("case", EVERY_MODE + VALUES, ids=ids(EVERY_MODE + VALUES))
def test_selective_scan_against_autograd(case, forward):
    """Values, and the hand-written backward, extreme values included (finite differences fail
    there): through a formula that shares nothing with the loop, and through the loop itself."""
    tensors = {name: double(x) for name, x in scan_inputs(case).items()}
    dy, dlast_state = (double(x) for x in scan_output_grads(case, tensors))
    wanted = scan_results(forward, tensors, case.flags, dy, dlast_state)
    found = scan_oracle(tensors, case.flags, dy, dlast_state)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        atol = 1e-12 * value.abs().max().item()
        torch.testing.assert_close(
            found[name], value.detach(), rtol=1e-9, atol=atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


@pytest.mark.parametrize("case", CONVS, ids=ids(CONVS))
def test_conv1d_silu_against_pytorch(case):
    """Values and every gradient of torch's own convolution and SiLU."""
    tensors = {name: double(x) for name, x in conv_inputs(case).items()}
    dy = torch.randn(tensors["x"].shape, generator=torch.Generator().manual_seed(1)).double()

    def conv(x, weight, bias=None):
        left = (case.width - 1) // 2
        padded = torch.nn.functional.pad(x.transpose(1, 2), (left, case.width - 1 - left))
        y = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=case.dim)
        return (torch.nn.functional.silu(y) if case.activation else y).transpose(1, 2)

    wanted = results(conv, tensors, dy)
    found = oracle("conv1d_silu", tensors, dy, activation=case.activation)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value.detach(), msg=name)
    weight = tensors.pop("weight")[:, None]
    y = reference.conv1d_silu(weight=weight, **tensors, activation=case.activation)
    torch.testing.assert_close(y, found["out"], rtol=0, atol=0)
    grads = reference.conv1d_silu_backward(dy, weight=weight, **tensors, activation=case.activation)
    torch.testing.assert_close(grads.dweight, found["dweight"][:, None], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", (HALF, BRAIN, SINGLE), ids=("float16", "bfloat16", "float32"))
def test_results_in_the_dtypes_of_the_arguments(dtype):
    mixed = {"delta": SINGLE, "B": HALF, "C": BRAIN, "z": SINGLE, "D": HALF}
    for case in (FULL, replace(FULL, dtypes=mixed), replace(FULL, complex_A=True)):
        tensors = scan_inputs(case, dtype)
        found = scan_oracle(tensors, case.flags, *scan_output_grads(case, tensors))
        assert found["y"].dtype == dtype
        assert found["last_state"].dtype == (torch.complex64 if case.complex_A else SINGLE)
        assert {k: found[f"d{k}"].dtype for k in tensors} == {
            k: x.dtype for k, x in tensors.items()
        }
    for op, tensors in (("conv1d_silu", conv_inputs(CONVS[0], dtype)),
                        ("mixer", mixer_inputs(MIXERS[2], dtype))):  # fmt: skip
        grad = torch.ones(next(iter(tensors.values())).shape, dtype=dtype)
        found = oracle(op, tensors, grad)
        assert found["out"].dtype == dtype
        assert {k: found[f"d{k}"].dtype for k in tensors} == {
            k: x.dtype for k, x in tensors.items()
        }


def test_strides_change_nothing_and_inputs_are_not_modified():
    for case in LAYOUTS:
        tensors = scan_inputs(case)
        before = {
            name: x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()
        }
        grads = scan_output_grads(case, tensors)
        found = scan_oracle(tensors, case.flags, *grads)
        for name, x in tensors.items():
            torch.testing.assert_close(x, before[name], rtol=0, atol=0, msg=f"{name} was modified")
        for name, value in scan_oracle(before, case.flags, *grads).items():
            torch.testing.assert_close(found[name], value, msg=f"{case.name}: {name}")


def test_empty_batch():
    tensors = scan_inputs(replace(FULL, batch=0))
    found = scan_oracle(tensors, FULL.flags, *scan_output_grads(FULL, tensors))
    assert found["y"].shape == (0, FULL.seqlen, FULL.dim)
    assert found["last_state"].shape == (0, FULL.dim, FULL.dstate)
    assert all(found[f"d{name}"].shape == x.shape for name, x in tensors.items())
    assert not found["dA"].any() and not found["dD"].any()


@pytest.mark.parametrize("name", RECORDED_SCANS)
def test_selective_scan_recorded(name):
    tensors, metadata = load(name)
    flat = {k: v for k, v in tensors.items() if not k.startswith("grad") and k != "out"}
    last_state = flat.pop("last_state")
    args = {}
    for key, value in flat.items():
        # (batch, dim, seqlen) -> (batch, seqlen, dim); (batch, groups, dstate, seqlen) likewise
        sequence = value.dim() > 2
        args[key] = value.movedim(-1, 1) if sequence else value
    softplus = metadata["delta_softplus"].lower() == "true"
    y, h = reference.selective_scan(**args, delta_softplus=softplus, return_last_state=True)
    assert_recorded(y.transpose(1, 2), tensors["out"], "out")
    assert_recorded(h, last_state, "last_state")
    dy = tensors["grad_out"].transpose(1, 2)
    grads = reference.selective_scan_backward(dy, **args, delta_softplus=softplus)
    for key, value in args.items():
        grad = getattr(grads, f"d{key}")
        grad = grad.movedim(1, -1) if value.dim() > 2 else grad
        assert_recorded(grad, tensors[f"grad.{key}"], key)


@pytest.mark.parametrize("name", RECORDED_MIXERS)
def test_mixer_recorded(name):
    """The whole mixer: in_proj and out_proj around the op, and the bias of dt_proj twice."""
    tensors, _ = load(name)
    p = {key[6:]: value for key, value in tensors.items() if key.startswith("param.")}
    A = -torch.exp(p["A_log"])
    args = {
        "xz": tensors["x"] @ p["in_proj.weight"].t(),
        "conv_x_weight": p["conv1d_x.weight"],
        "conv_z_weight": p["conv1d_z.weight"],
        "x_proj_weight": p["x_proj.weight"],
        "dt_proj_weight": p["dt_proj.weight"],
        "A": A,
        "D": p["D"],
        "delta_bias": 2 * p["dt_proj.bias"],
    }
    yz = reference.mixer(**args)
    out = yz @ p["out_proj.weight"].t()
    assert_recorded(out, tensors["out"], "out")
    grads = reference.mixer_backward(tensors["grad_out"] @ p["out_proj.weight"], **args)
    assert_recorded(grads.dxz @ p["in_proj.weight"], tensors["grad.x"], "x")
    expected = {
        "conv1d_x.weight": grads.dconv_x_weight,
        "conv1d_z.weight": grads.dconv_z_weight,
        "x_proj.weight": grads.dx_proj_weight,
        "dt_proj.weight": grads.ddt_proj_weight,
        "dt_proj.bias": 2 * grads.ddelta_bias,
        "A_log": grads.dA * A,
        "D": grads.dD,
    }
    for key, value in expected.items():
        assert_recorded(value, tensors[f"grad.{key}"], key)


def parts(tensors, start, stop):
    """The arguments of the steps from start to stop."""
    return {
        name: x[:, start:stop] if x.dim() > 2 and name != "initial_state" else x
        for name, x in tensors.items()
    }


@pytest.mark.parametrize("case", PROPERTIES, ids=ids(PROPERTIES))
class TestScan:
    FLAGS = {"delta_softplus": True, "return_last_state": True}

    @pytest.fixture
    def tensors(self, case):
        return {name: double(x) for name, x in scan_inputs(case).items()}

    def test_reversal_is_a_flip(self, tensors):
        y, h = reference.selective_scan(**tensors, **self.FLAGS, reverse=True)
        flipped = {
            name: x.flip(1) if x.dim() > 2 and name != "initial_state" else x
            for name, x in tensors.items()
        }
        y2, h2 = reference.selective_scan(**flipped, **self.FLAGS)
        torch.testing.assert_close(y, y2.flip(1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(h, h2, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("reverse", (False, True))
    def test_two_halves_with_the_state_handed_over_equal_the_whole(self, tensors, reverse):
        flags = self.FLAGS | {"reverse": reverse}
        y, h = reference.selective_scan(**tensors, **flags)
        halves = [parts(tensors, 0, 4), parts(tensors, 4, None)]
        first, second = reversed(halves) if reverse else halves
        y1, h1 = reference.selective_scan(**first, **flags)
        y2, h2 = reference.selective_scan(**(second | {"initial_state": h1}), **flags)
        joined = torch.cat([y2, y1] if reverse else [y1, y2], dim=1)
        torch.testing.assert_close(joined, y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(h2, h, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("reverse", (False, True))
    def test_gradients_pass_the_hand_over(self, case, tensors, reverse):
        """dinitial_state of the second half is dlast_state of the first."""
        flags = {"delta_softplus": True, "reverse": reverse}
        dy, dlast_state = scan_output_grads(case, tensors)
        dlast_state = double(dlast_state)
        whole = reference.selective_scan_backward(dy, **tensors, **flags, dlast_state=dlast_state)
        spans = [(0, 4), (4, None)]
        (a, b), (c, d) = reversed(spans) if reverse else spans
        first, second = parts(tensors, a, b), parts(tensors, c, d)
        _, h = reference.selective_scan(**first, **flags, return_last_state=True)
        late = reference.selective_scan_backward(
            dy[:, c:d], **(second | {"initial_state": h}), **flags, dlast_state=dlast_state
        )
        early = reference.selective_scan_backward(
            dy[:, a:b], **first, **flags, dlast_state=late.dinitial_state
        )
        for name in tensors:
            e, g, w = (getattr(grads, f"d{name}") for grads in (early, late, whole))
            if name == "initial_state":
                joined = e
            elif w.dim() > 2:
                joined = torch.cat([g, e] if reverse else [e, g], dim=1)
            else:
                joined = e + g
            torch.testing.assert_close(joined, w, msg=name)

    def test_linear_in_u_and_the_initial_state(self, case, tensors):
        linear = [name for name in ("u", "initial_state") if name in tensors]
        other = {name: double(x) for name, x in scan_inputs(case, seed=1).items() if name in linear}
        mixed = {name: 2 * tensors[name] - 3 * other[name] for name in linear}
        (y, h), (y_other, h_other), (y_mixed, h_mixed) = (
            reference.selective_scan(**(tensors | inputs), **self.FLAGS)
            for inputs in ({}, other, mixed)
        )
        torch.testing.assert_close(y_mixed, 2 * y - 3 * y_other)
        torch.testing.assert_close(h_mixed, 2 * h - 3 * h_other)


def test_complex_without_imaginary_parts_is_twice_the_real_scan():
    tensors = {name: double(x) for name, x in scan_inputs(replace(PLAIN, without=("D",))).items()}
    y, h = reference.selective_scan(**tensors, return_last_state=True)
    as_complex = {k: x.to(torch.complex128) if k in "ABC" else x for k, x in tensors.items()}
    y2, h2 = reference.selective_scan(**as_complex, return_last_state=True)
    torch.testing.assert_close(y2, 2 * y)
    torch.testing.assert_close(h2, h.to(h2.dtype))

"""The oracle itself: gradchecks in float64, recorded numbers, and what a scan must satisfy."""

from pathlib import Path

import pytest
import torch
from cases import COMPLEX, MODES, SHAPES, VALUES, ids, scan_inputs, scan_oracle, scan_output_grads
from safetensors import safe_open

from mambavision import reference

DATA = Path(__file__).parent / "data"
SCANS = sorted(path.stem for path in DATA.glob("scan_*.safetensors"))
MIXERS = sorted(path.stem for path in DATA.glob("mixer_*.safetensors"))


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


@pytest.mark.parametrize("width", (1, 2, 3, 4, 5, 8))
@pytest.mark.parametrize("activation", (True, False))
def test_conv1d_silu_gradcheck(width, activation):
    tensors = {"x": torch.randn(2, 4, 3), "weight": torch.randn(3, width), "bias": torch.randn(3)}

    def forward(**tensors):
        return reference.conv1d_silu(**tensors, activation=activation)

    def backward(grads, **tensors):
        return reference.conv1d_silu_backward(*grads, **tensors, activation=activation)

    gradcheck(forward, backward, tensors)


def test_mixer_gradcheck():
    dim, dstate, dt_rank = 3, 2, 2
    tensors = {
        "xz": torch.randn(2, 4, 2 * dim),
        "conv_x_weight": torch.randn(dim, 1, 3),
        "conv_z_weight": torch.randn(dim, 1, 3),
        "x_proj_weight": torch.randn(dt_rank + 2 * dstate, dim),
        "dt_proj_weight": torch.randn(dim, dt_rank),
        "A": -torch.rand(dim, dstate),
        "D": torch.randn(dim),
        "delta_bias": torch.randn(dim),
        "conv_x_bias": torch.randn(dim),
        "conv_z_bias": torch.randn(dim),
    }
    gradcheck(
        reference.mixer,
        lambda grads, **tensors: reference.mixer_backward(*grads, **tensors),
        tensors,
    )


@pytest.mark.parametrize("case", VALUES, ids=ids(VALUES))
def test_extreme_values_against_autograd(case):
    """Where finite differences fail: the forward written with PyTorch's own operators."""
    tensors = {name: double(x).requires_grad_() for name, x in scan_inputs(case).items()}
    dy, dlast_state = (double(x) for x in scan_output_grads(case, tensors))
    x = tensors["delta"] + tensors["delta_bias"]
    dt = torch.nn.functional.softplus(x, threshold=100)
    h = torch.zeros_like(dlast_state)
    ys = []
    for t in range(case.seqlen):
        driven = (dt[:, t] * tensors["u"][:, t])[..., None] * tensors["B"][:, t, None]
        h = torch.exp(dt[:, t, :, None] * tensors["A"]) * h + driven
        ys.append((h * tensors["C"][:, t, None]).sum(-1) + tensors["D"] * tensors["u"][:, t])
    y = torch.stack(ys, dim=1)
    torch.autograd.backward([y, h], [dy, dlast_state])
    plain = {name: value.detach() for name, value in tensors.items()}
    found = scan_oracle(plain, case.flags, dy, dlast_state)
    torch.testing.assert_close(found["y"], y.detach())
    for name, value in tensors.items():
        scale = value.grad.abs().max().item()
        torch.testing.assert_close(
            found[f"d{name}"], value.grad, rtol=1e-9, atol=1e-12 * scale, msg=name
        )


@pytest.mark.parametrize("name", SCANS)
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


@pytest.mark.parametrize("name", MIXERS)
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


def test_reversal_is_a_flip():
    case = MODES[-3]
    tensors = {name: double(x) for name, x in scan_inputs(case).items()}
    flags = {"delta_softplus": True, "return_last_state": True}
    y, h = reference.selective_scan(**tensors, **flags, reverse=True)
    flipped = {
        name: x.flip(1) if x.dim() > 2 and name != "initial_state" else x
        for name, x in tensors.items()
    }
    y2, h2 = reference.selective_scan(**flipped, **flags)
    torch.testing.assert_close(y, y2.flip(1), rtol=0, atol=0)
    torch.testing.assert_close(h, h2, rtol=0, atol=0)

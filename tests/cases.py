"""What the tests share: cases, inputs, the oracle's results, and the rule that compares.

The rule: |result - exact| <= 2 |oracle - exact| + TOLERANCES scale, by tensor and name, each |...|
the largest of its tensor. exact is the reference in float64, oracle the reference in the dtype
under test, scale the largest magnitude of exact. So a result may be twice as wrong as plain PyTorch
in that dtype, and a rounding more. Where the oracle overflows, and only there, so must the result.
"""

from dataclasses import dataclass, field

import torch

from mambavision import reference

# One rounding of the result (half a unit in the last place of 11, 8 bits); for float32, 16 units,
# since sums run in another order than the reference's; for float64 the same.
TOLERANCES = {
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float32: 16 * 2.0**-24,
    torch.float64: 16 * 2.0**-53,
}

# Triton's interpreter cuts float32 off to bfloat16 where a GPU rounds: a whole unit, not half.
INTERPRETED = {**TOLERANCES, torch.bfloat16: 2.0**-7}

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class ScanCase:
    name: str
    batch: int = 1
    seqlen: int = 9
    dim: int = 8
    dstate: int = 8
    groups: int = 0  # 0: B and C without a group axis
    ungrouped: str = ""  # "B" or "C", without that axis where the other has it
    const_B: bool = False
    const_C: bool = False
    without: tuple = ()  # of "D", "delta_bias"
    z: bool = False
    initial_state: bool = False
    delta_softplus: bool = True
    reverse: bool = False
    complex_A: bool = False
    dtypes: dict = field(default_factory=dict)  # argument -> dtype, where it is not u's
    layout: str = "contiguous"
    values: str = "normal"

    @property
    def flags(self):
        return {"delta_softplus": self.delta_softplus, "reverse": self.reverse}


# Interpreted kernels cost milliseconds per step and program: one or two programs, few steps.
LENGTHS = [ScanCase(f"length-{n}", seqlen=n, dim=4, dstate=2) for n in (1, 2, 3, 7, 16, 31, 33)]
LENGTHS += [ScanCase(f"length-{n}", seqlen=n, dim=4, dstate=2) for n in (48, 49, 50, 63, 64, 65)]
LONG = [ScanCase(f"length-{n}", seqlen=n, dim=4, dstate=2) for n in (127, 128, 129, 195, 196, 197)]
LONG += [ScanCase(f"length-{n}", seqlen=n, dim=4, dstate=1) for n in (255, 256, 257, 1023, 1025)]
# Too long for the interpreter; the torch backend and a GPU take them.
LONGER = [ScanCase(f"length-{n}", seqlen=n, dim=4, dstate=2) for n in (1024, 3136)]
STATES = [ScanCase(f"dstate-{n}", dstate=n, seqlen=6) for n in (1, 2, 3, 4, 8, 16, 17, 64)]
SHAPES = [
    ScanCase("two-blocks-and-a-mask", batch=2, dim=40, seqlen=5),
    ScanCase("one-full-block", dim=32, seqlen=7),
    ScanCase("wide-block-and-a-rest", batch=2, dim=72, seqlen=5),
    ScanCase("odd-rest", dim=67, seqlen=5, initial_state=True),
    ScanCase("groups-of-two-blocks", dim=74, groups=2, seqlen=5),
    ScanCase("groups", dim=36, groups=3, seqlen=5, dstate=3),
    ScanCase("groups-wide-states", dim=12, groups=2, seqlen=3, dstate=17),
    ScanCase("one-group", groups=1, seqlen=5),
]
MODES = [
    ScanCase("const-B", batch=2, const_B=True),
    ScanCase("const-C", batch=2, const_C=True),
    ScanCase("const-BC", batch=2, const_B=True, const_C=True),
    ScanCase("const-B-wide-states", const_B=True, dstate=17, seqlen=4),
    ScanCase("const-B-groups-C", const_B=True, groups=2),
    ScanCase("z", z=True),
    ScanCase("no-D", without=("D",)),
    ScanCase("no-bias", without=("delta_bias",)),
    ScanCase("bare", without=("D", "delta_bias"), delta_softplus=False),
    ScanCase("no-softplus-with-bias", delta_softplus=False),
    ScanCase("initial-state", batch=2, initial_state=True),
    ScanCase("reverse", reverse=True),
    ScanCase("reverse-everything", batch=2, reverse=True, initial_state=True, z=True, groups=2),
    ScanCase("everything-7", seqlen=14, initial_state=True, z=True, groups=2),
    ScanCase("everything-wide", seqlen=3, dstate=24, initial_state=True, z=True, reverse=True),
]
# What the backward pass sums over several programs. Above 16 states blocks have 4 channels.
SUMMED = [
    ScanCase("entries", batch=5, dim=4, dstate=2),
    ScanCase("entries-const-C", batch=3, dim=4, dstate=2, const_C=True),
    ScanCase("10-blocks", seqlen=2, dim=300, dstate=1),
    ScanCase("16-blocks", seqlen=2, dim=64, dstate=17),
    ScanCase("9-blocks-a-group", batch=2, seqlen=2, dim=72, groups=2, dstate=17),
    ScanCase("groups-of-B", batch=2, seqlen=3, dim=36, groups=3, dstate=17, ungrouped="C"),
    ScanCase("groups-of-C", batch=2, seqlen=3, dim=36, groups=3, dstate=17, ungrouped="B"),
]
LAYOUTS = [
    ScanCase(f"layout-{layout}", batch=2, z=True, layout=layout)
    for layout in ("transposed", "sliced", "offset", "nan-surrounded", "sequence-first")
]
VALUES = [
    ScanCase("softplus-extremes", seqlen=10, dstate=2, values="softplus-extremes"),
    ScanCase("underflow", values="underflow"),
    ScanCase("positive-A", values="positive-A"),
    ScanCase("large-u", values="large-u"),
    ScanCase("large-delta", z=True, values="large-delta"),
]
# To round the exponent of a state of e^80 costs 80 units, more than TOLERANCES grants; compared is
# where each result overflows.
OVERFLOWS = [
    ScanCase("overflow", seqlen=20, dim=6, dstate=3, groups=3, values="overflow"),
    ScanCase("overflow-reverse", seqlen=20, dim=6, dstate=3, initial_state=True, reverse=True,
             values="overflow"),
]  # fmt: skip
MIXED = [
    ScanCase("half-u-single-rest", dtypes={"delta": SINGLE, "B": SINGLE, "C": SINGLE}, z=True),
    ScanCase("half-delta-single-u", dtypes={"u": SINGLE, "z": SINGLE}, z=True),
]
COMPLEX = [
    ScanCase("complex", batch=2, complex_A=True, z=True, initial_state=True),
    ScanCase("complex-const-B", complex_A=True, const_B=True),
    ScanCase("complex-groups-reverse", complex_A=True, groups=2, reverse=True),
]
# What a kernel's two program shapes and both chunk lengths see in the 16-bit dtypes.
NARROW = [
    case
    for case in SHAPES + MODES + STATES + VALUES
    if case.name
    in (
        "two-blocks-and-a-mask",
        "everything-7",
        "everything-wide",
        "dstate-8",
        "softplus-extremes",
        "large-u",
        "large-delta",
    )
]


def ids(cases):
    return [case.name for case in cases]


def _normal(generator, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=generator).to(dtype)


def _lay_out(x, layout):
    """The same values (batch, seqlen, dim) in another place of memory. A copy to another device
    would be contiguous, so this comes last."""
    batch, seqlen, dim = x.shape
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        return torch.cat([torch.full_like(x, torch.nan), x], dim=-1)[..., dim:]
    if layout == "offset":
        return torch.cat([x.new_full((3,), torch.nan), x.flatten()])[3:].view(x.shape)
    if layout == "sequence-first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "nan-surrounded":
        return nan_surrounded(x)
    return x


def nan_surrounded(x):
    """x inside a buffer of NaN: reading outside shows."""
    big = x.new_full([n + 2 for n in x.shape], torch.nan)
    inside = big[tuple(slice(1, -1) for _ in x.shape)]
    return inside.copy_(x)


def scan_inputs(case, dtype=torch.float32, device="cpu", seed=0):
    """The tensors of a call, by argument name. A, D, delta_bias and initial_state are float32, as
    a model keeps them."""
    g = torch.Generator().manual_seed(seed)
    b, n, d, N = case.batch, case.seqlen, case.dim, case.dstate
    state = torch.complex64 if case.complex_A else torch.float32

    def values(*shape):
        real = _normal(g, *shape)
        return torch.complex(real, _normal(g, *shape)) if case.complex_A else real

    def by_step(name):
        grouped = case.groups and name != case.ungrouped
        return values(b, n, case.groups, N) if grouped else values(b, n, N)

    A = -0.1 - 2 * torch.rand(d, N, generator=g)
    tensors = {
        "u": _normal(g, b, n, d, dtype=dtype),
        "delta": (0.5 * _normal(g, b, n, d)).to(dtype),
        "A": torch.complex(A, _normal(g, d, N)) if case.complex_A else A,
        "B": values(d, N) if case.const_B else by_step("B"),
        "C": values(d, N) if case.const_C else by_step("C"),
        "D": _normal(g, d),
        "delta_bias": _normal(g, d),
    }
    if not case.complex_A:
        tensors["B"], tensors["C"] = tensors["B"].to(dtype), tensors["C"].to(dtype)
    if not case.delta_softplus:
        tensors["delta"] = tensors["delta"].abs()
        tensors["delta_bias"] = tensors["delta_bias"].abs()
    if case.z:
        tensors["z"] = _normal(g, b, n, d, dtype=dtype)
    if case.initial_state:
        tensors["initial_state"] = values(b, d, N).to(state)
    if case.values == "softplus-extremes":
        x = torch.tensor([-100, -30, -15, 0, 19.9, 20, 20.1, 88, 100, 1e4], dtype=dtype)
        tensors["delta"] = x[None, :, None].expand(b, n, d).contiguous()
        tensors["delta_bias"] = torch.zeros(d)
        tensors["A"] = tensors["A"] * 0.01
        # At dt = 1e4 one u of ordinary size would drown every other step of the sums
        tensors["u"] = tensors["u"] * (1 / (1 + x.float().clamp(min=0)))[None, :, None].to(dtype)
    if case.values == "underflow":
        tensors["A"] = tensors["A"] * 1e4
    if case.values == "positive-A":
        tensors["A"] = tensors["A"].abs() * 0.5
    if case.values == "overflow":
        tensors["A"] = tensors["A"].abs() * 20
    if case.values == "large-delta":
        tensors["delta"] = 65504.0 * torch.sign(tensors["delta"])
        # Keeps y and dB within float16; du, which is free of u, overflows in places
        tensors["u"] = 1e-3 * tensors["u"]
    if case.values == "large-u" and dtype == torch.float16:
        tensors["u"] = 65504.0 * torch.sign(tensors["u"])
        for name in ("B", "C"):
            tensors[name] = tensors[name] * 1e-4
        tensors["D"] = tensors["D"].clamp(-0.5, 0.5)
    for name, other in case.dtypes.items():
        tensors[name] = tensors[name].to(other)
    for name in case.without:
        del tensors[name]
    tensors = {name: x.to(device) for name, x in tensors.items()}
    for name in ("u", "delta", "z"):
        if name in tensors:
            tensors[name] = _lay_out(tensors[name], case.layout)
    if case.layout == "nan-surrounded":
        tensors = {name: nan_surrounded(x) for name, x in tensors.items()}
    return tensors


def scan_output_grads(case, tensors, seed=1):
    g = torch.Generator().manual_seed(seed)
    u, A = tensors["u"], tensors["A"]
    dlast_state = _normal(g, u.shape[0], *A.shape)
    if case.complex_A:
        dlast_state = torch.complex(dlast_state, _normal(g, u.shape[0], *A.shape))
    if case.values == "large-u":
        # dB holds its product with u, and must fit float16
        dlast_state = 1e-4 * dlast_state
    return _normal(g, *u.shape).to(u), dlast_state.to(u.device)


def scan_results(op, tensors, flags, dy, dlast_state):
    """y, last_state and every gradient of an autograd-aware op, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    y, last_state = op(**leaves, **flags, return_last_state=True)
    torch.autograd.backward([y, last_state], [dy, dlast_state.to(last_state.dtype)])
    return {"y": y, "last_state": last_state} | {f"d{k}": v.grad for k, v in leaves.items()}


def in_double(x):
    """An argument in float64 or complex128: a tensor, a tuple with tensors, or anything else."""
    if isinstance(x, tuple):
        return tuple(map(in_double, x))
    if not isinstance(x, torch.Tensor):
        return x
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def scan_oracle(tensors, flags, dy, dlast_state, double=False):
    """The same by the reference, in the tensors' own dtypes or in float64."""
    if double:
        tensors = {name: in_double(x) for name, x in tensors.items()}
        dy, dlast_state = in_double(dy), in_double(dlast_state)
    y, last_state = reference.selective_scan(**tensors, **flags, return_last_state=True)
    grads = reference.selective_scan_backward(dy, **tensors, **flags, dlast_state=dlast_state)
    found = {name: grad for name, grad in grads._asdict().items() if grad is not None}
    return {"y": y, "last_state": last_state} | found


@dataclass(frozen=True)
class ConvCase:
    name: str
    batch: int = 2
    seqlen: int = 7
    dim: int = 9
    width: int = 3
    bias: bool = True
    activation: bool = True
    layout: str = "contiguous"


CONVS = [ConvCase(f"width-{n}", width=n) for n in (1, 2, 3, 4, 5)]
CONVS += [
    ConvCase("wider-than-the-sequence", seqlen=3, width=8),
    ConvCase("one-step", seqlen=1),
    ConvCase("no-bias", bias=False),
    ConvCase("no-activation", activation=False),
    ConvCase("blocks-span-sequences", batch=5, seqlen=33, dim=70),
    ConvCase("sliced", layout="sliced"),
    ConvCase("transposed", layout="transposed"),
    ConvCase("nan-surrounded", layout="nan-surrounded"),
]


def conv_inputs(case, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    tensors = {
        "x": _normal(g, case.batch, case.seqlen, case.dim, dtype=dtype),
        "weight": _normal(g, case.dim, case.width),
    }
    if case.bias:
        tensors["bias"] = _normal(g, case.dim)
    tensors = {name: x.to(device) for name, x in tensors.items()}
    return tensors | {"x": _lay_out(tensors["x"], case.layout)}


@dataclass(frozen=True)
class MixerCase:
    name: str
    batch: int = 1
    seqlen: int = 9
    dim: int = 20
    dstate: int = 8
    dt_rank: int = 3
    width: int = 3
    bias: bool = False
    layout: str = "contiguous"


MIXERS = [
    MixerCase("published"),
    MixerCase("two-sequences", batch=2, seqlen=7, dim=40),
    MixerCase("width-4-bias", width=4, bias=True, dstate=4),
    MixerCase("one-step", batch=2, seqlen=1, dt_rank=1, dstate=1),
    MixerCase("wide-projection", seqlen=3, dim=8, dt_rank=120, dstate=8),
    MixerCase("transposed", layout="transposed"),
]


def mixer_inputs(case, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    d, N, R = case.dim, case.dstate, case.dt_rank
    tensors = {
        "xz": _normal(g, case.batch, case.seqlen, 2 * d, dtype=dtype),
        "conv_x_weight": 0.6 * _normal(g, d, 1, case.width),
        "conv_z_weight": 0.6 * _normal(g, d, 1, case.width),
        "x_proj_weight": _normal(g, R + 2 * N, d) / d**0.5,
        "dt_proj_weight": _normal(g, d, R) / R**0.5,
        "A": -0.1 - 2 * torch.rand(d, N, generator=g),
        "D": _normal(g, d),
        "delta_bias": _normal(g, d),
    }
    if case.bias:
        tensors["conv_x_bias"], tensors["conv_z_bias"] = _normal(g, d), _normal(g, d)
    tensors = {name: x.to(device) for name, x in tensors.items()}
    return tensors | {"xz": _lay_out(tensors["xz"], case.layout)}


def results(op, tensors, grad, **flags):
    """Output and every gradient of an autograd-aware op with one output, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out = op(**leaves, **flags)
    out.backward(grad)
    return {"out": out} | {f"d{name}": x.grad for name, x in leaves.items()}


def oracle(name, tensors, grad, double=False, **flags):
    """The same by the reference's op and hand-written backward of that name."""
    if double:
        tensors = {key: in_double(x) for key, x in tensors.items()}
        grad = in_double(grad)
    out = getattr(reference, name)(**tensors, **flags)
    grads = getattr(reference, f"{name}_backward")(grad, **tensors, **flags)
    found = {key: value for key, value in grads._asdict().items() if value is not None}
    return {"out": out} | found


def assert_close(found, oracle, exact, inner=None, tolerances=TOLERANCES):
    """The rule of the module docstring, for dicts of tensors under the same names. `inner` is the
    dtype to which an op rounds tensors inside it; then that of the result is not the measure."""
    assert found.keys() == exact.keys(), f"have {set(found)}, expected {set(exact)}"
    for name, wanted in exact.items():
        value, own = found[name], oracle[name]
        assert value is not None, f"{name} is missing"
        assert value.shape == wanted.shape, f"{name}: shape {value.shape}, not {wanted.shape}"
        dtype = inner or (value.real.dtype if value.is_complex() else value.dtype)
        finite = torch.isfinite(own)
        same = torch.equal(torch.isfinite(value), finite)
        assert same, f"{name} is not finite exactly where the reference is"
        value, own, wanted = (in_double(x.detach())[finite] for x in (value, own, wanted))
        if wanted.numel() == 0:
            continue
        scale = _largest(wanted)
        allowed = 2 * _largest(own - wanted) + tolerances[dtype] * scale
        error = _largest(value - wanted)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} ({scale=:.3g})"


def _largest(x):
    return x.abs().max().item()

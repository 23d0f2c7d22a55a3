"""mambavision/torch_backend against the reference: values and every gradient, by name."""

import importlib
from dataclasses import replace
from math import ceil

import pytest
import torch
from cases import (
    BRAIN,
    COMPLEX,
    CONVS,
    HALF,
    LAYOUTS,
    LENGTHS,
    LONG,
    LONGER,
    MIXED,
    MIXERS,
    MODES,
    SHAPES,
    SINGLE,
    STATES,
    VALUES,
    ScanCase,
    assert_close,
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mambavision import torch_backend

# The package's function of the same name hides the module.
scan_module = importlib.import_module("mambavision.torch_backend.selective_scan")

# How the work is cut: chunks one after another, all side by side, two at a time, and in blocks of
# one batch entry.
PLANS = {
    "in-turn": {"ALONE_ELEMENTS": 1},
    "side-by-side": {"ALONE_ELEMENTS": 1 << 40, "GROUP_ELEMENTS": 1 << 40},
    "blocks": {"ALONE_ELEMENTS": 1 << 40, "GROUP_ELEMENTS": 1, "BLOCK_ELEMENTS": 1},
}
DOUBLE = torch.float64
DTYPES = {"float16": HALF, "bfloat16": BRAIN, "float32": SINGLE, "float64": DOUBLE}
CASES = SHAPES + MODES + STATES + LENGTHS + LONG + LAYOUTS + VALUES + COMPLEX
# In float64 the reference is its own exact result, which leaves the rule its epsilon alone: not
# enough for sums over a thousand steps or states that grow a millionfold (nor can float16 hold
# those).
GROWING = ("positive-A", "overflow")
TAME = [case for case in CASES if case not in LONG and case.values not in GROWING]


@pytest.fixture(params=PLANS)
def plan(request, monkeypatch):
    set_plan(request.param, monkeypatch)


def set_plan(name, monkeypatch):
    for key, value in PLANS[name].items():
        monkeypatch.setattr(scan_module, key, value)


def as_double(x):
    return torch.complex128 if x.is_complex() else DOUBLE


def run(case, dtype):
    """Results of the scan, the reference's in that dtype, and its exact ones."""
    tensors = scan_inputs(case, dtype)
    if dtype == DOUBLE:
        tensors = {k: x.to(as_double(x)) for k, x in tensors.items()}
    before = {name: x.clone() for name, x in tensors.items()}
    grads = scan_output_grads(case, tensors)
    found = scan_results(torch_backend.selective_scan, tensors, case.flags, *grads)
    for name, x in tensors.items():
        torch.testing.assert_close(x, before[name], rtol=0, atol=0, msg=f"{name} was modified")
        assert found[f"d{name}"].dtype == x.dtype, f"d{name} has dtype {found[f'd{name}'].dtype}"
    assert found["y"].dtype == tensors["u"].dtype
    own = scan_oracle(tensors, case.flags, *grads)
    assert found["last_state"].dtype == own["last_state"].dtype
    return found, own, scan_oracle(tensors, case.flags, *grads, double=True)


def check(case, dtype=SINGLE):
    assert_close(*run(case, dtype))


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_scan_float32(case, plan):
    check(case)


@pytest.mark.parametrize("case", LONGER, ids=ids(LONGER))
def test_scan_longer(case):
    check(case)


@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float64"))
@pytest.mark.parametrize("case", TAME, ids=ids(TAME))
def test_scan_dtypes(case, dtype):
    check(case, DTYPES[dtype])


@pytest.mark.parametrize("case", MIXED, ids=ids(MIXED))
def test_scan_mixed_dtypes(case):
    check(case, HALF)


@pytest.mark.parametrize("batch", (3, 9))
def test_scan_model_sizes(batch):
    """The stage-3 shape of MambaVision-T; the plan is the one that users get."""
    check(ScanCase("", batch=batch, seqlen=49, dim=160, dstate=8))


@pytest.mark.parametrize("case", CONVS, ids=ids(CONVS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_conv1d_silu(case, dtype):
    tensors = conv_inputs(case, DTYPES[dtype])
    grad = torch.randn_like(tensors["x"])
    flags = {"activation": case.activation}
    found = results(torch_backend.conv1d_silu, tensors, grad, **flags)
    for name, x in tensors.items():
        assert found[f"d{name}"].dtype == x.dtype and found[f"d{name}"].shape == x.shape
    own = oracle("conv1d_silu", tensors, grad, **flags)
    assert_close(found, own, oracle("conv1d_silu", tensors, grad, double=True, **flags))


@pytest.mark.parametrize("case", MIXERS, ids=ids(MIXERS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixer(case, dtype):
    tensors = mixer_inputs(case, DTYPES[dtype])
    grad = torch.randn_like(tensors["xz"])
    found = results(torch_backend.mixer, tensors, grad)
    for name, x in tensors.items():
        assert found[f"d{name}"].dtype == x.dtype and found[f"d{name}"].shape == x.shape
    own = oracle("mixer", tensors, grad)
    assert_close(found, own, oracle("mixer", tensors, grad, double=True), inner=DTYPES[dtype])


# Laws that hold for any shape, stride, dtype and mode


@st.composite
def scan_cases(draw):
    groups = draw(st.sampled_from((0, 1, 2, 3)))
    const_B, const_C = draw(st.booleans()), draw(st.booleans())
    return ScanCase(
        "drawn",
        batch=draw(st.integers(1, 3)),
        seqlen=draw(st.integers(1, 40)),
        dim=max(1, groups) * draw(st.integers(1, 4)),
        dstate=draw(st.integers(1, 5)),
        groups=groups,
        const_B=const_B,
        const_C=const_C,
        without=tuple(draw(st.sets(st.sampled_from(("D", "delta_bias"))))),
        z=draw(st.booleans()),
        initial_state=draw(st.booleans()),
        delta_softplus=draw(st.booleans()),
        reverse=draw(st.booleans()),
        complex_A=draw(st.booleans()),
        layout=draw(st.sampled_from(("contiguous", "transposed", "sliced", "sequence-first"))),
    )


LAW = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@LAW
@given(scan_cases(), st.sampled_from(tuple(DTYPES)), st.sampled_from(tuple(PLANS)))
def test_any_scan(monkeypatch, case, dtype, plan):
    """Sums of a hundred terms may cancel, so the rule's epsilon, which knows only the result, is
    not enough for every draw: 64 roundings of the arithmetic, and two of the result."""
    with monkeypatch.context() as patch:
        set_plan(plan, patch)
        found, _, exact = run(case, DTYPES[dtype])
    inside = DOUBLE if dtype == "float64" else SINGLE
    allowed = 64 * torch.finfo(inside).eps / 2 + torch.finfo(DTYPES[dtype]).eps
    assert found.keys() == exact.keys()
    for name, x in exact.items():
        assert found[name].shape == x.shape
        error = (found[name].detach().to(x.dtype) - x).abs().amax()
        assert error <= allowed * x.abs().amax(), name


def double_inputs(case, seed=0):
    tensors = scan_inputs(replace(case, layout="contiguous"), DOUBLE, seed=seed)
    return {k: x.to(as_double(x)) for k, x in tensors.items()}


def scan(case, tensors, **flags):
    flags = case.flags | {"return_last_state": True} | flags
    return torch_backend.selective_scan(**tensors, **flags)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


SEQUENCES = ("u", "delta", "B", "C", "z")


def over_time(case, tensors, change):
    """The arguments with `change` applied to whatever has a time axis."""
    constant = {"B": case.const_B, "C": case.const_C}
    moving = [k for k in SEQUENCES if k in tensors and not constant.get(k)]
    return tensors | {k: change(tensors[k]) for k in moving}


@LAW
@given(scan_cases())
def test_linear_in_u_and_state(case):
    tensors = double_inputs(replace(case, initial_state=True))
    others = double_inputs(replace(case, initial_state=True), seed=1)
    both = {"u": others["u"], "initial_state": others["initial_state"]}
    y, h = scan(case, tensors)
    y_other, h_other = scan(case, tensors | both)
    mixed = {k: 2 * tensors[k] - 3 * x for k, x in both.items()}
    y_mixed, h_mixed = scan(case, tensors | mixed)
    assert_same(y_mixed, 2 * y - 3 * y_other)
    assert_same(h_mixed, 2 * h - 3 * h_other)


@LAW
@given(scan_cases())
def test_reverse_is_a_flip(case):
    tensors = double_inputs(case)
    y, h = scan(case, tensors)
    flipped = over_time(case, tensors, lambda x: x.flip(1))
    y_flipped, h_flipped = scan(case, flipped, reverse=not case.reverse)
    assert_same(y_flipped.flip(1), y)
    assert_same(h_flipped, h)


@LAW
@given(scan_cases(), st.integers(1, 39))
def test_two_parts_with_the_state_handed_over_equal_the_whole(case, cut):
    cut = min(cut, case.seqlen - 1)
    if cut < 1:
        return
    tensors = double_inputs(case)
    y, h = scan(case, tensors)
    times = slice(cut), slice(cut, None)
    parts = [over_time(case, tensors, lambda x, time=time: x[:, time]) for time in times]
    ys, state = [None, None], tensors.get("initial_state")
    for i in (1, 0) if case.reverse else (0, 1):
        ys[i], state = scan(case, parts[i] | {"initial_state": state})
    assert_same(torch.cat(ys, 1), y)
    assert_same(state, h)


@LAW
@given(scan_cases(), st.integers(1, 17))
def test_any_chunk_length_gives_the_same(monkeypatch, case, length):
    tensors = double_inputs(case)
    grads = scan_output_grads(case, tensors)
    with monkeypatch.context() as patch:
        set_plan("side-by-side", patch)
        patch.setattr(scan_module, "chunk_length", lambda seqlen: length)
        found = scan_results(torch_backend.selective_scan, tensors, case.flags, *grads)
    set_plan("in-turn", monkeypatch)
    expected = scan_results(torch_backend.selective_scan, tensors, case.flags, *grads)
    for name, x in expected.items():
        assert_same(found[name], x)


# What a fast path could get wrong


@pytest.mark.parametrize("reverse", (False, True))
def test_a_chunk_whose_decay_overflows(reverse, monkeypatch):
    """In channel 0, exp(8) per step is exp(112) over a chunk, inf in float32. Only zeros enter its
    chunks, so states and gradients are finite all the same, and inf * 0 would make them NaN."""
    set_plan("side-by-side", monkeypatch)
    first, last = (27, 0) if reverse else (0, 27)
    tensors = scan_inputs(ScanCase("", seqlen=28, dim=3, dstate=2, without=("delta_bias", "D")))
    dy, dlast_state = torch.randn(1, 28, 3), torch.randn(1, 3, 2)
    tensors["A"][0], tensors["delta"][..., 0], dlast_state[:, 0] = 8.0, 1.0, 0.0
    for x, t in ((tensors["u"], last), (dy, first)):
        x[..., 0] = 0.0
        x[:, t, 0] = 1.0
    flags = {"delta_softplus": False, "reverse": reverse}
    grads = dy, dlast_state
    found = scan_results(torch_backend.selective_scan, tensors, flags, *grads)
    for name, x in scan_oracle(tensors, flags, *grads).items():
        assert x.isfinite().all(), name
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-4, msg=name)


def test_kept_states_are_few():
    """One state per chunk, not per step."""
    for seqlen in (1, 7, 49, 64, 196, 197, 256, 1024, 3136):
        _, chunks, dstate, dim = torch_backend.states_shape(2, seqlen, 5, 3)
        length = scan_module.chunk_length(seqlen)
        assert (dstate, dim) == (3, 5) and chunks == ceil(seqlen / length)
        assert chunks <= seqlen / 7 + 1


def test_backward_memory_is_bounded(monkeypatch):
    """No tensor made by a backward pass is as large as u, though all states are 16 times that."""
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    set_plan("blocks", monkeypatch)
    case = ScanCase("", batch=8, seqlen=392, dim=64, dstate=16)
    tensors = scan_inputs(case)
    inputs = [tensors.get(k) for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    *_, states = torch_backend.selective_scan_fwd(*inputs, None, True, False, True)
    with Sizes():
        torch_backend.selective_scan_bwd(inputs[0], None, *inputs, None, states, True, False)
    assert 0 < largest <= inputs[0].numel()
    assert states.numel() == 8 * 28 * 64 * 16


@pytest.mark.parametrize("plan_name", PLANS)
def test_same_bits_every_time(plan_name, monkeypatch):
    set_plan(plan_name, monkeypatch)
    case = ScanCase("", batch=3, seqlen=49, dim=24, dstate=8)
    tensors = scan_inputs(case)
    grads = scan_output_grads(case, tensors)
    first = scan_results(torch_backend.selective_scan, tensors, case.flags, *grads)
    for _ in range(3):
        again = scan_results(torch_backend.selective_scan, tensors, case.flags, *grads)
        assert all(torch.equal(x, again[name]) for name, x in first.items())

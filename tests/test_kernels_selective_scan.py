"""kernels/selective_scan.py against the reference: values and every gradient, by name."""

import importlib

import pytest
import torch
from cases import (
    BRAIN,
    HALF,
    INTERPRETED,
    LAYOUTS,
    LENGTHS,
    LONG,
    LONGER,
    MIXED,
    MODES,
    NARROW,
    SHAPES,
    STATES,
    SUMMED,
    TOLERANCES,
    VALUES,
    ScanCase,
    assert_close,
    ids,
    nan_surrounded,
    scan_inputs,
    scan_oracle,
    scan_output_grads,
    scan_results,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mambavision import reference

kernels = pytest.importorskip("mambavision.kernels", reason="needs Triton")
module = importlib.import_module("mambavision.kernels.selective_scan")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = SHAPES + MODES + STATES + LENGTHS + LAYOUTS + VALUES


def check(case, dtype=torch.float32, seed=0):
    tensors = scan_inputs(case, dtype, DEVICE, seed)
    before = {name: x.clone() for name, x in tensors.items()}
    grads = scan_output_grads(case, tensors)
    found = scan_results(kernels.selective_scan, tensors, case.flags, *grads)
    for name, x in tensors.items():
        torch.testing.assert_close(x, before[name], rtol=0, atol=0, msg=f"{name} was modified")
        assert found[f"d{name}"].dtype == x.dtype, f"d{name} has dtype {found[f'd{name}'].dtype}"
    assert found["y"].dtype == tensors["u"].dtype
    own = scan_oracle(tensors, case.flags, *grads)
    exact = scan_oracle(tensors, case.flags, *grads, double=True)
    assert_close(found, own, exact, tolerances=TOLERANCES if DEVICE == "cuda" else INTERPRETED)


@pytest.mark.parametrize("case", FAST, ids=ids(FAST))
def test_float32(case):
    check(case)


@pytest.mark.parametrize("case", SUMMED, ids=ids(SUMMED))
def test_sums_over_programs(case, monkeypatch):
    """In blocks so small that few entries and rows fill several."""
    monkeypatch.setattr(module, "SUMS", {**module.SUMS, "ENTRIES": 2, "ROWS": 4})
    check(case)


@pytest.mark.slow
def test_sums_over_more_entries_and_rows_than_a_block():
    case = ScanCase("", batch=65, seqlen=2, dim=2, dstate=1)
    assert case.batch > module.SUMS["ENTRIES"] and case.batch * case.seqlen > module.SUMS["ROWS"]
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG, ids=ids(LONG))
def test_long(case):
    check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", LONGER, ids=ids(LONGER))
def test_longer(case):
    check(case)


@pytest.mark.parametrize("case", NARROW, ids=ids(NARROW))
@pytest.mark.parametrize("dtype", (HALF, BRAIN), ids=("float16", "bfloat16"))
def test_16_bit(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("case", MIXED, ids=ids(MIXED))
def test_mixed_dtypes(case):
    check(case, HALF)


def str_of_config(config):
    return "x".join(map(str, (*config.STEPS, config.BLOCK_D, config.LANES, config.SPLIT)))


def different(table):
    """The lines for 8 states, but for those that differ in nothing but which calls they serve."""
    return list({str_of_config(c): c for c in table if c.dstate == 8}.values())


@pytest.fixture
def config(request, monkeypatch):
    """Every forward pass by this line of this table, however long and wide it is."""
    table, line = request.param
    wide = [c for c in getattr(module, table) if c.dstate > 8]
    line = line._replace(seqlen=module.ANY, channels=module.ANY, itemsize=module.ANY)
    monkeypatch.setattr(module, table, (line, *wide))
    module._forward_constants.cache_clear()
    yield line
    module._forward_constants.cache_clear()


def each_line(name):
    lines = [(name, line) for line in different(getattr(module, name))]
    return pytest.mark.parametrize(
        "config", lines, ids=lambda given: str_of_config(given[1]), indirect=True
    )


WITHOUT_GRADIENTS = FAST + [case for case in LONG if case.seqlen in (128, 196, 197)]


def check_forward(case, dtype=torch.float32):
    tensors = scan_inputs(case, dtype, DEVICE)
    found, own, exact = (
        dict(zip(("y", "last_state"), op(**x, **case.flags, return_last_state=True), strict=True))
        for op, x in (
            (kernels.selective_scan, tensors),
            (reference.selective_scan, tensors),
            (reference.selective_scan, {name: x.double() for name, x in tensors.items()}),
        )
    )
    assert_close(found, own, exact, tolerances=TOLERANCES if DEVICE == "cuda" else INTERPRETED)


@each_line("FORWARD")
@pytest.mark.parametrize("case", WITHOUT_GRADIENTS, ids=ids(WITHOUT_GRADIENTS))
def test_without_gradients(case, config):
    check_forward(case)


@each_line("FORWARD")
@pytest.mark.parametrize("dtype", (HALF, BRAIN), ids=("float16", "bfloat16"))
def test_16_bit_without_gradients(dtype, config):
    check_forward(ScanCase("", batch=2, dim=72, seqlen=33), dtype)


@each_line("KEEPING")
@pytest.mark.parametrize("case", SHAPES, ids=ids(SHAPES))
def test_with_gradients(case, config):
    check(case)
    if case.dstate <= 8:
        constants = module._forward_constants(1, case.seqlen, case.dim, 1, case.dstate, 4, True)
        assert constants[:2] == (*config.STEPS, config.BLOCK_D)


@each_line("FORWARD")
@pytest.mark.parametrize("A", (2.0, -2.0))
def test_no_state_stays_none_where_decays_overflow(A, config):
    """Twice 100 steps of size 1: exp(200) is no float32, and nothing to multiply by it is there."""
    u = torch.zeros(1, 200, 4, device=DEVICE)
    B = torch.ones(1, 200, 2, device=DEVICE)
    delta, states = torch.ones_like(u), torch.full((4, 2), A, device=DEVICE)
    y, h = kernels.selective_scan(u, delta, states, B, B, return_last_state=True)
    assert not y.any() and not h.any()


def scan(tensors, **flags):
    flags = {"delta_softplus": True, "return_last_state": True} | flags
    return kernels.selective_scan(**tensors, **flags)


def test_two_halves_with_the_state_handed_over_equal_the_whole():
    case = ScanCase("", seqlen=11, dim=5, dstate=3)
    tensors = scan_inputs(case, device=DEVICE)
    y, h = scan(tensors)
    whole = {k: x for k, x in tensors.items() if x.dim() < 3}
    y1, h1 = scan(whole | {k: x[:, :4] for k, x in tensors.items() if x.dim() == 3})
    second = {k: x[:, 4:] for k, x in tensors.items() if x.dim() == 3}
    y2, h2 = scan(whole | second, initial_state=h1)
    torch.testing.assert_close(torch.cat([y1, y2], 1), y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(h2, h, rtol=1e-6, atol=1e-6)


def test_gradients_stop_at_the_hand_over_only_where_detached():
    """Gradients through last_state and initial_state together are those of the whole scan."""
    case = ScanCase("", seqlen=10, dim=5, dstate=3)
    tensors = scan_inputs(case, device=DEVICE)
    u = tensors["u"].requires_grad_()
    rest = {k: x for k, x in tensors.items() if k != "u"}
    scan({"u": u} | rest)[0].square().sum().backward()
    whole, u.grad = u.grad, None
    fixed = {k: x for k, x in rest.items() if x.dim() < 3}
    y1, h1 = scan(fixed | {k: tensors[k][:, :4] for k in ("u", "delta", "B", "C")})
    second = {k: tensors[k][:, 4:] for k in ("u", "delta", "B", "C")}
    y2, _ = scan(fixed | second, initial_state=h1)
    (y1.square().sum() + y2.square().sum()).backward()
    torch.testing.assert_close(u.grad, whole, rtol=1e-5, atol=1e-5)


def test_linear_in_u():
    case = ScanCase("", seqlen=9, dim=5, dstate=3)
    tensors = scan_inputs(case, device=DEVICE)
    v = torch.randn_like(tensors["u"])
    y, _ = scan(tensors)
    y_v, _ = scan(tensors | {"u": v})
    y_sum, _ = scan(tensors | {"u": 2 * tensors["u"] - 3 * v})
    torch.testing.assert_close(y_sum, 2 * y - 3 * y_v, rtol=1e-5, atol=1e-5)


def test_reversal_is_a_flip():
    case = ScanCase("", seqlen=9, dim=5, dstate=3)
    tensors = scan_inputs(case, device=DEVICE)
    flipped = {k: x.flip(1) if x.dim() == 3 else x for k, x in tensors.items()}
    y, h = scan(tensors, reverse=True)
    y2, h2 = scan(flipped)
    torch.testing.assert_close(y, y2.flip(1), rtol=0, atol=0)
    torch.testing.assert_close(h, h2, rtol=0, atol=0)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_case(data):
    draw = data.draw
    groups = draw(st.sampled_from((0, 1, 2, 3)))
    case = ScanCase(
        "drawn",
        batch=draw(st.integers(1, 2)),
        seqlen=draw(st.integers(1, 10)),
        dim=draw(st.integers(1, 12)) * max(groups, 1),
        dstate=draw(st.integers(1, 20)),
        groups=groups,
        const_B=draw(st.booleans()),
        const_C=draw(st.booleans()),
        without=draw(st.sampled_from(((), ("D",), ("delta_bias",), ("D", "delta_bias")))),
        z=draw(st.booleans()),
        initial_state=draw(st.booleans()),
        delta_softplus=draw(st.booleans()),
        reverse=draw(st.booleans()),
        layout=draw(st.sampled_from(("contiguous", "transposed", "sliced", "offset"))),
    )
    check(case, draw(st.sampled_from((torch.float32, HALF))), draw(st.integers(0, 99)))


def test_expanded_output_gradient():
    """y.sum().backward() hands over a gradient of strides 0."""
    tensors = scan_inputs(ScanCase("", seqlen=5, batch=2), device=DEVICE)
    found = []
    for ones in (lambda y: y.sum().backward(), lambda y: y.backward(torch.ones_like(y))):
        leaves = {k: x.clone().requires_grad_() for k, x in tensors.items()}
        ones(kernels.selective_scan(**leaves, delta_softplus=True))
        found.append({k: x.grad for k, x in leaves.items()})
    for name in tensors:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=0, msg=name)


def test_same_bits_in_every_run():
    case = ScanCase("", batch=2, seqlen=9, dim=40)
    tensors = scan_inputs(case, device=DEVICE)
    grads = scan_output_grads(case, tensors)
    first, second = (
        scan_results(kernels.selective_scan, tensors, case.flags, *grads) for _ in range(2)
    )
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, msg=name)


def test_states_are_kept_only_for_a_backward_pass():
    tensors = scan_inputs(ScanCase("", seqlen=9), device=DEVICE)
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
    args = [tensors.get(name) for name in order]
    _, _, none = kernels.selective_scan_fwd(*args, True, False, False)
    _, _, kept = kernels.selective_scan_fwd(*args, True, False, True)
    assert none.numel() == 0
    assert kept.shape == kernels.states_shape(1, 9, 8, 8)
    assert torch.isfinite(kept).all()


def test_double_backward_raises():
    tensors = scan_inputs(ScanCase("", seqlen=3), device=DEVICE)
    u = tensors.pop("u").requires_grad_()
    y = kernels.selective_scan(u, **tensors, delta_softplus=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(y.sum(), u, create_graph=True)


def test_result_may_be_written_over_u():
    """As the mixer does: y goes where u came from, rows of a wider buffer."""
    tensors = scan_inputs(ScanCase("", seqlen=9), device=DEVICE)
    expected = kernels.selective_scan(**tensors, delta_softplus=True)
    buffer = nan_surrounded(tensors["u"])
    args = [buffer] + [tensors.get(k) for k in ("delta", "A", "B", "C", "D", "z", "delta_bias")]
    kernels.selective_scan_fwd(*args, None, True, False, False, y=buffer)
    torch.testing.assert_close(buffer, expected, rtol=0, atol=0)


@pytest.mark.gpu
def test_more_than_65535_batch_entries():
    case = ScanCase("", batch=70_000, seqlen=3, dim=4, dstate=2)
    check(case)


@pytest.mark.gpu
def test_more_than_2_31_elements():
    """The last rows are those of the same scan alone, forward and backward."""
    batch, seqlen, dim = 1030, 1024, 2048
    assert batch * seqlen * dim > 2**31
    u = torch.randn(batch, seqlen, dim, device=DEVICE, dtype=HALF)
    small = scan_inputs(ScanCase("", batch=1, seqlen=seqlen, dim=dim, dstate=1), HALF, DEVICE)
    shared = {k: small[k] for k in ("A", "D", "delta_bias")}
    rest = {k: small[k].expand(batch, *small[k].shape[1:]) for k in ("delta", "B", "C")}
    u.requires_grad_()
    y = kernels.selective_scan(u=u, **rest, **shared, delta_softplus=True)
    last = u[-1:].detach().clone().requires_grad_()
    rest_last = {k: small[k] for k in ("delta", "B", "C")}
    y_last = kernels.selective_scan(u=last, **rest_last, **shared, delta_softplus=True)
    torch.testing.assert_close(y[-1:], y_last, rtol=0, atol=0)
    dy = torch.randn(1, seqlen, dim, device=DEVICE, dtype=HALF)
    (du,) = torch.autograd.grad(y, u, dy.expand_as(y))
    (du_last,) = torch.autograd.grad(y_last, last, dy)
    torch.testing.assert_close(du[-1:], du_last, rtol=0, atol=0)

"""mambavision/ops: what the operators promise whichever backend runs them.

Values and gradients of the backends themselves are the matter of test_torch_backend.py and of
test_kernels_*.py; here stand the way through ops, the custom operators, and mamba-ssm's interface.
"""

import importlib
import json
from pathlib import Path

import pytest
import torch
from cases import (
    COMPLEX,
    MODES,
    ConvCase,
    MixerCase,
    ScanCase,
    conv_inputs,
    ids,
    mixer_inputs,
    results,
    scan_inputs,
    scan_oracle,
    scan_output_grads,
    scan_results,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import mambavision
from mambavision import ops

DATA = Path(__file__).parent / "data"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
custom = torch.ops.mambavision

SCAN = ScanCase("scan", batch=2, seqlen=9, dim=6, dstate=3, z=True, initial_state=True)
CONV = ConvCase("conv")
MIXER = MixerCase("mixer", batch=2, seqlen=7, dim=6, dstate=3, bias=True)
# On a CPU, "triton" is the interpreter, one small call of it.
BACKENDS = ("auto", "torch", pytest.param("triton", marks=pytest.mark.slow))


def example(op, dtype=torch.float32):
    """(function, tensors, flags) of a small call."""
    if op == "selective_scan":
        return ops.selective_scan, scan_inputs(SCAN, dtype, DEVICE), SCAN.flags
    if op == "conv1d_silu":
        return ops.conv1d_silu, conv_inputs(CONV, dtype, DEVICE), {}
    return ops.mixer, mixer_inputs(MIXER, dtype, DEVICE), {}


OPS = ("selective_scan", "conv1d_silu", "mixer")


def assert_equal(found, expected, rtol=0.0, atol=0.0):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=rtol, atol=atol, msg=prefixed(name))


def prefixed(name):
    return lambda message: f"{name}: {message}"


def run(op, dtype=torch.float32, wrap=lambda f: f, **flags):
    function, tensors, own = example(op, dtype)
    first = next(iter(tensors.values()))
    grad = torch.randn(first.shape, generator=torch.Generator().manual_seed(3)).to(first)
    return results(wrap(function), tensors, grad, **own, **flags)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_backends_agree(op, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    assert_equal(run(op, backend=backend), run(op, backend="torch"), rtol=1e-5, atol=1e-5)


def test_native_scan_is_the_reference():
    for case in (SCAN, *MODES[:3], *COMPLEX):
        tensors = scan_inputs(case)
        grads = scan_output_grads(case, tensors)
        found = scan_results(ops.selective_scan, tensors, case.flags, *grads)
        assert_equal(found, scan_oracle(tensors, case.flags, *grads), rtol=1e-5, atol=1e-5)


def test_return_last_state():
    tensors = scan_inputs(SCAN, torch.float16)
    for nothing in (None, False):
        assert isinstance(ops.selective_scan(**tensors, return_last_state=nothing), torch.Tensor)
    y, last_state = ops.selective_scan(**tensors, return_last_state=True)
    assert y.dtype == torch.float16 and last_state.dtype == torch.float32


# The custom operators: what torch.compile and torch.export see


def positional(op, backend="torch"):
    """Arguments of the custom operators, in their order: (forward, backward)."""
    _, tensors, flags = example(op)
    tensors = {k: x.detach().requires_grad_() for k, x in tensors.items()}
    if op == "conv1d_silu":
        inputs = (tensors["x"], tensors["weight"], tensors["bias"], True, backend)
        return inputs, (torch.randn_like(inputs[0]), *inputs)
    if op == "selective_scan":
        order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
        inputs = [tensors[k] for k in order]
        options = (flags["delta_softplus"], flags["reverse"])
        forward = (*inputs, *options, True, backend)
        y, last_state, states = (x.detach() for x in custom.selective_scan_fwd(*forward))
        return forward, (y, last_state, *inputs, states, *options, backend)
    inputs = list(tensors.values())
    forward = (*inputs, True, backend)
    yz, *kept = (x.detach() for x in custom.mixer_fwd(*forward))
    return forward, (yz, *inputs, *kept, backend)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    forward, backward = positional(op)
    torch.library.opcheck(getattr(custom, f"{op}_fwd"), forward)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in backward]
    torch.library.opcheck(getattr(custom, f"{op}_bwd"), detached)


@pytest.mark.parametrize("mode", ["bare", "complex", "const-BC", "reverse-everything"])
def test_opcheck_of_scan_modes(mode):
    case = next(case for case in MODES + COMPLEX if case.name == mode)
    tensors = scan_inputs(case, device=DEVICE)
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
    inputs = [tensors[k].requires_grad_() if k in tensors else None for k in order]
    options = (case.delta_softplus, case.reverse, True, "torch")
    torch.library.opcheck(custom.selective_scan_fwd, (*inputs, *options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_compile_equals_eager(op, dtype):
    def compiled(function):
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    assert_equal(run(op, dtype, wrap=compiled), run(op, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_inductor_equals_eager(op):
    def doubled(function):
        return lambda **tensors: 2 * function(**tensors)

    def compiled(function):
        torch._dynamo.reset()
        return torch.compile(doubled(function), fullgraph=True)

    assert_equal(run(op, wrap=compiled), run(op, wrap=doubled), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_compile_with_triton(op):
    pytest.importorskip("triton")

    def compiled(function):
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    assert_equal(run(op, wrap=compiled, backend="triton"), run(op, backend="triton"))


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_opcheck_with_triton(op):
    pytest.importorskip("triton")
    forward, backward = positional(op, backend="triton")
    torch.library.opcheck(getattr(custom, f"{op}_fwd"), forward)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in backward]
    torch.library.opcheck(getattr(custom, f"{op}_bwd"), detached)


@pytest.mark.parametrize("backend", ("triton", "torch"))
@pytest.mark.parametrize("op", OPS)
def test_an_operators_gradients_share_no_memory(op, backend):
    """The kernels make several sums in one tensor; a registered operator may not return views."""
    if backend == "triton":
        pytest.importorskip("triton")
    _, backward = positional(op, backend=backend)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in backward]
    grads = getattr(custom, f"{op}_bwd")(*detached)
    assert len({x.untyped_storage().data_ptr() for x in grads}) == len(grads) > 2


def test_compile_reaches_every_gradient_of_the_state():
    torch._dynamo.reset()
    tensors = scan_inputs(SCAN)
    grads = scan_output_grads(SCAN, tensors)
    compiled = torch.compile(ops.selective_scan, fullgraph=True, backend="aot_eager")
    found = scan_results(compiled, tensors, SCAN.flags, *grads)
    assert_equal(found, scan_results(ops.selective_scan, tensors, SCAN.flags, *grads))


def test_compile_with_dynamic_sizes():
    """One graph serves many batch sizes."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(ops.conv1d_silu, fullgraph=True, dynamic=True, backend=count)
    weight = torch.randn(4, 3)
    for batch in (2, 3, 5, 8):
        x = torch.randn(batch, 7, 4)
        torch.testing.assert_close(compiled(x, weight), ops.conv1d_silu(x, weight))
    assert len(graphs) == 1


class Call(torch.nn.Module):
    def __init__(self, function, tensors, flags):
        super().__init__()
        self.function, self.flags, self.names = function, flags, list(tensors)
        for name, x in list(tensors.items())[1:]:
            self.register_parameter(f"p_{name}", torch.nn.Parameter(x))

    def forward(self, first):
        rest = [getattr(self, f"p_{name}") for name in self.names[1:]]
        return self.function(**dict(zip(self.names, [first, *rest], strict=True)), **self.flags)


@pytest.mark.parametrize("op", OPS)
def test_export(op):
    """The exported program holds the operator, computes no states, and takes any batch size. Run
    where gradients are wanted, it still has them."""
    function, tensors, flags = example(op)
    tensors.pop("initial_state", None), tensors.pop("z", None)
    if op == "selective_scan":
        tensors |= {name: tensors[name][:, 0].mean(0).expand(6, -1).clone() for name in ("B", "C")}
        tensors["delta"] = tensors["delta"][:1]
        function = constant_scan
    module = Call(function, tensors, flags)
    first = next(iter(tensors.values()))
    program = torch.export.export(
        module, (first,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
    )
    (node,) = (n for n in program.graph.nodes if "mambavision" in str(n.target))
    if op != "conv1d_silu":
        *_, save_states, _ = node.args
        assert save_states is False
    exported = program.module()
    larger = torch.cat([first, first, first])
    torch.testing.assert_close(exported(larger), module(larger))
    leaf, expected = larger.clone().requires_grad_(), larger.clone().requires_grad_()
    exported(leaf).square().sum().backward()
    module(expected).square().sum().backward()
    torch.testing.assert_close(leaf.grad, expected.grad)


def constant_scan(u, delta, **rest):
    return ops.selective_scan(u, delta.expand(u.shape), **rest)


@pytest.mark.parametrize("place", ["fake", "meta"])
@pytest.mark.parametrize("op", OPS)
def test_without_values(op, place):
    """Shapes and dtypes of output and gradients from tensors without values."""
    function, tensors, flags = example(op)

    def shapes(tensors):
        leaves = {k: x.detach().requires_grad_() for k, x in tensors.items()}
        out = function(**leaves, **flags)
        out.sum().backward()
        return [(x.shape, x.dtype) for x in (out, *(x.grad for x in leaves.values()))]

    if place == "fake":
        mode = FakeTensorMode()
        with mode:
            found = shapes({k: mode.from_tensor(x) for k, x in tensors.items()})
    else:
        found = shapes({k: x.to("meta") for k, x in tensors.items()})
    assert found == shapes(tensors)


# Gradients


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("op", OPS)
def test_double_backward_raises(op, traced):
    function, tensors, flags = example(op)
    if traced:
        (arguments, _), which = positional(op), getattr(custom, f"{op}_fwd")
        leaves = [x for x in arguments if isinstance(x, torch.Tensor)]
        out = which(*arguments)
        out = out if isinstance(out, torch.Tensor) else out[0]
    else:
        leaves = [x.detach().requires_grad_() for x in tensors.values()]
        out = function(**dict(zip(tensors, leaves, strict=True)), **flags)
    # Of a sum: the output's gradient is a constant, where dropping the second derivative is easy
    with pytest.raises(RuntimeError, match="second derivative|autograd formula"):
        (grad, *_) = torch.autograd.grad(out.sum(), leaves, create_graph=True)
        grad.sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_partial_requires_grad(op):
    """Any one argument may want a gradient alone, and it is the one of the full backward pass."""
    function, tensors, flags = example(op)
    whole = run(op)
    first = next(iter(tensors.values()))
    grad = torch.randn(first.shape, generator=torch.Generator().manual_seed(3)).to(first)
    for name in tensors:
        leaves = {k: x.detach().requires_grad_(k == name) for k, x in tensors.items()}
        function(**leaves, **flags).backward(grad)
        torch.testing.assert_close(leaves[name].grad, whole[f"d{name}"], rtol=0, atol=0)
        assert all(x.grad is None for k, x in leaves.items() if k != name)


@pytest.mark.parametrize("op", OPS)
def test_expanded_output_gradient(op):
    """`out.sum().backward()` hands over a gradient of stride 0."""
    function, tensors, flags = example(op)
    leaves = [{k: x.detach().requires_grad_() for k, x in tensors.items()} for _ in range(2)]
    function(**leaves[0], **flags).sum().backward()
    out = function(**leaves[1], **flags)
    out.backward(torch.ones_like(out))
    found, expected = ({k: x.grad for k, x in each.items()} for each in leaves)
    assert_equal(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", OPS)
def test_same_bits_every_run(op):
    first = run(op)
    for _ in range(3):
        assert_equal(run(op), first)


@pytest.mark.parametrize("op", OPS)
def test_no_graph_without_gradients(op):
    function, tensors, flags = example(op)
    assert not function(**tensors, **flags).requires_grad
    with torch.no_grad():
        leaves = {k: x.detach().requires_grad_() for k, x in tensors.items()}
        assert not function(**leaves, **flags).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(function(**tensors, **flags), function(**leaves, **flags))


def test_gradient_of_last_state_alone():
    tensors = {k: x.requires_grad_() for k, x in scan_inputs(SCAN).items()}
    _, last_state = ops.selective_scan(**tensors, return_last_state=True)
    last_state.sum().backward()
    assert tensors["u"].grad.abs().sum() > 0
    assert tensors["C"].grad.abs().sum() == 0


# Dtypes, autocast, sizes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_autocast_changes_nothing(op, dtype):
    """Neither dtypes nor bits, forward or backward, whatever dtype the activations have."""
    for own in (torch.float32, dtype):
        expected = run(op, own)
        with torch.autocast(DEVICE, dtype=dtype):
            assert_equal(run(op, own), expected)
        torch._dynamo.reset()
        with torch.autocast(DEVICE, dtype=dtype):
            compile_ = lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")  # noqa: E731
            assert_equal(run(op, own, wrap=compile_), expected)


@pytest.mark.parametrize("op", OPS)
def test_empty_batch(op):
    function, tensors, flags = example(op)
    batched = {"u", "delta", "B", "C", "z", "initial_state", "x", "xz"}
    empty = {k: x[:0] if k in batched else x for k, x in tensors.items()}
    leaves = {k: x.detach().requires_grad_() for k, x in empty.items()}
    out = function(**leaves, **flags)
    assert out.shape[0] == 0
    out.sum().backward()
    for name, x in leaves.items():
        assert x.grad.shape == x.shape and not x.grad.abs().sum(), name
    if op == "selective_scan":
        assert function(**empty, return_last_state=True)[1].shape == (0, 6, 3)


@pytest.mark.parametrize(
    ("op", "backend"),
    [("selective_scan", "triton"), ("selective_scan", "torch"), ("mixer", "torch")],
)
def test_states_are_kept_only_for_a_backward_pass(op, backend, monkeypatch):
    """Within an autograd function every input that is a parameter seems to need its gradient, with
    gradients off too."""
    if backend == "triton":
        pytest.importorskip("triton")
    function, tensors, flags = example(op)
    module = importlib.import_module(getattr(ops._module(backend), op).__module__)
    own = getattr(module, f"{op}_fwd")
    asked = []

    def forward(*arguments, **more):
        asked.append(arguments[-1])
        return own(*arguments, **more)

    monkeypatch.setattr(module, f"{op}_fwd", forward)
    function(**tensors, **flags, backend=backend)
    parameters = {k: x.requires_grad_() for k, x in tensors.items()}
    with torch.no_grad():
        function(**parameters, **flags, backend=backend)
    with torch.inference_mode():
        function(**parameters, **flags, backend=backend)
    function(**parameters, **flags, backend=backend)
    assert asked == [False, False, False, True]


@pytest.mark.parametrize("op", OPS)
def test_inputs_are_left_alone(op):
    function, tensors, flags = example(op)
    before = {k: x.clone() for k, x in tensors.items()}
    leaves = {k: x.detach().requires_grad_() for k, x in tensors.items()}
    function(**leaves, **flags).square().sum().backward()
    assert_equal({k: x.detach() for k, x in leaves.items()}, before)


def test_mixed_dtypes():
    tensors = scan_inputs(SCAN)
    for name, dtype in (("u", torch.bfloat16), ("delta", torch.float16), ("B", torch.bfloat16)):
        tensors[name] = tensors[name].to(dtype)
    leaves = {k: x.detach().requires_grad_() for k, x in tensors.items()}
    y = ops.selective_scan(**leaves, **SCAN.flags)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(x.grad.dtype == x.dtype for x in leaves.values())


# mamba-ssm's interface

RECORDED = sorted(DATA.glob("scan_*.safetensors"))


@pytest.mark.parametrize("path", RECORDED, ids=[p.stem for p in RECORDED])
def test_selective_scan_fn_against_recorded_numbers(path):
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(path, "pt") as file:
        softplus = json.loads(file.metadata()["delta_softplus"].lower())
        recorded = {name: file.get_tensor(name) for name in file.keys()}
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    leaves = {k: recorded[k].requires_grad_() if k in recorded else None for k in order}
    y, last_state = mambavision.selective_scan_fn(
        *leaves.values(), delta_softplus=softplus, return_last_state=True
    )
    y.backward(recorded["grad_out"])
    found = {"out": y, "last_state": last_state}
    found |= {f"grad.{k}": x.grad for k, x in leaves.items() if x is not None}
    for name, x in found.items():
        scale = recorded[name].abs().max().item()
        close = {"rtol": 1e-4, "atol": 1e-5 * scale}
        torch.testing.assert_close(x, recorded[name], msg=prefixed(name), **close)


def test_recorded_numbers_are_there():
    assert len(RECORDED) == 4


FN_CASES = [case for case in MODES + COMPLEX if not (case.initial_state or case.reverse)]


def interleaved(B):
    """(batch, ..., seqlen) complex as (batch, ..., 2 * seqlen) real."""
    return torch.view_as_real(B.resolve_conj()).flatten(-2)


@pytest.mark.parametrize("case", FN_CASES, ids=ids(FN_CASES))
def test_selective_scan_fn_is_the_native_scan(case):
    """Every mode, values and gradients, the layout undone."""
    tensors = scan_inputs(case)
    native = {k: x.detach().requires_grad_() for k, x in tensors.items()}
    y, last_state = ops.selective_scan(
        **native, delta_softplus=case.delta_softplus, return_last_state=True
    )
    leaves = {k: x.detach().requires_grad_() for k, x in tensors.items()}

    def time_last(name):
        x = leaves.get(name)
        if x is None or x.dim() < 3:
            return x
        x = x.transpose(1, 2) if x.dim() == 3 else x.permute(0, 2, 3, 1)
        return interleaved(x) if x.is_complex() else x

    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    out, state = ops.selective_scan_fn(*map(time_last, order), case.delta_softplus, True)
    torch.testing.assert_close(out.transpose(1, 2), y)
    torch.testing.assert_close(state, last_state)
    grad = torch.randn_like(y)
    y.backward(grad)
    out.backward(grad.transpose(1, 2))
    for name, x in leaves.items():
        torch.testing.assert_close(x.grad, native[name].grad, msg=prefixed(name))
    alone = ops.selective_scan_fn(*map(time_last, order), delta_softplus=case.delta_softplus)
    torch.testing.assert_close(alone, out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=["float16", "float64"])
def test_selective_scan_fn_dtypes(dtype):
    tensors = scan_inputs(ScanCase("", batch=2), dtype)
    for name in ("u", "delta", "B", "C"):
        tensors[name] = tensors[name].transpose(1, 2)
    y, last_state = ops.selective_scan_fn(**tensors, delta_softplus=True, return_last_state=True)
    assert y.dtype == dtype and y.shape == tensors["u"].shape
    assert last_state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


PARAMETERS = {
    "selective_scan": ("D", "delta_bias"),
    "conv1d_silu": ("bias",),
    "mixer": ("D", "delta_bias", "conv_x_bias", "conv_z_bias"),
    "add_layer_norm": ("gamma", "weight", "bias"),
    "norm_act": ("bias", "gamma"),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_any_stride(name):
    """Rows of a matrix's columns, as a view of packed parameters is."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(device)

    dim, seqlen = 8, 5
    parameters = {key: normal(dim, 2)[:, 0] for key in PARAMETERS[name]}
    x, weight = normal(2, seqlen, dim), normal(dim, 3)
    A, B = -normal(dim, 4).abs(), normal(2, seqlen, 4)
    arguments = {
        "selective_scan": {"u": x, "delta": x, "A": A, "B": B, "C": B},
        "conv1d_silu": {"x": x, "weight": weight},
        "mixer": {
            "xz": normal(2, seqlen, 2 * dim), "conv_x_weight": weight, "conv_z_weight": weight,
            "x_proj_weight": normal(11, dim), "dt_proj_weight": weight, "A": A,
        },
        "add_layer_norm": {"x": x, "y": x},
        "norm_act": {"x": normal(2, 3, 3, dim).permute(0, 3, 1, 2)},
    }[name]  # fmt: skip
    op = getattr(ops, name)
    found = op(**arguments, **parameters, backend="triton")
    apart = {key: value.contiguous() for key, value in parameters.items()}
    wanted = op(**arguments, **apart, backend="triton")
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)

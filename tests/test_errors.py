"""What the operators refuse: one case per rejected input, before any work, with nothing changed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mambavision import ops

BATCH, SEQLEN, DIM, DSTATE, RANK = 2, 6, 4, 3, 2


def rand(*shape, dtype=torch.float32):
    return torch.rand(*shape, dtype=dtype)


def scan_arguments():
    sequence = (BATCH, SEQLEN, DIM)
    return {
        "u": rand(*sequence),
        "delta": rand(*sequence),
        "A": -rand(DIM, DSTATE),
        "B": rand(BATCH, SEQLEN, DSTATE),
        "C": rand(BATCH, SEQLEN, DSTATE),
        "D": rand(DIM),
        "z": rand(*sequence),
        "delta_bias": rand(DIM),
        "initial_state": rand(BATCH, DIM, DSTATE),
    }


def scan_fn_arguments():
    arguments = scan_arguments()
    del arguments["initial_state"]
    return {k: x.transpose(1, 2) if x.dim() == 3 else x for k, x in arguments.items()}


def conv_arguments():
    return {"x": rand(BATCH, SEQLEN, DIM), "weight": rand(DIM, 3), "bias": rand(DIM)}


def mixer_arguments():
    return {
        "xz": rand(BATCH, SEQLEN, 2 * DIM),
        "conv_x_weight": rand(DIM, 3),
        "conv_z_weight": rand(DIM, 1, 3),
        "x_proj_weight": rand(RANK + 2 * DSTATE, DIM),
        "dt_proj_weight": rand(DIM, RANK),
        "A": -rand(DIM, DSTATE),
        "D": rand(DIM),
        "delta_bias": rand(DIM),
        "conv_x_bias": rand(DIM),
        "conv_z_bias": rand(DIM),
    }


ARGUMENTS = {
    "selective_scan": scan_arguments,
    "selective_scan_fn": scan_fn_arguments,
    "conv1d_silu": conv_arguments,
    "mixer": mixer_arguments,
}

# (operator, argument, a bad value, what the message says of it)
BAD_SHAPES = [
    ("selective_scan", "u", rand(6, 4), "(batch, seqlen, dim), got (6, 4)"),
    ("selective_scan", "u", rand(2, 0, 4), "seqlen must be at least 1, got 0"),
    ("selective_scan", "u", rand(2, 6, 0), "dim must be at least 1, got 0"),
    ("selective_scan", "delta", rand(2, 6, 5), "(batch, seqlen, dim) = (2, 6, 4), got (2, 6, 5)"),
    ("selective_scan", "delta", rand(6, 4), "(batch, seqlen, dim) = (2, 6, 4), got (6, 4)"),
    ("selective_scan", "A", rand(4), "(dim, dstate) = (4, dstate), got (4,)"),
    ("selective_scan", "A", rand(5, 3), "(dim, dstate) = (4, dstate), got (5, 3)"),
    ("selective_scan", "A", rand(4, 0), "dstate must be at least 1, got 0"),
    ("selective_scan", "B", rand(2, 3, 6), "(batch, seqlen, dstate) = (2, 6, 3), got (2, 3, 6)"),
    ("selective_scan", "B", rand(3, 4), "(dim, dstate) = (4, 3), got (3, 4)"),
    ("selective_scan", "B", rand(3), "(dim, dstate) = (4, 3) or (batch, seqlen, dstate) = "),
    ("selective_scan", "C", rand(2, 6, 3, 3), "groups of C must divide dim = 4, got 3"),
    ("selective_scan", "C", rand(2, 6, 0, 3), "groups of C must divide dim = 4, got 0"),
    ("selective_scan", "C", rand(2, 6, 2, 9), "(2, 6, groups, 3), got (2, 6, 2, 9)"),
    ("selective_scan", "D", rand(5), "(dim,) = (4,), got (5,)"),
    ("selective_scan", "z", rand(2, 5, 4), "= (2, 6, 4), got (2, 5, 4)"),
    ("selective_scan", "delta_bias", rand(4, 1), "(dim,) = (4,), got (4, 1)"),
    ("selective_scan", "initial_state", rand(2, 3, 4), "(batch, dim, dstate) = (2, 4, 3)"),
    ("selective_scan_fn", "u", rand(4, 6), "(batch, dim, seqlen), got (4, 6)"),
    ("selective_scan_fn", "delta", rand(2, 6, 4), "(batch, dim, seqlen) = (2, 4, 6)"),
    ("selective_scan_fn", "B", rand(2, 6, 3), "(batch, dstate, seqlen) = (2, 3, 6)"),
    ("selective_scan_fn", "C", rand(2, 3, 3, 6), "groups of C must divide dim = 4, got 3"),
    ("conv1d_silu", "x", rand(6, 4), "(batch, seqlen, dim), got (6, 4)"),
    ("conv1d_silu", "x", rand(2, 0, 4), "seqlen must be at least 1"),
    ("conv1d_silu", "weight", rand(5, 3), "(dim, width) = (4, width), got (5, 3)"),
    ("conv1d_silu", "weight", rand(4, 2, 3), "= (4, 1, width), got (4, 2, 3)"),
    ("conv1d_silu", "weight", rand(4, 0), "width must be at least 1, got 0"),
    ("conv1d_silu", "bias", rand(3), "(dim,) = (4,), got (3,)"),
    ("mixer", "xz", rand(2, 6, 7), "(batch, seqlen, 2 * dim), got (2, 6, 7)"),
    ("mixer", "xz", rand(2, 0, 8), "seqlen must be at least 1"),
    ("mixer", "conv_x_weight", rand(8, 3), "(dim, width) = (4, width), got (8, 3)"),
    ("mixer", "conv_x_weight", rand(4, 0), "width must be at least 1, got 0"),
    ("mixer", "conv_z_weight", rand(4, 5), "(dim, width) = (4, 3), got (4, 5)"),
    ("mixer", "x_proj_weight", rand(9, 4), "= (8, 4), got (9, 4)"),
    ("mixer", "dt_proj_weight", rand(2, 4), "(dim, dt_rank) = (4, dt_rank), got (2, 4)"),
    ("mixer", "dt_proj_weight", rand(4, 0), "dt_rank must be at least 1, got 0"),
    ("mixer", "A", rand(4, 0), "dstate must be at least 1, got 0"),
    ("mixer", "A", rand(3, 4), "(dim, dstate) = (4, dstate), got (3, 4)"),
    ("mixer", "D", rand(8), "(dim,) = (4,), got (8,)"),
    ("mixer", "delta_bias", rand(1, 4), "(dim,) = (4,), got (1, 4)"),
    ("mixer", "conv_x_bias", rand(3), "= (4,), got (3,)"),
    ("mixer", "conv_z_bias", rand(3), "= (4,), got (3,)"),
]
BAD_TYPES = [
    ("selective_scan", "u", [[1.0]], "must be a tensor, got list"),
    ("selective_scan", "u", torch.ones(2, 6, 4, dtype=torch.int64), "float64, got int64"),
    ("selective_scan", "u", torch.ones(2, 6, 4, dtype=torch.complex64), "got complex64"),
    ("selective_scan", "delta", None, "must be a tensor, got NoneType"),
    ("selective_scan", "A", torch.ones(4, 3, dtype=torch.int32), "got int32"),
    ("selective_scan", "B", torch.ones(2, 6, 3, dtype=torch.bool), "got bool"),
    ("selective_scan", "B", torch.ones(2, 6, 3, dtype=torch.complex64), "got complex64"),
    ("selective_scan", "C", np.ones((2, 6, 3)), "must be a tensor, got ndarray"),
    ("selective_scan", "D", 1.0, "must be a tensor, got float"),
    ("selective_scan", "z", torch.ones(2, 6, 4, dtype=torch.float8_e4m3fn), "got float8_e4m3fn"),
    ("selective_scan", "delta_bias", torch.ones(4, dtype=torch.int8), "got int8"),
    ("selective_scan", "initial_state", torch.ones(2, 4, 3, dtype=torch.int64), "got int64"),
    ("selective_scan", "delta_softplus", 1, "must be True or False, got 1"),
    ("selective_scan", "return_last_state", "yes", "must be True or False, got 'yes'"),
    ("selective_scan", "reverse", None, "must be True or False, got None"),
    ("selective_scan_fn", "u", torch.ones(2, 4, 6, dtype=torch.int64), "got int64"),
    ("selective_scan_fn", "delta_softplus", "True", "must be True or False, got 'True'"),
    ("conv1d_silu", "x", torch.ones(2, 6, 4, dtype=torch.uint8), "got uint8"),
    ("conv1d_silu", "weight", torch.ones(4, 3, dtype=torch.int64), "got int64"),
    ("conv1d_silu", "bias", 0.0, "must be a tensor, got float"),
    ("conv1d_silu", "activation", "silu", "must be True or False, got 'silu'"),
    ("mixer", "xz", torch.ones(2, 6, 8, dtype=torch.int64), "got int64"),
    ("mixer", "A", torch.ones(4, 3, dtype=torch.complex64), "got complex64"),
    ("mixer", "D", None, "must be a tensor, got NoneType"),
    ("mixer", "conv_x_weight", "w", "must be a tensor, got str"),
    ("mixer", "conv_z_bias", torch.ones(4, dtype=torch.int64), "got int64"),
]


def refuse(error, op, arguments, *fragments):
    """The call raises `error`, the message starts with the operator, and no tensor has changed."""
    before = {k: x.clone() for k, x in arguments.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(error) as caught:
        getattr(ops, op)(**arguments)
    message = str(caught.value)
    assert message.startswith(f"{op}: ")
    for fragment in fragments:
        assert fragment in message, message
    for name, x in before.items():
        assert arguments[name].device.type == "meta" or torch.equal(arguments[name], x)


def names(cases):
    return [f"{case[0]}-{case[1]}-{i}" for i, case in enumerate(cases)]


@pytest.mark.parametrize("case", BAD_SHAPES, ids=names(BAD_SHAPES))
def test_wrong_shape_or_size(case):
    op, name, value, *fragments = case
    refuse(ValueError, op, ARGUMENTS[op]() | {name: value}, name, *fragments)


@pytest.mark.parametrize("case", BAD_TYPES, ids=names(BAD_TYPES))
def test_wrong_type_or_dtype(case):
    op, name, value, *fragments = case
    refuse(TypeError, op, ARGUMENTS[op]() | {name: value}, name, *fragments)


MOVED = [(op, name) for op, arguments in ARGUMENTS.items() for name in list(arguments())[1:]]


@pytest.mark.parametrize(("op", "name"), MOVED)
def test_tensors_on_two_devices(op, name):
    arguments = ARGUMENTS[op]()
    first = next(iter(arguments))
    arguments[name] = arguments[name].to("meta")
    text = f"all tensors must be on one device, got {first} on cpu and {name} on meta"
    refuse(ValueError, op, arguments, text)


def test_complex_A_needs_complex_B_and_C():
    arguments = scan_arguments()
    arguments["A"] = arguments["A"].to(torch.complex64)
    refuse(TypeError, "selective_scan", arguments, "B must have one of the dtypes complex64")


def test_interleaved_complex_coefficients():
    arguments = scan_fn_arguments()
    arguments["A"] = arguments["A"].to(torch.complex64)
    text = "B must have shape (batch, dstate, 2 * seqlen) = (2, 3, 12), got (2, 3, 6)"
    refuse(ValueError, "selective_scan_fn", arguments, text)
    arguments["B"] = rand(4, 3)
    refuse(TypeError, "selective_scan_fn", arguments, "B", "complex64", "got float32")


@pytest.mark.parametrize("op", ["selective_scan", "conv1d_silu", "mixer"])
def test_unknown_backend(op):
    arguments = ARGUMENTS[op]() | {"backend": "cuda"}
    refuse(ValueError, op, arguments, "backend must be one of auto, triton, torch, got 'cuda'")


@pytest.mark.parametrize("op", ["selective_scan", "conv1d_silu", "mixer"])
def test_forced_triton_without_triton(op, monkeypatch):
    monkeypatch.setattr(ops, "_triton_missing", lambda: "it cannot be imported (no triton)")
    arguments = ARGUMENTS[op]() | {"backend": "triton"}
    refuse(RuntimeError, op, arguments, "backend='triton' cannot run: it cannot be imported")


def test_forced_triton_and_what_the_kernels_do_not_hold(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(ops, "_interpreted", lambda: True)
    arguments = scan_arguments() | {"backend": "triton"}
    double = {"u": arguments["u"].double()}
    refuse(RuntimeError, "selective_scan", arguments | double, "float32, got float64")
    plural = {"A": rand(4, 65), "B": rand(4, 65), "C": rand(4, 65), "initial_state": None}
    refuse(RuntimeError, "selective_scan", arguments | plural, "at most 64 states", "dstate = 65")
    whole = {k: arguments[k].to(torch.complex64) for k in ("A", "B", "C")}
    refuse(RuntimeError, "selective_scan", arguments | whole, "got complex64")


def test_forced_triton_on_cpu_tensors(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(ops, "_interpreted", lambda: False)
    arguments = conv_arguments() | {"backend": "triton"}
    text = "the tensors are on cpu, not on a GPU"
    refuse(RuntimeError, "conv1d_silu", arguments, text, "TRITON_INTERPRET=1")


def test_auto_never_needs_triton():
    """In a process that cannot import Triton, with every operator."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from mambavision import ops; from test_errors import ARGUMENTS\n"
        "for op, arguments in ARGUMENTS.items(): getattr(ops, op)(**arguments())\n"
        "try: ops.conv1d_silu(**ARGUMENTS['conv1d_silu'](), backend='triton')\n"
        "except RuntimeError as error: assert 'cannot be imported' in str(error), error\n"
        "else: raise AssertionError('ran')"
    )
    here = Path(__file__).parent
    path = f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]\n"
    subprocess.run([sys.executable, "-c", path + code], check=True, cwd=here)

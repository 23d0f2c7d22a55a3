"""kernels/attention.py and PyTorch's operation against the reference."""

from dataclasses import dataclass

import pytest
import torch
from cases import (
    BRAIN,
    HALF,
    SINGLE,
    TOLERANCES,
    _double,
    assert_close,
    ids,
    nan_surrounded,
)

from mambavision import ops, reference, torch_backend

kernels = pytest.importorskip("mambavision.kernels", reason="needs Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class AttentionCase:
    name: str
    seqlen: int = 49
    head_dim: int = 8
    num_heads: int = 2
    batch: int = 2
    scale: float = 1.0  # of q and k
    surrounded: bool = False  # by NaN


CASES = [
    *(AttentionCase(f"length-{n}", n) for n in (1, 15, 16, 17, 49, 63, 64, 65, 129, 196, 256)),
    *(AttentionCase(f"head-{d}", 20, d) for d in (1, 15, 16, 17, 40, 48, 98, 128)),
    AttentionCase("one-head", 81, 24, num_heads=1),
    AttentionCase("no-window", batch=0),
    AttentionCase("one-key-takes-all", 20, 16, scale=30.0),
    AttentionCase("surrounded-by-nan", 20, 12, surrounded=True),
]


def inputs(case, dtype, device):
    g = torch.Generator().manual_seed(0)
    dim = case.num_heads * case.head_dim
    qkv = torch.randn(case.batch, case.seqlen, 3 * dim, generator=g)
    qkv[..., : 2 * dim] *= case.scale
    qkv = qkv.to(device, dtype)
    return nan_surrounded(qkv) if case.surrounded else qkv


def check(op, case, dtype, device, tolerances):
    qkv = inputs(case, dtype, device)
    found = op(qkv, case.num_heads)
    assert found.dtype == dtype
    own = reference.attention(qkv, case.num_heads)
    exact = reference.attention(_double(qkv), case.num_heads)
    assert_close({"y": found}, {"y": own}, {"y": exact}, tolerances=tolerances)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
@pytest.mark.parametrize("dtype", (HALF, BRAIN), ids=("half", "brain"))
def test_against_the_reference(case, dtype):
    """Probabilities are rounded before the second product, one rounding more than the result's."""
    if dtype == BRAIN and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices wrongly")
    check(kernels.attention, case, dtype, DEVICE, {dtype: 2 * TOLERANCES[dtype]})


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
@pytest.mark.parametrize("dtype", (SINGLE, torch.float64), ids=("single", "double"))
def test_torch_backend(case, dtype):
    check(torch_backend.attention, case, dtype, "cpu", TOLERANCES)


@pytest.mark.parametrize(
    "seqlen,head_dim,dtype",
    ((257, 8, HALF), (9, 129, HALF), (9, 8, SINGLE)),
    ids=("long", "wide", "single"),
)
def test_what_a_program_cannot_hold_is_the_librarys(seqlen, head_dim, dtype, monkeypatch):
    def refuse(*_):
        raise AssertionError("the kernel was called")

    monkeypatch.setattr(kernels, "attention", refuse)
    qkv = torch.randn(1, seqlen, 3 * head_dim, device=DEVICE).to(dtype)
    y = ops.attention(qkv, 1, backend="triton")
    torch.testing.assert_close(y, torch_backend.attention(qkv, 1), rtol=0, atol=0)


def test_gradients_are_the_librarys():
    qkv = torch.randn(1, 9, 24, device=DEVICE, dtype=HALF, requires_grad=True)
    ops.attention(qkv, 2, backend="triton").sum().backward()
    assert qkv.grad.shape == qkv.shape


@pytest.mark.parametrize(
    "qkv,num_heads,error",
    (
        (torch.zeros(2, 4), 1, "attention: qkv must have shape"),
        (torch.zeros(2, 4, 8), 1, "attention: qkv must have shape"),
        (torch.zeros(2, 0, 9), 1, "attention: seqlen must be at least 1"),
        (torch.zeros(2, 4, 9), 2, "attention: num_heads must divide dim = 3, got 2"),
        (torch.zeros(2, 4, 9), 1.0, "attention: num_heads must be an integer"),
        ("qkv", 1, "attention: qkv must be a tensor"),
    ),
)
def test_wrong_arguments(qkv, num_heads, error):
    with pytest.raises((TypeError, ValueError), match=error):
        ops.attention(qkv, num_heads)

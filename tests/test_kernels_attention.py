"""kernels/attention.py and PyTorch's operation against the reference."""

import importlib
from dataclasses import dataclass

import pytest
import torch
from cases import (
    BRAIN,
    HALF,
    SINGLE,
    TOLERANCES,
    assert_close,
    ids,
    in_double,
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
    if case.surrounded:
        # Windows between windows of NaN, in one piece: reading behind the last row shows
        around = torch.full((case.batch + 2, case.seqlen, 3 * dim), torch.nan)
        around[1:-1] = qkv
        return around.to(device, dtype)[1:-1]
    return qkv.to(device, dtype)


def check(op, case, dtype, device, tolerances):
    qkv = inputs(case, dtype, device)
    found = op(qkv, case.num_heads)
    assert found.dtype == dtype
    own = reference.attention(qkv, case.num_heads)
    exact = reference.attention(in_double(qkv), case.num_heads)
    assert_close({"y": found}, {"y": own}, {"y": exact}, tolerances=tolerances)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
@pytest.mark.parametrize("dtype", (HALF, BRAIN), ids=("half", "brain"))
def test_against_the_reference(case, dtype):
    """Probabilities are rounded before the second product, one rounding more than the result's."""
    if dtype == BRAIN and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices wrongly")
    check(kernels.attention, case, dtype, DEVICE, {dtype: 2 * TOLERANCES[dtype]})


@pytest.mark.parametrize("part", "qkv")
def test_a_head_sees_no_other(part):
    """Its channels end within a tile; those of the head behind it are NaN."""
    case = AttentionCase("", 20, 12, num_heads=3)
    qkv = inputs(case, HALF, DEVICE)
    wanted = kernels.attention(qkv, 3).view(2, 20, 3, 12)
    qkv.view(2, 20, 3, 3, 12)[:, :, "qkv".index(part), 1] = torch.nan
    y = kernels.attention(qkv, 3).view(2, 20, 3, 12)
    assert y[:, :, 1].isnan().any()
    for head in (0, 2):
        torch.testing.assert_close(y[:, :, head], wanted[:, :, head], rtol=0, atol=0)


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


@pytest.mark.parametrize("limit,head_dim", ((99, 64), (163, 128), (227, 128)), ids=str)
def test_what_a_programs_shared_memory_holds(limit, head_dim, monkeypatch):
    """KiB of sm_86, sm_80, sm_90, and the widest heads of 196 tokens that they hold."""
    module = importlib.import_module("mambavision.kernels.attention")
    monkeypatch.setattr(module, "_shared_memory", lambda _: 1024 * limit)
    module._holds.cache_clear()
    served = [
        d for d in range(1, 257)
        if kernels.attention_serves(torch.empty(1, 196, 3 * d, device=DEVICE, dtype=HALF), 1)
    ]  # fmt: skip
    module._holds.cache_clear()
    assert served == list(range(1, head_dim + 1))


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

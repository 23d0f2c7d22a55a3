"""kernels/mixer.py against the reference: values, every gradient by name, and what is kept."""

import pytest
import torch
from cases import (
    BRAIN,
    HALF,
    MIXERS,
    MixerCase,
    assert_close,
    ids,
    mixer_inputs,
    oracle,
    results,
)  # fmt: skip

kernels = pytest.importorskip("mambavision.kernels", reason="needs Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(case, dtype=torch.float32):
    tensors = mixer_inputs(case, dtype, DEVICE)
    grad = torch.randn(tensors["xz"].shape, generator=torch.Generator().manual_seed(2))
    grad = grad.to(tensors["xz"])
    found = results(kernels.mixer, tensors, grad)
    own = oracle("mixer", tensors, grad)
    exact = oracle("mixer", tensors, grad, double=True)
    # delta, dx and their like are rounded to xz's dtype, in another order than the reference's
    assert_close(found, own, exact, inner=dtype)


@pytest.mark.parametrize("case", MIXERS, ids=ids(MIXERS))
def test_float32(case):
    check(case)


@pytest.mark.parametrize("case", MIXERS[:2], ids=ids(MIXERS[:2]))
@pytest.mark.parametrize("dtype", (HALF, BRAIN), ids=("float16", "bfloat16"))
def test_16_bit(case, dtype):
    if dtype == BRAIN and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices wrongly")
    check(case, dtype)


@pytest.mark.slow
def test_196_steps():
    check(MixerCase("", seqlen=196, dim=8, dstate=2))


def test_keeps_xz_and_small_tensors_only():
    """Saved for the backward pass: the arguments, dt_low, [B C] and states, and nothing else."""
    case = MIXERS[1]
    tensors = {k: x.requires_grad_() for k, x in mixer_inputs(case, device=DEVICE).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        kernels.mixer(**tensors)
    own = {x.data_ptr() for x in tensors.values()}
    kept = sorted(tuple(x.shape) for x in saved if x.data_ptr() not in own)
    b, n, d = case.batch, case.seqlen, case.dim
    states = kernels.states_shape(b, n, d, case.dstate)
    assert kept == sorted([(b, n, case.dt_rank), (b, n, 2 * case.dstate), states])


def test_double_backward_raises():
    tensors = mixer_inputs(MIXERS[3], device=DEVICE)
    xz = tensors.pop("xz").requires_grad_()
    y = kernels.mixer(xz, **tensors)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(y.sum(), xz, create_graph=True)

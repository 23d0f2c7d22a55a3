"""What Python does for one eager call of the mixer on the Triton path, launches left out."""

import importlib
import time

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from cases import MIXERS, mixer_inputs  # noqa: E402

from mambavision import ops  # noqa: E402

# Microseconds above an autograd function that does nothing but the same allocations, on a core of
# which that function takes USUAL. Checks that were made for every call took 15 more.
ALLOWED, USUAL = 25.0, 10.0


class Allocations(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        xz, dt_rank, dstate = inputs[0], inputs[4].shape[1], inputs[5].shape[1]
        batch, seqlen, columns = xz.shape
        yz = xz.new_empty(batch, seqlen, columns)
        xz.new_empty(batch, seqlen, columns // 2)
        dt_low = xz.new_empty(batch, seqlen, dt_rank)
        BC = xz.new_empty(batch, seqlen, 2 * dstate)
        xz.new_empty(batch, columns // 2, dstate)
        ctx.save_for_backward(*inputs, dt_low, BC, xz.new_empty(0), xz.new_empty(0))
        return yz

    @staticmethod
    def backward(ctx, dyz):
        raise NotImplementedError


def fastest(*calls, repetitions=60, count=50):
    """Least microseconds of each call; they take turns, so that a disturbance meets all."""
    least = [float("inf")] * len(calls)
    for _ in range(repetitions):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            for _ in range(count):
                call()
            least[i] = min(least[i], (time.perf_counter() - start) / count * 1e6)
    return least


def test_eager_mixer(monkeypatch):
    device = importlib.import_module("mambavision.kernels._device")
    launches = []
    monkeypatch.setattr(device, "launch", lambda *args: launches.append(args[0]))
    inputs = mixer_inputs(MIXERS[0])
    inputs["xz"].requires_grad_()
    values = tuple(inputs.values())
    ours, bare = fastest(
        lambda: ops.mixer(**inputs, backend="triton"), lambda: Allocations.apply(*values)
    )
    assert len(set(launches)) == 2  # the call was the whole call
    assert ours - bare <= ALLOWED * max(1.0, bare / USUAL), (ours, bare)

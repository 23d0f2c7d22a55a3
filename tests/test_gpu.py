"""What only a GPU shows: graphs, devices, cold caches, autocast on the device."""

import pytest
import torch
from cases import HALF, MIXERS, ScanCase, mixer_inputs, results, scan_inputs

kernels = pytest.importorskip("mambavision.kernels", reason="needs Triton")
pytestmark = pytest.mark.gpu


def test_graph_capture_and_replay_of_forward_and_backward():
    tensors = {k: x.requires_grad_() for k, x in mixer_inputs(MIXERS[1], device="cuda").items()}
    grad = torch.randn_like(tensors["xz"])

    def step():
        out = kernels.mixer(**tensors)
        return out, torch.autograd.grad(out, list(tensors.values()), grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grads = step()
    with torch.no_grad():
        tensors["xz"].copy_(torch.randn_like(tensors["xz"]))
    graph.replay()
    expected, expected_grads = step()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    for name, found, wanted in zip(tensors, grads, expected_grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, msg=name)


def test_first_call_equals_the_second_from_a_cold_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    # A dim that no other test compiles for
    tensors = scan_inputs(ScanCase("", batch=2, seqlen=11, dim=88), device="cuda")
    first = kernels.selective_scan(**tensors, delta_softplus=True)
    second = kernels.selective_scan(**tensors, delta_softplus=True)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_tensors_on_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    here = mixer_inputs(MIXERS[0], device="cuda:0")
    there = {name: x.to("cuda:1") for name, x in here.items()}
    grad = torch.randn_like(here["xz"])
    found = results(kernels.mixer, there, grad.to("cuda:1"))
    for name, wanted in results(kernels.mixer, here, grad).items():
        torch.testing.assert_close(found[name].to("cuda:0"), wanted, rtol=0, atol=0, msg=name)


def test_autocast_moves_nothing_inside_the_op():
    tensors = mixer_inputs(MIXERS[1], HALF, device="cuda")
    grad = torch.randn_like(tensors["xz"])
    wanted = results(kernels.mixer, tensors, grad)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = results(kernels.mixer, tensors, grad)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=0, msg=name)

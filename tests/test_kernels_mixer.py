"""kernels/mixer.py against the reference: values, every gradient by name, and what is kept."""

import inspect
import sys

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

# The functions of these names hide the modules
module = sys.modules["mambavision.kernels.mixer"]
scan = sys.modules["mambavision.kernels.selective_scan"]

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


@pytest.mark.parametrize("half", "xz")
def test_a_bias_of_one_half(half):
    tensors = mixer_inputs(MixerCase("", bias=True, seqlen=5), device=DEVICE)
    del tensors[f"conv_{half}_bias"]
    grad = torch.ones_like(tensors["xz"])
    own, exact = (oracle("mixer", tensors, grad, double) for double in (False, True))
    assert_close(results(kernels.mixer, tensors, grad), own, exact)


def test_more_states_than_a_block_of_channels():
    """Sums over blocks then load one at a time."""
    check(MixerCase("", batch=2, seqlen=3, dim=12, dstate=40))


@pytest.mark.parametrize("case", MIXERS[:2], ids=ids(MIXERS[:2]))
@pytest.mark.parametrize("dtype", (HALF, BRAIN), ids=("float16", "bfloat16"))
def test_16_bit(case, dtype):
    if dtype == BRAIN and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices wrongly")
    check(case, dtype)


ALL_TILES = [
    pytest.param({2: HALF, 4: torch.float32}[size], columns, config, id=f"{size}-{i}")
    for size, tiles in module.TILES.items()
    for i, (_, columns, config) in enumerate(tiles)
]


@pytest.mark.parametrize("dtype,columns,config", ALL_TILES)
def test_every_tile(dtype, columns, config, monkeypatch):
    """Two blocks of rows, the second begins inside a sequence and ends behind the last one; two
    blocks of channels."""
    monkeypatch.setitem(module.TILES, dtype.itemsize, ((0, columns, config),))
    module._tile.cache_clear()
    try:
        batch, dim = config["BLOCK_L"] // 3 + 1, config["BLOCK_D"] + 8
        check(MixerCase("", batch=batch, seqlen=3, dim=dim, dstate=2), dtype)
    finally:
        module._tile.cache_clear()


def test_sums_over_programs(monkeypatch):
    """Of 5 blocks of channels, of which 4 are loaded at once, and of 3 entries in blocks of 2."""
    monkeypatch.setattr(module, "SUMS", {**module.SUMS, "ENTRIES": 2})
    module._tile.cache_clear()
    try:
        check(MixerCase("", batch=3, seqlen=2, dim=132, dstate=2))
    finally:
        module._tile.cache_clear()


@pytest.mark.skipif(DEVICE == "cuda", reason="programs run in what order a GPU likes")
def test_no_program_needs_what_another_one_writes(monkeypatch):
    """Memory of no content is not a number, programs run from the last one to the first, and the
    second block of channels begins among those of the first."""
    interpreter = pytest.importorskip("triton.runtime.interpreter").interpreter_builder
    tensors = mixer_inputs(MIXERS[1])
    grad = torch.randn(tensors["xz"].shape, generator=torch.Generator().manual_seed(2))
    expected = results(kernels.mixer, tensors, grad)
    forward = interpreter.set_grid_idx

    def backward(*at):
        forward(*(size - 1 - i for size, i in zip(interpreter.grid_dim, at, strict=True)))

    monkeypatch.setattr(interpreter, "set_grid_idx", backward)
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(torch.nan)
    )
    found = results(kernels.mixer, tensors, grad)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


def test_too_large_a_dt_rank_is_named():
    tensors = mixer_inputs(MixerCase("", seqlen=2, dim=4, dt_rank=513), device=DEVICE)
    with pytest.raises(ValueError, match="dt_rank of at most 512, got 513"):
        kernels.mixer(**tensors)


@pytest.mark.slow
def test_196_steps():
    check(MixerCase("", seqlen=196, dim=8, dstate=2))


def test_keeps_xz_and_small_tensors_only():
    """Saved for the backward pass: the arguments, dt_low, [B C], and nothing else."""
    case = MIXERS[1]
    tensors = {k: x.requires_grad_() for k, x in mixer_inputs(case, device=DEVICE).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        kernels.mixer(**tensors)
    own = {x.data_ptr() for x in tensors.values()}
    kept = sorted(tuple(x.shape) for x in saved if x.numel() and x.data_ptr() not in own)
    b, n = case.batch, case.seqlen
    assert kept == [(b, n, case.dt_rank), (b, n, 2 * case.dstate)]


class Recorder:
    """In a kernel's place, notes the tensors of a launch, by name, and launches nothing."""

    def __init__(self, kernel, launches):
        self.names = list(inspect.signature(kernel.fn).parameters)
        self.launch = (kernel.fn.__name__.strip("_"), launches)

    def __getitem__(self, grid):
        def run(*args, **kwargs):
            values = dict(zip(self.names, args, strict=False)) | kwargs
            name, launches = self.launch
            tensors = {k: v for k, v in values.items() if isinstance(v, torch.Tensor)}
            launches.append((name, tensors))

        return run


def test_launches_and_the_bytes_they_move(monkeypatch):
    """Two launches forward, four backward. No tensor of a sequence is an argument twice, except x,
    over which the scan writes y."""
    launches = []
    for owner in (module, scan):
        for name, value in list(vars(owner).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(owner, name, Recorder(value, launches))
    case = MixerCase("", batch=2, seqlen=49, dim=160, dt_rank=20)
    tensors = {k: x.requires_grad_() for k, x in mixer_inputs(case, HALF, DEVICE).items()}
    y = kernels.mixer(**tensors)
    forward = len(launches)
    y.backward(torch.ones_like(y))

    unit = case.batch * case.seqlen * case.dim

    def units(arguments):
        sizes = {name.removesuffix("_ptr"): x.numel() / unit for name, x in arguments.items()}
        return {name: size for name, size in sizes.items() if size >= 1}

    names = [name for name, _ in launches]
    assert names[:forward] == ["project_kernel", "scan_fwd_kernel"]
    assert names[forward:] == [
        "project_kernel", "scan_bwd_kernel", "project_bwd_kernel", "convolve_bwd_kernel",
    ]  # fmt: skip
    moved = {name: units(arguments) for name, arguments in launches}
    assert units(launches[0][1]) == {"xz": 2, "x": 2, "delta": 1}
    # Of xz the half of x alone
    assert moved["project_kernel"] == {"xz": 2, "x": 1, "delta": 1}
    scanned = {"dy": 2, "u": 1, "delta": 1, "states": 13 * 8 / 49, "du": 1, "ddelta": 1}
    assert moved["scan_bwd_kernel"] == pytest.approx(scanned)
    assert moved["project_bwd_kernel"] == {"ddelta": 1, "dx": 1}
    assert moved["convolve_bwd_kernel"] == {"dx": 1, "dyz": 2, "xz": 2, "dxz": 2}
    for name, arguments in launches:
        large = [x.data_ptr() for x in arguments.values() if x.numel() >= unit]
        twice = len(large) - len(set(large))
        assert twice == (name == "scan_fwd_kernel"), name


def test_double_backward_raises():
    tensors = mixer_inputs(MIXERS[3], device=DEVICE)
    xz = tensors.pop("xz").requires_grad_()
    y = kernels.mixer(xz, **tensors)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(y.sum(), xz, create_graph=True)

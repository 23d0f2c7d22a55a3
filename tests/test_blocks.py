"""The blocks of the backbone in inference: the kernels behind them, and when these stay out."""

import copy

import pytest
import torch
from torch import nn

from mambavision import MambaVision, blocks, ops
from mambavision.inference import optimize_for_inference

kernels = pytest.importorskip("mambavision.kernels", reason="needs Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One of float32 is 6e-8; the parts add up some hundred numbers and are a few operations deep.
ROUNDINGS = 2e-6


@pytest.fixture(autouse=True)
def all_digits(monkeypatch):
    """Convolutions without TF32, which rounds to three."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def _drawn(module):
    """Parameters and statistics under which every part shows."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in [*module.named_parameters(), *module.named_buffers()]:
            if not x.is_floating_point() or "A_log" in name:
                continue
            values = torch.randn(x.shape, generator=draw)
            if x.dim() > 1:
                values /= x[0].numel() ** 0.5
            x.copy_(values.abs() + 0.5 if name.endswith(("var", "norm1.weight")) else values)
    return module.eval().to(DEVICE)


def _maps(dim=12):
    x = torch.randn(2, dim, 6, 5, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return x.to(memory_format=torch.channels_last)


def _tokens(dim=24):
    return torch.randn(3, 9, dim, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def _block(mixer, layer_scale):
    return blocks.Block(24, mixer, 2.0, drop_path=0.5, layer_scale=layer_scale, backend="triton")


def _attention(**options):
    return blocks.Attention(24, 3, backend="triton", **options)


# What is built, its input, and how often it calls each kernel in float32, which attention lacks.
CASES = {
    "stem": (lambda: blocks.Stem(3, 8, 12, "triton"), lambda: _maps(3), {"norm_act": 2}),
    "convolutions": (lambda: blocks.ConvBlock(12, 0.5, None, "triton"), _maps, {"norm_act": 2}),
    "convolutions, layer scale": (
        lambda: blocks.ConvBlock(12, 0.5, 0.5, "triton"), _maps, {"norm_act": 2},
    ),
    "attention": (_attention, _tokens, {}),
    "block": (lambda: _block(_attention(), None), _tokens, {"add_layer_norm": 2}),
    "block, layer scale": (
        lambda: _block(nn.Identity(), 0.5), _tokens, {"add_layer_norm": 2},
    ),
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """How often each kernel of inference was called."""
    counts: dict[str, int] = {}

    def counted(name):
        function = getattr(kernels, name)

        def call(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return function(*args, **kwargs)

        monkeypatch.setattr(kernels, name, call)

    for name in ("add_layer_norm", "attention", "norm_act", "stem_conv"):
        counted(name)
    return counts


def _plain_twin(module):
    """The same in float64, by PyTorch alone."""
    twin = copy.deepcopy(module).double()
    for part in twin.modules():
        if hasattr(part, "backend"):
            part.backend = "torch"
    return twin


def _assert_same(found, exact, allowed=ROUNDINGS):
    error = (found.double() - exact).abs().max() / exact.abs().max()
    assert error <= allowed, f"off by {error:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_kernels_compute_what_the_layers_do(name, calls):
    make, inputs, expected = CASES[name]
    module, x = _drawn(make()), inputs()
    with torch.no_grad():
        found, exact = module(x), _plain_twin(module)(x.double())
    assert calls == expected
    _assert_same(found, exact)


@pytest.mark.parametrize("name", CASES)
def test_gradients_come_from_the_layers(name, calls):
    make, inputs, _ = CASES[name]
    module = _drawn(make())
    module(inputs()).sum().backward()
    assert not calls
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("name", CASES)
def test_hooked_layers_are_called(name, calls):
    """Also those that a kernel would compute on the way."""
    make, inputs, _ = CASES[name]
    module, seen = _drawn(make()), []
    leaves = [m for m in module.modules() if not list(m.children())]
    for leaf in leaves:
        leaf.register_forward_hook(lambda leaf, *_: seen.append(leaf))
    with torch.no_grad():
        found = module(inputs())
    assert set(seen) == set(leaves) and not calls
    _assert_same(found, _plain_twin(module)(inputs().double()).detach())


def test_attention_in_half_precision(calls):
    """Its four roundings, of q, k, v, probabilities and result, are 5e-4 each."""
    module, x = _drawn(_attention()).half(), _tokens().half()
    with torch.no_grad():
        found, exact = module(x), _plain_twin(module)(x.double())
    assert calls == {"attention": 1}
    _assert_same(found, exact, 4 * 2**-11)


@pytest.mark.parametrize("optimized", (False, True), ids=("as-it-is", "optimized"))
def test_stem_in_half_precision(calls, optimized):
    """Folded and packed, its norms are gone and ReLUs inside the convolutions."""
    model = MambaVision(
        dim=12, in_dim=8, depths=(1, 1, 1, 1), window_size=(8, 8, 2, 2), mlp_ratio=1.0,
        num_heads=(1, 1, 2, 4), num_classes=0, backend="triton",
    )  # fmt: skip
    model = _drawn(model).half()
    x = _maps(3).half()
    with torch.no_grad():
        exact = _plain_twin(model.patch_embed)(x.double())
        ready = optimize_for_inference(model).model if optimized else model
        found = ready.patch_embed(x)
    expected = {"stem_conv": 1, "norm_act": 1}
    if optimized and DEVICE == "cuda":
        # Behind the second convolution NVIDIA's library computes ReLU itself.
        del expected["norm_act"]
    assert calls == expected
    _assert_same(found, exact, 4 * 2**-11)


@pytest.mark.parametrize("name", CASES)
def test_autocast_takes_the_layers(name, calls):
    make, inputs, _ = CASES[name]
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        _drawn(make())(inputs())
    assert not calls


@pytest.mark.parametrize("name", ("stem", "block, layer scale"))
def test_compilers_see_the_layers(name, calls):
    make, inputs, _ = CASES[name]
    module = _drawn(make())
    with torch.no_grad():
        exported = torch.export.export(module, (inputs(),)).module()
        found = exported(inputs())
    assert not calls
    _assert_same(found, _plain_twin(module)(inputs().double()).detach())


def test_batch_statistics_take_the_layers(calls):
    with torch.no_grad():
        _drawn(blocks.ConvBlock(12, 0.5, 0.5, "triton")).train()(_maps())
        _drawn(blocks.Stem(3, 8, 12, "triton")).train()(_maps(3))
    assert not calls


def test_maps_that_are_not_channels_last(calls):
    module, x = _drawn(blocks.ConvBlock(12, backend="triton")), _maps().contiguous()
    with torch.no_grad():
        _assert_same(module(x), _plain_twin(module)(x.double()))


def test_hooks_on_a_block_see_its_sum(calls):
    """Not joined with the norm of the next block then."""
    parts = [_block(nn.Identity(), 0.5), _block(nn.Identity(), None)]
    stage, x = _drawn(blocks.Stage(parts, None, 3)), _maps(24)
    with torch.no_grad():
        joined, seen = stage(x)[0], []
        assert calls == {"add_layer_norm": 4}
        for part in parts:
            part.register_forward_hook(lambda part, inputs, output: seen.append(output))
        apart = stage(x)[0]
    assert len(seen) == 2
    _assert_same(joined, _plain_twin(stage)(x.double())[0])
    _assert_same(apart, _plain_twin(stage)(x.double())[0].detach())


def test_whole_model(calls):
    """As it is, and optimized, whose norms are gone and whose layers are packed."""
    sizes = {"dim": 8, "in_dim": 8, "depths": (1, 1, 2, 2), "window_size": (8, 8, 2, 2)}
    model = MambaVision(
        **sizes, mlp_ratio=2.0, num_heads=(1, 1, 2, 4), num_classes=5, backend="triton",
        layer_scale=0.5, layer_scale_conv=0.5,
    )  # fmt: skip
    model = _drawn(model).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        exact = _plain_twin(model)(x.double())
        as_it_is = model(x)
        assert calls == {"norm_act": 6, "add_layer_norm": 8}
        calls.clear()
        optimized = optimize_for_inference(model)(x)
        assert calls["add_layer_norm"] == 8
    _assert_same(as_it_is, exact)
    _assert_same(optimized, exact)


def test_infers_names_an_unknown_backend():
    with pytest.raises(ValueError, match="backend must be one of"):
        ops.infers("cuda", torch.zeros(2))

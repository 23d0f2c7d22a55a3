"""optimize_for_inference: the same values from fewer operations, and what it refuses."""

import copy
import pickle

import pytest
import torch
from cases import assert_close
from torch import nn

from mambavision import MambaVision, create_model
from mambavision.inference import OptimizedMambaVision, optimize_for_inference
from mambavision.packed import PackedConv2d, PackedLinear

SMALL = {
    "dim": 16, "in_dim": 8, "depths": (1, 2, 3, 2), "window_size": (8, 8, 4, 2), "mlp_ratio": 2,
    "num_heads": (1, 1, 2, 4), "num_classes": 5,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """These models are small: threads that wait for each other cost more than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def alive(model):
    """In evaluation mode, with every parameter and statistic away from where it begins."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=draw, dtype=torch.float32)
            if name.endswith(("A_log", ".D")):
                p.add_(0.1 * noise)
            elif p.dim() == 1:
                # Norms and layer scales about 1, biases about 0
                p.copy_(0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
            else:
                p.copy_(noise * p[0].numel() ** -0.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.3, generator=draw)
                module.running_var.uniform_(0.5, 1.5, generator=draw)
    return model.eval()


def small(**overrides):
    return alive(MambaVision(**{**SMALL, **overrides}))


def images(*shape, dtype=torch.float32):
    draw = torch.Generator().manual_seed(4)
    return torch.randn(shape, generator=draw).to(dtype)


def outputs(model, x):
    with torch.no_grad():
        stages = model.forward_stages(x)
        features = model.forward_features(x)
        named = {f"stage {i}": s for i, s in enumerate(stages)}
        pooled = model.forward_head(features, pre_logits=True)
        return named | {"features": features, "pooled": pooled, "logits": model(x)}


def error(found, truth):
    return ((found.double() - truth).abs().max() / truth.abs().max()).item()


def check(model, dtype, x):
    """Errors against float64 are at most twice those of the plain model in the dtype, plus eight
    roundings: folding moves roundings, it does not add up more of them. Both are channels-last, a
    layout in which the library's convolutions sum in another order."""
    optimized = model.optimize_for_inference(dtype)
    truth = outputs(copy.deepcopy(model).double(), x.to(dtype).double())
    plain = copy.deepcopy(model).to(dtype=dtype, memory_format=torch.channels_last)
    plain = outputs(plain, x.to(dtype))
    found = outputs(optimized, x.to(dtype))
    assert found.keys() == truth.keys()
    for name, value in found.items():
        assert value.dtype == dtype and value.shape == truth[name].shape
        allowed = 2 * error(plain[name], truth[name]) + 8 * torch.finfo(dtype).eps
        assert error(value, truth[name]) <= allowed, name
    return optimized


CASES = {
    "plain": {},
    "layer scale": {"layer_scale": 0.5, "layer_scale_conv": 0.5},
    "norms on q and k": {"qk_scale": 1.0, "qkv_bias": False},
    "no classes": {"num_classes": 0},
    "other channels": {"in_chans": 4},
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_small_model(case, dtype):
    model = small(**CASES[case])
    check(model, dtype, images(2, model.in_chans, 64, 64))
    check(model, dtype, images(1, model.in_chans, 50, 75))


def test_small_model_in_float64():
    model, x = small(layer_scale=0.5, layer_scale_conv=0.5), images(1, 3, 50, 75)
    expected = outputs(copy.deepcopy(model).double(), x.double())
    for name, value in outputs(model.optimize_for_inference(torch.float64), x.double()).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("size", ((224, 224), (200, 168)), ids=str)
def test_published_model(size, dtype):
    check(alive(create_model("mamba_vision_T")), dtype, images(1, 3, *size))


def test_published_model_with_layer_scale():
    model = create_model("mamba_vision_T", layer_scale=1e-5, layer_scale_conv=1e-5)
    check(alive(model), torch.float32, images(1, 3, 96, 64))


def test_maps_instead_of_logits():
    model = small(num_classes=0)
    model.reset_classifier(0, "")
    x = images(2, 3, 64, 64)
    found, expected = model.optimize_for_inference()(x), model(x)
    assert found.shape == (2, 128, 2, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# What it is made of


def test_nothing_is_left_to_fold():
    model = small(layer_scale=0.5, layer_scale_conv=0.5)
    optimized = model.optimize_for_inference(torch.bfloat16)
    norms = [name for name, m in optimized.named_modules() if isinstance(m, nn.BatchNorm2d)]
    # Only that of forward_features; the logits have it in their classifier
    assert norms == ["model.norm"]
    assert not any("gamma" in name for name, _ in optimized.named_parameters())
    for name, x in (*optimized.named_parameters(), *optimized.named_buffers()):
        if x.is_floating_point():
            wide = name.rpartition(".")[2] in ("A", "D", "delta_bias")
            assert x.dtype == (torch.float32 if wide else torch.bfloat16), name
        if x.dim() == 4:
            assert x.is_contiguous(memory_format=torch.channels_last), name
    packed = [m for m in optimized.modules() if isinstance(m, PackedLinear)]
    # Two in each perceptron and in what mixes tokens, of five blocks
    assert len(packed) == 20 and sum(m.act is not None for m in packed) == 5
    convolutions = [m for m in optimized.modules() if isinstance(m, nn.Conv2d)]
    # Two in the stem and in each of three blocks, and one between stages; in three blocks and in
    # the stem with what follows inside
    assert len(convolutions) == 11 and all(type(m) is PackedConv2d for m in convolutions)
    assert sum(m.act is not None for m in convolutions) == 5
    acts = (nn.ReLU, nn.GELU)
    inside = [m.act for m in (*packed, *convolutions) if m.act is not None]
    assert {m for m in optimized.modules() if isinstance(m, acts)} == set(inside)
    mixers = [m for _, m in optimized.named_modules() if hasattr(m, "x_proj_weight")]
    assert len(mixers) == 3
    for mixer in mixers:
        assert mixer.dt_proj_weight.shape[1] % 8 == 0
        assert mixer.x_proj_weight.shape[0] == mixer.dt_proj_weight.shape[1] + 16


def test_original_is_untouched_and_shares_nothing():
    model = small(layer_scale=0.5, layer_scale_conv=0.5)
    x = images(1, 3, 64, 64)
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    optimized = model.optimize_for_inference()
    found = optimized(x)
    mine = {p.data_ptr() for p in model.state_dict().values()}
    for name, p in optimized.state_dict().items():
        assert p.data_ptr() not in mine, name
    assert model.state_dict().keys() == before.keys()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    torch.testing.assert_close(optimized(x), found, rtol=0, atol=0)
    model.load_state_dict(before)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert all(p.requires_grad for p in model.parameters())


def test_mixers_of_others_are_kept():
    class Other(nn.Module):
        def forward(self, x):
            return x.roll(1, dims=-1)

    model = small(layer_scale=0.5)
    model.levels[2].blocks[0].mixer = Other()
    model.eval()
    check(model, torch.float32, images(1, 3, 64, 64))


def test_no_casts_in_a_forward_pass():
    """Half precision means: no parameter is cast again in each call."""
    optimized = small().optimize_for_inference(torch.bfloat16)
    held = {p.data_ptr() for p in (*optimized.parameters(), *optimized.buffers())}
    cast = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in held:
                cast.append(args[0].shape)
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        optimized.model.patch_embed(images(1, 3, 64, 64, dtype=torch.bfloat16))
        block = optimized.model.levels[2].blocks[2]
        block(images(1, 16, 64, dtype=torch.bfloat16))
    assert not cast


# How it is used


@pytest.mark.parametrize(
    "duplicate", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))), ids=("copy", "pickle")
)
def test_copies(duplicate):
    optimized = small().optimize_for_inference()
    x = images(1, 3, 64, 64)
    torch.testing.assert_close(duplicate(optimized)(x), optimized(x), rtol=0, atol=0)


def test_state_dict_is_for_another_of_its_kind():
    model, other = small(), MambaVision(**SMALL).eval()
    optimized, another = model.optimize_for_inference(), other.optimize_for_inference()
    another.load_state_dict(optimized.state_dict())
    x = images(1, 3, 64, 64)
    torch.testing.assert_close(another(x), optimized(x), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(optimized.state_dict())


def test_ways_to_maps_that_a_subclass_adds():
    class Timm(MambaVision):
        def forward_intermediates(self, x, indices=None):
            return self.forward_stages(x)[: indices]

    model = alive(Timm(**SMALL))
    x = images(1, 3, 64, 64)
    found = model.optimize_for_inference().forward_intermediates(x, indices=2)
    expected = model.forward_intermediates(x, indices=2)
    assert len(found) == 2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with pytest.raises(AttributeError, match="forward_nowhere"):
        _ = model.optimize_for_inference().forward_nowhere


def test_exported():
    optimized = small().optimize_for_inference()
    x = images(1, 3, 64, 64)
    program = torch.export.export(optimized, (x,))
    torch.testing.assert_close(program.module()(x), optimized(x), rtol=1e-5, atol=1e-5)


def test_compiled_without_graph_breaks():
    optimized = small().optimize_for_inference()
    x = images(1, 3, 64, 64)
    compiled = torch.compile(optimized, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), optimized(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("compile", (True, "max-autotune-no-cudagraphs"), ids=str)
def test_compile_passes_stem_and_stages_through_the_compiler(compile):
    model = small()
    optimized = model.optimize_for_inference(compile=compile)
    seen, modes = [], []

    def compiler(graph, inputs):
        seen.append(len(graph.graph.nodes))
        return graph.forward

    with pytest.MonkeyPatch.context() as patch:
        original = torch.compile

        def compile_plainly(function, mode, **options):
            modes.append(mode)
            return original(function, backend=compiler, **options)

        patch.setattr(torch, "compile", compile_plainly)
        for x in (images(1, 3, 64, 64), images(2, 3, 50, 75)):
            for name, value in outputs(optimized, x).items():
                expected = outputs(model, x)[name]
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4, msg=name)
    # One graph for each shape, whichever method asks for it first
    assert len(seen) == 2 and min(seen) > 100
    again = pickle.loads(pickle.dumps(optimized))
    assert again.compiled == compile and again._compiled is None
    assert modes == [None if compile is True else compile]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("compile", (False, True), ids=("eager", "compiled"))
def test_cuda_graphs(dtype, compile):
    model = small(layer_scale=0.5).cuda()
    with pytest.raises(ValueError, match="CUDA graphs itself.*max-autotune-no-cudagraphs"):
        model.optimize_for_inference(dtype, cuda_graph=True, compile="reduce-overhead")
    optimized = model.optimize_for_inference(dtype)
    graphed = model.optimize_for_inference(dtype, cuda_graph=True, compile=compile)
    for x in (images(2, 3, 64, 64), images(1, 3, 50, 75), images(2, 3, 64, 64) + 1):
        x = x.to("cuda", dtype)
        for given, found in ((x, graphed(x)), (x + 1, graphed(x + 1))):
            eager = optimized(given)
            if compile and dtype == torch.float16:
                # Fused operators round less often: what counts is the distance to float32
                with torch.no_grad():
                    exact = model(given.float())
                assert_close({"logits": found}, {"logits": eager}, {"logits": exact})
            else:
                torch.testing.assert_close(found, eager, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(copy.deepcopy(graphed)(x), graphed(x), rtol=1e-3, atol=1e-3)


# What is refused


def test_refuses_to_begin():
    model = small()
    with pytest.raises(RuntimeError, match=r"training mode.*model\.eval\(\)"):
        copy.deepcopy(model).train().optimize_for_inference()
    with pytest.raises(RuntimeError, match="training mode"):
        part = copy.deepcopy(model)
        part.levels[0].train()
        part.optimize_for_inference()
    with pytest.raises(RuntimeError, match="CUDA device, got cpu"):
        model.optimize_for_inference(cuda_graph=True)
    with pytest.raises(ValueError, match="'max-autotune'.*, got 'fastest'"):
        model.optimize_for_inference(compile="fastest")
    with pytest.raises(TypeError, match=r"floating-point torch\.dtype, got torch.int8"):
        model.optimize_for_inference(torch.int8)
    with pytest.raises(TypeError, match="must be a MambaVision, got Linear"):
        optimize_for_inference(nn.Linear(1, 1))


def test_refuses_to_be_trained():
    optimized = small().optimize_for_inference()
    assert isinstance(optimized, OptimizedMambaVision) and not optimized.training
    assert optimized.eval() is optimized and optimized.train(False) is optimized
    with pytest.raises(RuntimeError, match="cannot be trained"):
        optimized.train()
    with pytest.raises(RuntimeError, match="no gradients"):
        optimized.requires_grad_()
    x = images(1, 3, 64, 64).requires_grad_()
    for method in (optimized, optimized.forward_features, optimized.forward_stages):
        with pytest.raises(RuntimeError, match="no gradients, but x requires one"):
            method(x)
    with torch.no_grad():
        assert not optimized(x).requires_grad
    assert not optimized(x.detach()).requires_grad


def test_refuses_another_dtype():
    optimized = small().optimize_for_inference()
    for move in (optimized.half, optimized.double, lambda: optimized.to(torch.bfloat16)):
        with pytest.raises(RuntimeError, match="optimize_for_inference"):
            move()
    assert optimized.to("cpu") is optimized
    with pytest.raises(TypeError, match="float32, got torch.float16"):
        optimized(images(1, 3, 64, 64, dtype=torch.float16))

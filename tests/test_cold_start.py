"""warmup: which calls it finds, what it leaves alone, and what compiling ahead takes."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import mambavision
from mambavision import MambaVision, MambaVisionMixer, create_model
from mambavision.cold_start import Call, _compilations, _run, inference_calls, mixer_calls

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "dim": 16, "in_dim": 8, "depths": (1, 1, 3, 3), "window_size": (8, 8, 4, 2), "mlp_ratio": 2,
    "num_heads": (1, 1, 2, 4), "num_classes": 5,
}  # fmt: skip


def found(calls):
    return [(call.shape, call.dtype) for call in calls]


@pytest.mark.parametrize(
    "size,batch,windows",
    ((64, 1, (1, 1)), ((64, 64), 3, (3, 3)), ((96, 50), 1, (2, 2)), ((160, 70), 2, (12, 12))),
    ids=str,
)
@pytest.mark.parametrize("optimized", (False, True), ids=("plain", "optimized"))
def test_finds_the_calls(size, batch, windows, optimized):
    model = MambaVision(**SMALL).train(not optimized)
    if optimized:
        model = model.optimize_for_inference()
    expected = [((windows[0], 16, 64), torch.float32), ((windows[1], 4, 128), torch.float32)]
    assert found(mixer_calls(model, size, batch)) == expected


def test_finds_each_kind_once():
    with torch.device("meta"):
        model = create_model("mamba_vision_T")
    assert found(mixer_calls(model, 224, 2)) == [
        ((2, 196, 320), torch.float32), ((2, 49, 640), torch.float32)
    ]  # fmt: skip
    # A mixer partly frozen has another backward pass
    model.levels[2].blocks[1].mixer.A_log.requires_grad_(False)
    assert len(mixer_calls(model, 224, 2)) == 3
    assert mixer_calls(torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3))) == []


def test_finds_the_other_parts_with_kernels():
    """Stem, convolution blocks, and of token blocks attention and norms; the image as it comes."""
    model = MambaVision(**SMALL).eval().to(memory_format=torch.channels_last)
    calls = inference_calls(model, 64, 2)
    assert [(type(call.module).__name__, call.shape, call.channels_last) for call in calls] == [
        ("Stem", (2, 3, 64, 64), False),
        ("ConvBlock", (2, 16, 16, 16), True),
        ("ConvBlock", (2, 32, 8, 8), True),
        ("Block", (2, 16, 64), False),
        ("Attention", (2, 16, 64), False),
        ("Block", (2, 4, 128), False),
        ("Attention", (2, 4, 128), False),
    ]
    for call in calls:
        _run(call, torch.device("cpu"), torch.float32)
        norms = {"norm1", "norm2", "mixer", "mlp", "drop_path"}
        if "Block" == type(call.module).__name__:
            assert {name for name, _ in call.module.named_children()} == norms
            assert not list(call.module.mixer.parameters())


def test_looking_leaves_no_trace():
    model = MambaVision(**SMALL, drop_rate=0.1, attn_drop_rate=0.1)
    before = {name: (x.clone(), x._version) for name, x in model.state_dict().items()}
    seed = torch.get_rng_state()
    mixer_calls(model, 64, 4)
    assert torch.equal(torch.get_rng_state(), seed)
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name][0]) and x._version == before[name][1], name
    inference_calls(model, 64, 4)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize("training", (False, True), ids=("evaluation", "training"))
def test_running_adds_no_gradients(monkeypatch, training):
    directions = []
    operator = import_module("mambavision.torch_backend.mixer").Mixer
    for name in ("forward", "backward"):
        original = getattr(operator, name)

        def spy(*args, name=name, original=original):
            directions.append(name)
            return original(*args)

        monkeypatch.setattr(operator, name, staticmethod(spy))
    mixer = MambaVisionMixer(16, d_state=2, d_conv=3, expand=1).train(training)
    mixer.D.requires_grad_(False)
    mixer.register_forward_hook(lambda *_: directions.append("hook"))
    for dtype in (torch.float32, torch.bfloat16):
        _run(Call(mixer, (2, 5, 16), torch.float32), torch.device("cpu"), dtype)
    assert all(p.grad is None for p in mixer.parameters())
    assert directions == (["forward", "backward"] * 2 if training else ["forward"] * 2)


def test_nothing_to_compile_on_a_cpu(capsys):
    assert mambavision.warmup(MambaVision(**SMALL), 64) == {}
    assert mambavision.warmup(torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3)), 64) == {}
    first, second = capsys.readouterr().err.splitlines()
    assert first == "warmup: nothing to compile: on cpu mixers run in plain PyTorch"
    assert second == "warmup: nothing to compile: the model has no mixers of this package"


@pytest.mark.parametrize(
    "arguments,words",
    (
        ({"input_size": 31}, "at least 32, got 31"),
        ({"input_size": (64, 64, 64)}, "one or two integers"),
        ({"input_size": 64, "batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"input_size": 64, "dtype": torch.float64}, "must be the model's torch.float32 or"),
    ),
)
def test_refuses(arguments, words):
    with pytest.raises(ValueError, match=words):
        mambavision.warmup(MambaVision(**SMALL), **arguments)


def test_compilations_are_timed_and_hooks_of_others_called():
    runtime = pytest.importorskip("triton").knobs.runtime
    theirs, ours = [], []
    kernel = type("Info", (), {"name": "module._scan_kernel"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "jit_cache_hook", lambda **facts: theirs.append("begin"))
        patch.setattr(runtime, "jit_post_compile_hook", lambda **facts: theirs.append("end"))
        hooks = runtime.jit_cache_hook, runtime.jit_post_compile_hook
        with _compilations(lambda *compiled: ours.append(compiled)):
            assert runtime.jit_cache_hook(fn=kernel) is None
            runtime.jit_post_compile_hook(fn=kernel)
        assert (runtime.jit_cache_hook, runtime.jit_post_compile_hook) == hooks
    ((name, seconds),) = ours
    assert name == "scan_kernel" and 0 <= seconds < 1 and theirs == ["begin", "end"]


@pytest.mark.gpu
def test_after_a_warmup_inference_compiles_nothing():
    model = MambaVision(**SMALL).cuda().eval().half().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64, device="cuda", dtype=torch.float16)
    compiled = []
    for ready in (model, model.optimize_for_inference()):
        mambavision.warmup(ready, 64, batch_size=2)
        with _compilations(lambda kernel, took: compiled.append(kernel)), torch.inference_mode():
            ready(x)
        assert not compiled


@pytest.mark.gpu
@pytest.mark.parametrize("training", (False, True), ids=("evaluation", "training"))
def test_after_a_warmup_nothing_is_compiled(training):
    model = MambaVision(**SMALL).cuda().train(training)
    seconds = mambavision.warmup(model, 64, torch.float16, batch_size=2)
    assert any("scan_bwd" in name for name in seconds) == training
    assert all(p.grad is None for p in model.parameters())
    compiled = []
    x = torch.randn(2, 3, 64, 64, device="cuda")
    with _compilations(lambda kernel, took: compiled.append(kernel)):
        with torch.set_grad_enabled(training), torch.autocast("cuda", torch.float16):
            out = model(x)
        if training:
            out.float().sum().backward()
    assert not compiled


MIXERS_FORWARD = {"project_kernel", "scan_fwd_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options,names",
    (
        ((), MIXERS_FORWARD | {"scan_bwd_kernel", "project_bwd_kernel", "convolve_bwd_kernel"}),
        (
            ("--inference",),
            MIXERS_FORWARD
            | {"stem_conv_kernel", "norm_act_kernel", "add_layer_norm_kernel", "attention_kernel"},
        ),
    ),
    ids=("training", "inference"),
)
def test_kernels_of_a_model_compile_in_time(options, names):
    """At most 20 s on two cores with nothing cached; as CPU time, which depends less on what else
    runs."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / "cold_start.py"), *options, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {row[0] for row in result["kernels"]} == names
    assert sum(row[2] for row in result["kernels"]) > 2
    assert result["cpu"] <= 40, result["kernels"]

"""mambavision.timm with timm itself: registry, published model checks, weights, training scripts."""

import copy
import math
import os
import pickle
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mambavision import MambaVision, create_model, save_checkpoint
from mambavision.published import Variant

timm = pytest.importorskip("timm", exc_type=ImportError)

from timm.data import (  # noqa: E402
    Mixup,
    create_dataset,
    create_loader,
    create_transform,
    resolve_data_config,
    resolve_model_data_config,
)
from timm.loss import SoftTargetCrossEntropy  # noqa: E402
from timm.models import (  # noqa: E402
    FeatureInfo,
    get_notrace_functions,
    get_notrace_modules,
    group_parameters,
    resume_checkpoint,
)
from timm.models import load_checkpoint as timm_load_checkpoint  # noqa: E402
from timm.models._hub import save_for_hf  # noqa: E402
from timm.optim import create_optimizer_v2, optimizer_kwargs  # noqa: E402
from timm.scheduler import create_scheduler_v2, scheduler_kwargs  # noqa: E402
from timm.utils import (  # noqa: E402
    AverageMeter,
    CheckpointSaver,
    ModelEmaV3,
    NativeScaler,
    accuracy,
)

from mambavision import timm as ours  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TINY = Variant(
    "", dim=8, in_dim=4, depths=(1, 2, 3, 2), num_heads=(1, 1, 2, 4), window_size=(8, 8, 4, 2),
    mlp_ratio=2.0, layer_scale=0.5, input_size=64, crop_pct=0.9, crop_mode="squash",
)  # fmt: skip
# Registered as the published ones are.
ours.register("mamba_vision_tiny", TINY)
# Repository, input size, crop, as published.
PUBLISHED = {
    "mamba_vision_T": ("T-1K", 224, 1.0, "center"),
    "mamba_vision_T2": ("T2-1K", 224, 0.98, "center"),
    "mamba_vision_S": ("S-1K", 224, 0.93, "center"),
    "mamba_vision_B": ("B-1K", 224, 1.0, "center"),
    "mamba_vision_B_21k": ("B-21K", 224, 1.0, "center"),
    "mamba_vision_L": ("L-1K", 224, 1.0, "center"),
    "mamba_vision_L_21k": ("L-21K", 224, 1.0, "center"),
    "mamba_vision_L2": ("L2-1K", 224, 1.0, "center"),
    "mamba_vision_L2_512_21k": ("L2-512-21K", 512, 0.93, "squash"),
    "mamba_vision_L3_256_21k": ("L3-256-21K", 256, 1.0, "center"),
    "mamba_vision_L3_512_21k": ("L3-512-21K", 512, 0.93, "squash"),
}


def tiny(seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model("mamba_vision_tiny", **kwargs)


def images(*shape, seed=1):
    shape = shape or (2, 3, 64, 64)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def same_weights(found, expected, but=()):
    found, expected = found.state_dict(), expected.state_dict()
    assert set(found) - set(but) <= set(expected)
    for name in set(found) - set(but):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)


# The registry


def test_registered_names():
    found = [n for n in timm.list_models("mamba_vision*") if n != "mamba_vision_tiny"]
    assert sorted(found) == sorted(PUBLISHED)
    assert set(timm.list_pretrained("mamba_vision*")) == set(PUBLISHED)
    assert set(PUBLISHED) < set(ours.__all__)
    assert timm.model_entrypoint("mamba_vision_T") is ours.mamba_vision_T


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name):
    repository, size, crop_pct, crop_mode = PUBLISHED[name]
    with torch.device("meta"):
        model, plain = timm.create_model(name), create_model(name)
    assert {k: x.shape for k, x in model.state_dict().items()} == {
        k: x.shape for k, x in plain.state_dict().items()
    }
    assert model.arguments == plain.arguments
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.hf_hub_id == f"nvidia/MambaVision-{repository}"
    assert (cfg.num_classes, cfg.license) == (1000, "cc-by-nc-sa-4.0")
    assert cfg.pool_size == (math.ceil(size / 32),) * 2
    assert resolve_model_data_config(model) == {
        "input_size": (3, size, size),
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
    }


def run(code, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


def test_other_registrations():
    """The later of two imports has the names, and says so once; importing again says nothing."""
    done = run("""
import importlib, sys, types, warnings
import timm
other = types.ModuleType("other")
sys.modules["other"] = other
exec("def mamba_vision_T(pretrained=False, **kwargs): return 'other'", vars(other))

warnings.simplefilter("always")
timm.models.register_model(other.mamba_vision_T)
with warnings.catch_warnings(record=True) as caught:
    import mambavision.timm as ours
print([str(w.message) for w in caught])
assert timm.model_entrypoint("mamba_vision_T") is ours.mamba_vision_T
assert "mamba_vision_T" not in timm.list_models(module="other")

with warnings.catch_warnings(record=True) as caught:
    importlib.reload(ours)
    import mambavision.timm
assert not caught, [str(w.message) for w in caught]
assert timm.model_entrypoint("mamba_vision_T") is ours.mamba_vision_T
assert timm.list_models("mamba_vision_T") == ["mamba_vision_T"]

with warnings.catch_warnings(record=True) as caught:
    timm.models.register_model(other.mamba_vision_T)
assert len(caught) == 1 and "Overwriting mamba_vision_T" in str(caught[0].message)
assert timm.model_entrypoint("mamba_vision_S") is ours.mamba_vision_S
""")
    (line,) = done.stdout.splitlines()
    assert "were those of other and now are those of mambavision.timm" in line
    assert line.count("mambavision.timm") == 1


def test_without_timm():
    done = run("""
import sys
sys.modules["timm"] = None
import mambavision
try:
    import mambavision.timm
except ImportError as error:
    print(error)
""")
    (line,) = done.stdout.splitlines()
    assert "pip install 'mambavision-triton[timm]'" in line


# What timm checks of every model


def test_forward_and_checkpointing():
    model = tiny().eval()
    expected = model(images())
    assert expected.shape == (2, 1000) and expected.isfinite().all()
    model.set_grad_checkpointing(enable=True)
    torch.testing.assert_close(model(images()), expected)
    model.set_grad_checkpointing(False)
    assert not any(stage.grad_checkpointing for stage in model.levels)


def test_same_values_as_without_timm():
    model = tiny(num_classes=7).eval()
    plain = MambaVision(**TINY.arguments, num_classes=7).eval()
    plain.load_state_dict(model.state_dict())
    same(model(images()), plain(images()))


@pytest.mark.parametrize("checkpointing", (False, True))
def test_backward_reaches_every_parameter(checkpointing):
    model = tiny(num_classes=42).train()
    model.set_grad_checkpointing(checkpointing)
    out = model(images())
    assert out.shape == (2, 42)
    out.square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


def test_default_cfg_fits_the_model():
    model = tiny().eval()
    cfg, names = model.default_cfg, set(model.state_dict())
    assert cfg["architecture"] == "mamba_vision_tiny" and "license" not in cfg
    assert {f"{cfg['classifier']}.weight", f"{cfg['first_conv']}.weight"} <= names
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])

    x = images(1, *cfg["input_size"])
    maps = model.forward_features(x)
    assert maps.shape == (1, model.num_features, *cfg["pool_size"])
    pooled = model.forward_head(maps, pre_logits=True)
    assert pooled.shape == (1, model.head_hidden_size)
    same(model.head(pooled), model(x))

    model.reset_classifier(0)
    assert model.num_classes == 0
    same(model(x), pooled)
    model.reset_classifier(0, "")
    same(model(x), maps)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (1, 3)

    assert tiny(num_classes=0).eval()(x).shape == pooled.shape
    assert tiny(num_classes=0, global_pool="").eval()(x).shape == maps.shape
    with pytest.raises(ValueError, match="global_pool='' needs num_classes = 0"):
        tiny(global_pool="")
    with pytest.raises(ValueError, match="global_pool must be 'avg' or '', got 'max'"):
        tiny(global_pool="max")


@pytest.mark.parametrize("size", ((64, 64), (33, 95)))
def test_forward_intermediates(size):
    model = tiny().eval()
    x = images(1, 3, *size)
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    expected = model.forward_stages(x)
    last, maps = model.forward_intermediates(x)
    assert len(maps) == len(info.channels()) == 4
    same(last, model.forward_features(x))
    for map, stage, channels, reduction, module in zip(
        maps, expected, info.channels(), info.reduction(), info.module_name(), strict=True
    ):
        same(map, stage)
        assert map.shape[1:] == (channels, *(math.ceil(edge / reduction) for edge in size))
        assert module in dict(model.named_modules())
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.forward_intermediates(x)[0], last)


def test_forward_intermediates_options():
    model, x = tiny().eval(), images()
    stages = model.forward_stages(x)
    for indices, expected in ((2, (2, 3)), ((-1, 0), (3, 0)), ([1], (1,)), ((2, 2), (2, 2))):
        maps = model.forward_intermediates(x, indices, intermediates_only=True)
        for map, index in zip(maps, expected, strict=True):
            same(map, stages[index])
    last, maps = model.forward_intermediates(x, (0, 3), norm=True)
    same(maps, [stages[0], model.norm(stages[3])])
    same(last, maps[1])

    ran = []
    handles = [stage.register_forward_hook(lambda *_: ran.append(1)) for stage in model.levels]
    last, maps = model.forward_intermediates(x, (1,), norm=True, stop_early=True)
    assert len(ran) == 2
    same([last], maps)
    for handle in handles:
        handle.remove()
    for wrong in (0, 5, (4,), (0, -5), ()):
        with pytest.raises(ValueError, match="indices must be 1 to 4, or stages from -4 to 3"):
            model.forward_intermediates(x, wrong)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")


@pytest.mark.parametrize("training", (False, True))
def test_symbolic_trace(training):
    """torchvision's feature extraction, as timm's own tests take it."""
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    how = {
        "leaf_modules": list(get_notrace_modules()),
        "autowrap_functions": list(get_notrace_functions()),
    }
    model = tiny(num_classes=42, drop_path_rate=0.0).train(training)
    _, names = feature_extraction.get_graph_node_names(model, tracer_kwargs=how)
    traced = feature_extraction.create_feature_extractor(
        copy.deepcopy(model), [names[-1]], tracer_kwargs=how
    )
    (found,) = traced(images()).values()
    same(found, model(images()))
    if training:
        found.square().mean().backward()
        assert not [n for n, p in traced.named_parameters() if p.grad is None]


def test_drop_path_and_dropout():
    rates = [
        m.drop_prob for m in tiny(drop_path_rate=0.7).modules() if hasattr(m, "drop_prob")
    ]
    torch.testing.assert_close(rates, torch.linspace(0, 0.7, 8).tolist())
    assert {m.p for m in tiny(drop_rate=0.25).modules() if isinstance(m, torch.nn.Dropout)} == {0.25}
    model = tiny(drop_path_rate=0.9, drop_rate=0.5)
    assert not torch.equal(model(images()), model(images()))
    model.eval()
    same(model(images()), model(images()))


# Feature maps


@pytest.mark.parametrize("out_indices", ((0, 1, 2, 3), (3,), (0, 2), (1,), (-2,), (3, 1), 2, 4))
def test_features_only(out_indices):
    whole = tiny().eval()
    model = tiny(features_only=True, out_indices=out_indices).eval()
    model.model.load_state_dict({k: whole.state_dict()[k] for k in model.model.state_dict()})
    asked = range(4 - out_indices, 4) if isinstance(out_indices, int) else out_indices
    maps, expected = model(images()), whole.forward_stages(images())
    for map, index, channels, reduction in zip(
        maps, asked, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        same(map, expected[index])
        assert (map.shape[1], 64 // map.shape[2]) == (channels, reduction)
    # As DistributedDataParallel wants it.
    sum(map.square().mean() for map in model.train()(images())).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


def test_features_only_default_is_all_stages():
    model = tiny(features_only=True)
    assert model.feature_info.channels() == [8, 16, 32, 64]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert "num_classes" not in model.pretrained_cfg


def test_pruned_model_takes_a_new_classifier():
    model = tiny().eval()
    stages, normalised = model.forward_stages(images()), model.forward_features(images())
    assert model.prune_intermediate_layers((1,)) == [1]
    same(model(images()), stages[1])
    assert (model.num_features, model.head_hidden_size) == (16, 16)
    model.reset_classifier(5, "avg")
    assert model(images()).shape == (2, 5)

    model = tiny().eval()
    assert model.prune_intermediate_layers(1, prune_head=False) == [3]
    same(model.forward_features(images()), normalised)
    assert model(images()).shape == (2, 1000)
    model.prune_intermediate_layers(1, prune_norm=True)
    same(model(images()), stages[3])


# Weights


@pytest.mark.parametrize("layout", ("ema", "ddp", "bare", "hub", "own"))
def test_weights_from_a_file(tmp_path, layout):
    source = tiny(seed=1)
    state = source.state_dict()
    path = tmp_path / ("m.safetensors" if layout in ("hub", "own") else "m.pth.tar")
    if layout == "ema":
        other = tiny(seed=2).state_dict()
        ema = {f"module.{k}": x for k, x in state.items()}
        torch.save({"state_dict": other, "state_dict_ema": ema, "args": Namespace(lr=1)}, path)
    elif layout == "ddp":
        content = {"state_dict": {f"module.encoder.{k}": x for k, x in state.items()}}
        torch.save(content, path)
    elif layout == "bare":
        torch.save(state, path)
    elif layout == "hub":
        save_file({f"model.{k}": x for k, x in state.items()}, path)
    else:
        save_checkpoint(source, path)
    overlay = {"file": str(path)}
    same_weights(tiny(pretrained=True, pretrained_cfg_overlay=overlay), source)
    features = tiny(pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
    same_weights(features.model, source)


HEAD = ("head.weight", "head.bias")


def test_weights_for_other_classes(tmp_path):
    ten, thousand = tiny(seed=1, num_classes=10), tiny(seed=1)
    save_checkpoint(ten, tmp_path / "10.pth")
    save_checkpoint(thousand, tmp_path / "1000.pth")
    from_ten = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "10.pth")}}
    from_1000 = {"pretrained": True, "pretrained_cfg_overlay": {"file": tmp_path / "1000.pth"}}

    model, fresh = tiny(num_classes=5, **from_1000), tiny(num_classes=5)
    same_weights(model, thousand, but=HEAD)
    same(model.head.weight, fresh.head.weight)
    same_weights(tiny(num_classes=0, **from_1000), thousand)
    same_weights(tiny(features_only=True, **from_ten).model, ten)
    # Those asked for are those in the file.
    same_weights(tiny(num_classes=10, **from_ten), ten)
    with pytest.raises(ValueError, match=r"head.weight \(10, 64\), expected \(1000, 64\)"):
        tiny(**from_ten)


@pytest.mark.parametrize("chans", (1, 2, 4, 6))
def test_weights_for_other_channels(tmp_path, chans):
    source = tiny(seed=1)
    save_checkpoint(source, tmp_path / "m.pth")
    overlay = {"file": str(tmp_path / "m.pth")}
    model = tiny(pretrained=True, pretrained_cfg_overlay=overlay, in_chans=chans).eval()
    conv = "patch_embed.conv_down.0.weight"
    same_weights(model, source, but=[conv])
    found, rgb = model.state_dict()[conv], source.state_dict()[conv]
    if chans == 1:
        expected = rgb.sum(1, keepdim=True)
    else:
        expected = rgb.repeat(1, 2, 1, 1)[:, :chans] * 3 / chans
    torch.testing.assert_close(found, expected)
    assert model(images(1, chans, 64, 64)).shape == (1, 1000)

    save_checkpoint(model, tmp_path / "again.pth")
    cfg = {"file": str(tmp_path / "again.pth"), "input_size": (chans, 64, 64)}
    same_weights(tiny(pretrained=True, pretrained_cfg_overlay=cfg), model)


def test_weights_that_do_not_fit(tmp_path):
    path = tmp_path / "m.pth"
    how = {"pretrained": True, "num_classes": 5, "pretrained_cfg_overlay": {"file": str(path)}}
    with pytest.raises(FileNotFoundError, match="no file .*m.pth"):
        tiny(**how)
    with torch.device("meta"):
        small = create_model("mamba_vision_S").state_dict()
    torch.save({k: torch.zeros(()).expand(x.shape) for k, x in small.items()}, path)
    with pytest.raises(ValueError, match="the weights have the sizes of mamba_vision_S; "):
        tiny(**how)
    state = tiny(seed=1).state_dict()
    del state["norm.weight"]
    torch.save(state, path)
    with pytest.raises(ValueError, match="1 missing: norm.weight"):
        tiny(**how)
    same(tiny(pretrained_strict=False, **how).norm.bias, state["norm.bias"])
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="m.pth is damaged or truncated"):
        tiny(**how)
    with pytest.raises(RuntimeError, match="No pretrained weights exist for mamba_vision_tiny"):
        tiny(pretrained=True)


def test_weights_that_timm_finds(tmp_path):
    """A state dict in the config, timm's own folders, and checkpoint_path."""
    source = tiny(seed=1, num_classes=5)
    state = {f"model.{k}": x for k, x in source.state_dict().items()}
    overlay = {"state_dict": state, "num_classes": 5}
    same_weights(tiny(pretrained=True, pretrained_cfg_overlay=overlay), source)

    for safe in (True, False):
        folder = tmp_path / str(safe)
        save_for_hf(source, folder, safe_serialization=safe)
        again = timm.create_model(f"local-dir:{folder}", pretrained=True)
        assert type(again) is ours.TimmMambaVision and again.num_classes == 5
        same_weights(again, source)

    torch.save({"state_dict": {f"module.{k}": x for k, x in source.state_dict().items()}}, "m.pth")
    same_weights(tiny(num_classes=5, checkpoint_path="m.pth"), source)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

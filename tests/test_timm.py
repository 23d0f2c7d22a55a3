"""mambavision.timm with timm itself: registry, its model checks, weights, training scripts."""

import copy
import math
import os
import pickle
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
    random_seed,
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
    rates = [m.drop_prob for m in tiny(drop_path_rate=0.7).modules() if hasattr(m, "drop_prob")]
    torch.testing.assert_close(rates, torch.linspace(0, 0.7, 8).tolist())
    dropouts = [m for m in tiny(drop_rate=0.25).modules() if isinstance(m, torch.nn.Dropout)]
    assert {m.p for m in dropouts} == {0.25}
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

    path = str(tmp_path / "m.pth")
    torch.save({"state_dict": {f"module.{k}": x for k, x in source.state_dict().items()}}, path)
    same_weights(tiny(num_classes=5, checkpoint_path=path), source)


def test_published_weights_from_the_hub_cache(tmp_path):
    """The layout of huggingface_hub's cache, and then no network."""
    torch.manual_seed(0)
    source = create_model("mamba_vision_T").half()
    home = tmp_path / "hub" / "models--nvidia--MambaVision-T-1K"
    files = home / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    files.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(files.name)
    state = {f"model.{k}": x for k, x in source.state_dict().items()}
    save_file(state, files / "model.safetensors")
    done = run(
        f"""
import timm, mambavision.timm
def show(**kwargs):
    model = timm.create_model("mamba_vision_T", pretrained=True, **kwargs)
    model = getattr(model, "model", model)
    print(model.levels[3].blocks[0].mixer.D.sum().item(), model.num_classes)
show()
show(num_classes=3)
show(features_only=True)
show(cache_dir={str(tmp_path / "hub")!r})
try:
    timm.create_model("mamba_vision_S", pretrained=True)
except RuntimeError as error:
    print(error)
""",
        HF_HOME=str(tmp_path),
        HF_HUB_OFFLINE="1",
    )
    D = source.levels[3].blocks[0].mixer.D.float().sum().item()
    *found, offline = done.stdout.splitlines()
    assert found == [f"{D} {classes}" for classes in (1000, 3, 0, 1000)]
    assert "nvidia/MambaVision-S-1K cannot be fetched (offline" in offline
    assert done.stderr.count("CC-BY-NC-SA") == 1


# Optimizers


def test_layer_decay():
    model = tiny(num_classes=5)
    layers = group_parameters(model, model.group_matcher())
    tops = [{".".join(name.split(".")[:4]) for name in layers[i]} for i in range(len(layers))]
    blocks = [(stage, block) for stage in range(4) for block in range(TINY.depths[stage])]
    expected = [f"levels.{stage}.blocks.{block}" for stage, block in blocks]
    assert all(name.startswith("patch_embed.") for name in layers[0])
    for found, block in zip(tops[1:-1], expected, strict=True):
        assert block in found
    between = {
        name for block, names in zip(expected, tops[1:-1], strict=True) for name in names - {block}
    }
    assert between == {f"levels.{s}.downsample.reduction" for s in range(3)} | {
        "norm.weight", "norm.bias",
    }  # fmt: skip
    assert "levels.1.downsample.reduction" in tops[3]
    assert layers[len(layers) - 1] == ["head.weight", "head.bias"]
    coarse = group_parameters(model, model.group_matcher(coarse=True))
    assert len(coarse) == 6 and "norm.weight" in coarse[4]

    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    names = {p: n for n, p in model.named_parameters()}
    scale = {
        names[p]: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert set(scale) == set(names.values())
    assert scale["head.weight"] == (1.0, 0.05) and scale["head.bias"] == (1.0, 0.0)
    assert scale["norm.weight"] == (0.5, 0.0)
    assert scale["patch_embed.conv_down.0.weight"] == (0.5**9, 0.05)
    assert scale["levels.2.blocks.0.mixer.A_log"] == (0.5**5, 0.0)
    assert scale["levels.2.blocks.0.mixer.in_proj.weight"] == (0.5**5, 0.05)


@pytest.mark.parametrize("opt", ("adamw", "lamb", "sgd", "muon"))
def test_no_weight_decay(opt):
    model = tiny(num_classes=5)
    optimizer = create_optimizer_v2(model, opt, lr=1e-3, weight_decay=0.05)
    names = {p: n for n, p in model.named_parameters()}
    still = {names[p] for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]}
    assert still == model.no_weight_decay()
    assert "levels.2.blocks.0.mixer.A_log" in still and "levels.0.blocks.0.gamma" not in still
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(images()).square().mean().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(before["head.weight"], model.head.weight)


# Scripts in the manner of timm's train.py and validate.py

ARGS = Namespace(
    model="mamba_vision_tiny", num_classes=2, in_chans=None, drop=0.0, drop_path=0.1,
    drop_block=None, gp=None, bn_momentum=None, bn_eps=None, torchscript=False,
    img_size=None, input_size=None, crop_pct=None, interpolation="", mean=None, std=None,
    opt="adamw", opt_eps=None, opt_betas=None, lr=1e-3, weight_decay=0.05, momentum=0.9,
    layer_decay=0.8, clip_grad=1.0, clip_mode="norm",
    sched="cosine", epochs=3, warmup_epochs=1, warmup_lr=1e-5, min_lr=0.0, cooldown_epochs=0,
    aa="rand-m7-mstd0.5-inc1", reprob=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1,
)  # fmt: skip


def picture_folder(root):
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        for label, channel in (("blue", 2), ("red", 0)):
            (root / part / label).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 120, (70, 80, 3))
                pixels[..., channel] += 120
                image = Image.fromarray(pixels.astype(np.uint8))
                image.save(root / part / label / f"{index}.png")
    return root


def script_model(args, **kwargs):
    return timm.create_model(
        args.model, pretrained=False, num_classes=args.num_classes, in_chans=3,
        drop_rate=args.drop, drop_path_rate=args.drop_path, drop_block_rate=args.drop_block,
        global_pool=args.gp, bn_momentum=args.bn_momentum, bn_eps=args.bn_eps,
        scriptable=args.torchscript, **kwargs,
    )  # fmt: skip


def script_loader(config, root, part, **kwargs):
    dataset = create_dataset("", root=root, split=part, is_training=part == "train")
    return create_loader(
        dataset, config["input_size"], 4, is_training=part == "train", use_prefetcher=False,
        interpolation=config["interpolation"], mean=config["mean"], std=config["std"],
        crop_pct=config["crop_pct"], crop_mode=config["crop_mode"], num_workers=0, **kwargs,
    )  # fmt: skip


@torch.no_grad()
def script_validate(model, loader):
    model.eval()
    top1 = AverageMeter()
    for x, target in loader:
        top1.update(accuracy(model(x), target, topk=(1,))[0].item(), len(x))
    return top1.avg


def test_training_scripts(tmp_path):
    data = picture_folder(tmp_path / "data")
    random_seed(0)
    model = script_model(ARGS)
    model.set_grad_checkpointing(enable=True)
    config = resolve_data_config(vars(ARGS), model=model)
    assert config["input_size"] == (3, 64, 64) and config["crop_mode"] == "squash"
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=ARGS))
    ema, scaler = ModelEmaV3(model, decay=0.5), NativeScaler(device="cpu")
    train = script_loader(
        config, data, "train", re_prob=ARGS.reprob, color_jitter=0.4, auto_augment=ARGS.aa
    )
    val = script_loader(config, data, "val")
    assert (len(train), len(val.dataset)) == (4, 8)
    mixup = Mixup(
        mixup_alpha=ARGS.mixup, cutmix_alpha=ARGS.cutmix, label_smoothing=ARGS.smoothing,
        num_classes=ARGS.num_classes,
    )  # fmt: skip
    scheduler, epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(ARGS), updates_per_epoch=len(train)
    )
    saver = CheckpointSaver(
        model, optimizer, args=ARGS, model_ema=ema, amp_scaler=scaler, checkpoint_dir=tmp_path,
        recovery_dir=tmp_path,
    )  # fmt: skip
    loss_function = SoftTargetCrossEntropy()
    before = copy.deepcopy(model.state_dict())
    for epoch in range(epochs):
        model.train()
        for x, target in train:
            x, target = mixup(x, target)
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_function(model(x).float(), target)
            assert loss.isfinite()
            optimizer.zero_grad()
            scaler(
                loss, optimizer, clip_grad=ARGS.clip_grad, clip_mode=ARGS.clip_mode,
                parameters=model.parameters(),
            )  # fmt: skip
            ema.update(model)
        scheduler.step(epoch + 1)
        top1 = script_validate(ema.module, val)
        saver.save_checkpoint(epoch, metric=top1)
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert set(moved) == {n for n, _ in model.named_parameters()}

    again = script_model(ARGS)
    other = create_optimizer_v2(again, **optimizer_kwargs(cfg=ARGS))
    assert resume_checkpoint(again, tmp_path / "last.pth.tar", other, scaler) == epochs
    same_weights(again, model)
    step = [state["step"] for state in other.state.values()]
    assert set(map(float, step)) == {float(epochs * len(train))}

    # As validate.py does it; and as weights to start from.
    last = str(tmp_path / "last.pth.tar")
    validated = timm.create_model("mamba_vision_tiny", num_classes=2)
    timm_load_checkpoint(validated, last, use_ema=True)
    same_weights(validated, ema.module)
    assert script_validate(validated, val) == top1
    overlay = {"file": last, "num_classes": 2}
    same_weights(tiny(pretrained=True, pretrained_cfg_overlay=overlay), ema.module)


def test_evaluation_transform():
    """What is squashed keeps its borders, up to the crop; what is centred does not."""
    wide = np.zeros((100, 300, 3), np.uint8)
    wide[:, 30:270] = 255
    model = tiny()
    config = resolve_model_data_config(model)
    squashed = create_transform(**config)(Image.fromarray(wide))
    centred = create_transform(**{**config, "crop_mode": "center"})(Image.fromarray(wide))
    assert squashed.shape == centred.shape == (3, 64, 64)
    assert squashed[0, 32, 0] < 0 < centred[0, 32, 0]


# Beside other tools


def test_copies_and_inference(tmp_path):
    model = tiny(num_classes=5).eval()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(copied(images()), model(images()))
        same(copied.forward_intermediates(images()), model.forward_intermediates(images()))
    fast = model.optimize_for_inference()
    with torch.no_grad():
        torch.testing.assert_close(fast(images()), model(images()))
        found = fast.forward_intermediates(images(), (1, 3), intermediates_only=True)
        expected = model.forward_intermediates(images(), (1, 3), intermediates_only=True)
        torch.testing.assert_close(found, expected)
    save_checkpoint(model, tmp_path / "m.safetensors")
    plain = MambaVision(**model.arguments).eval()
    plain.load_state_dict(model.state_dict())
    same(plain(images()), model(images()))


@pytest.mark.parametrize("kwargs", ({}, {"features_only": True}))
def test_no_graph_breaks(kwargs):
    model = tiny(**kwargs).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), model(images()))


def test_transformers_backbone(tmp_path):
    transformers = pytest.importorskip("transformers")
    backbone = transformers.TimmBackboneConfig(
        backbone="mamba_vision_tiny", use_pretrained_backbone=False, out_indices=[0, 1, 2, 3]
    )
    found = transformers.AutoBackbone.from_config(backbone)
    assert found.channels == [8, 16, 32, 64]
    x = images(2, 3, 64, 96)
    maps = found(x).feature_maps
    assert [tuple(map.shape[1:]) for map in maps] == [
        (8, 16, 24), (16, 8, 12), (32, 4, 6), (64, 2, 3),
    ]  # fmt: skip
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, auxiliary_in_channels=32,
        auxiliary_channels=8, num_labels=4,
    )  # fmt: skip
    model = transformers.UperNetForSemanticSegmentation(config)
    out = model(x, labels=torch.randint(0, 4, (2, 64, 96)))
    assert out.logits.shape == (2, 4, 64, 96)
    out.loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]

    model.save_pretrained(tmp_path)
    again = transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    same(again.eval()(x).logits, model.eval()(x).logits)

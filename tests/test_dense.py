"""mambavision.features, and the backbone for transformers' dense models."""

import pytest
import torch

import mambavision
from mambavision import create_model, features, save_checkpoint

SMALL = {
    "dim": 8, "in_dim": 4, "depths": (1, 1, 3, 2), "window_size": (8, 8, 4, 2), "mlp_ratio": 2,
    "num_heads": (1, 1, 2, 4),
}  # fmt: skip
# The second and third are no multiples of 32, and no window divides their maps.
SIZES = [(64, 96), (75, 100), (33, 130), (32, 32)]


def images(height, width, seed=0):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def backbones(out_indices=(0, 1, 2, 3), **overrides):
    """A model, and the features of one with the same weights."""
    torch.manual_seed(0)
    model = create_model("mamba_vision_T", **SMALL, num_classes=0, **overrides).eval()
    found = features("mamba_vision_T", out_indices, **SMALL, **overrides).eval()
    state = model.state_dict()
    found.model.load_state_dict({name: state[name] for name in found.model.state_dict()})
    return model, found


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_maps_are_those_of_the_stages(size):
    model, backbone = backbones()
    maps = backbone(images(*size))
    for found, expected in zip(maps, model.forward_stages(images(*size)), strict=True):
        same(found, expected)
    assert backbone.channels == [8, 16, 32, 64] and backbone.reductions == [4, 8, 16, 32]
    for x, channels, reduction in zip(maps, backbone.channels, backbone.reductions, strict=True):
        assert x.shape == (2, channels, *(-(-side // reduction) for side in size))


@pytest.mark.parametrize("out_indices", [(1, 3), [0], (2,), (0, 2)], ids=str)
def test_some_stages_and_nothing_beyond_them(out_indices):
    """Parameters that no map needs would stop distributed training."""
    model, backbone = backbones(out_indices, drop_path_rate=0.0)
    maps = backbone.train()(images(64, 96))
    assert backbone.out_indices == list(out_indices)
    assert [x.shape[1] for x in maps] == backbone.channels == [8 * 2**i for i in out_indices]
    sum(x.sum() for x in maps).backward()
    assert all(p.grad is not None for p in backbone.parameters())
    last = max(out_indices)
    assert len(backbone.model.levels) == last + 1
    expected = model.train().forward_stages(images(64, 96))
    for x, i in zip(backbone(images(64, 96)), out_indices, strict=True):
        same(x, expected[i])


def test_windows_of_another_size():
    torch.manual_seed(0)
    model = features("mamba_vision_T", **{**SMALL, "window_size": (8, 8, 8, 4)}).eval()
    other = features("mamba_vision_T", **SMALL).eval()
    other.load_state_dict(model.state_dict())
    assert not torch.equal(model(images(128, 128))[2], other(images(128, 128))[2])


def test_weights(tmp_path, monkeypatch):
    """Those of a classifier, published or in a file, whatever its classes."""
    model = create_model("mamba_vision_T", **SMALL, num_classes=7).eval()
    path = tmp_path / "model.safetensors"
    save_checkpoint(model, path)
    expected = model.forward_stages(images(64, 64))
    found = features("mamba_vision_T", (1, 2), checkpoint=path, **SMALL).eval()(images(64, 64))
    same(found[0], expected[1])
    same(found[1], expected[2])

    asked = []
    monkeypatch.setattr(
        "mambavision.variants.locate",
        lambda name: asked.append(name) or mambavision.hub.Source(path),
    )
    found = features("mamba_vision_T", pretrained=True, **SMALL).eval()(images(64, 64))
    assert asked == ["nvidia/MambaVision-T-1K"]
    same(found[3], expected[3])


def test_optimized():
    model, backbone = backbones(layer_scale=0.5)
    with torch.no_grad():
        expected = backbone(images(75, 100))
        backbone.model = backbone.model.optimize_for_inference()
        for found, x in zip(backbone(images(75, 100)), expected, strict=True):
            torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [(), (4,), (-1,), (1, 0), (1, 1), 3, "0"], ids=str)
def test_wrong_stages(wrong):
    with pytest.raises(ValueError, match="features: out_indices must be stages from 0 to 3"):
        features("mamba_vision_T", wrong, pretrained=True)


def test_other_mistakes():
    with pytest.raises(ValueError, match="did you mean 'mamba_vision_T'"):
        features("mamba_vision_t")
    with pytest.raises(ValueError, match="at least 32"):
        features("mamba_vision_T", **SMALL)(images(31, 64))


# transformers


@pytest.fixture
def transformers():
    found = pytest.importorskip("transformers")
    found.logging.set_verbosity_error()
    found.logging.disable_progress_bar()
    return found


def uper_net(transformers, **fields):
    from mambavision.transformers import MambaVisionConfig

    torch.manual_seed(0)
    config = transformers.UperNetConfig(
        backbone_config=MambaVisionConfig(**SMALL, num_labels=0, **fields),
        num_labels=3, hidden_size=8, auxiliary_channels=8,
    )  # fmt: skip
    return transformers.UperNetForSemanticSegmentation(config)


def test_uper_net(transformers, tmp_path):
    model = uper_net(transformers)
    pixels, labels = images(75, 100), torch.randint(3, (2, 75, 100))
    output = model.train()(pixels, labels=labels)
    assert output.logits.shape == (2, 3, 75, 100)
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())

    model.eval().save_pretrained(tmp_path)
    again = transformers.AutoModelForSemanticSegmentation.from_pretrained(tmp_path).eval()
    same(again(pixels).logits, model(pixels).logits)


def test_backbone_of_a_classifier(transformers, tmp_path):
    from mambavision.transformers import (
        MambaVisionBackbone,
        MambaVisionConfig,
        MambaVisionForImageClassification,
    )

    config = MambaVisionConfig(**SMALL, num_labels=5)
    classifier = MambaVisionForImageClassification(config).eval()
    classifier.save_pretrained(tmp_path)
    backbone, report = MambaVisionBackbone.from_pretrained(
        tmp_path, out_features=["stage2", "stage3"], output_loading_info=True
    )
    assert not any(report.values())
    assert backbone.out_indices == [1, 2] and backbone.channels == [16, 32]
    output = backbone.eval()(images(75, 100), output_hidden_states=True)
    expected = classifier(images(75, 100), output_hidden_states=True).hidden_states
    same(output.feature_maps[0], expected[1])
    same(output.feature_maps[1], expected[2])
    assert len(output.hidden_states) == 3
    assert backbone(images(75, 100)).hidden_states is None
    assert len(backbone(images(75, 100), return_dict=False)[0]) == 2

    everything = transformers.AutoBackbone.from_config(config)
    assert everything.channels == [8, 16, 32, 64]

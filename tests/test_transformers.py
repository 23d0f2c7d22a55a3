"""mambavision.transformers with transformers itself: Auto classes, published configs, copies."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mambavision import MambaVision, create_model, load_checkpoint

transformers = pytest.importorskip("transformers")

from sklearn.datasets import load_sample_image  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    pipeline,
)

from mambavision.transformers import (  # noqa: E402
    MambaVisionConfig,
    MambaVisionForImageClassification,
    MambaVisionModel,
    image_processor,
)

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "dim": 8, "in_dim": 4, "depths": [1, 1, 3, 2], "window_size": [8, 8, 4, 2], "mlp_ratio": 2,
    "num_heads": [1, 1, 2, 4], "layer_scale": 0.5, "layer_scale_conv": 0.25,
}  # fmt: skip
# What a published repository holds beside its weights.
PUBLISHED = {
    **SMALL,
    "model_type": "mambavision",
    "architectures": ["MambaVisionModelForImageClassification"],
    "auto_map": {
        "AutoConfig": "configuration_mambavision.MambaVisionConfig",
        "AutoModel": "modeling_mambavision.MambaVisionModel",
        "AutoModelForImageClassification": (
            "modeling_mambavision.MambaVisionModelForImageClassification"
        ),
    },
    "drop_path_rate": 0.2,
    "num_classes": 7,
    "resolution": 64,
    "crop_pct": 0.98,
    "torch_dtype": "float32",
    "transformers_version": "4.47.0",
    "something_else": 3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def classifier(**overrides):
    torch.manual_seed(0)
    classes = {} if "id2label" in overrides else {"num_labels": 5}
    config = MambaVisionConfig(**{**SMALL, "resolution": 64, **classes, **overrides})
    return MambaVisionForImageClassification(config).eval()


def images(seed=1):
    return torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(seed))


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_round_trip(tmp_path):
    model = classifier(id2label={0: "cat", 1: "dog"})
    expected = model(images(), output_hidden_states=True)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert type(again) is MambaVisionForImageClassification
    kept = again.config.to_diff_dict()
    assert {**kept, "_name_or_path": ""} == {**model.config.to_diff_dict(), "_name_or_path": ""}
    assert again.config.id2label == {0: "cat", 1: "dog"}
    same(again(images()).logits, expected.logits)

    features, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(features) is MambaVisionModel and not any(report.values())
    output = features.eval()(images())
    assert [tuple(x.shape[1:]) for x in output.hidden_states] == [
        (8, 16, 12), (16, 8, 6), (32, 4, 3), (64, 2, 2),
    ]  # fmt: skip
    for found, map in zip(output.hidden_states, expected.hidden_states, strict=True):
        same(found, map)
    same(output.pooler_output, output.last_hidden_state.mean((2, 3)))
    same(again.model.head(output.pooler_output), expected.logits)

    features.save_pretrained(tmp_path / "features")
    with_new_head = AutoModelForImageClassification.from_pretrained(tmp_path / "features")
    same(with_new_head.model.norm.weight, model.model.norm.weight)


def test_same_weights_as_without_transformers(tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path)
    plain = MambaVision(**SMALL, num_classes=5).eval()
    assert not any(load_checkpoint(plain, tmp_path))
    same(plain(images()), model(images()).logits)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    bare = tmp_path / "bare"
    bare.mkdir()
    model.config.save_pretrained(bare)
    (tmp_path / "plain.pth").rename(bare / "pytorch_model.bin")
    again = AutoModelForImageClassification.from_pretrained(bare, use_safetensors=False).eval()
    same(again(images()).logits, model(images()).logits)


@pytest.mark.parametrize("trust", (None, True))
def test_published_repository_runs_none_of_its_code(tmp_path, trust):
    """From a cache laid out as huggingface_hub does, whose code would end the process."""
    model = classifier(num_labels=7)
    home = tmp_path / "models--nvidia--MambaVision-X-1K"
    revision = "0123456789abcdef0123456789abcdef01234567"
    files = home / "snapshots" / revision
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(revision)
    model.save_pretrained(files)
    (files / "config.json").write_text(json.dumps(PUBLISHED))
    for name in ("configuration_mambavision.py", "modeling_mambavision.py"):
        (files / name).write_text("raise SystemExit('remote code ran')\n")
    options = {"cache_dir": tmp_path, "local_files_only": True, "trust_remote_code": trust}
    config = AutoConfig.from_pretrained("nvidia/MambaVision-X-1K", **options)
    assert type(config) is MambaVisionConfig
    assert (config.num_labels, config.num_classes, config.something_else) == (7, 7, 3)
    assert (config.dim, config.crop_pct, config.resolution) == (8, 0.98, 64)
    for auto, ours in (
        (AutoModelForImageClassification, MambaVisionForImageClassification),
        (AutoModel, MambaVisionModel),
    ):
        found, report = auto.from_pretrained(
            "nvidia/MambaVision-X-1K", output_loading_info=True, **options
        )
        assert type(found) is ours and not any(report.values())
        same(found.model.norm.bias, model.model.norm.bias)
    fewer = AutoModelForImageClassification.from_pretrained(
        "nvidia/MambaVision-X-1K", num_labels=3, ignore_mismatched_sizes=True, **options
    )
    assert fewer.model.head.out_features == fewer.config.num_labels == 3


def test_what_a_checkpoint_lacks_is_initialised(tmp_path):
    from safetensors.torch import load_file, save_file

    model = classifier()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = [k for k in state if "levels.2" in k or "levels.0" in k or "head" in k]
    kept = {k: torch.full_like(v, 7) for k, v in state.items() if k not in lost}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = AutoModelForImageClassification.from_pretrained(tmp_path).state_dict()
    fresh = MambaVision(**SMALL, num_classes=5).state_dict()
    for name in lost:
        value, expected = found[name].double(), fresh[name.removeprefix("model.")].double()
        if expected.dim() > 1 and "A_log" not in name:
            assert 0.7 < value.std() / expected.std() < 1.4, name
        elif "conv" not in name:
            same(value, expected)
        else:
            assert value.abs().max() <= (8 * 9) ** -0.5, name
    assert all((found[name] == 7).all() for name in kept)


def test_initialisation_is_that_of_the_backbone():
    torch.manual_seed(0)
    ours = classifier().model
    plain = MambaVision(**SMALL, num_classes=5)
    for (name, found), expected in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if expected.dim() > 1 and "A_log" not in name:
            assert 0.7 < found.std() / expected.std() < 1.4, name
            assert found.abs().max() <= 2
        elif "conv" not in name:
            same(found, expected)


def test_training_step_loss_and_checkpointing():
    model = classifier(drop_path_rate=0.0).train()
    labels = torch.tensor([1, 4])
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.is_activation_checkpointing
        assert model.model.levels[2].grad_checkpointing is checkpointing
        model.zero_grad()
        output = model(images(), labels=labels)
        same(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
        output.loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing
    torch.testing.assert_close(grads[0], grads[1])
    loss, logits = model(images(), labels=labels, return_dict=False)
    assert loss.dim() == 0 and logits.shape == (2, 5)


def test_half_precision_keeps_the_decays_in_float32(tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path)
    half = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    mixer = half.model.levels[2].blocks[0].mixer
    assert mixer.A_log.dtype == mixer.D.dtype == torch.float32
    assert half.model.head.weight.dtype == torch.bfloat16
    logits = half(images().bfloat16()).logits.float()
    torch.testing.assert_close(logits, model(images()).logits, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    "name", ("mamba_vision_T", "mamba_vision_T2", "mamba_vision_S", "mamba_vision_L2_512_21k")
)
@pytest.mark.parametrize("picture", ("china.jpg", "flower.jpg"))
def test_published_preprocessing(name, picture, tmp_path):
    """Equal to that of timm, with which the published models were evaluated."""
    from PIL import Image

    # Both need torchvision.
    create_transform = pytest.importorskip("timm.data").create_transform
    config = MambaVisionConfig.from_variant(name)
    # Where a margin is odd, timm and transformers round its half to different sides: here none is.
    photograph = Image.fromarray(load_sample_image(picture)).crop((0, 0, 560, 420))
    if picture == "flower.jpg":
        photograph = photograph.transpose(Image.Transpose.ROTATE_90)
    expected = create_transform(
        input_size=config.resolution, interpolation="bicubic", mean=config.mean, std=config.std,
        crop_pct=config.crop_pct, crop_mode=config.crop_mode,
    )(photograph)  # fmt: skip
    processor = image_processor(name)
    found = processor(images=photograph, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    processor.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    same(again(images=photograph, return_tensors="pt")["pixel_values"][0], found)
    on_tensors = AutoImageProcessor.from_pretrained(tmp_path, backend="torchvision")
    found = on_tensors(images=photograph, return_tensors="pt")["pixel_values"][0]
    # Another bicubic filter; a crop one pixel beside would differ by 0.06 or more.
    assert (found - expected).abs().mean() < 0.01


def test_grey_and_transparent_pictures():
    from PIL import Image

    photograph = Image.fromarray(load_sample_image("china.jpg"))
    for mode in ("L", "RGBA", "P"):
        found = image_processor(MambaVisionConfig(resolution=64))(
            images=photograph.convert(mode), return_tensors="pt"
        )
        assert found["pixel_values"].shape == (1, 3, 64, 64)


def test_pipeline_on_a_photograph(tmp_path):
    from PIL import Image

    model = classifier(id2label={0: "palace", 1: "flower"})
    model.save_pretrained(tmp_path)
    image_processor(model.config).save_pretrained(tmp_path)
    photograph = Image.fromarray(load_sample_image("china.jpg"))
    found = pipeline("image-classification", str(tmp_path))(photograph)
    assert {entry["label"] for entry in found} == {"palace", "flower"}
    assert sum(entry["score"] for entry in found) == pytest.approx(1, abs=1e-4)


def test_config():
    assert MambaVisionConfig().num_labels == 1000
    assert MambaVisionConfig(num_labels=2).num_labels == 2
    with torch.device("meta"):
        for name in ("mamba_vision_S", "mamba_vision_L3_512_21k"):
            config = MambaVisionConfig.from_variant(name, num_labels=4)
            expected = create_model(name, num_classes=4).arguments
            assert config.backbone(4).arguments == expected
    assert (config.resolution, config.crop_pct, config.crop_mode) == (512, 0.93, "squash")
    with pytest.raises(ValueError, match="no variant 'mamba_vision_Q'; known: mamba_vision_T,"):
        image_processor("mamba_vision_Q")


def test_importing_mambavision_imports_no_extra():
    code = (
        "import sys, mambavision;"
        "[getattr(mambavision, name) for name in mambavision.__all__];"
        "extras = {'transformers', 'timm', 'torchvision', 'huggingface_hub', 'safetensors'};"
        "assert not extras & set(sys.modules), extras & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

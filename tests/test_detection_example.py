"""examples/detection.py: the COCO adapter, average precision, Mask R-CNN on our backbone.

Where torchvision has no compiled operators, as beside a CPU torch, its non-maximum suppression is
the one below, in PyTorch; roi_align is then torchvision's own, in PyTorch too.
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

torchvision = pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")
pytest.importorskip("skimage")

from PIL import Image  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import _coco as adapter  # noqa: E402
import detection as example  # noqa: E402
import make_shapes as shapes  # noqa: E402

from mambavision import load_checkpoint, read_config, save_checkpoint  # noqa: E402
from mambavision.errors import CommandError  # noqa: E402

# pycocotools' own, with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

COMPILED = torchvision.extension._has_ops()


def plain_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """The best box, then the best of those that overlap it by no more, and so on."""
    iou = torchvision.ops.box_iou(boxes, boxes)
    left, kept = scores.argsort(descending=True, stable=True), []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        left = left[iou[best, left] <= iou_threshold]
    return torch.stack(kept) if kept else torch.empty(0, dtype=torch.int64)


@pytest.fixture(autouse=True)
def operators(monkeypatch):
    if not COMPILED:
        from torchvision.models.detection import roi_heads

        monkeypatch.setattr(torchvision.ops.boxes, "nms", plain_nms)
        # Masks are pooled with as many samples as pixels, for which PyTorch alone takes minutes.
        few = partial(roi_heads.roi_align, sampling_ratio=2)
        monkeypatch.setattr(roi_heads, "roi_align", few)


def test_nms():
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 8], [20, 0, 30, 10], [0, 0, 10, 3.0]])
    scores = torch.tensor([0.5, 0.9, 0.1, 0.8])
    kept = torchvision.ops.boxes.nms(boxes, scores, 0.5)
    assert kept.tolist() == [1, 3, 2]


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    shapes.make_shapes(folder, training=8, validation=4, size=(100, 75), seed=3)
    return folder


# The adapter


@pytest.fixture
def coco_folder(tmp_path):
    """Two pictures of 8 x 6 pixels; categories 3 and 7; the second picture is empty."""
    polygon = {"bbox": [1, 2, 4, 3], "segmentation": [[1, 2, 5, 2, 5, 5, 1, 5]], "category_id": 7}
    runs = {"bbox": [6, 0, 1, 6], "category_id": 3,
            "segmentation": {"size": [6, 8], "counts": [36, 6, 6]}}  # fmt: skip
    crowd = {**runs, "iscrowd": 1}
    flat = {**polygon, "bbox": [1, 2, 0, 3]}
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 8, "height": 6} for i in (5, 9)],
        "categories": [{"id": 7, "name": "cow"}, {"id": 3, "name": "hen"}],
        "annotations": [
            {"id": n, "image_id": 5, "iscrowd": 0, "area": 1.0, **annotation}
            for n, annotation in enumerate((polygon, runs, crowd, flat), 1)
        ],
    }

    def make(folder="train2017", **changes) -> Path:
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        path = tmp_path / "annotations" / f"instances_{Path(folder).name}.json"
        path.write_text(json.dumps({**content, **changes}))
        for image in content["images"]:
            pixels = np.arange(144, dtype=np.uint8).reshape(6, 8, 3)
            Image.fromarray(pixels).save(tmp_path / folder / image["file_name"])
        return tmp_path

    make.annotations = content["annotations"]
    return make


@pytest.mark.parametrize("folder", ["train2017", "images/train2017"])
def test_boxes_labels_and_masks_by_hand(coco_folder, folder):
    data = example.CocoPictures(coco_folder(folder), "train")
    assert data.labels == ["hen", "cow"] and data.categories == [3, 7] and data.ids == [5, 9]
    picture, target = data.read(0)
    assert picture.size == (8, 6)
    # The crowd and the box without width are left out; labels count from 1 in order of category.
    assert target["boxes"].tolist() == [[1, 2, 5, 5], [6, 0, 7, 6]]
    assert target["labels"].tolist() == [2, 1]
    expected = np.zeros((2, 6, 8), np.uint8)
    expected[0, 2:5, 1:5] = 1
    expected[1, :, 6] = 1
    np.testing.assert_array_equal(target["masks"], expected)
    _, empty = data.read(1)
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, 6, 8)
    assert example.CocoPictures(coco_folder(folder), "train", training=True).ids == [5]


def test_mirrored(coco_folder):
    data = example.CocoPictures(coco_folder(), "train")
    picture, target = data.read(0)
    pixels, turned = adapter.mirrored(example.as_tensor(picture), target)
    assert turned["boxes"].tolist() == [[3, 2, 7, 5], [1, 0, 2, 6]]
    for mask, (x1, y1, x2, y2) in zip(turned["masks"], turned["boxes"].int().tolist(), strict=True):
        assert mask.sum() == mask[y1:y2, x1:x2].sum() == (y2 - y1) * (x2 - x1)
    assert torch.equal(pixels[:, :, 0], example.as_tensor(picture)[:, :, 7])
    data.training, found = True, set()
    for seed in range(8):
        torch.manual_seed(seed)
        found.add(data[0][1]["boxes"][0, 0].item())
    assert found == {1.0, 3.0}


def test_mistakes_in_the_data(coco_folder, tmp_path):
    with pytest.raises(CommandError, match="one annotations/instances_train.*found none"):
        example.CocoPictures(tmp_path, "train")
    folder = coco_folder()
    with pytest.raises(CommandError, match="found none"):
        example.CocoPictures(folder, "val")
    Image.new("RGB", (8, 8)).save(folder / "train2017/5.png")
    (folder / "train2017/9.png").write_bytes(b"no picture")
    data = example.CocoPictures(folder, "train")
    assert "5.png is 8 x 8, but its annotation says 8 x 6" in data[0]
    assert "cannot read" in data[1] and "9.png" in data[1]
    assert "5.png" in example.collate([data[0], data[1]])
    (folder / "annotations/instances_train2017.json").write_text("{")
    with pytest.raises(CommandError, match="is no COCO file"):
        example.CocoPictures(folder, "train")
    coco_folder("train2014")
    with pytest.raises(CommandError, match="found instances_train2014.json, instances_train2017"):
        example.CocoPictures(folder, "train")


# Average precision


def found_as(target, scores, masks=None):
    masks = target["masks"] if masks is None else masks
    return {**{k: target[k].numpy() for k in ("boxes", "labels")}, "masks": masks.numpy() > 0,
            "scores": np.array(scores)}  # fmt: skip


def test_average_precision_by_hand(coco_folder):
    without_flat = coco_folder.annotations[:3]
    data = example.CocoPictures(coco_folder(annotations=without_flat), "train")
    _, target = data.read(0)
    right = example.results_of(found_as(target, [0.9, 0.8]), 5, data.categories)
    assert right[0]["category_id"] == 7 and right[0]["bbox"] == [1, 2, 4, 3]
    for kind in ("bbox", "segm"):
        np.testing.assert_allclose(example.average_precision(data, right, kind), 1)
        # Nothing found, and only a box far away: precision 0 at every recall.
        assert (example.average_precision(data, [], kind) == 0).all()
    far = {**target, "boxes": target["boxes"] + 100}
    wrong = example.results_of(found_as(far, [0.9, 0.8], target["masks"] * 0), 5, data.categories)
    assert (example.average_precision(data, wrong, "bbox") == 0).all()
    # A better score for the wrong one: precision 1 / 2 at every recall.
    both = wrong + [{**one, "score": 0.5} for one in right]
    np.testing.assert_allclose(example.average_precision(data, both, "bbox"), 0.5)
    # A box of 4 x 3 found as 4 x 2.16: IoU 0.72 is enough for 0.50, 0.55, 0.60, 0.65, 0.70.
    short = {**target, "boxes": target["boxes"] - torch.tensor([[0, 0, 0, 0.84], [0, 0, 0, 0]])}
    results = example.results_of(found_as(short, [0.9, 0.8]), 5, data.categories)
    found = example.average_precision(data, results, "bbox")
    np.testing.assert_allclose(found, [[1, 1, 1], [0.5, 1, 0]])
    np.testing.assert_allclose(example.mean(found), [0.75, 1, 0.5])
    np.testing.assert_allclose(example.average_precision(data, results, "segm"), 1)


def test_categories_without_objects_do_not_count(coco_folder):
    without_flat = coco_folder.annotations[:3]
    categories = [{"id": i, "name": str(i)} for i in (3, 5, 7)]
    folder = coco_folder(annotations=without_flat, categories=categories)
    data = example.CocoPictures(folder, "train")
    results = example.results_of(found_as(data.read(0)[1], [0.9, 0.8]), 5, [5, 3, 7])
    for found in (example.average_precision(data, r, "bbox") for r in (results, [])):
        assert np.isnan(found[1]).all() and not np.isnan(found[[0, 2]]).any()
        assert not np.isnan(example.mean(found)).any()
    both = {kind: found for kind in ("bbox", "segm")}
    assert example.report(both, data.labels).splitlines()[2].split() == ["5"]


# The model


def small_model(data, **changes):
    torch.manual_seed(0)
    options = example.parser().parse_args(["train", "x", "--small"])
    example.resolved(options, example.RECIPE)
    config = {
        "model": "mamba_vision_T", "small": True, "arguments": example.size_arguments(options),
        "labels": data.labels, "min_size": 75, "max_size": 100, **changes,
    }  # fmt: skip
    return example.build(config), config


def test_every_loss_reaches_the_backbone(few):
    data = example.CocoPictures(few, "train")
    model, _ = small_model(data)
    pictures, targets = example.collate([data[i] for i in range(2)])
    losses = model.train()(list(pictures), list(targets))
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness",
                           "loss_rpn_box_reg"}  # fmt: skip
    stem = model.backbone.body.model.patch_embed.conv_down[0].weight
    for name, loss in losses.items():
        assert loss.isfinite(), name
        (gradient,) = torch.autograd.grad(loss, stem, retain_graph=True)
        assert gradient.abs().max() > 0, name
    sum(losses.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_the_pyramid_has_the_strides_that_anchors_expect(few):
    model, _ = small_model(example.CocoPictures(few, "train"), min_size=224, max_size=224)
    maps = model.backbone(torch.randn(1, 3, 224, 224))
    assert list(maps) == ["0", "1", "2", "3", "pool"]
    assert [x.shape[-1] for x in maps.values()] == [56, 28, 14, 7, 4]
    assert all(x.shape[1] == model.backbone.out_channels for x in maps.values())


def test_same_detections_after_saving(few, tmp_path):
    data = example.CocoPictures(few, "val")
    model, config = small_model(data)
    save_checkpoint(model, tmp_path / "model.safetensors", config=config)
    again, kept = example.load(tmp_path)
    assert kept["labels"] == list(shapes.SHAPES)
    assert read_config(tmp_path / "model.safetensors")["min_size"] == 75
    assert not any(load_checkpoint(again, tmp_path))
    options = example.parser().parse_args(["eval", "x", "--weights", "x"])
    picture = data.read(0)[0]
    expected, found = (example.detect(m.eval(), picture, options) for m in (model, again))
    assert len(found["boxes"]) > 0 and found["masks"].shape[1:] == picture.size[::-1]
    for key in adapter.KEYS:
        np.testing.assert_array_equal(found[key], expected[key])
    with pytest.raises(CommandError, match="no file"):
        example.load(tmp_path / "none")


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["detection.py", *map(str, arguments)])
    return example.run(example.main)


@pytest.mark.slow
def test_commands(few, tmp_path, monkeypatch, capsys):
    """A training of a few steps, its evaluation, and a prediction."""
    out = tmp_path / "run"
    code = call(
        monkeypatch, "train", few, "--small", "--steps", 4, "--eval-every", 2, "--batch-size", 2,
        "--device", "cpu", "--output", out,
    )  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "step 4/4: loss" in printed.out
    assert {p.name for p in out.iterdir()} == {
        "model.safetensors", "results.csv", "curves.png", "predictions.png",
    }  # fmt: skip
    more = ("--weights", out, "--device", "cpu", "--output", tmp_path / "more", "--score", 0.0)
    assert call(monkeypatch, "eval", few, *more) == 0
    printed = capsys.readouterr()
    assert printed.out.split()[:7] == ["box", "AP", "AP50", "AP75", "mask", "AP", "AP50"]
    photo = few / "images/validation/shapes_00001.jpg"
    assert call(monkeypatch, "predict", photo, *more) == 0
    assert (tmp_path / "more/shapes_00001.png").stat().st_size > 0


@pytest.mark.slow
def test_learns_to_detect(tmp_path, monkeypatch, capsys):
    """Held-out pictures: most of the shapes with compiled operators, many with the slow ones."""
    data, out = tmp_path / "shapes", tmp_path / "run"
    shapes.make_shapes(data, training=200, validation=10)
    steps, least = (300, 0.6) if COMPILED else (80, 0.25)
    code = call(
        monkeypatch, "train", data, "--small", "--steps", steps, "--eval-every", steps, "--output",
        out, "--device", "cpu",
    )  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert call(monkeypatch, "eval", data, "--weights", out, "--device", "cpu", "--output",
                tmp_path / "eval") == 0  # fmt: skip
    mean = capsys.readouterr().out.split("mean")[1].split()
    assert float(mean[1]) >= least  # AP50 of boxes


def test_mistakes(few, tmp_path, monkeypatch, capsys):
    for arguments, code, message in (
        (("train", tmp_path, "--output", tmp_path / "x"), 2, "instances_train*.json is needed"),
        (("train", few, "--output", tmp_path / "x"), 1, "8 training pictures, --batch-size 16"),
        (("train", few, "--output", few), 2, "is not empty"),
        (("eval", few, "--weights", tmp_path), 2, "no file"),
        (("predict", few / "none.jpg", "--weights", tmp_path), 2, "no file"),
    ):
        assert call(monkeypatch, *arguments) == code
        printed = capsys.readouterr()
        assert message in printed.err and printed.err.count("\n") == 1
        assert not (tmp_path / "x").exists()


@pytest.mark.skipif(COMPILED, reason="torchvision's operators are there")
def test_torchvision_without_operators_is_named(few, monkeypatch, capsys):
    monkeypatch.undo()
    assert call(monkeypatch, "train", few) == 2
    assert "torchvision's operators do not work" in capsys.readouterr().err

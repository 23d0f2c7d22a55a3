"""examples/segmentation.py and make_shapes.py: adapters, measures, a training end to end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("skimage")
coco = pytest.importorskip("pycocotools.mask")

from PIL import Image  # noqa: E402

# pycocotools' own, with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import make_shapes as shapes  # noqa: E402
import segmentation as example  # noqa: E402

from mambavision.errors import CommandError  # noqa: E402


def run(script: str, *arguments, **more) -> subprocess.CompletedProcess:
    """A script as a person would call it, in one thread."""
    command = [sys.executable, "-W", "ignore", ROOT / "examples" / script, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, **more)


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """A handful of pictures, of sizes that are no multiples of 32."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    shapes.make_shapes(folder, training=12, validation=5, size=(100, 75), seed=3)
    return folder


# The data maker


def test_masks_boxes_and_classes_agree(few):
    for split, count in (("training", 12), ("validation", 5)):
        content = json.loads((few / "annotations" / f"instances_{split}.json").read_text())
        assert len(content["images"]) == count
        assert {a["image_id"] for a in content["annotations"]} == set(range(count))
        names = {c["id"]: c["name"] for c in content["categories"]}
        for image in content["images"]:
            picture = Image.open(few / "images" / split / image["file_name"])
            stem = Path(image["file_name"]).stem
            classes = np.array(Image.open(few / "annotations" / split / f"{stem}.png"))
            assert picture.size == (image["width"], image["height"]) == classes.shape[::-1]
            from_instances = np.ones_like(classes)
            for annotation in content["annotations"]:
                if annotation["image_id"] != image["id"]:
                    continue
                mask = coco.decode(annotation["segmentation"]).astype(bool)
                # No pixel belongs to two.
                assert (from_instances[mask] == 1).all()
                from_instances[mask] = 2 + shapes.SHAPES.index(names[annotation["category_id"]])
                rows, columns = np.nonzero(mask)
                x, y, width, height = annotation["bbox"]
                assert (x, y) == (columns.min(), rows.min())
                assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
                assert annotation["area"] == mask.sum() > 0
            np.testing.assert_array_equal(classes, from_instances)


def test_seed_decides_and_photographs_are_held_out(few, tmp_path):
    def files(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.*")}

    shapes.make_shapes(tmp_path / "again", 12, 5, (100, 75), seed=3)
    shapes.make_shapes(tmp_path / "other", 12, 5, (100, 75), seed=4)
    assert files(tmp_path / "again") == files(few) != files(tmp_path / "other")
    assert not set(shapes.PHOTOGRAPHS["training"]) & set(shapes.PHOTOGRAPHS["validation"])
    with pytest.raises(CommandError, match="exists"):
        shapes.make_shapes(few, 1, 1)


def test_colour_does_not_tell_the_class():
    """Else a segmentation would need no form. Inside the white rim, that is."""
    means = {name: [] for name in shapes.SHAPES}
    for seed in range(60):
        photo = Image.new("RGB", (160, 120))
        picture, found = shapes.compose(photo, photo.size, shapes.random.Random(seed))
        for name, mask in found:
            pixels = np.array(picture)[mask]
            means[name].append(pixels[(pixels < 255).any(1)].mean(0))
    middles = np.array([np.mean(colours, 0) for colours in means.values()])
    spread = np.mean([np.std(colours, 0) for colours in means.values()])
    assert np.ptp(middles, 0).max() < 0.7 * spread, (middles, spread)


# Adapters


@pytest.fixture
def scene(tmp_path):
    """An ADE20K-style folder with one picture of 4 x 2 pixels."""

    def make(values, picture=None, split="training") -> Path:
        values = np.array(values, dtype=np.uint8)
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((2, 4, 3), np.uint8) if picture is None else picture
        Image.fromarray(pixels).save(tmp_path / "images" / split / "a.jpg")
        Image.fromarray(values).save(tmp_path / "annotations" / split / "a.png")
        (tmp_path / "labels.txt").write_text("sky\ngrass\ncow\n")
        return tmp_path

    return make


def test_classes_from_0_and_none_is_255(scene):
    folder = scene([[0, 1, 2, 3], [255, 3, 3, 1]])
    assert example.read_labels(folder) == ["sky", "grass", "cow"]
    picture, truth = example.Scenes(folder, "training", 3).read(0)
    assert picture.size == (4, 2)
    np.testing.assert_array_equal(truth, [[255, 0, 1, 2], [255, 2, 2, 0]])


def test_names_of_ade20k(tmp_path):
    rows = ["Idx\tRatio\tTrain\tVal\tName", "1\t0.1576\t11664\t1172\twall",
            "2\t0.1072\t6046\t612\tbuilding, edifice", ""]  # fmt: skip
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows))
    assert example.read_labels(tmp_path) == ["wall", "building, edifice"]


@pytest.mark.parametrize(
    "values, message",
    [
        ([[1, 2, 3, 4], [1, 1, 1, 1]], "a.png: class 4, but there are 3"),
        ([[1, 2], [1, 1]], "a.png: 2 x 2, but its picture is 4 x 2"),
        (np.ones((2, 4, 3)), "a.png: one byte per pixel is needed, got mode RGB"),
    ],
    ids=["class", "size", "colours"],
)
def test_wrong_annotations(scene, values, message):
    scenes = example.Scenes(scene(values), "training", 3)
    with pytest.raises(CommandError, match=message):
        scenes.read(0)
    crops = example.Crops(scenes, 32, 32, 1.0, None)
    assert message in crops[0]
    assert message in example.collate([crops[0], crops[0]])


def test_missing_and_damaged_files(scene):
    folder = scene(np.ones((2, 4)))
    with pytest.raises(CommandError, match="no folder .*validation"):
        example.Scenes(folder, "validation", 3)
    (folder / "images/training/a.jpg").write_bytes(b"no picture")
    with pytest.raises(CommandError, match="cannot read .*a.jpg: cannot identify"):
        example.Scenes(folder, "training", 3).read(0)
    (folder / "annotations/training/a.png").unlink()
    with pytest.raises(CommandError, match="no annotation .*a.png"):
        example.Scenes(folder, "training", 3)
    (folder / "labels.txt").unlink()
    with pytest.raises(CommandError, match="neither labels.txt nor objectInfo150.txt"):
        example.read_labels(folder)


class Plain:
    """Statistics that leave pixels in 0..1."""

    class backbone_config:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


@pytest.mark.parametrize("size, crop", [(60, 40), (60, 96), (33, 32)])
def test_crops_keep_pixels_and_classes_together(scene, size, crop):
    """Left dark and of class 0, right bright and of class 2, whatever the crop."""
    dark = np.repeat(np.arange(90) < 40, 3).reshape(1, 90, 3).repeat(60, 0)
    folder = scene(np.where(dark[..., 0], 1, 3), np.where(dark, 20, 235).astype(np.uint8))
    crops = example.Crops(example.Scenes(folder, "training", 3), size, crop, 1.5, Plain)
    mirrored, padded = set(), set()
    for seed in range(20):
        torch.manual_seed(seed)
        pixels, truth = crops[0]
        assert pixels.shape == (3, crop, crop) and truth.shape == (crop, crop)
        inside = truth != example.IGNORED
        assert (pixels[:, ~inside] == 0).all()
        padded.add(bool((~inside).any()))
        if {0, 2} <= set(truth[0].tolist()):
            # Halfway, since the brightness varies. Columns at the edge may fall on either side.
            seen = pixels.mean(0)[inside]
            bright = seen > (seen.min() + seen.max()) / 2
            assert (bright == (truth == 2)[inside]).float().mean() > 0.93
            row = truth[0][inside[0]].tolist()
            mirrored.add(row != sorted(row))
    assert mirrored == {True, False}
    assert (crop == 96) == (True in padded)


# Measures


def test_confusion_and_iou_by_hand():
    truth = np.array([[0, 0, 1, 1], [1, 2, 255, 255]], dtype=np.uint8)
    found = np.array([[0, 1, 1, 1], [1, 2, 3, 0]])
    counts = example.confusion(truth, found, 4)
    np.testing.assert_array_equal(
        counts, [[1, 1, 0, 0], [0, 3, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    )
    # Class 0: 1 hit, 2 true, 1 found: 1 / 2. Class 1: 3 hits, 3 true, 4 found: 3 / 4.
    np.testing.assert_allclose(example.ious(counts), [1 / 2, 3 / 4, 1, np.nan])
    text = example.report(counts, ["a", "b", "c", "d"])
    assert "mIoU 0.7500, pixel accuracy 83.33%" in text
    assert re.search(r"b +50\.0% +0\.7500", text)
    # A class that is found but never true counts as 0, in every library alike.
    np.testing.assert_allclose(
        example.ious(example.confusion(np.zeros(4, np.uint8), np.array([0, 0, 0, 1]), 2)), [0.75, 0]
    )


# End to end


def test_sizes_that_no_window_divides(few):
    torch.manual_seed(0)
    options = example.parser().parse_args(["train", str(few), "--small"])
    example.resolved(options, example.RECIPE)
    model = example.build(options, ["a", "b", "c"])
    for size in ((100, 75), (33, 47), (130, 32)):
        picture = Image.new("RGB", size, (200, 30, 60))
        found = example.classes_of(model, picture, Namespace(amp=False))
        assert found.shape == size[::-1] and found.max() < 3


@pytest.mark.slow
def test_learns_to_segment_held_out_pictures(tmp_path):
    """From making the data to a drawn prediction, by the commands of the documentation."""
    data, out = tmp_path / "shapes", tmp_path / "run"
    assert run("make_shapes.py", data).returncode == 0
    done = run("segmentation.py", "train", data, "--small", "--output", out)
    assert done.returncode == 0, done.stderr
    for name in ("config.json", "model.safetensors", "results.csv", "curves.png",
                 "predictions.png"):  # fmt: skip
        assert (out / name).stat().st_size > 0, name
    assert not [p for p in out.iterdir() if p.name.startswith(".")]

    done = run("segmentation.py", "eval", data, "--weights", out, "--output", tmp_path / "eval")
    (found,) = re.findall(r"mIoU (0\.\d+)", done.stdout)
    assert float(found) >= 0.8, done.stdout
    assert f"best mIoU {found}" in run_output(out)

    photo = tmp_path / "photo.png"
    Image.open(data / "images/validation/shapes_00000.jpg").resize((97, 211)).save(photo)
    done = run(
        "segmentation.py", "predict", photo, "--weights", out, "--output", tmp_path / "predicted"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "predicted/photo.png").stat().st_size > 0


def run_output(out: Path) -> str:
    rows = (out / "results.csv").read_text().splitlines()[1:]
    return f"best mIoU {max(float(row.split(',')[-1]) for row in rows):.4f}"


def test_one_line_for_each_mistake(few, tmp_path, monkeypatch, capsys):
    """And nothing is written."""
    out = tmp_path / "out"
    small = ("train", few, "--small", "--output", out)
    for arguments, code, message in (
        (("train", tmp_path / "none", "--output", out), 2, "neither labels.txt nor"),
        (("train", few, "--model", "T", "-b", 4, "--output", out), 2, "no variant 'T'; known"),
        ((*small, "--pretrained"), 2, "--small has no published weights"),
        ((*small, "--batch-size", 13), 1, "12 training pictures, --batch-size 13"),
        ((*small[:-1], few), 2, "is not empty: name a new folder"),
        (("eval", few, "--weights", tmp_path), 2, "no trained model there"),
        (("predict", tmp_path / "no.jpg", "--weights", tmp_path), 2, "no trained model there"),
    ):
        monkeypatch.setattr(sys, "argv", ["segmentation.py", *map(str, arguments)])
        assert example.run(example.main) == code
        printed = capsys.readouterr()
        assert message in printed.err and printed.err.count("\n") == 1 and not printed.out
        assert not out.exists()


def test_loss_that_is_no_number(few, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = ["train", few, "--small", "--steps", 40, "--eval-every", 1, "--lr", 1e30,
                 "--warmup", 0, "--batch-size", 2, "--output", out]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["segmentation.py", *map(str, arguments)])
    assert example.run(example.main) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"the loss is (nan|inf) at step \d+: lower --lr; .*/out keeps the best", line)
    assert (out / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_ctrl_c_keeps_the_best_weights(few, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable, "-W", "ignore", ROOT / "examples/segmentation.py", "train", few, "--small",
        "--steps", "100000", "--eval-every", "2", "--batch-size", "2", "--output", out,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert "parameters, 100000 updates" in process.stdout.readline()
        assert "step 2/" in process.stdout.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.strip().endswith("segmentation.py: interrupted") and "Traceback" not in errors
    assert not [p for p in out.iterdir() if p.name.startswith(".")]
    assert example.load(out).config.id2label[1] == "ring"

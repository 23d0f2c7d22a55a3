"""`mambavision eval | predict | info | doctor`, on real files, and what `flops` counts."""

import csv
import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from mambavision import MambaVision, create_model, flops, ops, save_checkpoint
from mambavision.cli import main
from mambavision.tools.cli import COMMANDS
from mambavision.tools.info import PUBLISHED_GMACS
from mambavision.tools.text import amount, percent

SIZES = {
    "dim": 8, "in_dim": 4, "depths": (1, 1, 2, 2), "num_heads": (1, 1, 2, 2),
    "window_size": (8, 8, 2, 1), "mlp_ratio": 1,
}  # fmt: skip
LABELS = ["red", "green", "blue"]
ROOT = Path(__file__).resolve().parent.parent
# For processes in another folder.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
# Read off the table of the published models, arXiv 2407.08083.
PUBLISHED = {"T": 4.4, "T2": 5.1, "S": 7.5, "B": 15.0, "L": 34.9, "L2": 37.5}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(num_classes=3, seed=0):
    """Nobody trained it, but its norms know such pictures, and its answers differ among them."""
    torch.manual_seed(seed)
    model = MambaVision(**SIZES, num_classes=num_classes)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    rng = np.random.default_rng(1)
    seen = torch.stack([torch.from_numpy(np.array(picture(rng, (48, 48)))) for _ in range(32)])
    with torch.no_grad():
        model.head.weight.mul_(20)
        model(seen.permute(0, 3, 1, 2) / 127.5 - 1)
    return model.eval()


def save(model, path, labels=LABELS, **more):
    """As `mambavision train` saves it."""
    about = {"labels": labels, "input_size": 48, "crop_pct": 0.9, "crop_mode": "center", **more}
    save_checkpoint(model, path, config={k: v for k, v in about.items() if v is not None})
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tiny(), tmp_path_factory.mktemp("run") / "model.safetensors")


def picture(rng, size=(50, 40)):
    """Noise around a random colour."""
    noise = rng.normal(rng.uniform(0, 255, 3), 60, (size[1], size[0], 3))
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Seven pictures in each of three folders."""
    root, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for name in LABELS:
        (root / "val" / name).mkdir(parents=True)
        for index in range(7):
            picture(rng).save(root / "val" / name / f"{index}.png")
    return root


def expected(model, path, size=48, crop_pct=0.9):
    """Probabilities, with the steps of the preprocessing written out."""
    image = Image.open(path).convert("RGB")
    scale = int(size / crop_pct) / min(image.size)
    image = image.resize([int(scale * n) for n in image.size], Image.Resampling.BICUBIC)
    left, top = (round((n - size) / 2) for n in image.size)
    x = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    x = (x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        logits = model(torch.from_numpy(x.astype(np.float32)).permute(2, 0, 1)[None])
    return logits.softmax(1)[0]


def run(capsys, *arguments):
    """(exit code, what was printed, what went to stderr)."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_nothing_is_cut_off(path):
    """Around all that is drawn there is a margin."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    edges = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    assert all((edge == pixels[0, 0]).all() for edge in edges), path


def said(err):
    """The lines of stderr but for progress bars."""
    lines = re.split(r"[\r\n]+", err)
    return [line for line in lines if line.strip() and "|" not in line and "%" not in line]


# Operations and memory


@pytest.mark.parametrize("name", PUBLISHED)
def test_macs_are_the_published(name):
    assert PUBLISHED_GMACS[f"mamba_vision_{name}"] == PUBLISHED[name]
    with torch.device("meta"):
        model = create_model(f"mamba_vision_{name}")
    cost = flops.count(model, 224, 224)
    assert cost.macs / 1e9 == pytest.approx(PUBLISHED[name], rel=0.03)
    assert cost.flops == 2 * (cost.macs + cost.attention_macs)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    for total, part in (("macs", "macs"), ("kept_bytes", "kept_bytes"),
                        ("attention_macs", "attention_macs"), ("parameters", "parameters")):
        assert sum(getattr(row, part) for row in cost.parts) == getattr(cost, total)


def test_attention_products_by_hand():
    """T at 224 pixels: 4 blocks on 14 x 14 tokens of 320 channels, 2 on 7 x 7 of 640."""
    with torch.device("meta"):
        cost = flops.count(create_model("mamba_vision_T"), 224, 224)
    assert cost.attention_macs == 4 * 2 * 196**2 * 320 + 2 * 2 * 49**2 * 640


def mixer_arguments(device, batch=2, seqlen=20, dim=12, dstate=4, dt_rank=3, width=5):
    def given(*shape):
        return torch.randn(shape, device=device, requires_grad=True)

    arguments = (
        given(batch, seqlen, 2 * dim), given(dim, width), given(dim, width),
        given(dt_rank + 2 * dstate, dim), given(dim, dt_rank),
        given(dim, dstate), given(dim), given(dim),
    )  # fmt: skip
    return arguments, batch * seqlen * dim


@pytest.mark.parametrize("device", ("cpu", "meta"))
def test_fused_mixer_counts_as_its_parts(device):
    (xz, conv_x, conv_z, x_proj, dt_proj, A, D, bias), positions = mixer_arguments(device)
    x, z = (half.transpose(1, 2).detach() for half in xz.chunk(2, -1))
    with FlopCounterMode(display=False) as plain, torch.no_grad():
        for half, weight in ((x, conv_x), (z, conv_z)):
            F.conv1d(half, weight[:, None], padding="same", groups=12)
        dt_low = F.linear(x.transpose(1, 2), x_proj)[..., :3]
        F.linear(dt_low, dt_proj)
    scan = positions * (6 * 4 + 2)
    with FlopCounterMode(display=False) as fused, torch.no_grad():
        ops.mixer(xz, conv_x, conv_z, x_proj, dt_proj, A, D, bias)
    assert fused.get_total_flops() == plain.get_total_flops() + scan


def test_each_operator_and_its_backward_pass_count():
    (xz, conv_x, conv_z, x_proj, dt_proj, A, D, bias), positions = mixer_arguments("cpu")
    u, delta = torch.randn(2, 2, 20, 12, requires_grad=True)
    B, C = torch.randn(2, 2, 20, 4, requires_grad=True)
    projection = positions * 2 * (3 + 2 * 4)
    calls = {
        "conv1d_silu": (lambda: ops.conv1d_silu(u, conv_x), positions * 2 * 5, 0),
        "selective_scan": (lambda: ops.selective_scan(u, delta, A, B, C, D), positions * 26, 0),
        "mixer": (
            lambda: ops.mixer(xz, conv_x, conv_z, x_proj, dt_proj, A, D, bias),
            positions * (2 * 2 * 5 + 2 * 3 + 26) + projection, projection,
        ),
    }  # fmt: skip
    for name, (call, forward, once) in calls.items():
        with FlopCounterMode(display=False) as counter:
            y = call()
            assert counter.get_total_flops() == forward, name
            y.sum().backward()
        assert counter.get_total_flops() == 4 * forward - once, name
    without_D = FlopCounterMode(display=False)
    with without_D:
        ops.selective_scan(u, delta, A, B, C)
    assert without_D.get_total_flops() == positions * 24


def test_kept_memory_is_that_of_a_real_run():
    model = tiny().train()
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            # Held, so that no address is given twice.
            kept[storage.data_ptr()] = x
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        model(torch.randn(2, 3, 64, 48))
    cost = flops.count(model, 64, 48, batch=2)
    assert cost.kept_bytes == sum(x.untyped_storage().nbytes() for x in kept.values())
    half = flops.count(tiny().to(torch.bfloat16), 64, 48, batch=2)
    assert 0.4 < half.kept_bytes / cost.kept_bytes < 0.7


def test_peak_is_what_lives_at_once():
    with flops._Living() as living:
        a = torch.zeros(1000)
        b = a + 1
        a.add_(b).view(10, 100)
        assert living.now == 8000
        del b
        assert living.now == 4000
        c = a * 2
        del a, c
    assert (living.now, living.peak) == (0, 8000)


def test_counting_leaves_the_model_alone():
    model = tiny()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    flops.count(model.train(), 64, 64)
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    with pytest.raises(ValueError, match="at least 32"):
        flops.count(model, 16, 64)


def test_info_prints_both_figures(capsys, checkpoint):
    code, out, _ = run(capsys, "info", "mamba_vision_T")
    assert code == 0 and "4.464 G  without attention products; published: 4.4 G" in out
    assert "FLOPs            9.137 G  two per MAC, attention products included" in out
    assert re.search(r"stage 3 +4 mixer, 4 attention, window 14 +320 x 14 x 14 +10,928,640", out)
    code, out, _ = run(capsys, "info", checkpoint, "--img-size", 32, 64, "-b", 2, "--json")
    found = json.loads(out)
    assert (found["img_size"], found["batch_size"], found["published_gmacs"]) == ([32, 64], 2, None)
    assert found["parameters"] == sum(p.numel() for p in tiny().parameters())
    assert found["parts"][4]["output"] == [64, 1, 2]


# eval


def probabilities(model, root, **more):
    paths = {label: sorted((root / "val" / label).glob("*.png")) for label in LABELS}
    return {label: [expected(model, p, **more) for p in found] for label, found in paths.items()}


def test_eval_counts_what_a_loop_counts(tmp_path, capsys, checkpoint, colours):
    code, out, err = run(
        capsys, "eval", colours, "--checkpoint", checkpoint, "--output", tmp_path, "-b", 4
    )
    assert code == 0 and not said(err)
    found = probabilities(tiny(), colours)
    chosen = {label: [int(p.argmax()) for p in rows] for label, rows in found.items()}
    assert len({index for row in chosen.values() for index in row}) > 1
    right = sum(chosen[label].count(index) for index, label in enumerate(LABELS))
    (summary,) = rows_of(tmp_path / "summary.csv")
    assert float(summary["top1"]) == pytest.approx(right / 21)
    assert (summary["images"], summary["img_size"], summary["top5"]) == ("21", "48", "1.0")
    assert float(summary["images_per_second"]) > 0
    assert f"{right / 21:.2%}" in out
    every = [index for row in chosen.values() for index in row]
    for index, row in enumerate(rows_of(tmp_path / "classes.csv")):
        hits = chosen[LABELS[index]].count(index)
        assert (row["class"], row["images"]) == (LABELS[index], "7")
        assert float(row["top1"]) == pytest.approx(hits / 7)
        if every.count(index):
            assert float(row["precision"]) == pytest.approx(hits / every.count(index))
        wrong = [LABELS[i] for i in chosen[LABELS[index]] if i != index]
        assert (not wrong and not row["taken_for"]) or (
            int(row["times"]) == wrong.count(row["taken_for"]) == max(map(wrong.count, wrong))
        )
    predictions = rows_of(tmp_path / "predictions.csv")
    for row, best in zip(predictions, [p for r in found.values() for p in r], strict=True):
        assert row["predicted"] == LABELS[int(best.argmax())]
        assert float(row["probability"]) == pytest.approx(float(best.max()), abs=2e-3)
    assert Image.open(tmp_path / "confusion.png").width > 300
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "names", (("no", "yes"), ("a" * 40, "b" * 40), [f"class {i}" for i in range(70)]), ids=len
)
def test_confusion_matrix_fits_its_picture(tmp_path, names):
    from mambavision.tools import evaluate

    targets = np.repeat(np.arange(len(names)), 100)
    chosen = np.stack([np.random.default_rng(0).permutation(targets)] * 2, 1)
    found = evaluate.Result(targets, chosen, np.ones(len(targets)), 1.0)
    setting = evaluate.Setting(224, 0.875, "squash")
    evaluate._confusion(found, names, tmp_path / "c.png", setting)
    assert_nothing_is_cut_off(tmp_path / "c.png")


def test_confusion_matrix_has_true_classes_in_rows(tmp_path, monkeypatch):
    """Of classes 0, 2 and 3; class 3 is predicted only."""
    from mambavision.tools import draw, evaluate

    targets = np.array([0, 0, 0, 2, 2])
    chosen = np.array([0, 0, 2, 3, 2])[:, None]
    expected = [[2, 1, 0], [0, 1, 1], [0, 0, 0]]
    drawn, write = [], draw.confusion

    def spy(path, counts, names, title):
        drawn.append((counts.tolist(), names))
        write(path, counts, names, title)

    monkeypatch.setattr(draw, "confusion", spy)
    found = evaluate.Result(targets, chosen, np.ones(5), 1.0)
    setting = evaluate.Setting(48, 0.9, "center")
    evaluate._confusion(found, list("abcd"), tmp_path / "c.png", setting)
    assert drawn == [(expected, ["a", "c", "d"])] and (tmp_path / "c.png").exists()

    (axes,) = write.__wrapped__(np.array(expected), list("acd"), "title").axes
    colours = np.asarray(axes.images[0].get_array())
    paper = colours[2, 0]
    assert ((colours != paper).any(-1) == (np.array(expected) > 0)).all()
    assert {text.get_text() for text in axes.texts} == {"1", "2"}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")


def test_eval_at_several_sizes_and_crops(tmp_path, capsys, checkpoint, colours):
    sizes, crops = (32, 64), (0.8, 1.0)
    code, _, _ = run(
        capsys, "eval", colours / "val", "--checkpoint", checkpoint.parent, "--output", tmp_path,
        "--img-size", *sizes, "--crop-pct", *crops,
    )  # fmt: skip
    assert code == 0
    summary = rows_of(tmp_path / "summary.csv")
    for row, (size, crop) in zip(summary, product(sizes, crops), strict=True):
        found = probabilities(tiny(), colours, size=size, crop_pct=crop)
        right = sum(int(p.argmax()) == i for i, k in enumerate(LABELS) for p in found[k])
        assert (int(row["img_size"]), float(row["crop_pct"])) == (size, crop)
        assert float(row["top1"]) == pytest.approx(right / 21)
        assert (tmp_path / f"classes-{size}-{crop:g}.csv").is_file()
        assert (tmp_path / f"confusion-{size}-{crop:g}.png").is_file()


def test_eval_squashes_when_told(tmp_path, capsys, checkpoint, colours):
    """Pictures of 50 x 40 and all of them in the square, but for the crop."""
    code, out, _ = run(
        capsys, "eval", colours, "--checkpoint", checkpoint, "--output", tmp_path,
        "--crop-mode", "squash", "--crop-pct", 1.0,
    )  # fmt: skip
    assert code == 0 and "squash" in out
    (summary,) = rows_of(tmp_path / "summary.csv")
    assert summary["crop_mode"] == "squash"
    for row in rows_of(tmp_path / "predictions.csv"):
        square = Image.open(row["picture"]).convert("RGB").resize((48, 48), Image.BICUBIC)
        square.save(tmp_path / "square.png")
        chance = float(expected(tiny(), tmp_path / "square.png", crop_pct=1.0).max())
        assert float(row["probability"]) == pytest.approx(chance, abs=2e-3)


def test_folders_are_matched_by_name(tmp_path, capsys, colours):
    """Labels in another order than the folders', and one without a folder."""
    labels = ["blue", "none", "green", "red"]
    path = save(tiny(4), tmp_path / "model.safetensors", labels)
    assert run(capsys, "eval", colours, "--checkpoint", path, "--output", tmp_path)[0] == 0
    for row in rows_of(tmp_path / "predictions.csv"):
        assert f"/val/{row['class']}/" in row["picture"]
        best = expected(tiny(4), row["picture"]).argmax()
        assert row["predicted"] == labels[best]
    assert [row["class"] for row in rows_of(tmp_path / "classes.csv")] == ["blue", "green", "red"]


def test_digits_are_split_as_in_the_run(tmp_path, capsys):
    from mambavision.demo import load_digits

    path = save(tiny(10), tmp_path / "model.safetensors", [str(i) for i in range(10)])
    (tmp_path / "args.yaml").write_text("seed: 3\n")
    command = ["eval", "digits", "--checkpoint", path, "--output", tmp_path, "--img-size", 32]
    for more, seed in (((), 3), (("--seed", 1), 1)):
        assert run(capsys, *command, *more)[0] == 0
        found = [int(row["class"]) for row in rows_of(tmp_path / "predictions.csv")]
        assert found == load_digits(seed, torch.device("cpu")).test_labels.tolist()


def test_eval_names_an_unreadable_picture(tmp_path, capsys, checkpoint, colours):
    (tmp_path / "red").mkdir()
    bad = tmp_path / "red" / "bad.png"
    bad.write_bytes((colours / "val" / "red" / "0.png").read_bytes()[:200])
    code, _, err = run(capsys, "eval", tmp_path, "--checkpoint", checkpoint,
                       "--output", tmp_path / "out")  # fmt: skip
    assert code == 1
    (line,) = said(err)
    assert str(bad) in line and "cannot read" in line


# predict


def test_predict_files_folders_patterns(tmp_path, capsys, checkpoint, colours):
    folder = colours / "val"
    one = folder / "green" / "3.png"
    code, out, err = run(
        capsys, "predict", one, folder / "red", f"{folder}/**/[01].png", "--checkpoint", checkpoint,
        "--json", "--topk", 2,
    )  # fmt: skip
    assert code == 0 and not said(err)
    found = json.loads(out)
    pictures = [row["picture"] for row in found]
    rest = [f"{folder}/{name}/{i}.png" for name in ("blue", "green") for i in (0, 1)]
    assert pictures == [str(one), *(f"{folder}/red/{i}.png" for i in range(7)), *rest]
    for row in found:
        chances = expected(tiny(), row["picture"])
        order = chances.argsort(descending=True)[:2].tolist()
        assert [c["index"] for c in row["classes"]] == order
        assert [c["label"] for c in row["classes"]] == [LABELS[i] for i in order]
        shown = [c["probability"] for c in row["classes"]]
        assert shown == pytest.approx(chances[order].tolist(), abs=2e-3)
        assert row["size"] == [50, 40]


def test_predict_draws(tmp_path, capsys, checkpoint, colours):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        picture(np.random.default_rng(1)).save(tmp_path / name / "same.png")
    picture(np.random.default_rng(2)).save(tmp_path / "a" / "same.jpg")
    code, out, _ = run(
        capsys, "predict", tmp_path / "a", tmp_path / "b", "--checkpoint", checkpoint,
        "--output", tmp_path / "out", "--features", "--features-size", 64,
    )  # fmt: skip
    assert code == 0 and re.search(r"a/same\.jpg +(red|green|blue) +\d+\.\d %", out)
    drawn = sorted(p.name for p in (tmp_path / "out").iterdir())
    names = ("a-same", "a-same-2", "b-same")
    pictures = [f"{name}{kind}.png" for name in names for kind in ("", "-features")]
    assert drawn == sorted([*pictures, "predictions.json"])
    for name in pictures:
        assert_nothing_is_cut_off(tmp_path / "out" / name)
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == 3
    wide = Image.open(tmp_path / "out" / "a-same-features.png")
    assert wide.width > 2 * wide.height
    # Drawn from the picture: another one gives another drawing.
    first, second, third = ((tmp_path / "out" / f"{n}.png").read_bytes() for n in names)
    assert first != second and second == third


def test_predict_goes_on_after_a_broken_picture(tmp_path, capsys, checkpoint):
    rng = np.random.default_rng(0)
    picture(rng).save(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes(b"no picture")
    picture(rng).save(tmp_path / "3.png")
    code, out, err = run(capsys, "predict", tmp_path, "--checkpoint", checkpoint, "-b", 2)
    assert code == 1 and "1.png" in out and "3.png" in out
    (line,) = said(err)
    assert "cannot read" in line and "2.png" in line
    code, out, _ = run(capsys, "predict", tmp_path, "--checkpoint", checkpoint, "--json")
    found = json.loads(out)
    assert [("error" in row) for row in found] == [False, True, False]
    chances = [max(c["probability"] for c in found[i]["classes"]) for i in (0, 2)]
    files = (tmp_path / "1.png", tmp_path / "3.png")
    best = [float(expected(tiny(), path).max()) for path in files]
    assert chances == pytest.approx(best, abs=2e-3)


def test_pictures_are_upright(tmp_path, capsys, checkpoint):
    image = picture(np.random.default_rng(0), (60, 40))
    image.save(tmp_path / "1.png")
    turned = image.rotate(90, expand=True)
    exif = turned.getexif()
    exif[274] = 6
    turned.save(tmp_path / "2.png", exif=exif)
    _, out, _ = run(capsys, "predict", tmp_path, "--checkpoint", checkpoint, "--json")
    first, second = json.loads(out)
    assert first["size"] == second["size"] == [60, 40]
    assert first["classes"] == second["classes"]


def test_principal_components_as_colours():
    """A map of two kinds of features has two colours, whatever their order."""
    from mambavision.tools.draw import _principal

    kinds = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    where = (torch.arange(36).reshape(6, 6) % 5 == 0).long()
    colours = _principal(kinds[where].permute(2, 0, 1))
    assert colours.shape == (6, 6, 3) and 0 <= colours.min() and colours.max() <= 1
    first, second = colours[where.numpy() == 0], colours[where.numpy() == 1]
    assert np.ptp(first, axis=0).max() < 1e-6 and np.abs(first[0] - second[0]).max() > 0.9
    assert _principal(torch.ones(5, 1, 1)).shape == (1, 1, 3)


# What a checkpoint says, and what the command line adds


def opened(*arguments):
    from mambavision import cli
    from mambavision.tools.source import open_source

    command = ["predict", "x.png", "--device", "cpu", *map(str, arguments)]
    return open_source(cli._parser().parse_args(command))


def test_maps_are_those_of_the_stages(checkpoint):
    source, x = opened("--checkpoint", checkpoint), torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        expected = tiny().forward_stages(x)
    found = source.maps(x)
    assert [tuple(map.shape) for map in found] == [(8, 16, 12), (16, 8, 6), (32, 4, 3), (64, 2, 2)]
    torch.testing.assert_close(found, [map[0] for map in expected], rtol=0, atol=0)


@pytest.mark.parametrize(
    "flags, dtype", (((), torch.float32), (("--amp",), torch.bfloat16),
                     (("--amp", "--amp-dtype", "float16"), torch.float16)),
)  # fmt: skip
def test_precision_is_that_asked_for(checkpoint, flags, dtype):
    source, seen = opened("--checkpoint", checkpoint, *flags), []
    source.model.head.register_forward_hook(lambda module, x, out: seen.append(out.dtype))
    assert source.logits(torch.randn(1, 3, 48, 48)).dtype == torch.float32
    assert seen == [dtype]


@pytest.mark.parametrize(
    "variant, crop", (("mamba_vision_S", (0.93, "center")), ("mamba_vision_T2", (0.98, "center")),
                      ("mamba_vision_L2_512_21k", (0.93, "squash")))
)  # fmt: skip
def test_preprocessing_is_the_variants(tmp_path, variant, crop):
    path = tmp_path / "m.safetensors"
    save_checkpoint(tiny(), path, config={"model": variant})
    source = opened("--checkpoint", path)
    assert (source.crop_pct, source.crop_mode) == crop
    assert source.input_size == (512 if "512" in variant else 224)
    image = Image.new("RGB", (300, 200))
    image.paste((255, 255, 255), (0, 0, 40, 200))
    x = source.transform(source.input_size, source.crop_pct, source.crop_mode)(image)
    # A center crop of the wide picture leaves its white edge out, a squashed one shows it.
    assert (float(x[0, :, :10].max()) > 0) == (crop[1] == "squash")
    assert x.shape == (3, source.input_size, source.input_size)


def test_labels(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    named = save(tiny(), tmp_path / "named.safetensors")
    assert opened("--checkpoint", named).labels == LABELS
    (tmp_path / "names.txt").write_text("x\ny\nz\n")
    assert opened("--checkpoint", named, "--labels", tmp_path / "names.txt").labels == list("xyz")
    unnamed = save(tiny(), tmp_path / "unnamed.pth", None)
    assert opened("--checkpoint", unnamed).labels == []
    # As transformers' save_pretrained leaves it.
    from safetensors.torch import save_file

    state = {f"model.{k}": v.contiguous() for k, v in tiny().state_dict().items()}
    save_file(state, folder / "model.safetensors")
    id2label = dict(enumerate(LABELS))
    about = {**SIZES, "resolution": 96, "crop_pct": 0.7, "id2label": id2label}
    (folder / "config.json").write_text(json.dumps(about))
    source = opened("--checkpoint", folder)
    assert (source.labels, source.input_size, source.crop_pct) == (LABELS, 96, 0.7)
    imagenet = opened("--checkpoint", save(tiny(1000), tmp_path / "i.safetensors", None))
    assert imagenet.labels[0].startswith("tench") and imagenet.folders[0] == "n01440764"


@pytest.mark.parametrize(
    "arguments, message",
    (
        ("eval {data}", "no weights: name --checkpoint"),
        ("eval {data} --checkpoint {tmp}/none.pth", "no file"),
        ("eval {data} --checkpoint {tmp}/cut.safetensors", "damaged or truncated"),
        ("eval {data} --checkpoint {tmp}/bare.pth", "does not say of what model it is"),
        ("eval {data} --checkpoint {tmp}/bare.pth --model mamba_vision_T", "does not fit"),
        ("eval {data} --checkpoint {tmp}/bare.pth --model mamba_vison_T", "did you mean"),
        ("eval {data} --checkpoint {tmp}/odd.safetensors", "makes no model"),
        ("eval {data} --checkpoint {tmp}/two.safetensors", "2 labels, the model has 3 classes"),
        ("eval {data} --checkpoint {tmp}/other.safetensors", "blue, green, red: no class of the"),
        ("eval {data} --checkpoint {tmp}/four.safetensors", "3 class folders, the model has 4"),
        ("eval digits --checkpoint {ok}", "labels are not the digits"),
        ("eval {tmp}/nowhere --checkpoint {ok}", "no such folder"),
        ("eval {tmp}/empty --checkpoint {ok}", "no class folders"),
        ("eval {data} --checkpoint {ok} --output {tmp}/bare.pth", "is a file"),
        ("eval {data} --checkpoint {ok} --labels {tmp}/none.txt", "No such file"),
        ("eval {data} --checkpoint {ok} --crop-pct 0", "must be a number >= 0.01"),
        ("eval {data} --pretrained", "--pretrained goes with --model"),
        ("predict {tmp}/none.jpg --checkpoint {ok}", "no such picture"),
        ("predict {tmp}/empty --checkpoint {ok}", "no picture in that folder"),
        ("predict {tmp}/*.gif --checkpoint {ok}", "no such picture"),
        ("predict {data}/val/red/0.png --checkpoint {ok} --features", "needs --output"),
        ("predict {data}/val/red/0.png --checkpoint {ok} --topk 0", "must be an integer >= 1"),
        ("predict {data} --checkpoint {ok} --device cuda", "sees no such device"),
        ("info mamba_vison_T", "did you mean mamba_vision_T?"),
        ("info mamba_vision_T --img-size 20", "must be an integer >= 32, got '20'"),
        ("info mamba_vision_T --img-size 32 32 32", "takes one number or height and width"),
        ("info {tmp}/none.pth", "no file"),
    ),
)
def test_errors_are_one_line(tmp_path, capsys, checkpoint, colours, arguments, message):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is such a device")
    (tmp_path / "empty").mkdir()
    torch.save(tiny().state_dict(), tmp_path / "bare.pth")
    (tmp_path / "cut.safetensors").write_bytes(checkpoint.read_bytes()[:5000])
    save(tiny(), tmp_path / "odd.safetensors", dim="many")
    save(tiny(), tmp_path / "two.safetensors", ["a", "b"])
    save(tiny(), tmp_path / "other.safetensors", ["a", "b", "c"])
    save(tiny(4), tmp_path / "four.safetensors", None)
    places = {"data": colours, "tmp": tmp_path, "ok": checkpoint}
    command = [part.format(**places) for part in arguments.split()]
    if "--output" not in command and command[0] == "eval":
        command += ["--output", str(tmp_path / "out")]
    code, _, err = run(capsys, *command)
    assert code == 2
    (line,) = said(err)
    assert line.startswith(f"mambavision {command[0]}: error: ") and message in line


# doctor


def test_doctor(capsys):
    code, out, _ = run(capsys, "doctor", "--device", "cpu")
    assert code == 0 and f"torch               {torch.__version__}" in out
    for name in ("mixer", "selective_scan", "conv1d_silu"):
        assert re.search(rf"{name} \(float32", out)
        assert re.search(rf"{name} +float32 +\w+ \d\.\de-\d\d .* ok", out)
    assert "PyTorch: mixer" in out and re.search("GPU", out) and "cache" in out


@pytest.mark.gpu
def test_doctor_on_a_gpu(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and torch.cuda.get_device_name() in out
    assert "Triton: mixer (float32, dstate 8)" in out
    assert "PyTorch: selective_scan (float64, dstate 8)" in out
    assert re.search(r"mixer +float16 .* ok", out)


RIGHT = ops.conv1d_silu


def wrong_output(x, weight, bias):
    return 1.001 * RIGHT(x, weight, bias)


def one_lost_gradient(x, weight, bias):
    bias = bias.clone()
    bias.register_hook(lambda grad: torch.full_like(grad, float("nan")))
    return RIGHT(x, weight, bias)


@pytest.mark.parametrize("fault", (wrong_output, one_lost_gradient), ids=lambda f: f.__name__)
def test_doctor_notices_a_wrong_operator(capsys, monkeypatch, fault):
    monkeypatch.setattr(ops, "conv1d_silu", fault)
    code, out, _ = run(capsys, "doctor", "--device", "cpu")
    assert code == 1 and "problem: wrong on cpu: conv1d_silu" in out
    assert len(re.findall("WRONG", out)) == 1


def test_doctor_without_triton():
    """A Triton that cannot be imported is a finding, not a crash."""
    code = (
        "import sys; sys.modules['triton'] = None; from mambavision.cli import main;"
        "sys.exit(main(['doctor', '--device', 'cpu']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    assert re.search("PyTorch: mixer.*\n +it cannot be imported", done.stdout)
    assert re.search(r"problem: triton \S+ cannot be imported", done.stdout)


# The terminal


@pytest.mark.parametrize("name", (*COMMANDS, "train"))
def test_help_teaches(name, capsys):
    code, out, _ = run(capsys, name, "--help")
    assert code == 0 and f"examples:\n  mambavision {name}" in out
    code, out, _ = run(capsys, "--help")
    assert code == 0 and re.search(f"examples:\n(.*\n)*  mambavision {name} ", out)


def test_help_of_train_shows_the_presets(capsys):
    from mambavision.training.options import PRESETS

    out = run(capsys, "train", "--help")[1].partition("presets:")[2]
    assert all(len(line) <= 100 for line in out.splitlines())
    for name, values in PRESETS.items():
        shown = out.partition(f"\n  {name}: ")[2]
        for setting, value in values.items():
            if isinstance(value, (int, str)):
                assert f"{setting} {value}" in shown


def test_help_needs_no_torch():
    code = "import sys; import mambavision.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT)


def test_shell_completion(tmp_path):
    pytest.importorskip("argcomplete")
    line = "mambavision predict --featu"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)),
             "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "found")}  # fmt: skip
    subprocess.run([sys.executable, "-m", "mambavision"], env={**ENVIRONMENT, **asked}, check=False)
    found = (tmp_path / "found").read_text().split("\v")
    assert {name.strip() for name in found} == {"--features", "--features-size"}


def test_numbers_are_not_rounded_to_certainty():
    assert [percent(x) for x in (1, 0.99999, 0.5, 1e-4, 0)] == [
        "100.0 %", "99.9 %", "50.0 %", "<0.1 %", "0.0 %",
    ]  # fmt: skip
    assert [amount(x, "B") for x in (999, 999.6, 1.5e6, 2.5e12)] == [
        "999 B", "1 kB", "1.5 MB", "2.5e+03 GB",
    ]  # fmt: skip


def test_documented_code_runs(tmp_path):
    """The Python of docs/tools.md, from top to bottom."""
    text = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```py(?:thon)?\n(.*?)```", text, re.DOTALL))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=ENVIRONMENT)
    assert len(list((tmp_path / "pictures").iterdir())) == 362

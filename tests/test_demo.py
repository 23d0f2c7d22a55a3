"""`mambavision demo` as a person meets it: what it says, writes, and leaves behind."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from mambavision import ops
from mambavision.cli import main
from mambavision.demo import augmented, batch_sizes, load_digits
from mambavision.selfcheck import OpCheck, check_ops

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from mambavision.report import write_files  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    "report.html", "results.json", "curves.png", "predictions.png", "confusion.png", "speed.png",
}  # fmt: skip


def run(*arguments: object) -> int:
    try:
        return main([str(a) for a in arguments])
    except SystemExit as stop:  # from argparse
        return int(stop.code or 0)


BAD = {
    "no command": ([], "command"),
    "unknown command": (["dmeo"], "dmeo"),
    "epochs 0": (["demo", "--epochs", "0"], "epochs must be an integer >= 1, got '0'"),
    "epochs word": (["demo", "--epochs", "many"], "epochs must be an integer >= 1, got 'many'"),
    "batch size 1": (["demo", "--batch-size", "1"], "batch-size must be an integer >= 2"),
    "seed negative": (["demo", "--seed=-1"], "seed must be an integer from 0 to"),
    "seed too large": (["demo", f"--seed={2**32}"], "seed must be an integer from 0 to"),
    "device unknown": (["demo", "--device", "tpu"], "tpu"),
    "flag unknown": (["demo", "--epoch-count", "3"], "--epoch-count"),
    "output below a file": (["demo", "--output", f"{__file__}/report"], "cannot write into"),
    "output a file": (["demo", "--output", __file__], "is a file"),
}


@pytest.mark.parametrize("arguments, expected", BAD.values(), ids=BAD)
def test_bad_value_is_one_line(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and expected in err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_missing_device_is_one_line(capsys):
    assert run("demo", "--device", "cuda") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_missing_extra_names_the_command(capsys, monkeypatch):
    monkeypatch.setattr("mambavision.demo.find_spec", lambda name: None)
    assert run("demo") == 2
    err = capsys.readouterr().err
    assert "scikit-learn" in err and "pip install 'mambavision-triton[demo]'" in err
    assert err.count("\n") == 1


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """One epoch, as a separate process: (folder, stdout)."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    command = [sys.executable, "-m", "mambavision", "demo", "--epochs", "1", "--output", folder]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_writes_a_report_and_names_it_last(short_run):
    folder, out = short_run
    assert out.splitlines()[-1] == f"Report: {folder / 'report.html'}"
    assert {path.name for path in folder.iterdir()} == FILES
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_page_holds_everything(short_run):
    page = (short_run[0] / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 4
    assert 'src="http' not in page and "href=" not in page
    assert "no writer ids" in page and "mambavision demo --epochs 1" in page


def test_numbers_of_the_report(short_run):
    numbers = json.loads((short_run[0] / "results.json").read_text())
    assert [row["op"] for row in numbers["checks"][:1]] == ["conv1d_silu"]
    assert {row["op"] for row in numbers["checks"]} == {"conv1d_silu", "selective_scan", "mixer"}
    assert all(row["ok"] and row["seconds"] > 0 for row in numbers["checks"])
    assert len(numbers["history"]) == 1 and numbers["test_images"] == 360
    assert 0 < numbers["accuracy"] <= 1


def test_disagreement_fails_before_training(capsys, monkeypatch, tmp_path):
    right = ops.mixer

    def wrong(*args, **kwargs):
        return right(*args, **kwargs) * (1 + 1e-4)

    monkeypatch.setattr(ops, "mixer", wrong)
    assert run("demo", "--output", tmp_path / "report") == 1
    out, err = capsys.readouterr()
    assert "DISAGREES" in out and "mixer" in err and "conv1d_silu" not in err
    assert not list(tmp_path.iterdir())


def test_lost_gradient_is_seen(monkeypatch):
    right = ops.conv1d_silu

    def wrong(x, weight, bias, **kwargs):
        return right(x, weight, bias.detach() + 0 * bias, **kwargs)

    monkeypatch.setattr(ops, "conv1d_silu", wrong)
    check = next(check_ops(torch.device("cpu")))
    assert check.op == "conv1d_silu" and check.tensor == "dbias" and not check.ok


def test_nan_is_no_agreement():
    numbers = dict(error=float("nan"), allowed=1.0, seconds=1.0)
    check = OpCheck("op", "torch", "float32", "", "y", **numbers, seconds_reference=1.0,
                    seconds_eager=1.0)  # fmt: skip
    assert not check.ok


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to one process")
def test_interrupt_leaves_nothing(tmp_path):
    folder = tmp_path / "report"
    command = [sys.executable, "-u", "-m", "mambavision", "demo", "--output", str(folder)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("Training"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "mambavision demo: interrupted"
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    write_files(tmp_path, {"one": b"old", "two": b"old"})
    replace = os.replace

    def interrupted(source, target):
        if Path(target).name == "two":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_files(tmp_path, {"one": b"new", "two": b"new"})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"one": b"new", "two": b"old"}


def test_split_is_stratified_disjoint_and_seeded():
    digits = load_digits(0, torch.device("cpu"))
    assert digits.train_images.shape == (1437, 1, 64, 64)
    assert digits.test_images.shape == (360, 1, 64, 64)
    assert 0 <= digits.train_images.min() and digits.train_images.max() <= 1
    counts = Counter(digits.test_labels.tolist())
    assert set(counts) == set(range(10)) and min(counts.values()) >= 34
    train = {image.numpy().tobytes() for image in digits.train_images}
    assert not any(image.numpy().tobytes() in train for image in digits.test_images)
    assert torch.equal(digits.test_labels, load_digits(0, torch.device("cpu")).test_labels)
    assert not torch.equal(digits.test_labels, load_digits(1, torch.device("cpu")).test_labels)


def test_augmentation_moves_but_keeps_the_image():
    images = load_digits(0, torch.device("cpu")).train_images[:16]
    moved = augmented(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape and not torch.equal(moved, images)
    assert torch.equal(moved, augmented(images, torch.Generator().manual_seed(0)))
    ratio = moved.sum(dim=(1, 2, 3)) / images.sum(dim=(1, 2, 3))
    assert 0.6 < ratio.min() and ratio.max() < 1.5


@pytest.mark.parametrize("count, size", [(1437, 64), (10, 3), (9, 3), (7, 3), (3, 64), (5, 2)])
def test_batches_hold_every_image_and_never_one(count, size):
    sizes = batch_sizes(count, size)
    assert sum(sizes) == count and min(sizes) >= 2


@pytest.mark.slow
def test_reaches_97_percent(tmp_path):
    assert run("demo", "--output", tmp_path) == 0
    assert json.loads((tmp_path / "results.json").read_text())["accuracy"] >= 0.97

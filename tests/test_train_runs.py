"""`mambavision train` as it is started and watched: the bar, loggers, torchrun, Ctrl-C."""

import os
import re
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm", exc_type=ImportError)

from test_train import CPU, assert_whole, make_folder, options  # noqa: E402

from mambavision.errors import CommandError  # noqa: E402
from mambavision.training import loop  # noqa: E402
from mambavision.training.loop import train  # noqa: E402
from mambavision.training.parallel import Ranks  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
# The sizes of `options`, for another process.
MODEL = (
    "--img-size 32 -b 4 -j 0 --device cpu --warmup-epochs 0 --lr 1e-3 --model-kwargs dim=8 "
    "in_dim=4 depths=1,1,2,2 num_heads=1,1,2,2 window_size=8,8,2,1 mlp_ratio=1"
).split()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# What is shown


def test_bar_tells_loss_accuracy_speed_and_time_left(shapes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "READING", 0.0)
    result = train(options(shapes, tmp_path / "run"))
    out, err = capsys.readouterr()
    last = re.split(r"[\r\n]+", err.strip())[-1]
    row = result.history[-1]
    assert f"epoch 2/2, loss {row['train_loss']:.3f}, accuracy {row['train_top1']:.1%}" in last
    assert re.search(r"^100% \|█+\| \d\d:\d\d gone, 00:00 left, +\d+\.\d+ images/s, epoch", last)
    lines = [line for line in out.splitlines() if line.startswith("epoch")]
    assert len(lines) == 2
    for line, row in zip(lines, result.history, strict=True):
        assert f"validation loss {row['val_loss']:.4f}, accuracy {row['val_top1']:.2%}" in line
        assert f"{row['images_per_second']:.0f} images/s" in line
    assert out.splitlines()[-1].startswith(f"best validation accuracy {result.best_top1:.2%};")


def test_other_processes_show_nothing(capsys):
    display = loop._Display(Ranks(CPU.device, rank=1, count=2), 10, 0)
    with display.bar as bar:
        bar.update(5)
        display.line({"epoch": 1.0}, 1, False)
    assert capsys.readouterr() == ("", "")


def test_resumed_bar_starts_where_the_run_does(shapes, tmp_path, capsys):
    train(options(shapes, tmp_path / "run", epochs=1))
    capsys.readouterr()
    train(options(shapes, tmp_path / "run"), resume=str(tmp_path / "run"))
    out, err = capsys.readouterr()
    assert re.split(r"[\r\n]+", err.strip())[0].startswith("50%") and "from epoch 2" in out


# Loggers


def board_of(folder):
    """{column: [(epoch, value), ...]}"""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def assert_logged(found, history):
    for name in ("train_loss", "val_top1", "lr", "images_per_second"):
        assert [epoch for epoch, _ in found[name]] == [row["epoch"] for row in history]
        values = [value for _, value in found[name]]
        assert values == pytest.approx([row[name] for row in history], rel=1e-6)


def test_tensorboard(shapes, tmp_path):
    """Also after an epoch that a killed run had logged and its checkpoint does not hold."""
    pytest.importorskip("tensorboard")
    chosen = options(shapes, tmp_path / "run", log_tensorboard=True)
    train(replace(chosen, epochs=1))
    before = (tmp_path / "run" / "last.pt").read_bytes()
    history = train(chosen, resume=chosen.output).history
    assert_logged(board_of(tmp_path / "run"), history)
    (tmp_path / "run" / "last.pt").write_bytes(before)
    history = train(replace(chosen, epochs=3), resume=chosen.output).history
    assert len(history) == 3
    assert_logged(board_of(tmp_path / "run"), history)


@pytest.fixture
def offline(monkeypatch):
    """The real client of Weights & Biases, without a network."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    # It reads its environment once.
    wandb.teardown()
    yield
    wandb.teardown()


def wandb_records(path):
    """A .wandb file: blocks of records, each with its checksum, length and kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, record = path.read_bytes(), 7, b""
    while place < len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        place += 7
        record += data[place : place + size]
        place += size
        # 1: whole; 4: the last part
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def test_wandb(shapes, tmp_path, monkeypatch, offline):
    """A run that failed is continued under its id."""
    chosen = options(shapes, tmp_path / "run", log_wandb=True)
    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "finish_epoch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(chosen)
    # Its folders are named by the second.
    time.sleep(1)
    history = train(chosen, resume=chosen.output).history
    runs, exits, logged = [], [], []
    for path in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")):
        for record in wandb_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                runs.append(record.run)
            elif kind == "exit":
                exits.append(record.exit.exit_code)
            elif kind == "history":
                items = {"".join(i.nested_key) or i.key: i for i in record.history.item}
                logged.append({name: float(i.value_json) for name, i in items.items()})
    assert exits == [1, 0] and len({run.run_id for run in runs}) == 1
    config = {item.key: item.value_json for item in runs[0].config.update}
    assert config["batch_size"] == "4" and runs[0].display_name == "run"
    found = {name: [(row["epoch"], row[name]) for row in logged] for name in history[0]}
    assert_logged(found, history)


def test_wandb_that_cannot_start_is_one_line(shapes, tmp_path, monkeypatch, offline):
    monkeypatch.setenv("WANDB_RUN_ID", "no/such/id")
    with pytest.raises(CommandError, match="^--log-wandb: Run ID cannot") as error:
        train(options(shapes, tmp_path / "run", log_wandb=True))
    assert "\n" not in str(error.value)


# Ctrl-C


class Interrupting:
    """A file whose third writing is interrupted."""

    def __init__(self, file):
        self.file, self.writes = file, 0

    def write(self, data):
        self.writes += 1
        if self.writes == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_interrupted_in_the_middle_of_a_checkpoint(shapes, tmp_path, monkeypatch):
    """torch calls the file from C++ and would make another error of it."""
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda state, file: save(state, Interrupting(file)))
    with pytest.raises(KeyboardInterrupt):
        train(options(shapes, tmp_path / "run", recovery_interval=2))
    assert_whole(tmp_path / "run")
    assert not list((tmp_path / "run").glob(".*"))
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["updates"] == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked")
def test_interrupted_while_workers_start(shapes, tmp_path):
    """Python loses what arises in the middle of a fork; those just born must not die of it."""
    code = f"""
import os, signal, sys
left = [int(sys.argv[1])]
def interrupt():
    left[0] -= 1
    if left[0] == 0:
        os.killpg(0, signal.SIGINT)
os.register_at_fork(after_in_parent=interrupt)
from mambavision.cli import main
sys.exit(main(["train", {str(shapes)!r}, *{MODEL!r}, "--epochs", "9", "-j", "2",
               "--output", {str(tmp_path)!r} + "/" + sys.argv[1]]))
"""
    # The second worker of the training images, the first of the validation's.
    for fork in ("2", "3"):
        done = subprocess.run(
            [sys.executable, "-c", code, fork], env=ENVIRONMENT, capture_output=True, text=True,
            start_new_session=True,
        )  # fmt: skip
        assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.strip().endswith("mambavision train: interrupted")
        assert "epoch 2/" not in done.stdout


# Started and stopped as from a shell


def results_of(folder):
    state = torch.load(folder / "last.pt", weights_only=True)
    return state["epoch"], state["updates"]


@pytest.mark.slow
def test_torchrun(shapes, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "mambavision",
               "train", str(shapes), "--epochs", "1", "--output", str(tmp_path / "run"),
               *MODEL]  # fmt: skip
    done = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # 24 images in two processes of 4; the second one shows nothing.
    assert "1 epochs of 3 updates on 2 x cpu" in done.stdout
    assert len(re.findall(r"^epoch 1/1: ", done.stdout, re.MULTILINE)) == 1
    assert results_of(tmp_path / "run") == (1, 3)
    assert_whole(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of a shell")
def test_interrupted(shapes, tmp_path):
    """Ctrl-C reaches the workers, too: one line, whole files, and the run goes on."""
    run = tmp_path / "run"
    more = [*MODEL, "--epochs", "999", "-j", "2", "--recovery-interval", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mambavision", "train", str(shapes), *more, "--output", str(run)],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    while not (run / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert err.strip().splitlines()[-1] == "mambavision train: interrupted"
    assert not list(run.glob(".*"))
    assert_whole(run)
    done, _ = results_of(run)
    finished = subprocess.run(
        [sys.executable, "-m", "mambavision", "train", "--resume", str(run), "--epochs",
         str(done + 1), "-j", "0"], env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert results_of(run)[0] == done + 1

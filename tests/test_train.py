"""`mambavision train`: settings, repeatable data, whole files, kills and resumes, two processes."""

import csv
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mambavision import MambaVision, load_checkpoint, read_config, save_checkpoint
from mambavision.cli import main
from mambavision.errors import CommandError
from mambavision.training.options import PRESETS, Options, read_yaml, resolve

pytest.importorskip("timm", exc_type=ImportError)

from mambavision.training import parallel  # noqa: E402
from mambavision.training.data import Seeded, open_data, training_loader  # noqa: E402
from mambavision.training.engine import Trainer, learning_rate  # noqa: E402
from mambavision.training.loop import train  # noqa: E402
from mambavision.training.parallel import Ranks, Wrapped  # noqa: E402

CPU = Ranks(torch.device("cpu"))
SIZES = {
    "dim": 8, "in_dim": 4, "depths": (1, 1, 2, 2), "num_heads": (1, 1, 2, 2),
    "window_size": (8, 8, 2, 1), "mlp_ratio": 1,
}  # fmt: skip
CLASSES = ("circle", "cross", "square")


def picture(kind, rng):
    """A shape of random brightness, 40x36, on noise."""
    image = rng.integers(0, 80, (36, 40, 3))
    rows, columns = np.ogrid[:36, :40]
    y, x, size = rng.integers(12, 24), rng.integers(12, 28), rng.integers(6, 10)
    down, right = abs(rows - y), abs(columns - x)
    shape = {
        "circle": down**2 + right**2 < size**2,
        "square": np.maximum(down, right) < size,
        "cross": (np.minimum(down, right) < 2) & (np.maximum(down, right) < size),
    }[kind]
    image[shape] = rng.integers(150, 256, 3)
    return Image.fromarray(image.astype(np.uint8))


def make_folder(root, train_images=8, val_images=4):
    rng = np.random.default_rng(0)
    for part, count in (("train", train_images), ("val", val_images)):
        for kind in CLASSES:
            (root / part / kind).mkdir(parents=True)
            for index in range(count):
                picture(kind, rng).save(root / part / kind / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(autouse=True)
def one_thread():
    """The same bits in this process as in its children."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def options(data, output="unused", **more):
    """A run of a second: 24 images in 6 steps, all that is random switched on."""
    return replace(
        Options(
            data=str(data), output=str(output), device="cpu", workers=0, img_size=32, batch_size=4,
            epochs=2, warmup_epochs=0, lr=1e-3, model_kwargs=SIZES, drop=0.1, drop_path=0.2,
            aa="rand-m5-mstd0.5-inc1", reprob=0.3, mixup=0.2, cutmix=0.5, model_ema=True,
            model_ema_decay=0.9, clip_grad=1.0,
        ),
        **more,
    )  # fmt: skip


def trainer_of(chosen, classes=3, steps=6):
    return Trainer(chosen, classes, steps, CPU)


# Settings


def test_command_line_over_yaml_over_preset_over_default(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("mambavision.training.loop.train", lambda o, **_: seen.append(o))
    config = tmp_path / "c.yaml"
    config.write_text("preset: finetune\nepochs: 7\nlr-base: 1e-4\nscale: [0.5, 1]\n")
    command = ["train", "digits", "-c", str(config), "--lr-base", "2e-4", "--no-model-ema"]
    assert main([*command, "--model-kwargs", "dim=16", "depths=1,1,2,2"]) == 0
    (found,) = seen
    assert (found.lr_base, found.model_ema) == (2e-4, False)
    assert (found.epochs, found.scale) == (7, (0.5, 1.0))
    assert found.layer_decay == PRESETS["finetune"]["layer_decay"] != Options.layer_decay
    assert found.momentum == Options.momentum
    assert found.model_kwargs == {"dim": 16, "depths": (1, 1, 2, 2)}


@pytest.mark.parametrize(
    "line, message",
    (
        ("batchsize: 3", "no setting 'batchsize'; did you mean batch_size"),
        ("batch_size: many", "batch_size must be an integer >= 2, got 'many'"),
        ("batch_size: 2.5", "batch_size must be an integer"),
        ("mixup_prob: 1.5", "mixup_prob must be a number >= 0 and <= 1"),
        ("amp: 1", "amp must be true or false"),
        ("sched: linear", "sched must be one of cosine"),
        ("scale: 0.5", "scale must be a list of 2"),
        ("model_kwargs: 3", "model_kwargs must be a mapping"),
        ("- 1", "expected lines of"),
        ("a: [", "c.yaml"),
    ),
)
def test_yaml_is_checked(tmp_path, line, message):
    (tmp_path / "c.yaml").write_text(line)
    with pytest.raises(CommandError) as error:
        read_yaml(tmp_path / "c.yaml")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_settings(tmp_path, name):
    import yaml

    (tmp_path / "c.yaml").write_text(yaml.safe_dump(resolve({"preset": name}).as_dict()))
    assert read_yaml(tmp_path / "c.yaml").keys() == resolve({"preset": name}).as_dict().keys()
    chosen = resolve({"model_kwargs": SIZES}, tmp_path / "c.yaml")
    assert trainer_of(replace(chosen, amp=False)).epochs >= chosen.epochs


@pytest.mark.parametrize("name", ("paper", "finetune"))
def test_presets_train(shapes, tmp_path, name):
    """All that they switch on at once, for two epochs of a small model."""
    given = {
        "preset": name, "data": str(shapes), "output": str(tmp_path / "run"), "epochs": 2,
        "warmup_epochs": 1, "cooldown_epochs": 0, "batch_size": 4, "img_size": 32, "workers": 0,
        "device": "cpu", "model_kwargs": SIZES,
    }  # fmt: skip
    result = train(resolve(given))
    assert len(result.history) == 2 and (tmp_path / "run" / "model.safetensors").exists()


def test_rate_is_scaled_to_the_images_of_an_update():
    base = Options(batch_size=64, grad_accum_steps=2, lr_base=1e-3, lr_base_size=2048)
    assert learning_rate(base, ranks=4) == pytest.approx(1e-3 / 2)
    assert learning_rate(replace(base, opt="sgd"), ranks=4) == pytest.approx(1e-3 / 4)
    assert learning_rate(replace(base, lr=0.5), ranks=4) == 0.5


@pytest.mark.parametrize("layer_decay", (None, 0.5))
def test_no_decay_on_decays_norms_and_biases(shapes, layer_decay):
    trainer = trainer_of(options(shapes, layer_decay=layer_decay))
    decay = {p: g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    names = dict(trainer.model.named_parameters())
    assert decay.keys() == set(names.values())
    still = {n for n, p in names.items() if decay[p] == 0}
    assert still == {
        n for n, p in names.items() if p.dim() < 2 or n.endswith(("A_log", ".D", "bias"))
    }
    assert {decay[p] for n, p in names.items() if n not in still} == {0.05}


def test_layer_decay_goes_from_layer_to_layer(shapes):
    """1 + 1 + 2 + 2 blocks between stem and head."""
    trainer = trainer_of(options(shapes, layer_decay=0.5, sched="constant", lr=1.0))
    trainer.update(fixed_batches(1), 1, epoch=0, step=0)
    rates = {p: g["lr"] for g in trainer.optimizer.param_groups for p in g["params"]}
    found = {name: rates[p] for name, p in trainer.model.named_parameters()}
    blocks = [(0, 0), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1)]
    expected = {"patch_embed.": 0.5**7, "norm.": 0.5, "head.": 1.0}
    expected |= {f"levels.{s}.blocks.{b}.": 0.5 ** (6 - i) for i, (s, b) in enumerate(blocks)}
    expected |= {f"levels.{s}.downsample.": expected[f"levels.{s}.blocks.{b}."]
                 for s, b in ((0, 0), (1, 0), (2, 1))}  # fmt: skip
    for name, rate in found.items():
        (start,) = [start for start in expected if name.startswith(start)]
        assert rate == pytest.approx(expected[start]), name


def test_pictures_are_upright(tmp_path):
    """As predict shows them to the model: a camera held sideways notes it in the file."""
    data = make_folder(tmp_path / "data", train_images=1, val_images=1)
    path = data / "val" / "cross" / "0.png"
    upright = Image.open(path).convert("RGB")
    turned = upright.rotate(90, expand=True)
    exif = turned.getexif()
    exif[274] = 6
    turned.save(path, exif=exif)
    images = open_data(options(data)).val
    (index,) = [i for i in range(len(images)) if images.name(i) == str(path)]
    found, target = images.open(index)
    assert target == CLASSES.index("cross")
    np.testing.assert_array_equal(np.asarray(found), np.asarray(upright))


# Repeatable data


def test_sample_is_a_function_of_seed_epoch_and_index(shapes):
    chosen = options(shapes)
    splits = open_data(chosen)
    dataset = training_loader(splits.train, chosen, 0, 1, CPU.device)[0].dataset
    assert isinstance(dataset, Seeded)
    first = dataset[3, 5][0]
    torch.rand(7), np.random.rand(7)
    dataset[0, 0]
    torch.testing.assert_close(dataset[3, 5][0], first, rtol=0, atol=0)
    for other in ((4, 5), (3, 6)):
        assert not torch.equal(dataset[other][0], first)
    dataset.seed = 1
    assert not torch.equal(dataset[3, 5][0], first)


@pytest.mark.parametrize(
    "aa", ("rand-m10-n8-inc1", "rand-m0-n8", "original", "v0", "augmix-m1-w8", "3a")
)
def test_augmentations_at_the_ends_of_their_scales(shapes, aa):
    """Those of the paper reach them now and then: posterizing to no bit at all, for one."""
    chosen = options(shapes, aa=aa)
    dataset = training_loader(open_data(chosen).train, chosen, 0, 1, CPU.device)[0].dataset
    for epoch in range(4):
        for index in range(24):
            assert dataset[epoch, index][0].isfinite().all()


def test_workers_change_nothing(shapes):
    batches = []
    for workers in (0, 2):
        chosen = options(shapes, workers=workers)
        loader, sampler = training_loader(open_data(chosen).train, chosen, 0, 1, CPU.device)
        sampler.epoch = 1
        batches.append(list(loader))
    for found, expected in zip(*batches, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_sampler_starts_anywhere_and_processes_share(shapes):
    chosen = options(shapes)
    images = open_data(chosen).train
    _, whole = training_loader(images, chosen, 0, 1, CPU.device)
    every = [index for _, index in whole]
    assert sorted(every) == list(range(24))
    whole.start = 8
    assert [index for _, index in whole] == every[8:] and len(whole) == 16
    whole.start, whole.epoch = 0, 1
    assert [index for _, index in whole] != every
    shares = [training_loader(images, chosen, rank, 2, CPU.device)[1] for rank in (0, 1)]
    assert sorted(index for share in shares for _, index in share) == list(range(24))


def test_every_epoch_has_an_order_and_augmentation_of_its_own(shapes, tmp_path, monkeypatch):
    seen, read = [], Seeded.__getitem__

    def note(dataset, key):
        if len(dataset.images) == 24:
            seen.append(key)
        return read(dataset, key)

    monkeypatch.setattr(Seeded, "__getitem__", note)
    train(options(shapes, tmp_path / "run", epochs=3))
    assert [epoch for epoch, _ in seen] == [0] * 24 + [1] * 24 + [2] * 24
    orders = [[index for _, index in seen[start : start + 24]] for start in (0, 24, 48)]
    assert [sorted(order) for order in orders] == [list(range(24))] * 3
    assert orders[0] != orders[1] != orders[2] != orders[0]


# The update


def fixed_batches(count, size=4):
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(count, size, 3, 32, 32, generator=draw)
    return [(x, torch.arange(size) % 3) for x in images]


def gradients(trainer, batches, norms_in_eval=True, step=0, epoch=0):
    trainer.model.train()
    if norms_in_eval:
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
    trainer.optimizer.zero_grad()
    trainer.gradients(batches, len(batches), epoch, step)
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters()}


def assert_close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name, **tolerance)


PLAIN = {"drop": 0.0, "drop_path": 0.0, "mixup": 0.0, "cutmix": 0.0}


def test_accumulated_gradients_are_those_of_the_whole_batch(shapes):
    trainer = trainer_of(options(shapes, **PLAIN))
    parts = fixed_batches(2)
    whole = [tuple(torch.cat(x) for x in zip(*parts, strict=True))]
    found, expected = gradients(trainer, parts), gradients(trainer, whole)
    # float32 sums of other order
    assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "random", ({"mixup": 0.2, "cutmix": 0.5}, {"drop": 0.3}), ids=lambda r: "-".join(r)
)
def test_mixing_and_dropping_are_functions_of_the_position(shapes, random):
    """Of seed, epoch, step, and of nothing that happened before."""
    trainer = trainer_of(options(shapes, **{**PLAIN, **random}))

    def of(step, epoch=2, seed=7):
        trainer.options = replace(trainer.options, seed=seed)
        # timm mixes in place
        batch = [(x.clone(), t) for x, t in fixed_batches(1)]
        return gradients(trainer, batch, step=step, epoch=epoch)

    first = of(3)
    torch.rand(5)
    np.random.rand(5)
    assert_close(of(3), first, rtol=0, atol=0)
    for other in (of(4), of(3, epoch=3), of(3, seed=8)):
        assert any(not torch.equal(g, first[n]) for n, g in other.items())


@pytest.mark.parametrize(
    "setting",
    ({"amp": True}, {"channels_last": True}, {"grad_checkpointing": True}, {"clip_grad": 1e-9},
     {"opt": "lamb"}, {"grad_accum_steps": 4}, {"amp": True, "amp_dtype": "float16"}),
    ids=lambda s: "-".join(s),
)  # fmt: skip
def test_settings_train(shapes, tmp_path, setting):
    """Each runs; what shall not matter does not, and clipping to nothing leaves the weights."""
    plain = {**PLAIN, "epochs": 1, "weight_decay": 0.0, "opt": "sgd", "lr": 0.01}
    weights = {}
    for name, more in (("with", setting), ("without", {})):
        train(options(shapes, tmp_path / name, **{**plain, **more}))
        content = torch.load(tmp_path / name / "last.pt", weights_only=True)
        weights[name] = {k: x for k, x in content["state_dict"].items() if "running" not in k}
    assert all(x.isfinite().all() for x in weights["with"].values())
    if setting.keys() & {"channels_last", "grad_checkpointing"}:
        assert_close(weights["with"], weights["without"], rtol=1e-3, atol=1e-4)
    if "clip_grad" in setting:
        start = trainer_of(options(shapes, **plain)).model.state_dict()
        start = {k: x for k, x in start.items() if k in weights["with"] and "num_b" not in k}
        found = {k: weights["with"][k] for k in start}
        assert_close(found, start, rtol=0, atol=1e-8)


def test_checkpointing_reaches_the_model(shapes):
    for on in (False, True):
        levels = trainer_of(options(shapes, grad_checkpointing=on)).model.levels
        assert [stage.grad_checkpointing for stage in levels] == [on] * 4


@pytest.mark.slow
def test_compiled_trains(shapes, tmp_path, monkeypatch):
    """Traced and differentiated as ever, without the minute that generating code takes."""
    aot_eager, graphs = torch._dynamo.lookup_backend("aot_eager"), []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))

    def loss(on):
        chosen = options(shapes, tmp_path / str(on), torchcompile=on, **PLAIN, epochs=1, lr=0.01,
                         opt="sgd")  # fmt: skip
        return train(chosen).history[0]["val_loss"]

    expected = loss(False)
    assert not graphs
    assert loss(True) == pytest.approx(expected, rel=1e-3) and graphs


# The run folder


@pytest.fixture(scope="module")
def finished(shapes, tmp_path_factory):
    """A run of two epochs that nothing disturbed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "whole"
    result = train(options(shapes, folder, recovery_interval=2), command="a test")
    torch.set_num_threads(threads)
    return result


def test_run_folder(shapes, finished):
    folder = finished.folder
    names = {"args.yaml", "best.pt", "curves.png", "last.pt", "model.safetensors", "results.csv"}
    assert set(os.listdir(folder)) == names
    assert resolve({}, folder / "args.yaml") == options(shapes, folder, recovery_interval=2)
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(0 <= float(row["val_top1"]) <= float(row["val_top5"]) <= 1 for row in rows)
    assert Image.open(folder / "curves.png").size[0] > 500
    best = torch.load(folder / "best.pt", weights_only=True)
    for name in ("best.pt", "model.safetensors"):
        config = read_config(folder / name)
        assert config["labels"] == list(CLASSES) and config["input_size"] == 32
        assert config["dim"] == SIZES["dim"]
        model = MambaVision(**SIZES, num_classes=3)
        load_checkpoint(model, folder / name)
        assert_close(model.state_dict(), best["state_dict_ema"], rtol=0, atol=0)


def test_exported_weights_have_the_accuracy_of_the_results(shapes, finished):
    trainer = trainer_of(options(shapes))
    load_checkpoint(trainer.ema.module, finished.folder / "model.safetensors")
    from mambavision.training.data import evaluation_loader

    batches = evaluation_loader(open_data(options(shapes)).val, options(shapes), 0, 1, CPU.device)
    assert trainer.evaluate(batches)[1] == finished.best_top1


def test_it_learns(tmp_path):
    """Plain shapes: far better than the third that guessing gets."""
    data = make_folder(tmp_path / "data", train_images=16, val_images=8)
    plain = {**PLAIN, "aa": "", "reprob": 0.0, "scale": (0.8, 1.0), "color_jitter": 0.0}
    chosen = options(data, tmp_path / "run", **plain, epochs=8, lr=3e-3, model_ema=False)
    assert train(chosen).best_top1 > 0.6


def test_folder_of_another_run_is_left_alone(shapes, finished):
    before = (finished.folder / "last.pt").read_bytes()
    with pytest.raises(CommandError, match="holds a run: continue it with --resume"):
        train(options(shapes, finished.folder))
    assert (finished.folder / "last.pt").read_bytes() == before


# Kills


def _silent():
    torch.set_num_threads(1)
    # A loader's workers shall be forked, as they are where nobody asks for a server.
    multiprocessing.set_start_method("fork", force=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)


def _train_and_die(chosen, resume, kill_at):
    """Trains, and dies before step `kill_at` on the files of the run folder."""
    _silent()
    seen = 0

    def count(event, arguments):
        nonlocal seen
        if event in ("open", "os.rename", "os.link", "os.remove"):
            if any(chosen.output in str(a) for a in arguments if isinstance(a, (str, Path))):
                seen += 1
                if seen == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    train(chosen, resume=resume)


@pytest.fixture(scope="module")
def processes():
    """Where children come from: a server that has loaded torch and timm, and forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["timm.data", "timm.optim", "timm.scheduler", "timm.utils", "matplotlib.figure", "pytest",
         "safetensors.torch", "torch.distributed.tensor", "tqdm", "yaml"]
    )  # fmt: skip
    return context


def launch(processes, chosen, kill_at=0):
    resume = chosen.output if Path(chosen.output, "args.yaml").exists() else None
    process = processes.Process(target=_train_and_die, args=(chosen, resume, kill_at))
    process.start()
    return process


def assert_whole(folder):
    """Every file of a run is there whole, or not there."""
    for name in ("last.pt", "best.pt"):
        if (folder / name).exists():
            torch.load(folder / name, weights_only=True)
    if (folder / "model.safetensors").exists():
        load_checkpoint(MambaVision(**SIZES, num_classes=3), folder / "model.safetensors")
    if (folder / "curves.png").exists():
        Image.open(folder / "curves.png").load()
    if (folder / "args.yaml").exists():
        read_yaml(folder / "args.yaml")


def assert_same(found, expected, name):
    """Equal bit by bit, except for what says where and how fast it ran."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), name
        for key in expected.keys() - {"args", "images_per_second"}:
            assert_same(found[key], expected[key], f"{name} {key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), name
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{name} {index}")
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=name)
    else:
        assert found == expected, name


def assert_same_run(found, expected):
    assert set(os.listdir(found)) == set(os.listdir(expected))
    for name in ("last.pt", "best.pt"):
        states = [torch.load(folder / name, weights_only=True) for folder in (found, expected)]
        assert_same(*states, name)
    assert_same(*(load_file(folder / "model.safetensors") for folder in (found, expected)), "model")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_file_and_resumed(shapes, finished, processes, tmp_path, seed):
    """Killed again and again before an opening, renaming, linking: the end is the same."""
    rng = np.random.default_rng(seed)
    chosen = options(shapes, tmp_path / "run", recovery_interval=2)
    kills = 0
    while True:
        process = launch(processes, chosen, kill_at=int(rng.integers(1, 30)))
        process.join()
        assert_whole(Path(chosen.output))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills >= 2
    assert_same_run(Path(chosen.output), finished.folder)


@pytest.mark.slow
def test_killed_at_any_time_and_resumed(shapes, finished, processes, tmp_path):
    rng = np.random.default_rng(0)
    chosen = options(shapes, tmp_path / "run", recovery_interval=2)
    kills = 0
    while True:
        process = launch(processes, chosen)
        process.join(rng.uniform(0.05, 0.35) + 0.15 * kills)
        if process.is_alive():
            kills += 1
            process.kill()
        process.join()
        assert_whole(Path(chosen.output))
        if process.exitcode == 0:
            break
    assert kills >= 1
    assert_same_run(Path(chosen.output), finished.folder)


@pytest.mark.slow
def test_resumed_with_workers(shapes, finished, processes, tmp_path):
    """Stopped in the middle of the first epoch and continued by two workers."""
    chosen = options(shapes, tmp_path / "run", recovery_interval=2)
    process = launch(processes, chosen)
    while not (tmp_path / "run" / "last.pt").exists():
        assert process.is_alive()
        time.sleep(0.005)
    process.kill()
    process.join()
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"] == 0
    process = launch(processes, replace(chosen, workers=2))
    process.join()
    assert_same_run(tmp_path / "run", finished.folder)


@pytest.mark.slow
def test_resumed_in_float16(shapes, processes, tmp_path):
    """The scaler's state, rates of layers and an update of several steps go on as well."""
    chosen = options(
        shapes, tmp_path / "run", amp=True, amp_dtype="float16", opt="lamb", layer_decay=0.8,
        grad_accum_steps=2, recovery_interval=1,
    )  # fmt: skip
    undisturbed = train(replace(chosen, output=str(tmp_path / "whole")))
    scaler = torch.load(undisturbed.folder / "last.pt", weights_only=True)["scaler"]
    assert scaler["_growth_tracker"] > 1
    process = launch(processes, chosen)
    while not (tmp_path / "run" / "last.pt").exists():
        assert process.is_alive()
        time.sleep(0.005)
    process.kill()
    process.join()
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"] == 0
    process = launch(processes, chosen)
    process.join()
    assert_same_run(tmp_path / "run", undisturbed.folder)


# Two processes


def free_ports(count):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _as_rank(rank, port, work, arguments):
    _silent()
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank))
    work(rank, *arguments)


def in_two(processes, work, *arguments):
    (port,) = free_ports(1)
    pair = [processes.Process(target=_as_rank, args=(r, port, work, arguments)) for r in (0, 1)]
    for process in pair:
        process.start()
    try:
        for process in pair:
            process.join(300)
        assert [process.exitcode for process in pair] == [0, 0]
    finally:
        # One that waits for the other would keep the tests from ending.
        for process in pair:
            process.kill()


def statistics(trainer):
    """Batch norm's, as a checkpoint keeps them."""
    state = trainer.state_dict()["state_dict"]
    return {name: x.clone() for name, x in state.items() if "running" in name}


def averaged(first, second):
    return {name: (x + second[name]) / 2 for name, x in first.items()}


def _gradients_of_shard(rank, chosen, shards, norms_in_eval, folder):
    trainer = Trainer(chosen, 3, 6, parallel.start("cpu", fsdp=False))
    found = gradients(trainer, shards[rank], norms_in_eval)
    torch.save([found, statistics(trainer)], folder / f"{rank}.pt")
    parallel.stop()


@pytest.mark.parametrize("norms_in_eval", (False, True), ids=("norms-train", "norms-eval"))
def test_gradients_of_two_processes(shapes, processes, tmp_path, norms_in_eval):
    """Those of the shards, averaged; and of the whole batch where norms do not look at it."""
    chosen = options(shapes, **PLAIN)
    first, second, third, fourth = fixed_batches(4)
    shards = [[first, second], [third, fourth]]
    in_two(processes, _gradients_of_shard, chosen, shards, norms_in_eval, tmp_path)
    (found, kept), (other, other_kept) = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    assert_close(found, other, rtol=0, atol=0)
    assert_close(kept, other_kept, rtol=0, atol=0)

    trainers = [trainer_of(chosen), trainer_of(chosen)]
    alone = [gradients(t, s, norms_in_eval) for t, s in zip(trainers, shards, strict=True)]
    assert_close(found, averaged(*alone), rtol=1e-4, atol=1e-6)
    assert_close(kept, averaged(*map(statistics, trainers)), rtol=1e-5, atol=1e-7)
    whole = [tuple(torch.cat(x) for x in zip(first, second, third, fourth, strict=True))]
    of_whole = gradients(trainer_of(chosen), whole, norms_in_eval)
    if norms_in_eval:
        assert_close(found, of_whole, rtol=1e-4, atol=1e-6)
    else:
        assert any(not torch.allclose(g, of_whole[n], atol=1e-4) for n, g in found.items())


def _start_and_stop(rank, ports):
    torch.set_num_threads(1)
    for port in ports:
        os.environ["MASTER_PORT"] = str(port)
        wrapped = Wrapped(torch.nn.Linear(50, 50), parallel.start("cpu", fsdp=False), fsdp=False)
        wrapped.run(torch.ones(2, 50)).sum().backward()
        parallel.stop()
        del wrapped


def test_leaving_does_not_wait_for_itself(processes):
    """A process that leaves right after a backward pass ends; one in 30 did not."""
    in_two(processes, _start_and_stop, free_ports(60))


def _train_in_two(rank, chosen, resume):
    train(chosen, resume=resume)


@pytest.mark.slow
def test_sharded_weights_train_as_copied_ones(shapes, processes, tmp_path):
    """FSDP and DDP: the same run but for the order of sums; a sharded one resumes, too."""

    def run(name, resume=None, **more):
        chosen = options(
            shapes, tmp_path / name, batch_size=2, lr=0.01, opt="sgd", sched="constant",
            layer_decay=0.9, **more,
        )  # fmt: skip
        in_two(processes, _train_in_two, chosen, resume)
        return torch.load(tmp_path / name / "last.pt", weights_only=True)

    copied, sharded = run("copied"), run("sharded", fsdp=True)
    run("resumed", fsdp=True, epochs=1)
    resumed = run("resumed", str(tmp_path / "resumed"), fsdp=True)
    for part in ("state_dict", "state_dict_ema"):
        assert_close(sharded[part], copied[part], rtol=1e-3, atol=1e-5)
        assert_close(resumed[part], sharded[part], rtol=1e-5, atol=1e-7)
    losses = [state["history"][-1]["val_loss"] for state in (sharded, copied)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# What stops a run


def copied(shapes, tmp_path):
    return Path(shutil.copytree(shapes, tmp_path / "data"))


def stopped(chosen, resume=None):
    """The one line that a run ends with."""
    with pytest.raises(CommandError) as error:
        train(chosen, resume=resume)
    assert "\n" not in str(error.value)
    return str(error.value)


def remove_class(data):
    shutil.rmtree(data / "train" / "cross")


def empty_class(data):
    for image in (data / "train" / "cross").iterdir():
        image.unlink()


@pytest.mark.parametrize(
    "change, more, message",
    (
        (empty_class, {}, "no image in the class folder cross"),
        (remove_class, {}, "3 classes, .*train has 2; only the former has cross"),
        (lambda data: shutil.rmtree(data / "val"), {}, "expected a folder with train/CLASS"),
        (lambda data: None, {"num_classes": 4}, "--num-classes 4: .*data has 3 classes"),
        (lambda data: None, {"batch_size": 26}, "24 training images are fewer than a step"),
        (lambda data: None, {"batch_size": 3}, "need an even --batch-size"),
        (lambda data: None, {"warmup_epochs": 2}, "--warmup-epochs 2 must be below --epochs 2"),
        (lambda data: None, {"opt": "adamx"}, "--opt adamx"),
        (lambda data: None, {"model": "mamba_vision_X"}, "did you mean"),
        (lambda data: None, {"model_kwargs": {"dims": 8}}, "unknown keyword 'dims'"),
        (lambda data: None, {"fsdp": True}, "start it with torchrun"),
        (lambda data: None, {"log_wandb": True}, "--log-wandb needs the package wandb"),
    ),
)
def test_refused_before_anything_is_written(shapes, tmp_path, monkeypatch, change, more, message):
    monkeypatch.setitem(sys.modules, "wandb", None)
    data = copied(shapes, tmp_path)
    change(data)
    assert re.search(message, stopped(options(data, tmp_path / "run", **more)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", (0, 2))
def test_unreadable_image_is_named(shapes, tmp_path, workers):
    data = copied(shapes, tmp_path)
    victim = data / "train" / "cross" / "3.png"
    victim.write_bytes(victim.read_bytes()[:200])
    chosen = options(data, tmp_path / "run", workers=workers, recovery_interval=1)
    assert str(victim) in stopped(chosen)
    assert_whole(tmp_path / "run")


@pytest.mark.parametrize(
    "more", ({"lr": 1e30}, {"lr": 3e38, "weight_decay": 1e6}), ids=("loss", "weights")
)
def test_loss_that_is_no_number(shapes, tmp_path, more):
    """Or weights, which an update can spoil after the last loss that was one."""
    chosen = options(
        shapes, tmp_path / "run", opt="sgd", clip_grad=None, sched="constant", recovery_interval=1,
        epochs=4, warmup_epochs=2, warmup_lr=1e-9, **more,
    )  # fmt: skip
    message = stopped(chosen)
    assert "the last good checkpoint is" in message and "--lr" in message
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert all(x.isfinite().all() for x in state["state_dict"].values())


def test_loss_beyond_float16(shapes, tmp_path):
    """The scaler skips such updates and keeps the weights finite: the loss has to tell."""
    model = MambaVision(**SIZES, num_classes=3)
    with torch.no_grad():
        model.head.weight.fill_(3e4)
        model.head.bias.copy_(torch.tensor([6e4, -6e4, 0]))
    save_checkpoint(model, tmp_path / "model.safetensors")
    chosen = options(
        shapes, tmp_path / "run", amp=True, amp_dtype="float16", model_ema=False,
        initial_checkpoint=str(tmp_path / "model.safetensors"),
    )  # fmt: skip
    assert re.match("the loss is (inf|nan) in epoch 1, before update", stopped(chosen))
    assert not (tmp_path / "run" / "last.pt").exists()


def test_full_disk_leaves_the_last_checkpoint(shapes, tmp_path, capsys):
    """A limit on the size of files stands for the disk: writing stops in the middle of one."""
    resource = pytest.importorskip("resource")
    chosen = options(shapes, tmp_path / "run", epochs=1)
    train(chosen)
    last = tmp_path / "run" / "last.pt"
    before = last.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (len(before) - 5000, 20_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            code = main(["train", "--resume", str(tmp_path / "run"), "--epochs", "2"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        lines = capsys.readouterr().err.strip().splitlines()
        assert code == 1 and "cannot write" in lines[-1] and "File too large;" in lines[-1]
        assert last.read_bytes() == before
        assert not list((tmp_path / "run").glob(".*"))
    assert main(["train", "--resume", str(tmp_path / "run"), "--epochs", "2"]) == 0
    assert torch.load(last, weights_only=True)["epoch"] == 2


def test_resuming_what_does_not_fit(shapes, finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    before = (run / "last.pt").read_bytes()
    two = copied(shapes, tmp_path)
    for part in ("train", "val"):
        shutil.rmtree(two / part / "cross")
    assert "3 classes (circle, cross, square)" in stopped(options(two, run), str(run))
    other = options(shapes, run, model_kwargs={**SIZES, "dim": 16})
    assert "does not fit these options" in stopped(other, str(run))
    middle = torch.load(run / "last.pt", weights_only=True)
    torch.save({**middle, "epoch": 1, "epoch_updates": 2}, tmp_path / "middle.pt")
    assert "images per update" in stopped(options(shapes, run, batch_size=8),
                                          str(tmp_path / "middle.pt"))  # fmt: skip
    (tmp_path / "cut.pt").write_bytes(before[:1000])
    assert "damaged" in stopped(options(shapes, run), str(tmp_path / "cut.pt"))
    assert main(["train", "--resume", str(tmp_path / "nowhere")]) == 2
    assert main(["train", "--resume", str(run), "--preset", "paper"]) == 2
    assert "settings from the run" in capsys.readouterr().err
    assert (run / "last.pt").read_bytes() == before
    assert main(["train", "--resume", str(run)]) == 0


def test_command_line_errors(tmp_path, capsys):
    for command, message in (
        (["train", "digits", "--epochs", "0"], "--epochs: must be an integer >= 1, got '0'"),
        (["train", "digits", "--epoch", "3", "--bogus"], "--bogus"),
        (["train", "digits", "--model-kwargs", "dim"], "must be NAME=VALUE"),
    ):
        with pytest.raises(SystemExit) as error:
            main(command)
        assert error.value.code == 2 and message in capsys.readouterr().err
    assert main(["train", "--output", str(tmp_path / "run")]) == 2
    assert "name a folder with train/ and val/, or digits" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        main(["train", "--help"])
    assert error.value.code == 0 and "--recovery-interval" in capsys.readouterr().out

"""Whole-model benchmarks: the table of models, the gate, rows, pictures, commands."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_backbone  # noqa: E402
import bench_train_step  # noqa: E402
import models as benchmark_models  # noqa: E402
import plot  # noqa: E402
import rows as row_tools  # noqa: E402
import tables  # noqa: E402
import ways  # noqa: E402
import zoo  # noqa: E402

from mambavision import MambaVision, MambaVisionMixer, create_model  # noqa: E402

SMALL = {
    "dim": 16, "in_dim": 8, "depths": (1, 1, 2, 2), "window_size": (8, 8, 4, 2), "mlp_ratio": 1,
    "num_heads": (1, 1, 2, 4), "num_classes": 10, "layer_scale": 1e-5, "drop_path_rate": 0.0,
}  # fmt: skip


def millions(model):
    return sum(p.numel() for p in model.parameters()) / 1e6


# The table of models


@pytest.mark.parametrize("name", [n for n, m in zoo.MODELS.items() if m.library == "mambavision"])
def test_our_models_have_their_sizes(name):
    with torch.device("meta"):
        assert millions(create_model(name)) == pytest.approx(zoo.MODELS[name].params, abs=0.06)


def test_peers_exist_and_have_their_sizes():
    timm = pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)
    peers = [m for m in zoo.MODELS.values() if m.library == "timm"]
    assert {m.name for m in peers} <= set(timm.list_models())
    for model in peers:
        # Some of them compute with numbers while they are made.
        if model.family in ("Swin", "ConvNeXt", "XCiT", "LeViT", "MambaOut"):
            with torch.device("meta"):
                made = timm.create_model(model.name)
            assert millions(made) == pytest.approx(model.params, abs=0.06), model.name


def test_accuracies_are_plausible_and_sourced():
    for model in zoo.MODELS.values():
        assert 75 < model.top1 < 90 and model.source.startswith("arXiv "), model
    published = {"T": 82.3, "T2": 82.7, "S": 83.3, "B": 84.2, "L": 85.0, "L2": 85.3}
    ours = [m for m in zoo.MODELS.values() if m.library == "mambavision"]
    assert {m.size: m.top1 for m in ours} == published


def test_default_models_have_peers_of_their_size():
    for name, peers in zoo.SIZES.items():
        size = zoo.MODELS[name].params
        assert all(0.6 * size < zoo.MODELS[peer].params < 1.3 * size for peer in peers), name


def test_models_by_name():
    assert [m.name for m in zoo.pick(["swin_tiny_patch4_window7_224", "mamba_vision_T"])] == [
        "swin_tiny_patch4_window7_224",
        "mamba_vision_T",
    ]
    assert len(zoo.pick(["all"])) == len(zoo.MODELS)
    with pytest.raises(ValueError, match="no model 'swin'; known: default, all, mamba_vision_T"):
        zoo.pick(["swin"])


# The mixer as published, and the gate


@pytest.fixture(scope="module")
def small_models():
    """Benchmarks make a small model, whatever its name, and run on one thread."""

    def make(_, **more):
        return MambaVision(**{**SMALL, **more})

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark_models, "create_model", make)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small(small_models):
    """One of our models, small, with the weights of a benchmark."""
    return benchmark_models.ours("small", "cpu").eval()


@pytest.fixture(scope="module")
def gate(small):
    return ways.Gate(small, torch.randn(2, 3, 64, 64))


def way(provider, setting="nchw"):
    return next(w for w in ways.WAYS if (w.provider, w.setting) == (provider, setting))


def test_eager_model_shares_weights_and_has_no_other_mixer(small):
    eager = benchmark_models.with_mixers(
        small, lambda m: benchmark_models.EagerMixer(m, benchmark_models.loop_scan)
    )
    assert not any(isinstance(m, MambaVisionMixer) for m in eager.modules())
    found, expected = eager.state_dict(), small.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)
    # The other model is untouched.
    assert sum(isinstance(m, MambaVisionMixer) for m in small.modules()) == 2


@pytest.mark.parametrize("setting", ("nchw", "channels_last"))
@pytest.mark.parametrize("provider", ("ours", "eager"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_gate_lets_right_models_pass(small, gate, provider, setting, dtype):
    chosen = way(provider, setting)
    gate.check(chosen.make(small, dtype), chosen, dtype)


def halve_bias(mixer):
    mixer.dt_proj.bias.mul_(0.5)


def shift_decay(mixer):
    mixer.A_log.add_(0.05)


def swap_branches(mixer):
    mixer.conv1d_x.weight, mixer.conv1d_z.weight = mixer.conv1d_z.weight, mixer.conv1d_x.weight


def lose_D(mixer):
    mixer.D.zero_()


@pytest.mark.parametrize("plant", (halve_bias, shift_decay, swap_branches, lose_D))
def test_gate_refuses_a_wrong_mixer(small, gate, plant):
    chosen = way("ours")
    wrong = chosen.make(small, torch.float32)
    with torch.no_grad():
        for module in wrong.modules():
            if isinstance(module, MambaVisionMixer):
                plant(module)
    with pytest.raises(ways.Wrong, match="logits, relative to the largest, off by .* allowed"):
        gate.check(wrong, chosen, torch.float32)


def test_gate_refuses_nan(small, gate):
    chosen = way("ours")
    broken = chosen.make(small, torch.float32)
    with torch.no_grad():
        broken.head.bias.fill_(float("nan"))
    with pytest.raises(ways.Wrong, match="off by nan"):
        gate.check(broken, chosen, torch.float32)


class WrongFor(torch.nn.Module):
    """Right, but for the last image of one batch size. Notes what it is given."""

    def __init__(self, model, batch):
        super().__init__()
        self.model, self.batch, self.seen = model, batch, []

    def forward(self, images):
        self.seen.append(images)
        logits = self.model(images)
        if len(images) == self.batch:
            logits[-1] = 0
        return logits


def test_gate_asks_for_the_batch_that_is_measured(small, gate):
    chosen = way("ours", "channels_last")
    wrong = WrongFor(chosen.make(small, torch.float32), batch=3)
    for batch in (1, 2, 4):
        gate.check(wrong, chosen, torch.float32, batch)
    with pytest.raises(ways.Wrong, match="logits, relative to the largest, off by .* allowed"):
        gate.check(wrong, chosen, torch.float32, 3)
    assert [len(images) for images in wrong.seen] == [1, 2, 4, 3]
    first, second = gate.images
    for images in wrong.seen:
        assert images.stride(1) == 1
        for i, image in enumerate(images):
            assert torch.equal(image, (first, second)[i % 2])


def test_scan_left_out_computes_something_else(small, gate):
    chosen = way("no_scan")
    assert not chosen.gated
    with pytest.raises(ways.Wrong):
        gate.check(chosen.make(small, torch.float32), chosen, torch.float32)


def training(model):
    """The same model as one trains it: every gradient runs through every part."""
    return copy.deepcopy(model).train()


@pytest.fixture(scope="module")
def training_gate(small):
    return ways.TrainingGate(training(small), torch.randn(4, 3, 64, 64))


@pytest.mark.parametrize("setting", ("nchw", "channels_last"))
@pytest.mark.parametrize("provider", ("ours", "eager"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_training_gate_lets_right_models_pass(small, training_gate, provider, setting, dtype):
    chosen = way(provider, setting)
    training_gate.check(chosen.make(training(small), torch.float32), chosen, dtype)


def test_training_gate_refuses_a_gradient_that_is_missing(small, training_gate):
    """The bias enters twice; a backward pass that knows of one of them is off by half."""
    chosen = way("ours")
    wrong = chosen.make(training(small), torch.float32)
    for module in wrong.modules():
        if isinstance(module, MambaVisionMixer):
            module.dt_proj.bias.register_hook(lambda grad: grad / 2)
    with pytest.raises(ways.Wrong, match=r"gradients of levels.#.blocks.#.mixer.dt_proj.bias"):
        training_gate.check(wrong, chosen, torch.float32)


def test_training_gate_leaves_statistics_as_they_were(small, training_gate):
    chosen = way("ours")
    model = chosen.make(training(small), torch.float32)
    before = copy.deepcopy(model.state_dict())
    training_gate.check(model, chosen, torch.float32)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, msg=name)


# Rows and pictures


def row(op="selective_scan", provider="triton", us=10.0, **changes):
    times = [us, 0.9 * us, 1.2 * us]
    made = {
        "op": op, "provider": provider, "label": "T stage 3", "batch": 128, "seqlen": 196,
        "dim": 160, "dstate": 8, "dtype": "float16", "direction": "forward", "kernel_us": times,
        "eager_us": times, "graph_us": None, "peak_bytes": 10**9, "saved_bytes": 10**8,
        "bytes_min": 10**6, "floor_us": 5.0, "share_of_floor": 5.0 / us, "gb_per_s": 100.0,
        "status": "ok", "reason": None, "gpu": "NVIDIA H200", "cpu": "Xeon", "threads": 8,
    }  # fmt: skip
    return made | changes


def model_row(op, provider, label, images, **changes):
    size = {"seqlen": None, "dim": None, "dstate": None, "resolution": 224, "setting": "nchw"}
    speed = {"images_per_s": [images, 0.9 * images, 1.1 * images], "share_of_floor": None}
    return row(op, provider, label=label, **{**size, **speed, **changes})


def every_kind():
    on_cpu = {"gpu": None, "kernel_us": None, "share_of_floor": None, "dtype": "float32"}
    scans = [
        row(provider=provider, us=us * seqlen, seqlen=seqlen, direction=direction)
        for provider, us in (("triton", 1), ("mamba_ssm", 6), ("reference", 40))
        for seqlen in (49, 196, 1024)
        for direction in ("forward", "backward", "both")
    ]
    models = [
        model_row("backbone", provider, name, 3e5 / model.params * (1 + i))
        for name, model in zoo.MODELS.items()
        for i, provider in enumerate(
            ("eager", "triton") if model.library == "mambavision" else ("timm",)
        )
    ]
    steps = [model_row("train_step", p, "mamba_vision_T", 900) for p in ("triton", "eager")]
    cpu = [row(provider=p, us=1000, **on_cpu) for p in ("torch", "reference", "eager")]
    return [*scans, *models, *steps, *cpu]


def test_every_picture_is_drawn(tmp_path):
    written, missing = plot.draw(every_kind(), tmp_path)
    assert missing == []
    kinds = {path.name.split("_")[0] for path in written}
    assert kinds == set(plot.FIGURES)
    assert sorted(tmp_path.iterdir()) == sorted(written)
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000, path


def test_without_rows_nothing_is_drawn_and_it_says_so(tmp_path):
    written, missing = plot.draw([row(status="failed", kernel_us=None, eager_us=None)], tmp_path)
    assert written == [] and list(tmp_path.iterdir()) == []
    assert len(missing) == len(plot.FIGURES)
    assert all("not drawn, there are no rows of" in line for line in missing)


def test_ratio_is_theirs_over_ours():
    (figure,) = plot.length([row(us=10.0), row(provider="mamba_ssm", us=60.0)]).values()
    (axes,) = figure.axes
    heights = [y for line in axes.lines for y in line.get_ydata()]
    assert 6.0 in [round(float(y), 6) for y in heights]
    assert "NVIDIA H200, float16, batch 128" in figure.get_suptitle()


def test_names_in_the_accuracy_picture_cover_nothing():
    (figure,) = plot.accuracy([r for r in every_kind() if r["op"] == "backbone"]).values()
    figure.canvas.draw()
    boxes = [t.get_window_extent() for t in figure.axes[0].texts if t.get_text()]
    assert len(boxes) > 20
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_a_provider_has_one_colour():
    looks = [plot.look(provider)[1:] for provider in plot.PROVIDERS]
    assert len({colour for colour, _ in looks}) == len({mark for _, mark in looks}) == len(looks)


def test_later_rows_replace_earlier_ones_of_the_same_machine():
    old, new, elsewhere = row(us=10.0), row(us=20.0), row(us=30.0, gpu="NVIDIA A100")
    assert row_tools.newest([old, elsewhere, new]) == [elsewhere, new]


def test_reading_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(row()) + "\n" + json.dumps({"other": 1}) + "\n")
    assert row_tools.read([tmp_path]) == [row()]
    (tmp_path / "b.jsonl").write_text('{"op": "sel')
    with pytest.raises(ValueError, match=r"b\.jsonl:1 is no row"):
        row_tools.read([tmp_path])


def command(script, *arguments):
    found = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    return found.returncode, found.stdout, found.stderr


def test_plot_command(tmp_path):
    code, out, err = command("plot.py", tmp_path / "none.jsonl", "--output", tmp_path)
    assert code == 2 and len(err.splitlines()) == 1 and "none.jsonl" in err


@pytest.mark.parametrize(
    "script, arguments, words",
    [
        ("bench_backbone.py", ("--models", "resnet"), "no model 'resnet'; known: default"),
        ("bench_backbone.py", ("--providers", "magic"), "invalid choice: 'magic'"),
        ("bench_backbone.py", ("--device", "tpu"), "invalid choice: 'tpu'"),
        ("bench_backbone.py", ("--dtype", "int8"), "invalid choice: 'int8'"),
        ("bench_backbone.py", ("--batch", "0"), "expected an integer above 0, got '0'"),
        ("bench_backbone.py", ("--budget-ms", "nan"), "expected a number above 0, got 'nan'"),
        ("bench_backbone.py", ("--resolution", "16"), "must be at least 32, got 16"),
        ("bench_train_step.py", ("--models", "convnext_tiny"), "nothing to measure"),
    ],
)
def test_bad_arguments_are_one_line(script, arguments, words, capsys):
    benchmark = {"bench_backbone.py": bench_backbone, "bench_train_step.py": bench_train_step}
    with pytest.raises(SystemExit) as stop:
        benchmark[script].BENCHMARK.main([*arguments, "--list"])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert len(err.splitlines()) == 1 and words in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as stop:
        bench_backbone.BENCHMARK.main(["--device", "cuda"])
    assert stop.value.code == 2
    assert "--device cuda: PyTorch finds no GPU here" in capsys.readouterr().err


def test_rows_of_a_whole_model(small_models, tmp_path, capsys):
    """From the command to the pictures, at the smallest size."""
    rows_file = tmp_path / "rows.jsonl"
    arguments = ["--device", "cpu", "--resolution", "64", "--budget-ms", "1"]
    arguments += ["--output", str(rows_file), "--batch", "1", "--models", "mamba_vision_T"]
    chosen = ["--providers", "ours", "eager", "compiled", "no_scan"]
    assert bench_backbone.BENCHMARK.main([*arguments, *chosen, "--list"]) == 0
    planned = capsys.readouterr().out.splitlines()
    assert not rows_file.exists()
    assert bench_backbone.BENCHMARK.main([*arguments, *chosen]) == 0
    assert bench_train_step.BENCHMARK.main([*arguments, "--batch", "2"]) == 0
    found = row_tools.read([rows_file])
    assert len(found) == len(planned) + 4
    ours = {r["setting"]: r for r in found if r["provider"] == "torch"}
    for how in ("", "compiled, ", "autotuned, "):
        setting = f"optimized, {how}CUDA graph"
        assert ours.pop(setting)["reason"] == "CUDA graphs need a GPU"
    assert {"nchw", "channels_last", "optimized"} <= ours.keys()
    assert all(r["status"] == "ok" and r["images_per_s"][0] > 0 for r in ours.values())
    compiled = [r for r in found if r["provider"] == "compiled"]
    assert [r["status"] for r in compiled] == ["unavailable"] and "loop" in compiled[0]["reason"]
    kept = {(r["provider"], r["setting"]): r["saved_bytes"] for r in found if r["op"] != "backbone"}
    assert 0 < kept["torch", "nchw"] < kept["eager", "nchw"]
    written, _ = plot.draw(found, tmp_path / "pictures")
    assert {path.name.split("_")[0] for path in written} == {"accuracy", "training", "cpu"}
    text = tables.tables(found)
    assert "| mamba_vision_T | 64 |" in text and "needs a GPU" in text
    # What was not to be had is named once, below its table.
    assert text.count("- compiled eager channels_last: needs mamba-ssm's scan") == 1


def test_a_wrong_model_gets_no_time(small_models, tmp_path, monkeypatch):
    def broken(model, dtype):
        model = copy.deepcopy(model)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, MambaVisionMixer):
                    module.D.neg_()
        return model

    def failing(model, dtype):
        raise ValueError("no such luck\nand a second line")

    class Falling(torch.nn.Module):
        """Right for the two images of the gate, and then no more."""

        def __init__(self, model, dtype):
            super().__init__()
            self.model = model

        def forward(self, images):
            if len(images) == 1:
                raise MemoryError("too many")
            return self.model(images)

    faults = {"broken": broken, "failing": failing, "falling": Falling}
    chosen = [*(ways.Way("ours", name, make) for name, make in faults.items()), way("ours")]
    monkeypatch.setattr(bench_backbone, "WAYS", chosen)
    rows_file = tmp_path / "rows.jsonl"
    bench_backbone.BENCHMARK.main(
        ["--device", "cpu", "--resolution", "64", "--budget-ms", "1", "--batch", "1", "--models",
         "mamba_vision_T", "--output", str(rows_file)]
    )  # fmt: skip
    wrong, failed, fell, right = row_tools.read([rows_file])
    assert [r["setting"] for r in (wrong, failed, fell, right)] == [*faults, "nchw"]
    assert fell["status"] == "failed" and fell["reason"] == "MemoryError: too many"
    assert wrong["status"] == "wrong" and "off by" in wrong["reason"]
    assert failed["status"] == "failed" and failed["reason"] == "ValueError: no such luck"
    assert all(r["eager_us"] is r["images_per_s"] is None for r in (wrong, failed))
    assert right["status"] == "ok"

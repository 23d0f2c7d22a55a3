"""Checkpoints: every layout in, one clear error for what is no checkpoint, nothing half-written."""

import argparse
import os
import pickle
import subprocess
import sys
import threading
import types
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mambavision import MambaVision, create_model, load_checkpoint, load_model, save_checkpoint
from mambavision.published import variants_of
from mambavision.variants import VARIANTS
from mambavision.weights import read_config

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "dim": 8, "in_dim": 4, "depths": (1, 1, 1, 1), "window_size": (8, 8, 4, 2), "mlp_ratio": 1,
    "num_heads": (1, 1, 1, 1),
}  # fmt: skip


def model(num_classes=5, seed=0):
    torch.manual_seed(seed)
    return MambaVision(**CONFIG, num_classes=num_classes)


def assert_same(found, expected):
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("ending", (".safetensors", ".pth", ".pt", ".pth.tar"))
def test_saved_and_loaded(tmp_path, ending):
    source, target = model(), model(seed=1)
    save_checkpoint(source, tmp_path / f"m{ending}")
    assert not any(load_checkpoint(target, tmp_path / f"m{ending}"))
    assert_same(target, source)
    assert os.listdir(tmp_path) == [f"m{ending}"]
    (tmp_path / "other").touch()
    assert (tmp_path / f"m{ending}").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("prefix", ("", "module.", "encoder.", "module.model.", "timm_model."))
@pytest.mark.parametrize("home", (None, "state_dict", "model", "state_dict_ema"))
def test_published_layouts(tmp_path, prefix, home):
    source, target = model(), model(seed=1)
    state = {prefix + name: value for name, value in source.state_dict().items()}
    content = state if home is None else {home: state, "epoch": 3, "args": argparse.Namespace(lr=1)}
    torch.save(content, tmp_path / "m.pth.tar")
    load_checkpoint(target, tmp_path / "m.pth.tar")
    assert_same(target, source)


def test_moving_average_is_preferred(tmp_path):
    plain, average = model(seed=1), model(seed=2)
    states = {"state_dict": plain.state_dict(), "state_dict_ema": average.state_dict()}
    torch.save(states, tmp_path / "m.pth")
    target = model()
    load_checkpoint(target, tmp_path / "m.pth")
    assert_same(target, average)


def test_differences_are_listed_and_nothing_is_loaded(tmp_path):
    source, target = model(seed=1), model()
    state = source.state_dict()
    state["extra.weight"] = state.pop("norm.weight")
    state["norm.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(ValueError) as error:
        load_checkpoint(target, tmp_path / "m.pth")
    assert "1 missing: norm.weight" in str(error.value)
    assert "1 unexpected: extra.weight" in str(error.value)
    assert "1 misshapen: norm.bias (3,), expected (64,)" in str(error.value)
    assert_same(target, model())
    report = load_checkpoint(target, tmp_path / "m.pth", strict=False)
    assert report.missing == ["norm.weight"]
    torch.testing.assert_close(target.head.weight, source.head.weight)


def test_head_is_left_out_only_when_asked(tmp_path):
    source, target = model(num_classes=5, seed=1), model(num_classes=3)
    save_checkpoint(source, tmp_path / "m.pth")
    with pytest.raises(ValueError, match="misshapen: head.weight"):
        load_checkpoint(target, tmp_path / "m.pth")
    head = target.head.weight.clone()
    load_checkpoint(target, tmp_path / "m.pth", num_classes=3)
    torch.testing.assert_close(target.head.weight, head)
    torch.testing.assert_close(target.norm.weight, source.norm.weight)
    fits = model(num_classes=5)
    load_checkpoint(fits, tmp_path / "m.pth", num_classes=5)
    assert_same(fits, source)
    with pytest.raises(ValueError, match="must be that of the model, 3, got 4"):
        load_checkpoint(target, tmp_path / "m.pth", num_classes=4)


def test_windows_of_another_size_fit(tmp_path):
    save_checkpoint(model(), tmp_path / "m.pth")
    other = MambaVision(**{**CONFIG, "window_size": (8, 8, 7, 3)}, num_classes=5)
    load_checkpoint(other, tmp_path / "m.pth")


def test_pickled_code_is_refused(tmp_path):
    flag = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(flag),))

    for protocol in (2, 4):
        path = tmp_path / "bomb.pth"
        torch.save({"state_dict": Bomb()}, path, pickle_protocol=protocol)
        reason = r"it holds a pickled \w+.mkdir, " if protocol == 2 else "a safe load reads"
        with pytest.raises(ValueError, match=f"is refused: {reason}"):
            load_checkpoint(model(), path)
        path.write_bytes(pickle.dumps(Bomb(), protocol))
        with pytest.raises(ValueError, match="bomb.pth is (refused|damaged)"):
            load_checkpoint(model(), path)
    assert not flag.exists()


def test_no_class_but_namespace_is_let_through(tmp_path):
    path = tmp_path / "m.pth"
    for args in (types.SimpleNamespace(lr=1), Path("x"), argparse.ArgumentParser):
        torch.save({"state_dict": model().state_dict(), "args": args}, path)
        with pytest.raises(ValueError, match="m.pth is refused: it holds a pickled "):
            load_checkpoint(model(), path)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("ending", (".safetensors", ".pth"))
@pytest.mark.parametrize("kept", (0, 100, 5000))
def test_truncated_file_is_named(tmp_path, ending, kept):
    path = tmp_path / f"m{ending}"
    save_checkpoint(model(), path)
    path.write_bytes(path.read_bytes()[:kept])
    target = model()
    with pytest.raises(ValueError, match=f"m{ending} is damaged or truncated"):
        load_checkpoint(target, path)
    assert_same(target, model())


@pytest.mark.parametrize("content", ({}, {"state_dict": {}}, [1, 2], {"a": 1}))
def test_file_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(ValueError, match="m.pth holds no"):
        load_checkpoint(model(), tmp_path / "m.pth")


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        load_checkpoint(model(), tmp_path / "none.pth")
    with pytest.raises(ValueError, match="is a folder without model.safetensors"):
        load_checkpoint(model(), tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        save_checkpoint(model(), tmp_path / "none" / "m.pth")
    with pytest.raises(ValueError, match="must end in"):
        save_checkpoint(model(), tmp_path / "m.txt")


@pytest.mark.parametrize("ending", (".safetensors", ".pth"))
def test_interrupted_save_leaves_the_old_file(tmp_path, ending, monkeypatch):
    path = tmp_path / f"m{ending}"
    save_checkpoint(model(), path)
    before = path.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(model(seed=1), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_create_model_from_a_file(tmp_path):
    torch.manual_seed(0)
    small = {k: v for k, v in CONFIG.items() if k != "num_heads"}
    save_checkpoint(MambaVision(**CONFIG, num_classes=5), tmp_path / "m.pth")
    found = create_model(
        "mamba_vision_T", checkpoint=tmp_path / "m.pth", num_heads=(1, 1, 1, 1), num_classes=3,
        **small,
    )  # fmt: skip
    assert found.head.out_features == 3
    with pytest.raises(ValueError, match="not both"):
        create_model("mamba_vision_T", pretrained=True, checkpoint=tmp_path / "m.pth", **small)


def test_load_model_makes_the_model_of_a_file(tmp_path):
    source = model(num_classes=3)
    for place in ("model.safetensors", "m.pth"):
        save_checkpoint(source, tmp_path / place, config={"labels": ["a", "b", "c"], "model": "x"})
    for place in (tmp_path, tmp_path / "m.pth"):
        found = load_model(place)
        assert found.arguments == source.arguments
        assert_same(found, source)
    torch.save(source.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(ValueError, match=r"bare.pth does not say .* create_model\(NAME"):
        load_model(tmp_path / "bare.pth")


def test_config_is_kept_with_the_weights(tmp_path):
    source = model()
    source.reset_classifier(3)
    for ending in (".safetensors", ".pth"):
        path = tmp_path / f"m{ending}"
        save_checkpoint(source, path, config={"labels": ["a", "b", "c"]})
        config = read_config(path)
        assert config.pop("labels") == ["a", "b", "c"]
        again = MambaVision(**config)
        assert again.arguments == source.arguments
        load_checkpoint(again, path)
        assert_same(again, source)
    with pytest.raises(ValueError, match="plain values"):
        save_checkpoint(source, path, config={"labels": {1, 2}})
    torch.save(source.state_dict(), path)
    assert read_config(path) == {}


def test_nearest_variant_is_named(tmp_path):
    with torch.device("meta"):
        small = create_model("mamba_vision_S").state_dict()
    torch.save({k: torch.zeros(()).expand(x.shape) for k, x in small.items()}, tmp_path / "s.pth")
    with pytest.raises(ValueError, match="the weights have the sizes of mamba_vision_S; "):
        load_checkpoint(model(), tmp_path / "s.pth")
    with torch.device("meta"):
        scaled = create_model("mamba_vision_T", layer_scale=1e-5).state_dict()
    assert variants_of(scaled) == variants_of({}) == []
    save_checkpoint(model(), tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"dim=8, in_dim=4, depths=\(1, 1, 1, 1\)"):
        load_checkpoint(MambaVision(**{**CONFIG, "dim": 16}), tmp_path / "m.pth")
    with pytest.raises(ValueError, match="only the classifier differs: num_classes keeps"):
        load_checkpoint(model(num_classes=3), tmp_path / "m.pth")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_known_by_its_weights(name):
    with torch.device("meta"):
        state = create_model(name, num_classes=0).state_dict()
    assert name in variants_of(state)
    sizes = [VARIANTS[other].arguments for other in variants_of(state)]
    assert all({**s, "window_size": 0} == {**sizes[0], "window_size": 0} for s in sizes)


def test_folder_with_weights(tmp_path):
    save_checkpoint(model(seed=1), tmp_path / "model.safetensors")
    target = model()
    load_checkpoint(target, tmp_path)
    assert_same(target, model(seed=1))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves the folder `site`; what is below cut/ breaks off half-way."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    site = tmp_path / "site"
    (site / "cut").mkdir(parents=True)

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=site)

        def copyfile(self, source, outputfile):
            data = source.read()
            outputfile.write(data[: len(data) // 2] if "/cut/" in self.path else data)

        def log_message(self, *_):
            served.append(self.path)

    served = []
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield site, f"http://127.0.0.1:{http.server_port}", served
    http.shutdown()
    http.server_close()


def test_url_is_fetched_once(server):
    site, address, served = server
    for seed in (1, 2):
        (site / str(seed)).mkdir()
        save_checkpoint(model(seed=seed), site / str(seed) / "model.safetensors")
    for seed in (1, 2, 1, 2):
        target = model()
        load_checkpoint(target, f"{address}/{seed}/model.safetensors")
        assert_same(target, model(seed=seed))
    assert len(served) == 2
    target = model()
    load_checkpoint(target, (site / "1" / "model.safetensors").as_uri())
    assert_same(target, model(seed=1))


def test_url_that_fails_leaves_nothing_behind(server):
    site, address, served = server
    save_checkpoint(model(), site / "cut" / "m.pth")
    for attempt in (1, 2):
        with pytest.raises(ValueError, match="damaged or truncated.*try again"):
            load_checkpoint(model(), f"{address}/cut/m.pth")
        assert len(served) == attempt
    with pytest.raises(RuntimeError, match="404") as error:
        load_checkpoint(model(), f"{address}/none.pth")
    assert "\n" not in str(error.value)
    with pytest.raises(RuntimeError, match="cannot be fetched"):
        load_checkpoint(model(), "http://127.0.0.1:1/m.pth")


def published_cache(folder, repository):
    """As huggingface_hub lays out its cache; returns the folder of the files."""
    home = folder / "hub" / f"models--{repository.replace('/', '--')}"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (home / "snapshots" / revision).mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(revision)
    return home / "snapshots" / revision


def offline(code, home):
    """Runs code in a process without network whose Hugging Face cache is in `home`."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_pretrained_from_the_hub_cache(tmp_path):
    torch.manual_seed(0)
    source = create_model("mamba_vision_T").half()
    state = {f"model.{name}": value for name, value in source.state_dict().items()}
    files = published_cache(tmp_path, "nvidia/MambaVision-T-1K")
    save_file(state, files / "model.safetensors")
    out, err = offline(
        """
import warnings
from mambavision import create_model, load_checkpoint
warnings.simplefilter("always")
model = create_model("mamba_vision_T", pretrained=True)
print(model.head.weight.double().sum().item(), model.levels[2].blocks[0].mixer.D.sum().item())
print(not any(load_checkpoint(model, "nvidia/MambaVision-T-1K")))
print(create_model("mamba_vision_T", pretrained=True, num_classes=3).head.out_features)
""",
        tmp_path,
    )
    head, D = source.head.weight.double().sum().item(), source.levels[2].blocks[0].mixer.D
    assert out.splitlines() == [f"{head} {D.float().sum().item()}", "True", "3"]
    assert err.count("CC-BY-NC-SA") == 1


def test_offline_says_what_to_do(tmp_path):
    out, err = offline(
        """
import sys
from mambavision import create_model, load_checkpoint
for attempt in (
    lambda: create_model("mamba_vision_S", pretrained=True),
    lambda: load_checkpoint(create_model("mamba_vision_T"), "someone/else"),
):
    try:
        attempt()
    except RuntimeError as error:
        print(error)
sys.modules["huggingface_hub"] = None
try:
    create_model("mamba_vision_S", pretrained=True)
except RuntimeError as error:
    print(error)
""",
        tmp_path,
    )
    published, other, missing = out.splitlines()
    assert "nvidia/MambaVision-S-1K" in published and "checkpoint=PATH" in published
    assert "--initial-checkpoint" in published
    assert "someone/else cannot be fetched (offline" in other
    assert "pip install 'mambavision-triton[weights]'" in missing
    assert err.count("CC-BY-NC-SA") == 1

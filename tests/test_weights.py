"""Checkpoints: every layout in, one clear error for what is no checkpoint, nothing half-written."""

import argparse
import os
import pickle
import sys

import pytest
import torch

from mambavision import MambaVision, create_model, load_checkpoint, save_checkpoint

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
        with pytest.raises(ValueError, match="refused"):
            load_checkpoint(model(), path)
        path.write_bytes(pickle.dumps(Bomb(), protocol))
        with pytest.raises(ValueError, match="bomb.pth"):
            load_checkpoint(model(), path)
    assert not flag.exists()


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
    with pytest.raises(ValueError, match="is a folder"):
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


def test_pretrained_offline_says_what_to_do(monkeypatch):
    """A stand-in for huggingface_hub, which answers as it does without a network."""

    class Hub:
        @staticmethod
        def hf_hub_download(repository, name):
            raise OSError(f"cannot reach {repository}/{name}\nand a long story")

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    with pytest.warns(UserWarning, match="CC-BY-NC-SA"):
        with pytest.raises(RuntimeError) as error:
            create_model("mamba_vision_T", pretrained=True)
    assert "pass checkpoint=PATH" in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RuntimeError, match="pip install"):
        create_model("mamba_vision_T", pretrained=True)

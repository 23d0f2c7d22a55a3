"""`mambavision train`: every setting arrives where it acts."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("timm", exc_type=ImportError)

from test_train import (  # noqa: E402
    CPU,
    PLAIN,
    fixed_batches,
    gradients,
    make_folder,
    options,
    trainer_of,
)

from mambavision.training.data import open_data, training_loader  # noqa: E402
from mambavision.training.loop import train  # noqa: E402


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def finished(shapes, tmp_path_factory):
    return train(options(shapes, tmp_path_factory.mktemp("runs") / "run", epochs=1))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "setting, expected",
    (({}, torch.float32), ({"amp": True}, torch.bfloat16),
     ({"amp": True, "amp_dtype": "float16"}, torch.float16)),
)  # fmt: skip
def test_mixed_precision_is_that_asked_for(shapes, setting, expected):
    trainer = trainer_of(options(shapes, **setting))
    seen = []
    trainer.model.head.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    gradients(trainer, fixed_batches(1))
    trainer.evaluate(fixed_batches(1))
    assert trainer.scaler.is_enabled() is (expected == torch.float16)
    trainer.best_weights.head.register_forward_hook(lambda m, x, out: seen.append(out.dtype))
    trainer.evaluate(fixed_batches(1))
    assert set(seen) == {expected} and len(seen) == 2
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_channels_last_is_that_of_weights_and_images(shapes):
    for on in (False, True):
        trainer = trainer_of(options(shapes, channels_last=on, mixup=0.0, cutmix=0.0))
        seen = []
        trainer.model.register_forward_pre_hook(lambda m, x, seen=seen: seen.append(x[0]))
        gradients(trainer, fixed_batches(1))
        weight = trainer.model.levels[0].blocks[0].conv1.weight
        for x in (*seen, weight):
            assert x.is_contiguous(memory_format=torch.channels_last) is on


@pytest.mark.parametrize(
    "more", ({"smoothing": 0.5}, {"mixup": 1.0}, {"cutmix": 1.0}, {"drop": 0.3},
             {"drop_path": 0.9}), ids=lambda more: "-".join(more),
)  # fmt: skip
def test_regularization_changes_gradients(shapes, more):
    plain = {**PLAIN, "smoothing": 0.0}
    found = []
    for chosen in (plain, {**plain, **more}):
        batch = [(x.clone(), t) for x, t in fixed_batches(1, size=8)]
        found.append(gradients(trainer_of(options(shapes, **chosen)), batch))
    assert any(not torch.allclose(g, found[1][n], rtol=1e-3) for n, g in found[0].items())


def test_mixing_by_probability(shapes):
    trainer = trainer_of(options(shapes, mixup=1.0, mixup_prob=0.5))
    seen = []
    trainer.model.register_forward_pre_hook(lambda m, x: seen.append(x[0].clone()))
    (images, targets), *_ = fixed_batches(1)
    for step in range(20):
        gradients(trainer, [(images.clone(), targets)], step=step)
    mixed = sum(not torch.equal(x, images) for x in seen)
    assert 4 <= mixed <= 16


UNTOUCHED = {"aa": "", "reprob": 0.0, "color_jitter": 0.0, "hflip": 0.0, "scale": (1.0, 1.0)}


@pytest.mark.parametrize(
    "more", ({"aa": "rand-m9-n4"}, {"reprob": 1.0}, {"color_jitter": 0.9}, {"hflip": 1.0},
             {"scale": (0.1, 0.2)}, {"ratio": (3.0, 3.0)}), ids=lambda more: "-".join(more),
)  # fmt: skip
def test_augmentation_changes_images(shapes, more):
    def sample(**chosen):
        chosen = options(shapes, **chosen)
        loader = training_loader(open_data(chosen).train, chosen, 0, 1, CPU.device)[0]
        return torch.stack([loader.dataset[0, index][0] for index in range(8)])

    plain, found = sample(**UNTOUCHED), sample(**{**UNTOUCHED, **more})
    if "hflip" in more:
        torch.testing.assert_close(found, plain.flip(-1), rtol=0, atol=0)
    else:
        assert not torch.allclose(found, plain, atol=0.05)


def rates_of(chosen, steps=3):
    """The learning rate of every update."""
    trainer = trainer_of(chosen, steps=steps)
    rates = []
    for update in range(trainer.epochs * trainer.updates_per_epoch):
        trainer.scheduler.step_update(update)
        rates.append(trainer.rate)
    return rates


def test_course_of_the_learning_rate(shapes):
    chosen = options(
        shapes, epochs=6, warmup_epochs=2, cooldown_epochs=2, warmup_lr=0.1, lr=1.0, min_lr=0.01
    )
    rates = rates_of(chosen)
    assert len(rates) == (6 + 2) * 3
    assert rates[0] == pytest.approx(0.1)
    assert rates[:6] == sorted(rates[:6]) and rates[3] - rates[2] == pytest.approx(0.15)
    assert rates[6] < 1 and rates[6:18] == sorted(rates[6:18], reverse=True)
    assert rates[18:] == pytest.approx([0.01] * 6)
    # Half of the cosine, from its start on or after the warm-up.
    assert rates[9] == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi / 2)) / 2)
    assert len(set(rates_of(replace(chosen, sched="constant"))[6:18])) == 1


def test_optimizer_is_that_asked_for(shapes):
    for name, kind in (("adamw", "AdamW"), ("lamb", "Lamb"), ("sgd", "SGD")):
        chosen = options(shapes, opt=name, opt_eps=1e-5, momentum=0.7, weight_decay=0.3)
        optimizer = trainer_of(chosen).optimizer
        group = max(optimizer.param_groups, key=lambda group: group["weight_decay"])
        assert type(optimizer).__name__ == kind and group["weight_decay"] == 0.3
        assert group.get("momentum", 0.7) == 0.7 and group.get("eps", 1e-5) == 1e-5


def test_moving_average_follows_by_its_decay(shapes):
    """After a warm-up, in which it follows faster: w <- d w + (1 - d) new."""
    trainer = trainer_of(options(shapes, model_ema_decay=0.6, lr=0.1, sched="constant"))
    for step in range(12):
        before = trainer.ema.module.head.weight.clone()
        trainer.update(fixed_batches(1), 1, epoch=0, step=step)
        moved = trainer.model.head.weight
        found = trainer.ema.module.head.weight
        decay = min(0.6, 1 - (1 + step) ** (-2 / 3))
        torch.testing.assert_close(found, decay * before + (1 - decay) * moved.detach())
    assert not torch.equal(found, moved)


def test_start_from_weights(shapes, finished):
    """Of a run with as many classes, and with others, where the classifier is new."""
    source = load_file(finished.folder / "model.safetensors")
    for classes in (3, 4):
        chosen = options(shapes, initial_checkpoint=str(finished.folder / "model.safetensors"))
        found = trainer_of(chosen, classes=classes).model.state_dict()
        assert found["head.weight"].shape[0] == classes
        for name, x in source.items():
            if classes == 3 or not name.startswith("head."):
                torch.testing.assert_close(found[name], x, rtol=0, atol=0)


@pytest.mark.parametrize(
    "model, more, expected",
    (("mamba_vision_S", {}, (0.93, "center")), ("mamba_vision_L3_512_21k", {}, (0.93, "squash")),
     ("mamba_vision_S", {"crop_pct": 0.5}, (0.5, "center"))),
)  # fmt: skip
def test_validation_images_are_cropped_as_published(shapes, tmp_path, model, more, expected):
    from timm.data import create_transform

    from mambavision.training.data import evaluation_loader

    chosen = options(shapes, model=model, **more)
    images = open_data(chosen).val
    found = next(iter(evaluation_loader(images, chosen, 0, 1, CPU.device)))[0]
    crop_pct, crop_mode = expected
    published = create_transform(
        32, crop_pct=crop_pct, crop_mode=crop_mode, interpolation="bicubic",
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    expected = torch.stack([published(images.open(index)[0]) for index in range(4)])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)

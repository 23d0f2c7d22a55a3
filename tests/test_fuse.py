"""fuse_mixers: the same model with other mixers inside, and the way back."""

import copy
import io

import pytest
import torch
from test_model import MIXERS, assert_recorded, load
from torch import nn

from mambavision import (
    MambaVision,
    MambaVisionMixer,
    fuse_mixers,
    provide_mamba_ssm,
    unfuse_mixers,
)

with provide_mamba_ssm():
    from written_for_mamba_ssm import EagerBlock, EagerMixer, EagerModel

PLACES = ["blocks.0.mixer", "blocks.1.mixer"]


def eager_model():
    torch.manual_seed(0)
    return EagerModel()


def images(batch=2):
    return torch.randn(batch, 3, 32, 24, generator=torch.Generator().manual_seed(1))


def results(model):
    """Logits, and the gradients of all parameters by name."""
    logits = model(images())
    model.zero_grad()
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return {"logits": logits.detach()} | {n: p.grad for n, p in model.named_parameters()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_recorded(found[name], value, name)


@pytest.mark.parametrize("name", MIXERS)
def test_the_eager_mixer_is_the_published_one_recorded(name):
    """What the other tests compare with, values and gradients, before and after."""
    tensors, metadata = load(name)
    model = nn.Sequential(EagerMixer(**{key: int(value) for key, value in metadata.items()}))
    state = {f"0.{key[6:]}": v for key, v in tensors.items() if key.startswith("param.")}
    model.load_state_dict(state)
    for step in (lambda: None, lambda: fuse_mixers(model), lambda: unfuse_mixers(model)):
        step()
        model.zero_grad()
        x = tensors["x"].clone().requires_grad_()
        out = model(x)
        out.backward(tensors["grad_out"])
        assert_recorded(out, tensors["out"], "out")
        assert_recorded(x.grad, tensors["grad.x"], "x")
        for key, parameter in model.named_parameters():
            assert_recorded(parameter.grad, tensors[f"grad.{key[2:]}"], key)


def test_fused_equals_eager_and_comes_back():
    model = eager_model()
    modules, names = dict(model.named_modules()), list(model.state_dict())
    parameters = dict(model.named_parameters())
    random = torch.get_rng_state()
    expected = results(model)

    assert fuse_mixers(model) == PLACES
    assert torch.equal(torch.get_rng_state(), random)
    assert all(isinstance(model.get_submodule(place), MambaVisionMixer) for place in PLACES)
    assert sorted(model.state_dict()) == sorted(names)
    assert {n: id(p) for n, p in model.named_parameters()} == {
        n: id(p) for n, p in parameters.items()
    }
    assert_equal(results(model), expected)
    model.eval()
    with torch.no_grad():
        assert_recorded(model(images()), expected["logits"], "inference")

    assert unfuse_mixers(model) == PLACES
    assert all(modules[name] is module for name, module in model.named_modules())
    assert not any(module.training for module in model.modules())
    assert_equal(results(model), expected)


def trained(fuse_at, unfuse_at, steps=4):
    model = eager_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        if step == fuse_at:
            fuse_mixers(model)
        if step == unfuse_at:
            unfuse_mixers(model)
        loss = model(images()).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def test_training_goes_on_with_the_optimizer_it_began_with():
    eager = trained(None, None)
    assert eager[-1] < 0.9 * eager[0]
    torch.testing.assert_close(trained(1, 3), eager, rtol=1e-4, atol=0)


def test_what_happens_while_fused_stays():
    """Weights loaded by assignment, another dtype and hooks survive the way back."""
    model, other = eager_model(), EagerModel()
    fuse_mixers(model)
    seen = []
    handle = model.blocks[0].mixer.register_forward_hook(lambda *_: seen.append(1))
    model.load_state_dict({k: v.double() for k, v in other.state_dict().items()}, assign=True)
    unfuse_mixers(model)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value.double(), rtol=0, atol=0)
    model.float()(images())
    handle.remove()
    model(images())
    assert seen == [1]


def test_copies_stay_fused():
    model = eager_model()
    expected = results(model)
    fuse_mixers(model)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        assert_equal(results(other), expected)
        assert unfuse_mixers(other) == PLACES
        assert_equal(results(other), expected)
    assert isinstance(model.blocks[0].mixer, MambaVisionMixer)


def test_autocast_half_and_compile():
    model = eager_model().eval()
    fuse_mixers(model)
    with torch.no_grad():
        exact = model(images())
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(images()).float(), exact, rtol=0.1, atol=0.02)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(images()), exact, rtol=1e-4, atol=1e-5)
        model.bfloat16()
        half = model(images().bfloat16())
        torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.02)


def test_shared_places_are_all_replaced():
    block = EagerBlock(32)
    model = nn.Sequential(block, block, block.mixer)
    assert fuse_mixers(model) == ["0.mixer", "1.mixer", "2"]
    assert model[0] is model[1] and model[2] is model[0].mixer
    assert isinstance(model[2], MambaVisionMixer)
    assert unfuse_mixers(model) == ["0.mixer", "1.mixer", "2"]


class Odd(EagerMixer):
    def __init__(self, change):
        super().__init__(32)
        change(self)


@pytest.mark.parametrize(
    "change, reason",
    (
        (lambda m: setattr(m, "conv1d_z", None), "no conv1d_z.weight"),
        (lambda m: setattr(m, "conv1d_x", nn.Conv1d(16, 16, 3, groups=16)), "also conv1d_x.bias"),
        (lambda m: m.register_buffer("rope", torch.ones(1)), "also rope"),
        (lambda m: setattr(m, "gate", nn.Linear(2, 2)), "also gate.bias, gate.weight"),
        (lambda m: setattr(m, "conv1d_z", nn.Conv1d(16, 16, 5, groups=16, bias=False)), "width"),
        (lambda m: setattr(m, "conv1d_z", nn.Conv1d(16, 16, 3, groups=8, bias=False)), "1 = 1"),
        (lambda m: setattr(m, "x_proj", nn.Linear(16, 17, bias=False)), "dt_rank + 2"),
        (lambda m: setattr(m, "out_proj", nn.Linear(16, 32, bias=False)), "2 * dim = 32"),
        (lambda m: setattr(m, "D", nn.Parameter(torch.ones(16, 8))), "D is"),
    ),
)  # fmt: skip
def test_what_differs_is_left_alone_and_listed(change, reason):
    odd = Odd(change)
    with pytest.raises(ValueError) as error:
        fuse_mixers(nn.ModuleDict({"odd": odd}))
    assert "in this ModuleDict: odd: " in str(error.value) and reason in str(error.value)
    model = nn.ModuleList([odd, EagerMixer(32)])
    assert fuse_mixers(model) == ["1"] and model[0] is odd


def test_nothing_to_replace():
    with pytest.raises(ValueError, match="no module has a parameter A_log"):
        fuse_mixers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the model itself: has no parent"):
        fuse_mixers(EagerMixer(32))
    ours = MambaVision(
        dim=8, in_dim=4, depths=(1, 1, 2, 1), window_size=(8, 8, 4, 2), mlp_ratio=1,
        num_heads=(1, 1, 1, 1),
    )  # fmt: skip
    with pytest.raises(ValueError, match="levels.2.blocks.0.mixer: is a fused mixer already"):
        fuse_mixers(ours)
    with pytest.raises(ValueError, match="holds no replaced mixers"):
        unfuse_mixers(ours)
    for function in (fuse_mixers, unfuse_mixers):
        with pytest.raises(TypeError, match="must be a torch.nn.Module, got dict"):
            function({})

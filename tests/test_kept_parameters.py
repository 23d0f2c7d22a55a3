"""What a mixer keeps between calls in evaluation mode, and that it is never stale."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mambavision.mixer import MambaVisionMixer


def kept_mixer():
    torch.manual_seed(0)
    return MambaVisionMixer(16, d_state=2, d_conv=3, expand=1).eval()


def agrees(mixer, x):
    """Whether without gradients, where it keeps, the mixer computes what it computes with them."""
    with torch.no_grad():
        found = mixer(x)
    torch.testing.assert_close(found, mixer(x).detach(), rtol=0, atol=0)


def test_mixer_computes_once():
    mixer, x = kept_mixer(), torch.randn(1, 5, 16)
    with torch.no_grad():
        first = mixer.scan_parameters()
        assert all(a is b for a, b in zip(mixer.scan_parameters(), first, strict=True))
    assert mixer.scan_parameters()[0] is not first[0] and mixer.scan_parameters()[0].requires_grad
    mixer.train()
    with torch.no_grad():
        assert mixer.scan_parameters()[0] is not first[0]
        assert mixer.scan_parameters()[0] is not mixer.scan_parameters()[0]
    agrees(mixer.eval(), x)


def optimizer_step(mixer):
    optimizer = torch.optim.AdamW(mixer.parameters(), lr=0.5)
    mixer(torch.randn(1, 5, 16)).sum().backward()
    optimizer.step()


def load(mixer):
    mixer.load_state_dict({name: x + 0.5 for name, x in mixer.state_dict().items()})


def load_assigned(mixer):
    mixer.load_state_dict({n: x + 0.5 for n, x in mixer.state_dict().items()}, assign=True)


@torch.no_grad()
def write(mixer):
    mixer.A_log.mul_(1.5)
    mixer.dt_proj.bias.add_(1.0)


@torch.no_grad()
def write_through_a_view(mixer):
    mixer.A_log.detach()[3].fill_(2.0)
    mixer.dt_proj.bias[1:].zero_()


def replace(mixer):
    mixer.A_log = nn.Parameter(mixer.A_log.detach() + 0.5)


def swap_memory(mixer):
    # Let go of the old memory first, so that the new one may take its place
    for p in (mixer.A_log, mixer.dt_proj.bias):
        shape = p.shape
        p.data = torch.empty(0)
        p.data = torch.full(shape, 0.7)


def other_dtypes(mixer):
    mixer.half().float()


def widen(mixer):
    mixer.double()


def write_data(mixer):
    mixer.A_log.data.mul_(1.5)
    mixer.eval()


@pytest.mark.parametrize(
    "change",
    (optimizer_step, load, load_assigned, write, write_through_a_view, replace, swap_memory,
     other_dtypes, widen, write_data),
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_mixer_notices_changes(change):
    mixer, x = kept_mixer(), torch.randn(1, 5, 16)
    agrees(mixer, x)
    change(mixer)
    agrees(mixer, x.to(mixer.D.dtype))
    if change is not other_dtypes:
        with torch.no_grad():
            assert not torch.equal(mixer(x.to(mixer.D.dtype)), kept_mixer()(x).to(mixer.D.dtype))


def test_mixer_in_inference_mode_and_out_of_it():
    mixer, x = kept_mixer(), torch.randn(1, 5, 16)
    with torch.inference_mode():
        mixer(x)
        assert mixer._kept is not None
    assert not mixer._kept.values[0].is_inference()
    agrees(mixer, x)
    with torch.inference_mode():
        # Its parameters count no writes: nothing is kept
        born = kept_mixer()
        born(x)
        assert born._kept is None
        born.A_log.mul_(1.5)
        mixer.A_log.copy_(born.A_log)
        torch.testing.assert_close(born(x), mixer(x), rtol=0, atol=0)


def test_mixer_copies_keep_nothing_of_each_other():
    mixer, x = kept_mixer(), torch.randn(1, 5, 16)
    with torch.no_grad():
        mixer(x)
    for other in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer)), copy.copy(mixer)):
        assert other._kept is None
        agrees(other, x)
    assert mixer._kept is not None
    write(mixer)
    agrees(mixer, x)


def test_mixer_replicas_compute_their_own():
    """What DataParallel makes: the same attributes, other parameters."""
    mixer, x = kept_mixer(), torch.randn(1, 5, 16)
    with torch.no_grad():
        mixer(x)
        replica = mixer._replicate_for_data_parallel()
        assert replica._kept is mixer._kept
        replica.A_log, replica.D, replica.dt_proj = mixer.A_log + 0.5, mixer.D + 0, mixer.dt_proj
        found = replica.scan_parameters()[0]
    torch.testing.assert_close(found, -torch.exp(mixer.A_log.detach() + 0.5))


def test_mixer_under_functional_calls():
    mixer, x = kept_mixer(), torch.randn(1, 5, 16)
    other = {name: p.detach() + 0.5 for name, p in mixer.named_parameters()}
    with torch.no_grad():
        own = mixer(x)
        found = torch.func.functional_call(mixer, other, (x,))
        torch.testing.assert_close(mixer(x), own, rtol=0, atol=0)
    changed = copy.deepcopy(mixer)
    changed.load_state_dict(other)
    torch.testing.assert_close(found, changed(x).detach(), rtol=0, atol=0)


def test_mixer_compiled_and_exported_follows_its_parameters():
    mixer, x = kept_mixer(), torch.randn(1, 5, 16)
    with torch.no_grad():
        mixer(x)
        compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), mixer(x))
        write(mixer)
        torch.testing.assert_close(compiled(x), mixer(x))
        program = torch.export.export(mixer, (x,)).module()
        torch.testing.assert_close(program(x), mixer(x))
        write(program)
        write(mixer)
        torch.testing.assert_close(program(x), mixer(x))


def test_mixer_keeps_nothing_that_has_no_memory():
    mixer, x = kept_mixer(), torch.randn(1, 5, 16)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        mixer(torch.empty(1, 5, 16))
    assert mixer._kept is None
    agrees(mixer, x)

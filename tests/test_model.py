"""The mixer module and the backbone: recorded numbers, published names, and how they are used."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mambavision import MambaVision, MambaVisionMixer, create_model, list_models

DATA = Path(__file__).parent / "data"
STATE_DICTS = json.loads((DATA / "state_dicts.json").read_text())
MIXERS = sorted(path.stem for path in DATA.glob("mixer_*.safetensors"))
BACKBONES = ("backbone_small_64", "backbone_small_72x50_layerscale")
TINY = {
    "dim": 16, "in_dim": 8, "depths": (1, 1, 3, 2), "window_size": (8, 8, 4, 2), "mlp_ratio": 2,
    "num_heads": (1, 1, 2, 4), "num_classes": 5,
}  # fmt: skip


def tiny(**overrides):
    torch.manual_seed(0)
    return MambaVision(**{**TINY, "drop_path_rate": 0.0, **overrides})


def load(name):
    with safe_open(DATA / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def assert_recorded(found, recorded, name):
    """Float32's due: rtol 1e-4, atol 1e-5 of the tensor's scale."""
    scale = max(recorded.abs().max().item(), 1e-30)
    torch.testing.assert_close(
        found.detach(), recorded, rtol=1e-4, atol=1e-5 * scale, msg=lambda text: f"{name}: {text}"
    )


def recorded_model(name):
    tensors, metadata = load(name)
    model = MambaVision(**json.loads(metadata["config"]))
    state = {key[6:]: value for key, value in tensors.items() if key.startswith("state.")}
    model.load_state_dict(state)
    return model, tensors


# Recorded numbers of the published implementation


@pytest.mark.parametrize("name", MIXERS)
def test_mixer_recorded(name):
    tensors, metadata = load(name)
    mixer = MambaVisionMixer(**{key: int(value) for key, value in metadata.items()})
    state = {key[6:]: value for key, value in tensors.items() if key.startswith("param.")}
    mixer.load_state_dict(state)
    x = tensors["x"].requires_grad_()
    out = mixer(x)
    assert_recorded(out, tensors["out"], "out")
    out.backward(tensors["grad_out"])
    assert_recorded(x.grad, tensors["grad.x"], "x")
    for key, parameter in mixer.named_parameters():
        assert_recorded(parameter.grad, tensors[f"grad.{key}"], key)


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_recorded(name):
    model, tensors = recorded_model(name)
    model.eval()
    with torch.no_grad():
        features = model.forward_features(tensors["x"])
        assert_recorded(model(tensors["x"]), tensors["logits"], "logits")
    pooled = model.forward_head(features, pre_logits=True)
    assert_recorded(pooled, tensors["pooled"], "pooled")


def test_backbone_in_training_recorded():
    """Logits, every gradient, and the batch norms' statistics after one step."""
    model, tensors = recorded_model("backbone_small_train")
    model.train()
    x = tensors["x"].requires_grad_()
    logits = model(x)
    assert_recorded(logits, tensors["logits"], "logits")
    logits.backward(tensors["grad_out"])
    assert_recorded(x.grad, tensors["grad.x"], "x")
    # Biases before a batch norm have no gradient but rounding: the scale is the layer's weight's
    for key, parameter in model.named_parameters():
        wanted = tensors[f"grad.{key}"]
        weight = tensors[f"grad.{key.replace('bias', 'weight')}"]
        atol = 1e-5 * max(wanted.abs().max().item(), weight.abs().max().item())
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=atol, msg=key)
    for key, value in model.state_dict().items():
        if f"after.{key}" in tensors:
            assert_recorded(value.float(), tensors[f"after.{key}"].float(), key)


@pytest.mark.parametrize("name", list(STATE_DICTS))
def test_state_dict_has_the_published_names_and_shapes(name):
    with torch.device("meta"):
        model = create_model(name)
    own = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert own == STATE_DICTS[name]["keys"]
    assert sum(p.numel() for p in model.parameters()) == STATE_DICTS[name]["params"]


def test_list_models_is_what_was_published():
    assert sorted(list_models()) == sorted(STATE_DICTS)


# The mixer


def test_bias_of_dt_proj_counts_twice():
    mixer = MambaVisionMixer(16, d_state=2, d_conv=3, expand=1)
    x = torch.randn(1, 5, 16)
    out = mixer(x)
    out.sum().backward()
    assert mixer.dt_proj.bias.grad.abs().max() > 0
    with torch.no_grad():
        # Half the bias, and the other half through dt_proj's own output, is another function
        mixer.dt_proj.bias.mul_(0.5)
    assert not torch.allclose(mixer(x), out)


def test_mixer_alone_starts_with_mambas_steps():
    bias = MambaVisionMixer(64, dt_min=0.01, dt_max=0.1).dt_proj.bias
    steps = torch.nn.functional.softplus(bias)
    assert (steps > 0.0099).all() and (steps < 0.101).all()


@pytest.mark.parametrize("keep", (False, True))
def test_model_resets_every_linear_layer_unless_asked(keep):
    bias = tiny(mamba_dt_init=keep).levels[2].blocks[0].mixer.dt_proj.bias
    assert (bias == 0).all() == (not keep)


@pytest.mark.parametrize(
    "arguments,words",
    (
        ({"d_model": 0}, "d_model"),
        ({"d_model": 8, "d_state": 0}, "d_state"),
        ({"d_model": 8, "dt_init": "zeros"}, "dt_init"),
        ({"d_model": 7, "expand": 1}, "even"),
    ),
)
def test_mixer_refuses(arguments, words):
    with pytest.raises(ValueError, match=words):
        MambaVisionMixer(**arguments)


def test_mixer_refuses_inputs():
    mixer = MambaVisionMixer(16, d_state=2)
    with pytest.raises(ValueError, match=r"\(batch, seqlen, 16\), got \(2, 16\)"):
        mixer(torch.randn(2, 16))
    with pytest.raises(TypeError, match="floating-point"):
        mixer(torch.ones(1, 2, 16, dtype=torch.int64))


# Numbers of other kinds


@pytest.mark.parametrize("autocast", (False, True), ids=("plain", "autocast"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_dtypes(dtype, autocast):
    """Near the float32 model, output and gradients in the parameters' dtype, all finite."""
    model = tiny().eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
    model = model.to(dtype)
    # A model in 16 bits is cast to those: a batch norm's map and parameters must agree
    to = torch.bfloat16 if dtype == torch.float32 else dtype
    with torch.autocast("cpu", dtype=to, enabled=autocast):
        logits = model(x.to(dtype))
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()
    logits.float().square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.dtype == parameter.dtype, name


def test_decay_is_formed_in_float32_in_a_half_model(monkeypatch):
    seen = {}

    def spy(*arguments, **options):
        seen["A"], seen["D"], seen["delta_bias"] = arguments[5:8]
        return arguments[0]

    monkeypatch.setattr("mambavision.mixer.mixer", spy)
    MambaVisionMixer(16, d_state=2, d_conv=3, expand=1).half()(torch.randn(1, 4, 16).half())
    assert {x.dtype for x in seen.values()} == {torch.float32}


# Shapes


@pytest.mark.parametrize("size", ((32, 32), (33, 65), (50, 72), (224, 32), (97, 40)))
def test_any_size_from_32(size):
    model = tiny().eval()
    height, width = size
    with torch.no_grad():
        stages = model.forward_stages(torch.randn(2, 3, height, width))
        assert model(torch.randn(2, 3, height, width)).shape == (2, 5)
    for index, stage in enumerate(stages):
        step = 2 ** (index + 2)
        expected = (2, 16 * 2**index, -(-height // step), -(-width // step))
        assert stage.shape == expected, f"stage {index + 1}"


def test_channels_last_changes_nothing():
    model = tiny().eval()
    x = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        expected = model(x)
        found = model.to(memory_format=torch.channels_last)(
            x.contiguous(memory_format=torch.channels_last)
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "x,error,words",
    (
        (torch.zeros(2, 3, 31, 64), ValueError, r"at least 32, got \(31, 64\)"),
        (torch.zeros(3, 64, 64), ValueError, r"got \(3, 64, 64\)"),
        (torch.zeros(2, 1, 64, 64), ValueError, r"\(batch, 3, height, width\)"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), TypeError, "uint8"),
        (torch.zeros(2, 3, 64, 64).half(), TypeError, "float32, got torch.float16"),
        (torch.zeros(2, 3, 64, 64, device="meta"), ValueError, "device cpu, got meta"),
    ),
    ids=("small", "rank", "channels", "integers", "dtype", "device"),
)
def test_refused_inputs(x, error, words):
    with pytest.raises(error, match=words):
        tiny()(x)


@pytest.mark.parametrize(
    "overrides,error,words",
    (
        ({"depths": (1, 1, 3)}, ValueError, "depths"),
        ({"num_heads": (1, 1, 3, 4)}, ValueError, "num_heads of stage 3"),
        ({"num_classes": -1}, ValueError, "num_classes"),
        ({"drop_rate": 1.5}, ValueError, "drop_rate"),
        ({"colour": 3}, TypeError, "'colour'"),
    ),
)
def test_refused_configurations(overrides, error, words):
    with pytest.raises(error, match=words):
        tiny(**overrides)


def test_resolution_is_ignored():
    tiny(resolution=224)


def test_unknown_variant_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'mamba_vision_T'"):
        create_model("mambavision_T")


# The classifier


def test_reset_classifier():
    model = tiny().eval()
    x = torch.randn(1, 3, 64, 64)
    model.reset_classifier(7)
    assert model(x).shape == (1, 7) and model.get_classifier().out_features == 7
    model.reset_classifier(0)
    assert model(x).shape == (1, 128)
    model.reset_classifier(0, "")
    assert model(x).shape == (1, 128, 2, 2)
    with pytest.raises(ValueError, match="num_classes"):
        model.reset_classifier(-1)


# Training


def test_gradient_checkpointing_changes_nothing():
    """But that every block runs a second time."""
    x = torch.randn(2, 3, 64, 64)
    found = []
    for enable in (False, True):
        model = tiny(drop_path_rate=0.3).train()
        model.set_grad_checkpointing(enable)
        blocks, ran = [block for stage in model.levels for block in stage.blocks], []
        for block in blocks:
            block.register_forward_pre_hook(lambda block, _, ran=ran: ran.append(block))
        torch.manual_seed(1)
        model(x).square().sum().backward()
        assert [ran.count(block) for block in blocks] == [2 if enable else 1] * len(blocks)
        grads = {name: p.grad for name, p in model.named_parameters()}
        found.append(grads | dict(model.named_buffers()))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-6, atol=1e-6, msg=name)


def test_dropout_only_while_training():
    model = tiny(drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model.eval()
        torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)
        model.train()
        assert not torch.equal(model(x), model(x))


def test_no_decay_on_decays_norms_and_biases():
    model = tiny(layer_scale=1e-5)
    still = model.no_weight_decay()
    names = [name for name, _ in model.named_parameters()]
    for name in names:
        small = name.endswith(("A_log", ".D", "bias")) or "norm" in name or "gamma" in name
        assert (name in still) == (small or ".conv_down.1." in name or ".conv_down.4." in name)
    decayed, kept = model.param_groups(0.05)
    assert decayed["weight_decay"] == 0.05 and kept["weight_decay"] == 0
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_drop_path_rises_linearly_to_the_last_block():
    model = tiny(drop_path_rate=0.3)
    rates = [block.drop_path.drop_prob for stage in model.levels for block in stage.blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.3, 7))


def test_same_bits_in_every_run():
    x = torch.randn(2, 3, 64, 64)
    grads = []
    for _ in range(2):
        model = tiny()
        model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


# Around the model


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", (copy.deepcopy, through_pickle))
def test_copies(duplicate):
    model = tiny().eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(duplicate(model)(x), model(x), rtol=0, atol=0)


def test_compiled_without_graph_breaks():
    model = tiny()
    x = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    expected, found = model(x), compiled(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    expected.square().sum().backward()
    found.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), compiled.parameters(), strict=True):
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5 * scale + 1e-6, msg=name)


def test_exported():
    model = tiny().eval()
    x = torch.randn(1, 3, 64, 64)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_distributed_wrapper(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        model = tiny()
        wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        x = torch.randn(2, 3, 64, 64)
        model(x).sum().backward()
        wrapped(x).sum().backward()
        for p, q in zip(model.parameters(), wrapped.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-6)
        # Not after the group: see `stop` in mambavision/training/parallel.py.
        del wrapped
    finally:
        torch.distributed.destroy_process_group()

"""ONNX files: values in onnxruntime against the operators, over modes, batches and whole models."""

from collections import Counter

import pytest
import torch

from mambavision import MambaVision, MambaVisionMixer, conv1d_silu, selective_scan

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from mambavision.onnx import export  # noqa: E402

# Roundings of float32 against the largest value: two implementations, sums in other orders.
TOLERANCE = 64 * torch.finfo(torch.float32).eps

SMALL = {
    "dim": 16, "in_dim": 16, "depths": (1, 1, 3, 2), "window_size": (8, 8, 4, 2), "mlp_ratio": 2,
    "num_heads": (1, 1, 2, 4), "num_classes": 10,
}  # fmt: skip


class Scan(torch.nn.Module):
    def __init__(self, options, constant):
        super().__init__()
        self.options = options
        self.names = list(constant)
        for name, x in constant.items():
            self.register_buffer(name, x)

    def forward(self, *inputs):
        constant = {name: getattr(self, name) for name in self.names}
        u, delta, *rest = inputs
        given = dict(zip(self.options["inputs"], rest, strict=True))
        flags = {k: v for k, v in self.options.items() if k != "inputs"}
        return selective_scan(u, delta, **constant, **given, **flags)


def scan(batch, inputs, constant, **flags):
    """A module and inputs for it; sizes are such that no two axes are alike."""
    torch.manual_seed(batch)
    seqlen, dim, dstate = 19, 12, 5
    shapes = {
        "A": (dim, dstate), "D": (dim,), "delta_bias": (dim,), "z": (batch, seqlen, dim),
        "initial_state": (batch, dim, dstate), "B": (batch, seqlen, dstate),
        "C": (batch, seqlen, dstate), "B3": (batch, seqlen, 3, dstate),
        "C3": (batch, seqlen, 3, dstate), "C1": (batch, seqlen, 1, dstate), "Bc": (dim, dstate),
    }  # fmt: skip
    made = [torch.randn(shapes[name]) for name in inputs]
    kept = {name[0] if name in ("Bc",) else name: torch.randn(shapes[name]) for name in constant}
    kept["A"] = -kept["A"].abs()
    u, delta = torch.randn(2, batch, seqlen, dim)
    names = [name if len(name) > 2 else name[0] for name in inputs]
    return Scan({"inputs": names, **flags}, kept), (u, delta.abs() if not flags else delta, *made)


SCANS = {
    "plain": (["B", "C"], ["A"], {}),
    "all": (["B", "C", "z", "initial_state"], ["A", "D", "delta_bias"],
            {"delta_softplus": True, "return_last_state": True}),
    "reverse": (["B", "C"], ["A"], {"reverse": True, "return_last_state": True}),
    "groups": (["B3", "C3"], ["A", "D"], {"delta_softplus": True}),
    "one group beside three": (["B3", "C1"], ["A"], {"delta_softplus": True}),
    "constant B": (["C"], ["A", "Bc"], {"delta_softplus": True}),
}  # fmt: skip


def run(path, inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    found = session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    return [torch.from_numpy(x) for x in found]


def check(found, expected):
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).abs().max() <= TOLERANCE * b.abs().max()


def nodes(path):
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


@pytest.mark.parametrize("case", SCANS.values(), ids=SCANS)
def test_scan(case, tmp_path):
    inputs, constant, flags = case
    module, example = scan(2, inputs, constant, **flags)
    export(module.eval(), example, tmp_path / "scan.onnx")
    assert nodes(tmp_path / "scan.onnx")["Scan"] == 1
    for batch in (2, 1, 7):
        _, values = scan(batch, inputs, constant, **flags)
        check(run(tmp_path / "scan.onnx", values), module(*values))


@pytest.mark.parametrize("width", [1, 4])
def test_conv1d_silu(width, tmp_path):
    class Conv(torch.nn.Module):
        def forward(self, x):
            return conv1d_silu(x, weight, bias)

    weight, bias = torch.randn(6, width), torch.randn(6)
    export(Conv().eval(), torch.randn(2, 9, 6), tmp_path / "conv.onnx")
    x = torch.randn(3, 9, 6)
    check(run(tmp_path / "conv.onnx", [x]), Conv()(x))


@pytest.mark.slow
@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
def test_model(optimized, tmp_path):
    """Any batch; a scan for every mixer: one that is left out is what others' exports had."""
    torch.manual_seed(0)
    model = MambaVision(**SMALL).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    exported = model.optimize_for_inference() if optimized else model
    export(exported, torch.randn(2, 3, 64, 96), tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    mixers = [module for module in model.modules() if isinstance(module, MambaVisionMixer)]
    assert nodes(tmp_path / "model.onnx")["Scan"] == len(mixers) == 3
    for batch in (1, 5):
        images = torch.randn(batch, 3, 64, 96)
        with torch.no_grad():
            check(run(tmp_path / "model.onnx", [images]), model(images))


def test_half_precision(tmp_path):
    """Arithmetic inside is float32, as it is in the operator."""
    torch.manual_seed(0)
    mixer = MambaVisionMixer(32, d_state=8, d_conv=3, expand=1).eval().half()
    export(mixer, torch.randn(1, 10, 32).half(), tmp_path / "mixer.onnx")
    x = torch.randn(3, 10, 32).half()
    with torch.no_grad():
        expected = mixer(x)
    (found,) = run(tmp_path / "mixer.onnx", [x])
    assert found.dtype == torch.float16
    error = (found.float() - expected.float()).abs().max()
    assert error <= 2 * torch.finfo(torch.float16).eps * expected.abs().max()


def test_refused(tmp_path):
    mixer = MambaVisionMixer(32)
    with pytest.raises(RuntimeError, match="training mode"):
        export(mixer, torch.randn(1, 5, 32), tmp_path / "mixer.onnx")
    with pytest.raises(FileNotFoundError, match="no folder"):
        export(mixer.eval(), torch.randn(1, 5, 32), tmp_path / "absent" / "mixer.onnx")
    with pytest.raises(ValueError, match="no ONNX form"):
        export(mixer.double(), torch.randn(1, 5, 32).double(), tmp_path / "mixer.onnx")
    assert not list(tmp_path.iterdir())

"""provide_mamba_ssm: what the stand-in holds, and that it is there only while wanted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import mambavision
from mambavision.mamba_ssm import selective_scan_ref

ROOT = Path(__file__).resolve().parent.parent
SCANS = sorted((Path(__file__).parent / "data").glob("scan_*.safetensors"))


def python(code, *paths, **environment):
    """Runs code in a fresh process, in which nothing has been imported."""
    lines = f"import sys; sys.path[:0] = {[str(p) for p in (ROOT, ROOT / 'tests', *paths)]!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", lines + code], env={**os.environ, **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stand_in_and_its_undoing():
    python("""
import importlib.util
from mambavision import provide_mamba_ssm, selective_scan_fn

before = dict(sys.modules)
handle = provide_mamba_ssm()
assert handle.active
import mamba_ssm
import mamba_ssm.ops.selective_scan_interface as interface
assert mamba_ssm.ops.selective_scan_interface is interface
assert interface.selective_scan_fn is selective_scan_fn
assert importlib.util.find_spec("mamba_ssm.ops.selective_scan_interface") is not None
import written_for_mamba_ssm

for statement in ("from mamba_ssm import Mamba", "import mamba_ssm.modules.mamba_simple"):
    try:
        exec(statement)
    except ImportError as error:
        print(error)
    else:
        raise AssertionError(statement)

with provide_mamba_ssm() as second:
    assert not second.active
assert sys.modules["mamba_ssm"] is mamba_ssm

handle.undo()
handle.undo()
assert not handle.active
assert {n for n in sys.modules if "mamba_ssm" in n} - before.keys() == {"written_for_mamba_ssm"}
assert importlib.util.find_spec("mamba_ssm") is None
try:
    import mamba_ssm
except ModuleNotFoundError:
    pass
else:
    raise AssertionError

import torch
assert written_for_mamba_ssm.EagerModel()(torch.randn(1, 3, 32, 32)).shape == (1, 5)
""")


def test_nothing_is_there_after_an_error():
    python("""
from mambavision import provide_mamba_ssm
try:
    with provide_mamba_ssm():
        import mamba_ssm
        raise KeyError
except KeyError:
    assert "mamba_ssm" not in sys.modules
""")


def test_an_installed_one_is_not_shadowed_unless_told(tmp_path):
    package = tmp_path / "mamba_ssm" / "ops"
    package.mkdir(parents=True)
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "selective_scan_interface.py").write_text("selective_scan_fn = 'theirs'\n")
    (package / "other.py").write_text("")
    python(
        """
from mambavision import provide_mamba_ssm, selective_scan_fn

with provide_mamba_ssm() as handle:
    assert not handle.active and "mamba_ssm" not in sys.modules
    import mamba_ssm.ops.other
    import mamba_ssm.ops.selective_scan_interface as theirs
    assert theirs.selective_scan_fn == "theirs"
before = {n: m for n, m in sys.modules.items() if n.startswith("mamba_ssm")}
assert len(before) == 4

with provide_mamba_ssm(replace=True) as handle:
    assert handle.active and "mamba_ssm.ops.other" not in sys.modules
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as found
    assert found is selective_scan_fn
assert {n: m for n, m in sys.modules.items() if n.startswith("mamba_ssm")} == before
""",
        tmp_path,
    )


@pytest.mark.parametrize("path", SCANS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", ("selective_scan_fn", "selective_scan_ref"))
def test_recorded_numbers_of_mamba_ssm(name, path):
    with mambavision.provide_mamba_ssm():
        import mamba_ssm.ops.selective_scan_interface as interface
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        softplus = file.metadata()["delta_softplus"] in ("True", "true", "1")
    arguments = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    inputs = {k: tensors[k].requires_grad_() for k in arguments if k in tensors}
    out, last_state = getattr(interface, name)(
        **inputs, delta_softplus=softplus, return_last_state=True
    )
    out.backward(tensors["grad_out"])
    found = {"out": out, "last_state": last_state}
    found |= {f"grad.{key}": value.grad for key, value in inputs.items()}
    for key, value in found.items():
        atol = 1e-5 * tensors[key].abs().max().item()
        torch.testing.assert_close(value.detach(), tensors[key], rtol=1e-4, atol=atol, msg=key)


def test_reference_takes_complex_A_as_the_function_does():
    torch.manual_seed(0)
    u, delta = torch.randn(2, 2, 6, 9, dtype=torch.float64)
    A = torch.complex(-torch.rand(6, 4), torch.randn(6, 4)).to(torch.complex128)
    B, C = torch.randn(2, 2, 4, 18, dtype=torch.float64)
    for z, bias in ((None, None), (u.sin(), torch.ones(6, dtype=torch.float64))):
        arguments = {"z": z, "delta_bias": bias, "delta_softplus": True, "return_last_state": True}
        expected = mambavision.selective_scan_fn(u, delta, A, B, C, **arguments)
        found = selective_scan_ref(u, delta, A, B, C, **arguments)
        torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="selective_scan_ref: delta must have shape"):
        selective_scan_ref(u, delta[:1], A, B, C)


CONFIGURATION = """
from transformers import PretrainedConfig

class EagerConfig(PretrainedConfig):
    model_type = "eager"
    def __init__(self, d_model=32, depth=2, **kwargs):
        self.d_model, self.depth = d_model, depth
        super().__init__(**kwargs)
"""
MODELING = """
from transformers import PreTrainedModel
from .configuration_eager import EagerConfig
from .written_for_mamba_ssm import EagerModel

class EagerForImages(PreTrainedModel):
    config_class = EagerConfig
    def __init__(self, config):
        super().__init__(config)
        self.model = EagerModel(config.d_model, config.depth)
        self.post_init()
    def _init_weights(self, module):
        pass
    def forward(self, pixel_values):
        return self.model(pixel_values)
"""


def test_remote_code_of_a_repository(tmp_path):
    """As transformers fetches and imports it, for a model type that it does not know."""
    pytest.importorskip("transformers")
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "configuration_eager.py").write_text(CONFIGURATION)
    (folder / "modeling_eager.py").write_text(MODELING)
    eager = Path(__file__).parent / "written_for_mamba_ssm.py"
    (folder / eager.name).write_text(eager.read_text())
    about = {
        "model_type": "eager", "d_model": 48,
        "auto_map": {"AutoConfig": "configuration_eager.EagerConfig",
                     "AutoModel": "modeling_eager.EagerForImages"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(about))
    python(
        f"""
import torch
with __import__("mambavision").provide_mamba_ssm():
    from written_for_mamba_ssm import EagerModel
    from safetensors.torch import save_file
    torch.manual_seed(0)
    plain = EagerModel(48, 2).eval()
    folder = {str(folder)!r}
    state = {{f"model.{{k}}": v.contiguous() for k, v in plain.state_dict().items()}}
    save_file(state, folder + "/model.safetensors", {{"format": "pt"}})

from transformers import AutoModel
try:
    AutoModel.from_pretrained(folder, trust_remote_code=True)
except ImportError as error:
    assert "mamba_ssm" in str(error)
else:
    raise AssertionError

from mambavision import fuse_mixers, provide_mamba_ssm, unfuse_mixers
with provide_mamba_ssm():
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
assert "transformers_modules" in type(model).__module__
x = torch.randn(2, 3, 32, 24)
with torch.no_grad():
    expected = plain(x)
    torch.testing.assert_close(model(x), expected)
    assert fuse_mixers(model) == ["model.blocks.0.mixer", "model.blocks.1.mixer"]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
model.save_pretrained(folder + "/again")
unfuse_mixers(model)
model.train()(x).sum().backward()
assert all(p.grad is not None for p in model.parameters())
""",
        HF_HOME=str(tmp_path / "hf"),
        HF_HUB_OFFLINE="1",
    )

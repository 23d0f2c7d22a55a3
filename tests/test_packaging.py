"""What is installed: one import name, everything inside it, no dependency too many."""

import email
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCES = (
    "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in",
    "mambavision", "kernels", "reference",
)  # fmt: skip


def python(code: str, folder: Path, *paths: Path) -> str:
    """Runs code in a fresh interpreter that finds `paths` first."""
    lines = f"import sys; sys.path[:0] = {[str(p) for p in paths]!r}\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", lines], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built from a copy: building writes into the folder."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    command = "-m pip wheel --quiet --no-index --no-build-isolation --no-deps --wheel-dir"
    subprocess.run([sys.executable, *command.split(), str(built), str(source)], check=True)
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site-packages")
    wheel.extractall(folder)
    return folder


def test_only_one_top_level_name(wheel):
    names = {name.split("/")[0] for name in wheel.namelist()}
    (information,) = {name for name in names if name.endswith(".dist-info")}
    assert names == {"mambavision", information}
    assert information.startswith("mambavision_triton-")


def test_all_modules_are_inside(wheel):
    expected = {"mambavision/py.typed"}
    for folder, home in (
        ("mambavision", "mambavision"),
        ("kernels", "mambavision/kernels"),
        ("reference", "mambavision/reference"),
    ):
        for path in (ROOT / folder).rglob("*.py"):
            expected.add(f"{home}/{path.relative_to(ROOT / folder).as_posix()}")
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == expected
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_metadata(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["Name"] == "mambavision-triton"
    assert metadata["License-Expression"] or metadata["License"] == "Apache-2.0"
    required = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert {re.split(r"[^\w-]", r)[0] for r in required} == {"torch", "einops", "triton"}
    (triton,) = (r for r in required if r.startswith("triton"))
    assert 'platform_system == "Linux"' in triton
    setup = (ROOT / "setup.py").read_text()
    extras = {*re.findall(r'^    "(\w+)": \[', setup, re.MULTILINE), "dev"}
    assert {"bench", "demo", "train", "transformers", "weights", "test"} < extras
    assert set(metadata.get_all("Provides-Extra")) == extras
    start = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    assert all(f"`{extra}`" in start for extra in extras)
    minors = [10, 11, 12, 13]
    for minor in minors:
        classifier = f"Programming Language :: Python :: 3.{minor}"
        assert classifier in metadata.get_all("Classifier")
    assert metadata["Requires-Python"].replace(" ", "") in ("<3.14,>=3.10", ">=3.10,<3.14")


def test_installed_package_works_without_triton(installed, tmp_path):
    code = """
sys.modules["triton"] = None
import torch, mambavision, mambavision.reference
assert list(mambavision.__path__) == [sys.path[0] + "/mambavision"], mambavision.__path__
u, delta = torch.randn(2, 2, 5, 4)
B, C = torch.randn(2, 2, 5, 3)
A = -torch.rand(4, 3)
y = mambavision.selective_scan(u, delta, A, B, C, delta_softplus=True)
expected = mambavision.reference.selective_scan(u, delta, A, B, C, delta_softplus=True)
torch.testing.assert_close(y, expected)
"""
    python(code, tmp_path, installed)


def test_checkout_finds_its_own_kernels(tmp_path):
    """Also where another copy of the package is installed."""
    code = """
from importlib.util import find_spec
print(find_spec("mambavision.kernels").origin, find_spec("mambavision.reference").origin)
"""
    found = python(code, tmp_path, ROOT).split()
    assert found == [str(ROOT / room / "__init__.py") for room in ("kernels", "reference")]


def test_warns_of_the_other_distribution(tmp_path):
    site = tmp_path / "site"
    other = site / "mambavision-1.2.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: mambavision\nVersion: 1.2.0\n")
    message = python("import mambavision, mambavision.ops", tmp_path, ROOT, site)
    assert message.count("'mambavision' 1.2.0 is installed too") == 1
    assert "pip uninstall mambavision" in message
    assert "UserWarning" not in python("import mambavision", tmp_path, ROOT)


def test_versions_agree():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    init = (ROOT / "mambavision" / "__init__.py").read_text(encoding="utf-8")
    (version,) = re.findall(r'^__version__ = "(.+)"$', init, re.MULTILINE)
    assert f"## {version}" in changelog
    shown = subprocess.run(
        [sys.executable, "-m", "mambavision", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert shown.stdout == f"mambavision-triton {version}\n"


BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_python_of_the_readme_runs(block, tmp_path):
    if "timm" in block:
        pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))
    python(block, tmp_path, ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("words", re.findall(r'TEST_ARGS="-k ([^"]+)"', README))
def test_selections_of_the_readme_are_not_empty(words):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:xdist"]
    expression = words.strip("'")
    done = subprocess.run([*command, "-k", expression], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_oldest_versions_of_the_readme_are_those_of_setup():
    setup = (ROOT / "setup.py").read_text()
    torch, triton = re.findall(r'^OLDEST_\w+ = "(.+)"$', setup, re.MULTILINE)
    assert f"torch {torch} or newer, Triton {triton} or newer" in README


def test_make_targets_of_the_texts_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")]
    texts = "\n".join([README, contributing, *pages])
    shown = set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", texts, re.MULTILINE))
    assert {"demo", "test"} <= shown <= targets

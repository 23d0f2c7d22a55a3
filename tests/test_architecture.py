"""Who may import whom: arrows point one way, from the model down to the kernels.

Modules bear their installed names here: `kernels/mixer.py` is `mambavision.kernels.mixer`.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Module -> all that it may import beside the standard library; a name stands for what is below it
# too. Modules of `mambavision` without a row follow NOT_ABOVE_OPS.
MAY_IMPORT = {
    "mambavision.reference": {"torch", "mambavision.reference"},
    "mambavision.kernels": {"torch", "triton", "mambavision.kernels"},
    "mambavision.torch_backend": {"torch", "mambavision.torch_backend"},
    "mambavision.checks": {"torch"},
    "mambavision.ops": {
        "torch", "triton", "mambavision.checks", "mambavision.kernels", "mambavision.torch_backend",
    },
    "mambavision.mixer": {"torch", "einops", "mambavision.ops"},
    "mambavision.blocks": {
        "torch", "einops", "mambavision.mixer", "mambavision.ops", "mambavision.packed",
    },
    "mambavision.packed": {"torch", "mambavision.ops"},
    "mambavision.inference": {
        "torch", "mambavision.blocks", "mambavision.mixer", "mambavision.ops",
        "mambavision.packed",
    },
    "mambavision.model": {
        "torch", "einops", "mambavision.blocks", "mambavision.inference", "mambavision.mixer",
    },
    "mambavision.cold_start": {
        "torch", "triton", "mambavision.blocks", "mambavision.inference", "mambavision.mixer",
    },
    "mambavision.published": {"torch"},
    "mambavision.files": set(),
    "mambavision.hub": {"torch", "huggingface_hub"},
    "mambavision.weights": {
        "torch", "safetensors", "mambavision.files", "mambavision.hub", "mambavision.published",
    },
    "mambavision.variants": {
        "mambavision.hub", "mambavision.model", "mambavision.published", "mambavision.weights",
    },
}  # fmt: skip
# Only the dispatch point chooses a backend, and the oracle is for checking.
NOT_ABOVE_OPS = ("mambavision.kernels", "mambavision.torch_backend", "triton")
MAY_USE_REFERENCE = {"mambavision.mamba_ssm", "mambavision.selfcheck"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(p for p in (("mambavision", *parts) if parts[0] != "mambavision" else parts))


def outside_functions(node: ast.AST):
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from outside_functions(child)


def imported(tree: ast.Module, module: str, nodes=ast.walk) -> set[str]:
    """Absolute names of all imports and `import_module("...")` among the `nodes` of the tree."""
    names = set()
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            if node.module:
                names.add(".".join(base))
            else:
                names |= {".".join([*base, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            name = node.args[0]
            if isinstance(name, ast.Constant):
                names.add(name.value)
    return {n for n in names if n.split(".")[0] not in sys.stdlib_module_names}


def below(name: str, rooms) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


PACKAGE = sources("mambavision", "kernels", "reference")


@pytest.mark.parametrize("path", PACKAGE, ids=module_name)
def test_imports_point_down(path):
    module = module_name(path)
    names = imported(ast.parse(path.read_text(encoding="utf-8")), module)
    row = next((row for row in MAY_IMPORT if below(module, [row])), None)
    if row:
        strangers = {n for n in names if not below(n, MAY_IMPORT[row])}
    else:
        strangers = {n for n in names if below(n, [*NOT_ABOVE_OPS, "benchmarks", "tests"])}
        if module not in MAY_USE_REFERENCE:
            strangers |= {n for n in names if below(n, ["mambavision.reference"])}
    assert not strangers, f"{module} must not import {sorted(strangers)}"


@pytest.mark.parametrize("path", sources("mambavision"), ids=module_name)
def test_triton_is_imported_only_when_used(path):
    names = imported(
        ast.parse(path.read_text(encoding="utf-8")), module_name(path), outside_functions
    )
    assert not {n for n in names if below(n, ["triton", "mambavision.kernels"])}


@pytest.mark.parametrize("path", sources("kernels", "reference"), ids=module_name)
def test_rooms_that_move_use_relative_imports(path):
    """Their absolute names in a checkout differ from those installed."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    absolute = {
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not node.level and node.module
    } | {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    assert not {n for n in absolute if below(n, ["kernels", "reference", "mambavision"])}


@pytest.mark.parametrize("path", PACKAGE + sources("tests", "benchmarks"), ids=module_name)
def test_nobody_imports_top_level_kernels(path):
    """It is a second copy from the checkout's root, and another project's package elsewhere."""
    names = imported(ast.parse(path.read_text(encoding="utf-8")), module_name(path))
    assert not {n for n in names if n.split(".")[0] in ("kernels", "reference")}


def test_shape_of_the_checkout():
    """With conftest.py there or tests/__init__.py, pytest would put the root on the import path."""
    assert (ROOT / "kernels" / "__init__.py").is_file()
    assert (ROOT / "reference" / "__init__.py").is_file()
    assert not (ROOT / "conftest.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_import_needs_no_triton_and_touches_no_gpu():
    code = (
        "import sys; sys.modules['triton'] = None; import mambavision, torch;"
        "assert not torch.cuda.is_initialized();"
        "mambavision.selective_scan, mambavision.MambaVision;"
        "assert 'mambavision.kernels' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

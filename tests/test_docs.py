"""The README and the pages of docs/: their code runs, their commands and names exist.

A `python` block is run, those of a page as one program. A `py` block needs what a test has not, a
network or a GPU or somebody's data, and has to compile and import. What a page shows of commands is
parsed as the command line would, and where the output does not depend on the machine, compared.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from mambavision.cli import _parser
from mambavision.training.options import resolve

ROOT = Path(__file__).resolve().parent.parent
SITE = {path.stem: path for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES = {"README": ROOT / "README.md", "CONTRIBUTING": ROOT / "CONTRIBUTING.md", **SITE}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def blocks(name, *languages):
    found = re.findall(r"^```(\w*)\n(.*?)^```", TEXTS[name], re.DOTALL | re.MULTILINE)
    return [body for language, body in found if language in languages]


def prompted(body):
    """What follows the prompts, continued lines joined; the other lines are output."""
    lines = body.replace("\\\n", " ").splitlines()
    return [line[2:] for line in lines if line.startswith("$ ")]


def commands(name):
    """The lines of a page that call `mambavision`."""
    found = []
    for body in blocks(name, "", "console"):
        for line in prompted(body) or body.splitlines():
            called = re.match(r"(?:torchrun .*? -m )?mambavision (.*?)(?: +# .*)?$", line)
            found += [called[1]] if called else []
    return found


def need(code):
    """Skips where a package outside this one cannot be imported."""
    for name in re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE):
        if name != "mamba_ssm":
            pytest.importorskip(name, exc_type=(ImportError, RuntimeError))
    if "mambavision.timm" in code:
        pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in SITE if blocks(name, "python") and name != "getting-started"]
)
def test_code_runs(name, tmp_path):
    code = "\n".join(blocks(name, "python"))
    need(code)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [name for name in PAGES if blocks(name, "py")])
def test_code_that_is_not_run_compiles_and_imports(name):
    for body in blocks(name, "py"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mambavision"):
                need(f"import {node.module}" if "." in str(node.module) else "")
                module = import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("name", [name for name in PAGES if commands(name)])
def test_commands_are_those_of_the_command_line(name):
    for line in commands(name):
        if "..." not in line:
            _parser().parse_args(shlex.split(line))


def test_settings_in_yaml(tmp_path):
    (text,) = blocks("training", "yaml")
    (tmp_path / "settings.yaml").write_text(text)
    assert resolve({}, tmp_path / "settings.yaml").epochs == 30


@pytest.mark.slow
def test_output_that_is_the_same_everywhere(tmp_path):
    """Of `info`, and of errors of the command line, in full."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "digit_67.png").touch()
    compared = 0
    for body in (body for name in SITE for body in blocks(name, "", "console")):
        line, _, expected = body.partition("\n")
        if not re.match(r"\$ mambavision info (?!all)", line) and " error: " not in expected:
            continue
        run = [sys.executable, "-m", *shlex.split(line.removeprefix("$ "))]
        done = subprocess.run(run, env=ENVIRONMENT, capture_output=True, text=True, cwd=tmp_path)
        assert done.stdout + done.stderr == expected
        compared += 1
    assert compared >= 2


@pytest.mark.slow
def test_getting_started_from_top_to_bottom(tmp_path):
    """Its code and its commands in order; training is cut to two epochs."""
    need("import timm\nimport skimage")
    python = [sys.executable, "-c"]
    for language, body in re.findall(
        r"^```(\w*)\n(.*?)^```", TEXTS["getting-started"], re.DOTALL | re.MULTILINE
    ):
        runs = []
        if language in ("python", "py"):
            runs = [[*python, body]]
        elif language == "console":
            (line,) = prompted(body)
            runs = [[sys.executable, "-m", *shlex.split(line)]]
            runs[0] += ["--epochs", "2"] if "train" in runs[0][:4] else []
        for run in runs:
            done = subprocess.run(
                run, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
            )
            assert done.returncode == 0, (run, done.stderr)
    assert (tmp_path / "runs/eval/confusion.png").stat().st_size
    assert (tmp_path / "runs/predict/gravel-features.png").stat().st_size


def anchors(text):
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", list(PAGES))
def test_links_lead_somewhere(name):
    """Files and headings. The site's own build looks at its pages again."""
    text = re.sub(r"```.*?```", "", TEXTS[name], flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        path, _, anchor = target.partition("#")
        if "://" in target or anchor.startswith("mambavision."):
            continue
        file = (PAGES[name].parent / path) if path else PAGES[name]
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


def test_tests_that_the_texts_name_exist():
    sources = {path.name: path.read_text() for path in (ROOT / "tests").glob("*.py")}
    defined = set(re.findall(r"def (test_\w+)", "\n".join(sources.values())))
    for text in TEXTS.values():
        for name in re.findall(r"`(test_\w+(?:\.py)?)`", text):
            assert name in sources if name.endswith(".py") else name in defined, name

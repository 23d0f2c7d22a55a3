"""`make bench`: one bar over all scripts, what breaks is named, what was measured stays."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import run_all  # noqa: E402

# A benchmark in miniature: two rows, and then what the test says.
SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
import _measure
arguments = sys.argv[1:]
rows = [
    dict(op="selective_scan", provider=provider, label="T", batch=1, seqlen=196, dim=160, dstate=8,
         dtype="float32", direction="forward", kernel_us=None, eager_us=[2.0, 1.0, 3.0],
         graph_us=None, status=status, reason=reason, gpu=None, cpu="tiny", threads=1)
    for provider, status, reason in (("torch", "ok", None), ("eager", {status!r}, "it broke"))
]
if "--list" in arguments:
    print("one\\ntwo")
    sys.exit(0)
for row in rows:
    _measure.append(Path(arguments[arguments.index("--output") + 1]), row)
{then}
"""


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    def make(**then):
        for name, (status, line) in then.items():
            text = SCRIPT.format(benchmarks=str(ROOT / "benchmarks"), status=status, then=line)
            (tmp_path / f"bench_{name}.py").write_text(text)
        monkeypatch.setattr(run_all, "HERE", tmp_path)
        monkeypatch.setattr(run_all, "SCRIPTS", tuple(f"bench_{name}.py" for name in then))
        return tmp_path / "out" / "rows.jsonl"

    return make


def test_every_script_is_there():
    assert all((ROOT / "benchmarks" / script).is_file() for script in run_all.SCRIPTS)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_pictures_and_tables(scripts, capfd):
    output = scripts(a=("ok", ""), b=("failed", ""))
    assert run_all.main(["--quick", "--output", str(output)]) == 0
    out, err = capfd.readouterr()
    assert [r["status"] for r in rows_of(output)] == ["ok", "ok", "ok", "failed"]
    assert "3 ok, 1 failed in" in out and "4/4" in err
    assert "selective_scan T eager: failed: it broke" in out + err
    assert "length: not drawn, there are no rows of" in out
    names = {path.name for path in output.parent.iterdir()}
    assert names == {"rows.jsonl", "TABLES.md", "cpu_selective_scan_tiny_1_threads_float32.png"}
    if not torch.cuda.is_available():
        assert "No GPU here. Not measured:" in out
        assert "Not measured, because it needs a GPU" in (output.parent / "TABLES.md").read_text()


def test_rows_are_added_to_those_that_are_there(scripts, capfd):
    output = scripts(a=("ok", ""))
    assert run_all.main(["--output", str(output)]) == 0
    before = output.read_text()
    assert run_all.main(["--output", str(output)]) == 0
    assert output.read_text().startswith(before) and len(rows_of(output)) == 4


def test_a_script_that_breaks_is_named_and_the_next_one_runs(scripts, capfd):
    output = scripts(a=("ok", "raise MemoryError('too much')"), b=("ok", ""))
    assert run_all.main(["--output", str(output)]) == 1
    out, err = capfd.readouterr()
    assert "bench_a.py ended with exit code 1: MemoryError: too much" in out + err
    assert len(rows_of(output)) == 4


def test_a_script_that_cannot_say_what_it_measures(scripts, capfd):
    output = scripts(a=("ok", ""))
    (run_all.HERE / "bench_a.py").write_text("import sys; sys.exit('a: error: no such thing')")
    assert run_all.main(["--output", str(output)]) == 2
    assert "run_all: a: error: no such thing" in capfd.readouterr().err
    assert not output.exists()


def test_interrupted(scripts):
    output = scripts(a=("ok", "time.sleep(60)"), b=("ok", ""))
    program = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(ROOT / "benchmarks")!r})
        import run_all
        run_all.HERE, run_all.SCRIPTS = Path({str(run_all.HERE)!r}), {run_all.SCRIPTS!r}
        sys.exit(run_all.main(["--output", {str(output)!r}]))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 60
    while not (output.exists() and len(rows_of(output)) == 2) and time.monotonic() < end:
        time.sleep(0.1)
    # As a terminal does, to the whole group.
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"stopped; 2 rows are in {output}" in err and "Traceback" not in err
    assert len(rows_of(output)) == 2

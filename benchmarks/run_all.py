"""Every benchmark that this machine can run, then the pictures and the tables.

Rows are appended to one file in `results/`, named after the machine. Each script runs in a process
of its own, so that one which breaks leaves the others standing. Ctrl-C stops all; rows that were
measured stay.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    import _measure
    import plot
    import tables
    import torch
    from rows import read
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f"run_all: {error}; pip install 'mambavision-triton[bench]' has what it needs")

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SCRIPTS = (
    "bench_selective_scan.py", "bench_conv1d_silu.py", "bench_mixer.py", "bench_backbone.py",
    "bench_train_step.py",
)  # fmt: skip
NEEDS_GPU = (
    "No GPU here. Not measured: time of the kernels alone, CUDA graphs, peak memory, shares of the "
    "roofline,\nmamba-ssm, and half precision. Measured: PyTorch on the CPU."
)


def _command(script: str, arguments: Sequence[str]) -> list[str]:
    return [sys.executable, str(HERE / script), *arguments]


def _planned(script: str, arguments: Sequence[str]) -> int:
    """How many rows a script is going to write. RuntimeError where it cannot say."""
    found = subprocess.run(
        _command(script, [*arguments, "--list"]), capture_output=True, text=True, check=False
    )
    if found.returncode:
        last = found.stderr.strip().splitlines()[-1:]
        raise RuntimeError(" ".join(last) or f"{script} ended with exit code {found.returncode}")
    return len(found.stdout.splitlines())


class _Rows:
    """The lines that were appended to a file since the last look."""

    def __init__(self, path: Path):
        self.path, self.offset = path, path.stat().st_size if path.exists() else 0

    def new(self) -> list[dict]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            whole = stream.read().rpartition(b"\n")[0]
        self.offset += len(whole) + bool(whole)
        return [json.loads(line) for line in whole.splitlines()]


def _stop(process: subprocess.Popen) -> None:
    """Ends a script that the terminal's Ctrl-C may or may not have reached."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _show(rows: list[dict], bar: tqdm, seen: Counter) -> None:
    for row in rows:
        seen[row["status"]] += 1
        bar.update()
        if row["status"] not in ("ok", "unavailable"):
            about = f"{row['op']} {row['label']} {row['provider']}"
            bar.write(f"{about}: {row['status']}: {row['reason']}")


def _run(script: str, arguments: Sequence[str], rows: _Rows, bar: tqdm, seen: Counter) -> int:
    """Runs a script while the bar follows its rows; its exit code."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            _command(script, arguments), stdout=subprocess.DEVNULL, stderr=errors
        )
        try:
            while process.poll() is None:
                _show(rows.new(), bar, seen)
                time.sleep(0.3)
        except BaseException:
            _stop(process)
            raise
        finally:
            _show(rows.new(), bar, seen)
        if process.returncode:
            errors.seek(0)
            last = " ".join(errors.read().strip().splitlines()[-1:])
            bar.write(f"{script} ended with exit code {process.returncode}: {last}")
    return process.returncode


def _present(folder: Path) -> None:
    """Pictures and tables of all rows of a folder, beside them."""
    rows = read([folder])
    written, missing = plot.draw(rows, folder)
    tables.write(rows, folder / "TABLES.md")
    for path in (*written, folder / "TABLES.md"):
        print(os.path.relpath(path))
    for line in missing:
        print(line)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few repetitions: a trial, no figures")
    parser.add_argument(
        "--output", type=Path,
        help="file that rows are appended to; pictures and tables go beside it",
    )
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    if not gpu:
        print(NEEDS_GPU)
    output = options.output or RESULTS / _measure.file_name()
    passed = ["--output", str(output)]
    if options.quick:
        passed += ["--budget-ms", "20" if gpu else "100"]
    seen: Counter = Counter()
    broken = []
    try:
        rows = _Rows(output)
        with tqdm(total=0, unit="row", desc="planning") as bar:
            for script in SCRIPTS:
                bar.total += _planned(script, passed)
                bar.refresh()
            for script in SCRIPTS:
                bar.set_description(script.removeprefix("bench_").removesuffix(".py"))
                if _run(script, passed, rows, bar, seen):
                    broken.append(script)
    except KeyboardInterrupt:
        print(f"\nstopped; {sum(seen.values())} rows are in {output}", file=sys.stderr)
        return 130
    except (OSError, RuntimeError) as error:
        print(f"run_all: {error}", file=sys.stderr)
        return 2
    print(", ".join(f"{count} {status}" for status, count in seen.items()), "in", output)
    _present(output.parent)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

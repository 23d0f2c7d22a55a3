"""Launch configurations of the selective scan's forward pass beside the shipped ones, on this GPU.

    python benchmarks/launch_configs.py
    python benchmarks/launch_configs.py --shapes T-s3 L-s3 --batch 1 8 128

What the table `FORWARD` in `kernels/selective_scan.py` is chosen by. A configuration is a provider
like any other: it passes the gate of `gate.py` before it gets a time, and has its row. `triton` is
what is shipped.
"""

import sys
from functools import partial
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import _measure
from _operators import RESULTS, Benchmark, device_here
from problems import Call, Problem
from providers import PROVIDERS, Provider

# The module; the package exports the function of that name.
scan = import_module("mambavision.kernels.selective_scan")
SHIPPED = scan.FORWARD

# STEPS, BLOCK_D, BLOCK_N, LANES, SPLIT
CONFIGS = (
    ((8, 7), 32, 4, 1, 1),
    ((8, 7), 32, 4, 2, 1),
    ((4,), 32, 4, 2, 1),
    ((8, 7), 64, 4, 1, 1),
    ((4,), 64, 4, 1, 1),
    ((7, 4), 32, 4, 2, 4),
    ((7, 4), 32, 4, 2, 8),
    ((7, 4), 32, 4, 2, 16),
)


def name_of(config: tuple) -> str:
    steps, block_d, block_n, lanes, split = config
    shape = f"{block_d}x{block_n}, {lanes} lanes, {split} pieces"
    return f"{' or '.join(map(str, steps))} steps, {shape}"


def _with(table: tuple, make, problem: Problem) -> Call:
    # In force until the next provider is made; cases of one provider follow one another.
    scan.FORWARD = table
    scan._forward_constants.cache_clear()
    return make(problem)


def providers() -> list[Provider]:
    """The shipped table, and each configuration for all sizes."""
    (shipped,) = [p for p in PROVIDERS["selective_scan"] if p.name == "triton"]
    tables = {"triton": SHIPPED}
    for config in CONFIGS:
        line = scan.Config(8, scan.ANY, scan.ANY, scan.ANY, *config, "tried")
        tables[name_of(config)] = (line, *SHIPPED)
    return [Provider(name, partial(_with, table, shipped.make)) for name, table in tables.items()]


def main(arguments: list[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    PROVIDERS["selective_scan"] = providers()
    where = _measure.file_name(_measure.machine(device_here()), "forward")
    default = ["--direction", "forward", "--output", str(RESULTS / "launch_configs" / where)]
    return Benchmark(["selective_scan"], __doc__).main([*default, *arguments])


if __name__ == "__main__":
    sys.exit(main())

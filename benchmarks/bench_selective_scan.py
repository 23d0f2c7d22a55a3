"""The selective scan: ours against mamba-ssm, a loop over time, and the reference.

    python benchmarks/bench_selective_scan.py           every shape that this machine can take
    python benchmarks/bench_selective_scan.py --list    what that is
    pytest benchmarks/bench_selective_scan.py           the same under pytest-benchmark

Each provider's output and gradients pass the gate of `gate.py` before it gets a time.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _operators import Benchmark

BENCHMARK = Benchmark(["selective_scan"], __doc__)


def bench_selective_scan(benchmark, ready):
    benchmark(ready)


if __name__ == "__main__":
    sys.exit(BENCHMARK.main())

"""Depthwise convolution over the sequence and SiLU: ours against eager and compiled PyTorch.

    python benchmarks/bench_conv1d_silu.py           every shape that this machine can take
    python benchmarks/bench_conv1d_silu.py --list    what that is
    pytest benchmarks/bench_conv1d_silu.py           the same under pytest-benchmark

Eager and compiled PyTorch get the layout that F.conv1d likes, (batch, dim, seqlen).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _operators import Benchmark

BENCHMARK = Benchmark(["conv1d_silu"], __doc__)


def bench_conv1d_silu(benchmark, ready):
    benchmark(ready)


if __name__ == "__main__":
    sys.exit(BENCHMARK.main())

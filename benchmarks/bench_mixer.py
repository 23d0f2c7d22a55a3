"""The mixer: ours against the mixer as published, on mamba-ssm's scan or on a loop over time.

    mixer           all between in_proj and out_proj
    mixer_module    the module, in_proj and out_proj included

    python benchmarks/bench_mixer.py           every shape that this machine can take
    python benchmarks/bench_mixer.py --list    what that is
    pytest benchmarks/bench_mixer.py           the same under pytest-benchmark

Each provider's output and gradients pass the gate of `gate.py` before it gets a time.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _operators import Benchmark

BENCHMARK = Benchmark(["mixer", "mixer_module"], __doc__)


def bench_mixer(benchmark, ready):
    benchmark(ready)


if __name__ == "__main__":
    sys.exit(BENCHMARK.main())

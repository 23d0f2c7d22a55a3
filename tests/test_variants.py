"""How many kernels a program compiles that sees many batch sizes and lengths."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")

ROOT = Path(__file__).resolve().parent.parent
COUNT = """
import collections, sys
sys.path.insert(0, "benchmarks")
from launches import Case, call_{op}, recorded_launches

batches = range(1, 21)
lengths = [7 * n if n % 3 == 0 else 17 * n for n in range(1, 21)]
with recorded_launches() as launches:
    for batch, seqlen in [*zip(batches, lengths), *zip(batches, lengths[::-1])]:
        call_{op}(Case("{op}", call_{op}, batch=batch, seqlen=seqlen))
kernels = collections.defaultdict(set)
for launch in launches:
    kernels[launch.name].add(launch.key)
print(max(len(keys) for keys in kernels.values()), dict((k, len(v)) for k, v in kernels.items()))
"""


@pytest.mark.parametrize(
    "op", ("selective_scan", "conv1d_silu", "mixer", "add_layer_norm", "norm_act")
)
def test_twenty_batch_sizes_and_lengths_take_few_variants(op):
    """At most 8 of each kernel: 4 by length, 3 for few channels, 2 where states are kept. Attention
    has one for each length of a window, of which a model has two."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-c", COUNT.format(op=op)],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert int(found.stdout.split()[0]) <= 8, found.stdout

"""What the plain-PyTorch backend gains over a loop over time, on this machine's CPU.

The chunked scan of `mambavision/torch_backend` against two loops: the reference, which keeps
little, and the eager one, which computes every decay first and leaves the backward pass to
autograd. Rows are forward, and forward with backward. Providers take turns, so that a disturbance
hits all; the table shows medians. A provider whose results differ from the reference in float64
gets no number.
"""

import argparse
import json
import platform
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from mambavision import reference, torch_backend
from mambavision.selfcheck import eager_mixer, eager_selective_scan

# Name: (seqlen, dim, dstate, dt_rank): the scans of MambaVision-T at 224 px.
SHAPES = {"stage3": (196, 160, 8, 20), "stage4": (49, 320, 8, 40)}
TOLERANCE = 1e-4  # of the largest value of a tensor, in float32


def arguments(op, batch, seqlen, dim, dstate, dt_rank):
    draw = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=draw)
    tensors = {
        "A": -torch.arange(1.0, dstate + 1).repeat(dim, 1),
        "D": 1 + 0.1 * normal(dim),
        "delta_bias": 0.5 * normal(dim) - 3,
    }
    if op == "selective_scan":
        tensors["u"], tensors["delta"] = normal(batch, seqlen, dim), normal(batch, seqlen, dim)
        tensors["B"], tensors["C"] = normal(batch, seqlen, dstate), normal(batch, seqlen, dstate)
        return tensors, normal(batch, seqlen, dim)
    tensors["xz"] = normal(batch, seqlen, 2 * dim)
    tensors["conv_x_weight"], tensors["conv_z_weight"] = normal(dim, 3), normal(dim, 3)
    tensors["x_proj_weight"] = normal(dt_rank + 2 * dstate, dim) / dim**0.5
    tensors["dt_proj_weight"] = normal(dim, dt_rank) / dt_rank**0.5
    return tensors, normal(batch, seqlen, 2 * dim)


def by_autograd(function, tensors, grad=None):
    """The output, and with `grad` every gradient, of a differentiable function."""
    if grad is None:
        with torch.no_grad():
            return {"out": function(**tensors)}
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out = function(**leaves)
    out.backward(grad)
    return {"out": out.detach()} | {f"d{name}": x.grad for name, x in leaves.items()}


def by_hand(op, flags, tensors, grad=None):
    """The same by the reference and its own backward."""
    found = {"out": getattr(reference, op)(**tensors, **flags)}
    if grad is not None:
        grads = getattr(reference, f"{op}_backward")(grad, **tensors, **flags)
        found |= {name: x for name, x in grads._asdict().items() if x is not None}
    return found


FLAGS = {"selective_scan": {"delta_softplus": True}, "mixer": {}}
EAGER = {"selective_scan": eager_selective_scan, "mixer": eager_mixer}


def providers(op):
    flags = FLAGS[op]
    return {
        "chunked": partial(by_autograd, partial(getattr(torch_backend, op), **flags)),
        "reference loop": partial(by_hand, op, flags),
        "eager loop": partial(by_autograd, EAGER[op]),
    }


def wrong(run, op, tensors, grad):
    """The first tensor that differs from the reference in float64, if any."""
    exact = by_hand(op, FLAGS[op], {k: x.double() for k, x in tensors.items()}, grad.double())
    found = run(tensors, grad)
    for name, x in exact.items():
        if (found[name] - x).abs().max() > TOLERANCE * x.abs().max():
            return name
    return None


def measure(runs, seconds):
    """Median seconds by provider; they take turns until the time is up, three turns at least."""
    times = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def compare(op, shape, batch, seconds):
    """The raw rows of one operator and size: (direction, provider) -> seconds or what is wrong."""
    tensors, grad = arguments(op, batch, *SHAPES[shape])
    runs = providers(op)
    faults = {name: wrong(run, op, tensors, grad) for name, run in runs.items()}
    right = {name: run for name, run in runs.items() if faults[name] is None}
    for direction, dy in (("forward", None), ("forward+backward", grad)):
        times = measure({k: partial(run, tensors, dy) for k, run in right.items()}, seconds)
        size = {"op": op, "shape": shape, "batch": batch, "direction": direction}
        yield [
            size | {"provider": name, "seconds": times.get(name), "wrong": fault}
            for name, fault in faults.items()
        ]


LINE = "{:15}{:8}{:>6}  {:18}{:>14}{:>18}{:>14}{:>8}"


def print_line(found):
    """One line of the table: the times of the three providers, chunked first."""
    ours, *loops = (row["seconds"] for row in found)
    cells = [
        f"wrong {row['wrong']}" if row["wrong"] else f"{1e3 * row['seconds']:.2f}" for row in found
    ]
    loops = [loop for loop in loops if loop]
    gain = f"{min(loops) / ours:.1f}x" if ours and loops else "-"
    size = [found[0][key] for key in ("op", "shape", "batch", "direction")]
    print(LINE.format(*size, *cells, gain), flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Times on a busy machine say little, with two threads least of all: look at the "
        "load first.\n\nexample: python benchmarks/bench_torch_backend.py --batch 1 32 --threads 2",
    )
    parser.add_argument("--op", nargs="+", choices=list(FLAGS), default=list(FLAGS))
    parser.add_argument(
        "--shape", nargs="+", choices=list(SHAPES), default=["stage3"],
        help="stage3: seqlen 196, dim 160; stage4: seqlen 49, dim 320; dstate 8 (default: stage3)",
    )  # fmt: skip
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32], help="default: 1 8 32")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: 2)")
    parser.add_argument("--seconds", type=float, default=3.0, help="per row of the table")
    parser.add_argument("--output", type=Path, help="file for the raw rows, one JSON object a line")
    options = parser.parse_args()
    if options.threads < 1 or options.seconds < 0 or min(options.batch) < 1:
        parser.error("--threads and --batch must be at least 1, --seconds at least 0")
    torch.set_num_threads(options.threads)
    machine = {"torch": torch.__version__, "cpu": platform.processor() or platform.machine()}
    machine["threads"] = options.threads
    print(f"PyTorch {machine['torch']}, {machine['threads']} threads, {machine['cpu']}, float32")
    print("medians in ms; the gain is against the faster loop\n")
    names = ["chunked", "reference loop", "eager loop"]
    print(LINE.format("op", "shape", "batch", "direction", *names, "gain"))
    raw = []
    for op, shape, batch in product(options.op, options.shape, options.batch):
        for found in compare(op, shape, batch, options.seconds):
            print_line(found)
            raw += [row | machine for row in found]
    if options.output:
        options.output.write_text("".join(json.dumps(row) + "\n" for row in raw))


if __name__ == "__main__":
    main()

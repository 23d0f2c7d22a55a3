"""Small kernels with known machine code, to check what `benchmarks/static_report.py` reads.

Run as a script without TRITON_INTERPRET, it compiles each probe and prints {probe: result} as JSON.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))


@triton.jit
def scan_probe(
    x_ptr,  # (seqlen, BLOCK_D)
    y_ptr,  # (seqlen, BLOCK_D)
    seqlen,
    STATES: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANE_SUM: tl.constexpr,
):
    """STATES exponentials per step; with LANE_SUM one sum over lanes per step."""
    offs_d = tl.arange(0, BLOCK_D)
    base = tl.program_id(0).to(tl.int64) * seqlen * BLOCK_D
    h = ()
    for n in tl.static_range(STATES):
        h = h + (tl.load(x_ptr + offs_d + n).to(tl.float32),)
    for t0 in range(0, seqlen, STEPS):
        for i in tl.static_range(STEPS):
            row = base + (t0.to(tl.int64) + i) * BLOCK_D
            x = tl.load(x_ptr + row + offs_d).to(tl.float32)
            y = x
            new = ()
            for n in tl.static_range(STATES):
                state = tl.exp2(x * (n + 1)) * h[n] + x
                y += state
                new = new + (state,)
            h = new
            if LANE_SUM:
                y += tl.sum(y, axis=0)
            tl.store(y_ptr + row + offs_d, y.to(tl.float16))


@triton.jit
def nested_probe(x_ptr, y_ptr, chunks, seqlen, STEPS: tl.constexpr, BLOCK_D: tl.constexpr):
    """A loop over chunks around a loop over steps with one exponential per step."""
    offs_d = tl.arange(0, BLOCK_D)
    h = tl.zeros((BLOCK_D,), tl.float32)
    for chunk in range(chunks):
        h += tl.sqrt(tl.load(x_ptr + chunk.to(tl.int64) * BLOCK_D + offs_d).to(tl.float32))
        for t in range(seqlen):
            h = tl.exp2(h) + tl.load(x_ptr + t.to(tl.int64) * BLOCK_D + offs_d).to(tl.float32)
        tl.store(y_ptr + chunk.to(tl.int64) * BLOCK_D + offs_d, h)


@triton.jit
def narrow_probe(x_ptr, stride, BLOCK_D: tl.constexpr):
    """What the check of the IR must find: a stride met in 32 bits, and a second grid axis."""
    offs_d = tl.arange(0, BLOCK_D)
    tl.store(
        x_ptr + tl.program_id(0) * stride + tl.program_id(1).to(tl.int64) * BLOCK_D + offs_d, 0.0
    )


@triton.jit
def refused_probe(x_ptr):
    """The interpreter accepts this and the compiler does not."""
    for k in tl.static_range(2):
        shift: tl.constexpr = k
        tl.store(x_ptr + shift, 0.0)


def main():
    import static_report as report

    options = {"num_warps": 1, "enable_fp_fusion": True}
    with report.recorded_launches() as launches:
        x, wide = torch.empty(7, 32, dtype=torch.float16), torch.empty(7, 32)
        scan_probe[(3,)](x, x, 7, STATES=8, STEPS=4, BLOCK_D=32, LANE_SUM=False, **options)
        scan_probe[(3,)](x, x, 7, STATES=8, STEPS=4, BLOCK_D=32, LANE_SUM=True, **options)
        scan_probe[(3,)](x, x, 7, STATES=16, STEPS=1, BLOCK_D=1024, LANE_SUM=False, **options)
        nested_probe[(1,)](x, wide, 5, 7, STEPS=1, BLOCK_D=32, **options)
        narrow_probe[lambda meta: (meta["BLOCK_D"], 2)](x[:, 1:], 320, BLOCK_D=32, **options)
        refused_probe[(1,)](x, **options)
    *launches, refused = launches
    names = ("scan", "lane_sum", "spill", "nested", "narrow")
    results = {}
    for name, launch in zip(names, launches, strict=True):
        for target in sys.argv[1:] or ["sm_90"]:
            result = report.compile_variant(launch, target)
            results[f"{name} {target}"] = {
                **{k: v for k, v in asdict(result).items() if k != "asm"},
                "launch": asdict(launch),
                "narrow_offsets": report.narrow_offsets(result.asm["ttir"], launch.block_sizes),
            }
    try:
        report.compile_variant(refused, "sm_90")
    except report.CompileFailure as failure:
        results["refused"] = str(failure)
    print(json.dumps(results))


if __name__ == "__main__":
    main()

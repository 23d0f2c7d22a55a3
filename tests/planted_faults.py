"""Proof that the kernels' tests can fail: one fault at a time goes into a copy of the kernels, and
the test named for it must go red and name the tensor that is wrong.

    python tests/planted_faults.py            every fault
    python tests/planted_faults.py halo       those with "halo" in the name
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCAN, CONV, MIXER = "selective_scan", "conv1d_silu", "mixer"
DEVICE, REGISTERS = "_device", "_registers"
ATTENTION, LAYER_NORM, NORM_ACT, STEM = "attention", "add_layer_norm", "norm_act", "stem_conv"


@dataclass(frozen=True)
class Fault:
    name: str
    file: str  # of kernels/
    right: str  # occurs exactly once
    wrong: str
    test: str  # file suffix::node that must go red
    tensor: str  # what its message must name


FAULTS = [
    Fault(
        "decayed state taken for dC", SCAN, "reg.halve(g_t, dtu, h_t,", "reg.halve(g_t, dtu, p,",
        "selective_scan.py::test_float32[two-blocks-and-a-mask]", "dC",
    ),
    Fault(
        "dropped gradient of delta_bias", SCAN,
        "ddelta_bias += ddelta\n", "ddelta_bias += 0.0 * ddelta\n",
        "selective_scan.py::test_float32[one-full-block]", "ddelta_bias",
    ),
    Fault(
        "delta_bias gradient from behind the end", SCAN,
        "ddelta = tl.where(t0 + i < seqlen, ddelta, 0.0)",
        "ddelta = tl.where(t0 + i < seqlen, ddelta, 1.0)",
        "selective_scan.py::test_float32[two-blocks-and-a-mask]", "ddelta_bias",
    ),
    Fault(
        "D missing from du", SCAN, "(dt[0] * gB + D * dy,)", "(dt[0] * gB,)",
        "selective_scan.py::test_float32[one-full-block]", "du",
    ),
    Fault(
        "wrong chunk boundary", SCAN,
        "states_ptr + tl.cast(chunks - 1 - k, tl.int64)", "states_ptr + tl.cast(k, tl.int64)",
        "selective_scan.py::test_float32[everything-7]", "ddelta",
    ),
    Fault(
        "step behind the end not masked", SCAN,
        "softplus2(dt)\n    if not EVEN_L:\n        dt = tl.where(t < seqlen, dt, 0.0)",
        "softplus2(dt)\n    if not EVEN_L:\n        dt = dt + 0.0 * t",
        "selective_scan.py::test_float32[two-blocks-and-a-mask]", "last_state",
    ),
    Fault(
        "channels of the next group not masked", SCAN,
        "mask_d = offs_in_group < group_dim", "mask_d = group * group_dim + offs_in_group < dim",
        "selective_scan.py::test_float32[groups]", "dB",
    ),
    Fault(
        "channels of the block before counted twice", SCAN,
        "mask_d = offs_in_group >= first", "mask_d = offs_in_group >= begin",
        "selective_scan.py::test_float32[two-blocks-and-a-mask]", "dB",
    ),
    Fault(
        "upper half of a wide block's rows taken from the lower one", SCAN,
        "begin + tl.arange(0, BLOCK_D) % WIDTH", "begin + tl.arange(0, BLOCK_D) % 32",
        "selective_scan.py::test_without_gradients[wide-block-and-a-rest-8x7x64x1x1]", "y",
    ),
    Fault(
        "own step size taken for the neighbour's", REGISTERS,
        "return x, _across(x, 1)", "return x, x",
        "selective_scan.py::test_float32[one-full-block]", "du",
    ),
    Fault(
        "neighbour's states left out of dC", REGISTERS,
        "b_r[n] * y[0] + b_of_other[n] * y[1]", "b_r[n] * y[0] + b_of_other[n] * 0.0",
        "selective_scan.py::test_float32[one-full-block]", "dC",
    ),
    Fault(
        "even lane's values for both lanes", REGISTERS,
        "tl.broadcast_to(for_pair,", "tl.broadcast_to(tl.max(for_pair, 1)[:, None, :],",
        "selective_scan.py::test_float32[one-full-block]", "du",
    ),
    Fault(
        "states of two lanes not side by side", REGISTERS,
        "(ROWS, LANES, PARTS, BLOCK_N)), (0, 2, 1, 3))",
        "(ROWS, PARTS, LANES, BLOCK_N)), (0, 1, 2, 3))",
        "selective_scan.py::test_float32[dstate-16]", "y",
    ),
    Fault(
        "rows of the first steps in every iteration", REGISTERS,
        "t = tl.minimum(t0 + tl.arange(0, ROWS), seqlen - 1)\n        offs_n",
        "t = tl.minimum(0 * t0 + tl.arange(0, ROWS), seqlen - 1)\n        offs_n",
        "selective_scan.py::test_16_bit_without_gradients[float16-8x7x32x1x1]", "y",
    ),
    Fault(
        "B and C swapped", SCAN,
        "y = reg.dot_states(h, C_t, D * us[i], LANES)",
        "y = reg.dot_states(h, B_t, D * us[i], LANES)",
        "selective_scan.py::test_float32[one-full-block]", "y",
    ),
    Fault(
        "piece entered by its own state", SCAN,
        "h0[r], _lane_before(left, WIDTH))", "h0[r], left)",
        "selective_scan.py::test_without_gradients[initial-state-7x4x32x2x16]", "y",
    ),
    Fault(
        "decays of earlier pieces not composed", SCAN,
        "decay *= tl.where(more, composed, 1.0)", "decay *= tl.where(more, 1.0, 1.0)",
        "selective_scan.py::test_without_gradients[length-196-7x4x32x2x16]", "y",
    ),
    Fault(
        "first piece begins without the initial state", SCAN,
        "reg.only(h, (piece == 0)[:, None])", "reg.only(h, (piece < 0)[:, None])",
        "selective_scan.py::test_without_gradients[initial-state-7x32x2x8]", "y",
    ),
    Fault(
        "dB taken for dC", SCAN, "dBC_ptr + dstate, dC_ptr,", "dBC_ptr, dC_ptr,",
        "selective_scan.py::test_float32[one-full-block]", "dC",
    ),
    Fault(
        "batch entries behind the first block left out of sums", SCAN,
        "entry = first + tl.arange(0, ENTRIES)[:, None]",
        "entry = 2 * first + tl.arange(0, ENTRIES)[:, None]",
        "selective_scan.py::test_sums_over_programs[entries]", "dA",
    ),
    Fault(
        "last batch entry left out of sums", SCAN,
        "(entry < entries) & mask[None, :]", "(entry < entries - 1) & mask[None, :]",
        "selective_scan.py::test_sums_over_programs[entries]", "dA",
    ),
    Fault(
        "first blocks summed for every group", SCAN,
        "dBC_ptr += group * blocks * rows", "dBC_ptr += 0 * group * blocks * rows",
        "selective_scan.py::test_sums_over_programs[9-blocks-a-group]", "dB",
    ),
    Fault(
        "last block of a group left out of dB", SCAN,
        "mask & (k + i < blocks)", "mask & (k + i < blocks - 1)",
        "selective_scan.py::test_sums_over_programs[9-blocks-a-group]", "dB",
    ),
    Fault(
        "dB summed by the groups of C", SCAN,
        "groups_B, blocks // groups_B, ROWS", "groups_B, blocks // groups_C, ROWS",
        "selective_scan.py::test_sums_over_programs[groups-of-C]", "dB",
    ),
    Fault(
        "dC summed by the groups of B", SCAN,
        "blocks // groups_C, ROWS", "blocks // groups_B, ROWS",
        "selective_scan.py::test_sums_over_programs[groups-of-B]", "dC",
    ),
    Fault(
        "derivative of the gate", SCAN, "dy * y * dev.dsilu(z)", "dy * y * dev.sigmoid(z)",
        "selective_scan.py::test_float32[z]", "dz",
    ),
    Fault(
        "derivative of softplus dropped", SCAN,
        "ddelta *= dev.dsoftplus(deltas[i] + delta_bias, dt[0])", "ddelta *= 1.0",
        "selective_scan.py::test_float32[one-full-block]", "ddelta",
    ),
    Fault(
        "dt missing from dA", SCAN, "(dA[r] + gp[r] * dt_n,)", "(dA[r] + gp[r],)",
        "selective_scan.py::test_float32[one-full-block]", "dA",
    ),
    Fault(
        "gradient of the last state ignored", SCAN,
        "g = reg.load_first(dlast_state_ptr,", "g = reg.load_first(None,",
        "selective_scan.py::test_float32[one-full-block]", "du",
    ),
    Fault(
        "constant dB summed over one entry", SCAN,
        "partial.dB.sum(0) if const_B", "partial.dB[0] if const_B",
        "selective_scan.py::test_float32[const-B]", "dB",
    ),
    Fault(
        "reverse ignored", REGISTERS, "row = seqlen - 1 - row", "row = seqlen - 1 - 0 * row",
        "selective_scan.py::test_float32[reverse]", "y",
    ),
    Fault(
        "registers of a step mixed up", REGISTERS,
        "rows[i * triton.next_power_of_2(R) + r]\n",
        "rows[i * triton.next_power_of_2(R) + R - 1 - r]\n",
        "selective_scan.py::test_float32[dstate-16]", "y",
    ),
    Fault(
        "halves of a tile in the wrong order", REGISTERS,
        "(2, 2, WIDTH)), (2, 1, 0)", "(2, 2, WIDTH)), (2, 0, 1)",
        "selective_scan.py::test_float32[one-full-block]", "du",
    ),
    Fault(
        "initial state of the first entry for all", REGISTERS,
        "load_states(ptr + b * dim * dstate,", "load_states(ptr + 0 * b,",
        "selective_scan.py::test_float32[initial-state]", "y",
    ),
    Fault(
        "wrong digit in softplus", DEVICE, "0.33319091796875", "0.33329091796875",
        "selective_scan.py::test_float32[softplus-extremes]", "y",
    ),
    Fault(
        "lanes exchange the wrong half", REGISTERS,
        "(tl.where(upper, high, low) + received,)", "(tl.where(upper, low, high) + received,)",
        "selective_scan.py::test_float32[one-full-block]", "dB",
    ),
    Fault(
        "wide states not masked", REGISTERS,
        "tile = tl.load(at, mask=offs_n < dstate,", "tile = tl.load(at, mask=offs_n >= 0,",
        "selective_scan.py::test_float32[dstate-17]", "y",
    ),
    Fault(
        "halo off by one at even widths", CONV,
        "    left: tl.constexpr = (WIDTH - 1) // 2\n    row, t",
        "    left: tl.constexpr = WIDTH // 2\n    row, t",
        "conv1d_silu.py::test_against_the_reference[single-width-4]", "out",
    ),
    Fault(
        "halo of the backward pass mirrored", CONV,
        "dx += taps[k] * das[j - k]", "dx += taps[WIDTH - 1 - k] * das[j - k]",
        "conv1d_silu.py::test_against_the_reference[single-width-3]", "dx",
    ),
    Fault(
        "halo reaches into the next sequence", CONV,
        "mask_i = mask & (t + i < seqlen)", "mask_i = mask",
        "conv1d_silu.py::test_against_the_reference[single-width-3]", "out",
    ),
    Fault(
        "halo reaches into the sequence before", CONV,
        "mask_i = mask & (t + i >= 0)", "mask_i = mask",
        "conv1d_silu.py::test_against_the_reference[single-width-3]", "out",
    ),
    Fault(
        "runs of a block not shared out over sequences", CONV,
        "block // runs * BLOCK_L + run // runs", "block // runs * BLOCK_L",
        "conv1d_silu.py::test_against_the_reference[single-blocks-span-sequences]", "out",
    ),
    Fault(
        "dweight of rows that another run owns", CONV,
        "if j >= right and j < right + STEPS:", "if j >= right:",
        "conv1d_silu.py::test_against_the_reference[single-blocks-span-sequences]", "dweight",
    ),
    Fault(
        "dbias without the activation", CONV, "(sums[WIDTH] + da,)",
        "(sums[WIDTH] + dys[j].to(tl.float32),)",
        "conv1d_silu.py::test_against_the_reference[single-width-3]", "dbias",
    ),
    Fault(
        "z convolved from x", MIXER,
        "xz_ptr + dim, stride_xzl, conv_z_weight_ptr, conv_z_bias_ptr,",
        "xz_ptr, stride_xzl, conv_z_weight_ptr, conv_z_bias_ptr,",
        "mixer.py::test_float32[published]", "out",
    ),
    Fault(
        "dz through the weights of x", MIXER,
        "tl.where(of_z == 1, taps_z[k], taps_x[k])", "taps_x[k]",
        "mixer.py::test_float32[published]", "dxz",
    ),
    Fault(
        "B and C swapped in x_proj", MIXER,
        "delta, A, BC, C, D, None,", "delta, A, C, BC, D, None,",
        "mixer.py::test_float32[published]", "out",
    ),
    Fault(
        "block of channels loaded ahead of itself", MIXER,
        "xz_ptr + BLOCK_D + d, stride_xzl", "xz_ptr + 2 * BLOCK_D + d, stride_xzl",
        "mixer.py::test_float32[two-sequences]", "out",
    ),
    Fault(
        "x_proj missing from dx", MIXER,
        "new = tl.dot(dt_low, W_low.to(dtype)", "new = 0.0 * tl.dot(dt_low, W_low.to(dtype)",
        "mixer.py::test_float32[published]", "dxz",
    ),
    Fault(
        "dC missing from dw", MIXER,
        "mask_n = mask_l & (offs_n < 2 * dstate)\n        AHEAD",
        "mask_n = mask_l & (offs_n < dstate)\n        AHEAD",
        "mixer.py::test_float32[published]", "dxz",
    ),
    Fault(
        "last block of channels missing from dw", MIXER,
        "rows, blocks, dstate, AHEAD", "rows, blocks - 1, dstate, AHEAD",
        "mixer.py::test_sums_over_programs", "dxz",
    ),
    Fault(
        "program of the scan's last sums missing", MIXER,
        "(tiles + programs_over_entries,)", "(tiles + programs_over_entries - 1,)",
        "mixer.py::test_sums_over_programs", "ddelta_bias",
    ),
    Fault(
        "states that another program writes", SCAN,
        "offs, everywhere, dim,", "offs, masks, dim,",
        "mixer.py::test_no_program_needs_what_another_one_writes", "dxz",
    ),
    Fault(
        "bias left out when states are computed again", SCAN,
        "delta_bias * LOG2E, u_ptr", "0.0 * delta_bias, u_ptr",
        "mixer.py::test_float32[published]", "dxz",
    ),
    Fault(
        "dy taken for dz", MIXER, "dyz_ptr + dim, dx_ptr)", "dyz_ptr, dx_ptr)",
        "mixer.py::test_float32[published]", "dxz",
    ),
    Fault(
        "keys behind the end of a window", ATTENTION, "offs_n < seqlen", "offs_n <= seqlen",
        "attention.py::test_against_the_reference[half-length-49]", "y",
    ),
    Fault(
        "logits not scaled", ATTENTION, "* head_dim**-0.5", "* head_dim**0",
        "attention.py::test_against_the_reference[half-head-40]", "y",
    ),
    Fault(
        "the same rows of q in every block", ATTENTION, "l0 + BLOCK_L, seqlen", "0, seqlen",
        "attention.py::test_against_the_reference[half-length-129]", "y",
    ),
    Fault(
        "layer scale of the residual sum forgotten", LAYER_NORM,
        "if gamma_ptr is not None:", "if weight_ptr is None:",
        "add_layer_norm.py::test_against_the_reference[single-layer-scale]", "s",
    ),
    Fault(
        "variance over padded channels", LAYER_NORM,
        "var = tl.sum(centred * centred, 1, keep_dims=True) / dim",
        "var = tl.sum(centred * centred, 1, keep_dims=True) / BLOCK_D",
        "add_layer_norm.py::test_against_the_reference[single-norm-alone]", "n",
    ),
    Fault(
        "eps forgotten", NORM_ACT, "mask_d, 0.0) + eps)", "mask_d, 0.0) + 0.0 * eps)",
        "norm_act.py::test_against_the_reference[single-norm-alone]", "y",
    ),
    Fault(
        "bias not normed", NORM_ACT,
        "add = (add - load_row(mean_ptr, offs_d, mask_d, 0.0)) * factor",
        "add = add - load_row(mean_ptr, offs_d, mask_d, 0.0) * factor",
        "norm_act.py::test_against_the_reference[single-everything]", "y",
    ),
    Fault(
        "residual of another layout", NORM_ACT,
        "residual = residual.contiguous(memory_format=torch.channels_last)",
        "residual = residual.contiguous()",
        "norm_act.py::test_residual_of_another_layout", "y",
    ),
    Fault(
        "channels of the next head", ATTENTION,
        "mask = (offs_l < seqlen) & (offs_d < head_dim)\n    return",
        "mask = offs_l < seqlen\n    return",
        "attention.py::test_a_head_sees_no_other[k]", "Tensor-likes are not equal",
    ),
    Fault(
        "image not padded above", STEM, "(h >= 0) & ", "",
        "stem_conv.py::test_against_the_reference[half-surrounded-by-nan]", "y",
    ),
    Fault(
        "bias added behind the norm", STEM,
        "y = (y - load_row(mean_ptr, offs_d, mask_d, 0.0)) * factor",
        "y = y * factor - load_row(mean_ptr, offs_d, mask_d, 0.0)",
        "stem_conv.py::test_against_the_reference[half-everything]", "y",
    ),
]  # fmt: skip


def run(fault: Fault) -> tuple[bool, str]:
    """Whether the fault was caught, and pytest's output."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("kernels", "mambavision", "reference", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        path = copy / "kernels" / f"{fault.file}.py"
        source = path.read_text()
        if source.count(fault.right) != 1:
            return False, f"{fault.file}.py holds {fault.right!r} {source.count(fault.right)} times"
        path.write_text(source.replace(fault.right, fault.wrong))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        found = subprocess.run(
            [*command, f"tests/test_kernels_{fault.test}"],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
        )
    # 1: tests ran and some failed; everything else is a broken experiment
    caught = found.returncode == 1 and f"AssertionError: {fault.tensor}" in found.stdout
    return caught, found.stdout + found.stderr


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", default="", help="part of a fault's name")
    chosen = [fault for fault in FAULTS if parser.parse_args().name in fault.name]
    missed = 0
    for fault in chosen:
        caught, output = run(fault)
        missed += not caught
        print(f"{'caught' if caught else 'MISSED'}  {fault.name}", flush=True)
        if not caught:
            print(output)
    print(f"{len(chosen) - missed} of {len(chosen)} faults caught")
    return 1 if missed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())

"""Budgets of the convolutions' and the mixer's compiled kernels, without a GPU."""

import pytest
from test_static_report import budgets, expect_none, name, report

# Instructions per 32 elements at width 3, of a whole forward pass and of the backward pass's loop.
# Memory at full speed takes an H200 32 and 49 of them.
FORWARD_SLOTS = 20
BACKWARD_SLOTS = 37
# Of the loop over channels that convolves x and multiplies it by W_x
PROJECT_SLOTS = 37


def broken(rows: list[dict]) -> list[str]:
    found = []
    for row in rows:
        loads = {code: n for code, n in row["opcodes"].items() if code.startswith("LDG")}
        stores = {code for code in row["opcodes"] if code.startswith("STG")}
        limit, wide = {
            "conv1d_silu_fwd_kernel": (FORWARD_SLOTS, "128"),
            "conv1d_silu_bwd_kernel": (BACKWARD_SLOTS, "64"),
            "convolve_bwd_kernel": (BACKWARD_SLOTS, "64"),
            "project_kernel": (PROJECT_SLOTS, "128"),
            "project_bwd_kernel": (PROJECT_SLOTS, "128"),
        }[row["kernel"]]
        if row["useful_slots"] > limit:
            found.append(f"{row['useful_slots']} slots: {name(row)}")
        # Weights of a convolution are three apart and stay narrow: 3 of 8 channels
        narrow = sum(n for code, n in loads.items() if not code.endswith(("128", "64")))
        if narrow > 24 or f"LDG.E.{wide}" not in loads or f"STG.E.{wide}" not in stores:
            found.append(f"{loads} {stores}: {name(row)}")
        if row["spills"]:
            found.append(f"{row['spills']} bytes spilled: {name(row)}")
    return found


# 392 is no multiple of 16 or of a block
@budgets
@pytest.mark.parametrize("dim", (160, 392))
def test_budgets(dim, tmp_path):
    args = f"--target sm_90 --dtype float16 --dim {dim} --kernel".split()
    rows = [
        row
        for kernel in ("conv", "project")
        for row in report(tmp_path / f"{kernel}.json", *args, kernel)["rows"]
    ]
    assert len({row["kernel"] for row in rows}) == 5
    expect_none(broken(rows))

"""Budgets of the compiled kernels, without a GPU, and proof that the report reads code right.

The report runs in a subprocess, because these tests may run with interpreted kernels, which cannot
be compiled. Budgets are those of Triton 3.7.1: another release makes other code.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from mambavision.kernels.attention import shared_bytes  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "benchmarks" / "static_report.py"
PROBES = ROOT / "tests" / "static_probes.py"

BUDGET_VERSION = "3.7.1"
# Issue slots per (batch, step, channel) at dstate 8: forward by BLOCK_D, and backward; and where
# iterations are not full. The mixer's B and C are float32; every lane widens 16-bit ones.
FORWARD_SLOTS = {
    "float32": ({32: 74, 64: 69}, 80),
    "float16": ({32: 87, 64: 76}, 89),
    "bfloat16": ({32: 95, 64: 80}, 97),
}
BACKWARD_SLOTS = {"float32": (200, 220), "float16": (204, 214), "bfloat16": (208, 218)}
GATE_SLOTS = 36  # more with the gate z, backward
BEST_FORWARD = 70  # of all widths, with float32 B and C
# Exchanges between lanes in a step: forward what two lanes tell each other of their channels where
# they share them, and backward beside it the sums dB and dC, of 2 x 8 values.
FORWARD_SHUFFLES, BACKWARD_SHUFFLES = {1: 0, 2: 3}, 13
# Bytes per program: what every supported GPU has without asking for more.
SHARED = 48 * 1024
# Of tokens 320 wide; the others are those of maps
OPS = {"selective_scan", "conv1d_silu", "mixer", "attention", "add_layer_norm"}

budgets = pytest.mark.skipif(
    triton.__version__ != BUDGET_VERSION,
    reason=f"budgets are stated for Triton {BUDGET_VERSION}, this is {triton.__version__}",
)


def run(script: Path, *args: str, **env: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | env
    done = subprocess.run(
        [sys.executable, str(script), *args], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def report(path: Path, *args: str, **env: str) -> dict:
    run(REPORT, *args, "--json", str(path), **env)
    return json.loads(path.read_text())


def name(row: dict) -> str:
    keys = ("target", "op", "kernel", "mode", "dtype", "dim", "dstate", "constants")
    return " ".join(str(row[key]) for key in keys if row[key] != "")


def is_scan(row: dict, direction: str) -> bool:
    return row["kernel"].startswith(f"scan_{direction}")


def broken_rules(rows: list[dict]) -> list[str]:
    """What holds for every kernel on every target."""
    broken = []
    for row in rows:
        if row["spills"]:
            broken.append(f"spills {row['spills']} bytes: {name(row)}")
        # Where less can be had than `shared_bytes` says, attention is the library's
        attends = row["op"] == "attention"
        held = shared_bytes(row["seqlen"], row["constants"]["BLOCK_D"]) if attends else SHARED
        if row["shared"] > held:
            broken.append(f"{row['shared']} bytes of shared memory: {name(row)}")
        if row["options"].get("enable_fp_fusion") is not True:
            broken.append(f"floating-point fusion not requested: {name(row)}")
        # The large axis is axis 0, the only one that may exceed 65,535.
        if row["axes"] != ["x"] or row["grid"][1:] not in ([], [1], [1, 1]):
            broken.append(f"grid {row['grid']} over {row['axes']}: {name(row)}")
        if row["narrow_offsets"]:
            broken.append(f"32-bit offset {row['narrow_offsets'][0]}: {name(row)}")
    return broken


def broken_budgets(rows: list[dict]) -> list[str]:
    """Budgets of the scans' step loops, which only sm_90 rows carry."""
    broken = []
    for row in rows:
        # At a barrier, a program of one warp waits for nobody.
        lanes = row["mix"].get("shuffle", 0)
        allowed = FORWARD_SHUFFLES[row["constants"].get("LANES", 1)]
        if is_scan(row, "fwd") and row["dstate"] <= 16 and lanes > allowed:
            broken.append(f"{lanes} exchanges: {name(row)}")
        allowed = allowed_slots(row)
        if allowed is not None and row["slots"] > allowed:
            broken.append(f"{row['slots']} slots, {allowed} allowed: {name(row)}")
        # What the loop needs is copied to shared memory two iterations ahead, and never waited for
        waited = [opcode for opcode in row["opcodes"] if opcode.startswith("LDG.")]
        if allowed is not None and waited:
            broken.append(f"waits for {', '.join(waited)}: {name(row)}")
        plain = is_scan(row, "bwd") and row["dstate"] == 8 and not row["mode"]
        if plain and lanes > BACKWARD_SHUFFLES:
            broken.append(f"{lanes} exchanges: {name(row)}")
    return broken


def dtype_of_states(row: dict) -> str:
    """That of B and C."""
    return "float32" if row["op"] == "mixer" else row["dtype"]


def allowed_slots(row: dict) -> float | None:
    """Of a scan at dstate 8 in 16 bit without reverse or states kept; anything else is free, also
    a few channels, whose sequences are walked in pieces: there, latency is all."""
    modes, constants = row["mode"].split(), row["constants"]
    plain = row["dtype"] != "float32" and row["dstate"] == 8 and constants.get("SPLIT") == 1
    if not row["kernel"].startswith("scan") or not plain or set(modes) - {"z"}:
        return None
    full = row["seqlen"] % constants["STEPS"] == 0
    if is_scan(row, "bwd"):
        whole, rest = BACKWARD_SLOTS[dtype_of_states(row)]
        return (whole if full else rest) + GATE_SLOTS * ("z" in modes)
    if modes:
        return None
    whole, rest = FORWARD_SLOTS[dtype_of_states(row)]
    return whole[constants["BLOCK_D"]] if full else rest


def expect_none(broken: list[str]) -> None:
    assert not broken, "\n" + "\n".join(broken)


def test_probes():
    """Kernels of known machine code: exponentials, lane sums, spills, nesting, narrow offsets."""
    probes = json.loads(run(PROBES, "sm_90"))
    scan, lane_sum, spill, nested, narrow = (
        probes[f"{key} sm_90"] for key in ("scan", "lane_sum", "spill", "nested", "narrow")
    )
    # 8 exponentials, one load and one store per step, at one channel per lane.
    assert scan["mix"]["MUFU"] == 8 and scan["mix"]["load"] == scan["mix"]["store"] == 1
    assert scan["loop_instructions"] == 4 * scan["slots"]
    assert "shuffle" not in scan["mix"] and "other" not in scan["mix"]
    # A sum over 32 lanes is five butterfly exchanges.
    assert lane_sum["mix"]["shuffle"] == 5 and lane_sum["opcodes"]["SHFL.BFLY"] == 20
    assert scan["spills"] == 0 and spill["spills"] > 1000 and spill["mix"]["local"] > 1
    # One exponential per step remains after the assembler unrolled the inner loop by itself.
    assert nested["loop_steps_unrolled"] > 1 and nested["mix"]["MUFU"] == 1
    assert scan["narrow_offsets"] == nested["narrow_offsets"] == []
    assert len(narrow["narrow_offsets"]) == 1 and "stride" in narrow["narrow_offsets"][0]
    # A view two bytes into its buffer is not aligned; a stride of 320 is a multiple of 16.
    assert scan["launch"]["aligned"] == ["x_ptr", "y_ptr"]
    assert narrow["launch"]["aligned"] == ["stride"] and narrow["launch"]["grid"] == [32, 2]
    assert "constexpr cannot be reassigned" in probes["refused"]
    # At most 32 programs of one warp live on an SM, however few registers they take.
    assert scan["resident_warps"] == 32


def test_a_remainder_meets_constants_alone():
    """It stays below the divisor, and the quotient does not."""
    lines = """
        %c2 = arith.constant 2 : i32
        %pid = tt.get_program_id x : i32
        %j = arith.remsi %pid, %width : i32
        %i = arith.divsi %pid, %width : i32
        %right = arith.muli %j, %c2 : i32
        %at = arith.muli %right, %stride : i32
        %down = arith.muli %i, %c2 : i32
    """
    found = subprocess.run(
        [sys.executable, "-c", "import sys; from machine_code import narrow_offsets as found; "
         "print([line.split()[0] for line in found(sys.argv[1], [])])", lines],
        cwd=REPORT.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert found.stdout.strip() == "['%at', '%down']", found.stderr


@budgets
def test_budgets_of_one_width(tmp_path):
    rows = report(tmp_path / "r.json", "--target", "sm_90", "--dtype", "float16", "--dim", "320")[
        "rows"
    ]
    assert {row["op"] for row in rows} == OPS
    budgeted = [row for row in rows if allowed_slots(row) is not None]
    assert {(row["op"], row["kernel"][:8]) for row in budgeted} >= {
        ("mixer", "scan_fwd"), ("mixer", "scan_bwd"), ("selective_scan", "scan_fwd")
    }  # fmt: skip
    expect_none(broken_rules(rows) + broken_budgets(rows))


@budgets
@pytest.mark.slow
def test_budgets_of_the_full_matrix(tmp_path):
    rows = report(tmp_path / "r.json", "--target", "sm_90")["rows"]
    expect_none(broken_rules(rows) + broken_budgets(rows))
    # Lanes without a channel cost little at any width: 160, 392, 512 in full iterations. B and C
    # are float32 here: a lane of two channels widens 16-bit ones half as often
    scans = [r for r in rows if r["op"] == "mixer" and is_scan(r, "fwd") and not r["mode"]]
    useful = {row["dim"]: row["useful_slots"] for row in scans if row["dtype"] == "float16"}
    assert {160, 320, 392, 512} <= useful.keys()
    assert max(useful.values()) <= 1.15 * min(useful.values()), useful
    assert min(useful.values()) <= BEST_FORWARD, useful


@budgets
def test_one_image_fills_more_than_40_warps(tmp_path):
    args = "--target sm_90 --dtype float16 --dim 160 --kernel scan_fwd".split()
    rows = report(tmp_path / "r.json", *args)["rows"]
    few = {row["batch"]: row for row in rows if row["constants"]["SPLIT"] > 1}
    assert few.keys() >= {1, 32}
    assert few[1]["grid"][0] == 80 and few[32]["grid"][0] == 1280


@budgets
@pytest.mark.slow
def test_rules_on_the_other_targets(tmp_path):
    targets = ["sm_80", "sm_100", "gfx942"]
    rows = report(tmp_path / "r.json", "--target", *targets, "--dtype", "float16")["rows"]
    assert {row["target"] for row in rows} == set(targets)
    expect_none(broken_rules(rows))


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_another_triton_compiles_the_kernels(version, tmp_path):
    # A release is most of a gigabyte, and pytest would keep it in tmp_path.
    with tempfile.TemporaryDirectory() as site:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site]
        installed = subprocess.run([*pip, f"triton=={version}"], capture_output=True, text=True)
        if installed.returncode:
            pytest.skip(f"pip cannot install triton=={version}: {installed.stderr.strip()[-200:]}")
        args = "--target sm_90 gfx942 --dtype float16 --dim 320".split()
        env = {"PYTHONPATH": site, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
        document = report(tmp_path / "r.json", *args, **env)
    assert document["triton"] == version
    assert {row["op"] for row in document["rows"]} == OPS


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--target", "sm_1"], "invalid choice: 'sm_1'"),
        (["--set", "BLOCK_D"], "expected NAME=INTEGER"),
        (["--kernel", "nothing"], "no kernel matches"),
        (["--json", "no/such/folder/r.json"], "no such folder"),
    ],
    ids=["target", "set", "kernel", "json"],
)
def test_bad_arguments_are_named(args, message):
    done = subprocess.run(
        [sys.executable, str(REPORT), *args], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and message in done.stderr

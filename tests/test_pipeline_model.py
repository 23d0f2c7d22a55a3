"""benchmarks/pipeline_model.py: clocks of loops that can be counted by hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import pipeline_model as model  # noqa: E402
from pipeline_model import Encoded, clocks  # noqa: E402


def test_one_instruction_a_clock_whoever_issues_it():
    loop = [Encoded("FFMA", 1)] * 10
    assert clocks(loop, 1) == pytest.approx(10, rel=0.05)
    assert clocks(loop, 3) == pytest.approx(10, rel=0.05)


def test_a_pause_is_another_warps_turn():
    loop = [Encoded("FFMA", 4)] * 10
    assert clocks(loop, 1) == pytest.approx(40, rel=0.05)
    assert clocks(loop, 2) == pytest.approx(20, rel=0.1)
    assert clocks(loop, 4) == pytest.approx(10, rel=0.2)


def test_exponentials_and_memory_share_a_queue():
    exponentials = [Encoded("MUFU.EX2", 1)] * 4
    assert clocks(exponentials, 1) == pytest.approx(4 * model.EXPONENTIAL, rel=0.1)
    reads = [Encoded("LDS.128", 1)] * 4
    assert clocks(reads, 1) == pytest.approx(16 * model.ACCESS, rel=0.1)
    assert clocks(exponentials + reads, 2) == pytest.approx(32 + 40, rel=0.1)
    # Arithmetic in between costs nothing while the queue is busy
    assert clocks((exponentials + [Encoded("FFMA", 1)] * 20), 1) == pytest.approx(32, rel=0.1)


def test_who_waits_for_a_scoreboard_waits_for_all_that_set_it():
    waits = Encoded("FFMA", 1, waits=(2,))
    late = model.LATENCY["load"] + model.ACCESS
    loop = [Encoded("LDG.E", 1, sets=2), waits, *[Encoded("FFMA", 1)] * 8]
    assert clocks(loop, 1) == pytest.approx(late + 11, abs=5)
    assert clocks(loop, 2) == pytest.approx((late + 11) / 2, rel=0.05)
    other = [Encoded("LDG.E", 1, sets=3), waits, *[Encoded("FFMA", 1)] * 8]
    assert clocks(other, 1) == pytest.approx(10, rel=0.05)


def test_decoding():
    """A loop of one exponential, its fields as the assembler encodes them."""
    fields = 5 << 41 | 2 << 46 | 1 << 49 | 0b1001 << 52
    text = (
        f"/*0000*/ MUFU.EX2 R0, R1 ;  /* 0x{0:016x} */\n/* 0x{fields:016x} */\n"
        f"/*0010*/ BRA 0x0 ;  /* 0x{0:016x} */\n/* 0x{7 << 46 | 7 << 49:016x} */\n"
    )
    first, second = model.decode(text)
    assert first == Encoded("MUFU.EX2", 5, 2, 1, (0, 3))
    assert second == Encoded("BRA", 1, 7, 7)


def test_command():
    # Interpreted kernels, as in this process, cannot be compiled.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, model.__file__, "--shapes", "T-s3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    row = done.stdout.splitlines()[2].split("|")
    assert row[1].strip() == "T stage 3" and 10 < float(row[7]) < 40


def test_unknown_shape(capsys):
    with pytest.raises(SystemExit) as stop:
        model.main(["--shapes", "T-s5"])
    assert stop.value.code == 2 and "T-s5" in capsys.readouterr().err

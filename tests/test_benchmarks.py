"""Benchmarks of the operators: times, rows, floors, the gate, providers, commands."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import _measure  # noqa: E402
import _operators  # noqa: E402
import bench_conv1d_silu  # noqa: E402
import bench_mixer  # noqa: E402
import bench_selective_scan  # noqa: E402
import problems  # noqa: E402
import providers  # noqa: E402
import roofline  # noqa: E402
from gate import Gate, Wrong  # noqa: E402
from models import Unavailable  # noqa: E402
from shapes import GPU_SIZES, SHAPES, Shape  # noqa: E402

from mambavision import provide_mamba_ssm  # noqa: E402

TINY = Shape("tiny", "tiny", 13, 12)
SCRIPTS = {
    "selective_scan": bench_selective_scan, "conv1d_silu": bench_conv1d_silu, "mixer": bench_mixer,
}  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def provider(op, name):
    return next(p for p in providers.PROVIDERS[op] if p.name == name)


# Times and memory


def test_percentiles():
    assert _measure.percentiles([3.0, 1.0, 2.0]) == [2.0, 1.4, 2.6]
    assert _measure.percentiles(range(101)) == [50.0, 20.0, 80.0]
    assert _measure.percentiles([7.0]) == [7.0, 7.0, 7.0]


def test_a_cpu_has_the_wall_clock_alone():
    found = _measure.measure(lambda: time.sleep(2e-3), "cpu", 20.0)
    middle, low, high = found.pop("eager_us")
    assert 2000 <= low <= middle <= high < 50_000
    assert found.pop("budget_ms") == 20.0
    assert set(found) == {"kernel_us", "graph_us", "peak_bytes", "graph_reason"}
    assert not any(found.values())


def test_they_take_turns():
    calls = []
    runs = [lambda name=name: calls.append(name) or time.sleep(1e-3) for name in "abc"]
    found = _measure.measure_in_turns(runs, 10.0)
    assert "".join(calls) == "abc" * (len(calls) // 3) and len(calls) >= 9
    assert all(row["eager_us"][0] >= 1000 and row["kernel_us"] is None for row in found)


def test_few_calls_where_the_budget_is_small():
    calls = []
    _measure.measure(lambda: calls.append(time.sleep(5e-3)), "cpu", 1.0)
    assert len(calls) == 1 + _measure.FEWEST


def test_saved_bytes_count_each_storage_once():
    x, weight = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    # x @ weight keeps both, exp its result, a product of two views both factors: one storage.
    assert _measure.saved_bytes(lambda: x @ weight) == 4 * (32 + 16)
    assert _measure.saved_bytes(lambda: x @ weight, [weight]) == 4 * 32
    assert _measure.saved_bytes(lambda: (x @ weight).exp(), [weight]) == 4 * (32 + 32)
    assert _measure.saved_bytes(lambda: x[:4] * x[4:]) == 4 * 32
    with torch.no_grad():
        assert _measure.saved_bytes(lambda: x @ weight) == 0


def test_saved_bytes_are_not_fooled_by_memory_used_again():
    x = torch.randn(1000, requires_grad=True)

    def forward():
        y = x
        for _ in range(10):
            y = (y * 2).exp()  # keeps its result, not its argument
        return y

    assert _measure.saved_bytes(forward) == 10 * 4000


@pytest.mark.gpu
def test_a_gpu_has_every_time():
    for name in ("triton", "eager"):
        with _operators.own_stream("cuda"):
            cases = [
                _operators.Case(
                    "conv1d_silu", TINY, 4, torch.float16, provider("conv1d_silu", name), d, "cuda"
                )
                for d in _operators.DIRECTIONS
            ]
            for _, row in _operators.measure(cases, 5.0):
                assert row["status"] == "ok", row["reason"]
                for column in ("kernel_us", "eager_us", "graph_us"):
                    assert row[column] and row[column][0] > 0, (column, row)
                assert row["peak_bytes"] > 0
                assert row["kernel_us"][0] < row["eager_us"][0]


@pytest.mark.gpu
def test_a_call_that_waits_for_the_gpu_has_no_graph():
    x = torch.ones(9, device="cuda")
    found = _measure.measure(lambda: x.sum().item(), "cuda", 1.0)
    assert found["graph_us"] is None and "synchroniz" in found["graph_reason"]
    assert found["kernel_us"] and _measure.measure(lambda: x + 1, "cuda", 1.0)["graph_us"]


# Rows


def test_rows_are_appended(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    _measure.append(path, {"a": 1})
    _measure.append(path, {"a": 2})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["a"] for row in rows] == [1, 2]
    assert all(row["time"].endswith("+00:00") for row in rows)


@pytest.mark.parametrize("value", (float("nan"), object()))
def test_what_is_no_json_leaves_the_file_as_it_was(tmp_path, value):
    path = tmp_path / "rows.jsonl"
    _measure.append(path, {"a": 1})
    before = path.read_bytes()
    with pytest.raises((ValueError, TypeError)):
        _measure.append(path, {"a": value})
    assert path.read_bytes() == before


def test_no_half_row_where_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    _measure.append(path, {"a": 1})
    before, write = path.read_bytes(), os.write
    monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:5]))
    with pytest.raises(OSError, match="no room for a row"):
        _measure.append(path, {"a": 2})
    assert path.read_bytes() == before


def test_a_row_says_where_it_was_measured():
    where = _measure.machine("cpu")
    assert where["gpu"] is None and where["driver"] is None
    assert where["torch"] == torch.__version__ and where["threads"] == torch.get_num_threads()
    assert where["cpu"] and where["cores"] and len(where["commit"]) == 40
    assert isinstance(where["dirty"], bool) and set(where["tf32"]) == {"matmul", "cudnn"}
    gpu = {**where, "gpu": "NVIDIA H100 80GB HBM3"}
    assert _measure.file_name(gpu) == "nvidia_h100_80gb_hbm3.jsonl"
    assert _measure.file_name(gpu, "mixer") == "mixer_nvidia_h100_80gb_hbm3.jsonl"
    assert _measure.file_name().endswith("_threads.jsonl")


# The roofline. (seqlen, dim): microseconds at batch 128 on an H200, worked out by hand from the
# elements, 132 SMs x 4 schedulers x 32 lanes x 1.98 GHz, 4.3 TB/s and 790 TFLOP/s.

FLOORS = {
    ("selective_scan", "forward"): (9.6, 4.8, 11.5, 15.4, 23.5, 40, 160),
    ("selective_scan", "backward"): (23, 11.4, 27, 36.5, 56, 95, 381),
    ("mixer", "forward"): (13.4, 6.7, 16, 21.5, 33, 56, 225),
    ("mixer_module", "forward"): (30, 21, 37, 58, 116, 238, 953),
}
FLOOR_SHAPES = ("T-s3", "T-s4", "S-s3", "B-s3", "L-s3", "L3-256-s3", "L3-512-s3")


def floor(op, direction, name, device=roofline.DEVICES[0]):
    shape = SHAPES[name]
    return roofline.floor(device, op, direction, 128, shape.seqlen, shape.dim, shape.dstate)


@pytest.mark.parametrize(("op", "direction"), FLOORS, ids=["-".join(key) for key in FLOORS])
def test_floors(op, direction):
    found = [floor(op, direction, name).us for name in FLOOR_SHAPES]
    assert found == pytest.approx(FLOORS[op, direction], rel=0.015)


def test_what_bounds_a_floor():
    forward, backward = (floor("selective_scan", d, "T-s3") for d in ("forward", "backward"))
    assert forward.us == forward.special_us > forward.issue_us > forward.memory_us
    assert backward.us == backward.issue_us
    convolution = floor("conv1d_silu", "forward", "T-s3")
    assert convolution.us == convolution.memory_us
    # x in, y out.
    assert convolution.bytes == 2 * 2 * 128 * 196 * 160
    assert floor("mixer", "both", "T-s3").us == pytest.approx(
        floor("mixer", "forward", "T-s3").us + floor("mixer", "backward", "T-s3").us
    )


def test_floors_scale_with_states_and_bytes():
    size = "selective_scan", "forward", 4, 49, 64
    eight, sixteen = (roofline.floor(roofline.DEVICES[0], *size, n) for n in (8, 16))
    assert sixteen.special_us == pytest.approx(eight.special_us * 18 / 10)
    assert sixteen.issue_us == pytest.approx(2 * eight.issue_us)
    wide = roofline.floor(roofline.DEVICES[0], *size, 8, itemsize=4)
    assert wide.bytes == 2 * eight.bytes and wide.special_us == eight.special_us


def test_devices_by_name():
    for name, sms in (("NVIDIA H200", 132), ("NVIDIA A100-SXM4-40GB", 108)):
        assert roofline.device_named(name).sms == sms
    assert roofline.device_named("NVIDIA GeForce RTX 4090") is None
    assert roofline.device_named(None) is None


def test_share_of_the_floor():
    case = bench_selective_scan.BENCHMARK.cases("cuda")[0]
    known = case.against_floor("NVIDIA H200", [19.2, 19.0, 20.0])
    assert known["floor_us"] == pytest.approx(9.6, rel=0.01)
    assert known["share_of_floor"] == pytest.approx(0.5, rel=0.01)
    assert known["gb_per_s"] == pytest.approx(known["bytes_min"] / 19.2e-6 / 1e9, rel=0.01)
    unknown = case.against_floor("NVIDIA L40", [19.2, 19.0, 20.0])
    assert unknown["floor_us"] is None and unknown["share_of_floor"] is None
    assert unknown["bytes_min"] == known["bytes_min"] and unknown["gb_per_s"] == known["gb_per_s"]
    assert case.against_floor(None, None)["gb_per_s"] is None


# The gate


@pytest.mark.parametrize("batch", (8, 3, 1))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", providers.OPS)
def test_gate_lets_right_providers_pass(op, dtype, batch):
    gate = Gate(op, TINY, batch, dtype, "cpu")
    for name in ("torch", "eager"):
        call = provider(op, name).make(gate.problem)
        for gradients in (False, True):
            gate.check(call, gradients)


@pytest.fixture
def mamba_ssm():
    """The scan with mamba-ssm's name, layout and arguments."""
    with pytest.MonkeyPatch.context() as patch, provide_mamba_ssm():
        patch.setitem(sys.modules, "selective_scan_cuda", ModuleType("selective_scan_cuda"))
        scan = providers.mamba_ssm_scan()
        patch.setattr(providers, "_scan_on", lambda device: (scan, "mamba-ssm's scan"))
        yield scan


@pytest.mark.parametrize("seqlen", (13, 130, 256))
def test_gate_lets_mamba_ssm_pass_padded_or_not(mamba_ssm, seqlen):
    gate = Gate("selective_scan", replace(TINY, seqlen=seqlen), 4, torch.float32, "cpu")
    for name in ("mamba_ssm", "mamba_ssm_padded"):
        gate.check(provider("selective_scan", name).make(gate.problem), True)
    padded = provider("selective_scan", "mamba_ssm_padded").make(gate.problem)
    assert padded.setting == f"length {256 if seqlen > 128 else 128}"
    assert padded.leaves["u"].shape == (4, 12, 256 if seqlen > 128 else 128)


@pytest.mark.parametrize("op", ("mixer", "mixer_module"))
def test_gate_lets_eager_mixers_on_either_scan_pass(mamba_ssm, op):
    gate = Gate(op, TINY, 4, torch.float32, "cpu")
    for name, setting in (("eager", "mamba-ssm's scan"), ("eager_loop", "loop over time")):
        call = provider(op, name).make(gate.problem)
        gate.check(call, True)
        assert call.setting == setting


def test_gradients_of_weights_stay_within_float16():
    """Sums over 256 sequences of 1024 steps, from those over one of 256 steps."""
    problem = problems.make_problem("mixer", SHAPES["L3-512-s4"], 1, torch.float32, "cpu")
    found = problems.reference_results(problem, True)
    largest = max(float(x.abs().max()) for name, x in found.items() if "weight" in name)
    assert largest * 256 * 4 < torch.finfo(torch.float16).max


def test_folding_computes_something_else_at_the_same_cost(mamba_ssm):
    gate = Gate("selective_scan", replace(TINY, seqlen=100), 41, torch.float32, "cpu")
    folded = provider("selective_scan", "mamba_ssm_folded")
    assert not folded.gated
    call = folded.make(gate.problem)
    assert call.leaves["u"].shape == (3, 12, 2048) and "cost only" in call.setting
    assert len(call.ready("both")()) == 7


def spoiled(name, change):
    """Our scan with one of its results changed."""

    def make(problem):
        call = provider("selective_scan", "torch").make(problem)
        call.restore = lambda found, x: change(x) if found == name else x
        return call

    return make


def one_value(x):
    x = x.clone(memory_format=torch.contiguous_format)
    x.view(-1)[-1] += 0.01 * x.abs().max()
    return x


@pytest.mark.parametrize("change", (one_value, lambda x: x * 1.001, torch.zeros_like))
@pytest.mark.parametrize("name", ("y", "du", "ddelta", "dA", "dB", "dC", "dD", "ddelta_bias"))
def test_gate_refuses_any_wrong_result(name, change):
    gate = Gate("selective_scan", TINY, 8, torch.float32, "cpu")
    with pytest.raises(Wrong, match=f"^{name} is off by .*, allowed "):
        gate.check(spoiled(name, change)(gate.problem), True)


def test_gate_refuses_nan():
    gate = Gate("conv1d_silu", TINY, 2, torch.float32, "cpu")
    call = provider("conv1d_silu", "torch").make(gate.problem)
    call.restore = lambda name, x: x * float("nan")
    with pytest.raises(Wrong, match="y is off by nan"):
        gate.check(call, False)


def test_gate_refuses_a_bias_that_enters_once():
    """What the published mixer would be with one of its two biases lost."""
    gate = Gate("mixer", TINY, 4, torch.bfloat16, "cpu")
    half = {**gate.problem.tensors, "delta_bias": gate.problem.tensors["delta_bias"] / 2}
    wrong = replace(gate.problem, tensors=half)
    with pytest.raises(Wrong, match="y is off"):
        gate.check(provider("mixer", "torch").make(wrong), False)


# Rows of providers that are wrong, fail, or are not there


def rows_of(op, made, directions=_operators.DIRECTIONS, batch=2):
    cases = [
        _operators.Case(op, TINY, batch, torch.float32, made, direction, "cpu")
        for direction in directions
    ]
    return {case.direction: row for case, row in _operators.measure(cases, 1.0)}


def test_an_unchecked_provider_that_fails_is_reported():
    def make(problem):
        call = provider("conv1d_silu", "torch").make(problem)
        call.dy = call.dy[:1]
        return call

    rows = rows_of("conv1d_silu", providers.Provider("bad", make, gated=False))
    assert [rows[d]["status"] for d in _operators.DIRECTIONS] == ["ok", "failed", "failed"]


def is_without_times(row):
    return not any(row[name] for name in (*_operators.MEASURED, *_operators.COMPUTED))


def test_a_wrong_provider_gets_no_time():
    rows = rows_of("selective_scan", providers.Provider("bad", spoiled("y", torch.zeros_like)))
    for row in rows.values():
        assert row["status"] == "wrong" and row["reason"].startswith("y is off by 1.0e+00")
        assert is_without_times(row)


def test_a_wrong_gradient_leaves_the_forward_pass_its_time():
    rows = rows_of("selective_scan", providers.Provider("bad", spoiled("dC", torch.zeros_like)))
    assert rows["forward"]["status"] == "ok" and rows["forward"]["eager_us"]
    for direction in ("backward", "both"):
        assert rows[direction]["status"] == "wrong" and "dC" in rows[direction]["reason"]
        assert is_without_times(rows[direction])


def test_a_failing_provider_is_reported():
    def fails(problem):
        raise ValueError("out of luck\nsecond line")

    for row in rows_of("mixer", providers.Provider("bad", fails)).values():
        assert row["status"] == "failed" and row["reason"] == "ValueError: out of luck"
        assert is_without_times(row)


def test_a_failing_backward_leaves_the_forward_pass_its_time():
    def make(problem):
        call = provider("conv1d_silu", "torch").make(problem)
        call.dy = call.dy[:1]
        return call

    rows = rows_of("conv1d_silu", providers.Provider("bad", make))
    assert rows["forward"]["status"] == "ok"
    assert rows["backward"]["status"] == rows["both"]["status"] == "failed"
    assert rows["both"]["reason"].startswith("RuntimeError: ")


def test_what_this_machine_lacks_is_said():
    if not torch.cuda.is_available():
        for row in rows_of("mixer", provider("mixer", "triton")).values():
            assert row["status"] == "unavailable"
            assert row["reason"] == "the Triton kernels need a GPU, the tensors are on cpu"
    with pytest.raises(Unavailable, match="compiling unrolls a loop over time"):
        problem = Gate("mixer", TINY, 2, torch.float32, "cpu").problem
        providers._eager_mixer(problem, loop=True, compiled=True)


def test_right_rows_have_times_and_memory():
    rows = rows_of("selective_scan", provider("selective_scan", "torch"), batch=4)
    for direction, row in rows.items():
        assert row["status"] == "ok" and row["reason"] is None and len(row["eager_us"]) == 3
        # Both keep u and delta, 4 bytes a number, at the least.
        kept = row["saved_bytes"]
        assert kept is None if direction == "forward" else kept > 2 * 4 * 4 * 13 * 12
    size = {"op": "selective_scan", "batch": 4, "seqlen": 13, "dim": 12, "dtype": "float32"}
    assert {name: rows["both"][name] for name in size} == size


def test_backward_alone_is_repeatable():
    problem = Gate("mixer_module", TINY, 2, torch.float32, "cpu").problem
    for name in ("torch", "eager"):
        run = provider("mixer_module", name).make(problem).ready("backward")
        for first, second in zip(run(), run(), strict=True):
            torch.testing.assert_close(first, second, rtol=0, atol=0)


# The plan


def test_slow_providers_are_measured_once_unless_asked_for(mamba_ssm):
    benchmark = bench_mixer.BENCHMARK
    cases = benchmark.cases("cuda")
    for name in ("torch", "reference", "compiled", "eager_loop"):
        sizes = {(c.shape, c.batch) for c in cases if c.provider.name == name}
        assert sizes == {GPU_SIZES[0]}, name
    for name in ("triton", "eager"):
        assert len({(c.shape, c.batch) for c in cases if c.provider.name == name}) == len(GPU_SIZES)
    asked = benchmark.cases("cuda", providers=["reference"])
    assert {(c.shape, c.batch) for c in asked} == set(GPU_SIZES)


def test_padding_only_where_there_is_something_to_pad():
    cases = bench_selective_scan.BENCHMARK.cases("cuda", providers=["mamba_ssm_padded"])
    assert {c.shape.seqlen for c in cases} == {49, 64, 196}
    folded = bench_selective_scan.BENCHMARK.cases("cuda", providers=["mamba_ssm_folded"])
    assert all(c.batch * c.shape.seqlen >= 2048 for c in folded) and folded


def test_shapes_are_those_of_the_models():
    with torch.device("meta"):
        from mambavision import MambaVisionMixer, create_model

        for variant, name in (("T", "T"), ("L3-256", "L3_256_21k"), ("L2-512", "L2_512_21k")):
            model = create_model(f"mamba_vision_{name}")
            widths = {m.D.numel(): m for m in model.modules() if isinstance(m, MambaVisionMixer)}
            for shape in (SHAPES[f"{variant}-s3"], SHAPES[f"{variant}-s4"]):
                mixer = widths[shape.dim]
                assert mixer.dt_rank == shape.dt_rank and mixer.d_model == shape.d_model
                assert mixer.A_log.shape[1] == shape.dstate
                assert mixer.conv1d_x.weight.shape[-1] == shape.width


def test_table_has_ratios_to_ours():
    def row(name, us, **more):
        return {
            "op": "selective_scan", "provider": name, "label": "T stage 3", "batch": 128,
            "seqlen": 196, "dim": 160, "dtype": "float16", "direction": "forward",
            "kernel_us": us and [us, us, us], "eager_us": us and [9 * us] * 3, "status": "ok",
            **more,
        }  # fmt: skip

    text = _operators.table([row("triton", 20.0), row("mamba_ssm", 130.0), row("x", None)])
    assert "| triton | mamba_ssm | x |" in text
    assert "| 20 us, 1.00x | 130 us, 6.50x | ok |" in text
    text = _operators.table([row("triton", None, status="wrong"), row("torch", 2000.0)])
    assert "| wrong | 2 ms, 1.00x |" in text


# Commands


@pytest.mark.parametrize("op", SCRIPTS)
def test_a_run_on_the_cpu_ends_with_rows(op, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    output = tmp_path / "rows.jsonl"
    arguments = ["--device", "cpu", "--shapes", "tiny", "--batch", "2", "--budget-ms", "1"]
    arguments += ["--providers", "torch", "eager", "reference", "triton", "--output", str(output)]
    assert SCRIPTS[op].BENCHMARK.main([*arguments, "--list"]) == 0 and not output.exists()
    planned = capsys.readouterr().out.splitlines()
    for runs in (1, 2):
        assert SCRIPTS[op].BENCHMARK.main(arguments) == 0
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        assert len(rows) == runs * len(planned)
    out = capsys.readouterr().out
    assert "kernel_us, graph_us" in out and f"{op}, median time of the call" in out
    for row in rows:
        assert row["op"].startswith(op) and row["label"] == "tiny" and row["threads"] > 0
        assert row["commit"] and row["torch"] == torch.__version__
        if row["provider"] == "triton":
            assert row["status"] == "unavailable" and row["eager_us"] is None
        else:
            assert row["status"] == "ok" and row["eager_us"] and row["kernel_us"] is None, row


WRONG = {
    "provider": (["--providers", "mamba"], "--providers: invalid choice: 'mamba'"),
    "shape": (["--shapes", "T-s9"], "--shapes: invalid choice: 'T-s9'"),
    "device": (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
    "dtype": (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
    "batch": (["--batch", "0"], "--batch: expected an integer above 0, got '0'"),
    "budget": (["--budget-ms", "-1"], "--budget-ms: expected a number above 0, got '-1'"),
    "nothing": (
        ["--device", "cpu", "--providers", "mamba_ssm_folded", "--batch", "1"],
        "nothing to measure",
    ),
    "output": (
        [*"--device cpu --providers triton --batch 1 --output /dev/null/rows".split()],
        "--output: ",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_asked_for_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_selective_scan.BENCHMARK.main(arguments)
    lines = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert stopped.value.code == 2 and len(lines) == 1 and message in lines[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_mixer.BENCHMARK.main(["--device", "cuda"])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and len(err.splitlines()) == 1
    assert "--device cuda: PyTorch finds no GPU here" in err


def test_ctrl_c_leaves_whole_rows(tmp_path):
    output = tmp_path / "rows.jsonl"
    process = subprocess.Popen(
        [
            sys.executable, ROOT / "benchmarks" / "bench_selective_scan.py", "--device", "cpu",
            "--shapes", "T-s4", "--threads", "1", "--budget-ms", "2000", "--output", output,
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    end = time.time() + 60
    while not (output.exists() and "torch" in output.read_text()) and time.time() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "rows are in" in err and "Traceback" not in err
    text = output.read_text()
    assert text.endswith("\n") and all(json.loads(line)["op"] for line in text.splitlines())


def test_the_same_cases_under_pytest_benchmark():
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    found = subprocess.run(
        [
            sys.executable, "-m", "pytest", "benchmarks/bench_conv1d_silu.py", "-q",
            "-p", "no:cacheprovider", "--benchmark-disable", "-k", "b1-float32-torch or triton",
        ],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert found.returncode == 0, found.stdout
    assert "3 passed, 6 skipped" in found.stdout and "need a GPU" in found.stdout


def test_launch_configs_are_providers():
    """Every configuration beside the shipped one, at every size asked for; a GPU that is not there
    is named."""
    script = [sys.executable, str(ROOT / "benchmarks" / "launch_configs.py")]
    asked = [*script, "--shapes", "T-s3", "B-s3", "--batch", "8", "--list"]
    listed = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(listed) == 2 * 9 and len(set(listed)) == 18
    assert listed[0].endswith("-triton-forward")
    assert "7 or 4 steps, 32x4, 2 lanes, 16 pieces" in listed[8]
    if not torch.cuda.is_available():
        done = subprocess.run([*script, "--device", "cuda"], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no GPU" in done.stderr

"""Times, memory, the machine, and rows that are written whole.

Three times of a function, each as [median, 20th, 80th percentile] in microseconds:

    kernel_us   between two CUDA events around its kernels. Before each, the L2 cache is filled with
                other data, and the GPU is kept busy until the host has enqueued everything, so that
                neither a warm cache nor the speed of Python is in it. What remains beside the
                kernels, an event and the gaps between kernels, is about two microseconds.
    eager_us    on the host's clock: one call and a synchronization, launches included.
    graph_us    on the host's clock: one replay of a CUDA graph of it and a synchronization.

On a CPU there is eager_us alone; what was not measured is None. A row is one JSON object on one
line of a file that is only ever appended to.
"""

import json
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "append", "file_name", "machine", "measure", "measure_in_turns", "percentiles", "reason",
    "saved_bytes",
]  # fmt: skip

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[[], Any]

COLUMNS = ("kernel_us", "eager_us", "graph_us", "graph_reason", "peak_bytes")
FEWEST, MOST = 3, 200
# Longest that the GPU is kept busy before a call. A call that takes longer to enqueue (a loop over
# time in Python) is bound by its launches, and more launches than the driver's queue holds, about a
# thousand, cannot be waiting anyway.
LONGEST_WAIT_US = 10_000
# Cycles per microsecond, the highest of any GPU so far: waits come out too long, never too short.
CYCLES_PER_US = 2_700


def percentiles(values: Sequence[float]) -> list[float]:
    """[median, 20th, 80th percentile], interpolated between neighbours."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    return [round(at(share), 3) for share in (0.5, 0.2, 0.8)]


def reason(error: BaseException) -> str:
    """The first line of an error."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {first}"[:200] if first else type(error).__name__


def _wall(run: Run, budget_ms: float) -> list[float]:
    times: list[float] = []
    end = time.perf_counter() + budget_ms / 1e3
    while len(times) < FEWEST or (len(times) < MOST and time.perf_counter() < end):
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - start))
    return percentiles(times)


@cache
def _other_data(device: torch.device) -> Tensor:
    """Twice what the L2 cache holds."""
    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 2**26
    return torch.zeros(2 * size // 4, dtype=torch.int32, device=device)


def _enqueue_us(run: Run) -> float:
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(1e6 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return sorted(times)[1]


def _kernels(run: Run, device: torch.device, budget_ms: float) -> list[float]:
    other = _other_data(device)
    wait = int(CYCLES_PER_US * min(20 + 1.5 * _enqueue_us(run), LONGEST_WAIT_US))

    def once() -> tuple[Any, Any]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Reading evicts what was there and leaves nothing that has to be written back later.
        other.amax()
        torch.cuda._sleep(wait)
        start.record()
        run()
        end.record()
        return start, end

    once()
    torch.cuda.synchronize()
    began = time.perf_counter()
    once()
    torch.cuda.synchronize()
    each_ms = 1e3 * (time.perf_counter() - began)
    events = [once() for _ in range(int(min(MOST, max(FEWEST, budget_ms / each_ms))))]
    torch.cuda.synchronize()
    return percentiles([1e3 * start.elapsed_time(end) for start, end in events])


def _refuse_waiting(run: Run) -> None:
    """Raises where a call waits for the GPU: capturing that would spoil the context."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _graph(run: Run, budget_ms: float) -> list[float]:
    # A backward pass runs on the stream of its forward pass, so the caller's stream is captured
    # wherever it can be.
    stream = torch.cuda.current_stream()
    if stream == torch.cuda.default_stream():
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        run()
        _refuse_waiting(run)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            run()
        graph.replay()
        torch.cuda.synchronize()
        return _wall(graph.replay, budget_ms)
    finally:
        del graph
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _peak_bytes(run: Run) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(run: Run, device: str, budget_ms: float = 100.0, *, graph: bool = True) -> dict:
    """The measured columns of a row: times, peak memory, the budget they were given.

    Each of the times gets `budget_ms`, three calls at least and two hundred at most, after a call
    that is not timed. `peak_bytes` is the most that a call allocates beyond what was there before
    it. Where a CUDA graph cannot be made, `graph_us` is None and `graph_reason` says why; one of a
    backward pass alone can be made only on a stream other than the default, on which the forward
    pass ran, too.

    >>> measure(lambda: torch.ones(9).sum(), "cpu", 1.0)["kernel_us"] is None
    True
    """
    where = torch.device(device)
    if where.type != "cuda":
        return measure_in_turns([run], budget_ms)[0]
    found: dict[str, Any] = {**dict.fromkeys(COLUMNS), "budget_ms": budget_ms}
    run()
    with torch.cuda.device(where):
        torch.cuda.synchronize()
        found["kernel_us"] = _kernels(run, where, budget_ms)
        found["eager_us"] = _wall(run, budget_ms)
        found["peak_bytes"] = _peak_bytes(run)
        if graph:
            try:
                found["graph_us"] = _graph(run, budget_ms)
            except RuntimeError as error:
                found["graph_reason"] = reason(error)
    return found


def measure_in_turns(runs: Sequence[Run], budget_ms: float) -> list[dict]:
    """`measure` of several functions on a CPU, where what else the machine does should meet all
    alike: after a call each that is not timed they take turns until their budgets are spent."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    end = time.perf_counter() + len(runs) * budget_ms / 1e3
    turns = 0
    while turns < FEWEST or (turns < MOST and time.perf_counter() < end):
        for run, own in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            own.append(1e6 * (time.perf_counter() - start))
        turns += 1
    return [
        {**dict.fromkeys(COLUMNS), "budget_ms": budget_ms, "eager_us": percentiles(own)}
        for own in times
    ]


def saved_bytes(run: Callable[[], Any], parameters: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages that `run`, a forward pass, keeps for its backward pass.

    Each storage counts once and whole, however many views of it are kept; those of `parameters`,
    which live on anyway, do not count.
    """
    apart = {x.untyped_storage().data_ptr() for x in parameters}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        # Held until counted: a freed storage's address could be given to another.
        kept.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = run()
    total = sum(x.untyped_storage().nbytes() for at, x in kept.items() if at not in apart)
    del result
    return total


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else platform.processor() or platform.machine()


@cache
def _unchanging() -> dict[str, Any]:
    status = _output("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": _version("triton"),
        "mamba_ssm": _version("mamba-ssm") or _mamba_ssm_by_path(),
        "timm": _version("timm"),
        "commit": _output("git", "rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


def _mamba_ssm_by_path() -> str | None:
    """The version of a mamba-ssm that was put on the path without being installed."""
    for folder in sys.path:
        try:
            text = Path(folder, "mamba_ssm", "__init__.py").read_text(encoding="utf-8")
        except OSError:
            continue
        found = re.search(r'^__version__ = "(.+)"', text, re.MULTILINE)
        return found.group(1) if found else "unknown"
    return None


@cache
def _driver() -> str | None:
    text = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return text.splitlines()[0] if text else None


def machine(device: str = "auto") -> dict[str, Any]:
    """What every row says about where and with what it was measured; "auto" prefers the GPU."""
    gpu = device != "cpu" and torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name(None if device == "auto" else device) if gpu else None,
        "driver": _driver() if gpu else None,
        **_unchanging(),
        "threads": torch.get_num_threads(),
        "tf32": {
            "matmul": torch.backends.cuda.matmul.allow_tf32,
            "cudnn": torch.backends.cudnn.allow_tf32,
        },
    }


def file_name(where: dict[str, Any] | None = None, op: str | None = None) -> str:
    """What the file of an op's rows, or of all rows, from a machine is called."""
    where = machine() if where is None else where
    name = where["gpu"] or f"{where['cpu']} {where['threads']} threads"
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return f"{op}_{slug}.jsonl" if op else f"{slug}.jsonl"


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds a row, with the time of day, as one line in one write; OSError leaves no part of it."""
    stamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
    line = (json.dumps({**row, "time": stamp}, allow_nan=False) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        before = os.fstat(file).st_size
        written = os.write(file, line)
        if written < len(line):
            os.ftruncate(file, before)
            raise OSError(f"{path}: no room for a row of {len(line)} bytes")
        os.fsync(file)
    finally:
        os.close(file)

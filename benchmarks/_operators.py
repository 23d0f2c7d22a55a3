"""What the benchmarks of operators share: the plan, the rows, the table, the command."""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

import _measure
import roofline
import torch
from gate import Gate
from models import Unavailable
from problems import Call
from providers import PROVIDERS, Provider
from shapes import CPU_SIZES, GPU_SIZES, SHAPES, Shape
from tqdm import tqdm
from ways import Wrong

__all__ = [
    "Benchmark", "Case", "Prepared", "device_here", "measure", "own_stream", "table",
]  # fmt: skip

RESULTS = Path(__file__).resolve().parent / "results"
DIRECTIONS = ("forward", "backward", "both")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MEASURED = ("kernel_us", "eager_us", "graph_us", "peak_bytes", "graph_reason", "saved_bytes")
COMPUTED = ("bytes_min", "floor_us", "share_of_floor", "gb_per_s")
NEEDS_GPU = (
    "No GPU: eager_us and saved_bytes are measured; kernel_us, graph_us, peak_bytes, floor_us, "
    "share_of_floor and gb_per_s need one, and so do triton and mamba_ssm."
)


def device_here() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """One row to measure."""

    op: str
    shape: Shape
    batch: int
    dtype: torch.dtype
    provider: Provider
    direction: str
    device: str

    def __str__(self) -> str:
        size = f"{self.shape.name}-b{self.batch}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op}-{size}-{dtype}-{self.provider.name}-{self.direction}"

    @property
    def size(self) -> tuple:
        """Cases of one size share a gate."""
        return self.op, self.shape, self.batch, self.dtype, self.device

    def describe(self) -> dict[str, Any]:
        shape = self.shape
        return {
            "op": self.op,
            "provider": self.provider.name,
            "label": shape.label,
            "batch": self.batch,
            "seqlen": shape.seqlen,
            "dim": shape.dim,
            "dstate": shape.dstate if self.op != "conv1d_silu" else None,
            "dtype": str(self.dtype).removeprefix("torch."),
            "direction": self.direction,
            "setting": None,
        }

    def against_floor(self, gpu: str | None, kernel_us: list[float] | None) -> dict[str, Any]:
        """The least bytes and time of this shape on a GPU, and what of them was reached."""
        found: dict[str, Any] = dict.fromkeys(COMPUTED)
        device = roofline.device_named(gpu)
        shape = self.shape
        least = roofline.floor(
            # The bytes are the same on any.
            device or roofline.DEVICES[0], self.op, self.direction, self.batch, shape.seqlen,
            shape.dim, shape.dstate, self.dtype.itemsize,
        )  # fmt: skip
        found["bytes_min"] = round(least.bytes)
        if kernel_us:
            found["gb_per_s"] = round(least.bytes / kernel_us[0] / 1e3, 1)
        if device:
            found["floor_us"] = round(least.us, 3)
        if device and kernel_us:
            found["share_of_floor"] = round(least.us / kernel_us[0], 4)
        return found


def _unmeasured(error: Exception) -> dict[str, Any]:
    """The columns of a case that has no times, with why."""
    status = {Unavailable: "unavailable", Wrong: "wrong"}.get(type(error), "failed")
    why = _measure.reason(error)
    if status != "failed":
        why = why.removeprefix(f"{type(error).__name__}: ")
    return {**dict.fromkeys((*MEASURED, *COMPUTED)), "status": status, "reason": why}


def own_stream(device: str) -> AbstractContextManager:
    # The CUDA graph of a backward pass needs its forward pass on a stream that can be captured.
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext()


class Prepared:
    """One provider's call at one size; what it gets wrong, and why it cannot be measured."""

    def __init__(self, provider: Provider, gate: Gate):
        self.gate, self.provider = gate, provider
        self.call: Call | None = None
        self.errors: dict[bool, Exception | None] = {}
        try:
            self.call = provider.make(gate.problem)
        except Exception as error:
            self.errors = {False: error, True: error}

    def checked(self, direction: str) -> Call:
        """The call, after the gate; raises what making, checking or running it raised."""
        for gradients in (False, True)[: 1 if direction == "forward" else 2]:
            if gradients not in self.errors:
                self.errors[gradients] = self._error(gradients)
            if (error := self.errors[gradients]) is not None:
                raise error
        assert self.call is not None
        return self.call

    def _error(self, gradients: bool) -> Exception | None:
        if not self.provider.gated:
            return None
        assert self.call is not None
        try:
            self.gate.check(self.call, gradients)
        except Exception as error:
            return error
        return None


def _row(case: Case, call: Call, found: dict[str, Any]) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if case.device == "cuda" else None
    saved = None
    if case.direction != "forward" and case.provider.name != "reference":
        saved = _measure.saved_bytes(call.function, call.parameters)
    return {
        **case.describe(),
        **found,
        "saved_bytes": saved,
        **case.against_floor(gpu, found["kernel_us"]),
        "setting": call.setting,
        "status": "ok",
        "reason": None,
    }


Found = tuple[Case, dict[str, Any]]


def _in_turns(waiting: Sequence[tuple[Case, Call]], budget_ms: float) -> Iterator[Found]:
    able, runs = [], []
    for case, call in waiting:
        try:
            run = call.ready(case.direction)
            run()
        except Exception as error:
            yield case, {**case.describe(), **_unmeasured(error)}
        else:
            able.append((case, call))
            runs.append(run)
    times = _measure.measure_in_turns(runs, budget_ms)
    for (case, call), found in zip(able, times, strict=True):
        yield case, _row(case, call, found)


def measure(cases: Iterable[Case], budget_ms: float) -> Iterator[Found]:
    """Each case with its row, but for what `_measure.machine` says, as soon as it is known.

    On a CPU the providers of one size take turns.
    """
    for _, of_size in groupby(cases, key=lambda case: case.size):
        gate: Gate | None = None
        waiting: dict[str, list[tuple[Case, Call]]] = {}
        for _, own in groupby(of_size, key=lambda case: case.provider):
            prepared: Prepared | None = None
            for case in own:
                try:
                    gate = gate or Gate(*case.size)
                    prepared = prepared or Prepared(case.provider, gate)
                    call = prepared.checked(case.direction)
                    if case.device == "cpu":
                        waiting.setdefault(case.direction, []).append((case, call))
                        continue
                    run = call.ready(case.direction)
                    found = _measure.measure(run, case.device, budget_ms)
                    row = _row(case, call, found)
                except Exception as error:
                    row = {**case.describe(), **_unmeasured(error)}
                yield case, row
        for together in waiting.values():
            yield from _in_turns(together, budget_ms)


def _time(us: float) -> str:
    return f"{us:.3g} us" if us < 1e3 else f"{us / 1e3:.3g} ms"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, one table per operator: medians by provider, each with its ratio to ours.

    Times are those of the kernels where they were measured, else of the call. The ratio is to the
    first of triton and torch that has a time.
    """
    lines: list[str] = []
    for op in dict.fromkeys(row["op"] for row in rows):
        here = [row for row in rows if row["op"] == op]
        names = list(dict.fromkeys(row["provider"] for row in here))
        kind = "kernel" if any(row["kernel_us"] for row in here) else "call"
        lines += ["", f"{op}, median time of the {kind}, and its ratio to ours", ""]
        lines += ["| shape | batch | dtype | direction | " + " | ".join(names) + " |"]
        lines += ["|" + " --- |" * (4 + len(names))]
        sizes: dict[tuple, dict[str, dict]] = {}
        for row in here:
            key = (f"{row['label']}, {row['seqlen']} x {row['dim']}", row["batch"], row["dtype"])
            sizes.setdefault((*key, row["direction"]), {})[row["provider"]] = row
        for key, by_name in sizes.items():
            medians = {
                name: (row["kernel_us"] or row["eager_us"] or [None])[0]
                for name, row in by_name.items()
            }
            ours = next((medians[n] for n in ("triton", "torch") if medians.get(n)), None)
            cells = []
            for name in names:
                us = medians.get(name)
                if us is None:
                    cells.append(by_name[name]["status"] if name in by_name else "")
                else:
                    cells.append(_time(us) + (f", {us / ours:.2f}x" if ours else ""))
            lines.append("| " + " | ".join([*map(str, key), *cells]) + " |")
    return "\n".join(lines).strip()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer above 0, got {text!r}")
    return int(text)


@dataclass(frozen=True)
class Benchmark:
    """A script: the operators that it measures."""

    ops: Sequence[str]
    doc: str

    def cases(
        self,
        device: str,
        sizes: Sequence[tuple[Shape, int]] | None = None,
        providers: Sequence[str] | None = None,
        dtypes: Sequence[torch.dtype] | None = None,
        directions: Sequence[str] = DIRECTIONS,
    ) -> list[Case]:
        """What is measured, in that order; None is what this device gets by default."""
        gpu = device == "cuda"
        default = GPU_SIZES if gpu else CPU_SIZES
        sizes = sizes or default
        return [
            Case(op, shape, batch, dtype, provider, direction, device)
            for op in self.ops
            for shape, batch in sizes
            for dtype in dtypes or [torch.float16 if gpu else torch.float32]
            for provider in PROVIDERS[op]
            if provider.name in (providers or [provider.name])
            and provider.applies(shape, batch, device)
            and (providers or not gpu or (shape, batch) == sizes[0] or not provider.slow(device))
            for direction in directions
        ]

    def _parser(self) -> argparse.ArgumentParser:
        parser = _Parser(
            description=self.doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog="Rows are appended; the columns are explained in benchmarks/README.md. A wrong, "
            "failed or unavailable\nprovider has a row that says why. Exit codes: 0, 2 for what "
            "cannot be asked for, 130 after Ctrl-C.\n\nexample: %(prog)s --shapes T-s3 L-s3 "
            "--providers triton eager --direction forward",
        )
        names = list(dict.fromkeys(p.name for op in self.ops for p in PROVIDERS[op]))
        add = parser.add_argument
        if len(self.ops) > 1:
            add("--ops", nargs="+", choices=self.ops, default=self.ops, help="default: all")
        add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
        add(
            "--shapes", nargs="+", metavar="SHAPE", choices=SHAPES,
            help=f"variant and stage, of {' '.join(SHAPES)} (default: all; on a CPU T-s3)",
        )  # fmt: skip
        add(
            "--batch", nargs="+", type=_count,
            help="sequences (default: 128, and 1 8 32 256 for T-s3; on a CPU 1 8)",
        )  # fmt: skip
        add(
            "--providers", nargs="+", metavar="NAME", choices=names,
            help=f"of {' '.join(names)} (default: all, the slow ones at the first shape only)",
        )  # fmt: skip
        add("--dtype", nargs="+", choices=DTYPES, help="default: float16; on a CPU float32")
        add("--direction", nargs="+", choices=DIRECTIONS, default=DIRECTIONS, help="default: all")
        add("--budget-ms", type=_positive, help="for each time (default: 40; on a CPU 400)")
        add("--threads", type=_count, help="of PyTorch, on a CPU (default: PyTorch's choice)")
        add("--output", type=Path, help="file that rows are appended to (default: in results/)")
        add("--list", action="store_true", help="print one line per row, measure nothing")
        return parser

    def _plan(self, parser: argparse.ArgumentParser, given: argparse.Namespace) -> list[Case]:
        device = device_here() if given.device == "auto" else given.device
        if device == "cuda" and device_here() != "cuda":
            parser.error("--device cuda: PyTorch finds no GPU here")
        sizes = None
        if given.shapes or given.batch:
            default = GPU_SIZES if device == "cuda" else CPU_SIZES
            shapes = [SHAPES[n] for n in given.shapes or dict.fromkeys(s.name for s, _ in default)]
            batches = given.batch or ([128] if device == "cuda" else [1, 8])
            sizes = [(shape, batch) for shape in shapes for batch in batches]
        ops = getattr(given, "ops", self.ops)
        dtypes = [DTYPES[name] for name in given.dtype] if given.dtype else None
        cases = Benchmark(ops, "").cases(device, sizes, given.providers, dtypes, given.direction)
        if not cases:
            parser.error("nothing to measure: these providers do not apply at these sizes")
        return cases

    def main(self, arguments: Sequence[str] | None = None) -> int:
        parser = self._parser()
        given = parser.parse_args(arguments)
        cases = self._plan(parser, given)
        if given.list:
            print(*cases, sep="\n")
            return 0
        if given.threads:
            torch.set_num_threads(given.threads)
        device = cases[0].device
        if device == "cpu":
            print(NEEDS_GPU)
        where = _measure.machine(device)
        output = given.output or RESULTS / _measure.file_name(where, self.ops[0])
        budget_ms = given.budget_ms or (40.0 if device == "cuda" else 400.0)
        rows: list[dict[str, Any]] = []
        said: set[str] = set()
        try:
            found = measure(cases, budget_ms)
            with own_stream(device), tqdm(found, total=len(cases), unit="row") as bar:
                for case, row in bar:
                    _measure.append(output, {**row, **where})
                    rows.append(row)
                    about = case.provider.name if row["status"] == "unavailable" else str(case)
                    line = f"{about}: {row['status']}: {row['reason']}"
                    if row["status"] != "ok" and line not in said:
                        said.add(line)
                        bar.write(line)
        except KeyboardInterrupt:
            print(f"stopped; {len(rows)} rows are in {output}", file=sys.stderr)
            return 130
        except OSError as error:
            parser.error(f"--output: {error}")
        print(table(rows))
        print(f"\n{len(rows)} rows in {output}")
        return 0

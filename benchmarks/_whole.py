"""What the benchmarks of whole models share: options, cases, rows, the command."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import _measure
import torch
from models import Unavailable
from ways import Way, Wrong
from zoo import Model, pick

__all__ = ["Benchmark", "Case", "Options", "Prepared", "by_model", "results", "unmeasured"]

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    device: str
    models: Sequence[Model]
    providers: Sequence[str]
    dtypes: Sequence[torch.dtype]
    batches: Sequence[int]
    resolution: int
    budget_ms: float

    def images(self, case: "Case", batch: int) -> torch.Tensor:
        """Random images in the case's dtype and layout."""
        draw = torch.Generator().manual_seed(1)
        images = torch.randn(batch, 3, self.resolution, self.resolution, generator=draw)
        return images.to(device=self.device, dtype=case.dtype, memory_format=case.way.layout)


@dataclass(frozen=True)
class Case:
    """One row to measure."""

    model: Model
    way: Way
    dtype: torch.dtype
    batch: int

    def provider(self, device: str) -> str:
        """The name in the rows: "ours" is the backend that the device gets."""
        ours = "torch" if device == "cpu" else "triton"
        return ours if self.way.provider == "ours" else self.way.provider

    def describe(self, op: str, direction: str, options: Options) -> dict[str, Any]:
        """What a row says about it."""
        return {
            "op": op,
            "provider": self.provider(options.device),
            "label": self.model.name,
            "batch": self.batch,
            "seqlen": None,
            "dim": None,
            "dstate": None,
            "dtype": str(self.dtype).removeprefix("torch."),
            "direction": direction,
            "resolution": options.resolution,
            "setting": self.way.setting,
        }


def by_model(cases: Sequence[Case]) -> dict[Model, list[Case]]:
    found: dict[Model, list[Case]] = {}
    for case in cases:
        found.setdefault(case.model, []).append(case)
    return found


# The measured part of a row; what whole models have no use for stays null.
MEASURED = dict.fromkeys(
    (
        "kernel_us", "eager_us", "graph_us", "peak_bytes", "saved_bytes", "bytes_min", "floor_us",
        "share_of_floor", "gb_per_s", "images_per_s",
    )
)  # fmt: skip


def unmeasured(error: Exception) -> dict[str, Any]:
    """The measured part of a row that has no times, for the reason that the error gives."""
    if isinstance(error, (Unavailable, Wrong)):
        status = "wrong" if isinstance(error, Wrong) else "unavailable"
        return {**MEASURED, "status": status, "reason": str(error)}
    return {**MEASURED, "status": "failed", "reason": _measure.reason(error)}


@dataclass(frozen=True)
class Prepared:
    """A case, checked and ready to run, and what its row says besides times."""

    case: Case
    run: Callable[[], Any]
    graph: bool = True
    saved_bytes: int | None = None

    def row(self, found: dict[str, Any]) -> dict[str, Any]:
        """The measured part of its row."""
        middle, low, high = found["eager_us"]
        images = [1e6 * self.case.batch / us for us in (middle, high, low)]
        known = {"saved_bytes": self.saved_bytes, "images_per_s": images}
        return {**MEASURED, **found, **known, "status": "ok", "reason": None}


Found = tuple[Case, dict[str, Any]]


def _in_turns(group: Sequence[Prepared], options: Options) -> Iterator[Found]:
    """Times on a CPU. The cases take turns, so that what else the machine does meets all alike."""
    running = []
    for one in group:
        try:
            one.run()
            running.append(one)
        except Exception as error:
            yield one.case, unmeasured(error)
    times: list[list[float]] = [[] for _ in running]
    end = time.perf_counter() + len(running) * options.budget_ms / 1e3
    while running and (len(times[0]) < _measure.FEWEST or time.perf_counter() < end):
        for one, own in zip(running, times, strict=True):
            start = time.perf_counter()
            one.run()
            own.append(1e6 * (time.perf_counter() - start))
    for one, own in zip(running, times, strict=True):
        found = {"eager_us": _measure.percentiles(own), "budget_ms": options.budget_ms}
        yield one.case, one.row(found)


def results(
    todo: Iterable[tuple[Case, Callable[[], Prepared]]], options: Options
) -> Iterator[Found]:
    """Measures what the second of each pair prepares, or says why that cannot be."""
    together: dict[tuple, list[Prepared]] = {}
    for case, prepare in todo:
        try:
            ready = prepare()
            if options.device == "cpu":
                together.setdefault((case.dtype, case.batch), []).append(ready)
                continue
            found = _measure.measure(
                ready.run, options.device, options.budget_ms, graph=ready.graph
            )
            row = ready.row(found)
            # Its memory is for the next one.
            del ready
            yield case, row
        except Exception as error:
            yield case, unmeasured(error)
    for group in together.values():
        yield from _in_turns(group, options)


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
    """A script: what it can measure, what it takes by default, and how.

    `measure` yields each case with the measured part of its row as soon as it is known.
    """

    op: str
    direction: str
    doc: str
    providers: Sequence[str]
    gpu_models: Sequence[str]
    gpu_batches: Sequence[int]
    cpu_models: Sequence[str]
    cpu_batches: Sequence[int]
    gpu_dtype: str
    cases: Callable[[Options], list[Case]]
    measure: Callable[[Sequence[Case], Options], Iterator[tuple[Case, dict[str, Any]]]]

    def _parser(self) -> argparse.ArgumentParser:
        parser = _Parser(
            description=self.doc, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        add = parser.add_argument
        gpu, cpu = " ".join(self.gpu_models), " ".join(self.cpu_models)
        add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
        add(
            "--models", nargs="+", metavar="NAME",
            help=f"names of zoo.py, default or all (default: {gpu}; on a CPU {cpu})",
        )  # fmt: skip
        add(
            "--providers", nargs="+", metavar="NAME", choices=self.providers,
            help=f"of {', '.join(self.providers)} (default: those that need not be asked for)",
        )  # fmt: skip
        gpu, cpu = (" ".join(map(str, x)) for x in (self.gpu_batches, self.cpu_batches))
        add("--batch", nargs="+", type=_count, help=f"default: {gpu}; on a CPU {cpu}")
        dtypes = f"default: {self.gpu_dtype}; on a CPU float32"
        add("--dtype", nargs="+", choices=DTYPES, help=dtypes)
        add("--resolution", type=_count, default=224, help="pixels of a side (default: 224)")
        add("--budget-ms", type=_positive, help="for each figure (default: 200; on a CPU 1500)")
        add("--threads", type=_count, help="of PyTorch, on a CPU (default: PyTorch's choice)")
        add("--output", type=Path, help="file that rows are appended to (default: in results/)")
        add("--list", action="store_true", help="print one line per row, measure nothing")
        return parser

    def options(self, parser: argparse.ArgumentParser, given: argparse.Namespace) -> Options:
        has_gpu = torch.cuda.is_available()
        if given.device == "cuda" and not has_gpu:
            parser.error("--device cuda: PyTorch finds no GPU here")
        if given.resolution < 32:
            parser.error(f"--resolution: must be at least 32, got {given.resolution}")
        gpu = has_gpu and given.device != "cpu"
        try:
            models = pick(given.models or list(self.gpu_models if gpu else self.cpu_models))
        except ValueError as error:
            parser.error(f"--models: {error}")
        return Options(
            device="cuda" if gpu else "cpu",
            models=models,
            providers=given.providers or (),
            dtypes=[DTYPES[name] for name in given.dtype or [self.gpu_dtype if gpu else "float32"]],
            batches=given.batch or (self.gpu_batches if gpu else self.cpu_batches),
            resolution=given.resolution,
            budget_ms=given.budget_ms or (200.0 if gpu else 1500.0),
        )

    def main(self, arguments: Sequence[str] | None = None) -> int:
        parser = self._parser()
        given = parser.parse_args(arguments)
        options = self.options(parser, given)
        cases = self.cases(options)
        if not cases:
            names = ", ".join(model.name for model in options.models)
            parser.error(f"nothing to measure: none of these providers runs {names}")
        if given.list:
            for case in cases:
                print(_line(case.describe(self.op, self.direction, options)))
            return 0
        if given.threads:
            torch.set_num_threads(given.threads)
        where = _measure.machine(options.device)
        output = given.output or RESULTS / _measure.file_name(where)
        try:
            for case, found in self.measure(cases, options):
                row = {**case.describe(self.op, self.direction, options), **found, **where}
                _measure.append(output, row)
                print(_line(row), flush=True)
        except KeyboardInterrupt:
            print(f"stopped; rows so far are in {output}", file=sys.stderr)
            return 130
        except OSError as error:
            parser.error(f"--output: {error}")
        return 0


def _line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    size = [row["dtype"], f"batch {row['batch']}", f"{row['resolution']} px"]
    cells = [row["op"], row["label"], row["provider"], row["setting"], *size]
    if row.get("images_per_s"):
        images, low, high = row["images_per_s"]
        cells.append(f"{images:.4g} images/s ({low:.4g} to {high:.4g})")
    elif "status" in row:
        cells.append(f"{row['status']}: {row['reason']}")
    return "  ".join(cells)

"""What the compiler says about every shipped kernel, on a machine that needs no GPU.

Triton compiles to machine code for a named target anywhere, and its wheel carries the
disassemblers. So registers, spills, shared memory, resident warps and the instructions of the step
loop are known before any GPU sees a kernel; one that spills or grows is caught on a laptop.

What is compiled is what is shipped: `launches.py` records the launches that the operators make.
`machine_code.py` reads what comes out.

Issue slots per (batch, step, channel) = warp instructions of the step loop x 32 lanes x warps /
elements that one iteration serves; a kernel that only adds up partial sums has none. A scheduler
issues one warp instruction per clock, so slots x elements / (32 x 4 x SMs x clock) is a floor under
the run time. A special-function result (MUFU) counts one slot here and eight against its own unit.
`useful` charges the same instructions to the channels that exist: with BLOCK_D 128, dim 160 pays
for 256.

    python benchmarks/static_report.py
    python benchmarks/static_report.py --target sm_90 --kernel scan --dtype float16
    python benchmarks/static_report.py --target sm_90 --kernel scan_fwd --set BLOCK_D=32
    python benchmarks/static_report.py --target sm_90 --json report.json
"""

import argparse
import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

# Interpreted functions cannot be compiled, and the choice is made while the kernels are imported.
os.environ.pop("TRITON_INTERPRET", None)
# This checkout's kernels, also where another copy of the package is installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import triton  # noqa: E402
from launches import DTYPES, Case, Launch, recorded_launches, shipped_cases  # noqa: E402
from machine_code import (  # noqa: E402
    OPCODE_CLASSES,
    narrow_offsets,
    opcode_class,
    sass_instructions,
    step_loop,
    unroll_factor,
)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, CompilationError  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402


@dataclass(frozen=True)
class Machine:
    """Limits of one multiprocessor (compute unit on AMD), from the vendors' occupancy tables."""

    gpu: GPUTarget
    warps: int  # resident at most
    programs: int  # resident at most
    shared: int  # bytes, of all resident programs together
    reserved: int = 1024  # bytes of shared memory that the system takes per program


MACHINES = {
    "sm_80": Machine(GPUTarget("cuda", 80, 32), warps=64, programs=32, shared=164 * 1024),
    "sm_90": Machine(GPUTarget("cuda", 90, 32), warps=64, programs=32, shared=228 * 1024),
    "sm_100": Machine(GPUTarget("cuda", 100, 32), warps=64, programs=32, shared=228 * 1024),
    "gfx942": Machine(
        GPUTarget("hip", "gfx942", 64), warps=32, programs=32, shared=64 * 1024, reserved=0
    ),
}


@dataclass(frozen=True)
class StaticResult:
    """What one launch compiles to on one target. Counts are of machine code, not of source."""

    target: str
    registers: int  # per lane (vector registers on AMD)
    scalar_registers: int  # AMD only
    spills: int  # bytes of local (private) memory per lane; our kernels use it for nothing else
    shared: int  # bytes per program
    resident_warps: int  # per multiprocessor
    compile_seconds: float  # close to 0 when Triton's disk cache had it
    loop_instructions: int = 0  # of the step loop, or of the whole kernel where it has no loop
    loop_steps_unrolled: int = 1  # iterations of the source that the machine code joined into one
    slots: float | None = None  # issue slots per element, where the kernel has a size of such
    opcodes: dict = field(default_factory=dict)  # full opcode -> count in the step loop
    mix: dict = field(default_factory=dict)  # class -> issue slots per element
    asm: dict = field(default_factory=dict, repr=False)  # ttir, ttgir, ptx, sass | amdgcn


class CompileFailure(RuntimeError):
    """A shipped kernel that Triton refuses; the interpreter accepts more than the compiler does."""


def resolve(function: str) -> JITFunction:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def compile_launch(launch: Launch, target: str):
    """The compiled kernel of one launch for one of MACHINES."""
    function = resolve(launch.function)
    position = {param.name: i for i, param in enumerate(function.params)}
    source = ASTSource(
        function,
        signature=launch.signature,
        constexprs={(position[name],): value for name, value in launch.constants.items()},
        attrs={(position[name],): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    try:
        return triton.compile(source, target=MACHINES[target].gpu, options=launch.options)
    except CompilationError as error:
        # Outermost first: the line of the kernel, of the helper it calls, ..., the reason.
        chain: list[BaseException] = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        reasons = "\n".join(str(link) for link in chain)
        what = f"{launch.function} does not compile for {target} with {launch.constants}"
        raise CompileFailure(f"{what}:\n{reasons}") from None


def compile_variant(launch: Launch, target: str) -> StaticResult:
    """Compile one launch for one of MACHINES and read the machine code."""
    machine = MACHINES[target]
    start = time.perf_counter()
    kernel = compile_launch(launch, target)
    seconds = time.perf_counter() - start
    texts = {
        k: v
        for k, v in kernel.asm.items()
        if isinstance(v, str) and k in ("ttir", "ttgir", "ptx", "amdgcn")
    }
    read = _read_cuda if machine.gpu.backend == "cuda" else _read_hip
    return replace(read(kernel, texts, launch, target), compile_seconds=round(seconds, 2))


def _read_cuda(kernel, texts: dict, launch: Launch, target: str) -> StaticResult:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _cuobjdump("-res-usage", cubin.name)
        texts["sass"] = _cuobjdump("-sass", cubin.name)
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    machine, num_warps = MACHINES[target], kernel.metadata.num_warps
    # Registers come in units of 256 per warp; each of the four schedulers owns 16,384.
    registers_per_warp = math.ceil(used["REG"] * 32 / 256) * 256
    by_registers = 4 * (16384 // registers_per_warp)
    shared = kernel.metadata.shared

    loop = step_loop(sass_instructions(texts["sass"]))
    unrolled = unroll_factor(loop, texts["ptx"])
    measured = {}
    if launch.block_sizes:
        slots_each = 32 * num_warps / (launch.elements * unrolled)
        mix = Counter(opcode_class(i.opcode) for i in loop)
        measured = {
            "slots": round(len(loop) * slots_each, 1),
            "mix": {name: round(mix[name] * slots_each, 2) for name in OPCODE_CLASSES if mix[name]},
        }
    return StaticResult(
        target=target,
        registers=used["REG"],
        scalar_registers=0,
        spills=used["STACK"] + used["LOCAL"],
        shared=shared,
        resident_warps=_resident(machine, num_warps, by_registers, shared),
        compile_seconds=0.0,
        loop_instructions=len(loop),
        loop_steps_unrolled=unrolled,
        opcodes=dict(Counter(i.opcode for i in loop).most_common()),
        asm=texts,
        **measured,
    )


def _read_hip(kernel, texts: dict, launch: Launch, target: str) -> StaticResult:
    text = texts["amdgcn"]

    def number(pattern: str) -> int:
        return max((int(value) for value in re.findall(pattern, text)), default=0)

    machine = MACHINES[target]
    shared = kernel.metadata.shared
    # The assembler prints waves per SIMD; a compute unit has four.
    by_registers = 4 * number(r"; Occupancy: (\d+)")
    return StaticResult(
        target=target,
        registers=number(r"\.vgpr_count:\s+(\d+)"),
        scalar_registers=number(r"\.sgpr_count:\s+(\d+)"),
        spills=number(r"\.private_segment_fixed_size:\s+(\d+)"),
        shared=shared,
        resident_warps=_resident(machine, kernel.metadata.num_warps, by_registers, shared),
        compile_seconds=0.0,
        asm=texts,
    )


def _resident(machine: Machine, num_warps: int, by_registers: int, shared: int) -> int:
    """Warps resident at once: whole programs, as many as the scarcest resource allows."""
    programs = min(machine.warps // num_warps, machine.programs, by_registers // num_warps)
    if per_program := math.ceil(shared / 128) * 128 + machine.reserved:
        programs = min(programs, machine.shared // per_program)
    return programs * num_warps


def _cuobjdump(*args: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), *args], check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Variant:
    """One row of the report before it is compiled: a launch and the case it came from."""

    case: Case
    launch: Launch
    target: str

    def row(self, result: StaticResult) -> dict:
        case, block_d = self.case, self.launch.constants.get("BLOCK_D")
        useful = math.ceil(case.dim / block_d) * block_d / case.dim if block_d else 1.0
        return {
            "op": case.op,
            "kernel": self.launch.name,
            "mode": " ".join(filter(None, [case.mode, self._training()])),
            **{name: getattr(case, name) for name in ("dtype", "batch", "seqlen", "dim", "dstate")},
            "grid": self.launch.grid,
            "constants": {
                k: v for k, v in self.launch.constants.items() if isinstance(v, int) and k.isupper()
            },
            "options": self.launch.options,
            **{k: v for k, v in asdict(result).items() if k != "asm"},
            "useful_slots": None if result.slots is None else round(result.slots * useful, 1),
            "axes": sorted(set(re.findall(r"tt\.get_program_id (\w)", result.asm["ttir"]))),
            "narrow_offsets": narrow_offsets(result.asm["ttir"], self.launch.block_sizes),
        }

    def _training(self) -> str:
        stores = self.launch.signature.get("states_ptr", "constexpr") != "constexpr"
        return "keeps states" if stores and "fwd" in self.launch.name else ""


def variants(
    cases: list[Case], targets: list[str], overrides: dict[str, int] | None = None
) -> list[Variant]:
    """Every launch of every case on every target; one code launched twice by a case is one row."""
    rows: dict[tuple, Variant] = {}
    for case in cases:
        with recorded_launches() as launches:
            case.call(case)
        for launch in launches:
            launch = launch.with_overrides(overrides or {})
            for target in targets:
                if case.shared <= MACHINES[target].shared - MACHINES[target].reserved:
                    rows[case, launch.key, target] = Variant(case, launch, target)
    return list(rows.values())


def compile_all(rows: list[Variant], jobs: int = 2, progress: bool = False) -> list[dict]:
    """Compile the rows in `jobs` processes, equal code once; one dict per row, in their order."""
    keys = [(row.launch.key, row.target) for row in rows]
    first = {key: row for key, row in reversed(list(zip(keys, rows, strict=True)))}
    results: dict[tuple, StaticResult] = {}
    with ProcessPoolExecutor(jobs) as pool:
        futures = {
            pool.submit(compile_variant, row.launch, row.target): key for key, row in first.items()
        }
        for future in _progress(as_completed(futures), len(futures), progress):
            try:
                results[futures[future]] = future.result()
            except CompileFailure:
                pool.shutdown(cancel_futures=True)
                raise
    return [row.row(results[key]) for key, row in zip(keys, rows, strict=True)]


def _progress(iterable, total: int, shown: bool):
    try:
        from tqdm import tqdm
    except ImportError:
        return iterable
    return tqdm(iterable, total=total, desc="compiling", unit="kernel", disable=not shown)


COLUMNS = [
    "dtype",
    "seqlen",
    "dim",
    "dstate",
    "BLOCK_D",
    "num_warps",
    "registers",
    "spills",
    "shared",
    "resident_warps",
    "compile_seconds",
]


def table(rows: list[dict]) -> str:
    """Markdown, one table per target; issue slots and mix only where the disassembly was read."""
    lines = []
    for target in dict.fromkeys(row["target"] for row in rows):
        of_target = [row for row in rows if row["target"] == target]
        classes = [name for name in OPCODE_CLASSES if any(name in row["mix"] for row in of_target)]
        head = ["op", "kernel", "mode", *COLUMNS]
        if classes:
            head += ["slots", "useful_slots", *classes]
        lines += [f"\n## {target}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for row in of_target:
            known = row | row["constants"] | row["options"] | row["mix"]
            cells = ("" if (x := known.get(name)) is None else str(x) for name in head)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_json(path: Path, rows: list[dict]) -> None:
    """Written beside FILE and moved over it: an interrupted run leaves no half-written file."""
    document = {"triton": triton.__version__, "torch": torch.__version__, "rows": rows}
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(document, indent=1) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _override(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    if not name or not value.lstrip("-").isdigit():
        raise argparse.ArgumentTypeError(f"expected NAME=INTEGER such as BLOCK_D=32, got {text!r}")
    return name, int(value)


def parser() -> argparse.ArgumentParser:
    description, _, examples = (__doc__ or "").partition("\n    python")
    result = argparse.ArgumentParser(
        description=description,
        epilog="examples:\n    python" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--target", nargs="+", choices=MACHINES, default=list(MACHINES), help="default: all four"
    )
    result.add_argument(
        "--kernel", default="", help="only operators or kernels whose name contains this"
    )
    result.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    result.add_argument(
        "--dim", nargs="+", type=int, help="only these channel counts of 160 320 392 512"
    )
    result.add_argument(
        "--set",
        nargs="+",
        type=_override,
        default=[],
        metavar="NAME=INTEGER",
        dest="overrides",
        help="another launch config than the shipped one: BLOCK_D=32 num_warps=2; flags stay",
    )
    result.add_argument("--jobs", type=int, default=2, help="compiling processes (default 2)")
    result.add_argument(
        "--json", type=Path, metavar="FILE", help="write all rows, with full opcode counts"
    )
    return result


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.json and not args.json.parent.is_dir():
        parser().error(f"--json: no such folder: {args.json.parent}")
    cases = [
        c for c in shipped_cases() if c.dtype in args.dtype and (not args.dim or c.dim in args.dim)
    ]
    rows = [
        v
        for v in variants(cases, args.target, dict(args.overrides))
        if args.kernel in f"{v.case.op} {v.launch.name}"
    ]
    if not rows:
        parser().error("no kernel matches")
    try:
        compiled = compile_all(rows, args.jobs, progress=sys.stderr.isatty())
    except CompileFailure as failure:
        print(failure, file=sys.stderr)
        return 1
    print(
        f"Triton {triton.__version__}, {len(compiled)} rows, issue slots per (batch, step, channel)"
    )
    print(table(compiled))
    if args.json:
        write_json(args.json, compiled)
        print(f"\n{args.json}")
    spilled = [row for row in compiled if row["spills"]]
    if spilled:
        print(f"\n{len(spilled)} rows spill registers to memory", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

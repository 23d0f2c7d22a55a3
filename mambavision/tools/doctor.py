"""`mambavision doctor`: what is installed, what each operator will run on and why, a self-check."""

import argparse
import os
import platform
import shutil
import sysconfig
import time
import warnings
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__, ops, selfcheck
from ..demo import choose_device
from .text import amount, table

__all__ = ["run"]

Rows = list[tuple[str, str]]
PACKAGES = (
    "torch", "triton", "einops", "timm", "torchvision", "transformers", "safetensors",
    "huggingface_hub", "mamba-ssm", "mambavision",
)  # fmt: skip
VARIABLES = (
    "TRITON_INTERPRET", "TRITON_CACHE_DIR", "TRITON_HOME", "CC", "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "HF_HOME",
)  # fmt: skip
# Small: the reference is a loop over time.
SIZES = {"batch": 2, "seqlen": 49, "dim": 48, "dstate": 8, "dt_rank": 6, "width": 3}


def _imported(name: str) -> Any:
    """A package, or the first line of why it cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(name)
    except Exception as error:
        # A package that does not fit its neighbours raises whatever it stumbled over.
        return f"{type(error).__name__}: {error}".splitlines()[0]


def _versions(problems: list[str]) -> Rows:
    rows = [
        ("mambavision-triton", __version__),
        ("Python", f"{platform.python_version()}, {platform.platform()}"),
    ]
    for name in PACKAGES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        rows.append((name, version))
        # Those that are installed and do not work where a neighbour is of another build.
        if name in ("triton", "timm") and isinstance(why := _imported(name), str):
            problems.append(f"{name} {version} cannot be imported: {why}")
        if name == "mambavision":
            problems.append("the distribution mambavision shares our folder: pip uninstall it")
    return rows


def _devices() -> Rows:
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    rows = [("CPU", f"{platform.machine()}, {threads}")]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        chip = about.gcnArchName if torch.version.hip else f"sm_{about.major}{about.minor}"
        half = "bfloat16" if about.major >= 8 or torch.version.hip else "no bfloat16"
        memory = f"{amount(free, 'B')} of {amount(total, 'B')} free"
        rows.append((f"cuda:{index}", f"{about.name}, {chip}, {memory}, {half}"))
    if torch.backends.mps.is_available():
        rows.append(("mps", "available"))
    runtime = torch.version.hip and f"ROCm {torch.version.hip}"
    runtime = runtime or (torch.version.cuda and f"CUDA {torch.version.cuda}")
    rows.append(("torch is built for", runtime or "the CPU only"))
    return rows


def _compiler(problems: list[str]) -> Rows:
    """What Triton needs to make a kernel: a C compiler with Python's headers, ptxas, a cache."""
    triton = _imported("triton")
    if isinstance(triton, str):
        return [("Triton", triton)]
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    cache = Path(triton.knobs.cache.dir)
    there = next(p for p in (cache, *cache.absolute().parents) if p.exists())
    writable = os.access(there, os.W_OK)
    size = sum(p.stat().st_size for p in cache.rglob("*") if p.is_file())
    rows = [
        ("C compiler", found or "none"),
        ("Python.h", str(header) if header.exists() else f"not at {header}"),
        ("cache", f"{cache}, {amount(size, 'B')}{'' if writable else ', not writable'}"),
        ("interpreter", "on" if triton.knobs.runtime.interpret else "off"),
    ]
    if torch.version.cuda:
        try:
            tool = triton.knobs.nvidia.ptxas
            rows.append(("ptxas", f"{tool.version}, {tool.path}"))
        except Exception as error:
            problems.append(f"Triton finds no ptxas: {error}")
    if torch.cuda.is_available():
        if not found:
            problems.append("Triton needs a C compiler: install gcc, or name one in CC")
        if not header.exists():
            problems.append("Triton needs Python's headers: install python3-dev")
        if not writable:
            problems.append(f"Triton's cache {cache} is not writable: set TRITON_CACHE_DIR")
    return rows


def _backend(op: str, device: torch.device, dtype: torch.dtype, dstate: int) -> tuple[str, str]:
    """The backend that "auto" takes, and why."""
    x = torch.empty(1, device=device, dtype=dtype)
    if ops._choose(op, "auto", dstate, x) == "triton":
        return "Triton", "tensors on a GPU, float32, float16 or bfloat16, dstate up to 64"
    why = ops._triton_refusal(device, dstate, x)
    return "PyTorch", why or "auto takes Triton only for tensors on a GPU"


def _backends(device: torch.device) -> str:
    """Each backend that is taken, for which calls, and why."""
    asked = [(op, torch.float32, 8) for op in ("mixer", "selective_scan", "conv1d_silu")]
    if device.type == "cuda":
        asked += [("selective_scan", torch.float64, 8), ("selective_scan", torch.float32, 128)]
    found: dict[tuple[str, str], list[str]] = {}
    for op, dtype, dstate in asked:
        states = "" if op == "conv1d_silu" else f", dstate {dstate}"
        call = f"{op} ({str(dtype).removeprefix('torch.')}{states})"
        found.setdefault(_backend(op, device, dtype, dstate), []).append(call)
    return "\n".join(
        f"{backend}: {', '.join(calls)}\n    {why}" for (backend, why), calls in found.items()
    )


def _check(
    op: str, exact: dict[str, Tensor], flags: Any, device: torch.device, dtype: torch.dtype
) -> tuple[str, float, float]:
    """The output or gradient nearest its limit, its error, and what is allowed.

    As in `selfcheck`: against the reference in float64, twice the reference's own error in `dtype`
    and eight roundings.
    """
    kept = dict.fromkeys(selfcheck.FLOAT32, torch.float32)
    given = {name: x.to(device, kept.get(name, dtype)) for name, x in exact.items()}
    plain = {name: x.cpu() for name, x in given.items()}
    shape = next(iter(plain.values())).shape
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    doubled = {name: x.double() for name, x in plain.items()}
    truth = selfcheck._run_reference(op, doubled, flags, dy.double())
    own = selfcheck._run_reference(op, plain, flags, dy)
    found = selfcheck._run_autograd(
        lambda **inputs: getattr(ops, op)(**inputs), given, flags, dy.to(device)
    )
    roundings = 8 * torch.finfo(dtype).eps
    rows = []
    for name, x in truth.items():
        error, limit = selfcheck._error(found[name], x), selfcheck._error(own[name], x)
        rows.append((name, error, 2 * limit + roundings))
    # A NaN, which compares with nothing, comes first.
    return max(rows, key=lambda row: (row[1] != row[1], row[1] / row[2]))


def _self_check(device: torch.device) -> Iterator[tuple[str, str, str, str, str, str]]:
    dtypes = (torch.float32, torch.float16) if device.type == "cuda" else (torch.float32,)
    for op, (exact, flags) in selfcheck._arguments(**SIZES).items():
        for dtype in dtypes:
            start = time.perf_counter()
            name, error, allowed = _check(op, exact, flags, device, dtype)
            seconds = time.perf_counter() - start
            kind = str(dtype).removeprefix("torch.")
            verdict = "ok" if error <= allowed else "WRONG"
            yield (op, kind, f"{name} {error:.1e}", f"{allowed:.1e}", f"{seconds:.2f} s", verdict)


def run(options: argparse.Namespace) -> int:
    device = choose_device(options.device)
    problems: list[str] = []
    sections = [
        ("versions", table(_versions(problems), "ll")),
        ("devices", table(_devices(), "ll")),
        ("Triton", table(_compiler(problems), "ll")),
    ]
    if variables := [(name, os.environ[name]) for name in VARIABLES if name in os.environ]:
        sections.append(("environment", table(variables, "ll")))
    sections.append((f"backends on {device}", _backends(device)))
    for title, text in sections:
        print(f"{title}\n{_indented(text)}\n")
    head = ("operator", "dtype", "largest error", "allowed", "time", "")
    rows = [head, *_self_check(device)]
    print(f"self-check on {device}: outputs and gradients against the reference in float64")
    print(_indented(table(rows, "llrrrl")))
    wrong = sorted({row[0] for row in rows[1:] if row[-1] != "ok"})
    if wrong:
        problems.append(f"wrong on {device}: {', '.join(wrong)}")
    print("\n" + "\n".join([f"problem: {line}" for line in problems] or ["no problems found"]))
    return 1 if wrong else 0


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())

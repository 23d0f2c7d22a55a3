"""What is shipped: the launches of every operator, recorded once per shape, type and mode.

The launchers themselves run on fake tensors (shapes without memory) while `JITFunction.run` is
replaced by a recorder. So types, constants, alignment hints and launch options are those of a real
call, and there is no second list of them to go stale.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.jit import JITFunction

# Constants of a kernel that multiply to the elements one iteration of its loop serves.
ELEMENT_CONSTANTS = ("BLOCK_D", "BLOCK_L", "STEPS")

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Launch:
    """One recorded launch, as `triton.compile` takes it; plain data, so that it can be pickled."""

    function: str  # "module:name"
    grid: tuple
    signature: dict  # argument -> type
    constants: dict  # argument -> value
    aligned: tuple  # arguments known to be divisible by 16
    options: dict  # num_warps, enable_fp_fusion, ...

    @property
    def name(self) -> str:
        return self.function.partition(":")[2].strip("_")

    @property
    def key(self) -> str:
        """Two launches with the same key compile to the same code."""
        parts = (self.function, self.signature, self.constants, self.aligned, self.options)
        return repr(parts)

    def with_overrides(self, overrides: dict[str, int]) -> "Launch":
        """Another launch config: constants this kernel has, and num_warps."""
        constants = {k: v for k, v in overrides.items() if k in self.constants}
        options = {k: v for k, v in overrides.items() if k in self.options}
        return replace(self, constants=self.constants | constants, options=self.options | options)

    @property
    def elements(self) -> int:
        return math.prod(self.block_sizes)

    @property
    def block_sizes(self) -> list[int]:
        return [self.constants[name] for name in ELEMENT_CONSTANTS if name in self.constants]


def _describe(value, param) -> tuple[str, bool]:
    """Type of an argument and whether 16 divides it, as Triton's own launcher finds them."""
    specialize = not param.do_not_specialize
    align = specialize and not param.do_not_specialize_on_alignment
    if param.is_constexpr or value is None:
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        # Allocations are aligned; a view is as aligned as its offset.
        aligned = align and value.storage_offset() * value.element_size() % 16 == 0
        return f"*{TYPES[value.dtype]}", aligned
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        if specialize and value == 1:
            return "constexpr", False
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), align and value % 16 == 0
    return "fp32", False


def describe_launch(function, grid, args, kwargs) -> Launch:
    names = [param.name for param in function.params]
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    options = {k: v for k, v in kwargs.items() if k not in names and k not in ("grid", "warmup")}
    signature, constants, aligned = {}, {}, []
    for param in function.params:
        value = values.get(param.name, param.default if param.has_default else None)
        kind, divisible = _describe(value, param)
        signature[param.name] = kind
        if kind == "constexpr":
            constants[param.name] = getattr(value, "value", value)
        if divisible:
            aligned.append(param.name)
    grid = tuple(grid(values)) if callable(grid) else tuple(grid)
    name = f"{function.fn.__module__}:{function.fn.__name__}"
    return Launch(name, grid, signature, constants, tuple(aligned), options)


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Inside, tensors have no memory; launching a kernel appends a `Launch` and runs nothing."""
    launches: list[Launch] = []

    def record(self, *args, grid, **kwargs):
        launches.append(describe_launch(self, grid, args, kwargs))

    original, JITFunction.run = JITFunction.run, record
    try:
        with FakeTensorMode():
            yield launches
    finally:
        JITFunction.run = original


@dataclass(frozen=True)
class Case:
    """A call of an operator: its launches become rows of the report."""

    op: str
    call: Callable
    mode: str = ""
    dim: int = 160
    seqlen: int = 196
    dstate: int = 8
    dt_rank: int = 20
    dtype: str = "float16"
    batch: int = 128
    shared: int = 0  # bytes of shared memory without which it is not launched

    def tensor(self, *shape, dtype: str | None = None) -> torch.Tensor:
        return torch.empty(*shape, dtype=getattr(torch, dtype or self.dtype))

    def sequence(self, last: int | None = None) -> torch.Tensor:
        return self.tensor(self.batch, self.seqlen, last or self.dim)


def call_selective_scan(case: Case) -> None:
    op = import_module("mambavision.kernels.selective_scan")
    u, delta = case.sequence(), case.sequence()
    A = case.tensor(case.dim, case.dstate, dtype="float32")
    B, C = case.sequence(case.dstate), case.sequence(case.dstate)
    D, bias = (case.tensor(case.dim, dtype="float32") for _ in range(2))
    modes = case.mode.split()
    z = case.sequence() if "z" in modes else None
    initial = case.tensor(case.batch, case.dim, case.dstate, dtype="float32")
    inputs = (u, delta, A, B, C, D, z, bias, initial if "initial" in modes else None)
    reverse = "reverse" in modes
    return_last_state = "initial" in modes
    op.selective_scan_fwd(*inputs, True, reverse, False, return_last_state=return_last_state)
    y, _, states = op.selective_scan_fwd(
        *inputs, True, reverse, True, return_last_state=return_last_state
    )
    op.selective_scan_bwd(torch.empty_like(y), None, *inputs, states, True, reverse)


def call_conv1d_silu(case: Case) -> None:
    op = import_module("mambavision.kernels.conv1d_silu")
    x, weight = case.sequence(2 * case.dim)[..., case.dim :], case.tensor(case.dim, 1, 3)
    y = op.conv1d_silu_fwd(x, weight, None, True)
    op.conv1d_silu_bwd(torch.empty_like(y), x, weight, None, True)


def call_mixer(case: Case) -> None:
    op = import_module("mambavision.kernels.mixer")
    D, bias = (case.tensor(case.dim, dtype="float32") for _ in range(2))
    inputs = (
        case.sequence(2 * case.dim),
        case.tensor(case.dim, 1, 3),
        case.tensor(case.dim, 1, 3),
        case.tensor(case.dt_rank + 2 * case.dstate, case.dim),
        case.tensor(case.dim, case.dt_rank),
        case.tensor(case.dim, case.dstate, dtype="float32"),
        D,
        bias,
        None,
        None,
    )
    op.mixer_fwd(*inputs, False)
    yz, dt_low, BC, states = op.mixer_fwd(*inputs, True)
    op.mixer_bwd(torch.empty_like(yz), *inputs, dt_low, BC, states)


def attention_case(dim: int, seqlen: int, dtype: str) -> Case:
    op, heads = import_module("mambavision.kernels.attention"), 16 if seqlen == 49 else 8
    return Case(
        "attention", lambda case: op.attention(case.sequence(3 * dim), heads),
        dim=dim, seqlen=seqlen, dtype=dtype, shared=op.shared_bytes(seqlen, dim // heads),
    )  # fmt: skip


def call_add_layer_norm(case: Case) -> None:
    op = import_module("mambavision.kernels.add_layer_norm")
    x, weight = case.sequence(), case.tensor(case.dim)
    op.add_layer_norm(x, None, None, weight, weight, 1e-5)
    op.add_layer_norm(x, x, weight, weight, weight, 1e-5)


def call_norm_act(case: Case) -> None:
    op = import_module("mambavision.kernels.norm_act")
    x = case.tensor(case.batch, case.dim, case.seqlen, 1).to(memory_format=torch.channels_last)
    parameter, statistic = case.tensor(case.dim), case.tensor(case.dim, dtype="float32")
    norm = statistic, statistic, parameter, parameter, 1e-5
    op.norm_act(x, None, norm, "relu", None, None)
    op.norm_act(x, parameter, norm, "gelu", None, None)
    op.norm_act(x, parameter, norm, "none", parameter, x)


def call_stem_conv(case: Case) -> None:
    op = import_module("mambavision.kernels.stem_conv")
    x = case.tensor(case.batch, 3, 224, 224).to(memory_format=torch.channels_last)
    W, parameter = case.tensor(case.dim, 3, 3, 3), case.tensor(case.dim)
    op.stem_conv(x, W, None, (parameter, parameter, parameter, parameter, 1e-5))
    op.stem_conv(x, W, parameter, None)


DTYPES = ("float16", "bfloat16", "float32")
# (dim, seqlen, dt_rank) of published models: T stages 3 and 4, L stage 3, L3-256 stage 3.
SHAPES = ((160, 196, 20), (320, 49, 40), (392, 196, 49), (512, 256, 64))


def shipped_cases() -> list[Case]:
    cases = []
    for dtype in DTYPES:
        for dim, seqlen, dt_rank in SHAPES:
            shape = {"dim": dim, "seqlen": seqlen, "dt_rank": dt_rank, "dtype": dtype}
            cases += [
                Case("selective_scan", call_selective_scan, **shape),
                Case("conv1d_silu", call_conv1d_silu, **shape),
                Case("mixer", call_mixer, **shape),
            ]
        # Of the same models: tokens' widths, and those of maps
        for dim, seqlen, _ in SHAPES:
            shape = {"dim": 2 * dim, "seqlen": seqlen, "dtype": dtype}
            cases.append(Case("add_layer_norm", call_add_layer_norm, **shape))
            if dtype != "float32":
                cases.append(attention_case(**shape))
        cases += [
            Case("norm_act", call_norm_act, dim=dim, seqlen=784, dtype=dtype)
            for dim in (32, 80, 160, 196, 392)
        ]
        if dtype != "float32":
            cases += [
                Case("stem_conv", call_stem_conv, dim=dim, seqlen=112 * 112, dtype=dtype)
                for dim in (32, 64)
            ]
        # The gate alone, all that one call can carry, and a length that leaves a rest of a chunk.
        cases += [
            Case("selective_scan", call_selective_scan, mode=mode, seqlen=seqlen, dtype=dtype)
            for mode, seqlen in (("z", 196), ("z initial reverse", 196), ("", 50))
        ]
        cases += [
            Case("selective_scan", call_selective_scan, dstate=n, dtype=dtype) for n in (16, 64)
        ]
        # Few channels: one image, and a few
        cases += [
            Case("selective_scan", call_selective_scan, batch=n, dtype=dtype) for n in (1, 32)
        ]
    return cases

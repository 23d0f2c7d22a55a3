"""How long the kernels of a model take to compile, on a machine that needs no GPU.

What a warm-up compiles, with nothing in Triton's cache, for images of 224 pixels and a named
target: the launches of the model's mixers, forward and backward, as `launches.py` records them; or,
of a model in evaluation mode, those of the mixers forward and of all other parts that have kernels.
They are compiled in threads, one kind of part after another, as `mambavision.warmup` does it.

    python benchmarks/cold_start.py
    python benchmarks/cold_start.py --inference
    python benchmarks/cold_start.py --model mamba_vision_L --dtype bfloat16 --target sm_80
"""

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import static_report
import torch
from launches import DTYPES, Case, Launch, call_mixer, recorded_launches
from torch.func import functional_call

from mambavision import blocks, create_model, list_models, ops
from mambavision.cold_start import Call, inference_calls, mixer_calls


@dataclass(frozen=True)
class ColdStart:
    """Seconds of each kernel by name and its kind of part, and of all of them."""

    kernels: list[tuple[str, str, float]]
    wall: float
    cpu: float  # of this process and those that it started


def _different(launches: list[Launch]) -> list[Launch]:
    return list({launch.key: launch for launch in launches}.values())


def mixer_launches(call: Call, dtype: str, inference: bool) -> list[Launch]:
    """The different launches of one mixer, forward and, in training, backward."""
    batch, seqlen, d_model = call.shape
    mixer = call.module
    case = Case(
        "mixer", call_mixer, dim=d_model // 2, seqlen=seqlen, dstate=mixer.d_state,
        dt_rank=mixer.dt_rank, dtype=dtype, batch=batch,
    )  # fmt: skip
    with recorded_launches() as launches:
        case.call(case)
    # The forward pass is the first two
    return _different(launches[:2] if inference else launches)


def part_launches(call: Call) -> list[Launch]:
    """The different launches of another part, in evaluation mode."""
    kernels = import_module("mambavision.kernels")
    layout = torch.channels_last if call.channels_last else torch.contiguous_format
    with (
        recorded_launches() as launches,
        # Tensors without memory count as traced ones, and take no kernel by themselves
        patch.object(ops, "infers", lambda *_: kernels),
        patch.object(blocks, "infers", lambda *_: kernels),
        torch.no_grad(),
    ):
        held = (*call.module.named_parameters(), *call.module.named_buffers())
        state = {name: torch.empty(x.shape, dtype=x.dtype) for name, x in held}
        x = torch.empty(call.shape, dtype=call.dtype).to(memory_format=layout)
        functional_call(call.module, state, (x,))
    return _different(launches)


def cold_start(model: str, dtype: str, batch: int, target: str, inference: bool) -> ColdStart:
    with torch.device("meta"):
        made = create_model(model).to(getattr(torch, dtype)).train(not inference)
    kinds = {
        str(call): mixer_launches(call, dtype, inference) for call in mixer_calls(made, 224, batch)
    }
    if inference:
        made.to(memory_format=torch.channels_last)
        kinds |= {str(call): part_launches(call) for call in inference_calls(made, 224, batch)}

    def compile_kind(kind: str) -> list[tuple[str, str, float]]:
        found = []
        for launch in kinds[kind]:
            begun = time.perf_counter()
            static_report.compile_launch(launch, target)
            found.append((launch.name, kind, round(time.perf_counter() - begun, 2)))
        return found

    def cpu_seconds() -> float:
        return sum(os.times()[:4])

    begun, cpu = time.perf_counter(), cpu_seconds()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as threads:
        os.environ["TRITON_CACHE_DIR"] = folder
        kernels = [row for rows in threads.map(compile_kind, kinds) for row in rows]
    return ColdStart(
        kernels, round(time.perf_counter() - begun, 1), round(cpu_seconds() - cpu, 1)
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list_models(), default="mamba_vision_T")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--target", choices=static_report.MACHINES, default="sm_90")
    parser.add_argument("--inference", action="store_true", help="of a model in evaluation mode")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    found = cold_start(given.model, given.dtype, given.batch, given.target, given.inference)
    if given.json:
        print(json.dumps(asdict(found)))
        return 0
    for kernel, kind, seconds in found.kernels:
        print(f"{seconds:6.2f} s  {kernel:24} {kind}")
    print(
        f"{found.wall:6.1f} s in all, {found.cpu:.1f} s of CPU time: {given.model}, {given.dtype}, "
        f"{given.target}, {os.cpu_count()} cores"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the scan costs a whole model on a CPU, and what the rest costs beside the plain way.

Each of our settings runs with the scan and with an identity in its place (all else of the mixer
stays); and the model as one would first write it, channels-first, with batch norms, copied windows
and the mixer as published, runs with the identity too. The ways take turns, and there are two
ratios of each pair: of the least times, and the median of those within a turn, so that a busy
moment meets both of its sides. One thread's time is the processor's, in which the turns of other
programs do not count; several threads wait for each other, and their time is the clock's.

    scan         ours with the scan / ours without        1.10 at most is what we want
    remainder    plain without the scan / ours without    1.2 at least

    python benchmarks/bench_cpu_model.py --batch 1 8 --turns 40 --threads 1
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from models import EagerMixer, ours, with_mixers
from torch import Tensor, nn

from mambavision import list_models

SCAN = "mambavision.torch_backend.mixer.selective_scan_fwd"


def no_scan(x: Tensor, *rest: object, y: Tensor) -> tuple[Tensor, None, Tensor]:
    """In place of the scan: its output is its input."""
    return y.copy_(x), None, x.new_empty(0)


def first_argument(u: Tensor, *rest: object) -> Tensor:
    return u


class PlainStage(nn.Module):
    """A stage whose windows are cut out and put back by copies, channels first."""

    def __init__(self, stage: nn.Module):
        super().__init__()
        self.blocks, self.downsample, self.size = stage.blocks, stage.downsample, stage.window_size

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        batch, dim, height, width = x.shape
        size = self.size
        if size is not None:
            x = nn.functional.pad(x, (0, -width % size, 0, -height % size))
            rows, columns = x.shape[2] // size, x.shape[3] // size
            x = x.view(batch, dim, rows, size, columns, size).permute(0, 2, 4, 3, 5, 1)
            x = x.reshape(-1, size * size, dim).contiguous()
        for block in self.blocks:
            x = block(x)
        if size is not None:
            x = x.view(batch, rows, columns, size, size, dim).permute(0, 5, 1, 3, 2, 4)
            x = x.reshape(batch, dim, rows * size, columns * size)[..., :height, :width]
            x = x.contiguous()
        return x, None if self.downsample is None else self.downsample(x)


def plain(model: nn.Module) -> nn.Module:
    """The model as one would first write it, without its scan."""
    made = with_mixers(model, lambda mixer: EagerMixer(mixer, first_argument))
    made.levels = nn.ModuleList(PlainStage(stage) for stage in made.levels)
    return made.eval()


def seconds(run: Callable[[Tensor], Tensor], x: Tensor) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    begun = clock()
    run(x)
    return clock() - begun


def measure(model: nn.Module, batch: int, turns: int, compiled: bool) -> dict[str, list[float]]:
    """Seconds of every turn by way: "plain", and each setting with and without the scan."""
    x = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    layout = {"memory_format": torch.channels_last}
    settings = {
        "as it is": model,
        "channels-last": copy.deepcopy(model).to(**layout),
        "optimized": model.optimize_for_inference(),
    }
    if compiled:
        settings["compiled"] = model.optimize_for_inference(compile=True)
    baseline = plain(model)
    times: dict[str, list[float]] = {}
    with torch.inference_mode():
        with mock.patch(SCAN, no_scan):
            expected = baseline(x)
            for name, run in settings.items():
                # The ways compute one function, or their times say nothing.
                if name != "compiled":
                    torch.testing.assert_close(run(x), expected, rtol=1e-3, atol=1e-3)
        for turn in range(turns + 2):
            found = {"plain": seconds(baseline, x)}
            for name, run in settings.items():
                found[name] = seconds(run, x)
                if name != "compiled":
                    with mock.patch(SCAN, no_scan):
                        found[f"{name}, no scan"] = seconds(run, x)
            if turn >= 2:
                for name, took in found.items():
                    times.setdefault(name, []).append(took)
    return times


def ratio(over: list[float], under: list[float]) -> str:
    """Of the least; median of the turns', and what three fifths of them lie between."""
    found = sorted(a / b for a, b in zip(over, under, strict=True))
    low, high = found[len(found) // 5], found[-1 - len(found) // 5]
    return f"{min(over) / min(under):.2f}, {median(found):.2f} ({low:.2f} to {high:.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list_models(), default="mamba_vision_T")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compiled", action="store_true", help="also through torch.compile")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = ours(given.model, "cpu").eval()
    for batch in given.batch:
        times = measure(model, batch, given.turns, given.compiled)
        print(f"{given.model}, batch {batch}, {given.threads} threads, {given.turns} turns")
        for name, taken in times.items():
            line = f"  {name:24} {1e3 * median(taken):8.1f} ms, least {1e3 * min(taken):8.1f}"
            without = times.get(f"{name}, no scan")
            if without:
                line += f"   scan {ratio(taken, without)}"
                line += f"   remainder {ratio(times['plain'], without)}"
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

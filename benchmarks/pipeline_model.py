"""How long the scan takes according to its machine code, before any GPU runs it.

    python benchmarks/pipeline_model.py
    python benchmarks/pipeline_model.py --shapes T-s3 L3-512-s3 --direction backward

Instruction counts say what a scheduler issues at best. This model adds what they leave out: the
assembler has written into every instruction how many clocks the warp then pauses, which of six
scoreboards it sets until its result is there, and which ones it waits for. A scheduler issues one
instruction a clock, in order within a warp, of any warp that is ready. Exponentials and accesses of
memory go through one queue, in order, and occupy it: an exponential for 8 clocks, an access for 2.5
for each 128 bytes that it moves. Results come some clocks after that.

These numbers were chosen once, so that times of an earlier version of the forward pass on an NVIDIA
H100 came out: within a tenth for six shapes at batch 128 (`benchmarks/NOTES.md`). They are those of
that GPU; memory's bandwidth, and the beginning and end of a launch but for 2.5 us, are left out.
What it is for: to choose between versions, not to promise times.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launches import Case, Launch, call_selective_scan, recorded_launches
from machine_code import encoded_words, opcode_class, sass_instructions, step_loop
from shapes import SHAPES, Shape

SCHEDULERS, GIGAHERTZ, LAUNCH_US = 4 * 132, 1.98, 2.5
EXPONENTIAL, ACCESS = 8, 2.5  # clocks of the queue
LATENCY = {"MUFU": 24, "smem": 30, "shuffle": 30, "load": 700, "store": 0}
QUEUE = 6  # waiting instructions
DEFAULT = ("T-s3", "T-s4", "B-s3", "B-s4", "L-s3", "L-s4", "L3-256-s3", "L3-512-s3")
DIRECTIONS = {"forward": 0, "states": 1, "backward": 2}


@dataclass(frozen=True)
class Encoded:
    """One instruction; scoreboard 7 is none."""

    opcode: str
    pause: int
    sets: int = 7  # until its result is there
    frees: int = 7  # until its operands are read
    waits: tuple[int, ...] = ()

    @property
    def occupies(self) -> float:
        """Clocks of the queue; 0 for what does not go through it."""
        kind = opcode_class(self.opcode)
        if kind == "MUFU":
            return EXPONENTIAL
        if kind not in LATENCY:
            return 0.0
        wide = ".128" in self.opcode or ".M88" in self.opcode
        return ACCESS * (4 if wide else 2 if ".64" in self.opcode else 1)


def decode(text: str) -> list[Encoded]:
    """The step loop of `cuobjdump -sass`, Volta to Hopper."""
    words = encoded_words(text)
    return [
        Encoded(
            i.opcode,
            max(1, (word := words[i.address]) >> 41 & 15),
            word >> 46 & 7,
            word >> 49 & 7,
            tuple(board for board in range(6) if word >> 52 + board & 1),
        )
        for i in step_loop(sass_instructions(text))
    ]


@dataclass
class _Warp:
    ready: float
    next: int = 0
    iterations: int = 0
    boards: list[float] = field(default_factory=lambda: [0.0] * 6)


def clocks(loop: Sequence[Encoded], warps: int, iterations: int = 20) -> float:
    """Clocks of one scheduler for each iteration of each of its warps."""
    running = [_Warp(ready=37.0 * w) for w in range(warps)]
    queue: list[float] = []
    free, now, last, end = 0.0, 0.0, 0, 0.0
    while running:
        soonest = math.inf
        queue = [done for done in queue if done > now]
        # The one that issued last goes on while it can
        for warp in running[last:] + running[:last]:
            instruction = loop[warp.next]
            ready = max([warp.ready, *(warp.boards[board] for board in instruction.waits)])
            cost = instruction.occupies
            if cost and len(queue) >= QUEUE:
                ready = max(ready, queue[-QUEUE])
            if ready <= now:
                break
            soonest = min(soonest, ready)
        else:
            now = max(now + 1, float(math.ceil(soonest)))
            continue
        if cost:
            begin = max(now + 2, free)
            free = begin + cost
            queue.append(free)
            if instruction.frees < 6:
                warp.boards[instruction.frees] = begin + 4
        if instruction.sets < 6:
            there = free + LATENCY[opcode_class(instruction.opcode)] if cost else now + 12
            warp.boards[instruction.sets] = max(warp.boards[instruction.sets], there)
        warp.ready = now + instruction.pause
        warp.next = (warp.next + 1) % len(loop)
        last, end, now = running.index(warp), now, now + 1
        if warp.next == 0:
            warp.iterations += 1
            if warp.iterations == iterations:
                running.remove(warp)
                last = 0
    return end / (warps * iterations)


@dataclass(frozen=True)
class Estimate:
    launch: Launch
    slots: float
    resident: int  # warps of a scheduler
    clocks: list[float]  # per step and 32 channels, with 1, 2, ... of them
    microseconds: float


def estimate(shape: Shape, batch: int, direction: str) -> Estimate:
    # Decides, for all of the process, that kernels are compiled and not interpreted
    import static_report

    case = Case(
        "selective_scan", call_selective_scan, dim=shape.dim, seqlen=shape.seqlen, batch=batch
    )
    with recorded_launches() as launches:
        call_selective_scan(case)
    launch = launches[DIRECTIONS[direction]]
    result = static_report.compile_variant(launch, "sm_90")
    loop, steps = decode(result.asm["sass"]), launch.constants["STEPS"]
    resident = min(result.resident_warps // 4, 4)
    each = [clocks(loop, n) / steps for n in range(1, resident + 1)]
    # The scheduler with the most warps is last: full rounds, then the rest
    rounds, rest = divmod(math.ceil(launch.grid[0] / SCHEDULERS), resident)
    of_warps = rounds * resident * each[-1] + (rest * each[rest - 1] if rest else 0)
    walked = math.ceil(shape.seqlen / steps) * steps
    time = LAUNCH_US + of_warps * walked / GIGAHERTZ / 1e3
    width = launch.constants["BLOCK_D"] / 32
    return Estimate(launch, result.slots, resident, [c / width for c in each], time)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=DEFAULT, metavar="SHAPE",
        help=f"of {', '.join(SHAPES)}; default {' '.join(DEFAULT)}",
    )  # fmt: skip
    result.add_argument("--batch", type=int, default=128, help="default 128")
    result.add_argument(
        "--direction", choices=DIRECTIONS, default="forward",
        help="states: a forward pass that keeps them; backward: without the sums after it",
    )  # fmt: skip
    return result


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    print("| shape | BLOCK_D | lanes | steps | slots | clocks, with 1, 2, .. warps | us |")
    print("|---|---|---|---|---|---|---|")
    for name in args.shapes:
        found = estimate(SHAPES[name], args.batch, args.direction)
        chosen = (found.launch.constants[key] for key in ("BLOCK_D", "LANES", "STEPS"))
        each = " ".join(f"{c:.0f}" for c in found.clocks)
        cells = (SHAPES[name].label, *chosen, found.slots, each, f"{found.microseconds:.1f}")
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The least time that a GPU needs for an operator, computed from its shape.

Three floors, of which the highest counts:

    memory         bytes that must be read or written once, over the measured rate of a large copy
    special        results of the special-function units (exp2, log2, reciprocal): 16 lanes per SM a
                   cycle, where 128 lanes issue, so that one result costs as much as 8 issue slots
    issue          all warp instructions: 4 schedulers per SM, one instruction of 32 lanes a cycle

A matrix product counts with its operations over the measured rate of a large one, or its bytes. The
counts per (batch, step, channel) are in `COUNTS`. States of 8 are what they were counted for; the
part that grows with dstate is scaled.
"""

from dataclasses import dataclass

__all__ = ["DEVICES", "Device", "Floor", "device_named", "floor"]

SLOTS_PER_SPECIAL = 8


@dataclass(frozen=True)
class Device:
    """`name` is part of what PyTorch calls it; rates per second, `source` of the last two."""

    name: str
    sms: int
    clock: float
    copy_bytes: float
    matmul_flops: float
    source: str
    schedulers: int = 4

    @property
    def slots(self) -> float:
        """Lane slots per second."""
        return self.sms * self.schedulers * 32 * self.clock


DEVICES = (
    Device("H200", 132, 1.98e9, 4.3e12, 790e12, "measured"),
    Device("H100 80GB HBM3", 132, 1.98e9, 3.0e12, 790e12, "measured"),
    Device("A100-SXM4-80GB", 108, 1.41e9, 2.04e12, 312e12, "data sheet"),
    Device("A100-SXM4-40GB", 108, 1.41e9, 1.56e12, 312e12, "data sheet"),
)


def device_named(name: str | None) -> Device | None:
    """The device that a GPU's name belongs to, or None."""
    return next((device for device in DEVICES if name and device.name in name), None)


@dataclass(frozen=True)
class Count:
    """Per (batch, step, channel): special-function results and issue slots, at dstate 8.

    `tensors` counts reads and writes of a number in the activations' dtype, `coefficients` those of
    B or C, which channels share.
    """

    special_per_state: float
    special: float
    issue: float
    tensors: float
    coefficients: float


COUNTS = {
    # exp(dt A) per state; softplus is exp2 and log2. u, delta -> y.
    ("selective_scan", "forward"): Count(1, 2, 57, 3, 2),
    # The decays again, softplus, and its derivative from the same exp2 with one reciprocal. The
    # reverse sweep is bound by what it issues. u, delta, dy -> du, ddelta; B, C -> dB, dC.
    ("selective_scan", "backward"): Count(1, 3, 190, 5, 4),
    # silu is exp2 and reciprocal. x -> y; x, dy -> dx.
    ("conv1d_silu", "forward"): Count(0, 2, 9, 2, 0),
    ("conv1d_silu", "backward"): Count(0, 2, 16, 3, 0),
    # Scan, and silu in both branches. xz -> yz; xz, dyz -> dxz.
    ("mixer", "forward"): Count(1, 2 + 4, 57 + 2 * 9, 4, 0),
    ("mixer", "backward"): Count(1, 3 + 4, 190 + 2 * 16, 6, 0),
}
# x_proj and dt_proj in front of the scan, where the whole mixer is not one kernel: silu of x twice.
SPLIT_SPECIAL = 2


@dataclass(frozen=True)
class Floor:
    """Microseconds, the bytes that must be moved, and the floors it is the highest of."""

    us: float
    bytes: float
    memory_us: float
    special_us: float
    issue_us: float


def _one(
    device: Device, op: str, direction: str, elements: int, dim: int, dstate: int, itemsize: int
) -> Floor:
    count = COUNTS[op, direction]
    per_element = itemsize * (count.tensors + count.coefficients * dstate / dim)
    special = count.special_per_state * dstate + count.special
    issue = count.issue * (dstate / 8 if count.special_per_state else 1)
    moved = per_element * elements
    memory_us = 1e6 * moved / device.copy_bytes
    special_us = 1e6 * SLOTS_PER_SPECIAL * special * elements / device.slots
    issue_us = 1e6 * issue * elements / device.slots
    return Floor(max(memory_us, special_us, issue_us), moved, memory_us, special_us, issue_us)


def _sum(*floors: Floor) -> Floor:
    names = ("us", "bytes", "memory_us", "special_us", "issue_us")
    return Floor(*(sum(getattr(f, name) for f in floors) for name in names))


def _matmul(device: Device, rows: int, columns: int, inner: int, itemsize: int) -> Floor:
    moved = itemsize * (rows * columns + rows * inner + columns * inner)
    memory_us = 1e6 * moved / device.copy_bytes
    us = max(memory_us, 1e6 * 2 * rows * columns * inner / device.matmul_flops)
    return Floor(us, moved, memory_us, 0.0, 0.0)


def floor(
    device: Device, op: str, direction: str, batch: int, seqlen: int, dim: int, dstate: int,
    itemsize: int = 2,
) -> Floor:  # fmt: skip
    """The floor of an operator; "both" is the sum of "forward" and "backward".

    `op` is "selective_scan", "conv1d_silu", "mixer" or "mixer_module"; the last, from in_proj to
    out_proj with d_model = 2 dim, is the matrix products (two forward, four backward) and the
    middle in two kernels, the second of which computes silu(conv_x(x)) again.

    >>> round(floor(DEVICES[0], "selective_scan", "forward", 128, 196, 160, 8).us, 1)
    9.6
    """
    if direction == "both":
        size = batch, seqlen, dim, dstate, itemsize
        return _sum(*(floor(device, op, half, *size) for half in ("forward", "backward")))
    rows = batch * seqlen
    if op != "mixer_module":
        return _one(device, op, direction, rows * dim, dim, dstate, itemsize)
    middle = _one(device, "mixer", direction, rows * dim, dim, dstate, itemsize)
    again = 1e6 * SLOTS_PER_SPECIAL * SPLIT_SPECIAL * rows * dim / device.slots
    again_floor = Floor(again, 0.0, 0.0, again, 0.0)
    products = [_matmul(device, rows, 2 * dim, 2 * dim, itemsize)]
    if direction == "backward":
        products.append(_matmul(device, 2 * dim, 2 * dim, rows, itemsize))
    return _sum(middle, again_floor, *products, *products)

"""The sizes at which the published MambaVision models call their operators.

`batch` counts sequences, images times windows. d_model is 2 dim, dt_rank is ceil(d_model / 16);
the states per channel are 8, the convolutions 3 wide.
"""

import math
from dataclasses import dataclass

__all__ = ["CPU_SIZES", "GPU_SIZES", "SHAPES", "Shape"]

DSTATE, WIDTH = 8, 3


@dataclass(frozen=True)
class Shape:
    """`name` on the command line, `label` in rows."""

    name: str
    label: str
    seqlen: int
    dim: int
    dstate: int = DSTATE
    width: int = WIDTH

    @property
    def d_model(self) -> int:
        return 2 * self.dim

    @property
    def dt_rank(self) -> int:
        return math.ceil(self.d_model / 16)


# Variant: length in stage 3, channels of the scan in stage 3. Stage 4 has a quarter of the length
# and twice the channels. T2 is as T and L2 as L.
_VARIANTS = {
    "T": (196, 160),
    "S": (196, 192),
    "B": (196, 256),
    "L": (196, 392),
    "L3-256": (256, 512),
    "L2-512": (1024, 392),
    "L3-512": (1024, 512),
}
SHAPES = {
    shape.name: shape
    for variant, (seqlen, dim) in _VARIANTS.items()
    for shape in (
        Shape(f"{variant}-s3", f"{variant} stage 3", seqlen, dim),
        Shape(f"{variant}-s4", f"{variant} stage 4", seqlen // 4, 2 * dim),
    )
}

# What is measured unless something else is asked for: (shape, batch).
_FIRST = SHAPES["T-s3"]
GPU_SIZES = [
    *((shape, 128) for shape in SHAPES.values()),
    *((_FIRST, batch) for batch in (1, 8, 32, 256)),
]
CPU_SIZES = [(_FIRST, 1), (_FIRST, 8)]

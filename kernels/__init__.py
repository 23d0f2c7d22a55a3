"""Triton kernels of the MambaVision mixer: one op, one file, from equation to autograd."""

from .conv1d_silu import conv1d_silu, conv1d_silu_bwd, conv1d_silu_fwd
from .mixer import mixer, mixer_bwd, mixer_fwd
from .selective_scan import (
    MAX_DSTATE,
    selective_scan,
    selective_scan_bwd,
    selective_scan_fwd,
    states_shape,
)

__all__ = [
    "MAX_DSTATE",
    "conv1d_silu",
    "conv1d_silu_bwd",
    "conv1d_silu_fwd",
    "mixer",
    "mixer_bwd",
    "mixer_fwd",
    "selective_scan",
    "selective_scan_bwd",
    "selective_scan_fwd",
    "states_shape",
]

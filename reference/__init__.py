"""The oracle: every operator in plain PyTorch, forward and backward written out, step by step.

Read it as prose. It is never used in production; the kernels and the torch backend are checked
against it, and its own backward passes are gradcheck-ed in float64.
"""

from .conv1d_silu import Conv1dSiluGrads, conv1d_silu, conv1d_silu_backward
from .mixer import MixerGrads, mixer, mixer_backward
from .selective_scan import SelectiveScanGrads, selective_scan, selective_scan_backward

__all__ = [
    "Conv1dSiluGrads",
    "MixerGrads",
    "SelectiveScanGrads",
    "conv1d_silu",
    "conv1d_silu_backward",
    "mixer",
    "mixer_backward",
    "selective_scan",
    "selective_scan_backward",
]

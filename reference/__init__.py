"""The oracle: every operator in plain PyTorch, forward and backward written out, step by step.

Read it as prose. It is never used in production; the kernels and the torch backend are checked
against it, and its own backward passes are gradcheck-ed in float64.
"""

from .add_layer_norm import add_layer_norm
from .attention import attention
from .conv1d_silu import Conv1dSiluGrads, conv1d_silu, conv1d_silu_backward
from .mixer import MixerGrads, mixer, mixer_backward
from .norm_act import norm_act
from .selective_scan import SelectiveScanGrads, selective_scan, selective_scan_backward
from .stem_conv import stem_conv

__all__ = [
    "Conv1dSiluGrads",
    "MixerGrads",
    "SelectiveScanGrads",
    "add_layer_norm",
    "attention",
    "conv1d_silu",
    "conv1d_silu_backward",
    "mixer",
    "mixer_backward",
    "norm_act",
    "selective_scan",
    "selective_scan_backward",
    "stem_conv",
]

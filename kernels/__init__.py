"""Triton kernels of MambaVision: one operator, one file, from the equation to the function."""

from .add_layer_norm import add_layer_norm
from .attention import attention, attention_serves
from .conv1d_silu import conv1d_silu, conv1d_silu_bwd, conv1d_silu_fwd
from .mixer import mixer, mixer_bwd, mixer_fwd
from .norm_act import norm_act
from .selective_scan import (
    MAX_DSTATE,
    selective_scan,
    selective_scan_bwd,
    selective_scan_fwd,
    states_shape,
)
from .stem_conv import stem_conv, stem_conv_serves

__all__ = [
    "MAX_DSTATE",
    "add_layer_norm",
    "attention",
    "attention_serves",
    "conv1d_silu",
    "conv1d_silu_bwd",
    "conv1d_silu_fwd",
    "mixer",
    "mixer_bwd",
    "mixer_fwd",
    "norm_act",
    "selective_scan",
    "selective_scan_bwd",
    "selective_scan_fwd",
    "states_shape",
    "stem_conv",
    "stem_conv_serves",
]

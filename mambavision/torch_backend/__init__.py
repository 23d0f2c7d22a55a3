"""The operators in plain PyTorch: for a CPU, for MPS, and for whatever has no Triton.

The same functions as in `kernels`, one op, one file. Arithmetic in float32, in float64 for float64
activations, unmoved by autocast; arguments are checked by `mambavision.ops`.
"""

from ._common import work_dtype
from .add_layer_norm import add_layer_norm
from .attention import attention
from .conv1d_silu import conv1d_silu, conv1d_silu_bwd, conv1d_silu_fwd
from .mixer import mixer, mixer_bwd, mixer_fwd
from .norm_act import norm_act
from .selective_scan import (
    selective_scan,
    selective_scan_bwd,
    selective_scan_fwd,
    states_shape,
)
from .stem_conv import stem_conv

__all__ = [
    "add_layer_norm",
    "attention",
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
    "work_dtype",
]

"""MambaVision: the vision backbones with a fused mixer.

The operators live in `mambavision.ops`. Importing needs no Triton and touches no GPU. The names
below are imported when first used: torch takes seconds, and `mambavision --help` needs none of it.
"""

import warnings
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout `kernels/` and `reference/` lie beside this folder; installed, inside it.
_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():
    __path__.append(str(_here.parent))

try:
    _other = metadata.version("mambavision")
except metadata.PackageNotFoundError:
    pass
else:
    warnings.warn(
        f"the distribution 'mambavision' {_other} is installed too and writes into the same folder "
        "as 'mambavision-triton': run `pip uninstall mambavision`, then `pip install "
        "--force-reinstall --no-deps mambavision-triton`, or keep them in two environments",
        stacklevel=2,
    )

if TYPE_CHECKING:
    from .cold_start import warmup as warmup
    from .dense import features as features
    from .fuse import fuse_mixers as fuse_mixers
    from .fuse import unfuse_mixers as unfuse_mixers
    from .mamba_ssm import provide_mamba_ssm as provide_mamba_ssm
    from .mixer import MambaVisionMixer as MambaVisionMixer
    from .model import MambaVision as MambaVision
    from .ops import conv1d_silu as conv1d_silu
    from .ops import selective_scan as selective_scan
    from .ops import selective_scan_fn as selective_scan_fn
    from .variants import create_model as create_model
    from .variants import list_models as list_models
    from .variants import load_model as load_model
    from .weights import load_checkpoint as load_checkpoint
    from .weights import read_config as read_config
    from .weights import save_checkpoint as save_checkpoint

_HOME = {
    "MambaVision": "model",
    "MambaVisionMixer": "mixer",
    "conv1d_silu": "ops",
    "create_model": "variants",
    "features": "dense",
    "fuse_mixers": "fuse",
    "list_models": "variants",
    "load_checkpoint": "weights",
    "load_model": "variants",
    "provide_mamba_ssm": "mamba_ssm",
    "read_config": "weights",
    "save_checkpoint": "weights",
    "selective_scan": "ops",
    "selective_scan_fn": "ops",
    "unfuse_mixers": "fuse",
    "warmup": "cold_start",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"mambavision.{_HOME[name]}"), name)
    raise AttributeError(f"module 'mambavision' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

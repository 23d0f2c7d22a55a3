"""The published sizes by name, and which of them a set of weights belongs to.

Sizes, preprocessing and repositories are those of the published models, arXiv 2407.08083.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["VARIANTS", "Variant", "sizes_of", "variants_of"]

_BLOCK = re.compile(r"levels\.[0-3]\.blocks\.\d+\.")


@dataclass(frozen=True)
class Variant:
    """Arguments of `MambaVision`, the repository of the published weights, their preprocessing.

    Images of the published weights are normalised with ImageNet's mean and deviation and resized
    bicubically, so that `crop_pct` of the shorter side ("center") or all of it ("squash", which
    gives up the aspect ratio) fills `input_size`.
    """

    repository: str
    dim: int
    in_dim: int
    depths: tuple[int, int, int, int]
    num_heads: tuple[int, int, int, int]
    window_size: tuple[int, int, int, int] = (8, 8, 14, 7)
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.2
    layer_scale: float | None = None
    input_size: int = 224
    crop_pct: float = 1.0
    crop_mode: str = "center"
    mean: tuple[float, float, float] = field(default=(0.485, 0.456, 0.406), repr=False)
    std: tuple[float, float, float] = field(default=(0.229, 0.224, 0.225), repr=False)

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of `MambaVision`."""
        names = "dim in_dim depths num_heads window_size mlp_ratio drop_path_rate layer_scale"
        return {name: getattr(self, name) for name in names.split()}


_HEADS, _LARGE_HEADS = (2, 4, 8, 16), (4, 8, 16, 32)
_BASE: dict[str, Any] = {
    "dim": 128, "in_dim": 64, "depths": (3, 3, 10, 5), "num_heads": _HEADS,
    "drop_path_rate": 0.3, "layer_scale": 1e-5,
}  # fmt: skip
_LARGE: dict[str, Any] = {
    "dim": 196, "in_dim": 64, "depths": (3, 3, 10, 5), "num_heads": _LARGE_HEADS,
    "drop_path_rate": 0.3, "layer_scale": 1e-5,
}  # fmt: skip
_LARGE_2: dict[str, Any] = {**_LARGE, "depths": (3, 3, 12, 5)}
_LARGE_3: dict[str, Any] = {
    "dim": 256, "in_dim": 64, "depths": (3, 3, 20, 10), "num_heads": _LARGE_HEADS,
    "drop_path_rate": 0.5, "layer_scale": 1e-5,
}  # fmt: skip
_512: dict[str, Any] = {
    "window_size": (8, 8, 32, 16), "input_size": 512, "crop_pct": 0.93, "crop_mode": "squash",
}  # fmt: skip

VARIANTS = {
    "mamba_vision_T": Variant("nvidia/MambaVision-T-1K", 80, 32, (1, 3, 8, 4), _HEADS),
    "mamba_vision_T2": Variant(
        "nvidia/MambaVision-T2-1K", 80, 32, (1, 3, 11, 4), _HEADS, crop_pct=0.98
    ),
    "mamba_vision_S": Variant(
        "nvidia/MambaVision-S-1K", 96, 64, (3, 3, 7, 5), _HEADS, crop_pct=0.93
    ),
    "mamba_vision_B": Variant("nvidia/MambaVision-B-1K", **_BASE),
    "mamba_vision_B_21k": Variant("nvidia/MambaVision-B-21K", **_BASE),
    "mamba_vision_L": Variant("nvidia/MambaVision-L-1K", **_LARGE),
    "mamba_vision_L_21k": Variant("nvidia/MambaVision-L-21K", **_LARGE),
    "mamba_vision_L2": Variant("nvidia/MambaVision-L2-1K", **_LARGE_2),
    "mamba_vision_L2_512_21k": Variant("nvidia/MambaVision-L2-512-21K", **_LARGE_2, **_512),
    "mamba_vision_L3_256_21k": Variant(
        "nvidia/MambaVision-L3-256-21K", **_LARGE_3, window_size=(8, 8, 16, 8), input_size=256
    ),
    "mamba_vision_L3_512_21k": Variant("nvidia/MambaVision-L3-512-21K", **_LARGE_3, **_512),
}


def sizes_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `MambaVision` that show in names and shapes; empty where they do not."""
    blocks = {tuple(name.split(".")[1:4:2]) for name in state if _BLOCK.match(name)}
    depths = Counter(stage for stage, _ in blocks)
    try:
        hidden, width = state["levels.3.blocks.0.mlp.fc1.weight"].shape
        return {
            "dim": state["patch_embed.conv_down.3.weight"].shape[0],
            "in_dim": state["patch_embed.conv_down.0.weight"].shape[0],
            "depths": tuple(depths[stage] for stage in "0123"),
            "mlp_ratio": hidden / width,
        }
    except (KeyError, ValueError, IndexError, ZeroDivisionError):
        return {}


def variants_of(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the published variants with the sizes of these weights, whatever their classes."""
    sizes = sizes_of(state)
    scaled = any(name.endswith(".gamma_1") for name in state)
    return [
        name
        for name, variant in VARIANTS.items()
        if sizes
        and scaled == (variant.layer_scale is not None)
        and all(getattr(variant, key) == value for key, value in sizes.items())
    ]

"""The models of the whole-backbone benchmarks: ours, and peers of like size from timm.

`top1` is the ImageNet-1K accuracy that the named source published for this model at 224 px,
trained on ImageNet-1K alone and without a teacher (LeViT knows no other training than with one). It
is quoted, never measured here.
"""

from dataclasses import dataclass

__all__ = ["MODELS", "SIZES", "Model", "pick"]


@dataclass(frozen=True)
class Model:
    """`name` as the library it comes from calls it, `params` in millions with 1,000 classes."""

    family: str
    size: str
    name: str
    params: float
    top1: float
    source: str
    library: str = "timm"

    @property
    def label(self) -> str:
        return f"{self.family}-{self.size}"


_OURS = "mambavision"
_PAPERS = {
    "MambaVision": "arXiv 2407.08083",
    "Swin": "arXiv 2103.14030",
    "ConvNeXt": "arXiv 2201.03545",
    "DeiT": "arXiv 2012.12877",
    "PVTv2": "arXiv 2106.13797",
    "Twins-SVT": "arXiv 2104.13840",
    "XCiT": "arXiv 2106.09681",
    "LeViT": "arXiv 2104.01136",
    "FocalNet": "arXiv 2203.11926",
    "MambaOut": "arXiv 2405.07992",
    "MaxViT": "arXiv 2204.01697",
    "CAFormer": "arXiv 2210.13452",
    "NextViT": "arXiv 2207.05501",
}

# Family, size, name, millions of parameters, published top-1, library.
_TABLE = (
    ("MambaVision", "T", "mamba_vision_T", 31.8, 82.3, _OURS),
    ("MambaVision", "T2", "mamba_vision_T2", 35.1, 82.7, _OURS),
    ("MambaVision", "S", "mamba_vision_S", 50.1, 83.3, _OURS),
    ("MambaVision", "B", "mamba_vision_B", 97.7, 84.2, _OURS),
    ("MambaVision", "L", "mamba_vision_L", 228.0, 85.0, _OURS),
    ("MambaVision", "L2", "mamba_vision_L2", 241.6, 85.3, _OURS),
    ("Swin", "T", "swin_tiny_patch4_window7_224", 28.3, 81.3, "timm"),
    ("Swin", "S", "swin_small_patch4_window7_224", 49.6, 83.0, "timm"),
    ("Swin", "B", "swin_base_patch4_window7_224", 87.8, 83.5, "timm"),
    ("ConvNeXt", "T", "convnext_tiny", 28.6, 82.1, "timm"),
    ("ConvNeXt", "S", "convnext_small", 50.2, 83.1, "timm"),
    ("ConvNeXt", "B", "convnext_base", 88.6, 83.8, "timm"),
    ("ConvNeXt", "L", "convnext_large", 197.8, 84.3, "timm"),
    ("DeiT", "S", "deit_small_patch16_224", 22.1, 79.8, "timm"),
    ("DeiT", "B", "deit_base_patch16_224", 86.6, 81.8, "timm"),
    ("PVTv2", "B2", "pvt_v2_b2", 25.4, 82.0, "timm"),
    ("PVTv2", "B3", "pvt_v2_b3", 45.2, 83.1, "timm"),
    ("PVTv2", "B5", "pvt_v2_b5", 82.0, 83.8, "timm"),
    ("Twins-SVT", "S", "twins_svt_small", 24.1, 81.7, "timm"),
    ("Twins-SVT", "B", "twins_svt_base", 56.1, 83.2, "timm"),
    ("Twins-SVT", "L", "twins_svt_large", 99.3, 83.7, "timm"),
    ("XCiT", "S12", "xcit_small_12_p16_224", 26.3, 82.0, "timm"),
    ("XCiT", "S24", "xcit_small_24_p16_224", 47.7, 82.6, "timm"),
    ("XCiT", "M24", "xcit_medium_24_p16_224", 84.4, 82.7, "timm"),
    ("XCiT", "L24", "xcit_large_24_p16_224", 189.1, 82.9, "timm"),
    ("LeViT", "256", "levit_256", 18.9, 81.6, "timm"),
    ("LeViT", "384", "levit_384", 39.1, 82.6, "timm"),
    ("FocalNet", "T", "focalnet_tiny_lrf", 28.6, 82.3, "timm"),
    ("FocalNet", "S", "focalnet_small_lrf", 50.3, 83.5, "timm"),
    ("FocalNet", "B", "focalnet_base_lrf", 88.7, 83.9, "timm"),
    ("MambaOut", "T", "mambaout_tiny", 26.5, 82.7, "timm"),
    ("MambaOut", "S", "mambaout_small", 48.5, 84.1, "timm"),
    ("MambaOut", "B", "mambaout_base", 84.8, 84.2, "timm"),
    ("MaxViT", "T", "maxvit_tiny_tf_224", 30.9, 83.62, "timm"),
    ("MaxViT", "B", "maxvit_base_tf_224", 119.5, 84.95, "timm"),
    ("MaxViT", "L", "maxvit_large_tf_224", 211.8, 85.17, "timm"),
    ("CAFormer", "S18", "caformer_s18", 26.3, 83.6, "timm"),
    ("CAFormer", "S36", "caformer_s36", 39.3, 84.5, "timm"),
    ("CAFormer", "B36", "caformer_b36", 98.8, 85.5, "timm"),
    ("NextViT", "S", "nextvit_small", 31.8, 82.5, "timm"),
    ("NextViT", "B", "nextvit_base", 44.8, 83.2, "timm"),
    ("NextViT", "L", "nextvit_large", 57.9, 83.6, "timm"),
)

MODELS = {
    name: Model(family, size, name, params, top1, _PAPERS[family], library)
    for family, size, name, params, top1, library in _TABLE
}

# What a default run takes: three of ours, each with peers of its size.
SIZES = {
    "mamba_vision_T": (
        "swin_tiny_patch4_window7_224", "convnext_tiny", "deit_small_patch16_224", "pvt_v2_b2",
        "twins_svt_small", "xcit_small_12_p16_224", "levit_384", "focalnet_tiny_lrf",
        "mambaout_tiny",
    ),
    "mamba_vision_B": (
        "swin_base_patch4_window7_224", "convnext_base", "deit_base_patch16_224", "pvt_v2_b5",
        "twins_svt_large", "xcit_medium_24_p16_224", "focalnet_base_lrf", "mambaout_base",
    ),
    "mamba_vision_L": ("convnext_large", "xcit_large_24_p16_224", "maxvit_large_tf_224"),
}  # fmt: skip


def pick(names: list[str]) -> list[Model]:
    """Models by name; "default" and "all" stand for groups. ValueError for an unknown name."""
    chosen: dict[str, Model] = {}
    for name in names:
        if name == "all":
            group = list(MODELS)
        elif name == "default":
            group = [x for ours, peers in SIZES.items() for x in (ours, *peers)]
        elif name in MODELS:
            group = [name]
        else:
            raise ValueError(f"no model {name!r}; known: default, all, {', '.join(MODELS)}")
        chosen |= {x: MODELS[x] for x in group}
    return list(chosen.values())

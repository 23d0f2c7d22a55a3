"""Models by their published names."""

import difflib
from os import PathLike
from typing import Any

from .hub import locate
from .model import MambaVision
from .published import VARIANTS, Variant
from .weights import load_checkpoint

__all__ = ["VARIANTS", "Variant", "create_model", "list_models"]


def list_models() -> list[str]:
    """The names `create_model` knows.

    >>> list_models()[0]
    'mamba_vision_T'
    """
    return list(VARIANTS)


def create_model(
    name: str,
    pretrained: bool = False,
    checkpoint: str | PathLike[str] | None = None,
    **overrides: Any,
) -> MambaVision:
    """The published model of that name, in training mode, with random weights or loaded ones.

    `overrides` are arguments of `MambaVision` that shall differ. `checkpoint` is what
    `load_checkpoint` takes: a file, a repository or a URL. `pretrained=True` takes the published
    weights (their licence is CC-BY-NC-SA: not for commercial use) through huggingface_hub and its
    cache. With either, giving a `num_classes` that is not that of the weights leaves the classifier
    as initialised.

    Raises ValueError for an unknown name or weights that do not fit, RuntimeError where the
    published weights cannot be fetched.

    >>> create_model("mamba_vision_T", num_classes=10).head.out_features
    10
    """
    if name not in VARIANTS:
        near = difflib.get_close_matches(str(name), VARIANTS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"create_model: no model {name!r}; did you mean {near!r}? "
            f"Known: {', '.join(VARIANTS)}"
        )
    if pretrained and checkpoint is not None:
        raise ValueError("create_model: give either pretrained=True or checkpoint, not both")
    variant = VARIANTS[name]
    if pretrained:
        checkpoint = locate(variant.repository).path
    model = MambaVision(**{**variant.arguments, **overrides})
    if checkpoint is not None:
        load_checkpoint(model, checkpoint, num_classes=overrides.get("num_classes"))
    return model

"""Models by their published names."""

import difflib
from inspect import signature
from os import PathLike
from typing import Any

from .hub import locate
from .model import MambaVision
from .published import VARIANTS, Variant
from .weights import load_checkpoint, read_config

__all__ = ["VARIANTS", "Variant", "create_model", "list_models", "load_model"]


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


def load_model(path_or_repo_id: str | PathLike[str]) -> MambaVision:
    """The model that a file or a run folder holds, of whatever sizes, in training mode.

    Sizes are those that `save_checkpoint` and `mambavision train` keep with the weights; what else
    they keep, such as the classes' names, `read_config` returns. Sources and errors are those of
    `load_checkpoint`. Raises ValueError where the sizes are not there: `create_model` with a name
    and `checkpoint` then loads them.

    >>> model = load_model("runs/train").eval()  # doctest: +SKIP
    """
    config = read_config(path_or_repo_id)
    if "dim" not in config:
        raise ValueError(
            f"load_model: {path_or_repo_id} does not say of what model it is; "
            "create_model(NAME, checkpoint=PATH) loads it into a model of that name"
        )
    model = MambaVision(**{k: config[k] for k in signature(MambaVision).parameters if k in config})
    load_checkpoint(model, path_or_repo_id)
    return model

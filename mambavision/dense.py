"""The maps of a backbone's stages, for segmentation, detection and other dense tasks."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

from torch import Tensor, nn

from .model import MambaVision
from .variants import create_model

__all__ = ["Features", "features"]


def _stages(out_indices: Sequence[int]) -> list[int]:
    given = list(out_indices) if isinstance(out_indices, Sequence) else []
    if not given or given != [i for i in range(4) if i in given]:
        raise ValueError(
            "features: out_indices must be stages from 0 to 3 in rising order, each once, got "
            f"{out_indices!r}"
        )
    return given


class Features(nn.Module):
    """The backbone of a dense task: images to the maps of some stages.

    `channels[i]` are those of map i and `reductions[i]` how many times smaller than the image it
    is, rounded up, both in the order of `out_indices`. Inside is `model`, a `MambaVision` without
    what the maps do not need: every parameter left takes part in them.
    """

    def __init__(self, model: MambaVision, out_indices: Sequence[int] = (0, 1, 2, 3)):
        super().__init__()
        self.out_indices = _stages(out_indices)
        self.channels = [model.arguments["dim"] * 2**i for i in self.out_indices]
        self.reductions = [4 * 2**i for i in self.out_indices]
        self.model = model
        model.reset_classifier(0)
        model.norm = nn.Identity()  # type: ignore[assignment]
        model.levels = model.levels[: self.out_indices[-1] + 1]
        model.levels[-1].downsample = None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> list[Tensor]:
        """(batch, in_chans, height, width), from 32 pixels on, to a list of (batch, channels[i],
        height / reductions[i], width / reductions[i]), sizes rounded up."""
        maps = self.model.forward_stages(x)
        return [maps[i] for i in self.out_indices]


def features(
    name: str,
    out_indices: Sequence[int] = (0, 1, 2, 3),
    pretrained: bool = False,
    checkpoint: str | PathLike[str] | None = None,
    **overrides: Any,
) -> Features:
    """A published model without its classifier, that gives the maps of its stages.

        map[i] = what the blocks of stage out_indices[i] return, before the downsampling

    The last stage's is not normalised. `name`, `pretrained`, `checkpoint` and `overrides` are those
    of `create_model`; a classifier among the weights is left out. Large images want larger windows,
    which no weight depends on: `window_size=(8, 8, 32, 16)` spans 512 pixels, as 14 and 7 span 224.

    Raises ValueError for unknown names and stages, weights that do not fit, and images smaller than
    32 pixels; RuntimeError where the published weights cannot be fetched.

    >>> backbone = features("mamba_vision_T", out_indices=(1, 3))
    >>> backbone.channels, backbone.reductions
    ([160, 640], [8, 32])
    >>> [x.shape for x in backbone(torch.randn(1, 3, 100, 75))]
    [torch.Size([1, 160, 13, 10]), torch.Size([1, 640, 4, 3])]
    """
    _stages(out_indices)  # before the weights, which may take long to come
    model = create_model(name, pretrained, checkpoint, num_classes=0, **overrides)
    return Features(model, out_indices)

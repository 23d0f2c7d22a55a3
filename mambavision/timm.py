"""MambaVision for timm: importing this module registers the published variants.

    import timm, mambavision.timm

    timm.create_model("mamba_vision_T", pretrained=True)                  # classifier
    timm.create_model("mamba_vision_T", features_only=True)               # maps of the four stages

The names are the published ones and the only ones: checkpoints, papers and scripts use them, and a
second, lower-case name for each would be another entry in every list with nobody to ask for it.
Where another module has registered the same names before, the later import wins, as always in timm,
and one warning says so.

Weights are read by `mambavision.weights`, adapted and built upon by timm.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

try:
    from timm.models import (
        PretrainedCfg,
        adapt_input_conv,
        build_model_with_cfg,
        generate_default_cfgs,
        is_model,
        model_entrypoint,
        register_model,
        register_notrace_module,
        resolve_pretrained_cfg,
    )
except (ImportError, RuntimeError) as error:
    # A torchvision that belongs to another torch is a RuntimeError.
    raise ImportError(
        f"mambavision.timm needs timm 1.0.31 or newer ({error}): pip install "
        "'mambavision-triton[timm]', with the torchvision that belongs to your torch"
    ) from error

from .blocks import Stage
from .model import MambaVision
from .published import VARIANTS, Variant
from .weights import _state_dict, load_checkpoint

# timm appends the registered names.
__all__ = ["TimmMambaVision", "default_cfgs", "register"]

# Windows depend on sizes: to a symbolic trace a stage is one step.
register_notrace_module(Stage)


class TimmMambaVision(MambaVision):
    """`MambaVision` with what timm asks of a model beyond that; same parameters, same names.

    `global_pool` is "avg", or "" for maps, which needs `num_classes=0`. `drop_rate` is, as in the
    published models, that of the token blocks' layers.

    >>> model = timm.create_model("mamba_vision_T", num_classes=10)  # doctest: +SKIP
    """

    def __init__(self, *args: Any, global_pool: str = "avg", **kwargs: Any):
        super().__init__(*args, **kwargs)
        if global_pool != "avg":
            self.reset_classifier(self.num_classes, global_pool)
        self.feature_info = [
            {
                "num_chs": self.arguments["dim"] * 2**stage,
                "reduction": 4 * 2**stage,
                "module": f"levels.{stage}",
            }
            for stage in range(4)
        ]

    @property
    def head_hidden_size(self) -> int:
        """Channels that the classifier reads."""
        return self.num_features

    def _check_input(self, x: Tensor) -> None:
        # While a symbolic trace is taken there is nothing to look at.
        if not isinstance(x, torch.fx.Proxy):
            super()._check_input(x)

    def _stage_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        """None: all stages; n: the last n; else those given, from the end where negative."""
        stages = len(self.levels)
        if isinstance(indices, int):
            found = list(range(stages - indices, stages)) if 0 < indices <= stages else []
        elif indices is None:
            found = list(range(stages))
        else:
            found = [range(stages)[i] for i in indices if -stages <= i < stages]
            found = found if len(found) == len(indices) else []
        if not found:
            raise ValueError(
                f"TimmMambaVision: indices must be 1 to {stages}, or stages from {-stages} to "
                f"{stages - 1}, got {indices!r}"
            )
        return found

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The map of `forward_features`, and before it the stages' maps, in the order asked for.

        Maps are those of `forward_stages`; with `norm` the last stage's is normalised, the others
        have no norm. `stop_early` leaves out the stages after the last one asked for; the first
        return value is then that one's map. `intermediates_only` leaves out the first value.

        Raises ValueError for unknown stages and formats other than "NCHW".

        >>> last, maps = model.forward_intermediates(images, (1, 3))  # doctest: +SKIP
        """
        if output_fmt != "NCHW":
            raise ValueError(
                f"forward_intermediates: output_fmt must be 'NCHW', got {output_fmt!r}"
            )
        taken = self._stage_indices(indices)
        stages = len(self.levels)
        self._check_input(x)
        maps: list[Tensor] = []
        following = self.patch_embed(x)
        for stage in self.levels[: max(taken) + 1 if stop_early else stages]:
            here, following = stage(following)
            maps.append(here)
        last = maps[-1]
        if len(maps) == stages and (norm or not intermediates_only):
            last = self.norm(last)
        if norm:
            maps[-1] = last
        found = [maps[i] for i in taken]
        return found if intermediates_only else (last, found)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Removes what `forward_intermediates` of these stages does not need; their indices.

        Every parameter left takes part in the maps, as distributed training wants it. Head and norm
        belong to the last stage and go where that goes.
        """
        taken = self._stage_indices(indices)
        end = max(taken) + 1
        shorter = end < len(self.levels)
        if prune_head or shorter:
            self.reset_classifier(0, "")
        if shorter:
            self.levels = self.levels[:end]
            last = self.levels[-1]
            assert isinstance(last, Stage)
            last.downsample = None
            self.num_features = self.feature_info[end - 1]["num_chs"]
        if prune_norm or shorter:
            self.norm = nn.Identity()  # type: ignore[assignment]
        return taken


def _cfg(variant: Variant) -> dict[str, Any]:
    size = variant.input_size
    return {
        "hf_hub_id": variant.repository or None,
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (-(-size // 32), -(-size // 32)),
        "interpolation": "bicubic",
        "crop_pct": variant.crop_pct,
        "crop_mode": variant.crop_mode,
        "mean": variant.mean,
        "std": variant.std,
        "first_conv": "patch_embed.conv_down.0",
        "classifier": "head",
        "license": "cc-by-nc-sa-4.0" if variant.repository else None,
        "paper_ids": "arXiv:2407.08083",
    }


def _load(model: TimmMambaVision, source: str, cfg: PretrainedCfg, strict: bool) -> None:
    """`load_checkpoint`; the first convolution and the classifier need not fit."""
    conv, chans = model.patch_embed.conv_down[0], cfg.input_size[0]
    assert isinstance(conv, nn.Conv2d)

    def adapt(into: int, out_of: int) -> None:
        weight = adapt_input_conv(into, conv.weight.detach(), base_chans=out_of)
        conv.weight = nn.Parameter(weight)

    # The file's number of channels for as long as it is read.
    adapt(chans, model.in_chans)
    other_classes = None if model.num_classes == cfg.num_classes else model.num_classes
    load_checkpoint(model, source, strict=strict, num_classes=other_classes)
    adapt(model.in_chans, chans)


def _create(name: str, variant: Variant, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    cfg = resolve_pretrained_cfg(
        name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")
    )
    # Folders and repositories in timm's own layout ("local-dir:", "hf-hub:"), and what is asked for
    # in a cache of its own, are timm's to find.
    source = None
    if pretrained and not (cfg.source or cfg.state_dict or kwargs.get("cache_dir")):
        source = cfg.file or cfg.hf_hub_id or cfg.url
    if kwargs.get("features_only"):
        kwargs["num_classes"] = 0

    def build(**arguments: Any) -> TimmMambaVision:
        model = TimmMambaVision(**arguments)
        if source:
            _load(model, source, cfg, kwargs.get("pretrained_strict", True))
        return model

    return build_model_with_cfg(
        build,
        name,
        pretrained and source is None,
        pretrained_filter_fn=lambda state, model: _state_dict(state, Path(name)),
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{**variant.arguments, **kwargs},
    )


default_cfgs: dict[str, Any] = {}


def register(name: str, variant: Variant) -> None:
    """Gives timm a model of these sizes under this name, in place of whatever bore it before.

    >>> register("mamba_vision_mine", Variant("", 32, 16, (1, 1, 2, 2), (1, 1, 2, 4)))
    ... # doctest: +SKIP
    """

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(name, variant, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{name}: see `timm.create_model`."
    globals()[name] = create
    default_cfgs.update(generate_default_cfgs({name: _cfg(variant)}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Overwriting")
        register_model(create)


_others = {model_entrypoint(name).__module__ for name in VARIANTS if is_model(name)} - {__name__}
if _others:
    warnings.warn(
        f"the names of the MambaVision variants in timm were those of {', '.join(sorted(_others))} "
        "and now are those of mambavision.timm: of two modules the one imported last has them",
        stacklevel=2,
    )
for _name, _variant in VARIANTS.items():
    register(_name, _variant)

"""MambaVision: stem, four stages, head.

    stem     two strided convolutions     (batch, in_chans, H, W) -> (batch, dim, H/4, W/4)
    stage 1  convolution blocks           (batch, dim, H/4, W/4)
    stage 2  convolution blocks           (batch, 2 dim, H/8, W/8)
    stage 3  mixers, then attention       (batch, 4 dim, H/16, W/16), in windows
    stage 4  mixers, then attention       (batch, 8 dim, H/32, W/32), in windows
    head     batch norm, mean, linear     (batch, num_classes)

Sizes are rounded up, so any height and width from 32 pixels on will do, square or not.

Source: Hatamizadeh and Kautz, arXiv 2407.08083.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Stage, Stem, conv_stage, token_stage
from .inference import OptimizedMambaVision, optimize_for_inference
from .mixer import MambaVisionMixer

__all__ = ["MambaVision"]

SMALLEST = 32


def _check_config(
    sizes: dict[str, Any],
    per_stage: dict[str, Sequence[int]],
    rates: dict[str, float],
    dim: int,
    mlp_ratio: float,
) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < (name != "num_classes"):
            least = 0 if name == "num_classes" else 1
            raise ValueError(f"MambaVision: {name} must be an integer >= {least}, got {size!r}")
    for name, values in per_stage.items():
        four = isinstance(values, Sequence) and len(values) == 4
        if not four or any(not isinstance(v, int) or v < 1 for v in values):
            raise ValueError(
                f"MambaVision: {name} must be four integers >= 1, one per stage, got {values!r}"
            )
    for name, rate in rates.items():
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"MambaVision: {name} must be at least 0 and below 1, got {rate!r}")
    if not int(dim * mlp_ratio) >= 1:
        raise ValueError(f"MambaVision: mlp_ratio must be at least 1 / dim, got {mlp_ratio!r}")
    for stage in (2, 3):
        width, heads = dim * 2**stage, per_stage["num_heads"][stage]
        if width % heads:
            raise ValueError(
                f"MambaVision: num_heads of stage {stage + 1} must divide its {width} channels, "
                f"got {heads}"
            )


class MambaVision(nn.Module):
    """The MambaVision backbone with its classifier: images to logits.

        logits = head(mean(norm(stage4(stage3(stage2(stage1(stem(x))))))))

    x is (batch, in_chans, height, width), floating point, height and width at least 32; logits are
    (batch, num_classes). Sequences of arguments hold one entry per stage; `num_heads` and
    `window_size` count for stages 3 and 4. `create_model` knows the published sizes.

    `layer_scale` and `layer_scale_conv` are the initial factors on the branches of token and
    convolution blocks, None for no such parameters. `drop_path_rate` is that of the last block; the
    rate rises linearly from 0. A true `qk_scale` puts LayerNorms over q and k, as published.
    `resolution` is accepted and ignored, other unknown keywords are a TypeError.

    By default every linear layer starts from a normal distribution of deviation 0.02, truncated at
    +-2, with zero bias, as published; that discards Mamba's own initialisation of the steps, which
    `mamba_dt_init=True` keeps. `backend` is that of the operators in `ops`.

    Raises ValueError for an input of wrong shape, size or device, TypeError for a wrong dtype.

    >>> model = MambaVision(
    ...     dim=16, in_dim=8, depths=(1, 1, 2, 2), window_size=(8, 8, 4, 2), mlp_ratio=2,
    ...     num_heads=(1, 1, 2, 4), num_classes=10,
    ... )
    >>> model(torch.randn(2, 3, 64, 48)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        dim: int,
        in_dim: int,
        depths: Sequence[int],
        window_size: Sequence[int],
        mlp_ratio: float,
        num_heads: Sequence[int],
        drop_path_rate: float = 0.2,
        in_chans: int = 3,
        num_classes: int = 1000,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        layer_scale: float | None = None,
        layer_scale_conv: float | None = None,
        *,
        mamba_dt_init: bool = False,
        backend: str = "auto",
        **ignored: Any,
    ):
        super().__init__()
        unknown = sorted(ignored.keys() - {"resolution"})
        if unknown:
            raise TypeError(f"MambaVision: unknown keyword {', '.join(map(repr, unknown))}")
        _check_config(
            {"dim": dim, "in_dim": in_dim, "in_chans": in_chans, "num_classes": num_classes},
            {"depths": depths, "window_size": window_size, "num_heads": num_heads},
            {
                "drop_path_rate": drop_path_rate,
                "drop_rate": drop_rate,
                "attn_drop_rate": attn_drop_rate,
            },
            dim,
            mlp_ratio,
        )
        # Another model like this one is made from them: they are kept with its weights.
        self.arguments: dict[str, Any] = {
            "dim": dim,
            "in_dim": in_dim,
            "depths": tuple(depths),
            "window_size": tuple(window_size),
            "mlp_ratio": mlp_ratio,
            "num_heads": tuple(num_heads),
            "drop_path_rate": drop_path_rate,
            "in_chans": in_chans,
            "num_classes": num_classes,
            "qkv_bias": qkv_bias,
            "qk_scale": qk_scale,
            "drop_rate": drop_rate,
            "attn_drop_rate": attn_drop_rate,
            "layer_scale": layer_scale,
            "layer_scale_conv": layer_scale_conv,
        }
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, 8 * dim
        self.global_pool = "avg"

        last = max(sum(depths) - 1, 1)
        rates = [drop_path_rate * index / last for index in range(sum(depths))]
        self.patch_embed = Stem(in_chans, in_dim, dim, backend)
        self.levels = nn.ModuleList()
        for index, depth in enumerate(depths):
            width, downsample = dim * 2**index, index < 3
            here, rates = rates[:depth], rates[depth:]
            if index < 2:
                stage = conv_stage(width, here, layer_scale_conv, downsample, backend=backend)
            else:
                stage = token_stage(
                    width,
                    here,
                    layer_scale,
                    downsample,
                    window_size=window_size[index],
                    num_heads=num_heads[index],
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_norm=bool(qk_scale),
                    drop=drop_rate,
                    attn_drop=attn_drop_rate,
                    backend=backend,
                )
            self.levels.append(stage)
        self.norm = nn.BatchNorm2d(self.num_features)
        self.head = self._new_head()
        self._initialise(mamba_dt_init)

    def _new_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        return nn.Linear(self.num_features, self.num_classes)

    def _initialise(self, mamba_dt_init: bool) -> None:
        kept = {
            m.dt_proj for m in self.modules() if mamba_dt_init and isinstance(m, MambaVisionMixer)
        }
        for module in self.modules():
            if isinstance(module, nn.Linear) and module not in kept:
                _initialise_linear(module)

    # From images to maps

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = getattr(x, "dtype", type(x).__name__)
            raise TypeError(f"MambaVision: x must be a floating-point tensor, got {got}")
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                "MambaVision: x must have shape (batch, in_chans, height, width) = "
                f"(batch, {self.in_chans}, height, width), got {tuple(x.shape)}"
            )
        if min(x.shape[2:]) < SMALLEST:
            raise ValueError(
                f"MambaVision: height and width of x must be at least {SMALLEST}, "
                f"got {tuple(x.shape[2:])}"
            )
        weight = self.patch_embed.conv_down[0].weight
        if x.device != weight.device:
            raise ValueError(
                f"MambaVision: x must be on the model's device {weight.device}, got {x.device}"
            )
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"MambaVision: x must have the model's dtype {weight.dtype}, got {x.dtype} "
                "(or run it under torch.autocast)"
            )

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """Images to the four stages' maps, for dense tasks.

        Map i = 0 .. 3 is what the blocks of its stage return, before the downsampling: (batch,
        2^i dim, H / 2^(i+2), W / 2^(i+2)), sizes rounded up. The last one is not normalised.
        """
        self._check_input(x)
        maps: list[Tensor] = []
        following: Tensor | None = self.patch_embed(x)
        for stage in self.levels:
            here, following = stage(following)
            maps.append(here)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the last stage's map, normalised: (batch, 8 dim, H / 32, W / 32)."""
        return self.norm(self.forward_stages(x)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map of `forward_features` to logits or, with `pre_logits`, to its mean."""
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    # Inference

    def optimize_for_inference(
        self,
        dtype: torch.dtype | None = None,
        *,
        compile: bool | str = False,
        cuda_graph: bool = False,
    ) -> OptimizedMambaVision:
        """A copy in evaluation mode that computes the same with fewer operations, in `dtype`.

        See `mambavision.inference.optimize_for_inference`.

        >>> fast = model.eval().optimize_for_inference(torch.bfloat16)  # doctest: +SKIP
        """
        return optimize_for_inference(self, dtype, compile=compile, cuda_graph=cuda_graph)

    # The classifier

    def get_classifier(self) -> nn.Module:
        """The last layer: nn.Linear, or nn.Identity where num_classes is 0."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer, on the same device and in the same dtype; 0 classes: none.

        `global_pool` is "avg", or "" for maps instead of means, which only 0 classes allow; None
        leaves it as it is.
        """
        if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 0:
            raise ValueError(
                f"reset_classifier: num_classes must be an integer >= 0, got {num_classes!r}"
            )
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in ("avg", ""):
            raise ValueError(f"reset_classifier: global_pool must be 'avg' or '', got {pool!r}")
        if pool == "" and num_classes > 0:
            raise ValueError(
                f"reset_classifier: global_pool='' needs num_classes = 0, got {num_classes}"
            )
        self.num_classes, self.global_pool = num_classes, pool
        self.arguments["num_classes"] = num_classes
        like = next(self.parameters())
        self.head = self._new_head().to(device=like.device, dtype=like.dtype).train(self.training)
        if isinstance(self.head, nn.Linear):
            _initialise_linear(self.head)

    # Training

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether every block keeps only its input for the backward pass, and runs again there.

        The gradients and the batch norms' statistics are those without it.
        """
        for stage in self.levels:
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that should not decay: A_log, D, norms, biases, layer scales."""
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.dim() <= 1 or name.endswith(".A_log")
        }

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm numbers the layers for `layer_decay`: stem, blocks, head.

        What stands between blocks counts with the block before it; `coarse` numbers whole stages.
        """
        before = (99999,)
        blocks = [
            (r"^levels\.(\d+)\.blocks\.(\d+)", None),
            (r"^levels\.(\d+)\.downsample", before),
            (r"^norm", before),
        ]
        return {
            "stem": r"^patch_embed",
            "blocks": [(r"^levels\.(\d+)", None), blocks[-1]] if coarse else blocks,
        }

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Trainable parameters for an optimizer: those that decay, and those of `no_weight_decay`.

        >>> optimizer = torch.optim.AdamW(model.param_groups(0.05), lr=1e-3)  # doctest: +SKIP
        """
        still = self.no_weight_decay()
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        return [
            {"params": [p for n, p in trained if n not in still], "weight_decay": weight_decay},
            {"params": [p for n, p in trained if n in still], "weight_decay": 0.0},
        ]


def _initialise_linear(linear: nn.Linear) -> None:
    nn.init.trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)

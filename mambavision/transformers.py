"""MambaVision for Hugging Face transformers: configuration, models, image processor.

Importing this module registers them with AutoConfig, AutoModel, AutoModelForImageClassification,
AutoBackbone and AutoImageProcessor under the model type of the published repositories,
"mambavision". These then load without `trust_remote_code`, and none of their code runs.

    MambaVisionModel                     pixels -> last map, its mean, the four stages' maps
    MambaVisionForImageClassification    pixels -> logits, and a loss where labels are given
    MambaVisionBackbone                  pixels -> stage maps, for UperNet, Mask2Former and others

All hold a `MambaVision` under the name `model`, as the published repositories do.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils import is_torchvision_available

from .blocks import Block, ConvBlock
from .dense import Features
from .mixer import MambaVisionMixer
from .model import MambaVision
from .published import VARIANTS

__all__ = [
    "MambaVisionBackbone",
    "MambaVisionConfig",
    "MambaVisionForImageClassification",
    "MambaVisionModel",
    "image_processor",
]


class MambaVisionConfig(BackboneConfigMixin, PreTrainedConfig):
    """The arguments of `MambaVision` and the preprocessing of images; by default mamba_vision_T.

    Reads the published config.json files: `num_classes` there is `num_labels` here, and fields that
    mean nothing here are kept as they are. `out_indices` or `out_features`, of 0 to 3 or "stage1"
    to "stage4", say which maps a backbone gives: by default all four.

    >>> MambaVisionConfig.from_variant("mamba_vision_B", num_labels=10).dim
    128
    """

    model_type = "mambavision"
    attribute_map = {"num_classes": "num_labels"}

    dim: int = 80
    in_dim: int = 32
    depths: list[int] | tuple[int, ...] = (1, 3, 8, 4)
    num_heads: list[int] | tuple[int, ...] = (2, 4, 8, 16)
    window_size: list[int] | tuple[int, ...] = (8, 8, 14, 7)
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.2
    in_chans: int = 3
    qkv_bias: bool = True
    qk_scale: float | None = None
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    layer_scale: float | None = None
    layer_scale_conv: float | None = None
    resolution: int = 224
    crop_pct: float = 1.0
    crop_mode: str = "center"
    mean: list[float] | tuple[float, ...] = (0.485, 0.456, 0.406)
    std: list[float] | tuple[float, ...] = (0.229, 0.224, 0.225)
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.stage_names = ["stage1", "stage2", "stage3", "stage4"]
        given = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        self.set_output_features_output_indices(*(given if any(given) else (None, [0, 1, 2, 3])))
        classes = kwargs.pop("num_classes", None)
        if self.id2label is None:
            kwargs.setdefault("num_labels", 1000 if classes is None else classes)
        super().__post_init__(**kwargs)

    @classmethod
    def from_variant(cls, name: str, **overrides: Any) -> "MambaVisionConfig":
        """That of a published variant; `overrides` are fields that shall differ."""
        if name not in VARIANTS:
            known = ", ".join(VARIANTS)
            raise ValueError(f"MambaVisionConfig: no variant {name!r}; known: {known}")
        variant = VARIANTS[name]
        names = ("crop_pct", "crop_mode", "mean", "std")
        preprocessing = {key: getattr(variant, key) for key in names}
        fields = {**variant.arguments, "resolution": variant.input_size, **preprocessing}
        return cls(**{**fields, **overrides})

    def backbone(self, num_classes: int) -> MambaVision:
        """The model these fields describe, with random weights."""
        names = (
            "dim in_dim depths num_heads window_size mlp_ratio drop_path_rate in_chans qkv_bias "
            "qk_scale drop_rate attn_drop_rate layer_scale layer_scale_conv"
        )
        arguments = {name: getattr(self, name) for name in names.split()}
        return MambaVision(**arguments, num_classes=num_classes)


class MambaVisionPreTrainedModel(PreTrainedModel):
    config_class = MambaVisionConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block", "ConvBlock"]
    config: MambaVisionConfig
    model: Any

    def _set_gradient_checkpointing(self, enable: bool = True, *_: Any, **__: Any) -> None:
        self.model.set_grad_checkpointing(enable)
        # Where transformers looks whether it is on.
        self.model.gradient_checkpointing = enable

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The initialisation of `MambaVision`, through functions that spare loaded weights."""
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv1d | nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, MambaVisionMixer):
            states = torch.arange(1, module.d_state + 1, device=module.A_log.device)
            init.copy_(module.A_log, states.log().expand_as(module.A_log))
            init.ones_(module.D)
        elif isinstance(module, Block):
            for scale in (module.gamma_1, module.gamma_2):
                if scale is not None:
                    init.constant_(scale, self.config.layer_scale)
        elif isinstance(module, ConvBlock):
            if module.gamma is not None:
                init.constant_(module.gamma, self.config.layer_scale_conv)
        else:
            super()._init_weights(module)


class MambaVisionModel(MambaVisionPreTrainedModel):
    """The backbone without its classifier.

    `pixel_values` (batch, in_chans, height, width) to `last_hidden_state`, the normalised last map
    (batch, 8 dim, height / 32, width / 32); `pooler_output`, its mean (batch, 8 dim); and
    `hidden_states`, always, the maps of the four stages, of strides 4, 8, 16 and 32.

    >>> model = MambaVisionModel(MambaVisionConfig())  # doctest: +SKIP
    >>> len(model(torch.randn(1, 3, 224, 224)).hidden_states)  # doctest: +SKIP
    4
    """

    # A classifier's weights are no mistake in a checkpoint to take features from.
    _keys_to_ignore_on_load_unexpected = [r"^(model\.)?head\."]

    def __init__(self, config: MambaVisionConfig):
        super().__init__(config)
        self.model = config.backbone(num_classes=0)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, return_dict: bool | None = None, **_: Any
    ) -> BaseModelOutputWithPoolingAndNoAttention | tuple[Any, ...]:
        maps = self.model.forward_stages(pixel_values)
        last = self.model.norm(maps[-1])
        output = BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=last,
            pooler_output=self.model.forward_head(last),
            hidden_states=tuple(maps),
        )
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()


class MambaVisionForImageClassification(MambaVisionPreTrainedModel):
    """The backbone with its classifier: `pixel_values` to `logits` (batch, num_labels).

    With `labels` also to `loss`, of the kind that config.problem_type says; `hidden_states` are the
    maps of the four stages where `output_hidden_states` asks for them.

    >>> model = MambaVisionForImageClassification(MambaVisionConfig())  # doctest: +SKIP
    >>> model(torch.randn(1, 3, 224, 224)).logits.shape  # doctest: +SKIP
    torch.Size([1, 1000])
    """

    def __init__(self, config: MambaVisionConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = config.backbone(num_classes=config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> ImageClassifierOutputWithNoAttention | tuple[Any, ...]:
        maps = self.model.forward_stages(pixel_values)
        logits = self.model.forward_head(self.model.norm(maps[-1]))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        asked = output_hidden_states
        show = self.config.output_hidden_states if asked is None else asked
        output = ImageClassifierOutputWithNoAttention(
            loss=loss, logits=logits, hidden_states=tuple(maps) if show else None
        )
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()


class MambaVisionBackbone(BackboneMixin, MambaVisionPreTrainedModel):
    """The maps of the stages that `config.out_indices` names, for transformers' dense models.

    `pixel_values` (batch, in_chans, height, width), from 32 pixels on, to `feature_maps`, each
    (batch, channels, height / stride, width / stride), sizes rounded up, and where asked for
    `hidden_states`, the maps of all stages up to the last one named.

    >>> backbone = MambaVisionConfig.from_variant("mamba_vision_T")  # doctest: +SKIP
    >>> config = UperNetConfig(backbone_config=backbone, num_labels=150)  # doctest: +SKIP
    >>> UperNetForSemanticSegmentation(config)(images).logits.shape[1]  # doctest: +SKIP
    150
    """

    has_attentions = False
    _keys_to_ignore_on_load_unexpected = [r"^(model\.)?(head|norm|levels)\."]

    def __init__(self, config: MambaVisionConfig):
        super().__init__(config)
        self.num_features = [config.dim * 2**stage for stage in range(4)]
        self.model = Features(config.backbone(num_classes=0), self.out_indices).model
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> BackboneOutput | tuple[Any, ...]:
        maps = self.model.forward_stages(pixel_values)
        asked = output_hidden_states
        show = self.config.output_hidden_states if asked is None else asked
        output = BackboneOutput(
            feature_maps=tuple(maps[i] for i in self.out_indices),
            hidden_states=tuple(maps) if show else None,
        )
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()


def image_processor(source: MambaVisionConfig | str) -> CLIPImageProcessorPil:
    """The preprocessing of a config, or of a published variant by its name.

    Resized bicubically by Pillow, so that `crop_pct` of the shorter side (crop_mode "center") or of
    both sides ("squash") makes the crop from the middle; then scaled and normalised. It is CLIP's
    image processor with other numbers. Equal to timm's evaluation transform except where a margin
    beside the crop is odd: the two round its half to different sides. Raises ValueError for an
    unknown variant.

    >>> processor = image_processor("mamba_vision_T")  # doctest: +SKIP
    >>> processor(images=picture, return_tensors="pt")["pixel_values"].shape  # doctest: +SKIP
    torch.Size([1, 3, 224, 224])
    """
    config = source if isinstance(source, MambaVisionConfig) else None
    config = config or MambaVisionConfig.from_variant(str(source))
    edge = math.floor(config.resolution / config.crop_pct)
    squash = config.crop_mode == "squash"
    return CLIPImageProcessorPil(
        size={"height": edge, "width": edge} if squash else {"shortest_edge": edge},
        crop_size={"height": config.resolution, "width": config.resolution},
        image_mean=list(config.mean),
        image_std=list(config.std),
    )


AutoConfig.register(MambaVisionConfig.model_type, MambaVisionConfig, exist_ok=True)
AutoModel.register(MambaVisionConfig, MambaVisionModel, exist_ok=True)
AutoModelForImageClassification.register(
    MambaVisionConfig, MambaVisionForImageClassification, exist_ok=True
)
AutoBackbone.register(MambaVisionConfig, MambaVisionBackbone, exist_ok=True)
_PROCESSORS: dict[str, type] = {"pil": CLIPImageProcessorPil}
if is_torchvision_available():
    _PROCESSORS["torchvision"] = CLIPImageProcessor
AutoImageProcessor.register(MambaVisionConfig, image_processor_classes=_PROCESSORS, exist_ok=True)

"""A trained model made ready to run: the same function with fewer operations.

    stem, convolution blocks   conv, batch norm (, gamma)     one convolution with a bias
    token blocks               gamma_1 W, gamma_2 W           one matrix, where W ends the branch
    mixers                     -exp(A_log), 2 * bias, ranks   computed once, kept as buffers
    head                       batch norm, mean, linear       mean, one linear
    layers                     W x + b, activation            one call; on a CPU W reordered once

A batch norm with its running statistics is an affine map per channel, y = f x + s with
f = weight / sqrt(var + eps) and s = bias - f mean, and so is a layer scale. What is linear before
it takes both in: f (W x + b) + s = (f W) x + (f b + s). The head's norm commutes with the mean over
positions and goes into the classifier behind it. Folding is done in float64 and rounded once.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .blocks import Attention, Block, ConvBlock, Downsample, Mlp, Stem
from .mixer import MambaVisionMixer
from .ops import mixer
from .packed import PackedConv2d, PackedLinear, fuses

__all__ = ["OptimizedMambaVision", "PreparedMixer", "optimize_for_inference"]

# Rows of 16-bit matrices then begin at multiples of 16 bytes, as tensor cores want them.
RANK_MULTIPLE = 8


def _affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """(f, s) of a batch norm y = f x + s, in float64."""
    assert norm.running_mean is not None and norm.running_var is not None
    f = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return f, norm.bias.double() - f * norm.running_mean.double()


def _then(layer: nn.Linear | nn.Conv2d, f: Tensor, s: Tensor | None = None) -> None:
    """f (W x + b) + s in place of W x + b; f and s per output."""
    f, b = f.double(), layer.bias
    layer.weight.copy_(layer.weight.double() * f.reshape(-1, *[1] * (layer.weight.dim() - 1)))
    if b is not None or s is not None:
        bias = torch.zeros_like(f) if s is None else s
        bias = bias if b is None else bias + f * b.double()
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype))


def _convolution(conv: Any, norm: Any, gamma: Tensor | None) -> None:
    """Makes conv(x) what gamma norm(conv(x)) was."""
    f, s = _affine(norm)
    gamma = torch.ones_like(f) if gamma is None else gamma.double()
    _then(conv, gamma * f, gamma * s)


def _classifier(norm: _BatchNorm, head: nn.Linear) -> nn.Linear:
    """head(norm(x)) as one linear layer, for x averaged over positions."""
    f, s = _affine(norm)
    W = head.weight.double()
    bias = W @ s if head.bias is None else W @ s + head.bias.double()
    folded = copy.deepcopy(head)
    folded.weight.copy_(W * f)
    folded.bias = nn.Parameter(bias.to(head.weight.dtype))
    return folded


class PreparedMixer(nn.Module):
    """A mixer that keeps what the operator takes: cast, computed and padded once.

    Zero rows and columns raise dt_rank to a multiple of RANK_MULTIPLE and change no value.
    """

    conv_x_weight: Tensor
    conv_z_weight: Tensor
    x_proj_weight: Tensor
    dt_proj_weight: Tensor
    A: Tensor
    D: Tensor
    delta_bias: Tensor

    def __init__(self, source: MambaVisionMixer, dtype: torch.dtype):
        super().__init__()
        self.in_proj, self.out_proj = source.in_proj, source.out_proj
        self.backend = source.backend
        rank = source.dt_rank
        zeros = -rank % RANK_MULTIPLE
        dt_rows, BC_rows = source.x_proj.weight.split([rank, 2 * source.d_state])
        for name, value in {
            "conv_x_weight": source.conv1d_x.weight,
            "conv_z_weight": source.conv1d_z.weight,
            "x_proj_weight": torch.cat([F.pad(dt_rows, (0, 0, 0, zeros)), BC_rows]),
            "dt_proj_weight": F.pad(source.dt_proj.weight, (0, zeros)),
        }.items():
            self.register_buffer(name, value.detach().to(dtype, copy=True))
        wide = torch.promote_types(dtype, torch.float32)
        A, D, delta_bias = source.scan_parameters()
        for name, value in {"A": A, "D": D, "delta_bias": delta_bias}.items():
            self.register_buffer(name, value.detach().to(wide, copy=True))

    def forward(self, hidden_states: Tensor) -> Tensor:
        yz = mixer(
            self.in_proj(hidden_states),
            self.conv_x_weight,
            self.conv_z_weight,
            self.x_proj_weight,
            self.dt_proj_weight,
            self.A,
            self.D,
            self.delta_bias,
            backend=self.backend,
        )
        return self.out_proj(yz)


def _last_linear(mixer: nn.Module) -> nn.Linear | None:
    """The layer that a branch ends in; None for a mixer that others put there."""
    if isinstance(mixer, Attention):
        return mixer.proj
    return mixer.out_proj if isinstance(mixer, MambaVisionMixer) else None


def _fold(model: nn.Module) -> None:
    """Batch norms and layer scales go into what is before them; the head's norm stays."""
    for module in model.modules():
        if isinstance(module, Stem):
            conv1, norm1, act1, conv2, norm2, act2 = module.conv_down
            _convolution(conv1, norm1, None)
            _convolution(conv2, norm2, None)
            same = nn.Identity()
            module.conv_down = nn.Sequential(conv1, same, act1, conv2, same, act2)
        elif isinstance(module, ConvBlock):
            _convolution(module.conv1, module.norm1, None)
            _convolution(module.conv2, module.norm2, module.gamma)
            module.norm1, module.norm2, module.gamma = nn.Identity(), nn.Identity(), None
        elif isinstance(module, Block):
            last = _last_linear(module.mixer)
            if last is not None and module.gamma_1 is not None:
                _then(last, module.gamma_1)
                module.gamma_1 = None
            if module.gamma_2 is not None:
                _then(module.mlp.fc2, module.gamma_2)
                module.gamma_2 = None


def _pack_layer(parent: nn.Module, name: str, behind: str = "") -> None:
    """Puts a packed layer in place of a child, with the activation behind it inside."""
    kinds: dict[type, Any] = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d}
    layer = getattr(parent, name)
    if type(layer) not in kinds:
        # What others put there stays.
        return
    act = getattr(parent, behind) if behind else None
    if act is not None and fuses(act):
        setattr(parent, behind, nn.Identity())
    else:
        act = None
    setattr(parent, name, kinds[type(layer)](layer, act))


def _pack(model: nn.Module) -> None:
    """Layers in the forms that the libraries have, activations inside them."""
    for module in list(model.modules()):
        if isinstance(module, Stem):
            _pack_layer(module.conv_down, "0", "2")
            _pack_layer(module.conv_down, "3", "5")
        elif isinstance(module, ConvBlock):
            _pack_layer(module, "conv1", "act1")
            _pack_layer(module, "conv2")
        elif isinstance(module, Downsample):
            _pack_layer(module.reduction, "0")
        elif isinstance(module, Mlp):
            _pack_layer(module, "fc1", "act")
            _pack_layer(module, "fc2")
        elif isinstance(module, Attention):
            _pack_layer(module, "qkv")
            _pack_layer(module, "proj")
        elif isinstance(module, PreparedMixer):
            _pack_layer(module, "in_proj")
            _pack_layer(module, "out_proj")


class _Graphs:
    """A function of one tensor as CUDA graphs, captured when a shape is first seen and kept."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function = function
        self.captured: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def _capture(self, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        static = x.clone(memory_format=torch.channels_last)
        # What a first call sets up, kernels and the library's workspaces, cannot be captured.
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.function(static)
        torch.cuda.current_stream(x.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.function(static)
        return graph, static, out

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad(), torch.cuda.device(x.device):
            if x.shape not in self.captured:
                self.captured[x.shape] = self._capture(x)
            graph, static, out = self.captured[x.shape]
            static.copy_(x)
            graph.replay()
            return out.clone()


class OptimizedMambaVision(nn.Module):
    """What `optimize_for_inference` makes: images to logits, or to maps, and nothing else.

    Its methods are those of `MambaVision` and give the same values. It stays in evaluation mode and
    in its dtype, holds no trainable parameters and computes no gradients: asking for another is a
    RuntimeError. `state_dict()` holds the folded weights, which only another optimized copy of the
    same kind takes: keep the weights with the model that it was made from. A copied or unpickled
    one compiles, or captures its CUDA graphs, anew.
    """

    def __init__(
        self, model: Any, classifier: nn.Linear | None, compile: bool | str, cuda_graph: bool
    ):
        super().__init__()
        self.model, self.classifier = model, classifier
        self.num_classes, self.num_features = model.num_classes, model.num_features
        self.compiled, self.cuda_graph = compile, cuda_graph
        self._compiled: Callable[[Tensor], list[Tensor]] | None = None
        self._graphs: _Graphs | None = None
        super().train(False)
        super().requires_grad_(False)

    def _check_input(self, x: Tensor) -> None:
        if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
            raise RuntimeError(
                "OptimizedMambaVision: it computes no gradients, but x requires one; use the model "
                "that it was made from, or torch.no_grad()"
            )

    def _stages(self, x: Tensor) -> list[Tensor]:
        if not self.compiled:
            return self.model.forward_stages(x)
        if self._compiled is None:
            mode = self.compiled if isinstance(self.compiled, str) else None
            self._compiled = torch.compile(self.model.forward_stages, dynamic=False, mode=mode)
        return self._compiled(x)

    def _logits(self, x: Tensor) -> Tensor:
        last = self._stages(x)[-1]
        if self.classifier is None:
            return self.model.forward_head(self.model.norm(last))
        return self.classifier(last.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        """`MambaVision.forward`; through a CUDA graph of x's shape where one was asked for."""
        self._check_input(x)
        if not self.cuda_graph:
            return self._logits(x)
        self.model._check_input(x)
        if self._graphs is None:
            self._graphs = _Graphs(self._logits)
        return self._graphs(x)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """`MambaVision.forward_stages`."""
        self._check_input(x)
        return self._stages(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """`MambaVision.forward_features`."""
        self._check_input(x)
        return self.model.norm(self._stages(x)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """`MambaVision.forward_head`, for the maps of `forward_features`."""
        return self.model.forward_head(x, pre_logits)

    def __getattr__(self, name: str) -> Any:
        # Ways to maps that a subclass of MambaVision adds, such as forward_intermediates.
        if name.startswith("forward_"):
            return getattr(self.model, name)
        return super().__getattr__(name)

    def train(self, mode: bool = True) -> "OptimizedMambaVision":
        if mode:
            raise RuntimeError(
                "OptimizedMambaVision: it cannot be trained, its batch norms are gone; train the "
                "model that it was made from"
            )
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> "OptimizedMambaVision":
        if requires_grad:
            raise RuntimeError(
                "OptimizedMambaVision: it computes no gradients; use the model that it was made "
                "from"
            )
        return super().requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        like = next(self.parameters())
        if (found := fn(like.new_empty(0)).dtype) != like.dtype:
            raise RuntimeError(
                f"OptimizedMambaVision: it is in {like.dtype} for good, its mixers partly in more; "
                f"optimize_for_inference(dtype={found}) makes another"
            )
        self._graphs = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_compiled": None, "_graphs": None}


def _check_mode(op: str, mode: str, cuda_graph: bool) -> None:
    known = torch._inductor.list_mode_options()
    if mode not in known:
        names = ", ".join(map(repr, known))
        raise ValueError(f"{op}: compile must be True, False or one of {names}, got {mode!r}")
    if cuda_graph and known[mode].get("triton.cudagraphs"):
        raise ValueError(
            f"{op}: compile={mode!r} makes CUDA graphs itself, and cuda_graph=True others; use "
            "compile='max-autotune-no-cudagraphs' with it, or leave cuda_graph out"
        )


@torch.no_grad()
def optimize_for_inference(
    model: Any,
    dtype: torch.dtype | None = None,
    *,
    compile: bool | str = False,
    cuda_graph: bool = False,
) -> OptimizedMambaVision:
    """A copy of a model in evaluation mode that computes the same with fewer operations.

    Batch norms and layer scales are folded into what is before them, convolutions are
    channels-last, and mixers keep their cast and padded weights, -exp(A_log) and twice the bias.
    All is in `dtype`, the model's own by default, except A, D and that bias, which are at least
    float32; x has to be in `dtype`. Values differ by roundings of `dtype`. The model itself is left
    as it was and shares no memory with the copy. On a CPU convolutions and linear layers, but for
    the head, keep a second, reordered weight once they ran. On an NVIDIA GPU float16 is faster than
    bfloat16: libraries then compute activations behind products and convolutions.

    `compile` passes stem and stages through torch.compile, anew for each input shape; a string is
    its mode, "max-autotune-no-cudagraphs" the one that tries several ways to multiply, for minutes.
    `cuda_graph` captures one CUDA graph per input shape, for logits, and keeps it with its memory.
    Both are for a few fixed shapes. On a GPU the graph alone is fastest.

    Raises RuntimeError for a model in training mode and for CUDA graphs of a model that is not on a
    CUDA device, ValueError for a mode that torch.compile lacks or that makes CUDA graphs beside
    `cuda_graph`, TypeError for what is no MambaVision and for a dtype that is not floating-point.

    >>> fast = optimize_for_inference(model.eval(), torch.bfloat16)  # doctest: +SKIP
    >>> logits = fast(images.bfloat16())  # doctest: +SKIP
    """
    op = "optimize_for_inference"
    if not all(hasattr(model, name) for name in ("patch_embed", "levels", "norm", "head")):
        inside = " (give what is inside the wrapper)" if hasattr(model, "module") else ""
        raise TypeError(f"{op}: model must be a MambaVision, got {type(model).__name__}{inside}")
    if any(module.training for module in model.modules()):
        raise RuntimeError(
            f"{op}: the model is in training mode, where batch norms cannot be folded; call "
            "model.eval() first"
        )
    like = next(model.parameters())
    dtype = like.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"{op}: dtype must be a floating-point torch.dtype, got {dtype!r}")
    if cuda_graph and like.device.type != "cuda":
        raise RuntimeError(
            f"{op}: cuda_graph=True needs a model on a CUDA device, got {like.device}"
        )

    if isinstance(compile, str):
        _check_mode(op, compile, cuda_graph)

    wide = torch.promote_types(torch.promote_types(dtype, like.dtype), torch.float32)
    model = copy.deepcopy(model).to(wide)
    _fold(model)
    prepared = {
        module: PreparedMixer(module.mixer, dtype)
        for module in model.modules()
        if isinstance(module, Block) and type(module.mixer) is MambaVisionMixer
    }
    classifier = None
    if model.global_pool == "avg" and isinstance(model.head, nn.Linear):
        classifier = _classifier(model.norm, model.head).to(dtype)
    # Before the mixers come in, parts of which have another dtype.
    form: dict[str, Any] = {"dtype": dtype, "memory_format": torch.channels_last}
    model.to(**form)
    for block, mixer_ in prepared.items():
        block.mixer = mixer_
    _pack(model)
    return OptimizedMambaVision(model, classifier, compile, cuda_graph)

"""What the backbone is built of, from the stem to a stage.

Maps are (batch, channels, height, width); tokens are (batch x windows, positions, channels). Stages
1 and 2 convolve maps, stages 3 and 4 mix tokens: windows of the map become sequences, and are put
back at the end of the stage. Names of parameters and buffers are those of the published
checkpoints.

Source: Hatamizadeh and Kautz, arXiv 2407.08083, section 3.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from .mixer import MambaVisionMixer
from .ops import attention, infers
from .packed import PackedConv2d

__all__ = [
    "Attention",
    "Block",
    "ConvBlock",
    "Downsample",
    "DropPath",
    "Mlp",
    "Stage",
    "Stem",
    "batch_statistics_kept",
    "from_windows",
    "to_windows",
]


class DropPath(nn.Module):
    """Leaves out a residual branch, entry by entry: x m / (1 - p) with m ~ Bernoulli(1 - p).

    Only while training. Source: Huang et al., arXiv 1603.09382.
    """

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = 1.0 - self.drop_prob
        return x * x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


def _plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether to call it is to compute what its class does: no subclass, no hooks."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _passes(drop_path: Any) -> bool:
    """Whether it returns what it is given."""
    return _plain(drop_path, DropPath) and not (drop_path.training and drop_path.drop_prob)


def _activation(act: nn.Module | None) -> str | None:
    """Its name in `norm_act`; None for one that it does not know."""
    if act is None or _plain(act, nn.Identity):
        return "none"
    if _plain(act, nn.ReLU):
        return "relu"
    return "gelu" if _plain(act, nn.GELU) and getattr(act, "approximate", "") == "tanh" else None


def _statistics(norm: Any) -> tuple[Any, ...] | None:
    """A batch norm as `norm_act` takes it, empty where there is none; None where that is not what
    it computes."""
    if _plain(norm, nn.Identity):
        return ()
    if _plain(norm, nn.BatchNorm2d) and not norm.training and norm.running_mean is not None:
        return norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
    return None


def _behind(conv: Any, act: nn.Module | None) -> str | None:
    """The name of the activation behind a convolution, or inside a packed one; None where the
    convolution or the activation is of another kind."""
    form = _activation(act)
    if _plain(conv, PackedConv2d):
        return _activation(conv.act) if form == "none" else None
    return form if _plain(conv, nn.Conv2d) and conv.padding_mode == "zeros" else None


def _convolved(
    conv: Any, norm: Any, act: nn.Module | None, gamma: Tensor | None, x: Tensor,
    residual: Tensor | None, backend: str,
) -> Tensor | None:  # fmt: skip
    """residual + gamma act(norm(conv(x))) with one pass behind the convolution, in inference on a
    GPU; None where that cannot be, or is not what these modules compute."""
    if backend == "torch" or torch.compiler.is_compiling():
        return None
    form, statistics = _behind(conv, act), _statistics(norm)
    if form is None or statistics is None:
        return None
    if isinstance(conv, PackedConv2d) and conv.library_fuses(x):
        return None
    kernels = infers(backend, x, conv.weight, conv.bias, *statistics[:4], gamma, residual)
    if kernels is None:
        return None
    y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    y = y.contiguous(memory_format=torch.channels_last)
    return kernels.norm_act(y, conv.bias, statistics or None, form, gamma, residual)


def _stem_convolved(conv: Any, norm: Any, act: nn.Module, x: Tensor, backend: str) -> Tensor | None:
    """act(norm(conv(x))) of an image in one kernel; None where that has no such kernel."""
    if backend == "torch" or torch.compiler.is_compiling():
        return None
    statistics = _statistics(norm)
    if _behind(conv, act) != "relu" or statistics is None:
        return None
    sizes = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    if sizes != ((3, 3), (2, 2), (1, 1), (1, 1), 1):
        return None
    kernels = infers(backend, x, conv.weight, conv.bias, *statistics[:4])
    if kernels is None or not kernels.stem_conv_serves(x, conv.weight):
        return None
    return kernels.stem_conv(x, conv.weight, conv.bias, statistics or None)


def _half(in_dim: int, dim: int) -> nn.Conv2d:
    """A 3 x 3 convolution of stride 2: (height, width) to (ceil(height / 2), ceil(width / 2))."""
    return nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, bias=False)


class Stem(nn.Module):
    """(batch, in_chans, height, width) to (batch, dim, height / 4, width / 4), rounded up."""

    def __init__(self, in_chans: int, in_dim: int, dim: int, backend: str = "auto"):
        super().__init__()
        self.backend = backend
        self.conv_down = nn.Sequential(
            _half(in_chans, in_dim),
            nn.BatchNorm2d(in_dim, eps=1e-4),
            nn.ReLU(),
            _half(in_dim, dim),
            nn.BatchNorm2d(dim, eps=1e-4),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        if len(self.conv_down) != 6 or not _plain(self.conv_down, nn.Sequential):
            return self.conv_down(x)
        conv, norm, act, *second = self.conv_down
        y = _stem_convolved(conv, norm, act, x, self.backend)
        if y is None:
            y = _convolved(conv, norm, act, None, x, None, self.backend)
        x = act(norm(conv(x))) if y is None else y
        conv, norm, act = second
        y = _convolved(conv, norm, act, None, x, None, self.backend)
        return act(norm(conv(x))) if y is None else y


class Downsample(nn.Module):
    """(batch, dim, height, width) to (batch, 2 dim, height / 2, width / 2), rounded up."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduction = nn.Sequential(_half(dim, 2 * dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(x)


def _scale(value: float | None, dim: int) -> nn.Parameter | None:
    """Layer scale, arXiv 2103.17239: one factor per channel, or none at all."""
    return None if value is None else nn.Parameter(torch.full((dim,), float(value)))


class ConvBlock(nn.Module):
    """x + drop_path(gamma norm2(conv2(gelu(norm1(conv1(x)))))) on maps, gelu in its tanh form."""

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        self.backend = backend
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm1: nn.Module = nn.BatchNorm2d(dim)
        self.act1 = nn.GELU(approximate="tanh")
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm2: nn.Module = nn.BatchNorm2d(dim)
        self.gamma = _scale(layer_scale, dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = _convolved(self.conv1, self.norm1, self.act1, None, x, None, self.backend)
        if y is None:
            y = self.act1(self.norm1(self.conv1(x)))
        if _passes(self.drop_path):
            out = _convolved(self.conv2, self.norm2, None, self.gamma, y, x, self.backend)
            if out is not None:
                return out
        y = self.norm2(self.conv2(y))
        if self.gamma is not None:
            y = y * self.gamma.view(1, -1, 1, 1)
        return x + self.drop_path(y)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(head_dim)) v over the tokens of a window; dropout only while training.

    `qk_norm` puts a LayerNorm over each head's q and k.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str = "auto",
    ):
        super().__init__()
        self.num_heads, self.attn_drop, self.backend = num_heads, attn_drop, backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        dropout = self.attn_drop if self.training else 0.0
        if dropout == 0.0 and _plain(self.q_norm, nn.Identity) and _plain(self.k_norm, nn.Identity):
            y = attention(qkv, self.num_heads, backend=self.backend)
            return self.proj_drop(self.proj(y))
        qkv = rearrange(qkv, "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.num_heads)
        q, k, v = qkv.unbind(0)
        # Under autocast a LayerNorm returns float32, and q, k, v have to agree.
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.proj_drop(self.proj(rearrange(y, "b h n d -> b n (h d)")))


class _GeluLinear(torch.autograd.Function):
    """y = gelu(h) W^T + b, of which h alone is kept: gelu(h) is computed again.

        da = dy W       dh = gelu'(h) da       dW = dy^T gelu(h)       db = sum dy
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(h, W, b):
        return F.linear(F.gelu(h), W, b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dy):
        h, W, b = ctx.saved_tensors
        dh = dW = db = None
        rows = dy.reshape(-1, dy.shape[-1])
        # Under autocast dy is in its dtype and the weights are not.
        if ctx.needs_input_grad[0]:
            dh = torch.ops.aten.gelu_backward((dy @ W.to(dy.dtype)).to(h.dtype), h)
        if ctx.needs_input_grad[1]:
            a = F.gelu(h).to(dy.dtype)
            dW = (rows.t() @ a.reshape(-1, a.shape[-1])).to(W.dtype)
        if ctx.needs_input_grad[2]:
            db = rows.sum(0, dtype=b.dtype)
        return dh, dW, db


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), gelu in its exact form, a dropout after each.

    For the backward pass gelu's output, as large as its input, is not kept but computed again. Not
    so where dropout is active, where others put hooks or modules of their own in, and under
    torch.compile, which decides for itself what to compute again.
    """

    def __init__(self, dim: int, hidden: int, drop: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act: nn.Module = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def _again(self) -> bool:
        """Whether gelu(h) is computed again."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if self.training and self.drop.p > 0:
            return False
        exact = _plain(self.act, nn.GELU) and getattr(self.act, "approximate", "") == "none"
        return exact and _plain(self.fc2, nn.Linear)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        if self._again():
            return _GeluLinear.apply(h, self.fc2.weight, self.fc2.bias)
        return self.drop(self.fc2(self.drop(self.act(h))))


class Block(nn.Module):
    """x = x + drop_path(gamma_1 mixer(norm1(x))), then x = x + drop_path(gamma_2 mlp(norm2(x))).

    `mixer` is a MambaVisionMixer or an Attention.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float,
        drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        self.backend = backend
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.gamma_1 = _scale(layer_scale, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.gamma_2 = _scale(layer_scale, dim)
        self.drop_path = DropPath(drop_path)

    def _normed(
        self, x: Tensor, y: Tensor | None, gamma: Tensor | None, norm: Any
    ) -> tuple[Tensor, Tensor]:
        """s = x + drop_path(gamma y), x where there is no y, and norm(s)."""
        if _plain(norm, nn.LayerNorm) and (y is None or _passes(self.drop_path)):
            weight, bias = norm.weight, norm.bias
            affine = weight is not None and bias is not None and weight.dim() == 1
            if affine and (kernels := infers(self.backend, x, y, gamma, weight, bias)):
                return kernels.add_layer_norm(x, y, gamma, weight, bias, norm.eps)
        if y is not None:
            x = x + self.drop_path(y if gamma is None else gamma * y)
        return x, norm(x)

    def branch(
        self, x: Tensor, y: Tensor | None = None, gamma: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The block's second sum before it is made, x' and y' of x' + drop_path(gamma_2 y'). y and
        gamma are those of the block before, where its sum was not made either."""
        x, n = self._normed(x, y, gamma, self.norm1)
        x, n = self._normed(x, self.mixer(n), self.gamma_1, self.norm2)
        return x, self.mlp(n)

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.branch(x)
        return x + self.drop_path(y if self.gamma_2 is None else self.gamma_2 * y)


def to_windows(x: Tensor, size: int) -> Tensor:
    """(batch, dim, height, width) to (batch x windows, size x size, dim).

    Zeros are added below and to the right up to a multiple of `size`; nothing masks them later.
    """
    height, width = x.shape[-2:]
    below, right = -height % size, -width % size
    if below or right:
        x = F.pad(x, (0, right, 0, below))
    return rearrange(x, "b c (h p) (w q) -> (b h w) (p q) c", p=size, q=size)


def from_windows(x: Tensor, size: int, height: int, width: int) -> Tensor:
    """The inverse of `to_windows`, cropped to (batch, dim, height, width)."""
    rows, columns = -(-height // size), -(-width // size)
    x = rearrange(x, "(b h w) (p q) c -> b c (h p) (w q)", h=rows, w=columns, p=size, q=size)
    return x[..., :height, :width]


@contextmanager
def batch_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Batch norms normalise as they did, but do not count the same batch a second time."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _contexts(
    module: nn.Module,
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Around the first run of a checkpointed module and around its repetition."""
    return nullcontext(), batch_statistics_kept(module)


class Stage(nn.Module):
    """Blocks at one resolution, then, except in the last stage, half of it with twice the channels.

    (batch, dim, height, width) to a pair: the map after the blocks, of the same shape, and what the
    next stage reads, (batch, 2 dim, height / 2, width / 2) rounded up, or None.

    `window_size=None` says that the blocks take maps. With `grad_checkpointing` each block keeps
    only its input for the backward pass and runs again there.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], downsample: nn.Module | None, window_size: int | None
    ):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.window_size = window_size
        self.grad_checkpointing = False

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return block(x)
        if torch.compiler.is_compiling():
            # A compiled graph writes the statistics once, and refuses contexts.
            return checkpoint(block, x, use_reentrant=False)
        return checkpoint(block, x, use_reentrant=False, context_fn=partial(_contexts, block))

    def _joins(self, x: Tensor) -> bool:
        """Whether the sum that ends a block may be made by the block behind it."""
        if torch.compiler.is_compiling():
            return False
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.blocks.parameters()):
            return False
        blocks: list[Any] = list(self.blocks)
        plain = all(_plain(block, Block) and _passes(block.drop_path) for block in blocks)
        return plain and len(blocks) > 0 and bool(infers(blocks[0].backend, x))

    def _joined(self, x: Tensor) -> Tensor:
        """The blocks, each sum in one pass with the norm that reads it."""
        blocks: list[Any] = list(self.blocks)
        y: Any = None
        gamma: Tensor | None = None
        for block in blocks:
            x, y = block.branch(x, y, gamma)
            gamma = block.gamma_2
        return x + (y if gamma is None else gamma * y)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        height, width = x.shape[-2:]
        if self.window_size is not None:
            x = to_windows(x, self.window_size)
        if self._joins(x):
            x = self._joined(x)
        else:
            for block in self.blocks:
                x = self._run(block, x)
        if self.window_size is not None:
            x = from_windows(x, self.window_size, height, width)
        return x, None if self.downsample is None else self.downsample(x)


def conv_stage(
    dim: int,
    drop_path: Sequence[float],
    layer_scale: float | None,
    downsample: bool,
    *,
    backend: str,
) -> Stage:
    """A stage of convolution blocks, one per drop-path rate."""
    blocks = [ConvBlock(dim, rate, layer_scale, backend) for rate in drop_path]
    return Stage(blocks, Downsample(dim) if downsample else None, None)


def token_stage(
    dim: int,
    drop_path: Sequence[float],
    layer_scale: float | None,
    downsample: bool,
    *,
    window_size: int,
    num_heads: int,
    mlp_ratio: float,
    qkv_bias: bool,
    qk_norm: bool,
    drop: float,
    attn_drop: float,
    backend: str,
) -> Stage:
    """A stage of n blocks over windows: mixers first, attention in the last n // 2."""
    depth = len(drop_path)
    attention: Callable[[], nn.Module] = partial(
        Attention,
        dim,
        num_heads,
        qkv_bias,
        qk_norm,
        attn_drop=attn_drop,
        proj_drop=drop,
        backend=backend,
    )
    mamba: Callable[[], nn.Module] = partial(
        MambaVisionMixer, dim, d_state=8, d_conv=3, expand=1, backend=backend
    )
    blocks = [
        Block(
            dim,
            attention() if index >= depth - depth // 2 else mamba(),
            mlp_ratio,
            drop,
            rate,
            layer_scale,
            backend,
        )
        for index, rate in enumerate(drop_path)
    ]
    return Stage(blocks, Downsample(dim) if downsample else None, window_size)

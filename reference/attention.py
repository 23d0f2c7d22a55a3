"""Attention over the tokens of a short window, in plain PyTorch.

    s = q k^T / sqrt(head_dim)                 (batch, heads, seqlen, seqlen)
    p = exp(s - max(s)) / sum exp(s - max(s))  along the last axis
    y = p v

Shapes: qkv (batch, seqlen, 3 dim), columns in the order (q | k | v, head, head_dim); y (batch,
seqlen, dim), columns (head, head_dim).
"""

import torch
from torch import Tensor

from .conv1d_silu import accumulation_dtype


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """y of the module docstring, in qkv's dtype."""
    batch, seqlen, width = qkv.shape
    head_dim = width // (3 * num_heads)
    wide = qkv.to(accumulation_dtype(qkv)).view(batch, seqlen, 3, num_heads, head_dim)
    q, k, v = (x.transpose(1, 2) for x in wide.unbind(2))
    s = q @ k.transpose(2, 3) / head_dim**0.5
    e = torch.exp(s - s.amax(-1, keepdim=True))
    y = (e / e.sum(-1, keepdim=True)) @ v
    return y.transpose(1, 2).reshape(batch, seqlen, width // 3).to(qkv.dtype)

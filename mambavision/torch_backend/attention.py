"""Attention over the tokens of a window, by PyTorch's own operation.

    y = softmax(q k^T / sqrt(head_dim)) v
"""

import torch.nn.functional as F
from torch import Tensor


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """y; arguments are those of `mambavision.ops.attention`."""
    batch, seqlen, width = qkv.shape
    parts = qkv.view(batch, seqlen, 3, num_heads, width // (3 * num_heads))
    q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

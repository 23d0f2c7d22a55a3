"""Attention over the tokens of a short window; forward only.

    y = softmax(q k^T / sqrt(head_dim)) v

Shapes: qkv (batch, seqlen, 3 dim), columns in the order (q | k | v, head, head_dim), as one linear
layer gives them; y (batch, seqlen, dim), columns (head, head_dim). float16 or bfloat16 in, float32
inside but for the probabilities, which the second product reads in qkv's dtype.

Split: a program owns one head of one window and keeps all its k and v on the chip, padded to powers
of two. It takes BLOCK_L rows of q at a time. Each sees all keys at once, so that its softmax needs
no second look; the sum of exponentials divides the result and not the probabilities. No pass
rearranges q, k, v or y.

Source: Vaswani et al., arXiv 1706.03762.
"""

import math
from functools import cache

import triton
import triton.language as tl

from . import _device as dev

# What one program can hold.
MAX_SEQLEN, MAX_HEAD_DIM = 256, 128
# Rows of q at a time, 16 for each warp. More warps wait for each other at barriers, and 196 keys as
# 128 + 64 + 16 instead of 256 save a fifth of the arithmetic and no time: 56 us on an H200 for 128
# windows of 8 heads of 40, where cuDNN takes 60; 11 at 49, where it takes 38.
BLOCK_L, WARPS = 64, 4
# The smallest tile that tensor cores take.
SMALLEST = 16


@triton.jit
def load_rows(
    ptr, first, seqlen: tl.constexpr, dim: tl.constexpr, head_dim: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of q, k or v, (ROWS, BLOCK_D), 0 outside."""
    offs_l = first + tl.arange(0, ROWS)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (offs_l < seqlen) & (offs_d < head_dim)
    return tl.load(ptr + offs_l * (3 * dim) + offs_d, mask=mask, other=0.0)


@triton.jit
def _attention_kernel(
    qkv_ptr,  # (batch, seqlen, 3 dim)
    y_ptr,  # (batch, seqlen, dim)
    scale, seqlen: tl.constexpr, dim: tl.constexpr, head_dim: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    heads: tl.constexpr = dim // head_dim
    row, column = pid // heads * seqlen, pid % heads * head_dim
    q_ptr = qkv_ptr + row * (3 * dim) + column
    k_ptr = q_ptr + dim
    v_ptr = q_ptr + 2 * dim
    y_ptr += row * dim + column
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    q = load_rows(q_ptr, 0, seqlen, dim, head_dim, BLOCK_L, BLOCK_D)
    k = load_rows(k_ptr, 0, seqlen, dim, head_dim, BLOCK_N, BLOCK_D)
    v = load_rows(v_ptr, 0, seqlen, dim, head_dim, BLOCK_N, BLOCK_D)
    for l0 in range(0, seqlen, BLOCK_L):
        s = tl.dot(q, tl.trans(k))
        # The next block is on its way while this one is computed
        q = load_rows(q_ptr, l0 + BLOCK_L, seqlen, dim, head_dim, BLOCK_L, BLOCK_D)
        s = tl.where(offs_n < seqlen, s, float("-inf"))
        # scale holds log2(e)
        p = tl.exp2((s - tl.max(s, 1, keep_dims=True)) * scale)
        total = tl.sum(p, 1, keep_dims=True)
        y = tl.dot(p.to(q.dtype), v) * (1.0 / total)
        offs_l = l0 + tl.arange(0, BLOCK_L)[:, None]
        dev.store(y_ptr + offs_l * dim + offs_d, y, (offs_l < seqlen) & (offs_d < head_dim))


def _tiles(seqlen, head_dim):
    """BLOCK_N and BLOCK_D."""
    return tuple(max(SMALLEST, triton.next_power_of_2(n)) for n in (seqlen, head_dim))


def shared_bytes(seqlen, head_dim):
    """What a program takes of shared memory at most: k and v, and BLOCK_L rows of q or, on their
    way to the second product, of probabilities; 64 for barriers."""
    block_n, block_d = _tiles(seqlen, head_dim)
    return 2 * (2 * block_n * block_d + BLOCK_L * max(block_n, block_d)) + 64


@cache
def _shared_memory(device):
    """Of a program, at most; nothing limits an interpreted one."""
    if device.type != "cuda":
        return math.inf
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


@cache
def _holds(device, itemsize, seqlen, head_dim):
    if itemsize != 2 or seqlen > MAX_SEQLEN or head_dim > MAX_HEAD_DIM:
        return False
    return shared_bytes(seqlen, head_dim) <= _shared_memory(device)


def attention_serves(qkv, num_heads):
    """Whether a program can hold such a window: heads of up to 64 channels on every NVIDIA GPU
    since sm_80, of up to 128 where a program may have 161 KiB of shared memory (sm_80, sm_90,
    sm_100). float32 has no tensor cores here (TF32 is off), and its tiles are more than registers
    hold."""
    _, seqlen, width = qkv.shape
    return _holds(qkv.device, qkv.element_size(), seqlen, width // (3 * num_heads))


def attention(qkv, num_heads):
    """y of the module docstring on the Triton path, without gradients.

    Arguments are those of `mambavision.ops.attention`, which checks them and `attention_serves`.
    """
    qkv = qkv.contiguous()
    batch, seqlen, width = qkv.shape
    dim, head_dim = width // 3, width // (3 * num_heads)
    y = qkv.new_empty(batch, seqlen, dim)
    if batch:
        block_n, block_d = _tiles(seqlen, head_dim)
        args = (qkv, y, 1.4426950408889634 * head_dim**-0.5, seqlen, dim, head_dim)
        options = {
            "BLOCK_L": BLOCK_L,
            "BLOCK_N": block_n,
            "BLOCK_D": block_d,
            "num_warps": WARPS,
            "num_stages": 1,
            "enable_fp_fusion": True,
        }
        dev.launch(_attention_kernel, (batch * num_heads,), args, options)
    return y

"""The middle of the MambaVision mixer, between in_proj and out_proj; forward and backward.

    x, z  = halves of xz                                   xz (batch, seqlen, 2 dim)
    x     = silu(conv_x(x)),  z = silu(conv_z(z))          depthwise, 'same' padding
    [dt_low, B, C] = x W_x^T                               W_x (dt_rank + 2 dstate, dim)
    delta = dt_low W_dt^T                                  W_dt (dim, dt_rank)
    yz    = [selective_scan(x, delta, A, B, C, D), z]      with delta_bias, softplus

Backward: xz, dt_low and [B, C] are saved; x, delta and the scan's states are computed again. After
the backward pass of the scan

    ddt_low = ddelta W_dt                                  dW_dt = ddelta^T dt_low
    dx   += dw W_x,  dw = [ddt_low, dB, dC]                dW_x = dw^T x

and dx and dz go through the convolutions into the halves of dxz.

Launches, and what they move, in units of batch * seqlen * dim elements; tensors of dt_rank or
dstate columns, weights and partial sums come on top:

    forward   project    reads x and z of xz, 2       writes x and z of yz, delta, 3
              scan       reads x of yz, delta, 2      writes y over x, 1
    backward  project    reads x of xz, 1             writes x, delta, 2
              scan       reads x, delta twice, dy, 5    writes dx, ddelta, 2;
                         states: writes and reads dstate / 4 numbers each, in float32
              _project_bwd_kernel   reads ddelta, dx, 2          writes dx in place, 1
              _convolve_bwd_kernel  reads x and z of xz, dx, dz, 4    writes dxz, 2

Split: `project` takes whole rows, because W_x sums over channels. A program owns BLOCK_L runs of
STEPS rows, convolves them channel block by channel block (see conv1d_silu.py), accumulates x W_x^T
in registers on the way (`tl.dot`), and multiplies what it got by W_dt. z needs no other channel, so
other programs of the same launch own blocks of z. `_project_bwd_kernel` takes whole rows, too, and
sums what the scan's programs left: dB and dC in the programs that use them, dA, dD and ddelta_bias
in others. The weights' gradients are two library products over all rows.

Source: arXiv 2407.08083, section 3. `delta_bias` is all that is added inside the softplus.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from . import _device as dev
from .conv1d_silu import (
    CONFIGS,
    blocks_of,
    convolve,
    convolve_bwd,
    convolve_fwd,
    load_run,
    load_taps,
    runs_of,
    share_out,
)
from .selective_scan import (
    SUMS,
    partial_bwd,
    selective_scan_fwd,
    sum_over_blocks,
    sum_over_entries,
)

# Programs that take whole rows, by bytes per element: from so many rows on, and up to so many
# columns of W_x, each of its two parts padded to a power of two: rows, and channels at a time. Tall
# tiles read the weights less often, short ones occupy more multiprocessors. float32 has no tensor
# cores here (TF32 is off), and its tiles are what registers hold.
TILES = {
    2: (
        (16384, 256, {"BLOCK_L": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 1}),
        (4096, 256, {"BLOCK_L": 32, "BLOCK_D": 32, "num_warps": 4, "num_stages": 1}),
        (0, 256, {"BLOCK_L": 16, "BLOCK_D": 64, "num_warps": 4, "num_stages": 1}),
        (0, 1024, {"BLOCK_L": 16, "BLOCK_D": 16, "num_warps": 8, "num_stages": 1}),
    ),
    4: (
        (0, 80, {"BLOCK_L": 16, "BLOCK_D": 16, "num_warps": 4, "num_stages": 1}),
        (0, 1024, {"BLOCK_L": 16, "BLOCK_D": 16, "num_warps": 8, "num_stages": 1}),
    ),
}


@triton.jit
def load_matrix(ptr, stride_r: tl.constexpr, stride_c: tl.constexpr, r, rows, c, columns):
    """Elements r (..., 1) by c (1, ...) of a matrix, 0 outside."""
    return tl.load(ptr + r * stride_r + c * stride_c, mask=(r < rows) & (c < columns), other=0.0)


@triton.jit
def load_neighbours(ptr, stride_l: tl.constexpr, row, t, mask, offs_d, seqlen, WIDTH: tl.constexpr):
    """The WIDTH rows that a convolution reads for each of these rows."""
    left: tl.constexpr = (WIDTH - 1) // 2
    return load_run(ptr, stride_l, row, t, mask, offs_d, seqlen, -left, WIDTH - 1 - left)


@triton.jit(do_not_specialize=["batch", "seqlen"])
def _project_kernel(
    xz_ptr, stride_xzl: tl.constexpr,  # (batch, seqlen, 2 dim)
    conv_x_weight_ptr,  # (dim, width)
    conv_x_bias_ptr,  # (dim,) or None
    conv_z_weight_ptr,  # (dim, width), or None: x alone
    conv_z_bias_ptr,  # (dim,) or None
    x_proj_weight_ptr,  # (dt_rank + 2 dstate, dim)
    dt_proj_weight_ptr,  # (dim, dt_rank)
    x_ptr, stride_xl: tl.constexpr,  # (batch, seqlen, dim), z goes behind each of its rows
    delta_ptr,  # (batch, seqlen, dim)
    dt_low_ptr, stride_dtl: tl.constexpr,  # (batch, seqlen, dt_rank) or None
    BC_ptr,  # (batch, seqlen, 2 dstate) or None
    batch, seqlen, dim: tl.constexpr, dt_rank: tl.constexpr, dstate: tl.constexpr,
    WIDTH: tl.constexpr, Z_STEPS: tl.constexpr, Z_BLOCK_L: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    blocks = (tl.cast(batch, tl.int64) * seqlen + BLOCK_L - 1) // BLOCK_L
    if pid < blocks:
        dtype: tl.constexpr = xz_ptr.dtype.element_ty
        row, t, mask_l = runs_of(pid, batch, seqlen, BLOCK_L, 1)
        offs_d = tl.arange(0, BLOCK_D)[None, :]
        offs_k = tl.arange(0, BLOCK_D)[:, None]
        offs_r = tl.arange(0, BLOCK_R)[None, :]
        offs_n = tl.arange(0, BLOCK_N)[None, :]
        dt_low = tl.zeros((BLOCK_L, BLOCK_R), tl.float32)
        BC = tl.zeros((BLOCK_L, BLOCK_N), tl.float32)
        W_BC_ptr = x_proj_weight_ptr + dt_rank * dim
        mask = mask_l & (offs_d < dim)
        ahead = load_neighbours(xz_ptr, stride_xzl, row, t, mask, offs_d, seqlen, WIDTH)
        for d in range(0, dim, BLOCK_D):
            xs, mask_d = ahead, d + offs_d < dim
            # The next block is on its way while this one is computed
            mask = mask_l & (d + offs_d < dim - BLOCK_D)
            ahead = load_neighbours(
                xz_ptr + BLOCK_D + d, stride_xzl, row, t, mask, offs_d, seqlen, WIDTH
            )
            W_low = load_matrix(x_proj_weight_ptr, 1, dim, d + offs_k, dim, offs_r, dt_rank)
            W_BC = load_matrix(W_BC_ptr, 1, dim, d + offs_k, dim, offs_n, 2 * dstate)
            taps, bias = load_taps(conv_x_weight_ptr, conv_x_bias_ptr, d + offs_d, mask_d, WIDTH)
            x = dev.silu(convolve(xs, 0, taps, bias)).to(dtype)
            tl.store(x_ptr + (row * stride_xl + offs_d) + d, x, mask=mask_l & mask_d)
            # "ieee": Triton's default for float32 is TF32, three digits
            dt_low = tl.dot(x, W_low.to(dtype), dt_low, input_precision="ieee")
            BC = tl.dot(x, W_BC.to(dtype), BC, input_precision="ieee")
        low = dt_low.to(dtype)
        if dt_low_ptr is not None:
            mask_r = mask_l & (offs_r < dt_rank)
            tl.store(dt_low_ptr + (row * stride_dtl + offs_r), low, mask=mask_r)
        if BC_ptr is not None:
            mask_n = mask_l & (offs_n < 2 * dstate)
            tl.store(BC_ptr + (row * (2 * dstate) + offs_n), BC, mask=mask_n)
        offs_k = tl.arange(0, BLOCK_R)[:, None]
        for d in range(0, dim, BLOCK_D):
            W_dt = load_matrix(dt_proj_weight_ptr, 1, dt_rank, offs_k, dt_rank, d + offs_d, dim)
            delta = tl.dot(low, W_dt.to(dtype), input_precision="ieee")
            dev.store(delta_ptr + (row * dim + offs_d) + d, delta, mask_l & (d + offs_d < dim))
    else:
        if conv_z_weight_ptr is not None:
            blocks_d = tl.cdiv(dim, BLOCK_D)
            offs_z = (pid - blocks) % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
            convolve_fwd(
                xz_ptr + dim, stride_xzl, conv_z_weight_ptr, conv_z_bias_ptr, x_ptr + dim,
                stride_xl, (pid - blocks) // blocks_d, offs_z, offs_z < dim, batch, seqlen, WIDTH,
                True, Z_STEPS, Z_BLOCK_L,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "entries"])
def _project_bwd_kernel(
    ddelta_ptr,  # (rows, dim)
    dBC_ptr,  # (blocks, rows, 2 dstate)
    partial_ptr,  # (entries, columns)
    x_proj_weight_ptr,  # (dt_rank + 2 dstate, dim)
    dt_proj_weight_ptr,  # (dim, dt_rank)
    dx_ptr,  # (rows, dim), added to
    dw_ptr, stride_dwl: tl.constexpr,  # (rows, dt_rank + 2 dstate)
    sum_ptr,  # (columns,)
    rows, entries, dim: tl.constexpr, dt_rank: tl.constexpr, dstate: tl.constexpr,
    blocks: tl.constexpr, columns: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(rows, BLOCK_L)
    if pid < tiles:
        row = pid * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
        mask_l = row < rows
        dtype: tl.constexpr = dx_ptr.dtype.element_ty
        offs_d = tl.arange(0, BLOCK_D)[None, :]
        offs_k = tl.arange(0, BLOCK_D)[:, None]
        offs_r = tl.arange(0, BLOCK_R)[None, :]
        offs_n = tl.arange(0, BLOCK_N)[None, :]
        W_BC_ptr = x_proj_weight_ptr + dt_rank * dim
        at = ddelta_ptr + (row * dim + offs_d)
        ahead = tl.load(at, mask=mask_l & (offs_d < dim), other=0.0)
        mask_n = mask_l & (offs_n < 2 * dstate)
        AHEAD: tl.constexpr = max(1, 64 // BLOCK_N)
        dBC = sum_over_blocks(dBC_ptr, row, offs_n, mask_n, rows, blocks, dstate, AHEAD)
        dt_low = tl.zeros((BLOCK_L, BLOCK_R), tl.float32)
        for d in range(0, dim, BLOCK_D):
            ddelta = ahead
            ahead = tl.load(
                at + d + BLOCK_D, mask=mask_l & (d + offs_d < dim - BLOCK_D), other=0.0
            )
            W_dt = load_matrix(dt_proj_weight_ptr, dt_rank, 1, d + offs_k, dim, offs_r, dt_rank)
            dt_low = tl.dot(ddelta, W_dt.to(dtype), dt_low, input_precision="ieee")

        at = dx_ptr + (row * dim + offs_d)
        ahead = tl.load(at, mask=mask_l & (offs_d < dim), other=0.0)
        dt_low, dBC = dt_low.to(dtype), dBC.to(dtype)
        dw_at = dw_ptr + row * stride_dwl
        tl.store(dw_at + offs_r, dt_low, mask=mask_l & (offs_r < dt_rank))
        tl.store(dw_at + dt_rank + offs_n, dBC, mask=mask_n)
        offs_r = tl.arange(0, BLOCK_R)[:, None]
        offs_n = tl.arange(0, BLOCK_N)[:, None]
        for d in range(0, dim, BLOCK_D):
            dx = ahead.to(tl.float32)
            ahead = tl.load(
                at + d + BLOCK_D, mask=mask_l & (d + offs_d < dim - BLOCK_D), other=0.0
            )
            W_low = load_matrix(x_proj_weight_ptr, dim, 1, offs_r, dt_rank, d + offs_d, dim)
            W_BC = load_matrix(W_BC_ptr, dim, 1, offs_n, 2 * dstate, d + offs_d, dim)
            new = tl.dot(dt_low, W_low.to(dtype), input_precision="ieee")
            dx += tl.dot(dBC, W_BC.to(dtype), new, input_precision="ieee")
            dev.store(at + d, dx, mask_l & (d + offs_d < dim))
    else:
        sum_over_entries(partial_ptr, sum_ptr, pid - tiles, entries, columns, ENTRIES, COLUMNS)


@triton.jit(do_not_specialize=["batch", "seqlen", "count"])
def _convolve_bwd_kernel(
    dx_ptr,  # (batch, seqlen, dim)
    dyz_ptr, stride_dyzl: tl.constexpr,  # (batch, seqlen, 2 dim), of which dz
    xz_ptr, stride_xzl: tl.constexpr,  # (batch, seqlen, 2 dim)
    conv_x_weight_ptr,  # (dim, width)
    conv_x_bias_ptr,  # (dim,) or None
    conv_z_weight_ptr,  # (dim, width)
    conv_z_bias_ptr,  # (dim,) or None
    dxz_ptr,  # (batch, seqlen, 2 dim)
    sums_ptr,  # (programs over rows, 2, dim, WIDTH + 1)
    batch, seqlen, count, dim: tl.constexpr, WIDTH: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    blocks_d = tl.cdiv(dim, BLOCK_D)
    offs_d = pid % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    mask_d = offs_d < dim
    half = pid // blocks_d
    # x and z take the same way: two in one kernel take twice as long to compile
    of_z = half % 2
    taps_x, bias_x = load_taps(conv_x_weight_ptr, conv_x_bias_ptr, offs_d, mask_d, WIDTH)
    taps_z, bias_z = load_taps(conv_z_weight_ptr, conv_z_bias_ptr, offs_d, mask_d, WIDTH)
    taps = ()
    for k in tl.static_range(WIDTH):
        taps = taps + (tl.where(of_z == 1, taps_z[k], taps_x[k]),)
    convolve_bwd(
        tl.where(of_z == 1, dyz_ptr + dim, dx_ptr), tl.where(of_z == 1, stride_dyzl, dim),
        xz_ptr + of_z * dim, stride_xzl, taps, tl.where(of_z == 1, bias_z, bias_x),
        dxz_ptr + of_z * dim, 2 * dim, sums_ptr + half * dim * (WIDTH + 1), half // 2 * count,
        count, offs_d, mask_d, batch, seqlen, True,
        conv_x_bias_ptr is not None or conv_z_bias_ptr is not None, WIDTH + 1,
        STEPS, BLOCK_L, BLOCK_D,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _tile(batch, seqlen, dim, dt_rank, dstate, itemsize):
    """Programs over rows, beside them programs over z; constants of the launch that may have these,
    and of the one backward that sums."""
    block_r, block_n = (max(16, triton.next_power_of_2(n)) for n in (dt_rank, 2 * dstate))
    rows, width = batch * seqlen, block_r + block_n
    tile = next((c for low, high, c in TILES[itemsize] if rows >= low and width <= high), None)
    if tile is None:
        raise ValueError(f"mixer: the kernels take a dt_rank of at most 512, got {dt_rank}")
    tile = {"BLOCK_R": block_r, "BLOCK_N": block_n, "enable_fp_fusion": True, **tile}
    # 7 rows a run, and as many runs as make 8 elements for each lane of 4 warps
    both = {"Z_STEPS": 7, "Z_BLOCK_L": 1024 // tile["BLOCK_D"], **tile}
    z_blocks = triton.cdiv(batch * triton.cdiv(seqlen, 7), both["Z_BLOCK_L"])
    z_programs = z_blocks * triton.cdiv(dim, tile["BLOCK_D"])
    summing = {"ENTRIES": SUMS["ENTRIES"], "COLUMNS": SUMS["COLUMNS"], **tile}
    return triton.cdiv(rows, tile["BLOCK_L"]), z_programs, both, summing


def _project(
    xz, stride_xzl, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, dstate,
    conv_x_bias, conv_z_bias, x, delta, dt_low, BC,
):  # fmt: skip
    """Writes x, and z behind it unless conv_z_weight is None, delta, and dt_low and BC if given."""
    (batch, seqlen, dim), dt_rank = delta.shape, dt_proj_weight.shape[1]
    programs, z_programs, tile, _ = _tile(batch, seqlen, dim, dt_rank, dstate, xz.element_size())
    with_z = conv_z_weight is not None
    args = (
        xz, stride_xzl,
        conv_x_weight.contiguous(),
        dev.packed(conv_x_bias),
        conv_z_weight.contiguous() if with_z else None,
        dev.packed(conv_z_bias),
        x_proj_weight.contiguous(),
        dt_proj_weight.contiguous(),
        x, x.stride(1),
        delta,
        dt_low, 0 if dt_low is None else dt_low.stride(-2),
        BC,
        batch, seqlen, dim, dt_rank, dstate,
        conv_x_weight.shape[-1],
    )  # fmt: skip
    dev.launch(_project_kernel, (programs + with_z * z_programs,), args, tile)


def mixer_fwd(
    xz, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, A, D, delta_bias,
    conv_x_bias, conv_z_bias, save_states,
):  # fmt: skip
    """(yz, dt_low, BC, states): the output, and what the backward pass keeps; states is empty,
    since the backward pass computes them again."""
    (batch, seqlen, _), (dim, dt_rank), dstate = xz.shape, dt_proj_weight.shape, A.shape[1]
    xz, stride_xzl = dev.rows_of(xz)
    yz = xz.new_empty(batch, seqlen, 2 * dim)
    delta = xz.new_empty(batch, seqlen, dim)
    dt_low = xz.new_empty(batch, seqlen, dt_rank)
    BC = xz.new_empty(batch, seqlen, 2 * dstate, dtype=torch.float32)
    if batch:
        _project(
            xz, stride_xzl, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, dstate,
            conv_x_bias, conv_z_bias, yz, delta, dt_low, BC,
        )  # fmt: skip
    # x and B are the first columns of yz and BC
    C = BC[..., dstate:]
    scanned = (yz, delta, A, BC, C, D, None, delta_bias, None)
    selective_scan_fwd(*scanned, True, False, False, y=yz, return_last_state=False)
    return yz, dt_low, BC, BC.new_empty(0)


def _aligned(x, rows, columns):
    """An empty (rows, columns) of rows that begin at multiples of 16 bytes: for the library's
    products, many times faster."""
    return x.new_empty(rows, columns + -columns % 8)[:, :columns]


def mixer_bwd(
    dyz, xz, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, A, D, delta_bias,
    conv_x_bias, conv_z_bias, dt_low, BC, states,
):  # fmt: skip
    """(dxz, dconv_x_weight, dconv_z_weight, dx_proj_weight, ddt_proj_weight, dA, dD, ddelta_bias,
    dconv_x_bias, dconv_z_bias), None where an argument is."""
    (batch, seqlen, _), (dim, dt_rank), dstate = xz.shape, dt_proj_weight.shape, A.shape[1]
    rows, width = batch * seqlen, conv_x_weight.shape[-1]
    (xz, stride_xzl), (dyz, stride_dyzl) = dev.rows_of(xz), dev.rows_of(dyz)
    x, delta = xz.new_empty(batch, seqlen, dim), xz.new_empty(batch, seqlen, dim)
    low = None if dt_rank % 8 == 0 else _aligned(xz, rows, dt_rank)
    if batch:
        _project(
            xz, stride_xzl, conv_x_weight, None, x_proj_weight, dt_proj_weight, dstate,
            conv_x_bias, None, x, delta, low, None,
        )  # fmt: skip
    scanned = (x, delta, A, BC, BC[..., dstate:], D, None, delta_bias, None)
    dx, ddelta, _, _, partial = partial_bwd(dyz, None, *scanned, None, True, False)
    scan_sums = xz.new_empty(dim * (dstate + 2), dtype=torch.float32)
    dw = _aligned(xz, rows, dt_rank + 2 * dstate)
    dxz = xz.new_empty(batch, seqlen, 2 * dim)
    blocks, blocks_d = blocks_of("bwd", batch, seqlen, dim)
    count, programs = share_out(blocks, 2 * blocks_d)
    sums = xz.new_empty(programs, 2, dim, width + 1, dtype=torch.float32)
    tiles, _, _, tile = _tile(batch, seqlen, dim, dt_rank, dstate, xz.element_size())
    args = (
        ddelta,
        partial.over_blocks,
        partial.over_entries,
        x_proj_weight.contiguous(),
        dt_proj_weight.contiguous(),
        dx,
        dw, dw.stride(0),
        scan_sums,
        rows, batch, dim, dt_rank, dstate, partial.over_blocks.shape[0], scan_sums.shape[0],
    )  # fmt: skip
    programs_over_entries = -(-scan_sums.shape[0] // tile["COLUMNS"])
    dev.launch(_project_bwd_kernel, (tiles + programs_over_entries,), args, tile)
    if batch:
        args = (
            dx,
            dyz, stride_dyzl,
            xz, stride_xzl,
            conv_x_weight.contiguous(),
            dev.packed(conv_x_bias),
            conv_z_weight.contiguous(),
            dev.packed(conv_z_bias),
            dxz,
            sums,
            batch, seqlen, count, dim, width,
        )  # fmt: skip
        dev.launch(_convolve_bwd_kernel, (programs * 2 * blocks_d,), args, CONFIGS["bwd"])
    # Autocast casts the arguments of products, except those with an `out`
    dx_proj_weight = torch.mm(dw.t(), x.view(rows, dim), out=x.new_empty(x_proj_weight.shape))
    low = dt_low.view(rows, dt_rank) if low is None else low
    ddt_proj_weight = x.new_empty(dt_proj_weight.shape)
    torch.mm(ddelta.view(rows, dim).t(), low, out=ddt_proj_weight)
    sums_x, sums_z = sums.sum(0).unbind()
    dA, dD, ddelta_bias = scan_sums.split((A.numel(), dim, dim))

    def shaped(part, like):
        return None if like is None else dev.cast(part.view(like.shape), like)

    return (
        dxz,
        shaped(sums_x[:, :width], conv_x_weight),
        shaped(sums_z[:, :width], conv_z_weight),
        dev.cast(dx_proj_weight, x_proj_weight),
        dev.cast(ddt_proj_weight, dt_proj_weight),
        dev.cast(dA.view(A.shape), A),
        dev.cast(dD, D),
        dev.cast(ddelta_bias, delta_bias),
        shaped(sums_x[:, width], conv_x_bias),
        shaped(sums_z[:, width], conv_z_bias),
    )


class Mixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        yz, *kept = mixer_fwd(*inputs, False)
        ctx.save_for_backward(*inputs, *kept)
        return yz

    @staticmethod
    @dev.first_derivative_only
    def backward(ctx, dyz):
        return mixer_bwd(dyz, *ctx.saved_tensors)


def mixer(
    xz, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, A, D, delta_bias, *,
    conv_x_bias=None, conv_z_bias=None,
):  # fmt: skip
    """yz: the mixer's middle above on the Triton path, differentiable in every tensor.

    Arguments are those of `mambavision.ops.mixer`, which checks them.
    """
    return Mixer.apply(
        xz, conv_x_weight, conv_z_weight, x_proj_weight, dt_proj_weight, A, D, delta_bias,
        conv_x_bias, conv_z_bias,
    )  # fmt: skip

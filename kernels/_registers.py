"""A scan's registers: states, the rows that feed them, sums over channels.

A state register is a tile (BLOCK_D, BLOCK_N), BLOCK_N states of a channel in each row. With LANES =
1 a row's registers are the dstate states of the channel that the row owns. With LANES = 2 rows 2 k
and 2 k + 1, lanes next to each other, share their two channels: either has one half of the states,
of its own channel in the first half of the registers, of its neighbour's in the second. Both halves
meet the same values of B and C, so a lane reads half as many, and sums over channels begin inside
it; what is one number per channel, such as dt, the two lanes exchange (`of_both`).

Rows of u, delta and z are tuples of (BLOCK_D,), one for each of the STEPS steps of an iteration,
and so are those of B and C, (dstate,): rows of tiles, which asynchronous copies bring to shared
memory.
"""

import triton
import triton.language as tl


@triton.jit
def load_vector(ptr, offs_d):
    """(BLOCK_D,) of a (dim,) tensor, 0 where there is none."""
    if ptr is None:
        return tl.zeros(offs_d.shape, tl.float32)
    else:
        return tl.load(ptr + offs_d).to(tl.float32)


@triton.jit
def _across(x, BIT: tl.constexpr):
    """What the lane across BIT holds of a (32,) tensor."""
    return tl.gather(x, tl.arange(0, 32) ^ BIT, 0)


@triton.jit
def of_both(x, LANES: tl.constexpr):
    """x of the channels whose states a lane has: its own and, with LANES = 2, its neighbour's."""
    if LANES == 1:
        return (x,)
    else:
        return x, _across(x, 1)


@triton.jit
def _states_of(
    r: tl.constexpr, BLOCK_D: tl.constexpr, dstate: tl.constexpr, BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Which states a channel's register r holds, (1 or BLOCK_D, BLOCK_N)."""
    offs_n = r * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    if LANES == 1:
        return offs_n
    else:
        return (tl.arange(0, BLOCK_D) % LANES * (dstate // LANES))[:, None] + offs_n


@triton.jit
def load_states(ptr, offs, dstate: tl.constexpr, BLOCK_N: tl.constexpr):
    """The dstate values of each channel of a (dim, dstate) tensor, a tuple of state registers."""
    values = ()
    for c in tl.static_range(len(offs)):
        values = values + load_alike(ptr + offs[c] * dstate, offs, dstate, BLOCK_N)
    return to_float32(values)


@triton.jit
def load_alike(ptr, offs, dstate: tl.constexpr, BLOCK_N: tl.constexpr):
    """dstate values from ptr on, a channel's registers, in memory's dtype. For a row of B or C all
    lanes read the same addresses, up to 16 bytes at a time, and no value travels between lanes."""
    LANES: tl.constexpr = len(offs)
    BLOCK_D: tl.constexpr = offs[0].shape[0]
    values = ()
    for r in tl.static_range((dstate + BLOCK_N - 1) // BLOCK_N // LANES):
        offs_n = _states_of(r, BLOCK_D, dstate, BLOCK_N, LANES)
        at = (ptr + offs[0] * 0)[:, None] + offs_n
        if dstate % BLOCK_N == 0:
            values = values + (tl.load(at),)
        else:
            values = values + (tl.load(at, mask=offs_n < dstate, other=0.0),)
    return values


@triton.jit
def load_first(ptr, b, like, offs, dim, dstate: tl.constexpr, BLOCK_N: tl.constexpr):
    """Entry b of a (batch, dim, dstate) tensor, or zeros where there is none."""
    if ptr is None:
        return zeros(like)
    else:
        return load_states(ptr + b * dim * dstate, offs, dstate, BLOCK_N)


@triton.jit
def store_states(ptr, values, offs, masks, dstate: tl.constexpr, BLOCK_N: tl.constexpr):
    EACH: tl.constexpr = len(values) // len(offs)
    for r in tl.static_range(len(values)):
        offs_d = offs[r // EACH]
        offs_n = _states_of(r % EACH, offs_d.shape[0], dstate, BLOCK_N, len(offs))
        mask = masks[r // EACH][:, None] & (offs_n < dstate)
        tl.store(ptr + offs_d[:, None] * dstate + offs_n, values[r], mask=mask)


@triton.jit
def zeros(like):
    values = ()
    for r in tl.static_range(len(like)):
        values = values + (tl.zeros_like(like[r]),)
    return values


@triton.jit
def to_float32(values):
    wide = ()
    for r in tl.static_range(len(values)):
        wide = wide + (values[r].to(tl.float32),)
    return wide


@triton.jit
def only(values, mask):
    """The values where the mask holds, 0 elsewhere."""
    kept = ()
    for k in tl.static_range(len(values)):
        kept = kept + (tl.where(mask, values[k], 0.0),)
    return kept


@triton.jit
def add_product(sums, values, factors):
    """Sums and values of every state, a factor for each channel that a lane has states of."""
    EACH: tl.constexpr = len(sums) // len(factors)
    grown = ()
    for r in tl.static_range(len(sums)):
        grown = grown + (sums[r] + values[r] * factors[r // EACH][:, None],)
    return grown


@triton.jit
def row_of(t, seqlen, REVERSE: tl.constexpr):
    """Where step t lies, 64 bits wide: with REVERSE the sequence is walked from its end, without a
    flipped copy."""
    row = tl.cast(t, tl.int64)
    if REVERSE:
        row = seqlen - 1 - row
    return row


@triton.jit
def load_rows(
    ptr, stride_l: tl.constexpr, t0, seqlen, columns, STEPS: tl.constexpr, SPLIT: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """STEPS rows of a (seqlen, dim) tensor from step t0 on, float32, the last one again behind the
    end: a tile at once, or row by row where lanes are at steps of their own."""
    if SPLIT == 1:
        t = tl.minimum(t0 + tl.arange(0, triton.next_power_of_2(STEPS)), seqlen - 1)
        at = ptr + (row_of(t, seqlen, REVERSE) * stride_l)[:, None] + columns[None, :]
        return to_float32(_rows_of_tile(tl.load(at)))
    else:
        rows = ()
        for i in tl.static_range(STEPS):
            row = row_of(tl.minimum(t0 + i, seqlen - 1), seqlen, REVERSE)
            rows = rows + (tl.load(ptr + row * stride_l + columns),)
        return to_float32(rows)


@triton.jit
def load_states_by_step(
    ptr, stride_l: tl.constexpr, t0, seqlen, offs, dstate: tl.constexpr, BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr, SPLIT: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """As `load_rows` of B or C: for each step its registers, one behind the other, the same for
    every channel."""
    LANES: tl.constexpr = len(offs)
    if SPLIT == 1:
        WIDTH: tl.constexpr = triton.next_power_of_2(triton.cdiv(dstate, BLOCK_N)) * BLOCK_N
        PARTS: tl.constexpr = WIDTH // (LANES * BLOCK_N)
        # No copy of less than 4 bytes a lane is asynchronous; more rows than needed make it so
        FULL: tl.constexpr = 1024 // (WIDTH * ptr.dtype.element_ty.primitive_bitwidth)
        ROWS: tl.constexpr = max(triton.next_power_of_2(STEPS), min(FULL, 16 // PARTS))
        t = tl.minimum(t0 + tl.arange(0, ROWS), seqlen - 1)
        offs_n = tl.arange(0, WIDTH)[None, :]
        at = ptr + (row_of(t, seqlen, REVERSE) * stride_l)[:, None] + offs_n
        if dstate == WIDTH:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=offs_n < dstate, other=0.0)
        # What the lanes that share a channel's states meet lies side by side
        tile = tl.permute(tl.reshape(tile, (ROWS, LANES, PARTS, BLOCK_N)), (0, 2, 1, 3))
        return to_float32(_rows_of_tile(tl.reshape(tile, (ROWS * PARTS, LANES * BLOCK_N))))
    else:
        values = ()
        for i in tl.static_range(STEPS):
            row = row_of(tl.minimum(t0 + i, seqlen - 1), seqlen, REVERSE)
            values = values + load_alike(ptr + row * stride_l, offs, dstate, BLOCK_N)
        return to_float32(values)


@triton.jit
def _rows_of_tile(tile):
    """The rows of a tile, a power of 2 of at most 16."""
    COUNT: tl.constexpr = tile.shape[0]
    WIDTH: tl.constexpr = tile.shape[1]
    # Bits of the row's number behind the column, the highest last: halves stay in order
    if COUNT == 1:
        parts = (tl.reshape(tile, (WIDTH,)),)
    elif COUNT == 2:
        parts = (tl.permute(tile, (1, 0)),)
    elif COUNT == 4:
        parts = (tl.permute(tl.reshape(tile, (2, 2, WIDTH)), (2, 1, 0)),)
    elif COUNT == 8:
        parts = (tl.permute(tl.reshape(tile, (2, 2, 2, WIDTH)), (3, 2, 1, 0)),)
    else:
        parts = (tl.permute(tl.reshape(tile, (2, 2, 2, 2, WIDTH)), (4, 3, 2, 1, 0)),)
    for s in tl.static_range(4):
        if 2 << s <= COUNT:
            halves = ()
            for k in tl.static_range(len(parts)):
                halves = halves + tl.split(parts[k])
            parts = halves
    return parts


@triton.jit
def of_step(
    rows, i: tl.constexpr, dstate: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """The registers of step i, those of one channel."""
    R: tl.constexpr = triton.cdiv(dstate, BLOCK_N) // LANES
    values = ()
    for r in tl.static_range(R):
        if SPLIT == 1:
            row = rows[i * triton.next_power_of_2(R) + r]
            if LANES == 1:
                values = values + (row[None, :],)
            else:
                for_pair = tl.reshape(row, (1, LANES, BLOCK_N))
                for_all = tl.broadcast_to(for_pair, (32 // LANES, LANES, BLOCK_N))
                values = values + (tl.reshape(for_all, (32, BLOCK_N)),)
        else:
            values = values + (rows[i * R + r],)
    return values


@triton.jit
def _columns(tile, BLOCK_N: tl.constexpr):
    """The columns of a (BLOCK_D, BLOCK_N) state register, BLOCK_N 1, 2 or 4."""
    BLOCK_D: tl.constexpr = tile.shape[0]
    if BLOCK_N == 1:
        return (tl.reshape(tile, (BLOCK_D,)),)
    elif BLOCK_N == 2:
        return tl.split(tile)
    else:
        even, odd = tl.split(tl.reshape(tile, (BLOCK_D, 2, 2)))
        c0, c2 = tl.split(even)
        c1, c3 = tl.split(odd)
        return c0, c1, c2, c3


@triton.jit
def dot_states(a, b, first, LANES: tl.constexpr):
    """first + <a, b> over the states of each channel, (BLOCK_D,); b may be that of one channel for
    all, `of_step`."""
    BLOCK_N: tl.constexpr = a[0].shape[1]
    if a[0].shape[0] >= 32:
        # Chains of fused multiply-adds, one for each channel that a lane has states of
        EACH: tl.constexpr = len(a) // LANES
        sums = ()
        for c in tl.static_range(LANES):
            sum = first if c == 0 else tl.zeros_like(first)
            for r in tl.static_range(EACH):
                a_r = _columns(a[c * EACH + r], BLOCK_N)
                b_r = tl.broadcast_to(b[(c * EACH + r) % len(b)], a[0].shape)
                b_r = _columns(b_r, BLOCK_N)
                for n in tl.static_range(BLOCK_N):
                    sum += a_r[n] * b_r[n]
            sums = sums + (sum,)
        if LANES == 1:
            return sums[0]
        else:
            return sums[0] + _across(sums[1], 1)
    else:
        products = a[0] * b[0]
        for r in tl.static_range(1, len(a)):
            products += a[r] * b[r]
        return first + tl.sum(products, axis=1)


@triton.jit
def halve(a, x, b, y, dstate: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first of five steps of summing a x and b y over the channels of a warp, a and b dstate
    values of each channel, x and y one (32,) for each channel that a lane has states of: the lower
    lanes go on with a x, the upper ones with b y. With two channels a lane this is the second step,
    the first happens inside the lane."""
    LANES: tl.constexpr = len(x)
    EACH: tl.constexpr = len(a) // LANES
    upper = tl.arange(0, 32) >= 16
    values = ()
    if LANES == 1:
        kept, sent = tl.where(upper, y[0], x[0]), tl.where(upper, x[0], y[0])
    for r in tl.static_range(EACH):
        a_r, b_r = _columns(a[r], BLOCK_N), _columns(b[r], BLOCK_N)
        if LANES == 2:
            a_of_other = _columns(a[EACH + r], BLOCK_N)
            b_of_other = _columns(b[EACH + r], BLOCK_N)
        for n in tl.static_range(BLOCK_N):
            if r * BLOCK_N + n < triton.next_power_of_2(dstate):
                if LANES == 1:
                    received = _across(tl.where(upper, a_r[n], b_r[n]) * sent, 16)
                    values = values + (tl.where(upper, b_r[n], a_r[n]) * kept + received,)
                else:
                    ax = a_r[n] * x[0] + a_of_other[n] * x[1]
                    by = b_r[n] * y[0] + b_of_other[n] * y[1]
                    received = _across(tl.where(upper, ax, by), 16)
                    values = values + (tl.where(upper, by, ax) + received,)
    for _ in tl.static_range(triton.next_power_of_2(dstate) // LANES - EACH * BLOCK_N):
        values = values + (tl.zeros_like(x[0]),)
    return values


@triton.jit
def store_sums(
    ptr, stride: tl.constexpr, values, steps, STEPS: tl.constexpr, dstate: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """The other steps: sums over each half of the lanes of what `halve` left of STEPS steps, all at
    once. Rows begin at ptr, a stride apart; those from `steps` on are not stored."""
    lanes = tl.arange(0, 32)
    for s in tl.static_range(4 if LANES == 1 else 3):
        if len(values) > 1:
            upper = (lanes & (8 >> s)) != 0
            halved = ()
            for r in tl.static_range(len(values) // 2):
                low, high = values[r], values[r + len(values) // 2]
                received = _across(tl.where(upper, low, high), 8 >> s)
                halved = halved + (tl.where(upper, high, low) + received,)
            values = halved
        else:
            values = (values[0] + _across(values[0], 8 >> s),)
    # V values of a step in each lane at first, and then in GROUPS lanes
    V: tl.constexpr = triton.next_power_of_2(dstate) // LANES
    GROUPS: tl.constexpr = 16 // LANES
    first = lanes % 16 // LANES * (STEPS * V)
    for r in tl.static_range(len(values)):
        index = first // GROUPS + r
        step, n = index // V, index % V + lanes % LANES * V
        mask = (first % GROUPS == 0) & (n < dstate) & (step < steps)
        tl.store(ptr + step * stride + lanes // 16 * dstate + n, values[r], mask=mask)


@triton.jit
def store_sums_of_step(
    ptr, a, x, b, y, mask, dstate: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Sums over channels of a x and, behind them, of b y, where states lie over lanes."""
    for r in tl.static_range(len(a)):
        n = r * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = (n < dstate) & mask
        tl.store(ptr + n, tl.sum(a[r] * x[:, None], axis=0), mask=mask_n)
        tl.store(ptr + dstate + n, tl.sum(b[r] * y[:, None], axis=0), mask=mask_n)

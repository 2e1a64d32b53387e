"""Loss, statistics and gradient of a row in one launch, the row streamed in blocks, read twice.

The first loop takes maximum and sums, the second writes the gradient while the row is still in L2;
the formulas are in arithmetic.py. Maximum and sums are kept running (Milakov and Gimelshein 2018,
Online normalizer calculation for softmax), each thread for the columns that it loads: a block is
seen as (repeats, LANES, VECTOR), of which a thread holds one lane, so that the first loop has no
barrier and no shuffle, and the lanes meet once, at the end. The target is compared with in the one
block that holds it.

The choice: any vocabulary, any GPU, any option, no cluster. The price: each kept logit is asked for
twice, `(1 + 2 f) N V` elements with kept fraction f, of which `(1 + f) N V` are distinct.
Rows whose target is `ignore_index` are not read; their gradient is written as zero.

With STAYS a program takes row after row, and asks for the next row's target and first block before
it writes the gradient, so that something is on its way from memory between two rows too.
"""

import triton
import triton.language as tl

from sgp.kernels.arithmetic import (
    NOWHERE,
    candidates,
    entropy_term,
    exp,
    finish,
    finish_ignored,
    finite_or_zero,
    joined,
    joined_plain,
    leading,
    load_row_scalars,
    origin_of,
    rescaled,
    score,
    smoothing_term,
    transform,
)
from sgp.kernels.layout import aligned, body, column_offset, edge_columns, row_pointer
from sgp.kernels.row_pieces import load_class_weight, write_gradient, zero_row


@triton.jit
def start_of(i_block, blocks, BV: tl.constexpr, DESCENDS: tl.constexpr):
    """The first column of the block that comes i_block-th."""
    if DESCENDS:  # what is read last is read again first
        return (tl.maximum(blocks, 1) - 1 - i_block) * BV
    else:
        return i_block * BV


@triton.jit
def load_block(logits, p_body, start, columns, BV: tl.constexpr, AGAIN: tl.constexpr):
    """A block of logits, kept in L2 if it is read AGAIN."""
    o_lane = tl.arange(0, BV)
    p_block = p_body + column_offset(logits, start) + column_offset(logits, o_lane)
    m_col = o_lane < columns - start
    if AGAIN:
        b_x = tl.load(p_block, mask=m_col, other=float("-inf"), eviction_policy="evict_last")
    else:
        b_x = tl.load(p_block, mask=m_col, other=float("-inf"), eviction_policy="evict_first")
    return b_x


@triton.jit
def accumulate(
    carry, b_x, o_col, m_col, y, reference, b_w, opt,
    ENTROPY: tl.constexpr, ARGMAX: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One block more into each lane's (max, s_o, t_o, k, argmax); the target is the y-th of it."""
    BV: tl.constexpr = b_x.shape[0]
    REPEATS: tl.constexpr = BV // (LANES * VECTOR)
    top, s_o, t_o, k, i_top = carry
    b_s = score(b_x, m_col, opt)
    b_lanes = tl.reshape(b_s, [REPEATS, LANES, VECTOR])
    b_top = tl.max(tl.max(b_lanes, 2), 0)
    if ARGMAX:
        b_col = tl.reshape(o_col, [REPEATS, LANES, VECTOR])
        b_i = candidates(b_lanes, b_top[None, :, None], b_col)
        i_top = leading(top, i_top, b_top, tl.min(tl.min(b_i, 2), 0))
    top_new = tl.maximum(top, b_top)
    origin = origin_of(top_new, ENTROPY)
    b_z = b_lanes - origin[None, :, None]
    b_e = exp(b_z)
    if (y >= 0) & (y < BV):
        o_vector = tl.reshape(tl.arange(0, REPEATS * LANES), [REPEATS, LANES])
        b_y = tl.where(o_vector == y // VECTOR, y % VECTOR, -1)
        b_e = tl.where(tl.arange(0, VECTOR)[None, None, :] == b_y[:, :, None], 0.0, b_e)
    s_o, t_o = rescaled(top, s_o, t_o, origin, ENTROPY)
    s_o += tl.sum(tl.sum(b_e, 2), 0)
    if ENTROPY:
        t_o += tl.sum(tl.sum(entropy_term(b_z, b_e), 2), 0)
    if opt.label_smoothing is not None:
        b_k = smoothing_term(b_s, m_col, reference, b_w, opt)
        k += tl.sum(tl.sum(tl.reshape(b_k, [REPEATS, LANES, VECTOR]), 2), 0)
    return top_new, s_o, t_o, k, i_top


@triton.jit
def row_of_lanes(
    carry, opt, ENTROPY: tl.constexpr, ARGMAX: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """(max, s_o, t_o, k, argmax) of the row: by shuffles to one a warp, then in one exchange."""
    SMOOTHING: tl.constexpr = opt.label_smoothing is not None
    top, s_o, t_o, k, i_top = carry
    if ARGMAX:
        is_first = (top == tl.max(top, 0)) | (i_top < 0)
        i_top = tl.min(tl.where(is_first, i_top, NOWHERE), 0)
    b_top = tl.max(tl.reshape(top, [LANES // 32, 32]), 1)
    b_origin = tl.broadcast_to(origin_of(b_top, ENTROPY)[:, None], [LANES // 32, 32])
    s_o, t_o = rescaled(top, s_o, t_o, tl.reshape(b_origin, [LANES]), ENTROPY)
    b_so = tl.sum(tl.reshape(s_o, [LANES // 32, 32]), 1)
    if ENTROPY or SMOOTHING:
        b_to = tl.zeros([LANES // 32], tl.float32)
        b_k = tl.zeros([LANES // 32], tl.float32)
        if ENTROPY:
            b_to = tl.sum(tl.reshape(t_o, [LANES // 32, 32]), 1)
        if SMOOTHING:
            b_k = tl.sum(tl.reshape(k, [LANES // 32, 32]), 1)
        top, s_o, t_o, k = tl.reduce((b_top, b_so, b_to, b_k), 0, joined)
        return top, s_o, t_o, k, i_top
    else:
        top, s_o = tl.reduce((b_top, b_so), 0, joined_plain)
        return top, s_o, 0.0, 0.0, i_top


@triton.jit
def first_block(
    logits, i_row, m_row, V,
    BV: tl.constexpr, VECTOR: tl.constexpr, EDGES: tl.constexpr, DESCENDS: tl.constexpr,
    ALIGN: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """What `row_sums` begins with; nothing is read where m_row is false."""
    p_body, _, columns = body(logits, i_row, V, ALIGN, VECTOR, EDGES)
    start = start_of(0, tl.cdiv(columns, BV), BV, DESCENDS)
    return load_block(logits, p_body, start, tl.where(m_row, columns, 0), BV, AGAIN)


@triton.jit
def row_sums(
    logits, i_row, y, b_ahead, reference, opt, V, ENTROPY: tl.constexpr, ARGMAX: tl.constexpr,
    BV: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, EDGES: tl.constexpr,
    DESCENDS: tl.constexpr, ALIGN: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """(max, s_o, t_o, k, argmax) of a row; `b_ahead` is its first block where that was loaded."""
    p_body, before, columns = body(logits, i_row, V, ALIGN, VECTOR, EDGES)
    blocks = tl.cdiv(columns, BV)
    o_lane = tl.arange(0, BV)
    t_o = 0.0
    k = 0.0
    if ENTROPY:
        t_o = tl.zeros([LANES], tl.float32)
    if opt.label_smoothing is not None:
        k = tl.zeros([LANES], tl.float32)
    i_top = NOWHERE
    if ARGMAX:
        i_top = tl.full([LANES], NOWHERE, tl.int32)
    top = tl.full([LANES], float("-inf"), tl.float32)
    carry = (top, tl.zeros([LANES], tl.float32), t_o, k, i_top)
    i_begin = 0
    if b_ahead is not None:
        i_begin = 1
        start = start_of(0, blocks, BV, DESCENDS)
        m_col = o_lane < columns - start
        b_w = load_class_weight(before + start + o_lane, m_col, opt)
        carry = accumulate(
            carry, b_ahead, before + start + o_lane, m_col, y - before - start, reference, b_w, opt,
            ENTROPY, ARGMAX, LANES, VECTOR,
        )  # fmt: skip
    for i in range(i_begin, blocks):
        start = start_of(i, blocks, BV, DESCENDS)
        m_col = o_lane < columns - start
        b_x = load_block(logits, p_body, start, columns, BV, AGAIN)
        b_w = load_class_weight(before + start + o_lane, m_col, opt)
        carry = accumulate(
            carry, b_x, before + start + o_lane, m_col, y - before - start, reference, b_w, opt,
            ENTROPY, ARGMAX, LANES, VECTOR,
        )  # fmt: skip
    if EDGES:
        o_col, m_col = edge_columns(before, columns, V, VECTOR, LANES)
        p_row = row_pointer(logits, i_row, 1)
        b_x = tl.load(p_row + o_col, mask=m_col, other=float("-inf"))
        b_w = load_class_weight(o_col, m_col, opt)
        i_y = tl.where(y < before, y, y - before - columns + VECTOR)
        i_y = tl.where((y < before) | (i_y >= VECTOR), i_y, -1)
        carry = accumulate(
            carry, b_x, o_col, m_col, i_y, reference, b_w, opt, ENTROPY, ARGMAX, LANES, 1
        )
    return row_of_lanes(carry, opt, ENTROPY, ARGMAX, LANES)


@triton.jit(do_not_specialize=["N"])
def row_streaming(
    logits,  # Matrix (N, V) bf16 | fp16 | fp32
    dlogits,  # Matrix (N, V), may be `logits`; None: loss and statistics only
    target,  # (N,) int64
    loss,  # (N,) fp32, written
    saved,  # (N, 3) fp32: max, 1/d, s_o/d, written; None: not wanted
    stats,  # Statistics, written; None: not wanted
    argmax,  # (N,) int64, written; None: not wanted, as it is where stats is None
    opt,  # Options
    ignore_index,
    V,
    N,  # rows; not compiled in, so that one binary serves every batch
    BV: tl.constexpr,  # columns of a block of the first loop
    BV_2: tl.constexpr,  # of the second
    LANES: tl.constexpr,  # threads
    VECTOR: tl.constexpr,  # elements of one access to the logits
    EDGES: tl.constexpr,  # rows begin and end between two accesses
    DESCENDS: tl.constexpr,  # the first loop
    STAYS: tl.constexpr,  # a program takes row after row
    ALIGN: tl.constexpr,
):
    V = aligned(V, ALIGN)
    i_first = tl.program_id(0)
    y = tl.load(target + i_first)
    rows = 1
    if STAYS:
        rows = tl.cdiv(N - i_first, tl.num_programs(0))
        b_ahead = first_block(
            logits, i_first.to(tl.int64), y != ignore_index, V,
            BV, VECTOR, EDGES, DESCENDS, ALIGN, dlogits is not None,
        )  # fmt: skip
    else:
        b_ahead = None
    for i in range(rows):
        i_row = (i_first + i * tl.num_programs(0)).to(tl.int64)
        if STAYS:
            i_next = i_row + tl.num_programs(0)
            y_next = tl.load(target + i_next, mask=i_next < N, other=ignore_index)
            m_next = y_next != ignore_index
        if y == ignore_index:
            finish_ignored(i_row, loss, saved, stats, argmax)
            if STAYS:
                b_ahead = first_block(
                    logits, i_next, m_next, V,
                    BV, VECTOR, EDGES, DESCENDS, ALIGN, dlogits is not None,
                )  # fmt: skip
            if dlogits is not None:
                zero_row(dlogits, i_row, V, BV_2, LANES, VECTOR, EDGES, ALIGN)
        else:
            m_y = (y >= 0) & (y < V)
            i_y = tl.where(m_y, y, 0).to(tl.int32)
            p_row = row_pointer(logits, i_row, 1)
            x_y = tl.load(p_row + column_offset(logits, i_y), mask=m_y, other=float("nan"))
            s_y = transform(x_y, opt)
            reference = finite_or_zero(s_y)
            r, w_y, w_mean = load_row_scalars(i_row, i_y, m_y, opt)
            carry = row_sums(
                logits, i_row, i_y, b_ahead, reference, opt, V,
                stats is not None, argmax is not None,
                BV, LANES, VECTOR, EDGES, DESCENDS, ALIGN, dlogits is not None,
            )  # fmt: skip
            top, inv_d, so_d = finish(
                carry, s_y, reference, r, w_y, w_mean, i_row, loss, saved, stats, argmax, V, opt
            )
            if STAYS:
                b_ahead = first_block(
                    logits, i_next, m_next, V,
                    BV, VECTOR, EDGES, DESCENDS, ALIGN, dlogits is not None,
                )  # fmt: skip
            if dlogits is not None:
                write_gradient(
                    logits, dlogits, i_row, i_y, x_y, m_y, top, inv_d, so_d, r, w_y, w_mean, opt, V,
                    BV_2, LANES, VECTOR, EDGES, ALIGN,
                )  # fmt: skip
        if STAYS:
            y = y_next

"""Loss and gradients of rows whose target is a distribution, streamed in blocks, read twice.

A row of logits with scores ``s`` (arithmetic.py), probabilities ``y`` that need not add up to 1 and
class weights ``w``, with ``q_j = w_j ((1 - eps) y_j + eps / V)`` and a largest column ``m``::

    top   = s_m,  e_j = exp(s_j - top),  s_o = sum_{j != m} e_j,  log d = log1p(s_o)
    q_o   = sum_{j != m} q_j,  A = q_o + q_m,  lse = top + log d
    loss  = r (sum_j q_j (top - s_j) + A log d + zeta lse^2)
    dx_j  = r (A e_j / d - q_j + 2 zeta lse e_j / d)
    dx_m  = r (q_o - A s_o / d + 2 zeta lse / d)       where s_o < d / 2, m has most of the mass
    dy_j  = r (1 - eps) w_j (log d + top - s_j)

The largest column is left out of two sums, as the target is in arithmetic.py: near probability 1
neither ``log d`` nor ``p - q`` may be the difference of numbers near 1. The price: two comparisons
with the maximum an element. Every term of the loss is positive where the probabilities are.
``0 log 0`` is 0: a class with q = 0 and a score of minus infinity adds nothing to the loss, and has
no gradient of its probability.

The form is row_streaming's: sums are kept running by each thread for the columns that it loads, so
that the first loop has no barrier and no shuffle, and the lanes meet once. The price: logits and
probabilities are each asked for twice, the second time where the first loop has left them in L2.
The backward has the second loop alone, from ``(top, s_o, q_o, A)`` of each row.
"""

import triton
import triton.language as tl

from sgp.kernels.arithmetic import (
    exp,
    exponent_of,
    finite_or_zero,
    fma,
    log1p,
    score,
    transform_slope,
)
from sgp.kernels.layout import aligned, body, column_offset, edge_columns, row_pointer
from sgp.kernels.row_pieces import load_class_weight


@triton.jit
def load_columns(p_x, m, o_col, m_col, other, AGAIN: tl.constexpr):
    """Columns of a row of the matrix m that begins at p_x, kept in L2 if they are read AGAIN."""
    if AGAIN:
        return tl.load(
            p_x + column_offset(m, o_col), mask=m_col, other=other, eviction_policy="evict_last"
        )
    else:
        return tl.load(
            p_x + column_offset(m, o_col), mask=m_col, other=other, eviction_policy="evict_first"
        )


@triton.jit
def weighted(b_y, b_w, m_col, opt, V):
    """Probabilities as stored -> q, float32, 0 outside the row."""
    b_q = b_y.to(tl.float32)
    if opt.label_smoothing is not None:
        b_q = (1.0 - opt.label_smoothing) * b_q + opt.label_smoothing / V
        if opt.weight is None:
            b_q = tl.where(m_col, b_q, 0.0)
    if opt.weight is not None:
        b_q = b_q * b_w  # which is 0 outside the row
    return b_q


@triton.jit
def accumulate(
    carry, b_x, b_y, b_w, m_col, opt, V, LANES: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """One block more into each lane's (top, s_o, q_o, q_m, B), where B = sum q (top - s).

    Of equal largest columns, all are in q_m: nobody asks for it then.
    """
    SHAPE: tl.constexpr = [b_x.shape[0] // (LANES * VECTOR), LANES, VECTOR]
    top, s_o, q_o, q_m, b = carry
    b_s = tl.reshape(score(b_x, m_col, opt), SHAPE)
    b_q = tl.reshape(weighted(b_y, b_w, m_col, opt, V), SHAPE)
    top_new = tl.maximum(top, tl.max(tl.max(b_s, 2), 0))
    origin = finite_or_zero(top_new)
    b_z = b_s - origin[None, :, None]
    is_top = b_z == 0.0
    b_e = tl.where(is_top, 0.0, exp(b_z))
    count = tl.sum(tl.sum(is_top.to(tl.float32), 2), 0)
    shrink = exp(top - origin)  # what is left of the column that was left out; 0 without one
    s_o = shrink * s_o + tl.maximum(count - 1.0 + shrink, 0.0)
    s_o += tl.sum(tl.sum(b_e, 2), 0)
    b_b = b_q * tl.where(b_q == 0.0, 0.0, -b_z)
    b += (q_o + q_m) * (origin - finite_or_zero(top)) + tl.sum(tl.sum(b_b, 2), 0)
    q_o += tl.where(top_new > top, q_m, 0.0) + tl.sum(tl.sum(tl.where(is_top, 0.0, b_q), 2), 0)
    q_m = tl.where(top_new > top, 0.0, q_m) + tl.sum(tl.sum(tl.where(is_top, b_q, 0.0), 2), 0)
    return top_new, s_o, q_o, q_m, b


@triton.jit
def row_of_lanes(carry):
    """(top, s_o, q_o, A, B) of the row; s_o is NaN where every score is minus infinity."""
    top, s_o, q_o, q_m, b = carry
    top_row = tl.max(top, 0)
    origin = finite_or_zero(top_row)
    shrink = exp(top - origin)
    is_top = top == origin
    s_o = tl.sum(s_o * shrink + tl.where(is_top, 0.0, shrink), 0)
    s_o += tl.sum(is_top.to(tl.float32), 0) - 1.0
    b = tl.sum(b + (q_o + q_m) * (origin - finite_or_zero(top)), 0)
    q_o = tl.sum(q_o + tl.where(is_top, 0.0, q_m), 0)
    a = q_o + tl.sum(tl.where(is_top, q_m, 0.0), 0)
    s_o = tl.where(top_row == float("-inf"), float("nan"), s_o)
    return top_row, s_o, q_o, a, b


@triton.jit
def row_sums(
    logits, target, i_row, opt, V,
    BV: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, EDGES: tl.constexpr,
    ALIGN: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """(top, s_o, q_o, A, B) of a row."""
    p_x, before, columns = body(logits, i_row, V, ALIGN, VECTOR, EDGES)
    p_y, _, _ = body(target, i_row, V, ALIGN, VECTOR, EDGES)
    o_lane = tl.arange(0, BV)
    top = tl.full([LANES], float("-inf"), tl.float32)
    carry = (
        top,
        tl.zeros([LANES], tl.float32),
        tl.zeros([LANES], tl.float32),
        tl.zeros([LANES], tl.float32),
        tl.zeros([LANES], tl.float32),
    )
    for k in range(tl.cdiv(columns, BV)):
        start = k * BV
        m_col = o_lane < columns - start
        p_x_block = p_x + column_offset(logits, start)
        p_y_block = p_y + column_offset(target, start)
        b_x = load_columns(p_x_block, logits, o_lane, m_col, float("-inf"), AGAIN)
        b_y = load_columns(p_y_block, target, o_lane, m_col, 0.0, AGAIN)
        b_w = load_class_weight(before + start + o_lane, m_col, opt)
        carry = accumulate(carry, b_x, b_y, b_w, m_col, opt, V, LANES, VECTOR)
    if EDGES:
        o_col, m_col = edge_columns(before, columns, V, VECTOR, LANES)
        b_x = tl.load(row_pointer(logits, i_row, 1) + o_col, mask=m_col, other=float("-inf"))
        b_y = tl.load(row_pointer(target, i_row, 1) + o_col, mask=m_col, other=0.0)
        b_w = load_class_weight(o_col, m_col, opt)
        carry = accumulate(carry, b_x, b_y, b_w, m_col, opt, V, LANES, 1)
    return row_of_lanes(carry)


@triton.jit
def factors(top, s_o, q_o, a, i_row, opt):
    """(top, log d, r, factor of 2^(l s - c), l, c, dx_m / r, s_m where that is to be used)."""
    r = 1.0
    if opt.row_weight is not None:
        r = tl.load(opt.row_weight + i_row)
    if opt.scale is not None:
        r = r * tl.load(opt.scale)
    d = 1.0 + s_o
    log_d = log1p(s_o)
    of_e = a / d  # not a (1 / d), which is rounded twice
    so_d = s_o / d
    certain = tl.where(so_d < 0.5, top, float("nan"))  # which equals no score
    dx_m = q_o - a * so_d
    if opt.lse_square_scale is not None:
        from_lse = 2.0 * opt.lse_square_scale * (top + log_d) / d
        of_e += from_lse
        dx_m += from_lse
    l, c, rest = exponent_of(top)  # noqa: E741
    return top, log_d, r, of_e * tl.exp2(-rest), l, c, dx_m, certain


@triton.jit
def gradients(b_x, b_y, b_w, m_col, row, opt, V):
    """The gradients of logits and of probabilities, float32; `row` is what `factors` returns."""
    top, log_d, r, of_e, l, c, dx_m, certain = row  # noqa: E741
    b_s = score(b_x, m_col, opt)
    b_q = weighted(b_y, b_w, m_col, opt, V)
    b_dx = tl.where(b_s == certain, dx_m, of_e * tl.exp2(fma(b_s, l, -c)) - b_q) * r
    if opt.softcap is not None:
        b_dx = b_dx * transform_slope(b_x, opt)
    if opt.logit_scale is not None:
        b_dx = b_dx * opt.logit_scale
    b_dy = log_d + (top - b_s)
    if opt.weight is not None:
        b_dy = b_dy * b_w
    if opt.label_smoothing is not None:
        b_dy = b_dy * (1.0 - opt.label_smoothing)
    b_dy = tl.where((b_q == 0.0) & (b_s == float("-inf")), 0.0, b_dy * r)
    return b_dx, b_dy


@triton.jit
def store_columns(p_g, m, o_col, m_col, b_g):
    """Columns of a row of the matrix m, a gradient that nobody reads again here."""
    tl.store(
        p_g + column_offset(m, o_col),
        b_g.to(p_g.dtype.element_ty),
        mask=m_col,
        eviction_policy="evict_first",
    )


@triton.jit
def write_gradients(
    logits, target, dlogits, dtarget, i_row, top, s_o, q_o, a, opt, V,
    BV: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, EDGES: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    row = factors(top, s_o, q_o, a, i_row, opt)
    p_x, before, columns = body(logits, i_row, V, ALIGN, VECTOR, EDGES)
    p_y, _, _ = body(target, i_row, V, ALIGN, VECTOR, EDGES)
    if dlogits is not None:
        p_dx, _, _ = body(dlogits, i_row, V, ALIGN, VECTOR, EDGES)
    if dtarget is not None:
        p_dy, _, _ = body(dtarget, i_row, V, ALIGN, VECTOR, EDGES)
    o_lane = tl.arange(0, BV)
    for k in range(tl.cdiv(columns, BV)):
        start = k * BV
        m_col = o_lane < columns - start
        p_x_block = p_x + column_offset(logits, start)
        p_y_block = p_y + column_offset(target, start)
        b_x = load_columns(p_x_block, logits, o_lane, m_col, float("-inf"), False)
        b_y = load_columns(p_y_block, target, o_lane, m_col, 0.0, False)
        b_w = load_class_weight(before + start + o_lane, m_col, opt)
        b_dx, b_dy = gradients(b_x, b_y, b_w, m_col, row, opt, V)
        if dlogits is not None:
            store_columns(p_dx + column_offset(dlogits, start), dlogits, o_lane, m_col, b_dx)
        if dtarget is not None:
            store_columns(p_dy + column_offset(dtarget, start), dtarget, o_lane, m_col, b_dy)
    if EDGES:
        o_col, m_col = edge_columns(before, columns, V, VECTOR, LANES)
        b_x = tl.load(row_pointer(logits, i_row, 1) + o_col, mask=m_col, other=float("-inf"))
        b_y = tl.load(row_pointer(target, i_row, 1) + o_col, mask=m_col, other=0.0)
        b_w = load_class_weight(o_col, m_col, opt)
        b_dx, b_dy = gradients(b_x, b_y, b_w, m_col, row, opt, V)
        if dlogits is not None:
            store_columns(row_pointer(dlogits, i_row, 1), dlogits, o_col, m_col, b_dx)
        if dtarget is not None:
            store_columns(row_pointer(dtarget, i_row, 1), dtarget, o_col, m_col, b_dy)


@triton.jit
def probabilities(
    logits,  # Matrix (N, V) bf16 | fp16 | fp32
    target,  # Matrix (N, V) of any of these
    dlogits,  # Matrix (N, V) of the logits' dtype, written; None: not wanted
    dtarget,  # Matrix (N, V) of the target's dtype, written; None: not wanted
    loss,  # (N,) fp32, written; None: it was, and `saved` is read
    saved,  # (N, 4) fp32: top, s_o, q_o, A; written with the loss; None: not wanted
    opt,  # Options, in backward the upstream gradient folded into row_weight
    V,
    BV: tl.constexpr,  # columns of a block of the first loop
    BV_2: tl.constexpr,  # of the second
    LANES: tl.constexpr,  # threads
    VECTOR: tl.constexpr,  # elements of one access to the narrower of logits and target
    EDGES: tl.constexpr,  # rows begin and end between two accesses
    ALIGN: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    V = aligned(V, ALIGN)
    if loss is not None:
        top, s_o, q_o, a, b = row_sums(
            logits, target, i_row, opt, V, BV, LANES, VECTOR, EDGES, ALIGN, dlogits is not None
        )
        log_d = log1p(s_o)
        row_loss = b + a * log_d
        if opt.lse_square_scale is not None:
            row_loss += opt.lse_square_scale * (top + log_d) * (top + log_d)
        if opt.row_weight is not None:
            row_loss *= tl.load(opt.row_weight + i_row)
        tl.store(loss + i_row, row_loss)
        if saved is not None:
            tl.store(saved + 4 * i_row, top)
            tl.store(saved + 4 * i_row + 1, s_o)
            tl.store(saved + 4 * i_row + 2, q_o)
            tl.store(saved + 4 * i_row + 3, a)
    else:
        top = tl.load(saved + 4 * i_row)
        s_o = tl.load(saved + 4 * i_row + 1)
        q_o = tl.load(saved + 4 * i_row + 2)
        a = tl.load(saved + 4 * i_row + 3)
    if (dlogits is not None) | (dtarget is not None):
        write_gradients(
            logits, target, dlogits, dtarget, i_row, top, s_o, q_o, a, opt, V,
            BV_2, LANES, VECTOR, EDGES, ALIGN,
        )  # fmt: skip

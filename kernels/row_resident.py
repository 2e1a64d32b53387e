"""Loss, statistics and gradient of a row in one launch, the whole row on chip, read once.

The same formulas as the streaming form (arithmetic.py) on a row that stays in registers: each kept
logit is asked for once, `(1 + f) N V` elements with kept fraction f. A row too long for one program
is shared by the programs of a thread-block cluster (`num_ctas` at launch; NVIDIA, Hopper Tuning
Guide, section 1.4.1.2), whose maximum and sums meet in distributed shared memory. The row is a
tuple of pieces, so that a vocabulary above a power of two does not pay for empty lanes.

The choice: three passes over registers instead of two over memory. The price: the row must fit,
with room for a pass's temporaries; table.py says what fits where. Three habits keep it small:
the maximum is taken over logits as stored (scale, softcap and temperature keep their order);
the last pass gets its numbers as arguments of their own (`late`), or the compiler would keep what
the first pass computed from the same ones; and the target's gradient, a scalar, is stored after
the others instead of being selected in every lane.

Every thread's stores depend on sums over the pieces that all threads of the row have loaded, so no
store, in place or into the first half of a float32 row, reaches a logit that is still to be loaded.
The target's own logit, a scalar, is loaded before the threads meet for those sums: at barriers or,
where one warp has the whole row, in shuffles, which its threads do together.
Rows whose target is `ignore_index` are not read; their gradient is written as zero.
"""

import triton
import triton.language as tl

from sgp.kernels.arithmetic import (
    NOWHERE,
    candidates,
    coefficients,
    entropy_term,
    exp,
    finish,
    finish_ignored,
    finite_or_zero,
    gradient,
    load_row_scalars,
    ordered,
    origin_of,
    score,
    score_of_largest,
    smoothing_term,
    transform,
)
from sgp.kernels.layout import aligned, column_offset, row_pointer
from sgp.kernels.row_pieces import load_class_weight, zero_row


@triton.jit
def fold(b, BV: tl.constexpr):
    # 256 columns, a warp's in the layout of 16-byte accesses, into one: what is left is short
    # enough to be summed in any order (the interpreter adds one after another what is joined).
    return tl.sum(tl.reshape(b, [BV // 256, 256]), 1)


@triton.jit
def sums(b_so, b_to, b_ks, BV: tl.constexpr, ENTROPY: tl.constexpr, SMOOTHING: tl.constexpr):
    """The sums of those that are asked for, in one reduction: the cluster meets once."""
    t_o = 0.0
    k = 0.0
    if ENTROPY and SMOOTHING:
        b_st = tl.join(fold(b_so, BV), fold(b_to, BV))
        b_k = fold(b_ks, BV)
        b_st, b_kk = tl.split(tl.sum(tl.join(b_st, tl.join(b_k, b_k)), 0))
        s_o, t_o = tl.split(b_st)
        k, _ = tl.split(b_kk)
    elif ENTROPY:
        s_o, t_o = tl.split(tl.sum(tl.join(fold(b_so, BV), fold(b_to, BV)), 0))
    elif SMOOTHING:
        s_o, k = tl.split(tl.sum(tl.join(fold(b_so, BV), fold(b_ks, BV)), 0))
    else:
        s_o = tl.sum(b_so, 0)
    return s_o, t_o, k


@triton.jit
def row_resident(  # noqa: C901, PLR0915
    logits,  # Matrix (N, V) bf16 | fp16 | fp32
    dlogits,  # Matrix (N, V), may be `logits`; None: loss and statistics only
    target,  # (N,) int64
    loss,  # (N,) fp32, written
    saved,  # (N, 3) fp32: max, 1/d, s_o/d, written; None: not wanted
    stats,  # Statistics, written; None: not wanted
    argmax,  # (N,) int64, written; None: not wanted, as it is where stats is None
    opt,  # Options
    late,  # Options, equal to opt
    ignore_index,
    V,
    BV: tl.constexpr,  # columns in a piece
    PIECES: tl.constexpr,  # BV PIECES is at least V
    ALIGN: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    V = aligned(V, ALIGN)
    y = tl.load(target + i_row)
    if y == ignore_index:
        finish_ignored(i_row, loss, saved, stats, argmax)
        if dlogits is not None:
            zero_row(dlogits, i_row, V, BV, 32, 1, False, ALIGN)
    else:
        m_y = (y >= 0) & (y < V)
        i_y = tl.where(m_y, y, 0).to(tl.int32)
        o_lane = tl.arange(0, BV)
        p_x = row_pointer(logits, i_row, ALIGN)
        x_y = tl.load(p_x + column_offset(logits, i_y), mask=m_y, other=float("nan"))
        row = ()
        for k in tl.static_range(PIECES):
            o_col = k * BV + o_lane
            b_x = tl.load(p_x + column_offset(logits, o_col), mask=o_col < V, other=float("-inf"))
            row = row + (b_x,)  # noqa: RUF005  (Triton 3.5 knows no stars)

        b_top = ordered(row[0], o_lane < V, opt)
        for k in tl.static_range(1, PIECES):
            b_top = tl.maximum(b_top, ordered(row[k], k * BV + o_lane < V, opt))
        top = score_of_largest(tl.max(b_top, 0), opt)

        s_y = transform(x_y, opt)
        reference = finite_or_zero(s_y)
        origin = origin_of(top, stats is not None)
        r, w_y, w_mean = load_row_scalars(i_row, i_y, m_y, opt)
        b_so = tl.zeros([BV], tl.float32)
        b_to = tl.zeros([BV], tl.float32)
        b_ks = tl.zeros([BV], tl.float32)
        b_i = tl.full([BV], NOWHERE, tl.int32)
        for k in tl.static_range(PIECES):
            m_col = k * BV + o_lane < V
            b_w = load_class_weight(k * BV + o_lane, m_col, opt)
            b_s = score(row[k], m_col, opt)
            b_z = b_s - origin
            # The target's column counts from the piece, so that the lane numbers serve them all.
            b_e = tl.where(o_lane == i_y - k * BV, 0.0, exp(b_z))
            b_so += b_e
            if stats is not None:
                b_to += entropy_term(b_z, b_e)
            if opt.label_smoothing is not None:
                b_ks += smoothing_term(b_s, m_col, reference, b_w, opt)
            if argmax is not None:
                b_i = tl.minimum(b_i, candidates(b_s, top, k * BV + o_lane))
        s_o, t_o, k_all = sums(
            b_so, b_to, b_ks, BV, stats is not None, opt.label_smoothing is not None
        )
        i_top = NOWHERE
        if argmax is not None:
            i_top = tl.min(b_i, 0)

        carry = (top, s_o, t_o, k_all, i_top)
        top, inv_d, so_d = finish(
            carry, s_y, reference, r, w_y, w_mean, i_row, loss, saved, stats, argmax, V, opt
        )
        if dlogits is not None:
            a, a_y, b_y, c_over_v, c_y, h, h_origin, l, c, rest = coefficients(  # noqa: E741
                i_row, top, inv_d, so_d, m_y, r, w_y, w_mean, V, opt
            )
            p_g = row_pointer(dlogits, i_row, ALIGN)
            for k in tl.static_range(PIECES):
                o_col = k * BV + o_lane
                m_col = o_col < V
                b_w = load_class_weight(o_col, m_col, late)
                b_g = gradient(row[k], l, c, rest, a, 0.0, c_over_v * b_w, h, h_origin, late)
                tl.store(
                    p_g + column_offset(dlogits, o_col), b_g.to(p_g.dtype.element_ty), mask=m_col
                )
            g_y = gradient(x_y, l, c, rest, a_y, b_y, c_y, h, h_origin, late)
            # The target's gradient, over what has been stored for its column, by the same thread:
            # all stores of BV columns are laid out alike. The barrier is for a compiler that gives
            # them two layouts; it is one of the program, not of a cluster.
            tl.debug_barrier()
            o_col = i_y // BV * BV + o_lane
            b_g = tl.full([BV], g_y, tl.float32).to(p_g.dtype.element_ty)
            tl.store(p_g + column_offset(dlogits, o_col), b_g, mask=o_col == i_y)

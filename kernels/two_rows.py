"""The divergence of two rows of logits, statistics and gradient of the student's, both streamed.

The formulas are in divergence.py. The first loop takes maxima, sums and the running KL; for the
mixture of a jsd a second one takes its terms; the last one writes the gradient. As in
row_streaming.py each thread keeps what it has seen of the columns that it loads, so that no loop
has a barrier, and the lanes meet after it.

The choice: any two vocabularies and dtypes, any option. The price: each kept logit of both is asked
for twice with a gradient, `(1 + 4 f) N V` elements with kept fraction f, once without; of a jsd
three times, and twice. (The gradient of a jsd needs KL(p || m), which needs both log-sum-exps.)
Rows whose target is `ignore_index` are read in neither; their gradient is written as zero.
"""

import triton
import triton.language as tl

from sgp.kernels.arithmetic import log1p, transform
from sgp.kernels.divergence import (
    accumulate,
    divergence_of,
    gradient,
    mixture_terms,
    row_numbers,
    row_of_lanes,
    scores,
    started,
)
from sgp.kernels.layout import aligned, body, column_offset, edge_columns, row_pointer
from sgp.kernels.row_pieces import wait_for_loads, zero_row

# Numbers a row, as in divergence.started. Once it is known, what the gradient subtracts is in the
# place of the running sum.
SAVED = tl.constexpr(10)


@triton.jit
def load_both(logits, teacher, p_x, p_t, start, columns, BV: tl.constexpr, LAST: tl.constexpr):
    """(student's block, teacher's, mask), -inf outside the row, kept in L2 if they come again."""
    o_lane = tl.arange(0, BV)
    m_col = o_lane < columns - start
    p_x += column_offset(logits, start) + column_offset(logits, o_lane)
    p_t += column_offset(teacher, start) + column_offset(teacher, o_lane)
    if LAST:
        b_x = tl.load(p_x, mask=m_col, other=float("-inf"), eviction_policy="evict_first")
        b_t = tl.load(p_t, mask=m_col, other=float("-inf"), eviction_policy="evict_first")
    else:
        b_x = tl.load(p_x, mask=m_col, other=float("-inf"), eviction_policy="evict_last")
        b_t = tl.load(p_t, mask=m_col, other=float("-inf"), eviction_policy="evict_last")
    return b_x, b_t, m_col


@triton.jit
def load_edges(
    logits, teacher, i_row, before, columns, V, VECTOR: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """(student's columns, teacher's, column numbers, mask) of what `body` leaves at both ends."""
    o_col, m_col = edge_columns(before, columns, V, VECTOR, LANES)
    p_x = row_pointer(logits, i_row, 1) + o_col
    p_t = row_pointer(teacher, i_row, 1) + o_col
    b_x = tl.load(p_x, mask=m_col, other=float("-inf"))
    return b_x, tl.load(p_t, mask=m_col, other=float("-inf")), o_col, m_col


@triton.jit
def both_sums(
    logits, teacher, i_row, opt, theirs, pair, V, KIND: tl.constexpr, ENTROPY: tl.constexpr,
    LAST: tl.constexpr, BV: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    EDGES: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """What divergence.started has, of all columns that are here."""
    p_x, before, columns = body(logits, i_row, V, ALIGN, VECTOR, EDGES)
    p_t, _, _ = body(teacher, i_row, V, ALIGN, VECTOR, EDGES)
    carry = started(LANES)
    for i in range(tl.cdiv(columns, BV)):
        b_x, b_t, m_col = load_both(logits, teacher, p_x, p_t, i * BV, columns, BV, LAST)
        carry = accumulate(carry, b_x, b_t, m_col, opt, theirs, pair, KIND, ENTROPY, LANES, VECTOR)
    if EDGES:
        b_x, b_t, _, m_col = load_edges(logits, teacher, i_row, before, columns, V, VECTOR, LANES)
        carry = accumulate(carry, b_x, b_t, m_col, opt, theirs, pair, KIND, ENTROPY, LANES, 1)
    return row_of_lanes(carry, KIND)


@triton.jit
def summed(a, a_kl, b, b_kl):
    return a + b, a_kl + b_kl


@triton.jit
def add_mixture(
    carry, b_x, b_t, m_col, row, opt, theirs, pair, LANES: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """One block more into each lane's sums of `mixture_terms`."""
    REPEATS: tl.constexpr = b_x.shape[0] // (LANES * VECTOR)
    jsd, kl = carry
    top, _, top_t, _, _, _, _, _, _ = row
    b_s, _ = scores(b_x, m_col, opt, pair)
    b_s_t, _ = scores(b_t, m_col, theirs, pair)
    b_term, b_kl = mixture_terms(b_s - top, b_s_t - top_t, row, pair.beta)
    jsd += tl.sum(tl.sum(tl.reshape(b_term, [REPEATS, LANES, VECTOR]), 2), 0)
    kl += tl.sum(tl.sum(tl.reshape(b_kl, [REPEATS, LANES, VECTOR]), 2), 0)
    return jsd, kl


@triton.jit
def mixture_sums(
    logits, teacher, i_row, row, opt, theirs, pair, V,
    LAST: tl.constexpr, BV: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    EDGES: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The sums of `mixture_terms` over the columns that are here."""
    p_x, before, columns = body(logits, i_row, V, ALIGN, VECTOR, EDGES)
    p_t, _, _ = body(teacher, i_row, V, ALIGN, VECTOR, EDGES)
    carry = (tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32))
    for i in range(tl.cdiv(columns, BV)):
        b_x, b_t, m_col = load_both(logits, teacher, p_x, p_t, i * BV, columns, BV, LAST)
        carry = add_mixture(carry, b_x, b_t, m_col, row, opt, theirs, pair, LANES, VECTOR)
    if EDGES:
        b_x, b_t, _, m_col = load_edges(logits, teacher, i_row, before, columns, V, VECTOR, LANES)
        carry = add_mixture(carry, b_x, b_t, m_col, row, opt, theirs, pair, LANES, 1)
    return tl.reduce(carry, 0, summed)


@triton.jit
def write_gradient(
    logits, teacher, dlogits, i_row, y, row, kl, r, opt, theirs, pair, V, KIND: tl.constexpr,
    BV: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, EDGES: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """The gradient of the columns that are here; y is the target's, or one that is not here."""
    p_x, before, columns = body(logits, i_row, V, ALIGN, VECTOR, EDGES)
    p_t, _, _ = body(teacher, i_row, V, ALIGN, VECTOR, EDGES)
    p_g, _, _ = body(dlogits, i_row, V, ALIGN, VECTOR, EDGES)
    o_lane = tl.arange(0, BV)
    for i in range(tl.cdiv(columns, BV)):
        b_x, b_t, m_col = load_both(logits, teacher, p_x, p_t, i * BV, columns, BV, True)
        b_is_y = o_lane == y - before - i * BV
        b_g = gradient(b_x, b_t, b_is_y, row, kl, r, opt, theirs, pair, KIND)
        wait_for_loads(i, p_x, p_g)
        tl.store(
            p_g + column_offset(dlogits, i * BV) + column_offset(dlogits, o_lane),
            b_g.to(p_g.dtype.element_ty),
            mask=m_col,
            eviction_policy="evict_first",
        )
    if EDGES:
        b_x, b_t, o_col, m_col = load_edges(
            logits, teacher, i_row, before, columns, V, VECTOR, LANES
        )
        b_g = gradient(b_x, b_t, o_col == y, row, kl, r, opt, theirs, pair, KIND)
        p_row = row_pointer(dlogits, i_row, 1)
        tl.store(p_row + o_col, b_g.to(p_g.dtype.element_ty), mask=m_col)


@triton.jit
def weight_of(i_row, y, V, opt, pair):
    """What multiplies the gradient of a row; NaN for a bad target of the cross-entropy."""
    r = 1.0
    if opt.row_weight is not None:
        r = tl.load(opt.row_weight + i_row)
    if opt.scale is not None:
        r = r * tl.load(opt.scale)
    if pair.cross_entropy is not None:
        r = tl.where((y >= 0) & (y < V), r, float("nan"))
    return r


@triton.jit
def two_rows_forward(  # noqa: C901
    logits,  # Matrix (N, V) bf16 | fp16 | fp32: the student's
    teacher,  # Matrix (N, V) bf16 | fp16 | fp32
    dlogits,  # Matrix (N, V), may be `logits`; None: no gradient
    target,  # (N,) int64
    index,  # (N,) int64: which teacher a row has; None: this one
    loss,  # (N,) fp32, written; None: the sums of some columns are all that is wanted
    saved,  # (N, SAVED) fp32, written; None: not wanted
    stats,  # Statistics, written; None: not wanted
    opt,  # Options of the student
    theirs,  # Options of the teacher: softcap and scale
    pair,  # Pair
    ignore_index,
    which,  # rows of another teacher are left alone
    V,
    KIND: tl.constexpr,  # "forward_kl" | "reverse_kl" | "jsd"
    BV: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    EDGES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    V = aligned(V, ALIGN)
    y = tl.load(target + i_row)
    is_mine = True
    if index is not None:  # ignored rows are the first teacher's
        i_teacher = tl.where(y == ignore_index, 0, tl.load(index + i_row))
        is_mine = i_teacher == which
    p_saved = saved
    if saved is not None:
        p_saved = saved + SAVED * i_row
    if is_mine:
        if y == ignore_index:
            finish_ignored(i_row, loss, p_saved, stats)
            if dlogits is not None:
                zero_row(dlogits, i_row, V, BV, LANES, VECTOR, EDGES, ALIGN)
        else:
            ONCE: tl.constexpr = (dlogits is None) & ((KIND != "jsd") | (loss is None))
            sums = both_sums(
                logits, teacher, i_row, opt, theirs, pair, V,
                KIND, (stats is not None) | (loss is None), ONCE, BV, LANES, VECTOR, EDGES, ALIGN,
            )  # fmt: skip
            top, so, top_t, so_t, top_1, so_1, x, lead, w, t_o = sums
            if (pair.cross_entropy is None) | (pair.inverse_temperature is None):
                top_1 = top
                so_1 = so
            if loss is not None:
                row = row_numbers(top, so, top_t, so_t, top_1, so_1, x, lead)
                if KIND == "jsd":
                    value, w = mixture_sums(
                        logits, teacher, i_row, row, opt, theirs, pair, V,
                        dlogits is None, BV, LANES, VECTOR, EDGES, ALIGN,
                    )  # fmt: skip
                    value = tl.where(value < 0.0, 0.0, value)  # a rounding
                else:
                    value, w = divergence_of(w, row, KIND)
                finish(logits, i_row, y, V, value, row, so, so_1, t_o, loss, stats, opt, pair)
                if dlogits is not None:
                    r = weight_of(i_row, y, V, opt, pair)
                    tl.debug_barrier()  # in place, the target's own logit has been loaded
                    write_gradient(
                        logits, teacher, dlogits, i_row, y.to(tl.int32), row, w, r, opt, theirs,
                        pair, V, KIND, BV, LANES, VECTOR, EDGES, ALIGN,
                    )  # fmt: skip
            if saved is not None:
                store_numbers(p_saved, (top, so, top_t, so_t, top_1, so_1, x, lead, w, t_o))


@triton.jit
def store_numbers(p_saved, numbers):
    for k in tl.static_range(SAVED):
        tl.store(p_saved + k, numbers[k])


@triton.jit
def finish(logits, i_row, y, V, value, row, so, so_1, t_o, loss, stats, opt, pair):
    """Write the row's loss and its statistics."""
    top, inv_d, _, _, _, _, top_1, _, _ = row
    r = 1.0
    if opt.row_weight is not None:
        r = tl.load(opt.row_weight + i_row)
    if (pair.cross_entropy is not None) | (stats is not None):
        m_y = (y >= 0) & (y < V)
        i_y = tl.where(m_y, y, 0)
        p_row = row_pointer(logits, i_row, 1)
        x_y = tl.load(p_row + column_offset(logits, i_y), mask=m_y, other=float("nan"))
        s_y = transform(x_y, opt)
        if pair.cross_entropy is not None:
            value += pair.cross_entropy * ((top_1 - s_y) + log1p(so_1))
        if stats is not None:
            if pair.inverse_temperature is not None:
                s_y = s_y * pair.inverse_temperature
            log_d = log1p(so)
            tl.store(stats.log_prob + i_row, (s_y - top) - log_d)
            tl.store(stats.entropy + i_row, log_d - t_o * inv_d)
            lse = tl.where(top == float("inf"), top, top + log_d)
            tl.store(stats.lse + i_row, lse)
            is_number = so == so  # noqa: PLR0124
            tl.store(stats.is_top1 + i_row, (s_y >= top) & is_number)
    tl.store(loss + i_row, r * value)


@triton.jit
def finish_ignored(i_row, loss, p_saved, stats):
    """Zeros in every output of an ignored row."""
    if loss is not None:
        tl.store(loss + i_row, 0.0)
    if p_saved is not None:
        for k in tl.static_range(SAVED):
            tl.store(p_saved + k, 0.0)
    if stats is not None:
        tl.store(stats.log_prob + i_row, 0.0)
        tl.store(stats.entropy + i_row, 0.0)
        tl.store(stats.lse + i_row, 0.0)
        tl.store(stats.is_top1 + i_row, False)


@triton.jit
def load_numbers(p_saved):
    """(`row_numbers`, what the gradient subtracts) of what a forward saved."""
    row = row_numbers(
        tl.load(p_saved), tl.load(p_saved + 1), tl.load(p_saved + 2), tl.load(p_saved + 3),
        tl.load(p_saved + 4), tl.load(p_saved + 5), tl.load(p_saved + 6), tl.load(p_saved + 7),
    )  # fmt: skip
    return row, tl.load(p_saved + 8)


@triton.jit
def two_rows_mixture(
    logits,  # Matrix (N, V), some columns of the student's rows
    teacher,  # Matrix (N, V), the same of the teacher's
    target,  # (N,) int64
    saved,  # (N, SAVED) fp32: of the whole rows
    terms,  # (N, 2) fp32, written: the sums of `mixture_terms` over these columns
    opt,  # Options of the student
    theirs,  # Options of the teacher
    pair,  # Pair
    ignore_index,
    V,
    BV: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    EDGES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    V = aligned(V, ALIGN)
    jsd = 0.0
    kl = 0.0
    if tl.load(target + i_row) != ignore_index:
        row, _ = load_numbers(saved + SAVED * i_row)
        jsd, kl = mixture_sums(
            logits, teacher, i_row, row, opt, theirs, pair, V, True, BV, LANES, VECTOR, EDGES, ALIGN
        )
    tl.store(terms + 2 * i_row, jsd)
    tl.store(terms + 2 * i_row + 1, kl)


@triton.jit
def two_rows_backward(
    logits,  # Matrix (N, V) bf16 | fp16 | fp32, some columns of the student's rows, or all
    teacher,  # Matrix (N, V), the same of the teacher's
    dlogits,  # Matrix (N, V), may be `logits`
    target,  # (N,) int64
    index,  # (N,) int64: which teacher a row has; None: this one
    saved,  # (N, SAVED) fp32: of the whole rows
    opt,  # Options, the upstream gradient folded into row_weight
    theirs,  # Options of the teacher
    pair,  # Pair
    ignore_index,
    which,  # rows of another teacher are left alone
    V,
    KIND: tl.constexpr,
    BV: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    EDGES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    V = aligned(V, ALIGN)
    y = tl.load(target + i_row)
    is_mine = True
    if index is not None:  # ignored rows are the first teacher's
        i_teacher = tl.where(y == ignore_index, 0, tl.load(index + i_row))
        is_mine = i_teacher == which
    if is_mine:
        if y == ignore_index:
            zero_row(dlogits, i_row, V, BV, LANES, VECTOR, EDGES, ALIGN)
        else:
            row, kl = load_numbers(saved + SAVED * i_row)
            if opt.first is None:
                r = weight_of(i_row, y, V, opt, pair)
            else:
                r = weight_of(i_row, y, opt.vocabulary, opt, pair)
                y = tl.where((y >= opt.first) & (y < opt.first + V), y - opt.first, -1)
            write_gradient(
                logits, teacher, dlogits, i_row, y.to(tl.int32), row, kl, r, opt, theirs, pair, V,
                KIND, BV, LANES, VECTOR, EDGES, ALIGN,
            )  # fmt: skip

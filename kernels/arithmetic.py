"""The formulas of the row kernels, one place for each; every form and the backward call these.

A row of logits ``x`` with target ``y`` becomes ``s = cap * tanh(scale * x / cap)`` (scale and cap
optional). With ``max = max_j s_j``, ``e_j = exp(s_j - max)``, ``s_o = sum_{j != y} e_j`` and
``d = s_o + e_y``::

    nll    = (max - s_y) + log(d)      log(d) = log1p(s_o) where s_y = max
    lse    = max + log(d)
    loss   = r ((1 - eps) w_y nll + eps sum_j w_j (lse - s_j) / V + zeta lse^2)
    grad_j = a p_j - c w_j / V                            j != y,  p_j = e_j / d
    grad_y = (a - b) p_y - b s_o / d - c w_y / V
    b = r (1 - eps) w_y,   c = r eps,   a = b + c mean(w) + 2 zeta lse r

(Where the target has most of the mass, what smoothing adds to ``grad_y`` is written as
``c (mean(w) - w_y / V) - c mean(w) s_o / d``: with one class it is 0, and z-loss alone is left.)

Log-probability, entropy ``H = log(d) - sum_j p_j (s_j - max)`` and lse are differentiated by the
same formula: an upstream gradient ``u`` of the log-probability is ``r = -u``, ``l`` of lse adds to
``a``, and ``h`` of the entropy adds ``-h p_j (log p_j + H)``. A temperature divides s, after the
softcap.

``r`` is the row's weight, ``w`` the class weights, ``eps`` label smoothing, ``zeta`` z-loss
(Chowdhery et al. 2022, PaLM, section 5). The choice: the target is left out of the sum, so that
neither ``p_y - 1`` nor ``lse - s_y`` is ever computed; both lose every digit as p_y approaches 1.
The price: one comparison with the target column an element.

Names: ``i_`` program or index, ``o_`` offsets, ``m_`` mask, ``p_`` pointer, ``b_`` block value,
``BV`` tile, ``V`` vocabulary.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MINUS_2_LOG2E = tl.constexpr(-2.8853900817779268)
# From here on, float32 numbers that differ do so by more than 2^15.
COARSE = tl.constexpr(2.0**40)
LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32
# Columns of NaN are counted from the lowest int32, so that they come before all others.
FIRST_NAN = tl.constexpr(-(2**31))
NOWHERE = tl.constexpr(2**31 - 1)


class Options(NamedTuple):
    """What may be off. ``None`` is off, and what is off is compiled away."""

    weight: object = None  # (V,) fp32: class weights w
    weight_mean: object = None  # () fp32: mean(w); given exactly when `weight` is
    row_weight: object = None  # (N,) fp32: token weight, times the upstream gradient in backward
    scale: object = None  # () fp32: multiplies every row's gradient (1 / divisor), not its loss
    label_smoothing: object = None  # float in [0, 1]
    lse_square_scale: object = None  # float
    softcap: object = None  # float > 0
    inverse_softcap: object = None  # float, 1 / softcap; given exactly when `softcap` is
    logit_scale: object = None  # float
    inverse_temperature: object = None  # float > 0
    lse_weight: object = None  # (N,) fp32: upstream gradient of lse; backward only
    entropy_weight: object = None  # (N,) fp32: upstream gradient of the entropy; backward only
    entropy: object = None  # (N,) fp32: H; given exactly when `entropy_weight` is
    first: object = None  # int: the logits begin with this column of a row; backward only
    vocabulary: object = None  # int: columns of the whole row; given exactly when `first` is


class Statistics(NamedTuple):
    """Where the statistics of each row go, for logging and evaluation."""

    log_prob: object  # (N,) fp32, nats
    entropy: object  # (N,) fp32, nats
    lse: object  # (N,) fp32
    is_top1: object  # (N,) bool: no score of the row is larger than the target's, and none is NaN


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


# Whether the kernels were defined under TRITON_INTERPRET=1.
INTERPRETED = tl.constexpr(not isinstance(exp, triton.runtime.JITFunction))


@triton.jit
def log1p(x):
    # 2 atanh(x / (2 + x)) as a series below 0.4 (next term < 1e-9), log(1 + x) above.
    z = x / (2.0 + x)
    z2 = z * z
    series = 2.0 * z * (1.0 + z2 * (0.33333334 + z2 * (0.2 + z2 * (0.14285715 + z2 * 0.11111111))))
    return tl.where(x < 0.4, series, tl.log(1.0 + x))


@triton.jit
def scaled(b_x, opt):
    """Logits as stored, in float32, times logit_scale."""
    b_s = b_x.to(tl.float32)
    if opt.logit_scale is not None:
        b_s = b_s * opt.logit_scale
    return b_s


@triton.jit
def exponential_of(b_v):
    # e = exp(-2 |v|) and 1 / (1 + e): all that tanh(v) and its derivative are made of.
    # The reciprocal of 1 to 2 without a division's range checks: a squared rsqrt and one step of
    # Newton, which brings two units in the last place to one.
    b_e = tl.exp2(tl.abs(b_v) * MINUS_2_LOG2E)
    b_d = 1.0 + b_e
    b_q = tl.rsqrt(b_d)
    b_r = b_q * b_q
    return b_e, tl.fma(b_r, tl.fma(-b_d, b_r, 1.0), b_r)


@triton.jit
def tanh(b_v):
    # 1 - 2 e / (1 + e): one rounding, of 1's size, where (1 - e) / (1 + e) has three. Below 0.625,
    # where it would cancel, the polynomial of Cephes tanhf (Moshier, netlib.org/cephes).
    b_e, b_r = exponential_of(b_v)
    b_large = tl.fma(-2.0 * b_e, b_r, 1.0)
    z = b_v * b_v
    b_poly = tl.fma(z, -5.70498872745e-3, 2.06390887954e-2)
    b_poly = tl.fma(b_poly, z, -5.37397155531e-2)
    b_poly = tl.fma(b_poly, z, 1.33314422036e-1)
    b_poly = tl.fma(b_poly, z, -3.33332819422e-1)
    b_small = tl.fma(b_v * z, b_poly, b_v)
    b_large = tl.where(b_v < 0.0, -b_large, b_large)
    return tl.where(tl.abs(b_v) < 0.625, b_small, b_large)


@triton.jit
def transform(b_x, opt):
    """Logits as stored -> logits as scored, float32."""
    b_s = scaled(b_x, opt)
    if opt.softcap is not None:
        b_s = opt.softcap * tanh(b_s * opt.inverse_softcap)
    if opt.inverse_temperature is not None:
        b_s = b_s * opt.inverse_temperature
    return b_s


@triton.jit
def transform_slope(b_x, opt):
    """The softcap's part of d(scored logit) / d(stored logit)."""
    b_e, b_r = exponential_of(scaled(b_x, opt) * opt.inverse_softcap)
    return (4.0 * b_e) * (b_r * b_r)


@triton.jit
def finite_or_zero(x):
    # The point that exponents are taken from: -inf stands for "nothing seen yet".
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def origin_of(top, STATISTICS: tl.constexpr):
    """The point that a row's exponents are taken from, a finite one where statistics are wanted.

    Then s_o is inf where another column than the target's is, and NaN only where one is NaN: lse
    and is_top1 tell them apart.
    """
    if STATISTICS:
        top = tl.minimum(top, LARGEST)
    return finite_or_zero(top)


@triton.jit
def finite(b_z):
    # A factor of exp(z): 0 x -inf must be 0. Where z is NaN, so is exp(z).
    return tl.maximum(b_z, -3.0e38)


@triton.jit
def ordered(b_x, m_col, opt):
    """Logits as loaded -> numbers in the order of the scored logits, -inf outside the row."""
    b_s = b_x.to(tl.float32)
    if opt.logit_scale is not None:
        b_s = tl.where(m_col, b_s * sign(opt.logit_scale), float("-inf"))
    return b_s


@triton.jit
def score_of_largest(x_top, opt):
    """The largest scored logit, from the largest of the ordered ones (to a rounding, in tanh)."""
    if opt.logit_scale is not None:
        x_top = x_top * sign(opt.logit_scale)
    return transform(x_top, opt)


@triton.jit
def sign(x):
    return tl.where(x < 0.0, -1.0, 1.0)


@triton.jit
def score(b_x, m_col, opt):
    """Logits as loaded, -inf outside the row -> logits as scored, -inf outside the row."""
    b_s = transform(b_x, opt)
    if (opt.softcap is not None) | (opt.logit_scale is not None):
        b_s = tl.where(m_col, b_s, float("-inf"))  # a capped -inf is not -inf
    return b_s


@triton.jit
def entropy_term(b_z, b_e):
    """What a column adds to t_o = sum_{j != y} (s_j - max) e_j: z = s - max, e = exp(z)."""
    return finite(b_z) * b_e


@triton.jit
def smoothing_term(b_s, m_col, reference, b_w, opt):
    """What a column adds to k = sum_j w_j (s_j - reference).

    The reference is any finite number near the target's logit.
    """
    b_k = b_s - reference
    if opt.weight is not None:
        b_k = tl.where(b_w == 0.0, 0.0, b_w * b_k)
    return tl.where(m_col, b_k, 0.0)


@triton.jit
def rescaled(top, s_o, t_o, origin, ENTROPY: tl.constexpr):
    """(s_o, t_o) that were taken from the maximum `top`, as taken from `origin`, no smaller."""
    if ENTROPY:
        top = tl.minimum(top, LARGEST)  # as in origin_of
    shrink = exp(top - origin)  # 0 as long as nothing was seen
    if ENTROPY:
        # Where all that was seen vanishes, so does its term: 0 x (a difference of 1e38) is 0.
        moved = shrink * (t_o + (finite_or_zero(top) - origin) * s_o)
        t_o = tl.where(shrink > 0.0, moved, 0.0)
    return shrink * s_o, t_o


@triton.jit
def joined(top_a, s_a, t_a, k_a, top_b, s_b, t_b, k_b):
    """(max, s_o, t_o, k) of two parts of a row; t_o and k are 0 where nobody asks."""
    top = tl.maximum(top_a, top_b)
    origin = origin_of(top, True)
    s_a, t_a = rescaled(top_a, s_a, t_a, origin, True)
    s_b, t_b = rescaled(top_b, s_b, t_b, origin, True)
    return top, s_a + s_b, t_a + t_b, k_a + k_b


@triton.jit
def joined_plain(top_a, s_a, top_b, s_b):
    """(max, s_o) of two parts of a row."""
    top = tl.maximum(top_a, top_b)
    origin = finite_or_zero(top)
    return top, s_a * exp(top_a - origin) + s_b * exp(top_b - origin)


@triton.jit
def candidates(b_s, top, o_col):
    """What `argmax` of a block is the least of: the columns of its largest score, NaN before all.

    `top` may be passed by a rounding, in a resident row.
    """
    b_i = tl.where(b_s >= top, o_col, NOWHERE)
    is_nan = b_s != b_s  # noqa: PLR0124
    return tl.where(is_nan, o_col + FIRST_NAN, b_i)


@triton.jit
def leading(top_a, i_a, top_b, i_b):
    """The least candidate of two parts of a row, from their largest scores and candidates."""
    i = tl.minimum(i_a, i_b)
    i_of_larger = tl.where(top_a > top_b, i_a, i_b)
    return tl.where((top_a == top_b) | (i < 0), i, i_of_larger)


@triton.jit
def load_row_scalars(i_row, y, m_y, opt):
    """(r, w_y, mean w) of a row; 1 where the option is off."""
    r = 1.0
    if opt.row_weight is not None:
        r = tl.load(opt.row_weight + i_row)
    w_y = 1.0
    w_mean = 1.0
    if opt.weight is not None:
        w_y = tl.load(opt.weight + y, mask=m_y, other=0.0)
        w_mean = tl.load(opt.weight_mean)
    return r, w_y, w_mean


@triton.jit
def finish(
    carry, s_y, reference, r, w_y, w_mean, i_row, p_loss, p_saved, stats, argmax, V, opt
):  # fmt: skip
    """Write the row's loss, what the backward needs, and its statistics; return the latter two."""
    top, s_o, t_o, k, i_top = carry
    e_y = exp(s_y - finite_or_zero(top))
    d = s_o + e_y
    # A resident row's max is the largest logit's score, which another's may pass by a rounding.
    log_d = tl.where(s_y >= top, log1p(s_o), tl.log(d))
    nll = (top - s_y) + log_d  # top - s_y is exactly 0 or, for a row of infinities, NaN
    if stats is not None:
        nll = tl.where(s_o == float("inf"), float("nan"), nll)  # as PyTorch: inf - inf
    inv_d = 1.0 / d
    so_d = s_o * inv_d
    loss = nll
    if opt.weight is not None:
        loss = w_y * nll
    if opt.label_smoothing is not None:
        # lse - reference is nll itself unless the target's logit is -inf.
        from_reference = tl.where(reference == s_y, nll, top + log_d)
        smooth = w_mean * from_reference - k / V
        loss = (1.0 - opt.label_smoothing) * loss + opt.label_smoothing * smooth
    if opt.lse_square_scale is not None:
        loss += opt.lse_square_scale * (top + log_d) * (top + log_d)
    tl.store(p_loss + i_row, r * loss)
    if p_saved is not None:
        tl.store(p_saved + 3 * i_row, top)
        tl.store(p_saved + 3 * i_row + 1, inv_d)
        tl.store(p_saved + 3 * i_row + 2, so_d)
    if stats is not None:
        t = t_o + finite(s_y - top) * e_y
        tl.store(stats.log_prob + i_row, -nll)
        tl.store(stats.entropy + i_row, log_d - t * inv_d)
        tl.store(stats.lse + i_row, top + log_d)
        has_nan = s_o != s_o  # noqa: PLR0124
        tl.store(stats.is_top1 + i_row, (s_y >= top) & ~has_nan)
    if argmax is not None:
        tl.store(argmax + i_row, tl.where(i_top < 0, i_top - FIRST_NAN, i_top).to(tl.int64))
    return top, inv_d, so_d


@triton.jit
def finish_ignored(i_row, p_loss, p_saved, stats, argmax):
    """Zeros in every output of an ignored row: no output is left as it was allocated."""
    tl.store(p_loss + i_row, 0.0)
    if p_saved is not None:
        tl.store(p_saved + 3 * i_row, 0.0)
        tl.store(p_saved + 3 * i_row + 1, 0.0)
        tl.store(p_saved + 3 * i_row + 2, 0.0)
    if stats is not None:
        tl.store(stats.log_prob + i_row, 0.0)
        tl.store(stats.entropy + i_row, 0.0)
        tl.store(stats.lse + i_row, 0.0)
        tl.store(stats.is_top1 + i_row, False)
    if argmax is not None:
        tl.store(argmax + i_row, 0)


@triton.jit
def fma(x, y, z):
    """X y + z, rounded once. Triton's interpreter rounds twice before 3.9; float64 holds x y."""
    if INTERPRETED:
        return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@triton.jit
def exponent_of(top):
    """(l, c, rest) with log2(exp(s - max)) = (l s - c) - rest, and l s - c one instruction.

    c is max log2(e), rounded, and rest what the rounding left, 4e-5 for maxima near 1000. From
    COARSE on, where c might overflow, it is the difference s - max: there e is 1 at the maximum
    and 0 elsewhere, in base 2 as in base e.
    """
    l = tl.where(tl.abs(top) < COARSE, LOG2E, 1.0)  # noqa: E741
    c = top * l
    return l, c, fma(top, l, -c)


@triton.jit
def log_of_sum(inv_d, so_d):
    """log(d) from what is saved: as log1p(s_o) where the target has most of the mass."""
    return tl.where(so_d < 0.5, log1p(so_d / inv_d), -tl.log(inv_d))


@triton.jit
def coefficients(i_row, top, inv_d, so_d, m_y, r, w_y, w_mean, V, opt):
    """(a, a_y, b_y, c / V, c_y, h, H - log d, l, l max, rest): where every option meets.

    The target's gradient is a_y e_y - b_y - c_y, with (a - b, b s_o / d, c w_y / V) in their places
    or, where it has most of the mass, c mean(w) moved between them. a, a_y and h multiply
    2^(l s - l max) and have taken 1 / d and the `rest` of `exponent_of` with them; NaN for a bad
    target.
    """
    if opt.vocabulary is not None:
        V = opt.vocabulary
    if opt.scale is not None:
        r = r * tl.load(opt.scale)
    r = tl.where(m_y, r, float("nan"))
    b = r
    if opt.weight is not None:
        b = b * w_y
    if opt.label_smoothing is not None:
        b = b * (1.0 - opt.label_smoothing)
    from_lse = 0.0 * r
    if opt.lse_square_scale is not None:
        from_lse += 2.0 * opt.lse_square_scale * (top + log_of_sum(inv_d, so_d)) * r
    if opt.lse_weight is not None:
        from_lse += tl.load(opt.lse_weight + i_row)
    a_minus_b = from_lse
    a_y = from_lse
    b_so_d = b * so_d
    c_over_v = 0.0
    c_y = 0.0
    if opt.label_smoothing is not None:
        c_over_v = r * opt.label_smoothing / V
        c_mean = r * opt.label_smoothing * w_mean
        a_minus_b = c_mean + from_lse
        # Where the target has most of the mass, c mean(w) p_y is c mean(w) (1 - s_o / d).
        moved = tl.where(so_d < 0.5, c_mean, 0.0)
        a_y = tl.where(so_d < 0.5, from_lse, a_minus_b)
        b_so_d = (b + moved) * so_d
        c_y = c_over_v * w_y - moved
    h = 0.0
    h_origin = 0.0
    if opt.entropy_weight is not None:
        h = tl.load(opt.entropy_weight + i_row)
        h_origin = tl.load(opt.entropy + i_row) - log_of_sum(inv_d, so_d)
    a = b + a_minus_b
    l, c, rest = exponent_of(top)  # noqa: E741
    inv_d = inv_d * tl.exp2(-rest)
    return a * inv_d, a_y * inv_d, b_so_d, c_over_v, c_y, h * inv_d, h_origin, l, c, rest


@triton.jit
def gradient(b_x, l, c, rest, factor, offset, c_w_over_v, h, h_origin, opt):  # noqa: E741
    """The gradient, float32: factor p - offset, and what the options add, from `coefficients`.

    With factor a and offset 0 it is every column's but the target's; with (a_y, b_y) and c_y the
    target's. Scale, softcap and temperature multiply last.
    """
    b_z = fma(transform(b_x, opt), l, -c)
    b_e = tl.exp2(b_z)
    b_g = factor * b_e - offset
    if opt.label_smoothing is not None:
        b_g -= c_w_over_v
    if opt.entropy_weight is not None:
        # Less the rest first: where a class is nearly certain, log p + H is far smaller than it.
        b_g -= h * (b_e * (finite(b_z - rest) * LN2 + h_origin))
    if opt.softcap is not None:
        b_g = b_g * transform_slope(b_x, opt)
    if opt.logit_scale is not None:
        b_g = b_g * opt.logit_scale
    if opt.inverse_temperature is not None:
        b_g = b_g * opt.inverse_temperature
    return b_g

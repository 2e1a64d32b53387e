"""The formulas of two rows: how far a student's distribution is from a teacher's.

Of a kept row with the student's scores ``s`` and the teacher's ``t``, both divided by a temperature
and taken over the same V columns, with ``p = softmax(s)``, ``q = softmax(t)`` and
``m = beta q + (1 - beta) p``::

    forward_kl   KL(q || p)                                    dlogits  p - q
    reverse_kl   KL(p || q)                                             p (log(p / q) - KL(p || q))
    jsd          beta KL(q || m) + (1 - beta) KL(p || m)   (1 - beta) p (log(p / m) - KL(p || m))

(Agarwal et al. 2024, On-Policy Distillation of Language Models, equations 1 to 3), plus a weight
times the cross-entropy of the target, whose scores are not divided by the temperature.

Everything is made of ``z = s - max s``, of ``e = exp(z)``, of ``so``, the sum of e without one
maximal column (``d = 1 + so``), and of ``x = d_t - d``, the sum of ``e_t - e``::

    rho_j = log(q_j / p_j) = (z_t - z) - gap     gap = log(d_t / d) = log1p(x / d)

None of them loses a digit where both models are nearly certain of the same class, or nearly equal,
and equal rows have ``rho = 0``, not a rounding of it, so that loss and gradient are 0. Differences
like ``e_t - e`` and ``p - q`` are ``e expm1(z_t - z)`` and ``-p expm1(rho)`` where these are small,
and ``log(m / p)`` is ``log1p(beta expm1(rho))``, of whichever of p and q is larger, so that nothing
overflows.

A gradient that subtracts a KL is near 0 where p is near 1: the KL is the maximal column's own term.
So both are taken from that column's: with ``lead``, its ``z_t - z``::

    log(p_j / q_j) - KL(p || q) = lead - (z_t - z)_j + w / d      w = sum e ((z_t - z) - lead)

The two KLs are sums like w, kept running with the maxima. That of the mixture is no such sum: both
log-sum-exps have to be known first.

What divides by the temperature multiplies with its inverse. Names as in arithmetic.py; what ends in
``_t`` is the teacher's.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from sgp.kernels.arithmetic import (
    exp,
    finite,
    finite_or_zero,
    log1p,
    score,
    transform,
    transform_slope,
)

SMALL = tl.constexpr(0.14)  # of a difference of logarithms: below, a series


class Pair(NamedTuple):
    """What may be off in two rows, beside the Options of each. ``None`` is off."""

    inverse_temperature: object = None  # float > 0
    beta: object = None  # float in (0, 1); given exactly where the divergence is a jsd
    cross_entropy: object = None  # float: its weight


@triton.jit
def expm1_series(x):
    # Next term 8e-8 of the whole at |x| = SMALL.
    b = tl.fma(x, 1.0 / 120.0, 1.0 / 24.0)
    b = tl.fma(b, x, 1.0 / 6.0)
    b = tl.fma(b, x, 0.5)
    return x * tl.fma(b, x, 1.0)


@triton.jit
def apart(b_e, b_e_t, b_a):
    """e_t - e, of e_t = e exp(a)."""
    return tl.where(tl.abs(b_a) < SMALL, b_e * expm1_series(b_a), b_e_t - b_e)


@triton.jit
def scores(b_x, m_col, opt, pair):
    """Logits as loaded -> (scores, the same at temperature 1), -inf outside the row."""
    b_one = score(b_x, m_col, opt)
    b_s = b_one
    if pair.inverse_temperature is not None:
        b_s = b_one * pair.inverse_temperature
    return b_s, b_one


@triton.jit
def difference(b_z, b_other):
    """The difference of both, and 0 where they are equal: both may be -inf."""
    return tl.where(b_z == b_other, 0.0, b_z - b_other)


@triton.jit
def started(LANES: tl.constexpr):
    """What each lane knows before its first column.

    Maximum and so of s, of t, of s at temperature 1; x; the teacher's score in a maximal column of
    s, for the lead; w, the running sum of a KL; and t_o, the sum of e z of s.
    """
    top = tl.full([LANES], float("-inf"), tl.float32)
    zero = tl.zeros([LANES], tl.float32)
    return top, zero, top, zero, top, zero, zero, zero, zero, zero


@triton.jit
def running(top, so, b_s):
    """(max, so, exp(old max - new max), z, e) with one block (REPEATS, LANES, VECTOR) more."""
    top_new = tl.maximum(top, tl.max(tl.max(b_s, 2), 0))
    origin = finite_or_zero(top_new)
    shrink = exp(top - origin)  # 0 as long as nothing was seen
    b_z = b_s - origin[None, :, None]
    b_e = exp(b_z)
    b_is_top = b_z == 0.0
    count = tl.sum(tl.sum(b_is_top.to(tl.float32), 2), 0)
    rest = tl.sum(tl.sum(tl.where(b_is_top, 0.0, b_e), 2), 0)
    # Of the maximal columns one is left out, which was the old maximum's or is of this block.
    so_new = so * shrink + rest
    so_new += tl.where(top_new == float("-inf"), 0.0, (count - 1.0) + shrink)
    return top_new, so_new, shrink, b_z, b_e


@triton.jit
def moved(total, shrink, step, so):
    """A sum of e y over columns that were seen, y being `step` more from new maxima on.

    Where all that was seen vanishes, so does the sum: 0 x (a difference of 1e38) is 0.
    """
    return tl.where(shrink > 0.0, shrink * (total + step * (so + 1.0)), 0.0)


@triton.jit
def moved_apart(x, shrink, shrink_t, step, step_t, so):
    """The sum of e_t - e, from new maxima on; of nothing, as long as nothing was seen."""
    more = apart(shrink, shrink_t, step_t - step) * (so + 1.0)
    return shrink_t * x + tl.where(step > float("-inf"), more, 0.0)


@triton.jit
def accumulate(
    carry, b_x, b_t, m_col, opt, theirs, pair,
    KIND: tl.constexpr, ENTROPY: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One block of both rows more into what each lane knows."""
    BV: tl.constexpr = b_x.shape[0]
    REPEATS: tl.constexpr = BV // (LANES * VECTOR)
    SHAPE: tl.constexpr = [REPEATS, LANES, VECTOR]
    top, so, top_t, so_t, top_1, so_1, x, lead, w, t_o = carry
    b_s, b_one = scores(b_x, m_col, opt, pair)
    b_s_t, _ = scores(b_t, m_col, theirs, pair)
    top_new, so_new, shrink, b_z, b_e = running(top, so, tl.reshape(b_s, SHAPE))
    top_t_new, so_t_new, shrink_t, b_z_t, b_e_t = running(top_t, so_t, tl.reshape(b_s_t, SHAPE))
    step = top - finite_or_zero(top_new)
    step_t = top_t - finite_or_zero(top_t_new)
    b_a = difference(b_z_t, b_z)
    x = moved_apart(x, shrink, shrink_t, step, step_t, so)
    x += tl.sum(tl.sum(apart(b_e, b_e_t, b_a), 2), 0)
    if KIND == "forward_kl":
        w = moved(w, shrink_t, step_t - step, so_t)
        w += tl.sum(tl.sum(tl.where(b_e_t == 0.0, 0.0, b_e_t * b_a), 2), 0)
    else:
        # A score: a difference would be rounded whenever the maxima move, and that of the maximal
        # column itself must be exact.
        before = (lead - finite_or_zero(top_t_new)) - step
        b_score = tl.where(b_z == 0.0, tl.reshape(b_s_t, SHAPE), float("-inf"))
        b_lead = tl.max(tl.max(b_score, 2), 0)
        lead = tl.where(top_new > top, finite_or_zero(b_lead), lead)
    if KIND == "reverse_kl":
        now = lead - finite_or_zero(top_t_new)
        w = moved(w, shrink, before - now, so)
        b_w = tl.where(b_e == 0.0, 0.0, b_e * (b_a - now[None, :, None]))
        w += tl.sum(tl.sum(b_w, 2), 0)
    if ENTROPY:
        t_o = moved(t_o, shrink, step, so) + tl.sum(tl.sum(finite(b_z) * b_e, 2), 0)
    if (pair.cross_entropy is not None) & (pair.inverse_temperature is not None):
        top_1, so_1, _, _, _ = running(top_1, so_1, tl.reshape(b_one, SHAPE))
    return top_new, so_new, top_t_new, so_t_new, top_1, so_1, x, lead, w, t_o


@triton.jit
def larger(a, a_t, a_1, b, b_t, b_1):
    return tl.maximum(a, b), tl.maximum(a_t, b_t), tl.maximum(a_1, b_1)


@triton.jit
def added(a0, a1, a2, a3, a4, a5, a6, a7, a8, b0, b1, b2, b3, b4, b5, b6, b7, b8):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7, a8 + b8


@triton.jit
def gathered(top_lane, so_lane, top):
    """(part of so, maximal columns, exp(lane's max - max), step) of each lane of a row."""
    origin = finite_or_zero(top)
    step = top_lane - origin
    shrink = exp(step)
    is_top = top_lane == origin
    return so_lane * shrink + tl.where(is_top, 0.0, shrink), is_top.to(tl.float32), shrink, step


@triton.jit
def row_of_lanes(carry, KIND: tl.constexpr):
    """What all lanes know together, in the order of `started`; they meet two or three times."""
    top_lane, so_lane, top_t_lane, so_t_lane, top_1_lane, so_1_lane, x, lead, w, t_o = carry
    top, top_t, top_1 = tl.reduce((top_lane, top_t_lane, top_1_lane), 0, larger)
    so, n, shrink, step = gathered(top_lane, so_lane, top)
    so_t, n_t, shrink_t, step_t = gathered(top_t_lane, so_t_lane, top_t)
    so_1, n_1, _, _ = gathered(top_1_lane, so_1_lane, top_1)
    x = moved_apart(x, shrink, shrink_t, step, step_t, so_lane)
    of_row = 0.0
    if KIND == "forward_kl":
        w = moved(w, shrink_t, step_t - step, so_t_lane)
    else:
        origin_t = finite_or_zero(top_t)
        of_row = finite_or_zero(tl.max(tl.where(n > 0.0, lead, float("-inf")), 0))
    if KIND == "reverse_kl":
        w = moved(w, shrink, ((lead - origin_t) - step) - (of_row - origin_t), so_lane)
    t_o = moved(t_o, shrink, step, so_lane)
    so, n, so_t, n_t, so_1, n_1, x, w, t_o = tl.reduce(
        (so, n, so_t, n_t, so_1, n_1, x, w, t_o), 0, added
    )
    so += tl.maximum(n - 1.0, 0.0)
    so_t += tl.maximum(n_t - 1.0, 0.0)
    so_1 += tl.maximum(n_1 - 1.0, 0.0)
    return top, so, top_t, so_t, top_1, so_1, x, of_row, w, t_o


@triton.jit
def row_numbers(top, so, top_t, so_t, top_1, so_1, x, lead):
    """(max, 1 / d) of s and of t, gap, lead, and max, 1 / d, so / d of s at temperature 1.

    All NaN where a row has nothing but -inf.
    """
    so = tl.where(top == float("-inf"), float("nan"), so)
    so_t = tl.where(top_t == float("-inf"), float("nan"), so_t)
    inv_d = 1.0 / (1.0 + so)
    inv_1 = 1.0 / (1.0 + so_1)
    grown = x * inv_d
    gap = tl.where(tl.abs(grown) < 0.3, log1p(grown), log1p(so_t) - log1p(so))
    lead = lead - finite_or_zero(top_t)
    return top, inv_d, top_t, 1.0 / (1.0 + so_t), gap, lead, top_1, inv_1, so_1 * inv_1


@triton.jit
def divergence_of(w, row, KIND: tl.constexpr):
    """(the KL, what the gradient subtracts), from the running sum."""
    _, inv_d, _, inv_d_t, gap, lead, _, _, _ = row
    if KIND == "forward_kl":
        kl = 0.0 * w
        found = w * inv_d_t - gap
    else:
        kl = w * inv_d
        found = (gap - lead) - kl
    return tl.where(found < 0.0, 0.0, found), kl  # below 0 it is a rounding


@triton.jit
def log_of_mixture(b_rho, beta):
    """(log(m / p), log(m / q))."""
    b_size = tl.abs(b_rho)
    b_e = exp(-b_size)  # the smaller of p and q, divided by the larger
    b_share = tl.where(b_rho > 0.0, 1.0 - beta, beta)  # of the smaller in m
    b_y = b_share * tl.where(b_size < SMALL, expm1_series(-b_size), b_e - 1.0)
    z = b_y / (2.0 + b_y)  # log1p(y) = 2 atanh(z)
    z2 = z * z
    b_log = tl.fma(z2, 0.11111111, 0.14285715)
    b_log = tl.fma(b_log, z2, 0.2)
    b_log = tl.fma(b_log, z2, 0.33333334)
    b_log = 2.0 * (z * tl.fma(b_log, z2, 1.0))
    b_log = tl.where(b_y > -0.3, b_log, tl.log((1.0 - b_share) + b_share * b_e))
    return b_log + tl.maximum(b_rho, 0.0), b_log + tl.maximum(-b_rho, 0.0)


@triton.jit
def mixture_terms(b_z, b_z_t, row, beta):
    """What each column adds to the jsd, and to the sum of p (log(m / p) - that of the lead)."""
    _, inv_d, _, inv_d_t, gap, lead, _, _, _ = row
    b_p = exp(b_z) * inv_d
    b_q = exp(b_z_t) * inv_d_t
    b_mp, b_mq = log_of_mixture(difference(b_z_t, b_z) - gap, beta)
    of_lead, _ = log_of_mixture(lead - gap, beta)
    b_jsd = -beta * tl.where(b_q == 0.0, 0.0, b_q * b_mq)
    b_jsd -= (1.0 - beta) * tl.where(b_p == 0.0, 0.0, b_p * b_mp)
    return b_jsd, tl.where(b_p == 0.0, 0.0, b_p * (b_mp - of_lead))


@triton.jit
def gradient(b_x, b_t, b_is_target, row, kl, r, opt, theirs, pair, KIND: tl.constexpr):
    """The gradient of the student's logits, float32.

    `kl` is what `divergence_of` or the sum of `mixture_terms` gave; r multiplies the row's loss.
    """
    top, inv_d, top_t, inv_d_t, gap, lead, top_1, inv_1, less_1 = row
    b_one = transform(b_x, opt)
    b_s = b_one
    b_s_t = transform(b_t, theirs)
    if pair.inverse_temperature is not None:
        b_s = b_s * pair.inverse_temperature
        b_s_t = b_s_t * pair.inverse_temperature
    b_z = b_s - top
    b_z_t = b_s_t - top_t
    b_p = exp(b_z) * inv_d
    b_a = difference(b_z_t, b_z)
    if KIND == "forward_kl":
        b_q = exp(b_z_t) * inv_d_t
        b_g = -apart(b_p, b_q, b_a - gap)
    elif KIND == "reverse_kl":
        b_g = tl.where(b_p == 0.0, 0.0, -b_p * ((b_a - lead) - kl))
    else:
        b_mp, _ = log_of_mixture(b_a - gap, pair.beta)
        of_lead, _ = log_of_mixture(lead - gap, pair.beta)
        b_g = tl.where(b_p == 0.0, 0.0, (pair.beta - 1.0) * (b_p * ((b_mp - of_lead) - kl)))
    if pair.inverse_temperature is not None:
        b_g = b_g * pair.inverse_temperature
    if pair.cross_entropy is not None:
        b_p = exp(b_one - top_1) * inv_1
        b_less = tl.where(b_one == top_1, -less_1, b_p - 1.0)  # of the target: p - 1
        b_g += pair.cross_entropy * tl.where(b_is_target, b_less, b_p)
    b_g = b_g * r
    if opt.softcap is not None:
        b_g = b_g * transform_slope(b_x, opt)
    if opt.logit_scale is not None:
        b_g = b_g * opt.logit_scale
    return b_g

"""The formulas of the kernels by themselves, against float64 over their whole range.

What a loss adds up from many columns hides a formula that is wrong in its last digits.
"""

import pytest
import torch
import triton
import triton.language as tl

from sgp.kernels import arithmetic
from sgp.kernels.arithmetic import Options, log1p, rescaled, tanh, transform_slope

UNIT = 2.0**-24  # half a unit in the last place of 1, the least that a rounding can lose
N = 8_192


@triton.jit
def log1p_of(p_x, p_y, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_y + o, log1p(tl.load(p_x + o)))


@triton.jit
def tanh_of(p_x, p_y, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_y + o, tanh(tl.load(p_x + o)))


@triton.jit
def slope_of(p_x, p_y, opt, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_y + o, transform_slope(tl.load(p_x + o), opt))


@triton.jit
def rescaled_of(p_x, p_y, origin, N: tl.constexpr):
    o = tl.arange(0, N)
    s_o, t_o = rescaled(tl.load(p_x), tl.load(p_x + 1), tl.load(p_x + 2), origin, True)
    tl.store(p_y + o, tl.where(o == 0, s_o, t_o))


def assert_close(found, exact, units):
    """Relative, in units of 2^-24; zeros and infinities as they are."""
    found, exact = found.double(), exact.double()
    special = (exact == 0) | ~exact.isfinite()
    assert torch.equal(found[special], exact[special])
    error = ((found - exact) / exact)[~special].abs() / UNIT
    worst = int(error.argmax())
    assert error.max() <= units, f"{error.max():.1f} units, at {exact[~special][worst]}"


def test_log1p():
    """Across the seam of series and logarithm at 0.4, and where 1 + x is 1 or x."""
    far = torch.logspace(-30, 30, N // 2 - 2)
    x = torch.cat([far, torch.tensor([0.0, torch.inf]), torch.linspace(0.1, 2.0, N // 2)])
    y = torch.empty_like(x)
    log1p_of[(1,)](x, y, N)
    assert_close(y, x.double().log1p(), units=6)


def test_tanh():
    """Across the seam of polynomial and exponential at 0.625, and where it is v or 1."""
    far = torch.logspace(-30, 4, N // 4 - 2)
    positive = torch.cat([far, torch.tensor([0.0, torch.inf]), torch.linspace(0.01, 2, N // 4)])
    v = torch.cat([positive, -positive])
    y = torch.empty_like(v)
    tanh_of[(1,)](v, y, N)
    assert_close(y, v.double().tanh(), units=4)


@pytest.mark.parametrize("softcap", [30.0, 0.5])
def test_slope_of_the_softcap(softcap):
    """1 - tanh^2 without the cancellation; an exponent of -20 is rounded to 20 of its units."""
    x = softcap * torch.linspace(-10, 10, N)
    y = torch.empty_like(x)
    slope_of[(1,)](x, y, Options(softcap=softcap, inverse_softcap=1 / softcap), N)
    e = (-2 * x.double().abs() / softcap).exp()
    assert_close(y, 4 * e / (1 + e) ** 2, units=64)


@pytest.mark.parametrize(
    ("top", "s_o", "t_o", "origin", "expected"),
    [
        (0.0, 3.0, -2.0, 1.0, (3 / 2.718281828459045, -5 / 2.718281828459045)),
        # Nothing was seen; or nothing that counts beside the new maximum. 0 x inf is 0 here.
        (-torch.inf, 0.0, 0.0, 1.0, (0.0, 0.0)),
        (torch.finfo(torch.float32).min, 1_000.0, -5.0, 1.0, (0.0, 0.0)),
        # The maximum was infinite before.
        (torch.inf, 1.0, 0.0, arithmetic.LARGEST.value, (1.0, 0.0)),
    ],
)
def test_sums_of_another_maximum(top, s_o, t_o, origin, expected):
    """(s_o, t_o) = sum e^z, sum z e^z with z = s - top, as z = s - origin."""
    y = torch.empty(2)
    rescaled_of[(1,)](torch.tensor([top, s_o, t_o]), y, origin, 2)
    torch.testing.assert_close(y, torch.tensor(expected), rtol=1e-6, atol=0.0)

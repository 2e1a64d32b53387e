"""The measure of every other test: what is an error, and how large it may be."""

import math

import pytest
import torch

from sgp.tolerance import bound, relative_error

pytestmark = pytest.mark.core

FLOAT32 = torch.finfo(torch.float32).eps
BF16 = torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e20])
def test_an_error_is_relative_to_its_own_row(size):
    truth = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e5, 0.0]], dtype=torch.float64)
    value = truth.clone()
    value[0, 1] = 4.05
    assert relative_error(size * value, size * truth) == pytest.approx(0.01)
    assert relative_error(size * truth, size * truth) == 0


def test_a_row_of_zeros_is_compared_absolutely_and_no_rows_are_right():
    assert relative_error(torch.tensor([[0.0, 3e-4]]), torch.zeros(1, 2)) == pytest.approx(3e-4)
    assert relative_error(torch.empty(0, 5), torch.empty(0, 5)) == 0
    assert relative_error(torch.tensor(2.0), torch.tensor(1.0)) == 1, "a number is a row"


@pytest.mark.parametrize(
    "value",
    [[1.0, 2.0, 3.0], [math.nan, 2.0, math.nan], [math.nan, math.inf, 3.0], [-math.inf, 2.0, 3.0]],
)
def test_what_is_not_finite_must_stand_in_its_place(value):
    truth = torch.tensor([[math.inf, 2.0, 3.0]])
    assert relative_error(truth, truth) == 0
    assert relative_error(torch.tensor([value]), truth) == math.inf


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"value is \(3,\) and truth \(1, 3\)"):
        relative_error(torch.zeros(3), torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("dtype", "interpreted", "roundings", "least"),
    [
        (torch.float32, False, 1, 4 * FLOAT32),
        (torch.float32, True, 1, 4 * FLOAT32),
        (torch.float32, False, 2, 4.5 * FLOAT32),
        (torch.bfloat16, False, 1, BF16 / 2 + 4 * FLOAT32),
        (torch.bfloat16, False, 2, BF16 + 4 * FLOAT32),
        (torch.bfloat16, True, 1, BF16 + 8 * FLOAT32),
        (torch.float16, True, 1, torch.finfo(torch.float16).eps / 2 + 4 * FLOAT32),
        (torch.float64, False, 1, 64 * torch.finfo(torch.float64).eps),
    ],
)
def test_the_bound_is_pytorchs_error_or_the_rounding_and_a_little(
    dtype, interpreted, roundings, least
):
    def most(plain):
        return bound(plain, dtype, interpreted=interpreted, roundings=roundings)

    assert most(0.0) == pytest.approx(least)
    twice = 2 if interpreted and dtype == torch.bfloat16 else 1
    assert most(0.25) == pytest.approx(twice * 0.25, rel=0.02)


@pytest.mark.parametrize("plain", [math.inf, math.nan])
def test_where_pytorch_is_infinitely_wrong_we_may_not_be(plain):
    assert bound(plain, torch.float32) == pytest.approx(4 * FLOAT32)

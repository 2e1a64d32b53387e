"""float16 heads: how the factors of rows are kept out of the gradient of the logits.

It is made as if every row's factor (token weight, 1 / divisor, upstream) were 4096, far from
overflow and underflow, and the factors multiply in float32 afterwards. With 1 / N folded in first,
half of the off-target mass is flushed to zero at N = 32k; with 1, what has a probability below 6e-8
is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sgp.rows.by_torch import Upstream
from sgp.rows.divergence import Divergence
from sgp.rows.recipe import Recipe

HALF_RANGE = 4096.0  # sixteen times below float16's largest number
NO_DIVERGENCE = Divergence()
LEAST_ROOT = 2.0**-12  # HALF_RANGE times this is 1


class Factors(NamedTuple):
    """How the row factors of a float16 head are shared out, each (M,) for the kept rows.

    The factor of a row is `largest * share`. The gradient of the logits gets `scale * folded`, the
    hidden states of the weight's gradient get `share / folded`; what is missing in `d_input` is
    `rest`, in `d_weight` and `d_bias` it is `largest / scale`. With about the square root of its
    share folded into either side, a row keeps its digits when another one has ten million times its
    factor; the hidden states' part is a power of two, which rounds nothing.
    """

    folded: Tensor
    share: Tensor
    largest: Tensor  # ()
    scale: Tensor  # ()

    @property
    def rest(self) -> Tensor:
        """Factors (M,) that d_input lacks."""
        return self.of_hidden * self.missing

    @property
    def of_hidden(self) -> Tensor:
        """Factors (M,) of the hidden states in the weight's gradient."""
        return self.share / self.folded

    @property
    def missing(self) -> Tensor:
        """What the gradients of weight and bias lack, ()."""
        return self.largest / self.scale

    def of_loss(self, weights: Tensor | None, part: slice) -> Tensor:
        """What turns a loss that was multiplied by `folded` into the one that is asked for."""
        return (1 if weights is None else weights) / self.folded[part]

    @staticmethod
    def make(factors: Tensor, scale: Tensor) -> Factors:
        """Share out the factors (M,) beside a scale of `half_scale`."""
        largest = factors.abs().amax() if factors.numel() else factors.new_ones(())
        share = factors / torch.where(largest == 0, 1, largest)
        root = share.abs().sqrt().clamp(min=LEAST_ROOT)
        power = root / (2 * torch.frexp(root).mantissa)  # the next power of two below
        folded = torch.where(share == 0, 1, share.abs() / power)
        return Factors(folded, share, largest, scale)

    @staticmethod
    def of_forward(
        rows: Tensor, row_weight: Tensor | None, scale: Tensor | None, slope: Tensor
    ) -> Factors:
        """Row weight times scale, of the kept rows."""
        factors = torch.ones_like(rows, dtype=torch.float32)
        if row_weight is not None:
            factors = row_weight[rows]
        return Factors.make(factors if scale is None else factors * scale, slope)

    @staticmethod
    def of_backward(
        rows: Tensor, row_weight: Tensor | None, upstream: Upstream, slope: Tensor
    ) -> tuple[Factors, Tensor | None, Upstream]:
        """The sizes of the upstream gradients, and these (N,) with `scale * folded` instead."""
        given = [x for x in (row_weight, upstream.lse, upstream.entropy) if x is not None]
        size = torch.stack(given).abs().amax(0)
        factors = Factors.make(size[rows], slope)
        of_row = torch.zeros_like(size).index_copy_(0, rows, factors.folded)
        safe = torch.where(size == 0, 1, size)

        def instead(x: Tensor | None) -> Tensor | None:
            return None if x is None else x / safe * (of_row * factors.scale)

        changed = Upstream(instead(upstream.lse), instead(upstream.entropy), upstream.entropy_value)
        return factors, instead(row_weight), changed


def half_scale(
    like: Tensor,
    recipe: Recipe,
    class_weight: Tensor | None,
    divergence: Divergence = NO_DIVERGENCE,
    *,
    of_lse: bool = False,
) -> Tensor:
    """What brings the largest gradient of a row of factor 1 near HALF_RANGE, () on like's device.

    `of_lse`: also that of a log-sum-exp's upstream gradient.
    """
    r = recipe
    if divergence.is_on():
        slope = abs(r.logit_scale) * (
            divergence.largest_gradient(r.temperature) + divergence.cross_entropy_weight
        )
        return like.new_full((), HALF_RANGE / (slope or 1.0), dtype=torch.float32)
    slope = abs(r.logit_scale) / r.temperature  # at most: d(score) / d(logit)
    z_loss = 200 * abs(r.lse_square_scale)  # for a log-sum-exp of a hundred; no class weight here
    if class_weight is None:
        largest = like.new_full((), slope * (1 + z_loss), dtype=torch.float32)
    else:
        largest = slope * (class_weight.abs().amax() + z_loss + of_lse)
    return HALF_RANGE / torch.where(largest == 0, 1, largest)

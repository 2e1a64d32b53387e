"""The least that a loss on logits can ask of the host: what the others are measured against.

One launch for loss and gradient, one for the upstream factor, and the operators that a mean takes:
the count of kept rows before the first and the sum of their losses after it. No options, no checks,
no layout but contiguous rows. The formulas are the plain softmax's: it is right where that is.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BV, WARPS = 4_096, 8  # columns at a time, warps of a program
PROGRAMS, ELEMENTS = 528, 4_096  # of the launch that multiplies: four programs a multiprocessor


@triton.jit
def loss_and_gradient(
    logits,
    dlogits,
    target,
    loss,
    scale,
    ignore_index,
    V,
    row_stride,
    gradient_stride,
    BV: tl.constexpr,
) -> None:
    """Of one row: nll, and softmax less the target's one, times scale; zeros where ignored."""
    i_row = tl.program_id(0).to(tl.int64)
    y = tl.load(target + i_row)
    p_x, p_g = logits + i_row * row_stride, dlogits + i_row * gradient_stride
    lane = tl.arange(0, BV)
    if y == ignore_index:
        tl.store(loss + i_row, 0.0)
        for start in range(0, V, BV):
            o_col = start + lane
            tl.store(p_g + o_col, tl.zeros([BV], p_g.dtype.element_ty), mask=o_col < V)
    else:
        top, d = float("-inf"), 0.0
        for start in range(0, V, BV):
            o_col = start + lane
            b_x = tl.load(p_x + o_col, mask=o_col < V, other=float("-inf")).to(tl.float32)
            new = tl.maximum(top, tl.max(b_x, 0))
            d = d * tl.exp(top - new) + tl.sum(tl.exp(b_x - new), 0)
            top = new
        tl.store(loss + i_row, top + tl.log(d) - tl.load(p_x + y).to(tl.float32))
        r = tl.load(scale)
        for start in range(0, V, BV):
            o_col = start + lane
            b_x = tl.load(p_x + o_col, mask=o_col < V, other=0.0).to(tl.float32)
            b_g = r * (tl.exp(b_x - top) / d - tl.where(o_col == y, 1.0, 0.0))
            tl.store(p_g + o_col, b_g.to(p_g.dtype.element_ty), mask=o_col < V)


@triton.jit
def multiply(gradient, factor, size, BN: tl.constexpr) -> None:
    """The whole gradient times factor, in place, unless it is 1."""
    f = tl.load(factor)
    if f != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BN
        for start in range(tl.program_id(0).to(tl.int64) * BN, size, step):
            o = start + tl.arange(0, BN)
            b_g = tl.load(gradient + o, mask=o < size, other=0.0).to(tl.float32) * f
            tl.store(gradient + o, b_g.to(gradient.dtype.element_ty), mask=o < size)


class Least(torch.autograd.Function):
    """`Least.apply(logits, target)`: the mean over the rows whose target is not -100."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        """Loss and, at once, the gradient."""
        dlogits = torch.empty_like(logits)
        loss = torch.empty(len(target), device=logits.device)
        scale = (target != -100).sum(dtype=torch.float32).reciprocal()
        loss_and_gradient[(len(target),)](
            logits, dlogits, target, loss, scale, -100,
            logits.shape[1], logits.stride(0), dlogits.stride(0),
            BV=BV, num_warps=WARPS, maxnreg=128, enable_fp_fusion=False,
        )  # fmt: skip
        ctx.save_for_backward(dlogits)
        return loss.sum() * scale

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        """The gradient times the upstream factor."""
        (dlogits,) = ctx.saved_tensors
        multiply[(PROGRAMS,)](
            dlogits, upstream, dlogits.numel(), BN=ELEMENTS, num_warps=WARPS, enable_fp_fusion=False
        )
        return dlogits, None

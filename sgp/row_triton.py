"""The row operations by the Triton kernels: PyTorch tensors in, kernel arguments out.

Nothing here reads or writes anything of size N x V by a PyTorch operator, and nothing waits for
the device. One exception to the first, documented: logits whose leading dimensions need three
strides (a transposed batch sliced in time, say) are copied once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from sgp.kernels import launch
from sgp.kernels.layout import Matrix, matrix
from sgp.recipe import Recipe
from sgp.row_torch import NOTHING, RowOutputs, Upstream

LONG_ROW = 1 << 16  # elements


def forward(
    logits: Tensor,
    dlogits: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    scale: Tensor | None,
    recipe: Recipe,
    out: RowOutputs,
    *,
    scratch: bool = False,  # noqa: ARG001  (of use to row_torch only)
) -> None:
    """Fill `out` and, unless it is None, `dlogits`.

    It may be `logits` itself, or a view of bf16 or fp16 on the first half of each float32 row.
    """
    with _device(logits):
        source = _matrix(logits)
        sink = _Sink(dlogits, logits, source)
        stats = (
            launch.Statistics(out.log_prob, out.entropy, out.lse, out.is_top1)
            if out.log_prob.numel()
            else None
        )
        launch.row_forward(
            source,
            sink.matrix,
            target,
            out.loss,
            out.saved if out.saved.numel() else None,
            stats,
            _options(weight, row_weight, scale, recipe),
            V=logits.shape[-1],
            ignore_index=recipe.ignore_index,
        ).launch()
        sink.copy_back()


def backward(
    logits: Tensor,
    dlogits: Tensor,
    target: Tensor,
    saved: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    recipe: Recipe,
    upstream: Upstream = NOTHING,
) -> None:
    """Fill `dlogits`, in the same places as in `forward`, from what the forward saved."""
    with _device(logits):
        source = _matrix(logits)
        sink = _Sink(dlogits, logits, source)
        assert sink.matrix is not None, "backward always writes a gradient"  # noqa: S101
        launch.row_gradient(
            source,
            sink.matrix,
            target,
            saved,
            _options(weight, row_weight, None, recipe)._replace(
                lse_weight=upstream.lse,
                entropy_weight=upstream.entropy,
                entropy=upstream.entropy_value,
            ),
            V=logits.shape[-1],
            ignore_index=recipe.ignore_index,
        ).launch()
        sink.copy_back()


def multiply(dlogits: Tensor, target: Tensor | None, factor: Tensor, ignore_index: int) -> None:
    """Multiply the kept rows of dlogits by factor (0-d) in place; nothing happens for 1."""
    with _device(dlogits):
        matrix_of_rows = dlogits if target is not None else _long_rows(dlogits)
        source = _matrix(matrix_of_rows)
        V = matrix_of_rows.shape[-1]
        N = dlogits.numel() // max(1, V)
        launch.multiply(source, target, factor, N=N, V=V, ignore_index=ignore_index).launch()
        if source.ptr is not matrix_of_rows:
            matrix_of_rows.copy_(source.ptr)


def _long_rows(x: Tensor) -> Tensor:
    """A view of a contiguous matrix (V, D) with fewer and longer rows, for fewer programs."""
    if x.dim() != 2 or not x.is_contiguous() or not x.numel():
        return x
    V, D = x.shape
    together = next(k for k in range(max(1, LONG_ROW // D), 0, -1) if V % k == 0)
    return x.view(V // together, together * D)


class _Sink:
    """Where the gradient goes: its own tensor, the logits' place, or a copy of the latter."""

    def __init__(self, dlogits: Tensor | None, logits: Tensor, source: Matrix) -> None:
        self.dlogits = dlogits
        self.matrix: Matrix | None = None
        if dlogits is not None:
            self.matrix = source if dlogits is logits else _matrix(dlogits)

    def copy_back(self) -> None:
        if self.dlogits is not None and self.matrix is not None:
            written = self.matrix.ptr
            if written is not self.dlogits:
                self.dlogits.copy_(written)


def _matrix(x: Tensor) -> Matrix:
    addressed = matrix(x)
    return matrix(x.contiguous()) if addressed is None else addressed


def _options(
    weight: Tensor | None, row_weight: Tensor | None, scale: Tensor | None, recipe: Recipe
) -> launch.Options:
    return launch.Options(
        weight=weight,
        weight_mean=None if weight is None else weight.mean(),
        row_weight=row_weight,
        scale=scale,
        label_smoothing=recipe.label_smoothing or None,
        lse_square_scale=recipe.lse_square_scale or None,
        softcap=recipe.softcap,
        inverse_softcap=None if recipe.softcap is None else 1 / recipe.softcap,
        logit_scale=None if recipe.logit_scale == 1.0 else recipe.logit_scale,
        inverse_temperature=None if recipe.temperature == 1.0 else 1 / recipe.temperature,
    )


def _device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()

"""The row operations by the Triton kernels: PyTorch tensors in, kernel arguments out.

Nothing here reads or writes anything of size N x V by a PyTorch operator, and nothing waits for
the device. One exception to the first, documented: logits whose leading dimensions need three
strides (a transposed batch sliced in time, say) are copied once.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from sgp.kernels import launch
from sgp.kernels.layout import Matrix, matrix
from sgp.rows.by_torch import NOTHING, Columns, RowOutputs, Upstream
from sgp.rows.recipe import Recipe

LONG_ROW = 1 << 16  # elements
HERE = nullcontext()


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
    scratch: bool = False,  # noqa: ARG001  (of use to by_torch only)
) -> None:
    """Fill `out` and, unless it is None, `dlogits`.

    It may be `logits` itself, or a view of bf16 or fp16 on the first half of each float32 row.
    """
    with device_of(logits):
        source, sink = source_and_sink(logits, dlogits)
        statistics = out.statistics
        stats = None if statistics is None else launch.Statistics(*statistics)
        options = options_of(weight, row_weight, scale, recipe)
        V, N, ignored = logits.shape[-1], target.numel(), recipe.ignore_index
        rows = (source, sink, target, out.loss, out.saved, stats)
        argmax = out.argmax
        launch.put(
            (
                "forward", logits.device, recipe, V, known(source), known(sink),
                out.saved is None, stats is None, argmax is None, dtype_of(weight),
                dtype_of(row_weight), dtype_of(scale), os.environ.get("SGP_ROW_FORM"),
            ),
            (source.ptr, None if sink is None else sink.ptr, target, weight, row_weight, scale),
            N,
            (*rows, argmax, options, ignored, V, N),
            lambda: launch.row_forward(
                *rows, options, V=V, ignore_index=ignored, argmax=argmax
            ),
        )  # fmt: skip
        copy_back(sink, dlogits)


def backward(
    logits: Tensor,
    dlogits: Tensor,
    target: Tensor,
    saved: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    recipe: Recipe,
    upstream: Upstream = NOTHING,
    columns: Columns | None = None,
) -> None:
    """Fill `dlogits`, in the same places as in `forward`, from what the forward saved.

    `columns` as in `by_torch.backward`.
    """
    with device_of(logits):
        source, sink = source_and_sink(logits, dlogits)
        assert sink is not None, "backward always writes a gradient"  # noqa: S101
        options = options_of(weight, row_weight, None, recipe, upstream, columns)
        V, N, ignored = logits.shape[-1], target.numel(), recipe.ignore_index
        rows = (source, sink, target, saved, options)
        launch.put(
            (
                "backward", logits.device, recipe, V, known(source), known(sink),
                dtype_of(weight), dtype_of(row_weight), dtype_of(upstream.lse),
                dtype_of(upstream.entropy), None if columns is None else (*map(of_kind, columns),),
            ),
            (source.ptr, sink.ptr, target, saved, weight, row_weight, *upstream),
            N,
            (*rows, ignored, V),
            lambda: launch.row_gradient(*rows, V=V, ignore_index=ignored),
        )  # fmt: skip
        copy_back(sink, dlogits)


def probabilities(
    logits: Tensor,
    target: Tensor,
    dlogits: Tensor | None,
    dtarget: Tensor | None,
    loss: Tensor | None,
    saved: Tensor | None,
    weight: Tensor | None,
    row_weight: Tensor | None,
    scale: Tensor | None,
    recipe: Recipe,
) -> None:
    """Fill what is given of losses and gradients of rows whose target is a distribution.

    Args:
        logits: (..., V), any strides; leading dimensions flatten to N.
        target: (..., V) of the same shape, any strides.
        dlogits, dtarget: their gradients, contiguous, each in its own dtype.
        loss: (N,); None: `saved` is read instead of written.
        saved: (N, 4), what the gradients are made from.
        weight: (V,) class weights.
        row_weight: (N,); in backward the upstream gradients.
        scale: () multiplies the gradients only.
        recipe: the constants of the loss.
    """
    with device_of(logits):
        source, spread = matrix_of(logits), matrix_of(target)
        sinks = [None if x is None else matrix_of(x) for x in (dlogits, dtarget)]
        options = options_of(None, row_weight, scale, recipe)._replace(weight=weight)
        V = logits.shape[-1]
        N = logits.numel() // V
        rows = (source, spread, *sinks, loss, saved, options)
        launch.put(
            (
                "probabilities", logits.device, recipe, V, *map(known, (source, spread, *sinks)),
                loss is None, saved is None, dtype_of(weight), dtype_of(row_weight),
                dtype_of(scale),
            ),
            (source.ptr, spread.ptr, dlogits, dtarget, saved, weight, row_weight, scale),
            N,
            (*rows, V),
            lambda: launch.probability_rows(*rows, N=N, V=V),
        )  # fmt: skip


def multiply(dlogits: Tensor, target: Tensor | None, factor: Tensor, ignore_index: int) -> None:
    """Multiply the kept rows of dlogits by factor (0-d) in place; nothing happens for 1."""
    with device_of(dlogits):
        matrix_of_rows = dlogits if target is not None else _long_rows(dlogits)
        source = matrix_of(matrix_of_rows)
        V = matrix_of_rows.shape[-1]
        N = dlogits.numel() // max(1, V)
        launch.put(
            (
                "multiply", dlogits.device, ignore_index, V, known(source), dtype_of(target),
                factor.dtype,
            ),
            (source.ptr, target, factor),
            N,
            (source, target, factor, ignore_index, V),
            lambda: launch.multiply(source, target, factor, N=N, V=V, ignore_index=ignore_index),
        )  # fmt: skip
        copy_back(source, matrix_of_rows)


def mean_scale(
    target: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    """1 / sum over kept rows of row_weight * weight[target], 0 for nothing; () in `dtype`."""
    with device_of(target):
        scale = target.new_empty((), dtype=dtype)
        V, N = 1 if weight is None else weight.numel(), target.numel()
        options = (weight, row_weight, scale)
        launch.put(
            (
                "mean_scale", target.device, ignore_index, V, dtype_of(weight),
                dtype_of(row_weight), dtype, N < 1 << 31,
            ),
            (target, weight, row_weight),
            1,
            (target, *options, ignore_index, N, V),
            lambda: launch.mean_scale(target, *options, V=V, ignore_index=ignore_index),
        )  # fmt: skip
    return scale


def _long_rows(x: Tensor) -> Tensor:
    """A view of a contiguous matrix (V, D) with fewer and longer rows, for fewer programs."""
    if x.dim() != 2 or not x.is_contiguous() or not x.numel():
        return x
    V, D = x.shape
    together = next(k for k in range(max(1, min(V, LONG_ROW // D)), 0, -1) if V % k == 0)
    return x.view(V // together, together * D)


def source_and_sink(logits: Tensor, dlogits: Tensor | None) -> tuple[Matrix, Matrix | None]:
    """Where logits are read, and where their gradient goes."""
    source = matrix_of(logits)
    if dlogits is None:
        return source, None
    return source, source if dlogits is logits else matrix_of(dlogits)


def matrix_of(x: Tensor) -> Matrix:
    """The addressing of x, or of a copy where its leading dimensions need three strides."""
    addressed = matrix(x)
    return matrix(x.contiguous()) if addressed is None else addressed


def copy_back(written: Matrix | None, x: Tensor | None) -> None:
    """Into x from the copy that was written in its place, if there is one."""
    if written is not None and x is not None and written.ptr is not x:
        x.copy_(written.ptr)


def of_kind(x: int) -> tuple[bool, bool, bool]:
    """What Triton looks at in an integer."""
    return x == 1, x % 16 == 0, x < 1 << 31


def dtype_of(x: Tensor | None) -> torch.dtype | None:
    """Its dtype, for the key of a launch."""
    return None if x is None else x.dtype


def known(m: Matrix | None) -> tuple[object, ...] | None:
    """What is the same in every launch of a key."""
    return None if m is None else (m.ptr.dtype, *m[1:])


def options_of(
    weight: Tensor | None,
    row_weight: Tensor | None,
    scale: Tensor | None,
    recipe: Recipe,
    upstream: Upstream = NOTHING,
    columns: Columns | None = None,
) -> launch.Options:
    """What a kernel takes of a recipe and the tensors beside the logits."""
    return launch.Options(
        weight,
        None if weight is None else weight.mean(),
        row_weight,
        scale,
        # Floats: Triton would compile another kernel for a number that was given as an int.
        float(recipe.label_smoothing) or None,
        float(recipe.lse_square_scale) or None,
        None if recipe.softcap is None else float(recipe.softcap),
        None if recipe.softcap is None else 1 / float(recipe.softcap),
        None if recipe.logit_scale == 1.0 else float(recipe.logit_scale),
        None if recipe.temperature == 1.0 else 1 / float(recipe.temperature),
        upstream.lse,
        upstream.entropy,
        upstream.entropy_value,
        *(columns or (None, None)),
    )


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return HERE
    return torch.cuda.device(tensor.device)

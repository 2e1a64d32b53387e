"""The divergence of two rows by the Triton kernels; functions as in `two_by_torch`."""

from __future__ import annotations

from torch import Tensor

from sgp.kernels import launch
from sgp.rows import by_triton
from sgp.rows.by_torch import Columns, RowOutputs
from sgp.rows.by_triton import (
    copy_back,
    dtype_of,
    known,
    matrix_of,
    of_kind,
    options_of,
    source_and_sink,
)
from sgp.rows.divergence import SAVED, Divergence
from sgp.rows.recipe import Recipe, accumulation_dtype
from sgp.rows.two_by_torch import Whose


def forward(
    logits: Tensor,
    teacher: Tensor,
    dlogits: Tensor | None,
    target: Tensor,
    whose: Whose,
    row_weight: Tensor | None,
    scale: Tensor | None,
    recipe: Recipe,
    divergence: Divergence,
    out: RowOutputs,
) -> None:
    """Fill `out` and, unless it is None, `dlogits`, for the rows of this teacher."""
    statistics = out.statistics
    stats = None if statistics is None else launch.Statistics(*statistics)
    _forward(
        logits, teacher, dlogits, target, whose, row_weight, scale, recipe, divergence, out.loss,
        out.saved, stats,
    )  # fmt: skip


def sums(
    logits: Tensor, teacher: Tensor, target: Tensor, recipe: Recipe, divergence: Divergence
) -> Tensor:
    """(N, SAVED) sums over some columns, with those of the entropy; 0 where ignored."""
    saved = target.new_empty(target.numel(), SAVED, dtype=accumulation_dtype(logits.dtype))
    _forward(
        logits, teacher, None, target, Whose(), None, None, recipe, divergence, None, saved, None
    )
    return saved


def _forward(
    logits: Tensor,
    teacher: Tensor,
    dlogits: Tensor | None,
    target: Tensor,
    whose: Whose,
    row_weight: Tensor | None,
    scale: Tensor | None,
    recipe: Recipe,
    divergence: Divergence,
    loss: Tensor | None,
    saved: Tensor | None,
    stats: launch.Statistics | None,
) -> None:
    with by_triton.device_of(logits):
        source, sink = source_and_sink(logits, dlogits)
        theirs = matrix_of(teacher)
        opts = _options(row_weight, scale, recipe, divergence)
        V, N, ignored = logits.shape[-1], target.numel(), recipe.ignore_index
        rows = (source, theirs, sink, target, whose.teacher, loss, saved, stats)
        launch.put(
            (
                "two rows", logits.device, recipe, divergence, V, known(source), known(theirs),
                known(sink), whose.teacher is None, of_kind(whose.number), loss is None,
                saved is None, stats is None, dtype_of(row_weight), dtype_of(scale),
            ),
            (
                source.ptr, theirs.ptr, None if sink is None else sink.ptr, target, whose.teacher,
                row_weight, scale,
            ),
            N,
            (*rows, *opts, ignored, whose.number, V),
            lambda: launch.two_rows_loss(
                *rows, opts, kind=divergence.kind, V=V, ignore_index=ignored, which=whose.number
            ),
        )  # fmt: skip
        copy_back(sink, dlogits)


def terms(
    logits: Tensor,
    teacher: Tensor,
    target: Tensor,
    saved: Tensor,
    recipe: Recipe,
    divergence: Divergence,
) -> Tensor:
    """(N, 2): what some columns add to a jsd and to KL(p || m), from the sums of all columns."""
    found = saved.new_empty(target.numel(), 2)
    with by_triton.device_of(logits):
        source, theirs = matrix_of(logits), matrix_of(teacher)
        opts = _options(None, None, recipe, divergence)
        V, N, ignored = logits.shape[-1], target.numel(), recipe.ignore_index
        rows = (source, theirs, target, saved, found)
        launch.put(
            (
                "terms of two rows", logits.device, recipe, divergence, V, known(source),
                known(theirs),
            ),
            (source.ptr, theirs.ptr, target, saved),
            N,
            (*rows, *opts, ignored, V),
            lambda: launch.two_rows_terms(*rows, opts, V=V, ignore_index=ignored),
        )  # fmt: skip
    return found


def backward(
    logits: Tensor,
    teacher: Tensor,
    dlogits: Tensor,
    target: Tensor,
    whose: Whose,
    saved: Tensor,
    row_weight: Tensor | None,
    recipe: Recipe,
    divergence: Divergence,
    columns: Columns | None = None,
) -> None:
    """Fill `dlogits`, which may be `logits` itself, from what the forward saved."""
    with by_triton.device_of(logits):
        source, sink = source_and_sink(logits, dlogits)
        assert sink is not None, "backward always writes a gradient"  # noqa: S101
        theirs = matrix_of(teacher)
        opts = _options(row_weight, None, recipe, divergence, columns)
        V, N, ignored = logits.shape[-1], target.numel(), recipe.ignore_index
        rows = (source, theirs, sink, target, whose.teacher, saved)
        launch.put(
            (
                "gradient of two rows", logits.device, recipe, divergence, V, known(source),
                known(theirs), known(sink), whose.teacher is None, of_kind(whose.number),
                dtype_of(row_weight), None if columns is None else (*map(of_kind, columns),),
            ),
            (source.ptr, theirs.ptr, sink.ptr, target, whose.teacher, saved, row_weight),
            N,
            (*rows, *opts, ignored, whose.number, V),
            lambda: launch.two_rows_gradient(
                *rows, opts, kind=divergence.kind, V=V, ignore_index=ignored, which=whose.number
            ),
        )  # fmt: skip
        copy_back(sink, dlogits)


def _options(
    row_weight: Tensor | None,
    scale: Tensor | None,
    recipe: Recipe,
    divergence: Divergence,
    columns: Columns | None = None,
) -> tuple[launch.Options, launch.Options, launch.Pair]:
    at_one = recipe._replace(temperature=1.0)
    theirs = divergence.of_teacher(at_one)
    pair = launch.Pair(
        None if recipe.temperature == 1.0 else 1 / float(recipe.temperature),
        divergence.beta if divergence.kind == "jsd" else None,
        divergence.cross_entropy_weight or None,
    )
    return (
        options_of(None, row_weight, scale, at_one, columns=columns),
        options_of(None, None, None, theirs),
        pair,
    )

"""What the definitions share: kept rows, the head, and the way back to every token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sgp.labels import tokens_ahead
from sgp.rows.problem import Problem, check_input_and_target, check_tensor
from sgp.rows.recipe import Recipe, accumulation_dtype
from sgp.rows.reduction import check_whole_sequences
from sgp.selection import Selection


def score(logits: Tensor, recipe: Recipe) -> Tensor:
    """Stored logits -> scored logits: scale, then softcap."""
    s = logits.to(accumulation_dtype(logits.dtype)) * float(recipe.logit_scale)
    if recipe.softcap is None:
        return s
    return float(recipe.softcap) * torch.tanh(s / float(recipe.softcap))


def select(
    name: str,
    hidden: Tensor,
    target: Tensor | Selection,
    ignore_index: int | None,
    shift: bool | int,
    token_weight: Tensor | None,
) -> Selection:
    """The Selection of labels (...), or (N,) where nothing is shifted, for hidden (..., D)."""
    check_input_and_target(name, hidden, target)
    Recipe(-100 if ignore_index is None else ignore_index).check(name)
    lead = tuple(hidden.shape[:-1])
    flat = (torch.Size(lead).numel(),)
    ahead = tokens_ahead(name, shift, lead[-1] if lead else 0)
    if token_weight is not None:
        check_tensor(name, "token_weight", token_weight)
        if not isinstance(target, Selection) and token_weight.shape != target.shape:
            raise ValueError(
                f"{name}: token_weight is {tuple(token_weight.shape)}; expected "
                f"{tuple(target.shape)}, one a token"
            )
    if isinstance(target, Selection):
        if ahead or token_weight is not None or ignore_index not in (None, -100):
            raise ValueError(
                f"{name}: shift = {shift}, ignore_index = {ignore_index} or token_weight together "
                "with a Selection, which has decided them; pass them to its constructor"
            )
        if flat != (target.num_tokens,):
            raise ValueError(
                f"{name}: input is {tuple(hidden.shape)} and the Selection has shape "
                f"{target.shape}; expected leading dimensions that flatten to {target.num_tokens}"
            )
        return target
    if tuple(target.shape) not in ((lead,) if shift else (lead, flat)):
        raise ValueError(
            f"{name}: input is {tuple(hidden.shape)} and target {tuple(target.shape)}; expected "
            f"{lead}" + ("" if shift else f" or {flat}")
        )
    shape = tuple(target.shape) or (1,)
    return Selection.from_labels(
        target.reshape(shape),
        ignore_index=ignore_index,
        shift=shift,
        token_weight=None if token_weight is None else token_weight.reshape(shape),
    )


def head_logits(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    selection: Selection,
    dtype: torch.dtype | None = None,
    labels: tuple[str, str, str] = ("input", "linear_weight", "linear_bias"),
) -> Tensor:
    """(N, V) logits, zero and without gradient on rows that are not kept.

    `dtype` is that of the matmul and of the logits; None: the accumulation dtype of `hidden`.
    """
    of_input, of_weight, of_bias = labels
    check_tensor(name, of_weight, weight)
    if bias is not None:
        check_tensor(name, of_bias, bias)
    if not hidden.is_floating_point():
        raise TypeError(f"{name}: {of_input} is {hidden.dtype}; expected floating point")
    if weight.dim() != 2 or not hidden.dim() or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{name}: {of_weight} is {tuple(weight.shape)} and {of_input} {tuple(hidden.shape)}; "
            "expected (V, D) and (..., D)"
        )
    V = weight.shape[0]
    if bias is not None and tuple(bias.shape) != (V,):
        raise ValueError(f"{name}: {of_bias} is {tuple(bias.shape)}; expected ({V},)")
    rows = selection.rows
    dtype = accumulation_dtype(hidden.dtype) if dtype is None else dtype
    with torch.autocast(hidden.device.type, enabled=False):
        kept = F.linear(
            hidden.reshape(-1, hidden.shape[-1])[rows].to(dtype),
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
        )
    logits = kept.new_zeros(selection.num_tokens, V)
    return logits.index_copy(0, rows, kept)


def scatter_kept(problem: Problem, kept: Tensor, values: Tensor) -> Tensor:
    """(M,) values of the kept rows -> (N,), zero elsewhere."""
    N = torch.Size(problem.shape).numel()
    return values.new_zeros(N).index_copy(0, kept, values)


def reduce_kept(
    problem: Problem,
    kept: Tensor,
    rows: Tensor,
    divisor: Tensor,
    reduction: str,
    denominator: float | Tensor | None,
) -> Tensor:
    """(M,) losses of the kept rows -> what `reduction` says; a mean is over (M,) divisors."""
    if reduction == "none":
        return scatter_kept(problem, kept, rows).view(problem.shape)
    if reduction == "sum":
        return rows.sum()
    if reduction == "mean":
        total = divisor.sum()
        if denominator is not None:
            total = torch.as_tensor(
                denominator if isinstance(denominator, Tensor) else float(denominator)
            ).to(rows)
        return torch.where(total == 0, 0, rows.sum() / torch.where(total == 0, 1, total))
    if problem.boundaries is None:
        sequence = kept // max(1, problem.shape[-1] if problem.shape else 1)
    else:
        sequence = torch.searchsorted(problem.boundaries, kept, right=True) - 1
    zeros = rows.new_zeros(problem.num_sequences)
    sums = zeros.index_add(0, sequence, rows)
    if reduction == "sequence_sum":
        return sums
    check_whole_sequences(problem)
    totals = zeros.index_add(0, sequence, divisor)
    return torch.where(totals == 0, 0, sums / torch.where(totals == 0, 1, totals))

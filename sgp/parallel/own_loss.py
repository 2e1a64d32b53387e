"""`linear_loss` over a split vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sgp.head.autograd import head_options
from sgp.head.problem import Pieces
from sgp.own_loss import own_loss
from sgp.parallel.problem import agree_on_head, head_problem
from sgp.parallel.rows import ShardRows
from sgp.parallel.shard import Group
from sgp.reference import LossFunction
from sgp.rows.by_torch import Wanted
from sgp.rows.problem import check_flags
from sgp.rows.recipe import Recipe
from sgp.rows.units import check_loss_function, make_units
from sgp.rows.watched import not_compiled
from sgp.selection import Selection


@not_compiled
def linear_loss(
    input: Tensor,  # noqa: A002  (PyTorch's name)
    local_weight: Tensor,
    target: Tensor | Selection,
    loss_fn: LossFunction,
    *,
    by: str = "row",
    groups: Tensor | Sequence[int] | None = None,
    group: Group = None,
    vocab_size: int | None = None,
    sum_input_grad: bool = True,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shift: bool | int = False,
    chunk_rows: int | None = None,
    memory_budget: int | None = None,
    return_stats: bool = False,
) -> Any:
    """`sgp.linear_loss` with a head whose rows are split over the ranks of a group.

    Example:
        >>> # under torchrun, with a head of V / P rows on each of P ranks
        >>> loss = sgp.parallel.linear_loss(                        # doctest: +SKIP
        ...     hidden, local_head, completions, loss_fn, shift=True)

    Args:
        input, local_weight, target, group, vocab_size, sum_input_grad, linear_bias: as in
            `linear_cross_entropy`.
        loss_fn, by, groups: as in `sgp.linear_loss`. Every rank calls `loss_fn` on the same
            numbers, bit for bit, so it must give the same on every rank: tensors that it uses are
            the same everywhere, and each rank has their whole gradient.
        ignore_index, temperature, softcap, logit_scale, shift, chunk_rows, return_stats: as in
            `sgp.linear_loss`.
        memory_budget: as in `linear_cross_entropy`.

    Returns:
        As `sgp.linear_loss`, the same bits on every rank. Exchanged in forward: what
        `token_log_probs` does for each row, one all-gather a chunk, and the gradient of `input` as
        by `linear_cross_entropy`.

    Raises:
        As `linear_cross_entropy` and `sgp.linear_loss`. An exception of `loss_fn` that not all
        ranks have leaves the others waiting until the group's time-out.
    """
    name = "sgp.parallel.linear_loss"
    check_flags(name, sum_input_grad=sum_input_grad, return_stats=return_stats)
    check_loss_function(name, loss_fn)
    ignore = -100 if ignore_index is None else ignore_index
    recipe = Recipe(ignore, softcap=softcap, logit_scale=logit_scale, temperature=temperature)
    pieces = Pieces(chunk_rows, memory_budget)
    problem, head = head_problem(
        name, input, local_weight, linear_bias, target, None, recipe, pieces, shift
    )
    units = make_units(name, by, groups, problem, target, int(head.num_kept))
    function = getattr(loss_fn, "__qualname__", "")
    asked = (*pieces.asked(), sum_input_grad, return_stats, by, units.ends, function)
    shard, head = agree_on_head(
        name, group, problem, head, vocab_size, None, asked, sums_input_grad=sum_input_grad
    )
    wanted = Wanted(stats=True)
    chosen = head_options(problem.recipe, head, pieces, wanted, ShardRows(shard), name=name)
    found = own_loss(problem, head, units, loss_fn, chosen, return_stats=return_stats)
    if isinstance(found, Tensor):
        return shard.checked(found)
    return shard.checked(found[0]), *found[1:]

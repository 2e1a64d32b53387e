"""`linear_loss`: a linear head and a loss of the caller's own, at the price of three matmuls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sgp import dtensors
from sgp.head import operators
from sgp.head.autograd import (
    LINEAR_LOSS,
    Computed,
    HeadOptions,
    HeadOwnLoss,
    head_options,
    linear_head,
)
from sgp.head.calls import LinearHead
from sgp.head.loss_function import Caller
from sgp.head.problem import Pieces, check_head, make_head_problem
from sgp.losses import token_statistics
from sgp.reference import LossFunction
from sgp.rows.autograd import apply, refuse_forward_mode
from sgp.rows.by_torch import Wanted
from sgp.rows.operations import ONE_DEVICE
from sgp.rows.problem import Problem, check_flags
from sgp.rows.recipe import Recipe
from sgp.rows.units import Units, check_loss_function, make_units
from sgp.rows.watched import not_compiled
from sgp.selection import Selection


@not_compiled
def linear_loss(
    input: Tensor,  # noqa: A002  (PyTorch's name)
    linear_weight: Tensor,
    target: Tensor | Selection,
    loss_fn: LossFunction,
    *,
    by: str = "row",
    groups: Tensor | Sequence[int] | None = None,
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
    """A loss of your own, a function of each token's log-probability, computed inside the head.

    The kept rows' logits are made chunk by chunk. `loss_fn` runs between the statistics of a chunk
    and its gradient, so that the logits are made once, where log-probabilities with a loss after
    them make them twice. The gradients are exact.

    Example:
        >>> import torch, sgp
        >>> hidden = torch.randn(2, 5, 8, requires_grad=True)       # (B, T, D) of a backbone
        >>> head = torch.nn.Linear(8, 11, bias=False)               # (V, D)
        >>> labels = torch.randint(11, (2, 5))
        >>> labels[:, :3] = -100                                    # the prompt
        >>> old = torch.full((10,), -2.0)                           # (B * T,) of the old policy
        >>> advantage = torch.tensor([1.0, -1.0]).repeat_interleave(5)
        >>> def clipped(tokens, rows):                              # PPO's surrogate
        ...     ratio = (tokens.log_prob - old[rows]).exp()
        ...     gain = advantage[rows]
        ...     gain = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
        ...     return -gain / 4                                    # 4 tokens carry loss
        >>> loss = sgp.linear_loss(hidden, head.weight, labels, clipped, shift=True)
        >>> loss.backward()
        >>> hidden.grad.abs().sum(-1) > 0
        tensor([[False, False,  True,  True, False],
                [False, False,  True,  True, False]])

    Args:
        input, linear_weight, target, linear_bias, shift, chunk_rows, memory_budget: as in
            `linear_cross_entropy`, class indices or a Selection only. The weights of a Selection
            multiply the numbers of rows.
        loss_fn: called as `loss_fn(tokens, rows)` with the TokenLogProbs of some kept rows, (m,)
            each in float32 (float64 for float64 input), of which `log_prob`, `entropy` and `lse`
            are differentiable, and their positions (m,) int64 among the flattened rows, ascending.
            Take the values of your own tensors with `[rows]`: row t predicts token t + 1. It
            returns one number a row (m,); for `by="sequence"` and `"group"` one for each that has
            rows in this call, in ascending order, or one for every sequence (S,) or group (G,), of
            which the others are ignored (but must not be infinite or NaN). Or `(numbers, metrics)`,
            metrics being a dict of tensors of the same length. Where nothing is kept, it is called
            once with no rows.
        by: "row"; "sequence": all kept rows of a sequence stand in one call, so that a loss of
            whole sequences is exact; "group": those of several sequences, such as a DPO pair.
        groups: (S,) non-decreasing integers, for `by="group"`: sequences with the same number are
            one group. Give them on the CPU: from a GPU they are copied, which waits for it.
        ignore_index: targets of this value carry no loss; None means -100.
        temperature, softcap, logit_scale: as in `token_log_probs`.
        return_stats: also return the TokenLogProbs of all rows, detached.

    Returns:
        The sum of all numbers, 0-d, float32 (float64 for float64 input). With `return_stats` or
        metrics a tuple of loss, TokenLogProbs and metrics, without what was not asked for. Metrics
        of rows have the target's shape, zero where ignored; those of sequences and groups are (S,)
        and (G,), zero where none of their rows is kept.

    The result must not depend on the chunks, so no number may depend on other rows (sequences,
    groups), nor a metric, which is not checked. At its first call a function is called a few dozen
    times more, with some statistics changed and with some of the rows alone, and it is refused if
    its numbers mix rows; this waits for a GPU once. So it must have no side effects. A function is
    told by its code and by the functions, strings and booleans that it reaches, so that a closure
    made anew at each step is checked once. With SGP_CHECK=1 every call is checked, with SGP_CHECK=0
    none.

    `loss_fn` runs in the modes of autograd and autocast that the call is made in. Its exceptions
    come through. Other tensors that it uses get their gradients too.

    Where `input` is a DTensor whose tokens are sharded, every rank calls `loss_fn` with tokens of
    its own, by="row" only. `rows` are positions among all ranks' tokens, and gradients of other
    tensors are refused. An exception that not all ranks have leaves the others waiting until the
    group's time-out.

    Cost: matmuls take `6 M V D` floating-point operations, `4 M V D` with one side frozen and
    `2 M V D` without gradients. They take `2 M V D` more where the logits are made twice: where a
    small budget asks for it, or a sequence or group has more rows than a chunk may, which is said
    once. Labels on a GPU cost a wait for the device, two with by="sequence"; a Selection, none.

    Raises:
        ValueError, TypeError: arguments that do not fit; numbers or metrics of another shape, dtype
            or device, or without a gradient; rows that mix.
        IndexError: as `linear_cross_entropy`.
        RuntimeError: a second backward, a second derivative, or `torch.func` transforms.
            `torch.compile` breaks the graph here.
    """
    name = LINEAR_LOSS
    if dtensors.is_dtensor(input, linear_weight, linear_bias, target):
        return dtensors.server().of_head(
            linear_loss, input, linear_weight, target, linear_bias, loss_fn=loss_fn, by=by,
            groups=groups, ignore_index=ignore_index, temperature=temperature, softcap=softcap,
            logit_scale=logit_scale, shift=shift, chunk_rows=chunk_rows,
            memory_budget=memory_budget, return_stats=return_stats,
        )  # fmt: skip
    check_flags(name, return_stats=return_stats)
    check_loss_function(name, loss_fn)
    ignore = -100 if ignore_index is None else ignore_index
    recipe = Recipe(ignore, softcap=softcap, logit_scale=logit_scale, temperature=temperature)
    pieces = Pieces(chunk_rows, memory_budget)
    check_head(name, input, linear_weight, linear_bias, target)
    pieces.check(name, linear_weight)
    problem = make_head_problem(name, input, linear_weight, target, None, None, recipe, shift=shift)
    refuse_forward_mode(name, input, linear_weight, linear_bias)
    if torch._C._are_functorch_transforms_active():  # noqa: SLF001  (no public name)
        raise RuntimeError(
            f"{name}: loss_fn runs on numbers and its gradient is taken at once, which torch.func "
            "transforms cannot follow; use sgp.linear_token_log_probs"
        )
    head = linear_head(linear_weight, linear_bias, target, problem)
    chosen = head_options(problem.recipe, head, pieces, Wanted(stats=True), name=name)
    units = make_units(name, by, groups, problem, target, int(head.num_kept))
    return own_loss(problem, head, units, loss_fn, chosen, return_stats=return_stats)


def own_loss(
    problem: Problem,
    head: LinearHead,
    units: Units,
    loss_fn: LossFunction,
    options: HeadOptions,
    *,
    return_stats: bool,
) -> Any:
    """The loss of what has been checked, the statistics and the metrics."""
    o, name = options, options.named(LINEAR_LOSS)
    caller = Caller(
        name, loss_fn, units, head.input, problem.token_weight, trains=any(o.call.needs)
    )
    with torch.no_grad():
        stats, gradients = operators.with_loss(
            o.operations or ONE_DEVICE, head.detached(), o.early(), units, caller
        )
    caller.check_gradient()
    loss = torch.stack(caller.sums).sum()
    if any(o.call.needs):
        attached = [x for x in caller.sums if x.requires_grad]
        computed = Computed(loss.detach(), gradients)
        tensors = (head.input, head.weight, head.bias, head.target)
        loss = apply(HeadOwnLoss, *tensors, computed, o, *attached)[0]
    found: list[Any] = [loss]
    if return_stats:
        found.append(token_statistics(problem, stats, need_argmax=False))
    if caller.metrics is not None:
        is_of_rows = units.present is None
        found.append({k: problem.shaped(x) if is_of_rows else x for k, x in caller.metrics.items()})
    return found[0] if len(found) == 1 else tuple(found)

"""The definitions of the losses of labels, and of a token's statistics.

For a kept row with scored logits s and target y::

    log p_j = s_j - lse,  lse = log sum_i exp s_i
    ce      = (1 - eps) w_y (-log p_y) + eps / V sum_j w_j (-log p_j)
    loss    = r (ce + zeta lse^2)
    mean    = sum(r ce) / sum(r w_y) + zeta sum(r lse^2) / sum(r)     over all rows, or a sequence's

(for class probabilities, as in PyTorch, sum(r) divides both; a `denominator` always does).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sgp.reference.steps import head_logits, reduce_kept, scatter_kept, score, select
from sgp.rows.problem import check_flags, check_mean_weights, check_targets, make_problem
from sgp.rows.recipe import Recipe
from sgp.rows.reduction import check_reduction
from sgp.rows.units import check_loss_function, make_units
from sgp.selection import Selection


class TokenLogProbs(NamedTuple):
    """What a row of logits says about its target; every field has the shape of the target.

    Zero (False) where the target is ignored. `is_top1` is True where no other class has a larger
    score (a logit after scale, softcap and temperature), so that of tied classes every one is;
    a row with a NaN has none. 16-bit logits tie often: where one class a row must win, ask for
    `argmax`, the lowest of tied classes, and compare `argmax == target`.
    """

    log_prob: Tensor  # nats, float32
    entropy: Tensor  # nats, float32
    lse: Tensor  # float32
    is_top1: Tensor  # bool: no token is more probable than the target
    argmax: Tensor | None = None  # int64: as torch.argmax of the scores; a NaN counts as largest


LossFunction = Callable[[TokenLogProbs, Tensor], "Tensor | tuple[Tensor, dict[str, Tensor]]"]


def cross_entropy(
    input: Tensor,  # noqa: A002
    target: Tensor | Selection,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    shift: bool | int = False,
) -> Tensor:
    """The definition of `sgp.cross_entropy`.

    Example:
        >>> logits = torch.log(torch.tensor([[0.8, 0.2]]))
        >>> cross_entropy(logits, torch.tensor([0]))     # -log 0.8
        tensor(0.2231)
    """
    name = "sgp.reference.cross_entropy"
    ignore = -100 if ignore_index is None else ignore_index
    recipe = Recipe(ignore, label_smoothing, softcap, logit_scale, lse_square_scale)
    problem = make_problem(name, input, target, weight, token_weight, recipe, shift=shift)
    lse_square_scale = float(lse_square_scale)
    denominator = check_reduction(name, reduction, denominator)
    V = problem.input.shape[-1]
    logits, y, w = problem.input.reshape(-1, V), problem.target, problem.weight
    if problem.has_probabilities():
        kept = torch.arange(len(logits), device=logits.device)
        s = score(logits, recipe)
        q = (1 - label_smoothing) * y.reshape(-1, V).to(s.dtype) + label_smoothing / V
        q = q if w is None else q * w
        log_p = F.log_softmax(s, -1)
        log_p = log_p.masked_fill((q == 0) & (log_p == -torch.inf), 0)  # 0 log 0 is 0
        rows = -(q * log_p).sum(1)
        divisor = torch.ones_like(rows)
    else:
        check_targets(name, y, V, ignore)
        kept = (y != ignore).nonzero().squeeze(1)
        y = y[kept]
        s = score(logits[kept], recipe)
        w = s.new_ones(V) if w is None else w.to(s.dtype)
        log_p = F.log_softmax(s, -1)
        nll = -log_p.gather(1, y[:, None]).squeeze(1)
        rows = (1 - label_smoothing) * w[y] * nll
        if label_smoothing:
            rows = rows + label_smoothing / V * torch.where(w == 0, 0, w * -log_p).sum(1)
        divisor = w[y]
    r = torch.ones_like(rows)
    z_loss = lse_square_scale * s.logsumexp(1) ** 2 if lse_square_scale else torch.zeros_like(rows)
    if problem.token_weight is not None:
        if reduction == "mean" and denominator is None:
            scored = torch.zeros_like(problem.token_weight, dtype=torch.bool)
            check_mean_weights(name, scored.index_fill(0, kept, True), problem.token_weight)
        r = problem.token_weight[kept].to(rows.dtype)
    if reduction not in ("mean", "sequence_mean") or denominator is not None:
        return reduce_kept(problem, kept, r * (rows + z_loss), r, reduction, denominator)
    mean = reduce_kept(problem, kept, r * rows, r * divisor, reduction, None)
    return mean + reduce_kept(problem, kept, r * z_loss, r, reduction, None)


def linear_cross_entropy(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    target: Tensor | Selection,
    *,
    linear_bias: Tensor | None = None,
    shift: bool | int = False,
    ignore_index: int | None = -100,
    token_weight: Tensor | None = None,
    **loss: object,
) -> Tensor:
    """`cross_entropy` of `input @ linear_weight.T + linear_bias`, on the kept rows.

    Example:
        >>> hidden, head = torch.randn(2, 5, 8), torch.randn(11, 8)
        >>> labels = torch.randint(11, (2, 5))
        >>> linear_cross_entropy(hidden, head, labels, shift=True).shape
        torch.Size([])
    """
    name = "sgp.reference.linear_cross_entropy"
    selection = select(name, input, target, ignore_index, shift, token_weight)
    logits = head_logits(name, input, linear_weight, linear_bias, selection)
    result = cross_entropy(logits, selection, **loss)  # type: ignore[arg-type]
    return result.reshape(target.shape) if loss.get("reduction") == "none" else result


def token_log_probs(
    input: Tensor,  # noqa: A002
    target: Tensor | Selection,
    *,
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shift: bool | int = False,
    return_argmax: bool = False,
) -> TokenLogProbs:
    """The definition of `sgp.token_log_probs`; the first three fields are differentiable.

    Example:
        >>> logits = torch.log(torch.tensor([[0.8, 0.2]]))
        >>> token_log_probs(logits, torch.tensor([1])).log_prob.exp()
        tensor([0.2000])
    """
    name = "sgp.reference.token_log_probs"
    check_flags(name, return_argmax=return_argmax)
    ignore = -100 if ignore_index is None else ignore_index
    recipe = Recipe(ignore, softcap=softcap, logit_scale=logit_scale, temperature=temperature)
    problem = make_problem(name, input, target, None, None, recipe, shift=shift)
    if problem.has_probabilities():
        raise TypeError(f"{name}: target is {problem.target.dtype}; expected class indices")
    V = problem.input.shape[-1]
    check_targets(name, problem.target, V, ignore)
    logits = problem.input.reshape(-1, V)
    kept = (problem.target != ignore).nonzero().squeeze(1)
    y = problem.target[kept]
    s = score(logits[kept], recipe) / float(temperature)
    log_p = F.log_softmax(s, -1)
    p = log_p.exp()
    values = [
        log_p.gather(1, y[:, None]).squeeze(1),
        -(p * log_p.masked_fill(p == 0, 0)).sum(1),  # 0 log 0 is 0, in the gradient too
        s.logsumexp(1),
        s.gather(1, y[:, None]).squeeze(1) == s.amax(1),
    ]
    if return_argmax:
        values.append(s.argmax(1))
    return TokenLogProbs(
        *(scatter_kept(problem, kept, value).view(problem.shape) for value in values)
    )


def linear_token_log_probs(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    target: Tensor | Selection,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = -100,
    shift: bool | int = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_argmax: bool = False,
) -> TokenLogProbs:
    """`token_log_probs` of `input @ linear_weight.T + linear_bias`, on the kept rows.

    Example:
        >>> hidden, head = torch.randn(2, 5, 8), torch.randn(11, 8)
        >>> labels = torch.randint(11, (2, 5))
        >>> linear_token_log_probs(hidden, head, labels, shift=True).log_prob.shape
        torch.Size([2, 5])
    """
    name = "sgp.reference.linear_token_log_probs"
    selection = select(name, input, target, ignore_index, shift, None)
    logits = head_logits(name, input, linear_weight, linear_bias, selection)
    values = token_log_probs(
        logits, selection, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
        return_argmax=return_argmax,
    )  # fmt: skip
    return TokenLogProbs(*(x.reshape(target.shape) for x in values if x is not None))


def linear_loss(
    input: Tensor,  # noqa: A002
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
    return_stats: bool = False,
) -> Any:
    """The definition of `sgp.linear_loss`: `loss_fn` is called once, with every kept row.

    Example:
        >>> hidden, head = torch.randn(2, 5, 8), torch.randn(11, 8)
        >>> labels = torch.randint(11, (2, 5))
        >>> linear_loss(hidden, head, labels, lambda tokens, rows: -tokens.log_prob / 8).shape
        torch.Size([])
    """
    name = "sgp.reference.linear_loss"
    check_flags(name, return_stats=return_stats)
    check_loss_function(name, loss_fn)
    selection = select(name, input, target, ignore_index, shift, None)
    logits = head_logits(name, input, linear_weight, linear_bias, selection)
    recipe = Recipe(softcap=softcap, logit_scale=logit_scale, temperature=temperature)
    problem = make_problem(name, logits, selection, None, None, recipe)
    units = make_units(name, by, groups, problem, selection, selection.num_kept)
    found = token_log_probs(
        logits, selection, temperature=temperature, softcap=softcap, logit_scale=logit_scale
    )
    rows = selection.rows
    returned = loss_fn(TokenLogProbs(*(x.flatten()[rows] for x in found if x is not None)), rows)
    numbers, metrics = returned if isinstance(returned, tuple) else (returned, None)
    count = len(rows) if units.present is None else int(units.present.sum())
    if tuple(numbers.shape) not in ((count,), (count if by == "row" else units.number,)):
        raise ValueError(
            f"{name}: loss_fn returned {tuple(numbers.shape)}; expected ({count},), one a {by}"
        )
    if units.present is None:
        if problem.token_weight is not None:
            numbers = numbers * problem.token_weight[rows]
        place, size, shape = rows, selection.num_tokens, target.shape
    else:
        place, size, shape = units.present.nonzero().squeeze(1), units.number, (units.number,)
        numbers = numbers[place] if len(numbers) == size else numbers

    def scattered(x: Tensor) -> Tensor:
        some = x[place] if len(x) == size else x
        return x.detach().new_zeros(size).index_copy(0, place, some.detach()).view(shape)

    result: list[Any] = [numbers.sum()]
    if return_stats:
        result.append(
            TokenLogProbs(*(x.detach().view(target.shape) for x in found if x is not None))
        )
    if metrics is not None:
        result.append({key: scattered(x) for key, x in metrics.items()})
    return result[0] if len(result) == 1 else tuple(result)

"""Whether a rival computes what it should: before it is timed, small in full and large in samples.

Small: loss and every gradient on a stretch of 64 rows, against PyTorch in float64. Large: at the
size that is timed, where chunks are many and offsets pass 2^31, the loss, the gradient of a few
rows of logits or hidden states (the first and last that are kept, one that is not), and of a few
rows of the weight, against the formula in float64, which needs no N x V tensor; and no NaN may be
anywhere in the gradients. New tensors are filled with NaN meanwhile, so that what is not written is
seen. A rival may have the errors of `ALLOWED`; sgp no more than PyTorch in the same dtype.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import deterministic

from bench.against import rivals
from bench.against.cases import Case, Problem
from sgp import tolerance

ROWS = 64
ALLOWED = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}  # relative, of loss and gradients
FLOAT64_LIMIT = {"cpu": 1 << 28, "cuda": 1 << 30}  # elements of a weight; beyond, in float32
PART = 1 << 24  # elements that are compared, or rows of logits made, at a time


class Errors(NamedTuple):
    """Relative: |value - truth| / |truth|, of tensors as vectors."""

    loss: float
    gradient: float  # the worst

    @property
    def worst(self) -> float:
        """Of the two; NaN if either is."""
        return worst(self)


def worst(values: Iterable[float]) -> float:
    """The largest; NaN if any is, which `max` loses unless it comes first.

    Example:
        >>> worst([1.0, float("nan")])
        nan
    """
    return max(values, key=lambda x: (x != x, x))  # noqa: PLR0124


@contextlib.contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Every new tensor whose content is left open is filled with NaN.

    Example:
        >>> with unwritten_is_nan():
        ...     torch.empty(1)
        tensor([nan])
    """
    mode = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operators that have no deterministic form
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(mode, warn_only=warns)
            deterministic.fill_uninitialized_memory = fills


def no_worse(plain: Errors, case: Case) -> Errors:
    """What sgp may have where PyTorch in the same dtype has the errors `plain`.

    Half as much again, because matmuls sum in another order; and `tolerance.bound` over that. From
    logits the loss is not rounded to their dtype.
    """
    dtype = getattr(torch, case.dtype)
    of_loss = dtype if case.has_head else torch.float32
    more = (1.5 * error if error == error else 0.0 for error in plain)  # noqa: PLR0124
    return Errors(*map(tolerance.bound, more, (of_loss, dtype)))


def truth(p: Problem) -> tuple[Tensor, ...]:
    """Loss and gradients of PyTorch in float64, or float32 where the head is very large."""
    large = p.weight is not None and p.weight.numel() > FLOAT64_LIMIT[p.weight.device.type]
    dtype = torch.float32 if large else torch.float64
    leaves = [x.detach().to(dtype).requires_grad_() for x in p.leaves]
    logits = leaves[0][p.rows]
    if len(leaves) == 2:
        logits = F.linear(logits, leaves[1])
    if p.teacher is None or p.teacher_weight is None:
        loss = F.cross_entropy(logits, p.target)
    else:
        teacher = F.linear(p.teacher[p.rows].to(dtype), p.teacher_weight.to(dtype))
        loss = rivals.divergence_of(logits, teacher, p.case.divergence).mean()
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def errors(found: tuple[Tensor, ...], true: tuple[Tensor, ...]) -> Errors:
    """Of a loss and its gradients."""
    of = [_relative(ours, theirs) for ours, theirs in zip(found, true, strict=True)]
    return Errors(of[0], worst(of[1:]))


def _relative(value: Tensor, true: Tensor) -> float:
    """On the tensors' device, a part at a time."""
    difference = norm = 0.0
    for ours, theirs in zip(
        value.detach().reshape(-1).split(PART), true.reshape(-1).split(PART), strict=True
    ):
        difference += float((ours.double() - theirs.double()).square().sum())
        norm += float(theirs.double().square().sum())
    return (difference / norm) ** 0.5 if norm else difference**0.5


class Sample(NamedTuple):
    """What is known of the loss and its gradients at full size."""

    rows: Tensor  # (R,): of logits or hidden states
    columns: Tensor  # (C,): of the vocabulary, rows of the weight
    true: tuple[Tensor, ...]  # loss, gradient of `rows`, and with a head of the weight's `columns`

    def errors(self, found: tuple[Tensor, ...]) -> Errors:
        """Of the outcome of a rival."""
        loss, first, *weight = found
        sampled = (loss, first[self.rows], *(w[self.columns] for w in weight))
        found_errors = errors(sampled, self.true)
        if any(has_nan(gradient) for gradient in (first, *weight)):
            return found_errors._replace(gradient=float("nan"))
        return found_errors


def has_nan(x: Tensor) -> bool:
    """Whether NaN stands anywhere in rows (N, ...), a part at a time."""
    rows = max(1, PART * len(x) // max(1, x.numel()))
    return any(bool(part.isnan().any()) for part in x.detach().split(rows))


@torch.no_grad()
def sample(p: Problem) -> Sample:
    """By the formula: (softmax - one hot) / M for a row of logits."""
    M = p.rows.numel()
    ignored = (p.labels == -100).nonzero()[:, 0]
    kept = p.rows[torch.linspace(0, M - 1, 4, device=p.rows.device).long()]
    rows = torch.cat([kept, ignored[:1], ignored[-1:]])
    columns = torch.cat([p.target[:2], torch.tensor([0, p.case.model.V - 1], device=rows.device)])
    if p.teacher is not None:
        return _sample_of_teacher(p, rows, columns)
    lse, at_target, at_columns = [], [], []
    for part, target in zip(
        *(x.split(_rows_at_a_time(p)) for x in (p.rows, p.target)), strict=True
    ):
        logits = _logits(p, part)
        lse.append(logits.logsumexp(1))
        at_target.append(logits.gather(1, target[:, None])[:, 0])
        at_columns.append(logits[:, columns])
        del logits
    all_lse = torch.cat(lse)
    loss = (all_lse - torch.cat(at_target)).mean()
    sampled = _logits(p, rows)
    gradient = sampled.softmax(1)
    labels = p.labels[rows]
    gradient[torch.arange(len(rows), device=rows.device), labels.clamp(min=0)] -= 1.0
    gradient = torch.where((labels != -100)[:, None], gradient / M, 0.0)
    if p.hidden is None or p.weight is None:
        return Sample(rows, columns, (loss, gradient))
    of_columns = (torch.cat(at_columns) - all_lse[:, None]).exp()
    of_columns -= (p.target[:, None] == columns).double()
    return Sample(rows, columns, (loss, *_through_head(p, gradient, of_columns / M)))


def _through_head(p: Problem, gradient: Tensor, of_columns: Tensor) -> tuple[Tensor, Tensor]:
    """Of some rows of hidden states and some of the weight, from those of logits.

    Args:
        p: the problem.
        gradient: (R, V) of some rows.
        of_columns: (M, C) of some columns of all kept rows.
    """
    assert p.hidden is not None and p.weight is not None, "a head"  # noqa: S101, PT018
    d_weight = of_columns.t() @ p.hidden[p.rows].double()
    d_hidden = gradient.new_zeros(len(gradient), p.case.model.D)
    step = max(1, PART // p.case.model.D)
    for part, of_part in zip(p.weight.split(step), gradient.split(step, 1), strict=True):
        d_hidden += of_part @ part.double()
    return d_hidden, d_weight


def _sample_of_teacher(p: Problem, rows: Tensor, columns: Tensor) -> Sample:
    """By autograd's gradient of some rows' logits at a time."""
    M, total, of_columns = p.rows.numel(), 0.0, []
    for part in p.rows.split(_rows_at_a_time(p)):
        values, found = _compared(p, part)
        total += float(values.sum())
        of_columns.append(found[:, columns] / M)
    gradient = _compared(p, rows)[1] / M
    gradient[p.labels[rows] == -100] = 0.0
    loss = gradient.new_tensor(total / M)
    return Sample(rows, columns, (loss, *_through_head(p, gradient, torch.cat(of_columns))))


def _compared(p: Problem, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(R,) divergences from the teacher, and their gradients (R, V)."""
    with torch.enable_grad():
        logits = _logits(p, rows).requires_grad_()
        teacher = _product(p.teacher, p.teacher_weight, rows)
        values = rivals.divergence_of(logits, teacher, p.case.divergence)
        (found,) = torch.autograd.grad(values.sum(), logits)
    return values.detach(), found


def _rows_at_a_time(p: Problem) -> int:
    return max(1, PART // p.case.model.V)


def _logits(p: Problem, rows: Tensor) -> Tensor:
    """(R, V) float64."""
    if p.logits is not None:
        return p.logits[rows].double()
    return _product(p.hidden, p.weight, rows)


@torch.no_grad()
def _product(hidden: Tensor | None, weight: Tensor | None, rows: Tensor) -> Tensor:
    """(R, V) float64."""
    assert hidden is not None and weight is not None, "a head"  # noqa: S101, PT018
    some, step = hidden[rows].double(), max(1, PART // weight.shape[1])
    return torch.cat([some @ part.double().t() for part in weight.split(step)], 1)

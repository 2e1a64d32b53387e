"""One loss head on one real batch, four ways: loss, gradient error, time and peak memory."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import sgp
from sgp.train.batch import IGNORE_INDEX, Batch
from sgp.train.memory import cpu_peak
from sgp.train.model import Parts, post_processed

_MOST_REPETITIONS = 9
_SECONDS = 2.0  # no further repetitions once this has passed, but at least three
_TRUTH_LOGITS = 1 << 24  # float64 logits held at once by the reference, 128 MiB


class Inputs(NamedTuple):
    """What every head reads. `hidden` and `weight` are leaves that require grad."""

    hidden: Tensor  # (B, T, D) fp32
    weight: Tensor  # (V, D) fp32
    bias: Tensor | None  # (V,) fp32
    labels: Tensor  # (B, T) int64, shifted, -100 where there is no loss
    selection: sgp.Selection
    logit_scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """What PyTorch's operators make of some hidden states."""
        logits = functional.linear(hidden, self.weight, self.bias)
        return post_processed(logits, self.logit_scale, self.softcap)


class Row(NamedTuple):
    """A line of the table."""

    name: str
    loss: float  # nats an output token
    loss_error: float  # relative, against float64
    gradient_error: float  # larger of the relative errors (in norm) of d_hidden and d_weight
    seconds: float  # forward and backward, median
    peak_bytes: int | None  # above the inputs, both gradients included; None: not measurable


class Comparison(NamedTuple):
    """The rows, and how much of the batch carries loss."""

    rows: list[Row]
    num_tokens: int  # N
    num_kept: int  # M
    num_padding: int
    vocabulary: int  # V
    width: int  # D


def all_rows(x: Inputs) -> Tensor:
    """PyTorch's usual head: logits of all N rows."""
    logits = x.logits(x.hidden).flatten(0, 1)
    return functional.cross_entropy(logits, x.labels.flatten(), ignore_index=IGNORE_INDEX)


def kept_rows(x: Inputs) -> Tensor:
    """PyTorch on the M kept rows, gathered by hand."""
    hidden = x.hidden.flatten(0, 1)[x.selection.rows]
    return functional.cross_entropy(x.logits(hidden), x.selection.target)


def sgp_rows(x: Inputs) -> Tensor:
    """The M kept rows with sgp's loss."""
    hidden = x.hidden.flatten(0, 1)[x.selection.rows]
    logits = functional.linear(hidden, x.weight, x.bias)
    return sgp.cross_entropy(
        logits, x.selection.target, logit_scale=x.logit_scale, softcap=x.softcap
    )


def sgp_linear(x: Inputs) -> Tensor:
    """The M kept rows with the head inside the loss."""
    return sgp.linear_cross_entropy(
        x.hidden,
        x.weight,
        x.selection,
        linear_bias=x.bias,
        logit_scale=x.logit_scale,
        softcap=x.softcap,
    )


Head = Callable[[Inputs], Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]  # loss, d_hidden, d_weight

HEADS: dict[str, Head] = {
    "PyTorch, all rows": all_rows,
    "PyTorch, kept rows": kept_rows,
    "sgp, kept rows": sgp_rows,
    "sgp, linear head": sgp_linear,
}


def compare(parts: Parts, batch: Batch) -> Comparison:
    """Run the four heads forward and backward on a batch, from the model's hidden states.

    Times are medians over repetitions in which the heads take turns, after one run of each that
    is not timed.

    Args:
        parts: The model; only its head is measured.
        batch: At least one of its tokens carries loss.
    """
    with torch.no_grad():
        hidden = parts.hidden(batch)
    bias = parts.head.bias
    x = Inputs(
        hidden=hidden.detach().requires_grad_(),
        weight=parts.head.weight.detach().requires_grad_(),
        bias=None if bias is None else bias.detach(),
        labels=batch.shifted_labels,
        selection=batch.selection,
        logit_scale=parts.logit_scale,
        softcap=parts.softcap,
    )
    truth = _float64(x)
    measured = {name: _errors_and_peak(head, x, truth) for name, head in HEADS.items()}
    seconds = _time(x)  # all heads are warm now
    rows = [
        Row(name, *measured[name][:3], statistics.median(seconds[name]), measured[name][3])
        for name in HEADS
    ]
    V, D = x.weight.shape
    N = batch.selection.num_tokens
    padding = N - int(batch.lengths.sum())
    return Comparison(rows, N, batch.selection.num_kept, padding, V, D)


def _step(head: Head, x: Inputs) -> Gradients:
    loss = head(x)
    d_hidden, d_weight = torch.autograd.grad(loss, (x.hidden, x.weight))
    return loss.detach(), d_hidden, d_weight


def _errors_and_peak(
    head: Head, x: Inputs, truth: Gradients
) -> tuple[float, float, float, int | None]:
    """Return loss, its error, the gradients' error, and the most bytes held at one time."""
    if x.hidden.is_cuda:
        device = x.hidden.device
        _step(head, x)  # compiles the kernels and makes the workspaces
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        loss, *gradients = _step(head, x)
        peak: int | None = torch.cuda.max_memory_allocated(device) - before
    else:
        with cpu_peak() as held:
            loss, *gradients = _step(head, x)
        peak = held.peak_bytes
    errors = [_relative(mine, true) for mine, true in zip(gradients, truth[1:], strict=True)]
    return float(loss), _relative(loss, truth[0]), max(errors), peak


def _float64(x: Inputs) -> Gradients:
    """Loss, d_hidden and d_weight in float64, by the formula, a few rows at a time."""
    rows, target = x.selection.rows, x.selection.target
    weight = x.weight.detach().double()
    bias = None if x.bias is None else x.bias.double()
    kept = x.hidden.detach().flatten(0, 1)[rows].double()
    loss = weight.new_zeros(())
    d_kept, d_weight = torch.empty_like(kept), torch.zeros_like(weight)
    chunk = max(1, _TRUTH_LOGITS // weight.shape[0])
    for start in range(0, rows.numel(), chunk):
        part = slice(start, start + chunk)
        logits = functional.linear(kept[part], weight, bias)
        logits = post_processed(logits, x.logit_scale, x.softcap)
        log_prob = logits.log_softmax(dim=-1)
        of_target = target[part, None]
        loss -= log_prob.gather(1, of_target).sum()
        d_logits = log_prob.exp_()
        d_logits.scatter_add_(1, of_target, -torch.ones_like(of_target, dtype=torch.float64))
        d_logits *= x.logit_scale / rows.numel()
        if x.softcap is not None:  # the derivative of softcap * tanh(x / softcap)
            d_logits *= 1 - (logits / x.softcap) ** 2
        d_kept[part] = d_logits @ weight
        d_weight += d_logits.T @ kept[part]
    d_hidden = torch.zeros_like(x.hidden, dtype=torch.float64).flatten(0, 1)
    d_hidden[rows] = d_kept
    return loss / rows.numel(), d_hidden.view_as(x.hidden), d_weight


def _relative(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth||."""
    return float((value.double() - truth).norm() / truth.norm())


def _time(x: Inputs) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in HEADS}
    begin = time.perf_counter()
    for repetition in range(_MOST_REPETITIONS):
        for name, head in HEADS.items():
            _synchronize(x)
            start = time.perf_counter()
            _step(head, x)
            _synchronize(x)
            seconds[name].append(time.perf_counter() - start)
        if repetition >= 2 and time.perf_counter() - begin > _SECONDS:
            break
    return seconds


def _synchronize(x: Inputs) -> None:
    if x.hidden.is_cuda:
        torch.cuda.synchronize(x.hidden.device)

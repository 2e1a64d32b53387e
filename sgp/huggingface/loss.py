"""The loss function of a patched model, with the signature of transformers' loss mapping.

`ForCausalLMLoss` of transformers (loss/loss_utils.py) is what it replaces: mean over the targets,
or their sum over `num_items_in_batch`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sgp.labels import IGNORE
from sgp.losses import cross_entropy
from sgp.rows.reduction import check_denominator


def next_tokens(labels: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """What each position has to predict: (..., T) labels moved one to the left.

    Example:
        >>> next_tokens(torch.tensor([[-100, 5, 6]]))
        tensor([[   5,    6, -100]])
    """
    moved = labels.roll(-1, -1)
    moved[..., -1] = ignore_index
    return moved


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int | None = None,  # noqa: ARG001  (transformers passes it; logits have it)
    num_items_in_batch: Tensor | float | None = None,
    ignore_index: int = IGNORE,
    shift_labels: Tensor | None = None,
    *,
    token_weight: Tensor | None = None,
    evaluating: bool = False,
) -> Tensor:
    """The loss that a model asks its `loss_function` for.

    Args:
        logits: (B, T, V), or (M, V) of the kept rows alone, in the model's dtype: not copied.
        labels: (B, T), not shifted; not looked at where `shift_labels` is given.
        vocab_size: not looked at.
        num_items_in_batch: replaces the number of targets as the divisor: a number or a tensor of
            one element.
        ignore_index: the label without loss.
        shift_labels: a target for each of the logits, shifted.
        token_weight: as in `sgp.cross_entropy`, of the shape of `shift_labels`.
        evaluating: whether to return transformers' NaN where nothing carries loss.

    Returns:
        () float32, in nats. 0 where nothing carries loss, unless `evaluating`.

    Raises:
        ValueError: without labels, or if shapes disagree.
    """
    if shift_labels is None:
        if labels is None:
            raise ValueError("sgp.huggingface: a loss was asked for without labels")
        shift_labels = next_tokens(labels, ignore_index)
    rows, target = logits.flatten(0, -2), shift_labels.flatten().to(logits.device)
    weight = None if token_weight is None else token_weight.flatten().to(logits.device)

    def compute(denominator: Tensor | float | None) -> Tensor:
        return cross_entropy(
            rows,
            target,
            ignore_index=ignore_index,
            token_weight=weight,
            denominator=denominator,
        )

    if not evaluating:
        return compute(num_items_in_batch)
    return evaluated(compute, target, weight, num_items_in_batch, ignore_index)


def evaluated(
    compute: Callable[[Tensor | float | None], Tensor],
    target: Tensor,
    token_weight: Tensor | None,
    num_items_in_batch: Tensor | float | None,
    ignore_index: int,
) -> Tensor:
    """The mean as transformers takes it: 0 / 0 is NaN, which Trainer leaves out of its average.

    Args:
        compute: the loss, given its divisor or None for the targets' own.
        target, token_weight: shifted, of the same shape.
        num_items_in_batch, ignore_index: as for `causal_lm_loss`.
    """
    if num_items_in_batch is not None:
        divisor = check_denominator("sgp.huggingface.patch: num_items_in_batch", num_items_in_batch)
        total = compute(1.0)
        return total / (divisor.to(total.device) if isinstance(divisor, Tensor) else divisor)
    counts = target != ignore_index
    if token_weight is not None:
        counts = counts & (token_weight != 0)
    loss = compute(None)
    return loss.where(counts.any().to(loss.device), torch.nan)

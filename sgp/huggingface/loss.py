"""The loss function of a patched model, with the signature of transformers' loss mapping.

`ForCausalLMLoss` of transformers (loss/loss_utils.py) is what it replaces: mean over the targets,
or their sum over `num_items_in_batch`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sgp.losses import cross_entropy
from sgp.selection import IGNORE


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
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The loss that a model asks its `loss_function` for.

    Args:
        logits: (B, T, V), or (M, V) of the kept rows alone, in the model's dtype: not copied.
        labels: (B, T), not shifted; not looked at where `shift_labels` is given.
        vocab_size: not looked at.
        num_items_in_batch: replaces the number of targets as the divisor.
        ignore_index: the label without loss.
        shift_labels: targets of the logits' leading shape, shifted.
        label_smoothing, token_weight: as in `sgp.cross_entropy`.

    Returns:
        float32, in nats. 0 where nothing carries loss (transformers: NaN).

    Raises:
        ValueError: without labels, or if shapes disagree.
    """
    if shift_labels is None:
        if labels is None:
            raise ValueError("sgp.huggingface: a loss was asked for without labels")
        shift_labels = next_tokens(labels, ignore_index)
    return cross_entropy(
        logits.flatten(0, -2),
        shift_labels.flatten().to(logits.device),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        token_weight=None if token_weight is None else token_weight.flatten(),
        denominator=num_items_in_batch,
    )

"""Labels on their way into a Selection: checks, and the way to the rows that predict them."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""Marks a position without loss inside a `Selection`, whatever `ignore_index` its labels used."""


def padded_rows(target: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """(rows of the target (N,) that are not ignored, padded to N; their number () on the CPU).

    Example:
        >>> padded_rows(torch.tensor([-100, 7, 8]), -100)
        (tensor([1, 2, 0]), tensor(2))
    """
    rows = (target != ignore).nonzero().squeeze(1)
    padded = target.new_zeros(target.shape)
    padded[: rows.numel()] = rows
    return padded, torch.tensor(rows.numel(), device="cpu")


def kept_counts(kept: Tensor, num_sequences: int, boundaries: Tensor | None) -> Tensor:
    """(S,) int64: how many rows of each sequence are kept, of (N,) bool.

    Example:
        >>> kept_counts(torch.tensor([True, False, True, True]), 2, None)
        tensor([1, 2])
    """
    if boundaries is None:
        length = kept.numel() // max(1, num_sequences)
        return kept.view(num_sequences, length).sum(1)
    up_to = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])
    return up_to[boundaries].diff()[:num_sequences]


def shifted(target: Tensor, length: int, ignore: int, ahead: int) -> Tensor:
    """Values (N,) moved to the rows that predict them, in sequences of `length` tokens.

    The last `ahead` rows of a sequence predict nothing.

    Example:
        >>> shifted(torch.tensor([1, 2, 3, 4]), 2, -100, 1)
        tensor([   2, -100,    4, -100])
    """
    moved = target.roll(-ahead)
    moved.view(-1, length)[:, length - ahead :] = ignore
    return moved


def has_float64(device: torch.device | str) -> bool:
    """Whether the device computes in float64, which Apple's MPS and some of Intel's do not."""
    if torch.device(device).type in ("cpu", "cuda", "meta"):
        return True
    try:
        torch.ones((), dtype=torch.float64, device=device).add_(1)
    except (RuntimeError, TypeError):
        return False
    return True


def tokens_ahead(name: str, shift: Any, length: int) -> int:
    """How many tokens ahead a row predicts, at most the `length` of a sequence.

    Raises:
        TypeError, ValueError: for what is neither a bool nor a whole number of at least 0.

    Example:
        >>> [tokens_ahead("", shift, 5) for shift in (False, True, 2, 9)]
        [0, 1, 2, 5]
    """
    is_bool = type(shift).__name__ in ("bool", "bool_")  # NumPy's, too
    if not is_bool and type(shift) is not int and not isinstance(shift, numbers.Integral):
        shown = f"a tensor {tuple(shift.shape)}" if isinstance(shift, Tensor) else repr(shift)
        raise TypeError(
            f"{name}: shift = {shown}; expected True, False or a whole number of tokens"
        )
    if shift < 0:
        raise ValueError(
            f"{name}: shift = {shift!r}; expected at least 0: a row predicts tokens after its own"
        )
    return min(int(shift), length)


def whole_label(name: str, ignore_index: Any) -> int:
    """The ignore_index, -100 for None; TypeError or ValueError for what no label is equal to."""
    if ignore_index is None:
        return IGNORE
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, numbers.Integral):
        kind = type(ignore_index).__name__
        raise TypeError(f"{name}: ignore_index is a {kind}; expected a whole number or None")
    label = int(ignore_index)
    if not -(2**63) <= label < 2**63:
        raise ValueError(f"{name}: ignore_index = {label} is no int64")
    return label


def position_of(flat: int, shape: torch.Size) -> str:
    """'1, 3' for the flat index 7 of shape (2, 4)."""
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    return ", ".join(map(str, reversed(index)))


def require_tensor(name: str, label: str, value: object) -> None:
    """Raise TypeError for what is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: {label} is a {type(value).__name__}; expected a torch.Tensor")


def require_integers(name: str, label: str, value: Tensor) -> None:
    """Raise TypeError or ValueError for what is no tensor of integers with dimensions."""
    require_tensor(name, label, value)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name}: {label} is {value.dtype}; expected integers")
    if value.dim() == 0 and label != "cu_seqlens":
        raise ValueError(f"{name}: {label} has no dimensions; expected (T,), (B, T) or more")


def flat_weight(name: str, token_weight: Tensor | None, labels: Tensor) -> Tensor | None:
    """Token weights of the labels' shape as (N,), on their device."""
    if token_weight is None:
        return None
    require_tensor(name, "token_weight", token_weight)
    if token_weight.is_complex():
        raise TypeError(f"{name}: token_weight is {token_weight.dtype}; expected real numbers")
    if token_weight.shape != labels.shape:
        raise ValueError(
            f"{name}: token_weight is {tuple(token_weight.shape)} and labels "
            f"{tuple(labels.shape)}; expected the same shape"
        )
    if token_weight.requires_grad:
        raise ValueError(f"{name}: token_weight requires grad; it is a constant, detach it")
    dtype = torch.float64 if token_weight.dtype == torch.float64 else torch.float32
    return token_weight.reshape(-1).to(labels.device, dtype, copy=True)


def checked_boundaries(
    name: str, cu_seqlens: Tensor | None, labels: Tensor, kept: Tensor
) -> tuple[Tensor | None, int]:
    """Checked boundaries, with one more at N where padding follows, and the number of sequences."""
    N = labels.numel()
    if cu_seqlens is None:
        return None, math.prod(labels.shape[:-1])
    require_integers(name, "cu_seqlens", cu_seqlens)
    ends = cu_seqlens.to(labels.device, torch.int64, copy=True)
    listed = ends.tolist()
    if ends.dim() != 1 or not listed or listed[0] != 0 or sorted(listed) != listed:
        raise ValueError(
            f"{name}: cu_seqlens = {listed}; expected cumulative lengths (S + 1,) that start at 0 "
            "and never fall"
        )
    if listed[-1] > N:
        raise ValueError(
            f"{name}: cu_seqlens ends at {listed[-1]}, past the {N} tokens of labels "
            f"{tuple(labels.shape)}"
        )
    length = labels.shape[-1]
    across = sorted(set(range(length, listed[-1], length)) - set(listed)) if length else []
    if across:
        raise ValueError(
            f"{name}: a sequence of cu_seqlens = {listed} crosses the end of a row of labels "
            f"{tuple(labels.shape)} at token {across[0]}; packed rows must break there"
        )
    if listed[-1] < N:
        if kept[listed[-1] :].any():
            raise ValueError(
                f"{name}: cu_seqlens ends at {listed[-1]} but labels after it carry loss; tokens "
                "after the last boundary are padding"
            )
        ends = torch.cat([ends, ends.new_tensor([N])])
    return ends, len(listed) - 1

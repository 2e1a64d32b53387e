"""From what a caller passes to rows with a target each: what every form of the loss checks."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from sgp.labels import IGNORE, shifted, tokens_ahead
from sgp.rows.recipe import Recipe, accumulation_dtype, cast, shown
from sgp.selection import Selection

REDUCTIONS = ("none", "mean", "sum", "sequence_sum", "sequence_mean")
INTEGERS = (torch.int64, torch.int32, torch.uint8, torch.int16, torch.int8)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Problem(NamedTuple):
    """Rows whose leading dimensions flatten to N, and one target for each.

    With methods: torch.compile before PyTorch 2.13 sees no property of a named tuple.
    """

    input: Tensor  # (..., V) logits, vocabulary last, or (..., D) under a linear head; any strides
    target: Tensor  # (N,) int64; or probabilities of the shape of input, any strides
    shape: tuple[int, ...]  # of the per-token results
    recipe: Recipe
    weight: Tensor | None  # (V,)
    token_weight: Tensor | None  # (N,)
    boundaries: Tensor | None  # of packed sequences; None: one sequence a row of `shape`
    num_sequences: int
    is_part: bool = False  # whether sequences were cut, and the rest is elsewhere

    def has_probabilities(self) -> bool:
        """Whether the target is a distribution over the vocabulary for each row."""
        return self.target.is_floating_point()

    def has_two_divisors(self) -> bool:
        """Whether a mean divides the cross-entropy by class weights, and a z-loss without them."""
        return self.weight is not None and self.recipe.lse_square_scale != 0

    def shaped(self, rows: Tensor) -> Tensor:
        """Results (N,) in the shape of the targets; no idle view, which autograd would record."""
        return rows if rows.shape == self.shape else rows.view(self.shape)

    def dtype(self) -> torch.dtype:
        """Of the losses, of the weights, and of the arithmetic."""
        return accumulation_dtype(self.input.dtype)


def make_problem(
    name: str,
    input: Tensor,  # noqa: A002  (PyTorch's name)
    target: Tensor | Selection,
    weight: Tensor | None,
    token_weight: Tensor | None,
    recipe: Recipe,
    *,
    shift: bool | int = False,
    part: bool = False,
) -> Problem:
    """Check every shape, dtype and device, bring the vocabulary last, and shift the labels.

    `part`: input holds some columns of the vocabulary, maybe none; weight is checked later.

    Raises:
        ValueError, TypeError: with what was passed, what was expected, and what to do.
    """
    plain = weight is None and token_weight is None and shift is False
    if plain and isinstance(target, Tensor) and _is_usual(input, target):
        shape = tuple(target.shape)
        return Problem(input, target, shape, recipe.check(name), None, None, None, 1)
    check_input_and_target(name, input, target)
    recipe = recipe.check(name)
    classes = input.shape[1 if isinstance(target, Tensor) and input.dim() > 1 else -1]
    if classes == 0 and not part:
        raise ValueError(f"{name}: input {tuple(input.shape)} has a vocabulary of 0")
    if isinstance(target, Selection):
        refuse_shift_of_selection(name, shift)
        return _from_selection(name, input, target, weight, token_weight, recipe)
    # PyTorch's layouts: (V,) with (), (N, V) with (N,), (N, V, d1, ...) with (N, d1, ...).
    class_dim = 0 if input.dim() == 1 else 1
    logits = input if input.dim() == 2 else input.movedim(1, -1) if class_dim else input[None]
    lead = () if input.dim() == 1 else tuple(logits.shape[:-1])
    ahead = tokens_ahead(name, shift, lead[-1] if lead else 0)
    probabilities = target.is_floating_point()
    if tuple(target.shape) != (tuple(input.shape) if probabilities else lead):
        raise ValueError(_shape_message(name, input, target, lead, shift=bool(shift)))
    if shift and (probabilities or not lead):
        raise ValueError(
            f"{name}: shift={shift} needs class indices (T,) or (..., T), whose last dimension "
            f"is time; target is {tuple(target.shape)} ({target.dtype})"
        )
    row_weight = flat_token_weight(name, token_weight, input, lead)
    if probabilities:
        if recipe.ignore_index >= 0:  # as PyTorch: nothing would be ignored
            raise ValueError(
                f"{name}: ignore_index = {recipe.ignore_index} has no meaning with class "
                f"probabilities {tuple(target.shape)}"
            )
        rows = target if target.dim() == 2 else target.movedim(class_dim, -1).view(logits.shape)
    else:
        if target.dtype not in INTEGERS:
            raise TypeError(
                f"{name}: target is {target.dtype}; expected int64 class indices of shape {lead} "
                f"or floating-point class probabilities of shape {tuple(input.shape)}"
            )
        rows, row_weight = moved_ahead(
            flat_indices(target), row_weight, lead, recipe.ignore_index, ahead
        )
    return Problem(
        input=logits,
        target=rows,
        shape=lead,
        recipe=recipe,
        weight=class_weight(name, weight, logits, logits.shape[-1]),
        token_weight=row_weight,
        boundaries=None,
        num_sequences=math.prod(lead[:-1]),
    )


def _is_usual(input: Tensor, target: Tensor) -> bool:  # noqa: A002
    """Whether these are (N, V) logits and (N,) int64 labels that every check passes as they are."""
    return (
        isinstance(input, Tensor)
        and input.dim() == 2
        and input.layout == target.layout == torch.strided
        and input.dtype in FLOATS
        and target.dtype == torch.int64
        and input.shape[:1] == target.shape
        and input.shape[1] > 0
        and input.device == target.device
        and target.is_contiguous()
    )


def flat_indices(target: Tensor) -> Tensor:
    """Class indices of any shape and integer dtype as (N,) int64."""
    if target.dim() == 1 and target.dtype == torch.int64 and target.is_contiguous():
        return target
    return target.reshape(-1).to(torch.int64).contiguous()


def moved_ahead(
    rows: Tensor, row_weight: Tensor | None, lead: tuple[int, ...], ignore_index: int, ahead: int
) -> tuple[Tensor, Tensor | None]:
    """Labels and weights (N,) of tokens of shape `lead`, at the rows that predict these tokens."""
    if not ahead or not rows.numel():
        return rows, row_weight
    moved = shifted(rows, lead[-1], ignore_index, ahead)
    return moved, None if row_weight is None else row_weight.roll(-ahead)


def refuse_shift_of_selection(name: str, shift: bool | int) -> None:
    """Raise ValueError for a shift together with a Selection: nothing is shifted twice."""
    if tokens_ahead(name, shift, 1):
        raise ValueError(
            f"{name}: shift={shift} together with a Selection, which has been shifted or not by "
            "its constructor; pass shift to Selection.from_labels instead"
        )


def check_selection(
    name: str,
    input: Tensor,  # noqa: A002
    selection: Selection,
    token_weight: Tensor | None,
    recipe: Recipe,
    last: str,
) -> None:
    """Refuse a Selection beside what it has decided, of another size, or on another device."""
    if token_weight is not None:
        raise ValueError(
            f"{name}: a Selection carries its own weights; pass token_weight to "
            "Selection.from_labels instead"
        )
    if recipe.ignore_index != IGNORE:
        raise ValueError(
            f"{name}: ignore_index = {recipe.ignore_index} together with a Selection, which has "
            "decided what is ignored; pass ignore_index to Selection.from_labels instead"
        )
    N = selection.num_tokens
    if input.dim() < 2 or torch.Size(input.shape[:-1]).numel() != N:
        raise ValueError(
            f"{name}: input is {tuple(input.shape)} and the Selection has shape {selection.shape}; "
            f"expected (N, {last}) or (..., {last}) whose leading dimensions flatten to N = {N}"
        )
    if len(input.shape[:-1]) == len(selection.shape) and input.shape[:-1] != selection.shape:
        raise ValueError(
            f"{name}: input is {tuple(input.shape)} and the Selection has shape {selection.shape}, "
            "the same number of tokens in another order; is input transposed?"
        )
    if selection.device != input.device:
        raise ValueError(
            f"{name}: input is on {input.device} and the Selection on {selection.device}; move it "
            "with selection.to(input.device)"
        )


def _from_selection(
    name: str,
    input: Tensor,  # noqa: A002
    selection: Selection,
    weight: Tensor | None,
    token_weight: Tensor | None,
    recipe: Recipe,
) -> Problem:
    check_selection(name, input, selection, token_weight, recipe, "V")
    dense_weight = selection.dense_weight
    if dense_weight is not None:
        dense_weight = cast(dense_weight, accumulation_dtype(input.dtype))
    return Problem(
        input=input,
        target=selection.dense_target,
        shape=selection.shape,
        recipe=recipe,
        weight=class_weight(name, weight, input, input.shape[-1]),
        token_weight=dense_weight,
        boundaries=selection.boundaries,
        num_sequences=selection.num_sequences,
        is_part=selection.is_part,
    )


def check_input_and_target(
    name: str,
    input: Tensor,  # noqa: A002
    target: Tensor | Selection,
) -> None:
    """Refuse what is no tensor, dtypes without a loss, and a target on another device."""
    check_tensor(name, "input", input)
    if not isinstance(target, (Tensor, Selection)):
        raise TypeError(
            f"{name}: target is a {type(target).__name__}; expected a torch.Tensor or sgp.Selection"
        )
    if isinstance(target, Tensor):
        check_tensor(name, "target", target)
    if input.dtype not in FLOATS:
        raise TypeError(
            f"{name}: input is {input.dtype}; expected float32, float64, bfloat16 or float16 logits"
        )
    if input.dim() == 0:
        raise ValueError(f"{name}: input has no dimensions; expected (V,), (N, V) or (N, V, ...)")
    if isinstance(target, Tensor) and target.device != input.device:
        raise ValueError(
            f"{name}: input is on {input.device} and target on {target.device}; move one"
        )


def check_tensor(name: str, label: str, value: object) -> None:
    """Raise TypeError for what is no tensor, or a sparse one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: {label} is a {type(value).__name__}; expected a torch.Tensor")
    if value.layout != torch.strided:
        raise TypeError(
            f"{name}: {label} has the layout {value.layout}; expected a dense tensor: pass "
            f"{label}.to_dense()"
        )


def check_flags(name: str, **flags: object) -> None:
    """Raise TypeError for what is neither True nor False."""
    for label, value in flags.items():
        if type(value).__name__ not in ("bool", "bool_"):  # NumPy's, too
            raise TypeError(f"{name}: {label} = {shown(value)}; expected True or False")


def check_constant(name: str, label: str, value: Tensor, input: Tensor) -> None:  # noqa: A002
    """Refuse weights that require grad, are elsewhere, or are no real numbers."""
    if value.requires_grad:
        raise ValueError(f"{name}: {label} requires grad; it is a constant, detach it")
    if value.device != input.device:
        raise ValueError(f"{name}: input is on {input.device} and {label} on {value.device}")
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name}: {label} is {value.dtype}; expected real numbers")


def class_weight(
    name: str,
    weight: Tensor | None,
    input: Tensor,  # noqa: A002
    V: int,
) -> Tensor | None:
    """Class weights (V,) in the accumulation dtype."""
    if weight is None:
        return None
    check_tensor(name, "weight", weight)
    if tuple(weight.shape) != (V,):
        raise ValueError(
            f"{name}: weight is {tuple(weight.shape)}; expected ({V},), one a class of input "
            "(token_weight is the one per token)"
        )
    check_constant(name, "weight", weight, input)
    return cast(weight, accumulation_dtype(input.dtype)).contiguous()


def flat_token_weight(
    name: str,
    token_weight: Tensor | None,
    input: Tensor,  # noqa: A002
    shape: tuple[int, ...],
) -> Tensor | None:
    """Token weights of the target's shape as (N,) in the accumulation dtype."""
    if token_weight is None:
        return None
    check_tensor(name, "token_weight", token_weight)
    if tuple(token_weight.shape) != shape:
        raise ValueError(
            f"{name}: token_weight is {tuple(token_weight.shape)}; expected {shape}, one a token"
        )
    check_constant(name, "token_weight", token_weight, input)
    return token_weight.reshape(-1).to(accumulation_dtype(input.dtype)).contiguous()


def _shape_message(
    name: str,
    input: Tensor,  # noqa: A002
    target: Tensor,
    lead: tuple[int, ...],
    *,
    shift: bool,
) -> str:
    message = (
        f"{name}: input is {tuple(input.shape)} and target {tuple(target.shape)} "
        f"({target.dtype}); expected class indices of shape {lead} or probabilities of shape "
        f"{tuple(input.shape)}"
    )
    if target.shape == input.shape[:-1] and shift:
        message += (
            "; with the vocabulary last, pass input.movedim(-1, 1), which copies nothing, or an "
            "sgp.Selection"
        )
    elif target.shape == input.shape[:-1]:
        message += (
            "; with the vocabulary last, pass input.flatten(0, -2) and target.flatten(), or an "
            "sgp.Selection"
        )
    return message


def may_wait(tensor: Tensor) -> bool:
    """Whether values may be looked at: on a CPU, or where SGP_CHECK=1 asks for the wait."""
    if torch._C._functorch.is_batchedtensor(tensor):  # noqa: SLF001  (no public name)
        return False  # vmap has no single value to look at
    return tensor.device.type == "cpu" or os.environ.get("SGP_CHECK", "0") == "1"


def check_targets(name: str, target: Tensor, V: int, ignore_index: int) -> None:
    """Raise IndexError for a target (N,) outside the vocabulary, on a CPU or with SGP_CHECK=1.

    Elsewhere the check would wait for the device; the kernels make such a row's loss and gradient
    NaN instead.
    """
    if not may_wait(target):
        return
    bad = (target != ignore_index) & ((target < 0) | (target >= V))
    if bad.any():
        at = int(bad.nonzero()[0])
        raise IndexError(
            f"{name}: target[{at}] = {int(target[at])} is outside [0, {V}) and is not ignore_index "
            f"= {ignore_index} (position among the flattened rows; after a shift that of the row "
            "which predicts it); "
            + (
                "mark tokens without loss with ignore_index"
                if int(target[at]) < 0
                else "check the tokenizer's added tokens and the model's vocabulary size"
            )
        )


def check_mean_weights(name: str, kept: Tensor, token_weight: Tensor) -> None:
    """Raise ValueError for a mean over negative weights (N,), on a CPU or with SGP_CHECK=1."""
    if not may_wait(token_weight):
        return
    bad = kept & (token_weight < 0)
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"{name}: token_weight of row {at} is {float(token_weight[at])}; the mean over weights "
            "that can be negative has no stable divisor: pass denominator= or use reduction='sum'"
        )

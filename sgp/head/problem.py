"""From what a caller passes to a linear head's rows; the checks that only a head needs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sgp.head.chunks import check_sizes
from sgp.labels import tokens_ahead
from sgp.rows.problem import (
    INTEGERS,
    Problem,
    check_input_and_target,
    check_selection,
    check_tensor,
    class_weight,
    flat_indices,
    flat_token_weight,
    moved_ahead,
    refuse_shift_of_selection,
)
from sgp.rows.recipe import Recipe, accumulation_dtype
from sgp.rows.watched import is_traced
from sgp.selection import Selection


class Pieces(NamedTuple):
    """What a caller says about memory."""

    chunk_rows: int | None = None
    memory_budget: int | None = None
    accumulate_into: Tensor | None = None
    weight: Tensor | None = None  # whose gradient is added there, as it was passed

    def asked(self) -> tuple[object, ...]:
        """What has to be the same on every rank."""
        return self.chunk_rows, self.memory_budget, self.accumulate_into is not None

    def of_classes(self, count: int) -> Pieces:
        """For the first classes of a head, without the padding behind them."""
        into = self.accumulate_into
        return self if into is None else self._replace(accumulate_into=into[:count])

    def refuse(self, name: str) -> None:
        """Where whole logits are made, a budget would be broken and nothing added.

        Raises:
            ValueError: for either.
        """
        for label in ("memory_budget", "accumulate_into"):
            if getattr(self, label) is not None:
                raise ValueError(
                    f"{name}: {label} needs class indices and a linear_weight (V, D); class "
                    "probabilities and a linear_weight (V, d1, ..., D) make whole logits"
                )

    def check(self, name: str, linear_weight: Tensor) -> None:
        """Refuse what is no size, and a tensor that the weight's gradient cannot be added to.

        Raises:
            ValueError, TypeError: with what was passed.
            RuntimeError: for what records or changes operations on tensors.
        """
        check_sizes(name, self.chunk_rows, self.memory_budget)
        into, label = self.accumulate_into, "accumulate_into"
        if into is None:
            return
        check_tensor(name, label, into)
        expected = accumulation_dtype(linear_weight.dtype)
        if into.dtype != expected or into.shape != linear_weight.shape:
            raise ValueError(
                f"{name}: {label} is {tuple(into.shape)} {into.dtype} and linear_weight "
                f"{tuple(linear_weight.shape)} {linear_weight.dtype}; expected its shape in "
                f"{expected}"
            )
        if into.device != linear_weight.device:
            raise ValueError(
                f"{name}: {label} is on {into.device} and linear_weight on "
                f"{linear_weight.device}; move one"
            )
        if into.requires_grad or not into.is_contiguous():
            what = "requires grad" if into.requires_grad else "is not contiguous"
            raise ValueError(f"{name}: {label} {what}; pass a plain contiguous tensor to add to")
        if torch.is_grad_enabled():
            _check_weight_of(name, label, linear_weight)
            begins, ends = linear_weight.data_ptr(), linear_weight.data_ptr() + linear_weight.nbytes
            if into.data_ptr() < ends and begins < into.data_ptr() + into.nbytes:
                raise ValueError(f"{name}: {label} shares memory with linear_weight")


def _check_weight_of(name: str, label: str, weight: Tensor) -> None:
    """Refuse a weight whose gradient somebody else would look for."""
    if is_traced(weight):
        raise RuntimeError(
            f"{name}: {label} is written to in backward, which torch.compile, torch.func, "
            "dispatch modes and tensor subclasses such as DTensor would not see; leave it out"
        )
    if _is_inside_ddp():
        raise RuntimeError(
            f"{name}: {label} would not be reduced over the ranks by DistributedDataParallel, "
            "which only sees `.grad`; leave it out"
        )
    if not (weight.is_leaf and weight.requires_grad):
        why = "does not require grad" if weight.is_leaf else "is no leaf of the graph"
        raise ValueError(
            f"{name}: {label} adds up the gradient of linear_weight, which must be a leaf that "
            f"requires grad; this one {why}"
        )
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if getattr(weight, hooks, None):
            raise ValueError(
                f"{name}: linear_weight has hooks on its gradient, which {label} would keep "
                "from them; remove the hooks or leave it out"
            )


def _is_inside_ddp() -> bool:
    """Whether a module wrapped in DistributedDataParallel is in its forward."""
    wrapper = torch.nn.parallel.DistributedDataParallel
    return getattr(wrapper, "_active_ddp_module", None) is not None


def make_head_problem(
    name: str,
    input: Tensor,  # noqa: A002  (PyTorch's name)
    linear_weight: Tensor,
    target: Tensor | Selection,
    weight: Tensor | None,
    token_weight: Tensor | None,
    recipe: Recipe,
    *,
    shift: bool | int,
) -> Problem:
    """Rows of an input that `check_head` has passed; labels are shifted here, `input` never is.

    Raises:
        ValueError, TypeError: with what was passed, what was expected, and what to do.
    """
    recipe = recipe.check(name)
    if linear_weight.dim() != 2:
        raise ValueError(
            f"{name}: linear_weight is {tuple(linear_weight.shape)}; expected (V, D) = "
            f"(V, {input.shape[-1]})"
        )
    V = linear_weight.shape[0]
    weight = class_weight(name, weight, input, V)
    if isinstance(target, Selection):
        refuse_shift_of_selection(name, shift)
        check_selection(name, input, target, token_weight, recipe, "D")
        dense = target.dense_weight
        return Problem(
            input=input,
            target=target.dense_target,
            shape=target.shape,
            recipe=recipe,
            weight=weight,
            token_weight=None if dense is None else dense.to(accumulation_dtype(input.dtype)),
            boundaries=target.boundaries,
            num_sequences=target.num_sequences,
            is_part=target.is_part,
        )
    lead = tuple(input.shape[:-1])
    flat = (math.prod(lead),)
    shape = tuple(target.shape)
    if shape not in (lead, flat):
        raise ValueError(
            f"{name}: input is {tuple(input.shape)} and target {shape} ({target.dtype}); expected "
            f"class indices of shape {lead}" + (f" or {flat}" if flat != lead else "")
        )
    if target.dtype not in INTEGERS:
        raise TypeError(
            f"{name}: target is {target.dtype}; expected int64 class indices of shape {lead}"
        )
    rows = flat_indices(target)
    row_weight = flat_token_weight(name, token_weight, input, shape)
    ahead = tokens_ahead(name, shift, lead[-1] if lead else 0)
    if shift:
        if shape != lead or not lead:
            raise ValueError(
                f"{name}: shift={shift} needs a target of shape (T,) or (..., T) like input, "
                f"whose last dimension is time; input is {tuple(input.shape)} and target {shape}"
            )
        rows, row_weight = moved_ahead(rows, row_weight, lead, recipe.ignore_index, ahead)
    return Problem(
        input=input,
        target=rows,
        shape=shape,
        recipe=recipe,
        weight=weight,
        token_weight=row_weight,
        boundaries=None,
        num_sequences=math.prod(shape[:-1]),
    )


def check_head(
    name: str,
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor | Selection,
    *,
    part: bool = False,
) -> None:
    """Refuse a weight (V, d1, ..., D) or bias (V, d1, ...) that does not fit input (..., D).

    `part`: the weight holds some rows of a vocabulary, maybe none.

    Raises:
        ValueError, TypeError: with what was passed.
    """
    check_input_and_target(name, input, target)
    check_tensor(name, "linear_weight", linear_weight)
    given = [("linear_weight", linear_weight)]
    if linear_weight.dim() < 2 or linear_weight.shape[-1] != input.shape[-1]:
        raise ValueError(
            f"{name}: input is {tuple(input.shape)} and linear_weight "
            f"{tuple(linear_weight.shape)}; expected (..., D) and (V, D)"
        )
    if linear_weight.numel() == 0 and not (part and linear_weight.shape[-1]):
        raise ValueError(
            f"{name}: linear_weight is {tuple(linear_weight.shape)}; expected at least one class "
            "and one feature"
        )
    if linear_bias is not None:
        check_tensor(name, "linear_bias", linear_bias)
        given.append(("linear_bias", linear_bias))
        if linear_bias.shape != linear_weight.shape[:-1]:
            raise ValueError(
                f"{name}: linear_bias is {tuple(linear_bias.shape)}; expected "
                f"{tuple(linear_weight.shape[:-1])}, as linear_weight is "
                f"{tuple(linear_weight.shape)}"
            )
    for label, value in given:
        if value.device != input.device:
            raise ValueError(
                f"{name}: input is on {input.device} and {label} on {value.device}; move one"
            )
        if value.dtype != input.dtype and not (_is_cast(input) and _is_cast(value)):
            raise TypeError(
                f"{name}: input is {input.dtype} and {label} {value.dtype}; convert one, or use "
                "torch.autocast"
            )
        if not value.is_floating_point():
            raise TypeError(f"{name}: {label} is {value.dtype}; expected floating point")


def compute_dtype(input: Tensor) -> torch.dtype:  # noqa: A002
    """Of the matmuls' operands: the autocast dtype where autocast is on, as for F.linear."""
    return torch.get_autocast_dtype(input.device.type) if _is_cast(input) else input.dtype


def _is_cast(x: Tensor) -> bool:
    """Whether autocast is on and converts x; it leaves float64 alone."""
    return is_autocast(x) and x.dtype != torch.float64


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    device = x.device.type  # the usual ones first: torch.compile before 2.13 cannot ask
    known = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)

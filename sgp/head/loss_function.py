"""A loss function of the caller's: called chunk by chunk, checked, and differentiated.

It gets the statistics of some rows as leaves of a graph of its own, and gives one number for each
row, sequence or group. What autograd finds for the leaves goes to the rows' backward. Where its
numbers depend on other tensors that require grad, their graph is kept for the call's own backward.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import CellType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sgp.caller import warn
from sgp.head import mixing
from sgp.head.problem import is_autocast
from sgp.reference import LossFunction, TokenLogProbs
from sgp.rows.recipe import accumulation_dtype, shown
from sgp.rows.units import Piece, Units

Metrics = dict[str, Tensor]

# A function's code: the `by`, and the codes of functions in its closure, that it was checked with.
_seen: WeakKeyDictionary[Any, set[tuple[Any, ...]]] = WeakKeyDictionary()


class Caller:
    """Calls a loss function for the pieces of one call, and collects what it gives."""

    def __init__(
        self,
        name: str,
        function: LossFunction,
        units: Units,
        like: Tensor,
        row_weight: Tensor | None,
        *,
        trains: bool,
    ) -> None:
        """Of which call.

        Args:
            name: of the function that was called, for messages.
            function: the caller's.
            units: what it gives numbers for.
            like: hidden states (..., D), for device and dtypes.
            row_weight: (N,) of the rows' numbers.
            trains: whether the head needs gradients.
        """
        self.name, self.function, self.units = name, function, units
        self.row_weight, self.trains = row_weight, trains
        self.records = torch.is_grad_enabled()
        self.dtype, self.device = accumulation_dtype(like.dtype), like.device
        self.autocast: torch.dtype | None = None
        if is_autocast(like):
            self.autocast = torch.get_autocast_dtype(like.device.type)
        self.numbers: list[Tensor] = []  # of each piece; with a graph where others need it
        self.metrics: list[tuple[Tensor, Piece, Metrics]] = []
        self.returns_metrics = False

    def __call__(
        self, statistics: tuple[Tensor, Tensor, Tensor, Tensor], rows: Tensor, piece: Piece
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of the piece's loss with respect to log_prob, entropy and lse, or None."""
        *found, is_top1 = statistics
        leaves = [x.detach().requires_grad_(self.trains) for x in found]
        tokens = TokenLogProbs(leaves[0], leaves[1], leaves[2], is_top1)
        # Hooks of a checkpoint around this call would run all of it again.
        with torch.set_grad_enabled(self.records), saved_tensors_hooks(_itself, _itself):
            numbers, metrics = self.checked(tokens, rows, piece)
            if metrics is not None:
                self._keep(metrics, rows, piece)
            self._check_mixing(tokens, rows, piece, numbers)
            if self.row_weight is not None:
                numbers = numbers * self.row_weight.index_select(0, rows)
            if not self.trains or not rows.numel():
                self.numbers.append(numbers)
                return None, None, None
            has_others = reaches_others(numbers, leaves)
            gradients = self._gradients(numbers, leaves, retain=has_others)
            self.numbers.append(numbers if has_others else numbers.detach())
        return gradients

    def _gradients(
        self, numbers: Tensor, leaves: list[Tensor], *, retain: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        found: tuple[Tensor | None, ...] = (None, None, None)
        if numbers.requires_grad:
            found = torch.autograd.grad(
                numbers.sum(), leaves, allow_unused=True, retain_graph=retain
            )
        if all(x is None for x in found):
            raise ValueError(
                f"{self.name}: the numbers of loss_fn have no gradient for tokens.log_prob, "
                "tokens.entropy or tokens.lse; were they detached, or computed under "
                "torch.no_grad? Where only the value is wanted, call the function itself under "
                "torch.no_grad"
            )
        return found[0], found[1], found[2]

    def checked(
        self, tokens: TokenLogProbs, rows: Tensor, piece: Piece
    ) -> tuple[Tensor, Metrics | None]:
        """What the function returns of some rows: its numbers, one a unit, and its metrics.

        Numbers of all sequences or groups are zero where these rows are not theirs.
        """
        with self._autocast():
            returned = self.function(tokens, rows)
        metrics = None
        if isinstance(returned, tuple):
            if len(returned) != 2 or not isinstance(returned[1], dict):
                kinds = ", ".join(type(x).__name__ for x in returned)
                raise TypeError(
                    f"{self.name}: loss_fn returned ({kinds}); expected numbers, or (numbers, "
                    "metrics) with a dict of tensors"
                )
            returned, metrics = returned
        numbers = self._checked(returned, "", piece)
        if not numbers.is_floating_point() or numbers.dtype.itemsize < 4:
            raise TypeError(
                f"{self.name}: loss_fn returned numbers of {numbers.dtype}; expected float32 or "
                "float64, as tokens.log_prob is"
            )
        numbers = numbers.to(self.dtype)
        if metrics is not None:
            for key, value in metrics.items():
                if not isinstance(key, str):
                    raise TypeError(f"{self.name}: loss_fn returned a metric named {key!r}")
                self._checked(value, f" for metrics[{key!r}]", piece)
        if self.units.present is not None and len(numbers) == self.units.number:
            numbers = torch.where(self.units.mask(piece.units), numbers, 0)
        return numbers, metrics

    def _checked(self, value: Any, where: str, piece: Piece) -> Tensor:
        """A tensor of one number a unit."""
        by, m = self.units.by, piece.rows.stop - piece.rows.start
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{self.name}: loss_fn returned {shown(value)}{where}; expected a tensor with one "
                f"number a {by}"
            )
        count = self.units.count(piece.units)
        if tuple(value.shape) not in ((count,), (self.units.number if by != "row" else count,)):
            expected = f"({count},), one number a {by}"
            if by != "row":
                expected += (
                    f" with rows in this call, or ({self.units.number},), one for every {by}"
                )
            raise ValueError(
                f"{self.name}: loss_fn returned {tuple(value.shape)}{where} for {m} rows; expected "
                f"{expected}: the loss is the sum of the numbers"
            )
        if value.device != self.device:
            raise ValueError(
                f"{self.name}: loss_fn returned a tensor on {value.device}{where}; expected "
                f"{self.device}, where input is"
            )
        return value

    def _autocast(self) -> AbstractContextManager[object]:
        """The caller's own, which is off around the chunks."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def _check_mixing(
        self, tokens: TokenLogProbs, rows: Tensor, piece: Piece, numbers: Tensor
    ) -> None:
        """Find numbers that depend on other units' values, once for each function."""
        if self.units.count(piece.units) < 2:
            return
        code, *inner = _codes(self.function)
        checked, mark = _seen.setdefault(code, set()), (self.units.by, *inner)
        if mark in checked and os.environ.get("SGP_CHECK", "0") != "1":
            return
        still = TokenLogProbs(*(x.detach() for x in tokens if x is not None))
        told = mixing.look(self.checked, self.units, still, rows, piece, numbers.detach())
        if told == mixing.RANDOM:
            warn(
                f"{self.name}: loss_fn returned other numbers when it was called again with the "
                "same rows, so it cannot be checked that rows do not mix"
            )
        elif told:
            raise ValueError(f"{self.name}: {told}")
        checked.add(mark)

    def _keep(self, metrics: Metrics, rows: Tensor, piece: Piece) -> None:
        if self.metrics and self.metrics[0][2].keys() != metrics.keys():
            raise ValueError(
                f"{self.name}: loss_fn returned the metrics {list(metrics)}, and "
                f"{list(self.metrics[0][2])} in another call; expected the same for all rows"
            )
        self.returns_metrics = True
        self.metrics.append((rows, piece, {key: x.detach() for key, x in metrics.items()}))

    def joined_metrics(self, shape: tuple[int, ...]) -> Metrics:
        """Those of all pieces: of rows in `shape`, zero where ignored; else one a unit."""
        found: Metrics = {}
        size = torch.Size(shape).numel() if self.units.present is None else self.units.number
        for rows, piece, metrics in self.metrics:
            for key, x in metrics.items():
                whole = found.setdefault(key, x.new_zeros(size))
                if self.units.present is None:
                    whole.index_copy_(0, rows, x)
                elif x.numel():
                    mask = self.units.mask(piece.units)
                    if len(x) != size:  # one of each that is present, in order
                        x = x[(mask.cumsum(0) - 1).clamp(min=0)]  # noqa: PLW2901
                    found[key] = torch.where(mask, x, whole)
        if self.units.present is None:
            return {key: x.view(shape) for key, x in found.items()}
        return found


def _itself(x: Tensor) -> Tensor:
    return x


def _codes(function: Callable[..., Any]) -> list[Any]:
    """What two closures of one function share: its code, and that of functions in its closure.

    Of another callable, the code of its class, or the class itself.
    """
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    if isinstance(function, nn.Module):
        function = type(function).forward
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None:
        code = getattr(type(function).__call__, "__code__", None)
    inner = (_content(cell) for cell in getattr(function, "__closure__", None) or ())
    own = type(function) if code is None else code
    return [own, *(x.__code__ for x in inner if inspect.isfunction(x))]


def _content(cell: CellType) -> Any:
    """Of a closure's cell; None where nothing is in it yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def reaches_others(numbers: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Whether a tensor that requires grad, and is none of these leaves, went into the numbers."""
    seen: set[Any] = set()
    waiting: list[Any] = [numbers.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            if all(leaf is not x for x in leaves):
                return True
            continue
        waiting.extend(following for following, _ in node.next_functions)
    return False

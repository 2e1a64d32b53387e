"""A loss function of the caller's: called chunk by chunk, checked, and differentiated.

It gets the statistics of some rows as leaves of a graph of its own, and gives one number for each
row, sequence or group. What autograd finds for the leaves goes to the rows' backward. Where its
numbers depend on other tensors that require grad, their graph is kept for the call's own backward.
"""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import CellType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sgp.caller import warn
from sgp.head.mixing import FailedOnPartError, find_mixing, reaches_others
from sgp.head.problem import is_autocast
from sgp.reference import LossFunction, TokenLogProbs
from sgp.rows.recipe import accumulation_dtype
from sgp.rows.units import Piece, Units

Metrics = dict[str, Tensor]

MOST_CHECKS = 8  # of one code: with strings that change, or batches whose numbers are all 0

# The first of a function's fingerprint: with which `by` and which rest it was checked.
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
        self.size = like.shape[:-1].numel()
        self.autocast: torch.dtype | None = None
        if is_autocast(like):
            self.autocast = torch.get_autocast_dtype(like.device.type)
        self.sums: list[Tensor] = []  # () of each piece; with a graph where others need it
        self.has_rows = self.has_gradient = False  # of the statistics, in any piece
        self.is_checked = False  # for numbers that mix
        self.before: tuple[Sequence[Tensor], Tensor, Piece] | None = None
        self.is_first = True
        self.metrics: Metrics | None = None  # of all rows (N,), sequences or groups

    def __call__(
        self, statistics: tuple[Tensor, Tensor, Tensor, Tensor], rows: Tensor, piece: Piece
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of the piece's loss with respect to log_prob, entropy and lse, or None."""
        # Hooks of a checkpoint around this call would run all of it again.
        with torch.set_grad_enabled(self.records), saved_tensors_hooks(_packed, _unpacked):
            numbers, metrics, leaves = self.run(statistics, rows, piece)
            self._keep(metrics, rows, piece)
            self._check_mixing(statistics, rows, piece)
            if self.units.present is not None and len(numbers) == self.units.number:
                numbers = torch.where(self.units.mask(piece.units), numbers, 0)
            if self.row_weight is not None:
                numbers = numbers * self.row_weight.index_select(0, rows)
            total = numbers.sum()
            has_others = reaches_others(total, leaves)
            gradients = self._gradients(total, leaves, retain=has_others)
            self.sums.append(total if has_others else total.detach())
        self.has_rows |= rows.numel() > 0
        return gradients

    def run(
        self, statistics: Sequence[Tensor], rows: Tensor, piece: Piece
    ) -> tuple[Tensor, Metrics | None, list[Tensor]]:
        """What the function gives for some rows, checked, and the leaves of its graph.

        It gets copies: what it does to them in place is not the head's, nor the Selection's.
        """
        *found, is_top1 = (x.detach().clone() for x in statistics)
        leaves = [x.requires_grad_(self.trains) for x in found]
        tokens = TokenLogProbs(leaves[0], leaves[1], leaves[2], is_top1)
        try:
            with self._autocast():
                returned = self.function(tokens, rows.clone())
        except (IndexError, RuntimeError) as error:
            if hasattr(error, "add_note"):  # from Python 3.11 on
                error.add_note(
                    f"{self.name} called loss_fn with {len(rows)} rows, positions among the "
                    "flattened labels: take the values of your own tensors with [rows], and those "
                    "of each sequence with [selection.sequence_of(rows)]"
                )
            raise
        return *self._checked(returned, piece), leaves

    def _gradients(
        self, total: Tensor, leaves: list[Tensor], *, retain: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if not (self.trains and total.requires_grad):
            return None, None, None
        log_prob, entropy, lse = torch.autograd.grad(
            total, leaves, allow_unused=True, retain_graph=retain
        )
        if not all(x is None for x in (log_prob, entropy, lse)):
            self.has_gradient = True
        return log_prob, entropy, lse

    def check_gradient(self) -> None:
        """Raise ValueError where the head needs a gradient and no number had one."""
        if self.trains and self.has_rows and not self.has_gradient:
            raise ValueError(
                f"{self.name}: the numbers of loss_fn have no gradient for tokens.log_prob, "
                "tokens.entropy or tokens.lse; were they detached, or computed under "
                "torch.no_grad? Where only the value is wanted, call the function itself under "
                "torch.no_grad"
            )

    def _checked(self, returned: Any, piece: Piece) -> tuple[Tensor, Metrics | None]:
        """Numbers and metrics, from what the function returned."""
        metrics = None
        if isinstance(returned, tuple):
            if len(returned) != 2 or not isinstance(returned[1], dict):
                kinds = ", ".join(type(x).__name__ for x in returned)
                raise TypeError(
                    f"{self.name}: loss_fn returned ({kinds}); expected numbers, or (numbers, "
                    "metrics) with a dict of tensors"
                )
            returned, metrics = returned
        numbers = self._check_tensor(returned, "", piece)
        if not numbers.is_floating_point() or numbers.dtype.itemsize < 4:
            raise TypeError(
                f"{self.name}: loss_fn returned numbers of {numbers.dtype}; expected float32 or "
                "float64, as tokens.log_prob is"
                + (": convert them with .float()" if numbers.is_floating_point() else "")
            )
        for key, value in (metrics or {}).items():
            if not isinstance(key, str):
                raise TypeError(f"{self.name}: loss_fn returned a metric named {key!r}")
            self._check_tensor(value, f" for metrics[{key!r}]", piece)
        return numbers.to(self.dtype), metrics

    def _check_tensor(self, value: Any, where: str, piece: Piece) -> Tensor:
        """A tensor of one number a unit, or of one for every sequence or group."""
        by, m = self.units.by, piece.rows.stop - piece.rows.start
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            what = f"a {type(value).__name__}"
            what = f"a tensor of layout {value.layout}" if isinstance(value, Tensor) else what
            raise TypeError(
                f"{self.name}: loss_fn returned {what}{where}; expected a dense tensor with one "
                f"number a {by}"
            )
        count = self.units.count(piece.units)
        every = count if by == "row" else self.units.number
        if tuple(value.shape) not in ((count,), (every,)):
            expected = f"({count},), one number a {by}"
            if every != count:
                expected += f" with rows in this call, or ({every},), one for every {by}"
            raise ValueError(
                f"{self.name}: loss_fn returned {tuple(value.shape)}{where} for {m} rows; expected "
                f"{expected}"
                + ("" if where else "; they are summed for you, so divide each by the total first")
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

    def _check_mixing(self, statistics: Sequence[Tensor], rows: Tensor, piece: Piece) -> None:
        """Find numbers that depend on other units' values, once for each function."""
        asked = os.environ.get("SGP_CHECK")
        if self.is_checked or not rows.numel() or asked == "0":
            return
        if self.before is not None:  # a piece of one unit, which has nothing to mix with
            earlier, at, part = self.before
            statistics = [torch.cat(pair) for pair in zip(earlier, statistics, strict=True)]
            rows = torch.cat([at, rows])
            piece = Piece(*(slice(a.start, b.stop) for a, b in zip(part, piece, strict=True)))
        elif self.units.count(piece.units) == 1:
            self.before = (statistics, rows, piece)
            return
        self.is_checked, self.before = True, None
        code, *others = _fingerprint(self.function)
        checked, mark = _seen.setdefault(code, set()), (self.units.by, *others)
        is_known = mark in checked or len(checked) >= MOST_CHECKS
        if is_known and asked != "1":
            return
        devices = [rows.device] if rows.is_cuda else []
        try:
            with torch.random.fork_rng(devices), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of one row, say, that has no deviation
                found = find_mixing(self.run, self.units, statistics, rows, piece)
        except FailedOnPartError as error:
            text = str(error).replace(f"{self.name}: ", "")  # of its own, inside
            raise ValueError(f"{self.name}: {text}") from error
        if found.fault:
            raise ValueError(f"{self.name}: {found.fault} (SGP_CHECK=0 leaves this check out)")
        if found.unknown:
            warn(
                f"{self.name}: it cannot be checked that loss_fn keeps {self.units.by}s apart: "
                f"{found.unknown}"
            )
        checked.add(mark if found.is_final else (*mark, len(checked)))

    def _keep(self, metrics: Metrics | None, rows: Tensor, piece: Piece) -> None:
        """Put a piece's metrics into those of all rows (N,), sequences or groups."""
        names = None if metrics is None else [*metrics]
        if self.is_first:
            self.is_first = False
            size = self.size if self.units.present is None else self.units.number
            if metrics is not None:
                self.metrics = {key: x.detach().new_zeros(size) for key, x in metrics.items()}
        expected = None if self.metrics is None else [*self.metrics]
        if names != expected:
            raise ValueError(
                f"{self.name}: loss_fn returned the metrics {names}, and {expected} in another "
                "call; expected the same for all rows"
            )
        for key, whole in (self.metrics or {}).items():
            x = (metrics or {})[key].detach()
            if x.dtype != whole.dtype:
                raise TypeError(
                    f"{self.name}: loss_fn returned metrics[{key!r}] of {x.dtype}, and of "
                    f"{whole.dtype} in another call"
                )
            if self.units.present is None:
                whole.index_copy_(0, rows, x)
            elif x.numel():
                mask = self.units.mask(piece.units)
                if len(x) != len(whole):  # one of each that is present, in order
                    x = x[(mask.cumsum(0) - 1).clamp(min=0)]
                whole.copy_(torch.where(mask, x, whole))


def _packed(x: Tensor) -> tuple[Tensor, int | None]:
    """What a graph keeps, and its version; an output itself would keep its graph, and so itself."""
    return x.detach(), None if x.is_inference() else x._version  # noqa: SLF001  (no public name)


def _unpacked(packed: tuple[Tensor, int | None]) -> Tensor:
    x, version = packed
    if version is not None and x._version != version:  # noqa: SLF001
        raise RuntimeError(
            f"sgp.linear_loss: a tensor {tuple(x.shape)} of {x.dtype} that loss_fn needs for its "
            "gradient was changed in place afterwards"
        )
    return x


def _fingerprint(function: Callable[..., Any]) -> list[Any]:
    """What two closures of one function share, first the code that is called.

    Then the code of functions that they reach (by closures, defaults, partial arguments and
    attributes of a bound object), and their flags: strings and booleans among these. Of another
    callable, its class stands for its code.
    """
    found: list[Any] = []
    seen: set[int] = set()
    waiting: list[Any] = [function]
    while waiting:
        x = waiting.pop(0)
        if isinstance(x, (str, bool)):
            found.append(x)
        elif id(x) in seen:
            continue
        elif inspect.isfunction(x):
            cells = (_content(cell) for cell in x.__closure__ or ())
            waiting += [*cells, *(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()]
            found.append(x.__code__)
            function = getattr(x, "__wrapped__", x) if x is function else function
        elif isinstance(x, functools.partial):
            waiting += [x.func, *x.args, *x.keywords.values()]
            function = x.func if x is function else function
        elif inspect.ismethod(x):
            waiting += [x.__func__, *getattr(x.__self__, "__dict__", {}).values()]
        elif callable(x) and not isinstance(x, type):  # torch.compile's has what it compiles
            found.append(type(x))
            if x is function:
                function = getattr(x, "_orig_mod", function)
                waiting += [function, *getattr(x, "__dict__", {}).values()]
        seen.add(id(x))
    return found if found and not isinstance(found[0], (str, bool)) else [type(function), *found]


def _content(cell: CellType) -> Any:
    """Of a closure's cell; None where nothing is in it yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None

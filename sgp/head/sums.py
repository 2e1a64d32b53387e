"""The gradients of a linear head, summed over the pieces of a plan."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sgp.head import chunks, products
from sgp.head.calls import Gradients, Head, gradient_dtypes, new
from sgp.head.chunks import Plan
from sgp.head.half import Factors
from sgp.rows.recipe import cast


class Sums:
    """The gradients of a head, summed over pieces."""

    def __init__(self, head: Head, plan: Plan, factors: Factors | None) -> None:
        self.head, self.factors = head, factors
        self.dtypes = gradient_dtypes(head, head.call)
        needs, exact = head.call.needs, head.sums_dtype
        pieces = len(chunks.parts(head.rows.numel(), plan.group))
        # What one matmul makes is rounded at once.
        self.of_weight = exact if plan.way == "rows" and pieces > 1 else self.dtypes[1]
        # Where float16 has its factor later, it is multiplied into the whole sum. A loss of the
        # caller's gives each chunk another one.
        self.is_later = self.of_weight == exact and head.into is None and factors is not None
        self.d_input: Tensor | None = None
        self.d_weight: Tensor | None = None
        self.d_bias = new(head.bias, needs.bias, exact, zero=True, padding=head.padding)
        self.pending: Callable[[], None] | None = None

    def weighted(self, part: slice, hidden: Tensor) -> Tensor:
        """Hidden states of some kept rows as the weight's gradient takes them."""
        if self.factors is None:
            return hidden
        return hidden * self.factors.of_hidden[part, None].to(hidden.dtype)  # powers of two

    def add_input(self, part: slice, g: Tensor, weight: Tensor) -> None:
        """The input's gradient of some kept rows, from that of their logits (m, V)."""
        if self.head.call.needs.input:
            self._finish_pending()  # or two of them would be held
            values = products.input_gradient(g, weight, self.head.sums_dtype)
            self.put_input(part, values)

    def put_input(self, part: slice, values: Tensor) -> None:
        """Rows of the input's gradient, complete but for what other ranks have of them."""
        if self.factors is not None:
            values.mul_(self.factors.rest[part, None])
        summing = self.head.operations.start_sum(values)
        if summing is None:
            self._put(part, values)
            return

        def finish() -> None:
            self.head.operations.finish_sum(summing)
            self._put(part, values)

        self.pending = finish  # the sum goes on beside the next matmuls

    def _finish_pending(self) -> None:
        if self.pending is not None:
            self.pending()
            self.pending = None

    def _put(self, part: slice, values: Tensor) -> None:
        whole = self._start_input(zero=not self.head.is_whole).view(-1, values.shape[1])
        if self.head.is_whole:
            whole[part] = values
        else:
            whole.index_copy_(0, self.head.rows[part], cast(values, whole.dtype))

    def _start_input(self, *, zero: bool) -> Tensor:
        """The input's gradient, in which ignored rows are zero."""
        if self.d_input is None:
            self.d_input = new(self.head.input, True, self.dtypes[0], zero=zero)
        assert self.d_input is not None, "it is needed"  # noqa: S101
        return self.d_input

    def start_weight(self, *, zero: bool = False) -> bool:
        """See to a place for the weight's gradient; whether nothing is in it yet."""
        if self.d_weight is not None:
            return False
        into, needed = self.head.into, self.head.call.needs.weight
        self.d_weight = into
        if into is None:
            padding = self.head.padding if self.of_weight == self.dtypes[1] else 0
            self.d_weight = new(
                self.head.weight, needed, self.of_weight, zero=zero, padding=padding
            )
        return into is None

    def add_weight(self, part: slice, g: Tensor, hidden: Tensor) -> None:
        """The gradients of weight and bias of some kept rows, from that of their logits."""
        first = self.start_weight()
        self.add_columns(slice(None), part, g, self.weighted(part, hidden), first=first)

    def add_columns(
        self, columns: slice, part: slice, g: Tensor, weighted: Tensor, *, first: bool
    ) -> None:
        """Those of some columns; `first`: nothing is in their place yet."""
        f, V = self.factors, len(self.head.weight)
        factor = None if f is None or self.is_later else f.missing
        if self.d_weight is not None:
            place = self.d_weight[:V][columns]
            products.add_weight_gradient(g, weighted, place, first=first, factor=factor)
        if self.d_bias is None:
            return
        if f is None:
            products.add_bias_gradient(g, self.d_bias[:V][columns])
        else:
            share = f.of_hidden[part, None].to(weighted.dtype)
            place = self.d_bias[:V][columns, None]
            products.add_weight_gradient(g, share, place, first=False, factor=factor)

    def finish(self) -> Gradients:
        """The sums in the dtypes that were promised."""
        self._finish_pending()
        self.start_weight(zero=True)  # of no rows
        if self.head.call.needs.input:
            self._start_input(zero=True)
        d_weight, d_bias = self.d_weight, self.d_bias
        if self.factors is not None and self.is_later:
            for x in (d_weight, d_bias):
                if x is not None:
                    x.mul_(self.factors.missing)
        if self.head.into is not None:
            d_weight = None
        of_weight, of_bias = self.dtypes[1:]
        return Gradients(
            self.d_input,
            None if d_weight is None else self._padded(d_weight, of_weight),
            None if d_bias is None else cast(d_bias, of_bias),
        )

    def _padded(self, d_weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight's gradient in this dtype, with that of its padding."""
        if not self.head.padding or d_weight.dtype == dtype:
            return cast(d_weight, dtype)
        found = new(self.head.weight, True, dtype, padding=self.head.padding)
        assert found is not None, "it is needed"  # noqa: S101
        found[: len(d_weight)] = d_weight
        return found

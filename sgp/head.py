"""A linear head and its loss on the kept rows alone, some rows at a time.

For each chunk of kept rows: gather, matmul to float32 logits, row operation, and for a gradient
two matmuls more. Logits and their gradient share one buffer; nothing of size N x V exists, and
with several chunks nothing of size M x V. The row operations are those of the logits form; where
they run as kernels the gradient is written in the matmul's dtype into the first half of each row.

float16: the gradient of a chunk's logits is made as if every row's factor (token weight,
1 / divisor, upstream) were 4096, far from overflow and underflow, and the factors multiply in
float32 afterwards. With 1 / N folded in first, half of the off-target mass is flushed to zero at
N = 32k; with 1, what has a probability below 6e-8 is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sgp import backend, chunks, products
from sgp.operators import implementation
from sgp.recipe import Recipe, accumulation_dtype
from sgp.row_torch import RowOutputs, Upstream, new_outputs, row_index


HALF_RANGE = 4096.0  # sixteen times below float16's largest number


class Needs(NamedTuple):
    """Which gradients are wanted; what is not wanted is not computed."""

    input: bool
    weight: bool
    bias: bool


class Head(NamedTuple):
    """Hidden states, the linear map to logits, and which rows are kept."""

    input: Tensor  # (..., D), any strides
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    target: Tensor  # (N,) int64
    rows: Tensor  # (M,) int64: the kept rows
    class_weight: Tensor | None  # (V,)
    recipe: Recipe
    compute_dtype: torch.dtype  # of the matmuls' operands
    chunk_rows: int

    @property
    def parts(self) -> list[slice]:
        """The chunks of the M kept rows."""
        return chunks.split(self.rows.numel(), self.chunk_rows)

    @property
    def is_half_range(self) -> bool:
        """Whether the operands are float16, in which row factors must not be folded."""
        return self.compute_dtype == torch.float16


class Gradients(NamedTuple):
    """Gradients of a head; empty where not wanted."""

    input: Tensor  # of input's shape
    weight: Tensor  # (V, D)
    bias: Tensor  # (V,)


def gradient_dtypes(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None,
    *,
    wide: bool,
) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Those of what the gradients belong to; `wide`: float32."""
    if wide:
        return (torch.float32,) * 3
    return input.dtype, weight.dtype, input.dtype if bias is None else bias.dtype


def new_gradients(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None,
    needs: Needs,
    *,
    wide: bool,
) -> Gradients:
    """Uninitialised gradients, for tracing."""
    of_input, of_weight, of_bias = gradient_dtypes(input, weight, bias, wide=wide)
    return Gradients(
        _new(input, needs.input, of_input, input),
        _new(weight, needs.weight, of_weight, input),
        _new(bias, needs.bias, of_bias, input),
    )


def _new(x: Tensor | None, needed: bool, dtype: torch.dtype, like: Tensor) -> Tensor:
    """A contiguous tensor of x's shape, or an empty one where it is not needed."""
    shape = x.shape if needed and x is not None else (0,)
    return like.new_empty(shape, dtype=dtype)


def forward(
    head: Head,
    row_weight: Tensor | None,
    scale: Tensor | None,
    needs: Needs,
    *,
    wide: bool,
    need_saved: bool,
    need_stats: bool,
) -> tuple[RowOutputs, Gradients]:
    """Loss, saved and reported statistics of every row (N,), and the gradients of the head.

    Args:
        head: what is multiplied with what.
        row_weight: (N,) weights; they multiply loss and gradient.
        scale: () multiplies the gradients only.
        needs: which gradients are wanted.
        wide: gradients in float32 although the operands are float16.
        need_saved, need_stats: which row outputs are wanted.
    """
    zero = new_outputs(
        head.input, head.target.numel(), need_grad=False, need_saved=need_saved,
        need_stats=need_stats,
    )  # fmt: skip
    out = RowOutputs(*(values.zero_() for values in zero))
    separate = _all_factors(head, row_weight, scale) if head.is_half_range and any(needs) else None
    sums = _Sums(head, needs, separate, wide=wide)
    for chunk in _chunks(head):
        some, logits = chunk.rows, chunk.logits
        m = some.numel()
        here = new_outputs(logits, m, need_grad=False, need_saved=need_saved, need_stats=need_stats)
        g = _place_of_gradient(head, logits) if any(needs) else None
        weights = None if row_weight is None else row_weight[some]
        factors = (weights, scale) if separate is None else (None, _half_scale(head))
        implementation(logits).forward(
            logits, g, head.target[some], head.class_weight, *factors, head.recipe, here,
            scratch=True,
        )  # fmt: skip
        if separate is not None and weights is not None:
            here.loss.mul_(weights)
        for whole, values in zip(out[:-1], here[:-1], strict=True):
            if whole.numel():
                whole.index_copy_(0, some, values)
        if g is not None:
            sums.add(chunk, g)
    return out, sums.finish()


def backward(
    head: Head,
    saved: Tensor,
    row_weight: Tensor | None,
    upstream: Upstream,
    needs: Needs,
) -> Gradients:
    """The gradients of the head where the upstream gradient is one number a row.

    Args:
        head: as in forward; its logits are computed again.
        saved: (N, 3) of forward.
        row_weight: (N,) row weight times upstream gradient of the loss (of -log_prob).
        upstream: those of the statistics.
        needs: which gradients are wanted.
    """
    separate = None
    if head.is_half_range:
        separate, row_weight, upstream = _separate(head, row_weight, upstream)
    sums = _Sums(head, needs, separate, wide=False)
    for chunk in _chunks(head):
        some, logits = chunk.rows, chunk.logits
        g = _place_of_gradient(head, logits)
        implementation(logits).backward(
            logits,
            g,
            head.target[some],
            saved[some],
            head.class_weight,
            None if row_weight is None else row_weight[some],
            head.recipe,
            Upstream(*(None if values is None else values[some] for values in upstream)),
        )
        sums.add(chunk, g)
    return sums.finish()


class _Chunk(NamedTuple):
    """Some kept rows."""

    part: slice  # of the M kept rows
    rows: Tensor  # (m,) int64: their numbers among all N
    hidden: Tensor  # (m, D) in the compute dtype
    weight: Tensor  # (V, D) in the compute dtype
    logits: Tensor  # (m, V) float32 or float64


def _chunks(head: Head) -> Iterator[_Chunk]:
    """Every chunk with its logits, which share one buffer."""
    V = head.weight.shape[0]
    parts = head.parts
    weight = head.weight.to(head.compute_dtype)  # a copy under autocast only
    most = max((part.stop - part.start for part in parts), default=0)
    buffer = head.input.new_empty(most, V, dtype=accumulation_dtype(head.compute_dtype))
    for part in parts:
        rows = head.rows[part]
        hidden = _gather(head.input, rows).to(head.compute_dtype)
        logits = buffer[: rows.numel()]
        products.logits(hidden, weight, head.bias, logits)
        yield _Chunk(part, rows, hidden, weight, logits)


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """A copy (m, D) of some rows of x (..., D), whose other rows are not read."""
    if x.is_contiguous():
        return x.view(-1, x.shape[-1]).index_select(0, rows)
    x = x[None] if x.dim() == 1 else x
    return x[row_index(x, rows)]


def _place_of_gradient(head: Head, logits: Tensor) -> Tensor:
    """Where the gradient of the logits (m, V) goes: over them, in the matmul's dtype.

    PyTorch's operators on a CPU keep float32, in which its matmuls are done.
    """
    narrow = logits.is_cuda or backend.choose(logits.device, logits.dtype) == "triton"
    if head.compute_dtype == logits.dtype or not narrow:
        return logits
    return logits.view(head.compute_dtype)[:, : logits.shape[1]]


class _Sums:
    """The gradients of a head, summed over chunks."""

    def __init__(self, head: Head, needs: Needs, separate: Tensor | None, *, wide: bool) -> None:
        self.needs = needs
        self.dtypes = gradient_dtypes(head.input, head.weight, head.bias, wide=wide)
        exact = accumulation_dtype(head.compute_dtype)
        several = len(head.parts) != 1 or separate is not None
        self.d_input = _new(head.input, needs.input, self.dtypes[0], head.input).zero_()
        self.d_weight = _new(
            head.weight, needs.weight, exact if several else self.dtypes[1], head.input
        )
        self.d_bias = _new(head.bias, needs.bias, exact, head.input).zero_()
        if not head.parts:
            self.d_weight.zero_()
        # Row factors (M,) that the logits' gradient lacks, as the largest and shares of it.
        self.separate, self.largest, self.share = separate, None, None
        if separate is not None and separate.numel():
            self.largest = separate.abs().amax()
            self.share = separate / torch.where(self.largest == 0, 1, self.largest)

    def add(self, chunk: _Chunk, g: Tensor) -> None:
        """One chunk more, from the gradient g (m, V) of its logits."""
        part, hidden = chunk.part, chunk.hidden
        if self.needs.input:
            self._put_input(chunk, g)
        share = None if self.share is None else self.share[part, None]
        if self.needs.weight:
            if share is not None:
                hidden = (hidden * share).to(hidden.dtype)
            products.add_weight_gradient(g, hidden, self.d_weight, first=part.start == 0)
        if self.needs.bias:
            if share is None:
                self.d_bias += g.sum(0, dtype=self.d_bias.dtype)
            else:
                column = self.d_bias[:, None]
                products.add_weight_gradient(g, share.to(hidden.dtype), column, first=False)

    def _put_input(self, chunk: _Chunk, g: Tensor) -> None:
        if self.separate is None:
            values = products.input_gradient(g, chunk.weight, self.d_input.dtype)
        else:
            values = products.input_gradient(g, chunk.weight, torch.float32)
            values = (values * self.separate[chunk.part, None]).to(self.d_input.dtype)
        self.d_input.view(-1, self.d_input.shape[-1]).index_copy_(0, chunk.rows, values)

    def finish(self) -> Gradients:
        """The sums in the dtypes that were promised."""
        if self.largest is not None:
            self.d_weight *= self.largest
            self.d_bias *= self.largest
        return Gradients(
            self.d_input, self.d_weight.to(self.dtypes[1]), self.d_bias.to(self.dtypes[2])
        )


def _all_factors(head: Head, row_weight: Tensor | None, scale: Tensor | None) -> Tensor:
    """What the gradients of the kept rows, made with `_half_scale` alone, lack: (M,)."""
    factors = torch.ones_like(head.rows, dtype=torch.float32)
    if row_weight is not None:
        factors = row_weight[head.rows]
    factors = factors / _half_scale(head)
    return factors if scale is None else factors * scale


def _half_scale(head: Head) -> Tensor:
    """What brings the largest gradient of a row of factor 1 near HALF_RANGE, ()."""
    r = head.recipe
    # d(score) / d(logit), and the z-loss term for a log-sum-exp of a hundred.
    largest = abs(r.logit_scale) / r.temperature * (1 + 200 * abs(r.lse_square_scale))
    scale = head.input.new_full((), HALF_RANGE / max(largest, 1e-3), dtype=torch.float32)
    if head.class_weight is not None:
        scale = scale / head.class_weight.abs().amax().clamp(min=1e-3)
    return scale


def _separate(
    head: Head, row_weight: Tensor | None, upstream: Upstream
) -> tuple[Tensor, Tensor | None, Upstream]:
    """What gradients of upstream gradients of one size lack (M,), and those of that size (N,)."""
    given = [x for x in (row_weight, upstream.lse, upstream.entropy) if x is not None]
    size = torch.stack(given).abs().amax(0)
    safe = torch.where(size == 0, 1, size)
    scale = _half_scale(head)

    def divided(x: Tensor | None) -> Tensor | None:
        return None if x is None else x / safe * scale

    divided_upstream = Upstream(
        divided(upstream.lse), divided(upstream.entropy), upstream.entropy_value
    )
    return size[head.rows] / scale, divided(row_weight), divided_upstream

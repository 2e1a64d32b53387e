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

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sgp.head import chunks, products
from sgp.rows import backend
from sgp.rows.by_torch import RowOutputs, Upstream, Wanted, new_outputs, row_index
from sgp.rows.operations import RowOperations
from sgp.rows.recipe import Recipe, accumulation_dtype, cast

HALF_RANGE = 4096.0  # sixteen times below float16's largest number
LEAST_ROOT = 2.0**-12  # HALF_RANGE times this is 1


class Needs(NamedTuple):
    """Which gradients are wanted; what is not wanted is not computed."""

    input: bool = False
    weight: bool = False
    bias: bool = False


class HeadCall(NamedTuple):
    """What is no tensor in one pass over a head."""

    recipe: Recipe
    compute_dtype: torch.dtype  # of the matmuls' operands
    chunk_rows: int
    needs: Needs
    wanted: Wanted = Wanted()  # of the rows' outputs
    wide: bool = False  # gradients in float32 although the operands are float16

    @property
    def is_half(self) -> bool:
        """Whether the operands are float16, in which row factors must not be folded."""
        return self.compute_dtype == torch.float16


class LinearHead(NamedTuple):
    """Hidden states, the linear map to logits, and which rows it is applied to."""

    input: Tensor  # (..., D), any strides; leading dimensions flatten to N
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    target: Tensor  # (N,) int64
    rows: Tensor  # (N,) int64: the kept rows, padded
    num_kept: Tensor  # () int64 on the CPU: how many they are

    def detached(self) -> LinearHead:
        """Without a graph behind it."""
        bias = None if self.bias is None else self.bias.detach()
        return self._replace(input=self.input.detach(), weight=self.weight.detach(), bias=bias)


class Head(NamedTuple):
    """A linear head of which only the kept rows are left, and what is done with them."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    rows: Tensor  # (M,)
    class_weight: Tensor | None  # (V,)
    operations: RowOperations  # on rows of logits; target and class_weight are of all that it joins
    call: HeadCall

    @property
    def parts(self) -> list[slice]:
        """The chunks of the M kept rows."""
        return chunks.split(self.rows.numel(), self.call.chunk_rows)


class Gradients(NamedTuple):
    """Gradients of a head; None where not wanted."""

    input: Tensor | None  # of input's shape
    weight: Tensor | None  # (V, D)
    bias: Tensor | None  # (V,)


def gradient_dtypes(
    head: Head | LinearHead, call: HeadCall
) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Those of what the gradients belong to, or float32."""
    if call.wide:
        return (torch.float32,) * 3
    of_input, bias = head.input.dtype, head.bias
    return of_input, head.weight.dtype, of_input if bias is None else bias.dtype


def new_gradients(head: LinearHead, call: HeadCall) -> Gradients:
    """Uninitialised gradients, for tracing."""
    needs, (of_input, of_weight, of_bias) = call.needs, gradient_dtypes(head, call)
    return Gradients(
        _new(head.input, needs.input, of_input, head.input),
        _new(head.weight, needs.weight, of_weight, head.input),
        _new(head.bias, needs.bias, of_bias, head.input),
    )


def _new(
    x: Tensor | None, needed: bool, dtype: torch.dtype, like: Tensor, *, zero: bool = False
) -> Tensor | None:
    """A contiguous tensor of x's shape, where it is needed."""
    if x is None or not needed:
        return None
    return like.new_zeros(x.shape, dtype=dtype) if zero else like.new_empty(x.shape, dtype=dtype)


def forward(
    head: Head,
    row_weight: Tensor | None,
    scale: Tensor | None,
) -> tuple[RowOutputs, Gradients]:
    """Loss, saved and reported statistics of every row (N,), and the gradients of the head.

    Args:
        head: what is multiplied with what.
        row_weight: (N,) weights; they multiply loss and gradient.
        scale: () multiplies the gradients only.
    """
    call, factors = head.call, None
    out = new_outputs(head.input, head.target.numel(), call.wanted)
    out.zero_()
    if call.is_half and any(call.needs):
        factors = _Factors.of_forward(head, row_weight, scale)
    sums = _Sums(head, factors)
    used = sums if any(call.needs) else None

    def one(chunk: _Chunk) -> None:
        _forward_chunk(head, chunk, row_weight, scale, factors, out, used)

    _each_chunk(head, one)
    return out, sums.finish()


def _forward_chunk(
    head: Head,
    chunk: _Chunk,
    row_weight: Tensor | None,
    scale: Tensor | None,
    factors: _Factors | None,
    out: RowOutputs,
    sums: _Sums | None,
) -> None:
    """Fill the chunk's rows of `out`, and add its gradients to `sums` where there are any."""
    some, logits = chunk.rows, chunk.logits
    here = new_outputs(logits, some.numel(), head.call.wanted)
    g = None if sums is None else _place_of_gradient(head, logits)
    weights = None if row_weight is None else row_weight.index_select(0, some)
    of_rows = (weights, scale)
    if factors is not None:
        of_rows = (factors.folded[chunk.part], factors.scale)
    head.operations.forward(
        logits,
        g,
        head.target.index_select(0, some),
        head.class_weight,
        *of_rows,
        head.call.recipe,
        here,
        scratch=True,
    )
    if factors is not None:  # the loss was multiplied by what is folded into its gradient
        here.loss.mul_(factors.of_loss(weights, chunk.part))
    for whole, values in zip(out[:-1], here[:-1], strict=True):
        if whole is not None and values is not None:
            whole.index_copy_(0, some, values)
    if sums is not None and g is not None:
        sums.add(chunk, g)


def backward(
    head: Head,
    saved: Tensor,
    row_weight: Tensor | None,
    upstream: Upstream,
) -> Gradients:
    """The gradients of the head where the upstream gradient is one number a row.

    Args:
        head: as in forward; its logits are computed again.
        saved: (N, 3) of forward.
        row_weight: (N,) row weight times upstream gradient of the loss (of -log_prob).
        upstream: those of the statistics.
    """
    factors = None
    if head.call.is_half:
        factors, row_weight, upstream = _Factors.of_backward(head, row_weight, upstream)
    sums = _Sums(head, factors)

    def one(chunk: _Chunk) -> None:
        some, logits = chunk.rows, chunk.logits
        g = _place_of_gradient(head, logits)
        head.operations.backward(
            logits,
            g,
            head.target.index_select(0, some),
            saved.index_select(0, some),
            head.class_weight,
            None if row_weight is None else row_weight.index_select(0, some),
            head.call.recipe,
            Upstream(*(None if x is None else x.index_select(0, some) for x in upstream)),
        )
        sums.add(chunk, g)

    _each_chunk(head, one)
    return sums.finish()


class _Chunk(NamedTuple):
    """Some kept rows."""

    part: slice  # of the M kept rows
    rows: Tensor  # (m,) int64: their numbers among all N
    hidden: Tensor  # (m, D) in the compute dtype
    weight: Tensor  # (V, D) in the compute dtype
    logits: Tensor  # (m, V) float32 or float64


def _each_chunk(head: Head, do: Callable[[_Chunk], None]) -> None:
    """Call `do` with every chunk. The logits share one buffer, which is gone when this returns."""
    V = head.weight.shape[0]
    parts = head.parts
    weight = cast(head.weight, head.call.compute_dtype)  # a copy under autocast only
    most = max((part.stop - part.start for part in parts), default=0)
    buffer = head.input.new_empty(most, V, dtype=accumulation_dtype(head.call.compute_dtype))
    for part in parts:
        rows = head.rows if len(parts) == 1 else head.rows[part]
        hidden = cast(_gather(head.input, rows), head.call.compute_dtype)
        logits = buffer if part.stop - part.start == most else buffer[: part.stop - part.start]
        products.logits(hidden, weight, head.bias, logits)
        do(_Chunk(part, rows, hidden, weight, logits))


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """A copy (m, D) of some rows of x (..., D), whose other rows are not read."""
    if x.is_contiguous():
        return x.view(-1, x.shape[-1]).index_select(0, rows)
    x = x[None] if x.dim() == 1 else x
    return x[row_index(x, rows)]


def _place_of_gradient(head: Head, logits: Tensor) -> Tensor:
    """Where the gradient of the logits (m, V) goes, in the matmul's dtype.

    The kernels write it over the logits. PyTorch's operators cannot, in another dtype: on a GPU it
    gets a tensor of its own; on a CPU it stays float32, in which the matmuls are done there.
    """
    dtype = head.call.compute_dtype
    if dtype == logits.dtype:
        return logits
    if backend.choose(logits.device, logits.dtype) == "triton":
        return logits.view(dtype)[:, : logits.shape[1]]
    return torch.empty_like(logits, dtype=dtype) if logits.is_cuda else logits


class _Factors(NamedTuple):
    """How the row factors of a float16 head are shared out, each (M,) for the kept rows.

    The factor of a row is `largest * share`. The gradient of the logits gets `scale * folded`, the
    hidden states of the weight's gradient get `share / folded`; what is missing in `d_input` is
    `rest`, in `d_weight` and `d_bias` it is `largest / scale`. With about the square root of its
    share folded into either side, a row keeps its digits when another one has ten million times its
    factor; the hidden states' part is a power of two, which rounds nothing.
    """

    folded: Tensor
    share: Tensor
    largest: Tensor  # ()
    scale: Tensor  # ()

    @property
    def rest(self) -> Tensor:
        """Factors (M,) that d_input lacks."""
        return self.share / self.folded * (self.largest / self.scale)

    def of_loss(self, weights: Tensor | None, part: slice) -> Tensor:
        """What turns a loss that was multiplied by `folded` into the one that is asked for."""
        return (1 if weights is None else weights) / self.folded[part]

    @staticmethod
    def make(head: Head, factors: Tensor, *, of_lse: bool = False) -> _Factors:
        """Share out the factors (M,); `of_lse`: also of a log-sum-exp's upstream gradient."""
        largest = factors.abs().amax() if factors.numel() else factors.new_ones(())
        share = factors / torch.where(largest == 0, 1, largest)
        root = share.abs().sqrt().clamp(min=LEAST_ROOT)
        power = root / (2 * torch.frexp(root).mantissa)  # the next power of two below
        folded = torch.where(share == 0, 1, share.abs() / power)
        return _Factors(folded, share, largest, _half_scale(head, of_lse=of_lse))

    @staticmethod
    def of_forward(head: Head, row_weight: Tensor | None, scale: Tensor | None) -> _Factors:
        """Row weight times scale."""
        factors = torch.ones_like(head.rows, dtype=torch.float32)
        if row_weight is not None:
            factors = row_weight[head.rows]
        return _Factors.make(head, factors if scale is None else factors * scale)

    @staticmethod
    def of_backward(
        head: Head, row_weight: Tensor | None, upstream: Upstream
    ) -> tuple[_Factors, Tensor | None, Upstream]:
        """The sizes of the upstream gradients, and these (N,) with `scale * folded` instead."""
        given = [x for x in (row_weight, upstream.lse, upstream.entropy) if x is not None]
        size = torch.stack(given).abs().amax(0)
        factors = _Factors.make(head, size[head.rows], of_lse=upstream.lse is not None)
        of_row = torch.zeros_like(size).index_copy_(0, head.rows, factors.folded)
        safe = torch.where(size == 0, 1, size)

        def instead(x: Tensor | None) -> Tensor | None:
            return None if x is None else x / safe * (of_row * factors.scale)

        changed = Upstream(instead(upstream.lse), instead(upstream.entropy), upstream.entropy_value)
        return factors, instead(row_weight), changed


def _half_scale(head: Head, *, of_lse: bool) -> Tensor:
    """What brings the largest gradient of a row of factor 1 near HALF_RANGE, ()."""
    r = head.call.recipe
    slope = abs(r.logit_scale) / r.temperature  # at most: d(score) / d(logit)
    z_loss = 200 * abs(r.lse_square_scale)  # for a log-sum-exp of a hundred; no class weight here
    if head.class_weight is None:
        largest = head.input.new_full((), slope * (1 + z_loss), dtype=torch.float32)
    else:
        largest = slope * (head.class_weight.abs().amax() + z_loss + of_lse)
    return HALF_RANGE / torch.where(largest == 0, 1, largest)


class _Sums:
    """The gradients of a head, summed over chunks."""

    def __init__(self, head: Head, factors: _Factors | None) -> None:
        self.factors, self.operations = factors, head.operations
        call, needs = head.call, head.call.needs
        self.dtypes = gradient_dtypes(head, call)
        exact = accumulation_dtype(call.compute_dtype)
        parts = len(head.parts)
        # One chunk may write bf16 at once, where that is what the matmul makes.
        at_once = parts == 1 and factors is None and self.dtypes[1] == call.compute_dtype
        of_weight = self.dtypes[1] if at_once else exact
        self.d_input = _new(head.input, needs.input, self.dtypes[0], head.input, zero=True)
        self.d_weight = _new(head.weight, needs.weight, of_weight, head.input, zero=not parts)
        self.d_bias = _new(head.bias, needs.bias, exact, head.input, zero=True)

    def add(self, chunk: _Chunk, g: Tensor) -> None:
        """One chunk more, from the gradient g (m, V) of its logits."""
        hidden, f, share, rest = chunk.hidden, self.factors, None, None
        if f is not None:
            rest = f.rest[chunk.part, None]
            share = (f.share / f.folded)[chunk.part, None]
        summing = None
        if self.d_input is not None:
            exact = rest is None and not self.operations.is_part
            wide = accumulation_dtype(chunk.weight.dtype)
            dtype = self.d_input.dtype if exact else wide
            values = products.input_gradient(g, chunk.weight, dtype)
            if rest is not None:
                values = values * rest
            summing = self.operations.start_sum(values)
            if summing is None:
                _put(self.d_input, chunk, values)
        if self.d_weight is not None:
            weighted = hidden if share is None else (hidden * share).to(hidden.dtype)
            first = chunk.part.start == 0
            products.add_weight_gradient(g, weighted, self.d_weight, first=first)
        if self.d_bias is not None:
            if share is None:
                self.d_bias += g.sum(0, dtype=self.d_bias.dtype)
            else:
                column = self.d_bias[:, None]
                products.add_weight_gradient(g, share.to(hidden.dtype), column, first=False)
        if summing is not None and self.d_input is not None:
            # The sum went on beside the matmul of the weight's gradient.
            self.operations.finish_sum(summing)
            _put(self.d_input, chunk, values)

    def finish(self) -> Gradients:
        """The sums in the dtypes that were promised."""
        sums: tuple[Tensor | None, ...] = (self.d_weight, self.d_bias)
        if self.factors is not None:
            missing = self.factors.largest / self.factors.scale
            sums = tuple(None if x is None else x.mul_(missing) for x in sums)
        pairs = zip(sums, self.dtypes[1:], strict=True)
        return Gradients(
            self.d_input, *(None if x is None else cast(x, dtype) for x, dtype in pairs)
        )


def _put(d_input: Tensor, chunk: _Chunk, values: Tensor) -> None:
    """The rows of a chunk into d_input."""
    whole = d_input.view(-1, values.shape[1])
    whole.index_copy_(0, chunk.rows, cast(values, whole.dtype))

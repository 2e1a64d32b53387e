"""A linear head and its loss on the kept rows alone, in the pieces of a plan.

For each chunk of kept rows: gather, matmul to float32 logits, row operation, and for a gradient two
matmuls more; or slices of the vocabulary, for all rows, from the statistics of a first pass
(chunks.py). Logits and their gradient share one buffer, unless the latter is kept; nothing of size
N x V exists. The row operations are those of the logits form; where they run as kernels the
gradient in a logit's place is written in the matmul's dtype into the first half of each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sgp.caller import warn
from sgp.head import chunks, products
from sgp.head.calls import Gradients, Head
from sgp.head.chunks import Plan
from sgp.head.half import Factors, half_scale
from sgp.head.sums import Sums
from sgp.rows import backend
from sgp.rows.autograd import row_upstream
from sgp.rows.by_torch import NOTHING, Columns, RowOutputs, Upstream, new_outputs
from sgp.rows.recipe import Recipe, cast
from sgp.rows.units import Piece, Units

Statistics = tuple[Tensor, Tensor, Tensor, Tensor]
# A loss of the caller's: statistics (m,) of some rows, their positions, and which ones they are ->
# the upstream gradients of log_prob, entropy and lse.
OwnLoss = Callable[[Statistics, Tensor, Piece], tuple[Tensor | None, Tensor | None, Tensor | None]]


def forward(
    head: Head, row_weight: Tensor | None, scale: Tensor | None, *, may_hold: bool = False
) -> tuple[RowOutputs, Gradients, Tensor | None]:
    """Loss, saved and reported statistics of every row (N,), and the gradients of the head.

    Args:
        head: what is multiplied with what.
        row_weight: (N,) weights; they multiply loss and gradient.
        scale: () multiplies the gradients only.
        may_hold: whether the logits may be held for the backward, if that is the plan.

    Returns:
        Also the logits that are held, or None.
    """
    call, plan, factors = head.call, head.plan(), None
    of_slices = plan.way == "slices" and any(call.needs)
    wanted = call.wanted._replace(saved=True) if of_slices else call.wanted
    out = new_outputs(head.input, head.target.numel(), wanted)
    out.zero_()
    held = sums = None
    if plan.way == "held" and may_hold:
        held = head.input.new_empty(plan.padded, head.weight.shape[0], dtype=head.sums_dtype)
    elif any(call.needs) and not of_slices:
        if call.is_half:
            slope = half_scale(head.input, call.recipe, head.class_weight, call.divergence)
            factors = Factors.of_forward(head.rows, row_weight, scale, slope)
        sums = Sums(head, plan, factors)

    def one(chunk: _Chunk, g: Tensor | None) -> None:
        _forward_chunk(head, chunk, g, row_weight, scale, factors, out, scratch=held is None)

    _each_chunk(head, plan, sums, held, one)
    if of_slices:
        assert out.saved is not None, "asked for"  # noqa: S101
        r = row_weight
        if scale is not None:
            r = scale.expand(head.target.numel()) if r is None else r * scale
        gradients = _by_slices(head, plan, out.saved, None if r is None else r.contiguous())
        return out._replace(saved=out.saved if call.wanted.saved else None), gradients, None
    return out, Gradients() if sums is None else sums.finish(), held


def backward(
    head: Head,
    saved: Tensor,
    row_weight: Tensor | None,
    upstream: Upstream,
    held: Tensor | None = None,
    plan: Plan | None = None,
) -> Gradients:
    """The gradients of the head where the upstream gradient is one number a row.

    Args:
        head: as in forward; its logits are computed again.
        saved: (N, 3) of forward, more of them with a teacher.
        row_weight: (N,) row weight times upstream gradient of the loss (of -log_prob).
        upstream: those of the statistics.
        held: the logits of forward, which are used up.
        plan: that of the call, where it is not the head's own.
    """
    factors, plan = None, plan or head.plan()
    if plan.way == "held" and held is None:  # used up by an earlier backward
        plan = plan._replace(way="rows", group=plan.rows)
    if head.call.is_half:
        of_lse = upstream.lse is not None
        slope = half_scale(
            head.input, head.call.recipe, head.class_weight, head.call.divergence, of_lse=of_lse
        )
        factors, row_weight, upstream = Factors.of_backward(head.rows, row_weight, upstream, slope)
    if plan.way == "slices":
        return _by_slices(head, plan, saved, row_weight, upstream, factors)
    sums = Sums(head, plan, factors)

    def one(chunk: _Chunk, g: Tensor | None) -> None:
        assert g is not None, "with sums it has a place"  # noqa: S101
        head.at(chunk.part).backward(
            chunk.logits,
            g,
            *_of_rows(head, chunk.part, saved, row_weight, upstream),
        )

    if held is not None:
        logits = held[: head.rows.numel()]
        whole = _Chunk(slice(0, len(logits)), head.hidden(slice(None)), logits)
        g = _place_of_gradient(head, logits)
        one(whole, g)
        sums.add_input(whole.part, g, cast(head.weight, head.call.compute_dtype))
        sums.add_weight(whole.part, g, whole.hidden)
    else:
        _each_chunk(head, plan, sums, None, one)
    return sums.finish()


def with_loss(head: Head, units: Units, loss: OwnLoss) -> tuple[RowOutputs, Gradients]:
    """The statistics of every row (N,), and the gradients of the head for a loss of the caller's.

    Chunk by chunk, its lines run on the statistics, and the gradient of the logits is made from
    what they give while the logits are there. Where a unit has more rows than a chunk, the lines
    run once, on the statistics of all rows, and the logits are made again.
    """
    longest, M, trains = units.longest(), head.rows.numel(), any(head.call.needs)
    plan = head.plan(own=True, least=longest)
    once = plan.way == "slices" or plan.rows < longest or not (trains and M)
    if trains and M and plan.rows < longest:
        _say_twice(head.call.name, units)
    wanted = head.call.wanted._replace(saved=trains)
    out = new_outputs(head.input, head.target.numel(), wanted)
    out.zero_()
    assert out.statistics is not None, "asked for"  # noqa: S101
    if not once:
        return out, _loss_by_chunks(head, plan, units, loss, out)

    def one(chunk: _Chunk, g: Tensor | None) -> None:
        _forward_chunk(head, chunk, g, None, None, None, out, scratch=True)

    _each_chunk(head, plan, None, None, one)
    some = [x.index_select(0, head.rows) for x in out.statistics]
    found = loss((some[0], some[1], some[2], some[3]), head.rows, units.whole(M))
    if not trains:
        return out, Gradients()
    assert out.saved is not None, "asked for"  # noqa: S101

    def of_all(x: Tensor | None) -> Tensor | None:
        return None if x is None else out.loss.new_zeros(out.loss.shape).index_copy(0, head.rows, x)

    r, upstream = row_upstream((*map(of_all, found),), out.saved, out.statistics[1])
    return out, backward(head, out.saved, r, upstream, plan=plan)


_said: set[str] = set()  # functions that have said it


def _say_twice(name: str, units: Units) -> None:
    """Warn, once a process, that what the loss needs at once does not fit."""
    if name in _said:
        return
    _said.add(name)
    warn(
        f"{name}: there is no room for the logits of a {units.by} of {units.longest()} tokens that "
        "carry loss, so they are made twice; a larger memory_budget or chunk_rows makes them once"
    )


def _loss_by_chunks(
    head: Head, plan: Plan, units: Units, loss: OwnLoss, out: RowOutputs
) -> Gradients:
    """The gradients, and the statistics of `out` with them."""
    sums, M = Sums(head, plan, None), head.rows.numel()
    pieces = units.pieces(M, plan.rows)
    waiting = iter(pieces)
    shares = head.rows.new_ones(2, M, dtype=head.sums_dtype)  # folded and share of `Factors`
    scale = half_scale(head.input, head.call.recipe, None) if head.call.is_half else None

    def one(chunk: _Chunk, g: Tensor | None) -> None:
        assert g is not None, "with sums it has a place"  # noqa: S101
        here = _forward_chunk(head, chunk, None, None, None, None, out, scratch=False)
        assert here.statistics is not None, "asked for"  # noqa: S101
        assert here.saved is not None, "asked for"  # noqa: S101
        rows, recipe = head.rows[chunk.part], head.call.recipe
        target = head.target.index_select(0, rows)
        found = loss(here.statistics, rows, next(waiting))
        r, upstream = row_upstream(found, here.saved, here.statistics[1])
        if scale is not None:
            every = torch.arange(rows.numel(), device=rows.device)
            factors, weight, upstream = Factors.of_backward(every, r, upstream, scale)
            assert weight is not None, "given"  # noqa: S101
            r = weight
            shares[0, chunk.part], shares[1, chunk.part] = factors.folded, factors.share
            sums.factors = Factors(shares[0], shares[1], factors.largest, factors.scale)
        head.operations.backward(chunk.logits, g, target, here.saved, None, r, recipe, upstream)

    _each_chunk(head, plan, sums, None, one, [piece.rows for piece in pieces])
    return sums.finish()


class _Chunk(NamedTuple):
    """Some kept rows."""

    part: slice  # of the M kept rows
    hidden: Tensor  # (m, D) in the compute dtype
    logits: Tensor  # (m, V) float32 or float64


def _each_chunk(
    head: Head,
    plan: Plan,
    sums: Sums | None,
    held: Tensor | None,
    do: Callable[[_Chunk, Tensor | None], None],
    parts: list[slice] | None = None,
) -> None:
    """Make the logits chunk by chunk; `do` fills the place of their gradient if there are sums.

    The buffers are gone when this returns. `parts` are the chunks where they are not equal.
    """
    weight = cast(head.weight, head.call.compute_dtype)  # a copy under autocast only
    for group in _groups(head.rows.numel(), plan, sums is not None, parts):
        rows = slice(group[0].start, group[-1].stop)
        hidden = head.hidden(rows)
        g = _group(head, plan, group, hidden, weight, sums, held, do)
        if sums is not None and g is not None:
            sums.add_weight(rows, g, hidden)
            del g


def _groups(M: int, plan: Plan, has_sums: bool, parts: list[slice] | None) -> Iterator[list[slice]]:
    """The chunks of M kept rows, in groups of at most `plan.group` rows; without sums, alone."""
    most = plan.group if has_sums else plan.rows
    if parts is None:
        for group in chunks.parts(M, most):
            some = chunks.parts(group.stop - group.start, plan.rows)
            yield [slice(group.start + x.start, group.start + x.stop) for x in some]
        return
    found: list[slice] = []
    for part in parts:
        if found and part.stop - found[0].start > most:
            yield found
            found = []
        found.append(part)
    yield found


def _group(
    head: Head,
    plan: Plan,
    parts: list[slice],
    hidden: Tensor,
    weight: Tensor,
    sums: Sums | None,
    held: Tensor | None,
    do: Callable[[_Chunk, Tensor | None], None],
) -> Tensor | None:
    """The gradient (m, V) of a group's logits. The buffer of float32 logits is given back here."""
    V, start, count = weight.shape[0], parts[0].start, parts[-1].stop - parts[0].start
    kept = g = None
    if sums is not None and plan.keeps():
        aligned = -(-V // 8) * 8  # rows that begin at 16 bytes
        kept = weight.new_empty(plan.group, aligned)[:count, :V]
    rows = plan.rows if held is None else 0
    buffer = weight.new_empty(rows, V, dtype=head.sums_dtype)
    for absolute in parts:
        part = slice(absolute.start - start, absolute.stop - start)
        logits = buffer[: part.stop - part.start] if held is None else held[absolute]
        chunk = _Chunk(absolute, hidden[part], logits)
        products.logits(chunk.hidden, weight, head.bias, logits)
        if sums is None:
            do(chunk, None)
            continue
        g = _place_of_gradient(head, logits) if kept is None else kept[part]
        do(chunk, g)
        sums.add_input(absolute, g, weight)
    return g if kept is None else kept


def _by_slices(
    head: Head,
    plan: Plan,
    saved: Tensor,
    row_weight: Tensor | None,
    upstream: Upstream = NOTHING,
    factors: Factors | None = None,
) -> Gradients:
    """The gradients from the statistics of every row, a slice of the vocabulary at a time."""
    V, M = head.weight.shape[0], head.rows.numel()
    sums = Sums(head, plan, factors)
    if not M:
        return sums.finish()
    hidden = head.hidden(slice(None))
    of_rows = _of_rows(head, slice(None), saved, row_weight, upstream)
    buffer = hidden.new_empty(plan.padded * plan.columns, dtype=head.sums_dtype)
    total = None
    if head.call.needs.input:
        total = hidden.new_zeros(plan.padded, hidden.shape[1], dtype=head.sums_dtype)[:M]
    all_rows = slice(0, M)
    weighted = sums.weighted(all_rows, hidden)
    first, operations = sums.start_weight(), head.at(all_rows)
    for part in chunks.parts(V, plan.columns):
        weight = cast(head.weight[part], head.call.compute_dtype)
        logits = buffer[: M * len(weight)].view(M, len(weight))
        bias = None if head.bias is None else head.bias[part]
        products.logits(hidden, weight, bias, logits)
        g = _place_of_gradient(head, logits)
        operations.backward(logits, g, *of_rows, Columns(part.start, V))
        if total is not None:
            products.add_input_gradient(g, weight, total)
        sums.add_columns(part, all_rows, g, weighted, first=first)
        del g, logits, weight  # before the next ones are made
    del buffer, hidden, weighted, of_rows, operations
    if total is not None:
        sums.put_input(all_rows, total)
    return sums.finish()


def _of_rows(
    head: Head, part: slice, saved: Tensor, row_weight: Tensor | None, upstream: Upstream
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Recipe, Upstream]:
    """What the backward of some kept rows takes beside their logits."""
    target, some = head.of_rows(head.target, part), head.of_rows(saved, part)
    assert target is not None, "never None"  # noqa: S101
    assert some is not None, "never None"  # noqa: S101
    rest = Upstream(*(head.of_rows(x, part) for x in upstream))
    r = head.of_rows(row_weight, part)
    return target, some, head.class_weight, r, head.call.recipe, rest


def _forward_chunk(
    head: Head,
    chunk: _Chunk,
    g: Tensor | None,
    row_weight: Tensor | None,
    scale: Tensor | None,
    factors: Factors | None,
    out: RowOutputs,
    *,
    scratch: bool,
) -> RowOutputs:
    """Fill the chunk's rows of `out`, and the gradient g of its logits where it has a place.

    Returns:
        The chunk's own.
    """
    rows = head.rows[chunk.part]
    here = new_outputs(chunk.logits, rows.numel(), head.call.wanted._replace(
        saved=out.saved is not None
    ))  # fmt: skip
    weights = head.of_rows(row_weight, chunk.part)
    of_rows = (weights, None if g is None else scale)
    if factors is not None:
        of_rows = (factors.folded[chunk.part], factors.scale)
    head.at(chunk.part).forward(
        chunk.logits,
        g,
        head.target.index_select(0, rows),
        head.class_weight,
        *of_rows,
        head.call.recipe,
        here,
        scratch=scratch,
    )
    if factors is not None:  # the loss was multiplied by what is folded into its gradient
        here.loss.mul_(factors.of_loss(weights, chunk.part))
    for whole, values in zip(out[:-1], here[:-1], strict=True):
        if whole is not None and values is not None:
            whole.index_copy_(0, rows, values)
    return here


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

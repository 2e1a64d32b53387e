"""A vocabulary split over ranks: who holds which columns, and what the ranks tell each other.

Rank order is vocabulary order. Before a loss, every rank sends one `Header` and three checksums,
96 bytes: what it was called with. On a CPU (and with SGP_CHECK=1) all ranks compare them and raise
the same error before anything of another size is exchanged, which would end the process or hang. On
a GPU they are read the first time only, for the sizes of the shards; later ones are compared on the
device, and a disagreement makes the loss NaN, unless it changes how much is exchanged: then the
back end's own error or time-out ends it.

One checksum has to differ: that of a few values of the shard. Two ranks that hold the same columns
were most likely given the whole vocabulary each.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed

from sgp.rows.by_torch import row_index
from sgp.rows.problem import may_wait
from sgp.rows.recipe import accumulation_dtype, cast, shown

Group = Any  # a ProcessGroup, a one-dimensional DeviceMesh, or None for all ranks

MIX = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, so that every position has another multiplier


class Header(NamedTuple):
    """What a rank was called with, int64 each; all but `columns` must be the same everywhere."""

    function: int  # checksums
    options: int
    dtypes: int
    grads: int
    columns: int  # of the vocabulary, padding included
    vocab_size: int  # -1: not given
    tokens: int
    kept: int
    width: int  # of the hidden states; 0 for logits


WHAT = {
    "function": "the function",
    "options": "the options (reduction, smoothing, shift, chunk_rows, memory_budget and the like)",
    "dtypes": "the dtypes (autocast's, too)",
    "grads": "which tensors require grad",
    "vocab_size": "vocab_size",
    "tokens": "the number of tokens",
    "kept": "the number of tokens that carry loss",
    "width": "the width of the hidden states",
    "targets": "the targets (or on their shift)",
    "weights": "token weights, class weights or the divisor",
}
SUMMED = "the sum of the hidden states' gradient over the ranks"
NUMBERS = ("vocab_size", "tokens", "kept", "width")
COLUMNS = Header._fields.index("columns")
CHECKSUMS = ("targets", "weights", "values")  # sent after the header
VALUES = len(Header._fields) + CHECKSUMS.index("values")
SAMPLES = 8  # rows and columns of a shard that are looked at

_known: WeakKeyDictionary[Any, dict[tuple[int, int], tuple[int, ...]]] = WeakKeyDictionary()


class Shard(NamedTuple):
    """One rank's columns of a vocabulary."""

    name: str  # of the function, for messages
    group: Any
    rank: int
    sizes: tuple[int, ...]  # columns of each rank, padding left out
    agreed: Tensor | None = None  # () bool; None: the ranks were compared on the host
    sums_input_grad: bool = True  # whether the hidden states' gradient is summed over the ranks

    @property
    def V(self) -> int:  # noqa: N802  (the field's name)
        """The whole vocabulary."""
        return sum(self.sizes)

    @property
    def size(self) -> int:
        """Columns of this rank, padding left out."""
        return self.sizes[self.rank]

    @property
    def offset(self) -> int:
        """The first column of this rank."""
        return sum(self.sizes[: self.rank])

    @property
    def columns(self) -> slice:
        """Those of the vocabulary that this rank holds."""
        return slice(self.offset, self.offset + self.size)

    def gather(self, x: Tensor, what: str) -> Tensor:
        """(P, *x.shape): the tensor of every rank, in rank order."""
        return _gather(self.name, self.group, x, what)

    def checked(self, loss: Tensor) -> Tensor:
        """The loss; NaN where ranks that are compared on the device disagree, also over no row."""
        return loss if self.agreed is None else torch.where(self.agreed, loss, torch.nan)

    def start_sum(self, x: Tensor) -> Any:
        """Begin to sum x over the ranks in place; a handle whose `wait()` ends it, or None."""
        if len(self.sizes) == 1 or not self.sums_input_grad:
            return None
        try:
            return distributed.all_reduce(x, group=self.group, async_op=True)
        except RuntimeError as error:
            raise _failed(self.name, SUMMED, error) from error

    def finish_sum(self, handle: Any) -> None:
        """Wait for what `start_sum` began: the host on a CPU, the stream on a GPU."""
        try:
            handle.wait()
        except RuntimeError as error:
            raise _failed(self.name, SUMMED, error) from error


def process_group(name: str, group: Group) -> Any:
    """The ProcessGroup that is meant.

    Raises:
        RuntimeError: where torch.distributed is not initialised, or this rank is not in the group.
        TypeError: for what is no group.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError(
            f"{name}: torch.distributed is not initialised; call "
            "torch.distributed.init_process_group() under torchrun, or use the function of the "
            "same name in sgp for a vocabulary on one device"
        )
    if group is None:
        return distributed.group.WORLD
    if hasattr(group, "get_group"):  # a DeviceMesh; several dimensions raise PyTorch's own error
        group = group.get_group()
    if group is distributed.GroupMember.NON_GROUP_MEMBER:
        raise RuntimeError(f"{name}: rank {distributed.get_rank()} is not in the group it passed")
    if not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            f"{name}: group = {shown(group)}; expected a ProcessGroup "
            "(torch.distributed.new_group), a one-dimensional DeviceMesh, or None for all ranks"
        )
    return group


def checksum(*values: object) -> int:
    """Of constants, the same in every process."""
    return zlib.crc32(repr(values).encode())


def agree(
    name: str,
    group: Group,
    header: Header,
    targets: Tensor,
    weights: Sequence[Tensor | None],
    sample: Tensor,
    *,
    sums_input_grad: bool = True,
) -> Shard:
    """The shard of this rank, once all ranks were found to have been called alike.

    `sample` is a few values of the shard, as `sampled` takes them.

    Raises:
        ValueError: with what the ranks disagree on, the same on every rank; for two ranks with the
            same sample, not zero, and no `vocab_size`; or for one beyond what the ranks hold.
        RuntimeError: a rank that does not answer within the group's time-out.
    """
    group = process_group(name, group)
    rank = distributed.get_rank(group)
    sent = _on_device(header, targets, weights, sample)
    table = _gather(name, group, sent, "the comparison of the ranks' calls")
    key = (header.columns, header.vocab_size)
    known = _known.setdefault(group, {})
    columns = known.get(key)
    agreed = None
    if columns is None or may_wait(targets):
        rows: list[list[int]] = table.tolist()
        _compare(name, rows)
        columns = tuple(row[COLUMNS] for row in rows)
        _refuse_copies(name, rows, header.vocab_size)
        # Shards of zeros say nothing yet: the next call looks again.
        if header.vocab_size >= 0 or all(row[VALUES] for row in rows if row[COLUMNS]):
            known[key] = columns
    else:
        expected = torch.stack([sent] * len(columns))
        sizes_known = [torch.full_like(sent[COLUMNS], c) for c in columns]
        expected[:, COLUMNS] = torch.stack(sizes_known)
        expected[:, VALUES] = table[:, VALUES]
        agreed = (table == expected).all()
    sizes = without_padding(name, columns, header.vocab_size)
    return Shard(name, group, rank, sizes, agreed, sums_input_grad)


def sampled(x: Tensor, rows: Tensor | None = None) -> Tensor:
    """At most SAMPLES x SAMPLES values of a shard x, spread over it; none of rows but `rows`.

    Args:
        x: (V_r, D) of a head, or (..., V_r) logits; any strides.
        rows: (M,) the logits' kept rows, numbered along the flattened leading dimensions.
    """
    x = x.detach()
    some = x[..., :: _step(x.shape[-1])]
    if rows is None:
        return some[:: _step(len(x))]
    rows = rows[:: _step(rows.numel())]
    return some[row_index(some, rows)]


def _step(length: int) -> int:
    return max(1, -(-length // SAMPLES))


def _on_device(
    header: Header, targets: Tensor, weights: Sequence[Tensor | None], sample: Tensor
) -> Tensor:
    """The header and the checksums (12,) int64 on the targets' device, without waiting for it."""
    numbers = torch.tensor(header, device="cpu")
    numbers = numbers.pin_memory() if targets.is_cuda else numbers
    numbers = numbers.to(targets.device, non_blocking=targets.is_cuda)
    of_weights = sum(
        ((i + 1) * _fingerprint(w) for i, w in enumerate(weights) if w is not None),
        start=targets.new_zeros(()),
    )
    # NaN and infinities, which a mask or a diverged model makes everywhere, say nothing.
    seen = cast(sample, accumulation_dtype(sample.dtype)).nan_to_num(0.0, 0.0, 0.0)
    of_values = torch.where((seen != 0).any(), _fingerprint(seen), 0)
    return torch.cat([numbers, torch.stack([_fingerprint(targets), of_weights, of_values])])


def _fingerprint(x: Tensor) -> Tensor:
    """() int64 of the bits of x and their order."""
    flat = x.detach().reshape(-1)
    if flat.is_floating_point():
        flat = flat.view(torch.int64 if flat.dtype == torch.float64 else torch.int32)
    places = torch.arange(1, flat.numel() + 1, device=x.device) * MIX
    return ((flat.to(torch.int64) + 1) * (places | 1)).sum()


def _compare(name: str, rows: list[list[int]]) -> None:
    for i, field in enumerate((*Header._fields, *CHECKSUMS)):
        values = [row[i] for row in rows]
        if field in ("columns", "values") or len(set(values)) == 1:
            continue
        shown = f": by rank {values}" if field in NUMBERS else ""
        fsdp = (
            " (A weight that FSDP shards is no shard of a vocabulary: use it in its module's "
            "forward, as sgp.huggingface.patch does)"
        )
        raise ValueError(
            f"{name}: the ranks disagree on {WHAT[field]}{shown}; every rank of the group passes "
            "the same tokens, targets and options, and its own columns of the vocabulary"
            + (fsdp if field in ("tokens", "kept", "targets", "weights") else "")
        )


def _refuse_copies(name: str, rows: list[list[int]], vocab_size: int) -> None:
    """Raise ValueError where two ranks have the same values and nobody said that it is right."""
    if vocab_size >= 0:
        return
    first: dict[tuple[int, int], int] = {}
    for rank, row in enumerate(rows):
        columns, values = row[COLUMNS], row[VALUES]
        other = first.setdefault((columns, values), rank)
        if other == rank or not values:
            continue
        total, single = sum(row[COLUMNS] for row in rows), name.replace(".parallel", "")
        raise ValueError(
            f"{name}: ranks {other} and {rank} hold the same {columns} columns of the vocabulary "
            "(by a sample of their values). Does every rank pass the whole head or logits, as "
            f"after a gather? Each class would count {len(rows)} times: pass the rank's own part, "
            f"in rank order, or call {single} instead. If the parts are equal by right, say so "
            f"with vocab_size={total}"
        )


def without_padding(name: str, columns: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """Columns of each rank below vocab_size."""
    total = sum(columns)
    if vocab_size > total:
        raise ValueError(
            f"{name}: vocab_size = {vocab_size}, but the ranks hold {total} columns, by rank "
            f"{list(columns)}"
        )
    if total == 0:
        raise ValueError(f"{name}: the {len(columns)} ranks hold a vocabulary of 0 columns")
    if vocab_size < 0:
        return tuple(columns)
    sizes, left = [], vocab_size
    for rank, count in enumerate(columns):
        sizes.append(min(count, left))
        left -= sizes[-1]
        if count and not sizes[-1]:
            raise ValueError(
                f"{name}: vocab_size = {vocab_size} leaves rank {rank} nothing but padding; the "
                f"ranks hold {list(columns)} columns. Does every rank pass the whole head, and not "
                "its own part?"
            )
    return tuple(sizes)


def _gather(name: str, group: Any, x: Tensor, what: str) -> Tensor:
    ranks = distributed.get_world_size(group)
    if ranks == 1:
        return x[None]
    table = x.new_empty(ranks * x.numel())
    # The name from torch 2.13 on, and the one before.
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    try:
        gather(table, x.reshape(-1), group=group)
    except RuntimeError as error:
        raise _failed(name, what, error) from error
    return table.view(ranks, *x.shape)


def _failed(name: str, what: str, error: RuntimeError) -> RuntimeError:
    return RuntimeError(
        f"{name}: {what} failed: a rank died, did not make this call, or raised an error before it "
        f"({error})"
    )

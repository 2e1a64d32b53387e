"""What ranks that hold different tokens need: one divisor for all, and a cut of the time."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from sgp.labels import has_float64
from sgp.parallel.shard import Group, process_group
from sgp.rows.problem import check_flags, check_tensor
from sgp.rows.recipe import shown, whole_number
from sgp.selection import Selection

LAYOUTS = ("contiguous", "zigzag")
EXPECTED = "expected Selections (of labels: sgp.Selection.from_labels) or counts"


def global_denominator(
    selections: Selection | Sequence[Selection | float | Tensor],
    *,
    group: Group = None,
    weight: Tensor | None = None,
    averaged: bool = True,
) -> Tensor:
    """The divisor of a mean over all ranks and accumulation steps: one all-reduce of one number.

    Example:
        >>> labels = torch.tensor([[-100, 1, 2], [-100, -100, 3]])
        >>> batches = [Selection.from_labels(labels), Selection.from_labels(labels[:1])]
        >>> global_denominator(batches)                     # one process: 3 + 2 tokens
        tensor(5., dtype=torch.float64)

    Give it as `denominator=` of every micro-batch's loss, and do not divide by the number of steps:
    the sum of the losses' gradients, averaged over the ranks, is then the gradient of the mean over
    every token of the step (docs/how-to/several-gpus.md has the arithmetic).

    Args:
        selections: all micro-batches of this rank's step; also counts, as numbers or tensors of one
            element.
        group: the ranks that hold different tokens; a ProcessGroup, a one-dimensional DeviceMesh,
            or None for all. Without torch.distributed the sum is this process's own.
        weight: class weights (V,), as given to the loss.
        averaged: whether gradients are averaged over `group` afterwards, as
            DistributedDataParallel and FSDP do: the sum is divided by the number of ranks. False
            where they are added up.

    Returns:
        () float64 (float32 where the device has no float64) on the selections' device (on one that
        the group's back end works on, where that is no CPU): the sum of token weights times class
        weights over kept tokens. Nothing waits for a GPU.

    Raises:
        TypeError: labels in place of a Selection, or a tensor of them; what is no count.
        ValueError: class weights that are not (V,).
        RuntimeError: a rank that died or did not answer within the group's time-out.
    """
    name = "sgp.parallel.global_denominator"
    given = _listed(name, selections)
    check_flags(name, averaged=averaged)
    if weight is not None:
        check_tensor(name, "weight", weight)
        if weight.dim() != 1 or weight.is_complex():
            raise ValueError(
                f"{name}: weight is {shown(weight)}; expected (V,), one real number a class"
            )
    devices = [x.device for x in (*given, weight) if isinstance(x, (Selection, Tensor))]
    device = next((x for x in devices if x.type != "cpu"), devices[0] if devices else None)
    ranks, pg = 1, None
    if group is not None or (distributed.is_available() and distributed.is_initialized()):
        pg = process_group(name, group)
        ranks = distributed.get_world_size(pg)
        pairs = distributed.get_backend_config(pg).split(",")  # "cpu:gloo,cuda:nccl"
        reached = [pair.partition(":")[0] for pair in pairs]
        if "cpu" not in reached and (device is None or device.type not in reached):
            device = torch.device(reached[0])  # the current one of its kind
    exact = device is None or has_float64(device)
    dtype = torch.float64 if exact else torch.float32
    total = torch.zeros((), dtype=dtype, device=device)
    for value in given:
        count = _count(name, value, weight, dtype)
        total += count.to(total) if isinstance(count, Tensor) else count
    if ranks > 1:
        try:
            distributed.all_reduce(total, group=pg)
        except RuntimeError as error:
            raise RuntimeError(f"{name}: the sum over the ranks failed ({error})") from error
    return total / ranks if averaged else total


def _listed(name: str, selections: Any) -> list[Any]:
    """What is given one by one; a Selection alone is one."""
    if isinstance(selections, Selection):
        return [selections]
    # A tensor may hold labels in place of counts; strings and dicts are lists by accident.
    if isinstance(selections, (Tensor, str, bytes, Mapping)) or not isinstance(
        selections, Iterable
    ):
        raise TypeError(f"{name}: selections = {shown(selections)}; {EXPECTED}, in a list")
    return list(selections)


def _count(name: str, value: Any, weight: Tensor | None, dtype: torch.dtype) -> float | Tensor:
    if isinstance(value, Selection):
        if value.dense_weight is None and weight is None:
            return value.num_kept
        counts = torch.ones(value.num_kept, dtype=dtype, device=value.device)
        if weight is not None:
            counts = counts * weight.to(counts)[value.target]
        if value.weight is not None:
            counts = counts * value.weight
        return counts.sum()
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.detach().view(())
    raise TypeError(f"{name}: one of selections is {shown(value)}; {EXPECTED}")


def positions(
    length: int,
    *,
    group: Group = None,
    rank: int | None = None,
    ranks: int | None = None,
    layout: str = "contiguous",
) -> Tensor:
    """The columns of a sequence that a rank of context or sequence parallelism holds.

    Example:
        >>> positions(8, rank=0, ranks=2), positions(8, rank=0, ranks=2, layout="zigzag")
        (tensor([0, 1, 2, 3]), tensor([0, 1, 6, 7]))
        >>> labels = torch.tensor([[-100, -100, -100, -100, 5, 6, 7, 8]])
        >>> whole = Selection.from_labels(labels, shift=True)   # shift first, then cut:
        >>> whole.cut(positions(8, rank=0, ranks=2)).target     # row 3 predicts token 4
        tensor([5])

    Args:
        length: T, a multiple of the number of ranks (of twice that in a zigzag).
        group: the ranks that share a sequence; None: all.
        rank, ranks: instead of a group.
        layout: "contiguous", or "zigzag": rank r has pieces r and 2 P - 1 - r of 2 P, so that
            causal attention costs every rank the same (PyTorch's `context_parallel`).

    Returns:
        (T / P,) int64, ascending, on the CPU.

    Raises:
        ValueError: a length that does not divide, another layout, a rank that does not exist.
        TypeError: what is no whole number.
    """
    name = "sgp.parallel.positions"
    length = whole_number(name, "length", length, 0)
    if (rank is None) != (ranks is None) or (group is not None and rank is not None):
        raise ValueError(
            f"{name}: rank = {rank}, ranks = {ranks}, group = {group}; give rank and ranks, or a "
            "group"
        )
    if rank is None or ranks is None:
        pg = process_group(name, group)
        rank, ranks = distributed.get_rank(pg), distributed.get_world_size(pg)
    else:
        rank = whole_number(name, "rank", rank, 0)
        ranks = whole_number(name, "ranks", ranks, 1)
    if layout not in LAYOUTS:
        raise ValueError(f"{name}: layout = {layout!r}; expected one of {LAYOUTS}")
    if not 0 <= rank < ranks:
        raise ValueError(f"{name}: rank = {rank} of {ranks}; expected 0 <= rank < ranks")
    pieces = ranks if layout == "contiguous" else 2 * ranks
    if length % pieces:
        raise ValueError(
            f"{name}: length = {length} is no multiple of {pieces}, the pieces that a {layout} "
            f"layout cuts for {ranks} ranks; pad the sequence"
        )
    size = length // pieces
    mine = (rank,) if layout == "contiguous" else (rank, 2 * ranks - 1 - rank)
    return torch.cat([torch.arange(i * size, (i + 1) * size) for i in mine])

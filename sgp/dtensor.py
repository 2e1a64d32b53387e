"""DTensors: logits or a head sharded on the vocabulary go to `sgp.parallel`, replicated ones stay.

The result is a replicated DTensor where `input` is a DTensor, as under PyTorch's `loss_parallel`,
and a tensor where only the head is one. Other arguments may be DTensors too: they are gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from sgp import parallel
from sgp.reference import TokenLogProbs
from sgp.selection import Selection

Loss = Callable[..., Any]


def of_logits(single: Loss, input: Tensor, target: Any, **options: Any) -> Any:  # noqa: A002
    """`single(input, target, **options)` for logits (N, V, ...) or, with a Selection, (..., V).

    Raises:
        ValueError: for logits that are sharded on another dimension than the vocabulary, or wait to
            be summed.
    """
    name = f"sgp.{single.__name__}"
    rest = {key: _whole(value) for key, value in options.items()}
    if not isinstance(input, DTensor):
        return single(input, _whole(target), **rest)
    dim = input.dim() - 1 if isinstance(target, Selection) or input.dim() == 1 else 1
    at = _mesh_dim(name, "input", input, dim)
    local = input.to_local(grad_placements=input.placements)
    if at is None:
        result = single(local, _whole(target), **rest)
    else:
        split = getattr(parallel, single.__name__)
        group = input.device_mesh.get_group(at)
        size = input.shape[dim]
        result = split(local, _whole(target), group=group, vocab_size=size, **rest)
    return _replicated(result, input)


def of_head(
    single: Loss,
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    target: Any,
    linear_bias: Tensor | None = None,
    **options: Any,
) -> Any:
    """`single(input, linear_weight, target, ...)` for a head sharded on its rows.

    Hidden states that are sharded over the head's dimension of the mesh (sequence parallelism) are
    gathered, and their gradient is reduced and scattered.

    Raises:
        ValueError: for a head that is sharded on its columns or waits to be summed; hidden states
            sharded on their width, on another mesh, or over another of its dimensions; a bias that
            is not sharded as the weight is.
    """
    name = f"sgp.{single.__name__}"
    rest = {key: _whole(value) for key, value in options.items()}
    target = _whole(target)
    weight = linear_weight if isinstance(linear_weight, DTensor) else None
    at = None if weight is None else _mesh_dim(name, "linear_weight", weight, 0)
    if weight is None or at is None:
        head = (_local(linear_weight), target)
        bias = _whole(linear_bias) if linear_bias is not None else None
        result = single(_gathered(name, input, None), *head, linear_bias=bias, **rest)
        return _replicated(result, input)
    mesh = weight.device_mesh
    for label, x in (("input", input), ("linear_bias", linear_bias)):
        if isinstance(x, DTensor) and x.device_mesh != mesh:
            raise ValueError(
                f"{name}: {label} is on {x.device_mesh} and linear_weight on {mesh}; expected one "
                "mesh"
            )
    of_bias = None
    if isinstance(linear_bias, DTensor):
        of_bias = _mesh_dim(name, "linear_bias", linear_bias, 0)
    if linear_bias is not None and of_bias != at:
        shown = getattr(linear_bias, "placements", "a tensor")
        raise ValueError(
            f"{name}: linear_weight has placements {weight.placements} and linear_bias is "
            f"{shown}; shard it alike"
        )
    scattered = isinstance(input, DTensor) and not _is_whole(input, at)
    result = getattr(parallel, single.__name__)(
        _gathered(name, input, at),
        _local(linear_weight),
        target,
        linear_bias=_local(linear_bias),
        group=mesh.get_group(at),
        vocab_size=linear_weight.shape[0],
        sum_input_grad=not scattered,
        **rest,
    )
    return _replicated(result, input)


def _is_whole(x: DTensor, i: int) -> bool:
    """Whether every rank of mesh dimension i has the same of x."""
    return x.placements[i].is_replicate() or x.device_mesh.size(i) == 1


def _mesh_dim(name: str, label: str, x: DTensor, dim: int) -> int | None:
    """The mesh dimension over which x's dimension `dim` is sharded; None: over none."""
    found = None
    for i, placement in enumerate(x.placements):
        if _is_whole(x, i) and not placement.is_partial():
            continue
        if not placement.is_shard(dim % x.dim()) or found is not None:
            raise ValueError(
                f"{name}: {label} {tuple(x.shape)} has placements {x.placements}; expected "
                f"Shard({dim}), the vocabulary, on one dimension of the mesh and Replicate() on "
                "the others. For other shards take .to_local() and a denominator of all ranks "
                "(sgp.parallel.global_denominator), or redistribute"
            )
        found = i
    return found


def _gathered(name: str, x: Tensor, at: int | None) -> Tensor:
    """Hidden states as this rank's tensor, whole.

    Over mesh dimension `at` each rank has a part of the sum that their gradient is, where they are
    sharded over it; over the others, and without `at`, all ranks have the gradient itself.
    """
    if not isinstance(x, DTensor):
        return x
    sharded = [i for i in range(x.device_mesh.ndim) if not _is_whole(x, i)]
    width = x.dim() - 1
    if any(
        not x.placements[i].is_shard()
        or x.placements[i].is_shard(width)
        or (at is not None and i != at)
        for i in sharded
    ):
        raise ValueError(
            f"{name}: input {tuple(x.shape)} has placements {x.placements}; expected Replicate(), "
            "or Shard of another dimension than the last over the ranks that share the vocabulary. "
            "For a batch sharded over others take .to_local() and a denominator of all ranks "
            "(sgp.parallel.global_denominator)"
        )
    whole: tuple[Placement, ...] = (Replicate(),) * x.device_mesh.ndim
    grads = tuple(Partial() if i == at and i in sharded else Replicate() for i in range(len(whole)))
    return x.redistribute(placements=whole).to_local(grad_placements=grads)


def _local(x: Tensor | None) -> Tensor | None:
    """This rank's part."""
    return x.to_local(grad_placements=x.placements) if isinstance(x, DTensor) else x


def _whole(value: Any) -> Any:
    """A DTensor gathered; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _replicated(result: Any, like: Tensor) -> Any:
    """The result as DTensors on like's mesh, where like is one."""
    if not isinstance(like, DTensor):
        return result
    if isinstance(result, TokenLogProbs):
        return TokenLogProbs(*(_replicated(x, like) for x in result if x is not None))
    if isinstance(result, tuple):
        return tuple(_replicated(value, like) for value in result)
    everywhere = (Replicate(),) * like.device_mesh.ndim
    return DTensor.from_local(result, like.device_mesh, everywhere, run_check=False)

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


def of_logits(single: Loss, input: DTensor, target: Any, **options: Any) -> Any:  # noqa: A002
    """`single(input, target, **options)` for logits (N, V, ...) or, with a Selection, (..., V).

    Raises:
        ValueError: for logits that are sharded on another dimension than the vocabulary, or wait to
            be summed.
    """
    name = f"sgp.{single.__name__}"
    dim = input.dim() - 1 if isinstance(target, Selection) or input.dim() == 1 else 1
    at = _mesh_dim(name, "input", input, dim)
    local = input.to_local(grad_placements=input.placements)
    rest = {key: _whole(value) for key, value in options.items()}
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

    Hidden states that are sharded on another dimension of the same mesh (sequence parallelism) are
    gathered, and their gradient is reduced and scattered.

    Raises:
        ValueError: for a head that is sharded on its columns or waits to be summed; hidden states
            sharded on their width or on another mesh.
    """
    name = f"sgp.{single.__name__}"
    rest = {key: _whole(value) for key, value in options.items()}
    target = _whole(target)
    if not isinstance(linear_weight, DTensor):
        local = _gathered(name, input, summed=False)
        result = single(
            local, _whole(linear_weight), target, linear_bias=_local(linear_bias), **rest
        )
        return _replicated(result, input)
    at = _mesh_dim(name, "linear_weight", linear_weight, 0)
    weight, bias = _local(linear_weight), _local(linear_bias)
    if isinstance(input, DTensor) and input.device_mesh != linear_weight.device_mesh:
        raise ValueError(
            f"{name}: input is on {input.device_mesh} and linear_weight on "
            f"{linear_weight.device_mesh}; expected one mesh"
        )
    if at is None:
        local = _gathered(name, input, summed=False)
        return _replicated(single(local, weight, target, linear_bias=bias, **rest), input)
    if linear_bias is not None and not isinstance(linear_bias, DTensor):
        raise ValueError(
            f"{name}: linear_weight is a DTensor {linear_weight.placements} and linear_bias a "
            "tensor; shard it alike"
        )
    split = getattr(parallel, single.__name__)
    scattered = isinstance(input, DTensor) and any(p.is_shard() for p in input.placements)
    result = split(
        _gathered(name, input, summed=scattered),
        weight,
        target,
        linear_bias=bias,
        group=linear_weight.device_mesh.get_group(at),
        vocab_size=linear_weight.shape[0],
        sum_input_grad=not scattered,
        **rest,
    )
    return _replicated(result, input)


def _mesh_dim(name: str, label: str, x: DTensor, dim: int) -> int | None:
    """The mesh dimension over which x's dimension `dim` is sharded; None: over none."""
    found = None
    for i, placement in enumerate(x.placements):
        if placement.is_replicate():
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


def _gathered(name: str, x: Tensor, *, summed: bool) -> Tensor:
    """Hidden states as this rank's tensor, whole; `summed`: their gradient is a part of a sum."""
    if not isinstance(x, DTensor):
        return x
    sharded = [i for i, placement in enumerate(x.placements) if not placement.is_replicate()]
    width = x.dim() - 1
    if any(not x.placements[i].is_shard() or x.placements[i].is_shard(width) for i in sharded):
        raise ValueError(
            f"{name}: input {tuple(x.shape)} has placements {x.placements}; expected Replicate(), "
            "or Shard of another dimension than the last"
        )
    whole: tuple[Placement, ...] = (Replicate(),) * x.device_mesh.ndim
    grads = tuple(
        Partial() if summed and i in sharded else Replicate() for i in range(len(x.placements))
    )
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
        return TokenLogProbs(*(_replicated(value, like) for value in result))
    if isinstance(result, tuple):
        return tuple(_replicated(value, like) for value in result)
    everywhere = (Replicate(),) * like.device_mesh.ndim
    return DTensor.from_local(result, like.device_mesh, everywhere, run_check=False)

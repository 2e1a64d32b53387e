"""DTensors: what is sharded on the vocabulary goes to `sgp.parallel`, on the tokens to each rank.

Logits or hidden states that are sharded on the batch or the sequence stay where they are: every
rank computes the losses of its own rows, a mean divides by the count of all ranks, and sums are
added up over them. Both may be sharded, over different dimensions of a mesh.

The result is a DTensor where `input` is one, as under PyTorch's `loss_parallel`: replicated, or
sharded as the tokens are where there is a value a token; and a tensor where only the head is one.
Other arguments may be DTensors too: they are gathered, or cut as the tokens are.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from sgp.head.chunks import check_sizes
from sgp.labels import IGNORE, tokens_ahead
from sgp.parallel import losses, own_loss
from sgp.parallel.tokens import Loss, Tokens, all_whole, is_whole, whole
from sgp.reference import TokenLogProbs
from sgp.rows.problem import check_selection, refuse_shift_of_selection
from sgp.rows.recipe import Recipe
from sgp.rows.reduction import check_reduction
from sgp.selection import Selection

OF_RANKS: dict[str, Loss] = {
    function.__name__: function
    for function in (
        losses.cross_entropy,
        losses.linear_cross_entropy,
        losses.token_log_probs,
        losses.linear_token_log_probs,
        own_loss.linear_loss,
    )
}  # those of a split vocabulary


def of_logits(single: Loss, input: Tensor, target: Any, **options: Any) -> Any:  # noqa: A002
    """`single(input, target, **options)` for logits (N, V, ...) or, with a Selection, (..., V).

    Raises:
        ValueError: for logits that wait to be summed or whose vocabulary is sharded twice; for
            targets and weights of other shapes than the whole logits'; for a mean over sequences
            that are cut.
    """
    name = f"sgp.{single.__name__}"
    if not isinstance(input, DTensor):
        return single(input, whole(target), **all_whole(options))
    mesh = input.device_mesh
    dim = input.dim() - 1 if isinstance(target, Selection) or input.dim() == 1 else 1
    at = _mesh_dim(name, "input", input, dim, tokens=True)
    local = input.to_local(grad_placements=input.placements)
    function = single
    if at is not None:
        function = functools.partial(
            OF_RANKS[single.__name__],
            group=mesh.get_group(at),
            vocab_size=input.shape[dim],
        )
    tokens = Tokens.of(name, input, dim, at)
    if tokens is None:
        return _replicated(function(local, whole(target), **all_whole(options)), input)
    if isinstance(target, Selection) and local.dim() > 2:
        local = local.movedim(-1, 1)
    target, options = _labels_of(name, input, target, options, last="V")
    return tokens.loss(function, (local,), target, options, single.__name__)


def of_head(
    single: Loss,
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    target: Any,
    linear_bias: Tensor | None = None,
    **options: Any,
) -> Any:
    """`single(input, linear_weight, target, ...)` for a head sharded on its rows, or replicated.

    Hidden states that are sharded over the head's dimension of the mesh (sequence parallelism) are
    gathered, and their gradient is reduced and scattered. Over other dimensions they stay where
    they are, and the head's gradient is summed.

    Raises:
        ValueError: for a head that is sharded on its columns or waits to be summed; hidden states
            sharded on their width, or on another mesh; a bias that is not sharded as the weight is;
            `accumulate_into`; and as `of_logits`.
    """
    name = f"sgp.{single.__name__}"
    weight: Any = linear_weight
    _check_pieces(single.__name__, weight, options)
    at = _mesh_dim(name, "linear_weight", weight, 0) if isinstance(weight, DTensor) else None
    for label, x in (("input", input), ("linear_bias", linear_bias)):
        if at is not None and isinstance(x, DTensor) and x.device_mesh != weight.device_mesh:
            raise ValueError(
                f"{name}: {label} is on {x.device_mesh} and linear_weight on "
                f"{weight.device_mesh}; expected one mesh"
            )
    of_bias = None
    if at is not None and isinstance(linear_bias, DTensor):
        of_bias = _mesh_dim(name, "linear_bias", linear_bias, 0)
    if linear_bias is not None and of_bias != at:
        shown = getattr(linear_bias, "placements", "a tensor")
        raise ValueError(
            f"{name}: linear_weight has placements {weight.placements} and linear_bias is "
            f"{shown}; shard it alike"
        )
    function = single
    if at is not None:
        scattered = isinstance(input, DTensor) and not is_whole(input, at)
        function = functools.partial(
            OF_RANKS[single.__name__],
            group=weight.device_mesh.get_group(at),
            vocab_size=weight.shape[0],
            sum_input_grad=not scattered,
        )
    if isinstance(input, DTensor):
        _check_hidden(name, input)
        tokens = Tokens.of(name, input, input.dim() - 1, at)
        hidden = _gathered(input, at, tokens)
        if tokens is not None:
            target, options = _labels_of(name, input, target, options, last="D")
            bias = None if linear_bias is None else tokens.shared(linear_bias)
            arguments, options = (hidden, tokens.shared(weight)), options | {"linear_bias": bias}
            if "loss_fn" in options:
                return tokens.own_loss(function, arguments, target, options)
            return tokens.loss(function, arguments, target, options, single.__name__)
    else:
        hidden = input
    own_bias = whole(linear_bias) if at is None else _local(linear_bias)
    own, options = (hidden, _local(weight), whole(target)), all_whole(options)
    return _replicated(function(*own, linear_bias=own_bias, **options), input)


def _labels_of(
    name: str,
    input: DTensor,  # noqa: A002
    target: Any,
    options: dict[str, Any],
    *,
    last: str,
) -> tuple[Tensor, dict[str, Any]]:
    """Targets that can be cut, shifted if need be, and the options that go with them.

    `last`: the letter of input's last dimension, for messages.
    """
    options = dict(options)
    shift = options.pop("shift", False)
    ahead = tokens_ahead(name, shift, 1)
    ignore, row_weight = options.get("ignore_index"), options.pop("token_weight", None)
    recipe = Recipe(IGNORE if ignore is None else ignore).check(name)
    if "reduction" in options:
        check_reduction(name, options["reduction"], options["denominator"])
    if isinstance(target, Selection):
        check_selection(name, input, target, row_weight, recipe, last)
        refuse_shift_of_selection(name, shift)
        packed = target.boundaries is not None or target.is_part
        if packed and options.get("reduction", "none").startswith("sequence"):
            raise ValueError(
                f"{name}: reduction={options['reduction']!r} of a Selection that is packed or cut, "
                f"and an input with placements {input.placements}: redistribute input first"
            )
        selection = target
    elif ahead:
        row_weight = whole(row_weight)
        selection = Selection.from_labels(
            whole(target), ignore_index=ignore, shift=shift, token_weight=row_weight
        )
        options["ignore_index"] = IGNORE
    else:
        return target, options | {"token_weight": row_weight}
    weight = selection.dense_weight
    options["token_weight"] = None if weight is None else weight.view(selection.shape)
    return selection.dense_target.view(selection.shape), options


def _check_pieces(function: str, weight: Any, options: dict[str, Any]) -> None:
    """Refuse sizes that are none, and a tensor to which no DTensor's gradient can be added."""
    name = f"sgp.{function}"
    check_sizes(name, options["chunk_rows"], options["memory_budget"])
    if options.get("accumulate_into") is None:
        return
    what = "beside DTensors; leave it out, or pass what each DTensor's .to_local() gives"
    if isinstance(weight, DTensor):
        what = (
            f"of a linear_weight that is a DTensor {weight.placements}, whose gradient is one too; "
            "leave it out and use .grad. Where its rows are a vocabulary split over ranks, "
            f"sgp.parallel.{function} takes linear_weight.to_local().detach().requires_grad_() "
            "and a tensor of that shape"
        )
    raise ValueError(f"{name}: accumulate_into {what}")


def _mesh_dim(name: str, label: str, x: DTensor, dim: int, *, tokens: bool = False) -> int | None:
    """The mesh dimension over which x's dimension `dim` is sharded; None: over none.

    `tokens`: the other dimensions, which are tokens, may be sharded too.
    """
    found = None
    for i, placement in enumerate(x.placements):
        if is_whole(x, i) and not placement.is_partial():
            continue
        if isinstance(placement, Shard) and placement.dim != dim % x.dim() and tokens:
            continue
        if not placement.is_shard(dim % x.dim()) or found is not None:
            raise ValueError(
                f"{name}: {label} {tuple(x.shape)} has placements {x.placements}; expected "
                f"Shard({dim}), the vocabulary, on one dimension of the mesh and Replicate()"
                + (" or Shard of the tokens" if tokens else "")
                + " on the others; redistribute it"
            )
        found = i
    return found


def _check_hidden(name: str, x: DTensor) -> None:
    """Refuse hidden states that are sharded on their width or wait to be summed."""
    for i, placement in enumerate(x.placements):
        if is_whole(x, i):
            continue
        if not isinstance(placement, Shard) or placement.dim == x.dim() - 1:
            raise ValueError(
                f"{name}: input {tuple(x.shape)} has placements {x.placements}; expected "
                "Replicate(), or Shard of another dimension than the last"
            )


def _gathered(x: DTensor, at: int | None, tokens: Tokens | None) -> Tensor:
    """Hidden states as this rank's tensor, gathered over mesh dimension `at`.

    There each rank has a part of the sum that their gradient is, where they are sharded over it;
    over the others all ranks have the gradient of their own.
    """
    kept = (Replicate(),) * x.device_mesh.ndim if tokens is None else tokens.placements
    grads = tuple(
        Partial() if i == at and not is_whole(x, i) else placement
        for i, placement in enumerate(kept)
    )
    return x.redistribute(placements=kept).to_local(grad_placements=grads)


def _local(x: Tensor | None) -> Tensor | None:
    """This rank's part."""
    return x.to_local(grad_placements=x.placements) if isinstance(x, DTensor) else x


def _replicated(result: Any, like: Tensor) -> Any:
    """The result as DTensors on like's mesh, where like is one."""
    if not isinstance(like, DTensor):
        return result
    if isinstance(result, TokenLogProbs):
        return TokenLogProbs(*(_replicated(x, like) for x in result if x is not None))
    if isinstance(result, tuple):
        return tuple(_replicated(value, like) for value in result)
    if isinstance(result, dict):  # metrics
        return {key: _replicated(value, like) for key, value in result.items()}
    everywhere = (Replicate(),) * like.device_mesh.ndim
    return DTensor.from_local(result, like.device_mesh, everywhere, run_check=False)

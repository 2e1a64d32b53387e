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
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from sgp.head.chunks import check_sizes
from sgp.labels import IGNORE, tokens_ahead
from sgp.parallel import losses
from sgp.reference import TokenLogProbs
from sgp.rows.problem import (
    check_mean_weights,
    check_selection,
    check_tensor,
    refuse_shift_of_selection,
)
from sgp.rows.recipe import Recipe, accumulation_dtype
from sgp.rows.reduction import check_reduction
from sgp.selection import Selection

Loss = Callable[..., Any]


def of_logits(single: Loss, input: Tensor, target: Any, **options: Any) -> Any:  # noqa: A002
    """`single(input, target, **options)` for logits (N, V, ...) or, with a Selection, (..., V).

    Raises:
        ValueError: for logits that wait to be summed or whose vocabulary is sharded twice; for
            targets and weights of other shapes than the whole logits'; for a mean over sequences
            that are cut.
    """
    name = f"sgp.{single.__name__}"
    if not isinstance(input, DTensor):
        return single(input, _whole(target), **_all_whole(options))
    mesh = input.device_mesh
    dim = input.dim() - 1 if isinstance(target, Selection) or input.dim() == 1 else 1
    at = _mesh_dim(name, "input", input, dim, tokens=True)
    local = input.to_local(grad_placements=input.placements)
    function = single
    if at is not None:
        function = functools.partial(
            getattr(losses, single.__name__),
            group=mesh.get_group(at),
            vocab_size=input.shape[dim],
        )
    tokens = _Tokens.of(name, input, dim, at)
    if tokens is None:
        return _replicated(function(local, _whole(target), **_all_whole(options)), input)
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
        scattered = isinstance(input, DTensor) and not _is_whole(input, at)
        function = functools.partial(
            getattr(losses, single.__name__),
            group=weight.device_mesh.get_group(at),
            vocab_size=weight.shape[0],
            sum_input_grad=not scattered,
        )
    if isinstance(input, DTensor):
        _check_hidden(name, input)
        tokens = _Tokens.of(name, input, input.dim() - 1, at)
        hidden = _gathered(input, at, tokens)
        if tokens is not None:
            target, options = _labels_of(name, input, target, options, last="D")
            bias = None if linear_bias is None else tokens.shared(linear_bias)
            arguments, options = (hidden, tokens.shared(weight)), options | {"linear_bias": bias}
            return tokens.loss(function, arguments, target, options, single.__name__)
    else:
        hidden = input
    own_bias = _whole(linear_bias) if at is None else _local(linear_bias)
    own, options = (hidden, _local(weight), _whole(target)), _all_whole(options)
    return _replicated(function(*own, linear_bias=own_bias, **options), input)


class _Tokens(NamedTuple):
    """Tokens that are shared out over a mesh: every rank has the loss of its own."""

    name: str
    mesh: Any
    placements: tuple[Placement, ...]  # of the targets
    shape: torch.Size  # of all ranks' targets
    dtype: torch.dtype

    @staticmethod
    def of(name: str, x: DTensor, dim: int, at: int | None) -> _Tokens | None:
        """Those of logits or hidden states whose dimension `dim` is no tokens'; None: not shared.

        Over mesh dimension `at` the tokens are gathered, or the vocabulary is split.
        """
        placements = tuple(
            Shard(placement.dim - (placement.dim > dim))
            if isinstance(placement, Shard) and i != at and not _is_whole(x, i)
            else Replicate()
            for i, placement in enumerate(x.placements)
        )
        if all(placement.is_replicate() for placement in placements):
            return None
        shape = torch.Size(size for i, size in enumerate(x.shape) if i != dim)
        return _Tokens(name, x.device_mesh, placements, shape, accumulation_dtype(x.dtype))

    @property
    def everywhere(self) -> tuple[Placement, ...]:
        """Of what all ranks have."""
        return (Replicate(),) * len(self.placements)

    def loss(
        self,
        function: Loss,
        arguments: tuple[Tensor, ...],
        target: Tensor,
        options: dict[str, Any],
        kind: str,
    ) -> Any:
        """What `function(*arguments, target)` gives of the rank's tokens, joined over the mesh."""
        ignore = options.get("ignore_index")
        ignore = IGNORE if ignore is None else ignore
        mine = self.cut("target", target)
        row_weight = options.pop("token_weight", None)
        if row_weight is not None:
            row_weight = self.cut("token_weight", row_weight)
        options = _all_whole(options)
        if "token_log_probs" in kind:
            found = function(*arguments, mine, **options)
            return self.put_statistics(found)
        reduction, denominator = options["reduction"], options["denominator"]
        check_reduction(self.name, reduction, denominator)
        self._check_sequences(reduction)
        if reduction == "mean" and denominator is None:
            weight = options["weight"]
            if weight is not None:
                check_tensor(self.name, "weight", weight)
            total = self.divisor(mine, ignore, weight, row_weight)
            if weight is not None and options["lse_square_scale"]:
                # The z-loss is divided by the tokens' weights alone (see sgp.rows.divisor).
                of_z_loss = self.divisor(mine, ignore, None, row_weight)
                ratio = torch.where(total == 0, 0, of_z_loss / torch.where(total == 0, 1, total))
                options["weight"], total = weight.to(ratio.dtype) * ratio, of_z_loss
            options["denominator"] = total
        found = function(*arguments, mine, token_weight=row_weight, **options)
        loss, stats = found if isinstance(found, tuple) else (found, None)
        loss = self.put(loss) if reduction == "none" else self.join(loss, reduction)
        return loss if stats is None else (loss, self.put_statistics(stats))

    def cut(self, label: str, value: Tensor) -> Tensor:
        """This rank's part of targets, or of what else has their shape."""
        check_tensor(self.name, label, value)
        classes = value.dim() - len(self.shape)  # 1: class probabilities
        if value.shape[:1] + value.shape[1 + classes :] != self.shape:
            raise ValueError(
                f"{self.name}: {label} is {tuple(value.shape)}; expected {tuple(self.shape)}, of "
                "all ranks' tokens: pass the whole one, or a DTensor sharded as input is"
            )
        placements = tuple(
            Shard(p.dim + classes * (p.dim > 0)) if isinstance(p, Shard) else p
            for p in self.placements
        )
        if isinstance(value, DTensor) and value.device_mesh != self.mesh:
            value = value.full_tensor()
        if not isinstance(value, DTensor):
            value = DTensor.from_local(value, self.mesh, self.everywhere, run_check=False)
        return value.redistribute(placements=placements).to_local()

    def shared(self, x: Tensor) -> Tensor:
        """This rank's part of a head that all ranks' tokens use: its gradient is summed."""
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, self.mesh, self.everywhere, run_check=False)
        if x.device_mesh != self.mesh:
            raise ValueError(
                f"{self.name}: input is on {self.mesh} and the head on {x.device_mesh}; expected "
                "one mesh"
            )
        grads = tuple(
            own if mine.is_replicate() else Partial()
            for own, mine in zip(x.placements, self.placements, strict=True)
        )
        # Redistributing to where it is does nothing, but backward it sums.
        return x.redistribute(placements=x.placements).to_local(grad_placements=grads)

    def divisor(
        self, target: Tensor, ignore_index: int, weight: Tensor | None, row_weight: Tensor | None
    ) -> Tensor:
        """The sum () of the weights of all ranks' kept tokens."""
        if target.is_floating_point():  # class probabilities, whose mean is one over the rows
            weight, kept = None, torch.ones_like(target.select(1, 0), dtype=torch.bool)
        else:
            kept = target != ignore_index
        total = kept.sum()
        if weight is not None or row_weight is not None:
            counts = kept.to(self.dtype)
            if weight is not None:
                counts = counts * weight[target.clamp(0, weight.numel() - 1)]
            if row_weight is not None:
                check_mean_weights(self.name, kept.flatten(), row_weight.flatten())
                counts = torch.where(kept, counts * row_weight, 0)
            total = counts.sum()
        for i, placement in enumerate(self.placements):
            if not placement.is_replicate():
                distributed.all_reduce(total, group=self.mesh.get_group(i))
        return total

    def put(self, value: Tensor) -> DTensor:
        """All ranks' results a token, from this rank's."""
        return self._from_local(value, self.placements, self.shape)

    def put_statistics(self, found: TokenLogProbs) -> TokenLogProbs:
        """All ranks' statistics; `argmax`, the last, may be None."""
        return TokenLogProbs(*(self.put(x) for x in found if x is not None))

    def join(self, value: Tensor, reduction: str) -> DTensor:
        """All ranks' loss (), or losses a sequence (S,), from this rank's."""
        is_scalar = reduction in ("mean", "sum") or len(self.shape) < 2
        shape = torch.Size() if reduction in ("mean", "sum") else self.shape[:-1] or torch.Size([1])
        parts = tuple(
            p if p.is_replicate() or (p.is_shard(0) and not is_scalar) else Partial()
            for p in self.placements
        )
        found = self._from_local(value, parts, shape)
        for i, part in enumerate(parts):  # one by one: together PyTorch warns of their order
            if part.is_partial():
                joined = (*found.placements[:i], Replicate(), *found.placements[i + 1 :])
                found = found.redistribute(placements=joined)
        return found

    def _from_local(
        self, value: Tensor, placements: tuple[Placement, ...], shape: torch.Size
    ) -> DTensor:
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            value, self.mesh, placements, run_check=False, shape=shape, stride=stride
        )

    def _check_sequences(self, reduction: str) -> None:
        if not reduction.startswith("sequence"):
            return
        last = len(self.shape) - 1
        is_cut = any(placement.is_shard(last) for placement in self.placements)
        if len(self.shape) > 2 or (is_cut and reduction == "sequence_mean"):
            raise ValueError(
                f"{self.name}: reduction={reduction!r} of tokens {tuple(self.shape)} with "
                f"placements {self.placements}: no rank has a whole sequence; redistribute input, "
                "or add up 'sequence_sum' and divide by the counts"
            )


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
        row_weight = _whole(row_weight)
        selection = Selection.from_labels(
            _whole(target), ignore_index=ignore, shift=shift, token_weight=row_weight
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
    if options["accumulate_into"] is None:
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


def _is_whole(x: DTensor, i: int) -> bool:
    """Whether every rank of mesh dimension i has the same of x."""
    return x.placements[i].is_replicate() or x.device_mesh.size(i) == 1


def _mesh_dim(name: str, label: str, x: DTensor, dim: int, *, tokens: bool = False) -> int | None:
    """The mesh dimension over which x's dimension `dim` is sharded; None: over none.

    `tokens`: the other dimensions, which are tokens, may be sharded too.
    """
    found = None
    for i, placement in enumerate(x.placements):
        if _is_whole(x, i) and not placement.is_partial():
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
        if _is_whole(x, i):
            continue
        if not isinstance(placement, Shard) or placement.dim == x.dim() - 1:
            raise ValueError(
                f"{name}: input {tuple(x.shape)} has placements {x.placements}; expected "
                "Replicate(), or Shard of another dimension than the last"
            )


def _gathered(x: DTensor, at: int | None, tokens: _Tokens | None) -> Tensor:
    """Hidden states as this rank's tensor, gathered over mesh dimension `at`.

    There each rank has a part of the sum that their gradient is, where they are sharded over it;
    over the others all ranks have the gradient of their own.
    """
    kept = (Replicate(),) * x.device_mesh.ndim if tokens is None else tokens.placements
    grads = tuple(
        Partial() if i == at and not _is_whole(x, i) else placement
        for i, placement in enumerate(kept)
    )
    return x.redistribute(placements=kept).to_local(grad_placements=grads)


def _local(x: Tensor | None) -> Tensor | None:
    """This rank's part."""
    return x.to_local(grad_placements=x.placements) if isinstance(x, DTensor) else x


def _whole(value: Any) -> Any:
    """A DTensor gathered; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _all_whole(options: dict[str, Any]) -> dict[str, Any]:
    return {key: _whole(value) for key, value in options.items()}


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

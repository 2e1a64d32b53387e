"""Tokens of DTensors that are shared out over a mesh: every rank has the loss of its own.

A mean divides by the count of all ranks, and sums are added up over them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from sgp.head.mixing import reaches_others
from sgp.labels import IGNORE
from sgp.reference import TokenLogProbs
from sgp.rows.problem import check_mean_weights, check_tensor
from sgp.rows.recipe import accumulation_dtype
from sgp.rows.reduction import check_reduction

Loss = Callable[..., Any]


class Tokens(NamedTuple):
    """Tokens that are shared out over a mesh: every rank has the loss of its own."""

    name: str
    mesh: Any
    placements: tuple[Placement, ...]  # of the targets
    shape: torch.Size  # of all ranks' targets
    dtype: torch.dtype

    @staticmethod
    def of(name: str, x: DTensor, dim: int, at: int | None) -> Tokens | None:
        """Those of logits or hidden states whose dimension `dim` is no tokens'; None: not shared.

        Over mesh dimension `at` the tokens are gathered, or the vocabulary is split.
        """
        placements = tuple(
            Shard(placement.dim - (placement.dim > dim))
            if isinstance(placement, Shard) and i != at and not is_whole(x, i)
            else Replicate()
            for i, placement in enumerate(x.placements)
        )
        if all(placement.is_replicate() for placement in placements):
            return None
        shape = torch.Size(size for i, size in enumerate(x.shape) if i != dim)
        return Tokens(name, x.device_mesh, placements, shape, accumulation_dtype(x.dtype))

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
        options = all_whole(options)
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

    def own_loss(
        self,
        function: Loss,
        arguments: tuple[Tensor, ...],
        target: Tensor,
        options: dict[str, Any],
    ) -> Any:
        """The same of `linear_loss`, whose `loss_fn` gets positions among all ranks' tokens."""
        loss_fn, by = options.pop("loss_fn"), options["by"]
        if by != "row":
            raise ValueError(
                f"{self.name}: by = {by!r} of tokens with placements {self.placements}, of which "
                "this rank has a part; redistribute input to Replicate() first, or call it with "
                "each tensor's .to_local() where every rank has whole sequences"
            )
        mine = self.cut("target", target)
        row_weight = options.pop("token_weight", None)
        if row_weight is not None:
            row_weight = self.cut("token_weight", row_weight).flatten()
        place = torch.arange(self.shape.numel(), device=mine.device).view(self.shape)
        place = self.cut("target", place).flatten()

        @functools.wraps(loss_fn)
        def of_rank(tokens: TokenLogProbs, rows: Tensor) -> Any:
            returned = loss_fn(tokens, place[rows])
            numbers = returned[0] if isinstance(returned, tuple) else returned
            if not isinstance(numbers, Tensor):
                return returned
            if reaches_others(numbers, tokens[:3]):
                raise ValueError(
                    f"{self.name}: loss_fn uses a tensor that requires grad, beside tokens; input "
                    f"has placements {self.placements}, and a rank would have its own tokens' part "
                    "of that gradient. Redistribute input to Replicate() first"
                )
            if row_weight is not None and numbers.shape == rows.shape:
                numbers = numbers * row_weight[rows]
            return (numbers, returned[1]) if isinstance(returned, tuple) else numbers

        found = function(*arguments, mine, of_rank, **all_whole(options))
        if not isinstance(found, tuple):
            return self.join(found, "sum")
        joined: list[Any] = [self.join(found[0], "sum")]
        for part in found[1:]:
            if isinstance(part, TokenLogProbs):
                joined.append(self.put_statistics(part))
            else:
                joined.append({key: self.put(x) for key, x in part.items()})
        return tuple(joined)

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


def is_whole(x: DTensor, i: int) -> bool:
    """Whether every rank of mesh dimension i has the same of x."""
    return x.placements[i].is_replicate() or x.device_mesh.size(i) == 1


def whole(value: Any) -> Any:
    """A DTensor gathered; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def all_whole(options: dict[str, Any]) -> dict[str, Any]:
    """Every DTensor among them gathered."""
    return {key: whole(value) for key, value in options.items()}

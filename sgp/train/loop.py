"""Training in lockstep: the same model twice, the same batches, PyTorch's loss and another."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import sgp
from sgp.interrupt import StopRequest
from sgp.train.batch import IGNORE_INDEX, Batch
from sgp.train.model import Parts, split_model

Loss = Callable[[Parts, Batch, str], Tensor]


def pytorch_loss(parts: Parts, batch: Batch, reduction: str = "mean") -> Tensor:
    """The usual loss: logits of every row, then cross-entropy that ignores most of them."""
    return functional.cross_entropy(
        parts.logits(batch).flatten(0, 1),
        batch.shifted_labels.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction=reduction,
    )


def sgp_loss(parts: Parts, batch: Batch, reduction: str = "mean") -> Tensor:
    """The same loss from the kept rows alone: gather the hidden states, then the head."""
    return sgp.cross_entropy(parts.kept_logits(batch), batch.selection.target, reduction=reduction)


def sgp_linear_loss(parts: Parts, batch: Batch, reduction: str = "mean") -> Tensor:
    """The same loss with the head inside: no logits of the whole batch."""
    return sgp.linear_cross_entropy(
        parts.hidden(batch),
        parts.head.weight,
        batch.selection,
        linear_bias=parts.head.bias,
        logit_scale=parts.logit_scale,
        softcap=parts.softcap,
        reduction=reduction,
    )


# `--loss`, the loss itself, and its name in tables and pictures.
LOSSES = {
    "pytorch": (pytorch_loss, "PyTorch, all rows"),
    "sgp": (sgp_loss, "sgp, kept rows"),
    "sgp-linear": (sgp_linear_loss, "sgp, linear head"),
}


def second_name(loss: str) -> str:
    """The name of the second copy in tables and pictures."""
    return "PyTorch, control" if loss == "pytorch" else LOSSES[loss][1]


@dataclass
class Curves:
    """The losses of the steps that both copies completed, in nats an output token."""

    pytorch: list[float] = field(default_factory=list)
    sgp: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sgp)

    @property
    def differences(self) -> list[float]:
        """|PyTorch's loss - sgp's loss| of each step."""
        return [abs(a - b) for a, b in zip(self.pytorch, self.sgp, strict=True)]

    @property
    def first_not_finite(self) -> int | None:
        """The first step (from 1) with a loss that is NaN or inf, if there is one."""
        pairs = enumerate(zip(self.pytorch, self.sgp, strict=True), start=1)
        return next((i for i, both in pairs if not all(map(math.isfinite, both))), None)


class Learner:
    """One copy of the model with its loss and its optimizer.

    Dropout is off, so that two copies see the same network.
    """

    def __init__(self, model: Any, loss: Loss, *, lr: float, steps: int) -> None:
        self.parts = split_model(model.eval())
        self.loss = loss
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: schedule(step, steps)
        )

    def step(self, batch: Batch) -> Tensor:
        """Train on one batch; return its loss before the step, without waiting for the device."""
        loss = self.loss(self.parts, batch, "mean")
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parts.model.parameters(), 1.0)
        self._optimizer.step()
        self._schedule.step()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Return the mean loss of all output tokens of the batches, in nats."""
        total, tokens = 0.0, 0
        for batch in batches:
            total += float(self.loss(self.parts, batch, "sum"))
            tokens += batch.selection.num_kept
        return total / max(tokens, 1)


def schedule(step: int, steps: int) -> float:
    """Return the factor of the learning rate: a tenth of the steps up, then a cosine down to 0.1.

    Example:
        >>> [round(schedule(step, 10), 2) for step in (0, 5, 10)]
        [1.0, 0.63, 0.1]
    """
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2


def make_learners(
    model: Any, *, lr: float, steps: int, loss: str = "sgp-linear"
) -> dict[str, Learner]:
    """Return two copies of one model that differ in their loss only; "sgp" has the original.

    Args:
        model: Trained in place as "sgp", and as a copy with PyTorch's loss as "pytorch".
        lr: Largest learning rate.
        steps: Optimizer steps of the schedule.
        loss: A key of LOSSES; "pytorch" makes a control, both copies with PyTorch's loss.
    """
    return {
        "pytorch": Learner(copy.deepcopy(model), pytorch_loss, lr=lr, steps=steps),
        "sgp": Learner(model, LOSSES[loss][0], lr=lr, steps=steps),
    }


def train(
    learners: Mapping[str, Learner],
    batches: Iterator[Batch],
    *,
    steps: int,
    stop: StopRequest,
    on_step: Callable[[int, Tensor, Tensor], None] = lambda *_: None,
) -> Curves:
    """Train both learners on the same batches, and return their losses.

    Args:
        learners: "pytorch" and "sgp".
        batches: At least `steps` batches, on the learners' device.
        steps: How many of them to train on.
        stop: Asked after each step; an interruption in the middle of a step (a second Ctrl-C, a
            `KeyboardInterrupt` from `on_step`) also ends the training and keeps the steps before.
        on_step: Called after each step with its number (from 1) and the two losses, tensors.
    """
    done: list[tuple[Tensor, Tensor]] = []
    try:
        for number, batch in enumerate(islice(batches, steps), start=1):
            losses = learners["pytorch"].step(batch), learners["sgp"].step(batch)
            done.append(losses)
            on_step(number, *losses)
            if stop.requested:
                break
    except KeyboardInterrupt:
        stop.requested = True
    if not done:
        return Curves()
    columns = torch.stack([torch.stack(losses).double() for losses in done]).T.tolist()
    return Curves(*columns)

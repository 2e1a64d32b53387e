"""Whether sequences of a packed row attend to one another, measured.

The last tokens of a sequence, those after its last predictor, can influence later sequences only.
Where they have a gradient in the pass that is made anyway, or where there are none of them, further
passes ask for the gradient of some sequences' loss alone, taken from the logits: what a model adds
to its loss has none in it. The first is of all sequences that may be at fault, and says whether one
is; each further one halves them. At most three such passes, of all rows in doubt at once: what they
cannot tell apart is reported together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sgp.auditing.view import Leak, View
from sgp.labels import IGNORE

PASSES = 3


@dataclass
class _Doubt:
    """What is known of one row."""

    row: int
    number: Tensor  # (T,) int64: of each token's sequence
    group: list[int]  # sequences of which one is at fault, if anything is
    rest: list[int] = field(default_factory=list)  # asked if none of the group is
    reached: Tensor | None = None  # (T,) bool: tokens of others that the group's loss reaches
    exact: bool = False

    @property
    def part(self) -> list[int]:
        """The sequences to ask next: all at first, then the later half."""
        first = self.reached is None or len(self.group) == 1
        return self.group if first else self.group[len(self.group) // 2 :]

    def learn(self, part: list[int], others: Tensor) -> None:
        """Take in which tokens the loss of a part reaches that it should not."""
        if bool(others.any()):
            after = int(self.number[others].max())  # reached by a later one
            self.group = [n for n in part if n > after] or part
            self.reached = others
            if len(self.group) < len(part):
                self.reached = others & (self.number == after)
            self.exact = len(part) == 1
        elif self.reached is None:
            self.group, self.rest = self.rest, []
        else:
            self.group = [n for n in self.group if n not in part] or self.group


def find_leaks(
    view: View, grad_norm: Tensor, measure: Callable[[Tensor], Tensor]
) -> tuple[Leak, ...]:
    """The sequences whose loss has gradient at other sequences' tokens.

    Example:
        >>> find_leaks(view, found.grad_norm, measure)  # doctest: +SKIP
        (Leak(row=0, sequences=(2,), span=(8, 15), reached=(0, 1), tokens=(0, 1, 2, 3)),)

    Args:
        view: the batch.
        grad_norm: (layers + 1, B, T), of the pass that was made.
        measure: the same, given the targets (B, T) of a further pass.
    """
    seam = torch.zeros_like(view.starts)
    seam[:, :-1] = view.starts[:, 1:]  # what stands before one predicts nothing of its own
    own = torch.where(view.attended & ~seam, view.targets, IGNORE)
    doubts = list(_doubts(view, own, grad_norm))
    for _ in range(PASSES):
        asked = [(doubt, doubt.part) for doubt in doubts if doubt.group and not doubt.exact]
        if not asked:
            break
        kept = torch.zeros_like(view.attended)
        for doubt, part in asked:
            kept[doubt.row] = torch.isin(doubt.number, torch.tensor(part))
        targets = torch.where(kept, own, IGNORE)
        reached = (measure(targets) > 0).any(0) & view.attended
        behind = _behind(view, targets != IGNORE)
        for doubt, part in asked:
            wrong = ~kept[doubt.row] | (behind[doubt.row] if len(part) > 1 else False)
            doubt.learn(part, reached[doubt.row] & wrong)
    return tuple(_leak(view, doubt) for doubt in doubts if doubt.reached is not None)


def packed(view: View) -> bool:
    """Whether a row holds several sequences."""
    return bool((view.starts.sum(1) > 1).any())


def _leak(view: View, doubt: _Doubt) -> Leak:
    of_group = torch.isin(doubt.number, torch.tensor(doubt.group)) & view.attended[doubt.row]
    here = of_group.nonzero()[:, 0]
    at = doubt.reached.nonzero()[:, 0] if doubt.reached is not None else here[:0]
    reached = tuple(doubt.number[at].unique().tolist())
    span = (int(here[0]), int(here[-1]))
    return Leak(doubt.row, tuple(doubt.group), span, reached, tuple(at.tolist()))


def _behind(view: View, predicts: Tensor) -> Tensor:
    """(B, T) bool: tokens after the last predictor of their sequence."""
    T = predicts.shape[1]
    following = torch.where(predicts, torch.arange(T), T).flip(1).cummin(1).values.flip(1)
    other = view.sequence.gather(1, following.clamp(max=T - 1)) != view.sequence
    return view.attended & (other | (following == T))


def _doubts(view: View, own: Tensor, grad_norm: Tensor) -> Iterator[_Doubt]:
    """Of each packed row whose pass leaves a doubt, the later sequences that have a loss."""
    behind = _behind(view, view.predicts)
    touched = (grad_norm > 0).any(0) & behind
    for row in (view.starts.sum(1) > 1).nonzero()[:, 0].tolist():
        number = view.sequence[row]
        every = number[view.attended[row]].unique().tolist()
        hit = number[touched[row]].unique().tolist()
        unknown = set(every) - set(number[behind[row]].tolist())
        doubtful = {*hit, *unknown}
        scored = number[own[row] != IGNORE].unique().tolist()
        later = [n for n in scored if n > min(doubtful, default=every[-1])]
        group = later
        if hit and every[-1] not in doubtful:  # nothing but other sequences adds a gradient
            group = [n for n in later if n > hit[-1]] or later
        if group:
            yield _Doubt(row, number, group, [n for n in later if n not in group])

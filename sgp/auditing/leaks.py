"""Whether sequences of a packed row attend to one another, measured.

The last tokens of a sequence, those after its last predictor, can influence later sequences only.
Where they have a gradient in the pass that is made anyway, or where there are none of them, a
further pass asks for the gradient of one sequence's loss alone, taken from the logits: what a model
adds to its loss has none in it. At most three such passes, of one sequence of every row in doubt.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sgp.auditing.view import Leak, View
from sgp.labels import IGNORE

PASSES = 3


def find_leaks(
    view: View, grad_norm: Tensor, measure: Callable[[Tensor], Tensor]
) -> tuple[Leak, ...]:
    """The sequences whose loss has gradient at other sequences' tokens.

    Args:
        view: the batch.
        grad_norm: (layers + 1, B, T), of the pass that was made.
        measure: the same, given the targets (B, T) of a further pass.
    """
    own = torch.where(view.attended, view.targets, IGNORE)
    doubt = _candidates(view, own, grad_norm)
    found = []
    for _ in range(PASSES):
        doubt = {row: numbers for row, numbers in doubt.items() if numbers}
        if not doubt:
            break
        chosen = {row: numbers.pop() for row, numbers in doubt.items()}
        targets = torch.full_like(own, IGNORE)
        for row, number in chosen.items():
            here = view.sequence[row] == number
            targets[row, here] = own[row, here]
        reached = (measure(targets) > 0).any(0) & view.attended
        for row, number in chosen.items():
            others = reached[row] & (view.sequence[row] != number)
            if bool(others.any()):
                found.append(_leak(view, row, number, others))
                doubt[row] = []
    return tuple(found)


def packed(view: View) -> bool:
    """Whether a row holds several sequences."""
    return bool((view.starts.sum(1) > 1).any())


def _leak(view: View, row: int, number: int, others: Tensor) -> Leak:
    here = ((view.sequence[row] == number) & view.attended[row]).nonzero()[:, 0]
    at = others.nonzero()[:, 0]
    reached = tuple(view.sequence[row][at].unique().tolist())
    return Leak(row, number, (int(here[0]), int(here[-1])), reached, tuple(at.tolist()))


def _candidates(view: View, own: Tensor, grad_norm: Tensor) -> dict[int, list[int]]:
    """Of each row in doubt, the later sequences that have a loss; the most telling ones last."""
    touched = (grad_norm > 0).any(0) & view.attended
    found: dict[int, list[int]] = {}
    for row in (view.starts.sum(1) > 1).nonzero()[:, 0].tolist():
        number, predicts = view.sequence[row], view.predicts[row]
        scored = number[own[row] != IGNORE].unique().tolist()
        for tail in number[view.attended[row]].unique().tolist():
            after = [n for n in scored if n > tail]
            if not after:
                continue
            here = (number == tail) & view.attended[row]
            behind = here & (predicts & here).flip(0).cumsum(0).flip(0).eq(0)
            if bool((behind & touched[row]).any()) or not bool(behind.any()):
                found[row] = list(dict.fromkeys([*after[1:-1], after[0], after[-1]]))
                break
    return found

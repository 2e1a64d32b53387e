"""Where a batch's labels are wrong: pure functions of a `View`, for findings and for repair.

(B, T) bool unless said otherwise, about tokens and not about what predicts them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgp.auditing.view import View, later
from sgp.labels import IGNORE


def shifted_twice(view: View) -> Tensor:
    """(B,) bool: labels are the next token's, all but one of them at least."""
    marked = view.labels != IGNORE
    ahead = torch.zeros_like(marked)
    ahead[:, :-1] = marked[:, :-1] & (view.labels[:, :-1] == view.input_ids[:, 1:])
    enough = ahead.sum(1) >= (marked.sum(1) - 1).clamp(min=1)
    return differing(view).any(1) & ~itself(view) & enough


def not_the_inputs(view: View) -> Tensor:
    """(B,) bool: labels of another sequence, or that nothing shifts: a guess would be needed."""
    return (differing(view).any(1) | itself(view)) & ~shifted_twice(view)


def differing(view: View) -> Tensor:
    """Labels that are neither -100 nor the token at their place."""
    return (view.labels != IGNORE) & (view.labels != view.input_ids)


def itself(view: View) -> Tensor:
    """(B,) bool: each token is trained to predict itself, and is not just one that repeats."""
    following = torch.zeros_like(view.attended)
    following[:, :-1] = view.targets[:, :-1] == view.input_ids[:, 1:]
    others = view.predicts & (view.targets != view.input_ids)
    return ~others.any(1) & (view.predicts & ~following).any(1)


def first_output_lost(view: View) -> Tensor:
    """First tokens of an output, by the batch's own mask, without loss."""
    if view.outputs is None:
        return torch.zeros_like(view.attended)
    lost = view.outputs & ~view.scored & view.attended & ~view.starts  # a start has no predictor
    lost[:, 1:] &= ~view.outputs[:, :-1] | view.starts[:, :-1]
    return lost


def crossed(view: View) -> Tensor:
    """First tokens of a packed sequence that the one before them would have to predict."""
    found = view.scored & view.starts
    found[:, 1:] &= view.attended[:, :-1]
    return found


def padding_scored(view: View) -> Tensor:
    """Padding with loss, and tokens with loss that padding would have to predict."""
    return view.scored & ~(view.attended & later(view.attended))


def unscored_ends(view: View) -> Tensor:
    """Ends of a turn directly after a scored answer, without loss, and line breaks before them."""
    found = torch.zeros_like(view.attended)
    if not view.eos:
        return found
    scored, same = view.scored, view.attended & ~view.starts
    ends = torch.isin(view.input_ids, torch.tensor(sorted(view.eos), dtype=view.input_ids.dtype))
    after = later(scored & ~ends) & ~scored & same
    return after & ends


def doubled(view: View) -> Tensor:
    """The second of two begins or two ends of text."""
    return torch.zeros_like(view.attended)

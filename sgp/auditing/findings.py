"""What can be wrong with a batch, and what a look at it and at its gradient says.

Each check is a function of a `View`, plain lists and numbers of one batch; its finding names where
it is. An error is a fault of mask or gradient; a warning may be meant; a note is worth knowing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ERRORS = (
    "labels-shifted-twice",
    "labels-not-the-inputs",
    "first-output-untrained",
    "no-targets",
    "crosses-boundary",
    "context-logit-gradient",
    "missing-gradient",
    "nan",
)
WARNINGS = ("padding-scored", "special-scored", "no-eos", "all-scored")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing."""

    code: str
    severity: str  # "error" | "warning" | "note"
    where: str  # "row 3, tokens 5 to 9"; "" for the whole batch
    message: str

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        return f"{self.severity}: {self.code}{place}: {self.message}"


@dataclass(frozen=True)
class View:
    """A batch as the checks see it, on the CPU."""

    input_ids: Tensor  # (B, T)
    labels: Tensor  # (B, T): the token itself where it is scored, -100 elsewhere; not shifted
    attended: Tensor  # (B, T) bool: not padding
    starts: Tensor  # (B, T) bool: the first token of a row or of a packed sequence
    outputs: Tensor | None  # (B, T) bool: a mask of output tokens that came with the batch
    special: frozenset[int]  # token ids of the tokenizer's special tokens, end of text aside
    eos: frozenset[int]
    log_prob: Tensor | None = None  # (B, T), of the scored token
    logit_grad_norm: Tensor | None = None  # (B, T)
    without_gradient: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()

    @property
    def scored(self) -> Tensor:
        """(B, T) bool."""
        return self.labels != -100

    @property
    def predicts(self) -> Tensor:
        """(B, T) bool: the next token is scored, in the same sequence."""
        found = torch.zeros_like(self.scored)
        found[:, :-1] = self.scored[:, 1:] & ~self.starts[:, 1:]
        return found


def find(view: View) -> list[Finding]:
    """Every finding, errors first."""
    order = {"error": 0, "warning": 1, "note": 2}
    found = [finding for check in CHECKS for finding in check(view)]
    return sorted(found, key=lambda finding: order[finding.severity])


def _severity(code: str) -> str:
    return "error" if code in ERRORS else "warning" if code in WARNINGS else "note"


def _of(code: str, where: str, message: str) -> Finding:
    return Finding(code, _severity(code), where, message)


def _rows(mask: Tensor) -> list[int]:
    return mask.any(1).nonzero()[:, 0].tolist()


def _place(mask: Tensor, row: int) -> str:
    at = mask[row].nonzero()[:, 0].tolist()
    tokens = f"token {at[0]}" if len(at) == 1 else f"{len(at)} tokens, {at[0]} to {at[-1]}"
    return f"row {row}, {tokens}"


# -- the labels ------------------------------------------------------------------------------------


def labels_and_inputs(view: View) -> Iterator[Finding]:
    """Labels are the inputs themselves: the model, or the loss, shifts them."""
    differ = view.scored & (view.labels != view.input_ids)
    ahead = torch.zeros_like(differ)
    ahead[:, :-1] = view.scored[:, :-1] & (view.labels[:, :-1] == view.input_ids[:, 1:])
    for row in _rows(differ):
        scored = int(view.scored[row].sum())
        if int(ahead[row].sum()) >= max(1, scored - 1):
            yield _of(
                "labels-shifted-twice",
                _place(differ, row),
                "labels are the next token's; the loss moves them once more, so every token is "
                "trained to predict the one after the next. Pass labels that are not shifted",
            )
        else:
            yield _of(
                "labels-not-the-inputs",
                _place(differ, row),
                "a label is neither -100 nor the token at its place: it was made from another "
                "sequence, or from one that was padded or cut in another way",
            )


def first_output(view: View) -> Iterator[Finding]:
    """The first output token is predicted by the last context token."""
    if view.outputs is None:
        return
    lost = view.outputs & ~view.scored & view.attended
    lost[:, 1:] &= ~view.outputs[:, :-1] | view.starts[:, 1:]
    for row in _rows(lost):
        yield _of(
            "first-output-untrained",
            _place(lost, row),
            "the mask marks this token as output and it has no label: the mask was applied to the "
            "predicting position, or the last context token was cut off",
        )


def no_targets(view: View) -> Iterator[Finding]:
    """A row without loss costs a forward pass and trains nothing."""
    empty = (~view.scored.any(1)).nonzero()[:, 0].tolist()
    for row in empty:
        yield _of(
            "no-targets",
            f"row {row}",
            "no token carries loss: the output is empty, was cut off, or its mask was lost",
        )


def boundaries(view: View) -> Iterator[Finding]:
    """The first token of a packed sequence is not predicted from the one before it."""
    crossed = view.scored & view.starts
    crossed[:, 0] = False
    for row in _rows(crossed):
        yield _of(
            "crosses-boundary",
            _place(crossed, row),
            "the first token of a packed sequence carries loss: the last token of another "
            "sequence would have to predict it. Set its label to -100, or pass cu_seqlens",
        )


def padding(view: View) -> Iterator[Finding]:
    """Padding carries no loss."""
    wrong = view.scored & ~view.attended
    for row in _rows(wrong):
        yield _of("padding-scored", _place(wrong, row), "padding carries loss")


def special(view: View) -> Iterator[Finding]:
    """Begin-of-text, image and role tokens are rarely meant to be learned."""
    ids = torch.tensor(sorted(view.special), dtype=view.input_ids.dtype)
    wrong = view.scored & view.attended & torch.isin(view.labels, ids)
    for row in _rows(wrong):
        names = sorted(set(view.labels[row][wrong[row]].tolist()))
        yield _of("special-scored", _place(wrong, row), f"special tokens {names} carry loss")


def end_of_text(view: View) -> Iterator[Finding]:
    """A model that never sees the end of an output does not learn to stop."""
    if not view.eos:
        return
    for row in _rows(view.scored):
        last = int(view.scored[row].nonzero()[-1])
        if int(view.labels[row, last]) not in view.eos:
            yield _of(
                "no-eos",
                f"row {row}, token {last}",
                f"the last token with loss is {int(view.labels[row, last])}, not an end of text "
                f"({sorted(view.eos)}): cut off, or never appended",
            )


def everything(view: View) -> Iterator[Finding]:
    """Context that carries loss."""
    candidates = view.attended & ~view.starts
    whole = (view.scored | ~candidates).all(1) & candidates.any(1)
    for row in whole.nonzero()[:, 0].tolist():
        yield _of("all-scored", f"row {row}", "every token carries loss, the context included")


# -- the gradient ----------------------------------------------------------------------------------


def context_logits(view: View) -> Iterator[Finding]:
    """No gradient starts where nothing is predicted."""
    if view.logit_grad_norm is None:
        return
    wrong = (view.logit_grad_norm > 0) & ~view.predicts
    for row in _rows(wrong):
        yield _of(
            "context-logit-gradient",
            _place(wrong, row),
            "the logits of positions that predict no scored token have a gradient",
        )


def missing(view: View) -> Iterator[Finding]:
    """A trainable parameter that the loss does not reach."""
    if view.without_gradient:
        names = ", ".join(view.without_gradient[:3])
        yield _of(
            "missing-gradient",
            "",
            f"{len(view.without_gradient)} trainable parameters get no gradient: {names}",
        )


def not_a_number(view: View) -> Iterator[Finding]:
    """A loss or a gradient that is not finite."""
    if view.log_prob is not None:
        wrong = ~view.log_prob.isfinite()
        for row in _rows(wrong):
            yield _of("nan", _place(wrong, row), "the loss of these tokens is not finite")
    if view.not_finite:
        names = ", ".join(view.not_finite[:3])
        yield _of("nan", "", f"{len(view.not_finite)} gradients are not finite: {names}")


CHECKS: tuple[Callable[[View], Iterator[Finding]], ...] = (
    labels_and_inputs, first_output, no_targets, boundaries, context_logits, missing, not_a_number,
    padding, special, end_of_text, everything,
)  # fmt: skip

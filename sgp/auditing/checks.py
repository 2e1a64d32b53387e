"""What can be wrong with a batch, and what a look at it and at its gradient says.

Each check is a function of a `View` of one batch; its finding names where it is. An error is a
fault of mask or gradient; a warning may be meant; a note is worth knowing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sgp.auditing import masks
from sgp.auditing.findings import SEVERITY, Finding
from sgp.auditing.view import View


def find(view: View) -> list[Finding]:
    """Every finding, of every check, in their order."""
    return [finding for check in CHECKS for finding in check(view)]


def _of(
    code: str, where: str, message: str, row: int | None = None, tokens: tuple[int, ...] = ()
) -> Finding:
    return Finding(code, SEVERITY[code], where, message, row, tokens)


def _each(code: str, mask: Tensor, message: str) -> Iterator[Finding]:
    """A finding for each row of a (B, T) mask, at its tokens."""
    for row, at in _places(mask).items():
        yield _at(code, row, at, message)


def _at(code: str, row: int, at: list[int], message: str) -> Finding:
    where = f"token {at[0]}" if len(at) == 1 else f"{len(at)} tokens, {at[0]} to {at[-1]}"
    return _of(code, f"row {row}, {where}", message, row, tuple(at))


def _places(mask: Tensor) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for row, column in mask.nonzero().tolist():
        found.setdefault(row, []).append(column)
    return found


# -- the labels ------------------------------------------------------------------------------------


def labels_and_inputs(view: View) -> Iterator[Finding]:
    """Labels are the inputs themselves: the model, or the loss, shifts them."""
    differ, twice, itself = (
        masks.differing(view),
        masks.shifted_twice(view)[:, None],
        masks.itself(view)[:, None],
    )
    yield from _each(
        "labels-not-the-inputs",
        view.predicts & itself,
        "each token is trained to predict itself: nothing shifts these labels. Pass shift=True, or "
        "targets that are the next token's",
    )
    yield from _each(
        "labels-shifted-twice",
        differ & twice,
        "labels are the next token's; the loss moves them once more, so every token is trained to "
        "predict the one after the next. Pass labels that are not shifted",
    )
    yield from _each(
        "labels-not-the-inputs",
        differ & ~twice & ~itself,
        "a label is neither -100 nor the token at its place: it was made from another sequence, or "
        "from one that was padded or cut in another way",
    )


def first_output(view: View) -> Iterator[Finding]:
    """The first output token is predicted by the last context token."""
    yield from _each(
        "first-output-untrained",
        masks.first_output_lost(view),
        "the mask marks this token as output and it has no label: the mask was applied to the "
        "predicting position, or the last context token was cut off",
    )


def no_targets(view: View) -> Iterator[Finding]:
    """A row without loss costs a forward pass and trains nothing."""
    for row in (~view.predicts.any(1)).nonzero()[:, 0].tolist():
        yield _of(
            "no-targets",
            f"row {row}",
            "no token carries loss: the output is empty, was cut off, or its mask was lost",
            row,
        )


def boundaries(view: View) -> Iterator[Finding]:
    """The first token of a packed sequence is not predicted from the one before it."""
    yield from _each(
        "crosses-boundary",
        masks.crossed(view),
        "the first token of a packed sequence carries loss: the last token of another sequence "
        "would have to predict it. Set its label to -100, or pass cu_seqlens",
    )


def padding(view: View) -> Iterator[Finding]:
    """Padding carries no loss."""
    wrong = masks.padding_scored(view)
    yield from _each("padding-scored", wrong & ~view.attended, "padding carries loss")
    early = torch.zeros_like(wrong)
    early[:, :-1] = wrong[:, 1:] & view.attended[:, 1:]
    yield from _each(
        "padding-scored",
        early,
        "padding, on the left or between sequences, has to predict the token after it; set that "
        "token's label to -100",
    )


def special(view: View) -> Iterator[Finding]:
    """Begin-of-text, image and role tokens are rarely meant to be learned."""
    ids = torch.tensor(sorted(view.special), dtype=view.input_ids.dtype)
    wrong = view.scored & view.attended & torch.isin(view.labels, ids)
    for row, at in _places(wrong).items():
        names = sorted({int(view.labels[row, t]) for t in at})
        yield _at("special-scored", row, at, f"special tokens {names} carry loss")


def end_of_text(view: View) -> Iterator[Finding]:
    """A model that never sees the end of an output does not learn to stop."""
    if not view.eos:
        return
    for row in view.scored.any(1).nonzero()[:, 0].tolist():
        at = view.scored[row].nonzero()[:, 0]
        of = view.sequence[row][at]
        for number in of.unique().tolist():
            last = at[of == number][-2:]  # a template may write a line break after the end
            ids = view.labels[row, last].tolist()
            if not view.eos & set(ids):
                yield _of(
                    "no-eos",
                    f"row {row}, token {int(last[-1])}",
                    f"the last token with loss is {ids[-1]}, not an end of text "
                    f"({sorted(view.eos)}): cut off, never appended, or the mask sits one token "
                    "early",
                    row,
                    (int(last[-1]),),
                )


def everything(view: View) -> Iterator[Finding]:
    """Context that carries loss."""
    candidates = view.attended & ~view.starts
    whole = (view.scored | ~candidates).all(1) & candidates.any(1)
    for row in whole.nonzero()[:, 0].tolist():
        yield _of("all-scored", f"row {row}", "every token carries loss, the context included", row)


# -- the gradient ----------------------------------------------------------------------------------


def context_logits(view: View) -> Iterator[Finding]:
    """No gradient starts where nothing is predicted."""
    if view.logit_grad_norm is None:
        return
    wrong = (view.logit_grad_norm > 0) & ~view.predicts
    yield from _each(
        "context-logit-gradient",
        wrong,
        "the logits of positions that predict no scored token have a gradient",
    )


def missing(view: View) -> Iterator[Finding]:
    """A trainable parameter that the loss does not reach."""
    if view.without_gradient:
        yield _of(
            "missing-gradient",
            "",
            f"{_parameters(view.without_gradient)}, trainable, got no gradient from a module that "
            "ran: its output is detached, or leads nowhere",
        )
    if view.not_run:
        yield _of(
            "module-not-run",
            "",
            f"{_parameters(view.not_run)}, trainable, in a module that this batch did not run",
        )
    if view.zero:
        yield _of(
            "zero-gradient",
            "",
            f"{_parameters(view.zero)}, trainable, with a gradient of exactly zero (LoRA's A has "
            "one until its B has moved)",
        )


def not_measured(view: View) -> Iterator[Finding]:
    """Hidden states that take no part in the graph have no gradient, not one of zero."""
    if view.measured is not None and not bool(view.measured.all()):
        layers = (~view.measured).nonzero()[:, 0].tolist()
        yield _of(
            "not-measured",
            "",
            f"the hidden states of layers {layers} are not part of the graph (0: the embeddings)",
        )


def other_loss(view: View) -> Iterator[Finding]:
    """The model's loss need not be the mean over the targets that the labels say."""
    if view.loss is None or view.log_prob is None or not view.own_loss:
        return
    mean = -float(view.log_prob[view.predicts].mean()) if bool(view.predicts.any()) else 0.0
    if abs(view.loss - mean) > 0.01 * max(1.0, abs(mean)):  # NaN is another finding
        yield _of(
            "another-loss",
            "",
            f"the model's loss is {view.loss:.4f}, the mean over the targets {mean:.4f} nats: an "
            "auxiliary loss, another divisor, or labels that the model shifts in another way",
        )


def worse_than_uniform(view: View) -> Iterator[Finding]:
    """A trained model is better than a guess."""
    if view.log_prob is None or view.vocabulary is None or not bool(view.predicts.any()):
        return
    mean, uniform = -float(view.log_prob[view.predicts].mean()), math.log(view.vocabulary)
    if mean > uniform + 1:
        yield _of(
            "worse-than-uniform",
            "",
            f"the targets have a mean loss of {mean:.2f} nats; a uniform guess has "
            f"log {view.vocabulary} = {uniform:.2f}. Is it the model's tokenizer?",
        )


def not_a_number(view: View) -> Iterator[Finding]:
    """A loss or a gradient that is not finite."""
    if view.log_prob is not None:
        wrong = ~view.log_prob.isfinite() & view.predicts
        yield from _each("nan", wrong, "the loss of these predictions is not finite")
    if view.not_finite:
        yield _of("nan", "", f"{_parameters(view.not_finite)} with a gradient that is not finite")
    if view.loss is not None and not math.isfinite(view.loss):
        yield _of("nan", "", f"the loss is {view.loss}")


def _parameters(names: tuple[str, ...]) -> str:
    """'2 parameters (a, b) are'; the first three names."""
    many = f"{len(names)} parameters" if len(names) > 1 else "1 parameter"
    return f"{many} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


CHECKS: tuple[Callable[[View], Iterator[Finding]], ...] = (
    labels_and_inputs, first_output, no_targets, boundaries, context_logits, missing, not_a_number,
    padding, special, end_of_text, everything, not_measured, other_loss, worse_than_uniform,
)  # fmt: skip

"""What can be wrong with a batch, and what a look at it and at its gradient says.

Each check is a function of a `View` of one batch; its finding names where it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sgp.auditing import masks
from sgp.auditing.findings import SEVERITY, Finding, ranges
from sgp.auditing.turns import text_of
from sgp.auditing.view import View


def find(view: View) -> list[Finding]:
    """Every finding, of every check, in their order."""
    repeats = masks.repeated(view)
    repeats |= masks.alike(replace(view, attended=view.attended & ~repeats))
    if bool(repeats.any()):
        text = view.attended & ~repeats
        view = replace(view, attended=text, starts=view.starts & text, repeats=repeats)
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
    again = torch.zeros_like(wrong) if view.repeats is None else view.repeats
    yield from _each("padding-scored", wrong & ~view.attended & ~again, "padding carries loss")
    for (row, at), names in _named(view, wrong & again, view.input_ids):
        message = f"{names} ends the row {masks.OFTEN} times or more, with loss: is it padding?"
        yield _at("padding-scored", row, at, message)
    early = torch.zeros_like(wrong)
    early[:, :-1] = wrong[:, 1:] & view.attended[:, 1:] & ~again[:, :-1]
    yield from _each(
        "padding-scored",
        early,
        "padding, on the left or between sequences, has to predict the token after it; set that "
        "token's label to -100",
    )


def special(view: View) -> Iterator[Finding]:
    """Begin-of-text, media and role tokens are rarely meant to be learned."""
    wrong = masks.special_scored(view)
    for (row, at), names in _named(view, wrong, view.labels):
        yield _at("special-scored", row, at, f"special tokens ({names}) carry loss")


def other_turns(view: View) -> Iterator[Finding]:
    """What others say is given, not learned."""
    whole = _all_scored(view)
    for role, mask in masks.others_scored(view).items():
        for row, at in _places(mask & ~whole[:, None]).items():
            yield _at(
                "other-turns-scored",
                row,
                at,
                f"tokens of {role} turns carry loss: the model learns to write them itself",
            )


def doubled(view: View) -> Iterator[Finding]:
    """One begin and one end of text are enough."""
    for (row, at), names in _named(view, masks.doubled(view), view.input_ids):
        yield _at(
            "doubled-special",
            row,
            at,
            f"{names} stands twice in a row: a template wrote one and the tokenizer another",
        )


def ends(view: View) -> Iterator[Finding]:
    """A model that never sees the end of an answer does not learn to stop."""
    if not view.eos:
        return
    unscored = masks.unscored_ends(view)
    yield from _each(
        "turn-end-unscored",
        unscored & masks.is_end(view),
        "the end of a turn stands after an answer and carries no loss: the model does not learn "
        "to stop there. The mask is one token short, or the end was masked as padding",
    )
    names, unended = _texts(view, view.eos), masks.unended(view)
    yield from _each(
        "no-eos",
        unended,
        f"an answer that another turn follows has no end ({names}): it was never appended, and the "
        "model does not learn to stop there",
    )
    for row, last, sure in _without_end(view, masks.near(view, unscored) | unended):
        token = f"row {row}, token {last}"
        if sure:
            message = (
                f"the last token with loss is not an end ({names}), and the window did not cut "
                "it off: it was never appended, or the mask sits one token early"
            )
            yield _of("no-eos", token, message, row, (last,))
        else:
            message = (
                f"the last token with loss is not an end ({names}): cut off, never appended, or "
                "the mask sits one token early"
            )
            yield replace(_of("no-eos", token, message, row, (last,)), severity="warning")


def _without_end(view: View, said: Tensor) -> Iterator[tuple[int, int, bool]]:
    """Row and last scored token of sequences without a scored end; whether surely not cut.

    Not of those of which something is `said` there, or behind it.
    """
    B, T = view.input_ids.shape
    key = view.sequence + torch.arange(B)[:, None] * (T + 1)  # one number for each sequence
    columns = torch.arange(T).expand(B, T)

    def last(mask: Tensor) -> Tensor:
        found = torch.full((B * (T + 1),), -1)
        return found.scatter_reduce_(0, key[mask], columns[mask], "amax")

    scored = view.scored & view.attended
    final = last(scored)
    which = (final >= 0).nonzero()[:, 0]
    if not len(which):
        return
    rows, at = which // (T + 1), final[which]
    end = scored & torch.isin(view.labels, torch.tensor(sorted(view.eos)))
    before = (at - 1).clamp(min=0)  # a template may write a line break after the end
    ended = end[rows, at] | end[rows, before]
    ended |= last(said)[which] >= at
    beyond = torch.isin(view.targets[:, -1], torch.tensor(sorted(view.eos)))
    ended |= beyond[rows] & (key[rows, -1] == which)  # the target of the row's last token
    lengths = torch.bincount(key[view.attended], minlength=len(final))[which]
    if view.max_length is not None:
        sure = lengths < view.max_length
    else:  # those that are cut are as long as the window, and none is longer
        sure = lengths < lengths.max(dim=0, keepdim=True).values
    lacking = zip(rows[~ended].tolist(), at[~ended].tolist(), sure[~ended].tolist(), strict=True)
    yield from lacking


def _named(view: View, mask: Tensor, ids: Tensor) -> Iterator[tuple[tuple[int, list[int]], str]]:
    """The places of a mask, row by row, each with the texts of the tokens there."""
    found, known = iter(ids[mask].tolist()), dict[frozenset[int], str]()
    for row, at in _places(mask).items():
        tokens = frozenset(itertools.islice(found, len(at)))
        if tokens not in known:
            known[tokens] = _texts(view, tokens)
        yield (row, at), known[tokens]


def _texts(view: View, tokens: Iterable[int]) -> str:
    return ", ".join(repr(text_of(view.tokenizer, token)) for token in sorted(set(tokens)))


def everything(view: View) -> Iterator[Finding]:
    """Context that carries loss."""
    for row in _all_scored(view).nonzero()[:, 0].tolist():
        yield _of("all-scored", f"row {row}", "every token carries loss, the context included", row)


def _all_scored(view: View) -> Tensor:
    """(B,) bool: every token that could carry loss does."""
    candidates = view.attended & ~view.starts
    return (view.scored | ~candidates).all(1) & candidates.any(1)


# -- the gradient ----------------------------------------------------------------------------------


def leaks(view: View) -> Iterator[Finding]:
    """A packed sequence sees itself alone."""
    for leak in view.leaks:
        first, last = leak.span
        others = f"sequence{'s' * (len(leak.reached) > 1)} {ranges(leak.reached)}"
        one = "one of the sequences" if len(leak.sequences) > 1 else "sequence"
        yield _of(
            "attends-across-boundary",
            f"row {leak.row}, the loss of {one} {ranges(leak.sequences)} (tokens {first} to "
            f"{last}) has gradient at the tokens of {others}",
            "the loss of a packed sequence has gradient at the tokens of other sequences: the "
            "model attends across their seams. Leave out an attention_mask of ones beside "
            "position_ids, give a mask of pairs, or do not pack for this model",
            leak.row,
            leak.tokens,
        )


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
    trained = bool(view.predicts.any())
    if view.without_gradient and trained:
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
    if view.zero and trained:
        yield _of(
            "zero-gradient",
            "",
            f"{_parameters(view.zero)}, trainable, with a gradient of exactly zero (LoRA's A has "
            "one until its B has moved)",
        )


def not_measured(view: View) -> Iterator[Finding]:
    """Hidden states that take no part in the graph have no gradient, not one of zero."""
    if view.measured is not None and not bool(view.measured.all()):
        layers = ranges((~view.measured).nonzero()[:, 0].tolist())
        yield _of(
            "not-measured",
            "",
            f"the hidden states of layers {layers} are not part of the graph (0: the embeddings): "
            "nothing before them is trained, or they were made without a graph",
        )
    inner = view.measured is not None and bool(view.measured[:-1].any())
    if view.measured is not None and not inner and bool((view.starts.sum(1) > 1).any()):
        yield _of(
            "not-measured",
            "",
            "whether packed sequences attend to one another: no hidden state before the last layer "
            "is part of the graph",
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
    """A loss or a gradient that is not finite; that of nothing is another finding."""
    if not bool(view.predicts.any()):
        return
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
    labels_and_inputs, first_output, no_targets, boundaries, leaks, context_logits, missing,
    not_a_number,
    ends, padding, special, other_turns, doubled, everything, not_measured, other_loss,
    worse_than_uniform,
)  # fmt: skip

"""A batch as the checks see it: tokens, labels, targets, padding, seams and masks, on the CPU.

Everything that a batch can say about itself is read here, once, whatever its keys are called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgp.auditing.turns import Turns, inner, learn, own_ends
from sgp.labels import IGNORE
from sgp.selection import Selection

NAME = "sgp.audit"
OUTPUT_MASKS = ("completion_mask", "assistant_masks", "assistant_mask")
BOUNDARIES = ("cu_seqlens", "cu_seq_lens_q")


class Leak(NamedTuple):
    """A sequence of a packed row whose loss has gradient at other sequences' tokens."""

    row: int
    sequences: tuple[int, ...]  # its number within the row; or several, of which it is one
    span: tuple[int, int]  # their first and last token
    reached: tuple[int, ...]  # the other sequences
    tokens: tuple[int, ...]  # of theirs, those with gradient


@dataclass(frozen=True)
class View:
    """What is known of a batch before and, from `loss` to `leaks`, after its backward pass."""

    input_ids: Tensor  # (B, T)
    labels: Tensor  # (B, T): -100, or the token at its place if they are right; not shifted
    targets: Tensor  # (B, T): what position t has to predict; -100 where nothing
    attended: Tensor  # (B, T) bool: not padding
    starts: Tensor  # (B, T) bool: the first token of a row or of a packed sequence
    outputs: Tensor | None  # (B, T) bool: which tokens are output, if the batch says so
    special: frozenset[int]  # tokens that are no part of an answer: begin of text, media, headers
    eos: frozenset[int]  # the ends of a text or a turn
    loss: float | None = None  # what was differentiated
    own_loss: bool = False  # it is the model's, not the mean over targets
    vocabulary: int | None = None
    log_prob: Tensor | None = None  # (B, T), of the target
    logit_grad_norm: Tensor | None = None  # (B, T)
    measured: Tensor | None = None  # (layers + 1,) bool: hidden states that took part in the graph
    without_gradient: tuple[str, ...] = ()  # trainable, in a module that ran
    not_run: tuple[str, ...] = ()  # trainable, in a module that did not
    not_finite: tuple[str, ...] = ()
    zero: tuple[str, ...] = ()
    leaks: tuple[Leak, ...] = ()
    tokenizer: Any = None  # decodes, for messages
    bos: int | None = None
    pad: int | None = None
    max_length: int | None = None  # sequences that reach it may be cut
    turns: Turns = field(default_factory=Turns)  # what the chat template says
    repeats: Tensor | None = None  # (B, T) bool: padding that only its loss shows, not `attended`

    @property
    def predicts(self) -> Tensor:
        """(B, T) bool: positions whose logits carry loss."""
        return self.targets != IGNORE

    @property
    def scored(self) -> Tensor:
        """(B, T) bool: tokens that the position before them has to predict."""
        return later(self.predicts)

    @property
    def sequence(self) -> Tensor:
        """(B, T) int64: the number of the sequence within its row, from 0."""
        return (self.starts.long().cumsum(1) - 1).clamp(min=0)


def read(
    batch: Mapping[str, Any],
    *,
    selection: Selection | None = None,
    tokenizer: Any = None,
    eos: tuple[int, ...] = (),
    max_length: int | None = None,
    turns: Turns | None = None,
) -> View:
    """Read a batch.

    Args:
        batch: `input_ids` (B, T) and one of `labels`, `shift_labels` (B, T), or a selection.
            Padding: `attention_mask` of 0 and 1 or of sequence numbers (B, T), or a mask of pairs
            (B, 1, T, T), or else `lengths` (B,), or else the tokenizer's padding tokens that end a
            row. Seams of packed rows: that mask, `position_ids` (B, T) or (1, T) that
            fall back, `seq_idx`, `cu_seqlens` or `cu_seq_lens_q` of the flattened batch. Output
            tokens: `completion_mask`, `assistant_masks` (B, T) or, if both, what both say; or
            `context_lengths` (B,).
        selection: in place of labels.
        tokenizer: has `eos_token_id`, `all_special_ids` and, if it pads, `pad_token_id`.
        eos: further tokens that end a text.
        max_length: the window: sequences that reach it may have been cut.
        turns: what the tokenizer's chat template says; None: it is asked.

    Raises:
        ValueError: without labels and selection, or if shapes disagree.
        TypeError: if the batch is no mapping, or has tokens or labels that are no tensor of ids.
    """
    input_ids, labels, targets = _tokens(batch, selection)
    turns = learn(tokenizer) if turns is None else turns
    tokenizer = inner(tokenizer)
    end = {*eos, *own_ends(tokenizer), *turns.ends}
    pad = _id(tokenizer, "pad_token_id")
    fill = _id(tokenizer, "eos_token_id") if pad is None else pad  # what collators pad with
    attended, starts = _attended_and_starts(batch, input_ids, fill, end)
    if selection is not None and selection.boundaries is not None:
        _mark(starts, selection.boundaries[: selection.num_sequences])
    begin = _id(tokenizer, "bos_token_id")
    if begin is not None and begin not in end and not turns.several_begins:
        _mark_begins(starts, attended, input_ids == begin)
    return View(
        input_ids=input_ids,
        labels=labels,
        targets=targets,
        attended=attended,
        starts=starts & attended,
        outputs=_outputs(batch, attended),
        special=turns.unlearned - end,
        eos=frozenset(end),
        tokenizer=tokenizer,
        bos=begin,
        pad=pad,
        max_length=max_length,
        turns=turns,
    )


def suffixes(view: View) -> Tensor | None:
    """(B, T) bool from the first predictor on, if every row is context, output, nothing scored."""
    begun = view.predicts.long().cumsum(1) > 0
    ahead = view.scored.flip(1).long().cumsum(1).flip(1) > 0  # after the last, no gradient is
    holes = later(begun) & view.attended & ~view.scored & ahead
    inner = view.starts & (view.attended.long().cumsum(1) > 1)
    return None if bool(holes.any()) or bool(inner.any()) else begun


def later(x: Tensor) -> Tensor:
    """What was at t, at t + 1."""
    found = torch.zeros_like(x)
    found[:, 1:] = x[:, :-1]
    return found


def _tokens(batch: Mapping[str, Any], selection: Selection | None) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(batch, Mapping):
        raise TypeError(f"{NAME}: batch is {type(batch).__name__}; expected a dict with input_ids")
    if "input_ids" not in batch:
        raise ValueError(f"{NAME}: the batch has {sorted(batch)}; expected input_ids")
    _check_ids(batch)
    input_ids = batch["input_ids"].cpu().long()
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(
            f"{NAME}: input_ids is {tuple(input_ids.shape)}; expected (B, T), not empty"
        )
    if selection is not None:
        if selection.num_tokens != input_ids.numel():
            raise ValueError(
                f"{NAME}: the selection is of {selection.num_tokens} tokens, input_ids of "
                f"{input_ids.numel()}"
            )
        return _from_targets(input_ids, selection.dense_target.cpu().view(input_ids.shape))
    for name in ("shift_labels", "labels"):  # what shift_labels says is what a model scores
        given = batch.get(name)
        if given is None:
            continue
        if given.shape != input_ids.shape:
            raise ValueError(
                f"{NAME}: {name} is {tuple(given.shape)}, input_ids {tuple(input_ids.shape)}"
            )
        if name == "shift_labels":
            return _from_targets(input_ids, given.cpu().long())
        labels = given.cpu().long()
        targets = torch.full_like(labels, IGNORE)
        targets[:, :-1] = labels[:, 1:]
        return input_ids, labels, targets
    raise ValueError(f"{NAME}: the batch has {sorted(batch)}; expected labels, or selection=")


def _check_ids(batch: Mapping[str, Any]) -> None:
    for name in ("input_ids", "labels", "shift_labels"):
        given = batch.get(name)
        if given is None:
            continue
        found = given.dtype if isinstance(given, Tensor) else type(given).__name__
        wrong = not isinstance(given, Tensor) or given.is_floating_point()
        if wrong or given.dtype == torch.bool:
            raise TypeError(f"{NAME}: {name} is {found}; expected a tensor (B, T) of token ids")


def _from_targets(input_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.full_like(targets, IGNORE)
    labels[:, 1:] = targets[:, :-1]
    return input_ids, labels, targets


def _attended_and_starts(
    batch: Mapping[str, Any], input_ids: Tensor, pad: int | None, eos: set[int]
) -> tuple[Tensor, Tensor]:
    B, T = input_ids.shape
    mask = batch.get("attention_mask")
    mask = mask.cpu() if isinstance(mask, Tensor) else None
    pairs = None
    if mask is not None and mask.shape == input_ids.shape:
        attended = mask != 0
    elif mask is not None and mask.dim() == 4 and mask.shape[-2:] == (T, T):
        pairs = ((mask == 0) if mask.is_floating_point() else (mask != 0))[:, 0].expand(B, T, T)
        attended = pairs.diagonal(dim1=1, dim2=2).clone()
    elif isinstance(batch.get("lengths"), Tensor) and batch["lengths"].shape == (B,):
        attended = torch.arange(T) < batch["lengths"].cpu()[:, None]
    else:
        attended = ~_padding_at_the_end(input_ids, pad, eos)
    before = _last_before(attended)  # seams may have padding in them
    known, at = before >= 0, before.clamp(min=0)
    starts = attended & ~known
    if mask is not None and mask.shape == input_ids.shape:
        starts |= known & (mask != mask.gather(1, at))  # numbered sequences
    if pairs is not None:
        starts |= known & ~pairs.gather(2, at[:, :, None])[:, :, 0]
    starts |= known & _falls(batch.get("position_ids"), input_ids, at)
    numbers = _by_row(batch.get("seq_idx"), input_ids)
    if numbers is not None:
        starts |= known & (numbers != numbers.gather(1, at))
    for name in BOUNDARIES:
        if isinstance(batch.get(name), Tensor) and batch[name].dim() == 1:
            _mark(starts, batch[name])
    return attended, starts


def _falls(positions: Any, input_ids: Tensor, before: Tensor) -> Tensor:
    """(B, T) bool: where positions begin again.

    Several axes are those of vision models, (3, B, T), or (4, B, T) with the text's first. Patches
    of an image share an axis and fall back on another; a sequence falls back on all.
    """
    no = torch.zeros_like(input_ids, dtype=torch.bool)
    if not isinstance(positions, Tensor) or positions.dim() not in (2, 3):
        return no
    axes = positions.cpu() if positions.dim() == 3 else positions.cpu()[None]
    B, T = input_ids.shape
    if axes.shape[1] not in (1, B) or axes.shape[2] != T or len(axes) not in (1, 3, 4):
        return no
    axes = axes.expand(-1, B, T)
    if len(axes) != 3:
        return axes[0] <= axes[0].gather(1, before)
    earlier = axes.gather(2, before.expand_as(axes))
    zero = (axes == 0).all(0) & (axes <= earlier).all(0)
    return zero | (axes < earlier).all(0)


def _last_before(attended: Tensor) -> Tensor:
    """(B, T) int64: of each token, where the last attended one before it is; -1: nowhere."""
    found = torch.full(attended.shape, -1)
    at = torch.where(attended, torch.arange(attended.shape[1]), -1)
    found[:, 1:] = at.cummax(1).values[:, :-1]
    return found


def _id(tokenizer: Any, name: str) -> int | None:
    found = getattr(tokenizer, name, None)
    return found if isinstance(found, int) else None


def _padding_at_the_end(input_ids: Tensor, pad: int | None, eos: set[int]) -> Tensor:
    """(B, T) bool: the padding tokens that end a row, where nothing else says what is padding."""
    if pad is None:
        return torch.zeros_like(input_ids, dtype=torch.bool)
    found = (input_ids == pad).flip(1).long().cumprod(1).flip(1) > 0
    return found & later(found) if pad in eos else found  # the first of them ends the text


def _by_row(x: Any, input_ids: Tensor) -> Tensor | None:
    if not isinstance(x, Tensor) or x.dim() != 2 or x.shape[1] != input_ids.shape[1]:
        return None
    return x.cpu().expand(input_ids.shape) if len(x) in (1, len(input_ids)) else None


def _mark(starts: Tensor, boundaries: Tensor) -> None:
    at = boundaries.cpu().long()
    starts.view(-1)[at[(at >= 0) & (at < starts.numel())]] = True


def _mark_begins(starts: Tensor, attended: Tensor, begins: Tensor) -> None:
    """Begins of text within a row are seams, where nothing else says any in it."""
    silent = (starts & attended).sum(1) <= 1
    inner = begins & attended & ~later(begins) & later(attended)
    starts |= inner & silent[:, None] & begins.gather(1, attended.long().argmax(1)[:, None])


def _outputs(batch: Mapping[str, Any], attended: Tensor) -> Tensor | None:
    masks = [batch.get(name) for name in OUTPUT_MASKS]
    given = [m.cpu() != 0 for m in masks if isinstance(m, Tensor) and m.shape == attended.shape]
    if given:  # what carries loss is in all of them
        return torch.stack(given).all(0)
    lengths = batch.get("context_lengths")
    if isinstance(lengths, Tensor) and lengths.shape == attended.shape[:1]:
        return (torch.arange(attended.shape[1]) >= lengths.cpu()[:, None]) & attended
    return None

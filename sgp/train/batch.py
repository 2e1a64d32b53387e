"""From pairs to right-padded batches with their `Selection`."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sgp
from sgp.data.examples import tokenize_all
from sgp.train.data import Chat, Pair

IGNORE_INDEX = -100
_BATCHES_SORTED_TOGETHER = 4  # less padding; more would make the curve jump with the lengths


class Example(NamedTuple):
    """A pair or a chat as token numbers."""

    context: list[int]
    output: list[int]  # from the first token that carries loss
    digest: str  # of the pair's text
    scored: list[bool] | None = None  # which tokens of the output carry loss; None: all


@dataclass(frozen=True)
class Encoded:
    """The examples that fit the window, and how many pairs did not."""

    examples: list[Example]
    filled: int  # pairs skipped because their context leaves no room for an output
    cut: int  # pairs whose completion was cut at the window
    empty: int  # pairs skipped because a side has no tokens
    skips: list[tuple[str, str]] = field(default_factory=list)  # (source, reason) of chats


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences and which of their tokens are outputs."""

    input_ids: Tensor  # (B, T) int64
    context_lengths: Tensor  # (B,) int64
    lengths: Tensor  # (B,) int64, context and output
    selection: sgp.Selection  # rows that predict an output token, and that token
    unscored: Tensor | None = None  # (B, T) bool: tokens that carry no loss; None: the contexts

    @property
    def attention_mask(self) -> Tensor:
        """(B, T) int64: 1 on tokens, 0 on padding."""
        columns = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return (columns < self.lengths[:, None]).long()

    @property
    def labels(self) -> Tensor:
        """(B, T) int64: the output tokens at their own places, -100 on context and padding."""
        columns = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        is_output = (columns >= self.context_lengths[:, None]) & (columns < self.lengths[:, None])
        without = ~is_output if self.unscored is None else ~is_output | self.unscored
        return self.input_ids.masked_fill(without, IGNORE_INDEX)

    @property
    def shifted_labels(self) -> Tensor:
        """(B, T) int64: at each place the label of the next one, as PyTorch's loss takes it."""
        return torch.nn.functional.pad(self.labels[:, 1:], (0, 1), value=IGNORE_INDEX)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        return Batch(
            self.input_ids.to(device),
            self.context_lengths.to(device),
            self.lengths.to(device),
            self.selection.to(device),
            None if self.unscored is None else self.unscored.to(device),
        )


def encode(
    pairs: Sequence[Pair],
    tokenize: Callable[[list[str]], list[list[int]]],
    *,
    window: int,
    begin: int | None,
    end: int | None,
) -> Encoded:
    """Turn pairs into examples of at most `window` tokens.

    A pair whose context alone has `window` tokens or more is skipped and counted; an output that
    passes the window is cut there and counted. Nothing is shortened without being counted. An
    empty prompt becomes `begin`, or else `end`: something must predict the first output token.

    Args:
        pairs: What to encode.
        tokenize: Maps texts to token numbers, without special tokens.
        window: Most tokens of a sequence.
        begin: Token put before each context; None for none.
        end: Token put after each output; None for none.

    Example:
        >>> encode([Pair("ab", "c", "x:1")], lambda texts: [[*map(ord, t)] for t in texts],
        ...        window=8, begin=None, end=0).examples[0][:2]
        ([97, 98], [99, 0])
    """
    if not pairs:  # a tokenizer refuses an empty list
        return Encoded([], 0, 0, 0)
    contexts = tokenize([pair.prompt for pair in pairs])
    outputs = tokenize([pair.completion for pair in pairs])
    before = [] if begin is None else [begin]
    after = [] if end is None else [end]
    examples = []
    filled = cut = empty = 0
    for pair, context, output in zip(pairs, contexts, outputs, strict=True):
        whole_context = before + context or after
        whole_output = output + after
        if not whole_context or not whole_output:
            empty += 1
            continue
        room = window - len(whole_context)
        if room <= 0:
            filled += 1
            continue
        cut += len(whole_output) > room
        examples.append(Example(whole_context, whole_output[:room], pair.digest))
    return Encoded(examples, filled, cut, empty)


def encode_chats(chats: Sequence[Chat], tokenizer: Any, *, window: int) -> Encoded:
    """Turn chats into examples of at most `window` tokens, as `sgp.Collator` does.

    Of messages the assistant's turns carry loss, of a prompt and a completion the completion. What
    does not fit is skipped, cut and counted as in `encode`; what the template refuses has its
    source and the reason in `skips`.

    Args:
        chats: What to encode.
        tokenizer: Of transformers, with a chat template.
        window: Most tokens of a sequence.
    """
    found = tokenize_all([chat.row for chat in chats], tokenizer)
    examples, skips = [], []
    filled = cut = empty = 0
    for chat, (rows, reason, _) in zip(chats, found, strict=True):
        if reason:
            skips.append((chat.source, reason))
            continue
        ((ids, labels),) = rows
        scored = [label != IGNORE_INDEX for label in labels]
        start = next((t for t in range(1, len(ids)) if scored[t]), len(ids))
        empty += start == len(ids)
        filled += window <= start < len(ids)
        if start < min(window, len(ids)):
            cut += any(scored[window:])
            kept = slice(start, window)
            examples.append(Example(ids[:start], ids[kept], chat.digest, scored[kept]))
    return Encoded(examples, filled, cut, empty, skips)


def collate(examples: Sequence[Example], *, pad: int = 0) -> Batch:
    """Pad examples on the right to the longest of them.

    Example:
        >>> batch = collate([Example([5, 6], [7], ""), Example([5], [8, 9], "")])
        >>> batch.selection.target.tolist()
        [7, 8, 9]
    """
    lengths = [len(example.context) + len(example.output) for example in examples]
    longest = max(lengths)
    input_ids = torch.tensor(
        [
            [*example.context, *example.output, *[pad] * (longest - length)]
            for example, length in zip(examples, lengths, strict=True)
        ]
    )
    context_lengths = torch.tensor([len(example.context) for example in examples])
    of_each = torch.tensor(lengths)
    if any(example.scored is not None for example in examples):
        return _of_chats(examples, input_ids, context_lengths, of_each)
    selection = sgp.Selection.from_context_lengths(
        input_ids, context_lengths, lengths=of_each, shift=True
    )
    return Batch(input_ids, context_lengths, of_each, selection)


def _of_chats(
    examples: Sequence[Example], input_ids: Tensor, context_lengths: Tensor, lengths: Tensor
) -> Batch:
    unscored = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, example in enumerate(examples):
        if example.scored is not None:
            start = len(example.context)
            unscored[row, start : start + len(example.scored)] = ~torch.tensor(example.scored)
    batch = Batch(input_ids, context_lengths, lengths, sgp.Selection.from_labels(input_ids))
    labels = replace(batch, unscored=unscored).labels
    return replace(
        batch, unscored=unscored, selection=sgp.Selection.from_labels(labels, shift=True)
    )


def epochs(
    examples: Sequence[Example], *, batch_size: int, seed: int, pad: int = 0
) -> Iterator[Batch]:
    """Yield batches without end; the same seed gives the same batches.

    Each epoch is shuffled anew; batches are then made from examples of similar length, four
    batches at a time, and come in random order.

    Example:
        >>> examples = [Example([5], [i], "") for i in range(6)]
        >>> [len(batch.lengths) for batch in islice(epochs(examples, batch_size=4, seed=0), 4)]
        [2, 4, 4, 2]
    """
    epoch = 0
    while True:
        rng = random.Random(f"{seed}:{epoch}")  # noqa: S311  # not for secrets
        order = iter(rng.sample(examples, len(examples)))
        while pool := list(islice(order, batch_size * _BATCHES_SORTED_TOGETHER)):
            groups = grouped(pool, batch_size)
            rng.shuffle(groups)
            yield from (collate(group, pad=pad) for group in groups)
        epoch += 1


def grouped(examples: Sequence[Example], batch_size: int) -> list[list[Example]]:
    """Return the examples in groups of similar length."""
    by_length = sorted(examples, key=lambda example: len(example.context) + len(example.output))
    return [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]

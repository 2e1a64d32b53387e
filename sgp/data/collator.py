"""`Collator`: examples into a batch whose mask is planned on the host, padded or packed."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sgp.caller import warn
from sgp.data.examples import COLUMNS, Row, tokenize
from sgp.data.messages import NAME
from sgp.labels import IGNORE
from sgp.selection import Selection


@dataclass
class Collator:
    """Makes the batch of a list of examples, for a DataLoader or a Trainer.

    Example:
        >>> collate = Collator(packed=True)
        >>> batch = collate([{"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]},
        ...                  {"input_ids": [8, 9], "completion_mask": [0, 1]}])
        >>> batch["labels"]
        tensor([[-100, -100,    7, -100,    9]])
        >>> batch["cu_seqlens"]
        tensor([0, 3, 5], dtype=torch.int32)
        >>> batch["selection"]
        Selection(shape=(1, 5), 2 of 5 tokens carry loss, 2 sequences, device=cpu)

    Args:
        tokenizer: of transformers, for examples that are not tokens, and for its padding token.
        packed: all sequences one after the other in one row, without padding; else one a row,
            padded on the right.
        max_length: of a sequence, in tokens; what is beyond it is cut off at the end.
        pad_to_multiple_of: of a row, as Tensor Cores like it.
        pad_token_id: None: the tokenizer's, its end of text, or 0.
        context_loss: prompts and the other side's turns carry loss too.
        assistant_only_loss: of a completion, only what the chat template marks as the assistant's
            carries loss, and not the results of tools, which stand between. TRL's name.
        selection: whether the batch has its Selection; False leaves tensors alone, as a loop wants
            that puts batches together or sends them on. The labels say the same.

    A packed row is one sequence to a model with a cache, and to models whose attention knows no
    `position_ids`: a patched model and the Trainer go without a cache, and a patched model refuses
    what does not keep sequences apart. In a loop of your own pass `use_cache=False`.

    `__call__` takes a list of examples, each of a kind that `sgp.data.examples.tokenize` knows, and
    returns, int64 unless said otherwise:

    * `input_ids`, `labels` (B, T) or (1, N): labels are not shifted, -100 where there is no loss,
      which includes the first token of each packed sequence.
    * `position_ids`, of the same shape, from 0 in each sequence.
    * `attention_mask` (B, T), 1 and 0, if padded; `cu_seqlens` (S + 1,) int32 if packed.
    * `selection`: the `Selection` of the labels. A model that `sgp.huggingface.patch` has patched
      takes it: no GPU has to wait for a count. It is left out where accelerate reads the data in
      one process and sends the others their share (a Trainer's way with an `IterableDataset`),
      which only tensors survive; the labels say the same.

    Rows that were padded before lose their padding, and rows that were packed before
    (`position_ids` that begin again) are taken apart; `sgp.data.examples.tokenize` says by which
    columns. A packed row needs `packed=True`.

    Raises:
        ValueError: no example, or one that cannot be read, with its number; packed rows that
            accelerate would cut up; `context_loss` with `assistant_only_loss`.

    Warns:
        where a sequence carries no loss, has labels that are its next tokens already, or begins
        with two begin-of-text tokens, once for each batch; where examples have columns that the
        batch will not have and a model might want (images, arrays, lists of numbers; not names,
        texts or single numbers), once for each.
    """

    tokenizer: Any = None
    packed: bool = False
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    pad_token_id: int | None = None
    context_loss: bool = False
    assistant_only_loss: bool = False
    selection: bool = True
    _dispatched: bool = field(default=False, init=False, repr=False, compare=False)
    _said: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.context_loss and self.assistant_only_loss:
            raise ValueError(
                f"{NAME}: context_loss=True and assistant_only_loss=True; expected one of them"
            )

    def __getstate__(self) -> dict[str, Any]:
        """For a worker process, which cannot see for whom it reads."""
        return {**vars(self), "_dispatched": self._dispatched or _dispatching()}

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make the batch."""
        if not examples:
            raise ValueError(f"{NAME}: no examples")
        found = [self._rows(number, example) for number, example in enumerate(examples)]
        cut = f" within max_length = {self.max_length}" if self.max_length else ""
        self._warn(found, _is_empty, f"carry no loss{cut}")
        self._warn(
            found,
            _is_shifted,
            "have labels that are the next tokens already (labels[t] is input_ids[t + 1]). A model "
            "shifts labels, and the selection is shifted here: each token would be trained to "
            "predict the one after the next. Give labels[t] = input_ids[t]",
        )
        self._warn_of_doubled(found)
        self._warn_of_columns(examples)
        rows = [row for rows in found for row in rows]
        dispatched = self._dispatched or _dispatching()
        if self.packed and dispatched:
            raise ValueError(
                f"{NAME}: packed=True, and accelerate reads the data in one process and cuts the "
                "batch up for the others, which a packed row does not survive. Let each process "
                "read its own: accelerator_config={'dispatch_batches': False}, or packed=False"
            )
        batch, boundaries = self._pack(rows) if self.packed else self._pad(rows)
        if self.selection and not dispatched:  # accelerate concatenates tensors, and nothing else
            batch["selection"] = Selection.from_labels(
                batch["labels"], shift=True, cu_seqlens=boundaries
            )
        return batch

    def _rows(self, number: int, example: Mapping[str, Any]) -> list[Row]:
        try:
            rows = tokenize(
                example,
                self.tokenizer,
                context_loss=self.context_loss,
                assistant_only_loss=self.assistant_only_loss,
            )
        except ValueError as error:
            raise ValueError(f"example {number}: {error}") from error
        if not all(row.input_ids for row in rows):
            raise ValueError(f"example {number}: {NAME}: no tokens")
        if len(rows) > 1 and not self.packed:
            raise ValueError(
                f"example {number}: {NAME}: a row of {len(rows)} packed sequences, of lengths "
                f"{str([len(row.input_ids) for row in rows])[:60]}; packed=True takes it"
            )
        cut = slice(self.max_length)
        return [Row(row.input_ids[cut], row.labels[cut]) for row in rows]

    def _warn(self, found: list[list[Row]], is_so: Callable[[Row], bool], what: str) -> None:
        numbers = [n for n, rows in enumerate(found) if all(map(is_so, rows))]
        if numbers:
            warn(f"{NAME}: examples {numbers} of {len(found)} {what}")

    def _warn_of_doubled(self, found: list[list[Row]]) -> None:
        """The begin of a text that a template has made, and the one that the tokenizer adds."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        twice = [bos, bos]
        numbers = [
            n for n, rows in enumerate(found) if any(row.input_ids[:2] == twice for row in rows)
        ]
        if bos is not None and numbers:
            text = self.tokenizer.decode(twice)
            warn(
                f"{NAME}: examples {numbers} of {len(found)} begin with two begin-of-text tokens, "
                f"{text!r}: the text has one, and the tokenizer adds another. Leave it out of the "
                "text, or give messages in place of a text that a template has made"
            )

    def _warn_of_columns(self, examples: Sequence[Mapping[str, Any]]) -> None:
        """Name what is left out and could be a model's input."""
        lost = {
            name: number
            for number, example in reversed(list(enumerate(examples)))
            for name in sorted(set(example) - COLUMNS - self._said)
            if _is_input(example[name])
        }
        if lost:
            self._said |= set(lost)
            warn(
                f"{NAME}: the columns {sorted(lost)} (in example {min(lost.values())}) are left "
                "out: a batch has tokens, labels and positions alone. If the model takes them, add "
                "them to the batch; if not, remove_columns of the data ends this warning"
            )

    def _pad(self, rows: list[Row]) -> tuple[dict[str, Any], None]:
        T = self._rounded(max(len(row.input_ids) for row in rows))
        lengths = torch.tensor([len(row.input_ids) for row in rows])
        attended = torch.arange(T) < lengths[:, None]
        batch = {
            "input_ids": torch.tensor([_filled(r.input_ids, T, self._padding) for r in rows]),
            "labels": torch.tensor([_filled(row.labels, T, IGNORE) for row in rows]),
            "attention_mask": attended.long(),
            "position_ids": torch.arange(T) * attended,
        }
        return batch, None

    def _pack(self, rows: list[Row]) -> tuple[dict[str, Any], torch.Tensor]:
        """The batch, and where its sequences begin and end, padding left out."""
        ends = torch.tensor([0, *(len(row.input_ids) for row in rows)]).cumsum(0)
        N = self._rounded(int(ends[-1]))
        ids = [x for row in rows for x in row.input_ids]
        labels = [x for row in rows for x in (IGNORE, *row.labels[1:])]
        positions = [t for row in rows for t in range(len(row.input_ids))]
        rest = list(range(N - len(ids)))  # padding is a sequence of its own, and no one's
        with_padding = torch.cat([ends, ends.new_tensor([N])]) if rest else ends
        batch = {
            "input_ids": torch.tensor([_filled(ids, N, self._padding)]),
            "labels": torch.tensor([_filled(labels, N, IGNORE)]),
            "position_ids": torch.tensor([positions + rest]),
            "cu_seqlens": with_padding.int(),
        }
        return batch, ends

    def _rounded(self, length: int) -> int:
        step = self.pad_to_multiple_of or 1
        return -(-length // step) * step

    @property
    def _padding(self) -> int:
        if self.pad_token_id is not None:
            return self.pad_token_id
        for name in ("pad_token_id", "eos_token_id"):
            found = getattr(self.tokenizer, name, None)
            if isinstance(found, int):
                return found
        return 0


def _filled(row: list[int], length: int, value: int) -> list[int]:
    return row + [value] * (length - len(row))


def _is_input(value: Any) -> bool:
    """Whether a model could take it: a tensor, an array, an image or sound; a list of numbers."""
    # Asked of the class: an image of PIL would be read for its answer.
    if hasattr(type(value), "__array_interface__") or isinstance(value, torch.Tensor):
        return getattr(value, "ndim", 1) != 0  # NumPy's numbers have an interface too
    if isinstance(value, Mapping):  # a sound or an image, as `datasets` has them
        inside = [x for x in value.values() if not _is_list(x)]
        return any(isinstance(x, bytes) or _is_input(x) for x in inside)
    return _is_list(value) and any(_is_number(x) or _is_input(x) for x in value)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real)


def _is_empty(row: Row) -> bool:
    """The first token has no predictor."""
    return all(x == IGNORE for x in row.labels[1:])


def _is_shifted(row: Row) -> bool:
    """Whether labels are aligned with logits in place of tokens; the last may be any."""
    ids, labels = row
    if all(label in (IGNORE, x) for x, label in zip(ids, labels, strict=True)):
        return False
    scored = [t for t, label in enumerate(labels) if label != IGNORE]
    ahead = [t for t in scored if t + 1 < len(ids) and labels[t] == ids[t + 1]]
    return len(ahead) >= max(1, len(scored) - 1)


def _dispatching() -> bool:
    """Whether accelerate wants this batch in order to cut it up for several processes."""
    state, loading = map(sys.modules.get, ("accelerate.state", "accelerate.data_loader"))
    if state is None or loading is None or not state.GradientState._shared_state:  # noqa: SLF001  (else it is made)
        return False
    loader = state.GradientState().active_dataloader
    return isinstance(loader, loading.DataLoaderDispatcher) and loader.state.num_processes > 1

"""Which tokens carry loss: the one place where masks, shifts and sequence boundaries live."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sgp.labels import (
    IGNORE,
    checked_boundaries,
    flat_weight,
    has_float64,
    kept_counts,
    padded_rows,
    position_of,
    require_integers,
    require_tensor,
    shifted,
    tokens_ahead,
    whole_label,
)


@dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """The tokens that carry loss: their rows, targets, weights and sequences.

    Make one with `from_labels`, `from_context_lengths` or `from_mask`, once, on the host, where
    the batch is made; then pass it wherever a function of this package takes `target`.

    Example:
        >>> import torch, sgp
        >>> #            Square this number . 2 . The result is 4 .
        >>> input_ids = torch.tensor([[1, 2, 3, 4, 5, 4, 6, 7, 8, 9, 4]])
        >>> selection = sgp.Selection.from_context_lengths(input_ids, torch.tensor([6]))
        >>> selection
        Selection(shape=(1, 11), 5 of 11 tokens carry loss, 1 sequence, device=cpu)
        >>> selection.rows       # row 5, the last of the context, predicts the first output
        tensor([5, 6, 7, 8, 9])
        >>> selection.target
        tensor([6, 7, 8, 9, 4])

    Rows number the flattened tokens of the labels (row-major). Row t holds the logits that predict
    the target; with `shift=True` the constructors have moved the target from token t + 1 there.

    Inside, everything has the length N of all tokens, so that shapes never depend on the mask, and
    the count is a CPU tensor that never moves: using a Selection on a GPU does not wait for it.
    """

    dense_target: Tensor  # (N,) int64, IGNORE where there is no loss
    padded_rows: Tensor  # (N,) int64: the M kept rows, ascending, then N - M entries to ignore
    count: Tensor  # () int64 on the CPU: M
    shape: tuple[int, ...]
    num_sequences: int
    dense_weight: Tensor | None = None  # (N,) fp32 or fp64
    boundaries: Tensor | None = None  # (S + 1,) or (S + 2,) int64; None: one sequence a row
    is_part: bool = False  # of sequences that were cut
    kept_counts: Tensor | None = None  # (S,) int64 on the CPU: kept tokens of each sequence

    # -- what users read ------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """N, all tokens, with or without loss."""
        return self.dense_target.numel()

    @property
    def num_kept(self) -> int:
        """M, the tokens that carry loss."""
        return int(self.count)

    @property
    def kept_fraction(self) -> float:
        """M / N; 0 for an empty batch."""
        return self.num_kept / self.num_tokens if self.num_tokens else 0.0

    @property
    def rows(self) -> Tensor:
        """(M,) int64, ascending: the flattened positions whose logits are scored."""
        return self.padded_rows[: self.num_kept]

    @property
    def target(self) -> Tensor:
        """(M,) int64: the token that each kept row predicts."""
        return self.dense_target[self.rows]

    @property
    def weight(self) -> Tensor | None:
        """(M,): the weight of each kept row's loss, or None where all are 1."""
        return None if self.dense_weight is None else self.dense_weight[self.rows]

    @property
    def sequence(self) -> Tensor:
        """(M,) int64: the number of the sequence that each kept row belongs to."""
        return self.sequence_of(self.rows)

    def sequence_of(self, rows: Tensor) -> Tensor:
        """The number of the sequence that each of these rows belongs to, without a wait.

        Example:
            >>> labels = torch.tensor([[-100, 5, 6], [-100, 7, 8]])
            >>> Selection.from_labels(labels).sequence_of(torch.tensor([1, 4, 5]))
            tensor([0, 1, 1])

        Args:
            rows: int64 positions among the flattened tokens, as `rows` has them.
        """
        if self.boundaries is not None:
            return torch.searchsorted(self.boundaries, rows, right=True) - 1
        return rows // max(1, self.shape[-1])

    @property
    def device(self) -> torch.device:
        """Where the rows, targets and weights are."""
        return self.dense_target.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Selection:
        """The same selection on another device; the count stays on the CPU.

        Weights in float64 become float32 on a device that has no float64.
        """

        def move(x: Tensor) -> Tensor:
            x = x.float() if x.dtype == torch.float64 and not has_float64(device) else x
            return x.to(device, non_blocking=non_blocking)

        return self._map(move)

    def pin_memory(self) -> Selection:
        """The same selection in page-locked memory, for `to(..., non_blocking=True)`."""
        return self._map(lambda t: t.pin_memory())

    def cut(self, positions: Tensor) -> Selection:
        """The part of it that holds some columns of every sequence: one rank's, when time is split.

        Targets have been moved to the rows that predict them before, so that no token is lost at a
        cut, where shifting a rank's own labels would lose one.

        Example:
            >>> whole = Selection.from_labels(torch.tensor([[1, 2, 3, 4]]), shift=True)
            >>> whole.cut(torch.tensor([0, 1])).target, whole.cut(torch.tensor([2, 3])).target
            (tensor([2, 3]), tensor([4]))

        Args:
            positions: (n,) integers, ascending: columns of the last dimension of `shape`, as
                `sgp.parallel.positions` makes them. Hidden states are cut alike.

        Returns:
            A Selection of shape (..., n) and as many sequences; those with no token here are empty.
            `reduction="sequence_sum"` gives the part that this rank has: add them up over the
            ranks. "sequence_mean" is refused, for this rank does not know the sequences' lengths.

        Raises:
            ValueError: positions that are outside, not ascending, or not (n,).
            TypeError: positions that are no integers.

        On a GPU this waits for the device; cut on the host.
        """
        name = "Selection.cut"
        require_integers(name, "positions", positions)
        length = self.shape[-1]
        places = positions.to(self.device, torch.int64)
        if places.dim() != 1 or not bool((places.diff() > 0).all()):
            raise ValueError(
                f"{name}: positions are {tuple(positions.shape)}; expected (n,), ascending"
            )
        if places.numel() and (int(places[0]) < 0 or int(places[-1]) >= length):
            raise ValueError(
                f"{name}: positions go from {int(places[0])} to {int(places[-1])}; expected "
                f"columns of shape {self.shape}, in [0, {length})"
            )

        def some(values: Tensor) -> Tensor:
            rows = values.view(math.prod(self.shape[:-1]), length)
            return rows[:, places].reshape(-1)

        boundaries = self.boundaries
        if boundaries is not None:
            rest = torch.searchsorted(places, boundaries % length)
            boundaries = boundaries // length * places.numel() + rest
        target = some(self.dense_target)
        rows, count = padded_rows(target, IGNORE)
        return replace(
            self,
            dense_target=target,
            padded_rows=rows,
            count=count,
            shape=(*self.shape[:-1], places.numel()),
            is_part=True,
            dense_weight=None if self.dense_weight is None else some(self.dense_weight),
            boundaries=boundaries,
            kept_counts=kept_counts(target != IGNORE, self.num_sequences, boundaries).cpu(),
        )

    def _map(self, move: Callable[[Tensor], Tensor]) -> Selection:
        return replace(
            self,
            dense_target=move(self.dense_target),
            padded_rows=move(self.padded_rows),
            dense_weight=None if self.dense_weight is None else move(self.dense_weight),
            boundaries=None if self.boundaries is None else move(self.boundaries),
        )

    def __repr__(self) -> str:
        plural = "" if self.num_sequences == 1 else "s"
        return (
            f"Selection(shape={self.shape}, {self.num_kept} of {self.num_tokens} tokens carry "
            f"loss, {self.num_sequences} sequence{plural}, device={self.device})"
        )

    # -- constructors ---------------------------------------------------------------------------

    @classmethod
    def from_labels(
        cls,
        labels: Tensor,
        *,
        ignore_index: int | None = -100,
        shift: bool | int = False,
        token_weight: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Selection:
        """Tokens whose label is not `ignore_index`.

        Example:
            >>> labels = torch.tensor([[-100, -100, 7, 8], [-100, 5, -100, 6]])  # Hugging Face's
            >>> Selection.from_labels(labels, shift=True).rows
            tensor([1, 2, 4, 6])
            >>> target = torch.tensor([[-100, 7, 8, -100], [5, -100, 6, -100]])  # the same, as of
            >>> Selection.from_labels(target).rows                               # F.cross_entropy
            tensor([1, 2, 4, 6])

        Hugging Face's labels without `shift=True` would train each token to predict itself. Labels
        alone do not show it; `sgp.audit`, which sees the inputs too, does.

        Args:
            labels: (T,) one sequence, (B, T) a sequence a row, or more dimensions; integers.
            ignore_index: the label that means "no loss"; None means -100.
            shift: labels[t] is token t itself (Hugging Face's convention), so row t - 1 predicts
                it. False: labels[t] is already what row t predicts. The first token of a sequence
                has no predictor and is never scored when shifting. A whole number k: row t - k
                predicts token t, as the heads of multi-token prediction do; True is 1.
            token_weight: weight of each label's loss, of the shape of `labels`, and shifted with
                them. A constant.
            cu_seqlens: (S + 1,) cumulative lengths of sequences packed along the flattened tokens,
                as FlashAttention's varlen functions take them: starts at 0. No token predicts
                across a boundary. Tokens after the last boundary are padding.

        Raises:
            ValueError: shapes that disagree, a negative label that is not `ignore_index`, weights
                that require grad, boundaries that are not cumulative lengths of these labels.
            TypeError: labels or boundaries that are not integers.

        On a GPU this waits for the device (it counts); build it on the host and use `to`.
        """
        name = "Selection.from_labels"
        return cls._make(name, "labels", labels, ignore_index, shift, token_weight, cu_seqlens)

    @classmethod
    def _make(
        cls,
        name: str,
        label: str,
        labels: Tensor,
        ignore_index: int | None = IGNORE,
        shift: bool | int = False,
        token_weight: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Selection:
        """Every constructor: what `mask` marks or, without one, what is not `ignore_index`."""
        require_integers(name, label, labels)
        ahead = tokens_ahead(name, shift, labels.shape[-1])
        ignore = whole_label(name, ignore_index)
        flat = labels.reshape(-1).to(torch.int64)
        kept = flat != ignore if mask is None else mask.reshape(-1)
        bad = kept & (flat < 0)
        if bad.any():
            at = position_of(int(bad.nonzero()[0]), labels.shape)
            raise ValueError(
                f"{name}: {label}[{at}] = {int(flat[bad][0])} is negative"
                + (
                    "; a token that carries loss needs a number of the vocabulary"
                    if mask is not None
                    else f" and not ignore_index = {ignore}; mark tokens without loss with "
                    "ignore_index"
                )
            )
        weight = flat_weight(name, token_weight, labels)
        length = labels.shape[-1]
        boundaries, num_sequences = checked_boundaries(name, cu_seqlens, labels, kept)
        target = torch.where(kept, flat, IGNORE)
        if ahead and flat.numel():
            target = shifted(target, length, IGNORE, ahead)
            if boundaries is not None:
                row = torch.arange(flat.numel(), device=flat.device)
                end = boundaries[torch.searchsorted(boundaries, row, right=True)]
                target[row + ahead >= end] = IGNORE
            weight = None if weight is None else weight.roll(-ahead)
        rows, count = padded_rows(target, IGNORE)
        return cls(
            dense_target=target,
            padded_rows=rows,
            count=count,
            shape=tuple(labels.shape),
            num_sequences=num_sequences,
            dense_weight=weight,
            boundaries=boundaries,
            kept_counts=kept_counts(target != IGNORE, num_sequences, boundaries).cpu(),
        )

    @classmethod
    def from_context_lengths(
        cls,
        input_ids: Tensor,
        context_lengths: Tensor,
        *,
        lengths: Tensor | None = None,
        shift: bool | int = True,
    ) -> Selection:
        """Every token from column `context_lengths[b]` on, up to `lengths[b]`, in each row b.

        Example:
            >>> ids = torch.tensor([[5, 6, 7, 8], [5, 9, 0, 0]])      # 0 pads on the right
            >>> s = Selection.from_context_lengths(
            ...     ids, torch.tensor([2, 1]), lengths=torch.tensor([4, 2]))
            >>> s.rows, s.target
            (tensor([1, 2, 4]), tensor([7, 8, 9]))

        Args:
            input_ids: (B, T) integers, padded on the right.
            context_lengths: (B,) integers: tokens of each row that carry no loss, counted from
                column 0.
            lengths: (B,) integers: tokens of each row that are not padding; None: all T.
            shift: row t predicts token t + 1, as a causal language model's logits do; a whole
                number k: token t + k. With a context length of 0 token 0 has no predictor and is
                not scored.

        Raises:
            ValueError: shapes that disagree, or not 0 <= context <= length <= T in some row.
            TypeError: arguments that are not integers.
        """
        name = "Selection.from_context_lengths"
        require_integers(name, "input_ids", input_ids)
        if input_ids.dim() != 2:
            raise ValueError(f"{name}: input_ids is {tuple(input_ids.shape)}; expected (B, T)")
        B, T = input_ids.shape
        if lengths is None:
            lengths = torch.full((B,), T, device=input_ids.device)
        for label, value in (("context_lengths", context_lengths), ("lengths", lengths)):
            require_integers(name, label, value)
            if tuple(value.shape) != (B,):
                raise ValueError(
                    f"{name}: {label} is {tuple(value.shape)}; expected ({B},), one a row of "
                    f"input_ids {tuple(input_ids.shape)}"
                )
        context_lengths = context_lengths.to(input_ids.device)
        lengths = lengths.to(input_ids.device)
        bad = (context_lengths < 0) | (context_lengths > lengths) | (lengths > T)
        if bad.any():
            b = int(bad.nonzero()[0])
            raise ValueError(
                f"{name}: row {b} has context length {int(context_lengths[b])} and length "
                f"{int(lengths[b])}; expected 0 <= context <= length <= {T}"
            )
        column = torch.arange(T, device=input_ids.device)
        mask = (column >= context_lengths[:, None]) & (column < lengths[:, None])
        return cls._make(name, "input_ids", input_ids, shift=shift, mask=mask)

    @classmethod
    def from_mask(
        cls,
        input_ids: Tensor,
        mask: Tensor,
        *,
        shift: bool | int = True,
        cu_seqlens: Tensor | None = None,
    ) -> Selection:
        """Tokens that `mask` marks: the scored targets, not the positions that predict them.

        Example:
            >>> ids = torch.tensor([[5, 6, 7, 8, 9]])
            >>> Selection.from_mask(ids, torch.tensor([[0, 0, 1, 0, 1]])).target   # two turns
            tensor([7, 9])

        Args:
            input_ids: any shape, integers; the last dimension is time.
            mask: same shape, bool or integers 0 and 1: an assistant or completion mask.
            shift: row t predicts token t + 1; a whole number k: token t + k. A marked first token
                of a sequence has no predictor and is not scored.
            cu_seqlens: as in `from_labels`.

        Raises:
            ValueError: shapes that disagree, a mask with values other than 0 and 1.
            TypeError: a mask of floats, tokens that are not integers.
        """
        name = "Selection.from_mask"
        require_integers(name, "input_ids", input_ids)
        require_tensor(name, "mask", mask)
        if mask.is_floating_point() or mask.is_complex():
            raise TypeError(f"{name}: mask is {mask.dtype}; expected bool or integers 0 and 1")
        if mask.shape != input_ids.shape:
            raise ValueError(
                f"{name}: mask is {tuple(mask.shape)} and input_ids {tuple(input_ids.shape)}; "
                "expected the same shape"
            )
        mask = mask.to(input_ids.device)
        if mask.dtype != torch.bool:
            bad = (mask != 0) & (mask != 1)
            if bad.any():
                at = position_of(int(bad.flatten().nonzero()[0]), mask.shape)
                raise ValueError(f"{name}: mask[{at}] = {int(mask[bad][0])}; expected 0 or 1")
        return cls._make(
            name, "input_ids", input_ids, shift=shift, cu_seqlens=cu_seqlens, mask=mask.bool()
        )

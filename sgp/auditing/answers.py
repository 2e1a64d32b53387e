"""What a model would say in a batch's own contexts, and whether it stops where the labels do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sgp.auditing.trace import device_of
from sgp.auditing.turns import text_of
from sgp.auditing.untouched import as_before
from sgp.auditing.view import View

BEYOND = 16
"""Tokens that an answer may have beyond the expected one."""
LAST = 2
"""Tokens among which an answer's end is: a template may write a line break after it."""


@dataclass(frozen=True)
class Answer:
    """A greedy answer to the context of one row."""

    row: int
    expected: str  # the first run of tokens with loss
    generated: str
    ends: bool  # with an end of text or of a turn
    tokens: int  # generated, the end included
    expected_ends: bool  # the labels have such an end there


def answer(
    model: nn.Module,
    view: View,
    tokenizer: Any,
    number: int,
    autocast: torch.dtype | None = None,
) -> tuple[Answer, ...]:
    """Answer the contexts of the first rows that carry loss, greedily.

    A context is a row's first sequence up to its first token with loss; the answer ends with an
    end of text or of a turn, or 16 tokens after the expected one, or where the model's window is
    full. The model answers in eval mode
    and without gradients; modes, buffers and the random state are then as before. `generate` is
    used where the model has it and its configuration, else its forward, once for each token. Images
    and sound are not passed on.

    Example:
        >>> for a in answer(model, report.view, tokenizer, 4):  # doctest: +SKIP
        ...     print(a.generated, a.ends)

    Args:
        model: as for `sgp.audit`.
        view: of the batch.
        tokenizer: decodes; None: numbers.
        number: of answers, at most; rows without a context or without loss have none, nor those
            whose context fills the window.
        autocast: the dtype of the forward passes; None: as it is.
    """
    found: list[Answer] = []
    if number < 1:
        return ()
    with _answering(model, autocast):
        for row, context, expected in _contexts(view):
            if len(found) == number:
                break
            most = len(expected) + BEYOND
            most = min(most, _window(model, len(context) + most) - len(context))
            if most < 1:
                continue
            said = _greedy(model, context, most, view.eos)
            found.append(
                Answer(
                    row,
                    text_of(tokenizer, *expected),
                    text_of(tokenizer, *said),
                    ends=said[-1] in view.eos,
                    tokens=len(said),
                    expected_ends=not view.eos.isdisjoint(expected[-LAST:]),
                )
            )
    return tuple(found)


def _contexts(view: View) -> Iterator[tuple[int, list[int], list[int]]]:
    """Of each row that has both: the row, its context and what is expected after it."""
    scored, sequence = view.scored & view.attended, view.sequence
    for row in scored.any(1).nonzero()[:, 0].tolist():
        at = scored[row].nonzero()[:, 0]
        first = int(at[0])
        same = view.attended[row] & (sequence[row] == sequence[row, first])
        before = same & (torch.arange(len(same)) < first)
        ahead = (same & scored[row])[first:]
        length = int(ahead.long().cumprod(0).sum())
        if bool(before.any()):
            ids = view.input_ids[row]
            yield row, ids[before].tolist(), ids[first : first + length].tolist()


@contextmanager
def _answering(model: nn.Module, autocast: torch.dtype | None) -> Iterator[None]:
    """In eval mode, without gradients, on a random state of its own."""
    kind = next((p.device.type for p in model.parameters()), "cpu")
    cast = torch.autocast(kind, dtype=autocast) if autocast is not None else nullcontext()
    with as_before(model), torch.no_grad(), cast:
        model.eval()
        yield


def _greedy(model: nn.Module, context: list[int], most: int, ends: frozenset[int]) -> list[int]:
    ids = torch.tensor([context], device=device_of(model))
    configured = getattr(model, "generation_config", None) is not None
    if configured and hasattr(model, "generate") and not _is_prompted(model):
        return _generated(model, ids, most, ends)
    for _ in range(most):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        if int(ids[0, -1]) in ends:
            break
    found: list[int] = ids[0, len(context) :].tolist()
    return found


def _is_prompted(model: nn.Module) -> bool:
    """Whether PEFT puts virtual tokens before a text: in a cache, `generate` may lose them."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def _window(model: nn.Module, default: int) -> int:
    """The positions that a model has, by its configuration."""
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()  # type: ignore[union-attr]
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) else default


def _generated(model: nn.Module, ids: Tensor, most: int, ends: frozenset[int]) -> list[int]:
    from transformers import GenerationConfig  # noqa: PLC0415

    options = GenerationConfig(
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
    )
    found = model.generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=options
    )
    said: list[int] = found[0, ids.shape[1] :].tolist()
    return said

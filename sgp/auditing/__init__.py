"""See where the gradient flows: `audit` looks at one batch and one backward pass.

`findings.py` has what can be wrong, `trace.py` the backward pass seen from inside, `report.py` what
is shown of both.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sgp.auditing import findings
from sgp.auditing.findings import Finding, View
from sgp.auditing.report import AuditReport, Token
from sgp.auditing.trace import Trace, trace
from sgp.selection import Selection

__all__ = ["AuditReport", "Finding", "audit"]

NAME = "sgp.audit"
OUTPUT_MASKS = ("completion_mask", "assistant_masks", "assistant_mask")


def audit(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    selection: Selection | None = None,
    tokenizer: Any = None,
) -> AuditReport:
    """Run one exact backward pass of a batch and report who got a gradient, and what is wrong.

    Read-only: parameters, gradients, random state and the training mode are as before.

    Example:
        >>> report = sgp.audit(model, batch, tokenizer=tokenizer)  # doctest: +SKIP
        >>> report.print()  # doctest: +SKIP
        >>> assert not report.errors, report.findings  # doctest: +SKIP

    Args:
        model: a causal language model that returns `.logits` (B, T, V) and, asked for
            `output_hidden_states`, `.hidden_states`, as Hugging Face's do.
        batch: `input_ids` (B, T) and, unless a selection is given, `labels` (B, T): -100 where
            there is no loss, not shifted; as Hugging Face has them. `attention_mask`,
            `position_ids` and masks of output tokens (`completion_mask`, `assistant_masks`) are
            looked at where they are there; what the model's forward knows is passed on.
        selection: which tokens carry loss, in place of labels.
        tokenizer: decodes tokens and knows the special ones; None: numbers, and no findings about
            special tokens and the end of text.

    Returns:
        The report: `.tokens`, `.grad_norm`, `.context_share`, `.cosine_detached`, `.findings`.
        `context_share` and `cosine_detached` are None where a row is not context, then output:
        the two parts of the gradient are then not defined.

    Raises:
        ValueError: without labels and selection, if shapes disagree, or a token is outside the
            model's vocabulary.
        TypeError: if the batch is no mapping, or the model takes no `output_hidden_states`.
    """
    input_ids, labels = _input_ids_and_labels(batch, selection)
    _check_model(model, input_ids, labels)
    view = _view(batch, input_ids, labels, tokenizer)
    device = next(model.parameters()).device
    inputs = _inputs(model, batch, device, with_labels=selection is None)
    targets = torch.full_like(labels, -100)
    targets[:, :-1] = labels[:, 1:]
    if selection is not None:
        targets = selection.dense_target.view(labels.shape).to(labels.device)
    outputs = _suffixes(view)
    found = trace(
        model, inputs, targets.to(device), outputs.to(device) if outputs is not None else None
    )
    log_prob = torch.zeros_like(found.log_prob)
    log_prob[:, 1:] = found.log_prob[:, :-1]
    view = View(
        **{
            **vars(view),
            "log_prob": log_prob,
            "logit_grad_norm": found.logit_grad_norm,
            "without_gradient": found.without_gradient,
            "not_finite": found.not_finite,
        }
    )
    return AuditReport(
        tokens=_tokens(view, targets.cpu(), found, tokenizer),
        grad_norm=found.grad_norm,
        loss=found.loss,
        context_share=found.context_share,
        cosine_detached=found.cosine_detached,
        findings=findings.find(view),
        model_name=type(model).__name__,
    )


def look(batch: Mapping[str, Any], *, tokenizer: Any = None) -> list[Finding]:
    """The findings of a batch's labels alone: no model, no gradient.

    Example:
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> [f.code for f in look({"input_ids": ids, "labels": torch.full_like(ids, -100)})]
        ['no-targets']

    Args:
        batch: as for `audit`.
        tokenizer: as for `audit`.
    """
    input_ids, labels = _input_ids_and_labels(batch, None)
    return findings.find(_view(batch, input_ids, labels, tokenizer))


def _input_ids_and_labels(
    batch: Mapping[str, Any], selection: Selection | None
) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, Mapping):
        raise TypeError(f"{NAME}: batch is {type(batch).__name__}; expected a dict with input_ids")
    if "input_ids" not in batch:
        raise ValueError(f"{NAME}: the batch has {sorted(batch)}; expected input_ids")
    input_ids = batch["input_ids"].cpu()
    if input_ids.dim() != 2:
        raise ValueError(f"{NAME}: input_ids is {tuple(input_ids.shape)}; expected (B, T)")
    if selection is not None:
        if selection.num_tokens != input_ids.numel():
            raise ValueError(
                f"{NAME}: the selection is of {selection.num_tokens} tokens, input_ids of "
                f"{input_ids.numel()}"
            )
        labels = torch.full_like(input_ids, -100)
        labels[:, 1:] = selection.dense_target.cpu().view(input_ids.shape)[:, :-1]
        return input_ids, labels
    if batch.get("labels") is None:
        raise ValueError(f"{NAME}: the batch has {sorted(batch)}; expected labels, or selection=")
    labels = batch["labels"].cpu()
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"{NAME}: labels is {tuple(labels.shape)}, input_ids {tuple(input_ids.shape)}"
        )
    return input_ids, labels


def _check_model(model: nn.Module, input_ids: Tensor, labels: Tensor) -> None:
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if not takes_any and "output_hidden_states" not in parameters:
        raise TypeError(
            f"{NAME}: {type(model).__name__}.forward takes {list(parameters)}; expected a causal "
            "language model that takes input_ids and output_hidden_states"
        )
    config = getattr(model, "config", None)
    V = getattr(config.get_text_config(), "vocab_size", None) if config is not None else None
    if V is None:
        return
    for name, ids, kept in (("input_ids", input_ids, True), ("labels", labels, labels != -100)):
        outside = ((ids < 0) | (ids >= V)) & kept
        if bool(outside.any()):
            row, column = outside.nonzero()[0].tolist()
            raise ValueError(
                f"{NAME}: {name}[{row}, {column}] = {int(ids[row, column])} is outside [0, {V}); "
                "is it the model's tokenizer?"
            )


def _view(batch: Mapping[str, Any], input_ids: Tensor, labels: Tensor, tokenizer: Any) -> View:
    mask = batch.get("attention_mask")
    attended = torch.ones_like(input_ids, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.shape == input_ids.shape:
        attended = mask.cpu() != 0
    first = attended & (attended.long().cumsum(1) == 1)
    starts = first.clone()
    positions = batch.get("position_ids")
    if isinstance(positions, Tensor) and positions.shape == input_ids.shape:
        starts |= attended & (positions.cpu() == 0)
    marks = (batch[name] for name in OUTPUT_MASKS if isinstance(batch.get(name), Tensor))
    outputs = next((m.cpu() != 0 for m in marks if m.shape == input_ids.shape), None)
    eos, special = frozenset[int](), frozenset[int]()
    if tokenizer is not None:
        end = getattr(tokenizer, "eos_token_id", None)
        eos = frozenset([end] if isinstance(end, int) else end or ())
        special = frozenset(getattr(tokenizer, "all_special_ids", ())) - eos
    return View(input_ids, labels, attended, starts, outputs, special, eos)


def _inputs(
    model: nn.Module, batch: Mapping[str, Any], device: torch.device, *, with_labels: bool
) -> dict[str, Any]:
    known = inspect.signature(model.forward).parameters
    kept = {k: v for k, v in batch.items() if k in known and (k != "labels" or with_labels)}
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kept.items()}


def _suffixes(view: View) -> Tensor | None:
    """(B, T) bool from the first predictor on, if every row is context, output, padding."""
    scored = view.scored
    first = scored.long().cumsum(1).clamp(max=1).bool()  # from the first scored token on
    inner = view.starts & (view.attended.long().cumsum(1) > 1)
    if bool((first & view.attended & ~scored).any()) or bool(inner.any()):
        return None
    outputs = first.clone()
    outputs[:, :-1] |= first[:, 1:]
    return outputs


def _tokens(view: View, targets: Tensor, found: Trace, tokenizer: Any) -> list[list[Token]]:
    scored, predicts = view.scored, targets != -100
    after = scored.long().cumsum(1) > 0
    rows = []
    for b in range(len(view.input_ids)):
        row = []
        for t in range(view.input_ids.shape[1]):
            has = bool(predicts[b, t])
            log_prob = float(found.log_prob[b, t])
            row.append(
                Token(
                    row=b,
                    position=t,
                    token_id=int(view.input_ids[b, t]),
                    text=_text(tokenizer, int(view.input_ids[b, t])),
                    role=_role(view, b, t, has=has, after=bool(after[b, t])),
                    target_id=int(targets[b, t]) if has else None,
                    target=_text(tokenizer, int(targets[b, t])) if has else None,
                    loss=-log_prob if has else None,
                    probability=math.exp(log_prob) if has else None,
                    gradient=float(found.logit_grad_norm[b, t]),
                )
            )
        rows.append(row)
    return rows


def _role(view: View, b: int, t: int, *, has: bool, after: bool) -> str:
    if bool(view.scored[b, t]):
        return "output"
    if not bool(view.attended[b, t]):
        return "padding"
    if has:
        return "predictor"
    return "ignored" if after else "context"


def _text(tokenizer: Any, token_id: int) -> str:
    return str(token_id) if tokenizer is None else str(tokenizer.decode([token_id]))

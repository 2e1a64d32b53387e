"""See where the gradient flows: `audit` looks at one batch and one backward pass.

`view.py` reads the batch (`turns.py` what a chat template says), and `trace.py` is the backward
pass seen from inside (`parts.py` the two parts of the linear layers' gradient, `untouched.py` what
it leaves as it was, `leaks.py` whether packed sequences see one another). `checks.py` has what can
be wrong (`masks.py` where), `findings.py` how it is told, `outcome.py` what came out of it all, and
`report.py` shows it (`page.py`, `plot.py`, `colors.py`). `repair.py` mends labels, `answers.py` has
what the model would say, and `survey.py` what is said of a whole file.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sgp.auditing.answers import answer
from sgp.auditing.checks import find
from sgp.auditing.findings import (
    Finding,
    Group,
    check_ignored,
    check_severity,
    grouped,
    ranges,
    settled,
)
from sgp.auditing.leaks import find_leaks, packed
from sgp.auditing.outcome import Token
from sgp.auditing.report import AuditReport
from sgp.auditing.trace import OF_LOSS, Trace, check_autocast, device_of, gradient_at, trace
from sgp.auditing.turns import Turns, text_of
from sgp.auditing.view import NAME, View, read, suffixes
from sgp.context import SHARDED
from sgp.labels import IGNORE
from sgp.selection import Selection

__all__ = ["AuditReport", "Finding", "Group", "audit", "grouped", "ranges"]

OPTIONS = {"output_hidden_states": True, "use_cache": False}
THROUGH = (  # keys that Hugging Face's models take without naming them in forward
    "position_ids", "shift_labels", "num_items_in_batch", "seq_idx",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
)  # fmt: skip


def audit(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    selection: Selection | None = None,
    tokenizer: Any = None,
    ignore: Sequence[str] = (),
    severity: Mapping[str, str] | None = None,
    autocast: torch.dtype | None = None,
    max_length: int | None = None,
    generate: int = 0,
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
            there is no loss, not shifted; as Hugging Face has them (or `shift_labels`, shifted).
            Padding and seams are read from `attention_mask`, `position_ids`, `seq_idx`,
            `cu_seqlens`, `cu_seq_lens_q` or `lengths`, which tokens are output from
            `completion_mask`, `assistant_masks` or `context_lengths`, as far as they are there.
            What the model's forward takes is passed on.
        selection: which tokens carry loss, in place of labels. The loss is its (weighted) mean.
        tokenizer: decodes tokens and knows the special ones; None: numbers, and no findings about
            special tokens and the end of text, which the model's generation_config adds to.
        ignore: codes of findings, and patterns of parameters' names ("*.visual.*", "lm_head"), that
            no finding is to be about.
        severity: other severities than the table's, `{"no-eos": "warning"}`.
        autocast: the dtype that training runs in; None: no autocast.
        max_length: the window: sequences that reach it may have been cut, and then need no end.
        generate: how many greedy answers to make in the batch's own contexts, at most one a row.

    Returns:
        The report: `.tokens`, `.grad_norm`, `.context_share`, `.cosine_detached`, `.findings`,
        `.answers`.
        `context_share` and `cosine_detached` are None where a row is not context, then output
        (the two parts of the gradient are then not defined), and where not all of a linear
        layer's gradient was seen: it runs twice, its weight is used elsewhere too, or its input is
        not (B, T, D).

    Raises:
        ValueError: without labels and selection, if shapes disagree, a token is outside the model's
            vocabulary, or a word of `ignore` or `severity` means nothing.
        TypeError: if the batch is no mapping, `ignore` is one word, `autocast` no dtype of floating
            point, the model takes no `output_hidden_states` or its parameters are sharded over
            processes.
    """
    severities = check_severity(severity)
    check_autocast(autocast)
    model = unwrapped(model)
    ignored = check_ignored(ignore, [name for name, _ in model.named_parameters()])
    ends = ends_of(model) if tokenizer is not None else ()
    view = read(batch, selection=selection, tokenizer=tokenizer, eos=ends, max_length=max_length)
    _check_model(model, view)
    device = device_of(model)
    inputs = _inputs(model, batch, device, with_labels=selection is None)
    outputs = suffixes(view)
    found = trace(
        model,
        inputs,
        view.targets.to(device),
        outputs.to(device) if outputs is not None else None,
        selection,
        autocast,
    )

    def kept(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in names if not ignored(name))

    view = replace(
        view,
        loss=found.loss,
        own_loss=found.own_loss,
        vocabulary=vocabulary_of(model),
        log_prob=found.log_prob,
        logit_grad_norm=found.logit_grad_norm,
        measured=found.measured,
        without_gradient=kept(found.without_gradient),
        not_run=kept(found.not_run),
        not_finite=kept(found.not_finite),
        zero=kept(found.zero),
    )
    if packed(view):
        view = replace(
            view,
            leaks=find_leaks(
                view,
                found.grad_norm,
                lambda targets: gradient_at(model, inputs, targets, autocast),
            ),
        )
    return AuditReport(
        tokens=_tokens(view, found, tokenizer),
        grad_norm=found.grad_norm,
        loss=found.loss,
        context_share=found.context_share,
        cosine_detached=found.cosine_detached,
        findings=settled(find(view), ignore, severities),
        model_name=type(model).__name__,
        view=view,
        answers=answer(model, view, tokenizer, generate, autocast),
    )


def look(
    batch: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    eos: tuple[int, ...] = (),
    max_length: int | None = None,
    ignore: Sequence[str] = (),
    severity: Mapping[str, str] | None = None,
    turns: Turns | None = None,
) -> list[Finding]:
    """The findings of a batch's labels alone: no model, no gradient.

    Example:
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> [f.code for f in look({"input_ids": ids, "labels": torch.full_like(ids, -100)})]
        ['no-targets']

    Args:
        batch: as for `audit`.
        tokenizer: as for `audit`.
        eos: tokens that end a text beside the tokenizer's (`ends_of` a model).
        max_length: as for `audit`; ignore, severity too.
        turns: what the tokenizer's chat template says, if it was asked before.
    """
    check_ignored(ignore)
    view = read(batch, tokenizer=tokenizer, eos=eos, max_length=max_length, turns=turns)
    return settled(find(view), ignore, check_severity(severity))


# -- the model -------------------------------------------------------------------------------------


def unwrapped(model: nn.Module) -> nn.Module:
    """Out of DistributedDataParallel and torch.compile: one process, one eager pass."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:  # noqa: SLF001  (torch.compile's wrapper)
            model = model.get_submodule("_orig_mod")
        else:
            return model


def _check_model(model: nn.Module, view: View) -> None:
    known, takes_any = _takes(model)
    if not takes_any and "output_hidden_states" not in known:
        raise TypeError(
            f"{NAME}: {type(model).__name__}.forward takes {sorted(known)}; expected a causal "
            "language model that takes input_ids and output_hidden_states"
        )
    for name, p in model.named_parameters():
        if any(hasattr(p, mark) for mark in SHARDED):
            raise TypeError(
                f"{NAME}: {name} is sharded over processes ({type(p).__name__}); audit the model "
                "before it is sharded"
            )
    V = vocabulary_of(model)
    if V is None:
        return
    wrong = (
        ("input_ids", view.input_ids, torch.ones_like(view.attended)),
        ("labels", view.labels, view.labels != IGNORE),
        ("the target of input_ids", view.targets, view.predicts),
    )
    for name, ids, kept in wrong:
        outside = ((ids < 0) | (ids >= V)) & kept
        if bool(outside.any()):
            row, column = outside.nonzero()[0].tolist()
            raise ValueError(
                f"{NAME}: {name}[{row}, {column}] = {int(ids[row, column])} is outside [0, {V}); "
                "is it the model's tokenizer?"
            )


def vocabulary_of(model: nn.Module) -> int | None:
    """V by the model's configuration, if it says."""
    config = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return None
    found = getattr(config.get_text_config(), "vocab_size", None)  # type: ignore[union-attr]
    return found if isinstance(found, int) else None


def ends_of(model: nn.Module) -> tuple[int, ...]:
    """What generation stops at: a chat model ends a turn with another token than a text."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return (found,) if isinstance(found, int) else tuple(found or ())


def _takes(model: nn.Module) -> tuple[set[str], bool]:
    """What forward takes by name, and whether it takes anything."""
    parameters = inspect.signature(model.forward).parameters
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return set(parameters), anything


def _inputs(
    model: nn.Module, batch: Mapping[str, Any], device: torch.device, *, with_labels: bool
) -> dict[str, Any]:
    known, takes_any = _takes(model)
    if takes_any:
        known |= set(THROUGH) | {"output_hidden_states", "use_cache"}
        if hasattr(model, "get_base_model"):  # PEFT's forward passes on what it does not name
            known |= _takes(model.get_base_model())[0]  # type: ignore[operator]
    if not with_labels or batch.get("labels") is None:
        known -= set(OF_LOSS)
    kept = {k: v for k, v in batch.items() if k in known}
    kept |= {k: v for k, v in OPTIONS.items() if k in known}
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kept.items()}


# -- the tokens ------------------------------------------------------------------------------------


def _tokens(view: View, found: Trace, tokenizer: Any) -> list[list[Token]]:
    roles = _roles(view)
    log_prob, gradient = found.log_prob.tolist(), found.logit_grad_norm.tolist()
    ids, targets = view.input_ids.tolist(), view.targets.tolist()
    text = functools.cache(functools.partial(text_of, tokenizer))
    rows = []
    for b in range(len(ids)):
        row = []
        for t in range(len(ids[b])):
            has = targets[b][t] != IGNORE
            row.append(
                Token(
                    row=b,
                    position=t,
                    token_id=ids[b][t],
                    text=text(ids[b][t]),
                    role=roles[b][t],
                    target_id=targets[b][t] if has else None,
                    target=text(targets[b][t]) if has else None,
                    loss=-log_prob[b][t] if has else None,
                    probability=math.exp(log_prob[b][t]) if has else None,
                    gradient=gradient[b][t],
                )
            )
        rows.append(row)
    return rows


def _roles(view: View) -> list[list[str]]:
    scored, predicts, attended = (
        view.scored.tolist(),
        view.predicts.tolist(),
        view.attended.tolist(),
    )
    sequence = view.sequence.tolist()
    rows = []
    for b in range(len(scored)):
        last = {n: t for t, n in enumerate(sequence[b]) if scored[b][t]}  # of each with an output
        row = []
        for t in range(len(scored[b])):
            if scored[b][t]:
                role = "output"
            elif not attended[b][t]:
                role = "padding"
            elif predicts[b][t]:
                role = "predictor"
            else:
                role = "ignored" if t > last.get(sequence[b][t], t) else "context"
            row.append(role)
        rows.append(row)
    return rows

"""`AuditCallback`: the audit of the first batch that a Trainer gives to its model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from sgp.auditing import AuditReport, audit, grouped, unwrapped
from sgp.auditing.findings import check_ignored, check_severity
from sgp.auditing.trace import check_autocast
from sgp.context import SHARDED

LOG = logging.getLogger("sgp.huggingface")
LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "note": logging.INFO}


class AuditError(ValueError):
    """The first batch has errors, and training was to stop on them."""


class AuditCallback(TrainerCallback):
    """Audits the first batch of a training run, just before its forward pass.

    It sees what the model is given: after the collator, with the columns that the Trainer has kept,
    on the model's device. On the first process only.

    Example:
        >>> trainer.add_callback(sgp.huggingface.AuditCallback(tokenizer))  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP

    Args:
        tokenizer: as for `sgp.audit`; None: the Trainer's own (`processing_class`).
        stop_on_errors: raise `AuditError` where there are errors, before a parameter has moved;
            else they are logged, one line for what many rows share, by the logger
            "sgp.huggingface".
        page: where to write the report as a page; None: audit.html in the output folder.
        rows: of the batch, at most: an audit holds all their logits.
        ignore: as for `sgp.audit`: codes, and patterns of parameters' names.
        severity: as for `sgp.audit`: `{"no-eos": "warning"}`.
        autocast: as for `sgp.audit`; a Trainer's own (`bf16=True`) is in effect without it.
        max_length: the collator's window: a sequence that reaches it may have been cut, and then
            needs no end; None: a missing end is an error only where a longer sequence with loss is
            in the batch, or another turn follows.

    Attributes:
        report: the `AuditReport`, once there is one.

    Raises:
        ValueError: a code or a severity that there is not; when training begins, also a word of
            `ignore` that is no code and fits no parameter of the model.
        TypeError: `ignore` is one word, or `autocast` no dtype of floating point.
        AuditError: from the model's first forward pass, with every error.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        *,
        stop_on_errors: bool = False,
        page: str | Path | None = None,
        rows: int = 4,
        ignore: Sequence[str] = (),
        severity: Mapping[str, str] | None = None,
        autocast: torch.dtype | None = None,
        max_length: int | None = None,
    ) -> None:
        """Nothing happens before training begins."""
        check_severity(severity)
        check_autocast(autocast)
        words = ignore if isinstance(ignore, str) else [word for word in ignore if "-" in word]
        check_ignored(words)  # the codes; the parameters are not known yet
        self.tokenizer = tokenizer
        self.stop_on_errors = stop_on_errors
        self.page = page
        self.rows = rows
        self.options: dict[str, Any] = {
            "ignore": ignore,
            "severity": severity,
            "autocast": autocast,
            "max_length": max_length,
        }
        self.report: AuditReport | None = None
        self._handle: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the first batch."""
        del control
        model: nn.Module = kwargs["model"]
        if not any(hasattr(p, mark) for p in model.parameters() for mark in SHARDED):
            names = [name for name, _ in unwrapped(model).named_parameters()]
            check_ignored(self.options["ignore"], names)
        if not state.is_world_process_zero:
            return
        tokenizer = self.tokenizer or kwargs.get("processing_class")
        page = Path(self.page) if self.page is not None else Path(args.output_dir) / "audit.html"

        def first(module: nn.Module, _: Any, batch: dict[str, Any]) -> None:
            self._stop_waiting()
            self._audit(module, batch, tokenizer, page)

        # Before the hook of a patch, which a forward pass of its own would confuse.
        self._handle = model.register_forward_pre_hook(first, prepend=True, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait no longer."""
        del args, state, control, kwargs
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _audit(
        self, model: nn.Module, batch: Mapping[str, Any], tokenizer: Any, page: Path
    ) -> None:
        try:
            report = audit(
                model, _first_rows(batch, self.rows), tokenizer=tokenizer, **self.options
            )
        except (ValueError, TypeError) as error:
            if self.stop_on_errors:
                raise AuditError(f"the first batch could not be audited: {error}") from error
            LOG.warning("the first batch could not be audited: %s", error)
            return
        self.report = report
        page.parent.mkdir(parents=True, exist_ok=True)
        report.to_html(page)
        for group in grouped(report.findings):
            LOG.log(LEVELS[group.severity], "%s", group)
        LOG.info("audit of the first batch: %r, %s", report, page)
        if report.errors and self.stop_on_errors:
            errors = "; ".join(str(group) for group in grouped(report.errors))
            raise AuditError(f"the first batch has errors: {errors} ({page})")


def _first_rows(batch: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The batch's first rows; a Selection goes, the labels say the same.

    All rows, where a tensor does not say which of it is of which row, as images do not.
    """
    B = len(batch["input_ids"]) if "input_ids" in batch else 0
    cut = {k: v for k, v in batch.items() if k not in ("selection", "num_items_in_batch")}
    found = {
        k: (v, int(k == "position_ids" and v.dim() == 3))  # (axes of an image, B, T)
        for k, v in cut.items()
        if isinstance(v, Tensor) and v.dim()
    }
    if rows >= B or any(v.shape[axis] not in (1, B) for v, axis in found.values()):
        return cut
    return cut | {k: v.narrow(axis, 0, min(rows, v.shape[axis])) for k, (v, axis) in found.items()}

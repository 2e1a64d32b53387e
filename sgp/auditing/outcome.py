"""What an audit finds out, before anyone shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sgp.auditing.answers import Answer
from sgp.auditing.findings import Finding
from sgp.auditing.view import View

ROLES = {  # role: (style of a terminal, colour of a picture, what it is)
    "context": ("dim", "#9aa5b1", "carries no loss; a later token attends to it"),
    "predictor": ("yellow", "#de8f05", "context that predicts the first output token"),
    "output": ("green", "#0173b2", "carries loss"),
    "ignored": ("magenta", "#cc78bc", "after an output, without loss, predicting nothing"),
    "padding": ("bright_black", "#e5e5e5", "not attended to"),
}


@dataclass(frozen=True)
class Token:
    """One position of one row."""

    row: int
    position: int
    token_id: int
    text: str
    role: str  # one of ROLES
    target_id: int | None  # what it predicts; None where nothing
    target: str | None
    loss: float | None  # of that prediction, in nats
    probability: float | None
    gradient: float  # norm of dL / d logits here


@dataclass(frozen=True, repr=False)
class Outcome:
    """The numbers of an `AuditReport`."""

    tokens: list[list[Token]]
    grad_norm: Tensor  # (layers + 1, B, T); NaN where it could not be measured
    loss: float
    context_share: float | None
    cosine_detached: float | None
    findings: list[Finding]
    model_name: str
    view: View
    answers: tuple[Answer, ...] = ()  # greedy ones, if they were asked for

    @property
    def errors(self) -> list[Finding]:
        """The findings that are errors."""
        return [finding for finding in self.findings if finding.severity == "error"]

    def name_of(self, row: int, labels: Sequence[str] = ()) -> str:
        """What a row is called: "row 0", or its line in a file."""
        return labels[row] if row < len(labels) else f"row {row}"

    @property
    def dead(self) -> Tensor:
        """(layers + 1, B, T) bool: cells whose gradient is exactly zero."""
        return self.grad_norm == 0

"""What an audit says: every token's role, loss and gradient, and what is wrong."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgp.auditing.colors import visible
from sgp.auditing.findings import Finding, grouped
from sgp.auditing.outcome import ROLES, Outcome, Token
from sgp.auditing.page import said, to_html
from sgp.auditing.plot import plot
from sgp.auditing.repair import Repair, repair
from sgp.auditing.survey import STYLES, Survey

if TYPE_CHECKING:  # rich is imported where it prints
    from rich.console import Console
    from rich.table import Table


class AuditReport(Outcome):
    """The outcome of `sgp.audit`, and how to see it."""

    def __repr__(self) -> str:
        codes = ", ".join(sorted({finding.code for finding in self.findings})) or "no findings"
        rows = len(self.tokens)
        return f"AuditReport({self.model_name}, {rows} rows, loss={self.loss:.4f}, {codes})"

    def print(
        self,
        console: Console | None = None,
        *,
        rows: int = 4,
        tokens: int = 64,
        findings: bool = True,
        labels: Sequence[str] = (),
    ) -> None:
        """A table a row of the batch, for the first `rows`, and every finding.

        Of a longer row the `tokens` nearest to a change of role are shown; what is left out, and
        padding, is counted in its place. `dL/dlogits` and `dL/dhidden` are norms, the latter's
        the largest over layers. `labels` name the rows ("line 21"), in place of "row 0".
        """
        from rich.console import Console  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        console = console or Console()
        for number, row in enumerate(self.tokens[:rows]):
            console.print(self._table(self.name_of(number, labels), row, tokens))
        if len(self.tokens) > rows:
            more = len(self.tokens) - rows
            console.print(f"{more} more row{'s' * (more != 1)}")
        console.print(Text("  ".join(f"{role}: {what}" for role, (_, _, what) in ROLES.items())))
        scored = sum(token.target_id is not None for row in self.tokens for token in row)
        positions = sum(token.role != "padding" for row in self.tokens for token in row)
        console.print(f"loss {self.loss:.4f} nats; {scored} of {positions} tokens carry loss")
        if self.context_share is not None:
            console.print(
                f"of the gradient of the linear layers, |g_context| / |g| = "
                f"{self.context_share:.3f} comes through the context; without it the direction "
                f"would have cosine {self.cosine_detached:.3f}"
            )
        for answer in self.answers:
            console.print(Text(said(answer, self.name_of(answer.row, labels))), soft_wrap=True)
        if not findings:
            return
        for group in grouped(self.findings):
            console.print(Text(str(group), style=STYLES[group.severity]), soft_wrap=True)
        if not self.findings:
            console.print(Text("no findings", style="green"))

    def _table(self, title: str, tokens: list[Token], most: int) -> Table:
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        table = Table(title=Text(title), title_justify="left", box=None, padding=(0, 1, 0, 0))
        for name in ("t", "token", "role", "predicts"):
            text = name in ("token", "predicts")  # which are cut where the terminal is narrow
            width = 12 if text else max(len(str(len(tokens))), len(name))
            table.add_column(name, no_wrap=True, min_width=width, max_width=24 if text else None)
        for name in ("loss", "prob.", "dL/dlogits", "dL/dhidden"):
            table.add_column(name, justify="right", no_wrap=True, min_width=max(6, len(name)))
        before = -1
        for token in _near_changes(tokens, most):
            _left_out(table, tokens[before + 1 : token.position])
            before = token.position
            style = ROLES[token.role][0]
            hidden = self.grad_norm[:, token.row, token.position]
            table.add_row(
                str(token.position),
                Text(visible(token.text), style=style),
                Text(token.role, style=style),
                Text(visible(token.target) if token.target is not None else ""),
                f"{token.loss:.3f}" if token.loss is not None else "",
                f"{token.probability:.3f}" if token.probability is not None else "",
                _norm(token.gradient),
                _norm(float(hidden[~hidden.isnan()].max())) if not hidden.isnan().all() else "",
            )
        _left_out(table, tokens[before + 1 :])
        return table

    def plot(self, path: str | Path, *, row: int = 0, label: str = "") -> Path:
        """Draw one row's tokens over a map of its gradient norms as a picture; needs matplotlib."""
        return plot(self, path, row=row, label=label)

    def to_html(
        self,
        path: str | Path,
        *,
        survey: Survey | None = None,
        labels: Sequence[str] = (),
        after: Survey | None = None,
        mended: Sequence[str] = (),
        found: Sequence[Sequence[Finding]] | None = None,
    ) -> Path:
        """Write one self-contained page.

        Args:
            path: of the page.
            survey: the findings of a whole file, in place of the batch's.
            labels: what the rows are called ("line 21").
            after: the findings of the file that was repaired.
            mended: what was changed in it, line by line.
            found: the findings of each row whose tokens are marked; None: the report's.
        """
        return to_html(
            self, path, survey=survey, labels=labels, after=after, mended=mended, found=found
        )

    def repair(self) -> Repair:
        """What can be mended in the batch's labels without a guess."""
        return repair(self.view)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it; not finite numbers as None."""
        return {
            "model": self.model_name,
            "loss": _finite(self.loss),
            "context_share": _finite(self.context_share),
            "cosine_detached": _finite(self.cosine_detached),
            "findings": [asdict(finding) for finding in self.findings],
            "answers": [asdict(answer) for answer in self.answers],
            "tokens": [
                [{k: _finite(v) for k, v in asdict(token).items()} for token in row]
                for row in self.tokens
            ],
            "grad_norm": [
                [[_finite(x) for x in row] for row in layer] for layer in self.grad_norm.tolist()
            ],
        }


def _near_changes(tokens: list[Token], most: int) -> list[Token]:
    """At most so many, those nearest to either side of a change of role or an end; no padding."""
    changes = [t for t in range(1, len(tokens)) if tokens[t].role != tokens[t - 1].role]
    distance = {
        t: min(t - left, right - 1 - t)
        for left, right in itertools.pairwise([0, *changes, len(tokens)])
        for t in range(left, right)
        if tokens[t].role != "padding"
    }
    kept = sorted(distance, key=lambda t: (distance[t], t))[:most]
    return [tokens[t] for t in sorted(kept)]


def _left_out(table: Table, tokens: list[Token]) -> None:
    """Say how many tokens are not shown here."""
    padding = sum(token.role == "padding" for token in tokens)
    for count, what in ((len(tokens) - padding, "tokens"), (padding, "padding")):
        if count:
            table.add_row("", f"... {count} {what if count > 1 else what.removesuffix('s')}")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _norm(x: float) -> str:
    return "0" if x == 0 else f"{x:.1e}"

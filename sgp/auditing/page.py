"""An audit as one page: no script, no network, nothing but HTML and its style."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

from sgp.auditing.outcome import ROLES, Outcome, Token

SEVERITIES = {"error": "#c0392b", "warning": "#b9770e", "note": "#2471a3"}
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 72rem; padding: 0 1rem 8rem;
  color: #1b1f24; background: #fff; }
h1 { font-size: 1.3rem; margin-bottom: 0; } h2 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
.sub { color: #57606a; margin-top: 0; }
ul.findings { list-style: none; padding: 0; }
ul.findings li { border-left: 4px solid var(--c); padding: .2rem .7rem; margin: .3rem 0;
  background: #f6f8fa; }
.findings b { color: var(--c); } .where { color: #57606a; }
.key span { display: inline-block; margin-right: 1.2rem; }
.key i { display: inline-block; width: .9em; height: .9em; margin-right: .3em; border-radius: 2px;
  vertical-align: -.1em; background: var(--c); }
.tokens { line-height: 2.1; font-family: ui-monospace, monospace; font-size: 13px; }
.t { padding: .15em .3em; margin: 0 1px; border-radius: 3px; white-space: pre;
  border-bottom: 3px solid var(--c); cursor: default; }
.t:hover, .t:focus { background: #eaeef2; outline: none; }
.t .tip { display: none; position: fixed; left: 1rem; right: 1rem; bottom: 1rem; z-index: 2;
  max-width: 40rem; margin: 0 auto; padding: .5em .8em; background: #1b1f24; color: #fff;
  border-radius: 4px; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; }
.t:hover .tip, .t:focus .tip { display: block; }
.map { overflow-x: auto; } table { border-collapse: collapse; }
.map th { font-weight: normal; font-size: 11px; color: #57606a; text-align: right;
  padding-right: .5em; white-space: nowrap; position: sticky; left: 0; background: #fff; }
.map td { width: 13px; min-width: 13px; height: 13px; padding: 0; }
.map td.dead { background: radial-gradient(circle, #b0b0b0 1.5px, #fff 2px); }
"""
LOW, HIGH = (24, 40, 90), (250, 220, 80)  # colours of the smallest and the largest gradient


def to_html(report: Outcome, path: str | Path) -> Path:
    """Write the report as one self-contained page.

    Findings first; then, a row of the batch after the other, its tokens in the colour of their
    role (hover over one, or reach it with Tab, for what it predicts, loss, probability and
    gradient) and the map of gradient norms, layer by position.

    Returns:
        The path.
    """
    rows = "".join(_row(report, number) for number in range(len(report.tokens)))
    counts = {s: sum(f.severity == s for f in report.findings) for s in SEVERITIES}
    words = ", ".join(f"{n} {s}{'s' * (n != 1)}" for s, n in counts.items() if n) or "no findings"
    found = Path(path)
    found.write_text(
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>Audit: {escape(report.model_name)}</title><style>{STYLE}</style></head><body>"
        f"<h1>Where the gradient went: {escape(report.model_name)}</h1>"
        f"<p class='sub'>{words}; loss {report.loss:.4f} nats{_parts(report)}</p>"
        f"{_findings(report)}<p class='key'>{_key()}</p>{rows}</body></html>\n",
        encoding="utf-8",
    )
    return found


def _parts(report: Outcome) -> str:
    if report.context_share is None or report.cosine_detached is None:
        return ""
    return (
        f"; of the gradient of the linear layers |g_context| / |g| = {report.context_share:.3f} "
        f"comes through the context, without which its direction would have cosine "
        f"{report.cosine_detached:.3f}"
    )


def _findings(report: Outcome) -> str:
    items = "".join(
        f"<li style='--c:{SEVERITIES[f.severity]}'><b>{f.severity}: {escape(f.code)}</b> "
        f"<span class='where'>{escape(f.where)}</span><br>{escape(f.message)}</li>"
        for f in report.findings
    )
    return f"<ul class='findings'>{items}</ul>" if items else ""


def _key() -> str:
    return "".join(
        f"<span><i style='--c:{color}'></i>{role}: {escape(what)}</span>"
        for role, (_, color, what) in ROLES.items()
    )


def _row(report: Outcome, number: int) -> str:
    tokens = report.tokens[number]
    spans = "".join(_token(token) for token in tokens)
    return (
        f"<h2>row {number}</h2><div class='tokens'>{spans}</div>"
        f"<h2>|dL / d hidden|, row {number}: dark is small, a dot exactly zero</h2>"
        f"<div class='map'><table>{_map(report, number)}</table></div>"
    )


def _token(token: Token) -> str:
    lines = [f"{token.position}: {token.role}, id {token.token_id}"]
    if token.loss is not None and token.probability is not None:
        lines.append(f"predicts {token.target!r} (id {token.target_id})")
        lines.append(f"loss {token.loss:.4f} nats, probability {token.probability:.4f}")
    lines.append(f"|dL / d logits| {token.gradient:.2e}")
    text = token.text.replace("\n", "\\n").replace("\t", "\\t") or "\u2205"
    tip = escape("\n".join(lines))
    return (
        f"<span class='t' tabindex='0' style='--c:{ROLES[token.role][1]}'>{escape(text)}"
        f"<span class='tip'>{tip}</span></span><wbr>"
    )


def _map(report: Outcome, number: int) -> str:
    norms = report.grad_norm[:, number].tolist()
    alive = [math.log10(x) for line in norms for x in line if x > 0 and math.isfinite(x)]
    low, high = (min(alive), max(alive)) if alive else (0.0, 0.0)
    lines = []
    for layer in reversed(range(len(norms))):
        name = "embeddings" if layer == 0 else f"layer {layer}"
        cells = "".join(_cell(x, low, high, t) for t, x in enumerate(norms[layer]))
        lines.append(f"<tr><th>{name}</th>{cells}</tr>")
    return "".join(lines)


def _cell(x: float, low: float, high: float, position: int) -> str:
    if x == 0:
        return f"<td class='dead' title='{position}: 0'></td>"
    if not math.isfinite(x):
        return f"<td style='background:#f0f' title='{position}: not finite, or not measured'></td>"
    share = (math.log10(x) - low) / (high - low) if high > low else 1.0
    color = ",".join(str(round(a + share * (b - a))) for a, b in zip(LOW, HIGH, strict=True))
    return f"<td style='background:rgb({color})' title='{position}: {x:.2e}'></td>"

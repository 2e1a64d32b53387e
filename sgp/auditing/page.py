"""An audit as one page: no script, no network, nothing but HTML and its style.

Each token stands over its own column of the map, so that lines break where the text does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from sgp.auditing.colors import dark_text, step, steps, visible
from sgp.auditing.findings import LEVELS, Finding, grouped
from sgp.auditing.outcome import ROLES, Outcome, Token
from sgp.auditing.survey import Survey, verdict

SEVERITIES = {"error": "#c0392b", "warning": "#b9770e", "note": "#2471a3"}
PADDING = 3  # padding tokens in a row that are shown; more are counted
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 76rem; padding: 0 1rem 8rem;
  color: #1b1f24; background: #fff; }
h1 { font-size: 1.3rem; margin-bottom: 0; }
.sub { color: #57606a; margin-top: 0; overflow-wrap: anywhere; }
ul.findings { list-style: none; padding: 0; }
ul.findings li { border-left: 4px solid var(--c); padding: .2rem .7rem; margin: .3rem 0;
  background: #f6f8fa; overflow-wrap: anywhere; }
.findings b { color: var(--c); } .where { color: #57606a; }
.findings code { display: block; font-size: 13px; white-space: pre-wrap; color: #57606a; }
.mended { border-left: 4px solid #1a7f37; padding: .2rem .7rem; background: #f6f8fa;
  font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.none { border-left: 4px solid #1a7f37; padding: .2rem .7rem; background: #f6f8fa; }
.bar { position: sticky; top: 0; z-index: 1; background: #fff; padding: .4rem 0;
  border-bottom: 1px solid #d0d7de; font-size: 13px; }
.bar p { margin: .2rem 0; } .bar a { margin-right: .8em; color: #0550ae; }
.key span { display: inline-block; margin-right: 1.2rem; }
.key i { display: inline-block; width: .9em; height: .9em; margin-right: .3em; border-radius: 2px;
  vertical-align: -.1em; background: var(--c); }
.scale { display: inline-block; width: 12rem; height: .9em; vertical-align: -.1em; margin: 0 .4em;
  border-radius: 2px; }
.of-loss { display: none; }
#by-loss:checked ~ .bar .of-loss { display: inline; }
#by-loss:checked ~ .bar .of-role { display: none; }
.by { position: absolute; opacity: 0; }
.bar label { padding: .1em .6em; border: 1px solid #d0d7de; border-radius: 1em; cursor: pointer; }
#by-role:checked ~ .bar [for=by-role], #by-loss:checked ~ .bar [for=by-loss] { background: #1b1f24;
  color: #fff; }
#by-role:focus-visible ~ .bar [for=by-role], #by-loss:focus-visible ~ .bar [for=by-loss] {
  outline: 2px solid #0550ae; }
details { scroll-margin-top: 8rem; margin: 1rem 0; }
summary { font-weight: 600; cursor: pointer; }
.tokens { display: flex; flex-wrap: wrap; align-items: flex-end; row-gap: .6rem;
  font-family: ui-monospace, monospace; font-size: 13px; }
.t { display: inline-flex; flex-direction: column; min-width: 14px; margin: 0 1px 0 0;
  cursor: default; }
.t:hover, .t:focus { outline: 2px solid #1b1f24; outline-offset: 1px; }
.w { padding: .1em .25em; white-space: pre; text-align: center; border-bottom: 3px solid var(--c);
  max-width: 20em; overflow: hidden; text-overflow: ellipsis; min-height: 1.4em; }
.f { display: block; height: 6px; min-width: 14px; margin: 0 -1px 2px 0; background: var(--f); }
.m { display: block; height: 7px; min-width: 14px; margin-top: 1px; }
.dead { background: radial-gradient(circle, #8c959f 1.5px, #fff 2px); }
.lost { background: repeating-linear-gradient(45deg, #f0f 0 2px, #fff 2px 4px); }
.more { color: #57606a; padding: 0 .6em; align-self: center; }
.t .tip { display: none; position: fixed; left: 1rem; right: 1rem; bottom: 1rem; z-index: 2;
  max-width: 40rem; margin: 0 auto; padding: .5em .8em; background: #1b1f24; color: #fff;
  border-radius: 4px; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; }
.t:hover .tip, .t:focus .tip { display: block; }
@media (max-width: 50rem) { .bar { position: static; } }
"""


class _Scale(NamedTuple):
    """The ends of the two colour scales: log10 of a gradient norm, and loss in nats."""

    low: float
    high: float
    loss: float


def to_html(
    report: Outcome,
    path: str | Path,
    *,
    survey: Survey | None = None,
    labels: Sequence[str] = (),
    after: Survey | None = None,
    mended: Sequence[str] = (),
    found: Sequence[Sequence[Finding]] | None = None,
) -> Path:
    """Write the report as one self-contained page.

    Findings first; then, a row of the batch after the other, its tokens, each over its column of
    gradient norms, the last layer on top and the embeddings at the bottom. Tokens have the colour
    of their role, or, by a switch, of their loss; hover over one, or reach it with Tab, for what it
    predicts, loss, probability and gradient. Over the tokens that a finding means stands a bar of
    the colour of its severity.

    Args:
        report: of `sgp.audit`.
        path: of the page.
        survey: of the file that the rows are from: its findings stand in place of the batch's.
        labels: what the rows are called ("line 21").
        after: of the file that was repaired, where one was written.
        mended: what was changed in it, line by line.
        found: the findings of each row whose tokens are marked; None: the report's.

    Returns:
        The path.
    """
    scale = _scale(report)
    names = [report.name_of(n, labels) for n in range(len(report.tokens))]
    if found is None:
        found = [[x for x in report.findings if x.row == n] for n in range(len(names))]
    rows = "".join(_row(report, n, name, scale, _marks(found[n])) for n, name in enumerate(names))
    where = f"{survey.name}, {report.model_name}" if survey is not None else report.model_name
    summary = survey.summary() if survey is not None else verdict(report.findings)
    title = f"Audit: {where}"
    page = Path(path)
    page.write_text(
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{_text(title)}</title><style>{STYLE}{_colors()}</style></head><body>"
        f"<h1>Where the gradient went: {_text(where)}</h1>"
        f"<p class='sub'>{_text(summary)}</p>"
        f"{_of_file(survey) if survey is not None else _of_batch(report, labels)}"
        f"{_repaired(after, mended) if after is not None else ''}"
        f"<p class='sub'>loss {report.loss:.4f} nats{_parts(report)}</p>{_answers(report, labels)}"
        "<input class='by' type='radio' name='by' id='by-role' checked>"
        "<input class='by' type='radio' name='by' id='by-loss'>"
        f"<div class='bar'>{_bar(names, scale)}</div><main>{rows}</main></body></html>\n",
        encoding="utf-8",
    )
    return page


def said(answer: Any, name: str) -> str:
    """A greedy answer beside the expected one, in one line; `name` is the row's."""
    if answer.ends:
        end = (
            "and ends, as the labels do" if answer.expected_ends else "and ends; the labels do not"
        )
    else:
        labels = "end" if answer.expected_ends else "do not end either"
        end = f"and does not end within {answer.tokens} tokens; the labels {labels}"
    return f"{name}: the model answers {answer.generated!r} {end}; expected {answer.expected!r}"


# -- findings --------------------------------------------------------------------------------------


def _of_file(survey: Survey) -> str:
    """Every finding with its lines; brackets stand around what carries loss."""

    def samples(entry: Any) -> str:
        lines = (
            f"{survey.unit} {number}{f', {where}' if where else ''}: {text}"
            for number, where, text in entry.samples
            if text
        )
        return "".join(f"<code>{_text(line)}</code>" for line in lines)

    return _list(
        _finding(entry.severity, entry.code, survey.place(entry), entry.message, samples(entry))
        for entry in survey.entries
    )


def _repaired(after: Survey, mended: Sequence[str]) -> str:
    done = f"<pre class='mended'>{_text(chr(10).join(mended))}</pre>" if mended else ""
    summary = f"<p class='sub'>after the repair: {_text(after.summary())}</p>"
    return done + summary + (_of_file(after) if after.entries else "")


def _of_batch(report: Outcome, labels: Sequence[str]) -> str:
    def where(group: Any) -> str:
        if len(group.findings) == 1:
            return str(group.findings[0].where)
        return ", ".join(report.name_of(row, labels) for row in group.rows)

    return _list(
        _finding(group.severity, group.code, where(group), group.message)
        for group in grouped(report.findings)
    )


def _finding(severity: str, code: str, where: str, message: str, more: str = "") -> str:
    return (
        f"<li style='--c:{SEVERITIES[severity]}'><b>{severity}: {_text(code)}</b> "
        f"<span class='where'>{_text(where)}</span><br>{_text(message)}{more}</li>"
    )


def _list(items: Iterator[str]) -> str:
    found = "".join(items)
    return f"<ul class='findings'>{found}</ul>" if found else "<p class='none'>No findings.</p>"


def _parts(report: Outcome) -> str:
    if report.context_share is None or report.cosine_detached is None:
        return ""
    return (
        f"; of the gradient of the linear layers |g_context| / |g| = {report.context_share:.3f} "
        f"comes through the context, without which its direction would have cosine "
        f"{report.cosine_detached:.3f}"
    )


def _answers(report: Outcome, labels: Sequence[str]) -> str:
    lines = (said(answer, report.name_of(answer.row, labels)) for answer in report.answers)
    return "".join(f"<p class='answer'>{_text(line)}</p>" for line in lines)


# -- colours ---------------------------------------------------------------------------------------


def _scale(report: Outcome) -> _Scale:
    norms = report.grad_norm.flatten().tolist()
    alive = [math.log10(x) for x in norms if x > 0 and math.isfinite(x)]
    losses = [x.loss for row in report.tokens for x in row if x.loss is not None]
    largest = max((x for x in losses if math.isfinite(x)), default=0.0)
    return _Scale(min(alive, default=0.0), max(alive, default=0.0), largest)


def _colors() -> str:
    rules = []
    for n, rgb in enumerate(steps()):
        red, green, blue = rgb
        text = "#000" if dark_text(rgb) else "#fff"
        rules.append(f".v{n} {{ background: rgb({red},{green},{blue}); }}")
        rules.append(
            f"#by-loss:checked ~ main .l{n} .w {{ background: rgb({red},{green},{blue}); "
            f"color: {text}; border-color: rgb({red},{green},{blue}); }}"
        )
    rules.append("#by-loss:checked ~ main .t:not([class*=' l']) .w { border-color: #e5e5e5; }")
    stops = ", ".join(f"rgb({r},{g},{b})" for r, g, b in steps())
    rules.append(f".scale {{ background: linear-gradient(to right, {stops}); }}")
    return "\n".join(rules)


def _bar(names: list[str], scale: _Scale) -> str:
    roles = "".join(
        f"<span><i style='--c:{color}'></i>{role}: {_text(what)}</span>"
        for role, (_, color, what) in ROLES.items()
    )
    levels = "".join(
        f"<span><i style='--c:{color}'></i>{level}</span>" for level, color in SEVERITIES.items()
    )
    links = "".join(f"<a href='#row-{n}'>{_text(name)}</a>" for n, name in enumerate(names))
    return (
        f"<p>{links}</p>"
        "<p>colour of the tokens: <label for='by-role'>role</label> "
        "<label for='by-loss'>loss</label></p>"
        f"<p class='key'>a bar over a token: a finding is about it; {levels}</p>"
        f"<p class='key of-role'>{roles}</p>"
        f"<p class='of-loss'>loss of a token, in nats: 0<span class='scale'></span>{scale.loss:.2f}"
        "</p>"
        f"<p>|dL / d hidden|, last layer on top, embeddings at the bottom: {10**scale.low:.0e}"
        f"<span class='scale'></span>{10**scale.high:.0e}; a dot: exactly zero; hatched: not "
        "finite, or not measured</p>"
    )


# -- rows ------------------------------------------------------------------------------------------


def _marks(found: Iterable[Finding]) -> dict[int, list[Finding]]:
    """By token, the findings that mean it, the worst first."""
    marks: dict[int, list[Finding]] = {}
    for finding in sorted(found, key=lambda finding: LEVELS.index(finding.severity)):
        for token in finding.tokens:
            marks.setdefault(token, []).append(finding)
    return marks


def _row(
    report: Outcome, number: int, name: str, scale: _Scale, marks: dict[int, list[Finding]]
) -> str:
    tokens = report.tokens[number]
    norms = report.grad_norm[:, number].T.tolist()
    pieces, run = [], 0
    for token, column in zip(tokens, norms, strict=True):
        of = marks.get(token.position, [])
        empty = token.target_id is None and not any(column) and not of
        plain = token.role == "padding" and empty
        run = run + 1 if plain else 0
        if run <= PADDING:
            own = tokens[token.position - 1] if token.position else None
            pieces.append(_token(token, own, column, scale, of))
        following = token.position + 1
        last = following == len(tokens) or tokens[following].role != "padding"
        if run > PADDING and last:
            pieces.append(f"<span class='more'>... {run - PADDING} more of padding</span>")
    return (
        f"<details open id='row-{number}'><summary>{_text(name)}</summary>"
        f"<div class='tokens'>{''.join(pieces)}</div></details>"
    )


def _token(
    token: Token, before: Token | None, column: list[float], scale: _Scale, found: list[Finding]
) -> str:
    lines = [f"{token.position}: {token.role}, id {token.token_id}"]
    lines += [f"{x.severity}: {x.code}" for x in found]
    own = before.loss if before is not None and token.role in ("output", "padding") else None
    if own is not None:
        lines.append(f"its own loss {own:.4f} nats")
    if token.loss is not None and token.probability is not None:
        lines.append(f"predicts {token.target!r} (id {token.target_id})")
        lines.append(f"loss {token.loss:.4f} nats, probability {token.probability:.4f}")
    lines.append(f"|dL / d logits| {token.gradient:.2e}")
    text = visible(token.text) or "\u2205"
    mark = f"<span class='f' style='--f:{SEVERITIES[found[0].severity]}'></span>" if found else ""
    of_loss = f" l{step(own, 0.0, scale.loss)}" if own is not None else ""
    cells = "".join(_cell(x, layer, scale) for layer, x in reversed(list(enumerate(column))))
    return (
        f"<span class='t{of_loss}' tabindex='0' style='--c:{ROLES[token.role][1]}'>"
        f"{mark}<span class='w'>{_text(text)}</span>{cells}"
        f"<span class='tip'>{_text(chr(10).join(lines))}</span></span>"
    )


def _cell(x: float, layer: int, scale: _Scale) -> str:
    name = f"layer {layer}" if layer else "embeddings"
    if x == 0:
        return f"<span class='m dead' title='{name}: 0'></span>"
    if not math.isfinite(x):
        return f"<span class='m lost' title='{name}: not finite, or not measured'></span>"
    return f"<span class='m v{step(math.log10(x), *scale[:2])}' title='{name}: {x:.2e}'></span>"


def _text(text: str) -> str:
    """Escaped, and of Unicode that a file can hold."""
    return escape(text.encode("utf-8", "replace").decode())

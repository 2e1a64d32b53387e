"""`sgp audit`: what is wrong with the rows of a file, and a closer look at the first of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from sgp.auditing import audit, ends_of, vocabulary_of
from sgp.auditing.findings import LEVELS, OF_THE_GRADIENT, SEVERITY, Finding, check_ignored
from sgp.auditing.report import AuditReport
from sgp.auditing.survey import OF_FILES, Survey, known_codes
from sgp.auditing.turns import learn
from sgp.commands.audit_repair import Mended, check_file
from sgp.commands.audit_rows import (
    FileRow,
    Maker,
    alike_seams,
    batch_of,
    batches,
    carries_loss,
    chunks,
    describe,
    first_with_loss,
    size,
)
from sgp.commands.console import steady
from sgp.data.reading import EXPECTED, Reading, UnreadableError
from sgp.interrupt import Interrupted, StopRequest
from sgp.train.errors import UserError
from sgp.train.model import load, load_tokenizer, tiny_llama
from sgp.train.output import check_folder, require, writing
from sgp.train.threads import at_most

FILES = ("audit.png", "audit.html", "audit.json")
SHOWN = 24  # tokens of a sample in the terminal
LONGEST = 512  # tokens of a row in the backward pass, unless --max-length or its loss needs more
BEYOND = 64  # tokens from the first with loss on, in a longer row
CANDIDATES = 64  # findings whose rows are kept for it
MAY_BE_CUT = (
    "the last token with loss is not an end, and no row is longer: cut off, or never appended"
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def run(arguments: argparse.Namespace) -> int:
    """Audit the file; 1 if there are errors in it, or with --repair, in what is left of it.

    Raises:
        UserError: The file, the tokenizer or the model cannot be used, or what should be written
            cannot be.
        Interrupted: Ctrl-C; says what was written.
    """
    console, errors = steady(), steady(stderr=True)
    require("transformers", "tokenizers", *(["matplotlib"] if arguments.out else []))
    if arguments.out:
        check_folder(arguments.out, files=FILES)
    if arguments.repair:
        check_file(arguments.repair, arguments.data)
    job = _job(arguments)
    mended = Mended(job.maker, job.survey, arguments.repair) if arguments.repair else None
    with mended or nullcontext():
        try:
            # one thread: the tensors are small
            with at_most(1), _bar(errors, job.reading) as advance:
                _survey(job, advance, mended)
            report = _closer_look(job)
            _print(job, report, console)
            if mended:
                mended.print(console)
        except UnreadableError as error:
            raise UserError(str(error)) from error
        except KeyboardInterrupt:
            raise Interrupted("before it wrote anything") from None
        if arguments.out or mended:
            _write(job, report, mended, console)
    return 1 if (mended.after if mended else job.survey).failed else 0


@dataclass
class _Job:
    """What is audited, with what, and what came out of it."""

    arguments: argparse.Namespace
    reading: Reading
    survey: Survey
    maker: Maker
    model: Any  # None until the tiny Llama is made
    ignored: list[str]  # of --ignore, what a batch can have, and patterns of modules
    marked: dict[int, FileRow] = field(default_factory=dict)  # with findings, by their line
    clean: list[FileRow] = field(default_factory=list)
    rows: list[FileRow] = field(default_factory=list)  # of the backward pass
    earliest: tuple[int, FileRow] | None = None  # the first token with loss, and its row
    reach: int = 0  # tokens that it takes to see loss, where no row has any within LONGEST

    @property
    def most(self) -> int:
        """Tokens of a row in the backward pass."""
        window = self.maker.window
        most: int = self.arguments.max_length or (min(LONGEST, window) if window else LONGEST)
        return max(most, self.reach)

    def keep(self, marked: dict[int, FileRow], clean: list[FileRow]) -> None:
        """Rows for the backward pass, as far as it looks at them: with findings, and without."""
        count, most = self.arguments.rows, self.most
        if len(self.marked) < CANDIDATES * count:
            seen = {line: row.beginning(most) for line, row in marked.items() if self._usable(row)}
            self.marked |= seen
        more = islice(filter(self._reaches_loss, clean), count - len(self.clean))
        self.clean += [row.beginning(most) for row in more]
        if not self.clean:
            self._note_earliest((*marked.values(), *clean))

    def _note_earliest(self, rows: Iterable[FileRow]) -> None:
        for row in rows:
            first = first_with_loss(row.columns["labels"])
            if first is not None and (self.earliest is None or first < self.earliest[0]):
                self.earliest = first, row.beginning(first + BEYOND)

    def _reaches_loss(self, row: FileRow) -> bool:
        """Whether the backward pass would see loss in a row."""
        return carries_loss(row.columns["labels"][: self.most])

    def _usable(self, row: FileRow) -> bool:
        """Whether it would see what a row has: loss, or that there is none."""
        return self._reaches_loss(row) or not carries_loss(row.columns["labels"])


def _job(arguments: argparse.Namespace) -> _Job:
    """Everything that can be refused before a line is read."""
    if arguments.generate and not arguments.model:
        raise UserError(f"--generate {arguments.generate} needs --model: whose answers?")
    severity = _severities(arguments)
    codes = known_codes()
    words = list(arguments.ignore or [])
    patterns = [word for word in words if word not in codes]
    if patterns and not arguments.model:
        raise UserError(
            f"--ignore {patterns[0]}: no such finding, and no --model whose modules it could name; "
            f"the findings are {', '.join(codes)}"
        )
    model = tokenizer = None
    if arguments.model:
        model, tokenizer = load(arguments.model, arguments.tokenizer)
    elif arguments.tokenizer:
        tokenizer = load_tokenizer(arguments.tokenizer)
    vocabulary, owner = (vocabulary_of(model), "model") if model is not None else (None, "model")
    if vocabulary is None and tokenizer is not None:
        vocabulary, owner = len(tokenizer), "tokenizer"
    for word in patterns:
        _check_pattern(word, model, arguments.model)
    if tokenizer is not None:
        tokenizer.model_max_length = int(1e30)  # what is too long is told by this command itself
    reading = Reading(arguments.data)
    return _Job(
        arguments,
        reading,
        Survey(reading.name, ignore=words, severity=severity),
        Maker(
            tokenizer,
            vocabulary,
            owner,
            _window(arguments, model),
            {code: level for code, level in severity.items() if code in SEVERITY},
            ends_of(model) if model is not None and tokenizer is not None else (),
            learn(tokenizer),
        ),
        model,
        [word for word in words if word not in OF_FILES],
    )


def _check_pattern(word: str, model: Any, path: str) -> None:
    try:
        check_ignored([word], [name for name, _ in model.named_parameters()])
    except ValueError as error:
        raise UserError(
            f"--ignore {word}: no such finding, and no module of --model {path}; the findings are "
            f"{', '.join(known_codes())}"
        ) from error


def _severities(arguments: argparse.Namespace) -> dict[str, str]:
    found = {code: level for level in LEVELS for code in getattr(arguments, level) or []}
    for code, level in found.items():
        if code not in known_codes():
            raise UserError(
                f"--{level} {code}: no such finding; they are {', '.join(known_codes())}"
            )
    return found


def _window(arguments: argparse.Namespace, model: Any) -> int | None:
    given: int | None = arguments.max_length
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(text, "max_position_embeddings", None)
    if not isinstance(most, int):
        return given
    if given is not None and given > most:
        raise UserError(
            f"--max-length {given} is more than the {most} positions of --model {arguments.model}"
        )
    return given or most


# -- every line ------------------------------------------------------------------------------------


def _survey(job: _Job, advance: Callable[[], None], mended: Mended | None) -> None:
    """Look at the labels of every line; the rows with findings are kept for a closer look."""
    survey, longest = job.survey, _Longest()
    for rows in chunks(job.reading, job.maker, survey):
        longest.see(rows)
        survey.unit = job.reading.unit
        job.keep(*_sorted_out(job, rows, longest))
        if mended:
            mended.add(rows)
        advance()
    survey.unit = job.reading.unit
    if not job.arguments.max_length:  # which says where rows are cut
        for told in (survey, mended.after) if mended else (survey,):
            told.soften("no-eos", longest.unended, "warning", MAY_BE_CUT)
    if not survey.samples:
        raise UserError(_nothing_usable(job))


@dataclass
class _Longest:
    """Of the rows that came as tokens, those of the largest length: they may have been cut."""

    length: int = 0
    unended: set[int] = field(default_factory=set)  # lines whose last token has loss and is no end

    def see(self, rows: list[FileRow]) -> None:
        """Take in some rows."""
        longest = max([self.length, *(size(row) for row in rows if row.given)])
        if longest > self.length:
            self.length, self.unended = longest, set()

    def note(self, row: FileRow, finding: Finding) -> None:
        """Take in a finding of such a row."""
        if finding.code == "no-eos" and row.given and finding.tokens[-1] == self.length - 1:
            self.unended.add(row.line)


def _sorted_out(
    job: _Job, rows: list[FileRow], longest: _Longest
) -> tuple[dict[int, FileRow], list[FileRow]]:
    """Tell the survey what is found; the rows to look at more closely, and those without."""
    found = [pair for group in batches(rows) for pair in job.maker.look(group)]
    found.sort(key=lambda pair: pair[0].line)
    marked = {row.line: row for row in rows if row.noted}
    faulty, of = set(marked), dict[int, list[Finding]]()
    for row, finding in found:
        entry = job.survey.add(finding, row.line, describe(row, finding, job.maker))
        if entry is None:
            continue
        faulty.add(row.line)
        of.setdefault(row.line, []).append(finding)
        if len(entry.lines) <= job.arguments.rows:
            marked[row.line] = row
        longest.note(row, finding)
    for line, row in marked.items():
        marked[line] = row._replace(noted=(*row.noted, *of.get(line, ())))
    return marked, [row for row in rows if row.line not in faulty]


def _nothing_usable(job: _Job) -> str:
    survey, shown = job.survey, job.reading.shown
    reasons = [entry for entry in survey.entries if entry.code in OF_FILES]
    if not reasons:
        return f"{shown}: the file has no samples; expected a line like {EXPECTED}"
    said = [f"{survey.where(entry)}: {_first(entry)}" for entry in reasons]
    return f"{shown}: no usable {survey.unit}; {'; '.join(said)}"


def _first(entry: Any) -> str:
    text = entry.samples[0].text
    return f"{entry.message} ({text})" if text else entry.message


@contextmanager
def _bar(console: Console, reading: Reading) -> Iterator[Callable[[], None]]:
    """A bar on a terminal while a file is read, by its bytes; yields what moves it."""
    columns = (
        TextColumn(f"reading {escape(reading.name)}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    off = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=off) as progress:
        task = progress.add_task("reading", total=None)

        def advance() -> None:
            progress.update(task, total=reading.size, completed=reading.done)

        yield advance


# -- the closer look -------------------------------------------------------------------------------


def _closer_look(job: _Job) -> AuditReport:
    """One backward pass of the rows with findings, or else of the first that carry loss."""
    job.rows = _chosen(job)
    attended = [row.attended for row in job.rows]
    batch = batch_of([row.columns for row in job.rows], attended=attended, pad=job.maker.pad)
    if job.model is None:
        largest = int(max(batch["input_ids"].max(), batch["labels"].max()))
        job.model = tiny_llama(1 + max(1, largest), job.most, seed=0)
    model = job.model.to("cuda") if torch.cuda.is_available() else job.model
    arguments, maker = job.arguments, job.maker
    try:
        report = audit(
            model,
            batch,
            tokenizer=maker.tokenizer,
            ignore=job.ignored,
            severity=maker.severity,
            autocast=DTYPES.get(arguments.autocast),
            max_length=job.most,
            generate=arguments.generate,
        )
    except Exception as error:  # a foreign model raises what it likes
        whose = f"--model {arguments.model}" if arguments.model else "the tiny Llama"
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{whose}: {type(error).__name__}: {reason}") from error
    for finding in report.findings:
        if finding.code in OF_THE_GRADIENT:
            rows = job.rows if finding.row is None else [job.rows[finding.row]]
            for row in rows:
                job.survey.add(finding, row.line, backward=True)
    return report


def _chosen(job: _Job) -> list[FileRow]:
    """A row of each finding, the worst first; then more of them; then any that carry loss.

    Of those without loss, one.
    """
    entries = [entry for entry in job.survey.entries if set(entry.lines) & set(job.marked)]
    firsts = [next(x for x in entry.lines if x in job.marked) for entry in entries]
    others = [line for entry in entries for line in entry.lines if line in job.marked]
    faulty = [job.marked[line] for line in dict.fromkeys(firsts + others)]
    lossless = [row for row in faulty if not carries_loss(row.columns["labels"])][1:]
    usable = [row for row in faulty if row not in lossless] + job.clean
    if not usable and job.earliest:  # all carry loss beyond the backward pass alone
        first, row = job.earliest
        job.reach, usable = first + BEYOND, [row]
    if not usable:
        raise UserError(f"{job.reading.shown}: no {job.survey.unit} carries loss")
    chosen = alike_seams(usable)[: job.arguments.rows]
    return sorted(chosen, key=lambda row: (row.line not in job.marked, row.line))


def _labels(job: _Job) -> list[str]:
    return [f"{job.survey.unit} {row.line}" for row in job.rows]


def _marked(job: _Job, report: AuditReport) -> list[list[Finding]]:
    """The findings of each row of the backward pass: the file's, and of the gradient."""
    found = []
    for number, row in enumerate(job.rows):
        own = [job.survey.settled(finding, row.line) for finding in row.noted]
        of_gradient = [x for x in report.findings if x.row == number and x.code in OF_THE_GRADIENT]
        found.append([x for x in own if x is not None] + of_gradient)
    return found


def _print(job: _Job, report: AuditReport, console: Console) -> None:
    console.print()
    if not job.arguments.model:
        console.print("A tiny Llama with random weights: who receives a gradient, not how much.")
    report.print(console, rows=len(job.rows), tokens=SHOWN, findings=False, labels=_labels(job))
    console.print()
    job.survey.print(console)


def _write(job: _Job, report: AuditReport, mended: Mended | None, console: Console) -> None:
    """Write the files; Ctrl-C waits until they are whole."""
    out, names = job.arguments.out, ""
    failed = (mended.after if mended else job.survey).failed
    content = job.survey.to_dict() | {"exit_code": int(failed)}
    content["lines"] = [row.line for row in job.rows]
    if mended:
        content["repair"] = mended.to_dict()
    with StopRequest(Console(stderr=True).print) as stop:
        stop.protect("writing; one moment")
        if mended:
            mended.write()
            names = f"{mended.path}"
        if out:
            with writing(out):
                out.mkdir(parents=True, exist_ok=True)
                report.plot(out / "audit.png", label=_labels(job)[0])
                after = mended.after if mended else None
                page = out / "audit.html"
                said = mended.said() if mended else ()
                report.to_html(
                    page,
                    survey=job.survey,
                    labels=_labels(job),
                    after=after,
                    mended=said,
                    found=_marked(job, report),
                )
                text = json.dumps(content | {"report": report.to_dict()}, allow_nan=False)
                (out / "audit.json").write_text(text + "\n", encoding="utf-8")
            of_out = ", ".join(sorted(path.name for path in out.glob("audit.*")))
            names = f"{names}, and {of_out} in {out}" if names else f"{of_out} in {out}"
        console.print(f"wrote {names}", soft_wrap=True)
    if stop.requested:
        raise Interrupted(f"after it wrote {names}")

"""`sgp audit`: what is wrong with the rows of a file, and a closer look at the first of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from sgp.auditing import audit, ends_of, vocabulary_of
from sgp.auditing.findings import LEVELS, OF_THE_GRADIENT, SEVERITY
from sgp.auditing.report import AuditReport
from sgp.auditing.survey import OF_FILES, Survey, known_codes
from sgp.auditing.turns import learn
from sgp.commands.audit_repair import Mended, check_file
from sgp.commands.audit_rows import (
    Maker,
    Sample,
    alike_seams,
    batch_of,
    batches,
    chunks,
    describe,
    size,
)
from sgp.commands.console import steady
from sgp.data.reading import EXPECTED, Reading, UnreadableError
from sgp.interrupt import Interrupted, StopRequest
from sgp.labels import IGNORE
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
    mended = None
    try:
        # of small tensors: more threads would wait for each other
        with at_most(1), _bar(errors, job.reading) as advance:
            mended = _survey(job, advance, repair=arguments.repair)
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
    marked: dict[int, Sample] = field(default_factory=dict)  # with findings, by their line
    clean: list[Sample] = field(default_factory=list)
    rows: list[Sample] = field(default_factory=list)  # of the backward pass
    earliest: tuple[int, Sample] | None = None  # the first token with loss, and its row
    reach: int = 0  # tokens that it takes to see loss, where no row has any within LONGEST

    @property
    def most(self) -> int:
        """Tokens of a row in the backward pass."""
        window = self.maker.window
        most: int = self.arguments.max_length or (min(LONGEST, window) if window else LONGEST)
        return max(most, self.reach)

    def keep(self, marked: dict[int, Sample], clean: list[Sample]) -> None:
        """Rows for the backward pass: with findings, and without."""
        rows = self.arguments.rows
        if len(self.marked) < CANDIDATES * rows:
            self.marked |= marked
        self.clean += islice(filter(self.reaches_loss, clean), rows - len(self.clean))
        if not self.clean:
            self._note_earliest((*marked.values(), *clean))

    def _note_earliest(self, samples: Iterable[Sample]) -> None:
        for sample in samples:
            labels = sample.columns["labels"]
            first = next((t for t in range(1, len(labels)) if labels[t] != IGNORE), None)
            if first is not None and (self.earliest is None or first < self.earliest[0]):
                self.earliest = first, sample

    def reaches_loss(self, sample: Sample) -> bool:
        """Whether the backward pass would see loss in a row."""
        return any(x != IGNORE for x in sample.columns["labels"][1 : self.most])


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


def _survey(job: _Job, advance: Callable[[], None], *, repair: Path | None) -> Mended | None:
    """Look at the labels of every line; the rows with findings are kept for a closer look."""
    survey, maker, most = job.survey, job.maker, job.arguments.rows
    mended = Mended(maker, survey, repair) if repair else None
    unended, longest = [], 0  # (length, line) of tokens whose last has loss and is no end
    for samples in chunks(job.reading, maker, survey):
        longest = max([longest, *(size(x) for x in samples if x.given)])
        survey.unit = job.reading.unit
        found = [pair for group in batches(samples) for pair in maker.look(group)]
        found.sort(key=lambda pair: pair[0].line)
        marked = {sample.line: sample for sample in samples if sample.noted}
        faulty = set(marked)
        for sample, finding in found:
            entry = survey.add(finding, sample.line, describe(sample, finding, maker))
            if entry is None:
                continue
            faulty.add(sample.line)
            if len(entry.lines) <= most:
                marked[sample.line] = sample
            if finding.code == "no-eos" and sample.given and finding.tokens[-1] == size(sample) - 1:
                unended.append((size(sample), sample.line))
        job.keep(marked, [sample for sample in samples if sample.line not in faulty])
        if mended:
            for group in batches(samples, ordered=True):
                mended.add(group)
        advance()
    survey.unit = job.reading.unit
    cut = {line for length, line in unended if length == longest}
    for told in (survey, mended.after) if mended else (survey,):
        told.soften("no-eos", cut, "warning", MAY_BE_CUT)
    if not survey.samples:
        raise UserError(_nothing_usable(job))
    return mended


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
    batch = batch_of([row.columns for row in job.rows], most=job.most)
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


def _chosen(job: _Job) -> list[Sample]:
    """A row of each finding, the worst first; then more of them; then any that carry loss."""
    entries = [entry for entry in job.survey.entries if set(entry.lines) & set(job.marked)]
    firsts = [next(x for x in entry.lines if x in job.marked) for entry in entries]
    others = [line for entry in entries for line in entry.lines if line in job.marked]
    faulty = [job.marked[line] for line in dict.fromkeys(firsts + others)]
    none = [x for x in faulty if all(y == IGNORE for y in x.columns["labels"][1:])]
    usable = [x for x in faulty if x in none or job.reaches_loss(x)] + job.clean
    if not usable and job.earliest:  # all carry loss beyond the backward pass alone
        first, sample = job.earliest
        job.reach, usable = first + BEYOND, [sample]
    chosen = alike_seams(usable)[: job.arguments.rows]
    return sorted(chosen, key=lambda sample: (sample in job.clean, sample.line))


def _labels(job: _Job) -> list[str]:
    return [f"{job.survey.unit} {row.line}" for row in job.rows]


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
                report.to_html(page, survey=job.survey, labels=_labels(job), after=after)
                text = json.dumps(content | {"report": report.to_dict()}, allow_nan=False)
                (out / "audit.json").write_text(text + "\n", encoding="utf-8")
            of_out = ", ".join(sorted(path.name for path in out.glob("audit.*")))
            names = f"{names}, and {of_out} in {out}" if names else f"{of_out} in {out}"
        console.print(f"wrote {names}", soft_wrap=True)
    if stop.requested:
        raise Interrupted(f"after it wrote {names}")

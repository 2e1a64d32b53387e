"""`sgp audit`: what is wrong with the rows of a file, and a closer look at the first of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from sgp.auditing import audit, ends_of, look, vocabulary_of
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
)
from sgp.commands.console import Steady
from sgp.data.reading import EXPECTED, Reading, UnreadableError
from sgp.interrupt import Interrupted, StopRequest
from sgp.train.errors import UserError
from sgp.train.model import load, tiny_llama
from sgp.train.output import check_folder, require, writing

FILES = ("audit.png", "audit.html", "audit.json")
SHOWN = 24  # tokens of a sample in the terminal
LONGEST = 512  # tokens of a row in the backward pass, unless --max-length says more
CANDIDATES = 64  # findings whose rows are kept for it
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def run(arguments: argparse.Namespace) -> int:
    """Audit the file; 1 if there are errors in it, or with --repair, in what is left of it.

    Raises:
        UserError: The file, the tokenizer or the model cannot be used, or what should be written
            cannot be.
        Interrupted: Ctrl-C; says what was written.
    """
    console, errors = Steady(), Steady(stderr=True)
    require("transformers", "tokenizers", *(["matplotlib"] if arguments.out else []))
    if arguments.out:
        check_folder(arguments.out, files=FILES)
    if arguments.repair:
        check_file(arguments.repair, arguments.data)
    job = _job(arguments)
    mended = None
    try:
        with _bar(errors, job.reading) as advance:
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
    ends: tuple[int, ...]
    ignored: list[str]  # of --ignore, what a batch can have, and patterns of modules
    severity: dict[str, str]  # of what a batch can have
    chosen: dict[int, Sample] = field(default_factory=dict)  # with findings, by their line
    clean: list[Sample] = field(default_factory=list)
    rows: list[Sample] = field(default_factory=list)  # of the backward pass

    @property
    def options(self) -> dict[str, Any]:
        """For `look` and `audit`."""
        return {"tokenizer": self.maker.tokenizer, "severity": self.severity}

    @property
    def most(self) -> int:
        """Tokens of a row in the backward pass."""
        window = self.maker.window
        return self.arguments.max_length or (min(LONGEST, window) if window else LONGEST)


def _job(arguments: argparse.Namespace) -> _Job:
    """Everything that can be refused before a line is read."""
    if arguments.generate and not arguments.model:
        raise UserError(f"--generate {arguments.generate} needs --model: whose answers?")
    severity = _severities(arguments)
    codes = known_codes()
    words = list(arguments.ignore)
    patterns = [word for word in words if word not in codes]
    if patterns and not arguments.model:
        raise UserError(
            f"--ignore {patterns[0]}: no such finding, and no --model whose modules it could name; "
            f"the findings are {', '.join(codes)}"
        )
    model, tokenizer = load(arguments.model) if arguments.model else (None, None)
    if arguments.tokenizer:
        tokenizer = _tokenizer(arguments.tokenizer)
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
        Maker(tokenizer, vocabulary, owner, _window(arguments, model)),
        model,
        ends_of(model) if model is not None and tokenizer is not None else (),
        [word for word in words if word not in OF_FILES],
        {code: level for code, level in severity.items() if code in SEVERITY},
    )


def _severities(arguments: argparse.Namespace) -> dict[str, str]:
    found = {code: level for level in LEVELS for code in getattr(arguments, level)}
    for code, level in found.items():
        if code not in known_codes():
            raise UserError(
                f"--{level} {code}: no such finding; they are {', '.join(known_codes())}"
            )
    return found


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer  # noqa: PLC0415  (takes seconds)

    try:
        return AutoTokenizer.from_pretrained(str(Path(name).expanduser()))
    except Exception as error:  # every kind of error comes out of a foreign folder
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--tokenizer {name}: {type(error).__name__}: {reason}") from error


def _window(arguments: argparse.Namespace, model: Any) -> int | None:
    given: int | None = arguments.max_length
    config = getattr(model, "config", None)
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


def _survey(job: _Job, advance: Any, *, repair: Path | None) -> Mended | None:
    """Look at the labels of every line; the rows with findings are kept for a closer look."""
    survey, turns = job.survey, learn(job.maker.tokenizer)
    mended = Mended(job.maker, survey, job.options, job.ends) if repair else None
    for samples in chunks(job.reading, job.maker, survey):
        survey.unit = job.reading.unit
        for group in batches(samples, ordered=repair is not None):
            batch = batch_of(group)
            found = look(
                batch,
                eos=job.ends,
                turns=turns,
                max_length=job.maker.window,
                **job.options,
            )
            marked = _told(job, group, found)
            if mended:
                mended.add(batch, group)
            _keep_clean(job, [x for n, x in enumerate(group) if n not in marked])
        advance()
    survey.unit = job.reading.unit
    if not survey.samples:
        raise UserError(_nothing_usable(job))
    return mended


def _told(job: _Job, group: list[Sample], findings: list[Any]) -> set[int]:
    """Tell the survey; the rows that have a finding."""
    marked = set()
    for finding in sorted(findings, key=lambda finding: group[finding.row].line):
        sample = group[finding.row]
        if finding.code == "no-eos" and sample.cut:  # completion-cut says it
            continue
        job.survey.add(finding, sample.line, describe(sample, finding, job.maker))
        if finding.code in job.survey.ignore:
            continue
        marked.add(finding.row)
        if len(job.chosen) < CANDIDATES * job.arguments.rows:
            job.chosen.setdefault(sample.line, sample)
    return marked


def _keep_clean(job: _Job, samples: list[Sample]) -> None:
    if len(job.clean) < job.arguments.rows or job.clean[-1].line > samples[0].line:
        with_loss = [x for x in samples if any(y != -100 for y in x.columns["labels"][: job.most])]
        job.clean = sorted(job.clean + with_loss)[: job.arguments.rows]


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

"""`sgp audit`: what is wrong with the batches of a file, and a closer look at the first of them."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from sgp.auditing import audit, ends_of, look, vocabulary_of
from sgp.auditing.findings import OF_THE_GRADIENT, Finding
from sgp.auditing.report import AuditReport
from sgp.interrupt import Interrupted, StopRequest
from sgp.labels import IGNORE
from sgp.train.errors import UserError
from sgp.train.model import load, tiny_llama
from sgp.train.output import check_folder, writing

COLUMNS = (
    "input_ids", "labels", "attention_mask", "position_ids", "seq_idx",
    "completion_mask", "assistant_masks",
)  # fmt: skip
FILES = ("audit.png", "audit.html", "audit.json")
SHOWN = 24  # tokens of a sample in the terminal


def run(arguments: argparse.Namespace) -> int:
    """Audit the file; 1 if there are errors in it.

    Raises:
        UserError: The file, the tokenizer or the model cannot be used, or `--out` not written to.
        Interrupted: Ctrl-C; says what was written.
    """
    console = Console()
    if arguments.out:
        check_folder(arguments.out, files=FILES)
    try:
        report, codes, samples, failed = _audit(arguments, console)
    except KeyboardInterrupt:
        raise Interrupted("before it wrote anything") from None
    if arguments.out:
        _write(arguments.out, report, codes, samples, console)
    return 1 if failed else 0


def _audit(
    arguments: argparse.Namespace, console: Console
) -> tuple[AuditReport, Counter[str], int, bool]:
    """Print everything; return the report, the findings' codes, the samples, and if any is bad."""
    tokenizer = _tokenizer(arguments)
    numbered = list(_samples(arguments.data, tokenizer))
    if not numbered:
        raise UserError(f"{arguments.data} has no samples")
    numbers, samples = [number for number, _ in numbered], [sample for _, sample in numbered]
    model = _model(arguments, samples)
    _check_vocabulary(arguments.data, numbered, vocabulary_of(model))
    ends = ends_of(model) if tokenizer is not None else ()
    codes: Counter[str] = Counter()
    examples: dict[str, tuple[int, Finding]] = {}
    for number, sample in track(numbered, "labels", console=console, transient=True):
        for finding in look(_batch([sample]), tokenizer=tokenizer, eos=ends):
            codes[finding.code] += 1
            examples.setdefault(finding.code, (number, finding))
    chosen = _with_loss(samples, arguments.max_length)[: arguments.rows]
    lines = [numbers[i] for i in chosen]
    cut = [{k: v[: arguments.max_length] for k, v in samples[i].items()} for i in chosen]
    report = audit(model, _batch(cut), tokenizer=tokenizer)
    console.print()
    if not arguments.model:
        console.print("A tiny Llama with random weights: who receives a gradient, not how much.")
    report.print(console, rows=len(report.tokens), tokens=SHOWN, findings=False)
    if lines != list(range(1, len(lines) + 1)):
        shown = ", ".join(map(str, lines))
        console.print(f"rows 0 to {len(lines) - 1} are lines {shown}: those that carry loss")
    console.print(f"{len(samples)} sample{'s' * (len(samples) != 1)} of {arguments.data}")
    for code, count in codes.most_common():
        line, finding = examples[code]
        place = finding.where.removeprefix("row 0")  # of a batch of one
        console.print(
            f"{finding.severity}: {code}: {count} sample{'s' * (count != 1)}, first in line "
            f"{line}{place}: {finding.message}",
            soft_wrap=True,
            markup=False,
        )
    for finding in report.findings:
        if finding.code in OF_THE_GRADIENT:
            console.print(f"backward pass: {finding}", soft_wrap=True, markup=False)
    found = [finding for _, finding in examples.values()]
    found += [finding for finding in report.findings if finding.code in OF_THE_GRADIENT]
    failed = any(finding.severity == "error" for finding in found)
    return report, codes, len(samples), failed


def _model(arguments: argparse.Namespace, samples: list[dict[str, Any]]) -> Any:
    if arguments.model:
        model, _ = load(arguments.model)
    else:
        ids = (x for sample in samples for x in (*sample["input_ids"], *sample["labels"]))
        model = tiny_llama(1 + max(0, *ids), arguments.max_length, seed=0)
    return model.to("cuda") if torch.cuda.is_available() else model


def _check_vocabulary(
    path: Path, numbered: list[tuple[int, dict[str, Any]]], vocabulary: int | None
) -> None:
    for number, sample in numbered:
        largest = max(*sample["input_ids"], *sample["labels"])
        if vocabulary is not None and largest >= vocabulary:
            raise UserError(
                f"{path}:{number}: token {largest} is outside the model's [0, {vocabulary}); was "
                "the file made with another tokenizer?"
            )


def _with_loss(samples: list[dict[str, Any]], max_length: int) -> list[int]:
    """The samples of which something carries loss within so many tokens; all, if none has."""
    found = [
        number
        for number, sample in enumerate(samples)
        if any(label != -100 for label in sample["labels"][:max_length])
    ]
    return found or list(range(len(samples)))


def _write(
    folder: Path, report: AuditReport, codes: Counter[str], samples: int, console: Console
) -> None:
    """Write the three files; Ctrl-C waits until they are whole."""
    content = {"samples": samples, "findings": dict(codes), "report": report.to_dict()}
    with StopRequest(Console(stderr=True).print) as stop, writing(folder):
        stop.protect("writing; one moment")
        folder.mkdir(parents=True, exist_ok=True)
        report.plot(folder / "audit.png")
        report.to_html(folder / "audit.html")
        (folder / "audit.json").write_text(json.dumps(content) + "\n")
        names = ", ".join(sorted(path.name for path in folder.glob("audit.*")))
        console.print(f"wrote {names} in {folder}")
    if stop.requested:
        raise Interrupted(f"after it wrote {names} in {folder}")


def _tokenizer(arguments: argparse.Namespace) -> Any:
    name = arguments.tokenizer or arguments.model
    if name is None:
        return None
    from transformers import AutoTokenizer  # noqa: PLC0415  (takes seconds)

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # every kind of error comes out of a foreign folder
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"tokenizer {name}: {type(error).__name__}: {reason}") from error


def _samples(path: Path, tokenizer: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number of each line that has a sample, and the sample."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _sample(json.loads(line), tokenizer)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{number}: not valid JSON: {error.msg}, column {error.colno}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}:{number}: {error}") from error


def _sample(sample: Any, tokenizer: Any) -> dict[str, Any]:
    if not isinstance(sample, dict):
        raise TypeError(f"is {str(sample)[:40]!r}; expected an object with input_ids and labels")
    if "input_ids" in sample and "labels" in sample:
        return _columns(sample)
    if "prompt" not in sample or "completion" not in sample:
        raise ValueError(
            f"has {sorted(sample)}; expected input_ids and labels, or prompt and completion"
        )
    if tokenizer is None:
        raise ValueError("prompt and completion need --tokenizer or --model")
    prompt = tokenizer(sample["prompt"])["input_ids"]
    completion = tokenizer(sample["completion"], add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        completion = [*completion, tokenizer.eos_token_id]
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}


def _columns(sample: dict[str, Any]) -> dict[str, list[int]]:
    found = {k: sample[k] for k in COLUMNS if sample.get(k) is not None}
    for name, column in found.items():
        if not isinstance(column, list) or not all(isinstance(x, int) for x in column):
            raise ValueError(f"{name} is {str(column)[:40]!r}; expected a list of whole numbers")
        wrong = [x for x in column if x < 0 and (name != "labels" or x != IGNORE)]
        if wrong:
            what = "-100 or a token" if name == "labels" else "0 or more"
            raise ValueError(f"{name} has {wrong[0]}; expected {what}")
    sizes = {k: len(v) for k, v in found.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"columns of different lengths: {sizes}")
    if not found["input_ids"]:
        raise ValueError("has no tokens")
    return found


def _batch(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Padded on the right, with an attention mask."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    fill = {"labels": -100}
    batch = {}
    for name in COLUMNS:
        if all(name in sample for sample in samples):
            rows = [s[name] + [fill.get(name, 0)] * (longest - len(s[name])) for s in samples]
            batch[name] = torch.tensor(rows)
    batch["lengths"] = torch.tensor([len(sample["input_ids"]) for sample in samples])
    if "attention_mask" not in batch and "position_ids" not in batch:
        # with positions, a model keeps packed rows apart where no mask is given
        batch["attention_mask"] = (torch.arange(longest) < batch["lengths"][:, None]).long()
    return batch

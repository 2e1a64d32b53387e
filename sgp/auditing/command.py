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

from sgp.auditing import audit, look
from sgp.auditing.findings import OF_THE_GRADIENT, Finding
from sgp.auditing.report import AuditReport
from sgp.train.errors import UserError

COLUMNS = (
    "input_ids", "labels", "attention_mask", "position_ids", "seq_idx",
    "completion_mask", "assistant_masks",
)  # fmt: skip
SHOWN = 24  # tokens of a sample in the terminal


def run(arguments: argparse.Namespace) -> int:
    """Audit the file; 1 if there are errors in it."""
    console = Console()
    tokenizer = _tokenizer(arguments)
    samples = list(_samples(arguments.data, tokenizer))
    if not samples:
        raise UserError(f"{arguments.data} has no samples")
    codes: Counter[str] = Counter()
    examples: dict[str, tuple[int, Finding]] = {}
    for number, sample in enumerate(track(samples, "labels", console=console, transient=True)):
        for finding in look(_batch([sample]), tokenizer=tokenizer):
            codes[finding.code] += 1
            examples.setdefault(finding.code, (number + 1, finding))
    lines = _with_loss(samples, arguments.max_length)[: arguments.rows]
    report = _backward(arguments, samples, lines, tokenizer)
    console.print()
    if not arguments.model:
        console.print("A tiny Llama with random weights: who receives a gradient, not how much.")
    report.print(console, rows=len(report.tokens), tokens=SHOWN, findings=False)
    if lines != list(range(len(lines))):
        numbers = ", ".join(str(line + 1) for line in lines)
        console.print(f"rows 0 to {len(lines) - 1} are lines {numbers}: those that carry loss")
    console.print(f"{len(samples)} samples of {arguments.data}")
    for code, count in codes.most_common():
        line, finding = examples[code]
        place = finding.where.removeprefix("row 0")  # of a batch of one
        console.print(
            f"{finding.severity}: {code}: {count} sample{'s' * (count != 1)}, first in line "
            f"{line}{place}: {finding.message}",
            soft_wrap=True,
            markup=False,
        )
    if arguments.out:
        _write(arguments.out, report, codes, len(samples), console)
    for finding in report.findings:
        if finding.code in OF_THE_GRADIENT:
            console.print(f"backward pass: {finding}", soft_wrap=True, markup=False)
    found = [finding for _, finding in examples.values()]
    found += [finding for finding in report.findings if finding.code in OF_THE_GRADIENT]
    return 1 if any(finding.severity == "error" for finding in found) else 0


def _backward(
    arguments: argparse.Namespace, samples: list[dict[str, Any]], lines: list[int], tokenizer: Any
) -> AuditReport:
    from sgp.train.model import load, tiny_llama  # noqa: PLC0415  (transformers takes seconds)

    if arguments.model:
        model, _ = load(arguments.model)
    else:
        ids = (x for sample in samples for x in (*sample["input_ids"], *sample["labels"]))
        vocabulary = 1 + max(ids, default=0)
        model = tiny_llama(vocabulary, arguments.max_length, seed=0)
    if torch.cuda.is_available():
        model = model.to("cuda")
    cut = [{k: v[: arguments.max_length] for k, v in samples[line].items()} for line in lines]
    return audit(model, _batch(cut), tokenizer=tokenizer)


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
    folder.mkdir(parents=True, exist_ok=True)
    content = {"samples": samples, "findings": dict(codes), "report": report.to_dict()}
    report.plot(folder / "audit.png")
    report.to_html(folder / "audit.html")
    (folder / "audit.json").write_text(json.dumps(content) + "\n")
    console.print(f"wrote {', '.join(sorted(p.name for p in folder.glob('audit.*')))} in {folder}")


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


def _samples(path: Path, tokenizer: Any) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            sample = json.loads(line)
            yield _sample(sample, tokenizer)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: {error}") from error


def _sample(sample: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    if "input_ids" in sample and "labels" in sample:
        found = {k: sample[k] for k in COLUMNS if sample.get(k) is not None}
        for name, column in found.items():
            if not isinstance(column, list) or not all(type(x) is int for x in column):
                raise ValueError(
                    f"{name} is {str(column)[:40]!r}; expected a list of whole numbers"
                )
        sizes = {k: len(v) for k, v in found.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"columns of different lengths: {sizes}")
        return found
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


def _batch(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Padded on the right, with an attention mask."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    fill = {"labels": -100}
    batch = {}
    for name in COLUMNS:
        if all(name in sample for sample in samples):
            rows = [s[name] + [fill.get(name, 0)] * (longest - len(s[name])) for s in samples]
            batch[name] = torch.tensor(rows)
    if (
        "attention_mask" not in batch and "position_ids" not in batch
    ):  # packed: no mask across seams
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return batch

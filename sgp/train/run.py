"""`sgp train` from its options to its files."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from sgp.interrupt import Interrupted, StopRequest
from sgp.train import report
from sgp.train.batch import Batch, collate, epochs, grouped
from sgp.train.compare import Comparison, compare
from sgp.train.loop import Curves, Learner, make_learners, train
from sgp.train.model import check_head, save, split_model
from sgp.train.options import Options
from sgp.train.output import check_folder, require, writing
from sgp.train.picture import draw
from sgp.train.prepare import Setup, prepare
from sgp.train.threads import FreeCores, at_most

_HELD_OUT_PAIRS = 64  # of the pairs held out, so many are evaluated
_GPU_STEPS_A_LOOK = 10  # reading a loss waits for the GPU: the progress bar does so this rarely


class _Job(NamedTuple):
    """What is trained, on what, and what is known before."""

    setup: Setup
    device: torch.device
    batches: Iterator[Batch]
    held_out: list[Batch]
    comparison: Comparison
    learners: dict[str, Learner]  # "pytorch", and as "sgp" the loss of `--loss`


class _Result(NamedTuple):
    """What came out; `after` is empty where Ctrl-C prevented it."""

    curves: Curves
    before: dict[str, float]
    after: dict[str, float]
    ended: str  # "complete" or "interrupted"


@dataclass
class _Disk:
    """What stands on disk, in the words for who presses Ctrl-C now."""

    words: str = "before the first step; nothing was saved"


def run(options: Options) -> int:
    """Train, print, save; return 0.

    Tables go to standard output; the progress bar and messages about Ctrl-C to standard error.

    Raises:
        UserError: The data, the model or the output folder cannot be used.
        Interrupted: Ctrl-C ended the run early; says what was saved.

    Example:
        >>> run(Options(data=Path("missing.jsonl")))
        Traceback (most recent call last):
        sgp.train.errors.UserError: --data missing.jsonl: no such file or directory
    """
    disk = _Disk()
    try:
        interrupted = _run(options, disk)
    except KeyboardInterrupt:
        interrupted = True
    if interrupted:
        raise Interrupted(disk.words)
    return 0


def _run(options: Options, disk: _Disk) -> bool:
    """Everything; whether Ctrl-C was pressed since training began."""
    begin, cores = time.perf_counter(), FreeCores()
    console = Console(highlight=False, markup=False, emoji=False)
    errors = Console(highlight=False, markup=False, emoji=False, stderr=True)
    require("transformers", "tokenizers", "matplotlib")
    check_folder(options.out, files=("loss.png", "summary.json"), folders=("model",))
    setup = prepare(options, lambda text: console.print(text, soft_wrap=True))
    usual, free = torch.get_num_threads(), cores.count()
    with at_most(free) as threads:
        if free is not None and threads < usual:
            console.print(
                f"threads: {threads} in place of {usual}: other programs leave about {free:.1f} "
                "cores free, and PyTorch's threads wait for each other",
                soft_wrap=True,
            )
        job = _start(setup, options, console)
        with writing(options.out):
            options.out.mkdir(parents=True, exist_ok=True)
        before = _evaluate(job)
        with StopRequest(errors.print) as stop:
            curves = _train(job, options, stop, errors)
            if not len(curves):
                return True
            stop.protect()
            with writing(options.out):
                save(job.learners["sgp"].parts, setup.tokenizer, options.out / "model")
            saved = f"after {len(curves)} of {options.steps} steps; saved in {options.out}: model/"
            disk.words = f"{saved} alone"
            stop.release()
            try:
                after = _evaluate(job)
            except KeyboardInterrupt:
                after = {}
            stop.protect()
            whole = len(curves) == options.steps and after
            result = _Result(curves, before, after, "complete" if whole else "interrupted")
            with writing(options.out):
                _write(job, options, result, seconds=time.perf_counter() - begin)
            disk.words = f"{saved}, loss.png, summary.json"
            stop.protect(None)
            _print(job, options, result, console, seconds=time.perf_counter() - begin)
    return stop.requested


def _start(setup: Setup, options: Options, console: Console) -> _Job:
    """Prepare everything up to the first step, and show the comparison of the heads."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = setup.model.to(device).eval()
    size, pad = options.batch_size, setup.tokenizer.pad_token_id or 0
    batches = (
        batch.to(device)
        for batch in epochs(setup.train, batch_size=size, seed=options.seed, pad=pad)
    )
    first = next(batches)
    parts = split_model(model)
    check_head(parts, first)
    console.print(
        f"model: {type(model).__name__}, {model.num_parameters():,} parameters, on "
        f"{report.device_name(device)}"
    )
    comparison = compare(parts, first)
    console.print(report.comparison_heading(comparison))
    console.print(report.comparison_table(comparison))
    held_out = [
        collate(group, pad=pad).to(device)
        for group in grouped(setup.held_out[:_HELD_OUT_PAIRS], max(size, 8))
    ]
    learners = make_learners(
        model, lr=options.learning_rate, steps=options.steps, loss=options.loss
    )
    return _Job(setup, device, chain([first], batches), held_out, comparison, learners)


def _train(job: _Job, options: Options, stop: StopRequest, errors: Console) -> Curves:
    """Train under a progress bar that shows both losses."""
    every = _GPU_STEPS_A_LOOK if job.device.type == "cuda" else 1
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=errors) as progress:
        task = progress.add_task("training", total=options.steps, losses="")

        def on_step(number: int, of_pytorch: Tensor, of_sgp: Tensor) -> None:
            if number % every == 0 or number == options.steps:
                text = f"PyTorch {float(of_pytorch):.4f}, {options.loss} {float(of_sgp):.4f}"
                progress.update(task, losses=text)
            progress.update(task, completed=number)

        return train(job.learners, job.batches, steps=options.steps, stop=stop, on_step=on_step)


def _evaluate(job: _Job) -> dict[str, float]:
    return {name: learner.evaluate(job.held_out) for name, learner in job.learners.items()}


def _write(job: _Job, options: Options, result: _Result, *, seconds: float) -> None:
    """Write the picture and the summary."""
    curves = result.curves
    draw(
        curves,
        options.out / "loss.png",
        title=(
            f"{type(job.setup.model).__name__} on "
            f"{options.data.name if options.data else 'the standard library'}: "
            f"{len(curves)} of {options.steps} steps, {report.device_name(job.device)}"
        ),
        before=result.before["sgp"],
        after=result.after.get("sgp"),
        loss=options.loss,
    )
    arguments = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in asdict(options).items()
    }
    content: dict[str, Any] = {
        "ended": result.ended,
        "steps": len(curves),
        "seconds": seconds,
        "held_out": {
            "pairs": min(len(job.setup.held_out), _HELD_OUT_PAIRS),
            "before": result.before,
            "after": result.after or None,
        },
        "head": report.comparison_summary(job.comparison),
        "data": job.setup.counts,
        "parameters": job.setup.model.num_parameters(),
        "arguments": arguments | {"lr": options.learning_rate},
        "environment": report.environment(job.device),
        "losses": report.curves_summary(curves),
    }
    report.write_summary(options.out / "summary.json", content)


def _print(
    job: _Job, options: Options, result: _Result, console: Console, *, seconds: float
) -> None:
    """Print how the training went and where its files are."""
    curves = result.curves
    if result.ended == "interrupted":
        console.print(f"interrupted after {len(curves)} of {options.steps} steps")
    bad = curves.first_not_finite
    if bad is not None:
        console.print(
            f"the loss of step {bad} is not finite; try a smaller --lr than "
            f"{options.learning_rate:g}"
        )
    all_held_out = len(job.setup.held_out)
    console.print(
        f"\nheld-out loss in nats per output token, on {min(all_held_out, _HELD_OUT_PAIRS)} of "
        f"{all_held_out} held-out pairs"
    )
    console.print(report.held_out_table(result.before, result.after, options.loss))
    console.print(
        f"largest difference of the two training losses: {max(curves.differences):.1e} nats "
        f"in {len(curves)} steps"
    )
    console.print(
        f"saved in {options.out}: model/, loss.png, summary.json ({seconds:.0f} s)", soft_wrap=True
    )

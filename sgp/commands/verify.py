"""`sgp verify`: every kernel against the reference on this machine, beside plain PyTorch."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sgp.commands.verify_cases import (
    DTYPES,
    PATHS,
    VOCABULARIES,
    Case,
    Outcome,
    attempt,
    cases,
    is_interpreted,
)
from sgp.interrupt import Interrupted
from sgp.rows import backend


def run(*, quick: bool = False, output: pathlib.Path | None = None) -> int:
    """Check, print the table, write it as JSON if asked; 0 if every case passed, else 1.

    A line is printed after each group of cases, and each case is in the file before the next
    begins. On a CPU the kernels run in Triton's interpreter (this sets TRITON_INTERPRET=1, so call
    it before anything imports the kernels); on a GPU they are compiled.

    Raises:
        Interrupted: Ctrl-C; says how far it came and what was written.
    """
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    elif os.environ.get("TRITON_INTERPRET", "0") == "1":
        device = torch.device("cpu")  # asked for: the interpreter, not the GPU
    if not backend.has_triton():
        console.print("sgp verify: Triton is not installed; there is no kernel to verify")
        return 2
    try:
        results = None if output is None else _Results(output, device)
    except OSError as error:
        folder = output.absolute().parent if output is not None else None
        why = error.strerror if folder and folder.is_dir() else f"{folder} is no folder"
        console.print(f"sgp verify: --output {output}: {why}", soft_wrap=True)
        return 2
    todo, outcomes = list(cases(quick=quick)), list[Outcome]()
    before = os.environ.get("SGP_BACKEND")
    os.environ["SGP_BACKEND"] = "triton"  # an error where the kernels cannot run, never a fallback
    try:
        choice, why = backend.explain(device, torch.float32)
        if choice == "error":
            console.print(f"sgp verify: the kernels cannot run: {why}", soft_wrap=True)
            return 2
        console.print(f"sgp verify: {len(todo)} cases; {machine(device)}", soft_wrap=True)
        _check_all(todo, outcomes, device, console, results)
        return _conclude(todo, outcomes, device, console)
    except KeyboardInterrupt:
        failed = sum(not outcome.passed for outcome in outcomes)
        where = "nothing was written (--output FILE.json keeps the results)"
        raise Interrupted(
            f"after {len(outcomes)} of {len(todo)} cases, {failed} of which failed; "
            f"{where if output is None else f'their results are in {output}'}"
        ) from None
    finally:
        if before is None:
            del os.environ["SGP_BACKEND"]
        else:
            os.environ["SGP_BACKEND"] = before


def _conclude(
    todo: list[Case], outcomes: list[Outcome], device: torch.device, console: Console
) -> int:
    """The tables and what failed; 1 if anything did."""
    for table in _tables(outcomes, device):
        console.print(table)
    failed = [outcome for outcome in outcomes if not outcome.passed]
    verdict = f"[red]{len(failed)} FAILED" if failed else "[green]all passed"
    console.print(f"{len(outcomes)} cases, {verdict}")
    for outcome in failed:
        _print_failure(outcome, console)
    if len(outcomes) < len(todo):
        rest = len(todo) - len(outcomes)
        console.print(f"[red]{rest} cases were not run: after this failure the GPU answers nothing")
    return 1 if failed else 0


def _check_all(
    todo: list[Case],
    outcomes: list[Outcome],
    device: torch.device,
    console: Console,
    results: _Results | None,
) -> None:
    """Every case; only those before it where one leaves a GPU that answers nothing any more."""
    # Where nobody watches a bar, rich would leave an empty line in its place.
    progress = Progress(console=console, transient=True, disable=not console.is_terminal)
    with warnings.catch_warnings(), progress:
        # NumPy inside the interpreter says aloud what a GPU does silently in masked lanes.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
        bar = progress.add_task("kernels against the reference", total=len(todo))
        for _, group in itertools.groupby(todo, lambda case: (case.V, case.dtype)):
            first, broken = len(outcomes), False
            for case in group:
                outcome = attempt(case, device)
                outcomes.append(outcome)
                if results is not None:
                    results.add(outcome)
                progress.advance(bar)
                if not outcome.passed:
                    _print_failure(outcome, console)
                if broken := bool(outcome.raised) and not answers(device):
                    break
            console.print(_summary(outcomes[first:]), highlight=False, soft_wrap=True)
            if broken:
                break


def _summary(outcomes: list[Outcome]) -> str:
    """A group of cases of one vocabulary and dtype, in a line."""
    _, dtype, V, *_ = outcomes[0].case
    loss, _, gradient, _ = (_largest(errors) for errors in _errors(outcomes))
    failed = sum(not outcome.passed for outcome in outcomes)
    verdict = f"[red]{failed} FAILED" if failed else "[green]ok"
    return (
        f"V = {_grouped(V)}, {_name(dtype)}: {len(outcomes)} cases, errors up to {loss} (loss), "
        f"{gradient} (gradient): {verdict}"
    )


def _print_failure(outcome: Outcome, console: Console) -> None:
    """A case that failed, and how."""
    case = outcome.case
    options = "" if case.options == "plain" else ", all options"
    how = outcome.raised or (
        f"loss {outcome.loss:.1e} (bound {outcome.loss_bound:.1e}), gradient "
        f"{outcome.gradient:.1e} (PyTorch {outcome.plain_gradient:.1e})"
    )
    text = (
        f"failed: {case.path}, V = {_grouped(case.V)}, {_name(case.dtype)}, "
        f"{case.kept:.0%} of the rows kept{options}: {how}"
    )
    console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)


def answers(device: torch.device) -> bool:
    """Whether the device still works: an illegal access ends everything in its process."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except Exception:  # noqa: BLE001  (the error of an earlier launch)
        return False
    return True


def machine(device: torch.device) -> str:
    """Where the kernels ran, in words."""
    if is_interpreted():
        return "Triton's interpreter on a CPU"
    return f"compiled, {torch.cuda.get_device_name(device)}"


def _tables(outcomes: list[Outcome], device: torch.device) -> Iterator[Table]:
    """One table for each way of calling: the largest errors of each dtype and vocabulary."""
    for path in PATHS:
        table = Table(
            title=f"{path} ({machine(device)})",
            caption="Worst of the cases: relative error of a row against float64;\n"
            "PyTorch: its operators in the same dtype, inf where they overflow.\n"
            "ok: no worse than these, within sgp/tolerance.py.",
        )
        for column in ("dtype", "V", "loss", "PyTorch", "gradient", "PyTorch", ""):
            table.add_column(column, justify="left" if column == "dtype" else "right", no_wrap=True)
        for dtype, V in itertools.product(DTYPES, VOCABULARIES):
            group = [o for o in outcomes if o.case[:3] == (path, dtype, V)]
            if group:
                good = all(outcome.passed for outcome in group)
                table.add_row(
                    _name(dtype),
                    _grouped(V),
                    *(_largest(errors) for errors in _errors(group)),
                    "[green]ok" if good else "[red]FAILED",
                )
        yield table


def _errors(outcomes: list[Outcome]) -> Iterator[tuple[float, ...]]:
    """Of each kind of error, those of all the outcomes."""
    return zip(*(outcome[1:5] for outcome in outcomes), strict=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _grouped(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _largest(errors: Iterable[float]) -> str:
    """NaN, which `max` alone may lose, where there is one."""
    return f"{max(errors, key=lambda x: (x != x, x)):.1e}"  # noqa: PLR0124


class _Results:
    """The file of `--output`: whole, valid JSON after every case."""

    _END = b"\n]}\n"

    def __init__(self, path: pathlib.Path, device: torch.device) -> None:
        self._path, self._between = path, b"\n"
        today = dt.datetime.now(dt.timezone.utc).date().isoformat()
        names = ("sgp-kernels", "torch", "triton")
        versions = {name: _version(name) for name in names}
        head = {"machine": machine(device), "date": today, "versions": versions}
        path.write_bytes(json.dumps(head)[:-1].encode() + b', "cases": [' + self._END)

    def add(self, outcome: Outcome) -> None:
        row = as_record(outcome)
        with self._path.open("r+b") as file:
            file.seek(-len(self._END), os.SEEK_END)
            file.write(self._between + json.dumps(row).encode() + self._END)
        self._between = b",\n"


def as_record(outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON has it, which knows no NaN and no infinity: these are null."""
    case = outcome.case._asdict() | {"dtype": _name(outcome.case.dtype)}
    row = case | {name: value for name, value in outcome._asdict().items() if name != "case"}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def _version(name: str) -> str | None:
    """None where it is not installed, as this package in a checkout that is only imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

"""Every rival on every case, in one run: right first, then time, memory and ratios.

    python -m bench compare                     # the cases for this machine, results file, tables
    python -m bench compare --time-budget 480   # stop beginning cases after so many seconds
    python -m bench compare --continue          # the cases that today's file does not have yet
    python -m bench compare --only linear       # some cases, or some --rivals: tables alone, unless
                                                # --output names a file

Ctrl-C keeps the cases that are done; --continue goes on. Ratios are to the best rival that is not
sgp, and to a bound measured on the same machine in the same run: for logits a copy's speed at the
bytes that must move, for a head its bare matmuls. What is not installed, needs a GPU, is wrong or
fails is shown as that. Cases that the budget leaves no time for are listed. Without a GPU the list
is shorter, and sgp runs PyTorch's operators, not its kernels: their traffic is counted by
`python -m bench traffic`.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import files, tables
from bench.against import cases, machine, measure, rivals
from bench.against.cases import Case
from bench.against.measure import Measured

RESULTS = files.RESULTS
MIB = 1 << 20
MOST_SECONDS = 3.0  # of turns, for one case


def record(case: Case, bound: float, measured: list[Measured]) -> dict[str, Any]:
    """One case for the results file."""
    plain = case._asdict() | {"model": case.model._asdict(), "name": case.name, "M": case.M}
    plain |= {"commit": machine.commit(), "load": os.getloadavg()[0]}  # of all processes, 1 min
    return plain | {"bound_ms": bound, "rivals": [m._asdict() for m in measured]}


def best_other(measured: list[Measured]) -> float | None:
    """Milliseconds of the fastest that is not sgp."""
    times = [m.both_ms for m in measured if m.both_ms and not m.rival.startswith("sgp")]
    return min(times, default=None)


def table_of(case: Case, bound: float, measured: list[Measured]) -> Table:
    """The outcome of one case, the fastest first; beneath it who has no times, and why."""
    timed = sorted((m for m in measured if m.both_ms), key=lambda m: m.both_ms or 0.0)
    others: dict[str, list[str]] = {}
    for m in measured:
        if not m.both_ms:
            others.setdefault(m.status, []).append(m.rival)
    what = "the bare matmuls of the kept rows" if case.has_head else "its bytes at a copy's speed"
    notes = [f"bound: {tables.ms(bound)} ms, {what}"]
    notes += [f"{', '.join(names)}: {status}" for status, names in others.items()]
    headings = ("forward\nms", "backward\nms", "both ms", "to best\nrival", "to\nbound")
    table = tables.make(
        case.name, ["rival"], [*headings, "memory\nMiB", "error"], notes="\n".join(notes)
    )
    best = best_other(measured)
    for m in timed:
        table.add_row(
            m.rival,
            tables.ms(m.forward_ms or 0.0),
            tables.ms(m.backward_ms or 0.0),
            f"{tables.ms(m.both_ms or 0.0)} ± {tables.ms(m.spread_ms or 0.0)}",
            f"{m.both_ms / best:.2f}" if best and m.both_ms else "",
            f"{m.both_ms / bound:.2f}" if m.both_ms else "",
            f"{(m.memory_bytes or 0) / MIB:.1f}",
            f"{m.gradient_error:.0e}",
        )
    return table


def header(device: torch.device) -> dict[str, Any]:
    """Machine, versions and commit."""
    return {
        "machine": machine.describe(device)._asdict(),
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "sgp": machine.settings(device),
        "versions": machine.versions(),
        "roofs": machine.roofs(device)._asdict(),
    }


def write(
    path: Path | None, head: dict[str, Any], records: list[dict[str, Any]], not_run: list[str]
) -> None:
    """The results file, one case a line, complete at any time; none without a path."""
    if path is None:
        return
    lines = ",\n".join(json.dumps(record) for record in records)
    start = json.dumps(head | {"not_run": not_run})[:-1]
    files.replace(path, f'{start}, "cases": [\n{lines}\n]}}\n')


def _recorded(path: Path, head: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases of a file that was made on this machine with these versions; [] if there is none.

    Raises:
        SystemExit: if it was made otherwise.
    """
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    for key in ("machine", "versions", "sgp"):
        if found[key] != head[key]:
            sys.exit(f"{path.name}: {key} was {found[key]}, is {head[key]}; not continued")
    return list(found["cases"])


def main() -> int:
    """Measure, print, write; 1 if sgp is wrong or fails anywhere, 130 if interrupted."""
    parser = _parser()
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    every = cases.gpu_cases() if device.type == "cuda" else cases.cpu_cases()
    chosen = [case for case in every if arguments.only in case.name]
    if not chosen:
        parser.error(f"--only {arguments.only!r}: no case has this in its name; see --list")
    if arguments.list:
        print("\n".join(case.name for case in chosen))
        return 0
    names = list(dict.fromkeys(rival.name for rival in rivals.RIVALS))
    for name in arguments.rivals or ():
        if name not in names:
            parser.error(f"--rivals {name!r}: nobody has this name; known are {names}")
    if arguments.rivals and arguments.go_on:
        parser.error("--continue adds to a file of every rival; without --rivals")
    output = arguments.output
    if output is None and (arguments.go_on or not (arguments.only or arguments.rivals)):
        today = dt.datetime.now(dt.timezone.utc).date().isoformat()
        output = RESULTS / f"{machine.describe(device).slug}-{today}.json"
    if output is not None:
        files.must_be_writable(output)
    head = header(device)
    records = _recorded(output, head) if arguments.go_on else []
    known = {record["name"] for record in records}
    Console().print(_on(head), soft_wrap=True, highlight=False)
    finished = _run(
        [case for case in chosen if case.name not in known],
        device,
        budget=arguments.time_budget,
        only=arguments.rivals,
        keep=lambda not_run: write(output, head, records, not_run),
        records=records,
    )
    if output is not None and (finished or records):
        print(f"wrote {output}")
    if not finished:
        print("interrupted; --continue keeps the cases that are done" if output else "interrupted")
        return 130
    outcomes = [m for r in records for m in r["rivals"] if m["rival"].startswith("sgp")]
    return 1 if any(m["status"] != "ok" for m in outcomes) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--time-budget",
        type=float,
        default=480.0,
        metavar="SECONDS",
        help="begin no case after so long; the one that runs is finished (480)",
    )
    parser.add_argument("--continue", dest="go_on", action="store_true", help="see above")
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="cases whose name, as --list has it, contains this text",
    )
    parser.add_argument("--rivals", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument("--list", action="store_true", help="name the cases, run none")
    parser.add_argument("--output", type=Path, help="results file (default: bench/results/)")
    return parser


def _on(head: dict[str, Any]) -> str:
    """What runs where, for those who see the tables alone."""
    found, versions = head["machine"], head["versions"]
    where = f"{found['name']} ({found['cpu']})" if found["device"] == "cpu" else found["name"]
    what = {"torch": "PyTorch's operators", "triton": "its kernels"}[head["sgp"]["backend"]]
    return f"{where}, torch {versions['torch']}, Triton {versions['triton']}; sgp runs {what}"


def _run(
    chosen: list[Case],
    device: torch.device,
    *,
    budget: float,
    only: list[str] | None,
    keep: Callable[[list[str]], None],
    records: list[dict[str, Any]],
) -> bool:
    """Add to the records, a case at a time; False if it was interrupted.

    After each case `keep` gets the names of those that have no record yet.
    """
    console = Console()
    unfit: list[str] = []
    waiting = [case.name for case in chosen]
    start = time.perf_counter()
    for case in chosen:
        spent = time.perf_counter() - start
        if spent > budget:
            break
        seconds = min((budget - spent) / len(waiting) / 2, MOST_SECONDS)
        try:
            bound, measured = measure.measure(case, device, seconds=seconds, only=only)
        except torch.OutOfMemoryError:  # of the case itself: nobody could run it
            unfit.append(f"{case.name} (does not fit this machine)")
        except KeyboardInterrupt:
            return False
        else:
            records.append(record(case, bound, measured))
            console.print(table_of(case, bound, measured))
        waiting.remove(case.name)
        keep(unfit + waiting)
    keep(unfit + waiting)
    for name in unfit:
        console.print(f"not run: {name}", soft_wrap=True)
    for name in waiting:
        console.print(f"not run, the time budget was spent: {name}", soft_wrap=True)
    return True


if __name__ == "__main__":
    sys.exit(main())

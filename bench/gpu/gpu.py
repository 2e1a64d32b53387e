"""A GPU's eight minutes: right first, then time, beside others, phase by phase.

    python -m bench gpu                       # every phase, a results file, the tables
    python -m bench gpu --only rows sweep     # some phases
    python -m bench gpu --resume FILE.jsonl   # the phases that did not end well in that file
    python -m bench gpu --dry-run             # all of it, tiny, on a CPU: no time means anything
    python -m bench gpu --build DIR           # no GPU: compile clusters for a machine whose
    python -m bench gpu --cubins DIR          # Triton is older than 3.8; there: sweep them too

Each phase is a process of its own with a time limit; every record is in the file before the next
is begun. A phase that crashes, or is ended at its limit, is recorded as that, and the next goes on.
What is NaN, was not written, or is less right than PyTorch in the same dtype, against float64, is
shown as NOT RIGHT and is never timed. Exit code 1 if anything was not right, or a phase did not end
well. `sweep` ends with lines for kernels/table.py.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from bench import files
from bench.against import machine
from bench.gpu import lines
from bench.gpu import phases as gpu_phases
from bench.gpu import tables as gpu_tables
from bench.gpu.order import PHASES
from sgp.kernels import launch

ROOT = files.ROOT
RESULTS = files.RESULTS
PATIENCE = 5.0  # seconds between asking a process to end and ending it
END = "the phase"  # the name of its last record


def header(*, dry: bool) -> dict[str, Any]:
    """What ran, for the first line of a file."""
    device = torch.device("cpu" if dry else "cuda")
    return {
        "machine": machine.describe(device)._asdict(),
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "commit": machine.commit(),
        "versions": machine.versions(),
        "sgp": machine.settings(device),
        "dry_run": dry,
    }


def continued(path: Path, head: dict[str, Any]) -> list[str]:
    """The phases that ended well in a file of the same machine, versions and commit.

    Raises:
        SystemExit: if the file is no such file.
    """
    try:
        found, records = gpu_tables.load(path)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"--resume {path}: {error!r}; it takes a file that `python -m bench gpu` wrote")
    for key in ("machine", "versions", "sgp", "commit", "dry_run"):
        if found[key] != head[key]:
            sys.exit(f"--resume {path}: {key} was {found[key]}, is {head[key]}; begin a new file")
    return [r["phase"] for r in records if r["name"] == END and r["ok"]]


def forget(path: Path, phase: str) -> None:
    """Take the records of an earlier attempt out of the file, and a line that was cut off."""
    whole = gpu_tables.whole_lines(path)
    kept = [line for line in whole if json.loads(line).get("phase") != phase]
    files.replace(path, "".join(f"{line}\n" for line in kept))


def command(name: str, path: Path, *, dry: bool, seconds: float, cubins: Path | None) -> list[str]:
    """What the process of a phase is started with."""
    words = [sys.executable, "-m", "bench", "gpu", "--phase", name, "--output", str(path)]
    words += ["--seconds", str(seconds), "--began", str(time.time())]
    words += ["--dry-run"] if dry else []
    return words + (["--cubins", str(cubins)] if cubins else [])


def run(name: str, path: Path, *, dry: bool, seconds: float, cubins: Path | None) -> None:
    """One phase in a process of its own; its end is recorded, whatever it is."""
    outside = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [outside])]),
    }
    if dry:
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment.setdefault("OMP_NUM_THREADS", "1")  # nothing there is large enough for more
        for variable in ("TRITON_INTERPRET", "SGP_BACKEND"):
            environment.pop(variable, None)
        if PHASES[name].interpreted:
            environment["TRITON_INTERPRET"] = "1"
    start = time.monotonic()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command(name, path, dry=dry, seconds=seconds, cubins=cubins),
            env=environment,
            stderr=errors,
            start_new_session=True,
        )
        status = "ok"
        try:
            if code := process.wait(timeout=seconds):
                status = f"exit code {code}"
                if code < 0:
                    status = f"ended by {signal.Signals(-code).name}"
        except subprocess.TimeoutExpired:
            status = f"ended at its limit of {seconds:g} s"
        finally:
            end(process)
        errors.seek(0)
        tail = errors.read().decode(errors="replace").strip()
    spent = round(time.monotonic() - start, 1)
    found = {"phase": name, "name": END, "ok": status == "ok", "status": status, "seconds": spent}
    if status != "ok":
        print(tail[-2_000:], file=sys.stderr)
        found["errors"] = tail.splitlines()[-1][:300] if tail else ""
    gpu_phases.append(path, found)


def end(process: subprocess.Popen[bytes]) -> None:
    """The process and what it started: asked first, then not asked."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        try:
            process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            continue
        return


def child(arguments: argparse.Namespace) -> int:
    """What the process of a phase does."""
    name, path = arguments.phase, arguments.output
    phase = gpu_phases.Phase(
        name,
        path,
        seconds=arguments.seconds,
        dry=arguments.dry_run,
        cubins=arguments.cubins,
        began=arguments.began,
    )
    PHASES[name].run(phase)
    return 0


def main() -> int:
    """Run the phases, show the tables; 1 if anything was not right."""
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.phase:
        return child(arguments)
    _refuse(parser, arguments)
    if arguments.build:
        return lines.build(arguments.build, arguments.target)
    dry = arguments.dry_run
    head = header(dry=dry)
    path = arguments.resume or arguments.output
    if path is None:
        slug = "dry-run" if dry else machine.describe(torch.device("cuda")).slug
        words = ("gpu", slug, *head["commit"].split(), head["date"])
        path = (Path.cwd() if dry else RESULTS) / f"{'-'.join(words)}.jsonl"
    done = continued(path, head) if arguments.resume else []
    files.must_be_writable(path)
    if not arguments.resume:
        files.replace(path, json.dumps(head) + "\n")
    interrupted = False
    for name in PHASES:
        if name in done or name not in (arguments.only or PHASES):
            continue
        print(f"\n== {name}: {PHASES[name].what}", flush=True)
        forget(path, name)
        seconds = arguments.seconds or PHASES[name].seconds
        try:
            run(name, path, dry=dry, seconds=seconds, cubins=arguments.cubins)
        except KeyboardInterrupt:
            interrupted = True
            break
    code = show(path)
    if interrupted:
        print(f"interrupted; --resume {path} goes on")
    return 130 if interrupted else code


def show(path: Path) -> int:
    """The tables of a file, lines for the launch table, and what was not right: 1 if anything."""
    head, records = gpu_tables.load(path)
    console = Console()
    for table in gpu_tables.tables_of(records):
        console.print(gpu_tables.for_terminal(table))
    for line in gpu_tables.fastest(head, records):
        console.print(line, soft_wrap=True, highlight=False)
    wrong = [r for r in records if r["ok"] is False]
    for r in wrong:
        console.print(f"[red]NOT RIGHT[/] {escape(gpu_phases.words(r))}", soft_wrap=True)
    console.print(f"{len(records)} records, {len(wrong)} not right: {path}", soft_wrap=True)
    return 1 if wrong else 0


def _refuse(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """What cannot be done, before anything is begun."""
    if launch.runs_interpreted() and not arguments.dry_run:
        parser.error("TRITON_INTERPRET=1 is set; unset it to compile")
    for name in arguments.only or ():
        if name not in PHASES:
            parser.error(f"--only {name!r}: there is no such phase; there are {', '.join(PHASES)}")
    if arguments.resume and arguments.output:
        parser.error(f"--output {arguments.output}: --resume adds to its own file")
    if not (arguments.dry_run or arguments.build or torch.cuda.is_available()):
        parser.error(
            "no GPU is visible; --dry-run tries every phase on a CPU, --build DIR compiles for one"
        )
    if arguments.cubins and not arguments.cubins.is_dir():
        parser.error(f"--cubins {arguments.cubins}: no such folder; --build makes it")


def _parser() -> argparse.ArgumentParser:
    phases = "\n".join(
        f"  {name:9} at most {plan.seconds:3.0f} s: {plan.what}" for name, plan in PHASES.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu",
        description=f"{__doc__}\nphases:\n{phases}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", nargs="+", metavar="PHASE", help="these alone, in the order of the list")
    add("--resume", type=Path, metavar="FILE", help="run what did not end well in this file")
    add("--dry-run", action="store_true", help="tiny, on a CPU; the file goes where you are")
    add("--output", type=Path, metavar="FILE", help="results file (default: bench/results/)")
    add("--build", type=Path, metavar="DIR", help="compile clusters only, without a GPU")
    add(
        "--target",
        choices=("sm_90", "sm_100"),
        default="sm_90",
        help="what to --build for (default sm_90: H100, H200)",
    )
    add("--cubins", type=Path, metavar="DIR", help="sweep what was built, whatever Triton")
    add("--seconds", type=float, help="a limit for every phase, in the place of its own")
    # What the process of a phase is told.
    add("--phase", choices=PHASES, help=argparse.SUPPRESS)
    add("--began", type=float, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())

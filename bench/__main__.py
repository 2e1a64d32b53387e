"""`python -m bench NAME`: what can be counted or measured about the kernels."""

from __future__ import annotations

import argparse
import importlib
import signal
import subprocess
import sys

COMMANDS = {
    "compare": "time, memory and error of sgp and its rivals, side by side",
    "traffic": "bytes that each kernel asks for and touches, counted under the interpreter",
    "loops": "instructions an element in the loops over a row, ours and Liger's",
    "resources": "registers, spills and access widths of every kernel, compiled without a GPU",
    "context": "time and memory of the gradient through the context, three modes",
    "recall": "what is lost when the context is held constant: a toy task, trained twice",
    "sft": "TRL's SFTTrainer and sgp's: the same steps, losses and time",
    "audit": "how long `sgp audit` takes to read a file, beside `sgp train`",
    "memory": "peak memory of the linear head, way by way: planned and counted",
    "gpu": "eight minutes of a GPU: checks, row kernels, whole calls, a model, beside others",
    "host": "the host's time of a call, to the least that a loss can take; needs no GPU",
    "predict": "milliseconds on paper, from bytes, FLOPs and a data sheet",
    "report": "the tables in README and docs, and the pictures, from the results files",
}
ROOMS = {
    "against": ("compare",),
    "proof": ("traffic", "loops", "resources", "host", "predict"),
    "gpu": ("gpu",),
    "studies": ("audit", "context", "memory", "recall", "sft"),
    "shown": ("report",),
}
INTERRUPTED = 130  # the exit code
EVERYTHING = "all that this machine can do, one after the other, and the report"


def everything() -> int:
    """Run what this machine can, each in a process of its own; 1 if any of them fails."""
    parser = argparse.ArgumentParser(prog="python -m bench all", description=EVERYTHING)
    parser.add_argument(
        "--time-budget", default="480", metavar="SECONDS", help="of `compare`, without a GPU (480)"
    )
    budget = parser.parse_args().time_budget
    import torch  # noqa: PLC0415  (the list of commands needs no PyTorch)

    from bench.proof import standin  # noqa: PLC0415

    on_gpu = torch.cuda.is_available()
    traffic, resources = ["bench", "traffic"], ["bench", "resources", "--longest", "--no-output"]
    plan = [["bench", "compare", "--time-budget", budget], traffic, resources]
    if on_gpu:  # ten minutes in all; `compare`, and all of `sgp verify`, are for longer ones
        plan = [["bench", "gpu"]]
    elif not standin.obstacle():
        plan.append(["bench", "host"])
    plan += [["bench", "predict"], ["bench", "report"]]
    failed = []
    for module, *arguments in plan:
        words = f"python -m {module} {' '.join(arguments)}"
        print(f"\n== {words}", flush=True)
        command = [sys.executable, "-m", module, *arguments]
        code = _run(command)
        if code in (INTERRUPTED, -signal.SIGINT):
            return INTERRUPTED
        if code:
            failed.append(words)
    for words in failed:
        print(f"failed: {words}")
    return 1 if failed else 0


def _run(command: list[str]) -> int:
    """The command's exit code; Ctrl-C is left to the command, which writes what it has."""
    # A function, because a command would inherit SIG_IGN.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        return subprocess.run(command, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, before)


def main() -> None:
    """Run a command with the arguments that follow."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in ("all", *COMMANDS):
        listing = "\n".join(
            f"  {command:10} {what}" for command, what in {"all": EVERYTHING, **COMMANDS}.items()
        )
        usage = f"usage: python -m bench NAME [options]\n\n{listing}"
        if name in ("--help", "-h"):
            print(usage)
            return
        sys.exit(f"unknown: {name}\n{usage}")
    del sys.argv[1]
    try:
        if name == "all":
            sys.exit(everything())
        room = next(room for room, commands in ROOMS.items() if name in commands)
        sys.exit(importlib.import_module(f"bench.{room}.{name}").main())
    except KeyboardInterrupt:
        print(f"python -m bench {name}: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()

"""`python -m bench NAME`: what can be counted or measured about the kernels."""

from __future__ import annotations

import importlib
import subprocess
import sys

COMMANDS = {
    "compare": "time, memory and error of sgp and its rivals, side by side",
    "traffic": "bytes that each kernel asks for and touches, counted under the interpreter",
    "resources": "registers, spills and access widths of every kernel, compiled without a GPU",
    "context": "time and memory of the gradient through the context, three modes",
    "recall": "what is lost when the context is held constant: a toy task, trained twice",
    "sft": "TRL's SFTTrainer and sgp's: the same steps, losses and time",
    "forms": "resident rows against streaming and a copy, timed on a GPU",
    "predict": "milliseconds on paper, from bytes, FLOPs and a data sheet",
    "report": "the README's tables and the pictures, from the results files",
}
EVERYTHING = "all that this machine can do, one after the other, and the report"


def everything() -> int:
    """Run what this machine can, each in a process of its own; 1 if any of them fails."""
    import torch  # noqa: PLC0415  (the list of commands needs no PyTorch)

    on_gpu = torch.cuda.is_available()
    traffic, resources = ["bench", "traffic"], ["bench", "resources", "--longest", "--no-output"]
    plan = [["bench", "compare"], traffic, resources]
    if on_gpu:
        plan = [["sgp", "verify"], ["bench", "compare"], ["bench", "forms"]]
    plan += [["bench", "predict"], ["bench", "report"]]
    failed = []
    for module, *arguments in plan:
        words = f"python -m {module} {' '.join(arguments)}"
        print(f"\n== {words}", flush=True)
        command = [sys.executable, "-m", module, *arguments]
        if subprocess.run(command, check=False).returncode:
            failed.append(words)
    for words in failed:
        print(f"failed: {words}")
    return 1 if failed else 0


def main() -> None:
    """Run bench/NAME.py with the arguments that follow."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name == "all":
        sys.exit(everything())
    if name not in COMMANDS:
        listing = "\n".join(
            f"  {command:10} {what}" for command, what in {"all": EVERYTHING, **COMMANDS}.items()
        )
        usage = f"usage: python -m bench NAME [options]\n\n{listing}"
        if name in ("--help", "-h"):
            print(usage)
            return
        sys.exit(f"unknown: {name}\n{usage}")
    del sys.argv[1]
    sys.exit(importlib.import_module(f"bench.{name}").main())


if __name__ == "__main__":
    main()

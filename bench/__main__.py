"""`python -m bench NAME`: what can be counted or measured about the kernels."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "traffic": "bytes that each kernel asks for and touches, counted under the interpreter",
    "head": "time and memory of a linear head and its loss, side by side",
    "forms": "resident rows against streaming and a copy, timed on a GPU",
    "resources": "registers, spills and access widths of every kernel, compiled without a GPU",
}


def main() -> None:
    """Run bench/NAME.py with the arguments that follow."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in COMMANDS:
        listing = "\n".join(f"  {command:10} {what}" for command, what in COMMANDS.items())
        usage = f"usage: python -m bench NAME [options]\n\n{listing}"
        if name in ("--help", "-h"):
            print(usage)
            return
        sys.exit(f"unknown: {name}\n{usage}")
    del sys.argv[1]
    sys.exit(importlib.import_module(f"bench.{name}").main())


if __name__ == "__main__":
    main()

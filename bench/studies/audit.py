"""How long `sgp audit` takes to read a file, beside what `sgp train` takes to read the same file.

    python -m bench audit        # some minutes on two CPU cores; table and results file

Functions of the Python standard library as prompt and completion, again and again with other
numbers, and the tokenizer that `sgp train` makes of that library. `sgp train` reads, tokenizes and
splits; `sgp audit` reads, tokenizes, looks at every line and runs one backward pass. They take
turns; times are medians. Exit code 1 if the audit takes more than three times as long.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import io
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from bench import files, tables
from bench.against import machine
from sgp import cli
from sgp.train.options import Options
from sgp.train.prepare import prepare
from sgp.train.stdlib import source_files, stdlib_pairs
from sgp.train.tokenizer import cache_folder, load_or_train, wrap

RESULTS = files.RESULTS
WINDOW = 512
MOST = 3.0  # times as long as `sgp train`


def write(path: Path, lines: int) -> None:
    """So many lines, no two of them alike."""
    pairs = itertools.cycle(stdlib_pairs(list(source_files(None))))
    with path.open("w", encoding="utf-8") as file:
        for number, pair in enumerate(itertools.islice(pairs, lines)):
            row = {"prompt": f"# {number}\n{pair.prompt}", "completion": pair.completion}
            file.write(json.dumps(row) + "\n")


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> int:
    """Measure, print, write; 1 if the audit takes too long."""
    parser = argparse.ArgumentParser(
        prog="python -m bench audit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path, help="results file (default: bench/results/)")
    arguments = parser.parse_args()
    found = machine.describe(torch.device("cpu"))
    today = dt.datetime.now(dt.timezone.utc).date().isoformat()
    output = arguments.output or RESULTS / f"audit-{found.slug}-{today}.json"
    files.must_be_writable(output)
    laps: dict[str, list[float]] = {"sgp train": [], "sgp audit": []}
    with tempfile.TemporaryDirectory() as folder:
        data, tokenizer = Path(folder, "data.jsonl"), Path(folder, "tokenizer")
        write(data, arguments.lines)
        texts = [text for _, text in source_files(None)]
        wrap(load_or_train(texts, folder=cache_folder())).save_pretrained(tokenizer)
        words = ["audit", str(data), "--tokenizer", str(tokenizer), "--max-length", str(WINDOW)]
        options = Options(data=data, max_length=WINDOW)
        quiet = io.StringIO()
        for _ in range(arguments.turns):
            laps["sgp train"].append(seconds(lambda: prepare(options, quiet.write)))
            with contextlib.redirect_stdout(quiet):
                laps["sgp audit"].append(seconds(lambda: cli.main(words)))
        size = data.stat().st_size
    times = {name: statistics.median(of) for name, of in laps.items()}
    ratio = times["sgp audit"] / times["sgp train"]
    content = {
        "machine": found._asdict(),
        "date": today,
        "commit": machine.commit(),
        "versions": machine.versions(),
        "lines": arguments.lines,
        "bytes": size,
        "seconds": laps,
        "ratio": ratio,
    }
    output.write_text(json.dumps(content) + "\n")
    table = tables.make(
        f"{arguments.lines} lines, {size / 1e6:.0f} MB", ["command"], ["seconds", "to sgp train"]
    )
    for name, median in times.items():
        table.add_row(name, f"{median:.1f}", f"{median / times['sgp train']:.2f}")
    Console().print(table)
    return 0 if ratio <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())

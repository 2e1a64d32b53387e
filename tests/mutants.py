"""Change the package by a line at a time and see whether the nearest tests notice.

    python tests/mutants.py [--check] [--jobs N] [--limit SECONDS] [ID | FILE ...]

Each line of mutants.jsonl is one change, a JSON object:

    id          letters of the area and a number
    file        what is changed, from the repository's root
    old, new    `old` stands exactly once in the file; `new` stands in its place
    tests       arguments of pytest, a string each, of the nearest tests: one of them should fail
    note        what the change breaks; "" where it can be seen
    equivalent  only where no caller can tell the change: the reason. It is not run.

A change is tried in a copy of the repository, its tests in the order given until one fails, and the
test that failed is run once more without the change: if it fails there too, nothing was noticed.
What is said of a change:

    noticed      a test fails, and passes without the change
    NOT NOTICED  all pass; a test is missing, or the change is equivalent
    equivalent   not tried; counted apart
    moved        `old` does not stand exactly once in the file: rewrite the change, do not drop it
    no tests     pytest found nothing to run, or could not begin
    broken       the test that failed fails without the change as well
    timed out    nothing failed within the limit

Choose changes, or all of them, by ids and by files, or folders. All of them take hours on two
cores. `--check` tries nothing: it asks of every change whether `old` is where it should be and
whether pytest collects something for each of its tests, in two minutes. The exit status is 0 if
all that was chosen is noticed or equivalent (with `--check`: is as it should be), and 1 if not.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_suffix(".jsonl")
LEFT_OUT = (  # beside .git, what git ignores
    ".git", ".venv", ".*_cache", ".hypothesis", ".benchmarks", "__pycache__", "*.egg-info", "build",
    "dist", "sgp-out", "trainer-out", "trl-out",
)  # fmt: skip
FINE = ("noticed", "equivalent")
NOTHING_RUN = (4, 5)  # pytest's exit status: usage error, nothing collected


class Change(NamedTuple):
    """One change, as in the list."""

    id: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    note: str = ""
    equivalent: str = ""

    @property
    def words(self) -> str:
        """What is changed, on one line."""
        return self.note or f"{shown(self.old)} -> {shown(self.new) or 'nothing'}"


class Result(NamedTuple):
    """What became of a change."""

    change: Change
    verdict: str
    by: str = ""  # the test that failed; the reason


def shown(code: str) -> str:
    """Some lines of code as one."""
    return " ".join(code.split())


def read(path: Path = LIST) -> list[Change]:
    """The changes of a list, in its order."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Change(**{**m, "tests": tuple(m["tests"])}) for m in map(json.loads, lines)]


def chosen(changes: Sequence[Change], names: Sequence[str]) -> list[Change]:
    """Those of these ids, files or folders; all where nothing is named.

    Raises:
        ValueError: for a name that chooses nothing.
    """

    def is_of(change: Change, name: str) -> bool:
        return name in (change.id, change.file) or change.file.startswith(name.rstrip("/") + "/")

    unknown = [name for name in names if not any(is_of(change, name) for change in changes)]
    if unknown:
        raise ValueError(f"no change has the id, or is in the file, {' or '.join(unknown)}")
    return [c for c in changes if not names or any(is_of(c, name) for name in names)]


def changed(change: Change, root: Path) -> str | None:
    """The file's text with the change; None where `old` does not stand there exactly once."""
    path = root / change.file
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text.replace(change.old, change.new) if text.count(change.old) == 1 else None


@contextlib.contextmanager
def copied(root: Path) -> Iterator[Path]:
    """A copy of the repository, without what git ignores."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder) / "repository"
        shutil.copytree(root, copy, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
        yield copy


def run_tests(arguments: Sequence[str], root: Path, limit: float) -> tuple[int, list[str]]:
    """Run pytest up to the first failure: (its exit status, the tests that failed).

    Raises:
        subprocess.TimeoutExpired: after `limit` seconds.
    """
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "PYTHONDONTWRITEBYTECODE": "1",  # a file changed twice in a second has one time stamp
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory(prefix="mutants-") as cache:
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-xq", "-o", f"cache_dir={cache}", *arguments],
            cwd=root, env=environment, capture_output=True, timeout=limit, check=False,
        )  # fmt: skip
        failed = Path(cache, "v", "cache", "lastfailed")
        return run.returncode, list(json.loads(failed.read_text())) if failed.exists() else []


def attempt(change: Change, *, root: Path = ROOT, limit: float = 900) -> Result:
    """Try one change."""
    if change.equivalent:
        return Result(change, "equivalent", change.equivalent)
    text = changed(change, root)
    if text is None:
        return Result(change, "moved")
    with copied(root) as copy:
        path = copy / change.file
        before = path.read_text(encoding="utf-8")
        try:
            for tests in change.tests:
                path.write_text(text, encoding="utf-8")
                status, failed = run_tests(shlex.split(tests), copy, limit)
                if status in NOTHING_RUN:
                    return Result(change, "no tests", tests)
                if status:
                    path.write_text(before, encoding="utf-8")
                    again, _ = run_tests(failed or shlex.split(tests), copy, limit)
                    by = failed[0] if failed else tests
                    return Result(change, "broken" if again else "noticed", by)
        except subprocess.TimeoutExpired:
            return Result(change, "timed out", tests)
    return Result(change, "NOT NOTICED")


def faults(changes: Sequence[Change], root: Path = ROOT) -> Iterator[str]:
    """What is wrong with a list, as far as a look at the files can tell."""
    for name, count in Counter(change.id for change in changes).items():
        if count > 1:
            yield f"{name}: {count} changes have this id"
    for change in changes:
        text = changed(change, root)
        if text is None:
            yield f"{change.id}: moved: {change.file} has not exactly once {change.old!r}"
        elif change.old == change.new:
            yield f"{change.id}: changes nothing"
        else:
            try:
                compile(text, change.file, "exec")
            except SyntaxError as error:
                yield f"{change.id}: {change.file} is no Python any more: {error}"
        if not change.tests and not change.equivalent:
            yield f"{change.id}: neither tests nor a reason why it is equivalent"


def without_tests(changes: Sequence[Change]) -> Iterator[str]:
    """The arguments for which pytest, in this process, collects nothing."""
    import pytest

    os.chdir(ROOT)
    for tests in sorted({tests for change in changes for tests in change.tests}):
        with contextlib.redirect_stdout(io.StringIO()):
            status = pytest.main(
                ["--collect-only", "-q", "-p", "no:cacheprovider", *shlex.split(tests)]
            )
        if status:
            of = [change.id for change in changes if tests in change.tests]
            yield f"{', '.join(of)}: pytest collects nothing for {tests}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description="Change the package by a line at a time and see whether its tests notice."
    )
    parser.add_argument("names", nargs="*", metavar="ID | FILE", help="which changes; all without")
    parser.add_argument("--check", action="store_true", help="check the list; try nothing")
    parser.add_argument("--jobs", type=int, default=1, help="changes at a time (default: 1)")
    parser.add_argument(
        "--limit", type=float, default=900, metavar="SECONDS", help="of one pytest (default: 900)"
    )
    options = parser.parse_args(arguments)
    try:
        changes = chosen(read(), options.names)
    except ValueError as error:
        parser.error(str(error))
    if options.check:
        wrong = [*faults(changes), *without_tests(changes)]
        print(*wrong, f"{len(changes)} changes, {len(wrong)} faults", sep="\n")
        return int(bool(wrong))
    counts: Counter[str] = Counter()
    with ThreadPoolExecutor(options.jobs) as pool:
        tried = [pool.submit(attempt, change, limit=options.limit) for change in changes]
        for done in as_completed(tried):
            result = done.result()
            counts[result.verdict] += 1
            print(f"{result.change.id:5} {result.verdict:11} {result.change.file}: ", end="")
            print(f"{result.change.words}" + (f"  [{result.by}]" if result.by else ""), flush=True)
    others = len(changes) - counts["equivalent"]
    print(f"{len(changes)} changes:", ", ".join(f"{n} {what}" for what, n in counts.most_common()))
    if others:
        print(f"noticed: {counts['noticed']} of {others} that are not equivalent", end=" ")
        print(f"({counts['noticed'] / others:.1%})")
    return int(any(verdict not in FINE for verdict in counts))


if __name__ == "__main__":
    sys.exit(main())

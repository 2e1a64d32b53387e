"""The core tests on other versions: an environment for each PyTorch with the Triton that it pins.

    python .ci/versions.py                # every line of the table below, one after the other
    python .ci/versions.py 2.9.1 2.15.0   # these
    python .ci/versions.py --list         # the table as JSON, for a workflow's matrix

An environment is downloaded (up to 3 GB where pip finds no CPU build), tested with
`pytest -m core` and removed. pip's own settings say from where; PIP_CONSTRAINT=/dev/null sets a
constraint file that caps torch aside.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("torch", "triton", "transformers", "numpy")
WITHOUT_TRL = ("test_trl.py",) if sys.version_info < (3, 11) else ()  # TRL 1.16 needs 3.11


@dataclass(frozen=True)
class Line:
    """Versions that go together; an empty one is the newest that pip finds."""

    torch: str
    triton: str  # what this torch pins; its CPU builds pin none
    transformers: str = ""
    numpy: str = ""


# Transformers from the oldest to the newest, spread over the torches.
TABLE = (
    Line("2.9.1", "==3.5.1", "==5.0.0", "<2.4"),  # Triton's interpreter breaks on NumPy 2.4
    Line("2.10.0", "==3.6.0", "==5.4.0", "<2.4"),  # as above
    Line("2.11.0", "==3.6.0", "==5.8.1", "<2.4"),  # as above
    Line("2.12.1", "==3.7.1", "==5.12.1"),
    Line("2.13.0", "==3.7.1", "==5.16.1"),
    Line("2.14.1", "~=3.8.0", "==5.20.2"),
    Line("2.15.0", "~=3.9.0"),
)


def install(line: Line, venv: Path) -> Path:
    """Python of an environment with the package and what its tests need."""
    python, installed = venv / "bin" / "python", venv / "installed"
    if installed.exists():  # with --keep
        return python
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    pins = [f"torch=={line.torch}", f"triton{line.triton}"]
    pins += [f"transformers{line.transformers}", f"numpy{line.numpy}"]
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-compile"]
    subprocess.run([*pip, *pins, "-e", f"{ROOT}[core]"], check=True)
    installed.touch()
    return python


def versions(python: Path) -> dict[str, str]:
    """What is installed."""
    code = (
        "import json, platform, sys\nfrom importlib.metadata import version\n"
        "print(json.dumps({'python': platform.python_version()} | "
        "{name: version(name) for name in sys.argv[1:]}))"
    )
    out = subprocess.run([python, "-c", code, *SHOWN], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(out.stdout)
    return found


def run_core(python: Path, jobs: int, report: Path) -> dict[str, Any]:
    """How many of the core tests passed, failed and were skipped."""
    command = [str(python), "-m", "pytest", "-q", "-m", "core", "-n", str(jobs)]
    command += ["-p", "no:cacheprovider", "--junitxml", str(report)]
    tests = sorted((ROOT / "tests").glob("test_*.py"))  # others need more than is installed here
    command += [
        str(path)
        for path in tests
        if "mark.core" in path.read_text("utf-8") and path.name not in WITHOUT_TRL
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False)
    if not report.exists():
        return {"exit": done.returncode}
    suites = list(ET.parse(report).getroot().iter("testsuite"))  # noqa: S314  (our own)
    count = {
        name: sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    }
    failed = count["failures"] + count["errors"]
    return {
        "exit": done.returncode,
        "passed": count["tests"] - failed - count["skipped"],
        "failed": failed,
        "skipped": count["skipped"],
        "seconds": round(sum(float(suite.get("time", 0)) for suite in suites)),
    }


def main() -> int:
    """0 if the core tests passed with all of the versions asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [line.torch for line in TABLE]
    parser.add_argument("torch", nargs="*", metavar="TORCH", help=f"of {', '.join(known)}")
    parser.add_argument("--list", action="store_true", help="print the table as JSON and end")
    parser.add_argument("--transformers", help="another one, such as ==5.2.0")
    parser.add_argument("--jobs", type=int, default=2, help="processes of pytest (2)")
    parser.add_argument("--keep", type=Path, help="a folder for the environments, to use again")
    parser.add_argument("--results", type=Path, help="a file that gets a line of JSON for each")
    options = parser.parse_args()
    if options.list:
        print(json.dumps([asdict(line) for line in TABLE]))
        return 0
    if not set(options.torch) <= set(known):
        parser.error(f"torch {' '.join(options.torch)}: expected some of {' '.join(known)}")
    bad = 0
    for line in TABLE:
        if options.torch and line.torch not in options.torch:
            continue
        if options.transformers:
            line = Line(line.torch, line.triton, options.transformers, line.numpy)  # noqa: PLW2901
        print(f"torch {line.torch}", flush=True)
        folder = options.keep or Path(tempfile.mkdtemp())
        try:
            python = install(line, folder / f"torch-{line.torch}")
            report = folder / f"torch-{line.torch}.xml"
            report.unlink(missing_ok=True)
            result: dict[str, Any] = versions(python) | run_core(python, options.jobs, report)
        except subprocess.CalledProcessError as error:
            result = {"torch": line.torch, "exit": error.returncode, "error": str(error)}
        finally:
            if not options.keep:
                shutil.rmtree(folder)
        result["date"] = datetime.now(timezone.utc).date().isoformat()
        print(json.dumps(result), flush=True)
        bad += result["exit"] != 0
        if options.results:
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())

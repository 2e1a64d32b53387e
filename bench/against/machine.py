"""The machine: its name, what is installed on it, what it reaches, and its clock."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import files
from bench.against import rivals
from sgp.rows import backend

CACHE = {"cuda": 256 << 20, "cpu": 64 << 20}  # bytes, above L2 on any GPU, and most CPUs' L3
HEAD_START = 8  # times that a GPU clears as much before a lap, while Python gets ahead of it


class Machine(NamedTuple):
    """What ran it."""

    name: str
    device: str  # "cuda" | "cpu"
    cpu: str
    driver: str | None
    platform: str
    python: str

    @property
    def slug(self) -> str:
        """The name in file names."""
        return self.name.lower().replace(" ", "-")


def describe(device: torch.device) -> Machine:
    """The GPU, or how many CPU cores PyTorch uses."""
    driver = None
    name = f"{torch.get_num_threads()} cores"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            found = subprocess.run(query, capture_output=True, text=True, check=True)
            driver = found.stdout.splitlines()[0].strip()
        except (OSError, subprocess.CalledProcessError, IndexError):
            driver = None
    found = (name, device.type, _cpu(), driver, platform.machine(), platform.python_version())
    return Machine(*found)


def _cpu() -> str:
    """The CPU's model, where Linux says it."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    lines = [line.split(":", 1)[1] for line in text.splitlines() if line.startswith("model name")]
    return lines[0].strip() if lines else platform.processor()


def commit() -> str:
    """The commit that is checked out, and whether anything in it was changed."""
    root = files.ROOT

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str | None]:
    """Of what was used."""
    try:
        from triton import __version__ as found  # noqa: PLC0415
    except ImportError:  # not on every system
        found = None
    return {"triton": found, "cuda": torch.version.cuda} | rivals.versions()


def settings(device: torch.device) -> dict[str, str | None]:
    """Which of sgp's two implementations runs for bf16 and float32, and what was set."""
    names = ("SGP_BACKEND", "SGP_ROW_FORM", "SGP_CHECK", "CUDA_VISIBLE_DEVICES")
    chosen = backend.choose(device, torch.float32)
    return {"backend": chosen} | {name: os.environ.get(name) for name in names}


class Roofs(NamedTuple):
    """What the machine reaches, measured."""

    copy_bytes_per_s: float  # read and written
    matmul_flops_per_s: float
    matmul_dtype: str


def roofs(device: torch.device) -> Roofs:
    """Of a copy far above any cache and of a large square matmul."""
    on_gpu = device.type == "cuda"
    copy = copy_bytes_per_s(device)
    size, dtype = (8_192, torch.bfloat16) if on_gpu else (2_048, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    product = median_ms(lambda: a @ a, device)
    name = str(dtype).removeprefix("torch.")
    return Roofs(copy, 2e3 * size**3 / product, name)


def copy_bytes_per_s(device: torch.device) -> float:
    """Read and written, far above any cache."""
    large = (1 << 30) if device.type == "cuda" else (1 << 28)
    source = torch.ones(large, dtype=torch.int8, device=device)
    sink = torch.empty_like(source)
    return 2e3 * source.nbytes / median_ms(lambda: sink.copy_(source), device)


def median_ms(run: Callable[[], Any], device: torch.device, *, turns: int = 7) -> float:
    """Median time of a call."""
    clock = Clock(device)
    run()
    times = []
    for _ in range(turns):
        clock.start()
        run()
        clock.lap()
        times.append(clock.laps()[0])
    return statistics.median(times)


class Clock:
    """Laps in milliseconds: by events on a GPU, caches emptied first, or wall time.

    A GPU's laps begin when it gets to them: Python's own time counts where it falls behind only.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.cache = torch.empty(CACHE[device.type], dtype=torch.int8, device=device)
        self.marks: list[Any] = []

    def start(self) -> None:
        """Begin the first lap."""
        for _ in range(HEAD_START if self.on_gpu else 1):
            self.cache.zero_()
        self.marks = []
        self.lap()

    def lap(self) -> None:
        """End a lap and begin the next."""
        if not self.on_gpu:
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def laps(self) -> list[float]:
        """Milliseconds of each lap; waits for a GPU."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if not self.on_gpu:
            return [1e3 * (after - before) for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in pairs]

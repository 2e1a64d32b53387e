"""Time, memory and error of a rival on a case, and what the machine itself can do.

Times: rivals take turns, so that a machine that slows down slows down all of them; each turn is
forward, then backward, from the same leaves. On a GPU events time it, after the L2 cache has been
emptied; on a CPU the wall clock. What is given are medians and the quartiles' distance.

Memory: the most bytes held at one time beyond the case's inputs and the gradients of hidden states
and weight, which every rival has to return.

Error: loss and gradient against the same formula in higher precision, on the first rows, before
anything is timed; who is wrong is not timed.
"""

from __future__ import annotations

import gc
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import sgp
from bench import cases, rivals
from bench.cases import Case, Problem
from bench.rivals import Rival
from sgp.tolerance import relative_error
from sgp.train.memory import cpu_peak

ERROR_ROWS = 64
ALLOWED = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}  # relative, of loss and gradient
CACHE = 256 << 20  # bytes, above any L2 cache
FLOAT64_LIMIT = 1 << 28  # elements of a weight beyond which the truth is float32's


class Measured(NamedTuple):
    """One rival on one case."""

    rival: str
    status: str  # "ok", or why there are no times
    forward_ms: float | None = None
    backward_ms: float | None = None
    both_ms: float | None = None
    spread_ms: float | None = None  # of both: third quartile less the first
    turns: int = 0
    memory_bytes: int | None = None
    loss_error: float | None = None
    gradient_error: float | None = None


class Machine(NamedTuple):
    """What ran it."""

    name: str
    driver: str | None
    platform: str
    python: str

    @property
    def slug(self) -> str:
        """The name in file names."""
        return self.name.lower().replace(" ", "-")


def machine(device: torch.device) -> Machine:
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
    return Machine(name, driver, platform.machine(), platform.python_version())


def commit() -> str:
    """The commit that is checked out, and whether anything in it was changed."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# -- bounds ----------------------------------------------------------------------------------------


class Roofs(NamedTuple):
    """What the machine reaches, measured."""

    copy_bytes_per_s: float  # read and written
    matmul_flops_per_s: float
    matmul_dtype: str


def roofs(device: torch.device) -> Roofs:
    """Of a copy far above any cache and of a large square matmul."""
    on_gpu = device.type == "cuda"
    source = torch.ones((1 << 30) if on_gpu else (1 << 28), dtype=torch.int8, device=device)
    sink = torch.empty_like(source)
    copy = median_ms(lambda: sink.copy_(source), device)
    size, dtype = (8_192, torch.bfloat16) if on_gpu else (2_048, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    product = median_ms(lambda: a @ a, device)
    name = str(dtype).removeprefix("torch.")
    return Roofs(2e3 * source.nbytes / copy, 2e3 * size**3 / product, name)


def compulsory_bytes(case: Case) -> float:
    """What the row kernel must move at least.

    Kept logits are read and the gradient of all is written; log-probabilities, whose upstream
    gradient is not known in forward, read the kept logits a second time.
    """
    reads = 2 if case.form == "log-probs" else 1
    return (1 + reads * case.kept) * case.N * case.model.V * case.itemsize


class Bound(NamedTuple):
    """What no rival can beat: `share` of the time of `work`, measured in the same turns."""

    work: Callable[[], Any]
    share: float


def bound_of(problem: Problem) -> Bound:
    """Bytes at a copy's speed, or the matmuls.

    From logits: `compulsory_bytes` at the speed of a copy of the logits, which reads and writes
    each once. With a head: logits, `d_hidden` and `d_weight` of the kept rows, and nothing else.
    """
    if problem.logits is not None:
        source = problem.logits.detach()
        sink = torch.empty_like(source)
        share = compulsory_bytes(problem.case) / (2 * source.nbytes)
        return Bound(lambda: sink.copy_(source), share)
    assert problem.hidden is not None and problem.weight is not None, "a head"  # noqa: S101, PT018
    hidden, weight = problem.hidden.detach()[problem.rows], problem.weight.detach()

    def matmuls() -> Tensor:
        logits = hidden @ weight.t()
        logits.t() @ hidden
        return logits @ weight

    return Bound(matmuls, 1.0)


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
    """Laps in milliseconds: by events on a GPU, whose L2 cache is emptied first, or wall time."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.cache = torch.empty(CACHE if self.on_gpu else 0, dtype=torch.int8, device=device)
        self.marks: list[Any] = []

    def start(self) -> None:
        """Begin the first lap."""
        if self.on_gpu:
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


# -- rivals ----------------------------------------------------------------------------------------


def run(rival: Rival, problem: Problem, clock: Clock | None = None) -> tuple[Tensor, ...]:
    """Loss and gradients of the leaves."""
    p = problem.fresh() if rival.overwrites else problem
    leaves = p.leaves
    if rival.overwrites:
        # In place acts on what is not a leaf; the gradient that comes back is the leaf's all the
        # same.
        p = p._replace(logits=_Untouched.apply(p.logits))
    if clock is not None:
        clock.start()
    loss = rival.loss(p)
    if clock is not None:
        clock.lap()
    gradients = torch.autograd.grad(loss, leaves)
    if clock is not None:
        clock.lap()
    return loss.detach(), *gradients


class _Untouched(torch.autograd.Function):
    """The same memory as a tensor that is not a leaf, without a kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return gradient


def truth(problem: Problem) -> tuple[Tensor, ...]:
    """Loss and gradients of PyTorch in float64, or float32 where the head is very large."""
    p = problem
    large = p.weight is not None and p.weight.numel() > FLOAT64_LIMIT
    dtype = torch.float32 if large else torch.float64
    leaves = [x.detach().to(dtype).requires_grad_() for x in p.leaves]
    logits = leaves[0][p.rows]
    if len(leaves) == 2:
        logits = F.linear(logits, leaves[1])
    loss = F.cross_entropy(logits, p.target)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def errors(found: tuple[Tensor, ...], true: tuple[Tensor, ...]) -> tuple[float, float]:
    """Relative errors of the loss and, the worst, of the gradients, each as one vector."""
    of = [
        relative_error(ours.reshape(1, -1), theirs.reshape(1, -1))
        for ours, theirs in zip(found, true, strict=True)
    ]
    return of[0], max(of[1:])


def check(case: Case, contestants: list[Rival], device: torch.device) -> dict[str, Measured]:
    """Everybody's errors on the case's first rows, and who cannot run, fails or is wrong."""
    problem = cases.make(case, device, rows=min(case.N, ERROR_ROWS))
    true = truth(problem)
    outcome = {}
    for rival in contestants:
        if reason := rival.missing(device):
            outcome[rival.name] = Measured(rival.name, reason)
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a library's own dependencies
                loss_error, gradient_error = errors(run(rival, problem), true)
        except Exception as error:  # noqa: BLE001  (whatever a library raises is its result)
            outcome[rival.name] = Measured(rival.name, failure(error))
            continue
        allowed = ALLOWED[case.dtype]
        right = loss_error <= allowed and gradient_error <= allowed
        status = "ok" if right else f"wrong: error {max(loss_error, gradient_error):.1e}"
        outcome[rival.name] = Measured(
            rival.name, status, loss_error=loss_error, gradient_error=gradient_error
        )
    return outcome


def failure(error: BaseException) -> str:
    """What to say of an exception."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = str(error).strip().splitlines()
    return f"fails: {type(error).__name__}: {text[0][:100] if text else ''}".rstrip(": ")


def memory(rival: Rival, problem: Problem) -> int:
    """The most bytes held at one time: see above."""
    returned = sum(x.nbytes for x in problem.leaves) if problem.logits is None else 0
    device = problem.labels.device
    copied = problem.logits.nbytes if rival.overwrites and problem.logits is not None else 0
    if device.type == "cuda":
        gc.collect()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run(rival, problem)
        return torch.cuda.max_memory_allocated(device) - before - returned - copied
    with cpu_peak() as held:
        run(rival, problem)
    return (held.peak_bytes or 0) - returned - copied


def measure(
    case: Case,
    device: torch.device,
    *,
    seconds: float,
    only: list[str] | None = None,
    most_turns: int = 25,
) -> tuple[float, list[Measured]]:
    """(the bound in milliseconds, every rival on a case); about `seconds` of turns.

    Every rival is run before, and at least three times for its time; twice, where that would take
    longer than all the others are meant to.
    """
    contestants = [r for r in rivals.rivals_of(case.form) if only is None or r.name in only]
    found = check(case, contestants, device)
    problem = cases.make(case, device)
    bound = bound_of(problem)
    running = [r for r in contestants if found[r.name].status == "ok"]
    laps: dict[str, list[list[float]]] = {r.name: [] for r in running}

    def attempt(rival: Rival, step: Callable[[], Any]) -> Any:
        """The step's value; a rival that fails is out."""
        try:
            return step()
        except Exception as error:  # noqa: BLE001  (whatever a library raises is its result)
            found[rival.name] = Measured(rival.name, failure(error))
            running.remove(rival)
            return None

    for rival in list(running):
        held = attempt(rival, lambda rival=rival: _warm_up(rival, problem))
        found[rival.name] = found[rival.name]._replace(memory_bytes=held)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    clock = Clock(device)
    bound.work()
    bounds = []
    start = time.perf_counter()
    for turn in range(most_turns):
        if turn >= 3 and time.perf_counter() - start > seconds:
            break
        clock.start()
        bound.work()
        clock.lap()
        bounds += clock.laps()
        for rival in list(running):
            if turn >= 2 and 1e-3 * sum(laps[rival.name][-1]) > seconds / 4:
                continue
            attempt(rival, lambda rival=rival: run(rival, problem, clock))
            if rival in running:
                laps[rival.name].append(clock.laps())
    for rival in running:
        found[rival.name] = _timed(found[rival.name], laps[rival.name])
    return bound.share * statistics.median(bounds), [found[r.name] for r in contestants]


def _warm_up(rival: Rival, problem: Problem) -> int:
    """Run; then run again and see what it holds."""
    run(rival, problem)
    return memory(rival, problem)


def _timed(measured: Measured, laps: list[list[float]]) -> Measured:
    both = [sum(lap) for lap in laps]
    first, _, third = statistics.quantiles(both, n=4)
    return measured._replace(
        forward_ms=statistics.median(lap[0] for lap in laps),
        backward_ms=statistics.median(lap[1] for lap in laps),
        both_ms=statistics.median(both),
        spread_ms=third - first,
        turns=len(laps),
    )


def versions() -> dict[str, str | None]:
    """Of what was used."""
    import triton  # noqa: PLC0415

    return {"triton": triton.__version__, "cuda": torch.version.cuda} | rivals.versions()


def backend(device: torch.device) -> str:
    """Which of sgp's two implementations ran."""
    return "kernels" if device.type == "cuda" else f"PyTorch operators (sgp {sgp.__version__})"

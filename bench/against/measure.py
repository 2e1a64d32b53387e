"""Time, memory and error of a rival on a case, beside what the machine itself can do.

Times: rivals take turns, in another order each time, so that a machine that slows down slows down
all of them; each turn is forward, then backward, from the same leaves, after the caches have been
emptied. On a GPU events time it, on a CPU the wall clock. The first turn is not counted. What is
given are medians, and half of the distance between the quartiles.

Memory: the most bytes held at one time beyond the case's inputs and the gradients of hidden states
and weight, which every rival has to return.

Error: right.py. Who is wrong is not timed.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.against import cases, right, rivals
from bench.against.cases import Case, Problem
from bench.against.machine import Clock
from bench.against.right import Errors
from bench.against.rivals import Rival
from sgp.train.memory import cpu_peak

FEWEST, MOST = 5, 25  # turns that are counted
FEWEST_SLOW = 2  # of a rival whose single turn takes longer than all turns are meant to
SINK = 1 << 28  # bytes that a copy is made into, part by part


class Measured(NamedTuple):
    """One rival on one case."""

    rival: str
    status: str  # "ok", or why there are no times
    forward_ms: float | None = None
    backward_ms: float | None = None
    both_ms: float | None = None
    spread_ms: float | None = None  # of both: half of third quartile less first
    turns: int = 0
    memory_bytes: int | None = None
    loss_error: float | None = None
    gradient_error: float | None = None


# -- bounds ----------------------------------------------------------------------------------------


def compulsory_bytes(case: Case) -> float:
    """What the row kernel must move at least.

    Kept logits are read and the gradient of all is written; log-probabilities, whose upstream
    gradient is not known in forward, read the kept logits a second time.
    """
    reads = 2 if case.form == "log-probs" else 1
    return (1 + reads * case.kept) * case.N * case.model.V * case.itemsize


class Bound(NamedTuple):
    """What the machine takes for the least work: `share` of the fastest turn of `work`."""

    work: Callable[[], Any]
    share: float


def bound_of(problem: Problem) -> Bound:
    """Bytes at a copy's speed, or the matmuls.

    From logits: `compulsory_bytes` at the speed of a copy of the logits, which reads and writes
    each once. With a head: logits, `d_hidden` and `d_weight` of the kept rows, the teacher's logits
    where there is one, and nothing else, by PyTorch's own matmul.
    """
    if problem.logits is not None:
        source = problem.logits.detach()
        rows = max(1, SINK // (source.shape[1] * source.element_size()))
        sink = torch.empty_like(source[:rows])

        def copy() -> None:
            for part in source.split(rows):
                sink[: len(part)].copy_(part)

        return Bound(copy, compulsory_bytes(problem.case) / (2 * source.nbytes))
    assert problem.hidden is not None and problem.weight is not None, "a head"  # noqa: S101, PT018
    hidden, weight = problem.hidden.detach()[problem.rows], problem.weight.detach()
    logits = hidden @ weight.t()
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    theirs = None
    if problem.teacher is not None and problem.teacher_weight is not None:
        theirs = problem.teacher[problem.rows], problem.teacher_weight.t()

    def matmuls() -> None:
        if theirs is not None:
            torch.mm(*theirs, out=logits)
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits.t(), hidden, out=d_weight)
        torch.mm(logits, weight, out=d_hidden)

    return Bound(matmuls, 1.0)


# -- rivals ----------------------------------------------------------------------------------------


def run(rival: Rival, problem: Problem, clock: Clock | None = None) -> tuple[Tensor, ...]:
    """Loss and gradients of the leaves."""
    p = problem.fresh() if rival.overwrites else problem
    leaves = p.leaves
    p = entered(rival, p)
    if clock is not None:
        clock.start()
    loss = rival.loss(p)
    if clock is not None:
        clock.lap()
    gradients = torch.autograd.grad(loss, leaves)
    if clock is not None:
        clock.lap()
    return loss.detach(), *gradients


def entered(rival: Rival, p: Problem) -> Problem:
    """What the rival is given: in place acts on what is not a leaf, with the leaf's gradient."""
    return p._replace(logits=_Untouched.apply(p.logits)) if rival.overwrites else p


class _Untouched(torch.autograd.Function):
    """The same memory as a tensor that is not a leaf, without a kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return gradient


class Small(NamedTuple):
    """A few rows of a case, and what their outcome may be apart from the truth."""

    problem: Problem
    true: tuple[Tensor, ...]
    allowed: dict[bool, Errors]  # of a library; and (True) of sgp, whose limit is PyTorch's error


def small(case: Case, device: torch.device) -> Small:
    """Its truth in float64, and PyTorch's own errors."""
    problem = cases.make(case, device, rows=min(case.N, right.ROWS))
    true, most = right.truth(problem), right.ALLOWED[case.dtype]
    plain = Rival(rivals.BASELINE, case.form, rivals.PLAIN[case.form])
    ours = right.no_worse(right.errors(run(plain, problem), true), case)
    return Small(problem, true, {False: Errors(most, most), True: ours})


def check(case: Case, contestants: list[Rival], device: torch.device) -> dict[str, Measured]:
    """Everybody's errors on a few rows, and who cannot run, fails or is wrong."""
    return _judge(small(case, device), contestants)


def _judge(rows: Small, contestants: list[Rival]) -> dict[str, Measured]:
    outcome = {}
    for rival in contestants:
        if reason := rival.missing(rows.problem.labels.device):
            outcome[rival.name] = Measured(rival.name, reason)
            continue
        try:
            error = right.errors(_checked(rival, rows.problem), rows.true)
        except Exception as exception:  # noqa: BLE001  (whatever a library raises is its result)
            outcome[rival.name] = Measured(rival.name, failure(exception))
            continue
        outcome[rival.name] = Measured(
            rival.name,
            _verdict(error, rows.allowed[rival.is_ours]),
            loss_error=error.loss,
            gradient_error=error.gradient,
        )
    return outcome


def _checked(rival: Rival, problem: Problem) -> tuple[Tensor, ...]:
    """`run` with NaN in every new tensor, but not where that would compile it once more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a library's own dependencies
        if "compile" in rival.name:
            return run(rival, problem)
        with right.unwritten_is_nan():
            return run(rival, problem)


def _verdict(error: Errors, allowed: Errors) -> str:
    if error.loss <= allowed.loss and error.gradient <= allowed.gradient:
        return "ok"
    name, value, most = next(
        (name, value, most)
        for name, value, most in zip(error._fields, error, allowed, strict=True)
        if not value <= most
    )
    return f"wrong: error {value:.1e} of the {name}, {most:.1e} is allowed"


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
) -> tuple[float, list[Measured]]:
    """(the bound in milliseconds, every rival on a case); about `seconds` of turns."""
    contestants = [r for r in rivals.rivals_of(case.form) if only is None or r.name in only]
    rows = small(case, device)
    found = _judge(rows, contestants)
    # All rows' sums are longer than a few rows', of which PyTorch's error is known.
    allowed = rows.allowed | {True: Errors(*(2.0 * most for most in rows.allowed[True]))}
    del rows
    problem = cases.make(case, device)
    running = [r for r in contestants if found[r.name].status == "ok"]
    field = Field(problem, running, found, allowed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bound = field.take_turns(seconds)
    return bound, [found[r.name] for r in contestants]


class Field:
    """Those who are still running on a case."""

    def __init__(
        self,
        problem: Problem,
        running: list[Rival],
        found: dict[str, Measured],
        allowed: dict[bool, Errors],
    ) -> None:
        self.problem, self.running, self.found, self.allowed = problem, running, found, allowed
        self.clock = Clock(problem.labels.device)
        self.laps: dict[str, list[list[float]]] = {rival.name: [] for rival in running}

    def take_turns(self, seconds: float) -> float:
        """Fill in `found`; the bound in milliseconds."""
        sample = right.sample(self.problem)
        slow = {r.name for r in list(self.running) if self._warm_up(r, sample) > seconds}
        for _ in range(FEWEST_SLOW):
            for rival in [r for r in self.running if r.name in slow]:
                self._attempt(rival, self._lap)
        bound = bound_of(self.problem)
        bounds = []
        start = time.perf_counter()
        for turn in range(1 + MOST):
            if turn > FEWEST and time.perf_counter() - start > seconds:
                break
            bounds.append(self._lap_of_bound(bound))
            quick = [r for r in self.running if r.name not in slow]
            first = turn % max(1, len(quick))
            for rival in (*quick[first:], *quick[:first]):
                self._attempt(rival, self._lap)
            if turn == 0:
                for rival in quick:
                    self.laps[rival.name].clear()
        for rival in self.running:
            self.found[rival.name] = _timed(self.found[rival.name], self.laps[rival.name])
        return bound.share * min(bounds)

    def _warm_up(self, rival: Rival, sample: right.Sample) -> float:
        """Run twice: is it right at this size, and what does it hold; seconds of the second."""
        name, started = rival.name, []

        def step(_: Rival) -> None:
            error = sample.errors(_checked(rival, self.problem))
            verdict = _verdict(error, self.allowed[rival.is_ours])
            started.append(time.perf_counter())
            held = memory(rival, self.problem)
            self.found[name] = self.found[name]._replace(memory_bytes=held, status=verdict)
            if verdict != "ok":
                self.found[name] = self.found[name]._replace(status=f"{verdict} at full size")
                self.running.remove(rival)

        self._attempt(rival, step)
        return time.perf_counter() - started[0] if started else 0.0

    def _attempt(self, rival: Rival, step: Callable[[Rival], None]) -> None:
        """Run the step; a rival that fails is out."""
        try:
            step(rival)
        except Exception as error:  # noqa: BLE001  (whatever a library raises is its result)
            self.found[rival.name] = self.found[rival.name]._replace(status=failure(error))
            self.running.remove(rival)

    def _lap(self, rival: Rival) -> None:
        run(rival, self.problem, self.clock)
        self.laps[rival.name].append(self.clock.laps())

    def _lap_of_bound(self, bound: Bound) -> float:
        self.clock.start()
        bound.work()
        self.clock.lap()
        return self.clock.laps()[0]


def _timed(measured: Measured, laps: list[list[float]]) -> Measured:
    both = [sum(lap) for lap in laps]
    first, _, third = statistics.quantiles(both, n=4, method="inclusive")
    return measured._replace(
        forward_ms=statistics.median(lap[0] for lap in laps),
        backward_ms=statistics.median(lap[1] for lap in laps),
        both_ms=statistics.median(both),
        spread_ms=(third - first) / 2,
        turns=len(laps),
    )

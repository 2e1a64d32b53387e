"""Time, memory and error of a rival on a case, beside what the machine itself can do.

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
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import cases, rivals
from bench.cases import Case, Problem
from bench.machine import Clock
from bench.rivals import Rival
from sgp.tolerance import relative_error
from sgp.train.memory import cpu_peak

ERROR_ROWS = 64
ALLOWED = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}  # relative, of loss and gradient
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


# -- bounds ----------------------------------------------------------------------------------------


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
    running = [r for r in contestants if found[r.name].status == "ok"]
    field = Field(problem, running, found, Clock(device))
    bound = field.take_turns(seconds, most_turns)
    return bound, [found[r.name] for r in contestants]


class Field:
    """Those who are still running on a case."""

    def __init__(
        self, problem: Problem, running: list[Rival], found: dict[str, Measured], clock: Clock
    ) -> None:
        self.problem, self.running, self.found, self.clock = problem, running, found, clock
        self.laps: dict[str, list[list[float]]] = {rival.name: [] for rival in running}

    def take_turns(self, seconds: float, most_turns: int) -> float:
        """Fill in `found`; the bound in milliseconds."""
        for rival in list(self.running):
            held = self.attempt(rival, lambda rival=rival: _warm_up(rival, self.problem))
            self.found[rival.name] = self.found[rival.name]._replace(memory_bytes=held)
            if self.problem.labels.is_cuda:
                torch.cuda.empty_cache()
        bound = bound_of(self.problem)
        bound.work()
        bounds: list[float] = []
        start = time.perf_counter()
        for turn in range(most_turns):
            if turn >= 3 and time.perf_counter() - start > seconds:
                break
            self.clock.start()
            bound.work()
            self.clock.lap()
            bounds += self.clock.laps()
            for rival in list(self.running):
                laps = self.laps[rival.name]
                if turn >= 2 and 1e-3 * sum(laps[-1]) > seconds:
                    continue
                done = self.attempt(rival, lambda rival=rival: self._lap(rival))
                laps += done or []
        for rival in self.running:
            self.found[rival.name] = _timed(self.found[rival.name], self.laps[rival.name])
        return bound.share * statistics.median(bounds)

    def attempt(self, rival: Rival, step: Callable[[], Any]) -> Any:
        """The step's value; a rival that fails is out."""
        try:
            return step()
        except Exception as error:  # noqa: BLE001  (whatever a library raises is its result)
            self.found[rival.name] = Measured(rival.name, failure(error))
            self.running.remove(rival)
            return None

    def _lap(self, rival: Rival) -> list[list[float]]:
        run(rival, self.problem, self.clock)
        return [self.clock.laps()]


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

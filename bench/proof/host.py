"""What a call costs the host: one thread's time until the last kernel is on its way.

    python -m bench host              # every call, in turns; table and results file
    python -m bench host --quick      # fewer rounds and no torch.compile: the table alone, unless
                                      # --output names a file
    python -m bench host --only mean  # the calls whose names contain a word, beside Least

Small batches, evaluation and reinforcement learning wait for Python, not for the GPU. The unit is
`Least` (least.py): one launch for loss and gradient, one for the upstream factor, and no more
operators than a mean takes. Every figure of one run is made in turns with the others; `x Least` is
the median over the rounds of a call's time to that of Least, forward and backward, in the same
round. `budget` is what we allow ourselves.

Without a GPU the tensors are on the CPU and the driver is one that does nothing (standin.py): all
that Python and Triton do for a launch is there, kernels compiled for an H100, and what is counted
is the thread's own CPU time. PyTorch's operators do their work on the CPU, which a GPU would do by
itself, so the tensors are small. On a GPU the same calls are timed by the wall clock, from an idle
GPU until everything is enqueued. Figures of the two kinds are not comparable; ratios nearly are.
"""

from __future__ import annotations

import argparse
import datetime as dt
import functools
import gc
import importlib.util
import json
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from bench import files, tables
from bench.against import machine
from bench.against.measure import failure
from bench.proof import standin

RESULTS = files.RESULTS
N, V, D = 64, 64, 16  # rows, vocabulary, width of the hidden states: see above
ROUNDS, CALLS = 25, 40  # rounds that are counted, calls of a kind in each
QUICK = (5, 10)
LEAST = "Least"
PLAIN_COMPILED = "F.cross_entropy, inductor"
BACKENDS = ("aot_eager", "inductor")  # of torch.compile
STANDIN = "CPU tensors and a driver that does nothing; one thread's CPU time"
GPU = "a GPU, idle at first; wall time until everything is enqueued"


class Batch(NamedTuple):
    """What the calls are given; half of the rows carry loss."""

    logits: Tensor  # (N, V) bf16
    target: Tensor  # (N,)
    hidden: Tensor  # (N, D) bf16
    weight: Tensor  # (V, D) bf16
    selection: Any

    @staticmethod
    def make(device: torch.device) -> Batch:
        """The same on any device."""
        import sgp  # noqa: PLC0415  (after the stand-in)

        def leaf(*shape: int) -> Tensor:
            return torch.randn(*shape).to(device, torch.bfloat16).requires_grad_()

        torch.manual_seed(0)
        target = torch.randint(V, (N,))
        target[::2] = -100
        selection = sgp.Selection.from_labels(target).to(device)
        return Batch(leaf(N, V), target.to(device), leaf(N, D), leaf(V, D), selection)


class Call(NamedTuple):
    """One way to a loss."""

    name: str
    forward: Callable[[Batch], Tensor]
    budget: float | None = None  # times Least, forward and backward
    head: bool = False  # gradients of hidden states and weight, not of logits

    @property
    def is_compiled(self) -> bool:
        """Whether torch.compile has had it."""
        return self.name.endswith(BACKENDS)

    def both(self, batch: Batch) -> None:
        """Forward and backward."""
        out = self.forward(batch)
        leaves = (batch.hidden, batch.weight) if self.head else (batch.logits,)
        torch.autograd.grad(out.sum() if out.dim() else out, leaves)


class Timed(NamedTuple):
    """What a call took, in microseconds."""

    call: str
    status: str  # "ok", or why there are no times
    forward_us: float | None = None
    forward_least_us: float | None = None  # of the rounds
    both_us: float | None = None
    both_least_us: float | None = None
    forward_ratio: float | None = None  # to Least with backward
    ratio: float | None = None
    budget: float | None = None


# -- calls -----------------------------------------------------------------------------------------


def _least(b: Batch) -> Tensor:
    from bench.against.least import Least  # noqa: PLC0415  (imports Triton)

    found: Tensor = Least.apply(b.logits, b.target)
    return found


@functools.cache
def _liger_module(device: str) -> Any:
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # of other devices' kernels
    from liger_kernel.ops import cross_entropy  # noqa: PLC0415
    from liger_kernel.transformers import LigerCrossEntropyLoss  # noqa: PLC0415

    if device == "cpu":  # it asks PyTorch which GPU this is
        cross_entropy.infer_device_arch = lambda: "hopper"
    return LigerCrossEntropyLoss()


def _liger(b: Batch) -> Tensor:
    found: Tensor = _liger_module(b.logits.device.type)(b.logits, b.target)
    return found


@functools.cache
def _compiled_mean(backend: str) -> Any:
    import sgp  # noqa: PLC0415

    torch._dynamo.reset()  # noqa: SLF001
    return torch.compile(sgp.cross_entropy, backend=backend, fullgraph=True)


def _compiled(backend: str, b: Batch) -> Tensor:
    found: Tensor = _compiled_mean(backend)(b.logits, b.target)
    return found


@functools.cache
def _compiled_plain() -> Any:
    return torch.compile(lambda x, y: F.cross_entropy(x.float(), y), fullgraph=True)


def _plain_by_inductor(b: Batch) -> Tensor:
    found: Tensor = _compiled_plain()(b.logits, b.target)
    return found


def calls() -> list[Call]:
    """All of them, Least first."""
    import sgp  # noqa: PLC0415

    ce, log_probs = sgp.cross_entropy, sgp.token_log_probs
    linear_ce, linear_log_probs = sgp.linear_cross_entropy, sgp.linear_token_log_probs
    return [
        Call(LEAST, _least),
        Call("F.cross_entropy", lambda b: F.cross_entropy(b.logits.float(), b.target)),
        Call("Liger", _liger),
        Call("mean", lambda b: ce(b.logits, b.target), 1.5),
        Call("mean, a denominator", lambda b: ce(b.logits, b.target, denominator=32.0), 1.5),
        Call("sum", lambda b: ce(b.logits, b.target, reduction="sum"), 1.25),
        Call("none", lambda b: ce(b.logits, b.target, reduction="none")),
        Call("token_log_probs", lambda b: log_probs(b.logits, b.target).log_prob, 1.5),
        *(Call(f"mean, {name}", functools.partial(_compiled, name)) for name in BACKENDS),
        Call(PLAIN_COMPILED, _plain_by_inductor),
        Call(
            "F, head and loss",
            lambda b: F.cross_entropy(F.linear(b.hidden, b.weight).float(), b.target),
            head=True,
        ),
        Call(
            "linear_cross_entropy",
            lambda b: linear_ce(b.hidden, b.weight, b.selection),
            4.0,
            head=True,
        ),
        Call(
            "linear_token_log_probs",
            lambda b: linear_log_probs(b.hidden, b.weight, b.selection).log_prob,
            head=True,
        ),
        Call(
            "linear_loss",
            lambda b: sgp.linear_loss(b.hidden, b.weight, b.selection, lambda t, _: -t.log_prob),
            head=True,
        ),
    ]


# -- times -----------------------------------------------------------------------------------------


def _clock(device: torch.device) -> Callable[[], int]:
    """Nanoseconds: of this thread, or of the wall."""
    return time.perf_counter_ns if device.type == "cuda" else time.thread_time_ns


def microseconds(run: Callable[[], object], count: int, device: torch.device) -> float:
    """Of one of `count` calls; a GPU has nothing to do when they begin."""
    clock = _clock(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    for _ in range(count):
        run()
    return (clock() - start) / count / 1e3


def attempt(call: Call, batch: Batch) -> str:
    """Run a call until it is warm; "ok", or why it cannot run."""
    if call.name == "Liger" and importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    try:
        for _ in range(10):
            call.forward(batch)
            call.both(batch)
    except Exception as error:  # noqa: BLE001  (whatever a library raises is its result)
        return failure(error)
    return "ok"


def measure(chosen: list[Call], batch: Batch, rounds: int, count: int) -> list[Timed]:
    """Every call, forward and both, in turns that begin with another one each time."""
    device = batch.logits.device
    status = {call.name: attempt(call, batch) for call in chosen}
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for call in chosen:
        if status[call.name] == "ok":
            runs[call.name, "forward"] = functools.partial(call.forward, batch)
            runs[call.name, "both"] = functools.partial(call.both, batch)
    laps: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    order = list(runs)
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % max(1, len(order))
            for key in (*order[first:], *order[:first]):
                laps[key].append(microseconds(runs[key], count, device))
    finally:
        gc.enable()
    return [_timed(call, status[call.name], laps) for call in chosen]


def _timed(call: Call, status: str, laps: dict[tuple[str, str], list[float]]) -> Timed:
    if status != "ok":
        return Timed(call.name, status, budget=call.budget)
    forward, both = laps[call.name, "forward"], laps[call.name, "both"]
    unit = laps.get((LEAST, "both"))

    def to_least(times: list[float]) -> float | None:
        return statistics.median(map(float.__truediv__, times, unit)) if unit else None

    median = statistics.median
    return Timed(
        call.name, status, median(forward), min(forward), median(both), min(both),
        to_least(forward), to_least(both), call.budget,
    )  # fmt: skip


def with_eager(timed: list[Timed]) -> list[Timed]:
    """What inductor compiled gets eager's ratio as its budget: to be no slower than that.

    aot_eager, which is for finding faults, shows what the compiled operators cost by themselves.
    """
    eager = next((t.ratio for t in timed if t.call == "mean"), None)
    return [t._replace(budget=eager) if t.call == "mean, inductor" else t for t in timed]


# -- the command -----------------------------------------------------------------------------------


def table_of(timed: list[Timed], title: str, how: str) -> Table:
    """One line a call; beneath it who has no times, and why."""
    notes = [
        f"Measured on {how}.",
        "x Least: the median over the rounds of a call's time to that of Least with",
        "backward in the same round. Over the budget is said, and is no failure.",
    ]
    if any(t.call.endswith(BACKENDS) for t in timed):
        notes.append("aot_eager and inductor: torch.compile of it; on a CPU inductor's code for")
        notes.append("F.cross_entropy does the work itself")
    notes += [f"{t.call}: {t.status}" for t in timed if t.status != "ok"]
    headings = [
        "forward\nus",
        "both\nus",
        "best\nround",
        "forward\nx Least",
        "both\nx Least",
        "budget",
    ]
    table = tables.make(title, ["call"], headings, notes="\n".join(notes))
    for t in timed:
        if t.both_us is None:
            continue
        values = (t.forward_us, t.both_us, t.both_least_us)
        over = " over" if t.budget and t.ratio and round(t.ratio, 2) > round(t.budget, 2) else ""
        table.add_row(
            t.call,
            *("" if value is None else f"{value:.0f}" for value in values),
            *("" if ratio is None else f"{ratio:.2f}" for ratio in (t.forward_ratio, t.ratio)),
            "" if t.budget is None else f"{t.budget:.2f}{over}",
        )
    return table


def write(path: Path, header: dict[str, Any], timed: list[Timed]) -> None:
    """The results file, one call a line."""
    lines = ",\n".join(json.dumps(t._asdict()) for t in timed)
    files.replace(path, f'{json.dumps(header)[:-1]}, "calls": [\n{lines}\n]}}\n')


def _prepare() -> torch.device:
    """The GPU, or a stand-in for it.

    Raises:
        SystemExit: if there can be none.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if reason := standin.obstacle():
        sys.exit(f"bench host: there is no GPU here, and no stand-in for one: {reason}")
    standin.install()
    return torch.device("cpu")


def main() -> int:
    """Measure, print, write; 1 if a call of sgp's failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench host",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="see above")
    parser.add_argument("--rounds", type=int, metavar="ROUNDS", help=f"({ROUNDS})")
    parser.add_argument("--only", metavar="WORD", help="calls whose names contain it")
    parser.add_argument("--output", type=Path, help="results file (default: bench/results/)")
    arguments = parser.parse_args()
    found = machine.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    today = dt.datetime.now(dt.timezone.utc).date().isoformat()
    output = arguments.output
    if output is None and not (arguments.quick or arguments.only or arguments.rounds):
        output = RESULTS / f"host-{found.slug}-{today}.json"
    if output is not None:
        files.must_be_writable(output)
    device = _prepare()
    torch.set_num_threads(1)
    rounds, count = QUICK if arguments.quick else (ROUNDS, CALLS)
    rounds = arguments.rounds or rounds
    chosen = [
        call
        for call in calls()
        if call.name == LEAST
        or ((arguments.only or "") in call.name and not (call.is_compiled and arguments.quick))
    ]
    if arguments.only and len(chosen) == 1 and arguments.only not in LEAST:
        names = ", ".join(call.name for call in calls())
        parser.error(f"--only {arguments.only}: no call has it in its name; there are {names}")
    how = GPU if device.type == "cuda" else STANDIN
    versions = machine.versions()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a library's own dependencies
        timed = with_eager(measure(chosen, Batch.make(device), rounds, count))
    title = (
        f"Host time of a call on {found.name} ({found.cpu or found.platform}), "
        f"torch {versions['torch']}, Triton {versions['triton']}"
    )
    Console().print(table_of(timed, title, how))
    if output is not None:
        header = {
            "machine": found._asdict(),
            "date": today,
            "commit": machine.commit(),
            "load": os.getloadavg()[0],  # of all processes, 1 min
            "sgp": machine.settings(device),
            "versions": versions,
            "how": how,
            "size": {"N": N, "V": V, "D": D, "dtype": "bfloat16"},
            "rounds": rounds,
            "calls_a_round": count,
        }
        write(output, header, timed)
        print(f"written: {output}")
    # Inductor wants a C++ compiler where there is no GPU.
    theirs = ("Liger", "F.cross_entropy", "F, head and loss", "mean, inductor", PLAIN_COMPILED)
    failed = [t for t in timed if t.status != "ok" and t.call not in theirs]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

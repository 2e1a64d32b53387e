"""What `python -m bench gpu` measures, phase by phase; each runs in a process of its own."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import sgp
from bench.against import cases, machine, measure, right, rivals
from bench.against.cases import Case, Model
from bench.against.least import Least
from bench.against.rivals import Rival
from bench.gpu import lines
from sgp import tolerance
from sgp.commands import verify, verify_cases
from sgp.kernels import launch, table
from sgp.kernels.table import Line

TINY = Model("tiny", 512, 32)
TRIALS = (  # the row kernel: V, data
    *((V, "bf16") for V in lines.VOCABULARIES),
    *((V, "head") for V in (151_936, 128_256, 32_000)),
    (50_257, "bf16"),  # rows that begin and end between two accesses
    (128_256, "fp32"),
)
LOGITS = ("sgp", "sgp, in place", "PyTorch, all rows", "torch.compile", "Liger", "quack")
LINEAR = (
    "sgp",
    "sgp, small budget",
    "PyTorch, all rows",
    "torch.compile",
    "Liger",
    "cut-cross-entropy",
    "quack",
)
LOG_PROBS = (
    "sgp", "sgp, logits held", "sgp, log-probs first", rivals.BASELINE, "torch.compile", "TRL",
    "Liger",
)  # fmt: skip
SLOW_TO_START = ("torch.compile", "TRL", "Liger, chunked")  # a dry run is without them
QUICK_TO_START = ("sgp", "least", "PyTorch")
HOSTED = {  # whose own time counts
    "logits": LOGITS,
    "linear": ("sgp", "PyTorch, all rows", "Liger", "cut-cross-entropy"),
    "log-probs": ("sgp", rivals.BASELINE),
}
LOOPED = ("sgp", "Liger", "quack", "torch.compile", "PyTorch, all rows")


class Phase:
    """Where a phase runs, how long it may, and the file its records go to, each at once."""

    def __init__(
        self,
        name: str,
        path: Path,
        *,
        seconds: float,
        dry: bool,
        cubins: Path | None = None,
        began: float | None = None,  # by time.time(), when its process was started
    ) -> None:
        self.name, self.path, self.dry, self.cubins = name, path, dry, cubins
        self.device = torch.device("cpu" if dry else "cuda")
        # After that nothing new is begun.
        self.until = (time.time() if began is None else began) + 0.85 * seconds
        self._clock: machine.Clock | None = None

    @property
    def is_late(self) -> bool:
        """Whether what is still to do is to be named, and not begun."""
        return time.time() > self.until

    def skips(self, name: str, **values: Any) -> bool:
        """Whether it is late; then what is not begun is recorded."""
        is_late = self.is_late
        if is_late:
            self.record(name, ok=None, status="not run: the phase's time was spent", **values)
        return is_late

    @property
    def clock(self) -> machine.Clock:
        """One for the phase: it holds what empties the caches."""
        self._clock = self._clock or machine.Clock(self.device)
        return self._clock

    def record(self, name: str, *, ok: bool | None, **values: Any) -> None:
        """A line of the file, and of what is shown. None: not right or wrong, or not run."""
        found = {"phase": self.name, "name": name, "ok": ok} | values
        append(self.path, found)
        print({False: "NOT RIGHT ", True: "", None: ""}[ok] + words(found), flush=True)

    def attempt(
        self, name: str, step: Callable[[], dict[str, Any]], *, ours: bool = True, **values: Any
    ) -> None:
        """Record what the step returns, or what it raises; the phase ends if the GPU is lost."""
        if self.skips(name, **values):
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a library's own dependencies
                found = {"ok": True} | step()
        except Exception as error:  # noqa: BLE001  (whatever it is, the others go on)
            found = {"ok": False if ours else None, "status": measure.failure(error)}
        self.record(name, **(values | found))
        self.must_answer(name)

    def must_answer(self, name: str) -> None:
        """After an illegal access every later call of this process would fail.

        Raises:
            SystemExit: if the GPU answers nothing any more.
        """
        if not verify.answers(self.device):
            raise SystemExit(f"{name}: afterwards the GPU answers nothing; {self.name} ends")

    def timed(self, run: Callable[[], Any], seconds: float = 0.12) -> dict[str, Any]:
        """Median and half of the quartiles' distance, in milliseconds, caches emptied before."""
        least, most = (2, 2) if self.dry else (5, 20)
        if not self.dry:
            run()
        laps: list[float] = []
        start = time.monotonic()
        while len(laps) < least or (len(laps) < most and time.monotonic() - start < seconds):
            self.clock.start()
            run()
            self.clock.lap()
            laps += self.clock.laps()
        first, middle, third = statistics.quantiles(laps, n=4, method="inclusive")
        return {"ms": middle, "spread_ms": (third - first) / 2, "turns": len(laps)}

    def compare(self, case: Case, names: tuple[str, ...], seconds: float) -> None:
        """Every named rival on a case, in turns: right first, then time and memory."""
        if self.skips(case.name, **described(case)):
            return
        only = [rival.name for rival in _field(self, case.form, names)]
        seconds = 0.0 if self.dry else seconds
        if not self.dry:
            torch.cuda.empty_cache()
        try:
            bound, found = measure.measure(case, self.device, seconds=seconds, only=only)
        except Exception as error:  # noqa: BLE001  (of the case itself)
            self.record(case.name, ok=None, status=measure.failure(error), **described(case))
        else:
            for m in found:
                rival, *rest = m._asdict().items()
                ok = verdict(m.status, ours=m.rival.startswith("sgp"))
                self.record(rival[1], ok=ok, **described(case), bound_ms=bound, **dict(rest))
        self.must_answer(case.name)


def _field(phase: Phase, form: str, names: tuple[str, ...]) -> list[Rival]:
    """Those of the rivals who are named; in a dry run without the slow ones."""
    return [
        rival
        for rival in rivals.rivals_of(form)
        if rival.name in names and not (phase.dry and rival.name in SLOW_TO_START)
    ]


def append(path: Path, found: dict[str, Any]) -> None:
    """One more line of JSON, on disk before this returns."""
    plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
             for k, v in found.items()}  # fmt: skip
    with path.open("a") as file:
        file.write(json.dumps(plain, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())


def words(found: dict[str, Any]) -> str:
    """A record for those who watch."""
    left_out = ("phase", "name", "ok", "line", "turns", "model", "bound_ms")
    values = ((k, v) for k, v in found.items() if k not in left_out and v is not None)
    shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values)
    return f"{found['phase']:8} {found['name']}: {shown}".rstrip(": ")


def verdict(status: str, *, ours: bool) -> bool | None:
    """Right, not right, or None: who is missing, or a library that fails, says nothing of us."""
    if status == "ok":
        return True
    if status.startswith("wrong"):
        return False
    missing = status.endswith("is not installed") or status == "needs a GPU"
    return False if ours and not missing else None


def described(case: Case) -> dict[str, Any]:
    """What was measured, for a record."""
    sizes = {"form": case.form, "model": case.model.name, "V": case.model.V, "N": case.N}
    if case.has_head:
        sizes["D"] = case.model.D
    return sizes | {"kept": case.kept, "pattern": case.pattern, "dtype": case.dtype}


# -- phases ----------------------------------------------------------------------------------------


def env(phase: Phase) -> None:
    """The card, what it reaches, and what sgp chooses on it."""
    found: dict[str, Any] = {}
    if not phase.dry:
        p = torch.cuda.get_device_properties(0)
        found = {"multiprocessors": p.multi_processor_count, "memory_bytes": p.total_memory}
        found |= {"l2_bytes": p.L2_cache_size}
    phase.record("machine", ok=True, target=str(table.target_of(phase.device)), **found)
    phase.record("roofs", ok=True, **machine.roofs(phase.device)._asdict())


def smoke(phase: Phase) -> None:
    """First calls: each way to call, each dtype, and what only a GPU can get wrong."""
    V, odd, long = (64, 57, 96) if phase.dry else (32_000, 50_257, 128_256)
    forward = "loss and gradient in one launch"
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    for path, dtype, columns, options in (
        *((forward, dtype, V, "plain") for dtype in (bf16, f16, f32)),
        (forward, bf16, odd, "all"),
        (forward, bf16, long, "plain"),
        (forward, f32, 1, "plain"),
        ("upstream factor 3", bf16, 1_000, "all"),
        ("in place", bf16, V, "plain"),
        ("vocabulary strided", bf16, V, "plain"),
        ("linear head", bf16, V, "plain"),
        ("linear head", f16, V, "plain"),
        ("linear head, a factor for each row", f16, V, "plain"),
        ("log-probabilities of a linear head", bf16, V, "all"),
    ):
        verify_one(phase, verify_cases.Case(path, dtype, columns, 0.25, options))
    phase.attempt("no rows", lambda: _no_rows(phase.device, V))
    phase.attempt("a target outside is NaN", lambda: _outside(phase, V))
    phase.attempt("same bits again", lambda: _same_bits(phase, V))
    phase.attempt("torch.compile", lambda: _compiled(phase, V))
    if not phase.dry:
        phase.attempt("CUDA graph", lambda: _graph(phase.device, V))
        phase.attempt("offsets above 2^31", lambda: _far(phase.device))


def verify_one(phase: Phase, case: verify_cases.Case) -> None:
    """Record a case of `sgp verify`."""
    outcome = verify_cases.attempt(case, phase.device)
    found = verify.as_record(outcome)
    del found["path"], found["passed"]
    if status := found.pop("raised"):
        found["status"] = f"fails: {status}"
    elif not outcome.passed:
        found["status"] = "wrong: less right than PyTorch in the same dtype"
    phase.record(case.path, ok=outcome.passed, **found)
    phase.must_answer(case.path)


def _random(N: int, V: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """bf16 logits (N, V) that take a gradient, and targets, every second ignored."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(N, V, device=device, dtype=torch.bfloat16, generator=generator)
    y = torch.randint(V, (N,), device=device, generator=generator)
    y[::2] = -100
    return x.requires_grad_(), y


def _against_float64(loss: Tensor, gradient: Tensor, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Errors of a mean loss and its gradient, and PyTorch's where x has the same dtype."""
    exact = x.detach().double().requires_grad_()
    truth = F.cross_entropy(exact, y)
    (true,) = torch.autograd.grad(truth, exact)
    errors = [tolerance.relative_error(a, b) for a, b in ((loss, truth), (gradient, true))]
    allowed = [tolerance.bound(0.0, dtype) for dtype in (torch.float32, x.dtype)]
    ok = all(error <= most for error, most in zip(errors, allowed, strict=True))
    status = "ok" if ok else f"wrong: {errors} where {allowed} are allowed"
    return {"loss": errors[0], "gradient": errors[1], "ok": ok, "status": status}


def _no_rows(device: torch.device, V: int) -> dict[str, Any]:
    x = torch.empty(0, V, device=device, dtype=torch.bfloat16, requires_grad=True)
    loss = sgp.cross_entropy(x, torch.empty(0, dtype=torch.long, device=device))
    loss.backward()
    return {"ok": float(loss) == 0.0}


def _outside(phase: Phase, V: int) -> dict[str, Any]:
    """On a GPU that row is NaN; a CPU raises."""
    x, y = _random(8, V, phase.device)
    y[1] = V
    if phase.dry:
        try:
            sgp.cross_entropy(x, y)
        except (ValueError, IndexError) as error:
            return {"ok": "outside" in str(error)}
        return {"ok": False, "status": "wrong: a target outside was taken"}
    loss = sgp.cross_entropy(x, y, reduction="none")
    return {"ok": bool(loss[1].isnan()) and not bool(loss[3:].isnan().any())}


def _same_bits(phase: Phase, V: int) -> dict[str, Any]:
    """The same call, alone and beside other work on another stream."""
    x, y = _random(16 if phase.dry else 2_048, V, phase.device)
    seen = []
    for turn in range(6):
        if turn > 2 and not phase.dry:
            with torch.cuda.stream(torch.cuda.Stream()):
                other = torch.randn(4_096, 4_096, device=phase.device)
                other @ other
        loss = sgp.cross_entropy(x, y)
        seen.append((loss.detach(), *torch.autograd.grad(loss, x)))
    same = all(torch.equal(a, b) for each in seen for a, b in zip(each, seen[0], strict=True))
    return {"ok": same, "status": "ok" if same else "wrong: other bits"}


def _compiled(phase: Phase, V: int) -> dict[str, Any]:
    x, y = _random(64, V, phase.device)
    function = torch.compile(
        lambda a, b: sgp.cross_entropy(a * 1.0, b),
        fullgraph=True,
        backend="aot_eager" if phase.dry else "inductor",
    )
    loss = function(x, y)
    return _against_float64(loss, *torch.autograd.grad(loss, x), x, y)


def _graph(device: torch.device, V: int) -> dict[str, Any]:
    """Captured once, replayed on other numbers."""
    x, y = _random(256, V, device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            sgp.cross_entropy(x, y).backward()
            x.grad = None
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = sgp.cross_entropy(x, y)
        loss.backward()
    with torch.no_grad():
        x.normal_()
    graph.replay()
    assert x.grad is not None, "captured"  # noqa: S101
    return _against_float64(loss, x.grad, x, y)


def _far(device: torch.device) -> dict[str, Any]:
    """A matrix of more than 2^31 elements, its last rows and columns among those compared."""
    N, V = 16_384, 151_936
    p = lines.problem(N, V, "bf16", 0.5, device)
    p.target[-2] = V - 1
    x = p.logits.requires_grad_()
    with right.unwritten_is_nan():
        loss = sgp.cross_entropy(x, p.target, reduction="none")
        (gradient,) = torch.autograd.grad(loss, x, p.scale.expand_as(loss))
    x.requires_grad_(requires_grad=False)
    return lines.Trial(p).judge(loss.detach(), gradient)._asdict()


def rows(phase: Phase) -> None:
    """The row kernel by the table's line, and other libraries' kernels, beside a copy."""
    speed = machine.copy_bytes_per_s(phase.device) / 1e3
    phase.record("copy", ok=None, bytes_per_ms=speed)
    on = _target(phase)
    for V, data in _trials(phase):
        line = table.choose(lines.row_of(V, data), on, "auto")
        for kept in (1.0,) if data == "head" else (1.0, 0.25):
            _launches(phase, V, data, kept, [line], speed)
    for V, data in _trials(phase):
        for rival, kernel in rivals.KERNELS if data == "bf16" else ():
            _kernel_of(phase, rival, kernel, V, speed)


def _target(phase: Phase) -> table.Target:
    """What is launched here; with ready-made cubins, what the Triton that made them can do."""
    here = table.target_of(phase.device)
    return here if phase.cubins is None else here._replace(triton=(3, 9))


def _trials(phase: Phase) -> tuple[tuple[int, str], ...]:
    return ((96, "bf16"), (64, "head")) if phase.dry else TRIALS


def _launches(
    phase: Phase, V: int, data: str, kept: float, field: list[Line], speed: float
) -> None:
    """Check, then time each line on one problem."""
    N = 4 if phase.dry else 4_096 if data == "head" else 8_192
    size = {"V": V, "N": N, "data": data, "kept": kept}
    if phase.is_late:
        phase.attempt(f"{len(field)} lines", dict, **size)
        return
    on = _target(phase)
    p = lines.problem(N, V, data, kept, phase.device)
    trial = lines.Trial(p, interpreted=launch.runs_interpreted())
    scored = float((p.target != lines.IGNORE).double().mean())
    floor = N * V * (p.logits.itemsize * scored + p.gradient.itemsize)

    def step(line: Line) -> dict[str, Any]:
        run = lines.runner(line, p, on, data, phase.cubins)
        outcome = trial.check(run)
        found = outcome._asdict() | {"ok": outcome.ok}
        if outcome.ok:
            found |= phase.timed(run)
            found["of_copy"] = floor / speed / found["ms"]
        return found

    chosen = table.choose(lines.row_of(V, data), on, "auto")
    for line in field:
        values = size | {"source": lines.source(line), "line": line._asdict()}
        name = "sgp" if phase.name == "rows" else line.form
        # Another line than the table's may be one that cannot be compiled; wrong it must not be.
        phase.attempt(name, functools.partial(step, line), ours=line == chosen, **values)


def _kernel_of(phase: Phase, rival: Rival, kernel: str, V: int, speed: float) -> None:
    """The kernel alone of another library's call, by the profiler; checked as a whole call."""
    case = Case("logits", Model(f"V = {V}", V, 1), 64 if phase.dry else 8_192, 1.0)
    size = {"V": V, "N": case.N, "data": "bf16", "kept": 1.0}

    def step() -> dict[str, Any]:
        found = measure.check(case, [rival], phase.device)[rival.name]
        values = {"status": found.status, "loss_error": found.loss_error}
        values |= {"ok": verdict(found.status, ours=False), "gradient_error": found.gradient_error}
        if found.status != "ok":
            return values
        p = cases.make(case, phase.device)
        error = right.sample(p).errors(measure.run(rival, p)).worst
        if not error <= right.ALLOWED[case.dtype]:
            return values | {"ok": False, "status": f"wrong: error {error:.1e} at full size"}
        turns = 7
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(turns):
                phase.clock.start()
                measure.run(rival, p)
            torch.cuda.synchronize()
        us = sum(e.self_device_time_total for e in seen.key_averages() if kernel in e.key)
        if not us:
            return values | {"ok": None, "status": f"no kernel has {kernel!r} in its name"}
        ms = us / turns / 1e3
        return values | {"ms": ms, "of_copy": case.N * V * 4 / speed / ms, "turns": turns}

    phase.attempt(rival.name, step, ours=False, **size)


def sweep(phase: Phase) -> None:
    """Lines that could take the place of the table's, the likeliest of each size first."""
    speed = machine.copy_bytes_per_s(phase.device) / 1e3
    phase.record("copy", ok=None, bytes_per_ms=speed)
    on = _target(phase)
    for V, data in _trials(phase):
        field = lines.candidates(lines.row_of(V, data), on)
        _launches(phase, V, data, 1.0, field[: 3 if phase.dry else None], speed)


def calls(phase: Phase) -> None:
    """Whole calls from logits, forward and backward."""
    for case in _cases(phase, "logits", (cases.QWEN_3, cases.LLAMA_2, cases.LLAMA_3)):
        phase.compare(case, LOGITS, seconds=0.8)


def head(phase: Phase) -> None:
    """The linear head: time, and memory beyond inputs and gradients."""
    for case in _cases(phase, "linear", (cases.LLAMA_3,)):
        phase.compare(case, LINEAR, seconds=2.0)


def logprobs(phase: Phase) -> None:
    """Log-probabilities from logits and from hidden states."""
    for form, models in (
        ("log-probs", (cases.QWEN_3, cases.LLAMA_2)),
        ("linear log-probs", (cases.QWEN_3,)),
        (cases.OWN, (cases.QWEN_3,)),
    ):
        for case in _cases(phase, form, models):
            phase.compare(case, LOG_PROBS, seconds=0.8)


def _cases(phase: Phase, form: str, models: tuple[Model, ...]) -> Iterator[Case]:
    for model in (TINY,) if phase.dry else models:
        for kept in (1.0, 0.25):
            yield Case(form, model, 64 if phase.dry else 8_192, kept)


LEAST = Rival(
    "least: one Function, one launch each way",
    "logits",
    lambda p: Least.apply(p.logits, p.labels),
    rivals.SGP._replace(gpu_only=True),
)


def host(phase: Phase) -> None:
    """Python's own time of a call, on tensors too small to matter; then calls in a loop.

    sgp and PyTorch first: the others take seconds to start.
    """
    small = TINY if phase.dry else Model("small", 1_024, 64)
    todo = [(Case(form, small, 64, 0.5), names, _host_time) for form, names in HOSTED.items()]
    for V in (512,) if phase.dry else (32_000, 151_936):
        case = Case("logits", Model(f"V = {V}", V, 1), 32 if phase.dry else 8_192, 1.0)
        todo.append((case, LOOPED, _loop))
    for is_first, (case, names, measured) in itertools.product((True, False), todo):
        field = _field(phase, case.form, names)
        if case.form == "logits" and measured is _host_time:
            field.append(LEAST)
        field = [r for r in field if r.name.startswith(QUICK_TO_START) == is_first]
        if not field or phase.skips(case.name, **described(case)):
            continue
        found = measure.check(case, field, phase.device)
        p = cases.make(case, phase.device)
        for rival in field:
            measured(phase, rival, p, found[rival.name].status)
            if rival.overwrites:
                p = cases.make(case, phase.device)


def _both(rival: Rival, p: cases.Problem) -> tuple[Tensor, ...]:
    """Forward and backward as a user's loop has them; who overwrites gets what it left."""
    return torch.autograd.grad(rival.loss(measure.entered(rival, p)), p.leaves)


def _host_time(phase: Phase, rival: Rival, p: cases.Problem, status: str) -> None:
    def step() -> dict[str, Any]:
        if status != "ok":
            return {"ok": verdict(status, ours=rival.is_ours), "status": status}
        forward = _microseconds(phase, lambda: rival.loss(measure.entered(rival, p)))
        return {"forward_us": forward, "both_us": _microseconds(phase, lambda: _both(rival, p))}

    phase.attempt(rival.name, step, ours=rival.is_ours, **described(p.case))


def _microseconds(phase: Phase, run: Callable[[], Any]) -> float:
    """The best of four loops: what a call costs when nothing else disturbs it."""
    calls = 2 if phase.dry else 100
    best = math.inf
    for turn in range(5):
        start = time.perf_counter()
        for _ in range(calls if turn else max(2, calls // 10)):
            run()
        spent = time.perf_counter() - start
        if not phase.dry:
            torch.cuda.synchronize()
        if turn:
            best = min(best, 1e6 * spent / calls)
    return best


def _loop(phase: Phase, rival: Rival, p: cases.Problem, status: str) -> None:
    """Milliseconds a call where nothing waits: the slower of host and GPU."""

    def step() -> dict[str, Any]:
        if status != "ok":
            return {"ok": verdict(status, ours=rival.is_ours), "status": status}
        turns = 2 if phase.dry else 30
        for _ in range(2):
            _both(rival, p)
        if not phase.dry:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(turns):
            _both(rival, p)
        if not phase.dry:
            torch.cuda.synchronize()
        return {"loop_ms": 1e3 * (time.perf_counter() - start) / turns, "turns": turns}

    phase.attempt(f"{rival.name}, in a loop", step, ours=rival.is_ours, **described(p.case))


def train(phase: Phase) -> None:
    """Forward and backward of a small Qwen2: as it is, with sgp's loss, with Liger's."""
    from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: PLC0415  (takes seconds)

    small = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64}
    small |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    half_a_billion = {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4_864}
    half_a_billion |= {"num_hidden_layers": 24, "num_attention_heads": 14}
    half_a_billion |= {"num_key_value_heads": 2, "max_position_embeddings": 4_096}
    sizes = small if phase.dry else half_a_billion
    B, T = (2, 32) if phase.dry else (8, 1_024)
    torch.manual_seed(0)
    with phase.device:
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True)).bfloat16()
        ids = torch.randint(model.config.vocab_size, (B, T))
    step = _Step(phase, model.train(), ids)
    for kept in (1.0, 0.25):
        step.measure("PyTorch", kept, ours=False)
    for mode in ("fused", "rows"):
        try:
            handle = sgp.huggingface.patch(model, mode=mode)
        except sgp.huggingface.UnsupportedModelError as error:
            first = str(error).splitlines()[0]
            phase.record(f"sgp, {mode}", ok=None, status=f"refused: {first}")
            continue
        for kept in (1.0, 0.25):
            step.measure(f"sgp, {mode}", kept, ours=True)
        handle.remove()
    if reason := LIGER_MODEL.missing(phase.device):
        phase.record("Liger", ok=None, status=reason)
        return
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2  # noqa: PLC0415

    apply_liger_kernel_to_qwen2(rope=False, rms_norm=False, swiglu=False, model=model)
    for kept in (1.0, 0.25):
        step.measure("Liger", kept, ours=False)


LIGER_MODEL = Rival("Liger", "linear", rivals.liger_linear, rivals.LIGER)


class _Step:
    """A training step on one model, held to a copy in float64 on a short stretch."""

    def __init__(self, phase: Phase, model: Any, ids: Tensor) -> None:
        self.phase, self.model, self.ids = phase, model, ids
        self.short = ids[:1, :256]
        exact = copy.deepcopy(model).double()
        self.true = self._gradients(exact, self.short)
        del exact
        plain = self._errors(self._gradients(model, self.short))
        most = right.ALLOWED["bfloat16"]
        self.allowed = {  # of another library; and (True) of sgp
            False: tuple(max(most, 2.0 * error) for error in plain),
            True: tuple(tolerance.bound(1.5 * error, torch.bfloat16) for error in plain),
        }

    def _labels(self, ids: Tensor, kept: float) -> Tensor:
        labels = ids.clone()
        labels[:, : round(ids.shape[1] * (1 - kept))] = -100
        return labels

    def _gradients(self, model: Any, ids: Tensor) -> tuple[Tensor, ...]:
        """Of a quarter kept: the loss, and the gradients of some weights, on the CPU."""
        weights = self._weights(model)
        loss = model(input_ids=ids, labels=self._labels(ids, 0.25)).loss
        gradients = torch.autograd.grad(loss, list(weights))
        return loss.detach().cpu(), *(g.flatten().cpu() for g in gradients)

    def _weights(self, model: Any) -> tuple[Tensor, ...]:
        first = model.model.layers[0].self_attn.q_proj.weight
        return first, model.model.norm.weight, model.model.embed_tokens.weight

    def _errors(self, found: tuple[Tensor, ...]) -> tuple[float, ...]:
        return tuple(map(tolerance.relative_error, found, self.true))

    def measure(self, name: str, kept: float, *, ours: bool) -> None:
        """Right on the short stretch, then time and memory."""
        B, T = self.ids.shape
        size = {"model": "Qwen2", "V": self.model.config.vocab_size, "tokens": B * T}
        size |= {"layers": self.model.config.num_hidden_layers, "kept": kept}
        self.phase.attempt(name, lambda: self._timed(kept, ours=ours), ours=ours, **size)

    def _timed(self, kept: float, *, ours: bool) -> dict[str, Any]:
        with right.unwritten_is_nan():
            errors = self._errors(self._gradients(self.model, self.short))
        found: dict[str, Any] = {"loss_error": errors[0], "gradient_error": right.worst(errors[1:])}
        allowed = self.allowed[ours]
        if not all(error <= most for error, most in zip(errors, allowed, strict=True)):
            words = f"wrong: errors {errors}, {allowed} are allowed"
            return found | {"ok": False, "status": words}
        labels = self._labels(self.ids, kept)

        def step() -> Tensor:
            loss: Tensor = self.model(input_ids=self.ids, labels=labels).loss
            loss.backward()
            return loss

        self.model.zero_grad(set_to_none=True)
        loss = float(step().detach())  # and the gradients are there
        if not self.phase.dry:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            found["memory_bytes"] = torch.cuda.max_memory_allocated() - before
        found |= self.phase.timed(step, seconds=1.0)
        self.model.zero_grad(set_to_none=True)
        tokens = self.ids.numel()
        return found | {"loss": loss, "tokens_per_s": 1e3 * tokens / found["ms"]}


def verified(phase: Phase) -> None:
    """As many cases of `sgp verify` as fit, in an order that mixes them, over processes."""
    todo = list(verify_cases.cases(quick=phase.dry))
    random.Random(0).shuffle(todo)  # noqa: S311  (an order)
    if phase.dry:
        os.environ["SGP_BACKEND"] = "triton"  # of this process
        todo = [case for case in todo if case.V < 10][:2]
        for case in todo:
            verify_one(phase, case)
        return
    workers = min(12, os.cpu_count() or 1)
    done = failed = 0
    pool = multiprocessing.get_context("spawn").Pool(workers)
    with pool:  # most of the time is compiling; those still at it in the end are ended
        for outcome in pool.imap_unordered(_verify_there, todo):
            done, failed = done + 1, failed + (not outcome["passed"])
            ok, path = outcome.pop("passed"), outcome.pop("path")
            status = outcome.pop("raised") or ("ok" if ok else "wrong")
            phase.record(path, ok=ok, status=status, **outcome)
            if phase.is_late:
                break
    phase.record("cases", ok=not failed, done=done, failed=failed, of=len(todo))


def _verify_there(case: verify_cases.Case) -> dict[str, Any]:
    os.environ["SGP_BACKEND"] = "triton"
    return verify.as_record(verify_cases.attempt(case, torch.device("cuda")))

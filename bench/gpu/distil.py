"""The phase of a student and a teacher: the kernel of two rows alone, and both heads."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.against import cases, machine, rivals
from bench.against.cases import Case
from bench.gpu import lines, phases
from bench.gpu.phases import Phase
from sgp.commands import verify_cases
from sgp.kernels import launch, table
from sgp.kernels.layout import matrix
from sgp.rows.divergence import KINDS

# V, data: bf16 logits of both, or float32 ones as in a chunk of the head, the gradient in place.
TRIALS = ((151_936, "bf16"), (32_000, "bf16"), (50_257, "bf16"), (128_256, "head"))
BETA = 0.5
NAMES = ("sgp", rivals.BASELINE, "TRL", "Liger", "Liger, chunked")


def distil(phase: Phase) -> None:
    """First calls, the kernel by divergence beside a copy, then both heads beside others."""
    V = 64 if phase.dry else 32_000
    for path, dtype in itertools.product(
        ("distillation, JSD", "distillation of linear heads"), (torch.bfloat16, torch.float32)
    ):
        phases.verify_one(phase, verify_cases.Case(path, dtype, V, 0.5, "all"))
    speed = machine.copy_bytes_per_s(phase.device) / 1e3
    phase.record("copy", ok=None, bytes_per_ms=speed)
    for (size, data), kept in itertools.product(_trials(phase), (1.0, 0.25)):
        if data == "bf16" or kept == 1.0:
            for kind in KINDS:
                _alone(phase, kind, size, data, kept, speed)
    model = phases.TINY if phase.dry else cases.LLAMA_3
    for kept, form in itertools.product((1.0, 0.25), cases.DIVERGENCES):
        phase.compare(Case(form, model, 64 if phase.dry else 8_192, kept), NAMES, seconds=1.0)


def _trials(phase: Phase) -> tuple[tuple[int, str], ...]:
    return ((96, "bf16"), (64, "head")) if phase.dry else TRIALS


class TwoRows(lines.Trial):
    """A problem with a teacher's rows of the same dtype."""

    def __init__(self, p: lines.Problem, teacher: Tensor, kind: str, *, interpreted: bool) -> None:
        self.teacher, self.kind = teacher, kind
        super().__init__(p, interpreted=interpreted)

    def _outcome(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Divergence and gradient of the rows by PyTorch; 16-bit logits are converted."""
        logits = self.pristine[self.rows].to(dtype).requires_grad_()
        wide = dtype if dtype == torch.float64 else torch.float32
        theirs = self.teacher[self.rows].to(wide)
        loss = rivals.divergence_of(logits.to(wide), theirs, self.kind, BETA)
        loss = torch.where(self.p.target[self.rows] == lines.IGNORE, 0.0, loss)
        (gradient,) = torch.autograd.grad(loss, logits, self.p.scale.to(loss.dtype).expand_as(loss))
        return loss.detach(), gradient


def launch_of(p: lines.Problem, teacher: Tensor, kind: str, device: torch.device) -> Any:
    """Loss and gradient of two rows in one launch, by the table's line."""
    logits, theirs, gradient = (matrix(x) for x in (p.logits, teacher, p.gradient))
    assert logits is not None and theirs is not None, "one stride"  # noqa: S101, PT018
    opts = (
        launch.Options(scale=p.scale),
        launch.Options(),
        launch.Pair(beta=BETA if kind == "jsd" else None),
    )
    rows = (logits, theirs, gradient, p.target, None, p.loss, None, None)
    on = table.target_of(device)
    return launch.two_rows_loss(
        *rows, opts, kind=kind, V=p.logits.shape[1], ignore_index=lines.IGNORE, on=on
    )


def _alone(phase: Phase, kind: str, V: int, data: str, kept: float, speed: float) -> None:
    """Right first, then its share of a copy's bandwidth: kept rows of both, every gradient."""
    N = 4 if phase.dry else 2_048 if data == "head" else 4_096
    size = {"divergence": kind, "V": V, "N": N, "data": data, "kept": kept}

    def step() -> dict[str, Any]:
        p = lines.problem(N, V, data, kept, phase.device)
        teacher = torch.empty_like(p.logits).normal_(0.0, 2.0)
        trial = TwoRows(p, teacher, kind, interpreted=launch.runs_interpreted())
        run: Callable[[], Any] = launch_of(p, teacher, kind, phase.device).launch
        outcome = trial.check(run)
        found = outcome._asdict() | {"ok": outcome.ok}
        if outcome.ok:
            scored = float((p.target != lines.IGNORE).double().mean())
            floor = N * V * (2 * p.logits.itemsize * scored + p.gradient.itemsize)
            found |= phase.timed(run)
            found["of_copy"] = floor / speed / found["ms"]
        return found

    phase.attempt("sgp", functools.partial(step), **size)

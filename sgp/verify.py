"""`sgp verify`: every kernel against the reference on this machine, beside plain PyTorch."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import itertools
import json
import os
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from sgp import backend, reference
from sgp.losses import cross_entropy
from sgp.tolerance import bound, relative_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = {
    "plain": {},
    "all": {
        "label_smoothing": 0.1,
        "softcap": 30.0,
        "logit_scale": 0.8,
        "lse_square_scale": 1e-4,
    },
}
# One vocabulary for each way a row can be laid out, and why.
VOCABULARIES = {
    7: "less than a block",
    1_000: "one block, with padding",
    8_192: "the largest row held whole",
    32_000: "streamed; Llama 2",
    50_257: "odd; GPT-2",
    262_144: "Gemma 3",
}
QUICK = (7, 1_000, 32_000)


class Path(NamedTuple):
    """Which kernels a call runs, and how it is called."""

    reduction: str
    upstream: float | None  # None: a number for each row
    roundings: int  # of the gradient to its dtype
    inplace: bool = False
    view: bool = False  # the vocabulary is not contiguous, as in (B, V, T)


PATHS = {
    # row_resident or row_streaming, the gradient in forward; the factor kernel finds a 1
    "loss and gradient in one launch": Path("mean", 1.0, 1),
    # the factor kernel multiplies
    "upstream factor 3": Path("mean", 3.0, 2),
    # statistics in forward, row_backward
    "a factor for each row": Path("none", None, 1),
    # the gradient over the logits, from either side
    "in place": Path("sum", 1.0, 1, inplace=True),
    "in place, a factor for each row": Path("none", None, 1, inplace=True),
    # strides instead of a copy
    "vocabulary strided": Path("mean", 1.0, 1, view=True),
}


STATISTICS_BOUND = 1e-6  # eight units in the last place of float32, over a row's whole vocabulary


class Case(NamedTuple):
    """One call to check."""

    path: str
    dtype: torch.dtype
    V: int
    kept: float
    options: str


class Outcome(NamedTuple):
    """Relative errors against float64, of sgp and of plain PyTorch in the same dtype."""

    case: Case
    loss: float
    plain_loss: float
    gradient: float
    plain_gradient: float
    loss_bound: float  # PyTorch's error in float32 on the same logits: the loss is not rounded
    passed: bool


def run(*, quick: bool = False, output: pathlib.Path | None = None) -> int:
    """Check, print the table, write it as JSON if asked; 0 if every case passed, else 1.

    On a CPU the kernels run in Triton's interpreter (this sets TRITON_INTERPRET=1, so call it
    before anything imports the kernels); on a GPU they are compiled.
    """
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    elif os.environ.get("TRITON_INTERPRET", "0") == "1":
        device = torch.device("cpu")  # asked for: the interpreter, not the GPU
    if not backend.has_triton():
        console.print("sgp verify: Triton is not installed; there is no kernel to verify")
        return 2
    if output is not None and not output.absolute().parent.is_dir():
        console.print(f"sgp verify: --output {output}: {output.absolute().parent} is no folder")
        return 2
    before = os.environ.get("SGP_BACKEND")
    os.environ["SGP_BACKEND"] = "triton"  # an error where the kernels cannot run, never a fallback
    try:
        outcomes = _check_all(list(cases(quick=quick)), device, console)
    finally:
        if before is None:
            del os.environ["SGP_BACKEND"]
        else:
            os.environ["SGP_BACKEND"] = before
    failed = [outcome for outcome in outcomes if not outcome.passed]
    for table in _tables(outcomes, device):
        console.print(table)
    if output is not None:
        output.write_text(json.dumps(_record(outcomes, device), indent=1) + "\n")
    verdict = f"[red]{len(failed)} FAILED" if failed else "[green]all passed"
    console.print(f"{len(outcomes)} cases, {verdict}")
    for outcome in failed:
        console.print(f"[red]failed: {outcome}")
    return 1 if failed else 0


def cases(*, quick: bool) -> Iterator[Case]:
    """All calls to check; `quick` leaves out the large vocabularies."""
    vocabularies = QUICK if quick else VOCABULARIES
    for V, dtype, options, path in itertools.product(vocabularies, DTYPES, OPTIONS, PATHS):
        # Interpreted, a long row takes a second: one of four rows is enough there.
        for kept in (0.0, 0.25, 1.0) if V == 1_000 else (0.25, 1.0) if V < 50_000 else (0.25,):
            yield Case(path, dtype, V, kept, options)


def check(case: Case, device: torch.device) -> Outcome:
    """Run one case three ways: float64 reference, plain PyTorch in the dtype, and sgp."""
    generator = torch.Generator().manual_seed(case.V)
    N = 4 if device.type == "cpu" else 128
    logits = (3 * torch.randn(N, case.V, generator=generator)).to(device, case.dtype)
    target = torch.randint(case.V, (N,), generator=generator)
    target[round(case.kept * N) :] = -100
    target = target.to(device)
    token_weight = torch.rand(N, generator=generator).to(device)
    reduction, factor, roundings, inplace, view = PATHS[case.path]
    upstream = torch.rand(N, generator=generator).to(device) if factor is None else factor
    everything = case.options == "all"
    weight = torch.rand(case.V, generator=generator).to(device) if everything else None
    options = {
        **OPTIONS[case.options],
        "weight": weight,
        "token_weight": token_weight if everything else None,
        "reduction": reduction,
    }

    def differentiate(function: object, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        loss = function(x, target, **options)  # type: ignore[operator]
        (loss * upstream).sum().backward()
        assert x.grad is not None, "logits require grad"  # noqa: S101
        return loss, x.grad

    truth, true_gradient = differentiate(_reference64, logits.double())
    plain, plain_gradient = differentiate(_plain, logits)
    in_float32, _ = differentiate(_plain, logits.float())

    def call(x: Tensor, *arguments: Tensor, **keywords: Any) -> Tensor:
        x = x * 1 if inplace else x
        x = x.t().contiguous().t() if view else x
        loss: Tensor = cross_entropy(x, *arguments, inplace=inplace, **keywords)
        return loss

    ours, gradient = differentiate(call, logits)
    statistics = _statistics_agree(logits, target, options)
    errors = (
        relative_error(ours, truth),
        relative_error(plain, truth),
        relative_error(gradient, true_gradient),
        relative_error(plain_gradient, true_gradient),
    )
    interpreted = _interpreted()
    loss_bound = bound(relative_error(in_float32, truth), torch.float32)
    passed = (
        ours.dtype == torch.float32
        and errors[0] <= loss_bound
        and errors[2] <= bound(errors[3], case.dtype, interpreted=interpreted, roundings=roundings)
        and not bool(gradient[target == -100].any())
        and statistics
    )
    return Outcome(case, *errors, loss_bound, passed)


def _statistics_agree(logits: Tensor, target: Tensor, options: dict[str, Any]) -> bool:
    """Whether the statistics-only launch reports what the reference says, to float32."""
    names = ("softcap", "logit_scale")
    scored = {name: options[name] for name in names if name in options}
    with torch.no_grad():
        _, found = cross_entropy(logits, target, return_stats=True, **options)
    truth = reference.token_log_probs(logits.double(), target, **scored)
    values = zip(found[:3], truth[:3], strict=True)
    close = all(relative_error(value, true) <= STATISTICS_BOUND for value, true in values)
    return close and torch.equal(found.is_top1, truth.is_top1)


def _reference64(logits: Tensor, target: Tensor, **options: object) -> Tensor:
    for name in ("weight", "token_weight"):
        value = options[name]
        options[name] = value.double() if isinstance(value, Tensor) else None
    return reference.cross_entropy(logits, target, **options)  # type: ignore[arg-type]


def _plain(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None,
    token_weight: Tensor | None,
    reduction: str,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
) -> Tensor:
    """What a user would write with PyTorch's operators, in the logits' own dtype."""
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    w = None if weight is None else weight.to(logits.dtype)
    kept = target != -100
    rows = F.cross_entropy(logits, target, w, reduction="none", label_smoothing=label_smoothing)
    if lse_square_scale:
        z = lse_square_scale * logits.logsumexp(-1) ** 2
        rows = rows + torch.where(kept, z, 0)
    counts = kept.to(logits.dtype)
    if weight is not None:
        counts = torch.where(kept, weight[target.clamp(min=0)], 0)
    if token_weight is not None:
        rows, counts = rows * token_weight, counts * token_weight
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    return rows.sum() / counts.sum() if kept.any() else rows.sum() * 0


def _check_all(todo: list[Case], device: torch.device, console: Console) -> list[Outcome]:
    outcomes = []
    with warnings.catch_warnings(), Progress(console=console, transient=True) as progress:
        # NumPy inside the interpreter says aloud what a GPU does silently in masked lanes.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
        bar = progress.add_task("kernels against the reference", total=len(todo))
        for case in todo:
            outcomes.append(check(case, device))
            progress.advance(bar)
    return outcomes


def machine(device: torch.device) -> str:
    """Where the kernels ran, in words."""
    if _interpreted():
        return "Triton's interpreter on a CPU"
    return f"compiled, {torch.cuda.get_device_name(device)}"


def _interpreted() -> bool:
    from sgp.kernels import launch  # noqa: PLC0415  (after TRITON_INTERPRET is set)

    return bool(launch.runs_interpreted())


def _tables(outcomes: list[Outcome], device: torch.device) -> Iterator[Table]:
    """One table for each way of calling: the largest errors of each dtype and vocabulary."""
    for path in PATHS:
        table = Table(
            title=f"{path} ({machine(device)})",
            caption="Worst of the cases: relative error of a row against float64;\n"
            "PyTorch: its operators in the same dtype.",
        )
        for column in ("dtype", "V", "loss", "PyTorch", "gradient", "PyTorch", ""):
            table.add_column(column, justify="left" if column == "dtype" else "right", no_wrap=True)
        for dtype, V in itertools.product(DTYPES, VOCABULARIES):
            group = [o for o in outcomes if o.case[:3] == (path, dtype, V)]
            if group:
                good = all(outcome.passed for outcome in group)
                table.add_row(
                    str(dtype).removeprefix("torch."),
                    f"{V:,}".replace(",", " "),
                    *(f"{max(outcome[i] for outcome in group):.1e}" for i in range(1, 5)),
                    "[green]ok" if good else "[red]FAILED",
                )
        yield table


def _record(outcomes: list[Outcome], device: torch.device) -> dict[str, object]:
    rows = []
    for outcome in outcomes:
        case = outcome.case._asdict() | {"dtype": str(outcome.case.dtype).removeprefix("torch.")}
        rows.append(case | {k: v for k, v in outcome._asdict().items() if k != "case"})
    versions = {
        name: importlib.metadata.version(name) for name in ("sgp-kernels", "torch", "triton")
    }
    today = dt.datetime.now(dt.timezone.utc).date().isoformat()
    return {"machine": machine(device), "date": today, "versions": versions, "cases": rows}

"""What `sgp verify` runs: a case is one call, three ways, and its errors against float64."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sgp import reference
from sgp.commands import verify_teachers
from sgp.linear import linear_cross_entropy
from sgp.log_probs import linear_token_log_probs
from sgp.losses import cross_entropy
from sgp.own_loss import linear_loss
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


Function = Callable[..., Tensor]


class Path(NamedTuple):
    """Which kernels a call runs, and how it is called."""

    reduction: str
    upstream: float | None  # None: a number for each row
    roundings: int  # of the gradient to its dtype
    inplace: bool = False
    view: bool = False  # the vocabulary is not contiguous, as in (B, V, T)
    subject: str = "logits"  # or "head": hidden states and a weight; "log-probs", "own" of a head
    divergence: str = ""  # from a teacher's logits, or of two heads


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
    # two chunks of logits, a bf16 or fp16 gradient in the first half of each float32 row
    "linear head": Path("mean", 1.0, 1, subject="head"),
    # the logits again in backward
    "linear head, a factor for each row": Path("none", None, 1, subject="head"),
    # and the terms of the entropy and of lse
    "log-probabilities of a linear head": Path("none", None, 1, subject="log-probs"),
    # the same terms, in forward, from a loss of the caller's
    "a loss of log-probabilities": Path("sum", 3.0, 2, subject="own"),
    # two_rows_forward: both models' rows, and the gradient of the student's
    "distillation, forward KL": Path("mean", 1.0, 1, divergence="forward_kl"),
    "distillation, reverse KL": Path("sum", 3.0, 2, divergence="reverse_kl"),
    # a mixture's terms between sums and gradient
    "distillation, JSD": Path("mean", 1.0, 1, divergence="jsd"),
    # statistics in forward, two_rows_backward
    "distillation, a factor for each row": Path("none", None, 1, divergence="jsd"),
    # chunks of both models' logits, the gradient in the first half of each float32 row
    "distillation of linear heads": Path("mean", 1.0, 1, subject="head", divergence="forward_kl"),
    # both models' logits again in backward
    "distillation of linear heads, a factor for each row": Path(
        "none", None, 1, subject="head", divergence="reverse_kl"
    ),
}
HEAD_VOCABULARIES = (7, 8_192, 32_000, 50_257)  # one for each layout is enough here
TEACHER_VOCABULARIES = (7, 8_192, 50_257)  # no row of two is held whole
WIDTH = 16  # of the hidden states


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
    raised: str = ""  # what came in the place of all of these


def cases(*, quick: bool) -> Iterator[Case]:
    """All calls to check; `quick` leaves out the large vocabularies."""
    vocabularies = QUICK if quick else VOCABULARIES
    for V, dtype, options, path in itertools.product(vocabularies, DTYPES, OPTIONS, PATHS):
        if not quick and V not in _vocabularies_of(PATHS[path]):
            continue
        for kept in _kept(path, V):
            yield Case(path, dtype, V, kept, options)


def _kept(path: str, V: int) -> tuple[float, ...]:
    # Interpreted, a long row takes a second: one of four rows is enough there.
    if PATHS[path].divergence:
        return (0.5,) if V < 50_000 else (0.25,)
    return (0.0, 0.25, 1.0) if V == 1_000 else (0.25, 1.0) if V < 50_000 else (0.25,)


def _vocabularies_of(path: Path) -> Iterable[int]:
    if path.divergence:
        return TEACHER_VOCABULARIES
    return VOCABULARIES if path.subject == "logits" else HEAD_VOCABULARIES


def attempt(case: Case, device: torch.device) -> Outcome:
    """`check`, and what it raises as an outcome that did not pass."""
    try:
        return check(case, device)
    except Exception as error:  # noqa: BLE001  (whatever it is, the other cases go on)
        lines = str(error).strip().splitlines() or [""]
        nan = float("nan")
        raised = f"{type(error).__name__}: {lines[0][:200]}".rstrip(": ")
        return Outcome(case, nan, nan, nan, nan, nan, passed=False, raised=raised)


class Problem(NamedTuple):
    """What a case is made of."""

    leaves: list[Tensor]  # what the gradient is asked of, that of rows first
    target: Tensor  # (N,)
    options: dict[str, Any]  # of the call
    upstream: float | Tensor
    functions: tuple[Function, Function, Function]  # reference in float64, plain PyTorch, sgp


def problem_of(case: Case, device: torch.device) -> Problem:
    """Random tensors, the same ones for the same vocabulary."""
    path, everything = PATHS[case.path], case.options == "all"
    generator = torch.Generator().manual_seed(case.V)
    N = 4 if device.type == "cpu" else 128

    def random(*shape: int, spread: float = 1.0) -> Tensor:
        return (spread * torch.randn(shape, generator=generator)).to(device, case.dtype)

    def of_model(V: int, D: int) -> list[Tensor]:
        if path.subject == "logits":
            return [random(N, V, spread=3)]
        return [random(N, D), random(V, D, spread=3 / D**0.5)]

    leaves, teacher, V = of_model(case.V, WIDTH), list[Tensor](), case.V
    if path.divergence:
        theirs = verify_teachers.columns(V, everything=everything)
        teacher, V = of_model(theirs, 2 * WIDTH), min(V, theirs)
    target = torch.randint(V, (N,), generator=generator)
    target[round(case.kept * N) :] = -100
    target = target.to(device)
    token_weight = torch.rand(N, generator=generator).to(device)
    upstream: float | Tensor | None = path.upstream
    if upstream is None:
        places = (3, N) if path.subject == "log-probs" else (N,)
        upstream = torch.rand(places, generator=generator).to(device)
    if path.divergence:
        for x in (leaves[0], teacher[0]):
            x[target == -100] = torch.nan  # which nobody reads
        options = verify_teachers.options(
            path.divergence, path.reduction, token_weight, everything=everything
        )
        return Problem(leaves, target, options, upstream, verify_teachers.functions(teacher))
    weight = torch.rand(case.V, generator=generator).to(device) if everything else None
    options = {
        **OPTIONS[case.options],
        "weight": weight,
        "token_weight": token_weight if everything else None,
        "reduction": path.reduction,
    }
    if path.subject in ("log-probs", "own"):
        options = {k: v for k, v in options.items() if k in ("softcap", "logit_scale")}
        options["temperature"] = 0.7 if everything else 1.0
    return Problem(leaves, target, options, upstream, _functions(path))


def check(case: Case, device: torch.device) -> Outcome:
    """Run one case three ways: float64 reference, plain PyTorch in the dtype, and sgp."""
    path = PATHS[case.path]
    leaves, target, options, upstream, (truth_of, plain_of, ours_of) = problem_of(case, device)

    def differentiate(function: Function, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        inputs = [x.detach().requires_grad_() for x in inputs]
        value = function(*inputs, target, **options)
        return value, list(torch.autograd.grad((value * upstream).sum(), inputs))

    truth, true_gradients = differentiate(truth_of, [x.double() for x in leaves])
    plain, plain_gradients = differentiate(plain_of, leaves)
    in_float32, _ = differentiate(plain_of, [x.float() for x in leaves])
    ours, gradients = differentiate(ours_of, leaves)
    statistics = path.subject != "logits" or bool(path.divergence)
    statistics = statistics or _statistics_agree(leaves[0], target, options)
    errors = (
        relative_error(ours, truth),
        relative_error(plain, truth),
        _worst(gradients, true_gradients),
        _worst(plain_gradients, true_gradients),
    )
    interpreted = is_interpreted()
    loss_bound = bound(relative_error(in_float32, truth), torch.float32)
    if path.subject in ("log-probs", "own"):  # of the statistics
        loss_bound = max(loss_bound, STATISTICS_BOUND)
    limit = bound(errors[3], case.dtype, interpreted=interpreted, roundings=path.roundings)
    passed = (
        ours.dtype == torch.float32
        and errors[0] <= loss_bound
        and errors[2] <= limit
        and not bool(gradients[0][target == -100].any())
        and statistics
    )
    return Outcome(case, *errors, loss_bound, passed)


def _worst(gradients: list[Tensor], truth: list[Tensor]) -> float:
    """The largest error of the rows of the first, and of each other as a whole."""
    errors = [relative_error(gradients[0], truth[0])]
    pairs = zip(gradients[1:], truth[1:], strict=True)
    return max(errors + [relative_error(g.flatten(), t.flatten()) for g, t in pairs])


def _functions(path: Path) -> tuple[Function, Function, Function]:
    """(reference in float64, plain PyTorch, sgp) on the leaves of the path's subject."""
    if path.subject == "head":
        # Two chunks of the rows, where there are two rows.
        ours = functools.partial(linear_cross_entropy, chunk_rows=2)
        return _reference64(reference.linear_cross_entropy), _plain_head, ours
    if path.subject == "log-probs":
        truth = _stacked(reference.linear_token_log_probs)
        in_chunks = functools.partial(linear_token_log_probs, chunk_rows=2)
        return truth, _plain_log_probs, _stacked(in_chunks)
    if path.subject == "own":
        truth = functools.partial(reference.linear_loss, loss_fn=_lines)
        return truth, _plain_own_loss, functools.partial(linear_loss, loss_fn=_lines, chunk_rows=2)

    def call(x: Tensor, *arguments: Tensor, **keywords: Any) -> Tensor:
        x = x * 1 if path.inplace else x
        x = x.t().contiguous().t() if path.view else x
        loss: Tensor = cross_entropy(x, *arguments, inplace=path.inplace, **keywords)
        return loss

    return _reference64(reference.cross_entropy), _plain, call


def _lines(tokens: reference.TokenLogProbs, rows: Tensor) -> Tensor:  # noqa: ARG001
    """Some loss of all three."""
    return 0.3 * tokens.entropy + 0.01 * tokens.lse - tokens.log_prob


def _plain_own_loss(hidden: Tensor, head: Tensor, target: Tensor, **options: Any) -> Tensor:
    log_prob, entropy, lse = _plain_log_probs(hidden, head, target, **options)
    loss: Tensor = (0.3 * entropy + 0.01 * lse - log_prob).sum()
    return loss


def _stacked(function: Callable[..., reference.TokenLogProbs]) -> Function:
    """The three differentiable statistics as one tensor (3, N)."""

    def call(*arguments: Tensor, **options: Any) -> Tensor:
        return torch.stack(function(*arguments, **options)[:3])

    return call


def _statistics_agree(logits: Tensor, target: Tensor, options: dict[str, Any]) -> bool:
    """Whether the statistics-only launch reports what the reference says, to float32."""
    names = ("softcap", "logit_scale")
    scored = {name: options[name] for name in names if name in options}
    with torch.no_grad():
        _, found = cross_entropy(logits, target, return_stats=True, return_argmax=True, **options)
    truth = reference.token_log_probs(logits.double(), target, return_argmax=True, **scored)
    values = zip(found[:3], truth[:3], strict=True)
    close = all(relative_error(value, true) <= STATISTICS_BOUND for value, true in values)
    pairs = ((found.is_top1, truth.is_top1), (found.argmax, truth.argmax))
    return close and all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


def _reference64(function: Any) -> Function:
    def call(*arguments: Tensor, **options: Any) -> Tensor:
        for name in ("weight", "token_weight"):
            value = options[name]
            options[name] = value.double() if isinstance(value, Tensor) else None
        loss: Tensor = function(*arguments, **options)
        return loss

    return call


def _plain_head(hidden: Tensor, head: Tensor, target: Tensor, **options: Any) -> Tensor:
    return _plain(F.linear(hidden, head), target, **options)


def _plain_log_probs(
    hidden: Tensor,
    head: Tensor,
    target: Tensor,
    *,
    temperature: float,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    logits = F.linear(hidden, head) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    log_p = logits.log_softmax(-1)
    values = (
        log_p.gather(1, target.clamp(min=0)[:, None]).squeeze(1),
        -(log_p.exp() * log_p).sum(1),
        logits.logsumexp(1),
    )
    return torch.where(target != -100, torch.stack(values), 0)


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
    z = torch.zeros_like(rows)
    if lse_square_scale:
        z = torch.where(kept, lse_square_scale * logits.logsumexp(-1) ** 2, 0)
    r = kept.to(logits.dtype) if token_weight is None else torch.where(kept, token_weight, 0)
    if reduction == "none":
        return r * (rows + z)
    if reduction == "sum":
        return (r * (rows + z)).sum()
    if not kept.any():
        return rows.sum() * 0
    counts = r if weight is None else r * weight[target.clamp(min=0)]
    return (r * rows).sum() / counts.sum() + (r * z).sum() / r.sum()


def is_interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter."""
    from sgp.kernels import launch  # noqa: PLC0415  (after TRITON_INTERPRET is set)

    return bool(launch.runs_interpreted())

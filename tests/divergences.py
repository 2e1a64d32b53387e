"""What the tests of distillation share: models, the divergences written out, and exact ones."""

import os
from decimal import Decimal, localcontext

import torch
from torch.nn import functional as F

import sgp
from tests.oracle import assert_no_worse, in_float64, loss_and_grad

IGNORE = -100
KINDS = ("forward_kl", "reverse_kl", "jsd")
BETA = 0.3
HALVES = (torch.bfloat16, torch.float16)


def of_kind(kind, **options):
    """The options of a divergence, whose beta is a jsd's alone."""
    return {"divergence": kind, **({"beta": BETA} if kind == "jsd" else {}), **options}


def models(N, V, dtype=torch.float32, *, teacher_dtype=None, longer=0):
    """(student's logits, a teacher's that are something like them, labels); row 1 is ignored."""
    student = 2 * torch.randn(N, V)
    teacher = F.pad(0.5 * student, (0, longer), value=1.0) + 2 * torch.randn(N, V + longer)
    target = torch.randint(V, (N,))
    target[1:2] = IGNORE
    return student.to(dtype), teacher.to(teacher_dtype or dtype), target


def plain_rows(s, t, kind, beta=BETA):
    """(...,) divergences as one writes them in PyTorch, of scores over the temperature."""
    log_p, log_q = F.log_softmax(s, -1), F.log_softmax(t, -1)

    def kl(a, b):
        return F.kl_div(b, a, reduction="none", log_target=True).sum(-1)

    if kind == "forward_kl":
        return kl(log_q, log_p)
    if kind == "reverse_kl":
        return kl(log_p, log_q)
    log_m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def exact(s, t, kind, beta=BETA, temperature=1.0):
    """(divergence, gradient (V,)) of two rows of logits by 60 decimal digits, in float64."""
    with localcontext(prec=60):
        p, q = (_softmax(x, temperature) for x in (s, t))
        share = Decimal(beta)
        m = [share * b + (1 - share) * a for a, b in zip(p, q, strict=True)]
        if kind == "forward_kl":
            loss, grad = _kl(q, p), [a - b for a, b in zip(p, q, strict=True)]
        else:
            other, factor = (q, 1) if kind == "reverse_kl" else (m, 1 - share)
            mine = _kl(p, other)
            loss = mine if kind == "reverse_kl" else share * _kl(q, m) + factor * mine
            grad = [
                factor * a * ((a / b).ln() - mine) if a else a
                for a, b in zip(p, other, strict=True)
            ]
        grad = [g / Decimal(temperature) for g in grad]
        return torch.tensor([float(loss), *map(float, grad)], dtype=torch.float64).split(
            [1, len(grad)]
        )


def _softmax(logits, temperature):
    e = [(Decimal(x) / Decimal(temperature)).exp() for x in logits.tolist()]
    return [x / sum(e) for x in e]


def _kl(a, b):
    return sum(x * (x / y).ln() for x, y in zip(a, b, strict=True) if x)


def results(function, student, teacher, target, upstream=None, **options):
    """(loss, gradient of a fresh leaf)."""

    def of_student(x, y, **given):
        return function(x, teacher, y, **given)

    return loss_and_grad(of_student, student, target, upstream, **options)


def ours_of(student, teacher, target, upstream=None, **options):
    """Of `sgp.distillation`."""
    return results(sgp.distillation, student, teacher, target, upstream, **options)


def wide(teacher):
    """The same teacher in float64, whatever it is."""
    if isinstance(teacher, (list, tuple)):
        return [wide(x) for x in teacher]
    if isinstance(teacher, sgp.TopK):
        return sgp.TopK(teacher.indices, teacher.log_probs.double(), teacher.offsets)
    return teacher.double()


def is_interpreted(x):
    """Whether Triton's interpreter computes this, which truncates to bf16."""
    return os.environ.get("SGP_BACKEND") == "triton" and not x.is_cuda


def check_distillation(student, teacher, target, upstream=None, **options):
    """`sgp.distillation`, loss and gradient, against the reference; returns ours.

    The truth is the reference in float64; the plain PyTorch to be no worse than is the reference on
    the same logits: float32 arithmetic, its gradient rounded once to the logits' dtype.
    """
    reference = sgp.reference.distillation
    truth = results(
        reference, student.double(), wide(teacher), target, upstream, **in_float64(options)
    )
    plain = results(reference, student, teacher, target, upstream, **options)
    ours = ours_of(student, teacher, target, upstream, **options)
    exact_dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    assert ours[0].dtype == exact_dtype, f"loss of {student.dtype} logits is {ours[0].dtype}"
    assert ours[1].dtype == student.dtype, f"gradient of {student.dtype} is {ours[1].dtype}"
    for value, other, true in zip(ours, plain, truth, strict=True):
        some = of_rows_with_something(value, other, true)
        assert_no_worse(*some, interpreted=is_interpreted(student))
    if isinstance(target, torch.Tensor) and not options.get("shift"):
        ignored = target == options.get("ignore_index", IGNORE)
        rows = ours[1].movedim(1, -1) if ours[1].dim() > 1 else ours[1]
        assert not rows[ignored].any(), "the gradient of an ignored row is not exactly zero"
    return ours


def of_rows_with_something(value, other, true):
    """The three without rows whose truth is 0 but for rounding: no error is relative to it."""
    if true.dim() < 2 or not true.numel():
        return value, other, true
    sizes = true.flatten(0, -2).norm(dim=-1)
    some = ~(sizes < 1e-9 * sizes.nan_to_num().max())  # a row of NaN is something
    nothing = value.flatten(0, -2)[~some]
    assert (nothing.abs() <= 1e-6 * sizes.nan_to_num().max()).all(), "of rows that have none"
    return tuple(x.flatten(0, -2)[some] for x in (value, other, true))


def top_of(teacher, target, k, temperature=1.0):
    """The k most probable tokens of a teacher's kept rows, as a server gives them."""
    kept = teacher.double()[target.flatten() != IGNORE]
    top = (kept / temperature).log_softmax(-1).topk(k)
    return sgp.TopK(top.indices, top.values.float())


def ragged_of(top, lengths):
    """The first so many entries of each row."""
    lengths = torch.as_tensor(lengths)
    kept = torch.arange(top.indices.shape[1]) < lengths[:, None]
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    return sgp.TopK(top.indices[kept], top.log_probs[kept], offsets)

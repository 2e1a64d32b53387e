"""The definitions of distillation against PyTorch's own divergence and against written-out ones."""

import math

import pytest
import torch
from torch.nn import functional as F

import sgp
from sgp import reference
from tests.divergences import (
    BETA,
    IGNORE,
    KINDS,
    exact,
    models,
    of_kind,
    plain_rows,
    ragged_of,
    top_of,
)

INF = math.inf


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(21)


def close(value, expected, rtol=1e-11):
    torch.testing.assert_close(value, expected, rtol=rtol, atol=1e-13)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)


def case(N=6, V=9, longer=0):
    s, t, y = models(N, V, torch.float64, longer=longer)
    return s.requires_grad_(), t, y


def in_turn(kind, s, t, y, *, temperature=1.0, weight=0.0):
    """One loss a row by PyTorch, of scored logits."""
    kept = y != IGNORE
    rows = plain_rows(s[kept] / temperature, t[kept] / temperature, kind)
    rows = rows + weight * F.cross_entropy(s[kept], y[kept], reduction="none")
    return torch.zeros(len(s), dtype=s.dtype).index_put((kept,), rows)


# -- divergences and options -----------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", ["plain", "temperature", "scores", "cross-entropy", "all"])
def test_options(option, kind):
    s, t, y = case()
    of = {
        "temperature": {"temperature": 1.7},
        "scores": {
            "softcap": 3.0, "logit_scale": -0.7, "teacher_softcap": 5.0, "teacher_logit_scale": 1.3,
        },
        "cross-entropy": {"cross_entropy_weight": 0.4},
    }  # fmt: skip
    of["all"] = {k: v for options in list(of.values()) for k, v in options.items()}
    options = of.get(option, {})
    ours = reference.distillation(s, t, y, **of_kind(kind), reduction="none", **options)
    scores, theirs = s, t
    if "softcap" in options:
        scores, theirs = 3.0 * torch.tanh(-0.7 * s / 3.0), 5.0 * torch.tanh(1.3 * t / 5.0)
    truth = in_turn(
        kind, scores, theirs, y, temperature=options.get("temperature", 1.0),
        weight=options.get("cross_entropy_weight", 0.0),
    )  # fmt: skip
    close(ours, truth)
    upstream = torch.randn(6, dtype=torch.float64)
    close(*(gradients((upstream * x).sum(), s)[0] for x in (ours, truth)))


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
def test_exact_numbers(kind):
    """By 60 decimal digits, where nothing of the value is lost."""
    s, t, _ = case()
    for temperature in (1.0, 0.5):
        loss = reference.distillation(
            s, t, torch.zeros(6, dtype=torch.int64), **of_kind(kind), reduction="none",
            temperature=temperature,
        )  # fmt: skip
        (grad,) = gradients(loss.sum(), s)
        for i in range(6):
            value, row = exact(s[i], t[i], kind, temperature=temperature)
            close(loss[i : i + 1].detach(), value)
            close(grad[i], row)


def test_relations():
    """Forward and reverse are one another's, and the even mixture is the same from both sides."""
    s, t, y = case()
    t = t.requires_grad_()

    def value(a, b, kind, beta=0.5):
        return reference.distillation(a, b, y, divergence=kind, beta=beta, reduction="none")

    close(value(s, t, "forward_kl"), value(t, s, "reverse_kl"))
    close(value(s, t, "jsd"), value(t, s, "jsd"))
    close(value(s, t, "jsd", 0.2), value(t, s, "jsd", 0.8))
    small = 1e-7  # a mixture of almost nothing but the student is near beta times the forward KL
    close(value(s, t, "jsd", small) / small, value(s, t, "forward_kl"), 1e-4)


def test_the_teacher_gets_no_gradient():
    s, t, y = case()
    t.requires_grad_()
    loss = reference.distillation(s, t, y)
    assert gradients(loss, s, t)[1] is None


@pytest.mark.parametrize("longer", [2, -2])
@pytest.mark.parametrize("kind", KINDS)
def test_columns_beyond_the_shorter_vocabulary_are_left_out(kind, longer):
    s, t, y = case(V=9, longer=max(longer, 0))
    t = t[:, : 9 + longer]
    V = min(9, 9 + longer)
    y = y.clamp(max=V - 1)
    options = {"divergence": kind, "cross_entropy_weight": 0.5}
    loss = reference.distillation(s, t, y, **options)
    cut = reference.distillation(s[:, :V], t[:, :V], y, **options)
    close(loss, cut)
    grad, expected = gradients(loss, s)[0], gradients(cut, s)[0]
    close(grad, expected)
    assert not grad[:, V:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_classes_of_probability_zero(kind):
    """As if they were not there, wherever both models, or the one that allows it, exclude them."""
    s, t, y = case(N=3, V=6)
    y = torch.zeros(3, dtype=torch.int64)
    both = torch.tensor([[False] * 5 + [True]])
    masked = [x.detach().masked_fill(both, -INF).requires_grad_() for x in (s, t)]
    loss = reference.distillation(masked[0], masked[1], y, **of_kind(kind))
    cut = reference.distillation(s[:, :5], t[:, :5], y, **of_kind(kind))
    close(loss, cut)
    grad = gradients(loss, masked[0])[0]
    close(grad, gradients(cut, s)[0])
    assert (grad[:, 5] == 0).all()
    for side in ("student", "teacher"):
        x = masked[0] if side == "student" else s.detach().requires_grad_()
        theirs = masked[1] if side == "teacher" else t
        loss = reference.distillation(x, theirs, y, **of_kind(kind), reduction="none")
        infinite = (side, kind) in (("student", "forward_kl"), ("teacher", "reverse_kl"))
        assert loss.isinf().all() if infinite else loss.isfinite().all()
        if not infinite:
            by_hand = exact(x[0], theirs[0], kind)
            close(loss[:1].detach(), by_hand[0])
            close(gradients(loss.sum(), x)[0][0], by_hand[1])


# -- reductions, weights, selections ---------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "token weights"])
def test_reductions(weighted):
    s, t, y = models(6, 9, torch.float64)
    r = torch.rand(6, dtype=torch.float64) if weighted else torch.ones(6, dtype=torch.float64)
    logits, teacher = (x.view(2, 3, 9).movedim(-1, 1) for x in (s, t))
    rows = (r * in_turn("jsd", s, t, y)).view(2, 3)
    r = torch.where(y == IGNORE, 0, r).view(2, 3)
    target = y.view(2, 3)

    def value(reduction, **more):
        given = {"token_weight": r} if weighted else {}
        return reference.distillation(
            logits, teacher, target, divergence="jsd", beta=BETA, reduction=reduction, **given,
            **more,
        )  # fmt: skip

    close(value("none"), rows)
    close(value("sum"), rows.sum())
    close(value("mean"), rows.sum() / r.sum())
    close(value("mean", denominator=7), rows.sum() / 7)
    close(value("sequence_sum"), rows.sum(1))
    close(value("sequence_mean"), rows.sum(1) / r.sum(1))


@pytest.mark.parametrize("shift", [True, 2])
def test_shift_is_by_hand(shift):
    s, t, y = models(8, 5, torch.float64)
    index = torch.randint(2, (2, 4))
    r = torch.rand(2, 4, dtype=torch.float64)
    logits, one, other = (x.view(2, 4, 5) for x in (s, t, t.flip(0)))
    labels, ahead = y.view(2, 4), int(shift)
    ours = reference.distillation(
        logits.movedim(-1, 1), [one.movedim(-1, 1), other.movedim(-1, 1)], labels,
        teacher_index=index, token_weight=r, shift=shift, reduction="none",
        cross_entropy_weight=0.3,
    )  # fmt: skip
    chosen = torch.where(index[:, ahead:, None] == 0, one[:, :-ahead], other[:, :-ahead])
    rows = in_turn(
        "forward_kl", logits[:, :-ahead].flatten(0, 1), chosen.flatten(0, 1),
        labels[:, ahead:].flatten(), weight=0.3,
    )  # fmt: skip
    close(ours[:, :-ahead], r[:, ahead:] * rows.view(2, 4 - ahead))
    assert not ours[:, -ahead:].any()
    flat = reference.distillation(
        logits.movedim(-1, 1), [one.movedim(-1, 1), other.movedim(-1, 1)], labels,
        teacher_index=index.flatten(), token_weight=r, shift=shift, reduction="none",
        cross_entropy_weight=0.3,
    )  # fmt: skip
    assert torch.equal(ours, flat)


def test_a_selection_is_its_labels():
    s, t, y = models(8, 5, torch.float64)
    labels, r = y.view(2, 4), torch.rand(2, 4)
    selection = sgp.Selection.from_labels(labels, shift=True, token_weight=r)
    options = {"divergence": "reverse_kl", "temperature": 2.0, "reduction": "sequence_mean"}
    expected = reference.distillation(
        s.view(2, 4, 5).movedim(-1, 1), t.view(2, 4, 5).movedim(-1, 1), labels, shift=True,
        token_weight=r, **options,
    )  # fmt: skip
    close(reference.distillation(s, t, selection, **options), expected)
    close(reference.distillation(s.view(2, 4, 5), t.view(2, 4, 5), selection, **options), expected)


def test_statistics_are_those_of_token_log_probs():
    s, t, y = case(V=9, longer=-2)
    y = y.clamp(max=6)
    t = t[:, :7]
    options = {"temperature": 1.5, "softcap": 4.0, "logit_scale": 0.8}
    loss, stats = reference.distillation(s, t, y, return_stats=True, **options)
    assert torch.equal(loss, reference.distillation(s, t, y, **options))
    expected = reference.token_log_probs(s[:, :7], y, **options)
    assert stats.argmax is None
    for value, other in zip(stats[:4], expected[:4], strict=True):
        close(value, other.detach())
        assert not value.requires_grad


@pytest.mark.parametrize("function", ["distillation", "linear_distillation"])
def test_a_label_matters_only_where_it_is_used(function):
    s, t, y = models(4, 5, torch.float64)
    y = torch.tensor([1, IGNORE, 2, 3])
    strange = torch.tensor([77, IGNORE, -5, 3])
    eye = torch.eye(5, dtype=torch.float64)

    def value(labels, **options):
        if function == "distillation":
            return reference.distillation(s, t, labels, **options)
        return reference.linear_distillation(s, eye, labels, t, eye, **options)

    assert torch.equal(value(strange), value(y))
    for options in ({"cross_entropy_weight": 0.1}, {"return_stats": True}):
        with pytest.raises((IndexError, ValueError), match=r"77|-5"):
            value(strange, **options)


# -- a teacher's few tokens ------------------------------------------------------------------------


def buckets_by_hand(s, t, top, kind):
    """Of one row: plain PyTorch on k + 1 probabilities."""
    q = top.exp()
    q = torch.cat([q, (1 - q.sum())[None]])
    p = s.softmax(-1)
    listed = torch.zeros(len(s), dtype=torch.bool).index_fill(0, t, True)
    p = torch.cat([p[t], p[~listed].sum()[None]])
    return plain_rows(p.log(), q.log(), kind)


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 3])
def test_buckets(k, kind):
    s, t, y = case()
    top = top_of(t, y, k, temperature=0.8)
    options = of_kind(kind, temperature=0.8)
    loss = reference.distillation(s, top, y, reduction="sum", **options)
    kept = (y != IGNORE).nonzero().flatten()
    by_hand = sum(
        buckets_by_hand(s[i] / 0.8, top.indices[j], top.log_probs[j].double(), kind)
        for j, i in enumerate(kept)
    )
    close(loss, by_hand, 1e-9)
    close(*(gradients(x, s)[0] for x in (loss, by_hand)), 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_are_the_whole_distribution(kind):
    s, t, y = case()
    kept = t[y != IGNORE].log_softmax(-1)
    order = torch.stack([torch.randperm(9) for _ in kept])
    top = sgp.TopK(order, kept.gather(1, order))
    options = of_kind(kind)
    loss, truth = (reference.distillation(s, x, y, **options) for x in (top, t))
    close(loss, truth)
    close(*(gradients(x, s)[0] for x in (loss, truth)))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_different_lengths_are_each_their_own(kind):
    s, t, y = case()
    top = top_of(t, y, 4)
    lengths = [4, 0, 1, 2, 3]
    ragged = ragged_of(top, lengths)
    options = of_kind(kind, reduction="none")
    loss = reference.distillation(s, ragged, y, **options)
    kept = (y != IGNORE).nonzero().flatten()
    for j, (i, k) in enumerate(zip(kept, lengths, strict=True)):
        if not k:
            assert abs(loss[i]) < 1e-15, "nothing is known of this row"
            continue
        one = sgp.TopK(top.indices[j : j + 1, :k], top.log_probs[j : j + 1, :k])
        alone = reference.distillation(s[i : i + 1], one, y[i : i + 1], **options)
        close(loss[i : i + 1], alone)
        close(gradients(loss[i], s)[0][i], gradients(alone.sum(), s)[0][i])


def test_probabilities_that_rounding_made_more_than_one_are_divided_by_their_sum():
    s = torch.randn(1, 4, dtype=torch.float64)
    log_probs = torch.tensor([[0.5, 0.5]]).log().bfloat16()
    assert log_probs.double().exp().sum() > 1
    loss = reference.distillation(s, sgp.TopK(torch.tensor([[0, 2]]), log_probs), torch.tensor([1]))
    log_p = s.log_softmax(-1)[0, [0, 2]]
    close(loss, math.log(0.5) - 0.5 * log_p.sum(), 1e-5)  # but for the rounding that is the rest


# -- several teachers, and the linear head ---------------------------------------------------------


def test_each_row_has_its_teacher():
    s, t, y = case(V=9, longer=2)
    others = [t, torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 9)]
    index = torch.tensor([0, 99, 2, 1, 1, 0])  # row 1 is ignored
    y = y.clamp(max=7)
    loss = reference.distillation(s, others, y, teacher_index=index, reduction="none")
    for i in range(6):
        if y[i] == IGNORE:
            continue
        mine = others[int(index[i])][i : i + 1, :8].double()
        close(
            loss[i : i + 1],
            reference.distillation(s[i : i + 1], mine, y[i : i + 1], reduction="none"),
        )


@pytest.mark.core
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
def test_linear_is_linear_then_distillation(biased, shift):
    double = {"dtype": torch.float64}
    hidden, head = torch.randn(2, 3, 4, **double), torch.randn(7, 4, **double)
    theirs, their_head = torch.randn(2, 3, 5, **double), torch.randn(8, 5, **double)
    bias, their_bias = (torch.randn(n, **double) if biased else None for n in (7, 8))
    labels = torch.tensor([[3, IGNORE, 2], [1, 6, 0]])
    leaves = [x.requires_grad_() for x in (hidden, head, *([bias] if biased else []))]
    options = {"divergence": "jsd", "temperature": 1.3, "cross_entropy_weight": 0.2}
    for reduction in ("mean", "none", "sequence_sum"):
        ours, stats = reference.linear_distillation(
            hidden, head, labels, theirs, their_head, linear_bias=bias, teacher_bias=their_bias,
            shift=shift, reduction=reduction, return_stats=True, **options,
        )  # fmt: skip
        plain = reference.distillation(
            F.linear(hidden, head, bias).movedim(-1, 1),
            F.linear(theirs, their_head, their_bias).movedim(-1, 1), labels, shift=shift,
            reduction=reduction, **options,
        )  # fmt: skip
        close(ours, plain)
        assert stats.log_prob.shape == labels.shape
        pairs = zip(gradients(ours.sum(), *leaves), gradients(plain.sum(), *leaves), strict=True)
        for mine, other in pairs:
            close(mine, other)


@pytest.mark.parametrize("shift", [False, True])
def test_linear_with_several_teachers(shift):
    double = {"dtype": torch.float64}
    hidden, head = torch.randn(2, 3, 4, **double), torch.randn(7, 4, **double)
    widths = (5, 3)
    theirs = [torch.randn(2, 3, D, **double) for D in widths]
    heads = [torch.randn(7, D, **double) for D in widths]
    labels, index = torch.randint(7, (2, 3)), torch.tensor([[0, 1, 1], [1, 0, 1]])
    ours = reference.linear_distillation(
        hidden, head, labels, theirs, heads, teacher_index=index, shift=shift, reduction="none"
    )
    logits = [(x @ w.t()).movedim(-1, 1) for x, w in zip(theirs, heads, strict=True)]
    plain = reference.distillation(
        (hidden @ head.t()).movedim(-1, 1), logits, labels, teacher_index=index, shift=shift,
        reduction="none",
    )  # fmt: skip
    close(ours, plain)
    assert ours.shape == (2, 3)


def test_linear_never_reads_ignored_rows():
    hidden, head = torch.randn(3, 4), torch.randn(7, 4)
    theirs, their_head = torch.randn(3, 5), torch.randn(7, 5)
    labels = torch.tensor([0, IGNORE, 2])
    expected = reference.linear_distillation(hidden, head, labels, theirs, their_head)
    hidden[1], theirs[1] = math.nan, INF
    hidden.requires_grad_()
    loss = reference.linear_distillation(hidden, head, labels, theirs, their_head)
    assert torch.equal(loss, expected)
    assert gradients(loss, hidden)[0].isfinite().all()


def test_narrow_dtypes_are_computed_in_float32():
    s, t, y = models(6, 50, torch.bfloat16)
    loss = reference.distillation(s, t, y)
    assert loss.dtype == torch.float32
    truth = reference.distillation(s.double(), t.double(), y)
    close(loss, truth.float(), 1e-5)
    double = reference.distillation(s.double(), t, y)
    assert double.dtype == torch.float64
    close(double, truth)

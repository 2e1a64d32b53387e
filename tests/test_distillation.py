"""`sgp.distillation`, its options and its errors, on PyTorch's operators and on the kernels.

The definitions themselves are tested in test_distillation_reference.py, the head's form in
test_linear_distillation.py.
"""

# ruff: noqa: ARG001  (fixtures are asked for by name, for what they do)

import math

import pytest
import torch
from torch import nn

import sgp
from sgp.tolerance import relative_error
from tests.divergences import (
    BETA,
    HALVES,
    IGNORE,
    KINDS,
    check_distillation,
    exact,
    models,
    of_kind,
    ours_of,
    plain_rows,
    ragged_of,
    results,
    top_of,
    wide,
)
from tests.oracle import assert_no_worse

INF, NAN = math.inf, math.nan
REDUCTIONS = ["mean", "sum", "none", "sequence_sum", "sequence_mean"]
EARLY_OR_LATE = ["mean", "none"]  # the gradient comes with the loss, or in backward
OF_KINDS = pytest.mark.parametrize("kind", KINDS)
SCORES = {"softcap": 5.0, "logit_scale": -0.7, "teacher_softcap": 4.0, "teacher_logit_scale": 1.3}
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 5.0},
    "logit_scale": {"logit_scale": -0.7},  # a negative scale moves the maximum
    "teacher's softcap": {"teacher_softcap": 4.0},
    "teacher's scale": {"teacher_logit_scale": -1.3},
    "cross-entropy": {"cross_entropy_weight": 0.4},
    "cross-entropy and temperature": {"cross_entropy_weight": 0.4, "temperature": 2.0},
    "all": {"cross_entropy_weight": 0.4, "temperature": 1.7, **SCORES},
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(21)


# -- options, reductions, dtypes, vocabularies -----------------------------------------------------


@pytest.mark.core
@OF_KINDS
@pytest.mark.parametrize(
    ("option", "reduction"),
    [*((option, "mean") for option in OPTIONS), ("plain", "none"), ("all", "none")],
)
def test_option(option, reduction, kind, backend):
    student, teacher, target = models(3, 77)
    upstream = torch.randn(3 if reduction == "none" else ())
    check_distillation(
        student, teacher, target, upstream, reduction=reduction, **of_kind(kind, **OPTIONS[option])
    )


@OF_KINDS
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reduction(reduction, kind, backend):
    """Two sequences of three tokens as (N, V, d1), with a factor other than 1 from upstream."""
    student, teacher, target = models(6, 33)
    student, teacher = (x.view(2, 3, 33).movedim(-1, 1) for x in (student, teacher))
    shape = {"none": (2, 3), "sequence_sum": (2,), "sequence_mean": (2,)}.get(reduction, ())
    options = OPTIONS["all"] | {"token_weight": torch.rand(2, 3) + 0.1}
    loss, _ = check_distillation(
        student, teacher, target.view(2, 3), torch.randn(shape), reduction=reduction,
        **of_kind(kind, **options),
    )  # fmt: skip
    assert loss.shape == shape


VOCABULARIES = {
    1: "one class: the loss is 0 and so is the gradient",
    2: "the smallest that says anything",
    7: "odd and smaller than any block",
    600: "no power of two divides it beyond 8",
    8193: "several blocks, and rows that begin and end between two accesses",
}


@OF_KINDS
@pytest.mark.parametrize(
    ("V", "dtype"),
    [*((V, torch.float32) for V in VOCABULARIES), *((V, x) for V in (7, 8193) for x in HALVES)],
    ids=str,
)
def test_vocabulary_and_dtype(V, dtype, kind, backend):
    student, teacher, target = models(3, V, dtype)
    target[2] = V - 1
    options = OPTIONS["all" if V in (7, 8193) else "temperature"]
    loss, grad = check_distillation(student, teacher, target, **of_kind(kind, **options))
    if V == 1:
        assert loss == 0
        assert not grad.any()


@OF_KINDS
@pytest.mark.parametrize("option", ["plain", "all"])
@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
def test_float64(reduction, option, kind):
    """By PyTorch's operators: the kernels refuse it."""
    student, teacher, target = models(5, 77, torch.float64)
    check_distillation(
        student, teacher, target, reduction=reduction, **of_kind(kind, **OPTIONS[option])
    )


def test_the_kernels_refuse_float64(monkeypatch):
    monkeypatch.setenv("SGP_BACKEND", "triton")
    student, teacher, target = models(3, 5, torch.float64)
    with pytest.raises(RuntimeError, match=r"SGP_BACKEND=triton cannot run: .*float64"):
        sgp.distillation(student, teacher, target)


@OF_KINDS
@pytest.mark.parametrize(
    ("dtype", "teacher_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
def test_the_teacher_may_have_another_dtype(dtype, teacher_dtype, kind, backend):
    student, teacher, target = models(4, 65, dtype, teacher_dtype=teacher_dtype)
    check_distillation(student, teacher, target, **of_kind(kind, temperature=2.0))


@OF_KINDS
def test_finite_differences(kind):
    """Not of the definition: of the value that comes out, each option on."""
    student, teacher, target = models(3, 6, torch.float64)
    options = of_kind(kind, **OPTIONS["all"], token_weight=torch.rand(3, dtype=torch.float64))
    _, grad = ours_of(student, teacher, target, reduction="sum", **options)
    step = 1e-6
    for i, j in ((0, 0), (0, 3), (2, 5)):
        moved = [student.clone(), student.clone()]
        moved[0][i, j] += step
        moved[1][i, j] -= step
        above, below = (
            sgp.distillation(x, teacher, target, reduction="sum", **options) for x in moved
        )
        assert grad[i, j].item() == pytest.approx(((above - below) / (2 * step)).item(), rel=1e-6)


@OF_KINDS
def test_what_a_divergence_is(kind, backend):
    """Not negative; blind to a shift of either row; its gradient adds up to 0."""
    student, teacher, target = models(5, 12)
    near = student + 1e-3 * torch.randn(5, 12)
    for other in (teacher, near):
        rows, grad = ours_of(student, other, target, reduction="none", **of_kind(kind))
        assert (rows >= 0).all()
        assert grad.sum(-1).abs().max() < 1e-6
        moved = sgp.distillation(
            student + 8.0, other - 4.0, target, reduction="none", **of_kind(kind)
        )
        torch.testing.assert_close(moved, rows, rtol=1e-4, atol=1e-6)


# -- exact near 0 and 1, and for equal models ------------------------------------------------------


CERTAIN = {
    "both": ([20.0, 0.0, 1.0, -1.0, 0.5], [19.0, 0.5, 0.0, -1.0, 1.0]),
    "both, one more": ([30.0, 0.0, 1.0, -1.0, 0.5], [22.0, 0.5, 0.0, -1.5, 1.0]),
    "the student": ([25.0, 0.0, 1.0, -1.0, 0.5], [2.0, 0.5, 0.0, -1.0, 1.0]),
    "the teacher": ([2.0, 0.0, 1.0, -1.0, 0.5], [25.0, 0.5, 0.0, -1.0, 1.0]),
    "of different tokens": ([18.0, 0.0, 1.0, -1.0, 0.5], [0.0, 18.0, 0.5, -1.5, 1.0]),
}


@OF_KINDS
@pytest.mark.parametrize(("temperature", "reduction"), [(1.0, "mean"), (0.5, "none")])
@pytest.mark.parametrize("which", CERTAIN)
def test_every_element_is_right_where_a_model_is_certain(
    which, temperature, reduction, kind, backend
):
    """Where both are certain of one token, PyTorch's gradient of that token has no digit right."""
    student, teacher = (torch.tensor([row]) for row in CERTAIN[which])
    loss, grad = exact(student[0], teacher[0], kind, temperature=temperature)
    options = of_kind(kind, temperature=temperature, reduction=reduction)
    ours = ours_of(student, teacher, torch.tensor([0]), **options)
    error = ((ours[1][0].double() - grad) / grad).abs()
    assert error.max() < 1e-4, f"relative errors {error.tolist()} of {grad.tolist()}"
    assert abs(ours[0].item() / loss.item() - 1) < 1e-4


def test_pytorch_loses_what_is_small():
    """Otherwise the test above would say nothing."""
    student, teacher = (torch.tensor([row]) for row in CERTAIN["both"])
    leaf = student.clone().requires_grad_()
    (plain,) = torch.autograd.grad(plain_rows(leaf, teacher, "forward_kl").sum(), leaf)
    _, grad = exact(student[0], teacher[0], "forward_kl")
    assert (plain[0, 0].double() - grad[0]).abs() > 0.5 * grad[0].abs()


@OF_KINDS
def test_nearly_equal_models(kind, backend):
    student = 3 * torch.randn(2, 30)
    for size in (1e-1, 1e-3):
        teacher = student + size * torch.randn(2, 30)
        rows, grad = ours_of(
            student, teacher, torch.zeros(2, dtype=torch.int64), reduction="none", **of_kind(kind)
        )
        for i in range(2):
            value, row = exact(student[i], teacher[i], kind)
            # Logits of up to 10, rounded to 5e-7, are what is known of a distance of `size`.
            assert relative_error(grad[i], row) < 4e-6 / size
            assert abs(rows[i].item() / value.item() - 1) < 1e-5 / size


EQUAL = {
    "plain": {},
    "everything": {
        "temperature": 3.0, "softcap": 5.0, "teacher_softcap": 5.0, "logit_scale": -0.7,
        "teacher_logit_scale": -0.7,
    },
}  # fmt: skip


@pytest.mark.core
@OF_KINDS
@pytest.mark.parametrize("option", EQUAL)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_equal_models_have_loss_and_gradient_zero(dtype, option, kind, backend):
    """Exactly, also where a class is excluded and where one token is certain."""
    student, _, target = models(3, 259, dtype)
    student[0, 7] = 40.0
    student[2, 5] = student[2, 250] = -INF
    target[:] = 0
    for teacher, reduction in ((student.clone(), "mean"), (student.float(), "none")):
        loss, grad = ours_of(
            student, teacher, target, reduction=reduction, **of_kind(kind, **EQUAL[option])
        )
        assert (loss == 0).all(), f"a loss of {loss}"
        assert not grad.any(), f"gradients up to {grad.abs().max()}"


@OF_KINDS
def test_equal_models_of_many_columns(kind, backend):
    """Streamed in blocks; the teacher's rows begin elsewhere, as its vocabulary is longer."""
    student = 3 * torch.randn(2, 8193)
    for more in (0, 3):
        teacher = nn.functional.pad(student, (0, more), value=50.0)
        loss, grad = ours_of(student, teacher, torch.tensor([0, 8192]), **of_kind(kind))
        assert loss == 0
        assert not grad.any()


@OF_KINDS
def test_equal_models_in_float64(kind):
    student, _, target = models(5, 259, torch.float64)
    loss, grad = ours_of(student, student.clone(), target, **of_kind(kind))
    assert loss == 0
    assert not grad.any()


@OF_KINDS
@pytest.mark.parametrize(
    ("side", "reduction"), [("student", "mean"), ("teacher", "none"), ("both", "mean")]
)
def test_classes_of_probability_zero(side, reduction, kind, backend):
    """A logit of -inf in either model, or in both at different classes too."""
    student, teacher, _ = models(3, 40)
    target = torch.tensor([1, 2, 3])
    if side in ("student", "both"):
        student[:, 9] = student[0, 30] = -INF
    if side in ("teacher", "both"):
        teacher[:, 9] = teacher[0, 31 if side == "teacher" else 30] = -INF
    options = of_kind(kind, reduction=reduction)
    if (side, kind) in (("student", "forward_kl"), ("teacher", "reverse_kl")):
        loss = sgp.distillation(student, teacher, target, **options)
        assert (loss == INF).all(), "one model gives what the other excludes"
        return
    _, grad = check_distillation(student, teacher, target, **options)
    if side != "teacher":
        assert (grad[:, 9] == 0).all()


@OF_KINDS
def test_a_student_that_excludes_what_the_teacher_does_too(kind, backend):
    """A mask of most of the vocabulary, first and last columns too."""
    student, teacher, target = models(3, 300)
    for x in (student, teacher):
        x[:, :100] = x[:, 200:] = -INF
    check_distillation(student, teacher, target, **of_kind(kind, temperature=0.5))


# -- what is never read ----------------------------------------------------------------------------


@OF_KINDS
@pytest.mark.parametrize(
    ("side", "poison", "reduction"),
    [
        ("student", NAN, "mean"),
        ("teacher", NAN, "none"),
        ("teacher", INF, "mean"),
        ("both", INF, "none"),
        ("both", -INF, "mean"),
    ],
)
def test_ignored_rows_are_not_read(side, poison, reduction, kind, backend):
    student, teacher, target = models(4, 50)
    target[3] = IGNORE
    options = of_kind(kind, reduction=reduction, **OPTIONS["all"])
    expected = ours_of(student, teacher, target, **options)
    ignored = target == IGNORE
    if side != "teacher":
        student[ignored] = poison
    if side != "student":
        teacher[ignored] = poison
    loss, grad = ours_of(student, teacher, target, **options)
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])
    assert (grad[ignored] == 0).all()


@OF_KINDS
@pytest.mark.parametrize(
    ("longer", "reduction"), [(3, "mean"), (-3, "none"), (1, "none"), (-1, "mean")]
)
def test_columns_beyond_the_shorter_vocabulary_are_left_out(longer, reduction, kind, backend):
    """Whatever is there; the gradient there is exactly 0."""
    student, teacher, target = models(4, 40, longer=max(longer, 0))
    V = min(40, 40 + longer)
    teacher = teacher[:, : 40 + longer].contiguous()
    target[target >= V] = 0
    options = of_kind(kind, reduction=reduction, cross_entropy_weight=0.3)
    (student if longer < 0 else teacher)[:, V:] = NAN
    loss, grad = ours_of(student, teacher, target, **options)
    truth = results(
        sgp.reference.distillation, student[:, :V].double(), teacher[:, :V].double(), target,
        **options,
    )  # fmt: skip
    plain = results(
        sgp.reference.distillation, student[:, :V].clone(), teacher[:, :V], target, **options
    )
    assert_no_worse(loss, plain[0], truth[0])
    assert_no_worse(grad[:, :V], plain[1], truth[1])
    assert (grad[:, V:] == 0).all()
    assert grad.shape == student.shape


def test_neither_model_is_changed(backend):
    student, teacher, target = models(4, 40)
    before = student.clone(), teacher.clone()
    for reduction in EARLY_OR_LATE:
        ours_of(student, teacher, target, reduction=reduction)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every other column": lambda x: torch.stack([x, x * NAN], -1).flatten(1)[:, ::2],
    "every other row": lambda x: torch.stack([x, x * NAN], 1).flatten(0, 1)[::2],
    "columns of more": lambda x: torch.cat([x * NAN, x, x * NAN], 1)[:, x.shape[1] : -x.shape[1]],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.core
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("side", "kind"), [("student", "jsd"), ("teacher", "forward_kl"), ("both", "reverse_kl")]
)
def test_logits_are_read_where_they_are(side, kind, layout, backend):
    student, teacher, target = models(4, 37)
    given = [
        LAYOUTS[layout](x) if side in (name, "both") else x
        for name, x in (("student", student), ("teacher", teacher))
    ]
    leaf = given[0].detach().requires_grad_()
    loss = sgp.distillation(leaf, given[1], target, **of_kind(kind))
    (grad,) = torch.autograd.grad(loss, leaf)
    expected = ours_of(given[0].contiguous(), given[1].contiguous(), target, **of_kind(kind))
    assert_no_worse(loss, expected[0], expected[0])
    assert_no_worse(grad, expected[1], expected[1])


def test_time_sliced_and_vocabulary_first(backend):
    """(B, V, T) of a (B, T, V) tensor, without its last token."""
    student, teacher, _ = models(10, 9)
    student, teacher = (x.view(2, 5, 9)[:, :-1] for x in (student, teacher))
    target = torch.randint(9, (2, 4))
    target[0, 1] = IGNORE
    given = student.movedim(-1, 1), teacher.movedim(-1, 1), target
    rows = ours_of(*given, reduction="none")
    flat = ours_of(student.flatten(0, 1), teacher.flatten(0, 1), target.flatten(), reduction="none")
    torch.testing.assert_close(rows[0].flatten(), flat[0])
    torch.testing.assert_close(rows[1].movedim(1, -1).flatten(0, 1), flat[1])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_row_without_batch(reduction, backend):
    student, teacher = torch.randn(7), torch.randn(9)
    single = ours_of(student, teacher, torch.tensor(3), reduction=reduction)
    batch = ours_of(student[None], teacher[None], torch.tensor([3]), reduction=reduction)
    assert torch.equal(single[0].flatten(), batch[0].flatten())
    assert torch.equal(single[1], batch[1][0])


# -- labels, weights, divisors ---------------------------------------------------------------------


@pytest.mark.parametrize("label", [40, 77, -5])
def test_a_label_matters_only_where_it_is_used(label, backend):
    student, teacher, target = models(4, 40)
    strange = target.clone()
    strange[2] = label
    assert torch.equal(
        sgp.distillation(student, teacher, strange), sgp.distillation(student, teacher, target)
    )
    for options in ({"cross_entropy_weight": 0.1}, {"return_stats": True}):
        with pytest.raises(IndexError, match=rf"target\[2\] = {label} is outside \[0, 40\)"):
            sgp.distillation(student, teacher, strange, **options)


def test_a_label_beyond_the_common_columns_has_no_probability(backend):
    student, teacher, target = models(4, 40)
    target[2] = 38
    assert sgp.distillation(student, teacher[:, :38], target).isfinite()
    with pytest.raises(IndexError, match=r"target\[2\] = 38 is outside \[0, 38\)"):
        sgp.distillation(student, teacher[:, :38], target, cross_entropy_weight=1.0)


@pytest.mark.parametrize("ignore_index", [0, 3, -1, None])
def test_ignore_index(ignore_index, backend):
    student, teacher, target = models(5, 9)
    ignored = target == IGNORE
    target[ignored] = IGNORE if ignore_index is None else ignore_index
    target[~ignored] = torch.tensor([5, 6, 7, 8])
    given = {"ignore_index": ignore_index, "return_stats": True}
    loss, stats = sgp.distillation(student, teacher, target, **given)
    alone = sgp.distillation(student[~ignored], teacher[~ignored], target[~ignored])
    torch.testing.assert_close(loss, alone)  # rows of 9 begin elsewhere: the last bits differ
    assert (stats.log_prob[ignored] == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_to_learn(reduction, backend):
    """No kept row: 0 with zero gradients, whatever is there. No row at all: the same."""
    student, teacher = torch.full((2, 5, 3), NAN), torch.full((2, 6, 3), NAN)
    for N in (2, 0):
        loss, grad = ours_of(
            student[:N], teacher[:N], torch.full((N, 3), IGNORE), reduction=reduction
        )
        assert not loss.any()
        assert not grad.any()
        assert grad.shape == (N, 5, 3)


@pytest.mark.parametrize("denominator", [3.0, torch.tensor(7), torch.tensor([2.5]), 0])
def test_denominator(denominator, backend):
    student, teacher, target = models(5, 20)
    ours = ours_of(student, teacher, target, denominator=denominator)
    total = ours_of(student, teacher, target, reduction="sum")
    divisor = float(denominator)
    for value, whole in zip(ours, total, strict=True):
        expected = whole / divisor if divisor else torch.zeros_like(whole)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8)


def test_token_weights(backend):
    student, teacher, target = models(5, 20)
    weights = torch.tensor([1.0, 9.0, 0.0, 2.0, 0.5])  # of an ignored row, and of none
    rows = sgp.distillation(student, teacher, target, reduction="none")
    given = {"token_weight": weights}
    loss = sgp.distillation(student, teacher, target, **given)
    torch.testing.assert_close(loss, (weights * rows).sum() / 3.5)
    with pytest.raises(ValueError, match=r"sgp\.distillation: token_weight of row 0 is -1\.0"):
        sgp.distillation(student, teacher, target, token_weight=-weights)
    weights = weights * torch.tensor([1, 1, 1, -1, 1])
    check_distillation(student, teacher, target, reduction="sum", token_weight=weights)


@pytest.mark.parametrize("shift", [False, True, 2])
@pytest.mark.parametrize("reduction", ["mean", "none", "sequence_mean"])
def test_a_selection_is_its_labels(reduction, shift, backend):
    student, teacher, target = models(8, 9)
    labels, weights = target.view(2, 4), torch.rand(2, 4)
    logits, other = (x.view(2, 4, 9) for x in (student, teacher))
    selection = sgp.Selection.from_labels(labels, shift=shift, token_weight=weights)
    options = of_kind("jsd", reduction=reduction, cross_entropy_weight=0.1)
    loss, grad = ours_of(
        logits.movedim(-1, 1), other.movedim(-1, 1), labels, shift=shift, token_weight=weights,
        **options,
    )  # fmt: skip
    for x, t in ((logits, other), (student, teacher)):
        found = ours_of(x, t, selection, **options)
        torch.testing.assert_close(found[0], loss)
        torch.testing.assert_close(found[1].view(2, 4, 9), grad.movedim(1, -1))


def test_packed_sequences(backend):
    student, teacher, target = models(8, 30)
    ends = torch.tensor([0, 3, 3, 7])  # one without tokens, and padding
    target[7:] = IGNORE
    selection = sgp.Selection.from_labels(target, cu_seqlens=ends)
    check_distillation(
        student, teacher, selection, torch.randn(3), reduction="sequence_mean", temperature=0.5
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
def test_integer_targets_of_any_width(dtype, backend):
    student, teacher, target = models(4, 20)
    target = target.clamp(min=0)
    given = {"cross_entropy_weight": 0.3}
    ours = sgp.distillation(student, teacher, target.to(dtype), **given)
    assert torch.equal(ours, sgp.distillation(student, teacher, target, **given))


# -- statistics, and the module --------------------------------------------------------------------


@pytest.mark.parametrize("option", ["plain", "all"])
@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
@OF_KINDS
def test_statistics_are_the_students(kind, reduction, option, backend):
    """At the temperature of the loss, over the common columns."""
    student, teacher, target = models(6, 40)
    teacher = teacher[:, :38]
    target[target >= 38] = 0
    options = OPTIONS[option]
    loss, grad = ours_of(student, teacher, target, reduction=reduction, **of_kind(kind, **options))
    leaf = student.clone().requires_grad_()
    other, stats = sgp.distillation(
        leaf, teacher, target, reduction=reduction, return_stats=True, **of_kind(kind, **options)
    )
    assert isinstance(stats, sgp.TokenLogProbs)
    assert_no_worse(other, loss, loss)
    other.backward(torch.ones_like(other))
    assert_no_worse(leaf.grad, grad, grad)
    given = {k: v for k, v in options.items() if k in ("temperature", "softcap", "logit_scale")}
    truth = sgp.reference.token_log_probs(student[:, :38].double(), target, **given)
    plain = sgp.reference.token_log_probs(student[:, :38], target, **given)
    for name in ("log_prob", "entropy", "lse"):
        value = getattr(stats, name)
        assert not value.requires_grad
        assert value.shape == target.shape
        assert_no_worse(value, getattr(plain, name), getattr(truth, name))
    assert torch.equal(stats.is_top1, truth.is_top1)
    assert stats.argmax is None


def test_statistics_of_several_dimensions(backend):
    student, teacher, target = models(6, 40)
    student, teacher = (x.view(2, 3, 40).movedim(-1, 1) for x in (student, teacher))
    loss, stats = sgp.distillation(student, teacher, target.view(2, 3), return_stats=True)
    assert [x.shape for x in stats[:4]] == [(2, 3)] * 4
    assert loss.dim() == 0


def test_the_module(backend):
    student, teacher, target = models(6, 40)
    options = of_kind("jsd", reduction="sum", ignore_index=-1, **OPTIONS["all"])
    target[target == IGNORE] = -1
    module = sgp.DistillationLoss(**options)
    expected = sgp.distillation(student, teacher, target, **options)
    assert torch.equal(module(student, teacher, target), expected)
    weights = torch.rand(6)
    weighted = sgp.distillation(student, teacher, target, token_weight=weights, **options)
    assert torch.equal(module(student, teacher, target, token_weight=weights), weighted)
    assert "jsd" in repr(module)
    assert "temperature=1.7" in repr(module)
    mean = sgp.DistillationLoss()(student, teacher, target.clamp(min=0), denominator=4)
    assert torch.equal(mean, sgp.distillation(student, teacher, target.clamp(min=0), denominator=4))
    with pytest.raises(ValueError, match=r"sgp\.DistillationLoss: divergence = 'kl'"):
        sgp.DistillationLoss(divergence="kl")


# -- a teacher's few tokens ------------------------------------------------------------------------


@pytest.mark.core
@OF_KINDS
@pytest.mark.parametrize("k", [1, 4, 39])
@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
def test_top_k(reduction, k, kind):
    student, teacher, target = models(6, 40)
    top = top_of(teacher, target, k, temperature=1.3)
    options = of_kind(kind, temperature=1.3, cross_entropy_weight=0.2, softcap=6.0)
    upstream = torch.randn(6) if reduction == "none" else None
    check_distillation(student, top, target, upstream, reduction=reduction, **options)


@OF_KINDS
@pytest.mark.parametrize("lengths", [[4, 0, 1, 2, 3], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], ids=str)
def test_ragged_top_k(lengths, kind):
    student, teacher, target = models(6, 40)
    ragged = ragged_of(top_of(teacher, target, 4), lengths)
    options = of_kind(kind, cross_entropy_weight=0.3, logit_scale=0.7)
    check_distillation(student, ragged, target, torch.randn(6), reduction="none", **of_kind(kind))
    check_distillation(student, ragged, target, torch.randn(6), reduction="none", **options)
    if sum(lengths):
        first = ragged.padded().indices[:, 0]
        labels = target.masked_scatter(target != IGNORE, first)  # in the list, where there is one
        check_distillation(student, ragged, labels, torch.randn(6), reduction="none", **options)
    rows, grad = ours_of(student, ragged, target, reduction="none", **of_kind(kind))
    kept = (target != IGNORE).nonzero().flatten()
    without = kept[torch.tensor(lengths) == 0]
    assert (rows[without] == 0).all(), "nothing is known of these rows"
    assert (grad[without] == 0).all()


@OF_KINDS
def test_all_tokens_are_the_whole_distribution(kind):
    student, teacher, target = models(6, 12)
    kept = teacher[target != IGNORE].double().log_softmax(-1)
    order = torch.stack([torch.randperm(12) for _ in kept])
    top = sgp.TopK(order, kept.gather(1, order).float())
    found = ours_of(student, top, target, **of_kind(kind))
    truth = results(
        sgp.reference.distillation, student.double(), teacher.double(), target, **of_kind(kind)
    )
    for value, exactly in zip(found, truth, strict=True):
        assert relative_error(value, exactly) < 2e-6


@OF_KINDS
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_top_k_of_narrow_dtypes(dtype, kind):
    student, teacher, target = models(6, 40, dtype)
    top = top_of(teacher, target, 5)
    top = sgp.TopK(top.indices.int(), top.log_probs.to(dtype))
    check_distillation(student, top, target, **of_kind(kind))


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
@pytest.mark.parametrize("rest", [0.0, 1e-7, 1e-4])
def test_a_teacher_that_leaves_next_to_nothing_to_the_others(rest, kind):
    """Also where rounding made the sum more than 1: then it is divided by the sum."""
    student = torch.randn(1, 6)
    q = torch.tensor([[0.75, 0.25]], dtype=torch.float64) * (1 - rest)
    top = sgp.TopK(torch.tensor([[4, 1]]), q.log().float())
    target = torch.tensor([0])
    check_distillation(student, top, target, **of_kind(kind))
    rounded = sgp.TopK(torch.tensor([[4, 1]]), torch.tensor([[0.5, 0.5]]).log().bfloat16())
    check_distillation(student, rounded, target, **of_kind(kind))


@OF_KINDS
def test_a_student_that_leaves_next_to_nothing_to_the_others(kind):
    """Less than float32's smallest number: its logarithm is what counts."""
    student = torch.tensor([[80.0, 0.0, -60.0, -61.0], [3.0, 2.0, -INF, -INF]])
    indices, log_probs = (
        torch.tensor([[0, 1], [0, 1]]),
        torch.tensor([[0.6, 0.3], [0.75, 0.25]]).log(),
    )
    top, target = sgp.TopK(indices[:1], log_probs[:1]), torch.tensor([0])
    ours = ours_of(student[:1], top, target, **of_kind(kind))
    truth = results(
        sgp.reference.distillation, student[:1].double(), wide(top), target, **of_kind(kind)
    )
    assert relative_error(ours[0], truth[0]) < 1e-5
    if kind == "forward_kl":  # the others' gradients are 1e-33, of which float64 has no digit
        assert relative_error(ours[1], truth[1]) < 1e-5
    if kind == "jsd":  # the teacher leaves 0, or a rounding, to what the student excludes
        other = sgp.TopK(indices[1:], log_probs[1:])
        assert sgp.distillation(student[1:], other, target, **of_kind(kind)).isfinite()


@OF_KINDS
def test_equal_buckets(kind):
    """Nothing is left but the rounding of what the server sent."""
    student, _, target = models(6, 40)
    top = top_of(student, target, 5)
    loss, grad = ours_of(student, top, target, reduction="sum", **of_kind(kind))
    assert abs(loss) < 1e-6
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_top_k_beside_the_other_arguments(reduction):
    student, teacher, target = models(8, 20)
    selection = sgp.Selection.from_labels(
        target.view(2, 4), shift=True, token_weight=torch.rand(2, 4)
    )
    top = sgp.TopK(*teacher[selection.rows].log_softmax(-1).topk(3)[::-1])
    shape = {"none": (2, 4), "sequence_sum": (2,), "sequence_mean": (2,)}.get(reduction, ())
    check_distillation(
        student.view(2, 4, 20), top, selection, torch.randn(shape), reduction=reduction
    )
    loss, stats = sgp.distillation(student, top, selection, reduction=reduction, return_stats=True)
    expected = sgp.token_log_probs(student, selection)
    torch.testing.assert_close(stats.log_prob, expected.log_prob)
    torch.testing.assert_close(stats.entropy, expected.entropy)
    assert loss.shape == shape


@OF_KINDS
def test_top_k_never_reads_ignored_rows(kind):
    student, teacher, target = models(6, 40)
    top = top_of(teacher, target, 3)
    expected = ours_of(student, top, target, **of_kind(kind))
    student[target == IGNORE] = NAN
    for value, other in zip(ours_of(student, top, target, **of_kind(kind)), expected, strict=True):
        assert torch.equal(value, other)


@OF_KINDS
def test_top_k_where_the_kernels_are_asked_for(kind, monkeypatch):
    """They do it, or say that they do not."""
    monkeypatch.setenv("SGP_BACKEND", "triton")
    student, teacher, target = models(6, 40)
    try:
        check_distillation(student, top_of(teacher, target, 3), target, **of_kind(kind))
    except RuntimeError as error:
        assert "SGP_BACKEND=triton cannot run" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"teacher_softcap": 3.0}, "teacher_softcap"),
        ({"teacher_logit_scale": 2.0}, "teacher_logit_scale"),
        ({"teacher_index": torch.zeros(6, dtype=torch.int64)}, "teacher_index"),
    ],
    ids=str,
)
def test_what_top_k_refuses(options, words):
    student, teacher, target = models(6, 40)
    top = top_of(teacher, target, 3)
    with pytest.raises(ValueError, match=rf"sgp\.distillation: .*{words}"):
        sgp.distillation(student, top, target, **options)


def test_top_k_of_other_rows_or_another_vocabulary():
    student, teacher, target = models(6, 40)
    top = top_of(teacher, target, 3)
    for labels, kept in ((target.clamp(min=0), 6), (torch.full_like(target, IGNORE), 0)):
        with pytest.raises(ValueError, match=rf"sgp\.distillation: .*5 rows.* {kept}\b"):
            sgp.distillation(student, top, labels)
    V = int(top.indices.max())
    with pytest.raises(ValueError, match=rf"= {V} is outside \[0, {V}\)"):
        sgp.distillation(student[:, :V], top, target.clamp(max=V - 1))


# -- several teachers ------------------------------------------------------------------------------


def several(N=7, V=30):
    """(student, three teachers of other lengths and dtypes, labels, whose each row is)."""
    student, _, target = models(N, V)
    target = torch.where(target == IGNORE, target, target.clamp(max=V - 3))
    teachers = [
        2 * torch.randn(N, V + 3),
        (2 * torch.randn(N, V - 1)).bfloat16(),
        2 * torch.randn(V - 2, N).t(),
    ]
    return student, teachers, target, torch.tensor([0, 2, 2, 1, 0, 1, 2])[:N]


@pytest.mark.core
@OF_KINDS
@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
def test_each_row_has_its_teacher(reduction, kind, backend):
    student, teachers, target, index = several()
    options = of_kind(kind, **OPTIONS["all"])
    upstream = torch.randn(7) if reduction == "none" else None
    loss, grad = check_distillation(
        student, teachers, target, upstream, reduction=reduction, teacher_index=index, **options
    )
    rows = sgp.distillation(
        student, teachers, target, teacher_index=index, reduction="none", **options
    )
    for i in range(7):
        mine = teachers[int(index[i])][i : i + 1, :28]
        alone = ours_of(
            student[i : i + 1, :28].contiguous(), mine, target[i : i + 1], reduction="none",
            **options,
        )  # fmt: skip
        torch.testing.assert_close(rows[i : i + 1], alone[0])
        if upstream is not None:
            torch.testing.assert_close(
                grad[i, :28], alone[1][0] * upstream[i], rtol=1e-5, atol=1e-7
            )
    assert (grad[:, 28:] == 0).all()
    assert loss.shape == ((7,) if reduction == "none" else ())


def test_rows_of_the_other_teachers_are_not_read(backend):
    student, teachers, target, index = several()
    options = {"teacher_index": index, "cross_entropy_weight": 0.5}
    expected = ours_of(student, teachers, target, **options)
    poisoned = [x.clone() for x in teachers]
    for number, x in enumerate(poisoned):
        x[(index != number) | (target == IGNORE)] = NAN
    strange = torch.where(target == IGNORE, 99, index)
    for given in (index, strange):
        options["teacher_index"] = given
        for value, other in zip(
            ours_of(student, poisoned, target, **options), expected, strict=True
        ):
            assert torch.equal(value, other)


def test_the_index_is_moved_with_its_token(backend):
    student, teachers, target, index = several(6)
    student, *teachers = (x.reshape(2, 3, -1) for x in (student, *teachers))
    labels, index = target.view(2, 3), index.view(2, 3)

    def value(x, theirs, y, whose, **options):
        theirs = [t.movedim(-1, 1) for t in theirs]
        return ours_of(x.movedim(-1, 1), theirs, y, teacher_index=whose, **options)

    for ahead in (1, 2):
        ours = value(student, teachers, labels, index, shift=ahead)
        flat = value(student, teachers, labels, index.flatten(), shift=ahead)
        cut = value(
            student[:, :-ahead], [t[:, :-ahead] for t in teachers], labels[:, ahead:],
            index[:, ahead:],
        )  # fmt: skip
        assert torch.equal(ours[0], flat[0])
        torch.testing.assert_close(ours[0], cut[0])
        torch.testing.assert_close(ours[1][..., :-ahead], cut[1])
        assert not ours[1][..., -ahead:].any()


def test_several_teachers_and_a_selection(backend):
    """A Selection has moved its labels to the rows; the index is then one a row."""
    student, teachers, target, index = several(6)
    selection = sgp.Selection.from_labels(target.view(2, 3))
    expected = sgp.distillation(student, teachers, target, teacher_index=index)
    for given in (index, index.view(2, 3)):
        found = sgp.distillation(student, teachers, selection, teacher_index=given)
        torch.testing.assert_close(found, expected)


def test_one_teacher_in_a_list(backend):
    student, teacher, target = models(4, 20)
    index = torch.zeros(4, dtype=torch.int64)
    found = sgp.distillation(student, [teacher], target, teacher_index=index)
    torch.testing.assert_close(found, sgp.distillation(student, teacher, target))


@pytest.mark.parametrize("wrong", [3, -1])
def test_an_index_of_no_teacher(wrong):
    student, teachers, target, index = several()
    index[3] = wrong
    with pytest.raises((IndexError, ValueError), match=rf"teacher_index.*{wrong}.*\[0, 3\)"):
        sgp.distillation(student, teachers, target, teacher_index=index)


# -- autograd and torch.compile --------------------------------------------------------------------


@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
@OF_KINDS
def test_no_second_derivative(kind, reduction, backend):
    student, teacher, target = models(4, 20)
    leaf = student.requires_grad_()
    loss = sgp.distillation(leaf, teacher, target, reduction=reduction, **of_kind(kind)).sum()
    with pytest.raises(RuntimeError, match=r"sgp\.distillation has no second derivative"):
        torch.autograd.grad(loss, leaf, create_graph=True)[0].square().sum().backward()


def test_a_second_backward(backend):
    student, teacher, target = models(4, 20)
    leaf = student.requires_grad_()
    for reduction in EARLY_OR_LATE:
        loss = sgp.distillation(leaf, teacher, target, reduction=reduction).sum()
        loss.backward(retain_graph=True)
        if reduction == "mean":
            with pytest.raises(RuntimeError, match=r"second|twice|again"):
                loss.backward()
        else:
            loss.backward()


@pytest.mark.parametrize("form", ["one", "list"])
def test_a_teacher_that_requires_grad_gets_none(form, backend):
    student, teacher, target = models(4, 20)
    student.requires_grad_()
    teacher.requires_grad_()
    options = {}
    given = teacher
    if form == "list":
        given, options = [teacher, teacher], {"teacher_index": torch.tensor([0, 1, 1, 0])}
    for reduction in EARLY_OR_LATE:
        loss = sgp.distillation(student, given, target, reduction=reduction, **options).sum()
        found = torch.autograd.grad(loss, (student, teacher), allow_unused=True)
        assert found[0].any()
        assert found[1] is None
    frozen = sgp.distillation(student.detach(), given, target, **options)
    assert not frozen.requires_grad
    torch.testing.assert_close(frozen, sgp.distillation(student, given, target, **options).detach())


@OF_KINDS
def test_without_gradients(kind, backend):
    student, teacher, target = models(4, 20)
    loss = ours_of(student, teacher, target, **of_kind(kind))[0]
    assert_no_worse(sgp.distillation(student, teacher, target, **of_kind(kind)), loss, loss)
    with torch.no_grad():
        other = sgp.distillation(student.requires_grad_(), teacher, target, **of_kind(kind))
    assert not other.requires_grad
    assert_no_worse(other, loss, loss)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("form", ["mean", "none", "statistics", "several", "selection"])
def test_compiled_is_eager(form, backend):
    """One graph, and the same bits."""
    torch._dynamo.reset()
    student, teacher, target = models(6, 40)
    index = torch.tensor([0, 1, 0, 1, 1, 0])
    given = [teacher, teacher.flip(0)] if form == "several" else teacher
    selection = sgp.Selection.from_labels(target)

    def loss_of(x, t, y, i):
        options = {"divergence": "jsd", "beta": BETA, "temperature": 1.5, "softcap": 6.0}
        if form == "several":
            options["teacher_index"] = i
        if form == "statistics":
            loss, stats = sgp.distillation(x, t, y, return_stats=True, **options)
            return loss + 0 * stats.entropy.sum()
        return sgp.distillation(x, t, y, reduction="none" if form == "none" else "mean", **options)

    labels = selection if form == "selection" else target
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True, dynamic=False)
    found = []
    for function in (loss_of, compiled):
        leaf = student.clone().requires_grad_()
        loss = function(leaf, given, labels, index)
        found.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf)))
    for value, other in zip(*found, strict=True):
        assert torch.equal(value, other)
    torch._dynamo.reset()


# -- errors ----------------------------------------------------------------------------------------

LOGITS, TEACHER, TARGET = torch.zeros(3, 5), torch.zeros(3, 6), torch.tensor([0, 1, 2])
INDEX = torch.zeros(3, dtype=torch.int64)
ERRORS = [
    ({"divergence": "kl"}, ValueError, ["divergence = 'kl'", "forward_kl", "reverse_kl", "jsd"]),
    ({"divergence": "jsd", "beta": 0.0}, ValueError, ["beta = 0.0", "forward_kl", "reverse_kl"]),
    ({"divergence": "jsd", "beta": 1.0}, ValueError, ["beta = 1.0", "forward_kl", "reverse_kl"]),
    ({"divergence": "jsd", "beta": 1.5}, ValueError, ["beta = 1.5"]),
    ({"divergence": "jsd", "beta": NAN}, ValueError, ["beta = nan"]),
    ({"temperature": 0.0}, ValueError, ["temperature = 0.0"]),
    ({"temperature": INF}, ValueError, ["temperature = inf"]),
    ({"cross_entropy_weight": INF}, ValueError, ["cross_entropy_weight = inf"]),
    ({"cross_entropy_weight": "1"}, TypeError, ["cross_entropy_weight = '1'"]),
    ({"reduction": "batchmean"}, ValueError, ["reduction = 'batchmean'", "sequence_mean"]),
    ({"reduction": "sum", "denominator": 2}, ValueError, ["denominator", "'sum'"]),
    ({"softcap": -1.0}, ValueError, ["softcap = -1.0"]),
    ({"teacher_softcap": 0.0}, ValueError, ["teacher_softcap = 0.0"]),
    ({"teacher_logit_scale": INF}, ValueError, ["teacher_logit_scale = inf"]),
    ({"token_weight": torch.ones(4)}, ValueError, ["token_weight", "(4,)", "(3,)"]),
    ({"teacher": torch.zeros(4, 5)}, ValueError, ["teacher", "(4, 5)", "(3, 5)"]),
    ({"teacher": torch.zeros(3, 5, 1)}, ValueError, ["teacher", "(3, 5, 1)", "(3, 5)"]),
    ({"teacher": torch.zeros(3, 0)}, ValueError, ["teacher", "(3, 0)"]),
    ({"teacher": torch.zeros(3, 5).long()}, TypeError, ["teacher", "int64"]),
    ({"teacher": torch.zeros(3, 5).to_sparse()}, TypeError, ["teacher", "sparse"]),
    ({"teacher": {"logits": 0}}, TypeError, ["teacher", "dict", "TopK"]),
    ({"teacher": [TEACHER, 3], "teacher_index": INDEX}, TypeError, ["teacher[1]", "int"]),
    ({"teacher": [], "teacher_index": INDEX}, ValueError, ["teacher", "empty"]),
    ({"teacher": [TEACHER, TEACHER]}, ValueError, ["teacher_index", "2"]),
    ({"teacher_index": INDEX}, ValueError, ["teacher_index", "list"]),
    (
        {"teacher": [TEACHER, TEACHER], "teacher_index": INDEX[:2]},
        ValueError,
        ["teacher_index", "(2,)", "(3,)"],
    ),
    (
        {"teacher": [TEACHER, TEACHER], "teacher_index": INDEX.float()},
        TypeError,
        ["teacher_index", "float32"],
    ),
    (
        {"teacher": [TEACHER, torch.zeros(2, 5)], "teacher_index": INDEX},
        ValueError,
        ["teacher[1]", "(2, 5)", "(3, 5)"],
    ),
    ({"target": torch.zeros(3, 5)}, TypeError, ["target", "float32"]),
    ({"target": torch.zeros(4, dtype=torch.int64)}, ValueError, ["(3, 5)", "(4,)"]),
    ({"target": [0, 1, 2]}, TypeError, ["target", "list"]),
    ({"input": torch.zeros(3, 5).long()}, TypeError, ["input", "int64"]),
    ({"return_stats": 1}, TypeError, ["return_stats = 1"]),
    ({"shift": -1}, ValueError, ["shift = -1"]),
]


@pytest.mark.parametrize("name", ["sgp.distillation", "sgp.reference.distillation"])
@pytest.mark.parametrize(
    ("kwargs", "error", "words"), ERRORS, ids=lambda x: ", ".join(x) if isinstance(x, dict) else ""
)
def test_errors(kwargs, error, words, name):
    function = sgp.distillation if name == "sgp.distillation" else sgp.reference.distillation
    arguments = {"input": LOGITS, "teacher": TEACHER, "target": TARGET, **kwargs}
    with pytest.raises(error) as caught:
        function(**arguments)
    assert str(caught.value).startswith(f"{name}: "), str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_shifted_selection_is_not_shifted_again():
    selection = sgp.Selection.from_labels(TARGET, shift=True)
    with pytest.raises(ValueError, match=r"sgp\.distillation: shift=True together with a Sel"):
        sgp.distillation(LOGITS, TEACHER, selection, shift=True)
    with pytest.raises(ValueError, match="carries its own weights"):
        sgp.distillation(LOGITS, TEACHER, selection, token_weight=torch.ones(3))


@OF_KINDS
@pytest.mark.parametrize("V", [5, 300, 5_000])
@pytest.mark.parametrize("low", [-95.0, -200.0, -1e4, -1e9])
def test_where_the_student_has_no_probability(low, V, kind, backend):
    """The teacher's mass counts although the student's exponentials there vanish beside its own."""
    student, teacher = torch.full((2, V), low), torch.full((2, V), -20.0)
    student[:, V // 2] = 0.0
    teacher[0, : V // 2], teacher[1, -1] = 0.0, 0.0
    options = of_kind(kind, reduction="none")
    ours = ours_of(student, teacher, torch.zeros(2, dtype=torch.int64), **options)
    truth = results(
        sgp.reference.distillation, student.double(), teacher.double(),
        torch.zeros(2, dtype=torch.int64), **options,
    )  # fmt: skip
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours[1].double(), truth[1], rtol=1e-5, atol=1e-7)


def test_a_label_that_the_student_excludes(backend):
    """Statistics are asked for, and the loss stays what it is: 0 times infinity does not count."""
    student = torch.tensor([[0.0, -INF, 1.0]])
    teacher = torch.tensor([[0.0, -INF, 2.0]])
    loss, stats = sgp.distillation(student, teacher, torch.tensor([1]), return_stats=True)
    assert loss == sgp.distillation(student, teacher, torch.tensor([1]))
    assert loss.isfinite()
    assert stats.log_prob[0] == -INF


def test_a_score_of_infinity(backend):
    student = torch.tensor([[0.0, INF, 1.0]])
    _, stats = sgp.distillation(student, torch.zeros(1, 3), torch.tensor([0]), return_stats=True)
    assert stats.lse[0] == INF


@OF_KINDS
@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_an_offset_of_all_scores_is_nothing_to_a_top_k(offset, kind):
    plain = (torch.randn(4, 50) * 32).round() / 16  # a sum with 1e6 is exact
    top = sgp.TopK(torch.tensor([[1, 2, 3]] * 4), torch.tensor([[0.3, 0.2, 0.1]] * 4).log())
    options = of_kind(kind, cross_entropy_weight=0.3)
    target = torch.tensor([0, 1, 2, 40])
    expected = ours_of(plain, top, target, **options)
    for value, exactly in zip(
        ours_of(plain + offset, top, target, **options), expected, strict=True
    ):
        torch.testing.assert_close(value, exactly, rtol=1e-6, atol=1e-7)


@OF_KINDS
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_statistics_beside_a_top_k(reduction, kind, backend):
    student, teacher, target = models(6, 40)
    top = top_of(teacher, target, 4)
    plain = sgp.token_log_probs(student, target)
    _, stats = sgp.distillation(
        student, top, target, reduction=reduction, return_stats=True, **of_kind(kind)
    )
    hidden, head = torch.randn(6, 8), torch.randn(40, 8)
    _, of_head = sgp.linear_distillation(
        hidden, head, target, top, reduction=reduction, return_stats=True, **of_kind(kind)
    )
    of_logits = sgp.token_log_probs(hidden @ head.T, target)
    for found, plain_ones in ((stats, plain), (of_head, of_logits)):
        for name in ("log_prob", "entropy", "lse"):
            torch.testing.assert_close(getattr(found, name), getattr(plain_ones, name))


@pytest.mark.parametrize("gap", [15.0, 20.0, 30.0])
def test_a_rest_keeps_its_digits(gap):
    """1 - 0.9999999 has none left; expm1 of the log-probability has all."""
    teacher = torch.zeros(1, 20, dtype=torch.float64)
    teacher[0, 3] = gap
    log_q = teacher.log_softmax(-1)
    log_probs, indices = log_q.topk(5)
    top, target = sgp.TopK(indices, log_probs), torch.tensor([0])
    loss = sgp.distillation(torch.zeros(1, 20), top, target, divergence="reverse_kl")
    rest = 15 / (19 + math.exp(gap))  # of the teacher's mass; of the student's it is 15 / 20
    exactly = 0.75 * math.log(0.75 / rest) + sum((0.05 * (math.log(0.05) - log_probs[0])).tolist())
    assert loss.item() == pytest.approx(exactly, rel=1e-6)


@OF_KINDS
def test_many_columns_beside_one_that_is_nearly_certain(kind, backend):
    """A thread's own columns add up before its maximum, which is left out of the sum."""
    student = torch.randn(2, 3_000) - 20
    teacher = student + 0.3 * torch.randn(2, 3_000)
    student[:, 7], teacher[:, 7] = 5.0, 6.0
    target = torch.tensor([7, 7])
    options = of_kind(kind, reduction="none", cross_entropy_weight=0.5)
    _, grad = ours_of(student, teacher, target, **options)
    _, truth = results(
        sgp.reference.distillation, student.double(), teacher.double(), target, **options
    )
    torch.testing.assert_close(grad[:, 7].double(), truth[:, 7], rtol=1e-4, atol=0)


def test_a_mixture_in_float64():
    student, teacher, target = models(6, 40, torch.float64)
    options = of_kind("jsd", reduction="none")
    ours = ours_of(student, teacher, target, **options)
    truth = results(sgp.reference.distillation, student, teacher, target, **options)
    for value, exactly in zip(ours, truth, strict=True):
        torch.testing.assert_close(value, exactly, rtol=1e-12, atol=1e-14)

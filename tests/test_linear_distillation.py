"""`sgp.linear_distillation` and its module: values, gradients, refusals, and what they cost.

The truth is `sgp.reference.linear_distillation` in float64.
"""

# ruff: noqa: ARG001  (fixtures are asked for by name, for what they do)

import math
from functools import partial
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

import sgp
from sgp.rows import by_torch
from sgp.tolerance import relative_error
from sgp.train.memory import cpu_peak
from tests.divergences import IGNORE, KINDS, of_kind, ragged_of, top_of, wide
from tests.oracle import in_float64
from tests.test_linear import assert_right, cast, flops, leaves_of

INF, NAN = math.inf, math.nan
N, V, D, D_T = 7, 23, 5, 8
ALL, INPUT, HEAD, BIAS = (
    (True, True, True),
    (True, False, False),
    (False, True, True),
    (False, False, True),
)
NOBODY = (False, False, False)
EARLY_OR_LATE = ["mean", "none"]  # the gradients come with the loss, or in backward
REDUCTIONS = ["mean", "sum", "none", "sequence_sum", "sequence_mean"]
OF_KINDS = pytest.mark.parametrize("kind", KINDS)
SCORES = {"softcap": 5.0, "logit_scale": -0.7, "teacher_softcap": 4.0, "teacher_logit_scale": 1.3}
EVERYTHING = {"cross_entropy_weight": 0.4, "temperature": 1.7, **SCORES}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(29)


@pytest.fixture
def target():
    return torch.tensor([3, IGNORE, 22, 0, IGNORE, 3, 7])


@pytest.fixture
def tensors():
    """The student's hidden states, head and bias."""
    return [torch.randn(shape) for shape in ((N, D), (V, D), (V,))]


@pytest.fixture
def teacher():
    """Another width, and a vocabulary that two rows pad."""
    return [torch.randn(shape) for shape in ((N, D_T), (V + 2, D_T), (V + 2,))]


def run(function, tensors, teacher, target, upstream=None, needs=ALL, **options):
    """[loss, gradient of input, of weight, of bias]; None where there is none."""
    leaves = leaves_of(tensors, needs)
    theirs = teacher if isinstance(teacher, sgp.TopK) else teacher[0]
    if not isinstance(teacher, sgp.TopK):
        options |= {"teacher_weight": teacher[1], "teacher_bias": teacher[2]}
    loss = function(*leaves[:2], target, theirs, linear_bias=leaves[2], **options)
    if loss.requires_grad:
        loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype))
    return [loss.detach(), *(None if x is None else x.grad for x in leaves)]


def ours_of(*arguments, **options):
    return run(sgp.linear_distillation, *arguments, **options)


def truth_of(tensors, teacher, *arguments, **options):
    if isinstance(teacher, sgp.TopK):
        theirs = wide(teacher)
    elif isinstance(teacher[0], list):
        theirs = [[None if x is None else x.double() for x in part] for part in teacher]
    else:
        theirs = cast(teacher, torch.float64)
    reference = sgp.reference.linear_distillation
    return run(reference, cast(tensors, torch.float64), theirs, *arguments, **in_float64(options))


def plain_logits(
    hidden, head, target, theirs, *, linear_bias, teacher_weight, teacher_bias, **options
):
    """What one writes without this package: the logits of both, in the tensors' own dtype."""
    s, t = F.linear(hidden, head, linear_bias), F.linear(theirs, teacher_weight, teacher_bias)
    return sgp.reference.distillation(s, t, target, **options)


def check(
    tensors, teacher, target, upstream=None, *, backend="torch", needs=ALL, chunk_rows=None,
    memory_budget=None, **options,
):  # fmt: skip
    """Loss and gradients against the reference in float64; returns ours. As in test_linear."""
    truth = truth_of(tensors, teacher, target, upstream, needs, **options)
    plain = run(
        sgp.reference.linear_distillation, tensors, teacher, target, upstream, needs, **options
    )
    dtype, roundings = tensors[0].dtype, 1
    if dtype == torch.float16 or (dtype == torch.bfloat16 and backend == "triton"):
        plain[1:] = run(plain_logits, tensors, teacher, target, upstream, needs, **options)[1:]
    if dtype == torch.float16 or options.get("reduction") not in (None, "mean", "sum"):
        roundings = 2  # of the logits' gradient, and of the result
    how = {"chunk_rows": chunk_rows, "memory_budget": memory_budget}
    ours = ours_of(tensors, teacher, target, upstream, needs, **how, **options)
    assert_right(ours, plain, truth, backend=backend, roundings=roundings)
    return ours


# -- values and gradients --------------------------------------------------------------------------


@pytest.mark.core
@OF_KINDS
@pytest.mark.parametrize(
    ("chunk_rows", "reduction"), [(1, "mean"), (3, "mean"), (3, "none"), (None, "none")]
)
def test_pieces(chunk_rows, reduction, kind, backend, tensors, teacher, target):
    upstream = torch.randn(N) if reduction == "none" else None
    check(
        tensors, teacher, target, upstream, backend=backend, chunk_rows=chunk_rows,
        reduction=reduction, **of_kind(kind, **EVERYTHING),
    )  # fmt: skip


@OF_KINDS
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("chunk_rows", [2, None])
def test_reductions_and_token_weights(chunk_rows, reduction, kind):
    """Of (2, 4) tokens, shifted."""
    tensors = [torch.randn(2, 4, D), torch.randn(V, D), None]
    teacher = [torch.randn(2, 4, D_T), torch.randn(V, D_T), torch.randn(V)]
    target = torch.randint(V, (2, 4))
    target[0, 2] = IGNORE
    shape = {"none": (2, 4), "sequence_sum": (2,), "sequence_mean": (2,)}.get(reduction, ())
    loss, *_ = check(
        tensors, teacher, target, torch.randn(shape), chunk_rows=chunk_rows, reduction=reduction,
        shift=True, token_weight=torch.rand(2, 4), **of_kind(kind, temperature=0.6),
    )  # fmt: skip
    assert loss.shape == shape


@pytest.mark.parametrize("denominator", [11, torch.tensor(3.5)])
def test_denominator(denominator, tensors, teacher, target):
    check(tensors, teacher, target, denominator=denominator, chunk_rows=2)


@OF_KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
@pytest.mark.parametrize("chunk_rows", [2, None])
def test_dtypes(chunk_rows, reduction, dtype, kind, tensors, teacher, target):
    check(
        cast(tensors, dtype), cast(teacher, dtype), target, chunk_rows=chunk_rows,
        reduction=reduction, **of_kind(kind, temperature=0.9),
    )  # fmt: skip


@OF_KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_by_the_kernels(dtype, kind, backend, tensors, teacher, target):
    check(cast(tensors, dtype), cast(teacher, dtype), target, backend=backend, **of_kind(kind))


@pytest.mark.parametrize(
    ("dtype", "teacher_dtype"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_the_teacher_may_have_another_dtype(dtype, teacher_dtype, tensors, teacher, target):
    """Its logits are then those of its own matmul, which sums in float32."""
    check(cast(tensors, dtype), cast(teacher, teacher_dtype), target, temperature=2.0)


@OF_KINDS
@pytest.mark.parametrize("needs", [INPUT, HEAD, BIAS, (False, True, False), NOBODY], ids=str)
@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
def test_frozen_sides(reduction, needs, kind, tensors, teacher, target):
    check(
        tensors, teacher, target, needs=needs, reduction=reduction, chunk_rows=2,
        **of_kind(kind, cross_entropy_weight=0.3),
    )  # fmt: skip


@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True)], ids=str)
def test_biases(biases, backend, tensors, teacher, target):
    for part, there in zip((tensors, teacher), biases, strict=True):
        part[2] = part[2] if there else None
    check(tensors, teacher, target, backend=backend, chunk_rows=2, divergence="jsd")


BUDGETS = {"small": 15_000, "larger": 40_000, "any": 1 << 28}


@OF_KINDS
@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
def test_budgets(reduction, name, kind):
    """Of a head that a small budget cuts: the bytes are held to, and the numbers stay."""
    tensors = [torch.randn(40, 6), torch.randn(90, 6), None]
    teacher = [torch.randn(40, D_T), torch.randn(90, D_T), None]
    target = torch.randint(90, (40,))
    target[::4] = IGNORE
    budget = BUDGETS[name]
    given = {"reduction": reduction, **of_kind(kind)}
    check(tensors, teacher, target, memory_budget=budget, **given)


def test_a_budget_that_nothing_fits(tensors, teacher, target):
    with pytest.raises(ValueError, match=r"sgp\.linear_distillation: .*memory_budget = 10\b"):
        ours_of(tensors, teacher, target, memory_budget=10)
    with pytest.raises(ValueError, match="chunk_rows = 2 and memory_budget = 999; pass one"):
        ours_of(tensors, teacher, target, memory_budget=999, chunk_rows=2)


@OF_KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, kind, tensors, teacher, target):
    """The operands of both models' matmuls have the autocast dtype; biases stay as they are."""
    rounded, theirs = (
        [*(x.to(dtype).float() for x in part[:2]), part[2]] for part in (tensors, teacher)
    )
    truth = truth_of(rounded, theirs, target, **of_kind(kind))
    with torch.autocast("cpu", dtype):
        ours = ours_of(tensors, teacher, target, **of_kind(kind))
        plain = run(plain_logits, tensors, teacher, target, **of_kind(kind))
    plain[0] = run(sgp.reference.linear_distillation, rounded, theirs, target, **of_kind(kind))[0]
    assert [x.dtype for x in ours] == [torch.float32] * 4
    assert_right(ours, plain, truth, roundings=2, dtype=dtype)


@OF_KINDS
@pytest.mark.parametrize(("longer", "reduction"), [(2, "none"), (-3, "mean")])
def test_vocabularies_of_different_length(longer, reduction, kind, backend, tensors, target):
    """Rows of the head that the shorter vocabulary lacks: never read, and of gradient exactly 0."""
    common = min(V, V + longer)
    target = torch.where(target >= common, 0, target)
    teacher = [torch.randn(shape) for shape in ((N, D_T), (V + longer, D_T), (V + longer,))]
    for x in (tensors if longer < 0 else teacher)[1:]:
        x[common:] = NAN
    given = {"reduction": reduction, "chunk_rows": 2, **of_kind(kind, cross_entropy_weight=0.1)}
    ours = ours_of(tensors, teacher, target, **given)
    cut = [[x[0], x[1][:common].clone(), x[2][:common].clone()] for x in (tensors, teacher)]
    expected = ours_of(*cut, target, **given)
    for value, other in zip(ours[:2], expected[:2], strict=True):
        torch.testing.assert_close(value, other)
    for value, other in zip(ours[2:], expected[2:], strict=True):
        torch.testing.assert_close(value[:common], other)
        assert (value[common:] == 0).all()
    assert [x.shape for x in ours[2:]] == [(V, D), (V,)]


@pytest.mark.core
@OF_KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("reduction", "chunk_rows"), [("mean", 2), ("none", None)])
def test_equal_models_have_loss_and_gradients_zero(
    reduction, chunk_rows, dtype, kind, backend, tensors, target
):
    """Exactly: nothing moves a student that is its teacher."""
    tensors = cast(tensors, dtype)
    given = {"temperature": 0.7, "softcap": 5.0, "teacher_softcap": 5.0}
    ours = ours_of(
        tensors, [x.clone() for x in tensors], target, reduction=reduction, chunk_rows=chunk_rows,
        **of_kind(kind, **given),
    )  # fmt: skip
    for value in ours:
        assert (value == 0).all(), f"up to {value.abs().max()}"


@OF_KINDS
@pytest.mark.parametrize(("side", "poison"), [("student", INF), ("teacher", NAN), ("both", NAN)])
@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
def test_ignored_rows_are_not_read(reduction, side, poison, kind, tensors, teacher, target):
    given = {"reduction": reduction, "chunk_rows": 2, **of_kind(kind, **EVERYTHING)}
    expected = ours_of(tensors, teacher, target, **given)
    ignored = target == IGNORE
    if side != "teacher":
        tensors[0][ignored] = poison
    if side != "student":
        teacher[0][ignored] = poison
    ours = ours_of(tensors, teacher, target, **given)
    for value, other in zip(ours, expected, strict=True):
        assert torch.equal(value, other)
    assert (ours[1][ignored] == 0).all()


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_hidden_states_are_read_where_they_are(layout, backend, tensors, teacher, target):
    def laid(x):
        if layout == "transposed":
            return x.t().contiguous().t()
        return torch.cat([x * NAN, x], 1)[:, x.shape[1] :]

    given = [[laid(x[0]), laid(x[1]), x[2]] for x in (tensors, teacher)]
    expected = ours_of(tensors, teacher, target, chunk_rows=3)
    for value, other in zip(ours_of(*given, target, chunk_rows=3), expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-7)


def test_labels_in_every_form(tensors, teacher, target):
    """(B, T), flat, and a Selection; with more dimensions of hidden states."""
    labels = F.pad(target, (0, 1), value=IGNORE).view(2, 4)
    both = [[F.pad(x[0], (0, 0, 0, 1)).view(2, 4, -1), *x[1:]] for x in (tensors, teacher)]
    expected = ours_of(tensors, teacher, target, chunk_rows=2)
    for form in (labels, labels.flatten(), sgp.Selection.from_labels(labels), labels.int()):
        ours = ours_of(*both, form, chunk_rows=2)
        ours[1] = ours[1].flatten(0, 1)[:N]
        for value, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(value, other)


@pytest.mark.parametrize("shift", [True, 2])
def test_a_shifted_selection(shift):
    tensors = [torch.randn(2, 4, D), torch.randn(V, D), None]
    teacher = [torch.randn(2, 4, D_T), torch.randn(V, D_T), None]
    labels = torch.randint(V, (2, 4))
    given = {"cross_entropy_weight": 0.5, "reduction": "sequence_mean"}
    expected = check(tensors, teacher, labels, shift=shift, **given)
    selection = sgp.Selection.from_labels(labels, shift=shift)
    for value, other in zip(ours_of(tensors, teacher, selection, **given), expected, strict=True):
        assert value is other or torch.equal(value, other)


@pytest.mark.parametrize("label", [V, 77, -5])
def test_a_label_matters_only_where_it_is_used(label, backend, tensors, teacher, target):
    strange = target.clone()
    strange[2] = label
    ours = partial(ours_of, tensors, teacher)
    assert torch.equal(ours(strange)[0], ours(target)[0])
    with pytest.raises(IndexError, match=rf"target\[2\] = {label} is outside \[0, {V}\)"):
        ours(strange, cross_entropy_weight=0.1)
    with pytest.raises(IndexError, match=rf"target\[2\] = {label} is outside"):
        sgp.linear_distillation(*tensors[:2], strange, *teacher[:2], return_stats=True)


@pytest.mark.parametrize("tokens", [N, 0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_to_learn(reduction, tokens, backend):
    tensors = [torch.full((1, tokens, D), NAN), torch.randn(V, D), torch.randn(V)]
    teacher = [torch.full((1, tokens, D_T), NAN), torch.randn(V, D_T), None]
    ours = ours_of(tensors, teacher, torch.full((1, tokens), IGNORE), reduction=reduction)
    for value in ours:
        assert not value.any()
    assert flops(lambda: ours_of(tensors, teacher, torch.full((1, tokens), IGNORE))) == 0


@OF_KINDS
@pytest.mark.parametrize(("chunk_rows", "reduction"), [(2, "mean"), (None, "none"), (2, "none")])
def test_statistics(chunk_rows, reduction, kind, backend, tensors, teacher, target):
    given = {"temperature": 1.4, "softcap": 5.0, "logit_scale": 0.7}
    loss, stats = sgp.linear_distillation(
        *tensors[:2], target, *teacher[:2], linear_bias=tensors[2], teacher_bias=teacher[2],
        return_stats=True, chunk_rows=chunk_rows, reduction=reduction, **of_kind(kind, **given),
    )  # fmt: skip
    expected = sgp.reference.linear_token_log_probs(
        *tensors[:2], target, linear_bias=tensors[2], **given
    )
    for value, other in zip(stats[:4], expected[:4], strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)
    assert stats.argmax is None
    same = ours_of(
        tensors, teacher, target, needs=NOBODY, reduction=reduction, **of_kind(kind, **given)
    )
    torch.testing.assert_close(loss, same[0])


def test_the_module(tensors, teacher, target):
    options = {"divergence": "jsd", "beta": 0.2, "temperature": 1.5, "reduction": "sum"}
    module = sgp.LinearDistillationLoss(D, V, bias=True, chunk_rows=2, **options)
    with torch.no_grad():
        module.linear.weight.copy_(tensors[1])
        module.linear.bias.copy_(tensors[2])
    loss = module(tensors[0], target, *teacher[:2], teacher_bias=teacher[2])
    expected = ours_of(tensors, teacher, target, needs=NOBODY, **options)[0]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert module.linear.weight.grad.any()
    assert "jsd" in repr(module)
    assert "chunk_rows=2" in repr(module)
    mean = sgp.LinearDistillationLoss(D, V)
    given = {"token_weight": torch.rand(N), "denominator": 3.0}
    found = mean(tensors[0], target, *teacher[:2], **given)
    other = sgp.linear_distillation(tensors[0], mean.linear.weight, target, *teacher[:2], **given)
    torch.testing.assert_close(found, other)
    with pytest.raises(ValueError, match=r"sgp\.LinearDistillationLoss: divergence = 'kl'"):
        sgp.LinearDistillationLoss(D, V, divergence="kl")


# -- a teacher's few tokens, and several teachers --------------------------------------------------


@OF_KINDS
@pytest.mark.parametrize("chunk_rows", [1, 3, None])
@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
def test_top_k(reduction, chunk_rows, kind, tensors, teacher, target):
    logits = F.linear(*teacher)[:, :V]
    top = top_of(logits, target, 4, temperature=1.3)
    given = {"chunk_rows": chunk_rows, "reduction": reduction, "temperature": 1.3}
    check(tensors, top, target, **given, **of_kind(kind, cross_entropy_weight=0.2))
    ragged = ragged_of(top, [4, 0, 1, 3, 2])
    check(tensors, ragged, target, **given, **of_kind(kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("needs", [ALL, INPUT, HEAD], ids=str)
def test_top_k_of_other_dtypes_and_frozen_sides(needs, dtype, tensors, teacher, target):
    top = top_of(F.linear(*teacher)[:, :V], target, 3)
    tensors = cast(tensors, dtype)
    truth = truth_of(tensors, top, target, None, needs)
    logits = F.linear(*tensors)
    plain = run(sgp.reference.linear_distillation, tensors, top, target, None, needs)
    ours = ours_of(tensors, top, target, None, needs, chunk_rows=2)
    assert logits.dtype == dtype
    assert_right(ours, plain, truth, roundings=3 if dtype == torch.float16 else 1)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"teacher_weight": torch.randn(V, D_T)}, "teacher_weight"),
        ({"teacher_bias": torch.randn(V)}, "teacher_bias"),
        ({"teacher_softcap": 3.0}, "teacher_softcap"),
        ({"teacher_logit_scale": 3.0}, "teacher_logit_scale"),
        ({"teacher_index": torch.zeros(N, dtype=torch.int64)}, "teacher_index"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_top_k_refuses(more, words, tensors, teacher, target):
    top = top_of(F.linear(*teacher)[:, :V], target, 3)
    with pytest.raises(ValueError, match=rf"sgp\.linear_distillation: .*{words}"):
        sgp.linear_distillation(*tensors[:2], target, top, **more)


def test_top_k_of_other_rows_or_another_vocabulary(tensors, teacher, target):
    top = top_of(F.linear(*teacher)[:, :V], target, 3)
    with pytest.raises(ValueError, match=r"sgp\.linear_distillation: .*5 rows.* 7\b"):
        sgp.linear_distillation(*tensors[:2], target.clamp(min=0), top)
    most = int(top.indices.max())
    with pytest.raises(ValueError, match=rf"= {most} is outside \[0, {most}\)"):
        sgp.linear_distillation(tensors[0], tensors[1][:most], target.clamp(max=most - 1), top)


@pytest.fixture
def teachers():
    """Three, as lists of hidden states, heads and biases: other widths and vocabularies."""
    widths, classes = (D_T, 3, 6), (V + 2, V, V - 1)
    hidden = [torch.randn(N, width) for width in widths]
    heads = [torch.randn(shape) for shape in zip(classes, widths, strict=True)]
    return [hidden, heads, [torch.randn(V + 2), None, torch.randn(V - 1)]]


@OF_KINDS
@pytest.mark.parametrize(("reduction", "chunk_rows"), [("mean", 1), ("mean", None), ("none", 2)])
def test_each_row_has_its_teacher(reduction, chunk_rows, kind, backend, tensors, teachers, target):
    target = torch.where(target == V - 1, 5, target)
    index = torch.tensor([0, 1, 2, 2, 0, 1, 0])
    upstream = torch.randn(N) if reduction == "none" else None
    check(
        tensors, teachers, target, upstream, teacher_index=index, chunk_rows=chunk_rows,
        reduction=reduction, backend=backend, **of_kind(kind, cross_entropy_weight=0.2),
    )  # fmt: skip


def test_the_rows_of_the_other_teachers_are_not_read(tensors, teachers, target):
    target = torch.where(target == V - 1, 5, target)
    index = torch.tensor([0, 1, 2, 2, 0, 1, 0])
    expected = ours_of(tensors, teachers, target, teacher_index=index)
    for number, x in enumerate(teachers[0]):
        x[(index != number) | (target == IGNORE)] = NAN
    strange = torch.where(target == IGNORE, 99, index)
    ours = ours_of(tensors, teachers, target, teacher_index=strange)
    for value, other in zip(ours, expected, strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("shift", [False, True])
def test_several_teachers_of_shifted_labels(shift):
    tensors = [torch.randn(2, 4, D), torch.randn(V, D), None]
    hidden = [torch.randn(2, 4, width) for width in (D_T, 3)]
    teachers = [hidden, [torch.randn(V, D_T), torch.randn(V, 3)], None]
    labels, index = torch.randint(V, (2, 4)), torch.randint(2, (2, 4))
    labels[1, 1] = IGNORE
    expected = ours_of(tensors, teachers, labels, teacher_index=index, shift=shift)
    truth = run(
        sgp.reference.linear_distillation, tensors, teachers, labels, teacher_index=index,
        shift=shift,
    )  # fmt: skip
    flat = ours_of(tensors, teachers, labels, teacher_index=index.flatten(), shift=shift)
    for value, other, third in zip(expected[:3], truth[:3], flat[:3], strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)
        assert torch.equal(value, third)


# -- autograd --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
def test_no_second_derivative(reduction, backend, tensors, teacher, target):
    leaves = [x.requires_grad_() for x in tensors]
    loss = sgp.linear_distillation(*leaves[:2], target, *teacher[:2], reduction=reduction).sum()
    with pytest.raises(RuntimeError, match=r"sgp\.linear_distillation has no second derivative"):
        torch.autograd.grad(loss, leaves[0], create_graph=True)[0].square().sum().backward()


def test_a_second_backward(tensors, teacher, target):
    leaves = [x.requires_grad_() for x in tensors]
    loss = sgp.linear_distillation(*leaves[:2], target, *teacher[:2])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"sgp\.linear_distillation|second time"):
        loss.backward()


def test_a_teacher_that_requires_grad_gets_none(backend, tensors, teacher, target):
    leaves, theirs = ([x.requires_grad_() for x in part] for part in (tensors, teacher))
    for reduction in EARLY_OR_LATE:
        loss = sgp.linear_distillation(
            *leaves[:2], target, *theirs[:2], linear_bias=leaves[2], teacher_bias=theirs[2],
            reduction=reduction,
        )  # fmt: skip
        found = torch.autograd.grad(loss.sum(), [*leaves, *theirs], allow_unused=True)
        assert all(x.any() for x in found[:3])
        assert found[3:] == (None, None, None)
    frozen = [x.detach() for x in leaves]
    assert not sgp.linear_distillation(*frozen[:2], target, *theirs[:2]).requires_grad


def test_a_head_that_both_share(tensors, target):
    """A teacher of the same weight, as under low-rank adapters: its gradient is the student's."""
    hidden, head, _ = (x.requires_grad_() for x in tensors)
    other = torch.randn(N, D)
    loss = sgp.linear_distillation(hidden, head, target, other, head, chunk_rows=2)
    found = torch.autograd.grad(loss, (hidden, head))
    truth = sgp.reference.linear_distillation(hidden, head, target, other, head.detach())
    for value, expected in zip(found, torch.autograd.grad(truth, (hidden, head)), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


# -- what it costs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reduction", "needs", "student", "times"),
    [("mean", ALL, 6, 1), ("sum", ALL, 6, 1), ("mean", INPUT, 4, 1), ("sum", HEAD, 4, 1),
     ("mean", NOBODY, 2, 1), ("none", NOBODY, 2, 1), ("none", ALL, 8, 2),
     ("sequence_mean", ALL, 8, 2)],
)  # fmt: skip
@OF_KINDS
def test_matmul_flops(kind, reduction, needs, student, times, tensors, teacher, target):
    """M V (6 D + 2 D_t) for "mean" and "sum"; both logits again where upstream comes later."""
    tensors[0], teacher[0] = torch.randn(2 * N, D), torch.randn(2 * N, D_T)
    teacher[1], teacher[2] = teacher[1][:V], teacher[2][:V]
    target = target.repeat(2)
    kept = int((target != IGNORE).sum())
    for y, chunk_rows in ((target, None), (sgp.Selection.from_labels(target), 5)):
        work = partial(
            ours_of, tensors, teacher, y, None, needs, reduction=reduction, chunk_rows=chunk_rows,
            **of_kind(kind),
        )  # fmt: skip
        assert flops(work) == kept * V * (student * D + 2 * times * D_T)


def test_matmul_flops_of_top_k(tensors, teacher, target):
    top = top_of(F.linear(*teacher)[:, :V], target, 3)
    kept = int((target != IGNORE).sum())
    assert flops(lambda: ours_of(tensors, top, target)) == 6 * kept * V * D


def test_matmul_flops_of_several_teachers(tensors, teachers, target):
    """Each row is multiplied by its own teacher's head alone."""
    target = torch.where(target == V - 1, 5, target)
    index = torch.tensor([0, 1, 2, 2, 0, 1, 0])
    work = partial(ours_of, tensors, teachers, target, teacher_index=index)
    widths = [x.shape[1] for x in teachers[0]]
    of_teachers = sum(2 * widths[i] for i in index[target != IGNORE].tolist())
    kept = int((target != IGNORE).sum())
    assert flops(work) == (V - 1) * (6 * D * kept + of_teachers)


def extra_peak(tokens, kept, chunk_rows, reduction):
    """Bytes beyond inputs and gradients of a call with so many of the tokens kept."""
    hidden, head = torch.randn(tokens, 32), torch.randn(2048, 32)
    theirs, their_head = torch.randn(tokens, 48), torch.randn(2048, 48)
    labels = torch.full((tokens,), IGNORE)
    labels[torch.arange(kept) * (tokens // kept)] = 0
    selection = sgp.Selection.from_labels(labels)
    leaves = [hidden.requires_grad_(), head.requires_grad_()]
    with mock.patch.object(by_torch, "CHUNK_ELEMENTS", 1 << 12), cpu_peak() as held:
        loss = sgp.linear_distillation(
            *leaves, selection, theirs, their_head, chunk_rows=chunk_rows, reduction=reduction,
            divergence="jsd",
        )  # fmt: skip
        loss.sum().backward()
    return held.peak_bytes - sum(x.grad.nbytes for x in leaves)


@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
def test_peak_memory_grows_with_the_chunk_and_not_with_the_tokens(reduction):
    """Of a chunk the logits of both models and little else; of each token some numbers."""
    small, large = (extra_peak(1024, 128, rows, reduction) for rows in (32, 128))
    logits = 4 * 32 * 2048
    assert 2 * logits <= small < 4 * logits
    assert 4 * logits < large - small < 8 * logits  # 6; at the peak some gradients are to come
    more = extra_peak(8192, 512, 32, reduction)
    gathered = 4 * (32 + 48) * 512
    assert more - small < 260 * 8192 + gathered, "numbers of each token, and nothing of V"


@pytest.mark.parametrize("budget", [1 << 20, 4 << 20])
@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
def test_a_budget_is_kept(reduction, budget):
    hidden, head = torch.randn(512, 16), torch.randn(2048, 16)
    theirs, their_head = torch.randn(512, 24), torch.randn(2048, 24)
    labels = torch.randint(2048, (512,))
    leaves = [hidden.requires_grad_(), head.requires_grad_()]
    with mock.patch.object(by_torch, "CHUNK_ELEMENTS", 1 << 13), cpu_peak() as held:
        loss = sgp.linear_distillation(
            *leaves, labels, theirs, their_head, memory_budget=budget, reduction=reduction
        )
        loss.sum().backward()
    assert held.peak_bytes - sum(x.grad.nbytes for x in leaves) <= 1.05 * budget


# -- errors ----------------------------------------------------------------------------------------

HIDDEN, WEIGHT, LABELS = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3).long()
THEIRS, THEIR_HEAD = torch.zeros(2, 3, 6), torch.zeros(5, 6)
INDEX = torch.zeros(2, 3).long()
LISTS = {"teacher_input": [THEIRS, THEIRS], "teacher_weight": [THEIR_HEAD, THEIR_HEAD]}
ERRORS = [
    ({"divergence": "kl"}, ValueError, ["divergence = 'kl'", "jsd"]),
    ({"linear_weight": torch.zeros(5, 3)}, ValueError, ["linear_weight", "(5, 3)", "(2, 3, 4)"]),
    ({"linear_bias": torch.zeros(4)}, ValueError, ["linear_bias", "(4,)", "(5,)"]),
    ({"target": torch.zeros(3, 2).long()}, ValueError, ["(2, 3, 4)", "(3, 2)"]),
    ({"target": torch.zeros(6).long(), "shift": True}, ValueError, ["(2, 3, 4)", "(6,)"]),
    ({"teacher_weight": None}, (TypeError, ValueError), ["teacher_weight", "None"]),
    ({"teacher_weight": torch.zeros(5, 7)}, ValueError, ["teacher_weight", "(5, 7)", "(2, 3, 6)"]),
    ({"teacher_weight": torch.zeros(5)}, ValueError, ["teacher_weight", "(5,)"]),
    ({"teacher_bias": torch.zeros(4)}, ValueError, ["teacher_bias", "(4,)", "(5,)"]),
    ({"teacher_input": torch.zeros(3, 2, 6)}, ValueError, ["teacher_input", "(3, 2, 6)", "(2, 3"]),
    ({"teacher_input": torch.zeros(2, 3, 6).long()}, TypeError, ["teacher_input", "int64"]),
    ({"teacher_input": {}}, TypeError, ["teacher_input", "dict", "TopK"]),
    ({"teacher_input": [THEIRS]}, ValueError, ["list of 1", "teacher_index"]),
    ({"teacher_input": [THEIRS], "teacher_weight": None}, ValueError, ["list of 1", "TopK"]),
    (LISTS, ValueError, ["teacher_index"]),
    (
        LISTS | {"teacher_index": INDEX, "teacher_weight": [THEIR_HEAD]},
        ValueError,
        ["teacher_weight", "1", "2"],
    ),
    (
        LISTS | {"teacher_index": INDEX, "teacher_bias": [None, torch.zeros(4)]},
        ValueError,
        ["teacher_bias[1]", "(4,)", "(5,)"],
    ),
    (LISTS | {"teacher_index": INDEX[0]}, ValueError, ["teacher_index", "(3,)", "(2, 3)"]),
    ({"teacher_index": INDEX}, ValueError, ["teacher_index", "list"]),
    ({"temperature": -1.0}, ValueError, ["temperature = -1.0"]),
    ({"teacher_softcap": -1.0}, ValueError, ["teacher_softcap = -1.0"]),
    ({"reduction": "avg"}, ValueError, ["reduction = 'avg'"]),
]


@pytest.mark.parametrize("name", ["sgp.linear_distillation", "sgp.reference.linear_distillation"])
@pytest.mark.parametrize(
    ("kwargs", "error", "words"), ERRORS, ids=lambda x: ", ".join(x) if isinstance(x, dict) else ""
)
def test_errors(kwargs, error, words, name):
    is_ours = name == "sgp.linear_distillation"
    function = sgp.linear_distillation if is_ours else sgp.reference.linear_distillation
    arguments = {
        "input": HIDDEN, "linear_weight": WEIGHT, "target": LABELS, "teacher_input": THEIRS,
        "teacher_weight": THEIR_HEAD, **kwargs,
    }  # fmt: skip
    with pytest.raises(error) as caught:
        function(**arguments)
    if is_ours:
        assert str(caught.value).startswith(f"{name}: "), str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("which", ["hidden states", "head", "bias", "top k"])
def test_a_teacher_that_changes_before_the_backward_is_noticed(which):
    hidden, head = torch.randn(6, 8), torch.randn(11, 8, requires_grad=True)
    target = torch.tensor([1, -100, 3, 4, -100, 0])
    parts = {
        "hidden states": torch.randn(6, 5),
        "head": torch.randn(11, 5),
        "bias": torch.randn(11),
        "top k": torch.full((4, 2), -1.0),
    }
    if which == "top k":
        given = {"teacher_input": sgp.TopK(torch.tensor([[1, 2]] * 4), parts[which])}
    else:
        names = ("teacher_input", "teacher_weight", "teacher_bias")
        given = dict(zip(names, parts.values(), strict=False))
    rows = sgp.linear_distillation(hidden.requires_grad_(), head, target, reduction="none", **given)
    parts[which].mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rows.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunks", [{}, {"chunk_rows": 2}, {"memory_budget": 4_000}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_longer_vocabulary_of_the_student(dtype, chunks, reduction, backend):
    """The gradient of its padding is zero, and is made in place."""
    tensors = [torch.randn(6, 8), torch.randn(40, 8) / 3, torch.randn(40)]
    target = torch.tensor([1, -100, 3, 4, -100, 0])
    teacher = [torch.randn(6, 5).to(dtype), (torch.randn(33, 5) / 3).to(dtype)]
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    loss = sgp.linear_distillation(
        *leaves[:2], target, *teacher, linear_bias=leaves[2], reduction=reduction, **chunks
    )
    loss.sum().backward()
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = sgp.reference.linear_distillation(
        *exact[:2], target, *(x.double() for x in teacher), linear_bias=exact[2],
        reduction=reduction,
    )  # fmt: skip
    truth.sum().backward()
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, other in zip(leaves, exact, strict=True):
        assert relative_error(ours.grad, other.grad) < limit
    assert (leaves[1].grad[33:] == 0).all()
    assert (leaves[2].grad[33:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.05, 1.0, 50.0])
def test_float16_at_any_temperature(temperature, kind, backend):
    """The gradient of the logits stays in its range, whatever divides the scores."""
    tensors = [torch.randn(6, 8).half(), torch.randn(40, 8).half()]
    teacher = [torch.randn(6, 5).half(), torch.randn(40, 5).half()]
    leaves = [x.clone().requires_grad_() for x in tensors]
    options = of_kind(kind, temperature=temperature)
    target = torch.tensor([1, -100, 3, 4, -100, 0])
    sgp.linear_distillation(*leaves, target, *teacher, **options).backward()
    exact = [x.double().requires_grad_() for x in tensors]
    sgp.reference.linear_distillation(
        *exact, target, *(x.double() for x in teacher), **options
    ).backward()
    for ours, other in zip(leaves, exact, strict=True):
        least = 6e-8 * other.grad.numel() ** 0.5  # what float16 cannot hold
        assert (ours.grad - other.grad).norm() < 2e-3 * other.grad.norm() + least


@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_several_teachers_where_every_row_is_kept(chunk_rows):
    """The rows are put in the order of their teachers, and their gradients back in their own."""
    hidden, head = torch.randn(6, 8), torch.randn(11, 8)
    target, index = torch.arange(6), torch.tensor([1, 0, 1, 1, 0, 0])
    inputs = [torch.randn(6, 5), torch.randn(6, 3)]
    weights = [torch.randn(11, 5), torch.randn(11, 3)]
    leaf = hidden.clone().requires_grad_()
    given = {"teacher_index": index, "reduction": "none"}
    rows = sgp.linear_distillation(
        leaf, head, target, inputs, weights, chunk_rows=chunk_rows, **given
    )
    rows.sum().backward()
    exact = hidden.double().requires_grad_()
    truth = sgp.reference.linear_distillation(
        exact, head.double(), target, [x.double() for x in inputs],
        [x.double() for x in weights], **given,
    )  # fmt: skip
    truth.sum().backward()
    assert relative_error(rows, truth) < 1e-5
    assert relative_error(leaf.grad, exact.grad) < 1e-5

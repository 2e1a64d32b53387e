"""`sgp.reference`, the oracle of all other tests, against PyTorch and against written-out formulas.

Everything is compared in float64, so that a tolerance of 1e-12 separates right from wrong.
"""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from sgp import Selection, cross_entropy, reference

X = -100
NAN, INF = math.nan, math.inf
SENTENCE = ["Square", "this", "number", ".", "2", ".", "The", "result", "is", "4", "."]
WORDS = {word: i for i, word in enumerate(sorted(set(SENTENCE)))}
CONTEXT = SENTENCE.index("The")


def close(value, truth, tolerance=1e-12):
    torch.testing.assert_close(value, truth, rtol=tolerance, atol=tolerance)


def gradient(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(N=7, V=5, ignored=(1, 4)):
    logits = (2 * torch.randn(N, V, dtype=torch.float64)).requires_grad_()
    target = torch.randint(V, (N,))
    target[list(ignored)] = X
    return logits, target


# -- against torch.nn.functional -------------------------------------------------------------------

LAYOUTS = {  # PyTorch's: class dimension 0 for 1-D input, else 1
    "(V,)": ((5,), ()),
    "(N, V)": ((6, 5), (6,)),
    "(N, V, d1)": ((2, 5, 3), (2, 3)),
    "(N, V, d1, d2)": ((2, 5, 3, 2), (2, 3, 2)),
    "one row": ((1, 5), (1,)),
    "one class": ((6, 1), (6,)),
    "two classes": ((6, 2), (6,)),
}


@pytest.mark.core
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    ("weighted", "smoothing"),
    list(itertools.product([False, True], [0.0, 0.1, 1.0])),
    ids=str,
)
def test_is_torch_cross_entropy(layout, reduction, weighted, smoothing):
    shape, lead = LAYOUTS[layout]
    V = shape[0] if len(shape) == 1 else shape[1]
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    target = torch.randint(V, lead)
    if target.numel() > 1:
        target.view(-1)[1] = X
    options = {
        "weight": torch.rand(V, dtype=torch.float64) if weighted else None,
        "reduction": reduction,
        "label_smoothing": smoothing,
    }
    ours = reference.cross_entropy(logits, target, **options)
    theirs = F.cross_entropy(logits, target, **options)
    close(ours, theirs)
    upstream = torch.randn_like(theirs)
    close(gradient((ours * upstream).sum(), logits), gradient((theirs * upstream).sum(), logits))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one class"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "class weights"])
def test_class_probabilities_are_torch_cross_entropy(layout, reduction, weighted):
    shape, _ = LAYOUTS[layout]
    class_dim = 0 if len(shape) == 1 else 1
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    target = torch.randn(shape, dtype=torch.float64).softmax(class_dim).requires_grad_()
    options = {
        "weight": torch.rand(shape[class_dim], dtype=torch.float64) if weighted else None,
        "reduction": reduction,
        "label_smoothing": 0.1,
    }
    ours = reference.cross_entropy(logits, target, **options)
    theirs = F.cross_entropy(logits, target, **options)
    close(ours, theirs)
    for mine, other in zip(
        gradient(ours.sum(), logits, target), gradient(theirs.sum(), logits, target), strict=True
    ):
        close(mine, other)


def test_class_probabilities_with_token_weights():
    logits, _ = make()
    target = torch.randn(7, 5, dtype=torch.float64).softmax(1)
    r = torch.rand(7, dtype=torch.float64)
    rows = -(target * logits.log_softmax(1)).sum(1)
    close(reference.cross_entropy(logits, target, token_weight=r), (r * rows).sum() / r.sum())
    close(
        reference.cross_entropy(logits, target, token_weight=r, lse_square_scale=0.3),
        (r * (rows + 0.3 * logits.logsumexp(1) ** 2)).sum() / r.sum(),
    )


@pytest.mark.parametrize("ignore_index", [0, 3, -1, None], ids=str)
def test_ignore_index_is_torchs(ignore_index):
    logits = torch.randn(6, 5, dtype=torch.float64)
    target = torch.tensor([0, 3, 1, 3, 0, 2])
    target[4] = X if ignore_index is None else ignore_index
    theirs = F.cross_entropy(
        logits, target, ignore_index=-100 if ignore_index is None else ignore_index
    )
    close(reference.cross_entropy(logits, target, ignore_index=ignore_index), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_loss_is_float32_of_the_rounded_logits(dtype):
    logits, target = make(V=50)
    rounded = logits.detach().to(dtype)
    loss = reference.cross_entropy(rounded, target)
    assert loss.dtype == torch.float32
    truth = F.cross_entropy(rounded.double(), target).float()
    close(loss, truth, 1e-6)  # rounding the loss to bf16 would be off by 1e-3
    assert reference.token_log_probs(rounded, target).log_prob.dtype == torch.float32


# -- each option by its own formula ----------------------------------------------------------------


def kept_rows(logits, target):
    """(rows, their targets) by a loop, for formulas written out one row at a time."""
    return [(logits[i], int(y)) for i, y in enumerate(target.tolist()) if y != X]


def log_p(row):
    return row - torch.log(torch.exp(row).sum())


def test_smoothing_formula():
    logits, target = make()
    eps, V = 0.2, 5
    terms = []
    for row, y in kept_rows(logits, target):
        q = torch.full((V,), eps / V, dtype=torch.float64)
        q[y] += 1 - eps
        terms.append(-(q * log_p(row)).sum())
    close(reference.cross_entropy(logits, target, label_smoothing=eps), sum(terms) / len(terms))


def test_class_weight_formula():
    logits, target = make()
    w = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    kept = kept_rows(logits, target)
    total = sum(-w[y] * log_p(row)[y] for row, y in kept)
    close(reference.cross_entropy(logits, target, w), total / sum(w[y] for _, y in kept))
    close(reference.cross_entropy(logits, target, w, reduction="sum"), total)


def test_smoothing_with_class_weights_formula():
    logits, target = make()
    w = torch.rand(5, dtype=torch.float64)
    eps = 0.3
    total = sum(
        -(1 - eps) * w[y] * log_p(row)[y] - eps / 5 * (w * log_p(row)).sum()
        for row, y in kept_rows(logits, target)
    )
    ours = reference.cross_entropy(logits, target, w, label_smoothing=eps, reduction="sum")
    close(ours, total)


@pytest.mark.parametrize("scale", [0.5, -2.0, 0.0], ids=str)
def test_logit_scale_formula(scale):
    logits, target = make()
    ours = reference.cross_entropy(logits, target, logit_scale=scale)
    close(ours, F.cross_entropy(scale * logits, target))


@pytest.mark.parametrize("cap", [0.5, 5.0, 1e6], ids=str)
def test_softcap_formula(cap):
    logits, target = make()
    ours = reference.cross_entropy(logits, target, softcap=cap)
    close(ours, F.cross_entropy(cap * torch.tanh(logits / cap), target), 1e-9)


def test_scale_comes_before_softcap_and_temperature_last():
    logits, target = make()
    capped = 3.0 * torch.tanh(2.0 * logits / 3.0)
    ours = reference.cross_entropy(logits, target, softcap=3.0, logit_scale=2.0)
    close(ours, F.cross_entropy(capped, target))
    values = reference.token_log_probs(
        logits, target, softcap=3.0, logit_scale=2.0, temperature=0.7
    )
    theirs = -F.cross_entropy(capped / 0.7, target, reduction="none")
    close(values.log_prob, theirs)


def test_z_loss_formula():
    """Neither class weights nor smoothing touch it; token weights do."""
    logits, target = make()
    zeta, w = 0.01, torch.rand(5, dtype=torch.float64)
    r = torch.rand(7, dtype=torch.float64)
    rows = []
    for i, y in enumerate(target.tolist()):
        if y != X:
            z = zeta * torch.log(torch.exp(logits[i]).sum()) ** 2
            rows.append(r[i] * (-w[y] * log_p(logits[i])[y] + z))
    ours = reference.cross_entropy(
        logits, target, w, lse_square_scale=zeta, token_weight=r, reduction="sum"
    )
    close(ours, sum(rows))
    plain = reference.cross_entropy(logits, target, lse_square_scale=zeta, reduction="none")
    kept = target != X
    theirs = F.cross_entropy(logits, target, reduction="none")
    close(plain, theirs + torch.where(kept, zeta * logits.logsumexp(1) ** 2, 0))


def test_token_weights_multiply_the_whole_row_and_divide_the_mean():
    logits, target = make()
    w, r = torch.rand(5, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    options = {"label_smoothing": 0.1, "lse_square_scale": 0.2, "softcap": 4.0}
    rows = reference.cross_entropy(logits, target, w, reduction="none", **options)
    weighted = {**options, "token_weight": r}
    close(reference.cross_entropy(logits, target, w, reduction="none", **weighted), r * rows)
    total = reference.cross_entropy(logits, target, w, reduction="sum", **weighted)
    close(total, (r * rows).sum())
    weighted.pop("lse_square_scale")
    ce = reference.cross_entropy(logits, target, w, reduction="none", **weighted)
    z_loss = (r * rows - ce).sum()
    divisor = sum(r[i] * w[y] for i, y in enumerate(target.tolist()) if y != X)
    weighted["lse_square_scale"] = 0.2
    close(
        reference.cross_entropy(logits, target, w, **weighted),
        ce.sum() / divisor + z_loss / r[target != X].sum(),
    )
    divided = reference.cross_entropy(logits, target, w, denominator=3.0, **weighted)
    close(divided, (r * rows).sum() / 3)


@pytest.mark.parametrize("zeta", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sequence_mean"])
def test_the_size_of_class_weights_does_not_matter_to_a_mean(reduction, zeta):
    """They say how much a class counts beside the others, and nothing about the z-loss."""
    logits, target = torch.randn(2, 5, 3, dtype=torch.float64), torch.tensor([[0, X, 2], [X, 1, 3]])
    options = {"reduction": reduction, "lse_square_scale": zeta}
    plain = reference.cross_entropy(logits, target, **options)
    for size in (1.0, 0.01, 100.0):
        weight = torch.full((5,), size, dtype=torch.float64)
        close(reference.cross_entropy(logits, target, weight, **options), plain)


@pytest.mark.parametrize(
    "denominator",
    [3, 2.5, torch.tensor(4), torch.tensor(2.5), torch.tensor(7.0, dtype=torch.float64)],
    ids=["int", "float", "int tensor", "fp32 tensor", "fp64 tensor"],
)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_denominator_replaces_the_divisor(denominator, kind):
    logits, target = make()
    if kind == "probabilities":
        target = torch.randn(7, 5, dtype=torch.float64).softmax(1)
    total = reference.cross_entropy(logits, target, reduction="sum")
    ours = reference.cross_entropy(logits, target, denominator=denominator)
    close(ours, total / float(denominator))


def test_negative_weights_with_sum_and_denominator():
    logits, target = make()
    r = torch.tensor([1.0, 5.0, -2.0, 0.5, 1.0, -1.0, 0.0], dtype=torch.float64)
    rows = reference.cross_entropy(logits, target, reduction="none")
    close(
        reference.cross_entropy(logits, target, token_weight=r, reduction="sum"), (r * rows).sum()
    )
    ours = reference.cross_entropy(logits, target, token_weight=r, denominator=3)
    close(ours, (r * rows).sum() / 3)


# -- derivatives -----------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "class weights": {"weight": torch.tensor([0.5, 0.0, 1.0, 2.0, 1.5], dtype=torch.float64)},
    "z-loss": {"lse_square_scale": 0.1},
    "softcap": {"softcap": 2.0},
    "scale": {"logit_scale": -1.5},
    "token weights": {"token_weight": torch.arange(4, dtype=torch.float64)},
    "all": {
        "label_smoothing": 0.1,
        "weight": torch.tensor([0.5, 0.0, 1.0, 2.0, 1.5], dtype=torch.float64),
        "lse_square_scale": 0.1,
        "softcap": 2.0,
        "logit_scale": 0.5,
        "token_weight": torch.arange(4, dtype=torch.float64),
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options):
    """First and second derivatives: the reference is what a Hessian is sent to."""
    logits, _ = make(N=4, ignored=[1])
    target = torch.tensor([0, X, 3, 2])
    loss = lambda x: reference.cross_entropy(x, target, reduction="none", **options)  # noqa: E731
    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


@pytest.mark.parametrize("field", ["log_prob", "entropy", "lse"])
def test_gradcheck_token_log_probs(field):
    logits, _ = make(N=4, ignored=[1])
    target = torch.tensor([0, X, 3, 2])
    value = lambda x: getattr(  # noqa: E731
        reference.token_log_probs(x, target, temperature=0.7, softcap=3.0), field
    )
    assert torch.autograd.gradcheck(value, logits)


def test_gradcheck_linear():
    hidden = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    head = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[X, 1, 2], [3, X, 4]])
    loss = lambda h, w, b: reference.linear_cross_entropy(  # noqa: E731
        h, w, labels, linear_bias=b, shift=True, label_smoothing=0.1
    )
    assert torch.autograd.gradcheck(loss, (hidden, head, bias))


# -- the worked example ----------------------------------------------------------------------------


def test_worked_example_only_the_output_has_loss_and_gradient():
    ids = torch.tensor([[WORDS[word] for word in SENTENCE]])
    selection = Selection.from_context_lengths(ids, torch.tensor([CONTEXT]))
    logits = torch.randn(1, 11, len(WORDS), dtype=torch.float64, requires_grad=True)
    losses = reference.cross_entropy(logits, selection, reduction="none")
    assert losses.shape == (1, 11)
    assert losses.nonzero()[:, 1].tolist() == [5, 6, 7, 8, 9]
    likelihood = math.prod(  # Pr(y | x): row t says what token t + 1 is
        logits[0, t].softmax(0)[ids[0, t + 1]].item() for t in range(5, 10)
    )
    loss = reference.cross_entropy(logits, selection, reduction="sum")
    close(loss.item(), -math.log(likelihood))
    (grad,) = gradient(loss, logits)
    assert grad[0].abs().sum(1).nonzero().flatten().tolist() == [5, 6, 7, 8, 9]
    for t in range(5, 10):
        expected = logits[0, t].softmax(0)
        expected = expected - F.one_hot(ids[0, t + 1], len(WORDS))
        close(grad[0, t], expected.detach())


@pytest.mark.core
@pytest.mark.parametrize(("probability", "loss"), [(0.8, 0.2231), (0.2, 1.6094), (1.0, 0.0)])
def test_worked_example_in_numbers(probability, loss):
    logits = torch.tensor([[probability, 1 - probability]]).log()
    target = torch.tensor([0])
    assert reference.cross_entropy(logits, target).item() == pytest.approx(loss, abs=5e-5)
    log_prob = reference.token_log_probs(logits, target).log_prob
    assert -log_prob.item() == pytest.approx(loss, abs=5e-5)


# -- ignored rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "sequence_sum", "sequence_mean"])
def test_ignored_rows_are_never_read(poison, reduction):
    logits, target = make()
    r = torch.rand(7, dtype=torch.float64)
    clean = reference.cross_entropy(
        logits, target, reduction=reduction, label_smoothing=0.1, lse_square_scale=0.1,
        token_weight=r, softcap=5.0,
    )  # fmt: skip
    (clean_grad,) = gradient(clean.sum(), logits)
    poisoned = logits.detach().clone()
    poisoned[[1, 4]] = poison
    r[[1, 4]] = poison
    poisoned.requires_grad_()
    loss = reference.cross_entropy(
        poisoned, target, reduction=reduction, label_smoothing=0.1, lse_square_scale=0.1,
        token_weight=r, softcap=5.0,
    )  # fmt: skip
    (grad,) = gradient(loss.sum(), poisoned)
    assert torch.equal(loss, clean)
    assert torch.equal(grad, clean_grad)
    assert torch.equal(grad[[1, 4]].view(torch.int64), torch.zeros(2, 5, dtype=torch.int64))


@pytest.mark.parametrize("poison", [NAN, INF], ids=str)
def test_ignored_hidden_rows_are_never_read(poison):
    hidden = torch.randn(6, 4, dtype=torch.float64)
    hidden[[0, 3]] = poison
    head = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    hidden.requires_grad_()
    target = torch.tensor([X, 1, 2, X, 3, 4])
    loss = reference.linear_cross_entropy(hidden, head, target)
    d_hidden, d_head = gradient(loss, hidden, head)
    assert loss.isfinite()
    assert d_head.isfinite().all()
    assert (d_hidden[[0, 3]] == 0).all()
    kept = [1, 2, 4, 5]
    close(loss, F.cross_entropy(hidden[kept] @ head.T, target[kept]))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "sequence_sum", "sequence_mean"])
@pytest.mark.parametrize("N", [0, 3])
def test_everything_ignored_is_zero_and_connected(reduction, N):
    logits = torch.full((N, 5), NAN, requires_grad=True)
    loss = reference.cross_entropy(logits, torch.full((N,), X), reduction=reduction)
    assert (loss == 0).all()
    (grad,) = gradient(loss.sum(), logits)
    assert torch.equal(grad, torch.zeros(N, 5))
    hidden, head = torch.full((N, 4), NAN, requires_grad=True), torch.randn(5, 4).requires_grad_()
    loss = reference.linear_cross_entropy(hidden, head, torch.full((N,), X), reduction=reduction)
    for grad in gradient(loss.sum(), hidden, head):
        assert (grad == 0).all()


@pytest.mark.parametrize("zero", ["token weights", "class weight", "denominator"])
def test_a_divisor_of_zero_is_no_loss(zero):
    logits, target = make()
    options = {
        "token weights": {"token_weight": torch.zeros(7, dtype=torch.float64)},
        "class weight": {"weight": torch.zeros(5, dtype=torch.float64)},
        "denominator": {"denominator": 0},
    }[zero]
    loss = reference.cross_entropy(logits, target, **options)
    assert loss == 0
    assert (gradient(loss, logits)[0] == 0).all()


def test_class_weights_that_add_up_to_zero_leave_the_z_loss():
    logits, target = make()
    weight, z_loss = torch.zeros(5, dtype=torch.float64), {"lse_square_scale": 0.1}
    expected = 0.1 * (logits[target != X].logsumexp(1) ** 2).mean()
    close(reference.cross_entropy(logits, target, weight, **z_loss), expected)


# -- one value a sequence --------------------------------------------------------------------------


def test_sequences_are_the_rows_of_the_target():
    logits = torch.randn(3, 5, 4, dtype=torch.float64)  # (B, V, T), PyTorch's layout
    target = torch.tensor([[0, X, 2, 3], [X, X, X, X], [1, 1, X, 4]])
    rows = F.cross_entropy(logits, target, reduction="none")
    sums = reference.cross_entropy(logits, target, reduction="sequence_sum")
    close(sums, rows.sum(1))
    means = reference.cross_entropy(logits, target, reduction="sequence_mean")
    close(means, rows.sum(1) / torch.tensor([3.0, 1.0, 3.0]))
    assert means[1] == 0


def test_a_target_of_one_dimension_is_one_sequence():
    logits, target = make()
    total = reference.cross_entropy(logits, target, reduction="sum")
    sums = reference.cross_entropy(logits, target, reduction="sequence_sum")
    assert sums.shape == (1,)
    close(sums[0], total)


def test_packed_sequences_with_weights():
    """Empty sequences, one without targets, and a padding tail, against a loop over sequences."""
    N, V = 12, 6
    boundaries = [0, 0, 3, 4, 4, 9, 10]  # 10 and 11 are padding
    labels = torch.randint(V, (N,))
    labels[[1, 3, 10, 11]] = X
    r, w = torch.rand(N, dtype=torch.float64), torch.rand(V, dtype=torch.float64)
    logits = torch.randn(N, V, dtype=torch.float64)
    selection = Selection.from_labels(
        labels, shift=True, token_weight=r, cu_seqlens=torch.tensor(boundaries)
    )
    expected_sums, expected_means = [], []
    for start, stop in itertools.pairwise(boundaries):
        total = divisor = 0.0
        for t in range(start + 1, stop):
            y = int(labels[t])
            if y != X:
                total += float(-r[t] * w[y] * logits[t - 1].log_softmax(0)[y])
                divisor += float(r[t] * w[y])
        expected_sums.append(total)
        expected_means.append(total / divisor if divisor else 0.0)
    assert sum(mean > 0 for mean in expected_means) == 2
    for reduction, expected in (
        ("sequence_sum", expected_sums),
        ("sequence_mean", expected_means),
    ):
        ours = reference.cross_entropy(logits, selection, w, reduction=reduction)
        close(ours, torch.tensor(expected, dtype=torch.float64))


# -- a Selection, and the linear head --------------------------------------------------------------


@pytest.mark.parametrize("leading", ["(N, V)", "(B, T, V)"])
def test_selection_of_shifted_labels(leading):
    labels = torch.tensor([[X, 1, 2, X], [4, X, 0, 3]])
    logits = torch.randn(2, 4, 5, dtype=torch.float64)
    by_hand = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    selection = Selection.from_labels(labels, shift=True)
    given = logits.flatten(0, 1) if leading == "(N, V)" else logits
    close(reference.cross_entropy(given, selection), by_hand)
    assert reference.cross_entropy(given, selection, reduction="none").shape == (2, 4)
    assert reference.token_log_probs(given, selection).log_prob.shape == (2, 4)


@pytest.mark.core
@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (2, 3, 1)], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_linear_is_linear_then_cross_entropy(lead, biased, reduction):
    """`F.linear_cross_entropy` takes () and (N,); more dimensions are flattened."""
    hidden = torch.randn(*lead, 4, dtype=torch.float64, requires_grad=True)
    head = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True) if biased else None
    target = torch.randint(5, lead)
    if target.numel() > 1:
        target.view(-1)[2] = X
    options = {
        "weight": torch.rand(5, dtype=torch.float64),
        "label_smoothing": 0.1,
        "reduction": reduction,
    }
    ours = reference.linear_cross_entropy(hidden, head, target, linear_bias=bias, **options)
    flat = hidden if len(lead) < 2 else hidden.flatten(0, -2)
    flat_target = target if len(lead) < 2 else target.flatten()
    logits = F.linear(flat, head, bias)
    theirs = F.cross_entropy(logits, flat_target, **options)
    close(ours.reshape(theirs.shape), theirs)
    if reduction == "none":
        assert ours.shape == target.shape
    inputs = (hidden, head) if bias is None else (hidden, head, bias)
    for mine, other in zip(gradient(ours.sum(), *inputs), gradient(theirs.sum(), *inputs),
                           strict=True):  # fmt: skip
        close(mine, other)


@pytest.mark.core
@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="PyTorch has it since 2.13")
@pytest.mark.parametrize("lead", [(), (6,)], ids=str)
def test_linear_is_torch_linear_cross_entropy(lead):
    hidden, head = torch.randn(*lead, 4).double(), torch.randn(5, 4).double()
    target = torch.randint(5, lead)
    options = {
        "linear_bias": torch.randn(5).double(),
        "weight": torch.rand(5).double(),
        "label_smoothing": 0.1,
    }
    for reduction in ("none", "mean", "sum"):
        ours = reference.linear_cross_entropy(hidden, head, target, reduction=reduction, **options)
        theirs = F.linear_cross_entropy(hidden, head, target, reduction=reduction, **options)
        close(ours, theirs)
        assert ours.shape == theirs.shape


def test_linear_shift():
    hidden, head = torch.randn(2, 4, 3).double(), torch.randn(5, 3).double()
    labels = torch.tensor([[X, 1, 2, X], [4, X, 0, 3]])
    r = torch.rand(2, 4).double()
    logits = (hidden @ head.T)[:, :-1]
    rows = F.cross_entropy(logits.movedim(-1, 1), labels[:, 1:], reduction="none")
    none = reference.linear_cross_entropy(
        hidden, head, labels, shift=True, token_weight=r, reduction="none"
    )
    assert none.shape == (2, 4)
    assert (none[:, -1] == 0).all()
    close(none[:, :-1], r[:, 1:] * rows)
    means = reference.linear_cross_entropy(
        hidden, head, labels, shift=True, reduction="sequence_mean"
    )
    close(means, rows.sum(1) / (labels[:, 1:] != X).sum(1))


def test_linear_in_low_precision_is_computed_in_float32():
    hidden, head = torch.randn(6, 64).bfloat16(), torch.randn(50, 64).bfloat16()
    target = torch.randint(50, (6,))
    loss = reference.linear_cross_entropy(hidden, head, target)
    assert loss.dtype == torch.float32
    truth = F.cross_entropy(hidden.double() @ head.double().T, target).float()
    close(loss, truth, 1e-5)  # bf16 logits would be off by 1e-3 or more


def test_linear_is_the_same_under_autocast():
    """An oracle whose logits are rounded to bf16 is none."""
    hidden, head = torch.randn(6, 64), torch.randn(50, 64)
    target = torch.randint(50, (6,))
    plain = reference.linear_cross_entropy(hidden, head, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reference.linear_cross_entropy(hidden, head, target), plain)


# -- token_log_probs -------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_token_log_probs_formulas(temperature):
    logits, target = make()
    values = reference.token_log_probs(logits, target, temperature=temperature, return_argmax=True)
    for i, y in enumerate(target.tolist()):
        if y == X:
            assert [value[i].item() for value in values] == [0, 0, 0, False, 0]
            continue
        row = logits[i].detach() / temperature
        p = row.exp() / row.exp().sum()
        close(values.log_prob[i].detach(), p[y].log())
        close(values.entropy[i].detach(), -(p * p.log()).sum())
        close(values.lse[i].detach(), row.exp().sum().log())
        assert bool(values.is_top1[i]) == (int(row.argmax()) == y)
        assert values.argmax[i] == row.argmax()
    assert values.is_top1.dtype == torch.bool
    assert not values.is_top1.requires_grad


def test_token_log_probs_of_a_distribution():
    theirs = torch.distributions.Categorical(logits=torch.randn(6, 9).double())
    ours = reference.token_log_probs(theirs.logits, torch.arange(6))
    close(ours.entropy, theirs.entropy())
    close(ours.log_prob, theirs.log_prob(torch.arange(6)))


def test_a_tie_for_the_first_place_is_top1():
    logits = torch.tensor([[1.0, 1.0, 0.0]]).expand(3, 3)
    values = reference.token_log_probs(logits, torch.tensor([0, 1, 2]))
    assert values.is_top1.tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("layout", "lead"), [((5,), ()), ((4, 5), (4,)), ((2, 5, 3), (2, 3))], ids=str
)
def test_token_log_probs_has_the_targets_shape(layout, lead):
    labels = torch.zeros(lead, dtype=torch.int64)
    values = reference.token_log_probs(torch.randn(layout), labels, return_argmax=True)
    assert [value.shape for value in values] == [torch.Size(lead)] * 5


@pytest.mark.parametrize("poison", [NAN, INF], ids=str)
def test_token_log_probs_never_reads_ignored_rows(poison):
    logits = torch.randn(3, 5)
    logits[1] = poison
    logits.requires_grad_()
    values = reference.token_log_probs(logits, torch.tensor([0, X, 2]))
    total = values.log_prob.sum() + values.entropy.sum() + values.lse.sum()
    (grad,) = gradient(total, logits)
    assert total.isfinite()
    assert grad.isfinite().all()
    assert (grad[1] == 0).all()


def test_minus_infinity_is_probability_zero():
    """In value and in gradient, wherever a class is masked out by -inf: 0 x inf is 0."""
    masked = torch.tensor([[1.0, 2.0, -INF, 0.5]], dtype=torch.float64, requires_grad=True)
    small = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1])
    for field in ("log_prob", "entropy", "lse"):
        ours = getattr(reference.token_log_probs(masked, target), field)
        theirs = getattr(reference.token_log_probs(small, target), field)
        close(ours, theirs)
        (our_grad,), (their_grad,) = gradient(ours.sum(), masked), gradient(theirs.sum(), small)
        close(our_grad[:, [0, 1, 3]], their_grad)
        assert our_grad[0, 2] == 0


def test_a_masked_class_of_weight_zero_takes_no_part_in_smoothing():
    masked = torch.tensor([[1.0, 2.0, -INF]], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64)
    loss = reference.cross_entropy(
        masked, torch.tensor([0]), w, label_smoothing=0.3, reduction="sum"
    )
    log_probs = torch.tensor([1.0, 2.0], dtype=torch.float64).log_softmax(0)
    close(loss.detach(), -0.7 * log_probs[0] - 0.1 * (log_probs[0] + 3 * log_probs[1]))
    assert gradient(loss, masked)[0].isfinite().all()


@pytest.mark.core
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
def test_linear_token_log_probs(biased):
    hidden, head = torch.randn(2, 4, 3).double(), torch.randn(5, 3).double()
    bias = torch.randn(5).double() if biased else None
    labels = torch.tensor([[X, 1, 2, X], [4, X, 0, 3]])
    options = {"temperature": 0.7, "softcap": 3.0, "return_argmax": True}
    ours = reference.linear_token_log_probs(
        hidden, head, labels, linear_bias=bias, shift=True, **options
    )
    shifted = torch.cat([labels[:, 1:], torch.full((2, 1), X)], 1)
    theirs = reference.token_log_probs(
        F.linear(hidden, head, bias).movedim(-1, 1), shifted, **options
    )
    for mine, other in zip(ours, theirs, strict=True):
        close(mine, other)
        assert mine.shape == (2, 4)


@pytest.mark.parametrize("function", [reference.cross_entropy, cross_entropy])
def test_a_negative_weight_of_an_ignored_token_is_no_error(function):
    logits, target = torch.randn(3, 5), torch.tensor([1, -100, 4])
    weights = torch.tensor([1.0, -7.0, 2.0])
    loss = function(logits, target, token_weight=weights)
    assert loss == function(logits, target, token_weight=weights.abs())


# -- errors ----------------------------------------------------------------------------------------

LOGITS, TARGET = torch.zeros(3, 5), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"reduction": "avg"}, ValueError, ["'avg'", "sequence_mean"]),
        ({"reduction": "sum", "denominator": 2}, ValueError, ["denominator", "'sum'"]),
        ({"denominator": torch.ones(2)}, ValueError, ["denominator", "(2,)"]),
        ({"denominator": torch.tensor(1.0).requires_grad_()}, ValueError, ["requires grad"]),
        ({"label_smoothing": 1.1}, ValueError, ["label_smoothing", "1.1"]),
        ({"label_smoothing": NAN}, ValueError, ["label_smoothing", "nan"]),
        ({"softcap": 0.0}, ValueError, ["softcap", "0.0"]),
        ({"softcap": -1.0}, ValueError, ["softcap", "-1.0"]),
        ({"logit_scale": INF}, ValueError, ["logit_scale", "inf"]),
        ({"lse_square_scale": NAN}, ValueError, ["lse_square_scale", "nan"]),
        ({"weight": torch.ones(4)}, ValueError, ["weight", "(4,)", "(5,)"]),
        ({"weight": torch.ones(5).requires_grad_()}, ValueError, ["weight", "requires grad"]),
        ({"token_weight": torch.ones(4)}, ValueError, ["token_weight", "(4,)", "(3,)"]),
        ({"token_weight": torch.ones(3).requires_grad_()}, ValueError, ["requires grad"]),
        ({"token_weight": torch.ones(3, dtype=torch.bool)}, TypeError, ["token_weight", "bool"]),
        ({"input": torch.zeros(3, 5, dtype=torch.int64)}, TypeError, ["input", "int64"]),
        ({"input": [[0.0]]}, TypeError, ["input", "list"]),
        ({"input": torch.tensor(0.0), "target": torch.tensor(0)}, ValueError, ["no dimensions"]),
        ({"input": torch.zeros(3, 0)}, ValueError, ["(3, 0)", "vocabulary"]),
        ({"target": torch.zeros(4, dtype=torch.int64)}, ValueError, ["(3, 5)", "(4,)", "int64"]),
        ({"target": [0, 1, 2]}, TypeError, ["target", "list"]),
        ({"target": torch.ones(3, dtype=torch.bool)}, TypeError, ["target", "bool"]),
        (
            {"input": torch.zeros(2, 3, 5), "target": torch.zeros(2, 3, dtype=torch.int64)},
            ValueError,
            ["vocabulary last", "flatten(0, -2)", "Selection"],
        ),
        (
            {"target": Selection.from_labels(torch.zeros(4, dtype=torch.int64))},
            ValueError,
            ["(3, 5)", "(4,)", "N = 4"],
        ),
        ({"target": torch.tensor([0, 5, 2])}, IndexError, ["target[1] = 5", "[0, 5)"]),
        ({"target": torch.tensor([0, 1, -1])}, IndexError, ["target[2] = -1", "[0, 5)"]),
        (
            {"token_weight": torch.tensor([1.0, -1.0, 2.0])},
            ValueError,
            ["token_weight", "row 1", "-1.0", "denominator"],
        ),
    ],
    ids=lambda value: ",".join(map(str, value)) if isinstance(value, (dict, list)) else "",
)
def test_cross_entropy_errors(kwargs, error, words):
    with pytest.raises(error) as caught:
        reference.cross_entropy(**{"input": LOGITS, "target": TARGET, **kwargs})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"temperature": 0.0}, ValueError, ["temperature", "0.0"]),
        ({"temperature": -1.0}, ValueError, ["temperature", "-1.0"]),
        ({"temperature": NAN}, ValueError, ["temperature", "nan"]),
        ({"temperature": INF}, ValueError, ["temperature", "inf"]),
        ({"target": torch.zeros(3, 5)}, (TypeError, ValueError), ["target", "float32"]),
        ({"target": torch.tensor([0, 5, 2])}, IndexError, ["target[1] = 5", "[0, 5)"]),
        ({"softcap": 0.0}, ValueError, ["softcap", "0.0"]),
    ],
    ids=[
        *(f"temperature {t}" for t in (0, -1, NAN, INF)),
        "probabilities",
        "range",
        "softcap",
    ],
)
def test_token_log_probs_errors(kwargs, error, words):
    with pytest.raises(error) as caught:
        reference.token_log_probs(**{"input": LOGITS, "target": TARGET, **kwargs})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"target": torch.zeros(3, 2, dtype=torch.int64)}, ValueError, ["(2, 3, 4)", "(3, 2)"]),
        (
            {"target": torch.zeros(6, dtype=torch.int64), "shift": True},
            ValueError,
            ["(2, 3, 4)", "(6,)"],  # flat labels do not say where rows end
        ),
        ({"target": torch.zeros(7, dtype=torch.int64)}, ValueError, ["(2, 3, 4)", "(7,)"]),
        ({"linear_weight": torch.zeros(5, 3)}, ValueError, ["(5, 3)", "(2, 3, 4)"]),
        ({"linear_bias": torch.zeros(4)}, ValueError, ["linear_bias", "(4,)", "(5,)"]),
        ({"input": torch.zeros(2, 3, 4, dtype=torch.int64)}, TypeError, ["input", "int64"]),
        ({"target": [[0, 1, 2], [0, 1, 2]]}, TypeError, ["target", "list"]),
    ],
    ids=["transposed", "flat shift", "size", "width", "bias", "integers", "list"],
)
def test_linear_errors(kwargs, error, words):
    arguments = {
        "input": torch.zeros(2, 3, 4),
        "linear_weight": torch.zeros(5, 4),
        "target": torch.zeros(2, 3, dtype=torch.int64),
        **kwargs,
    }
    with pytest.raises(error) as caught:
        reference.linear_cross_entropy(**arguments)
    for word in words:
        assert word in str(caught.value)

"""Class probabilities as targets of `sgp.cross_entropy`: the kernel, beside PyTorch's operators.

PyTorch's own sample inputs are in test_cross_entropy.py, the operators' checks in test_autograd.py.
"""

# ruff: noqa: ARG001  (fixtures are asked for by name, for what they do)

from functools import partial

import pytest
import torch
from torch import func
from torch.nn import functional as F

import sgp
from bench.proof.interpreter import watch_accesses
from sgp.rows import by_triton
from sgp.rows.recipe import Recipe
from tests.oracle import assert_no_worse, in_float64, loss_and_grad, relative_error

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INF = float("inf")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(26)


@pytest.fixture
def kernel(monkeypatch):
    """The kernel alone, under the bounds check."""
    monkeypatch.setenv("SGP_BACKEND", "triton")
    with watch_accesses() as accesses:
        yield accesses


def results(function, logits, target, upstream=None, **options):
    """(loss, gradient of the logits, gradient of the probabilities)."""
    x, y = (t.detach().clone().requires_grad_() for t in (logits, target))
    loss = function(x, y, **options)
    given = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, (x, y), given)


def check(logits, target, upstream=None, **options):
    """Loss and both gradients against the reference in float64; returns ours.

    No worse than the reference on the same tensors. The gradient of the logits is compared again
    where the probabilities have none: it may come in the launch of the loss.
    """
    reference = sgp.reference.cross_entropy
    double = (logits.double(), target.double(), upstream)
    truth = results(reference, *double, **in_float64(options))
    plain = results(reference, logits, target, upstream, **options)
    ours = results(sgp.cross_entropy, logits, target, upstream, **options)
    alone = loss_and_grad(sgp.cross_entropy, logits, target, upstream, **options)
    assert ours[0].dtype == FP32
    assert (ours[1].dtype, ours[2].dtype) == (logits.dtype, target.dtype)
    for found in (ours, alone):
        for values in zip(found, plain[: len(found)], truth[: len(found)], strict=True):
            rows = [x.movedim(1, -1) if x.shape == logits.shape else x for x in values]
            assert_no_worse(*rows, interpreted=True)
    return ours


# -- options, reductions, dtypes, vocabularies -----------------------------------------------------


def options_of(name, N, V):
    """The keywords of one option, or of all."""
    weight = torch.rand(V) + 0.1
    weight[0] = 0.0
    every = {
        "weight": {"weight": weight},
        "label_smoothing": {"label_smoothing": 0.1},
        "token_weight": {"token_weight": torch.rand(N) + 0.1},
        "softcap": {"softcap": 5.0},
        "logit_scale": {"logit_scale": -0.7},
        "z_loss": {"lse_square_scale": 0.05},
    }
    if name == "all":
        return {key: value for option in every.values() for key, value in option.items()}
    return every.get(name, {})


OPTIONS = ["plain", "weight", "label_smoothing", "token_weight", "softcap", "logit_scale", "z_loss"]


@pytest.mark.core
@pytest.mark.parametrize("reduction", ["mean", "none", "sequence_mean"])
@pytest.mark.parametrize("option", [*OPTIONS, "all"])
def test_option_and_reduction(option, reduction, backend):
    N, V = 6, 21
    logits = (3 * torch.randn(2, 3, V)).transpose(1, 2)
    target = torch.randn(2, V, 3).softmax(1)
    options = options_of(option, N, V)
    if "token_weight" in options:
        options["token_weight"] = options["token_weight"].view(2, 3)
    shape = {"none": (2, 3), "sequence_mean": (2,)}.get(reduction, ())
    check(logits, target, torch.randn(shape), reduction=reduction, **options)


VOCABULARIES = {
    1: "one class: the loss is 0 and so is the gradient",
    2: "the smallest that says anything",
    7: "odd and smaller than any block",
    256: "exactly the smallest block",
    1_000: "no power of two divides it beyond 8",
    9_001: "several blocks, and rows that begin and end between two accesses",
}


@pytest.mark.parametrize(
    "dtypes", [(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP32, FP16), (FP16, BF16)], ids=str
)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_vocabulary_and_dtypes(V, dtypes, kernel):
    logits = (3 * torch.randn(2, V)).to(dtypes[0])
    target = torch.randn(2, V).softmax(1).to(dtypes[1])
    # 2 rounds nothing: a factor that comes later would round a gradient once more.
    check(logits, target, torch.tensor(2.0), **options_of("all", 2, V))


@pytest.mark.parametrize("of_targets", [torch.float64, torch.float32], ids=str)
def test_probabilities_in_another_dtype(of_targets, backend):
    logits, target = torch.randn(3, 9), torch.randn(3, 9, dtype=torch.float64).softmax(1)
    expected = results(sgp.cross_entropy, logits, target.float())
    found = results(sgp.cross_entropy, logits, target.to(of_targets))
    assert found[2].dtype == of_targets
    for value, other in zip(found, expected, strict=True):
        assert relative_error(value, other) < 1e-6


def test_probabilities_need_not_add_up_to_1_nor_be_positive(kernel):
    check(3 * torch.randn(4, 300), torch.randn(4, 300), reduction="none")


@pytest.mark.parametrize("V", [5, 9_001])
def test_equal_largest_logits(V, kernel):
    logits = torch.randn(3, V)
    logits[0, [0, V - 1]] = 9.0
    logits[1] = 2.0
    logits[2, [1, 2, V - 1]] = -1e3  # and what is never the largest
    check(logits, torch.randn(3, V).softmax(1), reduction="none")


# -- near 0 and 1 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("V", [2, 300, 9_001])
@pytest.mark.parametrize("gap", [1.0, 12.0, 25.0, 80.0])
def test_nothing_is_lost_where_a_class_is_certain(gap, V, kernel):
    """Loss and gradient of its logit are far below 1 there: PyTorch's float32 has 0 from 17 on."""
    logits = torch.randn(3, V) / 8
    at = torch.tensor([0, V // 2, V - 1])
    logits[range(3), at] = gap
    target = F.one_hot(at, V).float()
    x = logits.double().requires_grad_()
    (exact_nll,) = (x.logsumexp(1) - x[range(3), at],)
    others = logits.double().index_put((torch.arange(3), at), torch.tensor(-INF).double())
    odds = (others.logsumexp(1) - gap).exp()  # of any other class against this one
    loss, grad, _ = results(sgp.cross_entropy, logits, target, reduction="none")
    torch.testing.assert_close(loss.double(), odds.log1p(), rtol=1e-5, atol=0)
    torch.testing.assert_close(exact_nll.detach(), odds.log1p(), rtol=1e-6, atol=1e-12)
    expected = -odds / (1 + odds)
    torch.testing.assert_close(grad[range(3), at].double(), expected, rtol=1e-5, atol=1e-44)
    by_index = loss_and_grad(sgp.cross_entropy, logits, at, reduction="none")
    torch.testing.assert_close(loss, by_index[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, by_index[1], rtol=1e-5, atol=1e-44)


@pytest.mark.parametrize("V", [2, 300, 9_001])
@pytest.mark.parametrize("gap", [12.0, 25.0])
def test_nothing_is_lost_where_both_are_certain(gap, V, kernel):
    """The gradient of the class's logit is the difference of what both leave to the others."""
    at = torch.tensor([0, V // 2, V - 1])
    logits, scores = torch.randn(2, 3, V)
    logits[range(3), at] = scores[range(3), at] = gap
    target = scores.softmax(1)
    others = torch.ones(3, V, dtype=torch.bool)
    others[range(3), at] = False
    p, q = ((x.double() * others).sum(1) for x in (logits.double().softmax(1), target))
    _, grad, _ = results(sgp.cross_entropy, logits, target, reduction="none")
    total = q + target[range(3), at].double()
    error = (grad[range(3), at].double() - (q - total * p)).abs()
    assert (error <= 1e-6 * (p + q)).all(), error / (p + q)


@pytest.mark.parametrize("V", [3, 9_001])
def test_a_class_without_probability_may_have_minus_infinity(V, backend):
    """0 log 0 is 0, as if the class were not there; PyTorch has NaN."""
    logits, target = torch.randn(2, V), torch.randn(2, V)
    gone = torch.zeros(V, dtype=torch.bool)
    gone[[1, V - 2]] = True
    target = target.masked_fill(gone, -INF).softmax(1)
    masked = logits.masked_fill(gone, -INF)
    assert F.cross_entropy(masked, target).isnan(), "PyTorch's was NaN"
    found = results(sgp.cross_entropy, masked, target, reduction="none")
    reference = results(sgp.reference.cross_entropy, masked, target, reduction="none")
    some = results(sgp.cross_entropy, logits[:, ~gone], target[:, ~gone], reduction="none")
    for value, other, without in zip(found, reference, some, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)
        if value.dim() == 2:
            assert not value[:, gone].any()
            value = value[:, ~gone]  # noqa: PLW2901
        torch.testing.assert_close(value, without, rtol=1e-5, atol=1e-6)
    smoothed = sgp.cross_entropy(masked, target, label_smoothing=0.1)
    assert smoothed == INF, "smoothing gives it probability: infinity, as in PyTorch"


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("V", [4, 9_001])
def test_nan_and_infinity_stay_in_their_row(V, kernel):
    logits, target = torch.randn(6, V), torch.randn(6, V).softmax(1)
    logits[0, 1] = torch.nan
    logits[1, V - 1] = INF
    logits[2] = -INF
    logits[3] = torch.nan
    target[4, 0] = torch.nan
    found = results(sgp.cross_entropy, logits, target, reduction="none")
    truth = results(F.cross_entropy, logits.double(), target.double(), reduction="none")
    for value, exact in zip(found[:2], truth[:2], strict=True):
        assert value[:5].isnan().all(), "a row that has no loss must never give a number"
        assert exact[:5].isnan().flatten(1).any(1).all() if value.dim() == 2 else True
        assert torch.isfinite(value[5]).all(), "and touches no other row"
    assert found[0].isnan().tolist() == truth[0].isnan().tolist()
    assert relative_error(found[1][5], truth[1][5]) < 1e-6


# -- where they are --------------------------------------------------------------------------------

VIEWS = {
    "rows of a wider matrix": lambda V: torch.randn(6, V + 3)[:, 1:-2],
    "every second row": lambda V: torch.randn(12, V)[::2],
    "vocabulary strided": lambda V: torch.randn(V, 6).t(),
    "one row for all": lambda V: torch.randn(1, V).expand(6, V),
    "(B, V, T)": lambda V: torch.randn(2, 3, V).movedim(-1, 1),
    "logits[:, :-1]": lambda V: torch.randn(2, 4, V)[:, :-1].movedim(-1, 1),
    "three levels of rows": lambda V: torch.randn(3, 5, 2, V).permute(2, 3, 0, 1)[..., :4],
}


@pytest.mark.parametrize("V", [9, 4_200])
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides_are_read_where_they_are(view, V, kernel):
    logits, target = VIEWS[view](V), VIEWS[view](V)
    close = partial(torch.testing.assert_close, rtol=2e-6, atol=1e-6)
    expected = results(sgp.cross_entropy, logits.contiguous(), target.contiguous())
    for x, y in ((logits, target), (logits.contiguous(), target), (logits, target.contiguous())):
        x, y = (t.detach().requires_grad_() for t in (x, y))  # noqa: PLW2901
        loss = sgp.cross_entropy(x, y)
        close(loss.detach(), expected[0])
        for gradient, other in zip(torch.autograd.grad(loss, (x, y)), expected[1:], strict=True):
            close(gradient, other)


def test_no_rows(backend):
    logits = torch.randn(0, 5, requires_grad=True)
    loss = sgp.cross_entropy(logits, torch.randn(0, 5))
    loss.backward()
    assert loss == 0
    assert logits.grad.shape == (0, 5)


def test_every_output_is_written_in_full():
    """Outputs are NaN before; V leaves columns before and after what is read 16 bytes at a time."""
    N, V = 3, 9_001
    x, y = torch.randn(N, V), torch.randn(N, V).softmax(1)
    nan = torch.full((N, V), torch.nan)
    dx, dy, loss, saved = nan.clone(), nan.clone(), nan[:, 0].clone(), nan[:, :4].clone()
    options = (None, None, None, Recipe())
    with watch_accesses():
        by_triton.probabilities(x, y, dx, None, loss, saved, *options)
        again = nan.clone()
        by_triton.probabilities(x, y, again, dy, None, saved, *options)
    for name, value in {"dx": dx, "dy": dy, "loss": loss, "saved": saved}.items():
        assert not value.isnan().any(), name
    assert torch.equal(dx, again), "the same gradient with the loss and in backward"


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, FP32), (BF16, BF16)], ids=str)
@pytest.mark.parametrize("V", [1_000, 9_001, 16_384])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bytes(reduction, V, dtypes, monkeypatch):
    """Logits and probabilities are read once for the loss and once for gradients, written once."""
    monkeypatch.setenv("SGP_BACKEND", "triton")
    N = 2
    logits = torch.randn(N, V).to(dtypes[0]).requires_grad_()
    target = torch.randn(N, V).softmax(1).to(dtypes[1]).requires_grad_(reduction == "none")
    with watch_accesses() as seen:
        sgp.cross_entropy(logits, target, reduction=reduction).sum().backward()
    read = [logits, target]
    written = [x.grad for x in read if x.requires_grad]
    assert seen.launches == 2
    for x in read:
        assert seen.of(x).loaded == 2 * N * V * x.dtype.itemsize
    for g in written:
        assert (seen.of(g).loaded, seen.of(g).stored) == (0, N * V * g.dtype.itemsize)
    known = [seen.of(x) for x in (*read, *written)]
    others = sum(r.loaded + r.stored for r in seen.regions.values() if r not in known)
    assert others <= 64 * N, "what is not of size N x V is a few numbers a row"


# -- autograd --------------------------------------------------------------------------------------


@pytest.fixture
def given():
    return torch.randn(3, 5, requires_grad=True), torch.randn(3, 5).softmax(1).requires_grad_()


@pytest.mark.core
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_pytorchs_or_refused(reduction, given, backend):
    logits, target = given
    for y in (target, target.detach()):
        loss = sgp.cross_entropy(logits, y, reduction=reduction).sum()
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        if backend == "torch":
            assert torch.autograd.grad(gradient.square().sum(), logits)[0].any()
        else:
            with pytest.raises(RuntimeError, match=r"sgp\.cross_entropy has no second derivative"):
                gradient.square().sum().backward()


def test_second_backward(given, kernel):
    logits, target = given
    mean = sgp.cross_entropy(logits, target.detach())
    mean.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"sgp\.cross_entropy: backward a second time"):
        mean.backward()
    rows = sgp.cross_entropy(logits, target, reduction="none").sum()
    first = torch.autograd.grad(rows, given, retain_graph=True)
    second = torch.autograd.grad(2 * rows, given)
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # PyTorch's own
def test_forward_mode_is_refused(given, kernel):
    logits, target = (x.detach() for x in given)
    for argument in (0, 1):
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            func.jacfwd(sgp.cross_entropy, argument)(logits, target)


@pytest.mark.parametrize("argument", [0, 1, (0, 1)])
def test_gradients_of_examples(argument, given, backend):
    def by(function):
        one = func.grad(lambda x, y: function(x[None], y[None], label_smoothing=0.1), argument)
        return func.vmap(one)(*(x.detach() for x in given))

    torch.testing.assert_close(by(sgp.cross_entropy), by(F.cross_entropy))
    batched = func.vmap(partial(sgp.cross_entropy, reduction="none"))
    examples = [x.detach()[None] for x in given]
    torch.testing.assert_close(
        batched(*examples), F.cross_entropy(*(x[0] for x in examples), reduction="none")[None]
    )


@pytest.mark.core
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("reduction", "dynamic"), [("mean", False), ("none", True)])
def test_compiled_is_eager(reduction, dynamic, given, backend):
    torch._dynamo.reset()

    def loss_of(x, y):
        return 3 * sgp.cross_entropy(x, y, reduction=reduction, label_smoothing=0.1).sum()

    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    logits, target = given
    for y, of in ((target, given), (target.detach(), (logits,))):
        found = torch.autograd.grad(compiled(logits, y), of)
        torch.testing.assert_close(found, torch.autograd.grad(loss_of(logits, y), of))
    torch._dynamo.reset()


def test_float16_gradients_wait_for_the_loss_scale(kernel):
    """A gradient of 1e-8 is 0 in float16, and times 2^16 it is not."""
    logits = torch.zeros(1, 3, dtype=FP16).requires_grad_()
    target = torch.tensor([[1 / 3 + 1e-6, 1 / 3, 1 / 3 - 1e-6]])
    loss = sgp.cross_entropy(logits, target, denominator=100.0)
    (2.0**20 * loss).backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 0] < 0 < logits.grad[0, 2]


def test_without_gradients(given, kernel):
    logits, target = given
    expected = F.cross_entropy(logits, target).detach()
    with torch.no_grad():
        torch.testing.assert_close(sgp.cross_entropy(logits, target), expected)
    assert not sgp.cross_entropy(logits.detach(), target.detach()).requires_grad
    (of_target,) = torch.autograd.grad(sgp.cross_entropy(logits.detach(), target), target)
    torch.testing.assert_close(of_target, -logits.detach().log_softmax(1) / 3)

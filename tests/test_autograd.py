"""How the loss meets autograd, functorch, torch.compile and autocast: right, or a clear error."""

# ruff: noqa: ARG001, ARG002  (fixtures are asked for by name, for what they do)

import re
import shutil
from functools import partial

import pytest
import torch
from torch import func
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sgp
from sgp.rows import operators, probabilities
from sgp.rows.by_torch import Upstream, Wanted
from sgp.rows.recipe import Recipe
from sgp.rows.watched import Operator, flat
from tests.oracle import assert_no_worse, loss_and_grad, relative_error

IGNORE = -100
N, V = 3, 5
REDUCTIONS = ["mean", "sum", "none", "sequence_sum", "sequence_mean"]
FUSED_OR_NOT = ["mean", "none"]  # the gradient comes with the loss, or in backward
SECOND = "no second derivative"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(22)


@pytest.fixture
def target(device):
    return torch.tensor([4, IGNORE, 0], device=device)


@pytest.fixture
def logits(device):
    return torch.randn(N, V, device=device, requires_grad=True)


# -- gradients by finite differences ---------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "weight": {"weight": torch.linspace(0.0, 2.0, V, dtype=torch.float64)},
    "label_smoothing": {"label_smoothing": 0.2},
    "token_weight": {"token_weight": torch.tensor([0.5, 3.0, 2.0], dtype=torch.float64)},
    "softcap": {"softcap": 1.5},
    "logit_scale": {"logit_scale": -0.7},
    "z_loss": {"lse_square_scale": 0.3},
}
OPTIONS["all"] = {name: value for option in OPTIONS.values() for name, value in option.items()}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("inplace", [False, True])
def test_gradient_by_central_differences(inplace, option, reduction, target, monkeypatch):
    """Float64 runs PyTorch's operators; the kernels are held to the same truth elsewhere.

    By hand, for `gradcheck` goes backward through one loss several times, which "mean", "sum" and
    `inplace` refuse.
    """
    monkeypatch.setenv("SGP_BACKEND", "torch")
    x = torch.randn(N, V, dtype=torch.float64)
    run = partial(sgp.cross_entropy, target=target, reduction=reduction, **OPTIONS[option])
    shape = run(x).shape
    upstream = torch.randn(shape, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    run(leaf * 1, inplace=inplace).backward(upstream)
    h = 1e-5
    steps = h * torch.eye(N * V, dtype=torch.float64).view(-1, N, V)
    slopes = torch.stack([((run(x + s) - run(x - s)) * upstream).sum() / (2 * h) for s in steps])
    torch.testing.assert_close(leaf.grad, slopes.view(N, V), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("reduction", ["none", "sequence_sum", "sequence_mean"])
def test_gradcheck(reduction, target, monkeypatch):
    """PyTorch's own check, where going backward twice is allowed."""
    monkeypatch.setenv("SGP_BACKEND", "torch")
    leaf = torch.randn(N, V, dtype=torch.float64, requires_grad=True)
    run = partial(sgp.cross_entropy, target=target, reduction=reduction, **OPTIONS["all"])
    torch.autograd.gradcheck(run, (leaf,))


def test_gradcheck_of_probabilities(monkeypatch):
    leaf = torch.randn(N, V, dtype=torch.float64, requires_grad=True)
    p = torch.randn(N, V, dtype=torch.float64).softmax(1)
    run = partial(sgp.cross_entropy, target=p, **{**OPTIONS["all"], "softcap": 2.0})
    torch.autograd.gradcheck(run, (leaf,))
    torch.autograd.gradgradcheck(run, (leaf,))  # PyTorch's operators: twice differentiable


# -- backward more than once -----------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_second_backward_raises_and_changes_nothing(
    factor, inplace, reduction, backend, logits, target
):
    loss = sgp.cross_entropy(logits * 1, target, reduction=reduction, inplace=inplace)
    (factor * loss).backward(retain_graph=True)
    first = logits.grad.clone()
    with pytest.raises(RuntimeError, match=r"sgp\.cross_entropy: backward a second time"):
        (factor * loss).backward()
    assert torch.equal(logits.grad, first)


def test_second_backward_in_place_of_rows_raises(backend, logits, target):
    loss = sgp.cross_entropy(logits * 1, target, reduction="none", inplace=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward a second time through a loss with inplace"):
        loss.backward()


def test_without_retain_graph_the_message_is_pytorchs(backend, logits, target):
    loss = sgp.cross_entropy(logits, target)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_rows_can_go_backward_twice_with_different_factors(backend, logits, target):
    loss = sgp.cross_entropy(logits, target, reduction="none")
    up = torch.tensor([1.0, 5.0, -2.0])
    loss.backward(up, retain_graph=True)
    loss.backward(3 * up)
    expected = loss_and_grad(sgp.cross_entropy, logits, target, 4 * up, reduction="none")[1]
    torch.testing.assert_close(logits.grad, expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("reduction", FUSED_OR_NOT)
@pytest.mark.parametrize("inplace", [False, True])
def test_logits_changed_by_the_caller_are_not_called_a_second_backward(
    inplace, reduction, backend, logits, target
):
    """The first backward fails because of the caller's `mul_`: the message must not mislead."""
    if reduction == "mean" and not inplace:
        return  # the gradient is there already and does not need the logits
    hidden = logits * 1
    loss = sgp.cross_entropy(hidden, target, reduction=reduction, inplace=inplace).sum()
    with torch.no_grad():
        hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
        loss.backward()
    assert "second time" not in str(caught.value)


# -- two losses, several uses ----------------------------------------------------------------------


@pytest.mark.parametrize("first", FUSED_OR_NOT)
@pytest.mark.parametrize("second", FUSED_OR_NOT)
def test_two_losses_of_the_same_logits(first, second, backend, logits, target):
    other = torch.tensor([0, 1, 2])

    def total(function, x):
        a = function(x, target, reduction=first).sum()
        b = function(x, other, reduction=second).sum()
        return a + 3 * b + x.square().sum()

    total(sgp.cross_entropy, logits).backward()
    twin = logits.detach().clone().requires_grad_()
    total(F.cross_entropy, twin).backward()
    assert_no_worse(logits.grad, twin.grad, twin.grad)


def test_gradients_accumulate_over_backwards(backend, logits, target):
    for _ in range(3):
        sgp.cross_entropy(logits, target).backward()
    expected = 3 * loss_and_grad(sgp.cross_entropy, logits, target)[1]
    torch.testing.assert_close(logits.grad, expected, rtol=3e-7, atol=0.0)


def test_one_loss_used_twice(backend, logits, target):
    loss = sgp.cross_entropy(logits, target)
    (2 * loss + loss.square()).backward()
    twin = logits.detach().clone().requires_grad_()
    expected = F.cross_entropy(twin, target)
    (2 * expected + expected.square()).backward()
    assert_no_worse(logits.grad, twin.grad, twin.grad)


@pytest.mark.parametrize("reduction", FUSED_OR_NOT)
def test_loss_divided_in_place(reduction, backend, logits, target):
    """`loss /= steps` is how many loops accumulate gradients."""
    whole = loss_and_grad(sgp.cross_entropy, logits, target, reduction=reduction)[1]
    loss = sgp.cross_entropy(logits, target, reduction=reduction)
    loss /= 4
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, whole / 4)


def test_unused_loss_gives_no_gradient(backend, logits, target):
    _, stats = sgp.cross_entropy(logits, target, return_stats=True, return_argmax=True)
    assert not any(value.requires_grad for value in stats)
    (grad,) = torch.autograd.grad(logits.sum(), logits)
    assert torch.equal(grad, torch.ones_like(grad))


@pytest.mark.parametrize("reduction", FUSED_OR_NOT)
@pytest.mark.parametrize("factor", [0.0, 1.0, -2.0, float("inf"), float("nan")])
def test_upstream_factor(factor, reduction, backend, logits, target):
    loss = sgp.cross_entropy(logits, target, reduction=reduction).sum()
    (factor * loss).backward()
    truth = loss_and_grad(F.cross_entropy, logits.double(), target, reduction=reduction)[1]
    assert not logits.grad[1].view(torch.int32).any(), "+0.0 in the context row, bit by bit"
    kept = logits.grad[[0, 2]]
    if factor == float("inf"):
        assert not kept.isfinite().any(), "infinite or NaN: what a loss scaler looks for"
    else:
        assert relative_error(kept, (factor * truth)[[0, 2]]) < 1e-6


# -- second derivatives: never silently zero -------------------------------------------------------


def network(device="cpu"):
    """Parameters and a function of them whose last layer gives the logits."""
    parameters = {
        "body": torch.randn(4, 6, device=device, requires_grad=True),
        "head": torch.randn(V, 6, device=device, requires_grad=True),
    }
    x = torch.randn(N, 4, device=device)
    return parameters, lambda p: (x @ p["body"]).tanh() @ p["head"].t()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("of", ["body", "head"])
def test_hessian_vector_product_raises(of, inplace, reduction, backend, target):
    """The head's gradient depends on the body by two ways; one is closed, so both must be."""
    parameters, model = network()
    loss = sgp.cross_entropy(model(parameters), target, reduction=reduction, inplace=inplace).sum()
    (gradient,) = torch.autograd.grad(loss, parameters["head"], create_graph=True)
    with pytest.raises(RuntimeError, match=SECOND):
        torch.autograd.grad(gradient.square().sum(), parameters[of], allow_unused=True)


@pytest.mark.parametrize("reduction", FUSED_OR_NOT)
def test_gradient_penalty_raises(reduction, backend, logits, target):
    loss = sgp.cross_entropy(logits, target, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match=SECOND):
        gradient.norm().backward()


@pytest.mark.parametrize("reduction", FUSED_OR_NOT)
def test_gradient_with_respect_to_a_loss_weight_is_not_lost(reduction, backend, logits, target):
    """Bilevel optimisation: the gradient is linear in the learned weight of its loss."""
    weight = torch.tensor(2.0, requires_grad=True)
    loss = weight * sgp.cross_entropy(logits, target, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    objective = gradient.square().sum() + weight
    with pytest.raises(RuntimeError, match=SECOND):
        torch.autograd.grad(objective, weight)


def test_create_graph_gives_the_same_gradient(backend, logits, target):
    for reduction in FUSED_OR_NOT:
        plain = loss_and_grad(sgp.cross_entropy, logits, target, reduction=reduction)[1]
        loss = sgp.cross_entropy(logits, target, reduction=reduction).sum()
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        assert torch.equal(gradient.detach(), plain)


# -- torch.func ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
class TestFunctionTransforms:
    """Every transform gives what it gives for `F.cross_entropy`, or raises; never a silent zero."""

    @pytest.fixture
    def point(self, device):
        return torch.randn(N, V, device=device)

    @staticmethod
    def same_or_raises(transform, reduction, *arguments, message="sgp|cross_entropy|Function|vmap"):
        def of(function):
            return transform(lambda x, y: function(x, y, reduction=reduction))(*arguments)

        expected = of(F.cross_entropy)
        try:
            ours = of(sgp.cross_entropy)
        except (RuntimeError, NotImplementedError) as error:
            assert re.search(message, str(error)), f"an unclear error: {error}"  # noqa: PT017
            return "raises"
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
        return "right"

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_grad(self, reduction, backend, point, target):
        assert self.same_or_raises(func.grad, reduction, point, target) == "right"

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_grad_and_value_of_a_model(self, reduction, backend, target):
        parameters, model = network()
        parameters = {name: p.detach() for name, p in parameters.items()}

        def run(function):
            return func.grad_and_value(
                lambda p: function(model(p), target, reduction=reduction, label_smoothing=0.1)
            )(parameters)

        torch.testing.assert_close(run(sgp.cross_entropy), run(F.cross_entropy))

    def test_vjp_of_rows(self, backend, point, target):
        up = torch.tensor([1.0, 7.0, -2.0])
        pulled = []
        for function in (sgp.cross_entropy, F.cross_entropy):
            _, vjp = func.vjp(lambda x, f=function: f(x, target, reduction="none"), point)
            pulled.append(vjp(up)[0])
        torch.testing.assert_close(*pulled)

    @pytest.mark.parametrize("reduction", FUSED_OR_NOT)
    def test_grad_in_place(self, reduction, backend, point, target):
        """On a temporary: right or an error, whatever functorch's wrappers do to `inplace`."""

        def run(function, **options):
            return func.grad(
                lambda x: function(x * 1, target, reduction=reduction, **options).sum()
            )(point)

        expected = run(F.cross_entropy)
        try:
            ours = run(sgp.cross_entropy, inplace=True)
        except RuntimeError as error:
            assert "sgp" in str(error), f"the message is about something else: {error}"  # noqa: PT017
        else:
            torch.testing.assert_close(ours, expected)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("outer", [func.jacrev, func.jacfwd, func.hessian])
    @pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
    def test_jacobians(self, outer, reduction, backend, point, target):
        self.same_or_raises(outer, reduction, point, target)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_forward_mode(self, reduction, backend, point, target):
        def along(f):
            direction = torch.arange(15.0).view(N, V)  # not ones: no loss notices a shift
            return lambda x, y: func.jvp(lambda x: f(x, y), (x,), (direction,))[1]

        self.same_or_raises(along, reduction, point, target)

    @pytest.mark.parametrize("reduction", FUSED_OR_NOT)
    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_dual_numbers(self, requires_grad, reduction, backend, point, target):
        def tangent(function):
            with forward_ad.dual_level():
                x = point.clone().requires_grad_(requires_grad)
                dual = forward_ad.make_dual(x, torch.arange(15.0).view(N, V))
                return forward_ad.unpack_dual(function(dual, target, reduction=reduction)).tangent

        expected = tangent(F.cross_entropy)
        try:
            ours = tangent(sgp.cross_entropy)
        except (RuntimeError, NotImplementedError):
            return
        assert ours is not None, "the tangent was dropped without a word"
        torch.testing.assert_close(ours, expected)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_vmap(self, reduction, backend, target):
        batch = torch.randn(2, N, V)
        targets = torch.stack([target, torch.tensor([0, 1, 2])])
        assert self.same_or_raises(func.vmap, reduction, batch, targets) == "right"

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("in_dims", [(0, 0), (2, None), (None, 0)], ids=str)
    def test_gradients_of_single_examples(self, in_dims, reduction, backend, target):
        batch = torch.randn((2, N, V) if in_dims[0] == 0 else (N, V, 2))
        batch = batch if in_dims[0] is not None else batch[..., 0]
        targets = target if in_dims[1] is None else torch.stack([target, torch.tensor([0, 1, 2])])
        outcome = self.same_or_raises(
            lambda f: func.vmap(func.grad(f), in_dims), reduction, batch, targets
        )
        assert outcome == "right"

    def test_gradients_of_single_examples_with_all_options(self, backend, target):
        """Batched weights and divisors too, statistics, and a reduction with a gradient a row."""
        batch, weight = torch.randn(2, N, V), torch.rand(V)
        targets = torch.stack([target, torch.tensor([0, 1, 2])])
        batched = (batch, targets, torch.rand(2, N), torch.tensor([2.0, 3.0]))

        def gradients(function, example):
            def mean(x, y, token_weight, denominator):
                return function(
                    x, y, weight, label_smoothing=0.1, lse_square_scale=0.1,
                    token_weight=token_weight, denominator=denominator,
                )  # fmt: skip

            def by_sequence(x, y, token_weight, denominator):
                values = function(
                    x.t()[None], y[None], weight, lse_square_scale=0.1, reduction="sequence_mean",
                    token_weight=token_weight[None],
                )  # fmt: skip
                return values[0] / denominator

            return [example(func.grad(f)) for f in (mean, by_sequence)]

        ours = gradients(sgp.cross_entropy, lambda f: func.vmap(f)(*batched))
        one_by_one = gradients(
            sgp.reference.cross_entropy,
            lambda f: torch.stack([f(*example) for example in zip(*batched, strict=True)]),
        )
        for value, expected in zip(ours, one_by_one, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)

    def test_grad_of_grad_raises(self, backend, point, target):
        def penalty(x):
            return func.grad(lambda x: sgp.cross_entropy(x, target))(x).square().sum()

        with pytest.raises(RuntimeError, match=SECOND):
            func.grad(penalty)(point)


# -- operators -------------------------------------------------------------------------------------


def operator_samples():
    """(operator, arguments): each operator with everything on, and with everything off."""
    x = torch.randn(N, V)
    y = torch.tensor([4, IGNORE, 0])
    weight, row_weight, scale = torch.rand(V), torch.rand(N), torch.tensor(0.5)
    off, on = Recipe(IGNORE), Recipe(IGNORE, 0.1, 5.0, 2.0, 0.1, 0.7)
    statistics = Wanted(saved=True, stats=True)
    _, saved, _, entropy, *_ = operators.row_forward(x, y, None, None, None, off, statistics)
    q = torch.randn(N, V).softmax(1).bfloat16()
    sums = torch.rand(N, 4)
    spread, spread_back = probabilities.probability_forward, probabilities.probability_backward
    return {
        "row_forward, plain": (
            operators.row_forward,
            (x, y, None, None, None, off, Wanted(*[True] * 4)),
        ),
        "row_forward, all": (
            operators.row_forward,
            (
                x.view(1, N, V),
                y,
                weight,
                row_weight,
                scale,
                on,
                Wanted(grad=True, saved=True, stats=True),
            ),
        ),
        "row_forward, loss only": (
            operators.row_forward,
            (x, y, weight, None, None, off, Wanted()),
        ),
        "row_forward, strided": (
            operators.row_forward,
            (torch.randn(V, N).t(), y, None, None, None, off, Wanted(grad=True)),
        ),
        "row_forward_": (
            operators.row_forward_,
            (x.clone(), y, weight, row_weight, scale, on, Wanted(stats=True, argmax=True)),
        ),
        "row_backward": (
            operators.row_backward,
            (x, y, saved, weight, row_weight, Upstream(row_weight, row_weight, entropy), on),
        ),
        "row_backward_": (
            operators.row_backward_,
            (x.clone(), y, saved, None, None, Upstream(), off),
        ),
        "multiply_rows_": (operators.multiply_rows_, (x.clone(), y, torch.tensor(3.0), IGNORE)),
        "multiply_rows_, all rows": (
            operators.multiply_rows_,
            (x.clone(), None, torch.tensor(3.0), IGNORE),
        ),
        "row_forward, bf16": (
            operators.row_forward,
            (x.bfloat16(), y, weight, row_weight, scale, on, Wanted(*[True] * 4)),
        ),
        "mean_scale, bf16": (
            operators.mean_scale,
            (y, weight.bfloat16(), None, IGNORE, torch.float32, "sgp"),
        ),
        "mean_scale": (
            operators.mean_scale,
            (y, weight, row_weight, IGNORE, torch.float32, "sgp"),
        ),
        "probability_forward": (spread, (x, q, weight, row_weight, scale, on, True, True)),
        "probability_forward, loss only": (spread, (x, q, None, None, None, off, False, False)),
        "probability_backward": (spread_back, (x, q, sums, weight, row_weight, on, True, True)),
        "probability_backward, of one": (spread_back, (x, q, sums, None, None, off, False, True)),
    }


@pytest.mark.core
@pytest.mark.parametrize("sample", list(operator_samples()))
def test_opcheck(sample, backend):
    """Schema (what is mutated, what is aliased), fake tensors, and tracing by AOTAutograd."""
    operator, arguments = operator_samples()[sample]
    if backend == "torch" and "probability" in sample:
        return  # PyTorch's operators are no operator of ours
    torch.library.opcheck(operator.op, tuple(flat(arguments)))


def test_every_operator_is_checked():
    found = {**vars(operators), **vars(probabilities)}
    library = {name for name, value in found.items() if isinstance(value, Operator)}
    checked = {operator.op._opname for operator, _ in operator_samples().values()}
    assert checked == library, "an operator without opcheck"


# -- torch.compile ---------------------------------------------------------------------------------

COMPILERS = ["aot_eager"]
if shutil.which("g++") or shutil.which("clang++"):
    COMPILERS.append("inductor")  # compiles C++ for a CPU


def test_inductor_is_among_the_compilers():
    assert "inductor" in COMPILERS, "no C++ compiler here: inductor is not tested on this machine"


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


# Dynamo and inductor use what PyTorch itself has deprecated.
TRACING = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.core
@TRACING
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize(
    ("reduction", "inplace", "factor"),
    [("mean", False, 1.0), ("mean", True, 3.0), ("none", False, 3.0)],
    ids=["with the loss", "in place", "in backward"],
)
def test_compiled_is_eager(reduction, inplace, factor, compiler, fresh_compiler, backend, target):
    """One graph, forward and backward, for masks with 2, 1, 3 and 0 kept tokens."""
    if backend == "triton" and compiler == "inductor":
        return  # the kernels are opaque to the compiler: aot_eager has shown them already
    head = torch.randn(V, 4, requires_grad=True)
    hidden = torch.randn(N, 4)

    def loss_of(hidden, head, target):
        return sgp.cross_entropy(
            hidden @ head.t(), target, reduction=reduction, inplace=inplace, label_smoothing=0.1
        ).sum()

    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(compiler)(graph, inputs)

    compiled = torch.compile(loss_of, backend=counting, fullgraph=True, dynamic=False)
    masks = [target, target.clone(), torch.tensor([4, 1, 0]), torch.full((N,), IGNORE)]
    masks[1][0] = IGNORE
    for mask in masks:
        results = []
        for function in (loss_of, compiled):
            loss = function(hidden, head, mask)
            (gradient,) = torch.autograd.grad(factor * loss, head)
            results.append((loss.detach(), gradient))
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
    assert len(graphs) == 1, f"{len(graphs)} graphs for {len(masks)} masks of one shape"


@TRACING
@pytest.mark.parametrize("reduction", ["mean", "sequence_mean"])
def test_compiled_selection_is_one_graph_for_every_count(reduction, fresh_compiler, backend):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    def loss_of(x, selection):
        return sgp.cross_entropy(x, selection, reduction=reduction).sum()

    compiled = torch.compile(loss_of, backend=counting, fullgraph=True, dynamic=False)
    logits = torch.randn(4, V, requires_grad=True)
    for kept in (2, 3, 1, 0, 4):
        labels = torch.full((4,), IGNORE)
        labels[:kept] = 1
        selection = sgp.Selection.from_labels(labels, cu_seqlens=torch.tensor([0, 1, 4]))
        (ours,) = torch.autograd.grad(compiled(logits, selection), logits)
        (eager,) = torch.autograd.grad(loss_of(logits, selection), logits)
        torch.testing.assert_close(ours, eager)
    assert len(graphs) == 1, f"{len(graphs)} graphs for five counts"


@TRACING
def test_compiled_denominator_tensor_is_one_graph(fresh_compiler, backend, logits, target):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda x, n: sgp.cross_entropy(x, target, denominator=n), backend=counting, fullgraph=True
    )
    total = sgp.cross_entropy(logits, target, reduction="sum").detach()
    for count in (1.0, 2.0, 7.0):
        torch.testing.assert_close(compiled(logits, torch.tensor(count)).detach(), total / count)
    assert len(graphs) == 1, f"{len(graphs)} graphs for three denominators"


@TRACING
@pytest.mark.parametrize("reduction", FUSED_OR_NOT)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_second_backward_is_right_or_raises(
    compiler, reduction, fresh_compiler, logits, target
):
    """The compiled backward must not multiply the saved gradient where it lies."""
    compiled = torch.compile(
        lambda x: sgp.cross_entropy(x, target, reduction=reduction).sum(), backend=compiler
    )
    loss = 3 * compiled(logits)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    first = first.clone()
    try:
        (second,) = torch.autograd.grad(loss, logits)
    except RuntimeError:
        return
    torch.testing.assert_close(second, first)


# -- in place --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", [*FUSED_OR_NOT, "sequence_mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every other row", "three levels"])
def test_in_place_gives_the_same_gradient(layout, dtype, reduction, backend, device):
    base_shape = {
        "contiguous": (4, V),
        "transposed": (V, 4),
        "every other row": (8, V),
        "three levels": (2, 3, 2, V),
    }[layout]
    view = {
        "contiguous": lambda x: x,
        "transposed": lambda x: x.t(),
        "every other row": lambda x: x[::2],
        "three levels": lambda x: x[:, :2].transpose(0, 2).transpose(1, 2),  # copied, copied back
    }[layout]
    base = torch.randn(base_shape, device=device).to(dtype)
    rows = view(base).shape[:-1]
    labels = torch.arange(rows.numel(), device=device).remainder(V).view(rows)
    labels.view(-1)[1] = IGNORE
    selection = sgp.Selection.from_labels(labels)

    def run(inplace):
        leaf = base.clone().requires_grad_()
        logits = view(leaf * 1)
        version, storage, passed = logits._version, logits.data_ptr(), []
        logits.register_hook(lambda grad: passed.append(grad.data_ptr()))
        loss = sgp.cross_entropy(logits, selection, reduction=reduction, inplace=inplace)
        if reduction == "mean" and dtype != torch.float16:
            noticed = logits._version > version
            assert noticed == inplace, "the gradient came with the loss: autograd must know now"
        loss.backward(torch.linspace(1, 2, loss.numel()).view(loss.shape))
        assert (passed == [storage]) == inplace, "where the gradient lies"
        assert (logits._version > version) == inplace, "whether autograd can notice"
        return loss.detach(), leaf.grad

    for ours, expected in zip(run(inplace=True), run(inplace=False), strict=True):
        assert torch.equal(ours, expected)


def test_in_place_refusals_say_why(logits, target):
    with pytest.raises(ValueError, match=r"inplace=True would overwrite input \(3, 5\), a leaf"):
        sgp.cross_entropy(logits, target, inplace=True)
    row = logits[:1] * 1
    with pytest.raises(ValueError, match=r"\(3, 5\) with strides \(0, 1\) overlaps itself"):
        sgp.cross_entropy(row.expand(3, 5), target, inplace=True)
    windows = (logits * 1).as_strided((3, 5), (2, 1))
    with pytest.raises(ValueError, match=r"with strides \(2, 1\) overlaps itself"):
        sgp.cross_entropy(windows, target, inplace=True)
    with pytest.raises(ValueError, match="overwrite input"):
        sgp.cross_entropy(logits.t().t(), target, inplace=True)  # a view of a leaf is its memory


def test_in_place_of_no_rows_overlaps_nothing(backend):
    """PyTorch gives the result of an operation on nothing strides of 0."""
    leaf = torch.randn(2, 0, 1, requires_grad=True)
    logits = (leaf * 1).movedim(-1, 1)
    assert 0 in logits.stride(), "the strides that this test is about"
    sgp.cross_entropy(logits, torch.zeros(2, 0, dtype=torch.int64), inplace=True).backward()
    assert leaf.grad.shape == leaf.shape


def test_in_place_two_losses_of_the_same_logits_are_noticed(backend, logits, target):
    """The second loss reads the gradient of the first: wrong, and autograd says so."""
    hidden = logits * 1
    a = sgp.cross_entropy(hidden, target, inplace=True)
    b = sgp.cross_entropy(hidden, target, inplace=True)
    with pytest.raises(RuntimeError):
        (a + b).backward()


def test_in_place_frozen_logits_are_left_alone(backend, target):
    frozen = torch.randn(N, V)
    before = frozen.clone()
    sgp.cross_entropy(frozen, target, inplace=True)
    assert torch.equal(frozen, before), "no gradient is wanted, so nothing is written"


# -- memory and modes ------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", FUSED_OR_NOT)
def test_saved_tensors_moved_to_the_cpu_and_back(reduction, backend, logits, target):
    expected = loss_and_grad(sgp.cross_entropy, logits, target, reduction=reduction)[1]
    with torch.autograd.graph.save_on_cpu():
        loss = sgp.cross_entropy(logits, target, reduction=reduction).sum()
    loss.backward()
    assert torch.equal(logits.grad, expected)


@pytest.mark.parametrize("reduction", FUSED_OR_NOT)
def test_checkpointed(reduction, backend, logits, target):
    def loss_of(x):
        return sgp.cross_entropy(x * 1, target, reduction=reduction).sum()

    checkpoint(loss_of, logits, use_reentrant=False).backward()
    expected = logits.detach().clone().requires_grad_()
    loss_of(expected).backward()
    assert torch.equal(logits.grad, expected.grad)


@pytest.mark.parametrize("reduction", FUSED_OR_NOT)
def test_gradient_belongs_to_the_caller(reduction, backend, logits, target):
    """Optimisers change `.grad` in place; a hook may scale it: nothing else must notice."""
    loss = sgp.cross_entropy(logits, target, reduction=reduction).sum()
    loss.backward(retain_graph=True)
    assert logits.grad.is_contiguous()
    first = logits.grad.clone()
    logits.grad.zero_()
    if reduction == "none":
        loss.backward()
        assert torch.equal(logits.grad, first)


def test_autocast_keeps_the_loss_in_float32(backend, target):
    head = torch.randn(V, 4, requires_grad=True)
    hidden = torch.randn(N, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = F.linear(hidden, head)
        loss = sgp.cross_entropy(logits, target)
        rows = sgp.cross_entropy(logits, target, reduction="none")
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == rows.dtype == torch.float32
    (loss + rows.sum()).backward()
    assert head.grad.dtype == torch.float32
    truth = F.cross_entropy(logits.double(), target)
    assert relative_error(loss, truth) < 1e-6


def test_anomaly_mode(backend, logits, target):
    with (
        pytest.warns(UserWarning, match="Anomaly Detection"),
        torch.autograd.detect_anomaly(check_nan=True),
    ):
        sgp.cross_entropy(logits, target).backward()
    assert logits.grad.isfinite().all()

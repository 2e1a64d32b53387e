"""Operators where somebody watches, their plain bodies where nobody does: the same either way."""

# ruff: noqa: ARG001  (fixtures are asked for by name, for what they do)

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import func
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import sgp
from sgp.head import operators as head_operators
from sgp.rows import operators
from sgp.rows.by_torch import Upstream, Wanted
from sgp.rows.recipe import Recipe
from sgp.rows.watched import Operator, is_watched

IGNORE = -100
N, V, D = 4, 7, 3
ALL = {
    name: value
    for module in (operators, head_operators)
    for name, value in vars(module).items()
    if isinstance(value, Operator)
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(16)


@pytest.fixture
def target():
    return torch.tensor([6, IGNORE, 0, 2])


class Seen(TorchDispatchMode):
    """The names of the package's operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "sgp":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


# -- who is watching -------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    """A tensor that is more than one."""


class Functions(TorchFunctionMode):
    """Hears of every function of PyTorch's."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def under(mode):
    def ask(x):
        with mode():
            return is_watched(x)

    return ask


def traced(x):
    answers = []
    torch.jit.trace(lambda x: answers.append(is_watched(x)) or x + 1, x, check_trace=False)
    return answers[0]


def transformed(transform):
    def ask(x):
        answers = []
        transform(lambda x: answers.append(is_watched(x)) or x.sum())(x)
        return answers[0]

    return ask


def left_behind(x):
    """What a transform had in its hands when it ended."""
    kept = []
    func.grad(lambda x: kept.append(x) or x.sum())(x)
    return is_watched(kept[0])


WATCHERS = {
    "profiler": under(torch.profiler.profile),
    "autograd's profiler": under(torch.autograd.profiler.profile),
    "dispatch mode": under(Seen),
    "fake tensors": under(FakeTensorMode),
    "function mode": under(Functions),
    "grad": transformed(func.grad),
    "vmap": transformed(func.vmap),
    "functionalize": transformed(func.functionalize),
    "make_fx": transformed(make_fx),
    "jit.trace": traced,
    "a tensor of a transform that has ended": left_behind,
    "subclass": lambda x: is_watched(x.as_subclass(Subclass)),
    "meta": lambda x: is_watched(x.to("meta")),
    "the second tensor": lambda x: is_watched(x, x.as_subclass(Subclass)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("watcher", WATCHERS)
def test_is_watched(watcher):
    x = torch.randn(N, V)
    assert WATCHERS[watcher](x)
    assert not is_watched(x), "afterwards nobody is there"


@pytest.mark.parametrize(
    "make",
    [torch.Tensor.clone, torch.nn.Parameter, torch.Tensor.requires_grad_, torch.Tensor.t],
    ids=["tensor", "parameter", "requires grad", "view"],
)
def test_nobody_is_watching(make):
    x = make(torch.randn(N, V))
    assert not is_watched(x)
    with torch.no_grad(), torch.autocast("cpu"):
        assert not is_watched(x)


# -- the same either way ---------------------------------------------------------------------------


def results(inplace=False, **options):
    """Losses, statistics and gradients of every form, from the same numbers."""
    generator = torch.Generator().manual_seed(3)
    target = torch.tensor([6, IGNORE, 0, 2])
    found = []
    for reduction in ("mean", "sum", "none", "sequence_mean"):
        logits = torch.randn(N, V, generator=generator).requires_grad_()
        loss, stats = sgp.cross_entropy(
            logits * 1, target, reduction=reduction, inplace=inplace, return_stats=True,
            return_argmax=True, **options,
        )  # fmt: skip
        loss.sum().backward()
        found += [loss, *stats, logits.grad]
        hidden = torch.randn(N, D, generator=generator).requires_grad_()
        weight = torch.randn(V, D, generator=generator).requires_grad_()
        loss = sgp.linear_cross_entropy(hidden, weight, target, reduction=reduction, **options)
        loss.sum().backward()
        found += [loss, hidden.grad, weight.grad]
    logits = torch.randn(N, V, generator=generator).requires_grad_()
    stats = sgp.token_log_probs(logits, target, return_argmax=True)
    (stats.log_prob.sum() + stats.entropy.sum() + stats.lse.sum()).backward()
    found += [*stats, logits.grad]
    hidden = torch.randn(N, D, generator=generator).requires_grad_()
    weight = torch.randn(V, D, generator=generator).requires_grad_()
    stats = sgp.linear_token_log_probs(hidden, weight, target, return_argmax=True)
    stats.log_prob.sum().backward()
    return [*found, *stats, hidden.grad, weight.grad]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1, "softcap": 30, "token_weight": torch.rand(N)}],
    ids=["plain", "options"],
)
def test_watched_and_unwatched_are_the_same(options, inplace, backend):
    plain = results(inplace, **options)
    with Seen() as seen:
        watched = results(inplace, **options)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    forward = {"row_forward_"} if inplace else set()
    expected = {"mean_scale", "row_forward", "row_backward", "multiply_rows_", *forward}
    assert expected <= set(seen.names)
    assert {"head_forward", "head_backward", "kept_rows"} <= set(seen.names)


def test_no_operator_is_called_where_nobody_watches(backend, monkeypatch):
    def refused(*_):
        raise AssertionError("an operator was called")

    for one in ALL.values():
        monkeypatch.setattr(one, "op", refused)
    results()
    results(inplace=True)


def twice(loss):
    loss.backward(retain_graph=True)
    loss.backward()


WRONG = {
    "target outside": lambda x, y: sgp.cross_entropy(x, y + 100),
    "negative weights": lambda x, y: sgp.cross_entropy(x, y, token_weight=-torch.ones(N)),
    "a second backward": lambda x, y: twice(sgp.cross_entropy(x, y)),
    "a second backward in place": lambda x, y: twice(
        sgp.cross_entropy(x * 1, y, reduction="none", inplace=True).sum()
    ),
    "a second backward of a head": lambda x, y: twice(
        sgp.linear_cross_entropy(x, torch.ones(V, V), y)
    ),
    "a second derivative": lambda x, y: torch.autograd.grad(
        torch.autograd.grad(sgp.cross_entropy(x, y), x, create_graph=True)[0].sum(), x
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_watched_and_unwatched_raise_the_same(wrong, target):
    def message():
        with pytest.raises((ValueError, IndexError, RuntimeError), match="sgp") as error:
            WRONG[wrong](torch.randn(N, V, requires_grad=True), target)
        return str(error.value)

    plain = message()
    with Seen():
        watched = message()
    assert plain == watched


@pytest.mark.parametrize("mode", [None, Seen], ids=["unwatched", "watched"])
def test_what_an_operator_writes_to_is_counted(mode, target):
    x, recipe = torch.randn(N, V), Recipe(IGNORE)
    saved = torch.ones(N, 3)
    for call in (
        lambda: operators.multiply_rows_(x, target, torch.tensor(2.0), IGNORE),
        lambda: operators.row_forward_(x, target, None, None, None, recipe, Wanted()),
        lambda: operators.row_backward_(x, target, saved, None, None, Upstream(), recipe),
    ):
        before = x._version
        if mode is None:
            call()
        else:
            with mode():
                call()
        assert x._version > before


# -- who sees which operators ----------------------------------------------------------------------


def test_make_fx_traces_operators(target):
    graph = make_fx(lambda x: sgp.cross_entropy(x, target))(torch.randn(N, V))
    names = [node.target._opname for node in graph.graph.nodes if "sgp" in str(node.target)]
    assert names == ["mean_scale", "row_forward"]


def test_export_traces_operators(target):
    class Loss(torch.nn.Module):
        def forward(self, x, y):
            return sgp.cross_entropy(x, y)

    graph = torch.export.export(Loss(), (torch.randn(N, V), target)).graph
    names = [node.target._opname for node in graph.nodes if "sgp" in str(node.target)]
    assert names == ["mean_scale", "row_forward"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_traces_operators(target):
    traced = torch.jit.trace(lambda x: sgp.cross_entropy(x, target), torch.randn(N, V))
    assert "sgp::row_forward" in str(traced.graph)
    logits = torch.randn(N, V)
    assert torch.equal(traced(logits), sgp.cross_entropy(logits, target))


def test_a_profiler_sees_operators(target):
    with torch.profiler.profile() as profile:
        sgp.cross_entropy(torch.randn(N, V, requires_grad=True), target).backward()
    names = {event.name for event in profile.events()}
    assert {"sgp::mean_scale", "sgp::row_forward", "sgp::multiply_rows_"} <= names


def test_fake_tensors_go_through(target):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        logits = mode.from_tensor(torch.randn(N, V)).requires_grad_()
        loss = sgp.cross_entropy(logits, mode.from_tensor(target))
        loss.backward()
    assert (loss.shape, logits.grad.shape) == ((), (N, V))


def test_selective_checkpointing_keeps_an_operators_results(target):
    """What its policy says of an operator is asked for, and obeyed."""
    asked = []

    def policy(context, op, *_, **__):
        if "sgp" in str(op):
            asked.append((op._opname, context.is_recompute))
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    logits = torch.randn(N, V, requires_grad=True)
    loss = checkpoint(
        lambda x: sgp.token_log_probs(x * 2, target).log_prob.sum(),
        logits,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
    loss.backward()
    assert ("row_forward", False) in asked
    plain = logits.detach().clone().requires_grad_()
    sgp.token_log_probs(plain * 2, target).log_prob.sum().backward()
    assert torch.equal(logits.grad, plain.grad)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vjp_after_its_transform_has_ended(reduction, target, backend):
    logits = torch.randn(N, V)
    loss, vjp = func.vjp(lambda x: sgp.cross_entropy(x, target, reduction=reduction), logits)
    (gradient,) = vjp(torch.ones_like(loss))
    leaf = logits.clone().requires_grad_()
    sgp.cross_entropy(leaf, target, reduction=reduction).sum().backward()
    torch.testing.assert_close(gradient, leaf.grad)


@pytest.mark.parametrize("loss", ["none", "log-probs", "head"])
def test_batches_of_upstream_gradients(loss, backend):
    """`is_grads_batched`, and so `jacobian(vectorize=True)`: autograd batches these alone."""
    torch.manual_seed(4)
    logits = torch.randn(4, 7, requires_grad=True)
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(7, 3)
    target = torch.tensor([1, 0, -100, 6])

    def rows(x):
        if loss == "none":
            return sgp.cross_entropy(x, target, reduction="none")
        if loss == "log-probs":
            return sgp.token_log_probs(x, target).log_prob
        return sgp.linear_cross_entropy(x, weight, target, reduction="none")

    x = hidden if loss == "head" else logits
    found = torch.autograd.grad(rows(x), x, torch.eye(4), is_grads_batched=True)[0]
    one_by_one = [torch.autograd.grad(rows(x), x, upstream)[0] for upstream in torch.eye(4)]
    torch.testing.assert_close(found, torch.stack(one_by_one), rtol=1e-6, atol=1e-7)


class Wrapped(torch.Tensor):
    """A tensor without memory of its own, as collectives return it until they have ended."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, strides=inner.stride()
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        def plain(x):
            return x.inner if isinstance(x, cls) else x

        return function(*tree_map(plain, arguments), **tree_map(plain, keywords or {}))


def test_any_tensor_may_be_a_subclass(backend):
    """Labels, weights and upstream gradients beside plain logits."""
    torch.manual_seed(5)
    logits = torch.randn(6, 11, requires_grad=True)
    target = torch.tensor([1, -100, 10, 0, -100, 4])
    weight, upstream = torch.rand(11), torch.tensor(2.0)
    expected = sgp.cross_entropy(logits, target, weight)
    for found in (
        sgp.cross_entropy(logits, Wrapped(target), weight),
        sgp.cross_entropy(logits, target, Wrapped(weight)),
    ):
        assert torch.equal(found, expected)
    (gradient,) = torch.autograd.grad(expected, logits, Wrapped(upstream))
    again = sgp.cross_entropy(logits, target, weight)
    assert torch.equal(gradient, torch.autograd.grad(again, logits, upstream)[0])
    hidden, head = torch.randn(6, 8), torch.randn(11, 8)
    expected = sgp.linear_cross_entropy(hidden, head, target)
    assert torch.equal(sgp.linear_cross_entropy(hidden, head, Wrapped(target)), expected)


@pytest.mark.parametrize("make", [np.float32, Fraction], ids=["NumPy", "fraction"])
def test_any_real_number_is_a_constant(make, backend):
    logits, target = torch.randn(3, 8), torch.tensor([1, 2, -100])
    options = {"softcap": 30, "logit_scale": 0.5, "label_smoothing": 0.25}
    expected = sgp.cross_entropy(logits, target, **options)
    found = sgp.cross_entropy(logits, target, **{k: make(v) for k, v in options.items()})
    assert torch.equal(found, expected)
    found = sgp.token_log_probs(logits, target, temperature=make(2))
    assert torch.equal(found.lse, sgp.token_log_probs(logits, target, temperature=2).lse)

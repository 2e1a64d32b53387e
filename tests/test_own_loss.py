"""`linear_loss`: a caller's own lines between the statistics and the gradient of each chunk.

The truth is `sgp.reference.linear_loss`, which calls them once, on whole logits, in float64.
"""

# ruff: noqa: ARG001  (fixtures are asked for by name, for what they do)

import functools
import warnings
import weakref
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sgp
from sgp.head import algorithm, chunks, loss_function
from sgp.head.chunks import Plan
from sgp.rows import by_torch
from sgp.tolerance import bound, relative_error
from sgp.train.memory import cpu_peak
from tests.oracle import assert_no_worse
from tests.test_linear import flops

B, T, D, V = 5, 8, 12, 37
IGNORE = -100
GROUPS = torch.tensor([0, 0, 3, 3, 4])
OPTIONS = {
    "plain": {},
    "all": {"temperature": 0.7, "softcap": 5.0, "logit_scale": -1.3, "shift": True},
}
CHUNKS = (None, 1, 3, 7, 100)


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    torch.manual_seed(41)
    monkeypatch.setattr(loss_function, "_seen", loss_function.WeakKeyDictionary())
    monkeypatch.setattr(algorithm, "_said", {"sgp.linear_loss"})  # but in the test of it


def make(dtype=torch.float32, *, bias=True):
    """([hidden states, head, bias], labels (B, T)); sequence 2 carries no loss."""
    tensors = [torch.randn(B, T, D), torch.randn(V, D), torch.randn(V) if bias else None]
    labels = torch.randint(V, (B, T))
    labels[torch.rand(B, T) < 0.4] = IGNORE
    labels[2] = IGNORE
    return [None if x is None else x.to(dtype) for x in tensors], labels


class Losses:
    """One loss for each `by`, from old log-probabilities and advantages that the lines close over.

    With `short`, sequences and groups give one number for each that has rows in the call.
    """

    def __init__(self, dtype, *, short=False):
        random = torch.Generator().manual_seed(5)
        self.old = -3 + torch.randn(B * T, generator=random).to(dtype)
        self.advantage = torch.randn(B, generator=random).to(dtype) / 8
        self.short = short

    def row(self, tokens, rows):
        ratio = (tokens.log_prob - self.old[rows]).exp()
        gain = self.advantage[rows // T]
        surrogate = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.3) * gain)
        numbers = (-surrogate - 0.1 * tokens.entropy + 0.01 * tokens.lse**2) / 7
        return numbers, {"ratio": ratio, "top": tokens.is_top1}

    def sequence(self, tokens, rows):
        of = rows // T
        count = self._sums(B, of, torch.ones_like(tokens.log_prob)).clamp(min=1)
        mean = self._sums(B, of, tokens.log_prob - self.old[rows]) / count
        numbers = -mean.exp() * self.advantage
        return self._given(of, numbers, {"mean": mean})

    def group(self, tokens, rows):
        of = torch.tensor([0, 0, 1, 1, 2])[rows // T]
        margin = self._sums(3, of, tokens.log_prob * self.advantage[rows // T])
        return self._given(of, -F.logsigmoid(margin), {"margin": margin})

    def _sums(self, size, of, values):
        return values.new_zeros(size).index_add(0, of, values)

    def _given(self, of, numbers, metrics):
        if not self.short:
            return numbers, metrics
        here = of.unique()
        return numbers[here], {key: x[here] for key, x in metrics.items()}


def run(function, tensors, target, loss_fn, *, by="row", more=(), upstream=3.0, **options):
    """(everything returned but the loss, [loss, the gradients of what requires grad])."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    if by == "group":
        options["groups"] = GROUPS
    out = function(*leaves[:2], target, loss_fn, by=by, linear_bias=leaves[2], **options)
    loss, *rest = out if isinstance(out, tuple) else (out,)
    wanted = [x for x in leaves if x is not None] + list(more)
    return rest, [loss.detach(), *torch.autograd.grad(loss * upstream, wanted)]


def check(tensors, target, by, *, short=False, interpreted=False, **options):
    """Ours against the reference, in float64 and in the tensors' own dtype."""
    dtype = tensors[0].dtype
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    numbers = {k: v for k, v in options.items() if k not in ("chunk_rows", "memory_budget")}
    double = [None if x is None else x.double() for x in tensors]
    of = {kind: getattr(Losses(kind, short=short), by) for kind in (torch.float64, exact)}
    more, truth = run(
        sgp.reference.linear_loss, double, target, of[torch.float64], by=by, **numbers
    )
    _, plain = run(sgp.reference.linear_loss, tensors, target, of[exact], by=by, **numbers)
    rest, found = run(sgp.linear_loss, tensors, target, of[exact], by=by, **options)
    for value, own, true in zip(found, plain, truth, strict=True):
        if dtype in (torch.float64, torch.float32):
            limit = 1e-10 if dtype == torch.float64 else 1e-5
            assert relative_error(value, true) <= limit
        limit = bound(relative_error(own, true), value.dtype, interpreted=interpreted, roundings=2)
        assert relative_error(value, true) <= limit
    return rest, more, found


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("by", ["row", "sequence", "group"])
def test_it_is_the_reference_in_float64(by, name):
    tensors, target = make(torch.float64)
    for chunk_rows in CHUNKS:
        check(tensors, target, by, chunk_rows=chunk_rows, **OPTIONS[name])


@pytest.mark.core
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("by", ["row", "sequence", "group"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_the_reference(dtype, by, name, backend):
    tensors, target = make(dtype)
    for chunk_rows in CHUNKS if backend == "torch" else (None, 7):
        check(
            tensors, target, by, chunk_rows=chunk_rows, interpreted=backend == "triton",
            **OPTIONS[name],
        )  # fmt: skip


@pytest.mark.parametrize("chunk_rows", CHUNKS)
@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("by", ["row", "sequence", "group"])
def test_statistics_and_metrics(by, short, chunk_rows):
    tensors, target = make(torch.float64)
    rest, more, _ = check(
        tensors, target, by, short=short, chunk_rows=chunk_rows, return_stats=True
    )
    for value, true in zip(rest[0], more[0], strict=True):
        assert (value is None) == (true is None)
        if value is not None:
            assert value.shape == target.shape
            assert not value.requires_grad
            torch.testing.assert_close(value, true)
    assert rest[1].keys() == more[1].keys()
    for key, true in more[1].items():
        value = rest[1][key]
        assert value.shape == {"row": (B, T), "sequence": (B,), "group": (3,)}[by]
        assert value.dtype == true.dtype
        assert not value.requires_grad
        torch.testing.assert_close(value, true)


def test_what_is_returned():
    (hidden, head, _), target = make()

    def plain(tokens, rows):
        return -tokens.log_prob

    def with_metrics(tokens, rows):
        return -tokens.log_prob, {"lse": tokens.lse}

    loss = sgp.linear_loss(hidden, head, target, plain)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    two = sgp.linear_loss(hidden, head, target, plain, return_stats=True)
    assert isinstance(two[1], sgp.TokenLogProbs)
    _, metrics = sgp.linear_loss(hidden, head, target, with_metrics)
    torch.testing.assert_close(metrics["lse"], two[1].lse)
    assert len(sgp.linear_loss(hidden, head, target, with_metrics, return_stats=True)) == 3
    torch.testing.assert_close(loss, -two[1].log_prob.sum())


WAYS = {
    "gradient kept": Plan("rows", 4, 64, 0, 64),
    "groups of chunks": Plan("rows", 4, 9, 0, 64),
    "chunks": Plan("rows", 8, 8, 0, 64),
    "slices": Plan("slices", 4, 4, 8, 64),
    "again": Plan("rows", 1, 1, 0, 64),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("by", ["row", "sequence", "group"])
@pytest.mark.parametrize("name", WAYS)
def test_every_way(name, by, dtype, backend, monkeypatch):
    """What the planner may choose, for rows and where units do not fit the chunks."""
    plan = WAYS[name]
    if dtype == torch.float16:  # its factors are known chunk by chunk
        if plan.way == "slices":
            return
        plan = plan._replace(group=plan.rows)
    monkeypatch.setattr(chunks, "plan", lambda *_, **__: plan)
    tensors, target = make(dtype)
    check(tensors, target, by, interpreted=backend == "triton", **OPTIONS["all"])


@pytest.mark.parametrize("by", ["row", "sequence"])
def test_bits_repeat(by, backend):
    tensors, target = make(torch.bfloat16)
    lines = getattr(Losses(torch.float32), by)
    first, again = (
        run(sgp.linear_loss, tensors, target, lines, by=by, chunk_rows=7)[1] for _ in range(2)
    )
    for value, other in zip(first, again, strict=True):
        assert torch.equal(value, other)


def test_rows_of_very_different_factors_in_float16():
    """Each chunk has its own scale: what is ten million times smaller keeps its digits."""
    tensors, target = make(torch.float16)
    factor = torch.logspace(-8, 2, B * T)[torch.randperm(B * T)]

    def lines(tokens, rows):
        return -tokens.log_prob * factor[rows].to(tokens.log_prob.dtype)

    double = [x.double() for x in tensors]
    _, truth = run(sgp.reference.linear_loss, double, target, lines)
    _, plain = run(sgp.reference.linear_loss, tensors, target, lines)
    for chunk_rows in (1, 4, 100):
        _, found = run(sgp.linear_loss, tensors, target, lines, chunk_rows=chunk_rows)
        # A gradient beyond float16's range is rounded to it in both.
        for value, own, true in zip(found, plain, truth, strict=True):
            assert_no_worse(value, own, true)


# -- what is differentiated ------------------------------------------------------------------------


@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("by", ["row", "sequence"])
def test_frozen_sides(by, needs):
    tensors, target = make(torch.float64)
    lines = getattr(Losses(torch.float64), by)
    _, truth = run(sgp.reference.linear_loss, tensors, target, lines, by=by)
    leaves = [x.clone().requires_grad_(bool(n)) for x, n in zip(tensors, needs, strict=True)]
    loss, _ = sgp.linear_loss(*leaves[:2], target, lines, by=by, linear_bias=leaves[2])
    torch.testing.assert_close(loss.detach(), truth[0])
    assert loss.requires_grad == any(needs)
    if any(needs):
        (3 * loss).backward()
    for leaf, needed, true in zip(leaves, needs, truth[1:], strict=True):
        assert (leaf.grad is not None) == bool(needed)
        if needed:
            torch.testing.assert_close(leaf.grad, true)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("by", ["row", "sequence"])
@pytest.mark.parametrize("chunk_rows", [None, 2, 7])
def test_gradients_of_what_the_lines_close_over(chunk_rows, by, frozen):
    """A parameter, an outcome of the model, and one that nothing else uses."""
    (hidden, head, _), target = make(torch.float64, bias=False)
    value_head = nn.Linear(D, 1, dtype=torch.float64)
    temperature = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    found = []
    for function in (sgp.reference.linear_loss, sgp.linear_loss):
        x = hidden.clone().requires_grad_(not frozen)
        w = head.clone().requires_grad_(not frozen)
        values = value_head(x.tanh()).flatten()  # with a graph behind it

        def lines(tokens, rows, values=values):
            numbers = -tokens.log_prob * values[rows] + temperature * tokens.entropy
            if by == "row":
                return numbers
            return numbers.new_zeros(B).index_add(0, rows // T, numbers).tanh()

        options = {} if function is sgp.reference.linear_loss else {"chunk_rows": chunk_rows}
        loss = function(x, w, target, lines, by=by, **options)
        leaves = [temperature, *value_head.parameters(), *(() if frozen else (x, w))]
        found.append((loss.detach(), *torch.autograd.grad(2.5 * loss, leaves)))
    for value, true in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(value, true)


@pytest.mark.parametrize("closes", [False, True])
def test_the_graph_of_the_lines_waits_where_something_needs_it(closes):
    (hidden, head, _), target = make(bias=False)
    factor = torch.tensor(2.0, requires_grad=closes)
    inside = []

    def lines(tokens, _):
        ratio = tokens.log_prob.exp()  # saved for its own backward, so that it may hold itself
        inside.append(weakref.ref(ratio))
        return ratio * factor

    loss = sgp.linear_loss(hidden.requires_grad_(), head, target, lines, chunk_rows=4)
    nodes = [type(node).__name__ for node, _ in loss.grad_fn.next_functions if node is not None]
    assert ("SumBackward0" in nodes) == closes
    assert all(x() is None for x in inside)


def test_the_graph_of_what_is_closed_over_is_walked_once(monkeypatch):
    """The model behind a value is differentiated by one backward, not by one a chunk."""
    (hidden, head, _), target = make(bias=False)
    calls = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(_, x):
            return x * 2

        @staticmethod
        def backward(_, gradient):
            calls.append(1)
            return gradient * 2

    source = torch.randn(B * T, requires_grad=True)
    values = Counted.apply(source)
    loss = sgp.linear_loss(
        hidden.requires_grad_(), head, target, lambda t, rows: t.log_prob * values[rows],
        chunk_rows=2,
    )  # fmt: skip
    loss.backward()
    assert len(calls) == 1
    assert source.grad.abs().sum() > 0


def test_a_second_backward_and_a_second_derivative_are_refused():
    (hidden, head, _), target = make()
    hidden.requires_grad_()
    loss = sgp.linear_loss(hidden, head, target, lambda t, _: -t.log_prob)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_loss: backward a second time"):
        loss.backward()
    loss = sgp.linear_loss(hidden, head, target, lambda t, _: -t.log_prob)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_loss has no second derivative"):
        gradient.sum().backward()


def test_no_grad():
    tensors, target = make(torch.float64)
    lines = Losses(torch.float64).row
    leaves = [x.requires_grad_() for x in tensors]
    modes = []

    def spied(tokens, rows):
        modes.append((torch.is_grad_enabled(), tokens.log_prob.requires_grad))
        return lines(tokens, rows)

    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss, _ = sgp.linear_loss(*leaves[:2], target, spied, linear_bias=leaves[2])
        assert not loss.requires_grad
        truth, _ = sgp.reference.linear_loss(*leaves[:2], target, lines, linear_bias=leaves[2])
        torch.testing.assert_close(loss, truth.detach())
    assert set(modes) == {(False, False)}


@pytest.mark.parametrize("by", ["row", "sequence"])
def test_autocast(by):
    """The lines run under the caller's autocast; the matmuls' operands have its dtype."""
    tensors, target = make()
    half = [x.bfloat16() for x in tensors]
    seen = []

    def lines(tokens, rows):
        seen.append((torch.is_autocast_enabled("cpu"), tokens.log_prob.dtype))
        return getattr(Losses(torch.float32), by)(tokens, rows)

    with torch.autocast("cpu", torch.bfloat16):
        _, found = run(sgp.linear_loss, tensors, target, lines, by=by)
    assert set(seen) == {(True, torch.float32)}
    _, expected = run(sgp.linear_loss, half, target, getattr(Losses(torch.float32), by), by=by)
    for value, true in zip(found, expected, strict=True):
        assert value.dtype == torch.float32
        assert relative_error(value, true) < 2e-2  # there the bias is rounded too


def test_a_loss_scaler():
    """float16 gradients keep what the scaler's factor is for; they are rounded with it."""
    (hidden, head, _), target = make(torch.float16, bias=False)
    leaves = [x.clone().requires_grad_() for x in (hidden, head)]
    loss = sgp.linear_loss(*leaves, target, lambda t, _: -t.log_prob * 1e-7, chunk_rows=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(loss).backward()
    doubles = [x.double().requires_grad_() for x in (hidden, head)]
    true = sgp.reference.linear_loss(*doubles, target, lambda t, _: -t.log_prob * 1e-7)
    (true * 2.0**16).backward()
    for leaf, double in zip(leaves, doubles, strict=True):
        assert relative_error(leaf.grad, double.grad) < 2e-3


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("closes", [False, True])
def test_checkpoints(use_reentrant, closes):
    """The lines' own graph is no business of a checkpoint around the call."""
    (hidden, head, _), target = make(bias=False)
    factor = torch.tensor(1.5, requires_grad=True)
    calls = []

    def lines(tokens, rows):
        calls.append(1)
        return -tokens.log_prob * (factor if closes else 1.5) - tokens.entropy

    def loss(x):
        return sgp.linear_loss(x, head, target, lines, chunk_rows=4)

    x = hidden.clone().requires_grad_()
    loss(x)  # the first call, which is checked
    calls.clear()
    loss(x).backward()
    true, of_factor = x.grad.clone(), factor.grad
    x.grad = factor.grad = None
    pieces = len(calls)
    calls.clear()
    checkpoint(loss, x, use_reentrant=use_reentrant).backward()
    torch.testing.assert_close(x.grad, true)
    if closes:
        torch.testing.assert_close(factor.grad, of_factor)
    first = 1 if use_reentrant else pieces  # without gradients, for all rows at once
    assert len(calls) == first + pieces, "once, and once more for the backward"


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks, after a break
def test_compiled():
    """A graph break, and the same numbers; where none may be, PyTorch says so."""
    (hidden, head, _), target = make(bias=False)
    lines = Losses(torch.float32).row

    def step(x, w, y):
        return sgp.linear_loss(2 * x, w, y, lines, chunk_rows=7)[0] * 2

    leaves = [x.clone().requires_grad_() for x in (hidden, head)]
    truth = torch.autograd.grad(step(*leaves, target), leaves)
    torch._dynamo.reset()
    found = torch.autograd.grad(torch.compile(step, backend="aot_eager")(*leaves, target), leaves)
    for value, true in zip(found, truth, strict=True):
        torch.testing.assert_close(value, true)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(step, backend="aot_eager", fullgraph=True)(*leaves, target)


def test_transforms_are_refused():
    (hidden, head, _), target = make(bias=False)
    with pytest.raises(RuntimeError, match=r"torch\.func transforms cannot follow"):
        torch.func.grad(lambda x: sgp.linear_loss(x, head, target, lambda t, _: -t.log_prob))(
            hidden
        )


# -- what the lines must be ------------------------------------------------------------------------


OUTSIDE = torch.randn(B * T, requires_grad=True)
MIXED = {
    "a mean": ("row", lambda t, _: t.log_prob - t.log_prob.mean()),
    "a detached mean": ("row", lambda t, _: t.log_prob - t.log_prob.detach().mean()),
    "the entropy's mean": ("row", lambda t, _: t.log_prob * t.entropy.detach().mean()),
    "a share of hits": ("row", lambda t, _: t.log_prob * t.is_top1.float().mean()),
    "a softmax": ("row", lambda t, _: t.log_prob * t.lse.softmax(0)),
    "the row before": ("row", lambda t, _: t.log_prob.cumsum(0)),
    "a neighbour": ("row", lambda t, _: t.log_prob + t.log_prob.roll(1)),
    "a count": ("row", lambda t, rows: t.log_prob / rows.numel()),
    "a sum of one's own": ("row", lambda t, rows: t.log_prob * OUTSIDE.detach()[rows].sum()),
    "a mean of sequences": ("sequence", lambda t, rows: _per_sequence(t, rows).cumsum(0)),
    "a count of sequences": (
        "sequence", lambda t, rows: _per_sequence(t, rows) / (rows // T).unique().numel()
    ),
    "other groups": ("group", lambda t, rows: _per_group(t, rows).cumsum(0)),
}  # fmt: skip


def _per_sequence(tokens, rows):
    return tokens.log_prob.new_zeros(B).index_add(0, rows // T, tokens.log_prob)


def _per_group(tokens, rows):
    of = torch.tensor([0, 0, 1, 1, 2])[rows // T]
    return tokens.log_prob.new_zeros(3).index_add(0, of, tokens.log_prob)


@pytest.mark.parametrize("name", MIXED)
def test_rows_that_mix_are_refused(name):
    (hidden, head, _), target = make(bias=False)
    by, lines = MIXED[name]
    options = {"groups": GROUPS} if by == "group" else {}
    with pytest.raises(ValueError, match=f"{by}") as said:
        sgp.linear_loss(hidden.requires_grad_(), head, target, lines, by=by, **options)
    text = str(said.value)
    assert text.startswith("sgp.linear_loss: loss_fn ")
    assert "would depend on the chunks" in text
    assert ("by='sequence'" in text) == (by == "row")
    if "count" not in name and "one's own" not in name:
        assert f"changes with the values of {by}" in text


def test_the_rows_that_mix_are_named():
    (hidden, head, _), target = make(bias=False)
    rows = (target.flatten() != IGNORE).nonzero().squeeze(1)

    def lines(tokens, positions):
        numbers = -tokens.log_prob
        at = (positions == rows[3]).float()
        return numbers + at * (tokens.log_prob * (positions == rows[5])).sum()

    with pytest.raises(ValueError, match="the number of row 3 of a call changes with the values of "
                       rf"row 5 \(positions {rows[3]} and {rows[5]}\)"):  # fmt: skip
        sgp.linear_loss(hidden.requires_grad_(), head, target, lines)


def of_a_large_batch():
    """4096 rows, in which a mean of all and of half differ little, and advantages of each."""
    hidden, head = torch.randn(4096, 4), torch.randn(7, 4)
    return hidden.requires_grad_(), head, torch.randint(7, (4096,)), torch.randn(4096)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "share",
    [lambda x: x - x.mean(), lambda x: x / x.std(), lambda x: (x - x.mean()) / x.std(),
     lambda x: x * (x > 0).float().mean(), lambda x: x.softmax(0)],
    ids=["centred", "scaled", "whitened", "a share", "softmax"],
)  # fmt: skip
def test_what_a_large_call_shares_is_found(share, seed):
    torch.manual_seed(seed)
    hidden, head, target, advantage = of_a_large_batch()
    with pytest.raises(ValueError, match="another number in a call with fewer rows"):
        sgp.linear_loss(hidden, head, target, lambda t, rows: t.log_prob * share(advantage[rows]))


def test_a_large_call_that_shares_nothing_passes():
    """Sizes of 24 orders, and a matmul of 16 bits."""
    hidden, head, target, advantage = of_a_large_batch()
    sizes = advantage * torch.logspace(-12, 12, 4096)
    network = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1)).bfloat16()

    def lines(tokens, rows):
        value = network(hidden.detach()[rows].bfloat16()).squeeze(1).float()
        return tokens.log_prob * sizes[rows] + value

    sgp.linear_loss(hidden, head, target, lines)


def good(tokens, _):
    return -tokens.log_prob


def bad(tokens, _):
    return -tokens.log_prob / len(tokens.log_prob)


def wrapped(function, *, kind="good"):
    @functools.wraps(function)
    def call(*arguments):
        numbers = function(*arguments)
        return numbers if kind == "good" else numbers - numbers.mean()

    return call


def passed(tokens, rows, function=good):
    return function(tokens, rows)


def with_default(function):
    def call(tokens, rows, function=function):
        return function(tokens, rows)

    return call


class Holder:
    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments):
        return self.function(*arguments)

    def method(self, *arguments):
        return self.function(*arguments)


def test_another_function_is_not_taken_for_one_that_was_checked():
    """Of the same code: behind wrappers, in arguments, defaults and objects, or by a flag."""
    (hidden, head, _), target = make(bias=False)
    hidden.requires_grad_()

    pairs = {
        "wraps": (good, wrapped(good, kind="bad")),
        "twice": (wrapped(wrapped(good)), wrapped(wrapped(bad))),
        "a flag": (wrapped(good, kind="good"), wrapped(good, kind="bad")),
        "partial": (
            functools.partial(passed, function=good),
            functools.partial(passed, function=bad),
        ),
        "a default": (with_default(good), with_default(bad)),
        "an object": (Holder(good), Holder(bad)),
        "a partial of an object": (
            functools.partial(Holder(good)),
            functools.partial(Holder(bad)),
        ),
        "a method": (Holder(good).method, Holder(bad).method),
        "compiled": (torch.compile(good, backend="eager"), torch.compile(bad, backend="eager")),
    }
    refused = {}
    for name, (first, second) in pairs.items():
        sgp.linear_loss(hidden, head, target, first)
        try:
            sgp.linear_loss(hidden, head, target, second)
        except ValueError as error:
            refused[name] = "depend on the chunks" in str(error)
    assert refused == dict.fromkeys(pairs, True)


def test_what_the_function_does_to_its_tokens_is_its_own_business():
    """In place, after it has computed, and during the check."""
    (hidden, head, _), target = make(torch.float64, bias=False)
    hidden.requires_grad_()

    def lines(tokens, _, *, changes):
        numbers = -tokens.log_prob - tokens.entropy
        if changes:
            with torch.no_grad():
                tokens.entropy.clamp_(max=0.5)
                tokens.log_prob.zero_()
                tokens.is_top1.logical_not_()
        return numbers

    for options in ({}, {"chunk_rows": 4}):
        found = []
        for changes in (False, True):
            loss, tokens = sgp.linear_loss(
                hidden, head, target, functools.partial(lines, changes=changes),
                return_stats=True, **options,
            )  # fmt: skip
            found.append((*torch.autograd.grad(loss, hidden), *tokens[:4]))
        for value, true in zip(*found, strict=True):
            torch.testing.assert_close(value, true)


def test_numbers_that_are_ignored_must_be_finite():
    """0 times NaN may be a gradient, of the head's or of other tensors, where one is missing."""
    (hidden, head, _), target = make(torch.float64, bias=False)
    hidden.requires_grad_()
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def lines(tokens, rows, *, least, factor):
        of = rows // T
        sums = tokens.log_prob.new_zeros(B).index_add(0, of, tokens.log_prob)
        return sums / torch.bincount(of, minlength=B).clamp(min=least) * factor

    unsafe = functools.partial(lines, least=0, factor=factor)
    with pytest.raises(ValueError, match=r"NaN numbers for sequences without rows.*clamp\(min=1\)"):
        sgp.linear_loss(hidden, head, target, unsafe, by="sequence")
    safe, found = functools.partial(lines, least=1, factor=factor), []
    for chunk_rows in (None, 6):
        loss = sgp.linear_loss(hidden, head, target, safe, by="sequence", chunk_rows=chunk_rows)
        found.append(torch.autograd.grad(loss, (hidden, factor)))
    for value, other in zip(*found, strict=True):
        torch.testing.assert_close(value, other)

    def by_matrix(tokens, rows):
        of_sequence = (rows[None] // T == torch.arange(B)[:, None]).to(tokens.log_prob.dtype)
        return -(of_sequence @ tokens.log_prob) / of_sequence.sum(1)

    target[2] = 0  # a token in every sequence, so that all are finite in one call
    with pytest.raises(ValueError, match="infinite or NaN numbers for sequences without rows"):
        sgp.linear_loss(hidden, head, target, by_matrix, by="sequence")


def test_a_chunk_may_have_no_gradient():
    """Whether an error is raised does not depend on the chunks."""
    (hidden, head, _), target = make(torch.float64, bias=False)
    hidden.requires_grad_()
    gains = (torch.arange(B * T) > 20).double()
    zeros = torch.zeros(B * T, dtype=torch.float64)

    def lines(tokens, rows):
        if not gains[rows].any():
            return zeros[: len(rows)].zero_()
        zeros.fill_(torch.nan)  # the buffer is used for something else
        return -tokens.log_prob * gains[rows]

    found = []
    for chunk_rows in (None, 4):
        loss = sgp.linear_loss(hidden, head, target, lines, chunk_rows=chunk_rows)
        found.append((loss.detach(), *torch.autograd.grad(loss, hidden)))
    for value, other in zip(*found, strict=True):
        torch.testing.assert_close(value, other)


def test_the_check_draws_no_random_numbers_of_the_callers():
    (hidden, head, _), target = make(bias=False)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sgp.linear_loss(hidden, head, target, lambda t, _: t.log_prob * torch.rand_like(t.lse))
        found.append(float(torch.rand(())))
    assert found[0] == found[1]


def test_a_metric_keeps_its_dtype():
    (hidden, head, _), target = make(bias=False)

    def lines(tokens, rows):
        dtype = torch.float32 if rows[0] < T else torch.float64
        return -tokens.log_prob, {"early": tokens.lse.detach().to(dtype)}

    words = r"metrics\['early'\] of torch.float64, and of torch.float32 in another call"
    with pytest.raises(TypeError, match=words):
        sgp.linear_loss(hidden.requires_grad_(), head, target, lines, chunk_rows=1)


def test_rows_are_a_copy():
    """What the function does to them in place reaches neither the Selection nor the gradient."""
    (hidden, head, _), target = make(torch.float64, bias=False)
    hidden.requires_grad_()
    selection = sgp.Selection.from_labels(target)
    before, gain = selection.rows.clone(), torch.randn(B, dtype=torch.float64)

    def lines(tokens, rows):
        rows //= T
        return -tokens.log_prob * gain[rows]

    for chunk_rows in (None, 3):
        loss = sgp.linear_loss(hidden, head, selection, lines, chunk_rows=chunk_rows)
        true = sgp.reference.linear_loss(
            hidden, head, target, lambda t, rows: -t.log_prob * gain[rows // T]
        )
        torch.testing.assert_close(
            torch.autograd.grad(loss, hidden)[0], torch.autograd.grad(true, hidden)[0]
        )
        assert torch.equal(selection.rows, before)


def test_a_buffer_may_be_used_again():
    """For metrics, and without gradients for numbers."""
    (hidden, head, _), target = make(bias=False)
    buffer = torch.zeros(B * T)

    def lines(tokens, rows):
        found = buffer[: len(rows)].copy_(tokens.log_prob.detach())
        return (-tokens.log_prob if tokens.log_prob.requires_grad else found), {"lp": found}

    whole = sgp.linear_token_log_probs(hidden, head, target).log_prob
    _, metrics = sgp.linear_loss(hidden.requires_grad_(), head, target, lines, chunk_rows=4)
    torch.testing.assert_close(metrics["lp"], whole)
    with torch.no_grad():
        loss, _ = sgp.linear_loss(hidden, head, target, lines, chunk_rows=4)
    torch.testing.assert_close(loss, whole.sum())


@pytest.mark.parametrize("first", ["zeros", "NaN", "one row a chunk"])
def test_a_batch_that_tells_nothing_is_no_check(first):
    (hidden, head, _), target = make(bias=False)
    hidden.requires_grad_()
    gain = {"zeros": torch.zeros(B * T), "NaN": torch.full((B * T,), torch.nan)}.get(first)
    options = {"chunk_rows": 1} if gain is None else {}

    def make_lines(gain):
        return lambda t, rows: -t.log_prob * gain[rows] / len(rows)

    if gain is not None:
        sgp.linear_loss(hidden, head, target, make_lines(gain), **options)
    with pytest.raises(ValueError, match="depend on the chunks"):
        sgp.linear_loss(hidden, head, target, make_lines(torch.randn(B * T)), **options)


def test_one_large_number_hides_no_small_one():
    (hidden, head, _), target = make(bias=False)
    sizes = torch.ones(B * T)
    sizes[:8] = 1e7

    def lines(tokens, rows):
        return -tokens.log_prob * torch.where(sizes[rows] > 1, sizes[rows], tokens.entropy[-1])

    with pytest.raises(ValueError, match="loss_fn mixes rows"):
        sgp.linear_loss(hidden.requires_grad_(), head, target, lines)


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_dropout_is_never_refused(share):
    """Whether the check sees a number that is dropped, or none."""
    (hidden, head, _), target = make(bias=False)
    hidden.requires_grad_()
    for seed in range(20):
        torch.manual_seed(seed)
        loss_function._seen.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sgp.linear_loss(
                hidden, head, target, lambda t, _: -t.log_prob * (torch.rand_like(t.lse) > share)
            )


def test_random_numbers_hide_no_mixing_of_statistics():
    (hidden, head, _), target = make(bias=False)

    def lines(tokens, _):
        return -F.dropout(tokens.log_prob, 0.1) - tokens.entropy.detach().mean()

    with pytest.raises(ValueError, match="loss_fn mixes rows"):
        sgp.linear_loss(hidden.requires_grad_(), head, target, lines)


def test_what_a_function_asserts_of_its_statistics():
    """It is told apart from a failure: it cannot be checked, and that is said."""
    (hidden, head, _), target = make(bias=False)
    old = sgp.linear_token_log_probs(hidden, head, target).log_prob.flatten()

    def lines(tokens, rows):
        tokens.log_prob.register_hook(lambda g: g)  # as in every other call
        assert tokens.log_prob.requires_grad
        ratio = (tokens.log_prob - old[rows]).exp()
        assert (ratio - 1).abs().max() < 1e-4, "the first epoch"
        return -ratio

    with pytest.warns(UserWarning, match="keeps rows apart: it raised AssertionError"):
        sgp.linear_loss(hidden.requires_grad_(), head, target, lines)


def test_metrics_of_some_calls_are_refused():
    (hidden, head, _), target = make(bias=False)

    def lines(tokens, rows):
        return (-tokens.log_prob, {"a": tokens.lse}) if rows[0] < T else -tokens.log_prob

    with pytest.raises(ValueError, match=r"metrics None, and \['a'\] in another call"):
        sgp.linear_loss(hidden.requires_grad_(), head, target, lines, chunk_rows=1)


def test_a_function_of_its_own_hides_nothing_that_it_uses():
    """A context may have an attribute that is called like that of a leaf's node."""
    (hidden, head, _), target = make(bias=False)
    factor = torch.ones(B * T, requires_grad=True)

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.variable = x
            ctx.save_for_backward(x, y)
            return x * y

        @staticmethod
        def backward(ctx, gradient):
            x, y = ctx.saved_tensors
            return gradient * y, gradient * x

    loss = sgp.linear_loss(
        hidden.requires_grad_(), head, target,
        lambda t, rows: -Product.apply(t.log_prob, factor[rows]),
    )  # fmt: skip
    loss.backward()
    whole = sgp.linear_token_log_probs(hidden, head, target).log_prob
    torch.testing.assert_close(factor.grad, -whole.detach().flatten())


def test_a_second_derivative_through_another_tensor_is_refused():
    (hidden, head, _), target = make(bias=False)
    factor = torch.ones(B * T, requires_grad=True)
    loss = sgp.linear_loss(
        hidden.requires_grad_(), head, target, lambda t, rows: -t.log_prob * factor[rows]
    )
    (gradient,) = torch.autograd.grad(loss, factor, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_loss has no second derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nothing_carries_loss_in_a_budget(dtype):
    (hidden, head, _), target = make(dtype, bias=False)
    head.requires_grad_()
    nothing = torch.full_like(target, IGNORE)
    loss = sgp.linear_loss(hidden, head, nothing, lambda t, _: -t.log_prob, memory_budget=10**6)
    loss.backward()
    assert not head.grad.any()


@pytest.mark.parametrize("seed", range(5))
def test_the_noise_of_additions_in_another_order_is_no_mixing(seed):
    """As atomic additions of a GPU make it, which no generator's state repeats."""
    (hidden, head, _), target = make(bias=False)
    noise = torch.Generator().manual_seed(seed)

    def lines(tokens, rows):
        sums = tokens.log_prob.new_zeros(B).index_add(0, rows // T, tokens.log_prob)
        return sums * (1 + 3e-6 * torch.randn(B, generator=noise))

    sgp.linear_loss(hidden.requires_grad_(), head, target, lines, by="sequence")


@pytest.mark.parametrize("seed", range(5))
def test_a_first_step_whose_numbers_are_rounding_alone_is_not_refused(seed):
    """The policy is the reference: the square of a difference is the square of noise."""
    torch.manual_seed(seed)
    hidden, head = torch.randn(8, 100, 8, requires_grad=True), torch.randn(50, 8)
    selection = sgp.Selection.from_labels(torch.randint(50, (8, 100)))
    with torch.no_grad():
        old = sgp.linear_token_log_probs(hidden, head, selection).log_prob.sum(1)

    def lines(tokens, rows):
        matrix = (selection.sequence_of(rows)[None] == torch.arange(8)[:, None]).float()
        return (matrix @ tokens.log_prob - old) ** 2 / 8

    sgp.linear_loss(hidden, head, selection, lines, by="sequence")


def test_a_mean_behind_a_threshold_is_found():
    """KTO's z0, taken of the call: 0 where the policy is the reference, and changes lower it."""
    (hidden, head, _), target = make(bias=False)
    hidden.requires_grad_()
    target = target.clamp(min=0)
    with torch.no_grad():
        old = sgp.linear_token_log_probs(hidden, head, target).log_prob.sum(1)

    def lines(tokens, rows):
        sums = tokens.log_prob.new_zeros(B).index_add(0, rows // T, tokens.log_prob)
        z0 = (sums - old).mean().clamp(min=0).detach()
        return torch.sigmoid(0.1 * (z0 - sums + old))

    with pytest.raises(ValueError, match="loss_fn mixes sequences"):
        sgp.linear_loss(hidden, head, target, lines, by="sequence")


def test_tensors_that_are_changed_after_their_use():
    """As autograd says it, and no wrong gradient."""
    (hidden, head, _), target = make(bias=False)
    hidden.requires_grad_()
    values = torch.ones(B * T, requires_grad=True)
    buffer, constant = torch.zeros(B * T), torch.ones(B * T)

    def inside(tokens, _):
        ratio = tokens.log_prob.exp()
        squared = ratio * ratio
        ratio += 1
        return -squared

    def over_chunks(tokens, rows):
        here = buffer[: len(rows)].copy_(2.0 * rows)
        return -tokens.log_prob + values[rows] * here

    words = r"linear_loss: a tensor \(\d+,\) of torch.float32 that loss_fn needs.*changed in place"
    with pytest.raises(RuntimeError, match=words):
        sgp.linear_loss(hidden, head, target, inside)
    loss = sgp.linear_loss(hidden, head, target, over_chunks, chunk_rows=4)
    with pytest.raises(RuntimeError, match=words):
        loss.backward()
    loss = sgp.linear_loss(
        hidden, head, target, lambda t, rows: -t.log_prob + (values * constant)[rows]
    )
    constant.zero_()
    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace"):
        loss.backward()


def test_exceptions_of_the_check_alone_do_not_end_a_training():
    (hidden, head, _), target = make(bias=False)
    old = sgp.linear_token_log_probs(hidden, head, target).log_prob.flatten()

    class StopEpoch(Exception):  # noqa: N818
        pass

    def lines(tokens, rows):
        if (tokens.log_prob - old[rows]).abs().mean() > 0.015:
            raise StopEpoch
        return -tokens.log_prob

    with pytest.warns(UserWarning, match="it raised StopEpoch"):
        sgp.linear_loss(hidden.requires_grad_(), head, target, lines)


@pytest.mark.parametrize("what", ["strings", "zeros"])
def test_the_check_ends(what):
    """Also where a string changes from step to step, or every number is 0."""
    (hidden, head, _), target = make(bias=False)
    calls = []

    def make_lines(tag):
        def lines(tokens, _):
            calls.append(tag)
            return tokens.log_prob * (what == "strings")

        return lines

    for step in range(20):
        tag = f"step {step}" if what == "strings" else "step"
        calls.clear()
        sgp.linear_loss(hidden.requires_grad_(), head, target, make_lines(tag))
    assert len(calls) == 1


def test_memory_of_many_sequences_does_not_grow_with_the_pieces():
    """Numbers and metrics of all sequences in each call are joined at once."""

    def peak(S):
        hidden, head = torch.randn(S, 2, 4), torch.randn(8, 4)
        selection = sgp.Selection.from_labels(torch.randint(8, (S, 2)))

        def lines(tokens, rows):
            numbers = -tokens.log_prob.new_zeros(S).index_add(0, rows // 2, tokens.log_prob)
            return numbers, {"a": numbers, "b": numbers}

        arguments = (hidden.requires_grad_(), head, selection, lines)
        sgp.linear_loss(*arguments, by="sequence", chunk_rows=32)
        with cpu_peak() as held:
            sgp.linear_loss(*arguments, by="sequence", chunk_rows=32)
        return held.peak_bytes

    assert peak(2000) < 5 * peak(500)


def test_lines_that_do_not_mix_pass():
    """A matmul of 16 bits inside, infinities, NaN, and numbers that no other row can reach."""
    (hidden, head, _), target = make(bias=False)
    value_head = nn.Linear(D, 1).bfloat16()
    flat = hidden.flatten(0, 1).bfloat16()
    factor = torch.randn(B * T)
    factor[::7], factor[3::7] = torch.inf, torch.nan

    def lines(tokens, rows):
        return tokens.log_prob * value_head(flat[rows]).squeeze(1).float() * factor[rows]

    sgp.linear_loss(hidden.requires_grad_(), head, target, lines)


def test_each_function_is_checked_once(monkeypatch):
    """By its code: a closure made anew counts once; by=... and another function again."""
    (hidden, head, _), target = make(bias=False)
    calls = []

    def make_lines(scale):
        def lines(tokens, rows):
            calls.append(1)
            return -scale * tokens.log_prob

        return lines

    def count(loss_fn, **options):
        calls.clear()
        sgp.linear_loss(hidden.requires_grad_(), head, target, loss_fn, **options)
        return len(calls)

    first = count(make_lines(1.0))
    assert 10 < first < 40
    assert count(make_lines(2.0)) == 1
    assert count(functools.partial(make_lines(2.0))) == 1
    lines = make_lines(1.0)

    @functools.wraps(lines)
    def wrapped(*arguments):
        return lines(*arguments)

    assert count(wrapped) == first, "a wrapper may mix what it wraps"
    assert count(wrapped) == 1

    def of(part):
        def lines(tokens, _):
            calls.append(1)
            return part(tokens)

        return lines

    assert count(of(lambda t: -t.log_prob)) == first
    assert count(of(lambda t: -t.log_prob - t.entropy)) == first, "another function inside"
    whole = {"by": "group", "groups": torch.zeros(B, dtype=torch.int64)}

    def one(tokens, rows):
        calls.append(1)
        return -tokens.log_prob.sum(0, keepdim=True)

    assert count(one, **whole) == 1, "one group has nothing to mix with"
    assert count(one, **whole) == 1
    monkeypatch.setenv("SGP_CHECK", "1")
    assert count(make_lines(2.0)) == first
    monkeypatch.setenv("SGP_CHECK", "0")
    assert count(lambda t, _: calls.append(1) or -t.log_prob / len(t.log_prob)) == 1


def test_lines_of_chance_are_not_refused():
    (hidden, head, _), target = make(bias=False)

    def lines(tokens, rows):
        return -tokens.log_prob * torch.rand(len(rows))

    with pytest.warns(
        UserWarning, match="cannot be checked that loss_fn keeps rows apart: it draws"
    ):
        sgp.linear_loss(hidden.requires_grad_(), head, target, lines)


def test_lines_that_do_not_index():
    (hidden, head, _), target = make(bias=False)
    advantage = torch.randn(int((target != IGNORE).sum()))
    with pytest.raises(ValueError, match=r"failed when it was called with a part of the rows.*\[r"):
        sgp.linear_loss(hidden.requires_grad_(), head, target, lambda t, _: t.log_prob * advantage)


WRONG = {
    "a mean": (lambda t, _: t.log_prob.mean(), ValueError,
               r"returned \(\) for \d+ rows; expected \(\d+,\), one number a row"),
    "a column": (lambda t, _: t.log_prob[:, None], ValueError, r"\(\d+, 1\) for \d+ rows"),
    "a float": (lambda *_: 1.0, TypeError, "returned a float; expected a dense tensor"),
    "nothing": (lambda *_: None, TypeError, "returned a NoneType; expected a dense tensor"),
    "16 bits": (lambda t, _: t.log_prob.bfloat16(), TypeError, "of torch.bfloat16"),
    "integers": (lambda _, rows: rows, TypeError, "numbers of torch.int64"),
    "a triple": (lambda t, _: (t.log_prob, {}, {}), TypeError,
                 r"returned \(Tensor, dict, dict\); expected numbers, or \(numbers, metrics\)"),
    "a number metric": (lambda t, _: (t.log_prob, {"a": 1.0}), TypeError,
                        r"returned a float for metrics\['a'\]"),
    "a mean metric": (lambda t, _: (t.log_prob, {"a": t.lse.mean()}), ValueError,
                      r"returned \(\) for metrics\['a'\] for \d+ rows"),
    "a numbered metric": (lambda t, _: (t.log_prob, {1: t.lse}), TypeError, "named 1"),
    "elsewhere": (lambda t, _: t.log_prob.to("meta"), ValueError, "a tensor on meta; expected cpu"),
    "detached": (lambda t, _: t.log_prob.detach(), ValueError, "no gradient for tokens"),
    "not of the tokens": (lambda _, rows: OUTSIDE[rows], ValueError, "no gradient for tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_the_lines_return_is_checked(name):
    (hidden, head, _), target = make(bias=False)
    lines, error, words = WRONG[name]
    with pytest.raises(error, match=f"^sgp.linear_loss: .*{words}"):
        sgp.linear_loss(hidden.requires_grad_(), head, target, lines)


def test_one_number_a_row_is_not_one_a_sequence():
    (hidden, head, _), target = make(bias=False)
    words = r"returned \(\d+,\) for \d+ rows; expected \(4,\).* or \(5,\), one for every sequence"
    with pytest.raises(ValueError, match=words):
        sgp.linear_loss(hidden, head, target, lambda t, _: -t.log_prob, by="sequence")


def test_metrics_are_the_same_in_every_call(monkeypatch):
    (hidden, head, _), target = make(bias=False)

    def lines(tokens, rows):
        return -tokens.log_prob, {"late" if rows[0] > T else "early": tokens.lse}

    with pytest.raises(ValueError, match=r"metrics \['late'\], and \['early'\] in another call"):
        sgp.linear_loss(hidden.requires_grad_(), head, target, lines, chunk_rows=1)


def test_exceptions_of_the_lines_come_through():
    (hidden, head, _), target = make(bias=False)

    class MineError(Exception):
        pass

    def lines(tokens, rows):
        raise MineError

    with pytest.raises(MineError) as caught:
        sgp.linear_loss(hidden.requires_grad_(), head, target, lines)
    assert caught.traceback[-1].name == "lines"


ARGUMENTS = [
    ({"by": "token"}, ValueError, r"by = 'token'; expected one of \('row', 'sequence', 'group'\)"),
    ({"by": None}, ValueError, "by = None"),
    ({"by": "group"}, ValueError, "by = 'group' needs groups"),
    ({"groups": GROUPS}, ValueError, "by = 'row' together with groups"),
    ({"by": "group", "groups": GROUPS[:3]}, ValueError, r"groups are \(3,\); expected \(5,\)"),
    ({"by": "group", "groups": GROUPS.float()}, TypeError, "groups are torch.float32"),
    ({"by": "group", "groups": "01122"}, TypeError, "groups = '01122'"),
    (
        {"by": "group", "groups": [0, 1, 0, 1, 2]},
        ValueError,
        "groups fall from 1 to 0 at sequence 2",
    ),
    ({"by": "group", "groups": ["a"] * 5}, TypeError, "expected integers"),
    ({"loss_fn": 3}, TypeError, "loss_fn = 3; expected a function"),
    ({"return_stats": "yes"}, TypeError, "return_stats = 'yes'"),
    ({"chunk_rows": 0}, ValueError, "chunk_rows = 0"),
    ({"temperature": 0.0}, ValueError, "temperature = 0.0"),
]


@pytest.mark.parametrize(("options", "error", "words"), ARGUMENTS)
def test_arguments_that_do_not_fit(options, error, words):
    (hidden, head, _), target = make(bias=False)
    options = {"loss_fn": lambda t, _: -t.log_prob} | options
    with pytest.raises(error, match=f"^sgp.linear_loss: .*{words}"):
        sgp.linear_loss(hidden, head, target, **options)


# -- selections ------------------------------------------------------------------------------------


def test_the_weights_of_a_selection_multiply_rows():
    tensors, target = make(torch.float64)
    weight = torch.rand(B, T)
    selection = sgp.Selection.from_labels(target, token_weight=weight)
    lines = Losses(torch.float64).row

    def weighted(tokens, rows):
        return lines(tokens, rows)[0] * weight.flatten()[rows]

    _, truth = run(sgp.reference.linear_loss, tensors, target, weighted)
    for function in (sgp.reference.linear_loss, sgp.linear_loss):
        _, found = run(function, tensors, selection, lines)
        for value, true in zip(found, truth, strict=True):
            torch.testing.assert_close(value, true)
    for by in ("sequence", "group"):
        options = {"groups": GROUPS} if by == "group" else {}
        with pytest.raises(ValueError, match=f"by = '{by}' of a Selection with token weights"):
            sgp.linear_loss(*tensors[:2], selection, lines, by=by, **options)


def test_packed_sequences():
    """Of any length, one without a token that carries loss, and padding at the end."""
    hidden, head = torch.randn(1, 40, D).double(), torch.randn(V, D).double()
    labels = torch.randint(V, (1, 40))
    labels[0, :4] = labels[0, 9:20] = labels[0, 33:] = IGNORE
    selection = sgp.Selection.from_labels(
        labels, shift=True, cu_seqlens=torch.tensor([0, 9, 20, 21, 33])
    )
    assert selection.kept_counts.tolist() == [5, 0, 0, 11]

    def lines(tokens, rows):
        of = selection.sequence_of(rows)
        return -tokens.log_prob.new_zeros(4).index_add(0, of, tokens.log_prob).tanh()

    for by, groups in (("sequence", None), ("group", [0, 1, 1, 1])):
        per = lines if by == "sequence" else lambda t, rows: _two(lines(t, rows))
        options = {"by": by, "groups": groups}
        x = hidden.clone().requires_grad_()
        loss = sgp.reference.linear_loss(x, head, selection, per, **options)
        (true,) = torch.autograd.grad(loss, x)
        for chunk_rows in (None, 4, 11, 12):
            found = sgp.linear_loss(x, head, selection, per, chunk_rows=chunk_rows, **options)
            torch.testing.assert_close(found.detach(), loss.detach())
            torch.testing.assert_close(torch.autograd.grad(found, x)[0], true)


def _two(numbers):
    return torch.stack([numbers[0], numbers[1:].sum()])


def test_a_cut_selection_is_refused():
    (hidden, head, _), target = make(bias=False)
    part = sgp.Selection.from_labels(target).cut(torch.arange(4))
    assert part.kept_counts.tolist() == (target[:, :4] != IGNORE).sum(1).tolist()
    lines = Losses(torch.float32)
    with pytest.raises(ValueError, match="by = 'sequence' of a Selection that was cut"):
        sgp.linear_loss(hidden[:, :4], head, part, lines.sequence, by="sequence")
    assert sgp.linear_loss(hidden[:, :4], head, part, lambda t, _: -t.log_prob) > 0


@pytest.mark.parametrize("by", ["row", "sequence", "group"])
def test_nothing_carries_loss(by):
    """Zero, gradients of zero, and metrics, which a training loop unpacks as always."""
    tensors, target = make(torch.float64)
    lines = getattr(Losses(torch.float64), by)
    rest, found = run(
        sgp.linear_loss, tensors, torch.full_like(target, IGNORE), lines, by=by, return_stats=True
    )
    assert len(rest) == 2
    assert all(not x.any() for x in (*found, *rest[1].values()))
    hidden = torch.zeros(0, T, D, requires_grad=True)
    loss = sgp.linear_loss(hidden, tensors[1].float(), target[:0], lambda t, _: -t.log_prob)
    loss.backward()
    assert loss == 0
    assert hidden.grad.shape == hidden.shape


def test_ignored_rows_are_not_read():
    tensors, target = make()
    lines = Losses(torch.float32).row
    _, truth = run(sgp.linear_loss, tensors, target, lines, chunk_rows=3)
    tensors[0][target == IGNORE] = torch.nan
    _, found = run(sgp.linear_loss, tensors, target, lines, chunk_rows=3)
    for value, true in zip(found, truth, strict=True):
        assert torch.equal(value, true)


# -- what it costs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_rows", [None, 6])
@pytest.mark.parametrize("by", ["row", "sequence", "group"])
@pytest.mark.parametrize(
    ("needs", "matmuls"), [((1, 1), 3), ((1, 0), 2), ((0, 1), 2), ((0, 0), 1)], ids=str
)
def test_matmul_flops(needs, matmuls, by, chunk_rows):
    """6 M V D, 4 with one side frozen, 2 without gradients: the logits are made once."""
    (hidden, head, _), target = make(bias=False)
    target = target.clamp(min=0)
    target[:, 3:] = target[2] = IGNORE  # three rows a sequence, six a group: full chunks
    leaves = [x.requires_grad_(bool(n)) for x, n in zip((hidden, head), needs, strict=True)]
    lines = getattr(Losses(torch.float32), by)
    options = {"groups": GROUPS} if by == "group" else {}

    def step():
        loss, _ = sgp.linear_loss(*leaves, target, lines, by=by, chunk_rows=chunk_rows, **options)
        if any(needs):
            loss.backward()

    kept = int((target != IGNORE).sum())
    assert flops(step) == 2 * kept * V * D * matmuls


@pytest.mark.parametrize("by", ["sequence", "group"])
def test_what_does_not_fit_a_chunk_makes_the_logits_twice(by, monkeypatch):
    monkeypatch.setattr(algorithm, "_said", set())
    (hidden, head, _), target = make(bias=False)
    target = target.clamp(min=0)
    lines = getattr(Losses(torch.float32), by)
    options = {"by": by, "groups": GROUPS if by == "group" else None, "chunk_rows": 4}

    def step():
        sgp.linear_loss(hidden.requires_grad_(), head.requires_grad_(), target, lines, **options)

    longest = T if by == "sequence" else 2 * T
    words = (
        f"no room for the logits of a {by} of {longest} tokens that carry loss, so they are made t"
    )
    with pytest.warns(UserWarning, match=words) as said:
        assert flops(step) == 2 * B * T * V * D * 4
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()  # it was said once


@pytest.mark.parametrize(
    ("way", "by"),
    [(way, by) for way in ("chunks", "again", "slices") for by in ("row", "sequence", "group")
     if (way, by) != ("again", "row")],
)  # fmt: skip
def test_nothing_waits_for_a_gpu(way, by, monkeypatch):
    """What a GPU would be asked, with a Selection: nothing but at the first call of a function."""
    monkeypatch.setenv("SGP_BACKEND", "triton")
    monkeypatch.setattr("sgp.rows.by_triton.launch.Call.launch", lambda _: None)
    monkeypatch.setattr("sgp.rows.problem.may_wait", lambda _: False)
    plan = WAYS[way]._replace(rows=24, group=24) if way == "chunks" else WAYS[way]
    monkeypatch.setattr(chunks, "plan", lambda *_, **__: plan)
    tensors, target = make(torch.bfloat16, bias=False)
    selection = sgp.Selection.from_labels(target)
    leaves = [x.requires_grad_() for x in tensors[:2]]
    lines = getattr(Losses(torch.float32), by)
    options = {"groups": GROUPS} if by == "group" else {}
    looked, inner, listed = [], loss_function.find_mixing, []

    def look(*arguments):
        looked.append(1)
        return inner(*arguments)._replace(fault="", unknown="", is_final=True)  # of no numbers

    monkeypatch.setattr(loss_function, "find_mixing", look)
    summed, cumsum = [], torch.Tensor.cumsum
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, *y: summed.append(x) or cumsum(x, *y))
    to_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: listed.append(x) or to_list(x))
    for call in ("first", "later"):
        listed.clear()
        with torch.profiler.profile() as profile:
            loss, _ = sgp.linear_loss(*leaves, selection, lines, by=by, **options)
            loss.backward()
        names = [event.name for event in profile.events()]
        assert "aten::nonzero" not in names
        assert names.count("aten::_local_scalar_dense") == 2, "the count of rows, on the CPU"
        assert len(looked) == 1, "at the first call"
        # On the CPU: the rows of each sequence, and the groups.
        known = {"row": 0, "sequence": 1, "group": 2}[by]
        assert any(x is selection.kept_counts for x in summed) == (by != "row")
        assert len(listed) == known + (call == "first")


def extra_peak(N, M, chunk_rows, by):
    """Bytes beyond inputs and gradients of a call with M of N rows."""
    hidden, head = torch.randn(N, 64), torch.randn(4096, 64)
    labels = torch.full((N,), IGNORE)
    labels[torch.arange(M) * (N // M)] = torch.randint(4096, (M,))
    shape = (N // 64, 64)
    leaves = [hidden.view(*shape, 64).requires_grad_(), head.requires_grad_()]
    selection = sgp.Selection.from_labels(labels.view(shape))
    count = shape[0]

    def lines(tokens, rows):
        if by == "row":
            return -tokens.log_prob
        return -tokens.log_prob.new_zeros(count).index_add(0, rows // 64, tokens.log_prob)

    sgp.linear_loss(*leaves, selection, lines, by=by, chunk_rows=chunk_rows)  # the first call
    with mock.patch.object(by_torch, "CHUNK_ELEMENTS", 1 << 13), cpu_peak() as held:
        sgp.linear_loss(*leaves, selection, lines, by=by, chunk_rows=chunk_rows).backward()
    return held.peak_bytes - sum(x.grad.nbytes for x in leaves)


@pytest.mark.parametrize("by", ["row", "sequence"])
def test_peak_memory_grows_with_the_chunk_and_not_with_the_tokens(by):
    small, large = extra_peak(2048, 256, 64, by), extra_peak(2048, 256, 256, by)
    logits = 4 * 64 * 4096
    assert logits <= small < 2.5 * logits
    assert 3 * logits < large - small + logits < 5 * logits
    more = extra_peak(16_384, 2048, 64, by)
    assert more - small < 130 * 16_384, "numbers of each token, and nothing of V"

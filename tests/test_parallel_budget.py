"""A split vocabulary under a memory budget: every way that it can choose, planned alike by all."""

from typing import NamedTuple

import pytest
import torch
from torch.nn import functional as F

import sgp
from sgp.head import chunks
from sgp.tolerance import bound, relative_error
from tests.ranks import caught, run_ranks

SOME = (1, 1 << 14, 1 << 16, 1 << 40)  # budgets whose ways are tried: small ones, small pieces


class Size(NamedTuple):
    """Of a head that two ranks share, and of the tokens before it."""

    parts: tuple[int, int]  # classes
    width: int
    kept: int
    tokens: int

    def make(self, dtype):
        """Hidden states (N, D), a head (V, D), labels with context, upstream gradients (N,)."""
        random = torch.Generator().manual_seed(0)
        V = sum(self.parts)
        hidden = torch.randn(self.tokens, self.width, generator=random).to(dtype)
        head = torch.randn(V, self.width, generator=random).to(dtype)
        labels = torch.randint(V, (self.tokens,), generator=random)
        labels[torch.randperm(self.tokens, generator=random)[self.kept :]] = -100
        return hidden, head, labels, torch.rand(self.tokens, generator=random)

    def part(self, rank):
        """A rank's classes."""
        return slice(sum(self.parts[:rank]), sum(self.parts[: rank + 1]))


WIDE = Size(
    (600, 300), 24, 40, 60
)  # a sum of the head's gradient takes more than that of all logits
THIN = Size((400, 150), 5, 60, 90)  # and less
SMALL = Size((300, 140), 24, 20, 24)  # for the interpreter, which takes its time
LOSSES = {
    "mean": ("linear_cross_entropy", {"label_smoothing": 0.1}),
    "none": ("linear_cross_entropy", {"reduction": "none", "softcap": 5.0}),
    "tokens": ("linear_token_log_probs", {}),
}
WAYS = {"one chunk", "chunks", "slices", "held"}
OF_16_BITS = {"gradient kept", "gradient of groups kept"}


def kind(plan):
    """Which way it is, without its sizes."""
    if plan.way != "rows":
        return plan.way
    if plan.keeps():
        return "gradient kept" if plan.group >= plan.padded else "gradient of groups kept"
    return "one chunk" if plan.rows >= plan.padded else "chunks"


def choices(shape, *, one_of_a_kind):
    """{plan: the least budget that chooses it}."""
    shape = shape._replace(M=chunks.padded(shape.M, shape.N))
    sizes = sorted({p.bytes for b in SOME for p in chunks.ways(shape, b, held=True)}, reverse=True)
    found = {chunks.plan("test", shape, memory_budget=size): size for size in sizes}
    if one_of_a_kind:
        found = {plan: found[plan] for plan in {kind(plan): plan for plan in found}.values()}
    return found


class OfLogits:
    """The linear forms without sgp's head: logits in the dtype of its weight."""

    @staticmethod
    def linear_cross_entropy(hidden, head, labels, **options):
        return sgp.reference.cross_entropy(F.linear(hidden, head), labels, **options)

    @staticmethod
    def linear_token_log_probs(hidden, head, labels):
        return sgp.reference.token_log_probs(F.linear(hidden, head), labels)


def call(module, tensors, labels, upstream, loss, **how):
    """(a value, or one a token; the gradients of hidden states and head)."""
    function, options = LOSSES[loss]
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = getattr(module, function)(*leaves, labels, **options, **how)
    value = out if isinstance(out, torch.Tensor) else out.log_prob + 0.1 * out.entropy
    (value * upstream if value.dim() else value).sum().backward()
    of_hidden, of_head = (x.grad for x in leaves)
    return value.detach(), of_hidden, of_head


def errors_of(values, truths):
    """The worst row's of the hidden states' gradient, of the others as a whole."""
    (loss, of_hidden, of_head), (true_loss, *true) = values, truths
    return [
        relative_error(loss, true_loss),
        relative_error(of_hidden, true[0]),
        relative_error(of_head.flatten(), true[1].flatten()),
    ]


def limits(size, dtype, loss, backend):
    """(float64's value and gradients, the errors that pass): no worse than PyTorch's."""
    hidden, head, *others = size.make(dtype)
    truth = call(sgp.reference, (hidden.double(), head.double()), *others, loss)
    plain = call(OfLogits, (hidden, head), *others, loss)
    in_float32 = call(OfLogits, (hidden.float(), head.float()), *others, loss)
    errors = errors_of((in_float32[0], *plain[1:]), truth)
    pairs = zip(errors, (torch.float32, dtype, dtype), strict=True)
    return truth, [bound(error, of, interpreted=backend == "triton") for error, of in pairs]


def every_way(rank, size, dtype, losses, backend):
    """[(loss, plan, whether it adds, value, d_hidden)], and what is worse than PyTorch's."""
    seen, inner = [], chunks.plan

    def spy(name, shape, **asked):
        seen.append((shape, asked["memory_budget"], inner(name, shape, **asked)))
        return seen[-1][-1]

    def run(loss, before, **how):
        hidden, head, *others = size.make(dtype)
        into = None if before is None else before.clone()
        tensors = (hidden, head[size.part(rank)])
        *rest, of_head = call(sgp.parallel, tensors, *others, loss, accumulate_into=into, **how)
        assert (of_head is None) == (into is not None)
        return *rest, of_head if into is None else into - before

    found, wrong = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "plan", spy)
        for loss in losses:
            patch.setenv("SGP_BACKEND", "torch")
            truth, allowed = limits(size, dtype, loss, backend)
            truth = (*truth[:2], truth[2][size.part(rank)])
            patch.setenv("SGP_BACKEND", backend)
            for before in (None, -3 * truth[2].float()):  # of the size of what is added
                adds = before is not None
                run(loss, before)
                quick = backend == "triton"
                for plan, budget in choices(seen[-1][0], one_of_a_kind=quick).items():
                    seen.clear()
                    ours = run(loss, before, memory_budget=budget)
                    assert {entry[1:] for entry in seen} == {(budget, plan)}
                    errors = errors_of(ours, truth)
                    if not all(a <= b for a, b in zip(errors, allowed, strict=True)):
                        wrong.append((loss, plan.words(), adds, errors, allowed))
                    found.append((loss, tuple(plan), adds, *ours[:2]))
    return found, wrong


def ways(folder, size, *case):
    """The ways that two ranks were seen to go, alike and right."""
    folder.mkdir()
    (first, wrong), (second, also) = run_ranks(every_way, 2, folder, size, *case)
    assert wrong == also == []
    for mine, other in zip(first, second, strict=True):
        assert mine[:3] == other[:3], "another plan"
        assert all(map(torch.equal, mine[3:], other[3:])), f"other bits: {mine[:3]}"
    return {kind(chunks.Plan(*plan)) for _, plan, *_ in first}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_way_is_planned_alike_and_right(dtype, tmp_path):
    found = [
        ways(tmp_path / str(size.width), size, dtype, tuple(LOSSES), "torch")
        for size in (WIDE, THIN)
    ]
    expected = WAYS | OF_16_BITS if dtype == torch.bfloat16 else WAYS
    assert set.union(*found) == expected


def test_every_way_of_the_kernels(tmp_path):
    found = ways(tmp_path / "ranks", SMALL, torch.bfloat16, ("mean", "none"), "triton")
    assert found == {"gradient kept", "slices", "held"}


def refused(rank):
    """{what: the error} of budgets that are too small or differ, and of one rank that adds."""
    hidden, head, labels, _ = SMALL.make(torch.float32)
    part = head[SMALL.part(rank)].clone().requires_grad_()
    into = torch.zeros_like(part)

    def tried(function=sgp.parallel.linear_cross_entropy, **how):
        return caught(lambda: function(hidden, part, labels, **how))

    tokens = sgp.parallel.linear_token_log_probs
    return {
        "too small": tried(memory_budget=1),
        "too small for tokens": tried(tokens, memory_budget=1),
        "another": tried(memory_budget=1 << (20 + rank)),
        "another for tokens": tried(tokens, memory_budget=1 << (20 + rank)),
        "one adds": tried(accumulate_into=None if rank else into),
        "of the whole": tried(accumulate_into=torch.zeros_like(head)),
    }


def test_a_budget_that_does_not_fit_or_differs_is_refused_by_all(tmp_path):
    first, second = run_ranks(refused, 2, tmp_path)
    for what, text in {
        "too small": "sgp.parallel.linear_cross_entropy: memory_budget = 1; the least that 20 kept",
        "too small for tokens": "sgp.parallel.linear_token_log_probs: memory_budget = 1; the least",
        "another": "the ranks disagree on the options",
        "another for tokens": "the ranks disagree on the options",
        "one adds": "the ranks disagree on the options",
    }.items():
        assert text in first[what], what
        assert first[what] == second[what], what
    for rank, found in enumerate((first, second)):
        given = f"(440, 24) torch.float32 and local_weight ({SMALL.parts[rank]}, 24) torch.float32"
        assert f"accumulate_into is {given}; expected its shape" in found["of the whole"]


def padded(rank):
    """What a gradient was added to, whose last rows on the last rank are padding."""
    hidden, head, labels, _ = SMALL.make(torch.float32)
    part = head[SMALL.part(rank)]
    part = torch.cat([part, part.new_full((5 * rank, SMALL.width), torch.nan)]).requires_grad_()
    into = torch.ones_like(part)
    for _ in range(2):
        loss = sgp.parallel.linear_cross_entropy(
            hidden, part, labels, vocab_size=len(head), accumulate_into=into
        )
        loss.backward()
    return into.detach(), part.grad


def test_rows_of_padding_are_not_added_to(tmp_path):
    hidden, head, labels, _ = SMALL.make(torch.float32)
    head.requires_grad_()
    sgp.linear_cross_entropy(hidden, head, labels).backward()
    for rank, (into, gradient) in enumerate(run_ranks(padded, 2, tmp_path)):
        assert gradient is None
        own = head.grad[SMALL.part(rank)]
        torch.testing.assert_close(into[: len(own)], 1 + 2 * own)
        assert (into[len(own) :] == 1).all()
        assert len(into) - len(own) == 5 * rank

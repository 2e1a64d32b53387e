"""The divergence of a vocabulary that is split over ranks, for both models: that of one process."""

import itertools
import os

import pytest
import torch

import sgp
from sgp.rows.divergence import KINDS
from sgp.tolerance import relative_error
from tests.ranks import caught, run_ranks

B, T, D, D_T, V = 3, 5, 8, 12, 29
LONGER = V + 3  # the teacher's vocabulary, with padding on the last rank
LIMIT = 1e-5
PLAIN = {}
ALL = {
    "temperature": 2.0,
    "cross_entropy_weight": 0.3,
    "softcap": 5.0,
    "logit_scale": 0.7,
    "teacher_softcap": 4.0,
    "teacher_logit_scale": 1.5,
    "reduction": "none",
}


def make():
    """Both models' hidden states, heads and biases, labels with context, and token weights."""
    random = torch.Generator().manual_seed(5)
    shapes = ((B, T, D), (V, D), (V,), (B, T, D_T), (LONGER, D_T), (LONGER,))
    tensors = [torch.randn(*shape, generator=random) for shape in shapes]
    tensors[0][0, 1] = tensors[3][2, 0] = torch.nan  # context
    labels = torch.randint(V, (B, T), generator=random)
    labels[0, :2] = labels[2, :1] = -100
    return tensors, labels, torch.rand(B, T, generator=random)


def parts_of(x, world, rank, uneven=True):
    """A rank's rows; the last one has what is left."""
    first = V // 2 if uneven else V // world
    sizes = [first, *[(V - first) // max(1, world - 1)] * (world - 1)]
    if world == 4:  # a rank without columns
        sizes = [first, 0, 3, 0]
    sizes[-1] += len(x) - sum(sizes)
    return x.split(sizes)[rank].clone()


def results_of(function, leaves, *arguments, **options):
    """[loss, statistics..., gradients]."""
    loss, stats = function(*leaves[:2], *arguments, return_stats=True, **options)
    loss.backward(torch.ones_like(loss) * 1.5)
    return [loss.detach(), *stats[:4], *(x.grad for x in leaves)]


def heads(rank, world, backend):
    """{kind, options, chunk: this rank's results}."""
    os.environ["SGP_BACKEND"] = backend
    found = {}
    for kind, (name, options) in itertools.product(KINDS, (("plain", PLAIN), ("all", ALL))):
        chunks = ({"chunk_rows": 2}, {"memory_budget": 12_000}, {})
        for chunk in chunks if backend == "torch" else chunks[:1]:
            (h, w, b, h_t, w_t, b_t), labels, weight = make()
            leaves = [x.requires_grad_() for x in (h, parts_of(w, world, rank))]
            bias = parts_of(b, world, rank).requires_grad_()
            found[kind, name, str(chunk)] = results_of(
                sgp.parallel.linear_distillation, [*leaves, bias], labels, h_t,
                parts_of(w_t, world, rank), linear_bias=bias,
                teacher_bias=parts_of(b_t, world, rank), divergence=kind, token_weight=weight,
                **chunk, **options,
            )  # fmt: skip
    return found


@pytest.mark.core
@pytest.mark.parametrize(("world", "backend"), [(2, "torch"), (4, "torch"), (2, "triton")])
def test_split_heads(world, backend, tmp_path):
    results = run_ranks(heads, world, tmp_path, world, backend)
    for key in results[0]:
        kind, name, _ = key
        (h, w, b, h_t, w_t, b_t), labels, weight = make()
        leaves = [x.double().requires_grad_() for x in (h, w, b)]
        truth = results_of(
            sgp.reference.linear_distillation, leaves, labels, h_t.double(), w_t.double(),
            linear_bias=leaves[2], teacher_bias=b_t.double(), divergence=kind, token_weight=weight,
            **{"plain": PLAIN, "all": ALL}[name],
        )  # fmt: skip
        *same, of_head, of_bias = zip(*(found[key] for found in results), strict=True)
        for values, exact in zip(same, truth, strict=False):
            assert all(torch.equal(x, values[0]) for x in values), "the same bits on every rank"
            assert relative_error(values[0].double(), exact.double()) <= LIMIT, key
        for parts, exact in ((of_head, truth[-2]), (of_bias, truth[-1])):
            assert relative_error(torch.cat(parts), exact) <= LIMIT, key


def logits(rank, world, backend):
    """{kind, options: this rank's results} of logits with padding behind the teacher's."""
    os.environ["SGP_BACKEND"] = backend
    found = {}
    for kind, (name, options) in itertools.product(KINDS, (("plain", PLAIN), ("all", ALL))):
        (h, w, _, h_t, w_t, _), labels, _ = make()
        x, t = ((a @ b.T).flatten(0, 1) for a, b in ((h, w), (h_t, w_t)))
        x, t = (parts_of(a.T, world, rank).T.contiguous() for a in (x, t))
        x.requires_grad_()
        loss, stats = sgp.parallel.distillation(
            x, t, labels.flatten(), divergence=kind, return_stats=True, **options
        )
        loss.sum().backward()
        found[kind, name] = [loss.detach(), *stats[:4], x.grad.T]
    return found


@pytest.mark.parametrize(("world", "backend"), [(2, "torch"), (4, "torch"), (2, "triton")])
def test_split_logits(world, backend, tmp_path):
    results = run_ranks(logits, world, tmp_path, world, backend)
    for kind, name in results[0]:
        (h, w, _, h_t, w_t, _), labels, _ = make()
        x = (h.double() @ w.double().T).flatten(0, 1).requires_grad_()
        t = (h_t.double() @ w_t.double().T).flatten(0, 1)
        loss, stats = sgp.reference.distillation(
            x, t, labels.flatten(), divergence=kind, return_stats=True,
            **{"plain": PLAIN, "all": ALL}[name],
        )  # fmt: skip
        loss.sum().backward()
        *same, of_logits = zip(*(found[kind, name] for found in results), strict=True)
        for values, exact in zip(same, (loss.detach(), *stats), strict=False):
            assert all(torch.equal(x, values[0]) for x in values), "the same bits on every rank"
            assert relative_error(values[0].double(), exact.double()) <= LIMIT, (kind, name)
        assert relative_error(torch.cat(of_logits), x.grad.T) <= LIMIT, (kind, name)


def near_one(rank, world):
    """Both models nearly certain of one class, which one rank has; and equal models."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(4, V, generator=random)
    t = x + 0.3 * torch.randn(4, V, generator=random)
    x[:, 3], t[:, 3] = 25.0, 26.0
    t[3] = x[3]
    found = {}
    for kind in KINDS:
        mine = parts_of(x.T, world, rank).T.contiguous().requires_grad_()
        loss = sgp.parallel.distillation(
            mine, parts_of(t.T, world, rank).T.contiguous(), torch.zeros(4, dtype=torch.int64),
            divergence=kind, reduction="none",
        )  # fmt: skip
        loss.sum().backward()
        found[kind] = [x, t, loss.detach(), mine.grad.T]
    return found


def test_nearly_certain_of_the_same_class(tmp_path):
    results = run_ranks(near_one, 2, tmp_path, 2)
    for kind in KINDS:
        x, t, loss, _ = results[0][kind]
        leaf = x.double().requires_grad_()
        exact = sgp.reference.distillation(
            leaf, t.double(), torch.zeros(4, dtype=torch.int64), divergence=kind, reduction="none"
        )
        exact.sum().backward()
        grad = torch.cat([found[kind][3] for found in results]).T
        assert loss[3] == 0
        assert (grad[3] == 0).all()
        torch.testing.assert_close(grad[:3].double(), leaf.grad[:3], rtol=1e-4, atol=1e-25)
        torch.testing.assert_close(loss[:3].double(), exact[:3].detach(), rtol=1e-3, atol=1e-25)


def far_apart(rank, world, backend):
    """One rank holds only what the student excludes, and all that the teacher expects."""
    os.environ["SGP_BACKEND"] = backend
    found = {}
    for low, kind in itertools.product((-200.0, -1e4), KINDS):
        x, t = torch.full((2, V), low), torch.full((2, V), -20.0)
        x[:, 0], t[0, 20:], t[1, 1] = 0.0, 0.0, 0.0
        mine = parts_of(x.T, world, rank).T.contiguous().requires_grad_()
        loss = sgp.parallel.distillation(
            mine, parts_of(t.T, world, rank).T.contiguous(), torch.zeros(2, dtype=torch.int64),
            divergence=kind, reduction="none",
        )  # fmt: skip
        loss.sum().backward()
        found[low, kind] = [x, t, loss.detach(), mine.grad.T]
    return found


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_where_the_student_has_no_probability(backend, tmp_path):
    results = run_ranks(far_apart, 2, tmp_path, 2, backend)
    for low, kind in results[0]:
        x, t, loss, _ = results[0][low, kind]
        leaf = x.double().requires_grad_()
        exact = sgp.reference.distillation(
            leaf, t.double(), torch.zeros(2, dtype=torch.int64), divergence=kind, reduction="none"
        )
        exact.sum().backward()
        grad = torch.cat([found[low, kind][3] for found in results]).T
        torch.testing.assert_close(loss.double(), exact.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(grad.double(), leaf.grad, rtol=1e-5, atol=1e-7)


def disagree(rank):
    """What ranks say that were not called alike, or hold other classes of either model."""
    (h, w, _, h_t, w_t, _), labels, _ = make()

    def call(student, teacher, **options):
        return caught(
            lambda: sgp.parallel.linear_distillation(h, student, labels, h_t, teacher, **options)
        )

    own, theirs = parts_of(w, 2, rank), parts_of(w_t, 2, rank)
    return [
        call(own, theirs, divergence=("jsd", "reverse_kl")[rank]),
        call(own, w_t.tensor_split(2)[rank]),
        call(own, theirs, divergence="jsd", beta=1.0),
        caught(lambda: sgp.parallel.linear_distillation(h, own, labels, [h_t], theirs)),
        caught(
            lambda: sgp.parallel.distillation(
                own.T, sgp.TopK(torch.zeros(8, 1).long(), torch.zeros(8, 1)), labels.flatten()[:8]
            )
        ),
    ]


def test_ranks_that_disagree(tmp_path):
    name = "sgp.parallel.linear_distillation"
    for found in run_ranks(disagree, 2, tmp_path):
        assert f"{name}: the ranks disagree on the options" in found[0]
        assert (
            f"{name}: the ranks hold [14, 15] columns of the student's vocabulary and [16, 16] of "
            "the teacher's" in found[1]
        )
        assert f"{name}: beta = 1.0; expected a number between 0 and 1" in found[2]
        assert "teacher_input = [tensor(" in found[3]
        assert "expected one teacher's tensor" in found[4]

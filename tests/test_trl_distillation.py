"""TRL's own divergences, of its chunked kernel and of its GOLD trainer, beside ours.

TRL's beta is ours; at its ends, 0 and 1, TRL has the two KLs. What it computes in float32 is held
against our definition in float64.
"""

import math
import warnings

import pytest
import torch

import sgp
from tests.divergences import IGNORE, models

KINDS = {0.0: "forward_kl", 0.3: "jsd", 0.8: "jsd", 1.0: "reverse_kl"}
OPTIONS = {
    "plain": {},
    "all": {
        "temperature": 1.7, "softcap": 5.0, "logit_scale": 0.8, "teacher_softcap": 4.0,
        "teacher_logit_scale": 1.2,
    },
}  # fmt: skip
FUNCTIONS = ("reference", "linear_distillation")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(3)


def named(beta):
    """Our words for TRL's beta."""
    kind = KINDS[beta]
    return {"divergence": kind, "beta": beta} if kind == "jsd" else {"divergence": kind}


def heads(N=7, V=50, D=8, D_t=5):
    """Student's hidden states, head and bias, then the teacher's; labels, one of them ignored."""
    shapes = ((N, D), (V, D), (V,), (N, D_t), (V, D_t), (V,))
    target = torch.randint(V, (N,))
    target[2] = IGNORE
    return [torch.randn(shape) for shape in shapes], target


def trl_rows(tensors, kept, beta, options):
    """(one divergence a kept row, entropies) of TRL's chunked kernel."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, head, bias, theirs, their_head, their_bias = tensors
    return ChunkedDivergenceFunction.apply(
        hidden[kept], head, bias, theirs[kept], their_head, their_bias, beta,
        options.get("temperature", 1.0), options.get("logit_scale", 1.0), options.get("softcap"),
        options.get("teacher_logit_scale", 1.0), options.get("teacher_softcap"),
    )  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("beta", KINDS)
def test_the_chunked_kernel_agrees(beta, option, function):
    tensors, target = heads()
    ours_of = sgp.reference.linear_distillation
    if function != "reference":
        ours_of = sgp.linear_distillation
    double = function == "reference"
    theirs = [x.requires_grad_(i < 3) for i, x in enumerate(tensors)]
    rows, entropy = trl_rows(theirs, target != IGNORE, beta, OPTIONS[option])
    upstream = torch.rand(len(rows))
    true = torch.autograd.grad((rows * upstream).sum(), theirs[:3])
    ours = [(x.double() if double else x).detach().requires_grad_() for x in tensors]
    loss, stats = ours_of(
        *ours[:2], target, *ours[3:5], linear_bias=ours[2], teacher_bias=ours[5], reduction="none",
        return_stats=True, **named(beta), **OPTIONS[option],
    )  # fmt: skip
    kept = target != IGNORE
    torch.testing.assert_close(loss[kept].float(), rows, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(stats.entropy[kept].float(), entropy, rtol=1e-5, atol=2e-6)
    found = torch.autograd.grad((loss[kept] * upstream).sum(), ours[:3])
    for value, other in zip(found, true, strict=True):
        torch.testing.assert_close(value.float(), other, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("beta", KINDS)
def test_the_loss_of_gold_agrees(beta, temperature, function):
    """Its "batchmean" divides by the tokens that carry loss, as our mean does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trainer is experimental
        from trl.experimental.gold.gold_trainer import GOLDTrainer
    student, teacher, target = models(6, 40, torch.float64)
    student.requires_grad_()
    theirs = GOLDTrainer.generalized_jsd_loss(
        student.view(2, 3, 40), teacher.view(2, 3, 40), target.view(2, 3), beta, temperature
    )
    (true,) = torch.autograd.grad(theirs, student)
    ours_of = sgp.reference.distillation if function == "reference" else sgp.distillation
    ours = ours_of(student, teacher, target, temperature=temperature, **named(beta))
    (found,) = torch.autograd.grad(ours, student)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-12)


def test_trl_loses_what_is_small_and_we_do_not():
    """Both models nearly certain of the same token: the gradient there is what the others are."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    eye = torch.eye(4)
    s = torch.tensor([[20.0, 0.0, 1.0, -1.0]], requires_grad=True)
    t = torch.tensor([[19.0, 0.5, 0.0, -1.0]])
    rows, _ = ChunkedDivergenceFunction.apply(s, eye, None, t, eye, None, 0.0)
    (theirs,) = torch.autograd.grad(rows.sum(), s)
    p, q = (x.detach().double().softmax(-1) for x in (s, t))
    exact = -(p - q)[0, 1:].sum().item()
    ours = torch.autograd.grad(sgp.distillation(s, t, torch.tensor([0])), s)[0]
    assert ours[0, 0].item() == pytest.approx(exact, rel=1e-4)
    assert not math.isclose(theirs[0, 0].item(), exact, rel_tol=0.5)

"""The oracle (float64) and the tolerance (no worse than PyTorch in the same dtype) of all tests."""

import os

import torch

import sgp


def relative_error(value, truth):
    """The worst row's |value - truth| / |truth| (rows of the last dimension; a row of zeros: 1).

    NaN and infinities must stand where they stand in the truth: otherwise the error is infinite.
    """
    value, truth = value.detach().double().cpu(), truth.detach().double().cpu()
    assert value.shape == truth.shape, f"shape {tuple(value.shape)}, expected {tuple(truth.shape)}"
    special = ~truth.isfinite()
    if not torch.equal(special, ~value.isfinite()) or not torch.equal(
        value[special].nan_to_num(), truth[special].nan_to_num()
    ):
        return float("inf")
    value, truth = value.masked_fill(special, 0), truth.masked_fill(special, 0)
    if truth.dim() < 2:
        value, truth = value.reshape(1, -1), truth.reshape(1, -1)
    scale = truth.norm(dim=-1)
    error = (value - truth).norm(dim=-1) / torch.where(scale > 0, scale, 1)
    return error.max().item() if error.numel() else 0.0


def assert_no_worse(value, plain, truth, *, interpreted=False):
    """`value` is as close to the float64 `truth` as PyTorch's `plain` in the same dtype is.

    Rounding is luck: half as much again is allowed, and four units in the last place of float32,
    in which the arithmetic is done. Under the interpreter bf16 stores truncate, so a kernel's bf16
    result may have twice PyTorch's error, and a whole unit in the last place where PyTorch was
    lucky. A float64 value is compared with a truth that is itself rounded to float64: 64 units.
    """
    ours, theirs = relative_error(value, truth), relative_error(plain, truth)
    bound = 1.5 * theirs if theirs < float("inf") else 0.0
    if value.dtype == torch.float64:
        bound += 64 * torch.finfo(torch.float64).eps
    else:
        bound += 4 * torch.finfo(torch.float32).eps
    if interpreted and value.dtype == torch.bfloat16:
        bound = max(2 * bound, torch.finfo(torch.bfloat16).eps)
    assert ours <= bound, f"relative error {ours:.3g}, PyTorch's {theirs:.3g}, bound {bound:.3g}"


def loss_and_grad(function, logits, target, upstream=None, **options):
    """(loss, gradient of a fresh leaf) of `function`; upstream None stands for ones."""
    leaf = logits.detach().clone().requires_grad_()
    loss = function(leaf, target, **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype))
    return loss.detach(), leaf.grad


def in_float64(options):
    """The same options with every floating-point tensor in float64."""
    return {
        name: value.double()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in options.items()
    }


def check_cross_entropy(logits, target, upstream=None, **options):
    """`sgp.cross_entropy`, loss and gradient, against the reference; returns ours.

    The truth is the reference in float64. The plain PyTorch to be no worse than is the reference
    on the same logits: float32 arithmetic, its gradient rounded once to the logits' dtype.
    """
    reference = sgp.reference.cross_entropy
    truth = loss_and_grad(reference, logits.double(), target, upstream, **in_float64(options))
    plain = loss_and_grad(reference, logits, target, upstream, **options)
    ours = loss_and_grad(sgp.cross_entropy, logits, target, upstream, **options)
    accumulation = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert ours[0].dtype == accumulation, f"loss of {logits.dtype} logits is {ours[0].dtype}"
    assert ours[1].dtype == logits.dtype, f"gradient of {logits.dtype} logits is {ours[1].dtype}"
    interpreted = os.environ.get("SGP_BACKEND") == "triton" and not logits.is_cuda
    assert_no_worse(ours[0], plain[0], truth[0], interpreted=interpreted)
    assert_no_worse(ours[1], plain[1], truth[1], interpreted=interpreted)
    if isinstance(target, torch.Tensor) and not target.is_floating_point():
        ignored = target == options.get("ignore_index", -100)
        rows = ours[1].movedim(1, -1) if ours[1].dim() > 1 else ours[1]
        assert not rows[ignored].any(), "the gradient of an ignored row is not exactly zero"
    return ours

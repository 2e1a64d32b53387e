"""The oracle (float64) and the tolerance (no worse than PyTorch in the same dtype) of all tests."""

import os

import torch

import sgp
from sgp.tolerance import bound, relative_error


def assert_no_worse(value, plain, truth, *, interpreted=False):
    """`value` is as close to the float64 `truth` as PyTorch's `plain` in the same dtype is.

    The measure and the bound are those of `sgp verify`.
    """
    ours, theirs = relative_error(value, truth), relative_error(plain, truth)
    limit = bound(theirs, value.dtype, interpreted=interpreted)
    assert ours <= limit, f"relative error {ours:.3g}, PyTorch's {theirs:.3g}, bound {limit:.3g}"


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


def sample_results(function, sample, upstream=None):
    """[loss, gradient of every tensor that requires grad] of one of PyTorch's sample inputs."""
    given = (sample.input, *sample.args, *sample.kwargs.values())
    inputs = [x for x in given if isinstance(x, torch.Tensor) and x.requires_grad]
    loss = function(sample.input, *sample.args, **sample.kwargs)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, inputs, upstream)]


def sample_in(dtype, sample):
    """The sample with every floating-point tensor in this dtype, leaves as they were."""

    def converted(x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return x.detach().to(dtype).requires_grad_(x.requires_grad)

    return sample.transform(converted)


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


def rows_of_infinities(V):
    """(logits (10, V), targets): infinities, NaN and ties, wherever a row may have them."""
    inf, nan = float("inf"), float("nan")
    x = 3 * torch.randn(10, V, generator=torch.Generator().manual_seed(5))
    middle, last = V // 2, V - 1
    x[0, middle] = inf  # the target
    x[1, [middle, last]] = inf  # the target, and another
    x[2, last] = inf  # another
    x[3, middle] = nan  # and the target is the largest of the rest
    x[4, [0, middle]] = torch.tensor([inf, nan])
    x[5, [middle, last]] = torch.tensor([nan, inf])
    x[6] = -inf
    x[7] = nan
    x[8, [1, middle, last]] = 20.0
    x[9] = -inf
    x[9, last] = 1.0
    largest = int(x[3].nan_to_num(-inf).argmax())
    return x, torch.tensor([middle, middle, 0, largest, 0, 0, 0, 0, last, last])

"""`sgp.linear_cross_entropy` and its module: values, gradients, refusals, and what they cost."""

# ruff: noqa: ARG001  (fixtures are asked for by name, for what they do)

import copy
import itertools
import math
import pickle
import shutil
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import func
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils.checkpoint import checkpoint

import sgp
from sgp import chunks, head_operators, problem
from sgp.tolerance import bound
from sgp.train.memory import cpu_peak
from tests.oracle import in_float64, relative_error

IGNORE = -100
INF, NAN = math.inf, math.nan
N, V, D = 6, 11, 5
REDUCTIONS = ["mean", "sum", "none", "sequence_sum", "sequence_mean"]
EARLY_OR_LATE = ["mean", "none"]  # gradients come with the loss, or in backward
SECOND = "no second derivative"

reference = sgp.reference.linear_cross_entropy


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(23)


@pytest.fixture
def hidden(device):
    return torch.randn(N, D, device=device, requires_grad=True)


@pytest.fixture
def head(device):
    return torch.randn(V, D, device=device, requires_grad=True)


@pytest.fixture
def bias(device):
    return torch.randn(V, device=device, requires_grad=True)


@pytest.fixture
def target(device):
    return torch.tensor([3, IGNORE, 10, 0, IGNORE, 3], device=device)


def run(function, tensors, target, upstream=None, needs=(True, True, True), **options):
    """[loss, gradient of input, of linear_weight, of linear_bias]: None where there is none.

    The leaves are the tensors themselves, with their strides; `upstream` None stands for ones.
    """
    leaves = [
        None if x is None else x.detach().requires_grad_(needed)
        for x, needed in zip(tensors, needs, strict=True)
    ]
    loss = function(*leaves[:2], target, linear_bias=leaves[2], **options)
    if any(needs):
        loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype))
    return [loss.detach(), *(None if x is None else x.grad for x in leaves)]


def in_double(tensors):
    return [None if x is None else x.double() for x in tensors]


def assert_right(ours, plain, truth, *, backend="torch", roundings=1):
    """Every number is no worse than PyTorch's in the same dtype; `roundings` as in `bound`."""
    names = ("loss", "input.grad", "linear_weight.grad", "linear_bias.grad")
    for name, value, other, exact in zip(names, ours, plain, truth, strict=True):
        if exact is None:
            assert value is None, f"{name}: a gradient that nobody wanted"
            continue
        assert value.dtype == other.dtype, f"{name} is {value.dtype}"
        limit = bound(
            relative_error(other, exact),
            value.dtype,
            interpreted=backend == "triton" and not value.is_cuda,
            roundings=1 if name == "loss" else roundings,
        )
        error = relative_error(value, exact)
        assert error <= limit, f"{name}: relative error {error:.3g}, bound {limit:.3g}"


def check(
    tensors, target, upstream=None, *, chunk_rows=None, backend="torch", needs=(True,) * 3,
    roundings=1, **options,
):  # fmt: skip
    """Loss and gradients against the reference; returns ours.

    The truth is the reference in float64; the plain PyTorch to be no worse than is the reference
    on the same tensors: float32 arithmetic, gradients rounded once to the tensors' dtype.
    """
    truth = run(reference, in_double(tensors), target, upstream, needs, **in_float64(options))
    plain = run(reference, tensors, target, upstream, needs, **options)
    ours = run(
        sgp.linear_cross_entropy, tensors, target, upstream, needs, chunk_rows=chunk_rows, **options
    )
    assert_right(ours, plain, truth, backend=backend, roundings=roundings)
    return ours


def bits(x):
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.detach().contiguous().view(sizes[x.element_size()])


def assert_positive_zero(grad):
    assert not bits(grad).any(), "the gradient is not +0.0, bit by bit"


def upstream_of(reduction, shape):
    """Random upstream gradients; `shape` is that of the target, a sequence a row."""
    shape = {"none": shape, "sequence_sum": shape[:-1], "sequence_mean": shape[:-1]}.get(
        reduction, ()
    )
    return torch.randn(shape)


# -- (a) PyTorch's own sample inputs ---------------------------------------------------------------

SAMPLES = {
    op.variant_test_name or "plain": op
    for op in op_db
    if op.name == "nn.functional.linear_cross_entropy"
}
if not SAMPLES and hasattr(F, "linear_cross_entropy"):
    raise RuntimeError("PyTorch's op_db has lost its samples of linear_cross_entropy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", SAMPLES)  # PyTorch 2.12 and later; before, nothing to run
def test_pytorch_sample_inputs(variant, dtype, device):
    """Loss (in PyTorch's dtype) and all gradients; `options` may ask for what it wants."""
    samples = list(SAMPLES[variant].sample_inputs(device, dtype, requires_grad=True))
    assert len(samples) >= 20, f"PyTorch's op_db has {len(samples)} samples of this"
    for sample in samples:
        head, target = (argument.detach() for argument in sample.args)
        options = dict(sample.kwargs)
        exact_options = in_float64({k: v for k, v in options.items() if k != "options"})
        tensors = [sample.input.detach(), head, options.pop("linear_bias", None)]
        exact_options.pop("linear_bias", None)
        plain_run = partial(run, F.linear_cross_entropy, tensors, target)
        upstream = None
        if options.get("reduction") == "none":
            upstream = torch.randn(plain_run(**options)[0].shape, device=device)
        plain = plain_run(upstream, **options)
        exact_target = target.double() if target.is_floating_point() else target
        truth = run(
            F.linear_cross_entropy, in_double(tensors), exact_target, upstream, **exact_options
        )
        ours = run(sgp.linear_cross_entropy, tensors, target, upstream, **options)
        if truth[0].isnan().all():  # a deliberate difference: the mean of nothing is 0
            truth, plain = ([torch.nan_to_num(x) for x in some if x is not None] for some in (truth, plain))
            ours = [x for x in ours if x is not None]
        assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        ours[0] = ours[0].to(dtype)  # the other one: the loss of bf16 is not rounded
        # `plain` has bf16 logits and one more rounding a step, but is luckier on 3 numbers.
        torch.testing.assert_close(ours[0], plain[0], equal_nan=True)
        if dtype == torch.bfloat16:
            for value, other, exact in zip(ours[1:], plain[1:], truth[1:], strict=True):
                if exact is not None:
                    torch.testing.assert_close(value, exact.to(dtype))
                    assert value.dtype == other.dtype
        else:
            for value, other in zip(ours[1:], plain[1:], strict=True):
                torch.testing.assert_close(value, other)

"""The edge cases that break the libraries of this field, by their number in the project's list.

Rows 9 and 14 concern the linear head and the sharded vocabulary and are tested there. Every test
runs on PyTorch's operators and on both forms of the kernel.
"""

# ruff: noqa: ARG001  (fixtures are asked for by name, for what they do)

import ast
import copy
import math
import pickle
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import sgp
from bench.proof.interpreter import watch_accesses
from sgp.rows import backend as backends
from sgp.rows import by_triton, operators, problem
from tests.oracle import assert_no_worse, check_cross_entropy, loss_and_grad, relative_error

IGNORE = -100
INF, NAN = math.inf, math.nan
REDUCTIONS = ["mean", "sum", "none", "sequence_sum", "sequence_mean"]


# Left alone, the launch table holds rows of up to 4096 columns on chip and streams longer ones.
TORCH, RESIDENT, STREAMING = ("torch", "auto"), ("triton", "auto"), ("triton", "staying")
NAMES = {TORCH: "torch", RESIDENT: "auto-resident", STREAMING: "staying-streaming"}


@pytest.fixture(autouse=True, params=NAMES, ids=NAMES.values())
def implementation(request, monkeypatch):
    """Every implementation of a row, by the environment that selects it, under a bounds check."""
    torch.manual_seed(21)
    name, form = request.param
    monkeypatch.setenv("SGP_BACKEND", name)
    monkeypatch.setenv("SGP_ROW_FORM", form)
    with watch_accesses() if name == "triton" else nullcontext():
        yield request.param


def only(*implementations):
    """The implementations that a test is about, where it is not about all."""
    names = [NAMES[i] for i in implementations]
    return pytest.mark.parametrize("implementation", implementations, indirect=True, ids=names)


ONCE = only(TORCH)  # no row kernel takes part
KERNELS = only(RESIDENT, STREAMING)


def bits(tensor):
    return tensor.contiguous().view(
        {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    )


def assert_positive_zero(grad):
    assert not bits(grad).any(), "the gradient is not +0.0, bit by bit"


# -- 1. strides ------------------------------------------------------------------------------------


def test_row_01_transposed(device):
    logits = torch.randn(9, 3, device=device).t()
    check_cross_entropy(logits, torch.tensor([8, IGNORE, 0], device=device))
    view = logits.detach().requires_grad_()
    sgp.cross_entropy(view, torch.tensor([8, IGNORE, 0], device=device)).backward()
    expected = loss_and_grad(
        F.cross_entropy, logits.contiguous(), torch.tensor([8, IGNORE, 0], device=device)
    )[1]
    assert_no_worse(view.grad, expected, expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_row_01_slice_of_time_of_three_dimensions(inplace, device):
    base = torch.randn(2, 4, 9, device=device, requires_grad=True)
    labels = torch.tensor([[0, 1, IGNORE], [3, IGNORE, 8]], device=device)
    loss = sgp.cross_entropy((base * 1)[:, :-1], sgp.Selection.from_labels(labels), inplace=inplace)
    loss.backward()
    twin = base.detach().clone().requires_grad_()
    expected = F.cross_entropy(twin[:, :-1].reshape(6, 9), labels.view(6))
    expected.backward()
    assert_no_worse(loss, expected, expected)
    assert_no_worse(base.grad, twin.grad, twin.grad)
    assert not base.grad[:, -1].any(), "the last token of each row was not in the slice"


def test_row_01_rows_of_stride_zero(device):
    row = torch.randn(9, device=device, requires_grad=True)
    target = torch.tensor([0, IGNORE, 8], device=device)
    sgp.cross_entropy(row.expand(3, 9), target, reduction="sum").backward()
    twin = row.detach().clone().requires_grad_()
    F.cross_entropy(twin.expand(3, 9), target, reduction="sum").backward()
    assert_no_worse(row.grad, twin.grad, twin.grad)


# -- 2. minus infinity, and logits far from zero ---------------------------------------------------


def test_row_02_first_block_all_minus_inf(device, monkeypatch):
    V = 70_000
    logits = torch.randn(2, V, device=device)
    logits[:, :40_000] = -INF
    target = torch.tensor([V - 1, 50_000], device=device)
    _, grad = check_cross_entropy(logits, target)
    assert not grad[:, :40_000].any()


@pytest.mark.parametrize("y", [0, 3, 129])
def test_row_02_everything_but_the_target_minus_inf(y, device):
    logits = torch.full((1, 130), -INF, device=device)
    logits[0, y] = 2.5
    loss, grad = check_cross_entropy(logits, torch.tensor([y], device=device))
    assert loss.item() == 0.0
    assert not grad.any()


def test_row_02_impossible_target(device):
    logits = torch.tensor([[0.0, -INF, 1.0]], device=device)
    loss, _ = check_cross_entropy(logits, torch.tensor([1], device=device))
    assert loss.item() == INF


def test_row_02_a_masked_class_of_weight_zero_takes_no_part_in_smoothing(device):
    """0 x inf is 0: a class that is masked out and weighs nothing leaves the loss as it is."""
    logits = torch.tensor([[1.0, 2.0, -INF, 0.5]], device=device)
    weight = torch.tensor([1.0, 3.0, 0.0, 2.0], device=device)
    loss, grad = check_cross_entropy(
        logits, torch.tensor([0], device=device), weight=weight, label_smoothing=0.3
    )
    assert loss.isfinite()
    assert not grad[0, 2]


def test_row_02_smoothing_and_an_impossible_target_among_negative_weights(device):
    """A loss of inf; the mean weight, negative here, must not meet the infinity."""
    logits = torch.tensor([[-INF, 2.0, 0.5]], device=device)
    options = {"label_smoothing": 0.1, "reduction": "sum"}
    options["weight"] = torch.tensor([1.0, -3.0, 1.0], device=device)
    target = torch.tensor([0], device=device)
    assert sgp.cross_entropy(logits, target, **options).item() == INF
    assert F.cross_entropy(logits, target, **options).item() == INF


@pytest.mark.parametrize("V", [1, 3, 300])
def test_row_02_whole_row_minus_inf_is_nan_as_in_pytorch(V, device):
    """0 / 0: there is no distribution, and a loss of 0 would say that all is well."""
    logits = torch.full((2, V), -INF, device=device)
    logits[1] = 0.0
    target = torch.tensor([0, 0], device=device)
    loss, grad = loss_and_grad(sgp.cross_entropy, logits, target, reduction="none")
    assert grad[0].isnan().all()
    assert loss[0].isnan(), f"the loss is {loss[0].item()}"
    assert loss[1].item() == pytest.approx(math.log(V), abs=1e-6)
    assert grad[1].isfinite().all()


@pytest.mark.parametrize("y", [0, 2])
def test_row_02_plus_infinity_is_nan_as_in_pytorch(y, device):
    """inf - inf: overflowed logits must not report a loss of 0."""
    logits = torch.tensor([[INF, 0.0, 1.0]], device=device)
    loss, grad = loss_and_grad(sgp.cross_entropy, logits, torch.tensor([y], device=device))
    assert grad.isnan().all()
    assert loss.isnan(), f"the loss is {loss.item()}"


@pytest.mark.parametrize("offset", [-1e4, -95.0, -80.0, 1000.0, 1e4])
def test_row_02_logits_far_from_zero(offset, device):
    """Log-probabilities, masks of -1e4: exp of a maximum below -88 must not overflow anything."""
    logits = torch.randn(2, 300, device=device).mul(64).round().div(64) + offset
    target = torch.tensor([0, 299], device=device)
    check_cross_entropy(logits, target, reduction="none")
    with torch.no_grad():
        _, stats = sgp.cross_entropy(logits, target, return_stats=True)
    truth = sgp.reference.token_log_probs(logits.double(), target)
    for field in ("log_prob", "entropy", "lse"):
        assert relative_error(getattr(stats, field), getattr(truth, field)) < 1e-6, field


def test_row_02_scores_far_apart_under_a_negative_scale(device):
    """The largest score is the smallest logit's; exponents from another would overflow."""
    logits = torch.linspace(-150, 20, 131, device=device).repeat(2, 1)
    check_cross_entropy(logits, torch.tensor([0, 65], device=device), logit_scale=-1.0)


def test_row_02_block_far_below_the_next(device, monkeypatch):
    """The running maximum starts at -inf, passes through -1e4 and ends at 0, block by block."""
    V = 40_000
    logits = torch.randn(1, V, device=device)
    logits[:, :16_384] = -INF
    logits[:, 16_384:32_768] -= 1e4
    check_cross_entropy(logits, torch.tensor([35_000], device=device), label_smoothing=0.0)


# -- 3, 4. what is ignored -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("poison", "dtype"),
    [(NAN, torch.float32), (INF, torch.bfloat16), (-INF, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_row_03_poison_in_an_ignored_row(reduction, dtype, poison, device):
    logits = torch.randn(3, 9, device=device).to(dtype)
    logits[1] = poison
    target = torch.tensor([4, IGNORE, 8], device=device)
    loss, grad = loss_and_grad(
        sgp.cross_entropy, logits, target, reduction=reduction, label_smoothing=0.1,
        lse_square_scale=0.1,
    )  # fmt: skip
    assert loss.isfinite().all()
    assert grad.isfinite().all()
    assert_positive_zero(grad[1])


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("factor", [0.0, -1.0, INF, NAN])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_row_03_upstream_factor_does_not_reach_an_ignored_row(reduction, factor, inplace, device):
    leaf = torch.randn(3, 9, device=device)
    leaf[1] = NAN
    leaf.requires_grad_()
    logits = leaf * 1
    loss = sgp.cross_entropy(
        logits,
        torch.tensor([4, IGNORE, 8], device=device),
        reduction=reduction,
        inplace=inplace,
    )
    (grad,) = torch.autograd.grad(loss.sum() * factor, logits)
    assert_positive_zero(grad[1])
    if factor in (INF, NAN):
        assert not grad[[0, 2]].isfinite().any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_row_04_everything_ignored(inplace, dtype, reduction, device):
    leaf = torch.full((2, 9), NAN, device=device, dtype=dtype, requires_grad=True)
    target = torch.full((2,), IGNORE, device=device)
    logits = leaf * 1
    loss, stats = sgp.cross_entropy(
        logits, target, reduction=reduction, return_stats=True, return_argmax=True, inplace=inplace
    )
    assert loss.requires_grad, "the loss stays connected: data parallelism waits for this gradient"
    assert not loss.any()
    assert not any(value.any() for value in stats)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert_positive_zero(grad)


def test_row_04_one_strided_row_ignored_in_place(device):
    base = torch.randn(18, device=device, requires_grad=True)
    logits = (base * 1)[::2]
    target = torch.tensor(IGNORE, device=device)
    sgp.cross_entropy(logits, target, inplace=True).backward()
    assert_positive_zero(base.grad)


def test_row_04_one_row_of_several_ignored_in_place(device):
    base = torch.randn(3, 5, device=device, requires_grad=True)
    target = torch.tensor([1, IGNORE, 2], device=device)
    loss = sgp.cross_entropy(base * 1, target, inplace=True)
    (grad,) = torch.autograd.grad(loss, base)
    plain = F.cross_entropy(base, target)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(grad, torch.autograd.grad(plain, base)[0])


# -- 5. targets outside the vocabulary -------------------------------------------------------------


@ONCE
@pytest.mark.parametrize("bad", [-1, 9, 2**31, 2**40, -(2**40)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_row_05_bad_target_raises_where_nothing_waits(bad, reduction):
    logits = torch.randn(2, 9, requires_grad=True)
    with pytest.raises(IndexError, match=rf"target\[1\] = {bad} is outside \[0, 9\)"):
        sgp.cross_entropy(logits, torch.tensor([0, bad]), reduction=reduction)


@pytest.mark.parametrize("bad", [-1, 9, 300, 2**32 + 1, -(2**40)])  # 2^32 + 1 is 1 in 32 bits
@pytest.mark.parametrize(("options", "reduction"), [("plain", "mean"), ("all", "none")])
def test_row_05_bad_target_is_nan_where_a_check_would_wait(
    options, bad, reduction, device, monkeypatch
):
    """As on a GPU: memory safe (the bounds check is on), never a silent number or a silent zero."""
    monkeypatch.setattr(problem, "may_wait", lambda _: False)
    keywords = {}
    if options == "all":
        keywords = {
            "weight": torch.rand(9, device=device) + 0.1,
            "label_smoothing": 0.1,
            "softcap": 5.0,
            "lse_square_scale": 0.1,
        }
    logits = torch.randn(3, 9, device=device)
    target = torch.tensor([0, bad, IGNORE], device=device)
    loss, grad = loss_and_grad(sgp.cross_entropy, logits, target, reduction=reduction, **keywords)
    assert grad[1].isnan().all()
    assert_positive_zero(grad[2])
    if reduction == "mean":
        assert loss.isnan()
    else:
        assert loss.isnan().tolist() == [False, True, False]
        assert grad[0].isfinite().all()


# -- 6, 7. upstream gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_row_06_upstream_that_differs_by_row(dtype, device):
    logits = torch.randn(4, 9, device=device).to(dtype)
    target = torch.tensor([0, 8, IGNORE, 3], device=device)
    upstream = torch.tensor([1.0, -2.0, 5.0, 0.0], device=device)
    _, grad = check_cross_entropy(logits, target, upstream, reduction="none")
    assert not grad[3].any(), "an upstream gradient of 0"
    _, single = loss_and_grad(sgp.cross_entropy, logits[1:2], target[1:2], reduction="none")
    torch.testing.assert_close(grad[1:2], -2 * single, rtol=2e-3, atol=0.0)


def test_row_06_upstream_of_stride_zero(device):
    logits = torch.randn(3, 9, device=device)
    target = torch.tensor([0, 8, 3], device=device)
    upstream = torch.tensor(0.5, device=device).expand(3)
    check_cross_entropy(logits, target, upstream, reduction="none")
    check_cross_entropy(logits, target, upstream[:1], reduction="sequence_mean")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_row_07_second_backward_raises(reduction, device):
    logits = torch.randn(2, 9, device=device, requires_grad=True)
    loss = sgp.cross_entropy(logits, torch.tensor([0, 8], device=device), reduction=reduction)
    (3 * loss).backward(retain_graph=True)
    first = logits.grad.clone()
    with pytest.raises(RuntimeError, match="backward a second time"):
        (3 * loss).backward()
    assert torch.equal(logits.grad, first), "the failed backward changed the gradient"


@pytest.mark.parametrize("reduction", ["none", "sequence_sum", "sequence_mean"])
def test_row_07_second_backward_doubles_exactly(reduction, device):
    logits = torch.randn(2, 9, device=device, requires_grad=True)
    loss = sgp.cross_entropy(logits, torch.tensor([0, 8], device=device), reduction=reduction)
    loss.sum().backward(retain_graph=True)
    first = logits.grad.clone()
    loss.sum().backward()
    assert torch.equal(logits.grad, 2 * first)


# -- 8. the caller's tensors -----------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_row_08_the_callers_tensors_are_untouched(dtype, reduction, device):
    given = {
        "input": torch.randn(3, 9, device=device).to(dtype).requires_grad_(),
        "target": torch.tensor([0, IGNORE, 8], device=device),
        "weight": torch.rand(9, device=device),
        "token_weight": torch.rand(3, device=device),
    }
    before = {name: value.detach().clone() for name, value in given.items()}
    versions = {name: value._version for name, value in given.items()}
    loss, _ = sgp.cross_entropy(
        **given, reduction=reduction, return_stats=True, softcap=3.0, logit_scale=2.0,
        label_smoothing=0.1,
    )  # fmt: skip
    (2 * loss).sum().backward()
    for name, value in given.items():
        assert torch.equal(bits(value.detach()), bits(before[name])), f"{name} was overwritten"
        assert value._version == versions[name], f"{name}'s version counter moved"


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_row_08_logits_are_usable_after_the_loss(reduction, device):
    base = torch.randn(3, 9, device=device, requires_grad=True)
    target = torch.tensor([0, IGNORE, 8], device=device)
    logits = base.exp()  # saves its output: overwriting the logits would be an error here
    loss = sgp.cross_entropy(logits, target, reduction=reduction).sum() + logits.square().sum()
    loss.backward()
    twin = base.detach().clone().requires_grad_()
    logits = twin.exp()
    (F.cross_entropy(logits, target, reduction=reduction).sum() + logits.square().sum()).backward()
    assert_no_worse(base.grad, twin.grad, twin.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_row_08_overwritten_logits_are_noticed(dtype, device):
    base = torch.randn(3, 9, device=device).to(dtype).requires_grad_()
    logits = base.exp()
    version = logits._version
    loss = sgp.cross_entropy(logits, torch.tensor([0, 1, 8], device=device), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # exp's backward needs the logits that are gone
    assert logits._version > version


# -- 10, 11. sixteen bits --------------------------------------------------------------------------


def test_row_10_loss_of_bf16_logits_is_not_rounded(device):
    logits = torch.zeros(3, 46_200, device=device, dtype=torch.bfloat16)[:, :9_000]
    target = torch.tensor([0, 1, 2], device=device)
    logits[:, 3] = 5.0  # any value off the target
    exact = F.cross_entropy(logits.double(), target).item()
    for leaf in (logits, logits.clone().requires_grad_()):  # alone, and with its gradient
        loss = sgp.cross_entropy(leaf, target)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact, rel=1e-6)
    assert abs(loss.bfloat16().item() - exact) > 1e-4, "this case does not show rounding to bf16"


def test_row_10_losses_of_many_tokens_are_added_in_float32(device):
    N = 8
    logits = torch.randn(N, 300, device=device).bfloat16()
    target = torch.arange(N, device=device)
    exact = F.cross_entropy(logits.double(), target, reduction="sum")
    for leaf in (logits, logits.clone().requires_grad_()):
        total = sgp.cross_entropy(leaf, target, reduction="sum")
        assert total.dtype == torch.float32
        assert relative_error(total, exact) < 1e-6


def test_row_11_float16_keeps_its_small_gradients(device):
    """1 / N = 2^-15 folded in before the scaler's 2^16: PyTorch's way flushes the tail to zero."""
    N, V = 2**15, 3_000
    logits = torch.randn(2, V, device=device).half()
    target = torch.tensor([0, 1], device=device)
    leaf = logits.clone().requires_grad_()
    (sgp.cross_entropy(leaf, target, denominator=N) * 2.0**16).backward()
    truth = (logits.double().softmax(1) - F.one_hot(target, V)) * 2.0
    off_target = F.one_hot(target, V) == 0
    mass = leaf.grad.double()[off_target].sum() / truth[off_target].sum()
    assert abs(mass - 1) < 1e-3, f"{mass:.1%} of the off-target mass is left"
    assert_no_worse(leaf.grad, truth.half(), truth)


def test_row_11_float16_scaler_overflow_is_infinite_not_wrong(device):
    leaf = torch.randn(2, 9, device=device).half().requires_grad_()
    loss = sgp.cross_entropy(leaf, torch.tensor([0, IGNORE], device=device))
    (loss * 2.0**24).backward()
    assert leaf.grad[0].isinf().any(), "what the scaler looks for, to skip the step"
    assert_positive_zero(leaf.grad[1])


# -- 12. softcap -----------------------------------------------------------------------------------


@pytest.mark.parametrize("V", [77, 257, 8_104])
def test_row_12_softcap_of_padded_lanes(V, device):
    """All logits near -cap: lanes past V, capped to 0 or to -cap, would outweigh or equal them."""
    logits = torch.randn(1, V, device=device) - 20.0
    check_cross_entropy(logits, torch.tensor([V - 1], device=device), softcap=5.0)


@pytest.mark.parametrize("value", [0.0, 1e-6, 1e-3, 1.0, 1e3, 1e30, INF])
@pytest.mark.parametrize("logit_scale", [1.0, -2.0])
def test_row_12_softcap_at_every_size(logit_scale, value, device):
    logits = torch.tensor([[value, -value, 0.5]], device=device)
    loss, grad = check_cross_entropy(
        logits, torch.tensor([1], device=device), softcap=5.0, logit_scale=logit_scale
    )
    assert loss.isfinite()
    assert grad.isfinite().all()


# -- 13. a target that is nearly certain -----------------------------------------------------------


@pytest.mark.parametrize("exponent", [-1, -3, -5, -6, -7, -8, -12, -30])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_row_13_nearly_certain_target(exponent, reduction, device):
    gap = -exponent * math.log(10.0)
    logits = torch.randn(1, 50, device=device)
    logits[0, 7] = logits.logsumexp(1).item() + gap
    target = torch.tensor([7], device=device)
    exact_logits = logits.double()
    others = exact_logits.clone()
    others[0, 7] = -INF
    odds = (others.logsumexp(1) - exact_logits[0, 7]).exp()  # (1 - p) / p
    loss, grad = loss_and_grad(sgp.cross_entropy, logits, target, reduction=reduction)
    assert loss.item() == pytest.approx(odds.log1p().item(), rel=3e-6), "the loss lost its digits"
    p_off = (odds / (1 + odds)).item()
    assert grad[0, 7].item() == pytest.approx(-p_off, rel=3e-6), "p - 1 lost its digits"
    assert grad[0].double().sum().abs().item() <= 1e-6 * p_off


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_row_13_bf16_gradient_of_a_nearly_certain_target(factor, device):
    """Stored in bf16, reloaded and then reduced by 1, it would be exactly 0 above p = 0.998."""
    logits = torch.zeros(1, 50, device=device, dtype=torch.bfloat16)
    logits[0, 7] = 12.0
    leaf = logits.clone().requires_grad_()
    (factor * sgp.cross_entropy(leaf, torch.tensor([7], device=device))).backward()
    p_off = 49 / (49 + math.exp(12.0))
    assert leaf.grad[0, 7].item() == pytest.approx(-factor * p_off, rel=2**-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_row_13_smoothing_over_one_class_leaves_the_z_loss_alone(reduction, device):
    """Its share of the gradient, hundreds of times the z-loss's, is exactly 0."""
    logits = torch.tensor([[0.7], [-1.3], [30.0]], device=device)
    target = torch.zeros(3, dtype=torch.int64, device=device)
    for weight in (None, torch.tensor([0.7], device=device)):
        check_cross_entropy(
            logits, target, weight=weight, reduction=reduction, label_smoothing=0.1,
            lse_square_scale=1e-3,
        )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_row_13_smoothing_towards_one_class_that_is_nearly_certain(reduction, device):
    """All of the class weight is the target's: its gradient is -w s_o / d, of which p - 1 loses."""
    logits = torch.tensor([[0.3, 17.0, -0.2]], device=device)
    weight = torch.tensor([0.0, 1.0, 0.0], device=device)
    target = torch.tensor([1], device=device)
    options = {"label_smoothing": 0.4, "reduction": reduction}
    _, grad = loss_and_grad(sgp.cross_entropy, logits, target, weight=weight, **options)
    p = logits.double().softmax(1)
    factor = 0.6 + 0.4 / 3
    assert grad[0, 1].item() == pytest.approx(-factor * (p[0, 0] + p[0, 2]).item(), rel=1e-6)


# -- 15. nothing is computed that nobody asked for -------------------------------------------------


@contextmanager
def counted_operators(monkeypatch):
    """Names of the package's operators as they run, and the elements of the gradients they make."""
    ran = []
    for name in ("row_forward", "row_forward_", "row_backward", "row_backward_", "multiply_rows_"):
        operator = getattr(operators, name)

        def counted(*arguments, name=name, operator=operator):
            out = operator(*arguments)
            last = out[-1] if isinstance(out, tuple) else out
            ran.append((name, 0 if last is None else last.numel()))
            return out

        monkeypatch.setattr(operators, name, counted)
    yield ran


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "frozen", "detached"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("inplace", [False, True])
def test_row_15_no_gradient_that_nobody_wants(inplace, reduction, how, device, monkeypatch):
    logits = torch.randn(2, 9, device=device, requires_grad=how in ("no_grad", "inference_mode"))
    if how == "detached":
        logits = (logits * 2).detach()
    before = logits.detach().clone()
    contexts = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with counted_operators(monkeypatch) as ran, contexts.get(how, torch.enable_grad)():
        loss = sgp.cross_entropy(
            logits, torch.tensor([0, 8], device=device), reduction=reduction, inplace=inplace
        )
    assert ran == [("row_forward", 0)], "one launch, no gradient allocated"
    assert not loss.requires_grad
    assert torch.equal(logits.detach(), before)


def test_row_15_a_loss_without_backward_saves_a_few_bytes_a_row(device, monkeypatch):
    with counted_operators(monkeypatch) as ran:
        logits = torch.randn(2, 9, device=device, requires_grad=True)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            sgp.cross_entropy(logits, torch.tensor([0, 8], device=device), reduction="none")
    assert ran == [("row_forward", 0)], "the gradient of 'none' is computed in backward, or never"
    own = [t for t in saved if t.data_ptr() != logits.data_ptr() and t.is_floating_point()]
    assert sum(t.numel() * t.element_size() for t in own) <= 2 * 16, "12 of statistics, 4 of loss"


# -- 16. whose count divides -----------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_row_16_micro_batches_with_the_count_of_the_whole(weighted, device):
    logits = torch.randn(6, 9, device=device)
    target = torch.tensor([0, 8, IGNORE, IGNORE, IGNORE, 4], device=device)
    weight = torch.rand(6, device=device) if weighted else torch.ones(6, device=device)
    whole = loss_and_grad(sgp.cross_entropy, logits, target, token_weight=weight)
    count = weight[target != IGNORE].sum()  # all_reduce'd over ranks and micro-batches
    parts = [
        loss_and_grad(
            sgp.cross_entropy, logits[part], target[part], token_weight=weight[part],
            denominator=count,
        )
        for part in (slice(0, 1), slice(1, 5), slice(5, 6))
    ]  # fmt: skip
    assert relative_error(sum(loss for loss, _ in parts), whole[0]) < 5e-7
    assert relative_error(torch.cat([grad for _, grad in parts]), whole[1]) < 5e-7


@ONCE
def test_row_16_a_number_divides_float64_in_float64(monkeypatch):
    monkeypatch.setenv("SGP_BACKEND", "torch")
    logits, target = torch.randn(2, 5, dtype=torch.float64), torch.tensor([1, 3])
    loss = sgp.cross_entropy(logits, target, denominator=3.0)
    assert abs(loss - sgp.cross_entropy(logits, target, reduction="sum") / 3) < 1e-15


# -- 17. nothing waits for the device --------------------------------------------------------------

ROOT = Path(sgp.__file__).parent
WAITS = {"item", "cpu", "tolist", "numpy", "nonzero", "unique", "masked_select", "synchronize"}


@ONCE
@pytest.mark.parametrize(
    "path",
    [*sorted((ROOT / "kernels").glob("*.py")), ROOT / "rows" / "by_triton.py"],
    ids=lambda p: p.name,
)
def test_row_17_the_way_to_the_kernels_reads_no_value(path):
    tree = ast.parse(path.read_text())
    found = [
        f"{path.name}:{node.lineno} .{node.func.attr}()"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in WAITS
    ]
    assert not found, f"waits for the device: {found}"


class NoWaiting(TorchDispatchMode):
    """Raises where PyTorch would wait for a GPU; looks inside the package's operators too."""

    FORBIDDEN = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "sgp":
            with self:
                return getattr(operators, name).kernel(*args, **(kwargs or {}))
        indexed = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert name not in self.FORBIDDEN, f"aten::{name} waits for the device"
        assert not indexed, "indexing with a mask waits for the device"
        return func(*args, **(kwargs or {}))


@KERNELS
@pytest.mark.parametrize(
    ("dtype", "inplace"),
    [(torch.float32, False), (torch.float32, True), (torch.float16, True)],
    ids=["gradient in forward", "in place", "gradient in backward"],
)
@pytest.mark.parametrize(
    ("form", "reduction"),
    [
        ("labels", "mean"),
        ("labels", "denominator"),
        ("labels", "none"),
        ("selection", "sum"),
        ("selection", "sequence_mean"),
    ],
)
def test_row_17_loss_and_backward_do_not_wait(form, reduction, dtype, inplace, monkeypatch):
    monkeypatch.setattr(problem, "may_wait", lambda _: False)  # as for a CUDA tensor
    logits = torch.randn(4, 9).to(dtype).requires_grad_()
    labels = torch.tensor([[0, IGNORE], [8, 3]])
    options = {"reduction": reduction, "label_smoothing": 0.1, "return_stats": True}
    if reduction == "denominator":
        options.update(reduction="mean", denominator=torch.tensor(3))
    weights = torch.rand(2, 2)
    if form == "selection":
        target = sgp.Selection.from_labels(
            labels.view(4), token_weight=weights.view(4), cu_seqlens=torch.tensor([0, 1, 4])
        )
    else:
        target, options["token_weight"] = labels.view(4), weights.view(4)
    with NoWaiting():
        loss, _ = sgp.cross_entropy(logits * 1, target, torch.rand(9), inplace=inplace, **options)
        loss.backward(torch.ones_like(loss) * 2)
    assert logits.grad.isfinite().all()


@ONCE
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_row_17_shapes_are_known_without_values(kind, reduction):
    """A data-dependent shape or value would raise under FakeTensor and on `meta`."""
    shape = {"none": (4,), "sequence_sum": (1,), "sequence_mean": (1,)}.get(reduction, ())

    def run(device):
        logits = torch.empty(4, 9, device=device, dtype=torch.bfloat16, requires_grad=True)
        target = torch.zeros(4, device=device, dtype=torch.int64)
        asked = {"reduction": reduction, "return_stats": True, "return_argmax": True}
        loss, stats = sgp.cross_entropy(logits, target, **asked)
        loss.sum().backward()
        assert tuple(loss.shape) == shape
        assert loss.dtype == torch.float32
        assert all(value.shape == (4,) for value in stats)
        assert logits.grad.shape == (4, 9)

    if kind == "meta":
        run("meta")
    else:
        with FakeTensorMode():
            run("cpu")


# -- 18. sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [0, 1, 3])
@pytest.mark.parametrize("V", [1, 2, 3, 127, 129])
def test_row_18_small_sizes(N, V, device):
    logits = torch.randn(N, V, device=device)
    target = torch.randint(V, (N,), device=device)
    check_cross_entropy(logits, target, reduction="sum", label_smoothing=0.1)
    loss, grad = loss_and_grad(sgp.cross_entropy, logits, target)
    if V == 1:
        assert not loss.any()
        assert not grad.any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_row_18_no_rows(reduction, device):
    """An empty micro-batch: nothing to launch, and every reduction has its shape."""
    shapes = {"none": (0, 3), "sequence_sum": (0,), "sequence_mean": (0,)}
    logits = torch.empty(0, 9, 3, device=device, requires_grad=True)
    target = torch.empty(0, 3, device=device, dtype=torch.int64)
    loss, stats = sgp.cross_entropy(logits, target, reduction=reduction, return_stats=True)
    assert tuple(loss.shape) == shapes.get(reduction, ())
    assert not loss.any()
    assert stats.entropy.shape == (0, 3)
    loss.sum().backward()
    assert logits.grad.shape == (0, 9, 3)


def test_row_18_largest_vocabulary(device, monkeypatch):
    V = 262_144
    logits = torch.randn(1, V, device=device).bfloat16()
    check_cross_entropy(logits, torch.tensor([V - 1], device=device))


def sparse_storage(path, elements, dtype):
    """Mapped memory of which only the touched pages exist."""
    try:
        return torch.from_file(str(path), shared=True, size=elements, dtype=dtype)
    except RuntimeError as error:
        pytest.skip(f"no sparse files of {elements * 2**-30:.0f} Gi elements here: {error}")


@pytest.mark.parametrize("axis", ["rows", "groups of rows", "columns"])
@pytest.mark.parametrize("reduction", ["mean", "none"])  # row_forward_; row_forward, row_backward_
def test_row_18_offsets_above_two_to_the_31(axis, reduction, tmp_path, device):
    """N x V > 2^31 by strides: the elements lie 2^31 apart, for loads and for stores (in place)."""
    far = 2**30 + 8
    storage = sparse_storage(tmp_path / "sparse", 2 * far + 64, torch.bfloat16)
    shape, stride = {
        "rows": ((3, 8), (far, 1)),
        "groups of rows": ((3, 2, 8), (far, 16, 1)),
        "columns": ((4, 3), (1, far)),
    }[axis]
    view = storage.as_strided(shape, stride)
    values = torch.randn(shape).bfloat16()
    view.copy_(values)
    lead = shape[:-1]
    target = torch.randint(shape[-1], lead)
    target.view(-1)[1] = IGNORE
    target.view(-1)[-1] = shape[-1] - 1
    selection = sgp.Selection.from_labels(target)
    expected = loss_and_grad(sgp.cross_entropy, values, selection, reduction=reduction)
    logits = Identity.apply(view.requires_grad_())
    loss = sgp.cross_entropy(logits, selection, reduction=reduction, inplace=True)
    loss.sum().backward()
    assert torch.equal(loss, expected[0]), "loads"
    assert torch.equal(view.detach(), expected[1]), "stores"


class Identity(torch.autograd.Function):
    """A view of its input that is not a leaf, and swallows the gradient (it lies in place)."""

    @staticmethod
    def forward(_ctx, x):
        return x.view_as(x).detach()

    @staticmethod
    def backward(_ctx, _grad):
        return None


# -- 19. packed sequences and masks with holes -----------------------------------------------------

IDS = [3, 1, 4, 1, 5, 2, 6, 5]


def per_sequence_by_hand(logits, ids, mask, sequences):
    """One loss a sequence, token by token: row t predicts token t + 1 of its own sequence."""
    losses = []
    for a, b in sequences:
        total = torch.zeros((), dtype=torch.float64)
        for t in range(a + 1, b):
            if mask[t]:
                total = total - logits[t - 1].double().log_softmax(0)[ids[t]]
        losses.append(total)
    return torch.stack(losses)


MASKS = {
    "all tokens": [1, 1, 1, 1, 1, 1, 1, 1],
    "a sequence wholly context": [0, 0, 0, 1, 1, 1, 1, 1],
    "two turns, with holes": [0, 1, 0, 0, 1, 0, 1, 1],
    "only first tokens, which nothing predicts": [1, 0, 0, 1, 0, 0, 0, 0],
    "only the last token": [0, 0, 0, 0, 0, 0, 0, 1],
}


@pytest.mark.parametrize("mask", MASKS)
def test_row_19_no_token_predicts_the_next_sequence(mask, device):
    ids, marks = torch.tensor(IDS, device=device), torch.tensor(MASKS[mask], device=device)
    ends = [0, 3, 8]
    selection = sgp.Selection.from_mask(ids, marks, cu_seqlens=torch.tensor(ends))
    logits = torch.randn(8, 7, device=device)
    loss, grad = loss_and_grad(sgp.cross_entropy, logits, selection, reduction="sequence_sum")
    twin = logits.double().cpu().requires_grad_()
    expected = per_sequence_by_hand(twin, IDS, MASKS[mask], [(0, 3), (3, 8)])
    if expected.requires_grad:
        expected.sum().backward()
    truth = torch.zeros_like(twin) if twin.grad is None else twin.grad
    assert relative_error(loss, expected) < 1e-6
    assert relative_error(grad, truth) < 1e-6
    assert_positive_zero(grad[2])  # the last token of the first sequence predicts nothing


# -- 20. modes and copies --------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_row_20_autocast(reduction, device):
    hidden = torch.randn(3, 5, device=device, requires_grad=True)
    head = torch.randn(9, 5, device=device, requires_grad=True)
    target = torch.tensor([0, IGNORE, 8], device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = hidden @ head.t()
        assert logits.dtype == torch.bfloat16
        loss = sgp.cross_entropy(logits, target, reduction=reduction)
    loss.sum().backward()
    exact = F.cross_entropy(logits.double(), target, reduction=reduction)
    assert loss.dtype == torch.float32
    assert relative_error(loss, exact) < 1e-6
    assert hidden.grad.isfinite().all()
    assert not hidden.grad[1].any()


def test_row_20_inference_mode(device):
    target = torch.tensor([0, IGNORE, 8], device=device)
    logits = torch.randn(3, 9, device=device)
    expected = sgp.cross_entropy(logits, target)
    with torch.inference_mode():
        loss, stats = sgp.cross_entropy(logits.clone(), target, return_stats=True)
    assert torch.equal(loss, expected)
    assert loss.is_inference()
    assert stats.log_prob[1].item() == 0.0


@ONCE
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
def test_row_20_copies_of_a_model_with_its_loss(copied, device):
    model = torch.nn.Module()
    model.head = torch.nn.Linear(4, 9)
    model.loss = sgp.CrossEntropyLoss(torch.rand(9), label_smoothing=0.1)
    model.to(device)
    hidden, target = torch.randn(2, 4, device=device), torch.tensor([0, 8], device=device)
    twin = copied(model)
    model.loss(model.head(hidden), target).backward()
    twin.loss(twin.head(hidden), target).backward()
    assert torch.equal(twin.head.weight.grad, model.head.weight.grad)


# -- 21. devices, determinism, sums of weights -----------------------------------------------------


@ONCE
def test_row_21_kernels_run_on_the_tensors_own_device(monkeypatch):
    """Without a second GPU: the guard that the launches stand under names the tensor's device."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    guard = by_triton.device_of(tensor)
    assert isinstance(guard, torch.cuda.device)
    assert guard.idx == 1
    here = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    assert isinstance(by_triton.device_of(here), nullcontext), "on its device already"


@KERNELS
def test_row_21_every_launch_stands_under_the_guard(monkeypatch):
    inside = []

    @contextmanager
    def guard(tensor):
        inside.append(True)
        yield
        inside.append(False)

    monkeypatch.setattr(by_triton, "device_of", guard)
    from sgp.kernels.launch import Call

    launch = Call.launch
    launches = []

    def guarded(self):
        launches.append(bool(inside) and inside[-1])
        return launch(self)

    monkeypatch.setattr(Call, "launch", guarded)
    logits = torch.randn(2, 9, requires_grad=True)
    for reduction in ("mean", "none"):
        (2 * sgp.cross_entropy(logits, torch.tensor([0, 8]), reduction=reduction).sum()).backward()
    assert launches == [True] * 5, "divisor, forward, factor; forward, backward"


@ONCE
def test_row_21_cuda_without_triton(monkeypatch):
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    backends._warn_once.cache_clear()
    cuda = torch.device("cuda")
    monkeypatch.setenv("SGP_BACKEND", "auto")
    with pytest.warns(UserWarning, match="CUDA tensors run PyTorch's operators: Triton is not"):
        assert backends.choose(cuda, torch.bfloat16) == "torch"
    assert backends.choose(cuda, torch.bfloat16) == "torch", "said once"
    monkeypatch.setenv("SGP_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        backends.choose(cuda, torch.bfloat16)
    backends._warn_once.cache_clear()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("inplace", [False, True])
def test_row_21_deterministic_algorithms(inplace, reduction, device):
    """Uninitialised memory is filled with NaN in this mode: every output is written in full."""
    leaf = torch.randn(2, 3, 9, device=device, requires_grad=True)
    labels = torch.tensor([[0, IGNORE, 8], [IGNORE, 3, 3]], device=device)
    selection = sgp.Selection.from_labels(labels)

    def run():
        loss, stats = sgp.cross_entropy(
            leaf * 1, selection, reduction=reduction, inplace=inplace, return_stats=True,
            return_argmax=True,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(2 * loss.sum(), leaf)
        return loss.detach(), grad, *stats

    expected = run()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        again = run()
    finally:
        torch.use_deterministic_algorithms(False)
    for value, other in zip(again, expected, strict=True):
        assert torch.equal(value, other), "same input, same bits"


@pytest.mark.parametrize(
    ("weights", "classes", "denominator", "divisor"),
    [
        ([0.0, 5.0, 0.0], None, None, 0.0),  # the token of weight 5 is ignored
        (None, [0.0, 1.0, 0.0], None, 0.0),  # no target is of the class that has weight
        (None, [-1.0, 1.0, -2.0], None, -3.0),  # as PyTorch: class weights may have any sign
        (None, None, -4.0, -4.0),
    ],
    ids=["zero token weights", "zero class weights", "negative class weights", "negative divisor"],
)
def test_row_21_sums_of_weights_zero_or_negative(weights, classes, denominator, divisor, device):
    options = {
        "token_weight": None if weights is None else torch.tensor(weights, device=device),
        "weight": None if classes is None else torch.tensor(classes, device=device),
    }
    logits = torch.randn(3, 3, device=device)
    target = torch.tensor([0, IGNORE, 2], device=device)
    total = loss_and_grad(sgp.cross_entropy, logits, target, reduction="sum", **options)
    mean = loss_and_grad(sgp.cross_entropy, logits, target, denominator=denominator, **options)
    for value, whole in zip(mean, total, strict=True):
        expected = whole / divisor if divisor else torch.zeros_like(whole)
        torch.testing.assert_close(value, expected, rtol=5e-7, atol=0.0)

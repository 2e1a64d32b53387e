"""The kernels themselves: what they write, what they never read, how many bytes they ask for.

Interpreted (conftest.py), so that every access is counted and checked against the bounds of the
tensors that a launch was given.
"""

import itertools

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

import sgp
from bench.proof.interpreter import watch_accesses
from sgp.kernels import layout
from sgp.rows import by_triton
from sgp.rows.by_torch import RowOutputs, Wanted, new_outputs
from sgp.rows.recipe import Recipe

ALL = Recipe(-100, 0.1, 5.0, 0.7, 1e-3)
LONG = 8_193  # more than one block, more than one piece
FORMS = pytest.mark.parametrize(
    ("form", "V"),
    [
        *(("resident", 5), ("streaming", 5), ("streaming", LONG + 7), ("staying", LONG)),
        ("blockwise", LONG),
    ],
    indirect=["form"],
)


@pytest.fixture(autouse=True)
def form(request, monkeypatch):
    name = getattr(request, "param", "auto")
    monkeypatch.setenv("SGP_ROW_FORM", name)
    return name


def poisoned(logits, N, **wanted):
    """Outputs filled with NaN, so that whatever a kernel leaves unwritten shows."""
    out = new_outputs(logits, N, Wanted(**wanted))
    return RowOutputs(
        *(None if t is None else t.fill_(torch.nan if t.is_floating_point() else True) for t in out)
    )


def launch_forward(logits, target, recipe=ALL, *, weight=None, row_weight=None, inplace=False):
    out = poisoned(logits, target.numel(), saved=True, stats=True, argmax=True, grad=not inplace)
    dlogits = logits if inplace else out.dlogits
    by_triton.forward(logits, dlogits, target, weight, row_weight, None, recipe, out)
    return out


@pytest.mark.core
@FORMS
def test_every_output_is_written_in_full_even_for_ignored_rows(V):
    target = torch.tensor([1, -100, V - 1, -100])
    with watch_accesses():
        out = launch_forward(torch.randn(4, V), target, weight=torch.rand(V))
    for name, values in out._asdict().items():
        assert not torch.isnan(values.float()).any(), f"{name} was left as it was allocated"
        assert not values[target == -100].any(), f"{name} of an ignored row is not zero"


@FORMS
def test_the_language_is_patched_once_a_launch_and_the_bits_stay(V, monkeypatch):
    """As Triton does it, at each call of a jit function (tests/quick_interpreter.py)."""
    target, weight, logits = torch.tensor([1, -100, V - 1]), torch.rand(V), torch.randn(3, V)
    calls, patch = [], interpreter._patch_lang.before

    def counted(fn):
        calls.append(fn)
        return patch(fn)

    load, quick = tl.load, launch_forward(logits, target, weight=weight)
    assert tl.load is load, "undone"
    monkeypatch.setattr(interpreter, "_patch_lang", counted)
    slow = launch_forward(logits, target, weight=weight)
    assert len(calls) > 10
    for name, values, others in zip(quick._fields, quick, slow, strict=True):
        assert torch.equal(values, others), name


@FORMS
@pytest.mark.parametrize("bad", [-1, "V", 2**40, -(2**40)])
def test_a_bad_target_poisons_its_row_only_and_touches_nothing_outside(V, bad):
    bad = V if bad == "V" else bad
    logits, weight = torch.randn(4, V), torch.rand(V)
    target = torch.tensor([0, bad, 1, bad])  # what is beyond the last row is nobody's
    with watch_accesses():
        out = launch_forward(logits, target, weight=weight)
        again = torch.full_like(logits, torch.nan)
        by_triton.backward(logits, again, target, out.saved, weight, None, ALL)
    good = torch.tensor([0, 2])
    for values in (out.loss, out.dlogits, again):
        assert torch.isnan(values[[1, 3]]).all(), "a bad target must never give a number"
        assert torch.isfinite(values[good]).all(), "a bad target must not touch other rows"


def test_the_bounds_check_sees_an_access_outside(monkeypatch):
    """The watch itself can fail: a kernel told of one column more than there is is caught."""
    logits, target = torch.randn(2, 6), torch.tensor([0, 1])
    out = poisoned(logits, 2, saved=True, stats=True, grad=True)
    launch = by_triton.launch.row_forward

    def one_too_many(*args, V, **kwargs):
        return launch(*args, V=V + 1, **kwargs)

    monkeypatch.setattr(by_triton.launch, "row_forward", one_too_many)
    with watch_accesses(), pytest.raises(InterpreterError, match="outside"):
        by_triton.forward(logits, out.dlogits, target, None, None, None, Recipe(), out)


VIEWS = {
    "contiguous rows": lambda V: torch.randn(6, V),
    "rows of a wider matrix": lambda V: torch.randn(6, V + 3)[:, 1:-2],
    "every second row": lambda V: torch.randn(12, V)[::2],
    "vocabulary strided": lambda V: torch.randn(V, 6).t(),
    "logits[:, :-1]": lambda V: torch.randn(2, 4, V)[:, :-1],
    "(B, V, T) to (B, T, V)": lambda V: torch.randn(2, V, 3).movedim(1, -1),
    "one row for all": lambda V: torch.randn(1, V).expand(6, V),
    "three levels of rows": lambda V: torch.randn(3, 2, 2, V)[:, :, :1].transpose(0, 1)[:, ::2],
}


@pytest.mark.parametrize("view", VIEWS)
@FORMS
def test_any_strides_give_the_numbers_of_a_contiguous_copy(view, V):
    """To a rounding: strides are compiled in, and another kernel may add in another order."""
    logits = VIEWS[view](V)
    target = torch.arange(logits.numel() // V) % V
    target[1] = -100
    with watch_accesses():
        here = launch_forward(logits, target)
        copy = launch_forward(logits.contiguous(), target)
    for name, values in here._asdict().items():
        others = getattr(copy, name).view(values.shape)
        torch.testing.assert_close(values, others, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("view", [view for view in VIEWS if view != "one row for all"])
def test_in_place_writes_the_view_and_nothing_between_its_rows(view):
    base = VIEWS[view](5)
    storage = torch.as_strided(base, (base.untyped_storage().nbytes() // 4,), (1,), 0)
    logits, before = base, storage.clone()
    target = torch.arange(logits.numel() // 5) % 5
    target[0] = -100
    expected = launch_forward(logits.clone(), target).dlogits
    launch_forward(logits, target, inplace=True)
    assert torch.equal(logits, expected.view(logits.shape))
    mine = torch.zeros_like(storage, dtype=torch.bool)
    mine.as_strided(base.shape, base.stride(), base.storage_offset()).fill_(True)
    assert torch.equal(storage[~mine], before[~mine])


def test_alignment_is_never_claimed_beyond_the_truth():
    for V, row_stride in itertools.product((1, 8, 24, 32, 50_257, 50_264), (0, 4)):
        x = torch.empty(2, V + row_stride)[:, :V]
        align = layout.alignment(V, layout.matrix(x))
        assert V % align == 0
        assert x.stride(0) % align == 0
    apart = torch.empty(2, 8, 12)[:, 1:3, :8]  # rows 12 apart, groups of them 96
    assert layout.alignment(8, layout.matrix(apart)) == 4
    assert layout.alignment(50_264, layout.matrix(torch.empty(2, 50_264))) == 8
    assert layout.alignment(262_144, layout.matrix(torch.empty(2, 262_144))) == 16


# -- bytes --------------------------------------------------------------------------------------

BYTES_AT = {
    1: "the smallest vocabulary",
    1_000: "one block, with padding",
    8_200: "one block, with padding",
    20_011: "a prime: rows that begin and end between two accesses",
    32_896: "a little more than a power of two",
    131_072: "a power of two",
    151_936: "Qwen 3",
    248_320: "Qwen 3.5",
    262_144: "Gemma 3, the largest in use",
}


@pytest.mark.parametrize("form", ["auto", "staying"], indirect=True)
@pytest.mark.parametrize("V", BYTES_AT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kept", [0, 1, 4], ids=["f=0", "f=1/4", "f=1"])
def test_bytes_of_loss_and_backward_with_upstream_factor_1(V, dtype, kept, form, monkeypatch):
    monkeypatch.setenv("SGP_BACKEND", "triton")
    N, f = 4, kept / 4
    logits = torch.randn(N, V).to(dtype).requires_grad_()
    target = torch.full((N,), -100)
    target[:kept] = torch.arange(kept) % V
    with watch_accesses(distinct=True) as seen:
        sgp.cross_entropy(logits, target).backward()
    x, g = seen.of(logits), seen.of(logits.grad)
    element = dtype.itemsize
    asked = (x.loaded + x.stored + g.loaded + g.stored) / element
    touched = (sum(seen.distinct(logits)) + sum(seen.distinct(logits.grad))) / element
    assert touched <= 1.02 * (1 + f) * N * V, "each kept logit and each gradient once"
    reads = 1 if form == "auto" and V <= 4_096 else 2
    targets = 2 * kept  # the target's logit is asked for beside its row, and so is its gradient
    assert asked == (1 + reads * f) * N * V + targets
    assert seen.rows_loaded(logits) == list(range(kept)), "context rows are not read"
    others = sum(r.loaded + r.stored for r in seen.regions.values() if r not in (x, g))
    assert others <= 64 * N, "what is not logits is a few numbers a row"
    assert seen.launches == 3, "the divisor, the loss with its gradient, and the factor that is 1"


@pytest.mark.parametrize(("factor", "read"), [(1.0, 0), (2.0, 2)])
def test_the_factor_kernel_reads_gradients_only_when_it_must(factor, read):
    gradient = torch.randn(4, 9_000)
    before = gradient.clone()
    target = torch.tensor([1, -100, -100, 2])
    with watch_accesses(distinct=True) as seen:
        by_triton.multiply(gradient, target, torch.tensor(factor), -100)
    assert seen.distinct(gradient) == (read * 9_000 * 4, read * 9_000 * 4)
    kept = target != -100
    assert torch.equal(gradient[kept], before[kept] * factor)
    assert torch.equal(gradient[~kept], before[~kept])


@pytest.mark.parametrize("reduction", ["mean", "none", "sequence_mean"])
def test_no_pytorch_operator_computes_over_n_times_v(reduction, monkeypatch):
    """A clone, zeros, `grad * upstream` or `.float()` would show here; there are none.

    The kernels themselves are left out, because the interpreter copies their arguments.
    """
    monkeypatch.setenv("SGP_BACKEND", "triton")
    monkeypatch.setattr(by_triton.launch.Call, "launch", lambda _: None)
    N, V = 64, 1_000
    logits = torch.randn(N, V, requires_grad=True)
    target = torch.randint(V, (N,))
    with torch.profiler.profile(record_shapes=True) as profile:
        loss = sgp.cross_entropy(logits, target, reduction=reduction)
        torch.autograd.grad(loss, logits, torch.full_like(loss, 3.0))
    large = {
        event.name
        for event in profile.events()
        if any(shape and torch.Size(shape).numel() >= N * V for shape in event.input_shapes)
    }
    views = {f"aten::{name}" for name in ("movedim", "permute", "as_strided", "detach", "slice")}
    views |= {"detach", "PermuteBackward0", "aten::view", "aten::alias", "aten::view_as"}
    ours = {"sgp::row_forward", "sgp::row_backward", "sgp::multiply_rows_", "sgp::mean_scale"}
    ours |= {"ScalarLoss", "RowLoss", "ScalarLossBackward", "RowLossBackward"}
    allocations = {"aten::new_empty", "aten::empty", "aten::empty_like"}
    computing = {name for name in large - views - ours - allocations if "autograd::" not in name}
    assert "sgp::row_forward" in large, "the profiler saw nothing"
    assert not computing, f"operators over N x V: {sorted(computing)}"


@FORMS
def test_same_input_same_bits(V):
    logits, target = torch.randn(3, V), torch.tensor([1, 2, 3])
    first, second = (launch_forward(logits, target) for _ in range(2))
    for name in first._fields:
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_the_divisor_of_a_mean_loses_no_small_weight_beside_a_large_one():
    """All of them are one lane's: float32 would add each of the ones to 2^25 in vain."""
    weights = torch.zeros(64, 8_192)
    weights[:, 0] = 1
    weights[0, 0] = 2.0**25
    target = torch.zeros(weights.numel(), dtype=torch.int64)
    scale = by_triton.mean_scale(target, None, weights.view(-1), -100, torch.float32)
    assert scale.item() * (2**25 + 63) == pytest.approx(1, abs=2e-7)

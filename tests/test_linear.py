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
from sgp.head import chunks
from sgp.head import operators as head_operators
from sgp.head.calls import HeadCall, LinearHead, Needs
from sgp.head.shape import Shape
from sgp.head.teachers import Teachers
from sgp.rows import by_torch, problem
from sgp.rows.by_torch import Upstream, Wanted
from sgp.rows.divergence import SAVED, Divergence
from sgp.rows.recipe import Recipe
from sgp.rows.watched import Operator, flat
from sgp.tolerance import bound
from sgp.train.memory import cpu_peak
from tests.oracle import in_float64, relative_error, sample_in, sample_results

IGNORE = -100
INF, NAN = math.inf, math.nan
N, V, D = 6, 11, 5
ALL, INPUT, HEAD = (True, True, True), (True, False, False), (False, True, True)  # who needs grad
NOBODY = (False, False, False)
REDUCTIONS = ["mean", "sum", "none", "sequence_sum", "sequence_mean"]
EARLY_OR_LATE = ["mean", "none"]  # the gradients come with the loss, or in backward
HALVES = [torch.bfloat16, torch.float16]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
SECOND = r"sgp\.linear_cross_entropy has no second derivative"

reference = sgp.reference.linear_cross_entropy


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(23)


@pytest.fixture
def tensors(device):
    """Input, weight and bias."""
    return [torch.randn(size, device=device) for size in ((N, D), (V, D), (V,))]


@pytest.fixture
def target(device):
    return torch.tensor([3, IGNORE, 10, 0, IGNORE, 3], device=device)


def cast(tensors, dtype):
    return [None if x is None else x.to(dtype) for x in tensors]


def leaves_of(tensors, needs=ALL):
    """Leaves on the very memory and strides of the tensors."""
    pairs = zip(tensors, needs, strict=True)
    return [None if x is None else x.detach().requires_grad_(need) for x, need in pairs]


def run(function, tensors, target, upstream=None, needs=ALL, **options):
    """[loss, gradient of input, of weight, of bias]; None where there is none."""
    leaves = leaves_of(tensors, needs)
    loss = function(*leaves[:2], target, linear_bias=leaves[2], **options)
    if loss.requires_grad:
        loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype))
    return [loss.detach(), *(None if x is None else x.grad for x in leaves)]


ours_of = partial(run, sgp.linear_cross_entropy)


def truth_of(tensors, target, upstream=None, needs=ALL, **options):
    tensors, options = cast(tensors, torch.float64), in_float64(options)
    return run(reference, tensors, target, upstream, needs, **options)


def plain_logits(hidden, head, target, *, linear_bias=None, **options):
    """What one writes without this package: `F.linear`, its logits in the tensors' own dtype."""
    if isinstance(target, torch.Tensor):
        constructor = {k: options.pop(k) for k in ("shift", "token_weight") if k in options}
        target = sgp.Selection.from_labels(target, **constructor)
    return sgp.reference.cross_entropy(F.linear(hidden, head, linear_bias), target, **options)


def assert_right(ours, plain, truth, *, backend="torch", roundings=1, dtype=None):
    """Every number is no worse than PyTorch's in the same dtype; `roundings` as in `bound`.

    A float32 gradient of the weight, and any of the bias, adds up terms of both signs, rounded at
    other places than PyTorch's: twice the bound. `dtype` is what was multiplied, where that is not
    what comes out.
    """
    names = ("loss", "input.grad", "linear_weight.grad", "linear_bias.grad")
    for name, value, other, exact in zip(names, ours, plain, truth, strict=True):
        if exact is None:
            assert value is None, f"{name}: a gradient that nobody wanted"
            continue
        assert value is not None, f"{name} is missing"
        assert value.dtype == other.dtype, f"{name} is {value.dtype}"
        limit = bound(
            relative_error(other, exact),
            value.dtype if name == "loss" else dtype or value.dtype,
            interpreted=backend == "triton" and not value.is_cuda,
            roundings=1 if name == "loss" else roundings,
        )
        exact_sum = value.dtype in (torch.float32, torch.float64) or name == "linear_bias.grad"
        if name.startswith("linear") and exact_sum:
            limit *= 2
        error = relative_error(value, exact)
        assert error <= limit, f"{name}: relative error {error:.3g}, bound {limit:.3g}"


def check(
    tensors, target, upstream=None, *, chunk_rows=None, backend="torch", needs=ALL, roundings=1,
    memory_budget=None, **options,
):  # fmt: skip
    """Loss and gradients against the reference in float64; returns ours.

    The plain PyTorch to be no worse than is the reference on the same tensors: float32 arithmetic,
    gradients rounded once to the tensors' dtype. Where the logits' gradient is rounded to 16 bits
    for the next matmul, by the kernels and in float16, it is F.linear, which rounds it too.
    """
    truth = truth_of(tensors, target, upstream, needs, **options)
    plain = run(reference, tensors, target, upstream, needs, **options)
    dtype = tensors[0].dtype
    if dtype == torch.float16 or (dtype == torch.bfloat16 and backend == "triton"):
        plain[1:] = run(plain_logits, tensors, target, upstream, needs, **options)[1:]
    if dtype == torch.float16:
        roundings = 2  # of the logits' gradient, and of the result
    how = {"chunk_rows": chunk_rows, "memory_budget": memory_budget}
    ours = ours_of(tensors, target, upstream, needs, **how, **options)
    assert_right(ours, plain, truth, backend=backend, roundings=roundings)
    return ours


def assert_same(ours, expected, rtol=1e-5, atol=1e-6):
    for value, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=rtol, atol=atol)


def assert_equal(ours, expected):
    for value, other in zip(ours, expected, strict=True):
        assert value is other or torch.equal(value, other), "the same bits"


def assert_positive_zero(grad):
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = grad.contiguous().view(sizes[grad.element_size()])
    assert not bits.any(), "the gradient is not +0.0, bit by bit"


def upstream_of(reduction, shape, sequences=None):
    """Random upstream gradients for a target of `shape`, a sequence a row unless it is packed."""
    by_sequence = (math.prod(shape[:-1]) if sequences is None else sequences,)
    shapes = {"none": tuple(shape), "sequence_sum": by_sequence, "sequence_mean": by_sequence}
    return torch.randn(shapes.get(reduction, ()))


# -- PyTorch's own sample inputs -------------------------------------------------------------------

SAMPLES = {
    op.variant_test_name or "plain": op
    for op in op_db
    if op.name == "nn.functional.linear_cross_entropy"
}


@pytest.mark.filterwarnings("ignore:linear_cross_entropy. ``options`` ignored:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["plain", "chunked", "chunked_none"])
@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch older than 2.12")
def test_pytorch_sample_inputs(variant, dtype, device):
    """Loss, in PyTorch's dtype, and every gradient; what `options` asks for changes nothing."""
    samples = list(SAMPLES[variant].sample_inputs(device, dtype, requires_grad=True))
    assert len(samples) >= 20, f"PyTorch's op_db has {len(samples)} samples of this"
    rtol = {torch.float64: 1e-7, torch.float32: 1.3e-6, torch.bfloat16: 1.6e-2}[dtype]
    for sample in samples:
        plain = partial(sample_results, F.linear_cross_entropy)
        with torch.no_grad():
            shape = F.linear_cross_entropy(sample.input, *sample.args, **sample.kwargs).shape
        upstream = torch.randn(shape, device=device)
        theirs = plain(sample, upstream)
        ours = sample_results(sgp.linear_cross_entropy, sample, upstream)
        exact = sample_in(torch.float64, sample)
        exact.kwargs.pop("options", None)
        truth = plain(exact, upstream)
        # Two deliberate differences: a bf16 loss is not rounded, the mean of nothing is not NaN.
        assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        ours[0] = ours[0].to(dtype)
        for value, other, exact in zip(ours, theirs, truth, strict=True):
            if exact.dim() == 0 and exact.isnan():
                assert value.item() == 0.0
            elif relative_error(value, exact) > bound(relative_error(other, exact), dtype):
                # PyTorch had luck: then as close to it as torch.testing asks of this dtype, where
                # zeros that are sums of what cancels are measured by their largest neighbour.
                atol = rtol * float(exact.abs().amax())
                torch.testing.assert_close(value, other, rtol=rtol, atol=atol)


# -- against the reference: options, reductions, chunks, vocabularies ------------------------------


def options_of(name, shape, classes, device):
    """The keywords of one option (or of all) for a target of `shape`."""
    weight = torch.rand(classes, device=device) + 0.1
    weight[0] = 0.0  # a class without weight is not the same as an ignored one
    every = {
        "weight": {"weight": weight},
        "label_smoothing": {"label_smoothing": 0.1},
        "token_weight": {"token_weight": torch.rand(shape, device=device) + 0.1},
        "softcap": {"softcap": 5.0},
        "logit_scale": {"logit_scale": -0.7},
        "z_loss": {"lse_square_scale": 0.05},
    }
    every["all"] = {key: value for option in every.values() for key, value in option.items()}
    alone = {
        "plain": {},
        "shift": {"shift": True},
        "shift by two": {"shift": 2},
        "ignore_index": {"ignore_index": 3},
    }
    return {**alone, **every}[name]


@pytest.mark.core
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "option",
    ["plain", "weight", "label_smoothing", "token_weight", "softcap", "logit_scale", "z_loss",
     "ignore_index", "shift", "shift by two", "all"],
)  # fmt: skip
def test_option_and_reduction(option, reduction, backend, tensors, target, device):
    """Two sequences of three tokens, in two chunks, with an upstream gradient that is not 1."""
    options = options_of(option, (2, 3), V, device)
    if option == "ignore_index":
        target = target.clamp(min=0)
    tensors[0] = tensors[0].view(2, 3, D)
    check(
        tensors, target.view(2, 3), upstream_of(reduction, (2, 3)), chunk_rows=3, backend=backend,
        reduction=reduction, **options,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("chunk_rows", [None, 1, 3, 64])
@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
def test_chunks_of_any_size_with_all_options(reduction, chunk_rows, dtype, backend, device):
    if backend == "triton" and (dtype == torch.float64 or chunk_rows == 64):
        return  # refused, for the kernels compute in float32; and not other than None
    shape = (2, 4)
    sizes = (*shape, D), (V, D), (V,)
    tensors = [torch.randn(size, device=device).to(dtype) for size in sizes]
    target = torch.randint(V, shape, device=device)
    target[0, 2] = IGNORE
    options = {**options_of("all", shape, V, device), "shift": True, "reduction": reduction}
    late = reduction == "mean"  # the gradient is stored before the upstream factor is known
    check(
        tensors, target, upstream_of(reduction, shape), chunk_rows=chunk_rows, backend=backend,
        roundings=1 + late, **options,
    )  # fmt: skip


VOCABULARIES = {
    1: "one class: the loss is 0 and so is the gradient",
    2: "the smallest that says anything",
    7: "odd",
    300: "beyond one small block",
    8193: "one column more than the resident form of the kernel holds",
}


@DTYPES
@pytest.mark.parametrize("classes", VOCABULARIES)
def test_vocabulary_and_dtype(classes, dtype, backend, device):
    sizes = (3, 8), (classes, 8), (classes,)
    tensors = [torch.randn(size, device=device).to(dtype) for size in sizes]
    target = torch.tensor([0, IGNORE, classes - 1], device=device)
    options = options_of("all", (3,), classes, device)
    upstream = torch.full((3,), 1024.0)  # above the smallest normal numbers of float16
    check(tensors, target, upstream, reduction="none", chunk_rows=1, backend=backend, **options)
    # Interpreted, each of the weight's V rows is a launch of its own when multiplied.
    needs = (True, backend == "torch" or classes <= 300, True)
    check(tensors, target, needs=needs, backend=backend)


# -- shapes, strides, Selections -------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("lead", "shape"),
    [((), ()), ((), (1,)), ((1,), (1,)), ((4,), (4,)), ((2, 3), (2, 3)), ((2, 3), (6,)),
     ((2, 1, 3), (2, 1, 3)), ((0,), (0,)), ((2, 0), (2, 0)), ((0, 3), (0,))],
    ids=str,
)  # fmt: skip
def test_shapes(lead, shape, reduction, tensors, device):
    """(D,), (N, D) and (..., D); the target in the leading shape or flattened; N = 0 and 1."""
    hidden, target = torch.randn(*lead, D, device=device), torch.randint(V, shape, device=device)
    if target.numel() > 2:
        target.view(-1)[1] = IGNORE
    upstream, weight = upstream_of(reduction, shape), torch.rand(shape, device=device) + 0.1
    options = {"reduction": reduction, "token_weight": weight}
    ours = ours_of([hidden, *tensors[1:]], target, upstream, **options)
    by_sequence = (math.prod(shape[:-1]),)
    assert ours[0].shape == {"none": shape, "mean": (), "sum": ()}.get(reduction, by_sequence)
    assert ours[1].shape == hidden.shape
    batch = shape or (1,)  # the reference of one token is a batch of one
    upstream = upstream.view(batch) if reduction == "none" else upstream
    options["token_weight"] = weight.view(batch)
    rows = [hidden.reshape(*batch, D), *tensors[1:]]
    plain = run(reference, rows, target.view(batch), upstream, **options)
    assert_same((x.flatten() for x in ours), (x.flatten() for x in plain))


STRIDED = {
    "slice of time": lambda device: torch.randn(2, 3, D, device=device)[:, :-1],
    "transposed": lambda device: torch.randn(D, 4, device=device).t(),
    "batch second": lambda device: torch.randn(2, 2, D, device=device).transpose(0, 1),
    "every other column": lambda device: torch.randn(4, 2 * D, device=device)[:, ::2],
    "expanded rows": lambda device: torch.randn(D, device=device).expand(4, D),
    "expanded batch": lambda device: torch.randn(1, 2, D, device=device).expand(2, 2, D),
}


@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
@pytest.mark.parametrize("layout", STRIDED)
def test_strides(layout, reduction, backend, device):
    hidden = STRIDED[layout](device)
    head, bias = torch.randn(D, V, device=device).t(), torch.randn(2 * V, device=device)[::2]
    target = torch.tensor([1, IGNORE, V - 1, 0], device=device).view(hidden.shape[:-1])
    upstream = upstream_of(reduction, target.shape)
    for chunk_rows in (None, 2):
        check(
            [hidden, head, bias], target, upstream, chunk_rows=chunk_rows, backend=backend,
            reduction=reduction,
        )  # fmt: skip


def selections(device):
    labels = torch.tensor([[3, 0, IGNORE, 6], [IGNORE, 5, 1, IGNORE]], device=device)
    ids, weight = labels.clamp(min=0), torch.rand(2, 4, device=device) + 0.1
    make, mask = sgp.Selection.from_labels, sgp.Selection.from_mask
    holes = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0]], device=device)
    packed, padded = torch.tensor([0, 3, 3, 8]), torch.tensor([0, 3, 7])
    return {
        "rows": make(labels),
        "weighted, shifted": make(labels, shift=True, token_weight=weight),
        "packed, shifted": make(labels.view(8), shift=True, cu_seqlens=packed),
        "packed, weighted": make(labels.view(8), cu_seqlens=packed, token_weight=weight.view(8)),
        "holes": mask(ids, holes),
        "packed, with holes and padding": mask(ids.view(8), holes.view(8), cu_seqlens=padded),
        "context lengths": sgp.Selection.from_context_lengths(ids, torch.tensor([2, 1])),
        "nothing": make(torch.full((2, 4), IGNORE, device=device)),
    }


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", selections("cpu"))
def test_selection_instead_of_labels(kind, reduction, backend, tensors, device):
    selection = selections(device)[kind]
    tensors[0] = torch.randn(2, 4, D, device=device)
    upstream = upstream_of(reduction, selection.shape, selection.num_sequences)
    ours = check(
        tensors, selection, upstream, chunk_rows=2, backend=backend, reduction=reduction,
        label_smoothing=0.1,
    )  # fmt: skip
    context = torch.ones(8, dtype=torch.bool, device=device)
    context[selection.rows] = False
    assert_positive_zero(ours[1].view(8, D)[context])


# -- how many are kept -----------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_kept(reduction, dtype, backend, tensors, device):
    hidden, head, bias = leaves_of(cast([tensors[0].view(2, 3, D) * NAN, *tensors[1:]], dtype))
    loss, stats = sgp.linear_cross_entropy(
        hidden, head, torch.full((2, 3), IGNORE, device=device), linear_bias=bias,
        reduction=reduction, return_stats=True, return_argmax=True,
    )  # fmt: skip
    assert not loss.any()
    assert not any(values.any() for values in stats)
    assert loss.requires_grad, "the loss stays connected: data parallelism waits for this gradient"
    loss.sum().backward()
    for leaf in (hidden, head, bias):
        assert leaf.grad.dtype == dtype
        assert_positive_zero(leaf.grad)


def test_property_any_mask_size_chunk_and_options(backend):
    @settings(
        max_examples={"torch": 40, "triton": 5}[backend],  # an interpreted row takes milliseconds
        deadline=None,  # the machine is shared: no test depends on time
        derandomize=True,
        database=None,
    )
    @given(st.data())
    def holds(data):
        draw = data.draw
        tokens, classes, width = (draw(st.integers(1, most)) for most in (9, 20, 6))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
        make = partial(torch.randn, generator=generator)
        scale = draw(st.sampled_from([0.3, 3.0]))
        tensors = [scale * make(tokens, width), make(classes, width), make(classes)]
        if draw(st.booleans()):
            tensors[2] = None
        target = torch.randint(classes, (tokens,), generator=generator)
        ignored = torch.tensor(draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
        target[ignored] = IGNORE
        options = {
            "reduction": draw(st.sampled_from(REDUCTIONS)),
            "softcap": draw(st.sampled_from([None, 4.0])),
            "label_smoothing": draw(st.sampled_from([0.0, 0.2])),
            "token_weight": draw(st.sampled_from([None, make(tokens).abs()])),
        }
        upstream = upstream_of(options["reduction"], (tokens,))
        truth = truth_of(tensors, target, upstream, **options)
        tensors[0][ignored] = NAN
        if options["reduction"] == "none":
            upstream[ignored] = draw(st.sampled_from([NAN, INF]))
        rows = draw(st.integers(1, 10))
        ours = ours_of(tensors, target, upstream, chunk_rows=rows, **options)
        for value, exact in zip(ours, truth, strict=True):
            if exact is not None:
                torch.testing.assert_close(value.double(), exact, rtol=3e-5, atol=3e-6)
        assert_positive_zero(ours[1][ignored])

    holds()


# -- what is ignored, and targets outside the vocabulary -------------------------------------------


@DTYPES
@pytest.mark.parametrize("reduction", ["mean", "none", "sequence_mean"])
def test_poison_in_an_ignored_row_of_input(reduction, dtype, backend, tensors, target):
    """Only dropping the row before the matmul saves the weight's gradient."""
    ignored = target == IGNORE
    options = {"reduction": reduction, "token_weight": torch.ones(N).masked_fill_(ignored, NAN)}
    clean = ours_of(cast(tensors, dtype), target, chunk_rows=2, **options)
    for poison in (NAN, -INF):
        tensors[0][ignored] = poison
        dirty = ours_of(cast(tensors, dtype), target, chunk_rows=2, **options)
        assert all(value.isfinite().all() for value in dirty)
        assert_equal(dirty, clean)
        assert_positive_zero(dirty[1][ignored])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("needs", [ALL, INPUT], ids=["all", "frozen head"])
@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
def test_upstream_does_not_reach_an_ignored_row(reduction, needs, dtype, backend, tensors, target):
    tensors, ignored = cast(tensors, dtype), target == IGNORE
    for factor in (0.0, -1.0, INF, NAN):
        upstream = torch.full((N,) if reduction == "none" else (), factor)
        grad = ours_of(tensors, target, upstream, needs, reduction=reduction)[1]
        assert_positive_zero(grad[ignored])
        if not math.isfinite(factor):
            assert not grad[~ignored].isfinite().any(), "what a loss scaler looks for"
    if dtype == torch.float16:
        upstream = torch.full((N,) if reduction == "none" else (), 2.0**24)
        grad = ours_of(tensors, target, upstream, needs, reduction=reduction)[1]
        assert grad[~ignored].isinf().any(), "overflow is infinite, not wrong"
        assert_positive_zero(grad[ignored])


@pytest.mark.parametrize("bad", [-1, V, 2**32 + 1])
@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
def test_target_outside_the_vocabulary(reduction, bad, backend, tensors, target):
    target[2] = bad
    labels = [target] if bad < 0 else [target, sgp.Selection.from_labels(target)]
    for y in labels:
        with pytest.raises(IndexError, match=rf"target\[2\] = {bad} is outside \[0, {V}\)"):
            ours_of(tensors, y, reduction=reduction)


@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
def test_target_outside_is_nan_where_a_check_would_wait(
    reduction, backend, tensors, target, monkeypatch
):
    """As on a GPU: memory safe (the bounds check is on), never a silent number or a silent zero."""
    monkeypatch.setattr(problem, "may_wait", lambda _: False)
    target[2] = V
    loss, *gradients = ours_of(tensors, target, reduction=reduction, chunk_rows=2)
    assert loss.flatten()[2 if reduction == "none" else 0].isnan()
    assert gradients[0][2].isnan().all()
    assert_positive_zero(gradients[0][target == IGNORE])
    assert all(gradient.isnan().any() for gradient in gradients[1:])


# -- autograd --------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
def test_frozen_sides(needs, reduction, dtype, backend, tensors, target):
    """A gradient exactly where one is wanted, and the right one."""
    upstream = upstream_of(reduction, (N,))
    check(
        cast(tensors, dtype), target, upstream, needs=needs, backend=backend, chunk_rows=2,
        roundings=2, reduction=reduction,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("needs", [ALL, INPUT, HEAD], ids=["all", "frozen head", "frozen input"])
@pytest.mark.parametrize("reduction", ["sum", "none", "sequence_mean"])
def test_second_backward_doubles_or_raises(reduction, needs, dtype, backend, tensors, target):
    """Gradients that came with the loss are handed over; the others are made again."""
    leaves = leaves_of(cast(tensors, dtype), needs)
    loss = 3 * sgp.linear_cross_entropy(*leaves[:2], target, reduction=reduction).sum()
    wanted = [leaf for leaf in leaves[:2] if leaf.requires_grad]
    loss.backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in wanted]
    if reduction == "sum":
        with pytest.raises(RuntimeError, match=r"sgp\.linear_cross_entropy: backward a second"):
            loss.backward()
        assert_equal((leaf.grad for leaf in wanted), first)
    else:
        loss.backward()
        assert_equal((leaf.grad for leaf in wanted), (2 * grad for grad in first))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
def test_second_derivative_is_refused(reduction, dtype, backend, tensors, target):
    """Of every gradient, by every way: the other two leaves, and the upstream gradient."""
    leaves, factor = leaves_of(cast(tensors, dtype)), torch.tensor(2.0, requires_grad=True)
    loss = sgp.linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], reduction=reduction)
    gradients = torch.autograd.grad(factor * loss.sum(), leaves, create_graph=True)
    upstream = torch.full_like(loss.detach(), 2.0)
    plain = ours_of(leaves, target, upstream, reduction=reduction)
    assert_equal([gradient.detach() for gradient in gradients], plain[1:])
    for gradient, leaf in itertools.product(gradients, (*leaves, factor)):
        with pytest.raises(RuntimeError, match=SECOND):
            torch.autograd.grad(gradient.square().sum(), leaf, retain_graph=True)


# Every transform of torch.func gives what the reference gives, or raises; never a silent zero.
TRANSFORM = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


@TRANSFORM
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("argnums", [0, (1, 2), (0, 1, 2)])
def test_functional_gradient(argnums, reduction, tensors, target):
    tensors[1].requires_grad_()  # of somebody outside: a constant unless among the arguments

    def gradients(function):
        def loss(h, w, b):
            return function(h, w, target, linear_bias=b, reduction=reduction).square().sum()

        return func.grad(loss, argnums)(*tensors)

    torch.testing.assert_close(gradients(sgp.linear_cross_entropy), gradients(reference))


@TRANSFORM
@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
@pytest.mark.parametrize("argument", range(3))
def test_functional_second_and_forward_derivatives_raise(argument, reduction, tensors, target):
    def loss(x):
        h, w, b = (x if i == argument else other for i, other in enumerate(tensors))
        return sgp.linear_cross_entropy(h, w, target, linear_bias=b, reduction=reduction).sum()

    point, forward = tensors[argument], "linear_cross_entropy has no forward-mode derivative"
    with pytest.raises(RuntimeError, match=SECOND):
        func.grad(lambda x: func.grad(loss)(x).square().sum())(point)
    with pytest.raises(RuntimeError, match=forward):
        func.jvp(loss, (point,), (torch.ones_like(point),))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=forward):
        loss(forward_ad.make_dual(point, torch.ones_like(point)))


@TRANSFORM
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_of_single_examples(reduction, backend, tensors, target):
    """Per-example gradients of hidden states, of the head that all share, and of its bias."""
    hidden = torch.stack([tensors[0], 2 * tensors[0]])
    targets = torch.stack([target, torch.full_like(target, IGNORE)])
    targets[1, 2] = 7
    ours, expected = (
        func.grad(
            lambda h, w, b, y, f=function: f(h, w, y, linear_bias=b, reduction=reduction),
            argnums=(0, 1, 2),
        )
        for function in (sgp.linear_cross_entropy, reference)
    )
    found = func.vmap(ours, in_dims=(0, None, None, 0))(hidden, *tensors[1:], targets)
    alone = [expected(h, *tensors[1:], y) for h, y in zip(hidden, targets, strict=True)]
    for value, *by_example in zip(found, *alone, strict=True):
        torch.testing.assert_close(value, torch.stack(by_example))


@DTYPES
@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
def test_the_callers_tensors_are_untouched(reduction, dtype, backend, tensors, target):
    names = ("input", "linear_weight", "linear_bias", "target", "weight", "token_weight")
    leaves = leaves_of(cast(tensors, dtype))
    arguments = dict(zip(names, (*leaves, target, torch.rand(V), torch.rand(N)), strict=True))
    before = {name: (x.detach().clone(), x._version) for name, x in arguments.items()}
    loss, _ = sgp.linear_cross_entropy(
        **arguments, reduction=reduction, return_stats=True, softcap=3.0, chunk_rows=2
    )
    (2 * loss).sum().backward()
    for name, value in arguments.items():
        assert torch.equal(value, before[name][0]), f"{name} was overwritten"
        assert value._version == before[name][1], f"{name}'s version counter moved"


@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
def test_several_uses_of_one_loss_and_one_weight(reduction, backend, tensors, target):
    """Tied embeddings, two losses of one head, the loss squared, divided in place, checkpointed."""

    def gradients(function):
        hidden, head, _ = leaves_of(tensors)
        h, other = hidden + head[:N].tanh(), target.flip(0)
        first = function(h, head, target, reduction=reduction)
        first /= 4
        again = checkpoint(lambda h, w: function(h, w, other), 2 * h, head, use_reentrant=False)
        total = first.sum() + 3 * first.square().sum() + again
        return torch.autograd.grad(total, (hidden, head))

    assert_same(gradients(sgp.linear_cross_entropy), gradients(reference), rtol=1e-4, atol=1e-5)


def test_gradient_accumulation_with_the_count_of_the_whole_batch(backend, tensors, target):
    hidden, head, bias = tensors
    count = (target != IGNORE).sum()
    parts = [
        ours_of([hidden[i : i + 2], head, bias], target[i : i + 2], denominator=count)
        for i in (0, 2, 4)
    ]
    losses, inputs, *others = zip(*parts, strict=True)
    ours = [sum(losses), torch.cat(inputs), *map(sum, others)]
    assert_same(ours, ours_of(tensors, target))


@pytest.mark.parametrize("number", [4, 4.0, torch.tensor(4.0), torch.tensor(4)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_denominator(dtype, number, tensors, target):
    tensors = cast(tensors, dtype)
    total = ours_of(tensors, target, reduction="sum")
    rtol = 2 * torch.finfo(dtype).eps if dtype == torch.float16 else 1e-6
    mean = ours_of(tensors, target, denominator=number)
    assert_same(mean, [x / 4 for x in total], rtol=rtol, atol=1e-6)
    for value in ours_of(tensors, target, denominator=0 * number):
        assert not value.any(), "a divisor of 0: loss 0 and zero gradients, connected to the graph"


def test_statistics(backend, tensors, target):
    """Detached, from the loss's own pass, the same with and without gradients."""
    (hidden, head, bias), y = leaves_of(tensors), target.view(2, 3)
    hidden = hidden.view(2, 3, D)
    options = {"softcap": 4.0, "logit_scale": 1.5}
    truth = sgp.reference.linear_token_log_probs(
        hidden, head, y, linear_bias=bias, return_argmax=True, **options
    )
    loss_of = partial(
        sgp.linear_cross_entropy, hidden, head, y, linear_bias=bias, chunk_rows=2,
        return_stats=True, return_argmax=True, **options,
    )  # fmt: skip
    with torch.no_grad():
        _, frozen = loss_of()
    for reduction in EARLY_OR_LATE:
        loss, stats = loss_of(reduction=reduction, label_smoothing=0.1)
        assert loss.requires_grad
        assert_equal(stats, frozen)
        assert not any(value.requires_grad for value in stats)
        assert not any(value[y == IGNORE].any() for value in stats)
        assert_same(stats, (value.detach() for value in truth))


# -- modes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
def test_without_gradients(reduction, mode, backend, tensors, target):
    hidden, head, bias = leaves_of(tensors)
    loss_of = partial(sgp.linear_cross_entropy, linear_bias=bias, reduction=reduction)
    expected = loss_of(hidden, head, target)
    losses = []
    with mode():
        for x in (hidden, hidden * 1):
            count = flops(lambda x=x: losses.append(loss_of(x, head, target)))
            assert count == 2 * 4 * V * D, "one matmul on the kept rows"
    for loss in losses:
        assert torch.equal(loss, expected)
        assert not loss.requires_grad
        assert loss.is_inference() == (mode is torch.inference_mode)


@pytest.mark.parametrize(
    "dtypes", list(itertools.product([torch.float32, torch.bfloat16], repeat=3)), ids=str
)
@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
def test_autocast(reduction, dtypes, backend, tensors, target):
    """A bf16 backbone's hidden states meet a float32 head, and every other mixture of dtypes."""
    tensors = [x.to(dtype) for x, dtype in zip(tensors, dtypes, strict=True)]
    upstream = upstream_of(reduction, (N,))
    rounded = [tensors[0].bfloat16().float(), tensors[1].bfloat16().float(), tensors[2].float()]

    def plain(h, w, y, linear_bias):
        return F.cross_entropy(F.linear(h, w, linear_bias).float(), y, reduction=reduction)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = ours_of(tensors, target, upstream, reduction=reduction, chunk_rows=2)
        theirs = run(plain, tensors, target, upstream)
    assert [x.dtype for x in ours] == [torch.float32, *dtypes]
    theirs[0] = run(reference, rounded, target, reduction=reduction)[0]
    truth = truth_of(rounded, target, upstream, reduction=reduction)
    assert_right(ours, theirs, truth, backend=backend, roundings=2, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_of_a_model(dtype, backend, target):
    """As a training loop has it: the backbone's output has the autocast dtype, the head has not."""
    backbone, loss_function = torch.nn.Linear(4, D), sgp.LinearCrossEntropyLoss(D, V, bias=True)
    with torch.autocast("cpu", dtype=dtype):
        states = backbone(torch.randn(N, 4))
        loss = loss_function(states, target)
    assert states.dtype == dtype
    assert loss.dtype == torch.float32
    loss.backward()
    for parameter in (*backbone.parameters(), *loss_function.parameters()):
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.any()


@pytest.mark.usefixtures("two_threads")
def test_same_bits_twice_and_with_deterministic_algorithms(backend, tensors, target):
    """Uninitialised memory is filled with NaN in this mode: every output is written in full."""
    dtypes, targets = (torch.float32, *HALVES), (target, torch.full_like(target, IGNORE))
    cases = list(itertools.product(EARLY_OR_LATE, (ALL, INPUT), dtypes, targets))

    def every():
        for reduction, needs, dtype, y in cases:
            options = {"reduction": reduction, "chunk_rows": 2}
            yield from ours_of(cast(tensors, dtype), y, None, needs, **options)

    expected = list(every())
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        assert_equal(every(), expected)
    finally:
        torch.use_deterministic_algorithms(False)


# -- sixteen bits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["denominator", "token_weight"])
def test_float16_keeps_its_small_gradients(form, backend, device):
    """1 / N = 2^-15 before the loss scaler's 2^16: folded in first, the softmax's tail is gone."""
    count, classes = 2**15, 1000 if backend == "triton" else 3000
    hidden, head = (torch.randn(n, 16, device=device).half() / 4 for n in (2, classes))
    target, upstream = torch.tensor([0, 1], device=device), torch.tensor(2.0**16)
    options = {"denominator": count}
    if form == "token_weight":
        options = {"reduction": "sum", "token_weight": torch.full((2,), 1 / count)}
    ours = ours_of([hidden, head, None], target, upstream, chunk_rows=1, **options)
    truth = truth_of([hidden, head, None], target, upstream, **options)
    for value, exact in zip(ours[1:3], truth[1:3], strict=True):
        assert relative_error(value, exact) < 1.5e-3, "three roundings of half a unit"
    p = (hidden.double() @ head.double().t()).softmax(1)
    folded = ((p - F.one_hot(target, classes)) / count).half().double()
    naive = 2.0**16 * folded.t() @ hidden.double()
    assert relative_error(naive, truth[2]) > 0.1, "this case does not show what folding loses"


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_float16_tail_of_a_large_vocabulary(reduction, backend, device):
    """Few tokens and a loss scaler: PyTorch scales before it rounds, and so must a kernel."""
    hidden, head = (torch.randn(n, 8, device=device).half() for n in (2, 200))
    bias = torch.full((200,), -11.0, device=device).half()  # p around 1e-8 off the targets
    bias[:2] = 4.0
    tensors, target = [hidden, head, bias], torch.tensor([0, 1], device=device)
    upstream = torch.full((2,) if reduction == "none" else (), 2.0**14)
    truth = truth_of(tensors, target, upstream, reduction=reduction)[2][2:]
    plain = run(plain_logits, tensors, target, upstream, reduction=reduction)[2][2:]
    ours = ours_of(tensors, target, upstream, reduction=reduction)[2][2:]
    error, theirs = relative_error(ours, truth), relative_error(plain, truth)
    assert error <= 2 * theirs, f"beside the targets: {error:.3g}, PyTorch {theirs:.3g}"


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("size", [1e-4, 0.0])
def test_float16_small_class_weights_do_not_scale_the_z_loss(size, reduction, backend, tensors):
    """Class weights multiply the cross-entropy alone, whatever brings gradients into range."""
    options = {"weight": torch.full((V,), size), "lse_square_scale": 0.1, "reduction": reduction}
    check(cast(tensors, torch.float16), torch.arange(N), backend=backend, **options)


@pytest.mark.parametrize("needs", [ALL, (True, False, False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_class_weights_do_not_divide_the_z_loss(size, dtype, needs, backend, tensors, target):
    """Also in a mean over each sequence, whose z-loss is differentiated through the log-sum-exp."""
    if backend == "triton" and size == 1.0:
        return  # the interpreter takes its time
    options = {"weight": size * (torch.rand(V) + 0.5), "lse_square_scale": 0.1}
    tensors = cast(tensors, dtype)
    tensors[0] = tensors[0].view(2, 3, D)
    for reduction in ("mean", "sequence_mean"):
        check(
            tensors, target.view(2, 3), upstream_of(reduction, (2, 3)), backend=backend,
            needs=needs, chunk_rows=3, roundings=2 if reduction == "mean" else 1,
            reduction=reduction, **options,
        )  # fmt: skip


def test_float16_tiny_and_hugely_differing_weights(backend, tensors, target):
    """Each row of input.grad keeps its digits, whatever the others weigh."""
    tensors = cast(tensors, torch.float16)
    weight = torch.tensor([1.0, NAN, 1e-6, 300.0, NAN, 1e-3]) / 2**15
    options = {"token_weight": weight, "reduction": "sum"}
    for row, exponent in {3: 7, 0: 14, 5: 24, 2: 34}.items():  # brings one after the other in range
        alone, upstream = torch.full_like(target, IGNORE), torch.tensor(2.0**exponent)
        alone[row] = target[row]
        for y in (target, alone):
            ours = ours_of(tensors, y, upstream, **options)
            truth = truth_of(tensors, y, upstream, **options)
            error = relative_error(ours[1][row], truth[1][row])
            assert error < 1.5e-3, f"row {row} of weight {weight[row]}: {error:.3g}"
        error = relative_error(ours[2], truth[2])
        assert error < 2e-3, f"linear_weight.grad of row {row} alone: {error:.3g}"


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_bf16_in_64_chunks(reduction, backend, device):
    """Loss and gradients are summed in float32, over however many chunks."""
    tokens, classes = (256, 512) if backend == "torch" else (64, 96)
    hidden, head = (torch.randn(n, 32, device=device).bfloat16() for n in (tokens, classes))
    target = torch.randint(classes, (tokens,), device=device)
    assert len(chunks.parts(tokens, tokens // 64)) == 64
    truth = truth_of([hidden, head, None], target, reduction=reduction)
    ours = ours_of([hidden, head, None], target, reduction=reduction, chunk_rows=tokens // 64)
    assert relative_error(ours[0].sum(), truth[0].sum()) < 2e-5
    # One matmul on all rows, accumulated in float32, the logits' gradient rounded to bf16 before.
    p = (hidden.double() @ head.double().t()).softmax(1)
    g = (p - F.one_hot(target, classes)).bfloat16().float()
    whole = [truth[0], (g @ head.float()).bfloat16(), (g.t() @ hidden.float()).bfloat16(), None]
    assert_right(ours, [ours[0], *whole[1:]], truth, backend=backend)


# -- what it costs ---------------------------------------------------------------------------------

MATMULS = {  # which arguments are multiplied; matmul, linear and einsum call these
    "aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::addmm_": (1, 2), "aten::bmm": (0, 1),
    "aten::baddbmm": (1, 2), "aten::mv": (0, 1), "aten::addmv": (1, 2), "aten::addmv_": (1, 2),
}  # fmt: skip


def flops(work):
    """Multiplications and additions of every matmul inside `work`, from the profiler's shapes."""
    with torch.profiler.profile(record_shapes=True, acc_events=True) as profile:
        work()
    total = 0
    for event in profile.events():
        if event.name in MATMULS and getattr(event.cpu_parent, "name", None) not in MATMULS:
            left, right = (event.input_shapes[i] for i in MATMULS[event.name])
            total += 2 * math.prod(left) * (right[-1] if len(right) > 1 else 1)
    return total


def test_the_counter_counts(tensors, target):
    """Otherwise 0 = 0: a plain head with every side trained has 3 matmuls on all rows."""
    work = partial(run, plain_logits, tensors, target)
    assert flops(work) == 6 * N * V * D


@pytest.mark.parametrize(
    ("reduction", "needs", "matmuls"),
    [("mean", ALL, 3), ("sum", ALL, 3), ("mean", INPUT, 2), ("sum", HEAD, 2), ("mean", NOBODY, 1),
     ("mean", (False, False, True), 1), ("none", ALL, 4), ("none", INPUT, 2), ("none", HEAD, 3),
     ("none", NOBODY, 1), ("sequence_mean", ALL, 4), ("sequence_sum", INPUT, 2)],
)  # fmt: skip
def test_matmul_flops(reduction, needs, matmuls, tensors, target):
    """6 M V D for "mean" and "sum", 4 with one side frozen, 2 in evaluation; 8 for "none"."""
    tensors[0], target, kept = torch.randn(2 * N, D), target.repeat(2), 8
    for y, chunk_rows in ((target, None), (sgp.Selection.from_labels(target), 4)):
        work = partial(ours_of, tensors, y, None, needs, reduction=reduction, chunk_rows=chunk_rows)
        assert flops(work) == 2 * kept * V * D * matmuls
    nothing = partial(ours_of, tensors, torch.full_like(target, IGNORE), reduction=reduction)
    assert flops(nothing) == 0


def extra_peak(hidden, head, target, *, needs=(True, True), **options):
    """Most bytes above the inputs and their gradients, forward and backward."""
    leaves = leaves_of((hidden, head), needs)
    with cpu_peak() as held:
        sgp.linear_cross_entropy(*leaves, target, **options).backward()
    grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return held.peak_bytes - sum(grad.numel() * grad.element_size() for grad in grads)


def planned(kept, hidden, head, *, chunk_rows=chunks.UNSET, needs=(True, True)):
    """Bytes of the plan of a mean."""
    shape = Shape(
        kept, len(hidden), *head.shape, hidden.itemsize, head.itemsize, head.itemsize, *needs,
        is_half=head.dtype == torch.float16, wide=head.dtype == torch.float16, is_cpu=True,
    )  # fmt: skip
    return chunks.plan("f", shape, chunk_rows=chunk_rows).bytes


@pytest.mark.parametrize("form", ["labels", "selection"])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("chunk_rows", [512, 64], ids=["one chunk", "several"])
def test_peak_memory_is_the_formulas(chunk_rows, needs, form):
    tokens, kept, classes, width = 8192, 128, 8192, 32
    y = torch.randint(classes, (tokens,))
    y[torch.arange(tokens) % 64 != 0] = IGNORE
    y = sgp.Selection.from_labels(y) if form == "selection" else y
    hidden, head = torch.randn(tokens, width), torch.randn(classes, width)
    extra = extra_peak(hidden, head, y, needs=needs, chunk_rows=chunk_rows)
    formula = planned(kept, hidden, head, chunk_rows=chunk_rows, needs=needs)
    logits = 4 * min(kept, chunk_rows) * classes
    assert logits <= extra <= 1.05 * formula, f"{extra} bytes, formula {formula}"
    assert formula <= 1.05 * logits, "the logits of one chunk, and little else"
    assert extra - logits < hidden.numel() * 4, "no copy of the input, and no all logits"


def test_peak_memory_of_float16_rows_that_wait():
    """Their gradient waits in float32 for the loss scaler's factor, that of ignored rows too."""
    tokens, classes, width = 8192, 256, 256
    hidden, head = torch.randn(tokens, width).half(), torch.randn(classes, width).half()
    y = torch.full((tokens,), IGNORE)
    y[::256] = 3
    extra = extra_peak(hidden, head, y)
    formula = planned(32, hidden, head)
    assert 4 * tokens * width <= extra <= 1.05 * formula, f"{extra} bytes, formula {formula}"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_pytorchs_operators_fill_a_narrow_place(dtype):
    """Where there is no Triton on a GPU: the gradient may not be left as float32 bits."""
    logits, y = torch.randn(5, 12), torch.tensor([1, 2, 3, 4, 5])
    exact, narrow = torch.empty(5, 12), torch.empty(5, 12, dtype=dtype)
    for place in (exact, narrow):
        out = by_torch.new_outputs(logits, 5, Wanted(saved=True, stats=True))
        arguments = (y, None, None, None, Recipe(), out)
        by_torch.forward(logits.clone(), place, *arguments, scratch=True)
    assert torch.equal(narrow, exact.to(dtype))


def test_second_backward_is_refused_behind_hooks(tensors, target):
    """Hooks on saved tensors hide their versions from autograd."""
    leaves = leaves_of(tensors)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        loss = sgp.linear_cross_entropy(*leaves[:2], target)
    torch.autograd.grad(loss, leaves[:2], torch.tensor(3.0), retain_graph=True)
    with pytest.raises(RuntimeError, match="backward a second time"):
        torch.autograd.grad(loss, leaves[:2], torch.tensor(3.0))


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="PyTorch has no such tag")
def test_compiled_cuda_graphs_leave_the_head_out():
    """The number of kept rows is read on the host; a graph would replay that of its capture."""
    for name in ("kept_rows", "head_forward", "head_backward"):
        tags = getattr(torch.ops.sgp, name).default.tags
        assert torch.Tag.cudagraph_unsafe in tags, name


@pytest.mark.parametrize(("share", "factor"), [(1e-5, 1024.0), (1e-7, 65_536.0)])
def test_float16_rows_keep_their_digits_beside_a_large_one(share, factor, backend):
    """A row that is certain of its target and has all the weight must not flush the others."""
    hidden, head = torch.randn(16, 8), torch.randn(64, 8)
    hidden[0], head[0] = 20.0, 4.0
    tensors = [hidden.half(), head.half(), torch.zeros(64).half()]
    y = torch.randint(1, 64, (16,))
    y[0] = 0
    weight = torch.full((16,), share)
    weight[0] = 1.0
    options = {"token_weight": weight, "reduction": "sum"}
    upstream = torch.tensor(factor)
    truth = truth_of(tensors, y, upstream, **options)
    ours = ours_of(tensors, y, upstream, **options)
    for value, exact in zip(ours[2:], truth[2:], strict=True):
        assert relative_error(value.flatten(), exact.flatten()) < 3e-3


def test_float16_tail_beside_a_large_row(backend):
    """Classes that are no target, of rows with a ten-millionth of the largest one's weight."""
    hidden, head = torch.randn(16, 8), torch.randn(400, 8) / 4
    hidden[0], head[0] = 20.0, 4.0
    tensors = [hidden.half(), head.half(), None]
    y = torch.ones(16, dtype=torch.int64)
    y[0] = 0
    weight = torch.full((16,), 1e-7)
    weight[0] = 1.0
    options = {"token_weight": weight, "reduction": "sum"}
    upstream = torch.tensor(65_536.0)
    truth = truth_of(tensors, y, upstream, **options)[2][2:]
    ours = ours_of(tensors, y, upstream, **options)[2][2:]
    assert relative_error(ours.flatten(), truth.flatten()) < 1e-3


@pytest.mark.parametrize("form", ["labels", "selection"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
def test_nothing_is_waited_for_but_the_number_of_labels(reduction, dtype, form, monkeypatch):
    """What a GPU would be asked, without the kernels themselves: no value is read on the host.

    The number of kept rows is on the CPU and is read once in each operator over the head.
    """
    monkeypatch.setenv("SGP_BACKEND", "triton")
    monkeypatch.setattr("sgp.rows.by_triton.launch.Call.launch", lambda _: None)
    monkeypatch.setattr(problem, "may_wait", lambda _: False)
    hidden = torch.randn(2, 8, D).to(dtype)[:, 1:].requires_grad_()  # rows with gaps
    head = torch.randn(V, D).to(dtype).requires_grad_()
    y = torch.randint(V, (2, 7))
    y[:, :3] = IGNORE
    y = sgp.Selection.from_labels(y) if form == "selection" else y
    with torch.profiler.profile() as profile:
        loss = sgp.linear_cross_entropy(hidden, head, y, reduction=reduction, chunk_rows=2)
        torch.autograd.grad(loss, [hidden, head], torch.full_like(loss, 3.0))
    names = [event.name for event in profile.events()]
    operators = names.count("sgp::head_forward") + names.count("sgp::head_backward")
    assert operators == (1 if reduction == "mean" else 2), "the profiler saw nothing"
    assert names.count("aten::nonzero") == names.count("sgp::kept_rows") == (form == "labels")
    assert names.count("aten::_local_scalar_dense") == operators


def test_peak_memory_is_bounded_whatever_n_is():
    """V = 131 072 in chunks: four times the tokens cost their losses, numbers and masks."""
    classes, width, chunk_rows = 131_072, 4, 16
    head, extra = torch.randn(classes, width), []
    for tokens in (64, 256):
        y = torch.randint(classes, (tokens,))
        y[1::2] = IGNORE
        y = sgp.Selection.from_labels(y)
        hidden = torch.randn(tokens, width)
        extra.append(extra_peak(hidden, head, y, chunk_rows=chunk_rows))
        formula = planned(tokens // 2, hidden, head, chunk_rows=chunk_rows)
        assert 4 * chunk_rows * classes <= extra[-1] <= 1.05 * formula
    assert extra[1] - extra[0] <= 64 * (256 - 64), "64 bytes a token"


def test_default_chunks_keep_to_the_budget_of_a_cpu():
    tokens, classes = 640, 131_072
    y = torch.randint(classes, (tokens,))
    extra = extra_peak(torch.randn(tokens, 2), torch.randn(classes, 2), y)
    assert extra <= 1.05 * chunks.CPU_BYTES < 4 * tokens * classes


def test_backward_of_a_plain_loss_allocates_nothing():
    """The factor is 1: the gradients are handed over as they are, never copied."""
    hidden, head, _ = leaves_of([torch.randn(32, 64), torch.randn(4096, 64), None])
    loss = sgp.linear_cross_entropy(hidden, head, torch.arange(32))
    with cpu_peak() as held:
        loss.backward()
    assert head.grad.shape == head.shape
    assert held.peak_bytes < 1024, f"backward allocated {held.peak_bytes} bytes"


# -- torch.compile ---------------------------------------------------------------------------------

# Dynamo and inductor use what PyTorch itself has deprecated.
TRACING = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def compiled_counting():
    """function -> (compiled function, the list of the graphs that were made)."""
    torch._dynamo.reset()

    def compile_(function, compiler="aot_eager", *, dynamic=False):
        graphs = []

        def counting(graph, inputs):
            graphs.append(graph)
            return torch._dynamo.lookup_backend(compiler)(graph, inputs)

        compiled = torch.compile(function, backend=counting, fullgraph=True, dynamic=dynamic)
        return compiled, graphs

    yield compile_
    torch._dynamo.reset()


FORMS = {
    "labels": lambda labels: (labels,),
    "selection": lambda labels: (sgp.Selection.from_labels(labels),),
    "tensors of a selection": lambda labels: (
        labels, sgp.Selection.from_labels(labels).padded_rows, (labels != IGNORE).sum(),
    ),
}  # fmt: skip


@pytest.mark.core
@TRACING
@pytest.mark.parametrize(
    ("reduction", "needs", "form"),
    [("mean", ALL, "labels"), ("mean", ALL, "selection"), ("mean", ALL, "tensors of a selection"),
     ("mean", INPUT, "labels"), ("none", ALL, "labels"), ("none", INPUT, "selection")],
)  # fmt: skip
def test_compiled_is_eager_in_one_graph(reduction, needs, form, tensors, compiled_counting):
    """Forward and backward, for 3, 1, 0, 6 and 2 kept tokens."""
    leaves = leaves_of(tensors, needs)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def loss_of(h, w, b, *y):
        chosen = y[0] if len(y) == 1 else sgp.Selection(*y, shape=(N,), num_sequences=1)
        options = {"linear_bias": b, "reduction": reduction, "label_smoothing": 0.1}
        return sgp.linear_cross_entropy(h, w, chosen, chunk_rows=2, **options).sum()

    compiled, graphs = compiled_counting(loss_of)
    for mask in ([0, 2, 3], [0], [], list(range(N)), [5, 1]):
        labels = torch.full((N,), IGNORE)
        labels[mask] = torch.arange(len(mask))
        losses = [function(*leaves, *FORMS[form](labels)) for function in (loss_of, compiled)]
        factor = 1 + len(mask)  # of 1, backward makes nothing
        ours, expected = (
            [loss.detach(), *torch.autograd.grad(factor * loss, wanted)] for loss in losses
        )
        assert_same(ours, expected)
    assert len(graphs) == 1, f"{len(graphs)} graphs for five counts"


@TRACING
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiled_by_inductor(tensors, target, compiled_counting):
    """With a model's operators around it, and a factor."""
    leaves = leaves_of(tensors)[:2]

    def loss_of(h, w, y):
        return 3 * sgp.linear_cross_entropy(h.tanh(), w, y, shift=True) + h.sum()

    compiled, graphs = compiled_counting(loss_of, "inductor")
    for labels in (target, torch.full_like(target, IGNORE)):
        ours, expected = (function(*leaves, labels) for function in (compiled, loss_of))
        torch.testing.assert_close(ours, expected)
        gradients = (torch.autograd.grad(loss, leaves) for loss in (ours, expected))
        assert_same(*gradients)
    assert len(graphs) == 1


@TRACING
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_for_batches_of_any_length(dynamic, tensors, compiled_counting):
    """From the second length on, or from the first, N is a symbol."""
    compiled, graphs = compiled_counting(sgp.linear_cross_entropy, dynamic=dynamic)
    for length in (6, 5, 9, 3):
        leaves = leaves_of([torch.randn(2, length, D), *tensors[1:]])[:2]
        labels = torch.randint(V, (2, length))
        ours, expected = (
            [loss.detach(), *torch.autograd.grad(loss, leaves)]
            for loss in (f(*leaves, labels) for f in (compiled, sgp.linear_cross_entropy))
        )
        assert_same(ours, expected)
    assert len(graphs) <= 2


@TRACING
@pytest.mark.parametrize("reduction", EARLY_OR_LATE)
def test_compiled_second_backward_is_right_or_raises(reduction, tensors, target, compiled_counting):
    """The compiled backward must not multiply the saved gradient where it lies."""
    compiled, _ = compiled_counting(partial(sgp.linear_cross_entropy, reduction=reduction))
    leaves = leaves_of(tensors)[:2]
    loss = 3 * compiled(*leaves, target).sum()
    first = [x.clone() for x in torch.autograd.grad(loss, leaves, retain_graph=True)]
    try:
        second = torch.autograd.grad(loss, leaves)
    except RuntimeError:
        return
    assert_same(second, first)


# -- operators and chunks --------------------------------------------------------------------------


def operator_samples():
    """(operator, arguments): each operator with everything on, and with everything off."""
    forward, backward = head_operators.head_forward, head_operators.head_backward
    kept_rows, y = head_operators.kept_rows, torch.tensor([3, IGNORE, 10, 0, IGNORE, 3])
    x, w, b = torch.randn(N, D), torch.randn(V, D), torch.randn(V)
    row, upstream = torch.rand(N), Upstream()
    plain = LinearHead(x, w, None, y, *kept_rows(y, IGNORE))
    biased = plain._replace(input=x.view(2, 3, D), bias=b)
    half = plain._replace(input=x.half(), weight=w.half(), bias=b.half())
    brain = plain._replace(
        input=x.bfloat16().t().contiguous().t(), weight=w.bfloat16(), bias=b.bfloat16()
    )
    off = HeadCall(Recipe(IGNORE), torch.float32, 2, Needs())
    on = off._replace(recipe=Recipe(IGNORE, 0.1, 5.0, 2.0, 0.1, 0.7), needs=Needs(*ALL))
    mixed = plain._replace(weight=w.bfloat16(), bias=b)
    none, everything = (None, None, None), (torch.rand(V), row, torch.tensor(0.5))
    statistics = off._replace(wanted=Wanted(saved=True, stats=True))
    _, saved, _, entropy, *_ = forward(plain, *none, statistics)
    outputs = Wanted(saved=True, stats=True, argmax=True)
    wide = off._replace(compute_dtype=torch.float16, needs=Needs(*ALL), wide=True)
    autocast = off._replace(compute_dtype=torch.bfloat16, needs=Needs(*ALL))
    of_teacher = Divergence("jsd", 0.3, 0.2, 5.0, 0.7)
    teachers = Teachers([torch.randn(N, 3)], [torch.randn(V, 3)], [torch.randn(V)])
    distilled = on._replace(recipe=Recipe(IGNORE, temperature=2.0), divergence=of_teacher)
    with_teacher = distilled._replace(wanted=Wanted(saved=True, stats=True, width=SAVED))
    listed = Teachers(
        indices=torch.tensor([[1, 4]]).repeat(4, 1), log_probs=torch.full((4, 2), -2.0)
    )
    distil, distil_back = head_operators.distilled_forward, head_operators.distilled_backward
    of_two = distil(biased, teachers, row, None, with_teacher)[1]
    return {
        "distilled_forward": (distil, (biased, teachers, row, None, with_teacher)),
        "distilled_forward, few tokens": (distil, (biased, listed, row, None, distilled)),
        "distilled_backward": (distil_back, (biased, teachers, of_two, row, with_teacher)),
        "kept_rows": (kept_rows, (y, IGNORE)),
        "kept_rows, none": (kept_rows, (torch.full((3,), 2), 2)),
        "head_forward, all": (forward, (biased, *everything, on._replace(wanted=outputs))),
        "head_forward, loss only": (forward, (plain, *none, off)),
        "head_forward, wide": (forward, (half, *everything, wide)),
        "head_forward, autocast": (forward, (mixed, *none, autocast)),
        "head_backward, all": (
            backward,
            (biased, saved, everything[0], row, Upstream(row, row, entropy), on),
        ),
        "head_backward, nothing but input": (
            backward,
            (plain, saved, None, None, upstream, off._replace(needs=Needs(*INPUT))),
        ),
        "head_backward, strided, bf16": (
            backward,
            (brain, saved, None, row, upstream, autocast._replace(needs=Needs(*HEAD))),
        ),
    }


@pytest.mark.parametrize("sample", list(operator_samples()))
def test_opcheck(sample):
    """Schema (what is mutated, what is aliased), fake tensors, and tracing by AOTAutograd."""
    operator, arguments = operator_samples()[sample]
    torch.library.opcheck(operator.op, tuple(flat(arguments)))


def test_every_operator_is_checked():
    module = vars(head_operators)
    library = {name for name in module if isinstance(module[name], Operator)}
    checked = {operator.op._opname for operator, _ in operator_samples().values()}
    assert checked == library, "an operator without opcheck"


# -- the module ------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("bias", [False, True])
def test_module_is_the_function(bias, backend, tensors, target):
    options = {
        "weight": torch.rand(V), "label_smoothing": 0.1, "softcap": 3.0, "logit_scale": 2.0,
        "lse_square_scale": 0.1, "shift": True, "chunk_rows": 2,
    }  # fmt: skip
    module = sgp.LinearCrossEntropyLoss(D, V, bias=bias, ignore_index=None, **options)
    hidden, call = leaves_of(tensors)[0], {"token_weight": torch.rand(N), "denominator": 3.0}
    loss = module(hidden, target, **call)
    loss.backward()
    leaves = [hidden, module.linear.weight, module.linear.bias]
    expected = ours_of(leaves, target, **options, **call)
    assert_equal([loss, *(None if leaf is None else leaf.grad for leaf in leaves)], expected)
    module.linear = torch.nn.Linear(D, V)  # a model's own
    own = [hidden, module.linear.weight, module.linear.bias]
    assert torch.equal(module(hidden, target), ours_of(own, target, **options)[0])


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch older than 2.12")
@pytest.mark.parametrize("places", [(), (2, 1)], ids=str)
def test_module_is_pytorchs_module(places, tensors):
    """The same parameters by the same names and, from the same seed, of the same values."""
    options = {"out_features": places, "bias": True, "weight": torch.rand(V)}
    modules = []
    for kind in (sgp.LinearCrossEntropyLoss, torch.nn.LinearCrossEntropyLoss):
        torch.manual_seed(0)
        modules.append(kind(D, V, **options))
    ours, theirs = modules
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_equal(ours.state_dict().values(), theirs.state_dict().values())
    target = torch.randint(V, (N, *places))
    torch.testing.assert_close(ours(tensors[0], target), theirs(tensors[0], target))


def test_module_survives_deepcopy_pickle_and_state_dict(tensors, target):
    make = partial(sgp.LinearCrossEntropyLoss, D, V, softcap=5.0, reduction="sum")
    module, other = make(weight=torch.rand(V)), make(weight=torch.ones(V))
    expected = module(tensors[0], target)
    other.load_state_dict(module.state_dict())
    for twin in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):  # noqa: S301
        assert repr(twin) == repr(module)
        assert torch.equal(twin(tensors[0], target), expected)
        assert twin.linear.weight is not module.linear.weight
    assert module.bfloat16()(tensors[0].bfloat16(), target).dtype == torch.float32


def test_module_repr_shows_what_is_not_default():
    text = repr(sgp.LinearCrossEntropyLoss(3, 7, softcap=30.0, shift=True, chunk_rows=5))
    assert "softcap=30.0, shift=True, chunk_rows=5" in text
    assert "in_features=3, out_features=7, bias=False" in text
    assert "label_smoothing" not in text


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch older than 2.12")
def test_class_probabilities_of_a_batch_of_sequences(tensors):
    """PyTorch's samples have (C,), (N, C) and K dimensions; these run on whole logits, too."""
    tensors[0], p = tensors[0].view(2, 3, D), torch.randn(2, 3, V).softmax(-1)
    rows = [tensors[0].view(N, D), *tensors[1:]]
    ours, plain = (
        run(function, x, q, reduction="none", label_smoothing=0.1)
        for function, x, q in (
            (sgp.linear_cross_entropy, tensors, p),
            (F.linear_cross_entropy, rows, p.view(N, V)),
        )
    )
    assert ours[0].shape == (2, 3)
    assert_same((x.flatten() for x in ours), (x.flatten() for x in plain))


# -- refusals repeat what was passed ---------------------------------------------------------------

X, W, Y, P = torch.zeros(2, 4), torch.zeros(3, 4), torch.tensor([0, 1]), torch.full((2, 3), 1 / 3)
KD, CHOSEN = torch.zeros(3, 2, 4), sgp.Selection.from_labels(Y)
THREE = sgp.Selection.from_labels(torch.tensor([[0, 1, 2]]))
GRAD2, GRAD3 = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
NEGATIVE = torch.tensor([1.0, -2.5])
# fmt: off
ERRORS = [
    (([[0.0]], W, Y), {}, TypeError, r"input is a list"),
    ((X, [[0.0]], Y), {}, TypeError, r"linear_weight is a list"),
    ((X, W, Y), {"linear_bias": [0.0]}, TypeError, r"linear_bias is a list"),
    ((X, W, [0, 1]), {}, TypeError, r"target is a list"),
    ((X.long(), W, Y), {}, TypeError, r"input is torch\.int64"),
    ((X, W.long(), Y), {}, TypeError, r"linear_weight torch\.int64"),
    ((X, W.double(), Y), {}, TypeError, r"input is torch\.float32 and linear_weight .*float64"),
    ((X, W, Y), {"linear_bias": W[:, 0].double()}, TypeError, r"linear_bias torch\.float64"),
    ((X, W, Y.bool()), {}, TypeError, r"target is torch\.bool"),
    ((X[0, 0], W, Y), {}, ValueError, r"input has no dimensions"),
    ((X, W[0], Y), {}, ValueError, r"input is \(2, 4\) and linear_weight \(4,\)"),
    ((X, W[:, :3], Y), {}, ValueError, r"input is \(2, 4\) and linear_weight \(3, 3\)"),
    ((X, W[:0], Y), {}, ValueError, r"linear_weight is \(0, 4\)"),
    ((X, W, Y), {"linear_bias": X[0]}, ValueError, r"linear_bias is \(4,\); expected \(3,\)"),
    ((X, W.to("meta"), Y), {}, ValueError, r"input is on cpu and linear_weight on meta"),
    ((X, W, Y.to("meta")), {}, ValueError, r"input is on cpu and target on meta"),
    ((X, W, Y[:1]), {}, ValueError, r"input is \(2, 4\) and target \(1,\).*of shape \(2,\)"),
    ((X[None], W, Y), {"shift": True}, ValueError, r"shift=True needs.*\(1, 2, 4\).*\(2,\)"),
    ((X[0], W, Y[0]), {"shift": True}, ValueError, r"shift=True needs.*\(4,\)"),
    ((X, W, CHOSEN), {"shift": True}, ValueError, r"shift=True together with a Selection"),
    ((X, W, CHOSEN), {"token_weight": Y}, ValueError, r"a Selection carries its own weights"),
    ((X, W, CHOSEN), {"ignore_index": 0}, ValueError, r"ignore_index = 0 together with a Sel"),
    ((X, W, THREE), {}, ValueError, r"input is \(2, 4\) and the Selection has shape \(1, 3\).*3"),
    ((X, KD, CHOSEN), {}, ValueError, r"Selection.*\(3, 2, 4\)"),
    ((X[None], KD, Y), {}, ValueError, r"input is \(1, 2, 4\).*\(3, 2, 4\)"),
    ((X, W, P), {"shift": True}, ValueError, r"shift.*class indices"),
    ((X, W, P[:, :2]), {}, ValueError, r"target \(2, 2\)"),
    ((X, W, Y), {"chunk_rows": 0}, ValueError, r"chunk_rows = 0; expected at least 1"),
    ((X, W, Y), {"chunk_rows": -3}, ValueError, r"chunk_rows = -3"),
    ((X, W, Y), {"chunk_rows": 2.5}, TypeError, r"chunk_rows = 2\.5"),
    ((X, W, Y), {"chunk_rows": True}, TypeError, r"chunk_rows = True"),
    ((X, W, Y), {"token_weight": GRAD2}, ValueError, r"token_weight requires grad"),
    ((X, W, Y), {"token_weight": GRAD3}, ValueError, r"token_weight is \(3,\); expected \(2,\)"),
    ((X, W, Y), {"token_weight": NEGATIVE}, ValueError, r"of row 1 is -2\.5.*denominator= or use"),
    ((X, W, Y), {"weight": GRAD3}, ValueError, r"weight requires grad"),
    ((X, W, Y), {"reduction": "avg"}, ValueError, r"reduction = 'avg'"),
    ((X, W, Y), {"reduction": "sum", "denominator": 2}, ValueError, r"no meaning with .*'sum'"),
    ((X, W, Y), {"softcap": -30.0}, ValueError, r"softcap = -30\.0"),
    ((X, W, Y), {"label_smoothing": 2.0}, ValueError, r"label_smoothing = 2\.0"),
]
# fmt: on


@pytest.mark.parametrize("case", range(len(ERRORS)), ids=lambda case: ERRORS[case][-1])
def test_error_says_what_was_passed(case):
    arguments, options, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message) as caught:
        sgp.linear_cross_entropy(*arguments, **options)
    assert str(caught.value).startswith("sgp."), "the message says whose function refused"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"reduction": "avg"}, r"reduction = 'avg'"), ({"chunk_rows": 0}, r"chunk_rows = 0"),
     ({"softcap": 0.0}, r"softcap = 0\.0"), ({"weight": GRAD3}, r"weight is \(3,\); .*\(7,\)")],
)  # fmt: skip
def test_module_refuses_at_construction(options, message):
    with pytest.raises(ValueError, match=r"sgp\.LinearCrossEntropyLoss: " + message):
        sgp.LinearCrossEntropyLoss(4, 7, **options)


def test_negative_weights_are_fine_with_sum_and_with_a_denominator(backend, tensors, target):
    """Advantages of policy gradients: the sum and a given divisor are stable."""
    weight = torch.tensor([1.0, NAN, -0.25, 0.5, NAN, -3.0])
    for options in ({"reduction": "sum"}, {"denominator": 3.0}, {"reduction": "none"}):
        check(tensors, target, backend=backend, chunk_rows=2, token_weight=weight, **options)

"""`sgp.cross_entropy`, its options and its errors, on PyTorch's operators and on the kernels."""

# ruff: noqa: ARG001  (fixtures are asked for by name, for what they do)

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing._internal.common_methods_invocations import op_db

import sgp
from sgp.rows import operators
from tests.oracle import (
    assert_no_worse,
    check_cross_entropy,
    in_float64,
    loss_and_grad,
    relative_error,
    sample_in,
    sample_results,
)

IGNORE = -100

# Every implementation of a row: PyTorch's operators, and the forms of the kernel. Left alone, the
# launch table holds rows of up to 4096 columns on chip and streams longer ones.
IMPLEMENTATIONS = pytest.mark.parametrize(
    ("backend", "row_form"),
    [("torch", "auto"), ("triton", "auto"), ("triton", "staying")],
    indirect=True,
    ids=["torch", "auto-resident", "staying-streaming"],
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20)


@pytest.fixture
def row_form(request, monkeypatch):
    monkeypatch.setenv("SGP_ROW_FORM", request.param)
    return request.param


def interpreted(backend):
    return backend == "triton" and not torch.cuda.is_available()


def batch(N, V, device, dtype=torch.float32, ignored=(1,)):
    """Logits of standard deviation 3 and random targets, some of them ignored."""
    logits = (3 * torch.randn(N, V, device=device)).to(dtype)
    target = torch.randint(V, (N,), device=device)
    target[[i for i in ignored if i < N]] = IGNORE
    return logits, target


# -- (a) PyTorch's own sample inputs ---------------------------------------------------------------

SAMPLES = next(op for op in op_db if op.name == "nn.functional.cross_entropy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_pytorch_sample_inputs(backend, dtype, device):
    if dtype == torch.float64 and backend == "triton":
        with pytest.raises(RuntimeError, match=r"SGP_BACKEND=triton cannot run: .*float64"):
            sgp.cross_entropy(torch.zeros(2, 3, dtype=dtype), torch.zeros(2, dtype=torch.int64))
        return
    samples = list(SAMPLES.sample_inputs(device, dtype, requires_grad=True))
    assert len(samples) >= 21, f"PyTorch's op_db has {len(samples)} samples; it had 21 in 2.13"
    for sample in samples:
        upstream = None
        if sample.kwargs.get("reduction") == "none":
            upstream = torch.randn(sample_results(F.cross_entropy, sample)[0].shape, device=device)
        truth = sample_results(F.cross_entropy, sample_in(torch.float64, sample), upstream)
        plain = sample_results(F.cross_entropy, sample, upstream)
        loss, *grads = sample_results(sgp.cross_entropy, sample, upstream)
        # A deliberate difference: the loss of bf16 logits is float32, and as good as float32.
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        if dtype == torch.bfloat16:
            plain[0] = sample_results(F.cross_entropy, sample_in(torch.float32, sample))[0]
        assert_no_worse(loss, plain[0], truth[0])
        for grad, other, exact in zip(grads, plain[1:], truth[1:], strict=True):
            assert grad.dtype == dtype
            assert_no_worse(grad, other, exact, interpreted=interpreted(backend))


def test_difference_from_pytorch_mean_of_nothing(backend, device):
    logits = torch.randn(3, 5, device=device)
    target = torch.full((3,), IGNORE, device=device)
    assert F.cross_entropy(logits, target).isnan(), "PyTorch's mean of nothing was NaN"
    loss, grad = loss_and_grad(sgp.cross_entropy, logits, target)
    assert loss.item() == 0.0, "the mean of nothing is 0, so that such a micro-batch kills no run"
    assert not grad.any()


def test_difference_from_pytorch_bf16_loss_is_not_rounded(backend, device):
    logits = torch.randn(4, 300, device=device).bfloat16()
    target = torch.tensor([0, 1, 2, 299], device=device)
    loss = sgp.cross_entropy(logits, target)
    exact = F.cross_entropy(logits.double(), target)
    assert loss.dtype == torch.float32
    assert abs(loss.double() - exact) < 1e-5 < abs(F.cross_entropy(logits, target) - exact)


# -- (b) options, reductions, dtypes, vocabularies -------------------------------------------------


def options_of(name, N, V, device):
    """The keywords of one option (or all of them) for N tokens and V classes."""
    weight = torch.rand(V, device=device) + 0.1
    weight[0] = 0.0  # a class without weight is not the same as an ignored one
    token_weight = torch.rand(N, device=device) + 0.1
    every = {
        "weight": {"weight": weight},
        "label_smoothing": {"label_smoothing": 0.1},
        "token_weight": {"token_weight": token_weight},
        "softcap": {"softcap": 5.0},
        "logit_scale": {"logit_scale": -0.7},  # a negative scale moves the maximum
        "z_loss": {"lse_square_scale": 0.05},
        "ignore_index": {"ignore_index": 0},  # inside the vocabulary, as some tokenizers' padding
    }
    if name == "plain":
        return {}
    if name == "all":
        return {
            k: v for n, option in every.items() if n != "ignore_index" for k, v in option.items()
        }
    return every[name]


OPTIONS = [
    "plain",
    "weight",
    "label_smoothing",
    "token_weight",
    "softcap",
    "logit_scale",
    "z_loss",
    "ignore_index",
    "all",
]
REDUCTIONS = ["mean", "sum", "none", "sequence_sum", "sequence_mean"]


@pytest.mark.core
@IMPLEMENTATIONS
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("option", OPTIONS)
def test_option_and_reduction(option, reduction, backend, row_form, device):
    N, V = 6, 77
    logits, target = batch(N, V, device)
    options = options_of(option, N, V, device)
    if option == "ignore_index":
        target = torch.tensor([3, 0, 0, 76, 1, 0], device=device)
    # Two sequences of three tokens as (N, V, d1) with N = 2, so that "sequence" has a meaning.
    logits = logits.view(2, 3, V).transpose(1, 2)
    target = target.view(2, 3)
    if "token_weight" in options:
        options["token_weight"] = options["token_weight"].view(2, 3)
    shape = {"none": (2, 3), "sequence_sum": (2,), "sequence_mean": (2,)}.get(reduction, ())
    # "mean" and "sum" with a factor other than 1: the factor kernel has something to do.
    upstream = torch.randn(shape, device=device)
    check_cross_entropy(logits, target, upstream, reduction=reduction, **options)


VOCABULARIES = {
    1: "one class: the loss is 0 and so is the gradient",
    2: "the smallest that says anything",
    7: "odd and smaller than any block",
    128: "half of the smallest block",
    256: "exactly the smallest block",
    1000: "no power of two divides it beyond 8",
    8192: "exactly one block of the narrower lines",
    8193: "one column more, and rows that begin and end between two accesses",
    12000: "one block, with room to spare, or three",
    20011: "prime; several blocks of any width",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("option", ["plain", "all"])
@pytest.mark.parametrize("V", VOCABULARIES)
@IMPLEMENTATIONS
def test_vocabulary_and_dtype(V, option, dtype, backend, row_form, device):
    N = 3
    logits, target = batch(N, V, device, dtype)
    options = options_of(option, N, V, device)
    target[2] = V - 1  # the last column of the last block
    check_cross_entropy(logits, target, reduction="mean", **options)


@IMPLEMENTATIONS
def test_unknown_row_form_is_an_error(backend, row_form, device, monkeypatch):
    if backend == "torch":
        return  # the form is the kernels' business
    monkeypatch.setenv("SGP_ROW_FORM", "sideways")
    with pytest.raises(ValueError, match="SGP_ROW_FORM = 'sideways'"):
        sgp.cross_entropy(torch.zeros(1, 3), torch.tensor([0]))


# -- (c) shapes and forms of the target ------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "target_shape"),
    [((5,), ()), ((1, 5), (1,)), ((3, 5, 2), (3, 2)), ((2, 5, 3, 2), (2, 3, 2)), ((0, 5), (0,))],
    ids=["0-d target", "one row", "one more dimension", "two more dimensions", "no rows"],
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_shapes_of_pytorch(shape, target_shape, reduction, backend, device):
    logits = torch.randn(shape, device=device)
    target = torch.randint(5, target_shape, device=device)
    upstream = torch.randn(target_shape if reduction == "none" else (), device=device)
    run = partial(loss_and_grad, target=target, upstream=upstream, reduction=reduction)
    truth = run(F.cross_entropy, logits.double())
    plain = run(F.cross_entropy, logits)
    ours = run(sgp.cross_entropy, logits)
    if truth[0].isnan().any():  # the mean of no rows
        truth, plain = (torch.zeros(()), truth[1]), (torch.zeros(()), plain[1])
    assert_no_worse(ours[0], plain[0], truth[0])
    assert_no_worse(ours[1], plain[1], truth[1])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_row_without_batch_is_like_a_batch_of_one(reduction, backend, device):
    logits, y = torch.randn(7, device=device), torch.tensor(3, device=device)
    options = {"reduction": reduction, "token_weight": torch.tensor(0.5, device=device)}
    single = loss_and_grad(sgp.cross_entropy, logits, y, **options)
    options["token_weight"] = options["token_weight"][None]
    batched = loss_and_grad(sgp.cross_entropy, logits[None], y[None], **options)
    assert torch.equal(single[0].flatten(), batched[0].flatten())
    assert torch.equal(single[1], batched[1][0])


def test_reference_takes_one_row_without_batch(device):
    logits, y = torch.randn(7, device=device), torch.tensor(3, device=device)
    loss = sgp.reference.cross_entropy(logits, y)
    assert_no_worse(loss, F.cross_entropy(logits, y), F.cross_entropy(logits.double(), y))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_integer_targets_of_any_width(dtype, backend, device):
    logits = torch.randn(3, 9, device=device)
    target = torch.tensor([0, 8, 4], device=device)
    ours = sgp.cross_entropy(logits, target.to(dtype))
    assert torch.equal(ours, sgp.cross_entropy(logits, target))


def test_strided_targets_are_read_by_their_indices(backend, device):
    """A column of a table of labels, say."""
    logits = torch.randn(4, 9, device=device)
    table = torch.tensor([[0, 5], [8, 6], [-100, 7], [4, 1]], device=device)
    target = table[:, 0]
    assert not target.is_contiguous()
    found = sgp.cross_entropy(logits, target, reduction="none")
    assert torch.equal(found, sgp.cross_entropy(logits, target.clone(), reduction="none"))
    assert found[2] == 0


@pytest.mark.core
@pytest.mark.parametrize("layout", ["transposed", "every other column", "three levels", "rows"])
def test_strided_logits_are_read_where_they_are(layout, backend, device):
    if layout == "transposed":
        logits = torch.randn(9, 4, device=device).t()
    elif layout == "every other column":
        logits = torch.randn(4, 18, device=device)[:, ::2]
    elif layout == "rows":
        logits = torch.randn(8, 9, device=device)[::2]
    else:  # (2, 2, 3) tokens whose strides do not merge, sliced in time: needs three strides
        logits = torch.randn(3, 5, 2, 9, device=device).permute(2, 0, 1, 3)[:, :, :4].movedim(-1, 1)
    target = torch.randint(9, logits.select(1, 0).shape, device=device)
    target.view(-1)[1] = IGNORE
    leaf = logits.clone(memory_format=torch.preserve_format).requires_grad_()
    contiguous = loss_and_grad(sgp.cross_entropy, logits.contiguous(), target)
    before = logits.clone()
    loss = sgp.cross_entropy(leaf, target)
    (grad,) = torch.autograd.grad(loss, leaf)
    view = logits.detach().requires_grad_()  # the very strides
    loss_of_view = sgp.cross_entropy(view, target)
    (grad_of_view,) = torch.autograd.grad(loss_of_view, view)
    assert torch.equal(logits, before)
    assert_no_worse(grad, contiguous[1], contiguous[1])
    assert_no_worse(grad_of_view, contiguous[1], contiguous[1])
    assert_no_worse(loss_of_view, contiguous[0], contiguous[0])


PROBABILITY_OPTIONS = {
    "plain": {},
    "label_smoothing": {"label_smoothing": 0.2},
    "weight": {"weight": torch.tensor([0.5, 1.0, 2.0, 0.0])},
    "both": {"label_smoothing": 0.2, "weight": torch.tensor([0.5, 1.0, 2.0, 0.1])},
}


@pytest.mark.parametrize("option", PROBABILITY_OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (3, 4, 2)], ids=str)
def test_class_probabilities(shape, reduction, option, backend, device):
    """As PyTorch's; what is ours alone is in test_probabilities.py."""
    logits = torch.randn(shape, device=device)
    dim = 0 if len(shape) == 1 else 1
    target = torch.randn(shape, device=device).softmax(dim)
    options = {
        k: v.to(device) if isinstance(v, torch.Tensor) else v
        for k, v in PROBABILITY_OPTIONS[option].items()
    }
    truth = loss_and_grad(
        F.cross_entropy, logits.double(), target.double(), reduction=reduction,
        **in_float64(options),
    )  # fmt: skip
    plain = loss_and_grad(F.cross_entropy, logits, target, reduction=reduction, **options)
    ours = loss_and_grad(sgp.cross_entropy, logits, target, reduction=reduction, **options)
    assert_no_worse(ours[0], plain[0], truth[0])
    # By token: of one class, p - q may be next to nothing for all tokens.
    assert_no_worse(*(grads[1].movedim(dim, -1) for grads in (ours, plain, truth)))


@pytest.mark.core
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_hot_probabilities_are_class_indices(reduction, backend, device):
    """Every option of this package means the same with a distribution as with an index."""
    logits = torch.randn(2, 5, 3, device=device)
    target = torch.randint(5, (2, 3), device=device)
    one_hot = F.one_hot(target, 5).movedim(-1, 1).float()
    options = {
        "reduction": reduction,
        "token_weight": torch.rand(2, 3, device=device) + 0.1,
        "label_smoothing": 0.1,
        "softcap": 4.0,
        "logit_scale": 0.5,
        "lse_square_scale": 0.1,
    }
    indices = loss_and_grad(sgp.cross_entropy, logits, target, **options)
    spread = loss_and_grad(sgp.cross_entropy, logits, one_hot, **options)
    assert relative_error(spread[0], indices[0]) < 1e-6
    assert relative_error(spread[1], indices[1]) < 1e-6


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("form", ["int", "float", "0-d float tensor", "0-d int tensor"])
def test_denominator_replaces_the_divisor(form, kind, backend, device):
    logits = torch.randn(4, 6, device=device)
    target = torch.tensor([1, IGNORE, 2, 5], device=device)
    if kind == "probabilities":
        target = torch.randn(4, 6, device=device).softmax(1)
    denominator = {
        "int": 7,
        "float": 7.0,
        "0-d float tensor": torch.tensor(7.0, device=device),
        "0-d int tensor": torch.tensor(7),  # on the CPU, as a count that was summed by all_reduce
    }[form]
    total = loss_and_grad(sgp.cross_entropy, logits, target, reduction="sum")
    mean = loss_and_grad(sgp.cross_entropy, logits, target, denominator=denominator)
    assert relative_error(mean[0], total[0] / 7) < 3e-7
    assert relative_error(mean[1], total[1] / 7) < 3e-7


@pytest.mark.parametrize("denominator", [0, 0.0, torch.tensor(0)], ids=["int", "float", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_denominator_zero_gives_zero_connected_to_the_graph(denominator, dtype, backend, device):
    logits = torch.randn(3, 6, device=device).to(dtype)
    target = torch.tensor([1, IGNORE, 5], device=device)
    loss, grad = loss_and_grad(sgp.cross_entropy, logits, target, denominator=denominator)
    assert loss.item() == 0.0
    assert not grad.any(), "a divisor of 0 gives a gradient of 0"


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reference_takes_a_tensor_as_denominator_and_agrees(reduction, backend, device):
    logits = torch.randn(4, 6, device=device)
    target = torch.tensor([1, IGNORE, 2, 5], device=device)
    if reduction != "mean":
        with pytest.raises(ValueError, match=f"no meaning with reduction='{reduction}'"):
            sgp.cross_entropy(logits, target, reduction=reduction, denominator=3.0)
        return
    check_cross_entropy(logits, target, denominator=torch.tensor(3.0, device=device))


def test_gradient_accumulation_with_the_count_of_the_whole_batch(backend, device):
    logits = torch.randn(6, 9, device=device)
    target = torch.tensor([1, IGNORE, IGNORE, IGNORE, 5, 8], device=device)
    whole = loss_and_grad(sgp.cross_entropy, logits, target)
    count = (target != IGNORE).sum()
    parts = [
        loss_and_grad(sgp.cross_entropy, logits[i : i + 2], target[i : i + 2], denominator=count)
        for i in (0, 2, 4)
    ]
    assert relative_error(sum(loss for loss, _ in parts), whole[0]) < 3e-7
    assert relative_error(torch.cat([grad for _, grad in parts]), whole[1]) < 3e-7


def test_a_mean_counts_more_tokens_than_float32_can():
    """2^24 + 1 is no float32; a long context over many ranks comes near."""
    N = (1 << 24) + 1
    target = torch.zeros(1, dtype=torch.int64).expand(N)
    scale = operators.mean_scale(target, None, None, IGNORE, torch.float64, "sgp")
    assert round(1 / float(scale)) == N


def test_class_weights_do_not_divide_the_z_loss(backend, device):
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]], device=device)
    target, z_loss = torch.tensor([0, 2], device=device), {"lse_square_scale": 0.1}
    for weight, expected in (
        (None, 1.5810),
        ([0.01, 0.01, 0.01], 1.5810),
        ([0.2, 1.0, 0.6], 1.2715),
        ([0.0, 1.0, 0.0], 0.7922),  # 0.1 (2.4076^2 + 3.1698^2) / 2: no class counts, z-loss does
    ):
        w = None if weight is None else torch.tensor(weight, device=device)
        loss, grad = check_cross_entropy(logits, target, weight=w, **z_loss)
        assert abs(float(loss) - expected) < 1e-4
        by_sequence = loss_and_grad(
            sgp.cross_entropy, logits.t()[None], target[None], weight=w,
            reduction="sequence_mean", **z_loss,
        )  # fmt: skip
        torch.testing.assert_close(by_sequence[0], loss[None])
        torch.testing.assert_close(by_sequence[1][0].t(), grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sequence_mean_with_class_weights_and_z_loss(dtype, backend, device):
    """Each sequence has two divisors of its own, which no factor on the class weights makes one."""
    logits = (3 * torch.randn(3, 7, 4, device=device)).to(dtype)
    target = torch.randint(7, (3, 4), device=device)
    target[0, :2] = target[1] = IGNORE
    options = {
        "weight": torch.rand(7, device=device), "token_weight": torch.rand(3, 4, device=device),
        "lse_square_scale": 0.1, "label_smoothing": 0.1, "reduction": "sequence_mean",
    }  # fmt: skip
    upstream = torch.randn(3, device=device)
    check_cross_entropy(logits, target, upstream, **options)
    plain = sgp.reference.cross_entropy(logits, target, **options)
    torch.testing.assert_close(sgp.cross_entropy(logits, target, **options), plain)
    leaf = logits.clone().requires_grad_()
    loss, stats = sgp.cross_entropy(
        leaf * 1, target, inplace=True, return_stats=True, **options
    )  # the gradient in place, and statistics that stay detached
    assert not any(x.requires_grad for x in stats[:4])
    loss.backward(upstream)
    _, grad = loss_and_grad(sgp.cross_entropy, logits, target, upstream, **options)
    torch.testing.assert_close(leaf.grad, grad)


def test_token_weight_of_zero_is_not_ignored(backend, device):
    logits = torch.zeros(2, 4, device=device)
    logits[1, 2] = math.nan
    target = torch.tensor([1, 1], device=device)
    weight = torch.tensor([1.0, 0.0], device=device)
    loss = sgp.cross_entropy(logits, target, token_weight=weight)
    assert loss.isnan(), "a row of weight 0 is read: its NaN stays NaN, as the docstring says"
    target[1] = IGNORE
    weight[1] = math.nan
    assert sgp.cross_entropy(logits, target, token_weight=weight).item() == pytest.approx(
        math.log(4)
    ), "nothing of an ignored row counts, its weight included"


def selections(device):
    """Selections of the same eight tokens, by what their sequences are."""
    labels = torch.tensor([[3, 0, IGNORE, 6], [IGNORE, 5, 1, IGNORE]], device=device)
    weight = torch.tensor([[0.5, 2.0, 9.0, 1.0], [9.0, 0.1, 3.0, 9.0]], device=device)
    make = sgp.Selection.from_labels
    packed = labels.flatten().clone()
    packed[7] = IGNORE
    return {
        "rows": make(labels),
        "shifted": make(labels, shift=True),
        "weighted": make(labels, shift=True, token_weight=weight),
        "ragged, packed": make(packed, cu_seqlens=torch.tensor([0, 3, 3, 7])),
        "packed in rows": make(labels, cu_seqlens=torch.tensor([0, 1, 4, 8])),
        "context lengths": sgp.Selection.from_context_lengths(
            labels.clamp(min=0), torch.tensor([2, 1]), lengths=torch.tensor([4, 3])
        ),
    }


SELECTIONS = list(selections("cpu"))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", SELECTIONS)
def test_selection_instead_of_labels(kind, reduction, backend, device):
    selection = selections(device)[kind]
    V = 7
    logits = torch.randn(8, V, device=device)
    shape = {
        "none": selection.shape,
        "sequence_sum": (selection.num_sequences,),
        "sequence_mean": (selection.num_sequences,),
    }.get(reduction, ())
    upstream = torch.randn(shape, device=device)
    loss, grad = check_cross_entropy(logits, selection, upstream, reduction=reduction)
    context = torch.ones(8, dtype=torch.bool)
    context[selection.rows.cpu()] = False
    assert not grad[context.to(device)].any(), "context rows have a gradient of exactly zero"
    # By hand: the reductions of the losses of the kept rows, sequence by sequence.
    nll = F.cross_entropy(logits[selection.rows], selection.target, reduction="none")
    counts = torch.ones_like(nll) if selection.weight is None else selection.weight
    if reduction.startswith("sequence"):
        zeros = torch.zeros(selection.num_sequences, device=device)
        expected = zeros.index_add(0, selection.sequence, counts * nll)
        if reduction == "sequence_mean":
            divisor = zeros.index_add(0, selection.sequence, counts)
            expected = torch.where(divisor > 0, expected / divisor, 0.0)
    elif reduction == "none":
        expected = torch.zeros(8, device=device).index_copy(0, selection.rows, counts * nll)
        expected = expected.view(selection.shape)
    else:
        expected = (counts * nll).sum() / (counts.sum() if reduction == "mean" else 1)
    assert relative_error(loss, expected) < 1e-6


def test_selection_with_leading_dimensions(backend, device):
    labels = torch.tensor([[3, IGNORE], [0, 6]], device=device)
    logits = torch.randn(2, 2, 7, device=device)
    selection = sgp.Selection.from_labels(labels)
    nested = loss_and_grad(sgp.cross_entropy, logits, selection)
    flat = loss_and_grad(sgp.cross_entropy, logits.view(4, 7), labels.view(4))
    assert torch.equal(nested[0], flat[0])
    assert torch.equal(nested[1].view(4, 7), flat[1])


def test_sequence_without_targets_is_zero(backend, device):
    labels = torch.full((2, 3), IGNORE, device=device)
    labels[1, 0] = 2
    logits = torch.full((2, 3, 4), math.nan, device=device)
    logits[1, 0] = 0.0
    selection = sgp.Selection.from_labels(labels)
    for reduction in ("sequence_sum", "sequence_mean"):
        loss, grad = loss_and_grad(sgp.cross_entropy, logits, selection, reduction=reduction)
        assert loss.tolist() == pytest.approx([0.0, math.log(4)])
        assert not grad[0].any()


# -- statistics ------------------------------------------------------------------------------------


@pytest.mark.core
@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])  # one number for all rows, or one a row
def test_statistics_are_those_of_the_reference(reduction, dtype, backend, row_form, device):
    logits = (3 * torch.randn(2, 50, 3, device=device)).to(dtype)
    target = torch.randint(50, (2, 3), device=device)
    target[0, 1] = IGNORE
    logits[1, target[1, 0], 0] = 100.0  # the target is the most probable token
    options = {"softcap": 8.0, "logit_scale": 1.5}
    truth = sgp.reference.token_log_probs(logits.double(), target, **options)
    plain = sgp.reference.token_log_probs(logits, target, **options)
    leaf = logits.clone().requires_grad_()
    loss, stats = sgp.cross_entropy(
        leaf, target, reduction=reduction, return_stats=True, return_argmax=True,
        label_smoothing=0.1, **options,
    )  # fmt: skip
    alone = sgp.cross_entropy(leaf, target, reduction=reduction, label_smoothing=0.1, **options)
    assert torch.equal(loss, alone), "asking for statistics changed the loss"
    assert isinstance(stats, sgp.TokenLogProbs)
    assert stats.is_top1.dtype == torch.bool
    assert torch.equal(stats.is_top1, truth.is_top1)
    assert stats.is_top1[1, 0]
    scores = sgp.reference.token_log_probs(logits, target, return_argmax=True, **options)
    assert torch.equal(stats.argmax, scores.argmax)
    for field in ("log_prob", "entropy", "lse"):
        value = getattr(stats, field)
        assert value.shape == target.shape
        assert not value.requires_grad, f"{field} is detached"
        assert value[0, 1].item() == 0.0, f"{field} is 0 where the target is ignored"
        for row in range(6):  # each by itself: a log-probability near 0 hides beside a large one
            assert_no_worse(
                value.view(-1)[row],
                getattr(plain, field).view(-1)[row],
                getattr(truth, field).view(-1)[row],
            )
    loss.sum().backward()
    with torch.no_grad():
        asked = {"return_stats": True, "return_argmax": True}
        _, frozen = sgp.cross_entropy(logits, target, **asked, **options)
    for field in stats._fields:
        assert torch.equal(getattr(stats, field), getattr(frozen, field))


@pytest.mark.parametrize(
    "order", ["rising", "falling", "after a block of -inf", "after the least number"]
)
def test_statistics_of_a_row_of_many_blocks(order, backend, device):
    """The entropy's running sum is moved to each new maximum, block by block."""
    V = 40_000
    logits = 0.1 * torch.randn(1, V, device=device)
    ramp = torch.linspace(0.0, 3.0, V, device=device)
    logits += ramp if order == "rising" else ramp.flip(0)
    if order == "after a block of -inf":
        logits[:, : V // 2] = -math.inf
    if order == "after the least number":  # masks made with torch.finfo(dtype).min
        logits[:, : V // 2] = torch.finfo(torch.float32).min
    target = torch.tensor([V - 1], device=device)
    truth = sgp.reference.token_log_probs(logits.double(), target)
    _, stats = sgp.cross_entropy(logits, target, return_stats=True)
    for field in ("log_prob", "entropy", "lse"):
        assert relative_error(getattr(stats, field), getattr(truth, field)) < 2e-6, field


def test_statistics_of_an_impossible_token(backend, device):
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]], device=device)
    _, stats = sgp.cross_entropy(logits, torch.tensor([1], device=device), return_stats=True)
    assert stats.log_prob.item() == -math.inf
    assert stats.entropy.item() == pytest.approx(math.log(2))
    assert not stats.is_top1.item()


# -- shifted labels --------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [True, 2, 7])
def test_shift_is_by_hand_what_it_is(shift, backend, device):
    """Row t predicts token t + shift; labels and weights move, each sequence by itself."""
    logits, labels = torch.randn(2, 5, 9, device=device), torch.randint(9, (2, 5), device=device)
    labels[:, :2], weight = IGNORE, torch.rand(2, 5, device=device)
    ahead = min(int(shift), 5)
    target, token_weight = torch.full_like(labels, IGNORE), torch.zeros_like(weight)
    target[:, : 5 - ahead], token_weight[:, : 5 - ahead] = labels[:, ahead:], weight[:, ahead:]
    logits = logits.movedim(-1, 1)  # (B, V, T), which nobody copies
    for function in (sgp.cross_entropy, sgp.reference.cross_entropy):
        for reduction in ("mean", "none", "sequence_mean"):
            ours, expected = (
                loss_and_grad(function, logits, y, reduction=reduction, token_weight=w, shift=by)
                for y, w, by in ((labels, weight, shift), (target, token_weight, False))
            )
            assert torch.equal(ours[0], expected[0])
            assert torch.equal(ours[1], expected[1])
    module = sgp.CrossEntropyLoss(shift=shift)
    assert torch.equal(module(logits, labels), sgp.cross_entropy(logits, target))
    asked = {"return_argmax": True}
    _, stats = sgp.cross_entropy(logits, labels, shift=shift, return_stats=True, **asked)
    for result in (stats, sgp.token_log_probs(logits, labels, shift=shift, **asked)):
        for value, other in zip(result, sgp.token_log_probs(logits, target, **asked), strict=True):
            assert torch.equal(value, other)
    one = logits[0].t()  # (N, V) is one sequence
    by_hand = sgp.cross_entropy(one, target[0])
    assert torch.equal(sgp.cross_entropy(one, labels[0], shift=shift), by_hand)


# -- the module ------------------------------------------------------------------------------------


@pytest.mark.core
def test_module_is_the_function(backend, device):
    logits, target = batch(4, 9, device)
    weight = torch.rand(9, device=device)
    options = {"label_smoothing": 0.1, "softcap": 3.0, "logit_scale": 2.0, "lse_square_scale": 0.1}
    module = sgp.CrossEntropyLoss(weight, reduction="mean", ignore_index=None, **options)
    call = {"token_weight": torch.rand(4, device=device), "denominator": 3.0}
    ours = loss_and_grad(module, logits, target, **call)
    function = loss_and_grad(sgp.cross_entropy, logits, target, weight=weight, **options, **call)
    assert torch.equal(ours[0], function[0])
    assert torch.equal(ours[1], function[1])


def test_module_survives_deepcopy_pickle_and_state_dict(device):
    module = sgp.CrossEntropyLoss(
        torch.tensor([1.0, 2.0, 3.0]), reduction="sum", ignore_index=2, softcap=5.0
    ).to(device)
    logits, target = torch.randn(4, 3, device=device), torch.tensor([2, 0, 1, 2], device=device)
    expected = module(logits, target)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):  # noqa: S301
        assert twin is not module
        assert repr(twin) == repr(module)
        assert torch.equal(twin(logits, target), expected)
    assert list(module.state_dict()) == ["weight"]
    assert list(sgp.CrossEntropyLoss().state_dict()) == [], "no weight, nothing to save"
    other = sgp.CrossEntropyLoss(torch.ones(3), reduction="sum", ignore_index=2, softcap=5.0)
    other.to(device).load_state_dict(module.state_dict())
    assert torch.equal(other(logits, target), expected)


def test_module_repr_shows_what_is_not_default():
    assert repr(sgp.CrossEntropyLoss()) == "CrossEntropyLoss()"
    text = repr(sgp.CrossEntropyLoss(reduction="sum", softcap=30.0, inplace=True))
    assert text == "CrossEntropyLoss(reduction='sum', softcap=30.0, inplace=True)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "avg"}, r"sgp\.CrossEntropyLoss: reduction = 'avg'"),
        ({"label_smoothing": 1.5}, r"sgp\.CrossEntropyLoss: label_smoothing = 1\.5"),
        ({"softcap": 0.0}, r"sgp\.CrossEntropyLoss: softcap = 0\.0"),
        (
            {"return_argmax": True},
            r"sgp\.CrossEntropyLoss: return_argmax=True .* return_stats=True",
        ),
        ({"shift": -1}, r"sgp\.CrossEntropyLoss: shift = -1"),
    ],
)
def test_module_refuses_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        sgp.CrossEntropyLoss(**options)


# -- (d) errors repeat what was passed -------------------------------------------------------------

X, Y = torch.zeros(2, 3), torch.tensor([0, 1])
PROBABILITIES = torch.full((2, 3), 1 / 3)
ERRORS = {
    "input is a list": (([[0.0]], Y), {}, TypeError, r"input is a list"),
    "target is a list": ((X, [0, 1]), {}, TypeError, r"target is a list"),
    "integer input": ((X.long(), Y), {}, TypeError, r"input is torch\.int64"),
    "complex input": ((X.cfloat(), Y), {}, TypeError, r"input is torch\.complex64"),
    "bool target": ((X, Y.bool()), {}, TypeError, r"target is torch\.bool; expected int64"),
    "scalar input": ((torch.tensor(1.0), Y), {}, ValueError, r"input has no dimensions"),
    "no vocabulary": ((torch.zeros(2, 0), Y), {}, ValueError, r"\(2, 0\) has a vocabulary of 0"),
    "number of targets": (
        (X, torch.tensor([0, 1, 2])),
        {},
        ValueError,
        r"input is \(2, 3\) and target \(3,\) \(torch\.int64\); expected .* \(2,\)",
    ),
    "vocabulary last": (
        (torch.zeros(2, 4, 3), torch.zeros(2, 4, dtype=torch.int64)),
        {},
        ValueError,
        r"\(2, 4, 3\) and target \(2, 4\).*with the vocabulary last.*Selection",
    ),
    "shift and the vocabulary last": (
        (torch.zeros(2, 4, 3), torch.zeros(2, 4, dtype=torch.int64)),
        {"shift": True},
        ValueError,
        r"\(2, 4, 3\) and target \(2, 4\).*vocabulary last, pass input\.movedim\(-1, 1\)",
    ),
    "shift of one token": (
        (X[0], Y[0]),
        {"shift": True},
        ValueError,
        r"shift=True needs class indices \(T,\).*target is \(\)",
    ),
    "shift of probabilities": (
        (X, PROBABILITIES),
        {"shift": 2},
        ValueError,
        r"shift=2 needs class indices.*\(2, 3\)",
    ),
    "shift of a Selection": (
        (X, sgp.Selection.from_labels(Y)),
        {"shift": True},
        ValueError,
        r"shift=True together with a Selection",
    ),
    "negative shift": ((X, Y), {"shift": -1}, ValueError, r"shift = -1; expected at least 0"),
    "shift that is no number": ((X, Y), {"shift": "yes"}, TypeError, r"shift = 'yes'; expected"),
    "probabilities of another shape": (
        (X, PROBABILITIES[:, :2]),
        {},
        ValueError,
        r"input is \(2, 3\) and target \(2, 2\) \(torch\.float32\)",
    ),
    "probabilities and an ignored class": (
        (X, PROBABILITIES),
        {"ignore_index": 1},
        ValueError,
        r"ignore_index",  # PyTorch refuses it too: nothing would be ignored
    ),
    "probabilities in place": (
        ((X * 1).requires_grad_() * 1, PROBABILITIES),
        {"inplace": True},
        ValueError,
        r"inplace and return_stats need class indices.*\(2, 3\)",
    ),
    "statistics of probabilities": (
        (X, PROBABILITIES),
        {"return_stats": True},
        ValueError,
        r"return_stats need class indices.*\(2, 3\)",
    ),
    "target above": (
        (X, torch.tensor([0, 3])),
        {},
        IndexError,
        r"target\[1\] = 3 is outside \[0, 3\)",
    ),
    "target below": (
        (X, torch.tensor([-1, 0])),
        {},
        IndexError,
        r"target\[0\] = -1 is outside \[0, 3\).*ignore_index = -100",
    ),
    "PyTorch's ignored value under another ignore_index": (
        (X, torch.tensor([-100, 0])),
        {"ignore_index": 0},
        IndexError,
        r"target\[0\] = -100 .*ignore_index = 0",
    ),
    "weight too short": (
        (X, Y, torch.ones(2)),
        {},
        ValueError,
        r"weight is \(2,\); expected \(3,\)",
    ),
    "weight requires grad": (
        (X, Y, torch.ones(3, requires_grad=True)),
        {},
        ValueError,
        r"weight requires grad",
    ),
    "weight of bools": ((X, Y, torch.ones(3) > 0), {}, TypeError, r"weight is torch\.bool"),
    "weight on another device": (
        (X, Y, torch.ones(3, device="meta")),
        {},
        ValueError,
        r"input is on cpu and weight on meta",
    ),
    "target on another device": ((X, Y.to("meta")), {}, ValueError, r"on cpu and target on meta"),
    "token_weight too long": (
        (X, Y),
        {"token_weight": torch.ones(3)},
        ValueError,
        r"token_weight is \(3,\); expected \(2,\)",
    ),
    "token_weight requires grad": (
        (X, Y),
        {"token_weight": torch.ones(2, requires_grad=True)},
        ValueError,
        r"token_weight requires grad",
    ),
    "mean over negative weights": (
        (X, Y),
        {"token_weight": torch.tensor([1.0, -2.5])},
        ValueError,
        r"token_weight of row 1 is -2\.5.*denominator= or use reduction='sum'",
    ),
    "mean of probabilities over negative weights": (
        (X, PROBABILITIES),
        {"token_weight": torch.tensor([1.0, -2.5])},
        ValueError,
        r"token_weight of row 1 is -2\.5.*denominator= or use reduction='sum'",
    ),
    "reduction": ((X, Y), {"reduction": "avg"}, ValueError, r"reduction = 'avg'; .*'sequence_sum'"),
    "denominator of a sum": (
        (X, Y),
        {"reduction": "sum", "denominator": 2},
        ValueError,
        r"no meaning with reduction='sum'",
    ),
    "denominator of two": (
        (X, Y),
        {"denominator": torch.ones(2)},
        ValueError,
        r"denominator is \(2,\)",
    ),
    "denominator requires grad": (
        (X, Y),
        {"denominator": torch.tensor(1.0, requires_grad=True)},
        ValueError,
        r"denominator requires grad",
    ),
    "denominator of text": ((X, Y), {"denominator": "2"}, TypeError, r"denominator"),
    "label_smoothing": ((X, Y), {"label_smoothing": -0.1}, ValueError, r"label_smoothing = -0\.1"),
    "label_smoothing nan": (
        (X, Y),
        {"label_smoothing": math.nan},
        ValueError,
        r"label_smoothing = nan",
    ),
    "softcap": ((X, Y), {"softcap": -30.0}, ValueError, r"softcap = -30\.0"),
    "softcap inf": ((X, Y), {"softcap": math.inf}, ValueError, r"softcap = inf"),
    "logit_scale": ((X, Y), {"logit_scale": math.inf}, ValueError, r"logit_scale = inf"),
    "lse_square_scale": (
        (X, Y),
        {"lse_square_scale": math.nan},
        ValueError,
        r"lse_square_scale = nan",
    ),
    "selection of another size": (
        (X, sgp.Selection.from_labels(torch.tensor([[0, 1, 2]]))),
        {},
        ValueError,
        r"input is \(2, 3\) and the Selection has shape \(1, 3\).*N = 3",
    ),
    "selection and token_weight": (
        (X, sgp.Selection.from_labels(Y)),
        {"token_weight": torch.ones(2)},
        ValueError,
        r"a Selection carries its own weights",
    ),
    "selection and ignore_index": (
        (X, sgp.Selection.from_labels(Y)),
        {"ignore_index": 0},
        ValueError,
        r"ignore_index = 0 together with a Selection",
    ),
    "argmax without statistics": (
        (X, Y),
        {"return_argmax": True},
        ValueError,
        r"return_argmax=True fills a field of the statistics; pass return_stats=True",
    ),
    "selection on another device": (
        (X, sgp.Selection.from_labels(Y).to("meta")),
        {},
        ValueError,
        r"input is on cpu and the Selection on meta",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error_says_what_was_passed(case):
    arguments, options, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message) as caught:
        sgp.cross_entropy(*arguments, **options)
    assert str(caught.value).startswith("sgp"), "the message says whose function refused"


def test_negative_weights_are_fine_with_sum_and_with_a_denominator(backend, device):
    """Advantages of policy gradients: the sum and a given divisor are stable."""
    logits, target = batch(4, 9, device)
    weight = torch.tensor([1.0, math.nan, -0.25, 0.5], device=device)  # row 1 is ignored
    options = {"token_weight": weight}
    check_cross_entropy(logits, target, reduction="sum", **options)
    check_cross_entropy(logits, target, denominator=3.0, **options)
    weight[1] = -1.0
    weight[2] = 2.0
    check_cross_entropy(logits, target, reduction="mean", **options)  # negative only where ignored


def test_unknown_backend_is_an_error(monkeypatch):
    monkeypatch.setenv("SGP_BACKEND", "cuda")
    with pytest.raises(ValueError, match="SGP_BACKEND = 'cuda'"):
        sgp.cross_entropy(X, Y)


# -- (e) properties --------------------------------------------------------------------------------

EXAMPLES = {"torch": 30, "triton": 6}  # an interpreted row takes milliseconds, not microseconds


def holds_for_all(backend, *strategies):
    """Runs the decorated function on drawn examples, at once."""

    def run(function):
        settings(
            max_examples=EXAMPLES[backend],
            deadline=None,  # the machine is shared: no test depends on time
            derandomize=True,
            database=None,
        )(given(*strategies)(function))()

    return run


@st.composite
def problems(draw, min_kept=0):
    """(logits (N, V) float32, target (N,)) with N <= 4, V <= 20, any mask."""
    N = draw(st.integers(1, 4))
    V = draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scale = draw(st.sampled_from([0.1, 3.0, 30.0]))  # flat, usual, nearly certain
    logits = scale * torch.randn(N, V, generator=generator)
    target = torch.randint(V, (N,), generator=generator)
    kept = draw(st.lists(st.booleans(), min_size=N, max_size=N))
    if sum(kept) < min_kept:
        kept[0] = True
    target[~torch.tensor(kept)] = IGNORE
    return logits, target


def test_property_shift_of_the_logits_changes_nothing(backend):
    @holds_for_all(backend, problems(), st.sampled_from([-1000.0, -7.5, 64.0, 1000.0]))
    def _(problem, shift):
        logits, target = problem
        logits = (logits * 64).round() / 64  # so that adding the shift rounds nothing
        loss, grad = loss_and_grad(sgp.cross_entropy, logits, target, reduction="none")
        moved, moved_grad = loss_and_grad(
            sgp.cross_entropy, logits + shift, target, reduction="none"
        )
        torch.testing.assert_close(moved, loss, rtol=2e-6, atol=1e-30)
        # exp(-a) has a relative error of a 2^-24 where a is rounded, and the two round a apart.
        rtol = 1e-6 + 2.0**-23 * (logits.max() - logits.min()).item()
        torch.testing.assert_close(moved_grad, grad, rtol=rtol, atol=1e-30)


def test_property_permutation_of_the_vocabulary(backend):
    @holds_for_all(backend, problems(), st.integers(0, 2**16))
    def _(problem, seed):
        logits, target = problem
        V = logits.shape[1]
        order = torch.randperm(V, generator=torch.Generator().manual_seed(seed))
        weight = torch.linspace(0.5, 1.5, V)
        options = {"label_smoothing": 0.1, "lse_square_scale": 0.01, "reduction": "sum"}
        loss, grad = loss_and_grad(sgp.cross_entropy, logits, target, weight=weight, **options)
        renamed = torch.where(target == IGNORE, IGNORE, order.argsort()[target.clamp(min=0)])
        permuted, permuted_grad = loss_and_grad(
            sgp.cross_entropy, logits[:, order], renamed, weight=weight[order], **options
        )
        torch.testing.assert_close(permuted, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(permuted_grad, grad[:, order], rtol=1e-5, atol=1e-6)


def test_property_ignored_rows_might_as_well_not_exist(backend):
    @holds_for_all(
        backend,
        problems(),
        st.sampled_from(["mean", "sum"]),
        st.sampled_from(["nan", "inf", "-inf"]),
    )
    def _(problem, reduction, poison):
        logits, target = problem
        kept = target != IGNORE
        logits[~kept] = float(poison)
        loss, grad = loss_and_grad(sgp.cross_entropy, logits, target, reduction=reduction)
        short, short_grad = loss_and_grad(
            sgp.cross_entropy, logits[kept], target[kept], reduction=reduction
        )
        assert torch.equal(grad[~kept].view(torch.int32), torch.zeros_like(grad[~kept]).int()), (
            "+0.0, bit by bit"
        )
        assert torch.equal(grad[kept], short_grad), "the kept rows do not notice the ignored ones"
        torch.testing.assert_close(loss, short, rtol=5e-7, atol=0.0)  # another order of summation


def test_property_gradient_rows_sum_to_zero(backend):
    @holds_for_all(backend, problems())
    def _(problem):
        logits, target = problem
        _, grad = loss_and_grad(sgp.cross_entropy, logits, target, reduction="sum")
        error = grad.double().sum(1).abs()
        bound = 1e-6 * grad.double().abs().sum(1)
        assert (error <= bound).all(), f"sums of gradient rows: {error.tolist()}"


def test_property_gradient_is_never_larger_than_its_upstream(backend):
    @holds_for_all(backend, problems())
    def _(problem):
        logits, target = problem
        loss, grad = loss_and_grad(sgp.cross_entropy, logits, target, reduction="none")
        assert (loss >= 0).all(), "a probability above 1"
        assert (grad.abs() <= 1.0 + 1e-6).all()
        off_target = grad.clone()
        kept = target != IGNORE
        off_target[kept, target[kept]] = 0.0
        assert (off_target >= 0).all(), "only the target's logit is pushed up"


def test_property_reductions_agree(backend):
    @holds_for_all(backend, problems(min_kept=1))
    def _(problem):
        logits, target = problem
        none = sgp.cross_entropy(logits, target, reduction="none")
        total = sgp.cross_entropy(logits, target, reduction="sum")
        kept = (target != IGNORE).sum()
        torch.testing.assert_close(total, none.sum(), rtol=5e-7, atol=0.0)
        torch.testing.assert_close(
            sgp.cross_entropy(logits, target), none.sum() / kept, rtol=5e-7, atol=0.0
        )
        torch.testing.assert_close(
            sgp.cross_entropy(logits, target, reduction="sequence_sum"), none.sum()[None],
            rtol=5e-7, atol=0.0,
        )  # fmt: skip
        _, grad_none = loss_and_grad(sgp.cross_entropy, logits, target, reduction="none")
        _, grad_sum = loss_and_grad(sgp.cross_entropy, logits, target, reduction="sum")
        torch.testing.assert_close(grad_none, grad_sum, rtol=5e-7, atol=1e-37)


def test_property_scaling_token_weights(backend):
    """The mean does not notice a common factor of the weights; with a denominator it is one."""

    @holds_for_all(backend, problems(min_kept=1), st.sampled_from([0.25, 2.0, 64.0]))
    def _(problem, factor):
        logits, target = problem
        weight = torch.linspace(0.5, 1.5, len(target))
        run = partial(loss_and_grad, sgp.cross_entropy, logits, target)
        mean, scaled = run(token_weight=weight), run(token_weight=factor * weight)
        torch.testing.assert_close(scaled[0], mean[0], rtol=5e-7, atol=0.0)
        torch.testing.assert_close(scaled[1], mean[1], rtol=1e-6, atol=1e-37)
        fixed = run(token_weight=weight, denominator=3.0)
        scaled = run(token_weight=factor * weight, denominator=3.0)
        torch.testing.assert_close(scaled[0], factor * fixed[0], rtol=5e-7, atol=0.0)
        torch.testing.assert_close(scaled[1], factor * fixed[1], rtol=5e-7, atol=1e-37)
        both = run(token_weight=factor * weight, denominator=3.0 * factor)
        torch.testing.assert_close(both[0], fixed[0], rtol=5e-7, atol=0.0)


def test_property_smoothing_is_linear_between_its_ends(backend):
    @holds_for_all(backend, problems(), st.floats(0.0, 1.0))
    def _(problem, eps):
        logits, target = problem
        run = partial(sgp.cross_entropy, logits, target, reduction="none")
        plain, uniform = run(label_smoothing=0.0), run(label_smoothing=1.0)
        expected = (1 - eps) * plain.double() + eps * uniform.double()
        torch.testing.assert_close(
            run(label_smoothing=eps).double(), expected, rtol=2e-6, atol=1e-5
        )


# -- (f) the worked example ------------------------------------------------------------------------


@pytest.mark.parametrize(("probability", "cost"), [(0.8, 0.2231), (0.2, 1.6094)])
def test_negative_log_likelihood_of_the_output(probability, cost, backend, device):
    """-log Pr(y|x) = -sum_t log Pr(y_t | x, y_<t): Square this number . 2 . The result is 4 ."""
    input_ids = torch.tensor([[1, 2, 3, 4, 5, 4, 6, 7, 8, 9, 4]], device=device)
    selection = sgp.Selection.from_context_lengths(input_ids, torch.tensor([6], device=device))
    assert selection.num_kept == 5, "five output tokens: The result is 4 ."
    # Each of the five tokens gets probability p^(1/5), so that the output as a whole gets p.
    p = torch.full((1, 11), probability, dtype=torch.float64).pow(1 / 5)
    V = 10
    logits = ((1 - p) / (V - 1)).log()[..., None].expand(1, 11, V).clone()
    rows, target = selection.rows.cpu(), selection.target.cpu()
    logits[0, rows, target] = p[0, rows].log()
    logits[0, :5] = math.nan  # the context: read by nobody
    logits = logits.float().to(device).requires_grad_()
    loss = sgp.cross_entropy(logits, selection, reduction="sequence_sum")
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(cost, abs=5e-5)
    assert loss.item() == pytest.approx(-math.log(probability), rel=1e-6)
    loss.sum().backward()
    assert logits.grad[0].any(1).nonzero().flatten().tolist() == [5, 6, 7, 8, 9]

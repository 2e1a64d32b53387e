"""Log-probability, entropy and log-sum-exp of every token: values, gradients, costs and errors.

The truth is `sgp.reference` in float64; what there is to be no worse than is the same code in the
input's own dtype (oracle.py).
"""

# ruff: noqa: ARG001  (fixtures are asked for by name, for what they do)

import math
import os

import pytest
import torch
from torch import func
from torch.autograd import forward_ad
from torch.nn import functional as F

import sgp
from bench.proof.interpreter import watch_accesses
from sgp.head import operators as head_operators
from sgp.rows import by_triton, operators
from sgp.tolerance import bound
from tests.oracle import assert_no_worse, relative_error, rows_of_infinities

IGNORE = -100
INF, NAN = math.inf, math.nan
FIELDS = ("log_prob", "entropy", "lse")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DEPRECATED = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside PyTorch itself
LINEAR = {False: "token_log_probs", True: "linear_token_log_probs"}
BOTH = pytest.mark.parametrize("linear", LINEAR, ids=LINEAR.values())
OPTIONS = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.5},
    "softcap": {"softcap": 5.0},
    "logit_scale": {"logit_scale": 0.5},
    "negative scale": {"logit_scale": -0.7},  # the largest logit is the least likely
    "all": {"temperature": 0.7, "softcap": 5.0, "logit_scale": -1.3},
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(23)


def functions(linear):
    """(ours, the reference's)."""
    return getattr(sgp, LINEAR[linear]), getattr(sgp.reference, LINEAR[linear])


def problem(linear, N, V, dtype=torch.float32, *, bias=False, ignored=(1,)):
    """(tensors, target): logits of standard deviation 3, or hidden states and a head."""
    target = torch.randint(V, (N,))
    target[[i for i in ignored if i < N]] = IGNORE
    if not linear:
        return {"input": (3 * torch.randn(N, V)).to(dtype)}, target
    tensors = {"input": torch.randn(N, 12).to(dtype), "linear_weight": torch.randn(V, 12).to(dtype)}
    if bias:
        tensors["linear_bias"] = torch.randn(V).to(dtype)
    return tensors, target


def upstream_of(fields, target):
    """A random gradient of each field, and NaN for each ignored token, which must not matter."""
    shape = target.shape
    labels = target if isinstance(target, torch.Tensor) else target.dense_target.view(shape)
    return {
        name: torch.randn(shape).masked_fill(labels == IGNORE, NAN)
        for name in (fields if isinstance(fields, tuple) else (fields,))
    }


def run(function, tensors, target, upstream, **options):
    """(TokenLogProbs, gradient of every tensor), for these upstream gradients."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    result = function(**leaves, target=target, return_argmax=True, **options)
    outputs = [getattr(result, name) for name in upstream]
    # The reference's own zeros of ignored tokens are constants: NaN stops there too.
    grads = [g.to(out.dtype) for g, out in zip(upstream.values(), outputs, strict=True)]
    torch.autograd.backward(outputs, grads)
    return result, {name: leaf.grad for name, leaf in leaves.items()}


def assert_good(linear, value, plain, truth, *, interpreted=False):
    """No worse than PyTorch in the same dtype, each row by itself; a head's sums as a whole.

    A head has matmuls, which round differently for every number of rows (twice the error in
    float32), and stores the logits' gradient in bf16 or fp16 (a rounding more).
    """
    assert truth.isfinite().all() or not linear, "the truth itself is not finite"
    if value.dtype == torch.float64:  # PyTorch's 1 - tanh^2 of a saturated softcap loses 4 digits
        assert relative_error(value, truth) < 1e-11
    elif not linear:
        assert_no_worse(value, plain, truth, interpreted=interpreted)
    else:
        ours, theirs = (relative_error(x.flatten(), truth.flatten()) for x in (value, plain))
        limit = bound(theirs, value.dtype, interpreted=interpreted, roundings=2)
        limit = 2 * limit if value.dtype == torch.float32 else limit
        assert ours <= limit, (
            f"relative error {ours:.3g}, PyTorch's {theirs:.3g}, bound {limit:.3g}"
        )


def check(linear, tensors, target, fields=FIELDS, *, how=None, **options):
    """Values and gradients of ours against the reference's; returns ours.

    `how` are keywords that say how to compute, which the reference does not have.
    """
    ours, reference = functions(linear)
    labels = target
    if options.get("shift"):
        labels = target.roll(-1, -1)
        labels[..., -1] = IGNORE
    upstream = upstream_of(fields, labels)
    wide = {name: x.double() for name, x in tensors.items()}
    truth = run(reference, wide, target, upstream, **options)
    plain = run(reference, tensors, target, upstream, **options)
    result, grads = run(ours, tensors, target, upstream, **options, **(how or {}))
    dtype = tensors["input"].dtype
    for name in FIELDS:
        values = (getattr(r, name).detach() for r in (result, plain[0], truth[0]))
        value, plain_value, exact = (x if linear else x[..., None] for x in values)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert getattr(result, name).shape == target.shape
        assert_good(linear, value, plain_value, exact)
    assert torch.equal(result.is_top1, truth[0].is_top1)
    assert torch.equal(result.argmax, truth[0].argmax)
    interpreted = os.environ["SGP_BACKEND"] == "triton"
    for name, gradient in grads.items():
        assert gradient.dtype == dtype
        found = (gradient, plain[1][name], truth[1][name])
        if not linear and gradient.dim() > 1 and isinstance(target, torch.Tensor):
            found = (g.movedim(1, -1) for g in found)
        assert_good(linear, *found, interpreted=interpreted)
    if isinstance(target, torch.Tensor):
        rows = grads["input"] if linear else grads["input"].movedim(min(1, target.dim()), -1)
        ignored = (labels == IGNORE).view(rows.shape[:-1])
        assert not bits(rows[ignored]).any(), "+0.0 in ignored rows, bit by bit"
        for values in result:
            assert not values[labels == IGNORE].any(), "zero, False, where ignored"
    return result, grads


def bits(tensor):
    view = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(view)


# -- values and gradients --------------------------------------------------------------------------


@pytest.mark.core
@BOTH
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, linear, backend):
    tensors, target = problem(linear, 6, 77, bias=True)
    check(linear, tensors, target, **OPTIONS[option])


@BOTH
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("option", ["plain", "cold", "all"])
def test_each_field_alone(option, field, linear, backend):
    tensors, target = problem(linear, 6, 77, bias=True)
    check(linear, tensors, target, field, **OPTIONS[option])


@pytest.mark.parametrize("field", FIELDS)
def test_the_gradient_of_a_sum_is_expanded(field, backend):
    """Its upstream gradients have stride 0."""
    logits, target = torch.randn(6, 77), torch.arange(6)
    found, true = logits.clone().requires_grad_(), logits.double().requires_grad_()
    getattr(sgp.token_log_probs(found, target), field).sum().backward()
    getattr(sgp.reference.token_log_probs(true, target), field).sum().backward()
    assert relative_error(found.grad, true.grad) < 1e-6


VOCABULARIES = {
    1: "log_prob and entropy are 0, and only lse has a gradient",
    2: "the smallest that says anything",
    7: "narrow accesses",
    300: "one block, with padding",
    8_193: "the smallest row that is streamed, three blocks of 4096 columns",
    20_000: "three blocks of 8192 columns",
}


@BOTH
@pytest.mark.parametrize(
    ("dtype", "option"),
    [
        (torch.float64, "all"),
        (torch.float32, "plain"),
        (torch.float32, "all"),
        (torch.bfloat16, "all"),
        (torch.float16, "plain"),
    ],
    ids=str,
)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_vocabulary_and_dtype(V, dtype, option, linear, backend):
    tensors, target = problem(linear, 3, V, dtype)
    if dtype == torch.float64 and backend == "triton":
        with pytest.raises(RuntimeError, match=r"not torch\.float64"):
            functions(linear)[0](**tensors, target=target)
        return
    target[2] = V - 1  # the last column of the last block
    result, _ = check(linear, tensors, target, **OPTIONS[option])
    if V == 1:
        assert not result.log_prob.any()
        assert not result.entropy.any()


@pytest.mark.parametrize("chunk_rows", [1, 3, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_chunks(bias, dtype, chunk_rows, backend):
    if dtype == torch.float64 and backend == "triton":
        return
    tensors, target = problem(True, 8, 40, dtype, bias=bias, ignored=(0, 4, 5))
    check(True, tensors, target, how={"chunk_rows": chunk_rows}, temperature=0.7)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 5, 2), (2, 5, 3, 2), (0, 5)], ids=str)
def test_shapes_of_pytorch(shape, backend):
    target = torch.randint(5, (*shape[:1], *shape[2:]) if len(shape) > 1 else ())
    if target.numel() > 2:
        target.view(-1)[1] = IGNORE
    result, _ = check(False, {"input": torch.randn(shape)}, target, logit_scale=2.0)
    assert result.is_top1.shape == target.shape


@pytest.mark.core
@pytest.mark.parametrize("shape", [(12,), (0, 12), (3, 12), (2, 3, 12), (2, 1, 3, 12)], ids=str)
def test_shapes_of_the_linear_form(shape, backend):
    head = torch.randn(5, 12)
    target = torch.randint(5, shape[:-1])
    check(True, {"input": torch.randn(shape), "linear_weight": head}, target)
    if len(shape) > 2:  # labels flattened beforehand
        check(True, {"input": torch.randn(shape), "linear_weight": head}, target.flatten())


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 2, 3)], ids=str)
def test_shift(shape, backend):
    """Row t predicts token t + 1; the result stands at t."""
    tensors = {"input": torch.randn(*shape, 12), "linear_weight": torch.randn(9, 12)}
    labels = torch.randint(9, shape)
    labels[..., 1] = IGNORE
    result, grads = check(True, tensors, labels, shift=True)
    moved = torch.full(shape, IGNORE)
    moved[..., :-1] = labels[..., 1:]
    by_hand = sgp.linear_token_log_probs(**tensors, target=moved, return_argmax=True)
    for values, expected in zip(result, by_hand, strict=True):
        assert torch.equal(values, expected)
    assert not grads["input"][..., -1, :].any(), "the last token predicts nothing"


@BOTH
@pytest.mark.parametrize("kind", ["flat", "two-dimensional", "packed", "mask"])
def test_selections(kind, linear, backend):
    ids = torch.randint(9, (2, 4))
    selection = {
        "flat": lambda: sgp.Selection.from_labels(torch.tensor([3, IGNORE, 0, 8])),
        "two-dimensional": lambda: sgp.Selection.from_labels(
            ids.masked_fill(ids < 4, IGNORE), shift=True
        ),
        "packed": lambda: sgp.Selection.from_labels(
            ids.view(-1), shift=True, cu_seqlens=torch.tensor([0, 3, 8])
        ),
        "mask": lambda: sgp.Selection.from_mask(ids, ids > 3),
    }[kind]()
    tensors, _ = problem(linear, selection.num_tokens, 9)
    if kind == "two-dimensional":
        tensors["input"] = tensors["input"].view(2, 4, -1)
    result, grads = check(linear, tensors, selection)
    ignored = selection.dense_target == IGNORE
    assert not grads["input"].view(len(ignored), -1)[ignored].any()
    for values in result:
        assert not values.view(-1)[ignored].any()


@BOTH
@pytest.mark.parametrize("fields", [*FIELDS, FIELDS], ids=[*FIELDS, "together"])
def test_gradcheck(fields, linear, monkeypatch):
    """PyTorch's finite differences, of float64, which PyTorch's operators compute."""
    monkeypatch.setenv("SGP_BACKEND", "torch")
    tensors, target = problem(linear, 3, 5, torch.float64, bias=True)
    names, leaves = list(tensors), [x.requires_grad_() for x in tensors.values()]

    def outputs(*values):
        result = functions(linear)[0](
            **dict(zip(names, values, strict=True)), target=target, **OPTIONS["all"]
        )
        return tuple(getattr(result, name) for name in FIELDS if name in fields)

    torch.autograd.gradcheck(outputs, leaves)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ignored_rows_may_hold_anything(dtype, linear, backend):
    tensors, target = problem(linear, 4, 9, dtype)
    upstream = upstream_of(FIELDS, target)
    clean = run(functions(linear)[0], tensors, target, upstream)
    for poison in (NAN, INF, -INF):
        poisoned = {name: x.clone() for name, x in tensors.items()}
        poisoned["input"][1] = poison
        result, grads = run(functions(linear)[0], poisoned, target, upstream)
        for values, expected in zip(result, clean[0], strict=True):
            assert torch.equal(values, expected)
            assert not values[1].any()
        for name, gradient in grads.items():
            assert torch.equal(bits(gradient), bits(clean[1][name])), name
        assert not bits(grads["input"][1]).any()


@BOTH
def test_everything_ignored(linear, backend):
    tensors, target = problem(linear, 3, 9, bias=True, ignored=(0, 1, 2))
    tensors["input"].fill_(NAN)
    result, grads = run(functions(linear)[0], tensors, target, upstream_of(FIELDS, target))
    for values in result:
        assert not values.any()
    for name, gradient in grads.items():
        assert not bits(gradient).any(), name


def test_ignore_index_inside_the_vocabulary(backend):
    tensors, target = problem(False, 5, 9, ignored=())
    target[:2] = 0
    check_ignoring_0 = {"ignore_index": 0}
    upstream = {name: torch.randn(5) for name in FIELDS}
    result, grads = run(sgp.token_log_probs, tensors, target, upstream, **check_ignoring_0)
    moved = target.masked_fill(target == 0, IGNORE)
    expected, expected_grads = run(sgp.token_log_probs, tensors, moved, upstream)
    for values, others in zip(result, expected, strict=True):
        assert torch.equal(values, others)
    assert torch.equal(grads["input"], expected_grads["input"])
    none = sgp.token_log_probs(tensors["input"], moved, ignore_index=None)
    assert torch.equal(none.log_prob, expected.log_prob.detach())


# -- is_top1 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("V", [3, 9_000])
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_is_top1_on_ties(scale, V, backend):
    """Every one of the most probable classes counts, wherever it stands."""
    logits = torch.zeros(6, V)
    logits[:, [0, V - 1]] = 2.0
    target = torch.tensor([0, V - 1, 1, IGNORE, 0, V - 1])
    logits[4:, 1] = 3.0
    logits[3] = NAN
    result = sgp.token_log_probs(logits * scale, target, logit_scale=scale)
    assert result.is_top1.tolist() == [True, True, False, False, False, False]
    assert result.is_top1.dtype == torch.bool


def test_is_top1_of_equal_logits(backend):
    result = sgp.token_log_probs(torch.zeros(4, 4), torch.arange(4), return_argmax=True)
    assert result.is_top1.all()
    assert (result.argmax == torch.arange(4)).sum() == 1, "argmax has one winner"


# -- argmax, and what is left of a row with an infinity or a NaN -----------------------------------

FORMS = {
    "torch": ("torch", "auto", 300),
    "resident": ("triton", "auto", 300),
    "streaming": ("triton", "streaming", 8_203),  # rows begin between two accesses
    "backwards": ("triton", "staying", 8_203),
    "blockwise": ("triton", "blockwise", 8_203),
}


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # the interpreter
@pytest.mark.parametrize("options", [{}, {"logit_scale": -0.7, "temperature": 0.7}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_rows_of_infinities_and_nan(form, options, monkeypatch):
    """A NaN leaves nothing but where it stands; beside an infinity the log-sum-exp is infinite."""
    name, row_form, V = FORMS[form]
    monkeypatch.setenv("SGP_BACKEND", name)
    monkeypatch.setenv("SGP_ROW_FORM", row_form)
    logits, target = rows_of_infinities(V)
    with watch_accesses():
        result = sgp.token_log_probs(logits, target, return_argmax=True, **options)
    truth = sgp.reference.token_log_probs(logits.double(), target, return_argmax=True, **options)
    assert torch.equal(result.argmax, truth.argmax)
    assert torch.equal(result.is_top1, truth.is_top1)
    for field in FIELDS:
        value, exact = getattr(result, field), getattr(truth, field)
        torch.testing.assert_close(value, exact.float(), rtol=2e-6, atol=1e-6, equal_nan=True)
    if not options:
        assert torch.equal(result.argmax, logits.argmax(1))
        top1 = [True, True, False, False, False, False, True, False, True, True]
        assert result.is_top1.tolist() == top1
        assert result.lse[:3].tolist() == [INF] * 3
        assert result.lse[[3, 4, 5, 7]].isnan().all()
        assert result.lse[6] == -INF


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("V", [8_203, 40_000])
@pytest.mark.parametrize("row_form", ["streaming", "staying", "blockwise"])
def test_argmax_of_ties_in_many_blocks(row_form, V, order, monkeypatch):
    """The lowest column, whichever block and lane is read first."""
    monkeypatch.setenv("SGP_BACKEND", "triton")
    monkeypatch.setenv("SGP_ROW_FORM", row_form)
    places = torch.tensor([[3, V - 1], [4_095, 4_096], [4_100, 8_200], [17, 18], [8_192, 8_191]])
    ramp = torch.linspace(0, order, V).expand(len(places), V).clone()
    logits = ramp.scatter(1, places, 2.0)
    result = sgp.token_log_probs(logits, places[:, 0], return_argmax=True)
    assert result.argmax.tolist() == places.amin(1).tolist()
    assert result.is_top1.all()


def test_argmax_of_16_bits_that_tie(backend):
    """The values that PyTorch's own argmax of the same tensor has."""
    for dtype in (torch.bfloat16, torch.float16):
        logits = torch.randn(64, 500).mul(8).round().div(8).to(dtype)
        target = logits.argmax(1)
        result = sgp.token_log_probs(logits, target, return_argmax=True)
        assert torch.equal(result.argmax, target)
        assert result.is_top1.all()
        others = (logits == logits.amax(1, keepdim=True)).sum(1) > 1
        assert others.any(), "the test has no tie"


@pytest.mark.parametrize("chunk_rows", [1, None])
def test_a_head_with_an_infinite_bias(chunk_rows, backend):
    """Its chunks pass on what the rows have."""
    hidden, head, bias = torch.randn(3, 4), torch.randn(9, 4), torch.zeros(9)
    bias[6], hidden[2] = INF, NAN
    result = sgp.linear_token_log_probs(
        hidden, head, torch.tensor([6, 2, 6]), linear_bias=bias, chunk_rows=chunk_rows,
        return_argmax=True,
    )  # fmt: skip
    assert result.lse[:2].tolist() == [INF, INF]
    assert result.lse[2].isnan()
    assert result.is_top1.tolist() == [True, False, False]
    assert result.argmax.tolist() == [6, 6, 0]


# -- infinities, offsets, near-certain targets -----------------------------------------------------

EXTREME = {
    "most -inf": lambda x: x.masked_fill(torch.rand(x.shape) < 0.9, -INF),
    "first half -inf": lambda x: x.index_fill(1, torch.arange(x.shape[1] // 2), -INF),
    "all but the target -inf": lambda x: torch.full_like(x, -INF),
    "all but one other -inf": lambda x: torch.full_like(x, -INF).index_fill(
        1, torch.tensor([x.shape[1] // 3]), 1.5
    ),
    "+1000": lambda x: x + 1000,
    "-1000": lambda x: x - 1000,
}


@pytest.mark.parametrize(
    ("V", "fields"),
    [*((300, field) for field in FIELDS), (20_000, FIELDS)],  # one block, three blocks
    ids=[*FIELDS, "together"],
)
@pytest.mark.parametrize("case", EXTREME)
def test_extreme_logits(case, fields, V, backend):
    """Multiples of 1/64, so that the offset itself costs no digit."""
    target = torch.tensor([V - 1, IGNORE, V // 2])
    logits = torch.randn(3, V).mul(64).round().div(64)
    kept = target.clamp(0)[:, None]
    logits = EXTREME[case](logits).scatter(1, kept, logits.gather(1, kept))
    if case.endswith("1000"):
        logits.scatter_add_(1, kept, torch.full((3, 1), float(case)))
    result, grads = check(False, {"input": logits}, target, fields)
    assert grads["input"].isfinite().all()
    assert not grads["input"][logits == -INF].any()
    if case == "all but the target -inf":
        assert not result.log_prob.any()
        assert not result.entropy.any()


@pytest.mark.parametrize("fields", [*FIELDS, FIELDS], ids=[*FIELDS, "together"])
@pytest.mark.parametrize("V", [5, 9_000])
def test_impossible_target(V, fields, backend):
    """A log-probability of -inf, and the gradient that PyTorch gives it."""
    logits = torch.randn(2, V)
    logits[:, 1] = -INF
    result, _ = check(False, {"input": logits}, torch.tensor([1, 0]), fields)
    assert result.log_prob[0].item() == -INF
    assert result.entropy.isfinite().all()


@pytest.mark.parametrize("exponent", [-1, -3, -6, -8, -12])
@pytest.mark.parametrize("V", [50, 9_000])
def test_nearly_certain_target(V, exponent, backend):
    """At 1 - p = 1e-8 `s_y - lse` is 0 and `p - 1` is 0; both must keep their digits."""
    logits = torch.randn(1, V)
    logits[0, 7] = logits.logsumexp(1).item() - exponent * math.log(10.0)
    target = torch.tensor([7])
    exact = logits.double()
    others = exact.clone()
    others[0, 7] = -INF
    odds = (others.logsumexp(1) - exact[0, 7]).exp()  # (1 - p) / p
    p_off = (odds / (1 + odds)).item()
    ones = {"log_prob": torch.ones(1)}
    result, grads = run(sgp.token_log_probs, {"input": logits}, target, ones)
    assert result.log_prob.item() == pytest.approx(-odds.log1p().item(), rel=3e-6)
    assert grads["input"][0, 7].item() == pytest.approx(p_off, rel=3e-6)
    assert grads["input"].double().sum().abs().item() <= 3e-6 * p_off
    # H = log1p(odds) + (sum of p_j (s_y - s_j)), all of one sign.
    gap = exact[0, 7] - exact
    entropy = odds.log1p() + ((exact - exact[0, 7]).exp() / (1 + odds) * gap).sum()
    assert result.entropy.item() == pytest.approx(entropy.item(), rel=3e-6)
    check(False, {"input": logits}, target, "entropy")
    # -h p_j (log p_j + H), by float64 without cancellation.
    p = (exact - exact[0, 7]).exp() / (1 + odds)
    slope = -p * (-gap - odds.log1p() + entropy)
    _, grads = run(sgp.token_log_probs, {"input": logits}, target, {"entropy": torch.ones(1)})
    assert relative_error(grads["input"], slope) < 3e-6
    assert grads["input"][0, 7].item() == pytest.approx(slope[0, 7].item(), rel=3e-5)


# -- what people train with ------------------------------------------------------------------------


def dpo(log_probs, tensors, labels):
    """Rafailov et al. 2023: chosen completions first, rejected ones second."""
    torch.manual_seed(5)
    frozen = -12 * torch.rand(len(labels))
    ours = log_probs(**tensors, target=labels, shift=True).log_prob.sum(1)
    chosen, rejected = (ours - frozen).chunk(2)
    return -F.logsigmoid(0.3 * (chosen - rejected)).mean()


def grpo(log_probs, tensors, labels):
    """Shao et al. 2024: clipped ratios, an estimate of the KL term, and an entropy bonus."""
    torch.manual_seed(6)
    selection = sgp.Selection.from_labels(labels, shift=True)
    kept = selection.dense_target.view(labels.shape) != IGNORE
    with torch.no_grad():  # sampled a little while ago
        near = log_probs(**tensors, target=selection, temperature=0.8).log_prob
    noise = torch.randn(2, *labels.shape)
    old, frozen = (near + 0.3 * n.to(near.dtype) for n in noise)
    now = log_probs(**tensors, target=selection, temperature=0.8)
    advantage = torch.tensor([1.0, -0.5, 2.0, -1.0])[:, None]
    ratio = (now.log_prob - old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    kl = (frozen - now.log_prob).exp() - (frozen - now.log_prob) - 1
    per_token = torch.where(kept, gain - 0.04 * kl + 0.01 * now.entropy, 0)
    return -(per_token.sum(1) / kept.sum(1).clamp(1)).mean()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", [dpo, grpo])
def test_losses_of_preference_and_reward(loss, dtype, backend):
    if dtype == torch.float64 and backend == "triton":
        return
    labels = torch.randint(50, (4, 7))
    labels[:, :3] = IGNORE
    labels[1, 5:] = IGNORE
    tensors = {
        "input": torch.randn(4, 7, 16).to(dtype),
        "linear_weight": (0.3 * torch.randn(50, 16)).to(dtype),
        "linear_bias": torch.randn(50).to(dtype),
    }

    def value_and_grads(log_probs, tensors):
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        value = loss(log_probs, leaves, labels)
        value.backward()
        return value, {name: x.grad for name, x in leaves.items()}

    reference = sgp.reference.linear_token_log_probs
    truth = value_and_grads(reference, {name: x.double() for name, x in tensors.items()})
    plain = value_and_grads(reference, tensors)
    ours = value_and_grads(sgp.linear_token_log_probs, tensors)
    assert_good(True, ours[0], plain[0], truth[0])
    for name, gradient in ours[1].items():
        assert gradient.any()
        exact, expected = truth[1][name], plain[1][name]
        assert_good(True, gradient, expected, exact, interpreted=backend == "triton")
    assert not ours[1]["input"][:, :2].any(), "context carries no gradient"


# -- return_stats ----------------------------------------------------------------------------------

LOSSES = {
    "mean": {},
    "none": {"reduction": "none"},
    "per sequence": {"reduction": "sequence_mean"},
    "weights": {"label_smoothing": 0.1, "weight": torch.linspace(0, 2, 9)},
    "token weights": {"token_weight": torch.linspace(0, 2, 6).view(2, 3), "denominator": 5},
    "z-loss": {"lse_square_scale": 0.1},
    "scores": {"softcap": 3.0, "logit_scale": -0.5},
}


@BOTH
@pytest.mark.parametrize("wanted", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("option", LOSSES)
def test_statistics_of_a_loss_are_these_detached(option, wanted, linear, backend):
    tensors, target = problem(linear, 6, 9)
    target = target.view(2, 3)
    shape = (2, 3, -1) if linear else (2, 9, 3)
    tensors["input"] = tensors["input"].reshape(shape).requires_grad_(wanted)
    loss_function = sgp.linear_cross_entropy if linear else sgp.cross_entropy
    asked = {"return_stats": True, "return_argmax": True}
    _, stats = loss_function(**tensors, target=target, **asked, **LOSSES[option])
    scores = {k: v for k, v in LOSSES[option].items() if k in ("softcap", "logit_scale")}
    expected = functions(linear)[0](**tensors, target=target, return_argmax=True, **scores)
    for name, values in stats._asdict().items():
        assert not values.requires_grad, f"{name} of a loss is a constant"
        others = getattr(expected, name)
        # Options are compiled in: another kernel may add in another order.
        torch.testing.assert_close(values, others.detach(), rtol=1e-6, atol=1e-6, msg=name)
        assert others.requires_grad == (wanted and name in FIELDS), name


# -- autograd --------------------------------------------------------------------------------------


@BOTH
def test_second_backward_is_right(linear, backend):
    tensors, target = problem(linear, 4, 9, bias=True)
    first, second = ({name: torch.randn(4) for name in FIELDS} for _ in range(2))
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    result = functions(linear)[0](**leaves, target=target)
    outputs = [getattr(result, name) for name in FIELDS]
    torch.autograd.backward(outputs, list(first.values()), retain_graph=True)
    torch.autograd.backward(outputs, list(second.values()))
    total = {name: first[name] + second[name] for name in FIELDS}
    _, expected = run(functions(linear)[0], tensors, target, total)
    for name, leaf in leaves.items():
        assert relative_error(leaf.grad, expected[name]) < 1e-6, name


@BOTH
@pytest.mark.parametrize("fields", [*FIELDS, FIELDS], ids=[*FIELDS, "together"])
def test_second_derivative_raises(fields, linear, backend):
    """By every way: each input, and the upstream gradient."""
    tensors, target = problem(linear, 3, 5, bias=True)
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    factor = torch.tensor(2.0, requires_grad=True)
    result = functions(linear)[0](**leaves, target=target)
    chosen = [getattr(result, name) for name in FIELDS if name in fields]
    loss = factor * sum(values.sum() for values in chosen)  # no other way than the anchors
    for taken in leaves.values():
        (gradient,) = torch.autograd.grad(loss, taken, create_graph=True)
        for of in (*leaves.values(), factor):
            with pytest.raises(RuntimeError, match=rf"sgp\.{LINEAR[linear]} has no second deriv"):
                torch.autograd.grad(gradient.square().sum(), of, retain_graph=True)


@DEPRECATED
@BOTH
def test_forward_mode_raises(linear, backend):
    tensors, target = problem(linear, 3, 5, bias=True)
    match = rf"sgp\.{LINEAR[linear]} has no forward-mode derivative"
    for name, x in tensors.items():
        for requires_grad in (False, True):
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(x.clone().requires_grad_(requires_grad), x)
                with pytest.raises(RuntimeError, match=match):
                    functions(linear)[0](**{**tensors, name: dual}, target=target)
        with pytest.raises(RuntimeError, match=match):
            func.jvp(
                lambda x, name=name: (
                    functions(linear)[0](**{**tensors, name: x}, target=target).lse
                ),
                (x,),
                (x,),
            )


@DEPRECATED
@BOTH
def test_function_transforms(linear, backend):
    tensors, target = problem(linear, 4, 9, bias=True)

    def objective(function):
        def loss(tensors):
            result = function(**tensors, target=target, temperature=0.7)
            return result.log_prob.sum() + 2 * result.entropy.sum() - result.lse.square().sum()

        return loss

    ours, reference = (func.grad(objective(f))(tensors) for f in functions(linear))
    for name, gradient in ours.items():
        assert relative_error(gradient, reference[name]) < 1e-5, name
    batch = {name: torch.stack([x, 2 * x]) for name, x in tensors.items()}
    of_examples = (func.vmap(func.grad(objective(f)))(batch) for f in functions(linear))
    for value, expected in zip(*(x.values() for x in of_examples), strict=True):
        assert relative_error(value, expected) < 1e-5
    with pytest.raises(RuntimeError, match=r"no second derivative|no forward-mode derivative"):
        func.hessian(objective(functions(linear)[0]))(tensors)


@pytest.mark.core
@DEPRECATED
@BOTH
@pytest.mark.parametrize("kind", ["labels", "selection"])
def test_compiled_is_eager_in_one_graph(kind, linear, backend):
    """Forward and backward, for masks with 2, 1, 4 and 0 kept tokens."""
    torch._dynamo.reset()
    tensors, _ = problem(linear, 4, 9, bias=True)
    upstream = {name: torch.randn(4) for name in FIELDS}
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def objective(tensors, target):
        result = functions(linear)[0](**tensors, target=target, temperature=0.7)
        weighted = sum((getattr(result, name) * g).sum() for name, g in upstream.items())
        return weighted, result.is_top1

    compiled = torch.compile(objective, backend=counting, fullgraph=True, dynamic=False)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    for kept in (2, 1, 4, 0):
        target = torch.tensor([3, 8, 0, 1])
        target[kept:] = IGNORE
        target = sgp.Selection.from_labels(target) if kind == "selection" else target
        results = []
        for function in (objective, compiled):
            value, is_top1 = function(leaves, target)
            results.append((value.detach(), is_top1, *torch.autograd.grad(value, leaves.values())))
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    assert len(graphs) == 1, f"{len(graphs)} graphs for 4 masks of one shape"
    torch._dynamo.reset()


@DEPRECATED
@BOTH
@pytest.mark.parametrize("kind", ["labels", "selection"])
def test_compiled_for_any_length_and_scale(kind, linear, monkeypatch):
    """A second graph where the first number changes, and no graph break: batches vary in length."""
    monkeypatch.setenv("SGP_BACKEND", "torch")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda tensors, target, scale: (
            functions(linear)[0](**tensors, target=target, logit_scale=scale).log_prob
        ),
        backend="aot_eager",
        fullgraph=True,
    )
    for N, scale in ((4, 1.0), (6, 1.0), (7, 1.0), (7, 0.5), (7, 0.7)):
        tensors, target = problem(linear, N, 9)
        expected = functions(linear)[0](**tensors, target=target, logit_scale=scale).log_prob
        target = sgp.Selection.from_labels(target) if kind == "selection" else target
        torch.testing.assert_close(compiled(tensors, target, scale), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_frozen_sides(trained, dtype, backend, monkeypatch):
    """No gradient where none is wanted, nor the matmul for it; the others as before."""
    tensors, target = problem(True, 5, 9, dtype, bias=True)
    upstream = upstream_of(FIELDS, target)
    _, expected = run(sgp.linear_token_log_probs, tensors, target, upstream)
    made = []
    backward = head_operators.head_backward
    monkeypatch.setattr(
        head_operators, "head_backward", lambda *a: made.append(backward(*a)) or made[-1]
    )
    leaves = {name: x.requires_grad_(i in trained) for i, (name, x) in enumerate(tensors.items())}
    result = sgp.linear_token_log_probs(**leaves, target=target)
    torch.autograd.backward([getattr(result, name) for name in FIELDS], list(upstream.values()))
    for i, (name, leaf) in enumerate(leaves.items()):
        if i in trained:
            assert torch.equal(leaf.grad, expected[name]), name
        else:
            assert leaf.grad is None, name
    (gradients,) = made
    assert [g is not None for g in gradients] == [i in trained for i in range(3)]


@BOTH
@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "frozen"])
def test_evaluation_is_one_operator_without_gradients(how, linear, backend, monkeypatch):
    tensors, target = problem(linear, 4, 9)
    for x in tensors.values():
        x.requires_grad_(how != "frozen")
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    ran = []
    for module, name in ((operators, "row_forward"), (head_operators, "head_forward")):
        operator = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=operator: ran.append(f(*a)) or ran[-1])
    with modes.get(how, torch.enable_grad)():
        result = functions(linear)[0](**tensors, target=target)
    (outputs,) = ran
    extra = [outputs[1], *outputs[6:]]
    assert extra == [None] * len(extra), "nothing saved, no argmax, no gradient allocated"
    assert result.argmax is None
    assert not any(values.requires_grad for values in result[:4])


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(autocast_dtype, weight_dtype, backend):
    """Operands in the autocast dtype, logits in float32, gradients in the tensors' own dtypes."""
    tensors, target = problem(True, 6, 50, bias=True)
    tensors["linear_weight"] = tensors["linear_weight"].to(weight_dtype)
    upstream = upstream_of(FIELDS, target)
    with torch.autocast("cpu", autocast_dtype):
        ours = run(sgp.linear_token_log_probs, tensors, target, upstream)
    rounded = {
        name: x if name == "linear_bias" else x.to(autocast_dtype).float()
        for name, x in tensors.items()
    }
    plain = run(sgp.reference.linear_token_log_probs, rounded, target, upstream)
    wide = {name: x.double() for name, x in rounded.items()}
    truth = run(sgp.reference.linear_token_log_probs, wide, target, upstream)
    for name in FIELDS:
        values = (getattr(r[0], name).detach() for r in (ours, plain, truth))
        assert_good(True, *values)
    for name, gradient in ours[1].items():
        assert gradient.dtype == tensors[name].dtype
        coarser = max(autocast_dtype, gradient.dtype, key=lambda d: torch.finfo(d).eps)
        pair = (gradient, plain[1][name].to(autocast_dtype).to(gradient.dtype))
        ours_error, error = (relative_error(x.flatten(), truth[1][name].flatten()) for x in pair)
        assert ours_error <= bound(error, coarser, interpreted=backend == "triton", roundings=2), (
            name
        )


def test_autocast_logits(backend):
    head, hidden = torch.randn(9, 5, requires_grad=True), torch.randn(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(hidden, head)
        result = sgp.token_log_probs(logits, torch.tensor([0, IGNORE, 8]))
    truth = sgp.reference.token_log_probs(logits.double(), torch.tensor([0, IGNORE, 8]))
    for name in FIELDS:
        assert relative_error(getattr(result, name), getattr(truth, name)) < 1e-6
    result.entropy.sum().backward()
    assert head.grad.dtype == torch.float32
    assert head.grad.isfinite().all()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wanted", [False, True], ids=["evaluation", "training"])
def test_the_callers_tensors_are_untouched(wanted, dtype, linear, backend):
    tensors, target = problem(linear, 4, 9, dtype, bias=True)
    upstream = upstream_of(FIELDS, target)
    given = {**tensors, "target": target, **{f"upstream {k}": v for k, v in upstream.items()}}
    for x in tensors.values():
        x.requires_grad_(wanted)
    before = {name: (x.detach().clone(), x._version) for name, x in given.items()}
    result = functions(linear)[0](**tensors, target=target, **OPTIONS["all"])
    if wanted:
        torch.autograd.backward([getattr(result, name) for name in FIELDS], list(upstream.values()))
    for name, x in given.items():
        assert torch.equal(bits(x), bits(before[name][0])), f"{name} was overwritten"
        assert x._version == before[name][1], f"{name}'s version counter moved"


@BOTH
def test_changed_logits_are_noticed(linear, backend):
    tensors, target = problem(linear, 4, 9)
    hidden = tensors["input"].requires_grad_() * 1
    result = functions(linear)[0](**{**tensors, "input": hidden}, target=target)
    with torch.no_grad():
        hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.entropy.sum().backward()


# -- bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("V", [1, 1_000, 8_192, 8_193, 20_011])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kept", [0, 1, 4], ids=["f=0", "f=1/4", "f=1"])
def test_one_read_of_the_kept_logits(kept, dtype, V, monkeypatch):
    """Forward: f N V elements. Backward: the same once more, and every gradient once."""
    monkeypatch.setenv("SGP_BACKEND", "triton")
    N = 4
    logits = torch.randn(N, V).to(dtype).requires_grad_()
    target = torch.full((N,), IGNORE)
    target[:kept] = torch.arange(kept) % V
    unit = V * dtype.itemsize
    with watch_accesses(distinct=True) as seen:
        result = sgp.token_log_probs(logits, target)
    once = kept * (unit + dtype.itemsize)  # a row, and beside it the target's own logit
    assert seen.of(logits).loaded == once
    assert seen.rows_loaded(logits) == list(range(kept)), "context rows are not read"
    assert not seen.of(logits).stored
    assert seen.launches == 1
    with watch_accesses(distinct=True) as seen:
        (result.log_prob + result.entropy + result.lse).sum().backward()
    x, g = seen.of(logits), seen.of(logits.grad)
    assert x.loaded == once
    assert (g.loaded, g.stored) == (0, N * unit + kept * dtype.itemsize)
    others = sum(r.loaded + r.stored for r in seen.regions.values() if r not in (x, g))
    assert others <= 64 * N, "what is not logits is a few numbers a row"
    assert seen.launches == 1


def test_no_pytorch_operator_computes_over_n_times_v(monkeypatch):
    """A clone, zeros or `.float()` would show here; the kernels themselves are left out."""
    monkeypatch.setenv("SGP_BACKEND", "triton")
    monkeypatch.setattr(by_triton.launch.Call, "launch", lambda _: None)
    N, V = 64, 1_000
    logits, target = torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))
    with torch.profiler.profile(record_shapes=True) as profile:
        result = sgp.token_log_probs(logits, target)
        sums = result.log_prob.sum() + result.entropy.sum() + result.lse.sum()
        torch.autograd.grad(sums, logits)
    large = {
        event.name
        for event in profile.events()
        if any(shape and torch.Size(shape).numel() >= N * V for shape in event.input_shapes)
    }
    harmless = ("movedim", "permute", "as_strided", "detach", "slice", "view", "alias", "view_as")
    harmless += ("new_empty", "empty", "empty_like")
    ours = {"sgp::row_forward", "sgp::row_backward", "RowStatistics", "RowStatisticsBackward"}
    ours |= {f"aten::{name}" for name in harmless} | {"detach", "PermuteBackward0"}
    assert "sgp::row_forward" in large, "the profiler saw nothing"
    computing = {name for name in large - ours if "autograd::" not in name}
    assert not computing, f"operators over N x V: {sorted(computing)}"


# -- errors ----------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, NAN, INF, -INF])
def test_temperature_out_of_range(temperature, linear):
    tensors, target = problem(linear, 2, 5)
    for function in functions(linear):
        with pytest.raises(ValueError, match=r"temperature = .*expected a number above 0"):
            function(**tensors, target=target, temperature=temperature)


@BOTH
@pytest.mark.parametrize("temperature", ["1", None, True, torch.tensor(1.0), 1j], ids=repr)
def test_temperature_is_a_number(temperature, linear):
    tensors, target = problem(linear, 2, 5)
    with pytest.raises(TypeError, match=rf"sgp\.{LINEAR[linear]}: temperature = .*a number"):
        functions(linear)[0](**tensors, target=target, temperature=temperature)


@BOTH
def test_float_targets_raise(linear):
    tensors, _ = problem(linear, 2, 5)
    for shape in ((2, 5), (2,)):
        with pytest.raises((TypeError, ValueError), match=rf"sgp\.{LINEAR[linear]}: .*target"):
            functions(linear)[0](**tensors, target=torch.rand(shape))
    with pytest.raises(TypeError, match="target is a list"):
        functions(linear)[0](**tensors, target=[1, 2])


@BOTH
@pytest.mark.parametrize("bad", [-1, 9, 2**40])
@pytest.mark.parametrize("wanted", [False, True], ids=["evaluation", "training"])
def test_target_out_of_range_raises(wanted, bad, linear, backend):
    tensors, target = problem(linear, 3, 9)
    target[2] = bad
    for x in tensors.values():
        x.requires_grad_(wanted)
    with pytest.raises(IndexError, match=rf"target\[2\] = {bad} is outside \[0, 9\)"):
        functions(linear)[0](**tensors, target=target)


@BOTH
@pytest.mark.parametrize("bad", [-1, 9, 2**32 + 1])
def test_target_out_of_range_is_nan_where_a_check_would_wait(bad, linear, backend, monkeypatch):
    """As on a GPU: never a silent number; other rows are untouched."""
    monkeypatch.setattr("sgp.rows.problem.may_wait", lambda _: False)
    tensors, target = problem(linear, 3, 9)
    target[2] = bad
    upstream = {"log_prob": torch.ones(3)}
    result, grads = run(functions(linear)[0], tensors, target, upstream)
    assert result.log_prob.isnan().tolist() == [False, False, True]
    assert not result.is_top1[2]
    assert grads["input"][2].isnan().all()
    assert grads["input"][0].isfinite().all()
    assert not bits(grads["input"][1]).any()


SHAPES = {
    "too few targets": (False, {"input": (3, 5)}, (2,), {}),
    "classes last": (False, {"input": (2, 3, 5)}, (2, 3), {}),
    "no classes": (False, {"input": (3, 0)}, (3,), {}),
    "too many targets": (True, {"input": (3, 4), "linear_weight": (5, 4)}, (4,), {}),
    "another width": (True, {"input": (3, 4), "linear_weight": (5, 3)}, (3,), {}),
    "a vector": (True, {"input": (3, 4), "linear_weight": (4,)}, (3,), {}),
    "another bias": (
        True, {"input": (3, 4), "linear_weight": (5, 4), "linear_bias": (4,)}, (3,), {},
    ),
    "shift of flat labels": (
        True, {"input": (3, 2, 4), "linear_weight": (5, 4)}, (6,), {"shift": True},
    ),
    "no rows a chunk": (True, {"input": (3, 4), "linear_weight": (5, 4)}, (3,), {"chunk_rows": 0}),
    "a matrix a class": (True, {"input": (3, 4), "linear_weight": (5, 2, 4)}, (3,), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES)
def test_shapes_that_do_not_fit(case):
    linear, shapes, target_shape, options = SHAPES[case]
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    target = torch.zeros(target_shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"sgp\.{LINEAR[linear]}: "):
        functions(linear)[0](**tensors, target=target, **options)


@BOTH
def test_selection_beside_what_it_has_decided(linear):
    tensors, target = problem(linear, 4, 5)
    selection = sgp.Selection.from_labels(target)
    with pytest.raises(ValueError, match="together with a Selection"):
        functions(linear)[0](**tensors, target=selection, ignore_index=0)
    if linear:
        with pytest.raises(ValueError, match="shift=True together with a Selection"):
            sgp.linear_token_log_probs(**tensors, target=selection, shift=True)
    tensors["input"] = tensors["input"][:3]
    with pytest.raises(ValueError, match=r"flatten to N = 4"):
        functions(linear)[0](**tensors, target=selection)


@pytest.mark.parametrize("logit_scale", [1.0, 0.5])
@pytest.mark.parametrize("softcap", [7.0, 15.0, 30.0])
def test_a_softcap_moves_no_logits_one_way(softcap, logit_scale, monkeypatch):
    """lse of one class is its score; errors of a division have no common sign."""
    monkeypatch.setenv("SGP_BACKEND", "torch")
    logits = torch.linspace(1.0, 9.0, 4_001)[:, None]
    target = torch.zeros(len(logits), dtype=torch.int64)
    found = sgp.token_log_probs(logits, target, softcap=softcap, logit_scale=logit_scale).lse
    scaled = logits[:, 0].double() * logit_scale
    true = softcap * torch.tanh(scaled / softcap)
    common = float(((found.double() - true) / true).mean())
    assert abs(common) < 1.5e-8, f"{common:.1e} of every logit; a rounding is 6e-8"


@pytest.mark.parametrize("temperature", [0.05, 1.0, 1000.0])
def test_float16_head_at_any_temperature(temperature, backend):
    """A low temperature makes large gradients, which are brought into float16's range."""
    check(True, *half_head(), ("log_prob",), temperature=temperature)


@pytest.mark.parametrize("field", ["entropy", "lse"])
@pytest.mark.parametrize("beside", [0.0, 1e-6], ids=["alone", "beside a small one"])
def test_float16_gradients_of_one_statistic(field, beside, backend):
    """The largest of a row's upstream gradients decides, whichever statistic it is of."""
    tensors, target = half_head()
    upstream = {"log_prob": torch.full((6,), beside), field: torch.ones(6)}
    ours, reference = functions(True)
    exact = {name: x.double() for name, x in tensors.items()}
    _, truth = run(reference, exact, target, upstream)
    _, found = run(ours, tensors, target, upstream)
    for name, value in found.items():
        error = relative_error(value.flatten(), truth[name].flatten())
        assert error < 1e-3, f"{name}: {error:.3g}"


def half_head():
    """float16 hidden states and a head of 40 classes, and a target for each row."""
    tensors = {"input": torch.randn(6, 8).half(), "linear_weight": torch.randn(40, 8).half()}
    return tensors, torch.arange(6)
